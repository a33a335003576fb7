"""Scaling: a network trains on inputs of mean 0 and variance 1, and afterwards takes them as they are.

The network's units are found from the training rows alone, and folded into the weights once it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu.mlp import MLP

__all__ = ["Scaling"]

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

SCALE_ROWS = 8192
"""Rows that are scaled at a time, so that no float64 copy of a whole image set is made."""


@dataclass(frozen=True)
class Scaling:
    """x ↦ (x − offset) / scale, for inputs and for values to predict; found from the training rows, in float64."""

    X_offset: Floats
    """(n_features,)"""
    X_scale: Floats
    y_offset: Floats | None
    """(n_targets,), or None where the target stays in its units."""
    y_scale: Floats | None

    FLOAT32_LIMIT = 1e3
    """|offset| / scale from which float32 no longer holds a raw feature to a ten-thousandth of its spread."""

    @classmethod
    def of(cls, X: Array, y: Array | None) -> Scaling:
        """Mean 0 and variance 1 for each feature of (N, n_features) `X`, and for `y` unless it is None.

        Pixels (uint8) get one mean and one deviation for all, which leaves a pixel that is hardly ever set small.
        A constant feature gets scale 1.
        """
        if X.dtype == np.uint8:
            mean, std = _pixel_moments(X)
            X_offset, X_scale = np.full(X.shape[1], mean), np.full(X.shape[1], std)
        else:
            X_offset, X_scale = _moments(X)
        return cls(X_offset, X_scale, *(_moments(y.reshape(len(y), -1)) if y is not None else (None, None)))

    def inputs(self, X: Array, dtype: str) -> Array:
        """Scaled (N, n_features) `X` as `dtype`, computed in float64."""
        scaled = np.empty(X.shape, dtype)
        for start in range(0, len(X), SCALE_ROWS):
            rows = slice(start, start + SCALE_ROWS)
            scaled[rows] = (X[rows] - self.X_offset) / self.X_scale
        return scaled

    def targets(self, y: Array) -> Array:
        """Scaled `y`, of its shape; labels and unscaled targets as they are."""
        if self.y_offset is None or self.y_scale is None:
            return y
        scaled: Array = ((y.reshape(len(y), -1) - self.y_offset) / self.y_scale).reshape(y.shape)
        return scaled

    @property
    def needs_float64(self) -> bool:
        """Whether some raw feature is so far from 0, for its spread, that float32 would blur it."""
        return bool((np.abs(self.X_offset) > self.FLOAT32_LIMIT * self.X_scale).any())

    def folded(self, net: MLP) -> MLP:
        """A copy of `net` that takes raw inputs and answers in the target's units; computed in float64.

        Of net's dtype, but at least float32, and float64 where `needs_float64`: raw data has other ranges than scaled.
        """
        wide = net.copy(dtype="float64")
        W, b = ([np.array(wide.ops.to_numpy(x)) for x in views] for views in (wide.W, wide.b))
        W[0] = W[0] / self.X_scale[:, None]
        b[0] = b[0] - self.X_offset @ W[0]
        if self.y_offset is not None and self.y_scale is not None:
            W[-1] = W[-1] * self.y_scale
            b[-1] = b[-1] * self.y_scale + self.y_offset
        for view, values in zip((*wide.W, *wide.b), (*W, *b), strict=True):
            view[...] = wide.ops.asarray(values)
        narrow = net.dtype != "float64" and not self.needs_float64
        return wide.copy(dtype="float32") if narrow else wide


def _moments(x: Array) -> tuple[Floats, Floats]:
    """(mean, standard deviation) of each column, with 1 for a constant one: its rounded deviation need not be 0."""
    constant = x.max(axis=0) == x.min(axis=0)
    return x.mean(axis=0, dtype=np.float64), np.where(constant, 1.0, x.std(axis=0, dtype=np.float64))


def _pixel_moments(X: Array) -> tuple[float, float]:
    """(mean, standard deviation) of all pixels, exactly, from how often each of the 256 values occurs."""
    blocks = (X[start : start + SCALE_ROWS].reshape(-1) for start in range(0, len(X), SCALE_ROWS))
    counts = sum(np.bincount(block, minlength=256) for block in blocks)
    mean = float(np.average(np.arange(256), weights=counts))
    deviation = float(np.average((np.arange(256) - mean) ** 2, weights=counts)) ** 0.5
    return mean, deviation or 1.0
