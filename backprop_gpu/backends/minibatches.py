"""What every trainer needs to know of its mini-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["shares", "starts_of"]

Array = npt.NDArray[Any]


def starts_of(n_rows: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Where each mini-batch begins, and where the last one ends."""
    return np.append(np.arange(0, n_rows, batch_size), n_rows)


def shares(order: Array, sample_weight: Array | None, starts: Array) -> tuple[Array, Array]:
    """The part of each row in the mean over its mini-batch, and the total weight of each mini-batch."""
    n_rows = np.diff(starts)
    if sample_weight is None:
        return np.repeat(1 / n_rows, n_rows), n_rows
    w = sample_weight[order].astype(np.float64)
    totals = np.add.reduceat(w, starts[:-1])
    of_row = np.repeat(totals, n_rows)
    return np.divide(w, of_row, out=w, where=of_row != 0), totals
