"""Modules and kernels: `RawModule(code=...).get_function(name)(grid, block, args)`, as in CuPy, but strict.

CuPy passes whatever it is given, and a wrong dtype shows as wrong numbers or a fault. Here every argument is compared
with the kernel's signature.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import compiler
from .arrays import ndarray
from .emulator import SCHEDULES, Operation
from .errors import CompileException, CUDADriverError, EmulationError

if TYPE_CHECKING:
    from .emulator import Emulator
    from .memory import Allocation

__all__ = ["RawKernel", "RawModule"]

DEFAULT_SHARED_MEMORY = 48 << 10

_running = threading.Lock()  # the run-time has one set of fibers


class _ArrayArgument(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("parameter", ctypes.c_int),
        ("read_only", ctypes.c_int),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("checked", ctypes.c_int),
        ("max_dynamic_shared", ctypes.c_size_t),
        ("max_shared", ctypes.c_size_t),
        ("step_limit", ctypes.c_uint64),
        ("memory_file", ctypes.c_int),
        ("memory_base", ctypes.c_size_t),
        ("memory_size", ctypes.c_size_t),
        ("written", ctypes.c_void_p),
        ("last_blocks", ctypes.c_size_t),
    )


class RawModule:
    """As `cupy.RawModule`: the source is compiled when the first kernel is asked for."""

    _emulator: Emulator  # set in the subclass that each emulator has

    def __init__(
        self,
        *,
        code: str,
        options: Sequence[str] = (),
        name_expressions: Sequence[str] = (),
        backend: str = "nvrtc",
    ) -> None:
        self.code, self.options, self.name_expressions, self.backend = (
            code,
            tuple(options),
            tuple(name_expressions),
            backend,
        )
        self._kernels: dict[str, RawKernel] | None = None

    def compile(self, log_stream: Any = None) -> None:
        if self._kernels is not None:
            return
        emulator = self._emulator
        arch = emulator.compute_capability
        try:
            path, names = compiler.build(
                self.code, self.options, self.name_expressions, checked=emulator.checked, arch=arch
            )
        except compiler.CompileError as error:
            raise CompileException(str(error), self.code, "", self.options, self.backend) from None
        library = _Library(path)
        self._kernels = {name: RawKernel(emulator, library, i, name) for i, name in enumerate(names)}

    def get_function(self, name: str) -> RawKernel:
        self.compile()
        if name not in self._kernels:
            raise CUDADriverError(
                f"CUDA_ERROR_NOT_FOUND: named symbol not found ({name}; there are {', '.join(self._kernels)})"
            )
        return self._kernels[name]


class _Library:
    """A shared object of kernels, loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        run_time = ctypes.CDLL(str(compiler.runtime()))
        self.launch = run_time.cuda_on_cpu_launch
        self.launch.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
        )
        self.messages = run_time.cuda_on_cpu_messages
        self.messages.restype = ctypes.c_char_p

    def entry(self, index: int) -> int:
        return ctypes.cast(getattr(self.handle, f"cuda_on_cpu_run_{index}"), ctypes.c_void_p).value

    def signature(self, index: int) -> list[_Parameter]:
        function = getattr(self.handle, f"cuda_on_cpu_signature_{index}")
        function.restype = ctypes.c_char_p
        return [_Parameter.parse(text) for text in function().decode().split(",")[:-1]]


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a kernel: a pointer or a value, of a number, or of a struct of so many bytes."""

    pointer: bool
    read_only: bool
    dtype: np.dtype | None
    size: int

    @classmethod
    def parse(cls, text: str) -> _Parameter:
        pointer = text[0] in "pc"
        kind, size = (text[1], text[2:]) if pointer else (text[0], text[1:])
        dtype = None if kind in "sv" else np.dtype(bool if kind == "?" else f"{kind}{size}")
        return cls(pointer, text[0] == "c", dtype, int(size))

    def __str__(self) -> str:
        name = self.dtype.name if self.dtype is not None else f"struct of {self.size} bytes" if self.size else "void"
        return f"{'const ' if self.read_only else ''}{name}{'*' if self.pointer else ''}"

    def accepts_elements(self, array: ndarray) -> bool:
        if self.dtype is not None:
            return array.dtype == self.dtype
        return self.size == 0 or (self.size % array.itemsize == 0 and array.nbytes % self.size == 0)

    def pack_value(self, value: Any) -> bytes:
        """The bytes that CuPy would pass for `value`, or TypeError if they are not what the kernel reads."""
        if isinstance(value, bool | int | float):  # as CuPy does: bool, int64, float64
            value = np.asarray(value)[()]
        if isinstance(value, np.ndarray) and value.size != 1:
            raise TypeError(
                f"a numpy.ndarray of shape {value.shape} where an array must be on the device: use cupy.asarray"
            )
        if not isinstance(value, np.generic | np.ndarray):
            raise TypeError(f"Unsupported type {type(value)}")
        matches = value.dtype == self.dtype if self.dtype is not None else value.dtype.itemsize == self.size
        if not matches or self.pointer:
            raise TypeError(f"a {value.dtype} (as CuPy passes it) where the kernel takes {self}")
        return value.tobytes()


@dataclass(frozen=True)
class _Arguments:
    """What a launch passes: addresses, which keep no memory alive."""

    values: tuple[bytes, ...]
    arrays: tuple[tuple[int, int, int, bool], ...]  # address, bytes, parameter, read only


class RawKernel:
    """As `cupy.RawKernel`: `kernel(grid, block, args, shared_mem=0)` on the current stream."""

    def __init__(self, emulator: Emulator, library: _Library, index: int, name: str) -> None:
        self._emulator, self._library = emulator, library
        self._entry = library.entry(index)
        self._parameters = library.signature(index)
        self._max_dynamic_shared = 0
        self.name = name

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._max_dynamic_shared or DEFAULT_SHARED_MEMORY

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        if not 0 <= nbytes <= self._emulator.max_shared_memory:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: invalid argument ({nbytes} bytes of dynamic shared memory, of at most "
                f"{self._emulator.max_shared_memory})"
            )
        self._max_dynamic_shared = nbytes

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0, stream: Any = None
    ) -> None:
        arguments, allocations = self._pack(args)
        options = self._options()
        grid, block = _three(grid), _three(block)
        emulator = self._emulator
        stream = stream or emulator.streams.current
        if stream._capture is None:
            emulator.counters.direct_launches[self.name] += 1
        run = partial(self._run, grid, block, arguments, shared_mem, options)
        emulator.streams.submit(Operation(self.name, run, allocations), stream)

    def _pack(self, args: Sequence[Any]) -> tuple[_Arguments, tuple[Allocation, ...]]:
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments; got {len(args)}")
        values, arrays, allocations = [], [], []
        for i, (value, parameter) in enumerate(zip(args, self._parameters, strict=True)):
            try:
                if isinstance(value, ndarray):
                    self._check_array(value, parameter)
                    address = value._view.ctypes.data
                    values.append(address.to_bytes(8, "little"))
                    arrays.append((address, value.nbytes, i, parameter.read_only))
                    allocations.append(value._allocation)
                elif parameter.pointer and (value is None or (isinstance(value, np.uintp) and value == 0)):
                    values.append(bytes(8))
                else:
                    values.append(parameter.pack_value(value))
            except TypeError as error:
                raise TypeError(f"{self.name}: argument {i} is {error}") from None
        return _Arguments(tuple(values), tuple(arrays)), tuple(allocations)

    def _check_array(self, array: ndarray, parameter: _Parameter) -> None:
        if array._emulator is not self._emulator:
            raise TypeError("an array of another device")
        if not parameter.pointer or not parameter.accepts_elements(array):
            raise TypeError(f"a {array.dtype} array where the kernel takes {parameter}")
        if not array.flags.c_contiguous:
            raise TypeError(f"not C-contiguous: shape {array.shape}, strides {array.strides}")

    def _options(self) -> _Options:
        emulator, memory = self._emulator, self._emulator.memory
        return _Options(
            seed=emulator.seed,
            checked=emulator.checked,
            max_dynamic_shared=self.max_dynamic_shared_size_bytes,
            max_shared=emulator.max_shared_memory if self._max_dynamic_shared else DEFAULT_SHARED_MEMORY,
            step_limit=emulator.step_limit,
            memory_file=memory.file,
            memory_base=memory.base,
            memory_size=memory.bytes.size,
            written=None if memory.written is None else memory.written.ctypes.data,
            last_blocks=emulator.last_blocks,
        )

    def _run(self, grid: Any, block: Any, arguments: _Arguments, shared_mem: int, options: _Options) -> None:
        self._emulator.counters.launches[self.name] += 1
        schedules = self._emulator.schedules
        if len(schedules) == 1:
            return self._run_once(grid, block, arguments, shared_mem, options, schedules[0])
        memory = self._emulator.memory
        outputs = [(i, memory.at(address, size)) for address, size, i, read_only in arguments.arrays if not read_only]
        before = [output.copy() for _, output in outputs]
        results: list[np.ndarray] | None = None
        for schedule in schedules:
            for (_, output), contents in zip(outputs, before, strict=True):
                output[...] = contents
            self._run_once(grid, block, arguments, shared_mem, options, schedule)
            results = self._same_results(results, outputs, schedule)

    def _same_results(self, results: Any, outputs: Any, schedule: str) -> list[np.ndarray]:
        if results is None:
            return [output.copy() for _, output in outputs]
        for expected, (i, output) in zip(results, outputs, strict=True):
            if not np.array_equal(expected, output):
                offset = int(np.flatnonzero(expected != output)[0])
                raise EmulationError(
                    f"{self.name}: the result depends on the schedule: argument {i} differs from byte {offset} on "
                    f"between {self._emulator.schedules[0]!r} and {schedule!r}"
                )
        return results

    def _run_once(
        self, grid: Any, block: Any, arguments: _Arguments, shared_mem: int, options: _Options, schedule: str
    ) -> None:
        options.schedule = SCHEDULES.index(schedule)
        buffers = [ctypes.create_string_buffer(value, max(len(value), 8)) for value in arguments.values]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*map(ctypes.addressof, buffers))
        arrays = (_ArrayArgument * max(1, len(arguments.arrays)))(*arguments.arrays)
        with _running:
            problems = self._library.launch(
                self._entry, pointers, grid, block, shared_mem, arrays, len(arguments.arrays), ctypes.byref(options)
            )
            messages = self._library.messages().decode() if problems else ""
        if problems:
            text = compiler.source_lines(self._library.path, messages)
            raise EmulationError(f"{self.name}: {problems} problem{'s' * (problems > 1)}\n{text}".rstrip())


def _three(size: Sequence[int]) -> Any:
    return (ctypes.c_uint * 3)(*size, *[1] * (3 - len(size)))
