"""The `cpu` backend: whole training steps and whole forward passes, compiled by Numba for the machine's own vectors.

Both run on plain threads (`threads.available()` of them) that leave the interpreter alone, and use no BLAS; so does
every loss, optimizer and activation, with dropout or without. The five operations one by one are NumPy's products,
on BLAS's threads, with compiled passes over their results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numba.core import config

from backprop_gpu.activations import Activation
from backprop_gpu.architecture import Architecture
from backprop_gpu.backends import cpu_plan
from backprop_gpu.backends import threads as threading
from backprop_gpu.backends.contract import Array, Dropout, Trainer, TrainingJob, Wanted, WholeForward, shares
from backprop_gpu.backends.cpu_step import StepTrainer, no_entries, plain
from backprop_gpu.backends.numpy import NumpyBackend
from backprop_gpu.data import Entries
from backprop_gpu.kernels.numba_cpu import activations, operations, output_delta, step, update
from backprop_gpu.kernels.numba_cpu.network import Batches
from backprop_gpu.kernels.numba_cpu.team import new_barrier
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer

__all__ = ["BACKEND", "CpuBackend", "probe"]


def probe() -> str | None:
    """Why this backend does not work here: it does where Numba can be imported, as this module does, and compiles."""
    return "NUMBA_DISABLE_JIT is set, so nothing is compiled; unset it" if config.DISABLE_JIT else None  # type: ignore[attr-defined]


def _flat(x: Array) -> Array:
    return plain(x).reshape(-1)


FEW_PRODUCTS = 1 << 20
"""Rows times weights of a forward pass that is over in less time than packing the weights and a compiled pass take."""

WANTED = {"z": step.Z, "a": step.A, "labels": step.LABELS}

UNUSED = new_barrier()
"""For threads that do not wait for each other."""

OUTPUTS_PER_THREAD = 1 << 16
"""Entries of the output layer that take as long as a thread takes to start."""


@lru_cache(maxsize=32)
def _for_inference(architecture: Architecture, plan: cpu_plan.Plan, dtype: str) -> tuple[cpu_plan.Layout, Array]:
    """Layout and record, which take longer to write down than a small network takes for its pass."""
    layout = cpu_plan.Layout(architecture, plan, 0, dtype)
    return layout, layout.record(architecture)


def _work(architecture: Architecture, X: Array | Entries) -> tuple[int, int]:
    """Rows, and multiply-adds of a forward pass over them."""
    if not isinstance(X, Entries):
        return len(X), len(X) * architecture.n_weights
    n_rows, (n_in, n_out) = len(X.starts) - 1, architecture.layer_sizes[:2]
    return n_rows, len(X.values) * n_out + n_rows * (architecture.n_weights - n_in * n_out)


def _arguments(architecture: Architecture, X: Array | Entries, flat: Array, panel: int) -> tuple[Any, ...]:
    """What `step.infer` takes of X and of the flat parameters: x, entries, order, flat."""
    n_in, n_out = architecture.layer_sizes[:2]
    if not isinstance(X, Entries):
        return plain(X), no_entries(flat.dtype), np.empty(0, np.int64), flat
    if len(flat) < n_in * n_out + panel:  # of a network that is all first layer
        flat = np.append(flat, np.zeros(panel, flat.dtype))
    return np.empty((0, n_in), flat.dtype), Entries(*map(plain, X)), np.arange(len(X.starts) - 1), flat


class CpuBackend(NumpyBackend):
    """Compiled by Numba; runs wherever Numba does."""

    name: ClassVar[str] = "cpu"

    def trainer(self, job: TrainingJob) -> Trainer:
        """Whole compiled steps, for every job."""
        return StepTrainer(job)

    def whole_forward(
        self, architecture: Architecture, parameters: Array, X: Array | Entries, wanted: Wanted = "z"
    ) -> WholeForward | None:
        """A tile of rows at a time goes through all layers, and whatever is wanted of it, while it is in cache.

        None for few dense rows: the five operations take them from the weights where they lie.
        """
        n_rows, n_products = _work(architecture, X)
        if not isinstance(X, Entries) and n_products <= FEW_PRODUCTS:
            return None
        n_out, dtype, flat = architecture.layer_sizes[-1], parameters.dtype, plain(parameters)
        data = cpu_plan.SPARSE
        if not isinstance(X, Entries):
            data = cpu_plan.Nonzero.of(n_rows, architecture.layer_sizes[1], X.__getitem__)
        plan = cpu_plan.for_inference(architecture, n_rows, n_products, dtype.name, threading.available(), data)
        layout, record = _for_inference(architecture, plan, dtype.name)
        memory, sums = layout.memory(), np.zeros((plan.n_threads, layout.panel), dtype)
        outputs = np.empty((0 if wanted == "labels" else n_rows, n_out), dtype)
        labels = np.empty(n_rows if wanted == "labels" else 0, np.int64)
        step.load(record, layout.layers, flat, memory)
        of_X = _arguments(architecture, X, flat, layout.panel)
        arguments = record, layout.layers, *of_X, memory, WANTED[wanted], _flat(outputs), labels, sums
        threading.require(step.infer(plan.n_threads, UNUSED, arguments))
        return WholeForward(labels if wanted == "labels" else outputs, bool(np.isfinite(sums).all()))

    def sum_squares(self, x: Array) -> float:
        """Σ x², in float64."""
        return float(operations.squares(_flat(x)))

    def _output_forward(self, z: Array, output_activation: str, a: Array) -> None:
        sigma, n_columns, x, flat = output_delta.SIGMAS[output_activation], z.shape[1], _flat(z), _flat(a)
        n_threads = min(threading.available(), max(1, z.size // OUTPUTS_PER_THREAD))
        threading.require(operations.output_forward_of_rows(n_threads, sigma, x, n_columns, flat, UNUSED))

    def _dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        activation: Activation,
        dropout: Dropout | None,
        a: Array,
        z: Array | None,
    ) -> None:
        z = np.matmul(a_prev, W, out=a if z is None else z)
        z += b
        operations.activate(activations.CODES[activation.name], _flat(z), _flat(a))
        self._drop(a, dropout)

    def _drop(self, x: Array, dropout: Dropout | None) -> None:
        if dropout is not None:
            seed = np.uint64(dropout.seed)
            operations.drop(_flat(x), x.shape[1], dropout.rate, seed, dropout.layer, dropout.step)

    def _output_delta(
        self,
        z: Array,
        target: Array,
        loss: Loss,
        output_activation: str,
        sample_weight: Array | None,
        delta: Array,
    ) -> float:
        n = len(z)
        share, _ = shares(np.arange(n), sample_weight, np.array([0, n]))
        labels = target if target.ndim == 1 else np.empty(0, np.int32)
        values = target if target.ndim == 2 else np.empty((0, 0), z.dtype)
        batches = Batches(values, plain(labels), plain(values), np.arange(n), share, no_entries(z.dtype))
        code, sigma = output_delta.CODES[loss.name], output_delta.SIGMAS[output_activation]
        setting = output_delta.setting(loss)
        cost = operations.output_delta_of_rows(code, setting, sigma, _flat(z), z.shape[1], batches, _flat(delta))
        return float(cost)

    def _dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: Activation,
        dropout: Dropout | None,
        delta: Array,
    ) -> None:
        np.matmul(delta_next, W_next.T, out=delta)
        self._drop(delta, dropout)
        scale = 1 - dropout.rate if dropout is not None and activation.derivative_from == "a" else 1.0
        code = activations.CODES[activation.name]
        operations.multiply_by_sigma_derivative(code, _flat(kept), scale, _flat(delta))

    def _update(
        self,
        parameters: Array,
        gradients: Array,
        state: Mapping[str, Array],
        optimizer: Optimizer,
        learning_rate: float,
        step: int,
        n_weights: int,
    ) -> None:
        scale = 1.0
        if optimizer.clip_norm is not None:
            norm = math.sqrt(self.sum_squares(gradients))
            if not norm <= optimizer.clip_norm:  # a norm that is not finite makes every gradient NaN, and shows
                scale = optimizer.clip_norm / norm if math.isfinite(norm) else math.nan
        slots: list[Any] = [plain(state[slot]) for slot in optimizer.slots]
        operations.optimize(
            update.CODES[type(optimizer)],
            update.settings(optimizer),
            plain(parameters),
            plain(gradients),
            slots[0],
            slots[-1],
            n_weights,
            float(learning_rate),
            scale,
            step,
        )


BACKEND = CpuBackend
