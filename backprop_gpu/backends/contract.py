"""The contract that every backend fulfils: five operations over arrays of its own, in one notation.

    z = a_prev W + b,  a = σ(z)                      dense_forward
    C, δ = ∂C/∂z at the output layer                 output_delta
    δ = (δ_next W_nextᵀ) ⊙ σ′(z)                     dense_backward
    dW = a_prevᵀ δ,  db = Σ_rows δ                   dense_gradients
    parameters ← optimizer(parameters, gradients)    update

and one more for inference, `output_forward`, which is the output layer's σ without a target. The public methods
here check shapes and dtypes, find or allocate the outputs, and hand over to the backend's own `_operation`, which
may rely on all of that. Every output is *overwritten* unless `accumulate` says otherwise, and overlaps no input. 1/N
enters in `output_delta` and nowhere after it. No operation keeps state, and none draws random numbers but by `Dropout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu import activations, losses, optimizers
from backprop_gpu.activations import Activation
from backprop_gpu.checks import integer, lookup
from backprop_gpu.data import DenseRows, Entries, Rows
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer

if TYPE_CHECKING:
    from backprop_gpu.architecture import Architecture

__all__ = [
    "AfterStep",
    "Array",
    "Backend",
    "Dropout",
    "Trainer",
    "TrainingJob",
    "Wanted",
    "WholeForward",
    "shares",
    "starts_of",
]

Array: TypeAlias = Any
"""An array of the backend's own kind, C-contiguous: it has shape, ndim, dtype and len(), basic slices are views of it,
so is what `reshape` returns, and `x[...] = y` copies y into it."""

AfterStep: TypeAlias = Callable[[int], bool]
"""Called with the number of rows trained on since the last call; False asks the trainer to stop there."""


class Dropout(NamedTuple):
    """Which neurons of a layer are left out of a step: a function of these four numbers, so nothing is stored.

    Neuron `column` of row `row` of the mini-batch is kept if word `column % 4` of
    Philox4x32-10(counter=(column // 4, row, layer, step), key=seed) is at least ⌊rate · 2³²⌋ (Salmon et al., 2011).
    A kept activation is divided by 1 − rate; one that is left out is 0, whatever it was.
    """

    rate: float
    """Probability that a neuron is left out, in [0, 1)."""
    seed: int
    """Key of the generator, in [0, 2⁶⁴)."""
    layer: int
    """Index of the layer, from 0."""
    step: int
    """Number of the update step, from 0; its lower 32 bits count."""


@dataclass(frozen=True)
class TrainingJob:
    """All that a backend needs to take whole training steps by itself."""

    architecture: Architecture
    parameters: Array
    """The flat vector, updated in place."""
    optimizer: Optimizer
    state: Mapping[str, Array]
    """The optimizer's slots, updated in place."""
    dtype: str
    """The dtype to compute in; the parameters, and so the data, may be of a wider one (float32 for tf32)."""
    rows: Rows
    """X: the training rows among others; a mini-batch is `rows.take(indices)`."""
    target: npt.NDArray[Any]
    sample_weight: npt.NDArray[Any] | None
    batch_size: int
    seed: int
    """Key of the dropout masks."""
    steps_before: int
    """Updates that the network had before this run: dropout counts its steps on from there, the optimizer from 0."""
    tune: bool = False
    """Measure the ways that the backend has, first, and take the fastest."""
    in_stream: bool = False
    """Other rows will follow these: see `Trainer.take_over`."""

    def goes_on_from(self, other: TrainingJob) -> bool:
        """Whether nothing but the rows differs: the same arrays are trained with the same settings."""
        if self._settings() != other._settings() or self.parameters is not other.parameters:
            return False
        return all(x is y for x, y in zip(self.state.values(), other.state.values(), strict=True))

    def _settings(self) -> tuple[Any, ...]:
        return self.architecture, self.optimizer, self.dtype, self.batch_size, self.seed, self.steps_before

    def without_rows(self) -> TrainingJob:
        """The same with rows and targets of no memory."""
        x = np.empty((0, self.rows.shape[1]), self.rows.dtype)
        return replace(self, rows=DenseRows(x, self.rows.dtype), target=self.target[:0].copy(), sample_weight=None)


Wanted: TypeAlias = Literal["z", "a", "labels"]


class WholeForward(NamedTuple):
    """What a network says of some rows."""

    result: Array
    is_finite: bool
    """All of X is finite. Where not, look at X before using `result`: only a sum may have been too large."""


class Trainer(ABC):
    """Whole training steps (forward, loss, backward, update) with every buffer allocated beforehand."""

    @property
    def finite(self) -> bool | None:
        """Whether the last `run` came to its end with C and the parameters finite; None where the caller has to look.

        A trainer that tells leaves parameters and state as they were before the run until it has, and where it has not.
        """
        return None

    @abstractmethod
    def run(
        self,
        order: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """One update for each successive `batch_size` entries of `order`, the last batch taking what is left.

        `learning_rates` and `alphas` (the L2 penalty's, in place of the architecture's) have one entry per step;
        `first_step` is the number of updates made in this run before. Returns
        Σ over the steps of (total sample weight of the mini-batch) · C. Calls `after_step` with the rows of one or
        more whole mini-batches, and stops early when it returns False; where that sum is no longer finite, it may stop
        at once.
        """

    def run_epochs(
        self,
        orders: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> npt.NDArray[np.float64] | None:
        """`run` for each row of `orders` in turn, or None, and nothing done, where this trainer has no such path.

        Without one, the caller composes it of `run`. orders : (n_epochs, n_rows); learning_rates, alphas :
        (n_epochs, n_steps). Returns (n_epochs, n_steps, 2): C of each step without the penalty, and the penalty
        ½ alpha Σ W²; NaN for the steps that were not made.
        """
        return None

    def rest(self) -> bool:
        """Let go of the rows, to `take_over` others later; False where this trainer cannot, and is of no more use."""
        return False

    def take_over(self, job: TrainingJob) -> bool:
        """After `rest`, train on the rows of `job`; False, and nothing done, where not all else is as it was.

        A run that begins where the last one ended may then rely on `job.state` being as that one left it.
        """
        return False

    def gradient(self, gradients: Array, alpha: float) -> float | None:
        """C over all rows of the job together, without the penalty; or None, and nothing done, where there is no path.

        ∂C/∂W + alpha W and ∂C/∂b overwrite `gradients`, (n_parameters,). No dropout, and no update.
        """
        return None


# What every trainer needs to know of its mini-batches


def starts_of(n_rows: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Where each mini-batch begins, and where the last one ends."""
    return np.minimum(np.arange(0, n_rows + batch_size, batch_size), n_rows)


def shares(
    order: npt.NDArray[np.int64], sample_weight: npt.NDArray[Any] | None, starts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """The part of each row in the mean over its mini-batch, and the total weight of each mini-batch."""
    n_rows = starts[1:] - starts[:-1]
    if sample_weight is None:
        return np.repeat(1 / n_rows, n_rows), n_rows
    w = sample_weight[order].astype(np.float64)
    totals = np.add.reduceat(w, starts[:-1])
    of_row = np.repeat(totals, n_rows)
    return np.divide(w, of_row, out=w, where=of_row != 0), totals


class Backend(ABC):
    """The operations of one backend; stateless, so one instance serves every network."""

    name: ClassVar[str]
    dtypes: tuple[str, ...]
    """What it computes in, on this machine."""

    def computing_in(self, dtype: str) -> Backend:
        """The operations as a network of `dtype` needs them: where it is narrower than its arrays, products differ."""
        return self

    # Arrays

    @abstractmethod
    def asarray(self, x: Any, dtype: str | None = None) -> Array:
        """`x` as a C-contiguous array of this backend, copied only where it has to be."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with unspecified contents; `dtype` is a name, or an array's own dtype."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros."""

    @abstractmethod
    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """`x` on the host; it may be `x` itself, so copy before changing it."""

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array that lies where this backend computes, and should not come to the host on its way.

        Such rows are trained on and predicted as they are, and probabilities are of the same kind. False where that is
        the host.
        """
        return False

    @abstractmethod
    def sum_squares(self, x: Array) -> Any:
        """Σ x², accumulated in float64, as a scalar of this backend: the penalty ½ alpha Σ W² is made of it."""

    # Operations

    def dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        activation: str | Activation,
        *,
        dropout: Dropout | None = None,
        a: Array | None = None,
        z: Array | None = None,
    ) -> tuple[Array, Array]:
        """a = σ(z), z = a_prev W + b, with dropout on a.

        Parameters
        ----------
        a_prev : (N, n_in)
        W : (n_in, n_out)
        b : (n_out,)
        activation : a row of `activations.ACTIVATIONS`, or its name
        dropout : leaves neurons of a out; None in inference
        a : (N, n_out), overwritten; allocated if None
        z : (N, n_out), overwritten; if None, allocated only where σ′ needs it

        Returns
        -------
        (a, kept), where `kept` is what `dense_backward` wants later: z, or a itself (after dropout) where σ′
        is computed from it.
        """
        activation = activations.get(activation)
        _check_layer(a_prev, W, b)
        shape = (a_prev.shape[0], W.shape[1])
        a = self._output("a", a, shape, a_prev)
        if z is not None or activation.derivative_from == "z":
            z = self._output("z", z, shape, a_prev)
        self._dense_forward(a_prev, W, b, activation, dropout, a, z)
        return a, z if activation.derivative_from == "z" else a

    def output_forward(self, z: Array, output_activation: str, *, a: Array | None = None) -> Array:
        """a = σ(z) at the output layer, where σ may also be softmax (over each row) or exp.

        z : (N, n_out); a : (N, n_out), overwritten, allocated if None. Returns a.
        """
        lookup("output activation", output_activation, losses.OUTPUT_ACTIVATIONS)
        _check_ndim("z", z, 2)
        a = self._output("a", a, z.shape, z)
        self._output_forward(z, output_activation, a)
        return a

    def output_delta(
        self,
        z: Array,
        target: Array,
        loss: str | Loss,
        *,
        output_activation: str | None = None,
        sample_weight: Array | None = None,
        delta: Array | None = None,
    ) -> tuple[Any, Array]:
        """C and δ = ∂C/∂z at the output layer.

        Parameters
        ----------
        z : (N, n_out)
        target : (N,) int32 labels, for cross_entropy only, or (N, n_out) of z's dtype
        loss : a `Loss`, or the name of one
        output_activation : σ of this layer; None is the loss's own
        sample_weight : (N,) of z's dtype, at least 0; None is all ones
        delta : (N, n_out), overwritten; allocated if None

        Returns
        -------
        (C, delta), with C = Σ w c / Σ w a scalar of this backend, accumulated in float64; where all w are 0, C = 0 and
        δ = 0.
        """
        loss = losses.get(loss)
        output_activation = losses.output_activation(loss, output_activation)
        _check_ndim("z", z, 2)
        _check_target(target, z, loss)
        if sample_weight is not None:
            _check_shape("sample_weight", sample_weight, (z.shape[0],))
            _check_dtype(z, sample_weight=sample_weight)
        delta = self._output("delta", delta, z.shape, z)
        return self._output_delta(z, target, loss, output_activation, sample_weight, delta), delta

    def dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: str | Activation,
        *,
        dropout: Dropout | None = None,
        delta: Array | None = None,
    ) -> Array:
        """δ = (δ_next W_nextᵀ) ⊙ σ′(z), with the forward pass's dropout.

        With activation "identity" this is ∂C/∂a of the layer below, so also ∂C/∂X.

        delta_next : (N, n_next); W_next : (n_out, n_next); kept : (N, n_out) from `dense_forward`, as are activation
        and dropout; delta : (N, n_out), overwritten, allocated if None. Returns delta.
        """
        activation = activations.get(activation)
        _check_ndim("delta_next", delta_next, 2)
        _check_ndim("W_next", W_next, 2)
        if delta_next.shape[1] != W_next.shape[1]:
            raise ValueError(
                f"delta_next (N, n_next) and W_next (n_out, n_next) must agree in n_next; "
                f"got {delta_next.shape} and {W_next.shape}"
            )
        shape = (delta_next.shape[0], W_next.shape[0])
        _check_shape("kept", kept, shape)
        _check_dtype(delta_next, W_next=W_next, kept=kept)
        delta = self._output("delta", delta, shape, delta_next)
        self._dense_backward(delta_next, W_next, kept, activation, dropout, delta)
        return delta

    def dense_gradients(
        self,
        a_prev: Array,
        delta: Array,
        *,
        W: Array | None = None,
        alpha: float = 0.0,
        accumulate: bool = False,
        dW: Array | None = None,
        db: Array | None = None,
    ) -> tuple[Array, Array]:
        """dW = a_prevᵀ δ (+ alpha W), db = Σ_rows δ.

        Overwrites dW and db, or with `accumulate=True` adds to them (then both must be given).

        a_prev : (N, n_in); delta : (N, n_out); W : (n_in, n_out), needed for alpha ≠ 0; dW : (n_in, n_out) and
        db : (n_out,), allocated if None. Returns (dW, db).
        """
        _check_ndim("a_prev", a_prev, 2)
        _check_ndim("delta", delta, 2)
        if a_prev.shape[0] != delta.shape[0]:
            raise ValueError(f"a_prev and delta must have the same rows; got {a_prev.shape} and {delta.shape}")
        _check_dtype(a_prev, delta=delta)
        if accumulate and (dW is None or db is None):
            raise ValueError("accumulate=True adds to dW and db, so both must be given")
        shape = (a_prev.shape[1], delta.shape[1])
        if alpha:
            _check_shape("W (which alpha multiplies)", W, shape)
            _check_dtype(a_prev, W=W)
        dW = self._output("dW", dW, shape, a_prev)
        db = self._output("db", db, shape[1:], a_prev)
        self._dense_gradients(a_prev, delta, W, alpha, accumulate, dW, db)
        return dW, db

    def update(
        self,
        parameters: Array,
        gradients: Array,
        state: Mapping[str, Array],
        optimizer: str | Optimizer,
        *,
        learning_rate: float,
        step: int,
        n_weights: int,
    ) -> None:
        """parameters ← optimizer(parameters, gradients, state): one pass, overwriting parameters and state.

        Parameters
        ----------
        parameters, gradients : (n_parameters,); clipping may scale `gradients` in place
        state : one (n_parameters,) vector for each of the optimizer's `slots`, zero before step 1
        learning_rate : this step's; the optimizer's own setting is not read
        step : number of this update, from 1
        n_weights : the first n_weights parameters are weights, which weight decay touches; the rest are biases
        """
        optimizer = optimizers.get(optimizer)
        _check_ndim("parameters", parameters, 1)
        integer("step", step, at_least=1)
        if not 0 <= n_weights <= parameters.shape[0]:
            raise ValueError(f"n_weights must be in [0, {parameters.shape[0]}], the parameters; got {n_weights}")
        slots = {slot: state.get(slot) for slot in optimizer.slots}
        for name, vector in {"gradients": gradients, **slots}.items():
            _check_shape(name, vector, parameters.shape)
        _check_dtype(parameters, gradients=gradients, **slots)
        self._update(parameters, gradients, slots, optimizer, learning_rate, step, n_weights)

    # Whole steps

    def trainer(self, job: TrainingJob) -> Trainer | None:
        """A trainer that takes whole steps, or None where this backend has none for the job.

        Without one, the training loop composes the five operations, with the same numbers.
        """
        return None

    def whole_forward(
        self, architecture: Architecture, parameters: Array, X: Array | Entries, wanted: Wanted = "z"
    ) -> WholeForward | None:
        """The forward pass without dropout over rows X, in one go; None where this backend has no such path.

        X : (N, n_in), or what is stored of it where it is sparse, all of which is finite.

        wanted : "z" or "a" of the output layer, (N, n_out); or for cross_entropy "labels", (N,) int64, the first
        class with the largest z, and −1 where a z is NaN.

        Without one, the network composes it of `dense_forward` and `output_forward`, with the same numbers.
        """
        return None

    # What a backend writes: arguments checked, outputs allocated

    @abstractmethod
    def _dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        activation: Activation,
        dropout: Dropout | None,
        a: Array,
        z: Array | None,
    ) -> None: ...

    @abstractmethod
    def _output_forward(self, z: Array, output_activation: str, a: Array) -> None: ...

    @abstractmethod
    def _output_delta(
        self,
        z: Array,
        target: Array,
        loss: Loss,
        output_activation: str,
        sample_weight: Array | None,
        delta: Array,
    ) -> Any: ...

    @abstractmethod
    def _dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: Activation,
        dropout: Dropout | None,
        delta: Array,
    ) -> None: ...

    @abstractmethod
    def _dense_gradients(
        self,
        a_prev: Array,
        delta: Array,
        W: Array | None,
        alpha: float,
        accumulate: bool,
        dW: Array,
        db: Array,
    ) -> None: ...

    @abstractmethod
    def _update(
        self,
        parameters: Array,
        gradients: Array,
        state: Mapping[str, Array],
        optimizer: Optimizer,
        learning_rate: float,
        step: int,
        n_weights: int,
    ) -> None: ...

    def _output(self, name: str, out: Array | None, shape: tuple[int, ...], like: Array) -> Array:
        """The output given by the caller, checked, or a new one; TypeError where the inputs are no real numbers."""
        if like.dtype.kind in "biuc":
            raise TypeError(f"operations take floating-point arrays ({' or '.join(self.dtypes)}); got {like.dtype}")
        if out is None:
            return self.empty(shape, like.dtype)
        _check_shape(name, out, shape)
        _check_dtype(like, **{name: out})
        return out


def _check_ndim(name: str, x: Array, ndim: int) -> None:
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}; got shape {x.shape}")


