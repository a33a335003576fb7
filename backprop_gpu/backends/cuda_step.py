"""Whole training steps on the GPU: every buffer allocated beforehand, a step captured as a CUDA graph and replayed.

What changes from step to step lies in tables on the device, and kernels find their place in them by counters there:

    counters[0]   steps done in this `run`: the row of the tables, and the place in the order of the epoch
    counters[1]   updates that the network had: the step of the dropout masks

So a captured graph fits every step, the last kernel of a step counts it, and the host waits once, when a `run` ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backprop_gpu.backends import cuda_plan
from backprop_gpu.backends.contract import AfterStep, Array, Dropout, Trainer, TrainingJob, shares, starts_of
from backprop_gpu.backends.cuda_data import data_of
from backprop_gpu.backends.cuda_kernels import STEP_NUMBERS, Kernels, Launch, Whole, step_numbers, stretches
from backprop_gpu.backends.cuda_plan import NUMBERS
from backprop_gpu.backends.cuda_products import Launchable, Products

__all__ = ["StepTrainer"]

STEPS_PER_GRAPH = 8
"""Steps in one graph where there are as many, so that they cost one launch. Not yet measured."""

FIRST_LOSS_SCALE = 2.0**15
"""What float16's δ are multiplied by at first; it adapts (`LossScale` of update.cu)."""


