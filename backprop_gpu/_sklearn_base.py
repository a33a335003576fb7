"""What MLPClassifier and MLPRegressor share: scikit-learn's estimator around a network of this library.

`coefs_` and `intercepts_` are the model, as in scikit-learn: a network is made of them where there is none yet, where
they were assigned anew, and after unpickling. On a backend that computes in NumPy arrays they are views into the
network's flat vector; on others read-only copies, made when a fit ends.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from numbers import Integral, Real
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.optimize import _check_optimize_result
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from backprop_gpu import training
from backprop_gpu._sklearn_solvers import (
    STOCHASTIC_SOLVERS,
    Epochs,
    Problem,
    Solver,
    is_stochastic,
    minimize_lbfgs,
    optimizer_for,
    with_clipping,
)
from backprop_gpu.activations import ACTIVATIONS, Activation
from backprop_gpu.backends.contract import Trainer
from backprop_gpu.data import DenseRows, Rows, SparseRows
from backprop_gpu.history import History
from backprop_gpu.losses import Loss
from backprop_gpu.mlp import MLP
from backprop_gpu.optimizers import Optimizer
from backprop_gpu.progress import ProgressBar, interrupt_noted
from backprop_gpu.schedules import Schedule

__all__ = ["BaseMLP"]

Array = npt.NDArray[Any]

LIBRARY_NAMES = {"logistic": "sigmoid"}
"""What scikit-learn calls an activation: what the library does. All others have one name."""

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
"""What `validate_data` returns as it is: the dtypes of this machine's byte order."""

ROWS_AT_ONCE = 1 << 20
"""Rows of an epoch, or of several, whose order is drawn ahead: 8 MB."""

SKLEARN_NAMES = {name: sklearn_name for sklearn_name, name in LIBRARY_NAMES.items()}


@dataclass(frozen=True)
class _Fitted:
    """A network, and what it was made of or left behind: it is the model's for as long as those are."""

    net: MLP
    arrays: tuple[Array, ...]
    settings: tuple[Any, ...]

    def belongs_to(self, estimator: BaseMLP) -> bool:
        arrays = [*estimator.coefs_, *estimator.intercepts_]
        same = len(arrays) == len(self.arrays) and all(a is b for a, b in zip(arrays, self.arrays, strict=True))
        return same and self.settings == estimator._network_settings()


@dataclass(frozen=True)
class _Validation:
    """Rows to score after each epoch."""

    rows: Rows
    y: Any
    sample_weight: Array | None


