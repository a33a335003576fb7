"""Model files: safetensors with JSON metadata, written atomically; reading one never runs code. The user's cache."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["PathLike", "read", "replacing", "require_writable", "to_json", "user_cache", "write"]

PathLike: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]

FORMAT = "backprop_gpu"
VERSION = 1


def write(path: PathLike, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write one file, whole or not at all: a crash or a full disk leaves the file that was there.

    `metadata` maps names to JSON-ready values. OSError where `path` cannot be written.
    """
    from safetensors.numpy import save

    text = to_json({"version": VERSION, **metadata})
    # One entry, not one per name: safetensors keeps no order among entries, and the same network has the same bytes.
    header = {FORMAT: f"{_checksum(tensors, text):08x} {text}"}
    with replacing(path) as file:
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
    return tensors, _parse(path, tensors, header)


def require_writable(path: PathLike) -> None:
    """OSError, now and not after an hour of training, where `write(path, …)` could not create its file."""
    path = Path(path)
    _target(path)
    temporary = _temporary(path)
    with _blaming(path), temporary.open("xb"):
        pass
    temporary.unlink()


@contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place once it is complete and on the disk."""
    path = Path(path)
    target, temporary = _target(path), _temporary(path)
    try:
        with _blaming(path):
            with temporary.open("xb") as file:
                yield file
                _keep_mode(target, temporary)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def to_json(value: Any) -> str:
    """JSON, with NumPy's scalars as the numbers that they are."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written to a model file: it is not JSON-ready")


def _checksum(tensors: Mapping[str, npt.NDArray[Any]], text: str) -> int:
    """Of all that the file holds: a flipped bit would otherwise load as another weight."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).data, zlib.crc32(name.encode(), crc))
    return crc


def _parse(path: Path, tensors: Tensors, header: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in header:
        raise ValueError(f"{path} is a safetensors file, but not a model saved by backprop_gpu")
    checksum, _, text = header[FORMAT].partition(" ")
    if checksum != f"{_checksum(tensors, text):08x}":
        raise ValueError(f"{path} is damaged: its content does not fit its checksum")
    try:
        metadata = dict(json.loads(text))
        version = metadata.pop("version")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from error
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this release of backprop_gpu reads {VERSION}; "
            "a newer release may read it"
        )
    return metadata


def _keep_mode(target: Path, temporary: Path) -> None:
    """A private file stays private."""
    with suppress(FileNotFoundError):
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """An OSError about the temporary file names the path that the caller knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _target(path: Path) -> Path:
    """The file behind a link; OSError for what is no plain file, which a rename would destroy."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: it exists and is not a plain file")
    return target


def _temporary(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def user_cache() -> Path:
    """The folder of backprop_gpu in the user's cache directory, by the rules of the operating system."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "backprop_gpu"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "backprop_gpu"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "backprop_gpu"
