"""The kernels of `kernels/cuda/`: compiled as they are needed, and launched; the launch shape of each is here alone.

Every function returns a `Launch`, which runs when it is called, or is captured into a graph. Arrays are C-contiguous
and on the device; a pointer that may be null takes None.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backprop_gpu.backends import cuda_plan
from backprop_gpu.backends.contract import Array, Dropout
from backprop_gpu.backends.cuda_plan import LAYOUTS, NUMBERS, Parts, Tile
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["STEP_NUMBERS", "Kernels", "Launch", "Whole", "step_numbers", "stretches"]

THREADS = 128
"""Threads of a block, in every kernel but the products."""

BLOCK_PARAMETERS = 4 * THREADS
"""Parameters that a block of `update` takes, all of one stretch."""

UNASKED_SHARED_BYTES = (48 << 10) - cuda_plan.STATIC_BYTES
"""Dynamic shared memory that a kernel gets without asking, beside its static variables."""

MOST_BLOCKS = 1024
"""Of a sum over a whole array."""

STRETCH = ("begin", "count", "parts_begin", "n_parts", "first_block", "is_weights")
"""Columns of the table of stretches of the flat vector, int64: `Stretch` of update.cu."""

STEP_NUMBERS = ("learning_rate", "alpha", "correction_1", "correction_2", "epsilon")
"""Columns of the table of what changes from step to step, float64: `StepNumbers` of update.cu."""

NULL = np.uintp(0)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    threads: int
    arguments: tuple[Any, ...]
    shared_bytes: int = 0

    def __call__(self) -> None:
        """On the current stream."""
        self.kernel(self.grid, (self.threads,), self.arguments, shared_mem=self.shared_bytes)


class Whole(NamedTuple):
    """Whole gradients of a layer, where parts will not do: sum of the parts / loss scale + alpha W."""

    dW: Array
    """(n_in, n_out)"""
    db: Array
    """(n_out,)"""
    W: Array | None = None
    alpha: float = 0.0
    accumulate: bool = False
    """Adds to dW and db, instead of overwriting them."""
    numbers: Array | None = None
    """The table whose alpha counts, at the row that `steps_done` says."""
    steps_done: Array | None = None
    loss_scale: Array | None = None
    squares: Array | None = None
    """(1,), for the sum of all squares, in float64."""


def blocks_of(n: int, per_block: int) -> int:
    """Blocks for n of something."""
    return -(-n // per_block)


def struct_of(name: str) -> str:
    """The C++ struct of an activation or a loss: LeakyRelu for leaky_relu."""
    return "".join(word.title() for word in name.split("_"))


def stretches(counts: list[tuple[int, int, bool]], item_alignment: int = 4) -> Array:
    """The table of consecutive stretches of the flat vector, given as (count, number of parts, whether weights)."""
    rows: list[tuple[int, ...]] = []
    begin = parts_begin = block = 0
    for count, n_parts, is_weights in counts:
        rows.append((begin, count, parts_begin, n_parts, block, int(is_weights)))
        begin += count
        parts_begin = blocks_of(parts_begin + count * n_parts, item_alignment) * item_alignment
        block += blocks_of(count, BLOCK_PARAMETERS)
    return np.array(rows, np.int64)


class Kernels:
    """All kernels for one CuPy, whose current device and stream they run on."""

    def __init__(self, cp: Any) -> None:
        self.cp = cp
        self.folder = Path(str(resources.files("backprop_gpu.kernels"))) / "cuda"
        # CuPy's cache on disk knows a program by its text, and would not notice a changed header.
        sources = sorted([*self.folder.glob("*.cu"), *self.folder.glob("*.cuh")])
        self.digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        self._functions: dict[tuple[int, str], Any] = {}
        self._gpus: dict[int, cuda_plan.Device] = {}

    def function(self, file: str, expression: str, shared_bytes: int = 0) -> Any:
        """The kernel of that name from kernels/cuda/, compiled for the current device."""
        key = (self.cp.cuda.Device().id, expression)
        if key not in self._functions:
            module = self.cp.RawModule(
                code=f'// {self.digest}\n#include "{file}"\n',
                options=("-std=c++17", f"-I{self.folder}"),
                name_expressions=(expression,),
            )
            function = module.get_function(expression)
            if shared_bytes > UNASKED_SHARED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            self._functions[key] = function
        return self._functions[key]

    @property
    def gpu(self) -> cuda_plan.Device:
        """The current device, as the plan sees it."""
        device = self.cp.cuda.Device()
        if device.id not in self._gpus:  # CuPy asks the driver for all attributes of a device each time
            self._gpus[device.id] = cuda_plan.device(int(device.compute_capability), device.attributes)
        return self._gpus[device.id]

    def scratch(self, n_blocks: int, n_tickets: int = 1) -> tuple[Array, Array]:
        """(of_block, tickets) for a sum over so many blocks; launches that may run at once need one each."""
        return self.cp.empty((n_blocks,), "float64"), self.cp.zeros((n_tickets,), "uint32")

    # Products

    def dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        a: Array,
        z: Array | None,
        sigma: str,
        dropout: Dropout | None,
        steps_done: Array | None = None,
        *,
        dtype: str,
        tile: Tile | None = None,
    ) -> Launch:
        """a = σ(z), z = a_prev W + b; `steps_done` is a counter on the device that is added to the dropout's step."""
        (n_rows, n_in), n_out = a_prev.shape, W.shape[1]
        tile = tile or cuda_plan.tile(n_rows, n_out, n_in, dtype, self.gpu)
        name = self._product("dense_forward", tile, a_prev, W, _number(a, dtype), struct_of(sigma), dropout)
        arguments = (a_prev, W, b, a, _or_null(z), *_sizes(n_rows, n_in, n_out), *_dropout(dropout, steps_done))
        return self._launch_product("dense_forward", name, tile, (n_rows, n_out), arguments)

    def dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        delta: Array,
        sigma: str,
        dropout: Dropout | None,
        steps_done: Array | None = None,
        *,
        dtype: str,
        tile: Tile | None = None,
    ) -> Launch:
        """delta = (delta_next W_nextᵀ) ⊙ σ′."""
        (n_rows, n_next), n_out = delta_next.shape, W_next.shape[0]
        tile = tile or cuda_plan.tile(n_rows, n_out, n_next, dtype, self.gpu)
        number = _number(delta, dtype)
        name = self._product("dense_backward", tile, delta_next, W_next, number, struct_of(sigma), dropout)
        sizes = _sizes(n_rows, n_next, n_out)
        arguments = (delta_next, W_next, kept, delta, *sizes, *_dropout(dropout, steps_done))
        return self._launch_product("dense_backward", name, tile, (n_rows, n_out), arguments)

    def dense_gradients(
        self, a_prev: Array, delta: Array, dW: Array, db: Array, parts: Parts, whole: Whole | None = None
    ) -> Launch:
        """dW (n_parts, n_in, n_out) and db (n_parts, n_out): each part sums over its own rows; and whole gradients."""
        (n_rows, n_in), n_out = a_prev.shape, delta.shape[1]
        tile = parts.tile
        n_tiles = tile.blocks(n_in, n_out)
        name = f"dense_gradients<{tile.expression}, {_access(a_prev)}, {_access(delta)}>"
        sizes = _sizes(n_rows, n_in, n_out, parts.rows_per_part)
        scratch = (NULL, NULL) if whole is None else self.scratch(n_tiles, 1 + n_tiles)
        arguments = (a_prev, delta, dW, db, *sizes, *_whole(whole), *scratch)
        return self._launch_product("dense_gradients", name, tile, (n_in, n_out), arguments, parts.n_parts)

    @staticmethod
    def _product(
        operation: str, tile: Tile, a: Array, b: Array, output: str, sigma: str, dropout: Dropout | None
    ) -> str:
        has_dropout = "false" if dropout is None else "true"
        return f"{operation}<{sigma}, {tile.expression}, {_access(a)}, {_access(b)}, {output}, {has_dropout}>"

    def _launch_product(
        self,
        operation: str,
        name: str,
        tile: Tile,
        shape: tuple[int, int],
        arguments: tuple[Any, ...],
        n_parts: int = 1,
    ) -> Launch:
        grid = (blocks_of(shape[0], tile.m), blocks_of(shape[1], tile.n), n_parts)
        shared_bytes = tile.shared_bytes(LAYOUTS[operation])
        function = self.function(f"{operation}.cu", name, shared_bytes)
        return Launch(function, grid, tile.threads, arguments, shared_bytes)

    # The same after a product that is there

    def dense_forward_pass(
        self,
        product: Array,
        b: Array,
        a: Array,
        z: Array | None,
        sigma: str,
        dropout: Dropout | None,
        steps_done: Array,
        *,
        dtype: str,
    ) -> Launch:
        """a = σ(z), z = product + b."""
        arguments = (product, b, a, _or_null(z), *_sizes(*product.shape), *_dropout(dropout, steps_done))
        return self._launch_pass("dense_forward", sigma, _number(a, dtype), dropout, product, arguments)

    def dense_backward_pass(
        self,
        product: Array,
        kept: Array,
        delta: Array,
        sigma: str,
        dropout: Dropout | None,
        steps_done: Array,
        *,
        dtype: str,
    ) -> Launch:
        """delta = product ⊙ σ′."""
        arguments = (product, kept, delta, *_sizes(*product.shape), *_dropout(dropout, steps_done))
        return self._launch_pass("dense_backward", sigma, _number(delta, dtype), dropout, product, arguments)

    def _launch_pass(
        self,
        operation: str,
        sigma: str,
        output: str,
        dropout: Dropout | None,
        product: Array,
        arguments: tuple[Any, ...],
    ) -> Launch:
        has_dropout = "false" if dropout is None else "true"
        name = f"{operation}_pass<{struct_of(sigma)}, {_number(product)}, {output}, {has_dropout}>"
        n_rows, n_out = product.shape
        n_blocks = blocks_of(n_rows * blocks_of(n_out, 4), THREADS)
        return Launch(self.function(f"{operation}.cu", name), (n_blocks,), THREADS, arguments)

    def bias_gradients(self, delta: Array, db: Array, parts: Parts, *, dtype: str) -> Launch:
        """db (n_parts, n_out): each part sums over its own rows."""
        n_rows, n_out = delta.shape
        function = self.function("dense_gradients.cu", f"bias_gradients<{_number(delta, dtype)}>")
        grid = (blocks_of(n_out, THREADS), parts.n_parts)
        return Launch(function, grid, THREADS, (delta, db, *_sizes(n_rows, n_out, parts.rows_per_part)))

    def whole_gradients(self, dW: Array, db: Array, whole: Whole) -> Launch:
        """Whole gradients of dW (n_parts, n_in, n_out) and db (n_parts, n_out)."""
        n_parts, n_in, n_out = dW.shape
        function = self.function("dense_gradients.cu", f"whole_gradients<{_number(dW)}>")
        n_blocks = blocks_of((n_in + 1) * blocks_of(n_out, 4), THREADS)
        arguments = (dW, db, *_sizes(n_parts, n_in, n_out), *_whole(whole), *self.scratch(n_blocks))
        return Launch(function, (n_blocks,), THREADS, arguments)

    # The output layer

    def output_forward(self, z: Array, a: Array, sigma: str) -> Launch:
        """a = σ(z), where σ may be softmax or exp."""
        number = _number(z)
        if sigma == "softmax":
            lanes = _lanes(z.shape[1])
            function = self.function("output_forward.cu", f"output_softmax<{number}, {lanes}>")
            grid = (blocks_of(z.shape[0] * lanes, THREADS),)
            return Launch(function, grid, THREADS, (z, a, *_sizes(*z.shape)))
        function = self.function("output_forward.cu", f"output_forward<{struct_of(sigma)}, {number}>")
        return Launch(function, (blocks_of(z.size, 4 * THREADS),), THREADS, (z, a, np.int64(z.size)))

    def output_delta(
        self,
        z: Array,
        target: Array,
        delta: Array,
        losses: Array,
        loss: Loss,
        sigma: str,
        *,
        order: Array | None = None,
        share: Array | None = None,
        steps_done: Array | None = None,
        batch_size: int = 0,
        delta_scale: Array | None = None,
        scratch: tuple[Array, Array],
        dtype: str,
    ) -> Launch:
        """δ, and C into losses[steps done]; target and share are of the whole data where there is an order."""
        n_rows, n_out = z.shape
        lanes = _lanes(n_out)
        number, output = _number(z), _number(delta, dtype)
        sigma_struct = "Identity" if sigma == "softmax" else struct_of(sigma)
        name = f"output_delta<{struct_of(loss.name)}, {sigma_struct}, {number}, {output}, {lanes}>"
        labels, values = (target, NULL) if target.ndim == 1 else (NULL, target)
        pointers = (labels, values, *(_or_null(x) for x in (order, share, steps_done, delta_scale)))
        sizes = _sizes(batch_size, n_rows, n_out)
        arguments = (z, *pointers, delta, losses, *scratch, *sizes, np.float64(_loss_setting(loss)))
        function = self.function("output_delta.cu", name)
        return Launch(function, (self.output_delta_blocks(n_rows, n_out),), THREADS, arguments)

    @staticmethod
    def output_delta_blocks(n_rows: int, n_out: int) -> int:
        """Blocks of `output_delta`: the length of its scratch."""
        return blocks_of(n_rows * _lanes(n_out), THREADS)

    def shares(self, weight: Array, share: Array) -> Launch:
        """Each row's part in the mean with weights."""
        function = self.function("output_delta.cu", f"shares<{_number(weight)}>")
        return Launch(function, (1,), THREADS, (weight, share, np.int32(weight.size)))

    # The flat vector

    @staticmethod
    def parameter_blocks(counts: list[int]) -> int:
        """Blocks of `update` for stretches of so many parameters."""
        return sum(blocks_of(count, BLOCK_PARAMETERS) for count in counts)

    def update(
        self,
        parameters: Array,
        slots: list[Array],
        parts: Array,
        table: Array,
        n_blocks: int,
        optimizer: Optimizer,
        *,
        numbers: Array,
        counters: Array,
        losses: Array,
        scratch: tuple[Array, Array],
        squares: Array | None = None,
        loss_scale: Array | None = None,
        copy: Array | None = None,
        dtype: str = "",
    ) -> Launch:
        """One pass of the optimizer over all parameters, and their narrow copy; counts the step in both counters.

        Where there are `squares`, whose sum is that of all gradients' squares, the gradients are whole, and clipped.
        """
        number = _number(parameters)
        struct, settings = _optimizer(optimizer)
        two_slots = "true" if len(slots) == 2 else "false"
        narrow = number if copy is None else _number(copy, dtype)
        function = self.function("update.cu", f"update<{struct}, {number}, {narrow}, {two_slots}>")
        slot_1, slot_2 = slots[0], slots[1] if len(slots) == 2 else NULL
        arguments = (
            *(parameters, slot_1, slot_2, _or_null(copy), parts, table, np.int32(table.shape[0])),
            *(numbers, _or_null(squares), np.int32(0 if squares is None else squares.size)),
            *(np.float64(math.inf if optimizer.clip_norm is None else optimizer.clip_norm), _or_null(loss_scale)),
            *(*(np.float64(setting) for setting in settings), counters, losses, *scratch),
        )
        return Launch(function, (n_blocks,), THREADS, arguments)

    def sum_squares(self, x: Array, result: Array) -> Launch:
        """Σ x² in float64, into result (1,)."""
        function = self.function("update.cu", f"sum_squares<{_number(x)}>")
        n_blocks = min(MOST_BLOCKS, blocks_of(x.size, 8 * THREADS))
        return Launch(function, (n_blocks,), THREADS, (x, np.int64(x.size), result, *self.scratch(n_blocks)))

    # Rows

    def gather(
        self, data: Array, order: Array, steps_done: Array, batch: Array, batch_size: int, *, dtype: str
    ) -> Launch:
        """batch ← data[order[steps_done · batch_size + i]] for each of its rows i."""
        name = f"gather<{_number(data)}, {_number(batch, dtype)}>"
        arguments = (data, order, steps_done, batch, *_sizes(batch_size, batch.shape[1]))
        return Launch(self.function("gather.cu", name), (batch.shape[0],), THREADS, arguments)

    def convert(self, x: Array, y: Array, dtype: str) -> Launch:
        """y ← x in its own kind of number."""
        function = self.function("gather.cu", f"convert<{_number(x, dtype)}, {_number(y, dtype)}>")
        return Launch(function, (blocks_of(x.size, 4 * THREADS),), THREADS, (x, y, np.int64(x.size)))


