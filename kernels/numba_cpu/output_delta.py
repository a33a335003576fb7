"""C and δ = ∂C/∂z at the output layer for one tile of rows, by the formulas of `backprop_gpu.backends.numpy`.

Softmax goes over the tile in three passes, each a short loop: z less its row's largest entry, exp of all at once, and
then, row by row, Σ exp(z), C and δ. In one pass, each row would wait for the maximum, then for exp, then for the sum
(10 classes in float32 on a Zen 5: 34 ns per row even with the maximum given, instead of 21). In cross-entropy, a tile
of a few classes is turned before that, so that each pass goes over all rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.kernels.numba_cpu.activations import CODES as ACTIVATION_CODES
from backprop_gpu.kernels.numba_cpu.activations import apply, multiply_by_derivative
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.elementary import (
    INLINED,
    Format,
    Function,
    called,
    constant,
    exp,
    expm1,
    for_each_format,
    inlined,
    log1p_unit,
    written_anyway,
)
from backprop_gpu.kernels.numba_cpu.gemm import transpose_square
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, panel_width
from backprop_gpu.losses import (
    LOSSES,
    AbsoluteError,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    Loss,
    Poisson,
    SquaredError,
)

__all__ = ["CODES", "SIGMAS", "output_delta", "output_forward", "setting", "winners"]

CODES = {name: code for code, name in enumerate(LOSSES)}
"""The code of every loss."""

EXP, SOFTMAX = ACTIVATION_CODES["exp"], len(ACTIVATION_CODES)

SIGMAS = {**ACTIVATION_CODES, "softmax": SOFTMAX}
"""The code of every activation of an output layer."""

FROM_Z = np.array([name in ACTIVATIONS and ACTIVATIONS[name].derivative_from == "z" for name in SIGMAS])
"""Whether σ′ needs z, by code."""

CROSS_ENTROPY, BINARY_CROSS_ENTROPY, SQUARED_ERROR, ABSOLUTE_ERROR, HUBER, POISSON = (
    CODES[loss.name] for loss in (CrossEntropy, BinaryCrossEntropy, SquaredError, AbsoluteError, Huber, Poisson)
)


def setting(loss: Loss) -> float:
    """The one number that a loss has for a setting, 0 where it has none."""
    match loss:
        case CrossEntropy():
            return loss.label_smoothing
        case Huber():
            return loss.threshold
    return 0.0


@compiled
def output_delta(
    loss: Any,
    setting: Any,
    sigma: Any,
    x: Any,
    z: Any,
    delta: Any,
    stride: Any,
    width: Any,
    n_rows: Any,
    n_columns: Any,
    batches: Any,
    first: Any,
) -> Any:
    """δ = ∂C/∂z of a tile of rows; returns their part of C. Row r of the tile is entry first + r of batches.order.

    z and δ are matrices in panels of `width` columns, from x[z] and x[delta] on. z is used up; the padding of δ, and
    its rows of weight 0, become 0 whatever z is there.
    """
    tile = Tile(stride, width, (n_columns + width - 1) // width, n_rows, n_columns)
    if loss == CROSS_ENTROPY and has_few_columns(tile):
        return cross_entropy_by_columns(setting, x, z, delta, tile, batches, first)
    if loss == CROSS_ENTROPY:
        cost = cross_entropy(setting, x, z, delta, tile, batches, first)
    elif loss == BINARY_CROSS_ENTROPY:
        cost = of_binary_cross_entropy(x, z, delta, tile, batches, first)
    elif loss == POISSON:
        cost = of_poisson(x, z, delta, tile, batches, first)
    else:
        cost = of_error(loss, setting, sigma, x, z, delta, tile, batches, first)
    clear_padding(x, delta, tile)
    clear_absent(x, delta, tile, batches.share, first)
    return cost


@compiled
def output_forward(sigma: Any, x: Any, z: Any, stride: Any, width: Any, n_rows: Any, n_columns: Any) -> None:
    """a = σ(z) of a tile of rows, in place, where σ may be softmax."""
    tile = Tile(stride, width, (n_columns + width - 1) // width, n_rows, n_columns)
    if sigma == SOFTMAX:
        softmax(x, z, tile)
    else:
        apply_to_panels(sigma, x, z, z, tile)
    clear_padding(x, z, tile)


@compiled
def winners(x: Any, z: Any, stride: Any, n_rows: Any, n_columns: Any, labels: Any, first: Any) -> None:
    """labels[first + r] = the first column with the largest z in row r of a tile; −1 where one is NaN."""
    width = panel_width(x)
    for r in range(n_rows):
        best, winner, is_number = x[z + r * width], 0, True
        for p in range((n_columns + width - 1) // width):
            start = z + p * stride + r * width
            part = x[start : start + min(width, n_columns - p * width)]
            for j in range(part.size):
                value = part[j]
                winner = p * width + j if value > best else winner
                best = value if value > best else best
                is_number &= value == value
        labels[first + r] = winner if is_number else -1


# Panels


class Tile(NamedTuple):
    """Where element (r, c) of a matrix lies: at start + (c // width) · stride + r · width + c % width."""

    stride: Any
    width: Any
    n_panels: Any
    n_rows: Any
    n_columns: Any


@inlined
def used(tile: Any, p: Any) -> Any:
    """How many columns of panel p are in use."""
    return min(tile.width, tile.n_columns - p * tile.width)


@called
def apply_to_panels(sigma: Any, x: Any, z: Any, a: Any, tile: Any) -> None:
    """a = σ(z), elementwise."""
    for p in range(tile.n_panels):
        apply(sigma, x, z + p * tile.stride, x, a + p * tile.stride, tile.n_rows * tile.width)


@called
def clear_padding(x: Any, start: Any, tile: Any) -> None:
    """0 in the columns that fill up the last panel."""
    last = tile.n_panels - 1
    n = used(tile, last)
    if n < tile.width:
        for r in range(tile.n_rows):
            clear(x, start + last * tile.stride + r * tile.width + n, tile.width - n)


@called
def clear_absent(x: Any, start: Any, tile: Any, share: Any, first: Any) -> None:
    """0 in the rows of weight 0."""
    for r in range(tile.n_rows):
        if share[first + r] == 0:
            for p in range(tile.n_panels):
                clear(x, start + p * tile.stride + r * tile.width, used(tile, p))


# Runs x[start], …, x[start + count − 1]. Their indices are unsigned: those that could count from the end would keep the
# loops from being vectorised, and slices cost more than a short run.

summing = register_jitable(**{**INLINED, "fastmath": {"contract", "reassoc", "nsz"}})
"""Decorator: `inlined`, for sums, which may be taken in any order here: vectors need that."""


@inlined
def clear(x: Any, start: Any, count: Any) -> None:
    """x ← 0."""
    start = np.uintp(start)
    for i in range(np.uintp(count)):
        x[start + i] = 0


@summing
def total(x: Any, start: Any, count: Any) -> Any:
    """Σ x."""
    start, result = np.uintp(start), x.dtype.type(0)
    for i in range(np.uintp(count)):
        result += x[start + i]
    return result


@for_each_format
def order_key(f: Format) -> Function:
    """x → an integer that is the larger the larger x is; NaN is beyond ±∞, on the side of its sign."""
    to_float, to_int, sign, others = f.float, f.int, f.int(f.bits - 1), f.int(2 ** (f.bits - 1) - 1)

    def key(x: Any) -> Any:
        i = to_float(x).view(to_int)
        return to_int(i ^ ((i >> sign) & others))

    return key


@for_each_format
def from_order_key(f: Format) -> Function:
    """(any float, key) → the x that has the key."""
    to_float, to_int, sign, others = f.float, f.int, f.int(f.bits - 1), f.int(2 ** (f.bits - 1) - 1)
    return lambda like, key: to_int(key ^ ((key >> sign) & others)).view(to_float)


@inlined
def largest(x: Any, start: Any, count: Any) -> Any:
    """The largest entry; where there is a NaN, either that or the largest number.

    A maximum of integers is vectorised; one of floats is not, because of NaN (100 entries of float32: 7, not 42 ns).
    """
    start, most = np.uintp(start), order_key(x[start])
    for i in range(np.uintp(count)):
        key = order_key(x[start + i])
        most = key if key > most else most
    return from_order_key(x[start], most)


# Softmax

lowest = constant(float(np.finfo(np.float32).min) / 4, float(np.finfo(np.float64).min) / 4)


@called
def softmax(x: Any, z: Any, tile: Any) -> None:
    """exp(zₖ) / Σⱼ exp(zⱼ) over each row, in place."""
    shift_rows(x, z, tile)
    apply_to_panels(EXP, x, z, z, tile)
    for r in range(tile.n_rows):
        row = z + r * tile.width
        divisor = total_of_row(x, row, tile)
        for p in range(tile.n_panels):
            divide(x, row + p * tile.stride, used(tile, p), divisor)


@called
def shift_rows(x: Any, z: Any, tile: Any) -> None:
    """Every row less its largest entry."""
    for row in range(z, z + tile.n_rows * tile.width, tile.width):
        most = largest(x, row, used(tile, 0))
        for p in range(1, tile.n_panels):
            most = max(most, largest(x, row + p * tile.stride, used(tile, p)))
        for p in range(tile.n_panels):
            shift(x, row + p * tile.stride, used(tile, p), most)


@inlined
def shift(z: Any, start: Any, count: Any, most: Any) -> None:
    """z ← z − most; see `less`."""
    start = np.uintp(start)
    for i in range(np.uintp(count)):
        z[start + i] = less(z[start + i], most)


@inlined
def less(z: Any, most: Any) -> Any:
    """z − most: 0 where they are the same, even if infinite, and never −∞."""
    d, low = z - most, lowest(most)
    d = low if d < low else d
    return type(z)(0) if z == most else d


@inlined
def total_of_row(x: Any, row: Any, tile: Any) -> Any:
    """Σ over the columns of one row."""
    result = x.dtype.type(0)
    for p in range(tile.n_panels):
        result += total(x, row + p * tile.stride, used(tile, p))
    return result


@inlined
def divide(x: Any, start: Any, count: Any, divisor: Any) -> None:
    """x ← x / divisor."""
    start = np.uintp(start)
    for i in range(np.uintp(count)):
        x[start + i] /= divisor


# Cross-entropy: c = −Σₖ tₖ log softmax(z)ₖ, δ = (softmax(z) − t) · share, with t smoothed: (1 − ε)t + ε/K


@called
def cross_entropy(epsilon: Any, x: Any, z: Any, delta: Any, tile: Any, batches: Any, first: Any) -> Any:
    """δ and the tile's part of C."""
    shift_rows(x, z, tile)
    exponentials(x, z, delta, tile)
    cost, rest, base = 0.0, x.dtype.type(1 - epsilon), x.dtype.type(epsilon / tile.n_columns)
    for r in range(tile.n_rows):
        share, row = batches.share[first + r], batches.order[first + r]
        z_row, e_row, factor = z + r * tile.width, delta + r * tile.width, x.dtype.type(share)
        if share == 0:
            continue
        divisor = total_of_row(x, e_row, tile)
        if batches.labels.size > 0:
            label = batches.labels[row]
            c = with_label(x, z_row, e_row, divisor, tile, label, rest, base, factor)
        else:
            c = with_target(x, z_row, e_row, divisor, tile, batches.target, row, rest, base, factor)
        cost += share * c
    return cost


@inlined
def exponentials(x: Any, z: Any, e: Any, tile: Any) -> None:
    """e = exp(z), elementwise; `apply` would add every σ to what is compiled here."""
    for p in range(tile.n_panels):
        exp_of_run(x, z + p * tile.stride, tile.n_rows * tile.width, e + p * tile.stride)


@inlined
def exp_of_run(x: Any, start: Any, count: Any, e: Any) -> None:
    """e = exp(x)."""
    start, e = np.uintp(start), np.uintp(e)
    for i in range(np.uintp(count)):
        x[e + i] = exp(x[start + i])


@inlined
def with_label(x: Any, z: Any, e: Any, divisor: Any, tile: Any, label: Any, rest: Any, base: Any, share: Any) -> Any:
    """One row: from z, less its largest entry, and e = exp(z), whose sum is the divisor, to c, and δ in place of e."""
    cost, log_divisor, e_label = x.dtype.type(0), math.log(divisor), x.dtype.type(0)
    for p in range(tile.n_panels):
        n, z_p, e_p, column = used(tile, p), z + p * tile.stride, e + p * tile.stride, label - p * tile.width
        here = 0 <= column < n
        if here:
            e_label = x[e_p + column]
            cost += rest * (log_divisor - x[z_p + column])
        if base > 0:
            cost += cost_of_constant(x, z_p, n, log_divisor, base)
        less_constant(x, e_p, n, divisor, base, share)
        if here:
            x[e_p + column] = (e_label / divisor - (rest + base)) * share
    return cost


@summing
def cost_of_constant(z: Any, start: Any, count: Any, log_divisor: Any, base: Any) -> Any:
    """−Σₖ base · log softmax(z)ₖ."""
    start, cost = np.uintp(start), z.dtype.type(0)
    for i in range(np.uintp(count)):
        cost += base * (log_divisor - z[start + i])
    return cost


@inlined
def less_constant(e: Any, start: Any, count: Any, divisor: Any, base: Any, share: Any) -> None:
    """e ← (e / divisor − base) · share."""
    start = np.uintp(start)
    for i in range(np.uintp(count)):
        e[start + i] = (e[start + i] / divisor - base) * share


@inlined
def with_target(
    x: Any, z: Any, e: Any, divisor: Any, tile: Any, target: Any, row: Any, rest: Any, base: Any, share: Any
) -> Any:
    """As `with_label`, where the target is a row of probabilities."""
    cost, log_divisor = x.dtype.type(0), math.log(divisor)
    for p in range(tile.n_panels):
        n, z_p, e_p = used(tile, p), z + p * tile.stride, e + p * tile.stride
        cost += cost_of_target(x, z_p, n, target, row, p * tile.width, log_divisor, rest, base)
        less_target(x, e_p, n, target, row, p * tile.width, divisor, rest, base, share)
    return cost


@summing
def cost_of_target(
    z: Any, start: Any, count: Any, t: Any, row: Any, column: Any, log_divisor: Any, rest: Any, base: Any
) -> Any:
    """−Σₖ tₖ log softmax(z)ₖ."""
    start, row, column, cost = np.uintp(start), np.uintp(row), np.uintp(column), z.dtype.type(0)
    for i in range(np.uintp(count)):
        cost += (rest * t[row, column + i] + base) * (log_divisor - z[start + i])
    return cost


@inlined
def less_target(
    e: Any, start: Any, count: Any, t: Any, row: Any, column: Any, divisor: Any, rest: Any, base: Any, share: Any
) -> None:
    """e ← (e / divisor − t) · share."""
    start, row, column = np.uintp(start), np.uintp(row), np.uintp(column)
    for i in range(np.uintp(count)):
        e[start + i] = (e[start + i] / divisor - (rest * t[row, column + i] + base)) * share


# Cross-entropy of a few classes. A loop over the columns of a row would fill no vector, so the tile is turned: a column
# becomes a run of all rows. In one panel of few columns there is place for this: z, and four runs beside it, where δ
# will be; exp(z), and three more, where z was. In float32 on a Zen 5, 2 classes take 7 ns a row in place of 18, 10
# classes 13 in place of 22, and 16 classes 18 in place of 20; on a Zen 3, 16 classes 35 in place of 73.

FEW_COLUMNS = 16


@inlined
def has_few_columns(tile: Any) -> Any:
    """Whether it is to be turned."""
    return tile.n_columns <= min(FEW_COLUMNS, tile.width - 4)


@called
def cross_entropy_by_columns(epsilon: Any, x: Any, z: Any, delta: Any, tile: Any, batches: Any, first: Any) -> Any:
    """As `cross_entropy`; also leaves 0 in δ's padding and in the rows of weight 0."""
    n, size = tile.n_rows, tile.n_rows * tile.n_columns
    shifted, e, most = delta, z, delta + size
    divisor, logarithm, share = most + n, most + 2 * n, most + 3 * n
    costs, label, target = z + size, z + size + n, z + size + 2 * n
    turn(x, z, tile.width, 1, shifted, 1, n, tile)
    most_of_columns(x, shifted, n, tile.n_columns, most)
    for c in range(tile.n_columns):
        shift_column(x, shifted + c * n, n, most)
    exp_of_run(x, shifted, size, e)
    sum_of_columns(x, e, n, tile.n_columns, divisor)
    log_of_run(x, divisor, n, logarithm)
    for r in range(n):
        x[share + r] = batches.share[first + r]
        x[costs + r] = 0
    labels_of_rows(x, label, n, batches, first)
    for c in range(tile.n_columns):
        target_of_column(epsilon, x, label, target, c, tile, batches, first)
        of_column(x, shifted + c * n, e + c * n, target, n, divisor, logarithm, share, costs)
    cost = 0.0
    for r in range(n):
        if batches.share[first + r] != 0:
            cost += batches.share[first + r] * x[costs + r]
    clear(x, delta, n * tile.width)
    turn(x, e, 1, n, delta, tile.width, 1, tile)
    return cost


@inlined
def turn(x: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, b_column: Any, tile: Any) -> None:
    """b ← a, two matrices of a tile's size, each with its steps from row to row and from column to column.

    What is a run in one is none in the other; one number at a time, this took two thirds of the time.
    """
    a_step, b_step = max(a_row, a_column), max(b_row, b_column)
    rows, columns = tile.n_rows // BLOCK_ROWS * BLOCK_ROWS, tile.n_columns // BLOCK_ROWS * BLOCK_ROWS
    for r in range(0, rows, BLOCK_ROWS):
        for c in range(0, columns, BLOCK_ROWS):
            here, there = a + r * a_row + c * a_column, b + r * b_row + c * b_column
            transpose_square(x, here, a_step, x, there, b_step)
    for c in range(tile.n_columns):
        first = rows if c < columns else 0
        here, there = np.uintp(a + c * a_column), np.uintp(b + c * b_column)
        for r in range(np.uintp(first), np.uintp(tile.n_rows)):
            x[there + r * np.uintp(b_row)] = x[here + r * np.uintp(a_row)]


@inlined
def most_of_columns(x: Any, columns: Any, n_rows: Any, n_columns: Any, most: Any) -> None:
    """The largest entry of each row, or NaN: where that is not the first, its exponential will tell."""
    columns, n_rows, most = np.uintp(columns), np.uintp(n_rows), np.uintp(most)
    for r in range(n_rows):
        x[most + r] = x[columns + r]
    for c in range(np.uintp(1), np.uintp(n_columns)):
        for r in range(n_rows):
            value = x[columns + c * n_rows + r]
            x[most + r] = written_anyway(value if value > x[most + r] else x[most + r])


@inlined
def shift_column(x: Any, column: Any, n_rows: Any, most: Any) -> None:
    """As `shift`, with a most for every entry."""
    column, most = np.uintp(column), np.uintp(most)
    for r in range(np.uintp(n_rows)):
        x[column + r] = less(x[column + r], x[most + r])


@inlined
def log_of_run(x: Any, start: Any, count: Any, logarithm: Any) -> None:
    """The logarithm of each entry."""
    start, logarithm = np.uintp(start), np.uintp(logarithm)
    for i in range(np.uintp(count)):
        x[logarithm + i] = log(x[start + i])


@inlined
def sum_of_columns(x: Any, columns: Any, n_rows: Any, n_columns: Any, sums: Any) -> None:
    """The sum of each row."""
    columns, n_rows, sums = np.uintp(columns), np.uintp(n_rows), np.uintp(sums)
    for r in range(n_rows):
        x[sums + r] = x[columns + r]
    for c in range(np.uintp(1), np.uintp(n_columns)):
        for r in range(n_rows):
            x[sums + r] += x[columns + c * n_rows + r]


@inlined
def labels_of_rows(x: Any, label: Any, n_rows: Any, batches: Any, first: Any) -> None:
    """The label of each row, if rows have labels."""
    if batches.labels.size > 0:
        for r in range(n_rows):
            x[label + r] = batches.labels[batches.order[first + r]]


@inlined
def target_of_column(
    epsilon: Any, x: Any, label: Any, target: Any, c: Any, tile: Any, batches: Any, first: Any
) -> None:
    """(1 − ε)t + ε/K of every row, where t is 1 for the label and 0 for the others, or the row's probability."""
    rest, base, column = x.dtype.type(1 - epsilon), x.dtype.type(epsilon / tile.n_columns), x.dtype.type(c)
    if batches.labels.size > 0:
        label, target = np.uintp(label), np.uintp(target)
        for r in range(np.uintp(tile.n_rows)):
            x[target + r] = rest + base if x[label + r] == column else base
    else:
        for r in range(tile.n_rows):
            x[target + r] = rest * batches.target[batches.order[first + r], c] + base


@inlined
def of_column(
    x: Any, z: Any, e: Any, t: Any, n_rows: Any, divisor: Any, logarithm: Any, share: Any, costs: Any
) -> None:
    """costs += t · (log Σ − z), and δ = (e / Σ − t) · share in place of e."""
    z, e, t, costs = np.uintp(z), np.uintp(e), np.uintp(t), np.uintp(costs)
    divisor, logarithm, share = np.uintp(divisor), np.uintp(logarithm), np.uintp(share)
    for r in range(np.uintp(n_rows)):
        x[costs + r] += x[t + r] * (x[logarithm + r] - x[z + r])
        d = (x[e + r] / x[divisor + r] - x[t + r]) * x[share + r]
        x[e + r] = d if x[share + r] != 0 else x.dtype.type(0)


# Losses with a σ of their own: (z, y) → (c, ∂c/∂z), one output at a time


@inlined
def finite(z: Any) -> Any:
    """±∞ as the largest numbers whose differences are still finite."""
    low = lowest(z)
    z = low if z < low else z
    return -low if z > -low else z


@inlined
def binary_cross_entropy(z: Any, y: Any) -> Any:
    """c = max(z, 0) − yz + log(1 + exp(−|z|)), ∂c/∂z = sigmoid(z) − y.

    In this order, a confident right answer keeps its small cost.
    """
    zero, one, e, bounded = type(z)(0), type(z)(1), exp(-abs(z)), finite(z)
    cost = (zero if bounded < zero else bounded) - y * bounded + log1p_unit(e)
    return cost, (e if z < zero else one) / (one + e) - y


@for_each_format
def split(f: Format) -> Function:
    """x → (k, m) with x = 2ᵏ m and ¾ ≤ m < 1½, for normal x > 0."""
    to_float, to_int, bits = f.float, f.int, f.int(f.mantissa_bits)
    three_quarters = f.float(0.75).view(f.int)

    def parts(x: Any) -> Any:
        i = to_float(x).view(to_int)
        k = to_int(to_int(i - three_quarters) >> bits)
        return to_float(k), to_int(i - to_int(k << bits)).view(to_float)

    return parts


@inlined
def log(x: Any) -> Any:
    """log x = k log 2 + log m for normal x > 0; NaN where x is negative or NaN."""
    k, m = split(x)
    result = k * type(x)(math.log(2)) + log1p_unit(m - type(x)(1))
    return result if x >= type(x)(0) else type(x)(math.nan)


@inlined
def poisson(z: Any, y: Any) -> Any:
    """c = y(exp(d) − 1 − d) with d = z − log y, or exp(z) where y = 0; ∂c/∂z = exp(z) − y.

    Near exp(z) = y, there are no large numbers to cancel.
    """
    zero, one, a = type(z)(0), type(z)(1), exp(z)
    d = finite(z) - log(one if y == zero else y)
    return a if y == zero else y * (expm1(d) - d), a - y


def of_z(loss: Function) -> Function:
    """δ and part of C for a tile under a loss of z.

    The columns in use move together, to the front of their panel, and y to where δ will be; c takes the place of z.
    So the loss runs over whole vectors also where a panel has one output.
    """

    @inlined
    def run(x: Any, z: Any, y: Any, count: Any) -> None:
        z, y = np.uintp(z), np.uintp(y)
        for i in range(np.uintp(count)):
            x[z + i], x[y + i] = loss(x[z + i], x[y + i])

    @called
    def over_tile(x: Any, z: Any, delta: Any, tile: Any, batches: Any, first: Any) -> Any:
        cost = 0.0
        for p in range(tile.n_panels):
            n, z_p, delta_p = used(tile, p), z + p * tile.stride, delta + p * tile.stride
            if n < tile.width:
                pack(x, z_p, tile.width, tile.n_rows, n)
            for r in range(tile.n_rows):
                copy(batches.target, batches.order[first + r], p * tile.width, x, delta_p + r * n, n)
            run(x, z_p, delta_p, tile.n_rows * n)
            if n < tile.width:
                unpack(x, delta_p, tile.width, tile.n_rows, n)
            for r in range(tile.n_rows):
                share = batches.share[first + r]
                scale(x, delta_p + r * tile.width, n, x.dtype.type(share))
                if share != 0:
                    cost += share * total(x, z_p + r * n, n)
        return cost

    return over_tile


@inlined
def pack(x: Any, start: Any, width: Any, n_rows: Any, n_columns: Any) -> None:
    """The columns in use of a panel, without the gaps between them."""
    start, width, n_columns = np.uintp(start), np.uintp(width), np.uintp(n_columns)
    for r in range(np.uintp(n_rows)):
        for j in range(n_columns):
            x[start + r * n_columns + j] = x[start + r * width + j]


@inlined
def unpack(x: Any, start: Any, width: Any, n_rows: Any, n_columns: Any) -> None:
    """The inverse of `pack`: from the end, so that nothing is overwritten before it is moved."""
    for r in range(n_rows - 1, -1, -1):
        for j in range(n_columns - 1, -1, -1):
            x[np.uintp(start + r * width + j)] = x[np.uintp(start + r * n_columns + j)]


@inlined
def copy(matrix: Any, row: Any, column: Any, x: Any, start: Any, count: Any) -> None:
    """x ← the entries of a row, from `column` on."""
    row, column, start = np.uintp(row), np.uintp(column), np.uintp(start)
    for i in range(np.uintp(count)):
        x[start + i] = matrix[row, column + i]


@inlined
def scale(x: Any, start: Any, count: Any, factor: Any) -> None:
    """x ← factor · x."""
    start = np.uintp(start)
    for i in range(np.uintp(count)):
        x[start + i] *= factor


of_binary_cross_entropy, of_poisson = of_z(binary_cross_entropy), of_z(poisson)


# Losses of the error e = a − y under any elementwise σ: (setting, e) → (c, ∂c/∂a), one output at a time


@inlined
def squared_error(setting: Any, e: Any) -> Any:
    """½ e² and e."""
    return type(e)(0.5) * e * e, e


@inlined
def absolute_error(setting: Any, e: Any) -> Any:
    """|e| and its sign."""
    zero, one = type(e)(0), type(e)(1)
    sign = -one if e < zero else e
    return abs(e), one if e > zero else sign


@inlined
def huber(threshold: Any, e: Any) -> Any:
    """½ m² + t(|e| − m) with m = min(|e|, t), and e within ±t."""
    size = abs(e)
    m = threshold if size > threshold else size
    slope = threshold if e > threshold else e
    return type(e)(0.5) * m * m + threshold * (size - m), -threshold if e < -threshold else slope


def of_errors(loss: Function) -> Function:
    """δ ← ∂c/∂a · share, and part of C, for a tile under a loss of a − y; a may lie where δ will be."""

    @summing
    def run(setting: Any, x: Any, a: Any, count: Any, y: Any, row: Any, column: Any, delta: Any, share: Any) -> Any:
        a, row, column, delta = np.uintp(a), np.uintp(row), np.uintp(column), np.uintp(delta)
        cost = x.dtype.type(0)
        for i in range(np.uintp(count)):
            c, slope = loss(setting, x[a + i] - y[row, column + i])
            x[delta + i] = slope * share
            cost += c
        return cost

    @called
    def over_tile(setting: Any, x: Any, a: Any, delta: Any, tile: Any, batches: Any, first: Any) -> Any:
        cost, setting = 0.0, x.dtype.type(setting)
        for r in range(tile.n_rows):
            share, row, factor = (
                batches.share[first + r],
                batches.order[first + r],
                x.dtype.type(batches.share[first + r]),
            )
            for p in range(tile.n_panels):
                at, n = p * tile.stride + r * tile.width, used(tile, p)
                c = run(setting, x, a + at, n, batches.target, row, p * tile.width, delta + at, factor)
                if share != 0:
                    cost += share * c
        return cost

    return over_tile


of_squared_error, of_absolute_error, of_huber = map(of_errors, (squared_error, absolute_error, huber))


@called
def of_error(
    loss: Any, setting: Any, sigma: Any, x: Any, z: Any, delta: Any, tile: Any, batches: Any, first: Any
) -> Any:
    """δ = ∂c/∂a ⊙ σ′ · share; a is computed where δ will be, if σ′ needs z, else where z was."""
    a = delta if FROM_Z[sigma] else z
    apply_to_panels(sigma, x, z, a, tile)
    if loss == SQUARED_ERROR:
        cost = of_squared_error(setting, x, a, delta, tile, batches, first)
    elif loss == ABSOLUTE_ERROR:
        cost = of_absolute_error(setting, x, a, delta, tile, batches, first)
    else:
        cost = of_huber(setting, x, a, delta, tile, batches, first)
    for p in range(tile.n_panels):
        multiply_by_derivative(sigma, x, z + p * tile.stride, 1.0, x, delta + p * tile.stride, tile.n_rows * tile.width)
    return cost
