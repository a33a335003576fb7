"""scikit-learn's MLPClassifier, through `fit`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from bench.cases import LEARNING_RATE, Case
from bench.contenders.contract import Contender, Parameters, Unsupported, Variants, Work
from bench.datasets import Fit

__all__ = ["ScikitLearn"]

NEVER = 2**31 - 1
ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "logistic", "identity": "identity"}


class ScikitLearn(Contender):
    """Whole passes of `fit`, started warm from the initial weights; of its time, that of the loop over mini-batches."""

    label = "scikit-learn"
    packages = ("sklearn",)

    def set_up(self, threads: int) -> None:
        """Import it."""
        _classifier_class()

    def training(self, case: Case) -> Variants:
        """`fit`, a number of epochs."""
        return {"": partial(_Steps, case)}

    def prediction(self, case: Case) -> Variants:
        """`predict`."""
        return {"": partial(_Prediction, case)}

    def classifier(self) -> type:
        """scikit-learn's."""
        from sklearn.neural_network import MLPClassifier

        found: type = MLPClassifier
        return found

    def fit(self, fit: Fit, epochs: int, seed: int) -> Iterator[tuple[float, Parameters]]:
        """`fit` as a user calls it, shuffling, from weights of its own."""
        X, y, _, _ = fit.data()
        classifier = _classifier(fit.case, max_iter=epochs, shuffle=True, random_state=seed)
        start = time.perf_counter()
        _fit(classifier, X, y)
        yield from ((moment - start - noting, parameters) for moment, noting, parameters in classifier.curve)


@cache
def _classifier_class() -> type:
    from sklearn.neural_network import MLPClassifier

    class Classifier(MLPClassifier):
        """Tells how long its loop took, without the checks of the data before it, and where each epoch left it."""

        keep_curve = False
        loop_seconds = 0.0

        def _fit_stochastic(self, *arguments: Any, **keywords: Any) -> None:
            start, self.curve, self.noting = time.perf_counter(), [], 0.0
            super()._fit_stochastic(*arguments, **keywords)
            self.loop_seconds = time.perf_counter() - start

        def _update_no_improvement_count(self, *arguments: Any) -> None:
            """Comes at the end of each epoch."""
            super()._update_no_improvement_count(*arguments)
            if self.keep_curve:
                now = time.perf_counter()
                parameters = [w.copy() for w in self.coefs_], [b.copy() for b in self.intercepts_]
                self.curve.append((now, self.noting, parameters))
                self.noting += time.perf_counter() - now

    return Classifier


def _classifier(case: Case, **settings: Any) -> Any:
    if case.activation not in ACTIVATIONS:
        raise Unsupported(f"has no {case.activation}")
    classifier = _classifier_class()(
        case.layer_sizes[1:-1],
        activation=ACTIVATIONS[case.activation],
        alpha=0.0,
        batch_size=case.batch_size,
        learning_rate_init=LEARNING_RATE,
        n_iter_no_change=NEVER,
        **settings,
    )
    classifier.keep_curve = "random_state" in settings
    return classifier


def _fit(classifier: Any, X: Any, y: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        classifier.fit(X, y)


class _Steps(Work):
    def __init__(self, case: Case) -> None:
        X, y = case.batches()
        self.start, self.n_batches = case.initial(), case.n_batches
        self.X = X.reshape(-1, case.layer_sizes[0])
        # Rows of 0 and 1: from labels, two classes would become one sigmoid output, which is less work.
        self.y = np.eye(case.layer_sizes[-1], dtype=np.int64)[y.ravel()]
        self.classifier = _classifier(case, shuffle=False, warm_start=True, max_iter=1)
        _fit(self.classifier, self.X, self.y)
        self.classifier.out_activation_ = "softmax"

    def reset(self) -> None:
        """The initial weights; `fit` begins with a new Adam each time."""
        W, b = self.start
        self.classifier.coefs_, self.classifier.intercepts_ = [w.copy() for w in W], [x.copy() for x in b]
        self.classifier.loss_curve_, self.classifier.best_loss_ = [], np.inf

    def run(self, n: int) -> float:
        """n steps, whole passes only; the seconds of its loop."""
        self.classifier.max_iter = n // self.n_batches
        _fit(self.classifier, self.X, self.y)
        return self.classifier.loop_seconds

    def result(self) -> Parameters:
        """W and b."""
        return self.classifier.coefs_, self.classifier.intercepts_


class _Prediction(Work):
    def __init__(self, case: Case) -> None:
        few = _Steps(Case(case.layer_sizes, 8, case.activation))
        few.reset()
        self.classifier, self.X = few.classifier, case.data()[0]

    def run(self, n: int) -> None:
        """n times the probabilities of all rows, and the largest."""
        for _ in range(n):
            self.labels = self.classifier.predict_proba(self.X).argmax(axis=1)

    def result(self) -> Any:
        """The labels."""
        return self.labels
