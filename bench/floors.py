"""What each kernel of a training step must move and compute on a GPU, and so the least time that it can take there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from bench.cases import NETWORKS, Case

__all__ = ["H100", "floor", "kernels"]

H100 = (3.35e12, 66.9e12)
"""Bytes per second of memory and float32 operations per second of an H100 SXM, by its data sheet."""

FLOAT = 4


def kernels(case: Case) -> Iterator[tuple[str, float, float]]:
    """(kernel, bytes, operations) of every launch of a step in float32 with Adam; each operand once, ReLU layers."""
    N, sizes = case.batch_size, case.layer_sizes
    layers = list(pairwise(sizes))
    n_parameters = sum(n_in * n_out + n_out for n_in, n_out in layers)
    yield "gather", FLOAT * 2 * N * sizes[0] + 8 * N, 0.0
    for n_in, n_out in layers:
        yield "dense_forward", FLOAT * (N * n_in + n_in * n_out + n_out + N * n_out), 2.0 * N * n_in * n_out
    yield "output_delta", FLOAT * 2 * N * sizes[-1] + 12 * N, 0.0
    for n_in, n_out in layers[1:]:
        yield "dense_backward", FLOAT * (N * n_out + n_in * n_out + 2 * N * n_in), 2.0 * N * n_in * n_out
    for n_in, n_out in layers:
        yield "dense_gradients", FLOAT * (N * n_in + N * n_out + n_in * n_out + n_out), 2.0 * N * n_in * n_out
    yield "update", FLOAT * 7 * n_parameters, 0.0


def floor(case: Case) -> float:
    """Seconds of a step on an H100: each launch takes what memory or cores take, whichever is longer."""
    bytes_per_second, operations_per_second = H100
    return sum(max(b / bytes_per_second, ops / operations_per_second) for _, b, ops in kernels(case))


def rows() -> Iterator[list[str]]:
    """A row for each network of the benchmarks."""
    for name, case in NETWORKS.items():
        launches = list(kernels(case))
        n_bytes, operations = (sum(launch[i] for launch in launches) for i in (1, 2))
        yield [
            f"{name}: {'-'.join(map(str, case.layer_sizes))}, {case.batch_size}",
            str(len(launches)),
            f"{n_bytes / 1e6:.2f}",
            f"{operations / 1e6:.0f}",
            f"{1e6 * floor(case):.1f}",
        ]
