"""Streams, events and graphs: the order of work, and what a captured stream records.

Work runs when it is submitted, which is one of the orders that CUDA allows. In the "late" mode it runs as late as
events and synchronisations allow, which is another: a dependency that was forgotten then shows as wrong numbers. One
stream may be prompt among late ones, and so write what another has yet to read.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .emulator import Operation
from .errors import CUDARuntimeError, EmulationError

if TYPE_CHECKING:
    from .emulator import Emulator

__all__ = ["Event", "Graph", "Stream", "Streams", "get_elapsed_time"]

_handles = itertools.count(0x10000, 16)


class _Queue:
    """Work that has been submitted but need not have run yet."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self.submitted = 0
        self.finished = 0

    def add(self, run: Callable[[], None]) -> None:
        self._waiting.append(run)
        self.submitted += 1

    def flush(self, position: int | None = None) -> None:
        """Runs what was submitted up to `position`."""
        target = self.submitted if position is None else position
        while self.finished < target:
            self.finished += 1
            self._waiting.popleft()()


class Streams:
    """All streams of one device, which of them is current, and the capture that goes on."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.Stream = type("Stream", (Stream,), {"_streams": self})
        self.Event = type("Event", (Event,), {"_streams": self})
        self.null = self.Stream.null = self.Stream._create(non_blocking=False, handle=0)
        self.all: dict[int, Stream] = {0: self.null}  # what a stream was given runs, even if the host drops it
        self._local = threading.local()
        self.captures: list[_Capture] = []

    @property
    def stack(self) -> list[Stream]:
        if not hasattr(self._local, "stack"):
            self._local.stack = [self.null]
        return self._local.stack

    @property
    def current(self) -> Stream:
        return self.stack[-1]

    def by_handle(self, handle: int) -> Stream:
        if handle not in self.all:
            raise CUDARuntimeError(400, f"no stream has the pointer {handle}")
        return self.all[handle]

    def submit(self, operation: Operation, stream: Stream | None = None) -> None:
        """Runs, queues or records an operation."""
        stream = stream or self.current
        if stream._capture is not None:
            return stream._capture.record(stream, operation)
        self._forbid_implicit_capture(stream)
        if not self.emulator.late:
            return operation.run()
        self._order_with_null(stream)
        stream._queue.add(lambda kept=operation: kept.run())
        if self.emulator.prompt and self.emulator.prompt == stream._number:
            stream._queue.flush()

    def _forbid_implicit_capture(self, stream: Stream) -> None:
        if stream is self.null and any(not capture.origin.non_blocking for capture in self.captures):
            self._invalidate()
            raise CUDARuntimeError(906)

    def _order_with_null(self, stream: Stream) -> None:
        """The null stream waits for all blocking streams, and they for it."""
        others = [s for s in self.all.values() if not s.non_blocking] if stream is self.null else [self.null]
        for other in others:
            if other is not stream and not stream.non_blocking:
                self._wait(stream._queue, other._queue, other._queue.submitted)

    @staticmethod
    def _wait(queue: _Queue, other: _Queue, position: int) -> None:
        if other.finished < position:
            queue.add(lambda: other.flush(position))

    def host_waits(self, stream: Stream | None = None) -> None:
        """The host waits for a stream, or for all of them."""
        self.forbid_while_capturing("a wait of the host", stream)
        self.emulator.counters.synchronisations += 1
        for waited in [stream] if stream else list(self.all.values()):
            waited._queue.flush()

    def forbid_while_capturing(self, what: str, stream: Stream | None = None) -> None:
        """Raises, and spoils the capture, where `stream` (or any) is capturing."""
        if stream._capture if stream else self.captures:
            self._invalidate()
            raise CUDARuntimeError(900, what)

    def _invalidate(self) -> None:
        for capture in self.captures:
            capture.invalidated = True


class Stream:
    """As `cupy.cuda.Stream`."""

    _streams: Streams  # set in the subclass that each emulator has
    null: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        if null or ptds:
            raise EmulationError("write Stream.null for the null stream")
        self._set_up(non_blocking, next(_handles))
        self._number = len(self._streams.all)
        self._streams.all[self.ptr] = self

    @classmethod
    def _create(cls, *, non_blocking: bool, handle: int) -> Stream:
        stream = cls.__new__(cls)
        stream._set_up(non_blocking, handle)
        return stream

    def _set_up(self, non_blocking: bool, handle: int) -> None:
        self.non_blocking = non_blocking
        self.ptr = handle
        self.device_id = 0
        self._number = 0
        self._queue = _Queue()
        self._capture: _Capture | None = None

    def __repr__(self) -> str:
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def __enter__(self) -> Stream:
        self._streams.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._streams.stack.pop()

    def use(self) -> Stream:
        self._streams.stack[-1] = self
        return self

    def synchronize(self) -> None:
        self._streams.host_waits(self)

    @property
    def done(self) -> bool:
        self._streams.forbid_while_capturing("a query of the stream", self)
        return self._queue.finished == self._queue.submitted

    def record(self, event: Event | None = None) -> Event:
        event = event or self._streams.Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event._capture is not None:
            event._capture.join(self, event)
        elif self._capture is not None:
            if event._queue is not None:  # an event never recorded is no dependency
                self._streams._invalidate()
                raise CUDARuntimeError(905)
        elif event._queue is not None and event._queue is not self._queue:
            self._streams._wait(self._queue, event._queue, event._position)

    def begin_capture(self, mode: int | None = None) -> None:
        if self is self._streams.null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._capture is not None:
            raise CUDARuntimeError(900, "the stream is capturing already")
        self._capture = _Capture(self)
        self._streams.captures.append(self._capture)

    def end_capture(self) -> Graph:
        capture = self._capture
        if capture is None or capture.origin is not self:
            raise CUDARuntimeError(900, "the capture began on another stream, or on none")
        self._streams.captures.remove(capture)
        for stream in capture.clocks:
            stream._capture = None
        return capture.finish()

    def is_capturing(self) -> bool:
        return self._capture is not None


class _Capture:
    """What streams have recorded since `begin_capture`; further streams join by waiting for an event of it."""

    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.steps: list[tuple[Stream, Operation | tuple[Stream, int]]] = []
        self.clocks: dict[Stream, dict[Stream, int]] = {origin: {origin: 0}}
        self.invalidated = False

    def record(self, stream: Stream, step: Operation | tuple[Stream, int]) -> None:
        self.steps.append((stream, step))
        self.clocks[stream][stream] += 1

    def join(self, stream: Stream, event: Event) -> None:
        if stream._capture not in (None, self):
            raise CUDARuntimeError(905, "the event belongs to another capture")
        if stream._capture is None:
            stream._capture = self
            self.clocks.setdefault(stream, {stream: 0})
        clock = self.clocks[stream]
        for other, position in event._clock.items():
            clock[other] = max(clock.get(other, 0), position)
        if event._stream is not stream:
            self.record(stream, (event._stream, event._clock[event._stream]))

    def finish(self) -> Graph:
        if self.invalidated:
            raise CUDARuntimeError(901)
        for stream, clock in self.clocks.items():
            if self.clocks[self.origin].get(stream, 0) < clock[stream]:
                raise CUDARuntimeError(904)
        self.origin._streams.emulator.counters.captures += 1
        return Graph(self.origin._streams, self.steps)


class Graph:
    """A captured graph, as `cupy.cuda.Graph`. It keeps addresses, but no memory alive, as CUDA does."""

    def __init__(self, streams: Streams, steps: list[tuple[Stream, Operation | tuple[Stream, int]]]) -> None:
        self._streams = streams
        branches: dict[Stream, int] = {}
        self._steps: list[tuple[int, _Recorded | tuple[int, int]]] = []
        for stream, step in steps:
            branch = branches.setdefault(stream, len(branches))
            if isinstance(step, Operation):
                self._steps.append((branch, _Recorded(step)))
            else:
                self._steps.append((branch, (branches.setdefault(step[0], len(branches)), step[1])))
        self._branches = len(branches)

    def launch(self, stream: Stream | None = None) -> None:
        self._streams.emulator.counters.graph_launches += 1
        self._streams.submit(Operation("a graph", self._replay), stream)

    def upload(self, stream: Stream | None = None) -> None:
        """Does nothing that shows."""

    def _replay(self) -> None:
        queues = [_Queue() for _ in range(self._branches)]
        for branch, step in self._steps:
            if isinstance(step, _Recorded):
                queues[branch].add(step.run)
            else:
                other, position = queues[step[0]], step[1]
                queues[branch].add(lambda other=other, position=position: other.flush(position))
            if not self._streams.emulator.late:
                queues[branch].flush()
        for queue in queues:
            queue.flush()


class _Recorded:
    """An operation in a graph."""

    def __init__(self, operation: Operation) -> None:
        self._name, self._run = operation.name, operation.run
        self._memory = [weakref.ref(allocation) for allocation in operation.allocations]

    def run(self) -> None:
        if any(memory() is None for memory in self._memory):
            raise EmulationError(
                f"a graph replays {self._name}, but memory that it uses has been freed since the capture"
            )
        self._run()


class Event:
    """As `cupy.cuda.Event`."""

    _streams: Streams  # set in the subclass that each emulator has

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.disable_timing = disable_timing
        self.ptr = next(_handles)
        self._queue: _Queue | None = None
        self._position = 0
        self._time = 0.0
        self._stream: Stream | None = None
        self._capture: _Capture | None = None
        self._clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._streams.current
        self._stream, self._capture = stream, stream._capture
        if self._capture is not None:
            self._clock = dict(self._capture.clocks[stream])
            return
        self._queue, self._position = stream._queue, stream._queue.submitted
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        if self._capture is not None:
            self._streams._invalidate()
            raise CUDARuntimeError(907)
        self._streams.emulator.counters.synchronisations += 1
        if self._queue is not None:
            self._queue.flush(self._position)

    @property
    def done(self) -> bool:
        return self._queue is None or self._queue.finished >= self._position


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that have been recorded, and may be timed."""
    for event in (start_event, end_event):
        if event._queue is None or event.disable_timing:
            raise CUDARuntimeError(400)
    return (end_event._time - start_event._time) * 1e3