def _check_shape(name: str, x: Array | None, shape: tuple[int, ...]) -> None:
    if x is None or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {None if x is None else tuple(x.shape)}")


def _check_dtype(like: Array, **others: Array) -> None:
    for name, x in others.items():
        if x.dtype != like.dtype:
            raise TypeError(f"all arrays of one operation must share a dtype, here {like.dtype}; {name} is {x.dtype}")


def _check_layer(a_prev: Array, W: Array, b: Array) -> None:
    _check_ndim("a_prev", a_prev, 2)
    _check_ndim("W", W, 2)
    if a_prev.shape[1] != W.shape[0]:
        raise ValueError(f"a_prev (N, n_in) and W (n_in, n_out) must agree in n_in; got {a_prev.shape} and {W.shape}")
    _check_shape("b", b, (W.shape[1],))
    _check_dtype(a_prev, W=W, b=b)


def _check_target(target: Array, z: Array, loss: Loss) -> None:
    if loss.name == "cross_entropy" and target.ndim == 1:
        _check_shape("target", target, (z.shape[0],))
        if target.dtype != np.int32:
            raise TypeError(f"target must hold int32 labels, or be (N, n_out) probabilities; got {target.dtype}")
    else:
        _check_shape("target", target, tuple(z.shape))
        _check_dtype(z, target=target)
