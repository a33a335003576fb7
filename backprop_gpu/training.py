"""The training loop: mini-batches, epochs, validation, early stopping, callbacks, checkpoints.

`MLP.fit` is a method, so `mlp` imports this module, which knows a network by its passes and its package-private
`_take_in`, `_evaluate` and `_as_file`, and a backend by its contract.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu import checkpoint as checkpoints
from backprop_gpu import checks, data, optimizers, storage
from backprop_gpu.backends.contract import AfterStep, Array, Trainer, TrainingJob
from backprop_gpu.checkpoint import Checkpoint, checksum
from backprop_gpu.checks import integer, unknown
from backprop_gpu.data import Rows, SparseRows
from backprop_gpu.history import DivergenceError, History
from backprop_gpu.optimizers import Optimizer
from backprop_gpu.progress import ProgressBar, interrupt_noted
from backprop_gpu.schedules import Schedule
from backprop_gpu.storage import PathLike

if TYPE_CHECKING:
    from backprop_gpu.mlp import MLP

__all__ = ["BATCH_SIZE", "EarlyStopping", "Stream", "fit", "partial_fit"]

BATCH_SIZE = 128
"""Rows per update where the caller names none."""

HIGHER_IS_BETTER = ("val_accuracy", "val_r2")
"""The metrics that early stopping wants large."""

Indices: TypeAlias = npt.NDArray[np.int64]
Callback: TypeAlias = Callable[["MLP", History], object]


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` epochs in a row in which `monitor` was not better than its best by more than `min_delta`.

    `monitor` is a metric of the history: by default "val_loss" where there is validation data, else "loss".
    Losses are better when smaller, accuracy and r2 when larger. The network ends with the best epoch's parameters.
    """

    patience: int = 10
    min_delta: float = 0.0
    monitor: str | None = None

    def __post_init__(self) -> None:
        integer("patience", self.patience, at_least=1)
        checks.not_negative("min_delta", self.min_delta)


@dataclass
class Stream:
    """An optimizer in the middle of a stream of `partial_fit` calls."""

    optimizer: Optimizer
    state: dict[str, Array]
    steps_before: int
    """Updates that the network had before the stream."""
    steps: int = 0
    """Updates of the stream so far."""
    trainer: Trainer | None = field(default=None, repr=False, compare=False)
    """The last call's, which has its memory; no copy and no file has it."""
    before: list[Array] = field(default_factory=list, repr=False, compare=False)
    """Memory for what the next call may have to undo."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None, "before": []}


# Whole steps out of the five operations, for a backend that has no trainer of its own


class OperationTrainer(Trainer):
    """Takes each step operation by operation: the readable path, and the one that a whole-step path must agree with."""

    def __init__(self, net: MLP, job: TrainingJob) -> None:
        self.net, self.job = net, job
        self.gradients = net.ops.empty(job.parameters.shape, job.parameters.dtype)

    def run(
        self,
        order: Indices,
        learning_rates: npt.NDArray[np.float64],
        alphas: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """See `Trainer.run`."""
        total, size = 0.0, self.job.batch_size
        for i, (learning_rate, alpha) in enumerate(zip(learning_rates, alphas, strict=True)):
            batch = order[i * size : (i + 1) * size]
            total += self._step(batch, float(learning_rate), float(alpha), first_step + i)
            if not (np.isfinite(total) and after_step(len(batch))):
                break
        return total

    def _step(self, batch: Indices, learning_rate: float, alpha: float, step: int) -> float:
        """One update; returns the mini-batch's weight times its loss."""
        net, job, ops = self.net, self.job, self.net.ops
        w = None if job.sample_weight is None else job.sample_weight[batch]
        dropout_step = job.steps_before + step
        forward = net.forward(ops.asarray(job.rows.take(batch)), dropout_step=dropout_step)
        loss, _ = net.backward(
            forward,
            ops.asarray(job.target[batch]),
            None if w is None else ops.asarray(w),
            self.gradients,
            alpha=alpha,
            dropout_step=dropout_step,
        )
        ops.update(
            job.parameters,
            self.gradients,
            job.state,
            job.optimizer,
            learning_rate=learning_rate,
            step=step + 1,
            n_weights=job.architecture.n_weights,
        )
        return loss * (len(batch) if w is None else float(w.sum(dtype=np.float64)))


