"""C and δ = ∂C/∂z at the output layer, by the formulas of `backprop_gpu.backends.numpy`.

A row's `share` is its part in the mean over the mini-batch: 1/N enters here. Each block adds up share · c over its
rows in float64, and the host adds up the blocks, once an epoch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.kernels.numba_cuda.activations import DERIVATIVE, FORWARD, exponential, sigmoid
from backprop_gpu.kernels.numba_cuda.device import Function, cuda, device, exp, expm1, kernel, log, log1p
from backprop_gpu.kernels.numba_cuda.output_forward import THREADS, lanes, lowest, row_softmax, shape, shifted
from backprop_gpu.kernels.numba_cuda.reductions import block_reduce, plus
from backprop_gpu.losses import CrossEntropy, Huber, Loss

__all__ = ["lanes", "output_delta", "setting", "shape"]


def setting(loss: Loss) -> float:
    """The one number that a loss has for a setting, 0 where it has none."""
    match loss:
        case CrossEntropy():
            return loss.label_smoothing
        case Huber():
            return loss.threshold
    return 0.0


# Device functions: losses with a σ of their own, (z, y) → (c, ∂c/∂z) of one output


@device
def finite(z: Any, low: Any) -> Any:
    """±∞ as the largest numbers whose differences are still finite."""
    z = low if z < low else z
    return -low if z > -low else z


@device
def binary_cross_entropy(z: Any, y: Any, low: Any) -> Any:
    """c = max(z, 0) − yz + log(1 + exp(−|z|)), ∂c/∂z = sigmoid(z) − y.

    In this order, a confident right answer keeps its small cost.
    """
    bounded = finite(z, low)
    positive = type(z)(0) if bounded < type(z)(0) else bounded
    return positive - y * bounded + log1p(exp(-abs(z))), sigmoid(z) - y


@device
def poisson(z: Any, y: Any, low: Any) -> Any:
    """c = y(exp(d) − 1 − d) with d = z − log y, or exp(z) where y = 0; ∂c/∂z = exp(z) − y."""
    a = exponential(z)
    d = finite(z, low) - log(type(z)(1) if y == type(z)(0) else y)
    return (a if y == type(z)(0) else y * (expm1(d) - d)), a - y


# Device functions: losses of the error e = a − y under any elementwise σ, (e, setting) → (c, ∂c/∂a) of one output


@device
def squared_error(e: Any, setting: Any) -> Any:
    """½ e² and e."""
    return type(e)(0.5) * e * e, e


@device
def absolute_error(e: Any, setting: Any) -> Any:
    """|e| and its sign."""
    sign = type(e)(-1) if e < type(e)(0) else e
    return abs(e), type(e)(1) if e > type(e)(0) else sign


@device
def huber(e: Any, threshold: Any) -> Any:
    """½ m² + t(|e| − m) with m = min(|e|, t), and e within ±t."""
    size = abs(e)
    m = threshold if size > threshold else size
    slope = threshold if e > threshold else e
    return type(e)(0.5) * m * m + threshold * (size - m), -threshold if e < -threshold else slope


OF_Z: dict[str, Function] = {"binary_cross_entropy": binary_cross_entropy, "poisson": poisson}
OF_ERROR: dict[str, Function] = {"squared_error": squared_error, "absolute_error": absolute_error, "huber": huber}


@cache
def output_of(real: Any, loss: str, output_activation: str) -> Function:
    """(z, y, setting) → c and ∂c/∂z of one output: the same function for all lanes, which Numba compiles once."""
    if loss in OF_Z:
        of_z, low = OF_Z[loss], lowest(real)

        @device
        def output(z: Any, y: Any, setting: Any) -> Any:
            return of_z(z, y, low)
    else:
        of_error, sigma, derivative = OF_ERROR[loss], FORWARD[output_activation], DERIVATIVE[output_activation]
        from_a = ACTIVATIONS[output_activation].derivative_from == "a"

        @device
        def output(z: Any, y: Any, setting: Any) -> Any:
            a = sigma(z)
            c, dc_da = of_error(a - y, setting)
            return c, dc_da * derivative(a if from_a else z)

    return output


def elementwise(real: Any, loss: str, output_activation: str, n_lanes: int) -> Function:
    """(z, target, row, lane, thread, share, setting, delta) → the lane's part of c; writes δ = share · ∂c/∂z."""
    output = output_of(real, loss, output_activation)

    @device
    def row_of(z: Any, target: Any, row: Any, lane: Any, thread: Any, share: Any, setting: Any, delta: Any) -> Any:
        cost = real(0)
        n = z.shape[1] if row < z.shape[0] else 0
        for k in range(lane, n, n_lanes):
            c, dc_dz = output(z[row, k], target[row, k], setting)
            cost += c
            delta[row, k] = dc_dz * real(share) if share != 0.0 else real(0)
        return cost

    return row_of


