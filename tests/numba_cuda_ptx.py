"""Compiles the kernels of kernels/numba_cuda to PTX, without a driver: `python numba_cuda_ptx.py facts.json`.

Which kernels there are, and of which types their arguments are, comes from the backend itself: it makes every launch
that its tables allow (each activation in each tile, with dropout and without; each loss with each activation of the
output layer; each optimizer; …) with arrays of the host, and what it would launch is noted down. So a new activation,
loss, optimizer or tile is compiled without a change here.

A test starts it. Every kernel of the smallest size (tile, or lanes that share a row) is compiled for the oldest
architecture, whose PTX runs on all newer ones, and for the newest, as libNVVM has one code generator below 10.0 and
another from there on. Of the larger sizes, each has each of an operation's words (activation, loss, dtype, …) once for
the oldest: what follows a product is the same function in every tile. The architectures between them compile each
operation in each dtype. `--all` compiles every kernel for every architecture.
"""

import argparse
import gc
import json
import multiprocessing
import re
from functools import cache
from itertools import chain, product
from pathlib import Path

import numpy as np
from numba.cuda import compiler, dispatcher
from numba.cuda.cudadrv import nvrtc, nvvm
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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

WIDTHS = {lanes(n): n for n in range(1, 4097)}
"""Numbers of outputs by the lanes that share a row of so many, the fewest first."""

SMALLEST = {"32x32", "1"}
"""Tile, and lanes."""


class NoDevice:
    """In place of the current GPU, which Numba asks for its architecture before it types a device function."""

    compute_capability = NAMED[0]


dispatcher.get_current_device = NoDevice
plan.n_multiprocessors = lambda: 1

noted = []
"""(kernel, arguments) of every launch."""

kernels._ready = lambda kernel, shape, stream: lambda *arguments: noted.append((kernel, arguments))


# What there is to compile


def groups():
    """(dtype, cases) with cases() → (what, launch), …: all launches there are, in groups that have much in common."""
    for dtype in ("float32", "float64"):
        for tile in sorted(plan.tiles(dtype), key=lambda tile: tile.rows * tile.columns):
            yield dtype, lambda dtype=dtype, tile=tile: products(dtype, tile)
    for dtype in ("float32", "float64"):
        for n_lanes in WIDTHS:
            yield dtype, lambda dtype=dtype, n_lanes=n_lanes: outputs(dtype, n_lanes)
        yield dtype, lambda dtype=dtype: others(dtype)


def products(dtype, tile):
    """A tile in every layout, with every epilogue."""
    matrix, vector = np.empty((8, 8), dtype), np.empty(8, dtype)
    plan.tile = lambda shape, dtype: tile
    size = f"{tile.rows}x{tile.columns}"
    yield (
        f"dense_gradients, {size}",
        kernels.dense_gradients(matrix, matrix, matrix, 0, 8, plan.Division(tile, 1, 8), 0),
    )
    for activation, dropout in product(bp.ACTIVATIONS.values(), (None, Dropout(0.5, 2**63, 0, 0))):
        what = f"{size}, {activation.name}{', dropout' if dropout else ''}"
        for z in (matrix,) if activation.derivative_from == "z" else (None, matrix):
            forward = kernels.dense_forward(matrix, matrix, vector, activation, dropout, matrix, z, 0)
            yield f"dense_forward, {what}{'' if z is None else ', z'}", forward
        yield f"dense_backward, {what}", kernels.dense_backward(matrix, matrix, matrix, activation, dropout, matrix, 0)


def outputs(dtype, n_lanes):
    """Every loss and activation of the output layer, with so many lanes to a row."""
    row, costs, labels = np.empty(8), np.empty((8, 8)), np.empty((8, 1), np.int32)
    z = np.empty((8, WIDTHS[n_lanes]), dtype)
    for sigma in OUTPUT_ACTIVATIONS:
        yield f"output_forward, {sigma}, {n_lanes}", kernels.output_forward(z, sigma, z, 0)
    for loss in (made() for made in LOSSES.values()):
        for sigma, target in product(loss.output_activations, (z, labels)):
            if target is z or loss.name == "cross_entropy":
                delta = kernels.output_delta(z, target, loss, sigma, row, z, costs, 8, 0)
                kind = "labels" if target is labels else "rows"
                yield f"output_delta, {loss.name}, {sigma}, {kind}, {n_lanes}", delta


def others(dtype):
    """The gather, the optimizers and the sums."""
    matrix, vector, one = np.empty((8, 8), dtype), np.empty(8, dtype), np.empty(1)
    for target, kind in ((np.empty((8, 1), np.int32), "labels"), (matrix, "rows")):
        yield f"gather, {kind}", kernels.gather(matrix, target, np.empty(8, np.int64), matrix, target, 8, 0)
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


@cache
def covering(view):
    """Names of some kernels, so that each operation has each of what `view(its size, its other words)` yields once."""
    met, chosen = set(), set()
    for dtype, cases in groups():
        for what, _ in cases():
            name = f"{what}, {dtype}"
            operation, *words = name.split(", ")
            new = {(operation, seen) for seen in view(sizes(name), words)} - met
            if new:
                met |= new
                chosen.add(name)
    return chosen


