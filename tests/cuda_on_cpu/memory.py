"""Device memory: one sparse file in memory, from which allocations are cut and whose addresses are never used twice."""

from __future__ import annotations

import bisect
import gc
import mmap
import os
import weakref

import numpy as np

from .errors import EmulationError

__all__ = ["Allocation", "DeviceMemory", "PinnedMemory"]

ADDRESS_SPACE = 1 << 38
"""Bytes that can ever be allocated on one device. Reserved twice in checked mode, of the 2⁴⁷ that a process has."""
PAGE = 4096
ALIGNMENT = 512
"""Of every allocation, and no better: what cudaMalloc and CuPy's pool promise."""
LARGE = 1 << 30
"""Bytes; of a larger allocation, only pages that something touches take memory."""
NO_RESERVE = 0x4000  # MAP_NORESERVE, which the mmap module does not name


class Allocation:
    """Some bytes of device memory, freed when nothing refers to this object any more."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes


class DeviceMemory:
    """The memory of one emulated device."""

    def __init__(self, *, checked: bool) -> None:
        self.file = os.memfd_create("cuda_on_cpu")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, ADDRESS_SPACE)
        self._mapping = _reserve(self.file, mmap.MAP_SHARED)
        self.bytes = np.frombuffer(self._mapping, np.uint8)
        self.base = self.bytes.ctypes.data
        # Which bytes have ever been written: checked kernels may read no others.
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.written = np.frombuffer(_reserve(-1, anonymous), np.uint8) if checked else None
        self.used = 0
        self._top = PAGE
        self._addresses: list[int] = []
        self._allocations: list[weakref.ref[Allocation]] = []

    def allocate(self, nbytes: int) -> Allocation:
        """New memory, full of NaN, so that what a kernel forgets to write shows up; where it is large, of zeros."""
        offset = self._top + ALIGNMENT
        end = (offset + nbytes + PAGE - 1) // PAGE * PAGE
        if end + PAGE > ADDRESS_SPACE:
            raise EmulationError("this device's addresses are used up, as none is used twice: make a new one")
        self._top = end + PAGE
        if nbytes <= LARGE:
            self.bytes[offset : offset + nbytes] = 0xFF
        allocation = Allocation(self.base + offset, nbytes)
        self.used += nbytes
        self._addresses.append(allocation.address)
        self._allocations.append(weakref.ref(allocation))
        weakref.finalize(allocation, self._free, offset - ALIGNMENT, end, nbytes).atexit = False
        return allocation

    def _free(self, begin: int, end: int, nbytes: int) -> None:
        self.used -= nbytes
        self._mapping.madvise(mmap.MADV_REMOVE, begin, end - begin)

    def find(self, address: int, nbytes: int) -> Allocation | None:
        """The living allocation that holds all of [address, address + nbytes), if one does."""
        position = bisect.bisect_right(self._addresses, address) - 1
        allocation = self._allocations[position]() if position >= 0 else None
        if allocation is None or address + nbytes > allocation.address + allocation.nbytes:
            return None
        return allocation

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes [address, address + nbytes)."""
        return self.bytes[address - self.base : address - self.base + nbytes]

    def mark_written(self, view: np.ndarray) -> None:
        """Notes that the host, or a copy, has written all of `view`, an array in this memory."""
        if self.written is None or view.size == 0:
            return
        flags = self.written[view.ctypes.data - self.base :]
        shape, strides = (*view.shape, view.itemsize), (*view.strides, 1)
        np.lib.stride_tricks.as_strided(flags, shape, strides)[...] = 1


def _reserve(file: int, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, ADDRESS_SPACE, flags=flags | NO_RESERVE)
    except OSError:  # devices that are no longer used are in reference cycles, and each holds address space
        gc.collect()
        return mmap.mmap(file, ADDRESS_SPACE, flags=flags | NO_RESERVE)


class PinnedMemory(mmap.mmap):
    """Page-locked host memory, as `cupy.cuda.alloc_pinned_memory` returns it: a buffer with an address."""

    def __new__(cls, nbytes: int) -> PinnedMemory:
        return super().__new__(cls, -1, max(nbytes, 1))

    @property
    def ptr(self) -> int:
        return np.frombuffer(self, np.uint8).ctypes.data
