"""Taking data in: whatever holds numbers becomes rows to take mini-batches from, or a clear error comes first.

Arrays are converted once; a memory map, or a SciPy sparse matrix, is converted mini-batch by mini-batch and never
held dense as a whole; a backend may take what is stored of a sparse matrix as it is. Everything is checked here, so the
operations need not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu.losses import Loss

if TYPE_CHECKING:
    from backprop_gpu.backends.contract import Backend

__all__ = ["Entries", "OwnRows", "Rows", "as_rows", "as_sample_weight", "as_target", "chunks", "require_two_classes"]

Array: TypeAlias = Any

CHUNK = 1 << 20
"""Entries looked at in one go when a whole data set is checked: 8 MB of float64."""


class Entries(NamedTuple):
    """What is stored of a sparse matrix, row by row; an element that is stored more than once is the sum."""

    values: Array
    columns: Array
    """int32"""
    starts: Array
    """(N + 1,) int64: where each row begins among the values, and where the last one ends."""


class Rows(ABC):
    """N rows of features, finite in `dtype`: that is checked before, or by `require_finite`."""

    shape: tuple[int, int]
    dtype: str
    array: Array | None = None
    """All rows as one C-contiguous array of `dtype` in memory; None where there is none."""
    entries: Entries | None = None
    """All rows of a sparse matrix, for a backend that takes them as they are; None where there is none."""

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def take(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[Any]:
        """These rows as a C-contiguous (n, n_features) array of `dtype`."""

    def require_finite(self) -> None:  # noqa: B027 (most have nothing left to look for)
        """ValueError for NaN, inf or numbers too large for `dtype`, where they have not been looked for."""


class DenseRows(Rows):
    """Rows of an array, converted where they are taken: `x` has the dtype already, or is a memory map."""

    def __init__(self, x: Array, dtype: str, check: Callable[[], None] = lambda: None) -> None:
        self.x, self.shape, self.dtype, self.check = x, (x.shape[0], x.shape[1]), dtype, check
        self.array = None if isinstance(x, np.memmap) else x

    def require_finite(self) -> None:
        """See `Rows.require_finite`; looks once."""
        self.check()
        self.check = lambda: None

    def take(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[Any]:
        """These rows; a slice of an array that fits as it is comes back as a view."""
        return np.ascontiguousarray(self.x[indices], self.dtype)


class SparseRows(Rows):
    """Rows of a SciPy CSR matrix, made dense where they are taken one way; `entries` is the other.

    ValueError for a damaged matrix, of which SciPy looks at the sizes alone.
    """

    def __init__(self, x: Any, dtype: str) -> None:
        _require_elements(x)
        self.x, self.shape, self.dtype = x, (x.shape[0], x.shape[1]), dtype

    @cached_property
    def entries(self) -> Entries:  # type: ignore[override]
        """See `Rows.entries`: no copy of what is of these dtypes."""
        values, columns = self.x.data.astype(self.dtype, copy=False), self.x.indices.astype(np.int32, copy=False)
        return Entries(values, columns, self.x.indptr.astype(np.int64, copy=False))

    def take(self, indices: npt.NDArray[np.int64] | slice) -> npt.NDArray[Any]:
        """These rows, dense, and of `dtype` before they are, which halves the room for float32."""
        return np.ascontiguousarray(self.x[indices].astype(self.dtype, copy=False).toarray())


class OwnRows(Rows):
    """Rows of an array that a backend `owns`: they stay where they are, as long as a slice or all of them will do."""

    def __init__(self, x: Array, dtype: str, ops: Backend) -> None:
        self.x = self.array = x
        self.shape, self.dtype, self.ops = (x.shape[0], x.shape[1]), dtype, ops

    def take(self, indices: npt.NDArray[np.int64] | slice) -> Array:
        """These rows: a slice as a view on the backend, others out of a copy on the host, made once."""
        return self.x[indices] if isinstance(indices, slice) else self._on_host[indices]

    @cached_property
    def _on_host(self) -> npt.NDArray[Any]:
        return self.ops.to_numpy(self.x)


def as_rows(
    X: Any, n_features: int, dtype: str, name: str = "X", *, ops: Backend | None = None, check: bool = True
) -> Rows:
    """`X` as rows of `n_features` finite numbers.

    X : (N, n_features) array, np.memmap, SciPy sparse matrix, DataFrame, or anything with __array__ or DLPack; an array
    that the backend `ops` owns is not brought to the host. check : False leaves it to the caller to see that an array
    in memory is finite, or to call `require_finite`.
    ValueError for a wrong shape, no rows, NaN, inf or numbers too large for `dtype`; TypeError for what is not numbers.
    """
    if ops is not None and ops.owns(X):
        return _own_rows(X, n_features, dtype, name, ops)
    sparse = hasattr(X, "tocsr")
    x = X.tocsr() if sparse else _as_numeric(X, name)
    if sparse:
        _require_numeric(x.dtype, name)
    _require_matrix(x.shape, n_features, name)
    if sparse:
        _require_finite_entries(x, dtype, name)
        return SparseRows(x, dtype)
    if check or isinstance(x, np.memmap):
        _require_finite(x, dtype, name)
        return DenseRows(x if isinstance(x, np.memmap) else np.ascontiguousarray(x, dtype), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return DenseRows(np.ascontiguousarray(x, dtype), dtype, lambda: _require_finite(x, dtype, name))


def _own_rows(X: Array, n_features: int, dtype: str, name: str, ops: Backend) -> Rows:
    _require_numeric(X.dtype, name)
    _require_matrix(X.shape, n_features, name)
    x = ops.asarray(X, dtype)
    if not np.isfinite(float(ops.sum_squares(x))):  # NaN, inf, or float64 numbers whose squares are too large
        _require_finite(np.asarray(ops.to_numpy(X)), dtype, name)
    return OwnRows(x, dtype, ops)


def as_target(y: Any, loss: Loss, n_outputs: int, n_rows: int, dtype: str, name: str = "y") -> Array:
    """`y` as the contract's target: (N,) int32 labels for cross_entropy, or (N, n_outputs) numbers of `dtype`."""
    y = _as_numeric(y, name)
    _require_length(y, n_rows, name)
    if loss.name == "cross_entropy" and _is_column(y):
        return _as_labels(y.reshape(-1), n_outputs, name)
    if loss.name == "cross_entropy":
        return _as_probability_rows(_as_columns(y, n_outputs, dtype, name), name)
    values = _as_columns(y, n_outputs, dtype, name)
    if loss.name == "binary_cross_entropy":
        _require_between(values, 0, 1, f"{name} must be 0 or 1, or a probability between", name)
    if loss.name == "poisson":
        _require_between(values, 0, np.inf, f"{name} holds counts for the poisson loss, which cannot be negative", name)
    return values