def each_word_in_each_size(size, words):
    return product([size], words)


def each_size(size, words):
    return [size]


def each_dtype(size, words):
    return words[-1:]


def sizes(name):
    """The tile, or the lanes, in a kernel's name."""
    return frozenset(re.findall(r"\b\d+(?:x\d+)?\b", name))


def wanted(name, cc):
    """Whether a kernel is compiled for an architecture in every run of the test."""
    smallest = sizes(name) <= SMALLEST
    if cc == KNOWN[0]:
        return smallest or name in covering(each_word_in_each_size)
    if cc == KNOWN[-1]:
        return smallest or name in covering(each_size)
    return name in covering(each_dtype)


# Compiling it


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


text_of = cache(str)
"""Of a module, which most kernels of a group share; Numba would write it anew for each."""


def ptx_of(libraries, cc):
    """(target, code of each entry by its name): one program of all, which takes a quarter less time than one of each.

    They share most of their modules, and the code of each is what it is alone.
    """
    modules = dict.fromkeys(chain.from_iterable(library.modules for library in libraries))
    options = {"arch": nvrtc.get_arch_option(*cc), **libraries[0]._nvvm_options}
    text = nvvm.compile_ir([text_of(module) for module in modules], **options).decode()
    head, *entries = re.split(r"(?m)^(?=\.visible \.entry )", text)
    sizes = dict(re.findall(r"\.shared \S.* (\w+)\[(\d+)\];", text))
    target = re.search(r"\.target sm_(\d+)", head)[1]
    return target, {re.match(r"\.visible \.entry (\w+)", code)[1]: facts(code, sizes) for code in entries}


def batched(names, n):
    """Lists of n names, the last one of what is left."""
    return [names[i : i + n] for i in range(0, len(names), n)]


def facts(code, sizes):
    """What the test looks at; `sizes` of shared memory by name."""
    loops = loops_that_multiply(code)
    return {
        "shared": sum(int(size) for name, size in sizes.items() if re.search(rf"\b{name}\b", code)),
        "panels": len(loops),
        "local_while_multiplying": sum(len(re.findall(r"(?:ld|st)\.local", loop)) for loop in loops),
        "calls": len(re.findall(r"^\s*call", code, re.MULTILINE)),
        "atomics": len(re.findall(r"^\s*(?:atom|red)\.", code, re.MULTILINE)),
    }


def loops_that_multiply(code):
    """The text of every loop that has a barrier and multiplies.

    A loop is what is strongly connected in the flow of control: the order in which the blocks stand says little, and
    libNVVM's two code generators each have their own.
    """
    blocks = re.split(r"(?m)^(?=\$L__BB\w+:)", re.sub(r"(?m)^(\s.*\bbra\b.*\n)(?!\$L__BB)", r"\1$L__BB_after:\n", code))
    place = {re.match(r"\$L__BB\w+", block)[0]: number for number, block in enumerate(blocks) if number}
    edges = [(i, i + 1) for i, block in enumerate(blocks[:-1]) if not re.search(r"(?:bra\.uni.*|ret);\s*$", block)]
    edges += [(i, place[to]) for i, block in enumerate(blocks) for to in re.findall(r"(?m)^\s.*(\$L__BB\w+)", block)]
    graph = coo_array((np.ones(len(edges)), np.transpose(edges)), shape=(len(blocks), len(blocks)))
    n_parts, part_of = connected_components(graph, connection="strong")
    parts = ["".join(b for b, p in zip(blocks, part_of, strict=True) if p == part) for part in range(n_parts)]
    return [part for part in parts if "bar.sync" in part and "fma.rn" in part]


def library_of(launch):
    """Of the kernel that it launches."""
    noted.clear()
    launch(0, 0)
    (note,) = noted
    return compiled(*note)


def main(output, everything):
    """Compiles the kernels, and writes down the facts about each, by architecture: none where it was left out."""
    n_groups = len(list(groups()))
    with multiprocessing.Pool(min(n_groups, multiprocessing.cpu_count())) as pool:
        found = pool.starmap(compile_group, [(number, everything) for number in range(n_groups)], chunksize=1)
    output.write_text(json.dumps({name: facts for group in found for name, facts in group.items()}))


def compile_group(number, everything):
    """{name: {architecture: facts}} of the kernels of a group."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)  # Numba makes many objects that live long: 15 % of the time
    dtype, cases = list(groups())[number]
    launches = {f"{what}, {dtype}": launch for what, launch in cases()}
    assert len(launches) == len(list(cases()))
    names_for = {cc: [name for name in launches if everything or wanted(name, cc)] for cc in KNOWN}
    libraries = {name: library_of(launches[name]) for name in dict.fromkeys(chain.from_iterable(names_for.values()))}
    result = {name: {} for name in launches}
    for cc, names in names_for.items():
        for some in batched(names, 16):
            target, found = ptx_of([libraries[name] for name in some], cc)
            assert len(found) == len(some)
            for name in some:
                result[name][target] = found[libraries[name]._entry_name]
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--all", action="store_true", dest="everything")
    main(**vars(parser.parse_args()))
