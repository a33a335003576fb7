"""A barrier between the threads of one run, in compiled code: nobody goes on before all have arrived.

The last thread to arrive begins the next generation, and the others wait for that. What a thread has written to any
array before `wait`, every thread sees after it: a thread's arrival releases its writes to the last one to arrive, which
acquires them all and releases them with the new generation.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.compile import compiled

__all__ = ["GENERATION", "STOPPED", "load", "new", "store", "wait"]

LINE = 16
"""int64 in two cache lines, because processors fetch them in pairs, and some have lines of 128 bytes."""

ARRIVED, GENERATION = 0, LINE
"""Indices of the two counters. Those who wait look at the second alone, so that nobody who arrives has to take its
cache line away from them; one counter for both, with two threads, takes 30 ns a round in place of 60."""

STOPPED = -(2**63)
"""A generation from which none is reached that is not negative. Stored by one who knows that not all will
arrive, it lets all who wait go, now and for ever: whoever arrives at the same time adds to what is there."""

SPINS = 100
"""Looks at the generation before the core is offered to others: 2.5 µs on a Zen 5, up to 14 µs on a Skylake.

With a busy process on one of two cores, a round of 7 µs takes 17 µs, and 30 µs with 1000 spins; seven threads on two
cores need 11 µs a round, and 75 µs with 1000. Where the cores are free, both take 0.1 µs.
"""


def new() -> npt.NDArray[np.int64]:
    """A barrier at which nobody waits yet, for one run."""
    entries = np.zeros(3 * LINE, np.int64)
    start = -(entries.ctypes.data // entries.itemsize) % LINE
    return entries[start : start + 2 * LINE]


@compiled
def wait(barrier, n_threads):
    """Wait for all n_threads. False: the run is to stop, as not all may have arrived."""
    arrived = barrier.ctypes.data + ARRIVED * 8
    generation = barrier.ctypes.data + GENERATION * 8
    here = load(generation)
    if here < 0:
        return False
    if _add(arrived, 1) == n_threads - 1:
        store(arrived, 0)
        return _add(generation, 1) >= 0
    spins = 0
    while load(generation) == here:
        if spins < SPINS:
            spins += 1
            _pause()
        else:
            _yield()
    return load(generation) >= 0


_yield = types.ExternalFunction(
    "SwitchToThread" if "windows" in llvmlite.binding.get_process_triple() else "sched_yield", types.int32()
)


@intrinsic
def load(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`; acquires what the thread that stored it had released."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Atomic, and no more: it releases nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to what lies at `address`, and returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def _pause(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        call_pause(builder, llvmlite.binding.get_process_triple())
        return context.get_dummy_value()

    return types.void(), generate


def call_pause(builder: ir.IRBuilder, triple: str) -> None:
    """Tell the processor that this loop waits; nothing on one for which LLVM has no word."""
    name, operands = PAUSES.get(triple.split("-")[0], ("", ()))
    if name:
        values = [ir.Constant(ir.IntType(32), operand) for operand in operands]
        signature = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.module.declare_intrinsic(name, fnty=signature), values)


PAUSES: dict[str, tuple[str, tuple[int, ...]]] = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
    "arm64": ("llvm.aarch64.hint", (1,)),
}
"""LLVM's intrinsic by architecture, with its operands; hint 1 is `yield`."""


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())
