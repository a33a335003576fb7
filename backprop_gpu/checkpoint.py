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

__all__ = ["Checkpoint", "checksum", "read", "write"]

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


def write(path: PathLike, checkpoint: Checkpoint, model: tuple[dict[str, Array], dict[str, Any]]) -> None:
    """Write `checkpoint` and the tensors and description of the `model` that it belongs to, atomically."""
    tensors, description = model
    tensors = tensors | {f"optimizer.{slot}": vector for slot, vector in checkpoint.state.items()}
    if checkpoint.best is not None:
        tensors["best"] = checkpoint.best
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
        theirs = dict(metadata["training"]["key"])
        changed = [name for name, ours in json.loads(storage.to_json(key)).items() if theirs.get(name) != ours]
        checkpoint = None if changed else _parse(tensors, metadata, architecture, slots)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged checkpoint: {type(error).__name__}: {error}") from error
    if changed:
        raise ValueError(
            f"{path} is the checkpoint of a run with another {' and '.join(changed)} "
            f"({theirs.get(changed[0])}, now {key[changed[0]]}); name another file, or delete it to start anew"
        )
    return checkpoint


def checksum(*arrays: Array | None) -> int:
    """Tells one data set from another, well enough to refuse a checkpoint of a run on other data."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(b"" if x is None else np.ascontiguousarray(x).tobytes(), crc)
    return crc


def _parse(
    tensors: dict[str, Array], metadata: dict[str, Any], architecture: Architecture, slots: tuple[str, ...]
) -> Checkpoint:
    training = metadata["training"]
    return Checkpoint(
        key=dict(training["key"]),
        parameters=architecture.flatten(tensors),
        state={slot: tensors[f"optimizer.{slot}"] for slot in slots},
        best=tensors.get("best"),
        best_value=float(training["best_value"]),
        history=History(**training["history"]),
        step=int(training["step"]),
        steps_before=int(training["steps_before"]),
        start_rng=dict(training["start_rng"]),
        rng=dict(metadata["rng"]),
    )
