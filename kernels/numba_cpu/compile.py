"""How every function of this folder is compiled, and how the machine code is kept from one process to the next.

`compiled` is for every function but the few that Python calls. Those are each an `entry_point`, whose machine code is
kept on disk: a training step takes 15 s to compile, and 0.1 s to load.

Numba's own disk cache is used, but for three things that it does not do. It recompiles where the file of the cached
function has changed, but not where a function that it calls has: here the directory's name holds a digest of every
source. It loads what it finds: a block of zeros in a file of machine code, as a power failure leaves, ends the process
with a segmentation fault. And two processes that compile for different types at once may each write the other's file.
Here every function and tuple of types has a folder of its own, which appears complete and with a checksum, or not at
all.

The directory is $BACKPROP_GPU_CACHE_DIR, else the user's cache directory, else a private one among the temporary files.
The machine code is pickled, so a directory that others may write to is used only where $BACKPROP_GPU_CACHE_DIR asks
for it; that one is never replaced by another: where it cannot be written to, a warning says so and nothing is kept.
NUMBA_CACHE_DIR plays no part. Numba wants to write where it reads, so a directory on a read-only disk is of no use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, update_wrapper
from inspect import getfile
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.extending import is_jitted

import backprop_gpu
from backprop_gpu import activations, losses, optimizers
from backprop_gpu.kernels.numba_cpu.processor import HAS_AMX
from backprop_gpu.storage import user_cache

__all__ = ["INNER", "EntryPoint", "compiled", "entry_point", "executable", "named_apart", "outline"]

logger = logging.getLogger("backprop_gpu")

# Functions that only other compiled functions call are translated each by itself, and optimised where they end up:
# Numba optimises every function with all that it calls, so at ten levels of calls a training step went through LLVM ten
# times: 32 s; now 15.


class InnerCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's compiler, as `pipeline_class`, for such a function; called from Python, it raises TypeError."""

    def define_pipelines(self) -> list[Any]:
        """One pipeline: Numba's own."""
        state = self.state
        state.flags.no_cpython_wrapper = state.flags.no_cfunc_wrapper = True
        state["library"] = InnerLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


