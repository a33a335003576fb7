"""The emulated device: its settings, memory and counters, and the streams that its work goes through."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .errors import EmulationError, OutOfMemoryError
from .memory import Allocation, DeviceMemory, PinnedMemory

__all__ = ["SCHEDULES", "Counters", "Emulator", "Operation"]

SCHEDULES = ("forward", "reverse", "shuffled", "warps", "warps_reversed")
"""Orders in which threads and blocks run; "warps" lets one warp go as far as it can before the next."""

SHARED_MEMORY = {"75": 64, "80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227, "103": 227, "120": 99}
"""Most shared memory of a block by compute capability, in KiB (CUDA C++ Programming Guide)."""


@dataclass
class Counters:
    """What has happened since the last `reset`."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernels that ran, by name, those that a graph replayed among them."""
    direct_launches: Counter[str] = field(default_factory=Counter)
    """Kernels that the host launched one by one, by name; not those that it recorded."""
    graph_launches: int = 0
    captures: int = 0
    synchronisations: int = 0
    """Times that the host waited for the device."""
    allocations: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    bytes_on_device: int = 0
    """Copied from device memory to device memory, other than by kernels."""


@dataclass(frozen=True)
class Operation:
    """Work for a stream. `run` holds addresses only; `allocations` are what keeps their memory."""

    name: str
    run: Callable[[], None]
    allocations: tuple[Allocation, ...] = ()


class Emulator:
    """One emulated device; `cp.emulator` in tests."""

    def __init__(
        self,
        *,
        checked: bool,
        schedules: Sequence[str],
        compute_capability: str,
        late: bool,
        step_limit: int,
        seed: int,
    ) -> None:
        if unknown := set(schedules) - set(SCHEDULES):
            raise ValueError(f"schedules are {', '.join(SCHEDULES)}; got {', '.join(sorted(unknown))}")
        if compute_capability not in SHARED_MEMORY:
            raise ValueError(f"compute_capability is one of {', '.join(SHARED_MEMORY)}; got {compute_capability!r}")
        self.checked = checked
        self.schedules = tuple(schedules)
        self.compute_capability = compute_capability
        self.late = late
        self.step_limit = step_limit
        self.seed = seed
        self.memory_size = 80 << 30
        """Bytes of memory that the device claims to have; tests lower it."""
        self.last_blocks = 0
        """Of a grid, how many blocks run, the last ones; 0 is all. For arrays too large for all to walk over."""
        self.prompt = 0
        """Where streams run late: the one that does not, by the order in which they were made, from 1 on; 0 is none."""
        self.memory = DeviceMemory(checked=checked)
        self.counters = Counters()
        self.pinned: list[weakref.ref[PinnedMemory]] = []
        from .streams import Streams  # which needs what is above

        self.streams = Streams(self)

    Error = EmulationError

    @property
    def max_shared_memory(self) -> int:
        """Most shared memory that a block can ask for, in bytes."""
        return SHARED_MEMORY[self.compute_capability] << 10

    def reset(self) -> None:
        """Sets all counters to zero."""
        self.counters = Counters()

    def pinned_at(self, address: int, size: int) -> PinnedMemory | None:
        """The page-locked memory of the host that holds these bytes."""
        self.pinned = [reference for reference in self.pinned if reference() is not None]
        for reference in self.pinned:
            memory = reference()
            if memory is not None and memory.ptr <= address and address + size <= memory.ptr + len(memory):
                return memory
        return None

    def allocate(self, nbytes: int) -> Allocation:
        """New device memory, within what the device has."""
        self.streams.forbid_while_capturing("an allocation of device memory")
        if self.memory.used + nbytes > self.memory_size:
            raise OutOfMemoryError(nbytes, self.memory.used)
        self.counters.allocations += 1
        return self.memory.allocate(nbytes)