class StepTrainer(Trainer):
    """Trains a job in whole steps."""

    def __init__(self, job: TrainingJob, kernels: Kernels) -> None:
        self.job, self.kernels, self.cp = job, kernels, kernels.cp
        self.stream, self.beside = (self.cp.cuda.Stream(non_blocking=True) for _ in range(2))
        self.graphs: dict[tuple[int, int], Any] = {}
        self.steps: dict[int, Step] = {}
        """By rows of a mini-batch. Graphs replay addresses, so what they were captured from lives as long as they."""
        self.tables = Tables(job, self.cp, 0)
        with self._memory_told(), self._ordered():
            products = Products(kernels, job.dtype, job.tune, (self.stream, self.beside))
            self.buffers = Buffers(job, kernels, products)
            self.data = data_of(job, self.cp)

    def rest(self) -> bool:
        """See `Trainer.rest`."""
        self.job = self.buffers.job = self.job.without_rows()
        return self.data.take_over(self.job) and self.job.in_stream

    def take_over(self, job: TrainingJob) -> bool:
        """See `Trainer.take_over`: graphs stay, as the rows are copied to where the last ones were."""
        target = self.buffers.target
        fits = len(job.target) <= len(target) and job.target.shape[1:] == target.shape[1:]
        if not (fits and job.goes_on_from(self.job) and self._as_weighted(job)):
            return False
        with self._memory_told(), self._ordered():
            if not self.data.take_over(job):
                return False
            target[: len(job.target)].set(job.target)
        self.job = job
        return True

    def _as_weighted(self, job: TrainingJob) -> bool:
        """Whether the steps read weights where this job has some."""
        return (job.sample_weight is None) == (self.tables.share is None)

    def run(
        self,
        order: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """See `Trainer.run`."""
        share, weights = shares(order, self.job.sample_weight, starts_of(len(order), self.job.batch_size))
        numbers = step_numbers(self.job.optimizer, learning_rates, alphas, first_step)
        with self._memory_told(), self._ordered():
            self._make_room(len(numbers))
            tables = self.tables
            self.buffers.begin()
            tables.fill(numbers, order, share, self.job.steps_before + first_step)
            self.data.begin(order, tables.row_order)
            done = self._steps(len(order), len(numbers), after_step)
            losses = self.cp.asnumpy(tables.losses[:done])
        return float(np.dot(losses, weights[:done]))

    def _steps(self, n_rows: int, n_steps: int, after_step: AfterStep) -> int:
        """Hands all steps to the GPU, until the caller has enough; how many they were."""
        size = self.job.batch_size
        n_whole = n_rows // size
        for begin in range(0, n_steps, self.data.steps):
            end = min(begin + self.data.steps, n_steps)
            with self.data.window(begin, end, self.stream):
                self._launch(min(end, n_whole) - begin, size)
                self._launch(end - max(begin, n_whole), n_rows - n_whole * size)
            if not after_step(min(end * size, n_rows) - begin * size):
                return end
        return n_steps

    def _launch(self, n_steps: int, n_rows: int) -> None:
        """So many steps, if any, with mini-batches of n_rows rows."""
        for steps in (STEPS_PER_GRAPH, 1):
            while n_steps >= steps:
                self._graph(steps, n_rows).launch(self.stream)
                n_steps -= steps

    def _graph(self, n_steps: int, n_rows: int) -> Any:
        key = (n_steps, n_rows)
        if key not in self.graphs:
            step = self._step(n_rows)  # which compiles and allocates: a capture must not
            self.stream.begin_capture()
            for _ in range(n_steps):
                step(self.stream, self.beside)
            self.graphs[key] = self.stream.end_capture()
        return self.graphs[key]

    def _step(self, n_rows: int) -> Step:
        if n_rows not in self.steps:
            self.steps[n_rows] = self.buffers.step(n_rows, self.tables, self.data.rows)
        return self.steps[n_rows]

    def _make_room(self, n_steps: int) -> None:
        """Tables for so many steps; graphs hold the addresses of the ones that they were captured with."""
        if n_steps > self.tables.n_steps:
            self.graphs.clear()
            self.steps.clear()
            self.tables = Tables(self.job, self.cp, n_steps)

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """On this trainer's stream, after what the caller's stream has to do, and before what it gets to do later."""
        caller = self.cp.cuda.get_current_stream()
        self.stream.wait_event(caller.record())
        try:
            with self.stream:
                yield
        finally:
            caller.wait_event(self.stream.record())

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Out of memory: what was wanted, and what to change."""
        try:
            yield
        except self.cp.cuda.memory.OutOfMemoryError as error:
            free, total = (n / 2**20 for n in self.cp.cuda.Device().mem_info)
            raise MemoryError(
                f"training with batch_size={self.job.batch_size} takes {Buffers.n_bytes(self.job) / 2**20:.0f} MiB of "
                f"the GPU beside the data, and {free:.0f} of its {total:.0f} MiB are free ({error}); take a smaller "
                "batch_size, free other arrays (cupy.get_default_memory_pool().free_all_blocks()), or backend='cpu'"
            ) from error


class Tables:
    """What the host tells the device for one `run` of up to n_steps steps, and hears back."""

    def __init__(self, job: TrainingJob, cp: Any, n_steps: int) -> None:
        self.n_steps, n_rows = n_steps, n_steps * job.batch_size
        self.counters = cp.empty((2,), "uint32")
        self.numbers = cp.empty((n_steps, len(STEP_NUMBERS)), "float64")
        self.losses = cp.empty((n_steps,), "float64")
        self.target_order, self.row_order = cp.empty((n_rows,), "int64"), cp.empty((n_rows,), "int64")
        self.share = None if job.sample_weight is None else cp.empty((n_rows,), "float64")

    def fill(
        self,
        numbers: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        share: npt.NDArray[np.float64],
        updates_before: int,
    ) -> None:
        """Everything but the places of the rows, which the data knows."""
        self.counters.set(np.array([0, updates_before & 0xFFFFFFFF], np.uint32))
        self.numbers[: len(numbers)].set(numbers)
        self.target_order[: len(order)].set(order)
        if self.share is not None:
            self.share[: len(order)].set(share)


class Step(NamedTuple):
    """The launches of one step, in their order."""

    forward: list[Launchable]
    """The rows of the mini-batch, every layer, the loss and δ of the output layer."""
    backward: list[tuple[Launchable, Launchable | None]]
    """From the output layer on: a layer's dW and db, and δ of the layer below; neither needs the other."""
    update: Launchable

    def __call__(self, stream: Any, beside: Any) -> None:
        """On `stream`, the current one; the gradients on the stream `beside` it, while δ goes on down the layers."""
        for launch in self.forward:
            launch()
        for gradients, delta in self.backward:
            beside.wait_event(stream.record())
            with beside:
                gradients()
            if delta is not None:
                delta()
        stream.wait_event(beside.record())
        self.update()


class Buffers:
    """All arrays that a step works in, for mini-batches of up to batch_size rows, and the launches of a step."""

    def __init__(self, job: TrainingJob, kernels: Kernels, products: Products) -> None:
        self.job, self.kernels, self.products = job, kernels, products
        cp, sizes, N, dtype = kernels.cp, job.architecture.layer_sizes, job.batch_size, job.parameters.dtype
        operand = NUMBERS[job.dtype].array
        self.a = [cp.empty((N, n), operand) for n in sizes[:-1]]  # a[0] is X
        self.z = [
            cp.empty((N, n), operand) if activation.derivative_from == "z" else None
            for n, activation in zip(sizes[1:-1], job.architecture.activations, strict=True)
        ]
        self.z_out = cp.empty((N, sizes[-1]), dtype)
        self.delta = [cp.empty((N, n), operand) for n in sizes[1:]]
        self.target = cp.asarray(job.target)
        self.copy = None if operand == dtype else cp.empty(job.parameters.shape, operand)
        self.W, _ = job.architecture.views(job.parameters if self.copy is None else self.copy)
        _, self.b = job.architecture.views(job.parameters)
        self.loss_scale = cp.asarray(np.array([FIRST_LOSS_SCALE, 0.0])) if job.dtype == "float16" else None
        if products.tuning is not None:
            for buffer in (*self.a, *self.delta, *(z for z in self.z if z is not None)):
                products.tuning.fill(buffer, job.dtype)
        # Clipping, and leaving a step out, need the whole gradient before the first parameter changes.
        whole = job.optimizer.clip_norm is not None or self.loss_scale is not None
        self.gradients = cp.empty(job.parameters.shape, dtype) if whole else None
        self.squares = cp.empty((job.architecture.n_layers,), "float64") if whole else None

    def begin(self) -> None:
        """A run begins: the parameters may have changed since the last one."""
        if self.copy is not None:
            self.kernels.convert(self.job.parameters, self.copy, self.job.dtype)()

    @staticmethod
    def n_bytes(job: TrainingJob) -> int:
        """About how much memory a step takes: activations, what σ′ needs, δ, gradients in parts."""
        of_rows = 3 * job.batch_size * sum(job.architecture.layer_sizes)
        return int((of_rows + 4 * job.architecture.n_parameters) * job.parameters.dtype.itemsize)

    def step(self, n_rows: int, tables: Tables, rows: Array) -> Step:
        """The launches of a step with n_rows rows: 3 L + 2."""
        a, delta = [x[:n_rows] for x in self.a], [x[:n_rows] for x in self.delta]
        z, z_out = [None if x is None else x[:n_rows] for x in self.z], self.z_out[:n_rows]
        place = (tables.row_order, tables.counters, a[0], self.job.batch_size)
        gather = self.kernels.gather(rows, *place, dtype=self.job.dtype)
        gradients = Gradients(self.job, self.kernels, self.products, n_rows, self.squares is not None)
        layers = reversed(range(self.job.architecture.n_layers))
        return Step(
            [gather, *self._forward(a, z, z_out, tables), self._output_delta(z_out, delta[-1], tables)],
            [
                (
                    gradients.of_layer(i, a[i], delta[i], self._whole(i, tables)),
                    self._backward(i, a, z, delta, tables) if i else None,
                )
                for i in layers
            ],
            self._update(gradients, tables),
        )

    def _whole(self, layer: int, tables: Tables) -> Whole | None:
        """Where the whole gradients of a layer go, and what belongs to them."""
        if self.squares is None:
            return None
        dW, db = self.job.architecture.views(self.gradients)
        W, _ = self.job.architecture.views(self.job.parameters)
        return Whole(
            dW[layer],
            db[layer],
            W[layer],
            numbers=tables.numbers,
            steps_done=tables.counters,
            loss_scale=self.loss_scale,
            squares=self.squares[layer : layer + 1],
        )

    def _forward(self, a: list[Array], z: list[Array | None], z_out: Array, tables: Tables) -> list[Launchable]:
        forward = self.products.forward
        hidden = [
            forward(
                a[layer],
                self.W[layer],
                self.b[layer],
                a[layer + 1],
                z[layer],
                self._sigma(layer),
                self._dropout(layer),
                tables.counters[1:],
            )
            for layer in range(len(z))
        ]
        return [*hidden, forward(a[-1], self.W[-1], self.b[-1], z_out, None, "identity", None, tables.counters[1:])]

    def _backward(
        self, layer: int, a: list[Array], z: list[Array | None], delta: list[Array], tables: Tables
    ) -> Launchable:
        """δ of the layer below `layer`."""
        below = layer - 1
        return self.products.backward(
            delta[layer],
            self.W[layer],
            a[layer] if z[below] is None else z[below],
            delta[below],
            self._sigma(below),
            self._dropout(below),
            tables.counters[1:],
        )

    def _sigma(self, layer: int) -> str:
        return self.job.architecture.activations[layer].name

    def _dropout(self, layer: int) -> Dropout | None:
        """The layer's dropout at step 0, to which the kernels add the counter."""
        rate = self.job.architecture.dropout[layer]
        return Dropout(rate, self.job.seed, layer, 0) if rate else None

    def _output_delta(self, z: Array, delta: Array, tables: Tables) -> Launch:
        return self.kernels.output_delta(
            z,
            self.target,
            delta,
            tables.losses,
            self.job.architecture.loss,
            self.job.architecture.output_activation,
            order=tables.target_order,
            share=tables.share,
            steps_done=tables.counters,
            batch_size=self.job.batch_size,
            delta_scale=self.loss_scale,
            dtype=self.job.dtype,
            scratch=self.kernels.scratch(self.kernels.output_delta_blocks(*z.shape)),
        )

    def _update(self, gradients: Gradients, tables: Tables) -> Launchable:
        """The pass of the optimizer."""
        job, n_blocks = self.job, gradients.n_blocks
        parts = (gradients.parts, gradients.table) if self.gradients is None else (self.gradients, gradients.of_whole)
        return self.kernels.update(
            job.parameters,
            [job.state[slot] for slot in job.optimizer.slots],
            *parts,
            n_blocks,
            job.optimizer,
            numbers=tables.numbers,
            counters=tables.counters,
            losses=tables.losses,
            squares=self.squares,
            loss_scale=self.loss_scale,
            copy=self.copy,
            dtype=job.dtype,
            scratch=self.kernels.scratch(n_blocks),
        )


class Gradients:
    """The gradients of a step in parts, those of W[l] and of b[l] each by themselves, as the flat vector has them."""

    def __init__(self, job: TrainingJob, kernels: Kernels, products: Products, n_rows: int, whole: bool) -> None:
        self.products = products
        shapes, dtype = list(pairwise(job.architecture.layer_sizes)), job.parameters.dtype
        self.plans = [cuda_plan.parts(n_rows, *shape, job.dtype, kernels.gpu, whole=whole) for shape in shapes]
        n_parts = [plan.n_parts for plan in self.plans]
        counts = [n_in * n_out for n_in, n_out in shapes] + [n_out for _, n_out in shapes]
        are_weights = [True] * len(shapes) + [False] * len(shapes)
        table = stretches(list(zip(counts, n_parts + n_parts, are_weights, strict=True)))
        self.begins = [int(begin) for begin in table[:, 2]]
        self.parts = kernels.cp.empty((self.begins[-1] + counts[-1] * n_parts[-1],), dtype)
        self.table = kernels.cp.asarray(table)
        in_one = [(count, 1, is_weights) for count, is_weights in zip(counts, are_weights, strict=True)]
        self.of_whole = kernels.cp.asarray(stretches(in_one, 1))
        self.n_blocks = kernels.parameter_blocks(counts)

    def of_layer(self, layer: int, a_prev: Array, delta: Array, whole: Whole | None) -> Launchable:
        """dense_gradients of that layer, into its parts, and whole."""
        plan, n_in, n_out = self.plans[layer], a_prev.shape[1], delta.shape[1]
        dW = self._view(layer, plan.n_parts * n_in * n_out).reshape(plan.n_parts, n_in, n_out)
        db = self._view(layer + len(self.plans), plan.n_parts * n_out).reshape(plan.n_parts, n_out)
        return self.products.gradients(a_prev, delta, dW, db, plan, whole)

    def _view(self, stretch: int, count: int) -> Array:
        return self.parts[self.begins[stretch] : self.begins[stretch] + count]
