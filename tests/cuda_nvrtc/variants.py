"""Every kernel that the library may launch, found by asking the library: the planner's tables, and its own host code.

`Kernels` is given arrays that have shapes, dtypes and addresses but no memory, and a module `cupy` that notes what it
is asked to compile. So names, options, block sizes and shared memory are those of a real launch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np

import backprop_gpu as bp
from backprop_gpu import losses
from backprop_gpu.backends import cuda_kernels
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.backends.cuda_kernels import Kernels, Launch, Whole
from backprop_gpu.backends.cuda_plan import LAYOUTS, NUMBERS, TILES, Parts, Tile

__all__ = [
    *("ARCHITECTURES", "Variant", "assertions", "options"),
    *("covering", "every_tile", "everything", "representative"),
]

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compute capabilities, times ten, that are supported."""

ROWS, COLUMNS = 64, 64


@dataclass(frozen=True)
class Variant:
    """One instance of a kernel's template."""

    file: str
    expression: str
    threads: int
    shared_bytes: int
    oldest: int
    """The first compute capability, times ten, that it is for."""
    tile: Tile | None = None

    @property
    def operation(self) -> str:
        return self.expression.partition("<")[0]

    def runs_on(self, architecture: str) -> bool:
        return int(architecture) >= self.oldest


# A cupy that only takes notes


@dataclass
class _Array:
    """What the host code looks at."""

    shape: tuple[int, ...]
    dtype: np.dtype
    aligned: bool = True

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=512 if self.aligned else 512 + self.itemsize)


def array(dtype: str, *shape: int, aligned: bool = True) -> _Array:
    return _Array(shape or (ROWS, COLUMNS), np.dtype(NUMBERS[dtype].array if dtype in NUMBERS else dtype), aligned)


class _RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> None:
        self.code, self.options, self.names = code, options, name_expressions

    def get_function(self, name: str) -> Any:
        assert name in self.names
        file = re.search(r'#include "(.*)"', self.code)[1]
        return SimpleNamespace(file=file, expression=name, options=self.options)


def _kernels() -> Kernels:
    shared = {"MaxSharedMemoryPerBlockOptin": 227 << 10, "MaxSharedMemoryPerMultiprocessor": 228 << 10}
    device = SimpleNamespace(id=0, compute_capability="90", attributes={"MultiProcessorCount": 132, **shared})
    cp = SimpleNamespace(
        RawModule=_RawModule,
        cuda=SimpleNamespace(Device=lambda: device),
        empty=lambda shape, dtype: array(dtype, *shape),
        zeros=lambda shape, dtype: array(dtype, *shape),
    )
    return Kernels(cp)


KERNELS = _kernels()


def options() -> tuple[str, ...]:
    """With which the library compiles."""
    return KERNELS.shares(array("float32", 8), array("float64", 8)).kernel.options


def _variant(launch: Launch, *dtypes: str, tile: Tile | None = None) -> Variant:
    kernel = launch.kernel
    oldest = max(NUMBERS[dtype].oldest_capability for dtype in dtypes)
    return Variant(kernel.file, kernel.expression, launch.threads, launch.shared_bytes, oldest, tile)


# Products

Alignments = Sequence[tuple[bool, bool]]

BOTH: Alignments = ((True, True), (False, False))
ALL: Alignments = tuple(product((True, False), repeat=2))
DROPOUT = Dropout(0.5, 1, 0, 0)


def outputs(dtype: str) -> tuple[str, ...]:
    """What a product of that dtype may be written as."""
    return (dtype, "float32") if NUMBERS[dtype].array == "uint16" else (dtype,)


def products(tile: Tile, sigmas: Sequence[str], dropouts: Sequence[bool], alignments: Alignments) -> Iterator[Variant]:
    yield from dense(tile, sigmas, dropouts, alignments, outputs(tile.dtype))
    for a, b in alignments:
        yield gradients(tile, a, b)


def dense(
    tile: Tile, sigmas: Sequence[str], dropouts: Sequence[bool], alignments: Alignments, written_as: Sequence[str]
) -> Iterator[Variant]:
    """dense_forward and dense_backward."""
    dtype = tile.dtype
    for sigma, dropped, (a, b), output in product(sigmas, dropouts, alignments, written_as):
        masked, to = DROPOUT if dropped else None, array(output)
        operands = array(dtype, aligned=a), array(dtype, aligned=b)
        bias = array("float64" if dtype == "float64" else "float32", COLUMNS)
        settings = {"dtype": dtype, "tile": tile}
        yield _variant(KERNELS.dense_forward(*operands, bias, to, None, sigma, masked, **settings), dtype, tile=tile)
        yield _variant(KERNELS.dense_backward(*operands, to, to, sigma, masked, **settings), dtype, tile=tile)