def _trainer(net: MLP, job: TrainingJob, last: Trainer | None = None) -> Trainer:
    """The last call's trainer, if it can go on with these rows, or else a new one."""
    if last is not None and last.take_over(job):
        return last
    return net.ops.trainer(job) or OperationTrainer(net, job)


def _zero_state(net: MLP, optimizer: Optimizer) -> dict[str, Array]:
    shape, dtype = net.parameters.shape, net.parameters.dtype
    return {slot: net.ops.zeros(shape, dtype) for slot in optimizer.slots}


# fit


def fit(
    net: MLP,
    X: Any,
    y: Any,
    *,
    epochs: int,
    batch_size: int | None,
    optimizer: str | Optimizer,
    sample_weight: Any,
    validation_data: Sequence[Any] | None,
    validation_fraction: float,
    early_stopping: EarlyStopping | bool | None,
    callbacks: Iterable[Callback],
    checkpoint: PathLike | None,
    shuffle: bool,
    progress: bool | None,
    tune: bool,
) -> History:
    """`MLP.fit`, where it is documented. Everything is checked before anything changes."""
    epochs = integer("epochs", epochs, at_least=1)
    optimizer = optimizers.get(optimizer)
    callbacks = _callables(callbacks)
    rows, target, w = net._take_in(X, y, sample_weight)
    data.require_two_classes(target, net.architecture.loss)
    validation = _take_validation(net, validation_data)
    n_held_out = _n_held_out(validation_fraction, len(rows), validation is not None)
    n_train = len(rows) - n_held_out
    batch_size = _batch_size(batch_size, n_train)
    stopping = _stopping(early_stopping, net, n_held_out > 0 or validation is not None)
    schedule = optimizer.schedule.for_run(epochs * _n_steps(n_train, batch_size))
    saved = None
    if checkpoint is not None:
        storage.to_json(net.metadata)  # an error now, and not after the first epoch
        key = _run_key(net, optimizer, schedule, batch_size, shuffle, stopping, (rows, target, w))
        key["validation"] = n_held_out if validation is None else _fingerprint(*validation)
        saved = checkpoints.read(checkpoint, key, net.architecture, optimizer.slots)

    start_rng = net.rng.bit_generator.state if saved is None else saved.start_rng
    rng = checkpoints.generator(start_rng)
    train = np.arange(len(rows))
    if n_held_out:
        held_out, train = (np.sort(part) for part in np.split(rng.permutation(len(rows)), [n_held_out]))
        validation = (_some(rows, held_out), target[held_out], None if w is None else w[held_out])
        _require_weight(w, held_out, "held-out")
    _require_weight(w, train, "training")

    net.rng.bit_generator.state = rng.bit_generator.state
    net.stream = None
    job = _job(net, optimizer, (rows, target, w), batch_size, net.steps_taken if saved is None else saved.steps_before)
    job = replace(job, tune=tune)
    run = _Run(net, job, train, schedule, shuffle, validation, stopping, History(rows=n_train))
    if saved is not None:
        run.restore(saved)
    save = None if checkpoint is None else partial(run.save, checkpoint, key, start_rng)
    return run.until(epochs, callbacks, save, progress)


def _run_key(
    net: MLP,
    optimizer: Optimizer,
    schedule: Schedule,
    batch_size: int,
    shuffle: bool,
    stopping: EarlyStopping | None,
    taken: tuple[Rows, Any, Any],
) -> dict[str, Any]:
    """The settings and data that make a run what it is, but for the number of epochs."""
    return {
        "architecture": net.architecture.to_dict(),
        "dtype": net.dtype,
        "seed": net.seed,
        "optimizer": optimizers.to_dict(optimizer, schedule),
        "batch_size": batch_size,
        "shuffle": shuffle,
        "early_stopping": stopping and asdict(stopping),
        "data": _fingerprint(*taken),
    }


def _fingerprint(rows: Rows, target: Any, w: Any) -> list[int]:
    """Shape and checksum of a data set: of the target, the weights, and 64 rows throughout."""
    some = np.unique(np.linspace(0, len(rows) - 1, 64).astype(np.int64))
    return [*rows.shape, checksum(rows.take(some), target, w)]


