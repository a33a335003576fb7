"""The training loop: mini-batches, epochs, validation, early stopping, history, callbacks, checkpoints.

It knows a network only by what it needs of one, and a backend only by its contract, so `mlp` can build on it.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from backprop_gpu import data, optimizers, storage
from backprop_gpu.backends.contract import AfterStep, Array, Trainer, TrainingJob
from backprop_gpu.data import Rows
from backprop_gpu.names import unknown
from backprop_gpu.optimizers import Optimizer
from backprop_gpu.schedules import Schedule
from backprop_gpu.storage import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backprop_gpu.mlp import MLP

__all__ = ["BATCH_SIZE", "DivergenceError", "EarlyStopping", "History", "Stream", "fit", "partial_fit"]

BATCH_SIZE = 128
"""Rows per update where the caller names none."""

Indices = npt.NDArray[np.int64]
Callback = Callable[["MLP", "History"], object]


class DivergenceError(ArithmeticError):
    """The loss is no longer finite; the network has the last parameters with which it was.

    `history` holds the epochs before.
    """

    def __init__(self, message: str, history: History | None = None) -> None:
        super().__init__(message)
        self.history = history


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
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch; got {self.patience}")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0; got {self.min_delta}")


@dataclass
class History:
    """What happened in a training run. ``history["val_loss"]`` is a list with one number per completed epoch."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """loss (the mean over the epoch's mini-batches, as differentiated), learning_rate (at the epoch's end), and with
    validation data val_loss and val_accuracy or val_r2."""
    stopped: str = ""
    """Why the run ended: "epochs", "early stopping", "callback" or "interrupted"."""
    best_epoch: int | None = None
    """Index of the epoch whose parameters early stopping kept."""
    seconds: list[float] = field(default_factory=list, compare=False)
    """Time of each epoch's updates, validation apart."""
    rows: int = 0
    """Training rows in an epoch."""

    def __getitem__(self, metric: str) -> list[float]:
        if metric not in self.metrics:
            raise KeyError(str(unknown("metric", metric, self.metrics)))
        return self.metrics[metric]

    def __len__(self) -> int:
        """Completed epochs."""
        return len(self.seconds)

    @property
    def rows_per_second(self) -> float:
        """Training rows per second of updates, over all epochs; NaN before the first."""
        return self.rows * len(self) / sum(self.seconds) if self.seconds else float("nan")

    def record(self, metrics: dict[str, float], seconds: float) -> None:
        """Add one epoch."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)
        self.seconds.append(seconds)

    def plot(self) -> Figure:
        """The curves of loss and score over the epochs; needs the `plot` extra. See `plotting.plot_history`."""
        from backprop_gpu.plotting import plot_history

        return plot_history(self)


@dataclass
class Stream:
    """An optimizer in the middle of a stream of `partial_fit` calls."""

    optimizer: Optimizer
    state: dict[str, Array]
    steps_before: int
    steps: int = 0


# Whole steps out of the five operations, for a backend that has no trainer of its own


class OperationTrainer(Trainer):
    """Takes each step operation by operation: the readable path, and the one that a whole-step path must agree with."""

    def __init__(self, net: MLP, job: TrainingJob) -> None:
        self.net, self.job = net, job
        self.gradients = net.ops.empty(job.parameters.shape, str(job.parameters.dtype))

    def run(
        self,
        order: Indices,
        learning_rates: npt.NDArray[np.float64],
        first_step: int,
        after_step: AfterStep,
    ) -> float:
        """See `Trainer.run`."""
        total, size = 0.0, self.job.batch_size
        for i, learning_rate in enumerate(learning_rates):
            batch = order[i * size : (i + 1) * size]
            total += self._step(batch, float(learning_rate), first_step + i)
            if not (np.isfinite(total) and after_step(len(batch))):
                break
        return total

    def _step(self, batch: Indices, learning_rate: float, step: int) -> float:
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


def _trainer(net: MLP, job: TrainingJob) -> Trainer:
    return net.ops.trainer(job) or OperationTrainer(net, job)


def _zero_state(net: MLP, optimizer: Optimizer) -> dict[str, Array]:
    shape, dtype = net.parameters.shape, str(net.parameters.dtype)
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
) -> History:
    """`MLP.fit`, whose documentation this is under. Everything is checked before anything changes."""
    _at_least_one("epochs", epochs)
    optimizer = optimizers.get(optimizer)
    rows, target, w = net._take_in(X, y, sample_weight)
    data.require_two_classes(target, net.architecture.loss)
    validation = _take_validation(net, validation_data)
    n_held_out = _n_held_out(validation_fraction, len(rows), validation is not None)
    n_train = len(rows) - n_held_out
    batch_size = _batch_size(batch_size, n_train)
    stopping = _stopping(early_stopping, net, n_held_out > 0 or validation is not None)
    schedule = optimizer.schedule.for_run(epochs * -(-n_train // batch_size))
    key = {
        "architecture": net.architecture.to_dict(),
        "dtype": net.dtype,
        "seed": net.seed,
        "optimizer": {**optimizers.to_dict(optimizer), "schedule": repr(schedule)},
        "batch_size": batch_size,
        "shuffle": shuffle,
        "early_stopping": stopping and asdict(stopping),
        "data": [list(rows.shape), _checksum(rows.take(slice(0, 1)), target, w)],
        "validation": n_held_out if validation is None else [len(validation[0]), _checksum(*validation[1:])],
    }
    saved = None if checkpoint is None else _read_checkpoint(Path(checkpoint), key, net, optimizer)

    start_rng = net.rng.bit_generator.state if saved is None else saved.training["start_rng"]
    net.rng.bit_generator.state = start_rng
    train = np.arange(len(rows))
    if n_held_out:
        held_out, train = np.split(net.rng.permutation(len(rows)), [n_held_out])
        train.sort()
        validation = (_Taken(rows, held_out), target[held_out], None if w is None else w[held_out])
    run = _Run(
        net=net,
        job=TrainingJob(
            architecture=net.architecture,
            parameters=net.parameters,
            optimizer=optimizer,
            state=_zero_state(net, optimizer),
            rows=rows,
            target=target,
            sample_weight=w,
            batch_size=batch_size,
            seed=net.seed,
            steps_before=net.steps_taken,
        ),
        train=train,
        schedule=schedule,
        validation=validation,
        stopping=stopping,
        shuffle=shuffle,
        history=History(rows=n_train),
    )
    if saved is not None:
        run.restore(saved)
    save = None if checkpoint is None else lambda: _write_checkpoint(checkpoint, run, key, start_rng)
    return run.until(epochs, tuple(callbacks), save, progress)


@dataclass
class _Saved:
    """A checkpoint that belongs to the run at hand."""

    tensors: dict[str, npt.NDArray[Any]]
    parameters: npt.NDArray[Any]
    description: dict[str, Any]
    training: dict[str, Any]


@dataclass
class _Run:
    """One training run: what it works with, and how far it has come."""

    net: MLP
    job: TrainingJob
    train: Indices
    schedule: Schedule
    validation: tuple[Rows, Any, Any] | None
    stopping: EarlyStopping | None
    shuffle: bool
    history: History
    step: int = 0
    best: npt.NDArray[Any] | None = None
    best_value: float = float("inf")

    HIGHER_IS_BETTER: ClassVar[tuple[str, ...]] = ("val_accuracy", "val_r2")

    def __post_init__(self) -> None:
        self.trainer = _trainer(self.net, self.job)
        self.n_steps = -(-len(self.train) // self.job.batch_size)
        w = self.job.sample_weight
        self.train_weight = len(self.train) if w is None else float(w[self.train].sum(dtype=np.float64))
        if self.train_weight == 0:
            raise ValueError("the training rows all have sample_weight 0; hold out fewer rows or weigh them otherwise")

    def until(
        self,
        epochs: int,
        callbacks: tuple[Callback, ...],
        save: Callable[[], None] | None,
        progress: bool | None,
    ) -> History:
        """Train until one of the reasons to stop; with early stopping, put the best parameters back."""
        with _interrupt_noted() as interrupted, _ProgressBar(epochs, self, progress) as bar:
            while not self.history.stopped:
                if len(self.history) >= epochs:
                    self.history.stopped = "epochs"
                elif self._waited() >= (self.stopping.patience if self.stopping else float("inf")):
                    self.history.stopped = "early stopping"
                elif not self._epoch(bar, interrupted):
                    self.history.stopped = "interrupted"
                else:
                    if save is not None:
                        save()
                    bar.epoch_done(self.history)
                    if any([callback(self.net, self.history) is True for callback in callbacks]):
                        self.history.stopped = "callback"
        if self.best is not None:
            self._set_parameters(self.best)
        return self.history

    def _epoch(self, bar: _ProgressBar, interrupted: threading.Event) -> bool:
        """One pass over the training rows; False if it was interrupted on the way."""
        before = self._parameters()
        order = self.net.rng.permutation(self.train) if self.shuffle else self.train
        rates = self.schedule.rates(np.arange(self.step, self.step + self.n_steps))
        rows_done = 0

        def after_step(n_rows: int) -> bool:
            nonlocal rows_done
            rows_done += n_rows
            bar.update(n_rows)
            return not interrupted.is_set()

        start = time.perf_counter()
        total = self.trainer.run(order, rates, self.step, after_step)
        parameters_finite = bool(np.isfinite(self.net.ops.sum_squares(self.net.parameters)))
        seconds = time.perf_counter() - start
        if not (np.isfinite(total) and parameters_finite):
            self._set_parameters(before)
            raise _divergence(total, f"in epoch {len(self.history) + 1}", self.history)
        self.step += -(-rows_done // self.job.batch_size)
        self.net.steps_taken = self.job.steps_before + self.step
        if rows_done < len(order):
            return False
        self.history.record(
            {"loss": total / self.train_weight, "learning_rate": float(rates[-1]), **self._validate()},
            seconds,
        )
        self._keep_best()
        return True

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        return {f"val_{name}": value for name, value in self.net._evaluate(*self.validation).items()}

    def _keep_best(self) -> None:
        if self.stopping is None:
            return
        value = self.history[str(self.stopping.monitor)][-1]
        value = -value if self.stopping.monitor in self.HIGHER_IS_BETTER else value
        if value < self.best_value - self.stopping.min_delta or self.best is None:
            self.best_value, self.best = value, self._parameters()
            self.history.best_epoch = len(self.history) - 1

    def _waited(self) -> int:
        """Epochs since the best one."""
        best = self.history.best_epoch
        return 0 if best is None else len(self.history) - 1 - best

    def _parameters(self) -> npt.NDArray[Any]:
        return np.array(self.net.ops.to_numpy(self.net.parameters))

    def _set_parameters(self, values: npt.NDArray[Any]) -> None:
        self.net.parameters[...] = self.net.ops.asarray(values)

    def restore(self, saved: _Saved) -> None:
        """Go on where the run that wrote the checkpoint was."""
        net, training = self.net, saved.training
        self._set_parameters(saved.parameters)
        for slot, vector in self.job.state.items():
            vector[...] = net.ops.asarray(saved.tensors[f"optimizer.{slot}"])
        net.rng.bit_generator.state = saved.description["rng"]
        net.steps_taken = saved.description["steps_taken"]
        self.job = self.job.__class__(**{**self.job.__dict__, "steps_before": training["steps_before"]})
        self.trainer = _trainer(net, self.job)
        self.step = training["step"]
        self.best, self.best_value = saved.tensors.get("best"), training["best_value"]
        self.history = History(**training["history"])


def _at_least_one(name: str, value: int) -> int:
    if index(value) < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return index(value)


def _batch_size(batch_size: int | None, n_train: int) -> int:
    if batch_size is None:
        return min(BATCH_SIZE, n_train)
    if _at_least_one("batch_size", batch_size) > n_train:
        raise ValueError(f"batch_size={batch_size} is larger than the {n_train} training rows; None takes what fits")
    return index(batch_size)


def _n_held_out(fraction: float, n_rows: int, has_validation_data: bool) -> int:
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1); got {fraction}")
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
    score = "val_accuracy" if net.architecture.loss.task == "classification" else "val_r2"
    metrics = ["loss", *(["val_loss", score] if validated else [])]
    monitor = stopping.monitor or ("val_loss" if validated else "loss")
    if monitor not in metrics:
        raise unknown("metric to monitor", monitor, metrics)
    return EarlyStopping(stopping.patience, stopping.min_delta, monitor)


class _Taken(Rows):
    """Some of another's rows."""

    def __init__(self, rows: Rows, indices: Indices) -> None:
        self.rows, self.indices = rows, indices
        self.shape, self.dtype = (len(indices), rows.shape[1]), rows.dtype

    def take(self, indices: Indices | slice) -> npt.NDArray[Any]:
        """These of them."""
        return self.rows.take(self.indices[indices])