class InnerLibrary(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code of a function and of those that it calls, to be linked into that of its caller."""

    def _optimize_final_module(self) -> None:
        """Not here."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """What Python gets to call; Numba asks for it when it has compiled a function."""
        return _refusal()

    @property
    def codegen(self) -> InnerLibrary:
        """Numba gives a function's environment to the machine code that has been loaded: none of this has."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """See `codegen`."""


@cache
def _refusal() -> int:
    """The address of a function that says TypeError to whatever Python calls it with."""
    only_compiled_code_may_call_this.compile(())
    result = only_compiled_code_may_call_this.overloads[()]._asdict()
    return int(result["library"].get_pointer_to_function(result["fndesc"].llvm_cpython_wrapper_name))


@numba.njit
def only_compiled_code_may_call_this() -> None:
    """See `entry_point` for a function that Python may call."""
    raise TypeError("only compiled code may call this")


# How each function is compiled

# "contract" lets a product and a sum become one fused instruction. Nothing else of fastmath: "nnan" and "ninf" would
# let a NaN pass unseen, and "reassoc" would undo the range reductions of `elementary`.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

INNER: dict[str, Any] = {**OPTIONS, "pipeline_class": InnerCompiler}

compiled = numba.njit(**INNER)
"""Decorator: a function for other compiled functions; it divides by zero as IEEE 754 says, and fuses multiply-adds."""

executable = numba.njit(**OPTIONS)
"""Decorator: likewise, made into machine code with all that it calls, so Python may call it; it releases the GIL."""


Function = Callable[..., Any]


def named_apart(function: Function) -> Function:
    """`function`, by a qualified name of its own: all closures of one factory have the same.

    The code of several entry points is linked by the names of the functions inside. Numba tells functions of one name
    apart by a number, which counts up in each process: what two processes have kept may have one name for two
    functions, and the first that is loaded then serves both. So selu became gelu in networks that had trained well.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    _named[name] += 1
    if _named[name] > 1:
        function.__qualname__ += f"_{_named[name]}"
    return function


_named: Counter[str] = Counter()
"""Functions by name, in the order of import, which is the same in every process."""


class EntryPoint:
    """A compiled function that Python calls, and compiled code does not; its machine code is kept on disk.

    It takes numbers, arrays and tuples of them, by position. Where NUMBA_DISABLE_JIT is set, it is the plain function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._by_outline: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        return self.specialised(*args)(*args)

    def specialised(self, *args: Any) -> Callable[..., Any]:
        """The machine code for arguments of these types, loaded or compiled at its first use in this process."""
        kind = outline(args)
        if kind not in self._by_outline:
            with _lock:
                if kind not in self._by_outline:
                    self._by_outline[kind] = _specialise(self._function, tuple(map(numba.typeof, args)))
        return self._by_outline[kind]


entry_point = EntryPoint
"""Decorator: as `executable`, with the machine code kept on disk."""

_lock = threading.RLock()
"""Numba's configuration belongs to the process; and threads that ask for the same code wait for one to have it."""


def outline(x: Any) -> Any:
    """As much of `x` as its Numba type depends on: 5 µs for a training step's arguments, where `typeof` takes 175."""
    if isinstance(x, np.ndarray):
        return type(x), x.dtype, x.ndim, x.flags.num
    if isinstance(x, tuple):
        return type(x), *map(outline, x)
    return numba.typeof(x)


# One function for one tuple of types: load it, or else compile it and keep it


def _specialise(function: Callable[..., Any], types: tuple[Any, ...]) -> Callable[..., Any]:
    dispatcher = executable(function)
    if not is_jitted(dispatcher):
        return function
    folder = _folder(function, types)
    if folder is not None:
        dispatcher = _load(function, types, folder) or _compile_and_keep(function, types, folder)
    else:
        logger.info("compiling %s; the machine code is not kept", function.__name__)
        dispatcher.compile(types)
    # The folder is complete: code for other types would spoil it.
    dispatcher.disable_compile()
    return dispatcher


def _folder(function: Callable[..., Any], types: tuple[Any, ...]) -> Path | None:
    """Where the machine code of `function` for these types belongs, or None where it cannot be kept."""
    try:
        source = Path(getfile(function))
        # Numba's cache knows a function by its file's path, and before 0.68 by the time of its last change.
        key = f"{source} {source.stat().st_mtime_ns} {types}"
        directory = _directory()
    except OSError as error:
        logger.info("no directory for machine code: %s", error)
        return None
    return directory and directory / f"{function.__name__}-{_short_hash(key)}"


def _load(function: Callable[..., Any], types: tuple[Any, ...], folder: Path) -> Any:
    """The machine code in `folder`, or None where there is none, or not all of it."""
    if not _is_intact(folder):
        return None
    try:
        dispatcher = _cached(function, folder)
        dispatcher.compile(types)
    except Exception as error:  # reading a pickle can raise anything
        logger.info("machine code in %s cannot be loaded: %r", folder, error)
        return None
    return dispatcher


def _compile_and_keep(function: Callable[..., Any], types: tuple[Any, ...], folder: Path) -> Any:
    logger.info("compiling %s; the machine code is kept in %s", function.__name__, folder)
    fresh = folder.with_name(f"new-{uuid.uuid4().hex}")
    dispatcher = executable(function)
    try:
        fresh.mkdir()
        dispatcher = _cached(function, fresh)
        dispatcher.compile(types)
        _publish(fresh, folder)
    except OSError as error:
        logger.info("the machine code cannot be kept: %s", error)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    dispatcher.compile(types)  # nothing is left to do if only writing has failed: a full disk
    return dispatcher


def _cached(function: Callable[..., Any], folder: Path) -> Any:
    """A dispatcher whose machine code Numba keeps in `folder`; OSError where it would take another place."""
    # Where it cannot write to CACHE_DIR, Numba goes on to __pycache__, whose machine code may be stale.
    with _numba_configured(CACHE_DIR=str(folder), CACHE_LOCATOR_CLASSES=""):
        try:
            dispatcher = numba.njit(cache=True, **OPTIONS)(function)
        except RuntimeError as error:
            raise OSError(str(error)) from error
    if not Path(dispatcher.stats.cache_path).is_relative_to(folder):
        raise OSError(f"Numba cannot write to {folder}")
    return dispatcher


@contextmanager
def _numba_configured(**values: str) -> Iterator[None]:
    before = {name: getattr(numba.config, name, "") for name in values}
    try:
        for name, value in values.items():
            setattr(numba.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(numba.config, name, value)


# A folder of machine code, with the checksum that makes it complete


def _publish(fresh: Path, folder: Path) -> None:
    """Make `fresh` the contents of `folder`, unless another process was first, or these sources are no longer on disk.

    Without the second rule, a source edited between import and compilation would leave its old code under a new name.
    """
    (fresh / CHECKSUM).write_text(_checksum(fresh))
    if _sources_hash() == SOURCES_HASH and not _is_intact(folder):
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / CHECKSUM).read_text() == _checksum(folder)
    except (OSError, ValueError):
        return False


def _checksum(folder: Path) -> str:
    """The hash of Numba's index files and data files."""
    files = sorted(folder.rglob("*.nb[ic]"))
    return _short_hash(str([(path.name, hashlib.sha256(path.read_bytes()).digest()) for path in files]))


CHECKSUM = "checksum"


# The directory of all machine code that was compiled alike


def _directory() -> Path | None:
    """The directory for code compiled as it would be now, made where it is missing; None where there can be none."""
    root = _root(os.environ.get(VARIABLE, ""))
    if root is None:
        return None
    directory = root / f"{PREFIX}{_short_hash(SOURCES_HASH + _settings())}"
    if not directory.exists():
        directory.mkdir(exist_ok=True)
        _remove_old(root)
    os.utime(directory)
    return directory


VARIABLE = "BACKPROP_GPU_CACHE_DIR"
PREFIX = "numba_cpu-"

KEPT = 8
"""Directories kept, the last used ones: enough for environments and kinds of CPU that share a home to leave each other
alone, and an end to growth by a directory of some megabytes for each new version of this library, Numba or Python.
"""


def _remove_old(root: Path) -> None:
    """A process that is reading one of them compiles again."""
    with suppress(OSError):  # another process may be doing the same
        by_use = sorted(root.glob(f"{PREFIX}*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_use[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


@cache
def _root(chosen: str) -> Path | None:
    """The directory `chosen`, or the first of ours that will do; None where there is none."""
    if chosen:
        return _chosen_root(chosen)
    for place in (user_cache, _temporary):
        try:
            root = place()
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(root)
            _require_writable(root)
            return root
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
            logger.info("machine code is kept elsewhere, or not at all: %s", error)
    return None


def _chosen_root(chosen: str) -> Path | None:
    try:
        root = Path(chosen).expanduser().absolute()
        root.mkdir(parents=True, exist_ok=True)
        _require_writable(root)
        return root
    except (OSError, RuntimeError) as error:
        logger.warning("%s: %s; machine code is not kept, so every process compiles again", VARIABLE, error)
    return None


def _temporary() -> Path:
    """Windows has temporary files of each user's own; elsewhere the name tells users apart."""
    user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""
    return Path(tempfile.gettempdir()) / f"backprop_gpu{user}"


def _require_private(root: Path) -> None:
    """PermissionError where somebody else could have put a pickle into `root`: a link, another's, or open to others."""
    status = root.lstat()
    ours = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    closed = sys.platform == "win32" or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not (stat.S_ISDIR(status.st_mode) and ours and closed):
        raise PermissionError(f"somebody else may write to {root}")


def _require_writable(root: Path) -> None:
    tempfile.TemporaryFile(dir=root).close()


# What the machine code depends on


def _sources_hash() -> str:
    """The hash of every source that is compiled: 0.4 ms."""
    sources = [*Path(__file__).parent.glob("*.py"), *(Path(str(module.__file__)) for module in CONSTANTS)]
    return _short_hash(str(sorted((path.name, hashlib.sha256(path.read_bytes()).digest()) for path in sources)))


def _settings() -> str:
    """Everything else: versions, the CPU, and the configuration that changes what Numba compiles."""
    versions = (backprop_gpu.__version__, numba.__version__, llvmlite.__version__, np.__version__, sys.version)
    configuration = [str(getattr(numba.config, name, None)) for name in CONFIGURATION]
    return repr((versions, llvmlite.binding.get_process_triple(), _cpu(), HAS_AMX, configuration))


def _cpu() -> tuple[str, str]:
    """Name and features of the CPU that Numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, or this one's."""
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    if features is None:
        try:
            features = llvmlite.binding.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know them on every platform
            features = ""
    return name or llvmlite.binding.get_host_cpu_name(), features


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


CONSTANTS = (activations, losses, optimizers)
"""Modules outside this folder whose constants are compiled in."""

CONFIGURATION = (
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "DEBUG_NRT",
    "DISABLE_INTEL_SVML",
    "ENABLE_AVX",
    "LOOP_VECTORIZE",
    "NRT_STATS",
    "OPT",
    "SLP_VECTORIZE",
    "USING_SVML",
)
"""Names in `numba.config`."""

SOURCES_HASH = _sources_hash()
"""Of the sources as they are imported."""
