"""Whole forward and backward passes on the CPU, for another library's autograd: the host's side of
`kernels/numba_cpu/passes.py`.

Arrays come as addresses of their first entries, because a small network's pass takes no longer than wrapping ten
arrays. Whoever calls answers for them: of `dtype`, contiguous, on this machine, and alive until the call returns.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.backends import cpu_plan, threads
from backprop_gpu.backends.numpy import FORWARD
from backprop_gpu.backends.passes import Dropout, Network
from backprop_gpu.kernels.numba_cpu import activations, passes
from backprop_gpu.kernels.numba_cpu.dense_gradients import GROUP
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, round_up, width
from backprop_gpu.kernels.numba_cpu.team import new_barrier

__all__ = ["Passes"]

Record = npt.NDArray[Any]

FLOPS_PER_THREAD = 8e6
"""Work for which a further thread is started: 50 to 100 µs of it, where one takes 36 to start and to end."""

FLOPS_PER_MEMBER = 1.2e6
"""Work for which a further thread of a team is asked: 10 µs of it.

It takes 2.4 µs to reach them, but each then reads what the others have written out of their caches. With 2.5e6 in all,
network S, forward and backward under autograd take 270 µs on one thread and 250 on two of a Xeon, 215 and 211 of a
Zen 4.
"""

VARIABLE = struct.Struct("Q7q")
"""What a call changes of a NETWORK record: `seed` and all after it."""

MOST_KNOWN = 64
"""Numbers of rows for which the records are remembered."""


class Call(NamedTuple):
    """A pass over some number of rows, ready to be called again."""

    code: Callable[..., bool]
    n_threads: int
    arguments: tuple[Any, ...]
    """All but whether the team's threads do it."""
    numbers: memoryview
    """What changes of the NETWORK record: VARIABLE."""
    addresses: memoryview
    """Of the parameters and of their gradients."""


class Workspace(NamedTuple):
    """Memory of one call at a time."""

    work: passes.Work
    kept: npt.NDArray[Any]
    """A tile for each thread, where the caller keeps nothing."""
    deltas: npt.NDArray[Any]
    """With `split_rows`, δ of a tile for each thread."""
    addresses: tuple[int, int]
    """Of the two."""
    barrier: npt.NDArray[np.int64]
    calls: dict[Any, Call]