def _divergence(loss: float, where: str, history: History | None) -> DivergenceError:
    return DivergenceError(
        f"training diverged: the loss is {loss:g} {where}; the last finite parameters were kept "
        "(try a smaller learning_rate, clip_norm=1.0, or inputs scaled to about mean 0 and variance 1)",
        history,
    )


# partial_fit


def partial_fit(
    net: MLP, X: Any, y: Any, *, batch_size: int | None, optimizer: str | Optimizer, sample_weight: Any
) -> float:
    """`MLP.partial_fit`, whose documentation this is under."""
    optimizer = optimizers.get(optimizer)
    rows, target, w = net._take_in(X, y, sample_weight)
    batch_size = _batch_size(batch_size, len(rows))
    schedule = optimizer.schedule.for_run(None)
    stream = net.stream
    if stream is None or type(stream.optimizer) is not type(optimizer):
        stream = Stream(optimizer, _zero_state(net, optimizer), net.steps_taken)
    job = TrainingJob(
        architecture=net.architecture,
        parameters=net.parameters,
        optimizer=optimizer,
        state=stream.state,
        rows=rows,
        target=target,
        sample_weight=w,
        batch_size=batch_size,
        seed=net.seed,
        steps_before=stream.steps_before,
    )
    n_steps = -(-len(rows) // batch_size)
    before = [np.array(net.ops.to_numpy(x)) for x in (net.parameters, *stream.state.values())]
    rates = schedule.rates(np.arange(stream.steps, stream.steps + n_steps))
    total = _trainer(net, job).run(np.arange(len(rows)), rates, stream.steps, lambda _: True)
    if not (np.isfinite(total) and np.isfinite(net.ops.sum_squares(net.parameters))):
        for x, values in zip((net.parameters, *stream.state.values()), before, strict=True):
            x[...] = net.ops.asarray(values)
        raise _divergence(total, "on these rows", None)
    stream.optimizer, stream.steps = optimizer, stream.steps + n_steps
    net.stream, net.steps_taken = stream, stream.steps_before + stream.steps
    return total / (len(rows) if w is None else float(w.sum(dtype=np.float64)))


# Checkpoints


def _write_checkpoint(path: PathLike, run: _Run, key: dict[str, Any], start_rng: Any) -> None:
    """A model file with the rest of the run in it, so that `load` reads it too."""
    to_numpy = run.net.ops.to_numpy
    tensors = run.net._tensors() | {f"optimizer.{slot}": to_numpy(x) for slot, x in run.job.state.items()}
    if run.best is not None:
        tensors["best"] = run.best
    training = {
        "key": key,
        "start_rng": start_rng,
        "steps_before": run.job.steps_before,
        "step": run.step,
        "best_value": run.best_value,
        "history": asdict(run.history),
    }
    storage.write(path, tensors, run.net._description() | {"training": training})


def _read_checkpoint(path: Path, key: dict[str, Any], net: MLP, optimizer: Optimizer) -> _Saved | None:
    """The checkpoint to go on from, or None where there is none yet; ValueError if it is another run's."""
    from backprop_gpu.mlp import _flat_parameters

    storage.require_writable(path)
    if not path.exists():
        return None
    tensors, description = storage.read(path)
    training = description.pop("training", None)
    if training is None:
        raise ValueError(f"{path} holds a model without a training run to resume; name another file for the checkpoint")
    ours, theirs = json.loads(json.dumps(key)), training["key"]
    changed = [name for name in ours if ours[name] != theirs.get(name)]
    if changed:
        raise ValueError(
            f"{path} is the checkpoint of a run with another {', '.join(changed)} "
            f"({theirs.get(changed[0])}, now {ours[changed[0]]}); name another file, or delete it to start anew"
        )
    expected = {f"optimizer.{slot}" for slot in optimizer.slots}
    if not expected <= tensors.keys():
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(expected - tensors.keys()))}")
    return _Saved(tensors, _flat_parameters(tensors, net.architecture), description, training)


