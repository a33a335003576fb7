"""Compiles the kernels of kernels/numba_cuda to PTX, without a driver: `python numba_cuda_ptx.py products` or `others`.

A test starts it, in a process where Numba does not simulate CUDA. What it compiles, in float32 and in float64:
- every tile in every layout (dense_forward, dense_backward, dense_gradients);
- dropout with a σ′ from a and with one from z;
- σ and σ′ of every activation, in output_delta with the squared error, and every other loss, with labels and with
  rows, with one thread, a warp and a block to a row; softmax and exp;
- every optimizer, with clipping and without, and all other kernels.
Types are worked out once for each; its code is then compiled for every architecture, the newest ones taking turns.
"""

import json
import re
import sys

import numpy as np
from numba import float32, float64, int32, int64, uint64
from numba.cuda import compiler, dispatcher
from numba.cuda.cudadrv import nvrtc

import backprop_gpu as bp
from backprop_gpu.backends import numba_cuda_plan as plan
from backprop_gpu.kernels.numba_cuda import (
    dense_backward,
    dense_forward,
    dense_gradients,
    gather,
    output_delta,
    output_forward,
    reductions,
    update,
)
from backprop_gpu.losses import LOSSES

NAMED = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]
LANES = (1, 32, 128)
DROPOUT = (float64, uint64, int64, int64)
STRETCHES, LABELS, ORDER = int64[:, ::1], int32[:, ::1], int64[::1]
DOUBLES, DOUBLE_ROWS = float64[::1], float64[:, ::1]


def architectures(number):
    """Those that the backend promises, and in turn one of each generation since that the compiler knows."""
    newer = [tuple(cc) for cc in nvrtc.get_supported_ccs() if tuple(cc) > NAMED[-1] and cc[1] == 0]
    return [*NAMED, newer[number % len(newer)]] if newer else NAMED


class NoDevice:
    """In place of the current GPU, which Numba asks for its architecture before it types a device function."""

    compute_capability = NAMED[0]


dispatcher.get_current_device = NoDevice


def products(real, number):
    """Every tile and layout, and dropout."""
    matrix, vector = number[:, ::1], number[::1]
    for tile in plan.tiles(np.dtype(real).name):
        size = f"{tile.rows}x{tile.columns}"
        forward = dense_forward.dense_forward(real, tile, "identity", False, False)
        yield f"dense_forward, {size}", forward, (matrix, matrix, vector, matrix, matrix)
        backward = dense_backward.dense_backward(real, tile, "identity", False)
        yield f"dense_backward, {size}", backward, (matrix,) * 4
        gradients = dense_gradients.dense_gradients(real, tile)
        yield f"dense_gradients, {size}", gradients, (matrix, matrix, matrix, int64, int64, int64)
    for activation in ("tanh", "silu"):
        keeps_z = bp.ACTIVATIONS[activation].derivative_from == "z"
        forward = dense_forward.dense_forward(real, tile, activation, keeps_z, True)
        yield f"dense_forward, {activation}, dropout", forward, (matrix, matrix, vector, matrix, matrix, *DROPOUT)
        backward = dense_backward.dense_backward(real, tile, activation, True)
        yield f"dense_backward, {activation}, dropout", backward, (*(matrix,) * 4, *DROPOUT)


def others(real, number):
    """Every activation, loss and optimizer, and what is left."""
    matrix, vector = number[:, ::1], number[::1]
    after_target = (DOUBLES, int64, float64, matrix, DOUBLE_ROWS, int64)
    for loss in LOSSES.values():
        name = loss.name
        for target, kind in ((LABELS, "labels"), (matrix, "rows")) if name == "cross_entropy" else ((matrix, ""),):
            for lanes in LANES if kind == "labels" else (1,):
                sigmas = loss.output_activations if name == "squared_error" else loss.output_activations[:1]
                for sigma in sigmas:
                    kernel = output_delta.output_delta(real, name, sigma, kind == "labels", lanes)
                    yield f"output_delta, {name}, {sigma}, {kind} {lanes}", kernel, (matrix, target, *after_target)
    for sigma, lanes in (("exp", 1), *(("softmax", lanes) for lanes in LANES)):
        kernel = output_forward.output_forward(real, sigma, lanes)
        yield f"output_forward, {sigma}, {lanes}", kernel, (matrix, matrix)
    step = (matrix, STRETCHES, DOUBLES, DOUBLE_ROWS, int64)
    for optimizer in update.RULES:
        for clipped in (False, True):
            kernel = update.update(real, optimizer, clipped)
            yield f"update, {optimizer.__name__}, {clipped}", kernel, (vector, vector, vector, *step)
    yield (
        "total_gradients",
        reductions.total_gradients(real),
        (*(matrix, STRETCHES, vector, vector, DOUBLES, DOUBLE_ROWS, int64),),
    )
    yield "sum_parts", reductions.sum_parts(real), (matrix, int64, int64, vector, float64, int64, int64, vector)
    yield "sum_squares", reductions.sum_squares, (vector, DOUBLE_ROWS, int64)
    yield "shares", reductions.shares(True), (vector, DOUBLES)
    yield "equal shares", reductions.shares(False), (DOUBLES, DOUBLES)
    yield "clip_scale", reductions.clip_scale, (DOUBLES, float64, DOUBLES)
    for target, kind in ((LABELS, "labels"), (matrix, "rows")):
        yield f"gather, {kind}", gather.gather, (matrix, target, ORDER, matrix, target, int64)


def compiled(kernel, signature):
    """The kernel before it is made PTX; by what `cuda.compile` does first, which would do it for every architecture."""
    library, _ = compiler._compile_pyfunc_with_fixup(
        kernel.py_func,
        signature,
        debug=None,
        lineinfo=False,
        device=False,
        fastmath=False,
        cc=NAMED[0],
        opt=None,
        abi="numba",
        abi_info=None,
        forceinline=False,
        launch_bounds=None,
        lto=False,
    )
    return library


def facts(ptx):
    """What the test looks at."""
    shared = re.findall(r"\.shared [^;]*\[(\d+)\];", ptx, re.MULTILINE)
    return {
        "target": re.search(r"\.target sm_(\d+)", ptx)[1],
        "entries": len(re.findall(r"\.visible \.entry", ptx)),
        "shared": sum(map(int, shared)),
        "local": ".local" in ptx,
        "calls": len(re.findall(r"^\s*call", ptx, re.MULTILINE)),
        "atomics": len(re.findall(r"^\s*(atom|red)\.", ptx, re.MULTILINE)),
    }


def main(group):
    """Compiles a group of kernels."""
    result = {}
    for real, number in ((np.float32, float32), (np.float64, float64)):
        for name, kernel, signature in {"products": products, "others": others}[group](real, number):
            library = compiled(kernel, signature)
            ptx = {f"{cc[0]}{cc[1]}": library.get_asm_strs(cc=cc)[0] for cc in architectures(len(result))}
            result[f"{name}, {number}"] = {cc: facts(text) for cc, text in ptx.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