def _number(x: Array, dtype: str = "") -> str:
    """What the array holds, in CUDA C++: 16-bit arrays hold numbers of the dtype that is computed in."""
    return NUMBERS[dtype if x.dtype.name == "uint16" else x.dtype.name].cuda


def _or_null(x: Array | None) -> Any:
    return NULL if x is None else x


def _sizes(*sizes: int) -> tuple[Any, ...]:
    return tuple(np.int32(size) for size in sizes)


def _whole(whole: Whole | None) -> tuple[Any, ...]:
    if whole is None:
        return (NULL, NULL, NULL, np.float64(0), np.int32(0), NULL, NULL, NULL, NULL)
    pointers = (whole.numbers, whole.steps_done, whole.loss_scale, whole.squares)
    return (
        *(_or_null(whole.W), whole.dW, whole.db, np.float64(whole.alpha), np.int32(whole.accumulate)),
        *(_or_null(pointer) for pointer in pointers),
    )


def _access(x: Array) -> int:
    """Bytes of an access to a matrix: 16 where every row begins at a multiple of them."""
    fits = (x.data.ptr | x.shape[1] * x.itemsize) % 16 == 0
    return 16 if fits else int(x.itemsize)


def _lanes(n_out: int) -> int:
    """Threads that share a row: a power of two, at most a warp, with about four outputs each."""
    return min(32, 1 << max(0, math.ceil(math.log2(n_out / 4))))