def _require_weight(w: npt.NDArray[Any] | None, indices: Indices, which: str) -> None:
    if w is not None and not w[indices].any():
        raise ValueError(f"every {which} row has sample_weight 0; hold out other rows, or weigh them otherwise")


@dataclass
class _Run:
    """One training run: what it works with, and how far it has come."""

    net: MLP
    job: TrainingJob
    train: Indices
    schedule: Schedule
    shuffle: bool
    validation: tuple[Rows, Any, Any] | None
    stopping: EarlyStopping | None
    history: History
    step: int = 0
    best: npt.NDArray[Any] | None = None
    best_value: float = math.inf

    def __post_init__(self) -> None:
        self.trainer = _trainer(self.net, self.job)
        self.n_steps = _n_steps(len(self.train), self.job.batch_size)

    def until(
        self,
        epochs: int,
        callbacks: tuple[Callback, ...],
        save: Callable[[], None] | None,
        progress: bool | None,
    ) -> History:
        """Train until there is a reason to stop; with early stopping, put the best parameters back."""
        with interrupt_noted() as interrupted, ProgressBar(epochs, self.history, progress) as bar:
            try:
                self._epochs(epochs, callbacks, save, bar, interrupted)
            finally:
                if self.best is not None:
                    self._set_parameters(self.best)
        return self.history

    def _epochs(
        self,
        epochs: int,
        callbacks: tuple[Callback, ...],
        save: Callable[[], None] | None,
        bar: ProgressBar,
        interrupted: threading.Event,
    ) -> None:
        self.history.stopped = self.history.stopped or self._reason_to_stop(epochs)
        while not self.history.stopped:
            if interrupted.is_set() or not self._epoch(bar, interrupted):
                self.history.stopped = "interrupted"
                return
            bar.show(self.history)
            # Before the checkpoint, which so holds what a callback changes, and that it ended the run.
            answers = [callback(self.net, self.history) for callback in callbacks]
            self.history.stopped = "callback" if any(answer is True for answer in answers) else ""
            if save is not None:
                save()
            self.history.stopped = self.history.stopped or self._reason_to_stop(epochs)

    def _reason_to_stop(self, epochs: int) -> str:
        if len(self.history) >= epochs:
            return "epochs"
        best = self.history.best_epoch
        if self.stopping and best is not None and len(self.history) - 1 - best >= self.stopping.patience:
            return "early stopping"
        return ""

    def _epoch(self, bar: ProgressBar, interrupted: threading.Event) -> bool:
        """One pass over the training rows; False if it was interrupted on the way."""
        before = self._parameters() if self.trainer.finite is None else None
        order = self.net.rng.permutation(self.train) if self.shuffle else self.train
        rates = self.schedule.rates(np.arange(self.step, self.step + self.n_steps))
        rows_done = 0

        def after_step(n_rows: int) -> bool:
            nonlocal rows_done
            rows_done += n_rows
            bar.update(n_rows)
            return not interrupted.is_set()

        start = time.perf_counter()
        with _reported_as_divergence():
            total = self.trainer.run(order, rates, _alphas(self.net, self.n_steps), self.step, after_step)
        seconds = time.perf_counter() - start
        if what := _what_diverged(self.net, self.trainer, total):
            if before is not None:
                self._set_parameters(before)
            self.history.stopped = "diverged"
            raise DivergenceError(what, f"in epoch {len(self.history) + 1}", self.history)
        self.step += _n_steps(rows_done, self.job.batch_size)
        self.net.steps_taken = self.job.steps_before + self.step
        if rows_done < len(order):
            return False
        loss = total / _total_weight(self.job.sample_weight, self.train)
        self.history.record({"loss": loss, "learning_rate": float(rates[-1]), **self._validate()}, seconds)
        self._keep_best()
        return True

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        return {f"val_{name}": value for name, value in self.net._evaluate(*self.validation).items()}

    def _keep_best(self) -> None:
        if self.stopping is None:
            return
        monitor = str(self.stopping.monitor)
        value = self.history[monitor][-1] * (-1 if monitor in HIGHER_IS_BETTER else 1)
        if self.best is None or math.isnan(self.best_value) or value < self.best_value - self.stopping.min_delta:
            self.best_value, self.best = value, self._parameters()
            self.history.best_epoch = len(self.history) - 1

    def _parameters(self) -> npt.NDArray[Any]:
        return np.array(self.net.ops.to_numpy(self.net.parameters))

    def _set_parameters(self, values: npt.NDArray[Any]) -> None:
        self.net.parameters[...] = self.net.ops.asarray(values)

    def save(self, path: PathLike, key: dict[str, Any], start_rng: Any) -> None:
        """Write the checkpoint of this moment."""
        checkpoint = Checkpoint(
            key=key,
            parameters=self._parameters(),
            state={slot: self.net.ops.to_numpy(vector) for slot, vector in self.job.state.items()},
            best=self.best,
            best_value=self.best_value,
            history=self.history,
            step=self.step,
            steps_before=self.job.steps_before,
            start_rng=start_rng,
            rng=dict(self.net.rng.bit_generator.state),
        )
        checkpoints.write(path, checkpoint, self.net.architecture, self.net._as_file())

    def restore(self, saved: Checkpoint) -> None:
        """Go on from where the run that wrote the checkpoint was."""
        for slot, vector in self.job.state.items():
            vector[...] = self.net.ops.asarray(saved.state[slot])
        self._set_parameters(saved.parameters)
        self.net.rng.bit_generator.state = saved.rng
        self.net.steps_taken = saved.steps_before + saved.step
        self.step, self.history = saved.step, saved.history
        self.best, self.best_value = saved.best, saved.best_value