def as_sample_weight(sample_weight: Any, n_rows: int, dtype: str) -> Array | None:
    """(N,) weights of `dtype`, at least 0 and not all 0; None stays None."""
    if sample_weight is None:
        return None
    w = _as_numeric(sample_weight, "sample_weight")
    if w.shape != (n_rows,):
        raise ValueError(f"sample_weight must have shape ({n_rows},), one weight a row; got {w.shape}")
    _require_finite(w.reshape(-1, 1), dtype, "sample_weight")
    w = w.astype(dtype)
    if w.min() < 0 or w.max() == 0:
        raise ValueError(f"sample_weight must be at least 0 everywhere and above 0, in {dtype}, somewhere")
    return w


def require_two_classes(target: Array, loss: Loss) -> None:
    """ValueError where a classifier would be trained on a single class."""
    if loss.task != "classification" or (target.ndim == 2 and target.shape[1] > 1):
        return
    if (target == target.reshape(-1)[0]).all():
        raise ValueError(
            f"y holds a single class ({target.reshape(-1)[0]:g}); a classifier needs at least two to learn from"
        )


def _as_numeric(x: Any, name: str) -> Array:
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise ValueError(f"{name} has masked entries; fill them in first, e.g. {name}.filled(0)")
    if hasattr(x, "tocsr"):
        raise TypeError(f"{name} cannot be sparse; use {name}.toarray()")
    try:
        array = x if isinstance(x, np.memmap) else _to_numpy(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name} ({type(x).__name__}) cannot be read as an array of numbers: {error}") from error
    _require_numeric(array.dtype, name)
    return array


def _to_numpy(x: Any) -> Array:
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x)
    array = np.asarray(x)
    return x.to_numpy(dtype=float) if array.dtype == object and _is_numeric_frame(x) else array


def _is_numeric_frame(x: Any) -> bool:
    """A pandas DataFrame of numbers and booleans together, which NumPy by itself holds as objects."""
    dtypes = getattr(x, "dtypes", ())
    if not (hasattr(x, "to_numpy") and isinstance(dtypes, Iterable)):
        return False
    return all(getattr(dtype, "kind", "O") in "biuf" for dtype in dtypes)


def _require_numeric(dtype: np.dtype[Any], name: str) -> None:
    if dtype.kind not in "biuf":
        raise TypeError(
            f"{name} must hold real numbers; got dtype {dtype} ({name}.astype(float) converts numbers held as objects; "
            "text and categories must be encoded as numbers first)"
        )