def cross_entropy(real: Any, labels: bool, n_lanes: int) -> Function:
    """As `elementwise`: c = −Σₖ tₖ log softmax(z)ₖ, ∂c/∂z = softmax(z) − t, with t smoothed by ε: (1 − ε)t + ε/K.

    target : (N, 1) labels if `labels`, else (N, K) rows of probabilities.
    """
    low, of_row = lowest(real), row_softmax(real, n_lanes)

    @device
    def target_of(target: Any, row: Any, k: Any) -> Any:
        if labels:
            return real(1) if target[row, 0] == k else real(0)
        return target[row, k]

    @device
    def row_of(z: Any, target: Any, row: Any, lane: Any, thread: Any, share: Any, setting: Any, delta: Any) -> Any:
        most, total = of_row(z, row, lane, thread)
        log_total, cost = log(total), real(0)
        n = z.shape[1] if row < z.shape[0] else 0
        for k in range(lane, n, n_lanes):
            d = shifted(z[row, k], most, low)
            t = (real(1) - setting) * target_of(target, row, k) + setting / real(n)
            cost += t * (log_total - d)
            delta[row, k] = (exp(d) / total - t) * real(share) if share != 0.0 else real(0)
        return cost

    return row_of


@cache
def cost_of_row(real: Any, n_lanes: int) -> Function:
    """(c, thread) → the sum of a row's parts of c: for all threads of a block, also those beyond the last row."""
    return block_reduce(real, THREADS, n_lanes, plus)


cost_of_block = block_reduce(np.float64, THREADS, THREADS, plus)


# The kernel


@cache
def output_delta(real: Any, loss: str, output_activation: str, labels: bool, n_lanes: int) -> Any:
    """The kernel of one loss and σ, with `n_lanes` threads to a row.

    z : (N, n_out); target : (N, 1) int32 if `labels`, else (N, n_out); share : (≥ first + N,) float64, the rows' parts
    in the mean from `first` on; setting : the loss's own number; delta : (N, n_out), overwritten; costs :
    (> step, gridDim.x) float64, of which costs[step, block] becomes the block's part of C. A row of share 0 is absent,
    also where its cost is infinite.
    """
    rows = THREADS // n_lanes
    row_of = (
        cross_entropy(real, labels, n_lanes)
        if loss == "cross_entropy"
        else elementwise(real, loss, output_activation, n_lanes)
    )
    sum_of_row, float64 = cost_of_row(real, n_lanes), np.float64

    @kernel
    def output_delta(
        z: Any, target: Any, share: Any, first: Any, setting: Any, delta: Any, costs: Any, step: Any
    ) -> None:
        thread = cuda.threadIdx.x
        row, lane = cuda.blockIdx.x * rows + thread // n_lanes, thread % n_lanes
        part = share[first + row] if row < z.shape[0] else 0.0
        cost = sum_of_row(row_of(z, target, row, lane, thread, part, real(setting), delta), thread)
        cost = cost_of_block(part * float64(cost) if lane == 0 and part != 0.0 else 0.0, thread)
        if thread == 0:
            costs[step, cuda.blockIdx.x] = cost

    return output_delta