def gradients(tile: Tile, a_aligned: bool, b_aligned: bool) -> Variant:
    operands = array(tile.dtype, aligned=a_aligned), array(tile.dtype, aligned=b_aligned)
    wide = array("float64" if tile.dtype == "float64" else "float32")
    return _variant(KERNELS.dense_gradients(*operands, wide, wide, Parts(tile, 1, ROWS)), tile.dtype, tile=tile)


def passes(sigmas: Sequence[str], dropouts: Sequence[bool]) -> Iterator[Variant]:
    """What follows a product of cuBLAS."""
    counter = array("uint32", 2)
    for dtype, sigma, dropped in product(("float32", "float64"), sigmas, dropouts):
        x, b, masked = array(dtype), array(dtype, COLUMNS), DROPOUT if dropped else None
        for output in narrow(dtype):
            to = array(output)
            forward = KERNELS.dense_forward_pass(x, b, to, None, sigma, masked, counter, dtype=output)
            backward = KERNELS.dense_backward_pass(x, to, to, sigma, masked, counter, dtype=output)
            yield _variant(forward, dtype, output)
            yield _variant(backward, dtype, output)


def bias_gradients() -> Iterator[Variant]:
    for dtype in NUMBERS:
        delta, db = array(dtype), array("float64" if dtype == "float64" else "float32", COLUMNS)
        plan = Parts(TILES[dtype][0], 1, ROWS)
        oldest = "float32" if NUMBERS[dtype].array == "float32" else dtype  # tf32 is float32 in memory
        yield _variant(KERNELS.bias_gradients(delta, db, plan, dtype=dtype), oldest)


# The output layer

LANES_OUTPUTS = {1: 1, 2: 8, 4: 16, 8: 32, 16: 64, 32: 1000}
"""n_out for each number of lanes."""


def narrow(dtype: str) -> tuple[str, ...]:
    """What operands may be made from arrays of a dtype."""
    return (dtype, "bfloat16", "float16") if dtype == "float32" else (dtype,)


def output_layer(all_lanes: bool) -> Iterator[Variant]:
    for dtype, sigma in product(("float32", "float64"), losses.OUTPUT_ACTIVATIONS):
        for n_out in LANES_OUTPUTS.values() if sigma == "softmax" else (COLUMNS,):
            z = array(dtype, ROWS, n_out)
            yield _variant(KERNELS.output_forward(z, z, sigma), dtype)
    for name, loss in losses.LOSSES.items():
        for i, (dtype, sigma) in enumerate(product(("float32", "float64"), loss.output_activations)):
            all_here = all_lanes or (i == 0 and name in ("cross_entropy", "squared_error"))
            for n_out, output in product(LANES_OUTPUTS.values() if all_here else (16,), narrow(dtype)):
                yield output_delta(loss(), sigma, dtype, output, n_out)
    for dtype in ("float32", "float64"):
        yield _variant(KERNELS.shares(array(dtype, ROWS), array("float64", ROWS)), dtype)


def output_delta(loss: losses.Loss, sigma: str, dtype: str, output: str, n_out: int) -> Variant:
    z, delta, of_steps = array(dtype, ROWS, n_out), array(output, ROWS, n_out), array("float64", 8)
    settings = {"scratch": (of_steps, array("uint32", 1)), "dtype": output}
    return _variant(KERNELS.output_delta(z, z, delta, of_steps, loss, sigma, **settings), dtype, output)


# The flat vector, and rows


def flat_vector() -> Iterator[Variant]:
    table, of_steps = array("int64", 4, 6), array("float64", 8)
    for dtype in ("float32", "float64"):
        x = array(dtype, 1000)
        optimizers = (bp.SGD(), bp.SGD(momentum=0.9, nesterov=True), bp.Adam(), bp.RMSprop())
        for optimizer, copy in product(optimizers, narrow(dtype)):
            settings = {
                "numbers": of_steps,
                "counters": array("uint32", 2),
                "losses": of_steps,
                "scratch": (of_steps, array("uint32", 1)),
                "copy": None if copy == dtype else array(copy, 1000),
                "dtype": copy,
            }
            launch = KERNELS.update(x, [x] * len(optimizer.slots), x, table, 2, optimizer, **settings)
            yield _variant(launch, dtype, copy)
        parts, whole = array(dtype, 2, ROWS, COLUMNS), Whole(array(dtype), array(dtype, COLUMNS))
        yield _variant(KERNELS.whole_gradients(parts, array(dtype, 2, COLUMNS), whole), dtype)
        yield _variant(KERNELS.sum_squares(x, of_steps), dtype)


def rows() -> Iterator[Variant]:
    for dtype in ("float32", "float64"):
        data, index = array(dtype), array("int64", ROWS)
        for output in narrow(dtype):
            launch = KERNELS.gather(data, index, array("uint32", 2), array(output), ROWS, dtype=output)
            yield _variant(launch, dtype, output)
            if output != dtype:
                yield _variant(KERNELS.convert(data, array(output), output), dtype, output)


