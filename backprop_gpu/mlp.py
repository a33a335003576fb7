"""The multilayer perceptron: the forward pass, and the backward pass, which is the same network read in reverse.

forward,  l = 1 … L      z = a_prev W + b,   a = σ(z)
output layer             δ = ∂C/∂z = ∂C/∂a ⊙ σ′(z)
backward, l = L … 1      dW = a_prevᵀ δ,   db = Σ_rows δ,   δ_prev = (δ Wᵀ) ⊙ σ′(z_prev)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from backprop_gpu import checkpoint, data, storage, training
from backprop_gpu.activations import Activation
from backprop_gpu.architecture import Architecture
from backprop_gpu.backends.contract import Array, Dropout, Wanted
from backprop_gpu.backends.selection import select
from backprop_gpu.checks import integer, lookup
from backprop_gpu.data import OwnRows, Rows
from backprop_gpu.history import History
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer
from backprop_gpu.storage import PathLike
from backprop_gpu.training import EarlyStopping, Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DTYPES", "MLP", "Backprop", "load"]

DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16")
"""Every dtype that some backend may compute in."""

PREDICT_ROWS, PREDICT_ENTRIES = 8192, 1 << 22
"""Rows that inference takes at a time, and fewer where the widest layer would have more entries: its memory grows
neither with the data nor with a sparse matrix's width."""


@dataclass
class Forward:
    """What one forward pass leaves behind for the backward pass; index l counts the layers from 0."""

    a_prev: list[Array]
    """Input of each layer: X, then the hidden activations (after dropout). ∂z/∂w of a weight is its entry here."""
    kept: list[Array]
    """For each hidden layer, what σ′ is computed from."""
    z: list[Array]
    """Pre-activations: of every layer where asked for, else only of the output layer, as the last entry."""


@dataclass(frozen=True, eq=False)
class Backprop:
    """Every quantity of one forward and backward pass; a list has one array per layer, l = 0 … L − 1.

    The arrays are of the network's backend and dtype, N is the number of rows.
    """

    loss: float
    """C, the mean cost over the rows, with the L2 penalty ½ alpha Σ W²."""
    a_prev: list[Array]
    """∂z/∂w, the input that the weight multiplies, (N, n_in). The first may be the X that was given, not a copy."""
    z: list[Array]
    """Pre-activation a_prev W + b, (N, n_out)."""
    a: list[Array]
    """Activation σ(z), (N, n_out); of the output layer too."""
    delta: list[Array]
    """∂C/∂z, (N, n_out)."""
    dW: Sequence[Array]
    """∂C/∂W = a_prevᵀ δ (+ alpha W), (n_in, n_out): views into `gradients`."""
    db: Sequence[Array]
    """∂C/∂b = Σ_rows δ, (n_out,): views into `gradients`."""
    gradients: Array = field(repr=False)
    """All of dW and db in one flat vector, laid out as `MLP.parameters`."""


