"""Whole training steps on the CPU: the host's side of `kernels/numba_cpu/step.py`."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.backends import cpu_plan, threads
from backprop_gpu.backends.contract import AfterStep, Trainer, TrainingJob, shares, starts_of
from backprop_gpu.data import Entries
from backprop_gpu.kernels.numba_cpu import operations, step, update
from backprop_gpu.kernels.numba_cpu.compile import outline
from backprop_gpu.kernels.numba_cpu.network import Batches
from backprop_gpu.kernels.numba_cpu.team import new_barrier

__all__ = ["StepTrainer", "no_entries", "plain"]

Array = npt.NDArray[Any]

SECONDS_PER_CALL = 0.1
"""How long the compiled steps run before they return to Python, for the progress bar and Ctrl-C."""

BYTES_PER_CALL = 64 << 20
"""Rows made dense for one call, of data that is not in memory as it is needed."""


class StepTrainer(Trainer):
    """Trains a job in whole steps. Parameters live in panels during a `run`, and the state after it too."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.n_threads = 0
        self.data = cpu_plan.DENSE
        self.norms = np.full((1, 2), np.nan)
        """Those of the memory: [0, 1] is a number once a guarded run has stored its outcome."""
        self.codes: dict[Any, Callable[..., bool]] = {}
        """Machine code of `step.train`, by the types of the arguments that may change."""
        self.barrier = new_barrier()
        self.resting: TrainingJob | None = None
        """The job as it is between calls, without rows."""
        self.next_step = 0
        """After so many updates, the optimizer's state is in panels still; 0 where it has to be packed."""
        self.steps_per_call = 4
        self.settings = update.settings(job.optimizer)

    @property
    def finite(self) -> bool:
        """See `Trainer.finite`."""
        return math.isfinite(self.norms[0, 1])

    def rest(self) -> bool:
        """See `Trainer.rest`."""
        self.resting = self.resting or self.job.without_rows()
        self.job, self.norms[0, 1] = self.resting, np.nan
        return True

    def take_over(self, job: TrainingJob) -> bool:
        """See `Trainer.take_over`: all memory is kept, and with it the optimizer's state in panels."""
        if not job.goes_on_from(self.job) or (job.rows.entries is not None) != self.data.sparse:
            return False
        self.job = job
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
        starts = starts_of(order.size, self.job.batch_size)
        made, totals = self._train(order, starts, learning_rates, alphas, first_step, after_step, guarded=True)
        return float((made.sum(axis=1) * totals[: len(made)]).sum())

    def run_epochs(
        self,
        orders: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> npt.NDArray[np.float64]:
        """See `Trainer.run_epochs`: one run, of mini-batches that end where an epoch does."""
        n_epochs, n_rows = orders.shape
        first_rows = n_rows * np.arange(n_epochs)[:, None] + starts_of(n_rows, self.job.batch_size)[:-1]
        starts = np.append(first_rows, orders.size)
        rates, penalties = learning_rates.ravel(), alphas.ravel()
        made, _ = self._train(orders.ravel(), starts, rates, penalties, first_step, after_step, guarded=False)
        losses = np.full((*learning_rates.shape, 2), np.nan)
        losses.reshape(-1, 2)[: len(made)] = made
        return losses

    def _train(
        self,
        order: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
        guarded: bool,
    ) -> tuple[Array, Array]:
        """A step for each mini-batch order[starts[s] : starts[s + 1]]; guarded : as `Trainer.finite` promises of `run`.

        Returns (C without the penalty, the penalty) of each step made, and the total weight of every mini-batch.
        """
        self._prepare(threads.available())
        self.norms[0, 1] = np.nan
        share, totals = shares(order, self.job.sample_weight, starts)
        vectors = self._vectors()
        n_loaded = 1 if 0 < first_step == self.next_step else len(vectors)
        self.next_step = 0
        done, losses, most = 0, [np.empty((0, 2))], self._most_steps_per_call()
        while done < len(learning_rates):
            steps = slice(done, min(done + min(most, self.steps_per_call), len(learning_rates)))
            rows = slice(starts[steps.start], starts[steps.stop])
            start = time.perf_counter()
            losses.append(
                self._steps(
                    self._batches(order[rows], share[rows]),
                    starts[steps.start : steps.stop + 1] - rows.start,
                    learning_rates[steps],
                    alphas[steps],
                    first_step + done,
                    self.record,
                    self.layers,
                    self.parts,
                    vectors,
                    n_loaded if done == 0 else 0,
                    len(vectors) if steps.stop == len(learning_rates) else 0,
                    guarded,
                )
            )
            self._note_speed((steps.stop - done) / (time.perf_counter() - start))
            done = steps.stop
            if not (np.isfinite(losses[-1]).all() and after_step(int(rows.stop - rows.start))):
                break
        if done < len(learning_rates):
            self._end_early(losses[-1], vectors, guarded)
        if self.finite or not guarded:
            self._copy_back(vectors)
            self.next_step = first_step + done
        return np.concatenate(losses), totals

    def _end_early(self, losses: Array, vectors: tuple[Array, ...], guarded: bool) -> None:
        """What `step.part_of_train` does after the last step, of a run that was ended before it."""
        memory = self.memory
        total = operations.squares(memory.parameters[0]) + losses.sum()
        if guarded and not np.isfinite(total):
            return
        for flat, packed in zip(vectors, (memory.parameters, memory.slot_1, memory.slot_2), strict=True):
            if flat.size:
                step.store(0, 1, self.layers, packed[0], flat)
        self.norms[0, 1] = total

    def _note_speed(self, steps_per_second: float) -> None:
        """By which the next call, of this run or the next, takes its time."""
        fitting = int(steps_per_second * SECONDS_PER_CALL)
        self.steps_per_call = max(1, min(4 * self.steps_per_call, fitting))

    def gradient(self, gradients: Array, alpha: float) -> float:
        """See `Trainer.gradient`: steps that add to the first slot's memory, where another trainer's would update."""
        job, n_rows = self.job, len(self.job.rows)
        self._prepare(threads.available())
        record, layers, parts = self.record.copy(), self.layers.copy(), self.parts.copy()
        record["optimizer"], record["clip_norm"], layers["dropout"], parts["dropout"] = update.SUM, np.inf, 0, 0
        order, starts = np.arange(n_rows), starts_of(n_rows, job.batch_size)
        share, _ = shares(order, job.sample_weight, np.array([0, n_rows]))  # of the mean over all rows
        alphas = np.zeros(len(starts) - 1)
        alphas[-1] = alpha
        self.memory.slot_1[...], self.next_step = 0, 0
        none = np.empty(0, job.parameters.dtype)
        vectors = plain(job.parameters), none, none
        cost, most = 0.0, self._most_steps_per_call()
        for first in range(0, len(alphas), most):
            steps = slice(first, min(first + most, len(alphas)))
            rows = slice(starts[steps.start], starts[steps.stop])
            batches, some = self._batches(order[rows], share[rows]), starts[steps.start : steps.stop + 1] - rows.start
            n_loaded = 1 if first == 0 else 0
            losses = self._steps(
                batches, some, alphas[steps], alphas[steps], 0, record, layers, parts, vectors, n_loaded, 0, False
            )
            cost += float(losses[:, 0].sum())
        flat = plain(gradients)
        step.store(0, 1, self.layers, self.memory.slot_1[0], flat)
        if flat is not gradients:
            gradients[...] = flat
        return cost

    def _data(self) -> cpu_plan.Nonzero:
        rows, n_out = self.job.rows, self.job.architecture.layer_sizes[1]
        if rows.entries:
            return cpu_plan.SPARSE
        return cpu_plan.Nonzero.of(len(rows), n_out, rows.take, self.job.batch_size)

    def _prepare(self, n_threads: int) -> None:
        """Plan and memory for so many threads, kept until their number changes."""
        if n_threads == self.n_threads:
            return
        if self.n_threads == 0:
            self.data = self._data()
        job, self.n_threads = self.job, n_threads
        self.products_of_a_row = cpu_plan.products_of_a_row(job.architecture, job.dtype)
        self.plan = cpu_plan.for_training(job.architecture, job.batch_size, job.dtype, n_threads, self.data)
        layout = cpu_plan.Layout(job.architecture, self.plan, job.batch_size, job.dtype)
        self.layers, self.parts, self.groups = layout.layers, layout.parts, layout.groups()
        self.next_step = 0
        self.record = layout.record(job.architecture, job.optimizer, job.seed)
        self.memory = layout.memory(len(job.optimizer.slots), training=True)
        self.norms = self.memory.norms

    def _most_steps_per_call(self) -> int:
        if self.job.rows.array is not None or self.job.rows.entries is not None:
            return 1 << 40
        bytes_per_step = self.job.batch_size * self.job.rows.shape[1] * self.record.dtype.itemsize
        return max(1, BYTES_PER_CALL // bytes_per_step)

    def _steps(
        self,
        batches: Batches,
        starts: Array,
        learning_rates: Array,
        alphas: Array,
        first_step: int,
        record: Array,
        layers: Array,
        parts: Array,
        vectors: tuple[Array, ...],
        n_loaded: int,
        n_stored: int,
        guarded: bool,
    ) -> npt.NDArray[np.float64]:
        """(n_steps, 2): C of each step without the penalty, and the penalty; see `step.part_of_train`."""
        job, plan = self.job, self.plan
        losses = np.zeros((plan.n_threads, len(learning_rates), 2))
        if plan.by_entries:
            self._make_room(batches, starts)
        n_members = plan.n_threads if batches.order.size * self.products_of_a_row >= cpu_plan.PRODUCTS_PER_CALL else 1
        arguments = (
            n_members,
            record,
            layers,
            parts,
            self.groups,
            batches,
            starts,
            self.memory,
            self.barrier,
            self.settings,
            learning_rates,
            alphas,
            first_step + 1,
            job.steps_before + first_step,
            losses,
            vectors,
            n_loaded,
            n_stored,
            guarded,
        )
        # Of all these, the types of some alone can change from call to call.
        kind = outline((batches, starts, learning_rates, alphas))
        code = self.codes.get(kind) or step.train.specialised(n_members, self.barrier, arguments)
        self.codes[kind] = code
        started = code(n_members, self.barrier, arguments)
        if not started:
            self.barrier = new_barrier()  # the old one is stopped for good
        threads.require(started)
        total: npt.NDArray[np.float64] = losses.sum(axis=0)
        return total

    def _batches(self, order: Array, share: Array) -> Batches:
        """The rows of some mini-batches: all data and which of it, or where the data is elsewhere, just these rows."""
        rows, target = self.job.rows, self.job.target
        x, entries = rows.array, rows.entries or no_entries(self.job.dtype)
        if rows.entries is not None:
            x = np.empty((0, rows.shape[1]), self.job.dtype)
        elif x is None:
            x, target, order = rows.take(order), target[order], np.arange(len(order))
        labels = target if target.ndim == 1 else np.empty(0, np.int32)
        values = target if target.ndim == 2 else np.empty((0, 0), self.job.dtype)
        return Batches(plain(x), plain(labels), plain(values), plain(order), share, Entries(*map(plain, entries)))

    def _make_room(self, batches: Batches, starts: Array) -> None:
        """For the entries of any of these mini-batches, sorted by each thread."""
        stored, (_, n_in) = batches.entries.starts, batches.x.shape
        n = np.add.reduceat(stored[batches.order + 1] - stored[batches.order], starts[:-1]).max()
        if self.memory.sorted_entries[1].shape[1] < max(1, n):
            shapes = (n_in, np.int64), (max(1, n), np.int32), (max(1, n), batches.x.dtype)
            room = tuple(np.empty((self.plan.n_threads, size), kind) for size, kind in shapes)
            self.memory = self.memory._replace(sorted_entries=room)

    def _vectors(self) -> tuple[Array, ...]:
        """The flat vectors of the job's parameters and of the optimizer's two slots, as compiled code takes them."""
        job = self.job
        slots = [plain(job.state[slot]) for slot in job.optimizer.slots]
        none = np.empty(0, job.parameters.dtype)
        return (plain(job.parameters), *slots, none, none)[:3]

    def _copy_back(self, vectors: tuple[Array, ...]) -> None:
        """To those of the job's arrays that compiled code does not take."""
        wanted = (self.job.parameters, *(self.job.state[slot] for slot in self.job.optimizer.slots))
        for flat, array in zip(vectors, wanted, strict=False):
            if flat is not array and not np.shares_memory(flat, array):
                array[...] = flat


def no_entries(dtype: Any) -> Entries:
    """Those of a dense matrix, for code that takes either kind."""
    return Entries(np.empty(0, dtype), np.empty(0, np.int32), np.empty(0, np.int64))


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