def _checksum(*arrays: Any) -> int:
    """Tells one data set from another, well enough to refuse a checkpoint that is not this run's."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(np.ascontiguousarray(x).tobytes() if x is not None else b"", crc)
    return crc


# Ctrl-C and the progress bar


@contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """A first Ctrl-C is noted, and honoured between two updates, so none is cut in half; a second one raises at once."""
    noted = threading.Event()
    python_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or not python_default:
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _ProgressBar:
    """Rows done out of all epochs' rows; silent where stderr is no terminal, unless asked for."""

    def __init__(self, epochs: int, run: _Run, progress: bool | None) -> None:
        from tqdm import tqdm

        n_rows = len(run.train)
        self.epochs = epochs
        self.bar = tqdm(
            total=epochs * n_rows,
            initial=len(run.history) * n_rows,
            unit="row",
            unit_scale=True,
            desc=f"epoch {len(run.history) + 1}/{epochs}",
            disable=None if progress is None else not progress,
            dynamic_ncols=True,
        )
        self.update = self.bar.update

    def epoch_done(self, history: History) -> None:
        """Show the epoch's metrics."""
        self.bar.set_description(f"epoch {min(len(history) + 1, self.epochs)}/{self.epochs}", refresh=False)
        shown = {name: f"{values[-1]:.4g}" for name, values in history.metrics.items() if name != "learning_rate"}
        self.bar.set_postfix(shown, refresh=False)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
