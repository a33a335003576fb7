"""scikit-learn's MLPClassifier, and ours in its place: what is asked of both, with the same settings.

Every job ends in an accuracy, which has to be the other's within `TOLERANCE`; both draw the same weights, and shuffle
alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu import datasets as library_datasets
from bench import datasets

__all__ = ["JOBS", "TOLERANCE", "Job"]

TOLERANCE = 0.02
"""Between accuracies on held-out rows: a few hundred of them in the small sets, and roundings that grow in training."""

Array = npt.NDArray[Any]
NEVER = 2**31 - 1
BATCH = 200
"""Rows of a mini-batch in both."""


@dataclass(frozen=True)
class Job:
    """A call of an estimator's, on a data set."""

    name: str
    data: str
    settings: Mapping[str, Any]
    do: Callable[[Any, Job], float]
    """Makes the call `repeats` times with an estimator of a class; returns an accuracy."""
    repeats: int = 1
    rows: int = 0
    """For `predict`."""
    processes: bool = False
    """Whether it starts others, whose processor time is not its own."""
    fitted: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def missing(self) -> str | None:
        """Why the data set is not at hand, or None."""
        return datasets.missing(self.data)

    def warm_up(self) -> Job:
        """What to do once beforehand: the same, but to fit for one epoch only."""
        return self if self.rows else replace(self, settings={**self.settings, "max_iter": 1})

    def estimator(self, kind: type, **settings: Any) -> Any:
        """A new one; as many epochs as it says, whatever the loss does."""
        return kind(n_iter_no_change=NEVER, random_state=0, **{**self.settings, **settings})


N_WORDS, N_TOPIC_WORDS, TOPICS = 10_000, 200, 4
"""Different words, of them those of each topic, and topics, of the texts below."""


def _texts(n_rows: int = 5000, length: int = 100) -> tuple[Any, Array]:
    """Counts of words, (n_rows, N_WORDS), in rows of length 1, as a CSR matrix in float64; and the topic of each text.

    Drawn: a fifth of a text's words are its topic's, the others come by Zipf's law, the k-th word 1/k as often as the
    first.
    """
    from scipy.sparse import csr_matrix
    from sklearn.preprocessing import normalize

    rng = np.random.default_rng(0)
    topic = rng.integers(0, TOPICS, n_rows)
    frequency = 1 / np.arange(1, N_WORDS + 1)
    common = rng.choice(N_WORDS, (n_rows, length - length // 5), p=frequency / frequency.sum())
    own = N_WORDS // 2 + N_TOPIC_WORDS * topic[:, None] + rng.integers(0, N_TOPIC_WORDS, (n_rows, length // 5))
    words = np.concatenate([common, own], axis=1)
    rows = np.repeat(np.arange(n_rows), length)
    counts = csr_matrix((np.ones(words.size), (rows, words.ravel())), (n_rows, N_WORDS))
    return normalize(counts), topic


@cache
def _split(name: str) -> tuple[Any, Array, Any, Array]:
    """X, y, and those held out; X between 0 and 1, in float64 but for MNIST."""
    if name == "mnist":
        return datasets.FITS["mnist"].data()
    if name == "texts":
        X, y = _texts()
        return X[:4000], y[:4000], X[4000:], y[4000:]
    found = library_datasets.hold_out(library_datasets.load(name), 0.25, seed=0)
    least, largest = found.X.min(axis=0), found.X.max(axis=0)
    X, X_test = (
        np.asarray((x - least) / np.where(largest > least, largest - least, 1)) for x in (found.X, found.X_test)
    )
    return X.astype(np.float64), found.y, X_test.astype(np.float64), found.y_test


def _fit_quietly(estimator: Any, X: Array, y: Array) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return estimator.fit(X, y)


def _fit(kind: type, job: Job) -> float:
    X, y, X_test, y_test = _split(job.data)
    for _ in range(job.repeats):
        estimator = _fit_quietly(job.estimator(kind), X, y)
    return float(estimator.score(X_test, y_test))


def _stream(kind: type, job: Job) -> float:
    X, y, X_test, y_test = _split(job.data)
    estimator, classes = job.estimator(kind), np.unique(y)
    for i in range(job.repeats):
        start = i * BATCH % (len(X) - BATCH)
        estimator.partial_fit(X[start : start + BATCH], y[start : start + BATCH], classes=classes)
    return float(estimator.score(X_test, y_test))


def _predict(kind: type, job: Job) -> float:
    X, y, X_test, y_test = _split(job.data)
    some = np.arange(job.rows) % X_test.shape[0]
    if kind not in job.fitted:
        job.fitted[kind] = _fit_quietly(job.estimator(kind), X, y), X_test[some]
    estimator, rows = job.fitted[kind]
    for _ in range(job.repeats):
        labels = estimator.predict(rows)
    return float(np.mean(labels == y_test[some]))


def _search(kind: type, job: Job) -> float:
    from sklearn.model_selection import GridSearchCV

    grid = {"hidden_layer_sizes": [(50,), (100,)], "alpha": [1e-4, 1e-2, 1.0], "learning_rate_init": [1e-3, 1e-2]}
    X, y, X_test, y_test = _split(job.data)
    search = GridSearchCV(job.estimator(kind), grid, n_jobs=2, cv=3)
    return float(_fit_quietly(search, X, y).score(X_test, y_test))


JOBS = {
    job.name: job
    for job in (
        Job("fit, breast_cancer", "breast_cancer", {"hidden_layer_sizes": (100,), "max_iter": 200}, _fit),
        Job("fit, digits", "digits", {"hidden_layer_sizes": (100,), "max_iter": 100}, _fit),
        Job("fit, mnist", "mnist", {"hidden_layer_sizes": (256, 128), "max_iter": 3}, _fit),
        Job("fit, sparse texts", "texts", {"hidden_layer_sizes": (100,), "max_iter": 3}, _fit),
        Job("partial_fit, 200 rows", "digits", {"hidden_layer_sizes": (100,)}, _stream, 200),
        *(
            Job(f"predict, {rows:,} row{'s' * (rows > 1)}", "digits", {"max_iter": 10}, _predict, repeats, rows)
            for rows, repeats in ((1, 500), (100, 300), (100_000, 2))
        ),
        Job("predict, 1,000 sparse texts", "texts", {"max_iter": 3}, _predict, 30, 1000),
        Job("GridSearchCV, digits", "digits", {"max_iter": 30}, _search, processes=True),
    )
}
"""By name. Defaults of both are the same: Adam, relu, mini-batches of 200 rows, a penalty of 1e-4."""
