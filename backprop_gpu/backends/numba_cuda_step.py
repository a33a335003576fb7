"""Whole training steps on the device: the data lies there, and an epoch reads back nothing but its losses.

A step of L layers is 3L + 2 launches: gather, L forward, the output δ with the cost, L − 1 backward, L gradients, and
the update, which adds up the gradients' parts. A penalty adds one, to report it, and clipping two before the update.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.backends import numba_cuda_arrays as arrays
from backprop_gpu.backends import numba_cuda_kernels as kernels
from backprop_gpu.backends import numba_cuda_plan as plan
from backprop_gpu.backends.contract import AfterStep, Dropout, Trainer, TrainingJob, shares, starts_of
from backprop_gpu.backends.numba_cuda_arrays import Array
from backprop_gpu.backends.numba_cuda_kernels import Launch
from backprop_gpu.kernels.numba_cuda import reductions
from backprop_gpu.kernels.numba_cuda import update as update_kernels

__all__ = ["StepTrainer", "stretches_of"]

SECONDS_PER_READ = 0.25
"""How long the host launches steps before it waits for them and looks at their losses."""

FIRST_READ = 256
"""Steps before the first look; later ones follow from the time that they took."""

BYTES_PER_UPLOAD = 64 << 20
"""Rows made dense for one upload, of data that is not in memory as it is needed, or too large for the device."""


def stretches_of(rows: list[tuple[int, int, int, bool]]) -> Array:
    """(first, stop, n_parts, whether weights) of each stretch of the flat vectors, on the device."""
    return arrays.asarray(np.array(rows, np.int64))


class StepTrainer(Trainer):
    """Trains a job in whole steps."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.target = job, _target_of(job)
        self.stream = arrays.stream_of(job.parameters, *job.state.values())
        self.steps_per_read = FIRST_READ
        X = job.rows.array
        fits = 2 * self._bytes(len(job.rows)) <= arrays.free_bytes()
        self.resident = X is not None and (arrays.is_on_device(X) or (fits and not job.in_stream))
        self.data = (arrays.asarray(X), arrays.asarray(self.target)) if self.resident else None
        self.passes = _Passes(job, self.stream)
        self.uploads: _Uploads | None = None

    def rest(self) -> bool:
        """See `Trainer.rest`."""
        self.job = self.job.without_rows()
        self.target = _target_of(self.job)
        return not self.resident

    def take_over(self, job: TrainingJob) -> bool:
        """See `Trainer.take_over`: launches stay, as the rows are copied to where the last ones were."""
        target, on_device = _target_of(job), job.rows.array is not None and arrays.is_on_device(job.rows.array)
        if on_device or target.shape[1:] != self.target.shape[1:] or not job.goes_on_from(self.job):
            return False
        self.job, self.target = job, target
        return True

    def run(
        self,
        order: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """See `Trainer.run`."""
        size, n_steps = self.job.batch_size, len(learning_rates)
        share, weights = shares(order, self.job.sample_weight, starts_of(len(order), size))
        numbers = self._numbers_of_step(learning_rates, alphas, first_step)
        uploads = self._prepare(len(order), n_steps, bool(alphas.any()))
        weighted: list[float] = []  # weight · C of each step
        done = 0
        while done < n_steps:
            first = done % uploads.n_steps
            if first == 0:
                steps = slice(done, done + uploads.n_steps)
                rows = slice(steps.start * size, steps.stop * size)
                uploads.write(*self._rows(order[rows]), share[rows], numbers[steps])
            n = min(self.steps_per_read, uploads.n_steps - first, n_steps - done)
            n_rows = min(n * size, len(order) - done * size)
            costs, penalties = self._steps(uploads, first, n_rows, self.job.steps_before + first_step + done)
            some = slice(done, done + n)
            weighted.extend(weights[some] * (costs + alphas[some] * penalties))
            done += n
            if not (np.isfinite(weighted[-n:]).all() and after_step(n_rows)):
                break
        return math.fsum(weighted) if np.isfinite(weighted).all() else math.nan

    def _rows(self, order: npt.NDArray[np.int64]) -> tuple[Any, Any, Any]:
        """X and target of the next steps, None where the data is on the device, and the rows' numbers there."""
        if self.resident:
            return None, None, order
        return self.job.rows.take(order), self.target[order], np.arange(len(order))

    def _numbers_of_step(self, learning_rates: Any, alphas: Any, first_step: int) -> npt.NDArray[np.float64]:
        numbered = enumerate(zip(learning_rates, alphas, strict=True), start=first_step + 1)
        optimizer = self.job.optimizer
        return np.array([update_kernels.numbers(optimizer, rate, alpha, step) for step, (rate, alpha) in numbered])

    def _bytes(self, n_rows: int) -> int:
        bytes_per_row = self.job.rows.shape[1] * int(self.job.parameters.dtype.itemsize) + self.target[:1].nbytes
        return n_rows * bytes_per_row

    def _prepare(self, n_rows: int, n_steps: int, penalised: bool) -> _Uploads:
        """Room for the steps of a run, kept until a run is another one."""
        if not self.resident:
            n_steps = min(n_steps, max(1, BYTES_PER_UPLOAD // self._bytes(self.job.batch_size)))
            n_rows = min(n_rows, n_steps * self.job.batch_size)
        if self.uploads is None or self.uploads.is_for != (n_rows, n_steps, penalised):
            self.uploads = _Uploads(self.job, self.target.shape[1], self.data, n_rows, n_steps, penalised, self.stream)
            self.sequences: dict[int, list[Launch]] = {}
        return self.uploads

    def _steps(
        self, uploads: _Uploads, first: int, n_rows: int, number: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Takes the steps from row `first` of what is uploaded on; C of each without the penalty, and ½ Σ W²."""
        start, size = time.perf_counter(), self.job.batch_size
        n = -(-n_rows // size)
        for i in range(n):
            for launch in self._sequence(uploads, min(size, n_rows - i * size)):
                launch(first + i, number + i)
        costs = uploads.read_costs(first, n, n_rows - (n - 1) * size)
        penalties = uploads.read_penalties(first, n)
        pace = SECONDS_PER_READ / max(time.perf_counter() - start, 1e-9)
        self.steps_per_read = max(1, min(4 * self.steps_per_read, int(n * pace)))
        return costs, penalties

    def _sequence(self, uploads: _Uploads, n_rows: int) -> list[Launch]:
        """The launches of a step with so many rows: all mini-batches but the last have the same."""
        if n_rows not in self.sequences:
            self.sequences[n_rows] = self.passes.sequence(uploads, n_rows)
        return self.sequences[n_rows]


def _target_of(job: TrainingJob) -> npt.NDArray[Any]:
    """(n_rows, 1 or n_outputs)."""
    return np.ascontiguousarray(job.target.reshape(len(job.target), job.target.shape[1] if job.target.ndim > 1 else 1))


class _Uploads:
    """What the steps of a run read from the host, and the losses that they leave for it."""

    def __init__(
        self,
        job: TrainingJob,
        n_targets: int,
        data: tuple[Array, Array] | None,
        n_rows: int,
        n_steps: int,
        penalised: bool,
        stream: Any,
    ) -> None:
        self.stream = stream
        self.is_for = (n_rows, n_steps, penalised)
        self.n_steps = n_steps
        self.X, self.target = data or (
            arrays.empty((n_rows, job.rows.shape[1]), job.parameters.dtype, stream),
            arrays.empty((n_rows, n_targets), job.target.dtype, stream),
        )
        self.order = arrays.empty((n_rows,), "int64", stream)
        self.share = arrays.empty((n_rows,), "float64", stream)
        self.numbers = arrays.empty((n_steps, update_kernels.N_NUMBERS), "float64", stream)
        self.n_outputs = job.architecture.layer_sizes[-1]
        n_blocks = kernels.n_cost_blocks(min(job.batch_size, n_rows), self.n_outputs)
        self.costs = arrays.empty((n_steps, n_blocks), "float64", stream)
        n_blocks = reductions.shape(job.architecture.n_weights)[0]
        self.penalties = arrays.empty((n_steps, n_blocks), "float64", stream) if penalised else None

    def write(self, *values: Any) -> None:
        """X, target, order, share and numbers of the next steps; None leaves what is there."""
        for array, some in zip((self.X, self.target, self.order, self.share, self.numbers), values, strict=True):
            if some is not None:
                self._write(array, some)

    def _write(self, array: Array, values: Any) -> None:
        array[: len(values)].copy_to_device(np.ascontiguousarray(values), stream=self.stream)

    def read_costs(self, first: int, n: int, last_rows: int) -> npt.NDArray[Any]:
        """C of steps first … first + n − 1, of which the last one has `last_rows` rows and so, maybe, fewer parts."""
        parts = arrays.to_host(self.costs[first : first + n])
        parts[-1, kernels.n_cost_blocks(last_rows, self.n_outputs) :] = 0
        costs: npt.NDArray[Any] = parts.sum(axis=1)
        return costs

    def read_penalties(self, first: int, n: int) -> npt.NDArray[Any]:
        """½ Σ W² before each of these steps; 0 where no penalty asks for it."""
        if self.penalties is None:
            return np.zeros(n)
        penalties: npt.NDArray[Any] = 0.5 * arrays.to_host(self.penalties[first : first + n]).sum(axis=1)
        return penalties


class _Passes:
    """The buffers of a step, for the largest mini-batch, and the launches that fill them."""

    def __init__(self, job: TrainingJob, stream: Any) -> None:
        self.job, self.stream, arch = job.without_rows(), stream, job.architecture
        n, dtype = min(job.batch_size, len(job.rows)), job.parameters.dtype

        def buffer(width: int) -> Array:
            return arrays.empty((n, width), dtype, stream)

        self.a = [buffer(width) for width in arch.layer_sizes]
        """The mini-batch's X, the activations of the hidden layers, z of the output layer."""
        self.z = [
            buffer(width) if activation.derivative_from == "z" else None
            for width, activation in zip(arch.layer_sizes[1:], arch.activations, strict=False)
        ]
        self.delta = [buffer(width) for width in arch.layer_sizes[1:]]
        self.target = arrays.empty((n, _target_of(job).shape[1]), job.target.dtype, stream)
        most_parts = max(division.n for division in self._divisions(n))
        self.parts = arrays.empty((most_parts, arch.n_parameters), dtype, stream)
        self.slots = [job.state[slot] for slot in job.optimizer.slots]
        self.scale = arrays.asarray(np.ones(1))

    def _divisions(self, n_rows: int) -> list[plan.Division]:
        """How each layer's rows are divided."""
        sizes, dtype = self.job.architecture.layer_sizes, self.job.parameters.dtype.name
        return [plan.division(shape, n_rows, dtype) for shape in pairwise(sizes)]

    def sequence(self, uploads: _Uploads, n_rows: int) -> list[Launch]:
        """The launches of one step of n_rows rows, in order."""
        divisions = self._divisions(n_rows)
        return [
            kernels.gather(
                uploads.X,
                uploads.target,
                uploads.order,
                self.a[0][:n_rows],
                self.target[:n_rows],
                self.job.batch_size,
                self.stream,
            ),
            *self._forward(n_rows),
            self._output_delta(uploads, n_rows),
            *self._backward(n_rows, divisions),
            *self._update(uploads, divisions),
        ]

    def _dropout(self, layer: int) -> Dropout | None:
        rate = self.job.architecture.dropout[layer]
        return Dropout(rate, self.job.seed, layer, 0) if rate else None

    def _forward(self, n: int) -> list[Launch]:
        arch = self.job.architecture
        W, b = arch.views(self.job.parameters)
        made = []
        for layer, activation in enumerate([*arch.activations, ACTIVATIONS["identity"]]):
            hidden = layer < arch.n_layers - 1
            z = self.z[layer] if hidden else None
            made.append(
                kernels.dense_forward(
                    self.a[layer][:n],
                    W[layer],
                    b[layer],
                    activation,
                    self._dropout(layer) if hidden else None,
                    self.a[layer + 1][:n],
                    None if z is None else z[:n],
                    self.stream,
                )
            )
        return made

    def _output_delta(self, uploads: _Uploads, n: int) -> Launch:
        arch = self.job.architecture
        return kernels.output_delta(
            self.a[-1][:n],
            self.target[:n],
            arch.loss,
            arch.output_activation,
            uploads.share,
            self.delta[-1][:n],
            uploads.costs,
            self.job.batch_size,
            self.stream,
        )

    def _backward(self, n: int, divisions: list[plan.Division]) -> list[Launch]:
        """From the output layer down: ∂C/∂W and ∂C/∂b of a layer, then δ of the one below."""
        arch = self.job.architecture
        W, _ = arch.views(self.job.parameters)
        made = []
        for layer in reversed(range(arch.n_layers)):
            delta = self.delta[layer][:n]
            first_W, first_b = self._places(layer)
            made.append(
                kernels.dense_gradients(
                    self.a[layer][:n], delta, self.parts, first_W, first_b, divisions[layer], self.stream
                )
            )
            if layer > 0:
                below = layer - 1
                z = self.z[below]
                kept = self.a[layer] if z is None else z
                made.append(
                    kernels.dense_backward(
                        delta,
                        W[layer],
                        kept[:n],
                        arch.activations[below],
                        self._dropout(below),
                        self.delta[below][:n],
                        self.stream,
                    )
                )
        return made

    def _places(self, layer: int) -> tuple[int, int]:
        """Where the weights and the biases of a layer begin in the flat vectors."""
        sizes = self.job.architecture.layer_sizes
        before = sum(n_in * n_out for n_in, n_out in pairwise(sizes[: layer + 1]))
        return before, self.job.architecture.n_weights + sum(sizes[1 : layer + 1])

    def _update(self, uploads: _Uploads, divisions: list[plan.Division]) -> list[Launch]:
        job, stream, numbers = self.job, self.stream, uploads.numbers
        sizes, penalty, clip = job.architecture.layer_sizes, [], []
        rows = []
        for layer, division in enumerate(divisions):
            W, b = self._places(layer)
            rows += [
                (W, W + sizes[layer] * sizes[layer + 1], division.n, True),
                (b, b + sizes[layer + 1], division.n, False),
            ]
        longest = max(stop - first for first, stop, _, _ in rows)
        parts, stretches = self.parts, stretches_of(rows)
        if uploads.penalties is not None:
            penalty = [kernels.sum_squares(job.parameters[: job.architecture.n_weights], uploads.penalties, stream)]
        if job.optimizer.clip_norm is not None:
            n_blocks = reductions.shape(longest)[0] * len(rows)
            squares = arrays.empty((n_blocks,), "float64", stream)
            gradients = arrays.empty((job.parameters.size,), job.parameters.dtype, stream)
            clip = [
                kernels.total_gradients(parts, stretches, longest, job.parameters, gradients, squares, numbers, stream),
                kernels.clip_scale(squares, job.optimizer.clip_norm, self.scale, stream),
            ]
            parts, stretches = gradients.reshape(1, gradients.size), stretches_of([(*r[:2], 1, r[3]) for r in rows])
        update = kernels.update(
            job.parameters, self.slots, parts, stretches, longest, self.scale, numbers, job.optimizer, stream
        )
        return [*penalty, *clip, update]