class Passes:
    """The passes of one network in one dtype, on at most `n_threads` threads, with memory of their own.

    May be called from several threads at a time.

    team : addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the OpenMP library whose team of
        `n_threads` is to do the work; None where threads have to be started
    """

    def __init__(self, network: Network, dtype: str, n_threads: int, team: tuple[int, int, int] | None = None) -> None:
        self.network, self.dtype, self.n_threads = network, np.dtype(dtype), n_threads
        self.panel = width(dtype)
        self.flops_per_row = 2 * sum(n_in * n_out for n_in, n_out in pairwise(network.layer_sizes))
        self.columns = [int(round_up(n, self.panel)) for n in network.layer_sizes]
        self.layers = np.zeros(len(network.sigmas), passes.LAYER)
        self._describe()
        self.n_packed, self.n_transposed = self._place_parameters()
        self.n_gradients = self._place_gradients()
        self.kept_columns, self.delta_columns = self._place_columns()
        self.tile_rows = self._tile_rows()
        self.team = np.array([*(team or (0, 0, 0)), n_threads])
        self.flops_per_thread = FLOPS_PER_MEMBER if team else FLOPS_PER_THREAD
        self.process = os.getpid()
        self.free: list[Workspace] = []
        self.none = [0] * (2 * len(self.layers))
        self.addresses = struct.Struct(f"{4 * len(self.layers)}q")

    # Where everything lies

    def _describe(self) -> None:
        network = self.network
        self.layers["n_in"], self.layers["n_out"] = zip(*pairwise(network.layer_sizes), strict=True)
        for layer, name in zip(self.layers, network.sigmas, strict=True):
            layer["sigma"] = activations.CODES[name]
            layer["from_z"] = ACTIVATIONS[name].derivative_from == "z"
            layer["pads"] = FORWARD[name](np.zeros(1))[0] != 0
        n_parameters = sum((n_in + 1) * n_out for n_in, n_out in pairwise(network.layer_sizes))
        self.split_rows = n_parameters * self.dtype.itemsize <= cpu_plan.SPLIT_ROWS_BYTES

    def _place_parameters(self) -> tuple[int, int]:
        packed = transposed = 0
        for layer, n_in, n_out in zip(self.layers, self.columns, self.columns[1:], strict=False):
            layer["W"], layer["W_stride"] = packed, round_up(layer["n_in"], BLOCK_ROWS) * self.panel
            layer["T"], layer["T_stride"] = transposed, round_up(layer["n_out"], BLOCK_ROWS) * self.panel
            packed += n_out // self.panel * int(layer["W_stride"])
            transposed += n_in // self.panel * int(layer["T_stride"])
        for layer, n_out in zip(self.layers, self.columns[1:], strict=True):
            layer["b"], packed = packed, packed + n_out
        return packed, transposed

    def _place_gradients(self) -> int:
        panels = max(self.columns) // self.panel if cpu_plan.may_split(self.dtype) else 1
        end = self.n_transposed if self.split_rows else panels * GROUP * BLOCK_ROWS * self.panel
        for layer, n_out in zip(self.layers, self.columns[1:], strict=True):
            layer["db"], end = end, end + n_out
        return int(end)

    def _place_columns(self) -> tuple[int, int]:
        """X, then a, and z where σ′ needs it, of every layer but an output layer without σ; and δ of every layer.

        Offsets are in columns, to be multiplied by the rows.
        """
        kept, delta = self.columns[0], 0
        for layer, n_out in zip(self.layers, self.columns[1:], strict=True):
            layer["delta"], delta = delta, delta + n_out
            layer["a"], layer["z"] = kept, kept + n_out
            kept += n_out * (1 + int(layer["from_z"]))
        self.layers["a_prev"][1:] = self.layers["a"][:-1]
        if self.network.sigmas[-1] == "identity":
            kept = int(self.layers["a"][-1])
        return kept, delta

    def _tile_rows(self) -> int:
        """Rows that a thread takes through all layers at a time: as many as its cache holds."""
        return cpu_plan.rows_in_cache(self.network.layer_sizes, self.dtype)

    # Memory

    def n_kept(self, n_rows: int) -> int:
        """Entries that a forward pass over so many rows keeps for the backward pass."""
        return self.kept_columns * self._shared_rows(n_rows)

    def n_deltas(self, n_rows: int) -> int:
        """Entries that a backward pass needs besides, shared by the threads."""
        return 0 if self.split_rows else self.delta_columns * self._shared_rows(n_rows)

    def _shared_rows(self, n_rows: int) -> int:
        """Rows of a panel that holds all rows: whole blocks, and not as many bytes as would make panels collide."""
        rows = int(round_up(n_rows, BLOCK_ROWS))
        return rows + self.tile_rows if rows >= 8 * self.tile_rows else cpu_plan.rows_of_panel(rows, self.dtype)

    def _workspace(self) -> Workspace:
        line = cpu_plan.ALIGNMENT // self.dtype.itemsize
        n_gradients = int(round_up(self.n_gradients, line)) + line
        n_scratch = int(round_up(self._n_scratch(), line)) + line
        sizes = [
            self.n_packed,
            self.n_transposed,
            self.n_threads * n_gradients,
            self.n_threads * self._span(max(self.columns)),
            self.n_threads * n_scratch,
            self.panel,
            self.n_threads * self._span(self.kept_columns),
            self.n_threads * self._span(self.delta_columns) * self.split_rows,
        ]
        spans = [int(round_up(size, line)) + line for size in sizes]
        whole = cpu_plan.zeros(sum(spans) * self.dtype.itemsize).view(self.dtype)
        starts = np.cumsum([0, *spans])
        packed, transposed, gradients, tiles, scratch, zeros, kept, deltas = (
            whole[start : start + size] for start, size in zip(starts, sizes, strict=False)
        )
        gradients, scratch = (x.reshape(self.n_threads, -1) for x in (gradients, scratch))
        work = passes.Work(packed, transposed, gradients, tiles, scratch, zeros)
        return Workspace(work, kept, deltas, (kept.ctypes.data, deltas.ctypes.data), new_barrier(), {})

    def _n_scratch(self) -> int:
        """Entries that a thread's products need besides: of all rows of a tile, and of a group of blocks of ∂C/∂W."""
        sizes, chunk, columns = self.network.layer_sizes, cpu_plan.chunk_rows(self.dtype), GROUP * BLOCK_ROWS
        if self.split_rows:
            chunk, columns = self.tile_rows, max(self.columns)
        return cpu_plan.n_scratch(self.dtype, cpu_plan.products_of(sizes, self.tile_rows, chunk, columns))

    def _span(self, columns: int) -> int:
        """From one thread's tile of so many columns to the next: not a multiple of a page."""
        return int(columns * self.tile_rows + 2 * self.panel)

    # The passes

    def forward(
        self, n_rows: int, X: int, parameters: Sequence[int], out: int, kept: int, dropout: Dropout | None
    ) -> None:
        """Overwrites `out` (n_rows, n_outputs), and the n_kept(n_rows) entries at `kept`, unless that is 0.

        X : (n_rows, n_inputs); parameters : weight (n_out, n_in) and bias (n_out,) of each layer, 0 for no bias.
        """
        space = self._take()
        call = self._call(passes.forward, space, n_rows, kept != 0, dropout)
        seed = 0 if dropout is None else dropout.seed
        VARIABLE.pack_into(call.numbers, 0, seed, 0, X, out, kept or space.addresses[0], 0, 0, 0)
        self.addresses.pack_into(call.addresses, 0, *parameters, *self.none)
        self._run(call, space)

    def backward(
        self,
        n_rows: int,
        parameters: Sequence[int],
        kept: int,
        d_out: int,
        deltas: int,
        gradients: Sequence[int],
        dropout: Dropout | None,
    ) -> None:
        """Overwrites the gradients that are wanted, from ∂C/∂out (n_rows, n_outputs) and what `forward` has kept.

        parameters : as for `forward`; deltas : n_deltas(n_rows) entries to work with; gradients : of X, then of each
        parameter in turn; 0 for what is not wanted, which is not all of them.
        """
        first = next(index for index, address in enumerate(gradients) if address)
        space = self._take()
        call = self._call(passes.backward, space, n_rows, True, dropout)
        seed, lowest = 0 if dropout is None else dropout.seed, max(0, first - 1) // 2
        deltas, (dX, *others) = deltas or space.addresses[1], gradients
        VARIABLE.pack_into(call.numbers, 0, seed, lowest, 0, 0, kept, deltas, d_out, dX)
        self.addresses.pack_into(call.addresses, 0, *parameters, *others)
        self._run(call, space)

    def _call(self, entry: Any, space: Workspace, n_rows: int, keeps: bool, dropout: Dropout | None) -> Call:
        """What a pass over so many rows is called with; what changes from call to call is to be written into it."""
        key = entry, n_rows, self._n_threads(n_rows), keeps, None if dropout is None else dropout.rates
        call = space.calls.get(key)
        if call is None:
            if len(space.calls) >= MOST_KNOWN:
                space.calls.clear()
            call = space.calls[key] = self._new_call(space, *key)
        return call

    def _new_call(
        self, space: Workspace, entry: Any, n_rows: int, n_threads: int, keeps: bool, rates: tuple[float, ...] | None
    ) -> Call:
        network, layers, parts = self._records(n_rows, n_threads, keeps)
        network["n_kept"] = self.n_kept(n_rows) if keeps else space.kept.size
        network["n_deltas"] = space.deltas.size if self.split_rows else self.n_deltas(n_rows)
        layers["dropout"], parts["dropout"] = rates or 0, rates[0] if rates else 0
        addresses = np.zeros((2, len(layers), 2), np.int64)
        records = (network, layers, parts) if entry is passes.forward else (network, layers)
        arguments = self.team, n_threads, space.barrier, (*records, addresses, space.work, space.barrier)
        code = entry.specialised(False, *arguments)
        numbers = network.view(np.uint8)[-VARIABLE.size :].data
        return Call(code, n_threads, arguments, numbers, addresses.data)

    def _run(self, call: Call, space: Workspace) -> None:
        """The pass on its threads; then the memory is free again."""
        threads.require(call.code(call.n_threads > 1 and self._has_team(), *call.arguments))
        self.free.append(space)

    def _has_team(self) -> bool:
        """A team's threads are not there in a forked process, which would wait for them for ever."""
        return bool(self.team[0]) and os.getpid() == self.process

    def _records(self, n_rows: int, n_threads: int, keeps: bool) -> tuple[Record, Record, Record]:
        """The NETWORK record, the LAYER records and each thread's of the first layer, as far as sizes decide them."""
        kept_rows = self._shared_rows(n_rows) if keeps else self.tile_rows
        delta_rows = self.tile_rows if self.split_rows else self._shared_rows(n_rows)
        layers = self.layers.copy()
        for field in ("a_prev", "a", "z"):
            layers[field] *= kept_rows
        layers["delta"] *= delta_rows
        split_columns = keeps and self._splits_columns(n_rows, n_threads)
        n_parts = n_threads if split_columns else 0
        parts = cpu_plan.parts_of(layers[:1], n_parts, self.panel, kept_rows * self.panel, ("a", "z"))
        rows_each = math.ceil(n_rows / n_threads)
        network = np.zeros(1, passes.NETWORK)
        numbers = {
            "n_layers": len(layers),
            "n_threads": n_threads,
            "n_rows": n_rows,
            "tile_rows": int(round_up(math.ceil(rows_each / math.ceil(rows_each / self.tile_rows)), BLOCK_ROWS)),
            "split_rows": int(self.split_rows),
            "chunk_rows": cpu_plan.chunk_rows(self.dtype),
            "together": int(cpu_plan.together(self.dtype, n_rows)),
            "split_columns": int(split_columns),
            "kept_stride": kept_rows * self.panel,
            "kept_span": 0 if keeps else self._span(self.kept_columns),
            "delta_stride": delta_rows * self.panel,
            "delta_span": self._span(self.delta_columns),
            "tile_stride": self.tile_rows * self.panel,
            "tile_span": self._span(max(self.columns)),
        }
        for name, number in numbers.items():
            network[name] = number
        return network, layers, parts

    def _splits_columns(self, n_rows: int, n_threads: int) -> bool:
        """Of the first layer, so that each thread packs the weights that it needs: where `cpu_plan.Plan` does."""
        if n_threads == 1 or n_rows > cpu_plan.COLUMNS_ROWS or len(self.layers) == 1 or self.split_rows:
            return False
        return cpu_plan.shares_columns(self.network.layer_sizes[1], self.dtype, n_threads)

    def _n_threads(self, n_rows: int) -> int:
        """As many as there is work for; who else has a say is asked only where it is for more than one."""
        n_threads = min(self.n_threads, int(n_rows * self.flops_per_row / self.flops_per_thread))
        return min(n_threads, threads.available()) if n_threads > 1 else 1

    def _take(self) -> Workspace:
        try:
            return self.free.pop()
        except IndexError:
            return self._workspace()
