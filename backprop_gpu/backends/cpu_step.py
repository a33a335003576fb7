"""Whole training steps on the CPU: the host's side of `kernels/numba_cpu/step.py`."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.backends import cpu_plan, threads
from backprop_gpu.backends.contract import AfterStep, Trainer, TrainingJob
from backprop_gpu.backends.minibatches import shares
from backprop_gpu.kernels.numba_cpu import barrier as barriers
from backprop_gpu.kernels.numba_cpu import step, update
from backprop_gpu.kernels.numba_cpu.network import Batches

__all__ = ["StepTrainer", "plain"]

Array = npt.NDArray[Any]

SECONDS_PER_CALL = 0.1
"""How long the compiled steps run before they return to Python, for the progress bar and Ctrl-C."""

PARAMETERS_FOR_A_TEAM = 1 << 16
"""So many are packed and unpacked on all threads: fewer take less time than a thread takes to start."""

BYTES_PER_CALL = 64 << 20
"""Rows made dense for one call, of data that is not in memory as it is needed."""


class StepTrainer(Trainer):
    """Trains a job in whole steps. Within a `run`, parameters and optimizer state live in panels."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.n_threads = 0
        self.settings = update.settings(job.optimizer)

    def run(
        self,
        order: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """See `Trainer.run`."""
        self._prepare(threads.available())
        share, weights = shares(order, self.job.sample_weight, self.job.batch_size)
        self._load()
        total, done, most = 0.0, 0, self._most_steps_per_call()
        n_steps = min(most, 4)
        while done < len(learning_rates):
            steps = slice(done, min(done + n_steps, len(learning_rates)))
            rows = slice(steps.start * self.job.batch_size, steps.stop * self.job.batch_size)
            start = time.perf_counter()
            losses = self._steps(order[rows], share[rows], learning_rates[steps], alphas[steps], first_step + done)
            seconds = time.perf_counter() - start
            total += float(np.dot(losses, weights[steps]))
            done = steps.stop
            if not (np.isfinite(total) and after_step(len(order[rows]))):
                break
            n_steps = min(most, max(1, min(4 * n_steps, int(n_steps * SECONDS_PER_CALL / seconds))))
        self._store()
        return total

    def _prepare(self, n_threads: int) -> None:
        """Plan and memory for so many threads, kept until their number changes."""
        if n_threads == self.n_threads:
            return
        job, self.n_threads = self.job, n_threads
        self.plan = cpu_plan.for_training(job.architecture, job.batch_size, job.dtype, n_threads)
        layout = cpu_plan.Layout(job.architecture, self.plan, job.batch_size, job.dtype)
        self.layers = layout.layers
        self.packers = self.plan.n_threads if layout.n_parameters >= PARAMETERS_FOR_A_TEAM else 1
        self.record = layout.record(job.architecture, job.optimizer, job.batch_size, job.seed)
        self.memory = layout.memory(len(job.optimizer.slots), training=True)

    def _most_steps_per_call(self) -> int:
        if self.job.rows.array is not None:
            return 1 << 40
        bytes_per_step = self.job.batch_size * self.job.rows.shape[1] * self.record.dtype.itemsize
        return max(1, BYTES_PER_CALL // bytes_per_step)

    def _steps(self, order: Array, share: Array, learning_rates: Array, alphas: Array, first_step: int) -> Array:
        """C of each step."""
        job, plan = self.job, self.plan
        batches = self._batches(order, share)
        losses = np.zeros((plan.n_threads, len(learning_rates)))
        barrier = barriers.new()

        def work(thread: int) -> None:
            step.train(
                thread,
                self.record,
                self.layers,
                batches,
                self.memory,
                barrier,
                self.settings,
                learning_rates,
                alphas,
                first_step + 1,
                job.steps_before + first_step,
                losses,
            )

        threads.run(plan.n_threads, work, lambda: barriers.stop(barrier))
        total: Array = losses.sum(axis=0)
        return total

    def _batches(self, order: Array, share: Array) -> Batches:
        """The rows of some mini-batches: all data and which of it, or where the data is elsewhere, just these rows."""
        x, target = self.job.rows.array, self.job.target
        if x is None:
            x, target, order = self.job.rows.take(order), target[order], np.arange(len(order))
        labels = target if target.ndim == 1 else np.empty(0, np.int32)
        values = target if target.ndim == 2 else np.empty((0, 0), self.job.dtype)
        return Batches(plain(x), plain(labels), plain(values), plain(order), share)

    def _load(self) -> None:
        vectors = [(plain(flat), packed) for flat, packed in self._vectors()]

        def pack(thread: int) -> None:
            for flat, packed in vectors:
                step.load(thread, self.packers, self.layers, flat, packed)

        threads.run(self.packers, pack)
        threads.run(self.packers, lambda thread: step.transpose(thread, self.packers, self.layers, self.memory))

    def _store(self) -> None:
        vectors = [(flat, plain(flat), packed) for flat, packed in self._vectors()]

        def unpack(thread: int) -> None:
            for _, flat, packed in vectors:
                step.store(thread, self.packers, self.layers, packed, flat)

        threads.run(self.packers, unpack)
        for flat, unpacked, _ in vectors:
            if not np.shares_memory(flat, unpacked):  # an array that is not aligned
                flat[...] = unpacked

    def _vectors(self) -> list[tuple[Array, Array]]:
        """Each flat vector of the job, with its packed form."""
        slots = [self.job.state[slot] for slot in self.job.optimizer.slots]
        packed = (self.memory.parameters, self.memory.slot_1, self.memory.slot_2)
        return list(zip((self.job.parameters, *slots), packed, strict=False))


def plain(x: Array) -> Array:
    """`x` as an array that Numba needs no further variant of the code for: aligned, writeable, of no subclass."""
    if type(x) is np.ndarray and x.flags.writeable and x.flags.aligned:
        return x
    if x.nbytes == 0 or not x.flags.aligned:
        return np.array(x)
    memory: Any = (ctypes.c_char * x.nbytes).from_address(x.ctypes.data)
    memory.array = x  # which lives as long as this view of it
    view: Array = np.frombuffer(memory, x.dtype)
    return view.reshape(x.shape)
