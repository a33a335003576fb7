"""The products of a training step on the GPU, each in its way: as planned by sizes, or the fastest measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from backprop_gpu.backends import cuda_plan
from backprop_gpu.backends.contract import Array, Dropout
from backprop_gpu.backends.cuda_blas import Blas
from backprop_gpu.backends.cuda_kernels import Kernels, Whole
from backprop_gpu.backends.cuda_plan import Parts, Tile
from backprop_gpu.backends.cuda_tuning import Tuning, Way

__all__ = ["Launchable", "Products"]

logger = logging.getLogger("backprop_gpu")

Launchable: TypeAlias = Callable[[], None]
"""Launches on the current stream, or is captured."""

CUBLAS: Way = "cublas"


@dataclass(frozen=True)
class InOrder:
    """Several launches, one after the other."""

    launches: tuple[Launchable, ...]

    def __call__(self) -> None:
        """All of them."""
        for launch in self.launches:
            launch()


class Products:
    """dense_forward, dense_backward and dense_gradients for networks of one dtype."""

    def __init__(self, kernels: Kernels, dtype: str, tune: bool, streams: tuple[Any, ...]) -> None:
        self.kernels, self.cp, self.dtype = kernels, kernels.cp, dtype
        self.tiles = {tile.expression: tile for tile in kernels.gpu.tiles(dtype)}
        self.tuning = Tuning(self.cp) if tune else None
        self.blas = Blas(self.cp)
        self.ways = list(self.tiles)
        if tune:
            self._with_cublas(streams)

    def _with_cublas(self, streams: tuple[Any, ...]) -> None:
        """One way more, where it is there."""
        missing = self.blas.missing()
        if missing:
            logger.warning("tuning without cuBLAS, among the tiles alone: %s", missing)
            return
        self.ways.append(CUBLAS)
        for stream in streams:
            self.blas.prepare(stream)

    def forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        a: Array,
        z: Array | None,
        sigma: str,
        dropout: Dropout | None,
        counter: Array,
    ) -> Launchable:
        """See `Kernels.dense_forward`."""
        (m, k), n = a_prev.shape, W.shape[1]

        def launch_of(way: Way) -> Launchable:
            after = (b, a, z, sigma, dropout, counter)
            if way != CUBLAS:
                return self.kernels.dense_forward(a_prev, W, *after, dtype=self.dtype, tile=self.tiles[way])
            product = self.cp.empty((m, n), b.dtype)
            fused_pass = self.kernels.dense_forward_pass(product, *after, dtype=self.dtype)
            return InOrder((self.blas.nn(a_prev, W, product, self.dtype), fused_pass))

        return self._fastest("dense_forward", (m, n, k), self._planned(m, n, k), launch_of, [a])

    def backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        delta: Array,
        sigma: str,
        dropout: Dropout | None,
        counter: Array,
    ) -> Launchable:
        """See `Kernels.dense_backward`."""
        (m, k), n = delta_next.shape, W_next.shape[0]

        def launch_of(way: Way) -> Launchable:
            after = (kept, delta, sigma, dropout, counter)
            if way != CUBLAS:
                return self.kernels.dense_backward(delta_next, W_next, *after, dtype=self.dtype, tile=self.tiles[way])
            product = self.cp.empty((m, n), "float64" if self.dtype == "float64" else "float32")
            fused_pass = self.kernels.dense_backward_pass(product, *after, dtype=self.dtype)
            return InOrder((self.blas.nt(delta_next, W_next, product, self.dtype), fused_pass))

        return self._fastest("dense_backward", (m, n, k), self._planned(m, n, k), launch_of, [delta])

    def gradients(
        self, a_prev: Array, delta: Array, dW: Array, db: Array, parts: Parts, whole: Whole | None
    ) -> Launchable:
        """See `Kernels.dense_gradients`."""
        n_rows, rows = len(delta), parts.rows_per_part

        def launch_of(way: Way) -> Launchable:
            if way != CUBLAS:
                plan = parts._replace(tile=self.tiles[way])
                return self.kernels.dense_gradients(a_prev, delta, dW, db, plan, whole)
            of_part = [slice(p * rows, min((p + 1) * rows, n_rows)) for p in range(parts.n_parts)]
            products = [self.blas.tn(a_prev[s], delta[s], dW[p], self.dtype) for p, s in enumerate(of_part)]
            after = [self.kernels.bias_gradients(delta, db, parts, dtype=self.dtype)]
            after += [] if whole is None else [self.kernels.whole_gradients(dW, db, whole)]
            return InOrder((*products, *after))

        operation = "dense_gradients" if whole is None else "whole dense_gradients"
        sizes = (*dW.shape[1:], n_rows, parts.n_parts)
        return self._fastest(operation, sizes, parts.tile, launch_of, [dW, db])

    def _planned(self, m: int, n: int, k: int) -> Tile:
        return cuda_plan.tile(m, n, k, self.dtype, self.kernels.gpu)

    def _fastest(
        self,
        operation: str,
        sizes: tuple[int, ...],
        planned: Tile,
        launch_of: Callable[[Way], Launchable],
        outputs: list[Array],
    ) -> Launchable:
        if self.tuning is None:
            return launch_of(planned.expression)
        product = (operation, "x".join(map(str, sizes)), self.dtype)
        way = self.tuning.way(product, planned.expression, self.ways, launch_of, outputs, self.dtype)
        return launch_of(way if way in self.ways else planned.expression)
