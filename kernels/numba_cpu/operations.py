"""The operations of the contract one by one, over row-major arrays: what NumPy's products leave to do.

Flat views of C-contiguous arrays go in; a row-major matrix is one panel as wide as the matrix.
"""

from __future__ import annotations

import numpy as np

from backprop_gpu.kernels.numba_cpu.activations import apply, multiply_by_derivative
from backprop_gpu.kernels.numba_cpu.compile import compiled, entry_point
from backprop_gpu.kernels.numba_cpu.dropout import keep_factors, multiply
from backprop_gpu.kernels.numba_cpu.output_delta import output_delta, output_forward
from backprop_gpu.kernels.numba_cpu.team import run
from backprop_gpu.kernels.numba_cpu.update import sum_squares, update

__all__ = [
    "activate",
    "drop",
    "multiply_by_sigma_derivative",
    "optimize",
    "output_delta_of_rows",
    "output_forward_of_rows",
    "squares",
]

ROWS = 256


@entry_point
def activate(sigma, z, a):
    """a = σ(z); they may be the same array."""
    apply(sigma, z, 0, a, 0, z.size)


@entry_point
def multiply_by_sigma_derivative(sigma, kept, scale, delta):
    """delta *= σ′(scale · kept)."""
    multiply_by_derivative(sigma, kept, 0, scale, delta, 0, delta.size)


@entry_point
def drop(x, n_columns, rate, seed, layer, step):
    """Dropout on rows of n_columns."""
    factors = np.empty_like(x)
    keep_factors(factors, 0, x.size, n_columns, x.size // n_columns, n_columns, 0, 0, rate, seed, layer, step)
    multiply(x, 0, factors, 0, x.size)


@entry_point
def output_delta_of_rows(loss, setting, sigma, z, n_columns, batches, delta):
    """δ at the output layer, overwriting delta; returns C."""
    n = z.size
    x = np.empty(2 * n, z.dtype)
    x[:n] = z
    cost = output_delta(loss, setting, sigma, x, 0, n, n, n_columns, n // n_columns, n_columns, batches, 0)
    delta[:] = x[n:]
    return cost


@entry_point
def output_forward_of_rows(n_threads, sigma, z, n_columns, a, barrier):
    """a = σ(z) at the output layer; False where not all threads could be started."""
    return run(part_of_output_forward, n_threads, barrier.ctypes.data, (n_threads, sigma, z, n_columns, a))


@compiled
def part_of_output_forward(thread, n_threads, sigma, z, n_columns, a):
    """One thread's rows, ROWS at a time, which stay in cache."""
    n_rows = z.size // n_columns
    low, high = thread * n_rows // n_threads, (thread + 1) * n_rows // n_threads
    for row in range(low, high, ROWS):
        rows = min(ROWS, high - row)
        x = a[row * n_columns : (row + rows) * n_columns]
        x[:] = z[row * n_columns : (row + rows) * n_columns]
        output_forward(sigma, x, 0, x.size, n_columns, rows, n_columns)


@entry_point
def optimize(code, settings, parameters, gradients, slot_1, slot_2, n_weights, learning_rate, scale, step):
    """One step of an optimizer on all parameters, of which the first n_weights are weights."""
    n = parameters.size
    update(code, settings, parameters, gradients, slot_1, slot_2, 0, n_weights, learning_rate, 0.0, scale, step, False)
    update(code, settings, parameters, gradients, slot_1, slot_2, n_weights, n, learning_rate, 0.0, scale, step, True)


@entry_point
def squares(x):
    """Σ x², in float64."""
    return sum_squares(x, x, 0.0, 0, x.size)
