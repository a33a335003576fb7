"""How the `cpu` backend divides a training step among threads and caches, and the memory that this takes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.architecture import Architecture
from backprop_gpu.backends.numpy import FORWARD
from backprop_gpu.kernels.numba_cpu import activations, amx, nonzero, output_delta, thirds
from backprop_gpu.kernels.numba_cpu import update as updates
from backprop_gpu.kernels.numba_cpu.dense_gradients import GROUP
from backprop_gpu.kernels.numba_cpu.gemm import ROWS_OF_SUM
from backprop_gpu.kernels.numba_cpu.narrow import n_narrow, rows_turned
from backprop_gpu.kernels.numba_cpu.network import LAYER, PLAN, Memory
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, VECTOR_BYTES, round_up, width
from backprop_gpu.optimizers import Optimizer

__all__ = ["Layout", "Nonzero", "Plan", "for_inference", "for_training"]

Record = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""

HUGE_PAGE = 2 << 20

PAGE = 4096

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
"""Where Linux tells the size of a core's second-level cache."""


def _cache_bytes() -> int:
    """Of a core's second-level cache; as small as they come where the system does not tell."""
    try:
        return int(CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 512 << 10


TILE_BYTES = _cache_bytes()
"""What a tile's input and output of the widest layer may take: each tile brings all weights in once more.

Two cores of a Xeon with 2 MiB, in ms a step, with tiles for 512 KiB and for all of it, and with those for a and δ of
all layers in 512 KiB: network L 20.7, 20.3 and 24.2; 1024-1024-1024-10 with 256 rows 13.6, 13.0 and 15.7.
"""

TILE_ROWS = 128

SPLIT_ROWS_BYTES = 128 << 10
"""A gradient up to this size is summed by each thread for itself."""

COLUMNS_ROWS = 128
"""Rows of a mini-batch up to which the first layer's columns are split.

Two cores of a Xeon, in µs a step, with its rows split and its columns: network M 627 and 579, with 32 rows 276 and 233;
784-128-10 with 128 rows 277 and 257; 1024-1024-1024-10 with 32 rows 3107 and 2832. Of larger mini-batches,
784-100-10 with 200 rows 396 and 371, but 256-256-256-10 with 256 693 and 784, and network L 17.5 and 17.7 ms.
"""

MOST_WEIGHTS = 0.75
"""Of all weights, the part from which on the first layer's are most.

Then a few rows occupy two cores, whose parameters stay with them. One of the same Xeon beside two: 784-256-128-10 with
8 rows 212 and 132 µs, 784-128-10 with one row 83 and 51, 784-64-10 with 8 rows 43 and 32.
"""

PRODUCTS_PER_UPDATE = 50
"""Multiply-adds in float32 in the time of one parameter's update: 0.6 ns, at 95 in a ns, on a Xeon."""

COLUMNS_PER_THREAD = 64
"""With fewer, more than two threads would mostly gather: an element of X takes as long as 25 multiply-adds, on a Xeon.

Two gain all the same, see above; more are not measured.
"""

BLOCKS_PER_THREAD = 8
"""Of a panel of W, from which on threads share its rows: one of them has an eighth more than its share at most."""

EVEN = 1.1
"""Of these columns, how many more one thread may have than the mean of all."""

PRODUCTS_TO_START = 1 << 21
"""Multiply-adds that take twice as long as a thread takes to start and to end: 70 µs on a Zen 3."""

PRODUCTS_PER_STEP = 1 << 20
"""Multiply-adds in float32 of a training step for which a thread takes part in it.

One thread of a Zen 4 beside two, in µs a step: 64-64-64-10 with a batch of 32, 0.7 million multiply-adds, 22 and 33;
network S, 3.3 million, 84 and 60; 30-100-2 in float64 with a batch of 200, 1.7 million, 97 and 68.
"""

PRODUCTS_PER_CALL = 1 << 22
"""Multiply-adds of all steps of a call below which one thread of the system does every share of them.

A call a step on a Xeon, in µs, with two of them and with one: network S, 3.3 million, 313 and 239; 64-100-10 with 200
rows, 3.8 million, 316 and 244. Not measured where threads start sooner.
"""

ROWS_PER_THREAD = 2 * BLOCK_ROWS
"""In a smaller mini-batch, a second thread has few rows of its own or none, and shares the update."""

PARAMETERS_PER_THREAD = 1 << 19
"""For which a thread takes part in a small mini-batch's update.

One thread of a Zen 4 beside two that share a cache, in ms a step: 1662-885-529-39 with a batch of 7, 3.0 and 2.3;
1024-1024-1024-10 with 15, 4.0 and 3.0; 512-512-512-10 with 4, 0.63 and 0.55. Two that share none have to fetch each
other's parameters: 3.5 and 3.7; 4.6 and 5.8; 0.71 and 1.7.
"""


MOST_COPIES = 2
"""Threads that each have a copy of a small network: more would read more of each other's gradients than without, by
rule only, not measured.

Two cores of a Zen 4, in µs a step, without copies and with them: network S 57 and 55, 100-100-100-10 with 100 rows 103
and 97. While the two share no cache: 98 and 83, 209 and 165.
"""

MOST_NONZERO = 0.7
"""Of what the products of the first layer are by, the part that is not 0 up to which those by 0 are left out.

Two cores of a Zen 4, with random zeros: of the time of all products, a step takes so much where 0.5, 0.6, 0.7, 0.8 and
all of these parts are not 0: network M 0.76, 0.84, 0.91, 0.95 and 1.07; 784-100-10 with 200 rows 0.95, 1.00, 1.03, 1.06
and 1.15, in float64 0.82, 0.90, 0.98, 1.06 and 1.17; 64-100-10 with 200 rows, float64, 0.83, 0.84, 0.91, 0.95 and 1.02.
"""

ROWS_LOOKED_AT = 32
"""For this part: it takes 0.1 ms for 784 columns, once in a `fit`, a stream or a `predict`."""

CHUNK_ROWS, CHUNK_ROWS_OF_THIRDS = ROWS_OF_SUM, amx.MOST_DEPTH
"""Rows over which a block of ∂C/∂W is summed in one go: a longer float32 sum costs digits, and the cache."""

ROWS_OF_TWO = 2 * thirds.ROWS // BLOCK_ROWS
"""Blocks of two tiles of the left factor."""

LEFT_BYTES = 1 << 20
"""What a group's columns of a_prev may take in thirds."""


def may_split(dtype: Any) -> bool:
    """Whether products of `dtype` may be computed by thirds, see `amx`."""
    return bool(amx.may_split(np.empty(0, dtype)))


def chunk_rows(dtype: Any) -> int:
    """Rows over which a block of ∂C/∂W is summed in one go."""
    return int(CHUNK_ROWS_OF_THIRDS if may_split(dtype) else CHUNK_ROWS)


def together(dtype: Any, n_rows: int) -> bool:
    """Whether ∂C/∂W over n_rows is made chunk by chunk, each through all panels, see `step.own_gradients`."""
    return may_split(dtype) and n_rows > chunk_rows(dtype)


def n_scratch(dtype: Any, products: Iterable[tuple[int, int, int]]) -> int:
    """Entries that a thread needs for any of these products, (n_rows, depth, n_columns), or smaller ones."""
    if not may_split(dtype):
        return 0
    split = ((rows, depth) for rows, depth, columns in products if amx.gain(rows, columns) >= amx.LEAST_GAIN)
    return max((thirds.entries(rows, min(depth, amx.MOST_DEPTH)) for rows, depth in split), default=0)


def products_of(layer_sizes: Sequence[int], rows: int, chunk: int, columns: int) -> Iterable[tuple[int, int, int]]:
    """(n_rows, depth, n_columns) of a tile's products, forward and backward, and of ∂C/∂W and its transpose.

    The latter two of so many columns of a_prev, or of δ, over a chunk of rows.
    """
    for n_in, n_out in pairwise(layer_sizes):
        yield from ((rows, n_in, n_out), (rows, n_out, n_in))
        yield from ((min(columns, n_in + BLOCK_ROWS), chunk, n_out), (min(columns, n_out + BLOCK_ROWS), chunk, n_in))


@dataclass(frozen=True)
class Nonzero:
    """How much of X is not 0, as the first layer's products come upon it."""

    in_rows: float = 1.0
    """Of the columns, those that are not 0 in one of a few rows."""
    in_columns: float = 1.0
    """Of the rows, those in which a few columns next to each other are not all 0."""
    sparse: bool = False
    """X is a sparse matrix."""

    @classmethod
    def of(
        cls, n_rows: int, n_out: int, take: Callable[[Indices], npt.NDArray[Any]], most: int = ROWS_LOOKED_AT
    ) -> Nonzero:
        """Of a dense X for n_out neurons, by some of n_rows rows, as `take` returns them.

        All of it where there is little to gain.
        """
        some = min(most, ROWS_LOOKED_AT)
        X = take(np.arange(0, n_rows, max(1, n_rows // some))[:some])
        few = nonzero.n_together(n_out, X.dtype)
        n_rows, n_columns = (n // few * few for n in X.shape)
        if n_rows == 0 or X.shape[1] < width(X.dtype):
            return cls()
        found = X[:n_rows, :n_columns] != 0
        in_rows = found.reshape(-1, few, n_columns).any(axis=1)
        in_columns = found.reshape(n_rows, -1, few).any(axis=2)
        return cls(float(in_rows.mean()), float(in_columns.mean()))


DENSE, SPARSE = Nonzero(), Nonzero(sparse=True)


@dataclass(frozen=True)
class Plan:
    """How a step is divided. The same plan gives the same bits."""

    n_threads: int
    tile_rows: int
    """Rows that a thread takes through all layers at a time."""
    split_rows: bool
    """Each thread sums ∂C/∂W over its own rows; else it computes its own blocks of ∂C/∂W over all rows."""
    split_columns: bool = False
    """Of the first layer, each thread owns some columns, and takes all rows through them; never with `split_rows`."""
    copies: bool = False
    """Each thread has the parameters and the optimizer's state for itself, and updates all; only with `split_rows`,
    and of several threads."""
    z_where: bool = False
    """Of the first layer's z = X W + b, products by 0 are left out; never where that is the only layer."""
    dW_where: bool = False
    """Likewise of its ∂C/∂W = Xᵀ δ."""
    by_entries: bool = False
    """X is a sparse matrix, and the first layer's products are by what is stored of it; never with `split_rows` in
    training."""

    @property
    def knows_zeros(self) -> bool:
        """Whether it is noted which elements of X are not 0."""
        return self.z_where or self.dW_where

    @property
    def n_copies(self) -> int:
        """Of the parameters and the optimizer's state."""
        return self.n_threads if self.copies else 1


def for_inference(
    architecture: Architecture, n_rows: int, n_products: int, dtype: str, threads: int, data: Nonzero = DENSE
) -> Plan:
    """The plan for a forward pass: every thread takes its own tiles, of work that is worth starting it."""
    worth = n_products // PRODUCTS_TO_START
    n_threads = max(1, min(threads, worth, n_rows // ROWS_PER_THREAD))
    tile_rows = _tile_rows(architecture, n_rows, dtype, n_threads, data)
    z_where = architecture.n_layers > 1 and data.in_rows <= _most_nonzero(architecture, tile_rows, dtype)
    return Plan(n_threads, tile_rows, split_rows=True, z_where=z_where, by_entries=data.sparse)


def for_training(architecture: Architecture, batch_size: int, dtype: str, threads: int, data: Nonzero = DENSE) -> Plan:
    """The plan for mini-batches of `batch_size` rows and at most `threads` threads: by sizes, and a core's cache."""
    worth = batch_size * products_of_a_row(architecture, dtype) // PRODUCTS_PER_STEP
    shares = max(batch_size // ROWS_PER_THREAD, architecture.n_parameters // PARAMETERS_PER_THREAD)
    by_rows = max(1, min(threads, worth, shares))
    is_small = architecture.n_parameters * np.dtype(dtype).itemsize <= SPLIT_ROWS_BYTES
    split_rows = is_small and not data.sparse
    by_columns = 1 if split_rows else _threads_by_columns(architecture, batch_size, dtype, threads, by_rows)
    n_threads = max(by_rows, by_columns)
    most = _most_nonzero(architecture, batch_size, dtype)
    return Plan(
        n_threads,
        _tile_rows(architecture, batch_size, dtype, n_threads, data),
        split_rows,
        split_columns=1 < n_threads == by_columns,
        copies=split_rows and 1 < n_threads <= MOST_COPIES,
        z_where=architecture.n_layers > 1 and data.in_rows <= most,
        dW_where=data.in_columns <= most,
        by_entries=data.sparse,
    )


def _most_nonzero(architecture: Architecture, n_rows: int, dtype: str) -> float:
    """MOST_NONZERO, or what takes as long as all products by thirds; the latter by rule, not measured."""
    gain = amx.gain(n_rows, architecture.layer_sizes[1]) if may_split(dtype) else 1.0
    return MOST_NONZERO / max(1.0, gain)


def _threads_by_columns(architecture: Architecture, batch_size: int, dtype: str, threads: int, by_rows: int) -> int:
    """The most threads that share the first layer's columns evenly; 1 for a large mini-batch.

    No more than `by_rows`, unless most weights are the first layer's: then as many as have enough to do, of which the
    update is a part.
    """
    if architecture.n_layers == 1 or batch_size > COLUMNS_ROWS:
        return 1
    most, (n_in, n_out) = by_rows, architecture.layer_sizes[:2]
    if n_in * n_out >= MOST_WEIGHTS * architecture.n_weights:
        parameters = architecture.n_parameters * np.dtype(dtype).itemsize // 4
        work = batch_size * products_of_a_row(architecture, dtype) + PRODUCTS_PER_UPDATE * parameters
        most = max(by_rows, min(threads, work // PRODUCTS_PER_STEP))
    return max(t for t in range(1, most + 1) if shares_columns(n_out, dtype, t))


def shares_columns(n_columns: int, dtype: Any, n_threads: int) -> bool:
    """Whether each of n_threads gets enough columns, and about as many as the others, in whole panels."""
    panels = math.ceil(n_columns / width(dtype))
    enough = n_threads <= max(2, n_columns // COLUMNS_PER_THREAD)
    return bool(enough and math.ceil(panels / n_threads) * n_threads <= EVEN * panels)


def parts_of(layer: Record, n_threads: int, panel: int, rows_stride: int, names: Sequence[str]) -> Record:
    """(n_threads,): each thread's columns of a layer, as a layer; from panel to panel of `names` it is rows_stride."""
    parts = np.repeat(layer, n_threads)  # by the same rule as `panels_of`
    panels = math.ceil(int(layer["n_out"][0]) / panel)
    for t, part in enumerate(parts):
        first, last = t * panels // n_threads, (t + 1) * panels // n_threads
        part["first_column"] = first * panel
        part["n_out"] = min(part["n_out"], last * panel) - first * panel
        part["W"], part["b"] = part["W"] + first * part["W_stride"], part["b"] + first * panel
        for name in names:
            part[name] += first * rows_stride
    return parts


def products_of_a_row(architecture: Architecture, dtype: str) -> int:
    """Multiply-adds for one row of a mini-batch: a W, aᵀ δ, and δ Wᵀ but for the first layer, in whole vectors.

    One in float64 counts as two.
    """
    vector = VECTOR_BYTES // np.dtype(dtype).itemsize
    products = [n_in * round_up(n_out, vector) for n_in, n_out in pairwise(architecture.layer_sizes)]
    return int(3 * sum(products) - products[0]) * np.dtype(dtype).itemsize // 4


def _tile_rows(architecture: Architecture, n_rows: int, dtype: str, n_threads: int, data: Nonzero) -> int:
    """As many as fit a core's cache, and so few that a thread's tiles are of one size."""
    n_in, *others = architecture.layer_sizes
    rows = math.ceil(n_rows / n_threads)
    most = rows_in_cache([1 if data.sparse else n_in, *others], dtype)
    return int(round_up(math.ceil(rows / math.ceil(rows / most)), BLOCK_ROWS))


def rows_in_cache(layer_sizes: Sequence[int], dtype: Any) -> int:
    """The most rows of a tile: whole blocks."""
    columns = max(round_up(n_in, width(dtype)) + round_up(n_out, width(dtype)) for n_in, n_out in pairwise(layer_sizes))
    rows = min(TILE_ROWS, TILE_BYTES // (np.dtype(dtype).itemsize * columns))
    return int(max(BLOCK_ROWS, rows // BLOCK_ROWS * BLOCK_ROWS))


def rows_of_panel(n_rows: int, dtype: Any) -> int:
    """Rows that a panel of n_rows has place for: whole blocks, and no whole pages.

    The same row of every panel would fall into the same few lines of a cache: gathering a mini-batch of network M took
    11 µs, and takes 6.
    """
    rows = round_up(n_rows, BLOCK_ROWS)
    return int(rows + BLOCK_ROWS * (rows * width(dtype) * np.dtype(dtype).itemsize % PAGE == 0))


class Layout:
    """Where everything lies for one plan: the records that the compiled step reads, and its memory."""

    def __init__(self, architecture: Architecture, plan: Plan, batch_size: int, dtype: str) -> None:
        self.plan, self.batch_size, self.dtype = plan, batch_size, np.dtype(dtype)
        self.panel = width(dtype)
        self._block_size = BLOCK_ROWS * self.panel
        self.layers = np.zeros(architecture.n_layers, LAYER)
        rows = plan.tile_rows if plan.split_rows else rows_of_panel(batch_size, dtype)
        self.stride = rows * self.panel
        self._describe(architecture)
        self.n_weights = self._place_weights()
        self.n_parameters = self._place_biases(self.n_weights)
        self.n_transposed = self._place_transposed()
        self.n_passes = self._place_passes()
        self.parts = self._parts_of_first()

    def _describe(self, architecture: Architecture) -> None:
        layers = self.layers
        layers["n_in"], layers["n_out"] = zip(*pairwise(architecture.layer_sizes), strict=True)
        for layer, activation in zip(layers, architecture.activations, strict=False):
            layer["sigma"] = activations.CODES[activation.name]
            layer["from_z"] = activation.derivative_from == "z"
            layer["pads"] = FORWARD[activation.name](np.zeros(1))[0] != 0
        layers["dropout"][:-1] = architecture.dropout
        layers["few"][1:] = [n_narrow(n, self.dtype) for n in architecture.layer_sizes[2:]]
        layers["turned"] = (layers["few"] > 0) & (layers["few"] == layers["n_out"])

    def _columns(self, n: int) -> int:
        """Columns with the padding."""
        return int(round_up(n, self.panel))

    def _place_weights(self) -> int:
        end = 0
        for layer in self.layers:
            rows = rows_turned(int(layer["n_out"])) if layer["turned"] else round_up(layer["n_in"], BLOCK_ROWS)
            layer["W"], layer["W_stride"] = end, rows * self.panel
            end = self._end_of(layer)
        return int(end)

    def _end_of(self, layer: Any) -> int:
        """Where a layer's W ends among the packed parameters: whole blocks."""
        columns = self._columns(layer["n_in"] if layer["turned"] else layer["n_out"])
        return int(layer["W"] + round_up(columns // self.panel * layer["W_stride"], self._block_size))

    def _place_biases(self, end: int) -> int:
        for layer in self.layers:
            layer["b"] = end
            end += self._columns(layer["n_out"])
        return int(end)

    def _place_transposed(self) -> int:
        end = 0
        for layer in self.layers[1:]:
            if not layer["turned"]:
                layer["T"], layer["T_stride"] = end, round_up(layer["n_out"], BLOCK_ROWS) * self.panel
                end += self._columns(layer["n_in"]) // self.panel * layer["T_stride"]
        return int(end)

    def _place_passes(self) -> int:
        """a⁰, then a and δ of every layer, and what else σ′ and dropout need; `a` of the output layer is its z."""
        end, a_prev = self._input_span() * (self.plan.n_threads if self.plan.split_columns else 1), 0
        for layer in self.layers:
            size = self._columns(layer["n_out"]) // self.panel * self.stride
            layer["a_prev"], layer["a"], layer["delta"] = a_prev, end, end + size
            a_prev, end = end, end + 2 * size
            layer["z"], end = end, end + size * layer["from_z"]
            layer["factors"], end = end, end + size * (layer["dropout"] > 0)
        return int(end)

    def _input_span(self) -> int:
        """From one a⁰ to the next."""
        n_columns = 0 if self.plan.by_entries else self._columns(self.layers[0]["n_in"])
        return self._span(n_columns // self.panel * self.stride)

    def _parts_of_first(self) -> Record:
        """(n_threads,): each thread's columns of the first layer, as a layer; empty where these are not split."""
        n_parts = self.plan.n_threads if self.plan.split_columns else 0
        parts = parts_of(self.layers[:1], n_parts, self.panel, self.stride, ("a", "delta", "z", "factors"))
        parts["a_prev"] = self._input_span() * np.arange(n_parts)
        return parts

    def _blocks_of(self, layer: Any) -> tuple[int, int]:
        """The first block of a layer's W, and the last + 1."""
        return int(layer["W"]) // self._block_size, self._end_of(layer) // self._block_size

    def groups(self) -> npt.NDArray[np.int64]:
        """(n_threads, n, 3): for each thread the blocks that it updates in one go, first and last + 1, in their order;
        and 0 where they are the same rows of W as those of the group before, a panel on, else 1.

        Where a thread computes their gradients from the whole mini-batch, what lies at the same place in each panel
        comes together, so that these columns of a_prev stay in its cache meanwhile: network L takes 16.8 in place of
        17.7 ms a step on two cores of a Xeon, and M the same.
        """
        groups = [self._groups_of(thread) for thread in range(self.plan.n_threads)]
        table = np.zeros((len(groups), max(map(len, groups)), 3), np.int64)
        for row, of_thread in zip(table, groups, strict=True):
            row[: len(of_thread)] = np.reshape(of_thread, (-1, 3))
        return table

    def _groups_of(self, thread: int) -> list[tuple[int, int, bool]]:
        if self.plan.split_rows:
            blocks = self.n_weights // self._block_size
            share = (0, blocks) if self.plan.copies else self._share(blocks, thread)
            return [(*run, True) for run in self._runs(*share)]
        groups, before = [], (-1, 0, 0)
        for index in range(len(self.layers)):
            for start, low, high in self._owned(index, thread):
                groups.append((start + low, start + high, (index, low, high) != before))
                before = index, low, high
        return groups

    def _owned(self, index: int, thread: int) -> list[tuple[int, int, int]]:
        """The first block of a panel of a layer's W, and a run of the panel's blocks: all of them that a thread owns.

        They are the thread's columns of the first layer with `split_columns`; else an even share of W's rows, so that
        it needs its own columns of a_prev, and all of δ, which is narrower as a rule; else, of a W that is too low for
        that, an even share of the blocks in their order.
        """
        layer, by_columns = self.layers[index], index < self.plan.split_columns
        first, last = self._blocks_of(self.parts[thread] if by_columns else layer)
        in_panel = last - first if layer["turned"] else int(layer["W_stride"]) // self._block_size
        panels = range(first, last, in_panel)
        if by_columns or in_panel >= BLOCKS_PER_THREAD * self.plan.n_threads:
            rows = (0, in_panel) if by_columns else self._share(in_panel, thread)
            return [(start, *run) for run in self._runs(*rows) for start in panels]
        low, high = (first + share for share in self._share(last - first, thread))
        return [
            (start, *run) for start in panels for run in self._runs(max(low - start, 0), min(high - start, in_panel))
        ]

    def _share(self, blocks: int, thread: int) -> tuple[int, int]:
        """A thread's of so many blocks, the first and the last + 1; whole units where there are enough of them."""
        n_threads = self.plan.n_threads
        unit = self._unit if blocks >= BLOCKS_PER_THREAD * n_threads * self._unit else 1
        low, high = (min(blocks, round_up(t * blocks // n_threads, unit)) for t in (thread, thread + 1))
        return low, high

    def _runs(self, low: int, high: int) -> list[tuple[int, int]]:
        """The blocks from `low` to `high` in runs of one size, up to that of a group."""
        if low >= high:
            return []
        size = round_up(math.ceil((high - low) / math.ceil((high - low) / self._group())), self._unit)
        return [(start, min(start + size, high)) for start in range(low, high, size)]

    @property
    def _unit(self) -> int:
        """Blocks that are best left together."""
        return int(ROWS_OF_TWO) if may_split(self.dtype) else 1

    def _group(self) -> int:
        """Blocks that are updated in one go."""
        if not may_split(self.dtype):
            return int(GROUP)
        columns = LEFT_BYTES // (6 * min(max(1, self.batch_size), chunk_rows(self.dtype)))
        return int(max(self._unit, min(GROUP, columns // BLOCK_ROWS // self._unit * self._unit)))

    def _chunk(self) -> tuple[int, int]:
        """The most rows, and columns of a_prev, from which a thread makes ∂C/∂W in one go."""
        if self.plan.split_rows:
            return min(self.batch_size, self.plan.tile_rows), int(self.layers["n_in"].max()) + BLOCK_ROWS
        return min(self.batch_size, chunk_rows(self.dtype)), self._group() * BLOCK_ROWS

    def _n_scratch(self) -> int:
        """Entries that a thread's products need besides."""
        rows = self.batch_size if self.plan.split_columns else self.plan.tile_rows
        sizes = [int(n) for n in (self.layers["n_in"][0], *self.layers["n_out"])]
        return n_scratch(self.dtype, products_of(sizes, rows, *self._chunk()))

    def record(
        self,
        architecture: Architecture,
        optimizer: Optimizer | None = None,
        seed: int = 0,
    ) -> Record:
        """The PLAN record; a forward pass needs no optimizer."""
        plan = self.plan
        record = np.zeros(1, PLAN)
        record["n_layers"], record["n_threads"] = len(self.layers), plan.n_threads
        record["tile_rows"], record["split_rows"] = plan.tile_rows, plan.split_rows
        record["copies"] = plan.copies
        record["split_columns"] = plan.split_columns
        record["by_entries"] = plan.by_entries
        record["z_where"], record["dW_where"] = plan.z_where, plan.dW_where
        record["chunk_rows"] = chunk_rows(self.dtype)
        record["panels_at_once"] = nonzero.PANELS_AT_ONCE if plan.dW_where else 1
        if together(self.dtype, self.batch_size):
            record["panels_at_once"] = self.n_weights  # all of them
        record["stride"], record["span"] = self.stride, self._span(self.n_passes) if plan.split_rows else 0
        record["n_weights"], record["n_parameters"] = self.n_weights, self.n_parameters
        record["loss"] = output_delta.CODES[architecture.loss.name]
        record["loss_setting"] = output_delta.setting(architecture.loss)
        record["sigma"] = output_delta.SIGMAS[architecture.output_activation]
        record["seed"] = seed
        if optimizer is not None:
            record["optimizer"] = updates.CODES[type(optimizer)]
            record["clip_norm"] = math.inf if optimizer.clip_norm is None else optimizer.clip_norm
        return record

    @property
    def _infers_by_transposed(self) -> bool:
        """Whether a forward pass alone needs some of Wᵀ."""
        return bool(((self.layers["few"] > 0) & (self.layers["turned"] == 0)).any())

    def memory(self, n_slots: int = 0, *, training: bool = False) -> Memory:
        """Everything that a pass writes, zeroed; what only training needs is empty without it."""
        threads, plan = self.plan.n_threads, self.plan
        copies = plan.n_copies
        shapes = {
            "parameters": (copies, self.n_parameters),
            "transposed": (copies, self.n_transposed * (training or self._infers_by_transposed)),
            "slot_1": (copies, self.n_parameters * (n_slots > 0)),
            "slot_2": (copies, self.n_parameters * (n_slots > 1)),
            "gradients": (threads * (1 + plan.copies), self.n_parameters * training),
            "sums": (threads * plan.copies, self.n_parameters * training),
            "passes": (1, self._span(self.n_passes) * (threads if plan.split_rows else 1)),
            "scratch": (threads, self._n_scratch()),
            "zeros": (1, self.panel),
        }
        spans = [rows * self._span(columns) for rows, columns in shapes.values()]
        whole = zeros(sum(spans) * self.dtype.itemsize).view(self.dtype)
        starts = np.cumsum([0, *spans])
        arrays = {
            name: whole[start : start + span].reshape(rows, self._span(columns))
            for (name, (rows, columns)), start, span in zip(shapes.items(), starts, spans, strict=False)
        }
        arrays["passes"], arrays["zeros"] = arrays["passes"][0], arrays["zeros"][0]
        words = arrays["passes"].size // self.panel + nonzero.ROWS_AT_ONCE if plan.knows_zeros else 0
        return Memory(
            **arrays,
            nonzero=np.zeros(words, np.uint32),
            rows_where=np.zeros((threads, nonzero.rows_words(*self._chunk()) if plan.dW_where else 0), np.uint64),
            sorted_entries=tuple(np.empty((threads, 0), kind) for kind in (np.int64, np.int32, self.dtype)),
            norms=np.full((threads, 8), np.nan),
        )

    def _span(self, n: int) -> int:
        """From one part to the next: whole cache lines, and no multiple of a page, which caches dislike."""
        line = ALIGNMENT // self.dtype.itemsize
        return int(round_up(n, line)) + line


def zeros(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory from a cache line's start on, in huge pages where the system has them and the size is worth it.

    Scattered small pages collide in a core's cache: the same run of network M took 0.30 ms a step in one process and
    0.46 ms in the next.
    """
    if n_bytes < HUGE_PAGE // 4 or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(n_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + n_bytes]
    # Private: the default would be shared with forked processes.
    pages = mmap.mmap(-1, round_up(n_bytes, HUGE_PAGE) + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system has none
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(pages, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + n_bytes]
