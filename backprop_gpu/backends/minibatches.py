"""What every trainer needs to know of its mini-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["shares"]

Array = npt.NDArray[Any]


def shares(order: Array, sample_weight: Array | None, batch_size: int) -> tuple[Array, Array]:
    """The part of each row in the mean over its mini-batch, and the total weight of each mini-batch."""
    w = np.ones(len(order)) if sample_weight is None else sample_weight[order].astype(np.float64)
    totals = np.add.reduceat(w, np.arange(0, len(order), batch_size))
    of_row = np.repeat(totals, batch_size)[: len(order)]
    return np.divide(w, of_row, out=w, where=of_row != 0), totals