# Selections


def _unique(variants: Iterator[Variant]) -> tuple[Variant, ...]:
    return tuple(dict.fromkeys(variants))


def tiles() -> Iterator[Tile]:
    for of_dtype in TILES.values():
        yield from of_dtype


def everything() -> tuple[Variant, ...]:
    """Every variant that can be launched."""

    def all_of_them() -> Iterator[Variant]:
        for tile in tiles():
            yield from products(tile, tuple(bp.ACTIVATIONS), (False, True), ALL)
        yield from passes(tuple(bp.ACTIVATIONS), (False, True))
        yield from bias_gradients()
        yield from output_layer(all_lanes=True)
        yield from flat_vector()
        yield from rows()

    return _unique(all_of_them())


def every_tile() -> tuple[Variant, ...]:
    """Each tile with each access of each operand, in every product."""

    def enough() -> Iterator[Variant]:
        for tile in tiles():
            yield from dense(tile, ("tanh",), (False,), BOTH[:1], outputs(tile.dtype)[:1])
            yield from dense(tile, ("relu",), (True,), BOTH[1:], outputs(tile.dtype)[-1:])
            for alignment in BOTH:
                yield gradients(tile, *alignment)

    return _unique(enough())


def covering() -> tuple[Variant, ...]:
    """Everything once: every tile, each activation with and without dropout, and all that is no product."""

    def enough() -> Iterator[Variant]:
        yield from every_tile()
        for i, sigma in enumerate(bp.ACTIVATIONS):
            for j, dtype in enumerate(("float32", "float64")):
                yield from dense(TILES[dtype][-1], (sigma,), ((i + j) % 2 == 0,), BOTH[:1], (dtype,))
        yield from passes(("relu",), (False, True))
        yield from bias_gradients()
        yield from output_layer(all_lanes=False)
        yield from flat_vector()
        yield from rows()

    return _unique(enough())


def representative() -> tuple[Variant, ...]:
    """Those whose registers are kept in a table: each tile in each layout, aligned, and one of each other kernel."""

    def some() -> Iterator[Variant]:
        for tile in tiles():
            written_as = outputs(tile.dtype)[:1]
            yield from dense(tile, ("tanh",), (False,), BOTH[:1], written_as)
            yield gradients(tile, True, True)
        yield from passes(("tanh",), (False,))
        yield from bias_gradients()
        for loss in (bp.CrossEntropy(), bp.SquaredError()):
            yield output_delta(loss, loss.output_activations[0], "float32", "float32", 10)
        yield from flat_vector()

    return _unique(some())


# What the host takes for granted

CONSTANTS = {
    "output_delta.cu": ("DELTA_THREADS",),
    "output_forward.cu": ("OUTPUT_THREADS",),
    "gather.cu": ("GATHER_THREADS",),
    "update.cu": ("UPDATE_THREADS",),
}
STRUCTS = {"Stretch": cuda_kernels.STRETCH, "StepNumbers": cuda_kernels.STEP_NUMBERS}


def assertions(file: str, architecture: str) -> str:
    """A file's constants, structs and tiles as the host knows them: static_asserts to append to the file."""
    operation = file.removesuffix(".cu")
    lines = [f"{name} == {cuda_kernels.THREADS}" for name in CONSTANTS.get(file, ())]
    if file == "update.cu":
        lines += [f"BLOCK_PARAMETERS == {cuda_kernels.BLOCK_PARAMETERS}", *_of_structs()]
    if operation in LAYOUTS:
        there = (tile for tile in tiles() if NUMBERS[tile.dtype].oldest_capability <= int(architecture))
        lines += [line for tile in there for line in _of_tile(tile, operation)]
    return "\n".join(f'static_assert({line}, "the host says otherwise");' for line in lines)


def _of_structs() -> Iterator[str]:
    for struct, columns in STRUCTS.items():
        yield f"sizeof({struct}) == {8 * len(columns)}"
        for i, column in enumerate(columns):
            yield f"__builtin_offsetof({struct}, {column}) == {8 * i}"


def _of_tile(tile: Tile, operation: str) -> Iterator[str]:
    layout, itemsize = LAYOUTS[operation], NUMBERS[tile.dtype].itemsize
    along = ", ".join("ALONG_K" if along == "k" else "ALONG_MN" for along in layout)
    for name in ("m", "n", "k", "stages", "threads", "passes", "slices"):
        yield f"{tile.expression}::{name.upper()} == {getattr(tile, name)}"
    for a, b in product((16, itemsize), repeat=2):
        yield f"Product<{tile.expression}, {along}, {a}, {b}>::SHARED_BYTES == {tile.shared_bytes(layout)}"
