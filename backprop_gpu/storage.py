"""Model files: safetensors with JSON metadata, written atomically; reading one never runs code."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["PathLike", "read", "require_writable", "to_json", "write"]

PathLike: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]

FORMAT = "backprop_gpu"
VERSION = 1


def write(path: PathLike, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write one file, whole or not at all: a crash or a full disk leaves the file that was there.

    `metadata` maps names to JSON-ready values. OSError where `path` cannot be written.
    """
    from safetensors.numpy import save

    header = {FORMAT: str(VERSION), **{name: to_json(value) for name, value in metadata.items()}}
    with _replacing(Path(path)) as file:
        file.write(save(dict(tensors), header))


def read(path: PathLike) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, metadata) of a file that `write` made; ValueError for any other file, OSError where there is none."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb"):  # the plain OSError where it is missing, a folder, or forbidden
        pass
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model file, or it is damaged: {error}") from error
    return tensors, _parse(path, header)


def to_json(value: Any) -> str:
    """JSON, with NumPy's scalars as the numbers that they are."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written to a model file: it is not JSON-ready")


def require_writable(path: PathLike) -> None:
    """OSError, now and not after an hour of training, where `write(path, …)` could not create its file."""
    _target(Path(path))
    temporary = _temporary(Path(path))
    with temporary.open("xb"):
        pass
    temporary.unlink()


def _parse(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in header:
        raise ValueError(f"{path} is a safetensors file, but not a model saved by backprop_gpu")
    if header[FORMAT] != str(VERSION):
        raise ValueError(
            f"{path} has format version {header[FORMAT]}, and this release of backprop_gpu reads {VERSION}; "
            "a newer release may read it"
        )
    try:
        return {name: json.loads(value) for name, value in header.items() if name != FORMAT}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place once it is complete and on the disk."""
    target, temporary = _target(path), _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _target(path: Path) -> Path:
    """The file behind a link; OSError for what is no plain file, which a rename would destroy."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: it exists and is not a plain file")
    return target


def _temporary(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