class BaseMLP(BaseEstimator):  # type: ignore[misc]
    """The estimator that both classes are; use those."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions({"logistic", *ACTIVATIONS}), Activation, list, tuple],
        "solver": [StrOptions({"lbfgs", *STOCHASTIC_SOLVERS}), Optimizer],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate": [StrOptions({"constant", "invscaling", "adaptive"}), Schedule],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "power_t": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="both")],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "beta_1": [Interval(Real, 0, 1, closed="left")],
        "beta_2": [Interval(Real, 0, 1, closed="left")],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), Options(Real, {np.inf})],
        "max_fun": [Interval(Integral, 1, None, closed="left")],
        "backend": [str],
        "dtype": "no_validation",  # the library says which there are, in a ValueError
        "dropout": [Interval(Real, 0, 1, closed="left"), list, tuple],
        "clip_norm": [None, Interval(Real, 0, None, closed="neither")],
        "callbacks": [None, list, tuple],
        "progress_bar": ["boolean", None],
    }

    # The constructor's arguments that both classes have

    hidden_layer_sizes: Any
    activation: Any
    solver: Any
    alpha: float
    batch_size: Any
    learning_rate: Any
    learning_rate_init: float
    power_t: float
    max_iter: int
    loss: Any
    shuffle: bool
    random_state: Any
    tol: float
    verbose: Any
    warm_start: bool
    momentum: float
    nesterovs_momentum: bool
    early_stopping: bool
    validation_fraction: float
    beta_1: float
    beta_2: float
    epsilon: float
    n_iter_no_change: float
    max_fun: int
    backend: str
    dtype: Any
    dropout: Any
    clip_norm: float | None
    callbacks: Any
    progress_bar: bool | None

    # What a fit leaves behind

    coefs_: list[Array]
    intercepts_: list[Array]
    n_iter_: int
    t_: int
    n_outputs_: int
    n_layers_: int
    out_activation_: str
    loss_: float
    loss_curve_: list[float]
    best_loss_: float | None
    validation_scores_: list[float] | None
    best_validation_score_: float | None

    def _store(self, arguments: dict[str, Any]) -> None:
        """The constructor's arguments, as they are: scikit-learn checks them when it fits."""
        self.__dict__.update({name: value for name, value in arguments.items() if name != "self"})

    # What the two classes differ in

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Array]:
        """X and y checked, y as scikit-learn's MLP encodes it: (N, outputs)."""
        raise NotImplementedError

    def _out_activation(self) -> str:
        """The output layer's activation, by scikit-learn's name."""
        raise NotImplementedError

    def _n_outputs(self, y: Array) -> int:
        return int(y.shape[1])

    def _library_loss(self) -> Loss:
        """The loss that goes with `out_activation_`."""
        raise NotImplementedError

    def _target(self, y: Array, net: MLP) -> Array:
        """The encoded y as the operations' target."""
        raise NotImplementedError

    def _training_weight(self, y: Array, sample_weight: Array | None, incremental: bool) -> Array | None:
        """The rows' weights in the cost."""
        return sample_weight

    def _stratify(self, y: Array) -> Array | None:
        """What the held-out rows are drawn evenly by."""
        return None

    def _decode(self, outputs: Array) -> Array:
        """Predictions from the output layer's activations."""
        raise NotImplementedError

    def _original(self, y: Array) -> Array:
        """The encoded y as the user's."""
        return y

    def _score_of(self, y: Array, predicted: Array, sample_weight: Array | None) -> float:
        raise NotImplementedError

    # Fitting

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation_data: Sequence[Any] | None = None) -> Any:
        """Fit the model to rows X and their targets y.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
            The rows. A sparse matrix is never held dense as a whole.

        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            The targets: class labels in classification, values in regression.

        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, at least 0.

        validation_data : (X, y) or (X, y, sample_weight), default=None
            Rows to score after each epoch, into `validation_scores_`; with `early_stopping`, in place of rows held
            out of X. Not for 'lbfgs'.

        Returns
        -------
        self : object
            The trained estimator.
        """
        return self._fit(X, y, sample_weight, incremental=False, validation_data=validation_data)

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        *,
        incremental: bool,
        validation_data: Sequence[Any] | None = None,
    ) -> Any:
        hidden = self._hidden_layer_sizes()
        stochastic = is_stochastic(self.solver)
        if validation_data is not None and not stochastic:
            raise ValueError("validation_data is scored after each epoch, and solver='lbfgs' has none")
        first_pass = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y = self._validate_input(X, y, incremental, reset=first_pass)
        sample_weight = _weights(sample_weight, X)
        random_state = check_random_state(self.random_state)
        self.n_outputs_ = self._n_outputs(y)
        if first_pass:
            self._initialize([X.shape[1], *hidden, self.n_outputs_], X.dtype, random_state)
        net = self._network()
        problem = self._problem(net, X, y, self._training_weight(y, sample_weight, incremental))
        if stochastic:
            train, validation = self._split(net, X, y, sample_weight, random_state, incremental, validation_data)
            self._start_curves(first_pass, validation is not None, net)
            trainer = self._fit_stochastic(problem, train, validation, random_state, incremental)
        else:
            self._fit_lbfgs(problem)
        self._publish(net)
        if not all(np.isfinite(w).all() for w in chain(self.coefs_, self.intercepts_)):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large values and need to be"
                " preprocessed."
            )
        if incremental and trainer.rest():
            self._optimizer.trainer = trainer
        return self

    def _hidden_layer_sizes(self) -> list[int]:
        sizes = self.hidden_layer_sizes
        sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if any(size <= 0 for size in sizes):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return sizes

    def _problem(self, net: MLP, X: Any, y: Array, weight: Array | None) -> Problem:
        dtype = net._array_dtype
        if weight is not None and not weight.any():
            raise ValueError("every row has weight 0, so there is nothing to learn from")
        return Problem(
            net,
            _rows(X, dtype),
            self._target(y, net),
            None if weight is None else np.ascontiguousarray(weight, dtype),
            float(self.alpha),
        )

    def _initialize(self, layer_sizes: list[int], dtype: Any, random_state: Any) -> None:
        """A fresh model, its weights drawn as scikit-learn draws them: after Glorot & Bengio, the biases too."""
        self.n_iter_ = self.t_ = 0
        self.n_layers_ = len(layer_sizes)
        self.out_activation_ = self._out_activation()
        dtype = dtype if self.dtype is None else np.float64
        self.coefs_, self.intercepts_ = [], []
        activations = self._activations(self.n_layers_ - 2)
        # scikit-learn draws every layer by the hidden layers' activation, so the output layer goes by the last one's.
        by_layer = [*activations, activations[-1] if activations else _library_name(self.activation)]
        for (n_in, n_out), activation in zip(pairwise(layer_sizes), by_layer, strict=True):
            bound = np.sqrt((2.0 if activation == "sigmoid" else 6.0) / (n_in + n_out))
            self.coefs_.append(random_state.uniform(-bound, bound, (n_in, n_out)).astype(dtype, copy=False))
            self.intercepts_.append(random_state.uniform(-bound, bound, n_out).astype(dtype, copy=False))
        # Only dropout draws a seed, so that without it random_state goes on as scikit-learn's does.
        self._seed = int(random_state.randint(2**31 - 1)) if np.any(self.dropout) else 0
        self._updates = 0

    def _activations(self, n_hidden: int) -> list[str]:
        """The library's name for each hidden layer's activation."""
        given = self.activation
        names = list(given) if isinstance(given, list | tuple) else [given] * n_hidden
        if len(names) != n_hidden:
            raise ValueError(f"activation has {len(names)} entries for {n_hidden} hidden layers")
        return [_library_name(name) for name in names]

    # The network

    def _network(self) -> MLP:
        """The network whose parameters are `coefs_` and `intercepts_`."""
        fitted: _Fitted | None = self.__dict__.get("_fitted")
        if fitted is not None and fitted.belongs_to(self):
            return fitted.net
        net = self._new_network()
        self._publish(net)
        return net

    def _new_network(self) -> MLP:
        net = MLP(
            [self.coefs_[0].shape[0], *(W.shape[1] for W in self.coefs_)],
            self._activations(len(self.coefs_) - 1),
            self._library_loss(),
            output_activation=LIBRARY_NAMES.get(self.out_activation_, self.out_activation_),
            dropout=self.dropout,
            dtype=self.dtype if self.dtype is not None else self.coefs_[0].dtype.name,
            backend=self.backend,
            seed=self.__dict__.get("_seed", 0),
        )
        flat = np.concatenate([np.ravel(x) for x in chain(self.coefs_, self.intercepts_)])
        net.parameters[...] = net.ops.asarray(flat, net._array_dtype)
        return net

    def _network_settings(self) -> tuple[Any, ...]:
        """What a network is made of, besides its parameters."""
        return (self.activation, self.loss, self.out_activation_, self.dropout, self.dtype, self.backend)

    def _publish(self, net: MLP) -> None:
        """Make the network's parameters `coefs_` and `intercepts_`."""
        host = net.ops.to_numpy(net.parameters)
        if host is not net.parameters:
            host.flags.writeable = False  # a change to this copy would be lost: assign a new list instead
        W, b = net.architecture.views(host)
        self.coefs_, self.intercepts_ = list(W), list(b)
        self._fitted = _Fitted(net, (*W, *b), self._network_settings())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_fitted"}

    # L-BFGS

    def _fit_lbfgs(self, problem: Problem) -> None:
        result = minimize_lbfgs(problem, max_iter=self.max_iter, max_fun=self.max_fun, tol=self.tol)
        self.n_iter_ = _check_optimize_result("lbfgs", result, self.max_iter)
        self.loss_ = result.fun

    # Stochastic solvers

    def _split(
        self,
        net: MLP,
        X: Any,
        y: Array,
        sample_weight: Array | None,
        random_state: Any,
        incremental: bool,
        validation_data: Sequence[Any] | None,
    ) -> tuple[npt.NDArray[np.int64], _Validation | None]:
        """The rows to train on, by number, and those to score."""
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        everything = np.arange(len(y))
        if validation_data is not None:
            return everything, self._take_validation(net, validation_data)
        if not self.early_stopping:
            return everything, None
        train, held_out = train_test_split(
            everything, random_state=random_state, test_size=self.validation_fraction, stratify=self._stratify(y)
        )
        if len(held_out) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        rows = _rows(_safe_indexing(X, held_out), net._array_dtype)
        weight = None if sample_weight is None else sample_weight[held_out]
        return train, _Validation(rows, self._original(y[held_out]), weight)

    def _take_validation(self, net: MLP, validation_data: Sequence[Any]) -> _Validation:
        if not isinstance(validation_data, tuple | list) or len(validation_data) not in (2, 3):
            raise TypeError("validation_data must be (X, y) or (X, y, sample_weight)")
        X, y, *weight = validation_data
        X, y = validate_data(self, X, y, accept_sparse=["csr", "csc"], multi_output=True, reset=False)
        return _Validation(_rows(X, net._array_dtype), y, _weights(weight[0], X) if weight else None)

    def _start_curves(self, first_pass: bool, validated: bool, net: MLP) -> None:
        """A warm start and `partial_fit` go on with the curves that there are."""
        if first_pass or not hasattr(self, "loss_curve_"):
            self.loss_curve_, self._no_improvement_count = [], 0
            self.validation_scores_ = None
            self.best_loss_ = math.inf
        if validated and self.validation_scores_ is None:
            self.validation_scores_, self.best_validation_score_ = [], -math.inf
            self._best_parameters = _parameters(net)
        elif not validated:
            self.validation_scores_ = self.best_validation_score_ = None
        if self.early_stopping:
            self.best_loss_ = None
        elif self.best_loss_ is None:
            self.best_loss_ = math.inf

    def _new_solver(self, n_steps: int | None) -> Solver:
        """The solver of a run of so many updates; of unknown length, if None."""
        named = isinstance(self.solver, str)
        optimizer = optimizer_for(self.solver, self) if named else self.solver
        scheduled = isinstance(self.learning_rate, Schedule)
        if scheduled and not named:
            raise ValueError("learning_rate is a schedule, but the solver is an Optimizer, which has one of its own")
        schedule = None if named else optimizer.schedule
        schedule = self.learning_rate if scheduled else schedule
        return Solver(
            with_clipping(optimizer, self.clip_norm),
            None if schedule is None else schedule.for_run(n_steps),
            self.learning_rate if self.solver == "sgd" and not scheduled else "constant",
            self.learning_rate_init,
            self.power_t,
            self.__dict__.get("_updates", 0),
        )

    def _batch_size(self, n_train: int) -> int:
        if self.batch_size == "auto":
            return min(200, n_train)
        if self.batch_size > n_train:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=6
            )
        return int(min(self.batch_size, n_train))

    def _fit_stochastic(
        self,
        problem: Problem,
        train: npt.NDArray[np.int64],
        validation: _Validation | None,
        random_state: Any,
        incremental: bool,
    ) -> Trainer:
        batch_size = self._batch_size(len(train))
        if not incremental or not hasattr(self, "_optimizer"):
            n_steps = None if incremental else self.max_iter * -(-len(train) // batch_size)
            self._optimizer = self._new_solver(n_steps)
        epochs = Epochs(problem, self._optimizer, batch_size, incremental)
        self._optimizer.trainer = None  # a failure may leave NaN in its memory
        try:
            self._run(epochs, train, validation, random_state, incremental)
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=5)
        self._updates = self._optimizer.steps_before + self._optimizer.step
        if self.early_stopping:
            problem.net.parameters[...] = problem.net.ops.asarray(self._best_parameters, problem.net._array_dtype)
        return epochs.trainer

    def _run(
        self,
        epochs: Epochs,
        order: npt.NDArray[np.int64],
        validation: _Validation | None,
        random_state: Any,
        incremental: bool,
    ) -> None:
        """Epoch after epoch, until there is a reason to stop."""
        self.n_iter_ = 0
        max_iter = 1 if incremental else self.max_iter
        with interrupt_noted() as interrupted, self._progress(len(order), max_iter) as progress:

            def after_step(n_rows: int) -> bool:
                progress.update(n_rows)
                return not interrupted.is_set()

            while self.n_iter_ < max_iter:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                n_epochs = self._epochs_at_once(len(order), max_iter, validation is not None)
                orders = self._orders(order, n_epochs, random_state)
                with training._reported_as_divergence():
                    losses = epochs.run(orders, self.t_, after_step)
                for loss in losses:
                    self._epoch_ends(loss, len(order), epochs.problem.net, validation)
                    progress.epoch_ends(loss)
                if len(losses) < n_epochs:
                    raise KeyboardInterrupt
                if self._called_off(epochs.problem.net) or self._stagnates():
                    return
                order = orders[-1]
        if not incremental:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't "
                "converged yet.",
                ConvergenceWarning,
                stacklevel=6,  # of the caller of `fit`
            )

    def _epochs_at_once(self, n_rows: int, max_iter: int, validated: bool) -> int:
        """How many epochs can pass before anyone looks: only the last of them can be the one after which to stop."""
        if validated or self.callbacks or self.verbose or self.progress_bar is not False:
            return 1
        until_stagnation = self.n_iter_no_change + 1 - self._no_improvement_count
        return int(max(1, min(max_iter - self.n_iter_, until_stagnation, ROWS_AT_ONCE // n_rows)))

    def _orders(self, order: npt.NDArray[np.int64], n_epochs: int, random_state: Any) -> npt.NDArray[np.int64]:
        """The order of the rows in each of the next epochs, (n_epochs, n_rows): each shuffles the last one's."""
        orders = np.empty((n_epochs, len(order)), np.int64)
        for i in range(n_epochs):
            order = orders[i] = order[random_state.permutation(len(order))] if self.shuffle else order
        return orders

    def _epoch_ends(self, loss: float, n_rows: int, net: MLP, validation: _Validation | None) -> None:
        self.n_iter_ += 1
        self.t_ += n_rows
        self.loss_ = loss
        self.loss_curve_.append(loss)
        if self.verbose:
            print(f"Iteration {self.n_iter_}, loss = {loss:.8f}")
        if validation is not None:
            self._score_validation(net, validation)
        if not self.early_stopping:
            self._note_loss(loss)
        self._optimizer.epoch_ends(self.t_)

    def _note_loss(self, loss: float) -> None:
        assert self.best_loss_ is not None, "_start_curves fills it in"
        self._no_improvement_count = self._no_improvement_count + 1 if loss > self.best_loss_ - self.tol else 0
        if loss < self.best_loss_:
            self.best_loss_ = loss

    def _score_validation(self, net: MLP, validation: _Validation) -> None:
        score = self._validation_score(net, validation)
        best = self.best_validation_score_
        assert self.validation_scores_ is not None
        assert best is not None, "_start_curves fills both in"
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        if self.early_stopping:
            self._no_improvement_count = self._no_improvement_count + 1 if score < best + self.tol else 0
        if score > best:
            self.best_validation_score_ = score
            if self.early_stopping:
                self._best_parameters = _parameters(net)

    def _validation_score(self, net: MLP, validation: _Validation) -> float:
        """The score, or NaN where the network has diverged."""
        predicted = self._decode(net._outputs(validation.rows))
        if predicted.dtype.kind == "f" and not np.isfinite(predicted).all():
            return math.nan
        return self._score_of(validation.y, predicted, validation.sample_weight)

    def _stagnates(self) -> bool:
        """Whether there was no improvement for so long that training stops; a rule may slow it down instead."""
        if self._no_improvement_count <= self.n_iter_no_change:
            return False
        consequence = self._optimizer.stagnates()
        if self.verbose:
            what = "Validation score" if self.early_stopping else "Training loss"
            print(
                f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs. "
                f"{consequence}"
            )
        if consequence.endswith("Stopping."):
            return True
        self._no_improvement_count = 0
        return False

    def _called_off(self, net: MLP) -> bool:
        """Whether a callback ends the training; every one of them is called."""
        if not self.callbacks:
            return False
        self._publish(net)
        answers = [callback(self) for callback in self.callbacks]
        return any(answer is True for answer in answers)

    @contextmanager
    def _progress(self, n_rows: int, epochs: int) -> Iterator[_NoProgress]:
        if self.progress_bar is False:
            yield _NoProgress()
            return
        history = History(rows=n_rows)
        with ProgressBar(epochs, history, self.progress_bar) as bar:
            yield _Progress(bar, history)

    # Predicting

    def _rows_to_predict(self, X: Any) -> tuple[MLP, Rows]:
        """The network, and X checked; an array that lies where the network computes stays there."""
        check_is_fitted(self)
        net = self._network()
        if net.ops.owns(X):
            return net, net._rows(X)
        if not self._nothing_to_validate(X):
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        return net, _rows(X, net._array_dtype)

    def _outputs(self, X: Any) -> Array:
        """The output layer's activations, on the host."""
        net, rows = self._rows_to_predict(X)
        return net._host_outputs(rows)

    def _on_host(self, y: Any) -> Any:
        """`y`, brought to the host if it lies where the network computes."""
        check_is_fitted(self)
        ops = self._network().ops
        return ops.to_numpy(y) if ops.owns(y) else y

    def _nothing_to_validate(self, X: Any) -> bool:
        """Whether `validate_data` would find nothing and return X as it is: it takes longer than one row's outputs."""
        if type(X) is not np.ndarray or X.ndim != 2 or X.dtype not in _FLOATS or len(X) == 0:
            return False
        if hasattr(self, "feature_names_in_") or X.shape[1] != getattr(self, "n_features_in_", None):
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(X.sum()))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _check_solver(self) -> bool:
        if not is_stochastic(self.solver):
            raise AttributeError(
                f"partial_fit is only available for stochastic optimizers. {self.solver} is not stochastic."
            )
        return True


class _NoProgress:
    """What an epoch tells of itself where nobody looks."""

    def update(self, n_rows: int) -> None: ...

    def epoch_ends(self, loss: float) -> None: ...


class _Progress(_NoProgress):
    def __init__(self, bar: ProgressBar, history: History) -> None:
        self.bar, self.history = bar, history
        self.started = perf_counter()

    def update(self, n_rows: int) -> None:
        self.bar.update(n_rows)

    def epoch_ends(self, loss: float) -> None:
        self.history.record({"loss": loss}, perf_counter() - self.started)
        self.bar.show(self.history)


def _library_name(activation: Any) -> Any:
    """The library's name for an activation; what is none stays for the library to refuse."""
    if isinstance(activation, Activation):
        return activation.name
    return LIBRARY_NAMES.get(activation, activation) if isinstance(activation, str) else activation


def _rows(X: Any, dtype: str) -> Rows:
    """Validated X as rows of the network's dtype."""
    if hasattr(X, "tocsr"):
        return SparseRows(X.tocsr(), dtype)
    return DenseRows(np.ascontiguousarray(X, dtype), dtype)


def _weights(sample_weight: Any, X: Any) -> Array | None:
    if sample_weight is None:
        return None
    weight: Array = _check_sample_weight(sample_weight, X)
    if weight.min() < 0:
        raise ValueError("Negative values in data passed to `sample_weight`.")
    return weight


def _parameters(net: MLP) -> Array:
    """A copy on the host."""
    return np.array(net.ops.to_numpy(net.parameters))