class MLP:
    """A multilayer perceptron, trained by backpropagation.

    Parameters
    ----------
    layer_sizes : sequence of int
        Number of inputs, the width of every hidden layer, number of outputs; e.g. [784, 256, 128, 10].
    activation : str or sequence of str
        σ of the hidden layers, one for all or one for each: identity, relu, leaky_relu, elu, selu, sigmoid, tanh,
        softplus, silu, gelu, gelu_tanh, mish, sine.
    loss : str or Loss
        cross_entropy (softmax, one output per class), binary_cross_entropy (sigmoid; one output, or one per label),
        squared_error, absolute_error, huber, poisson; or one with settings, such as
        ``CrossEntropy(label_smoothing=0.1)``.
    output_activation : str, optional
        σ of the output layer. The loss decides by default: softmax, sigmoid, identity, or exp for poisson;
        squared_error, absolute_error and huber go with any activation of the list above.
    dropout : float or sequence of float
        Probability, for each hidden layer or for all, that a neuron is left out of a training step.
    alpha : float
        L2 penalty: ½ alpha Σ W² is added to the cost, over the weights, never the biases.
    initialization : "auto", "glorot" or "he"
        Uniform with variance 2 / (n_in + n_out) or 2 / n_in; "auto" takes what suits each layer's activation.
        Biases start at 0.
    dtype : "float32" or "float64"
        What the network computes in. On a GPU also "tf32", "bfloat16" and "float16": products of operands rounded to
        it, on the tensor cores, beside parameters, sums and an optimizer in float32.
    backend : str
        "auto", or a name of `backends()`.
    seed : int or None
        Seed of the initial weights, the shuffles and the dropout masks, in [0, 2⁶⁴): the same seed gives the same run.
        None draws one; `MLP.seed` tells it.

    Attributes
    ----------
    parameters : (n_parameters,) array of the backend
        All weights, then all biases; change it in place.
    W, b : tuples of arrays
        Views into `parameters`: W[l] is (n_in, n_out), b[l] is (n_out,).
    metadata : dict of str to JSON-ready values
        Notes that `save` and `load` carry along; the library does not read them.

    Examples
    --------
    >>> import numpy as np, backprop_gpu as bp
    >>> X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> net = bp.MLP([2, 8, 2], activation="tanh", seed=0)
    >>> history = net.fit(X, [0, 1, 1, 0], epochs=300, optimizer=bp.Adam(learning_rate=0.05))
    >>> net.predict(X)
    array([0, 1, 1, 0])
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        activation: str | Activation | Sequence[str | Activation] = "relu",
        loss: str | Loss = "cross_entropy",
        *,
        output_activation: str | None = None,
        dropout: float | Sequence[float] = 0.0,
        alpha: float = 0.0,
        initialization: Literal["auto", "glorot", "he"] = "auto",
        dtype: str = "float32",
        backend: str = "auto",
        seed: int | None = 0,
    ) -> None:
        architecture = Architecture.build(
            layer_sizes,
            activation=activation,
            loss=loss,
            output_activation=output_activation,
            dropout=dropout,
            alpha=alpha,
        )
        lookup("initialization", initialization, _INITIALIZATIONS)
        self._setup(architecture, dtype, backend, _seed(seed))
        values = _initial_parameters(architecture, initialization, self.rng)
        self._bind(self.ops.asarray(values, self._array_dtype))

    def _setup(self, architecture: Architecture, dtype: str, backend: str, seed: int) -> None:
        """All but the parameters."""
        self.architecture = architecture
        self.dtype = _dtype(dtype)
        self.ops, self.backend_reason = select(backend, self.dtype)
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.steps_taken = 0
        self.stream: Stream | None = None
        self.metadata: dict[str, Any] = {}

    def _bind(self, parameters: Array) -> None:
        """Make `parameters` this network's, with W and b as views into it."""
        self._parameters = parameters
        self._W, self._b = self.architecture.views(parameters)

    parameters = property(lambda self: self._parameters, doc="All weights, then all biases, in one flat vector.")
    W = property(lambda self: self._W, doc="The weights of each layer, (n_in, n_out), views into `parameters`.")
    b = property(lambda self: self._b, doc="The biases of each layer, (n_out,), views into `parameters`.")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Number of inputs, the width of every hidden layer, number of outputs."""
        return self.architecture.layer_sizes

    @property
    def backend(self) -> str:
        """Name of the backend that computes."""
        return self.ops.name

    def __repr__(self) -> str:
        arch = self.architecture
        names = list(dict.fromkeys(activation.name for activation in arch.activations)) or ["no hidden layer"]
        return (
            f"MLP({list(arch.layer_sizes)}, {', '.join(names)}, {arch.loss.name}, {self.dtype}, "
            f"backend={self.backend!r}, {arch.n_parameters:,} parameters)"
        )

    # The forward pass and the backward pass

    def forward(self, X: Array, *, dropout_step: int | None = None, every_z: bool = False) -> Forward:
        """The forward pass over (N, n_inputs) rows, an array of the backend and dtype; the output layer stops at z."""
        arch, ops = self.architecture, self.ops
        a, kept, z = [X], [], []
        for layer, activation in enumerate(arch.activations):
            z_l = ops.empty((len(X), arch.layer_sizes[layer + 1]), self._array_dtype) if every_z else None
            dropout = self._dropout(layer, dropout_step)
            a_l, kept_l = ops.dense_forward(a[-1], self._W[layer], self._b[layer], activation, dropout=dropout, z=z_l)
            a.append(a_l)
            kept.append(kept_l)
            z += [z_l] if every_z else []
        z_out, _ = ops.dense_forward(a[-1], self._W[-1], self._b[-1], "identity")
        return Forward(a, kept, [*z, z_out])

    def backward(
        self,
        forward: Forward,
        target: Array,
        sample_weight: Array | None,
        gradients: Array,
        *,
        alpha: float,
        dropout_step: int | None = None,
    ) -> tuple[float, list[Array]]:
        """The backward pass: overwrites the flat `gradients`, returns C, with ½ alpha Σ W², and δ of every layer."""
        arch, ops = self.architecture, self.ops
        dW, db = arch.views(gradients)
        cost, delta = ops.output_delta(
            forward.z[-1],
            target,
            arch.loss,
            output_activation=arch.output_activation,
            sample_weight=sample_weight,
        )
        deltas = [delta]
        for layer in reversed(range(arch.n_layers)):
            ops.dense_gradients(
                forward.a_prev[layer],
                deltas[0],
                W=self._W[layer],
                alpha=alpha,
                dW=dW[layer],
                db=db[layer],
            )
            if layer > 0:
                below = layer - 1
                dropout = self._dropout(below, dropout_step)
                delta = ops.dense_backward(
                    deltas[0], self._W[layer], forward.kept[below], arch.activations[below], dropout=dropout
                )
                deltas.insert(0, delta)
        return float(cost) + self._penalty(alpha), deltas

    def _dropout(self, layer: int, step: int | None) -> Dropout | None:
        rate = self.architecture.dropout[layer]
        return None if step is None or rate == 0 else Dropout(rate, self.seed, layer, step)

    def _penalty(self, alpha: float) -> float:
        """½ alpha Σ W²."""
        weights = self._parameters[: self.architecture.n_weights]
        return 0.5 * alpha * float(self.ops.sum_squares(weights)) if alpha else 0.0

    @property
    def _array_dtype(self) -> str:
        """The dtype of the parameters and the data: narrower dtypes compute beside float32 master parameters."""
        return "float64" if self.dtype == "float64" else "float32"

    def backprop(self, X: Any, y: Any, *, sample_weight: Any = None, dropout_step: int | None = None) -> Backprop:
        """One forward and backward pass over all rows, with every quantity on the way; changes nothing.

        Parameters
        ----------
        X : (N, n_inputs) numbers
        y : (N,) labels or values, or (N, n_outputs), as in `fit`
        sample_weight : (N,) weights of the rows in the mean, optional
        dropout_step : int, optional
            Leave out the neurons that update number `dropout_step` of this seed leaves out; by default none are.

        Raises
        ------
        ValueError or TypeError for bad input, as `fit`.
        """
        rows, target, w = self._take_in(X, y, sample_weight)
        ops = self.ops
        gradients = ops.empty((self.architecture.n_parameters,), self._array_dtype)
        forward = self.forward(ops.asarray(rows.take(slice(None))), dropout_step=dropout_step, every_z=True)
        weight = None if w is None else ops.asarray(w)
        loss, delta = self.backward(
            forward,
            ops.asarray(target),
            weight,
            gradients,
            alpha=self.architecture.alpha,
            dropout_step=dropout_step,
        )
        a_out = ops.output_forward(forward.z[-1], self.architecture.output_activation)
        dW, db = self.architecture.views(gradients)
        return Backprop(loss, forward.a_prev, forward.z, [*forward.a_prev[1:], a_out], delta, dW, db, gradients)

    def _take_in(self, X: Any, y: Any, sample_weight: Any, name: str = "") -> tuple[Rows, Any, Any]:
        """Data as rows, target and weights, checked against this network; `name` says which data an error is about."""
        rows = self._rows(X, f"{name}X")
        return rows, *self._take_in_targets(y, sample_weight, len(rows), name)

    def _take_in_targets(self, y: Any, sample_weight: Any, n_rows: int, name: str = "") -> tuple[Any, Any]:
        arch, dtype = self.architecture, self._array_dtype
        y, sample_weight = (self.ops.to_numpy(x) if self.ops.owns(x) else x for x in (y, sample_weight))
        target = data.as_target(y, arch.loss, arch.layer_sizes[-1], n_rows, dtype, f"{name}y")
        return target, data.as_sample_weight(sample_weight, n_rows, dtype)

    # Training

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        epochs: int = 10,
        batch_size: int | None = None,
        optimizer: str | Optimizer = "adam",
        sample_weight: Any = None,
        validation_data: Sequence[Any] | None = None,
        validation_fraction: float = 0.0,
        early_stopping: EarlyStopping | bool | None = None,
        callbacks: Iterable[Callable[[MLP, History], object]] = (),
        checkpoint: PathLike | None = None,
        shuffle: bool = True,
        progress: bool | None = None,
        tune: bool = False,
    ) -> History:
        """Train on mini-batches for a number of epochs, from the parameters as they are, with a fresh optimizer state.

        Parameters
        ----------
        X : (N, n_inputs)
            An array, np.memmap, SciPy sparse matrix (never held dense as a whole), DataFrame, or anything
            with ``__array__`` or DLPack.
        y : (N,) or (N, n_outputs)
            cross_entropy: integer labels, or rows of probabilities. binary_cross_entropy: 0, 1 or between.
            Regression losses: values; poisson: counts ≥ 0.
        epochs : int
            Passes over the training rows.
        batch_size : int, optional
            Rows per update; by default 128, or all of them where there are fewer. The last mini-batch of an epoch
            takes what is left.
        optimizer : str or Optimizer
            sgd, adam, adamw, rmsprop; or one with settings, such as ``Adam(learning_rate=Cosine(1e-3))``.
        sample_weight : (N,), optional
            Weights ≥ 0 of the rows: C = Σ w c / Σ w in each mini-batch.
        validation_data : (X, y) or (X, y, sample_weight), optional
            Evaluated after every epoch; or `validation_fraction` of the rows, drawn by the seed, are held out for it.
        early_stopping : EarlyStopping or True, optional
            Stop when the monitored quantity no longer improves; the network ends with its best parameters.
        callbacks : callables
            Each is called as ``callback(net, history)`` after every epoch; one that returns True ends the training.
        checkpoint : path, optional
            Written atomically after every epoch. Where the file exists, the run that wrote it is resumed, whatever
            this network's parameters are, and ends with the same bits as if it had never been interrupted.
        shuffle : bool
            A new order of the rows for each epoch.
        progress : bool, optional
            Show a progress bar; by default only where stderr is a terminal.
        tune : bool
            On a GPU, measure each product's tiles, and cuBLAS with a fused pass, for this network and batch_size first,
            and take the fastest; what won is remembered on disk. Other backends have no such choice.

        Returns
        -------
        History
            What happened, epoch by epoch, and why it stopped. Ctrl-C ends the training between two updates and returns.

        Raises
        ------
        ValueError, TypeError
            For bad input; the network is as it was.
        DivergenceError
            When the loss is no longer finite; the network has the parameters of the last epoch in which it was.
        """
        return training.fit(
            self,
            X,
            y,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            sample_weight=sample_weight,
            validation_data=validation_data,
            validation_fraction=validation_fraction,
            early_stopping=early_stopping,
            callbacks=callbacks,
            checkpoint=checkpoint,
            shuffle=shuffle,
            progress=progress,
            tune=tune,
        )

    def partial_fit(
        self,
        X: Any,
        y: Any,
        *,
        batch_size: int | None = None,
        optimizer: str | Optimizer = "adam",
        sample_weight: Any = None,
    ) -> float:
        """Train on the next rows of a stream, once, in their order; returns their mean loss before each update.

        The optimizer's state lasts from call to call, for as long as the optimizer is of the same kind and no `fit`
        comes between; `save` does not keep it. Arguments and errors are those of `fit`, but a `batch_size` larger
        than the rows takes them all.
        """
        return training.partial_fit(self, X, y, batch_size=batch_size, optimizer=optimizer, sample_weight=sample_weight)

    # Inference

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Labels for a classification loss, else values.

        X : (N, n_inputs). Returns (N,) integer labels for cross_entropy and for binary_cross_entropy with one output;
        (N, n_outputs) of 0 and 1 for multi-label; (N,) or (N, n_outputs) values for the others. ValueError for bad
        input, and where the network's output is NaN, which has no label.
        """
        rows = self._rows(X, check=False)
        if self.architecture.loss.name == "cross_entropy" and (labels := self._whole(rows, "labels")) is not None:
            if labels.min() < 0:
                raise self._no_label(int((labels < 0).argmax()))
            return np.asarray(labels)
        outputs = self._host_outputs(rows)
        if np.isnan(outputs).any():
            raise self._no_label(int(np.isnan(outputs).any(axis=1).argmax()))
        return self._labels(outputs)

    def _no_label(self, row: int) -> ValueError:
        return ValueError(f"the network's output for row {row} is not a number: its inputs or parameters are too large")

    def predict_proba(self, X: Any) -> Array:
        """Probabilities: (N, n_classes) for cross_entropy, (N, n_outputs) of "yes" for binary_cross_entropy.

        On the host; but for rows on the GPU that computes, such as a CuPy array, they stay there, as the rows do.
        Raises TypeError for a network with a regression loss.
        """
        if self.architecture.loss.task != "classification":
            raise TypeError(f"a network with loss {self.architecture.loss.name!r} has no probabilities; use predict")
        return self._outputs(self._rows(X, check=False))

    def evaluate(self, X: Any, y: Any, *, sample_weight: Any = None) -> dict[str, float]:
        """The loss and how well the network does, without dropout.

        Returns {"loss", "accuracy"} for classification (multi-label: a row counts where all its labels are right),
        {"loss", "r2"} for regression: the coefficient of determination, averaged over the outputs.
        """
        rows = self._rows(X, check=False)
        return self._evaluate(rows, *self._take_in_targets(y, sample_weight, len(rows)))

    def _rows(self, X: Any, name: str = "X", *, check: bool = True) -> Rows:
        """Rows, which stay where they are if that is where the backend computes; `check` as in `data.as_rows`."""
        return data.as_rows(X, self.layer_sizes[0], self._array_dtype, name, ops=self.ops, check=check)

    def _evaluate(self, rows: Rows, target: Any, sample_weight: Any) -> dict[str, float]:
        """`evaluate` for data that `_take_in` has checked, but for what `require_finite` looks at."""
        arch, ops = self.architecture, self.ops
        w = np.ones(len(rows)) if sample_weight is None else sample_weight
        total, outputs = 0.0, []
        for chunk, z in self._z_out(rows):
            weight = None if sample_weight is None else ops.asarray(w[chunk])
            cost, _ = ops.output_delta(
                z,
                ops.asarray(target[chunk]),
                arch.loss,
                output_activation=arch.output_activation,
                sample_weight=weight,
            )
            total += float(cost) * float(w[chunk].sum(dtype=np.float64))
            outputs.append(ops.to_numpy(ops.output_forward(z, arch.output_activation)))
        loss = total / float(w.sum(dtype=np.float64)) + self._penalty(arch.alpha)
        a = np.concatenate(outputs)
        if arch.loss.task == "classification":
            return {"loss": loss, "accuracy": _accuracy(self._labels(a), self._labels(target), w)}
        return {"loss": loss, "r2": _r2(a, target, w)}

    def _outputs(self, rows: Rows) -> Array:
        """The output layer's activations, (N, n_outputs), on the host unless the rows are an array of the backend's."""
        whole = self._whole(rows, "a")
        if whole is not None:
            return whole
        ops, sigma = self.ops, self.architecture.output_activation
        if isinstance(rows, OwnRows):
            outputs = ops.empty((len(rows), self.layer_sizes[-1]), self._array_dtype)
            for chunk, z in self._z_out(rows):
                ops.output_forward(z, sigma, a=outputs[chunk])
            return outputs
        return np.concatenate([ops.to_numpy(ops.output_forward(z, sigma)) for _, z in self._z_out(rows)])

    def _whole(self, rows: Rows, wanted: Wanted) -> Array | None:
        """What is wanted of all rows in one go, where they lie in memory and the backend can; they are finite then."""
        whole, X = None, rows.entries if rows.array is None else rows.array
        if X is not None:
            whole = self.ops.whole_forward(self.architecture, self._parameters, X, wanted)
        if whole is None or not whole.is_finite:
            rows.require_finite()
        return None if whole is None else whole.result

    def _z_out(self, rows: Rows) -> Iterator[tuple[slice, Array]]:
        """z of the output layer, without dropout, some rows at a time."""
        whole = self._whole(rows, "z")
        for chunk in self._chunks(len(rows)):
            yield chunk, self._z_of(self.ops.asarray(rows.take(chunk))) if whole is None else whole[chunk]

    def _z_of(self, X: Array) -> Array:
        whole = self.ops.whole_forward(self.architecture, self._parameters, X)
        return self.forward(X).z[-1] if whole is None else whole.result

    def _host_outputs(self, rows: Rows) -> npt.NDArray[Any]:
        """`_outputs`, on the host."""
        outputs = self._outputs(rows)
        return self.ops.to_numpy(outputs) if isinstance(rows, OwnRows) else outputs

    def _chunks(self, n_rows: int) -> list[slice]:
        size = max(1, min(PREDICT_ROWS, PREDICT_ENTRIES // max(self.layer_sizes)))
        return [slice(start, start + size) for start in range(0, n_rows, size)]

    def _labels(self, outputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What `predict` answers for these outputs; integer labels stay as they are."""
        if outputs.ndim == 1:
            return outputs
        if self.architecture.loss.name == "cross_entropy":
            winners: npt.NDArray[Any] = outputs.argmax(axis=1)
            return winners
        yes_or_no = self.architecture.loss.task == "classification"
        values: npt.NDArray[Any] = (outputs > 0.5).astype(np.int64) if yes_or_no else outputs
        return values[:, 0] if values.shape[1] == 1 else values

    # Copies and files

    def copy(self, *, dtype: str | None = None, backend: str | None = None) -> MLP:
        """A network of its own in the same state, of another dtype or on another backend if one is given."""
        new = MLP.__new__(MLP)
        new._setup(self.architecture, dtype or self.dtype, backend or self.backend, self.seed)
        new.rng.bit_generator.state = self.rng.bit_generator.state
        new.steps_taken = self.steps_taken
        new.metadata = copy.deepcopy(self.metadata)

        def moved(vector: Array) -> Array:
            return new.ops.asarray(np.array(self.ops.to_numpy(vector)), new._array_dtype)

        new._bind(moved(self._parameters))
        if self.stream is not None:
            state = {slot: moved(vector) for slot, vector in self.stream.state.items()}
            new.stream = replace(self.stream, state=state, trainer=None, before=[])
        return new

    def __copy__(self) -> MLP:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("ops", "_parameters", "_W", "_b")
        state = {name: value for name, value in self.__dict__.items() if name not in hidden}
        return {**state, "backend": self.backend, "values": np.array(self.ops.to_numpy(self._parameters))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend, values = state.pop("backend"), state.pop("values")
        self.__dict__.update(state)
        self.ops, _ = select(backend, self.dtype)
        self._bind(self.ops.asarray(values))

    def save(self, path: PathLike) -> None:
        """Write the network to a safetensors file: W.0, b.0, … as tensors, the architecture as metadata.

        The file is replaced in one step, or left as it was on an OSError (a full disk, a path that is not writable).
        """
        storage.write(path, *self._as_file())

    def _as_file(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """The tensors and the metadata of a model file."""
        description = {
            "architecture": self.architecture.to_dict(),
            "dtype": self.dtype,
            "seed": self.seed,
            "rng": self.rng.bit_generator.state,
            "steps_taken": self.steps_taken,
            "notes": dict(self.metadata),
        }
        return self.architecture.tensors(self.ops.to_numpy(self._parameters)), description

    # Pictures

    def draw(self, X: Any, y: Any) -> Figure:
        """A picture of this network and of the same network reversed, with the numbers of `backprop(X, y)` on it.

        For small networks; needs the `plot` extra. See `plotting.draw_network`.
        """
        from backprop_gpu.plotting import draw_network

        return draw_network(self, X, y)


def load(path: PathLike, *, backend: str = "auto") -> MLP:
    """The network that `MLP.save`, or `fit(checkpoint=…)`, wrote to `path`; loading runs no code from the file.

    Raises ValueError for a file that is damaged or of another kind, OSError where there is none.
    """
    tensors, metadata = storage.read(path)
    try:
        architecture = Architecture.from_dict(metadata["architecture"])
        flat = architecture.flatten(tensors)
        dtype, seed = _dtype(metadata["dtype"]), _seed(metadata["seed"])
        rng = checkpoint.generator(metadata["rng"])
        steps_taken, notes = index(metadata["steps_taken"]), dict(metadata["notes"])
    except checkpoint.MALFORMED as error:
        raise ValueError(f"{path} does not describe a network of backprop_gpu, or it is damaged: {error}") from error
    net = MLP.__new__(MLP)
    net._setup(architecture, dtype, backend, seed)
    net.rng, net.steps_taken, net.metadata = rng, steps_taken, notes
    net._bind(net.ops.asarray(flat, net._array_dtype))
    return net


def _accuracy(predicted: npt.NDArray[Any], true: npt.NDArray[Any], w: npt.NDArray[Any]) -> float:
    right = predicted == true
    return float(np.average(right if right.ndim == 1 else right.all(axis=1), weights=w))


def _r2(a: npt.NDArray[Any], y: npt.NDArray[Any], w: npt.NDArray[Any]) -> float:
    """1 − Σ w(y − a)² / Σ w(y − ȳ)², averaged over the outputs; for a constant y, 1 if a = y and else 0."""
    a, y, w = (x.astype(np.float64) for x in (a, y, w[:, None]))
    residual = (w * (y - a) ** 2).sum(axis=0)
    spread = (w * (y - np.average(y, axis=0, weights=w[:, 0])) ** 2).sum(axis=0)
    constant = np.where(residual == 0, 1.0, 0.0)
    return float(np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1), constant).mean())


def _dtype(dtype: Any) -> str:
    if dtype is None:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}; got None")
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    lookup("dtype", name, dict.fromkeys(DTYPES))
    return name


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    seed = integer("seed", seed, at_least=0)
    if seed >= 2**64:
        raise ValueError(f"seed must be in [0, 2⁶⁴); got {seed}")
    return seed


# Initial weights: U(−bound, bound) has variance bound² / 3


def _glorot(n_in: int, n_out: int) -> float:
    """Variance 2 / (n_in + n_out) (Glorot & Bengio, 2010)."""
    return math.sqrt(6 / (n_in + n_out))


def _he(n_in: int, n_out: int) -> float:
    """Variance 2 / n_in (He et al., 2015)."""
    return math.sqrt(6 / n_in)


_BOUNDS = {"glorot": _glorot, "he": _he}
_INITIALIZATIONS = {"auto": None, **_BOUNDS}


def _initial_parameters(
    architecture: Architecture, initialization: str, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Weights drawn layer by layer, biases 0; in float64, so that a seed means the same weights in every dtype."""
    flat = np.zeros(architecture.n_parameters)
    W, _ = architecture.views(flat)
    suited = [activation.initialization for activation in architecture.activations] + ["glorot"]
    for W_l, name in zip(W, suited, strict=True):
        bound = _BOUNDS[name if initialization == "auto" else initialization](*W_l.shape)
        W_l[...] = rng.uniform(-bound, bound, W_l.shape)
    return flat