def _require_matrix(shape: tuple[int, ...], n_features: int, name: str) -> None:
    if len(shape) != 2:
        raise ValueError(f"{name} must be 2-D, (rows, features); got shape {shape} (one row: {name}.reshape(1, -1))")
    if shape[0] == 0:
        raise ValueError(f"{name} is empty: it has shape {shape}")
    if shape[1] != n_features:
        raise ValueError(f"{name} must have {n_features} features, as the network has inputs; got shape {shape}")


def _require_length(y: Array, n_rows: int, name: str) -> None:
    if y.ndim not in (1, 2) or len(y) != n_rows:
        raise ValueError(f"{name} must have one entry or row for each of the {n_rows} rows of X; got shape {y.shape}")


def _is_column(y: Array) -> bool:
    return bool(y.ndim == 1 or y.shape[1] == 1)


def _as_labels(y: Array, n_classes: int, name: str) -> Array:
    if y.dtype.kind == "f":
        raise TypeError(
            f"{name} must hold integer class labels for cross_entropy; got {y.dtype} "
            f"(class numbers: {name}.astype(int); values to predict: loss='squared_error')"
        )
    bad = (y < 0) | (y >= n_classes)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{name} must hold labels 0 … {n_classes - 1}, one for each of the {n_classes} outputs; "
            f"got {y[row]} at row {row}"
        )
    return y.astype(np.int32)


def _as_columns(y: Array, n_outputs: int, dtype: str, name: str) -> Array:
    if y.ndim == 1 and n_outputs == 1:
        y = y.reshape(-1, 1)
    if y.ndim != 2 or y.shape[1] != n_outputs:
        raise ValueError(f"{name} must have {n_outputs} columns, as the network has outputs; got shape {y.shape}")
    _require_finite(y, dtype, name)
    return np.ascontiguousarray(y, dtype)


def _as_probability_rows(y: Array, name: str) -> Array:
    """Rows of probabilities, divided by their sum, so that ∂c/∂z is softmax(z) − t exactly."""
    _require_between(y, 0, 1, f"{name} holds probability rows, which must be between", name)
    totals = y.sum(axis=1, dtype=np.float64)
    bad = np.abs(totals - 1) > 1e-3
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"each row of {name} must sum to 1, as probabilities do; row {row} sums to {totals[row]:g}")
    return (y / totals[:, None]).astype(y.dtype)


def _require_between(y: Array, low: float, high: float, rule: str, name: str) -> None:
    bad = (y < low) | (y > high)
    if bad.any():
        row, column = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        bounds = f" {low} and {high}" if np.isfinite(high) else ""
        raise ValueError(f"{rule}{bounds}; got {y[row, column]:g} at row {row}")


def _require_finite(x: Array, dtype: str, name: str) -> None:
    """Every entry of a matrix is finite, and stays so in `dtype`; looked at chunk by chunk."""
    if x.dtype.kind != "f":
        return
    for start, block in chunks(x):
        with np.errstate(over="ignore", invalid="ignore"):
            block_cast = block.astype(dtype, copy=False)
            if np.isfinite(block_cast.sum()):  # as no sum with NaN or inf is; a quarter of the time of looking at each
                continue
        bad = ~np.isfinite(block_cast)
        if bad.any():
            row, column = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            raise ValueError(_not_finite(name, block[row, column], dtype, start + row, column))


def _require_finite_entries(x: Any, dtype: str, name: str) -> None:
    """`_require_finite` for a CSR matrix."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(x.data.astype(dtype, copy=False))
    if bad.any():
        entry = int(bad.argmax())
        row = int(np.searchsorted(x.indptr, entry, side="right")) - 1
        raise ValueError(_not_finite(name, x.data[entry], dtype, row, int(x.indices[entry])))


def _require_elements(x: Any) -> None:
    """The elements of a CSR matrix are in its columns, and in its rows in turn."""
    if x.indices.size and not 0 <= x.indices.min() <= x.indices.max() < x.shape[1]:
        wrong = x.indices[(x.indices < 0) | (x.indices >= x.shape[1])][0]
        raise ValueError(f"the sparse matrix is damaged: it has {x.shape[1]} columns, and an element in column {wrong}")
    if x.indptr[0] != 0 or (np.diff(x.indptr) < 0).any() or x.indptr[-1] > len(x.indices):
        raise ValueError("the sparse matrix is damaged: its indptr must rise from 0 to the number of its elements")


def _not_finite(name: str, value: Any, dtype: str, row: int, column: int) -> str:
    what = f"{value:g}, too large for {dtype}," if np.isfinite(value) else f"{value:g}"
    return f"{name} must be finite; got {what} at row {row}, column {column}"


def chunks(x: Array) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of a matrix, about `CHUNK` entries at a time."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]