def _job(
    net: MLP,
    optimizer: Optimizer,
    taken: tuple[Rows, Any, Any],
    batch_size: int,
    steps_before: int,
    state: dict[str, Array] | None = None,
    in_stream: bool = False,
) -> TrainingJob:
    rows, target, w = taken
    return TrainingJob(
        architecture=net.architecture,
        parameters=net.parameters,
        optimizer=optimizer,
        state=_zero_state(net, optimizer) if state is None else state,
        rows=rows,
        target=target,
        sample_weight=w,
        dtype=net.dtype,
        batch_size=batch_size,
        seed=net.seed,
        steps_before=steps_before,
        in_stream=in_stream,
    )


def _n_steps(n_rows: int, batch_size: int) -> int:
    """Mini-batches in so many rows: the last one may be smaller."""
    return -(-n_rows // batch_size)


def _alphas(net: MLP, n_steps: int) -> npt.NDArray[np.float64]:
    return np.full(n_steps, net.architecture.alpha)


def _reported_as_divergence() -> np.errstate:
    """NumPy keeps quiet about the overflows of a run that diverges: the error that follows says it once."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


def _what_diverged(net: MLP, trainer: Trainer, total: float) -> str:
    """What is no longer finite after a run, in words; "" where all is."""
    finite = trainer.finite
    if finite is None:
        finite = bool(np.isfinite(total) and np.isfinite(float(net.ops.sum_squares(net.parameters))))
    if finite:
        return ""
    return "the parameters are" if np.isfinite(total) else "the loss is"


def _total_weight(w: npt.NDArray[Any] | None, indices: Indices) -> float:
    return len(indices) if w is None else float(w[indices].sum(dtype=np.float64))


def _callables(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of functions of (net, history); got {callbacks!r}")
    functions = tuple(callbacks)
    if not all(callable(function) for function in functions):
        raise TypeError(f"callbacks must be functions of (net, history); got {functions!r}")
    return functions


def _batch_size(batch_size: int | None, n_train: int) -> int:
    if batch_size is None:
        return min(BATCH_SIZE, n_train)
    batch_size = integer("batch_size", batch_size, at_least=1)
    if batch_size > n_train:
        raise ValueError(f"batch_size={batch_size} is larger than the {n_train} training rows; None takes what fits")
    return batch_size


def _n_held_out(fraction: float, n_rows: int, has_validation_data: bool) -> int:
    checks.fraction("validation_fraction", fraction)
    if fraction and has_validation_data:
        raise ValueError("give validation_data or validation_fraction, not both")
    n_held_out = max(1, round(fraction * n_rows)) if fraction else 0
    if n_held_out >= n_rows:
        raise ValueError(f"validation_fraction={fraction} of {n_rows} rows leaves none to train on")
    return n_held_out


def _take_validation(net: MLP, validation_data: Sequence[Any] | None) -> tuple[Rows, Any, Any] | None:
    if validation_data is None:
        return None
    if not isinstance(validation_data, tuple | list) or len(validation_data) not in (2, 3):
        raise TypeError("validation_data must be (X, y) or (X, y, sample_weight)")
    X, y, *w = validation_data
    return net._take_in(X, y, w[0] if w else None, "validation ")


def _stopping(early_stopping: EarlyStopping | bool | None, net: MLP, validated: bool) -> EarlyStopping | None:
    """Early stopping with its monitor filled in, checked against the metrics that there will be."""
    if early_stopping is None or early_stopping is False:
        return None
    stopping = EarlyStopping() if early_stopping is True else early_stopping
    if not isinstance(stopping, EarlyStopping):
        raise TypeError(f"early_stopping must be an EarlyStopping, True or None; got {early_stopping!r}")
    score = "val_accuracy" if net.architecture.loss.task == "classification" else "val_r2"
    metrics = ["loss", *(["val_loss", score] if validated else [])]
    monitor = stopping.monitor or ("val_loss" if validated else "loss")
    if monitor not in metrics:
        raise unknown("metric to monitor", monitor, metrics)
    return EarlyStopping(stopping.patience, stopping.min_delta, monitor)


def _some(rows: Rows, indices: Indices) -> Rows:
    """These of the rows; sparse ones stay so."""
    if isinstance(rows, SparseRows):
        return SparseRows(rows.x[indices], rows.dtype)
    return _Taken(rows, indices)


class _Taken(Rows):
    """Some of another's rows."""

    def __init__(self, rows: Rows, indices: Indices) -> None:
        self.rows, self.indices = rows, indices
        self.shape, self.dtype = (len(indices), rows.shape[1]), rows.dtype

    def take(self, indices: Indices | slice) -> npt.NDArray[Any]:
        """These of them."""
        return self.rows.take(self.indices[indices])


# partial_fit


def partial_fit(
    net: MLP, X: Any, y: Any, *, batch_size: int | None, optimizer: str | Optimizer, sample_weight: Any
) -> float:
    """`MLP.partial_fit`, where it is documented."""
    optimizer = optimizers.get(optimizer)
    rows, target, w = net._take_in(X, y, sample_weight)
    batch_size = min(integer("batch_size", batch_size or BATCH_SIZE, at_least=1), len(rows))  # a stream ends anywhere
    stream = net.stream
    if stream is None or type(stream.optimizer) is not type(optimizer):
        stream = Stream(optimizer, _zero_state(net, optimizer), net.steps_taken)
    job = _job(net, optimizer, (rows, target, w), batch_size, stream.steps_before, stream.state, in_stream=True)
    steps = np.arange(stream.steps, stream.steps + _n_steps(len(rows), batch_size))
    rates = optimizer.schedule.for_run(None).rates(steps)
    trainer = _trainer(net, job, stream.trainer)
    stream.trainer = None  # a failure may leave NaN in its memory

    def keep() -> None:
        stream.optimizer, stream.steps = optimizer, stream.steps + len(steps)
        net.stream, net.steps_taken = stream, net.steps_taken + len(steps)
        stream.trainer = trainer if trainer.rest() else None

    try:
        total = _all_or_nothing(net, trainer, stream, rates, len(rows))
    except KeyboardInterrupt:
        if trainer.finite:  # it came when all was done
            keep()
        raise
    keep()
    return total / _total_weight(w, np.arange(len(rows)))


def _all_or_nothing(net: MLP, trainer: Trainer, stream: Stream, rates: npt.NDArray[np.float64], n_rows: int) -> float:
    """A run over all rows in their order; where it fails, or is interrupted, parameters and state are as before."""
    vectors = (net.parameters, *stream.state.values()) if trainer.finite is None else ()
    stream.before = stream.before or [net.ops.empty(x.shape, x.dtype) for x in vectors]
    for values, x in zip(stream.before, vectors, strict=True):
        values[...] = x
    try:
        with _reported_as_divergence():
            total = trainer.run(np.arange(n_rows), rates, _alphas(net, len(rates)), stream.steps, lambda _: True)
        if what := _what_diverged(net, trainer, total):
            raise DivergenceError(what, "on these rows")
    except BaseException:
        for x, values in zip(vectors, stream.before, strict=True):
            x[...] = values
        raise
    return total
