"""Compiles the kernels of kernels/numba_cuda to PTX, without a driver: `python numba_cuda_ptx.py float32 facts.json`.

Which kernels there are, and of which types their arguments are, comes from the backend itself: it makes every launch
that its tables allow (each activation in each tile, with dropout and without; each loss with each activation of the
output layer; each optimizer; …) with arrays of the host, and what it would launch is noted down. So a new activation,
loss, optimizer or tile is compiled without a change here.

A test starts it, once for each dtype. Types are worked out once for each kernel; its code is then compiled for one
architecture, all of them taking turns, or with `--all` for every one.
"""

import argparse
import gc
import json
import re
from itertools import product
from pathlib import Path

import numpy as np
from numba.cuda import compiler, dispatcher
from numba.cuda.cudadrv import nvrtc

import backprop_gpu as bp
from backprop_gpu.backends import numba_cuda_kernels as kernels
from backprop_gpu.backends import numba_cuda_plan as plan
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.kernels.numba_cuda.output_forward import lanes
from backprop_gpu.losses import LOSSES, OUTPUT_ACTIVATIONS
from backprop_gpu.optimizers import OPTIMIZERS

NAMED = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]
"""What the backend promises."""

KNOWN = [*NAMED, *(tuple(cc) for cc in nvrtc.get_supported_ccs() if tuple(cc) > NAMED[-1])]
"""And the newer ones that the compiler knows."""

WIDTHS = {lanes(n): n for n in range(4096, 0, -1)}
"""Numbers of outputs by the lanes that share a row of so many."""


class NoDevice:
    """In place of the current GPU, which Numba asks for its architecture before it types a device function."""

    compute_capability = NAMED[0]


dispatcher.get_current_device = NoDevice
plan.n_multiprocessors = lambda: 1

noted = []
"""(kernel, arguments) of every launch."""

kernels._ready = lambda kernel, shape, stream: lambda *arguments: noted.append((kernel, arguments))


def cases(dtype):
    """(what, launch): every launch that there is with arrays of `dtype`."""
    vector, one = np.empty(8, dtype), np.empty(1)
    yield from products(dtype)
    yield from outputs(dtype)
    stretches, numbers = np.empty((2, 4), np.int64), np.empty((8, 9))
    for name, clip_norm in product(OPTIMIZERS, (None, 1.0)):
        optimizer = OPTIMIZERS[name](clip_norm=clip_norm)
        slots = [vector] * len(optimizer.slots)
        update = kernels.update(vector, slots, vector.reshape(1, 8), stretches, 8, one, numbers, optimizer, 0)
        yield f"update, {name}{', clipped' if clip_norm else ''}", update
    parts = np.empty((2, 8), dtype)
    yield "total_gradients", kernels.total_gradients(parts, stretches, 8, vector, vector, one, numbers, 0)
    yield "sum_parts", kernels.sum_parts(parts, 0, 2, vector, 0.5, True, vector, 0)
    yield "sum_squares", kernels.sum_squares(vector, np.empty((1, 8)), 0)
    yield "clip_scale", kernels.clip_scale(one, 1.0, one, 0)
    for weights in (None, vector):
        yield f"shares, {'equal' if weights is None else 'weighted'}", kernels.shares(weights, one, 0)


def products(dtype):
    """Every tile in every layout, with every epilogue."""
    matrix, vector = np.empty((8, 8), dtype), np.empty(8, dtype)
    for tile in plan.tiles(dtype):
        plan.tile = lambda shape, dtype, tile=tile: tile
        size = f"{tile.rows}x{tile.columns}"
        division = plan.Division(tile, 1, 8)
        yield f"dense_gradients, {size}", kernels.dense_gradients(matrix, matrix, matrix, 0, 8, division, 0)
        for activation, dropout in product(bp.ACTIVATIONS.values(), (None, Dropout(0.5, 2**63, 0, 0))):
            what = f"{size}, {activation.name}{', dropout' if dropout else ''}"
            for z in (matrix,) if activation.derivative_from == "z" else (None, matrix):
                forward = kernels.dense_forward(matrix, matrix, vector, activation, dropout, matrix, z, 0)
                yield f"dense_forward, {what}{'' if z is None else ', z'}", forward
            backward = kernels.dense_backward(matrix, matrix, matrix, activation, dropout, matrix, 0)
            yield f"dense_backward, {what}", backward


def outputs(dtype):
    """Every loss and activation of the output layer, with every division of a row among lanes, and the gather."""
    row, order, costs = np.empty(8), np.empty(8, np.int64), np.empty((8, 8))
    labels = np.empty((8, 1), np.int32)
    for n_lanes, width in WIDTHS.items():
        z = np.empty((8, width), dtype)
        for sigma in OUTPUT_ACTIVATIONS:
            yield f"output_forward, {sigma}, {n_lanes}", kernels.output_forward(z, sigma, z, 0)
        for loss in (made() for made in LOSSES.values()):
            for sigma, target in product(loss.output_activations, (z, labels)):
                if target is z or loss.name == "cross_entropy":
                    delta = kernels.output_delta(z, target, loss, sigma, row, z, costs, 8, 0)
                    kind = "labels" if target is labels else "rows"
                    yield f"output_delta, {loss.name}, {sigma}, {kind}, {n_lanes}", delta
    for target, kind in ((labels, "labels"), (z, "rows")):
        yield f"gather, {kind}", kernels.gather(z, target, order, z, target, 8, 0)


def compiled(kernel, arguments):
    """The kernel before it is made PTX; by what `cuda.compile` does first, which would do it for every architecture."""
    library, _ = compiler._compile_pyfunc_with_fixup(
        kernel.py_func,
        tuple(map(kernel.typeof_pyval, arguments)),
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
        "local_while_multiplying": sum(len(re.findall(r"(?:ld|st)\.local", loop)) for loop in loops(ptx)),
        "panels": len(loops(ptx)),
        "calls": len(re.findall(r"^\s*call", ptx, re.MULTILINE)),
        "atomics": len(re.findall(r"^\s*(atom|red)\.", ptx, re.MULTILINE)),
    }


def loops(ptx):
    """The bodies of the loops that have a barrier and multiply."""
    found = []
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        branches = list(re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :]))
        body = ptx[label.end() : label.end() + branches[-1].end()] if branches else ""
        if "bar.sync" in body and "fma.rn" in body:
            found.append(body)
    return found


def architectures(number, everything):
    """Those that kernel `number` is compiled for."""
    return KNOWN if everything else [KNOWN[number % len(KNOWN)]]


def main(dtype, output, everything):
    """Compiles every kernel of a dtype, and writes down the facts about each, by architecture."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)  # Numba makes many objects that live long: 15 % of the time
    result = {}
    for number, (what, launch) in enumerate(cases(dtype)):
        noted.clear()
        launch(0, 0)
        (note,) = noted
        library = compiled(*note)
        ptx = {f"{cc[0]}{cc[1]}": library.get_asm_strs(cc=cc)[0] for cc in architectures(number, everything)}
        assert f"{what}, {dtype}" not in result
        result[f"{what}, {dtype}"] = {cc: facts(text) for cc, text in ptx.items()}
    output.write_text(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype")
    parser.add_argument("output", type=Path)
    parser.add_argument("--all", action="store_true", dest="everything")
    main(**vars(parser.parse_args()))