def _dropout(dropout: Dropout | None, steps_done: Array | None) -> tuple[Any, ...]:
    if dropout is None:
        return (np.uint32(0), np.float64(1), np.float64(1), np.uint64(0), np.uint32(0), np.uint32(0), NULL)
    return (
        np.uint32(int(dropout.rate * 2**32)),
        np.float64(1 - dropout.rate),
        np.float64(1 / (1 - dropout.rate)),
        np.uint64(dropout.seed),
        np.uint32(dropout.layer),
        np.uint32(dropout.step & 0xFFFFFFFF),
        _or_null(steps_done),
    )


def _loss_setting(loss: Loss) -> float:
    return float(getattr(loss, _SETTINGS[loss.name])) if loss.name in _SETTINGS else 0.0


_SETTINGS: Mapping[str, str] = {"cross_entropy": "label_smoothing", "huber": "threshold"}


def _optimizer(optimizer: Optimizer) -> tuple[str, tuple[float, float, float]]:
    """The struct of update.cu, and its settings, which do not change from step to step."""
    if isinstance(optimizer, SGD):
        return f"Sgd<{'true' if optimizer.nesterov else 'false'}>", (optimizer.momentum, 0.0, 0.0)
    if isinstance(optimizer, RMSprop):
        return "RMSprop", (optimizer.decay, 0.0, 0.0)
    assert isinstance(optimizer, Adam)
    decay = optimizer.weight_decay if isinstance(optimizer, AdamW) else 0.0
    return "Adam", (optimizer.beta_1, optimizer.beta_2, decay)


def step_numbers(
    optimizer: Optimizer, learning_rates: npt.NDArray[np.float64], alphas: npt.NDArray[np.float64], first_step: int
) -> npt.NDArray[np.float64]:
    """The table of what changes from step to step, (n_steps, len(STEP_NUMBERS)); the first is update first_step + 1."""
    numbers = np.ones((len(learning_rates), len(STEP_NUMBERS)))
    numbers[:, 0], numbers[:, 1] = learning_rates, alphas
    numbers[:, 4] = getattr(optimizer, "epsilon", 0.0)
    if isinstance(optimizer, Adam):
        t = np.arange(first_step + 1, first_step + 1 + len(numbers))
        numbers[:, 4] = [optimizer.epsilon_at(step) for step in t.tolist()]
        numbers[:, 2] = 1 / (1 - optimizer.beta_1**t)
        numbers[:, 3] = 1 / (1 - optimizer.beta_2**t)
    return numbers
