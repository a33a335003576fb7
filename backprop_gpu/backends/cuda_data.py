"""The rows of a training run on the GPU: all of them, uploaded once, or where they do not fit, a window at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from backprop_gpu.backends.contract import Array, TrainingJob

__all__ = ["Data", "data_of"]

STEPS_PER_WINDOW = 256
"""Steps handed to the GPU between two looks at the progress bar and Ctrl-C, where the data is there."""

BYTES_PER_WINDOW = 64 << 20
"""Rows uploaded at a time where it is not; the GPU holds two such windows."""

SHARE_OF_MEMORY = 0.8
"""Of the free memory, what data may take that stays on the GPU."""


class Data(Protocol):
    """X on the device, and how a run finds its rows there."""

    rows: Array
    """(..., n_features), where `gather` reads."""
    steps: int
    """Steps of a window."""

    def take_over(self, job: TrainingJob) -> bool:
        """Go on with the rows of `job`, where `rows` stays for them; False, and nothing done, where it cannot."""

    def begin(self, order: npt.NDArray[np.int64], row_order: Array) -> None:
        """A run over rows `order` begins; writes into `row_order` where in `rows` each of them will be."""

    @contextmanager
    def window(self, begin: int, end: int, stream: Any) -> Iterator[None]:
        """Steps [begin, end), at most `steps` of them: while this is open, `stream` finds their rows in `rows`."""


def data_of(job: TrainingJob, cp: Any) -> Data:
    """The data of a job: resident where it is in memory, on host or device, and fits into the GPU's."""
    rows = job.rows
    n_bytes = rows.shape[0] * rows.shape[1] * np.dtype(rows.dtype).itemsize
    fits = n_bytes <= SHARE_OF_MEMORY * cp.cuda.Device().mem_info[0]
    return ResidentData(job, cp) if rows.array is not None and fits else StreamedData(job, cp)


class ResidentData:
    """All rows, uploaded once; those of the device where they lie, unless others are to take their place."""

    steps = STEPS_PER_WINDOW

    def __init__(self, job: TrainingJob, cp: Any) -> None:
        self.cp, self.rows = cp, cp.asarray(job.rows.array)
        if job.in_stream and not isinstance(job.rows.array, np.ndarray):
            self.rows = self.rows.copy()

    def take_over(self, job: TrainingJob) -> bool:
        """See `Data.take_over`."""
        if job.rows.array is None or len(job.rows) > len(self.rows):
            return False
        self.rows[: len(job.rows)] = self.cp.asarray(job.rows.array)
        return True

    def begin(self, order: npt.NDArray[np.int64], row_order: Array) -> None:
        """See `Data.begin`."""
        row_order[: len(order)].set(order)

    @contextmanager
    def window(self, begin: int, end: int, stream: Any) -> Iterator[None]:
        """See `Data.window`."""
        yield


class StreamedData:
    """Two windows of rows, one uploaded while the other is trained on.

    The host takes a window's rows into page-locked memory, from which a stream of its own copies them: so the host
    prepares the next window, and the copy runs, while the GPU computes.
    """

    def __init__(self, job: TrainingJob, cp: Any) -> None:
        self.job, self.cp = job, cp
        n_columns, dtype = job.rows.shape[1], np.dtype(job.rows.dtype)
        self.steps = max(1, BYTES_PER_WINDOW // (job.batch_size * n_columns * dtype.itemsize))
        self.size = self.steps * job.batch_size
        self.rows = cp.empty((2 * self.size, n_columns), dtype)
        self.pinned = [_pinned(cp, (self.size, n_columns), dtype) for _ in range(2)]
        self.stream = cp.cuda.Stream(non_blocking=True)
        self.uploaded: list[Any] = [None, None]
        self.used: list[Any] = [None, None]

    def take_over(self, job: TrainingJob) -> bool:
        """See `Data.take_over`."""
        self.job = job
        return True

    def begin(self, order: npt.NDArray[np.int64], row_order: Array) -> None:
        """See `Data.begin`."""
        self.order = order
        row_order[: len(order)].set(np.arange(len(order)) % (2 * self.size))

    @contextmanager
    def window(self, begin: int, end: int, stream: Any) -> Iterator[None]:
        """See `Data.window`."""
        half = begin // self.steps % 2
        self._upload(half, self.order[begin * self.job.batch_size : end * self.job.batch_size])
        stream.wait_event(self.uploaded[half])
        yield
        self.used[half] = stream.record()

    def _upload(self, half: int, indices: npt.NDArray[np.int64]) -> None:
        if self.uploaded[half] is not None:
            self.uploaded[half].synchronize()  # only then may the host overwrite what it was copied from
        host = self.pinned[half][: len(indices)]
        host[...] = self.job.rows.take(indices)
        if self.used[half] is not None:
            self.stream.wait_event(self.used[half])
        with self.stream:
            self.rows[half * self.size : half * self.size + len(indices)].set(host)
        self.uploaded[half] = self.stream.record()


def _pinned(cp: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A page-locked array on the host."""
    count = int(np.prod(shape))
    memory = cp.cuda.alloc_pinned_memory(count * dtype.itemsize)
    return np.frombuffer(memory, dtype, count).reshape(shape)
