"""Checkpoints: a model file that also holds all a training run needs to go on with the same bits."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu import storage
from backprop_gpu.architecture import Architecture
from backprop_gpu.history import History
from backprop_gpu.storage import PathLike

__all__ = ["MALFORMED", "Checkpoint", "checksum", "generator", "read", "write"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Checkpoint:
    """A run after some epoch. `load` reads the file as the network that it was then."""

    key: dict[str, Any]
    """The settings and data of the run, by which a checkpoint of another run is told apart."""
    parameters: Array
    state: dict[str, Array]
    """The optimizer's slots."""
    best: Array | None
    """Early stopping's best parameters so far."""
    best_value: float
    history: History
    step: int
    """Updates made in this run."""
    steps_before: int
    """Updates that the network had before this run."""
    start_rng: dict[str, Any]
    """The random state before the validation rows were drawn."""
    rng: dict[str, Any]
    """The random state now."""


def write(
    path: PathLike, checkpoint: Checkpoint, architecture: Architecture, model: tuple[dict[str, Array], dict[str, Any]]
) -> None:
    """Write `checkpoint` and the tensors and description of the `model` that it belongs to, atomically."""
    tensors, description = model
    vectors = {f"optimizer.{slot}.": vector for slot, vector in checkpoint.state.items()}
    if checkpoint.best is not None:
        vectors["best."] = checkpoint.best
    for prefix, vector in vectors.items():
        tensors = tensors | {prefix + name: x for name, x in architecture.tensors(vector).items()}
    training = {
        "key": checkpoint.key,
        "best_value": checkpoint.best_value,
        "history": asdict(checkpoint.history),
        "step": checkpoint.step,
        "steps_before": checkpoint.steps_before,
        "start_rng": checkpoint.start_rng,
    }
    storage.write(path, tensors, {**description, "rng": checkpoint.rng, "training": training})


def read(path: PathLike, key: dict[str, Any], architecture: Architecture, slots: tuple[str, ...]) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none yet; `slots` names the optimizer's state vectors.

    ValueError for a file that is no checkpoint, is damaged, or belongs to a run with another `key`; OSError for a
    path that could not be written to later.
    """
    storage.require_writable(path)
    if not Path(path).exists():
        return None
    tensors, metadata = storage.read(path)
    if "training" not in metadata:
        raise ValueError(f"{path} holds a model without a training run to resume; name another file for the checkpoint")
    try:
        theirs, ours = dict(metadata["training"]["key"]), json.loads(storage.to_json(key))
        changed = [name for name in ours if theirs.get(name) != ours[name]]
        checkpoint = None if changed else _parse(tensors, metadata, architecture, slots)
    except MALFORMED as error:
        raise ValueError(f"{path} is a damaged checkpoint: {type(error).__name__}: {error}") from error
    if changed:
        before, now = _differing(theirs.get(changed[0]), ours[changed[0]])
        raise ValueError(
            f"{path} is the checkpoint of a run with another {' and '.join(changed)} "
            f"({before}, now {now}); name another file, or delete it to start anew"
        )
    return checkpoint


MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading JSON of another form than expected may raise."""


def generator(state: Any) -> np.random.Generator:
    """A generator in that state, as `MLP` uses; one of `MALFORMED` where it is none."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng


def _differing(before: Any, now: Any) -> tuple[Any, Any]:
    """The entries that differ, where both are dictionaries."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    names = [name for name in now if before.get(name) != now[name]]
    return {name: before.get(name) for name in names}, {name: now[name] for name in names}


def checksum(*arrays: Array | None) -> int:
    """Tells one data set from another, well enough to refuse a checkpoint of a run on other data."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(b"" if x is None else np.ascontiguousarray(x).data, crc)
    return crc


def _parse(
    tensors: dict[str, Array], metadata: dict[str, Any], architecture: Architecture, slots: tuple[str, ...]
) -> Checkpoint:
    training = metadata["training"]

    def vector(prefix: str) -> Array:
        return architecture.flatten({name: tensors[prefix + name] for name in architecture.tensor_names})

    return Checkpoint(
        key=dict(training["key"]),
        parameters=vector(""),
        state={slot: vector(f"optimizer.{slot}.") for slot in slots},
        best=vector("best.") if "best.W.0" in tensors else None,
        best_value=float(training["best_value"]),
        history=_history(training["history"]),
        step=int(training["step"]),
        steps_before=int(training["steps_before"]),
        start_rng=dict(generator(training["start_rng"]).bit_generator.state),
        rng=dict(generator(metadata["rng"]).bit_generator.state),
    )


def _history(values: dict[str, Any]) -> History:
    """The history, with as many numbers of each metric as there were epochs."""
    history = History(**values)
    metrics = {name: [float(value) for value in values] for name, values in history.metrics.items()}
    if any(len(values) != len(history) for values in metrics.values()):
        raise ValueError("its metrics are not of one length")
    best = history.best_epoch
    if not (best is None or 0 <= best < len(history)):
        raise ValueError(f"its best epoch is {best} of {len(history)}")
    return history
