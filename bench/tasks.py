"""What contenders are asked to do, and how each answer is checked before anything is timed.

A check is one number, made in the contender's process of what it computed, and expected to be within a tolerance of
another: the loss after some steps, the share of wrong labels, the error of an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

import backprop_gpu as bp
from bench.cases import Case
from bench.contenders.contract import Contender, Variants

__all__ = ["COPY", "OPERATIONS", "TASKS", "Layer", "Task", "layer", "operate", "outputs"]

LOSS_TOLERANCE = 1e-2
"""Of what the steps changed in the loss. float32 costs up to 4e-4 of it on L and 12 random networks, and scikit-learn,
whose Adam adds ε before the bias correction and not after it, 5e-3."""
LABEL_TOLERANCE = 1e-3
"""Of the labels: rows between two classes may go either way."""
OPERATION_TOLERANCE = 1e-4
"""Relative to the largest entry, float32."""


@dataclass(frozen=True)
class Task:
    """Something to do to a case."""

    name: str
    variants: Callable[[Contender, Case], Variants]
    number: Callable[[Case, Any], float]
    """The number to compare, from what `Work.result` returned."""
    expected: Callable[[Case], tuple[float, float]]
    """What the number should be, and how far from it it may be."""
    multiple: Callable[[Case], int] = lambda case: 1
    """Repetitions come in multiples of this: the check makes so many."""


def _training_loss(case: Case) -> tuple[float, float]:
    before, after = case.reference_loss(0), case.reference_loss(case.n_batches)
    return after, LOSS_TOLERANCE * abs(after - before)


def _wrong_labels(case: Case, labels: npt.NDArray[Any]) -> float:
    return float(np.mean(labels != case.network(dtype="float64").predict(case.data()[0])))


def _gradient_error(case: Case, gradients: tuple[Sequence[npt.NDArray[Any]], Sequence[npt.NDArray[Any]]]) -> float:
    """Of ∂C/∂W and ∂C/∂b of every layer for the first mini-batch, relative to the largest entry of each."""
    net, ops = case.network(dtype="float64"), bp.get_backend("numpy")
    forward = net.forward(case.batches()[0][0].astype(np.float64))
    delta, errors = case.d_out().astype(np.float64), []
    for layer in reversed(range(len(net.W))):
        exact = ops.dense_gradients(forward.a_prev[layer], delta)
        found = (gradients[0][layer], gradients[1][layer])
        errors += [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True)]
        if layer > 0:
            sigma = net.architecture.activations[layer - 1]
            delta = ops.dense_backward(delta, net.W[layer], forward.kept[layer - 1], sigma)
    return max(errors)


# The operations, one by one, on one layer: its arrays, and the reference's answers in float64


@dataclass(frozen=True)
class Layer:
    """Inputs of every operation at a layer of n_in inputs and n_out neurons, N rows."""

    a_prev: npt.NDArray[Any]
    W: npt.NDArray[Any]
    b: npt.NDArray[Any]
    delta: npt.NDArray[Any]
    kept: npt.NDArray[Any]
    """(N, n_in), what σ′ of the layer below is computed from."""
    z: npt.NDArray[Any]
    labels: npt.NDArray[np.int32]


@cache
def layer(case: Case, dtype: str = "float32") -> Layer:
    """The layer's arrays: float32 numbers, in `dtype`."""
    (n_in, n_out), N = case.layer_sizes, case.batch_size
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> npt.NDArray[Any]:
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    kept = draw(N, n_in)
    if bp.ACTIVATIONS[case.activation].derivative_from == "a":
        kept = bp.get_backend("numpy").output_forward(kept, case.activation)
    labels = rng.integers(0, n_out, N, dtype=np.int32)
    W = draw(n_in, n_out) / n_in**0.5
    return Layer(draw(N, n_in), W, draw(n_out), draw(N, n_out), kept, draw(N, n_out), labels)


def operate(ops: Any, operation: str, case: Case, x: Layer, out: dict[str, Any]) -> Sequence[Any]:
    """One operation of a backend, into the arrays of `out` where there are any; returns what it wrote."""
    if operation == "copy":
        out["W"][...] = x.W
        return [out["W"]]
    if operation == "dense_forward":
        return ops.dense_forward(x.a_prev, x.W, x.b, case.activation, **out)[:1]
    if operation == "output_delta":
        return ops.output_delta(x.z, x.labels, "cross_entropy", **out)[1:]
    if operation == "dense_backward":
        return [ops.dense_backward(x.delta, x.W, x.kept, case.activation, **out)]
    if operation == "dense_gradients":
        return ops.dense_gradients(x.a_prev, x.delta, **out)
    parameters, state = out["parameters"], out["state"]
    ops.update(parameters, out["gradients"], state, "adam", learning_rate=1e-3, step=1, n_weights=parameters.size)
    return [parameters]


COPY = "copy"
"""Not an operation of the contract: W into another array, for the ceiling of the memory."""

OPERATIONS = ("dense_forward", "output_delta", "dense_backward", "dense_gradients", "update")


def outputs(operation: str, x: Layer) -> dict[str, Any]:
    """What has to be there beforehand: `update` works on as many parameters as W has, gradients and Adam's moments."""
    if operation == COPY:
        return {"W": np.empty_like(x.W)}
    if operation != "update":
        return {}
    W = x.W.ravel()
    state = {"m": np.zeros_like(W), "v": np.zeros_like(W)}
    return {"parameters": W.copy(), "gradients": W[::-1].copy(), "state": state}


@cache
def _reference(case: Case, operation: str) -> Sequence[npt.NDArray[Any]]:
    x = layer(case, "float64")
    return operate(bp.get_backend("numpy"), operation, case, x, outputs(operation, x))


def _operation(name: str) -> Task:
    def error(case: Case, arrays: Sequence[npt.NDArray[Any]]) -> float:
        pairs = zip(arrays, _reference(case, name), strict=True)
        return max(float(np.abs(array - expected).max() / np.abs(expected).max()) for array, expected in pairs)

    return Task(
        name,
        variants=lambda contender, case: contender.operation(name, case),
        number=error,
        expected=lambda case: (0.0, OPERATION_TOLERANCE),
    )


TRAINING = Task(
    "training",
    variants=lambda contender, case: contender.training(case),
    number=lambda case, parameters: case.loss(*parameters),
    expected=_training_loss,
    multiple=lambda case: case.n_batches,
)

TASKS = {
    task.name: task
    for task in (
        TRAINING,
        replace(TRAINING, name="own loop", variants=lambda contender, case: contender.own_loop(case)),
        Task(
            "autograd",
            variants=lambda contender, case: contender.autograd(case),
            number=_gradient_error,
            expected=lambda case: (0.0, OPERATION_TOLERANCE),
        ),
        Task(
            "prediction",
            variants=lambda contender, case: contender.prediction(case),
            number=_wrong_labels,
            expected=lambda case: (0.0, LABEL_TOLERANCE),
        ),
        *map(_operation, (*OPERATIONS, COPY)),
    )
}
