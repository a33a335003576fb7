"""A function on several threads at once, called from compiled code: on threads started for it, or on a team's;
and the barrier between them.

A thread that Python starts begins when the interpreter lets it, 120 µs later on two cores of a Zen 3; one that is
started here, 20 µs later. Threads that wait from call to call would not be there in a forked process.

A team is what another library's OpenMP keeps. PyTorch's threads wait for the next piece of work for a while by looking
for it again and again, and so take a piece over in 2 µs; but a thread that is started beside them shares a core with
one that waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.compile import compiled

__all__ = ["GENERATION", "STOPPED", "load", "new_barrier", "run", "run_by_team", "store", "wait"]

POINTER, INT, SIZE = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
START = ir.FunctionType(POINTER, [POINTER]).as_pointer()
NULL = POINTER(None)


@intrinsic
def run(typing_context, function, n_threads, barrier, arguments):
    """function(thread, *arguments) on n_threads threads, 0 on this one; False where not all of them could be started.

    function is `compiled`, and its result is dropped. Threads that were started in vain find the barrier, which is at
    this address, stopped; so what comes before their first `wait` has to be what may be done again.
    """

    def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
        member = _member(context, builder, function, values[3], arguments)
        shared = builder.bitcast(member.shared, POINTER)
        others = builder.sub(values[1], SIZE(1))
        handles = builder.alloca(SIZE, size=others)
        n_started = cgutils.alloca_once_value(builder, SIZE(0))
        with cgutils.for_range(builder, others) as loop:
            is_there = _start(builder, builder.gep(handles, [loop.index]), _entry(builder.module, member), shared)
            with builder.if_then(builder.not_(is_there)):
                loop.do_break()
            builder.store(builder.add(loop.index, SIZE(1)), n_started)
        all_there = builder.icmp_signed("==", builder.load(n_started), others)
        with builder.if_else(all_there, likely=True) as (whole, part):
            with whole:
                builder.call(member.function, [SIZE(0), shared])
            with part:
                generation = builder.add(values[2], SIZE(8 * GENERATION))
                builder.store_atomic(SIZE(STOPPED), builder.inttoptr(generation, SIZE.as_pointer()), "monotonic", 8)
        with cgutils.for_range(builder, builder.load(n_started)) as loop:
            _join(builder, builder.load(builder.gep(handles, [loop.index])))
        return all_there

    size = types.intp
    return types.boolean(function, size, size, arguments), generate


@intrinsic
def run_by_team(
    typing_context, function, gomp_parallel, get_thread_num, get_num_threads, team_size, n_threads, arguments
):
    """function(thread, *arguments) on threads 0 … n_threads − 1 of a team of `team_size`; False where it was not run.

    The second to the fourth are addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; function as for
    `run`. A team may turn out smaller than asked for (in a parallel region of the caller's, or by OMP_THREAD_LIMIT): if
    it has not n_threads members, none of them does anything.
    """

    def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
        member = _member(context, builder, function, values[6], arguments, [*values[2:4], values[5]])
        address = builder.inttoptr(values[1], ir.FunctionType(ir.VoidType(), [START, POINTER, INT, INT]).as_pointer())
        shared, size = builder.bitcast(member.shared, POINTER), builder.trunc(values[4], INT)
        builder.call(address, [_entry_of_team(builder.module, member), shared, size, INT(0)])
        return builder.icmp_signed("!=", _load(builder, member.shared, COUNT), SIZE(0))

    size = types.intp
    return types.boolean(function, size, size, size, size, size, arguments), generate


# What all threads share: a count, then what the entry reads, then the arguments

COUNT = 0


class Member(NamedTuple):
    """What a thread does: void function(thread, shared)."""

    function: Any
    shared: Any
    """In the frame of the thread that calls all others."""


def _member(
    context: Any, builder: Any, function: Any, values: Any, arguments: Any, of_entry: list[Any] | None = None
) -> Member:
    result = function.dispatcher.get_compile_result(signature(types.none, types.intp, *arguments.types))
    context.add_linking_libs([result._asdict()["library"]])
    own = [SIZE(0), *(of_entry or [])]
    entries = [*own, *cgutils.unpack_tuple(builder, values)]
    shared = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, entries))
    member, inside = _function(builder.module, "member", ir.VoidType(), [SIZE, POINTER])
    member.attributes.add("noinline")  # large, and called from two places
    entries = cgutils.unpack_tuple(inside, inside.load(inside.bitcast(member.args[1], shared.type)))
    context.call_internal_no_propagate(inside, result.fndesc, result.signature, [member.args[0], *entries[len(own) :]])
    inside.ret_void()
    return Member(member, shared)


def _function(module: Any, name: str, result: Any, parameters: list[Any]) -> tuple[Any, Any]:
    """A new function of the module's own, and a builder at its beginning."""
    function = ir.Function(module, ir.FunctionType(result, parameters), module.get_unique_name(name))
    function.linkage = "internal"
    return function, ir.IRBuilder(function.append_basic_block())


def _entry(module: Any, member: Member) -> Any:
    """What a thread is started with: it takes the next number."""
    entry, builder = _function(module, "entry", POINTER, [POINTER])
    count = cgutils.gep_inbounds(builder, builder.bitcast(entry.args[0], member.shared.type), 0, COUNT)
    thread = builder.add(builder.atomic_rmw("add", count, SIZE(1), "monotonic"), SIZE(1))
    builder.call(member.function, [thread, entry.args[0]])
    builder.ret(NULL)
    return entry


def _entry_of_team(module: Any, member: Member) -> Any:
    """What each thread of a team calls: it is one of the first n_threads, and says so once, or does nothing."""
    entry, builder = _function(module, "entry", POINTER, [POINTER])
    shared = builder.bitcast(entry.args[0], member.shared.type)
    asked = ir.FunctionType(INT, []).as_pointer()
    thread, size = (
        builder.sext(builder.call(builder.inttoptr(_load(builder, shared, place), asked), []), SIZE) for place in (1, 2)
    )
    n_threads = _load(builder, shared, 3)
    takes_part = builder.and_(builder.icmp_signed("<", thread, n_threads), builder.icmp_signed("<=", n_threads, size))
    with builder.if_then(takes_part):
        builder.call(member.function, [thread, entry.args[0]])
        with builder.if_then(builder.icmp_signed("==", thread, SIZE(0))):
            builder.store(SIZE(1), cgutils.gep_inbounds(builder, shared, 0, COUNT))
    builder.ret(NULL)
    return entry


def _load(builder: Any, shared: Any, place: int) -> Any:
    return builder.load(cgutils.gep_inbounds(builder, shared, 0, place))


# The system's threads


def _start_posix(builder: Any, handle: Any, entry: Any, shared: Any) -> Any:
    """Whether a thread was started."""
    create = _external(builder, "pthread_create", INT, [SIZE.as_pointer(), POINTER, START, POINTER])
    return builder.icmp_signed("==", builder.call(create, [handle, NULL, entry, shared]), INT(0))


def _join_posix(builder: Any, handle: Any) -> None:
    builder.call(_external(builder, "pthread_join", INT, [SIZE, POINTER]), [handle, NULL])


def _start_windows(builder: Any, handle: Any, entry: Any, shared: Any) -> Any:
    create = _external(builder, "CreateThread", SIZE, [POINTER, SIZE, START, POINTER, INT, POINTER])
    builder.store(builder.call(create, [NULL, SIZE(0), entry, shared, INT(0), NULL]), handle)
    return builder.icmp_signed("!=", builder.load(handle), SIZE(0))


def _join_windows(builder: Any, handle: Any) -> None:
    builder.call(_external(builder, "WaitForSingleObject", INT, [SIZE, INT]), [handle, INT(-1)])
    builder.call(_external(builder, "CloseHandle", INT, [SIZE]), [handle])


def _external(builder: Any, name: str, result: Any, parameters: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, parameters), name)


ON_WINDOWS = "windows" in llvmlite.binding.get_process_triple()
_start = _start_windows if ON_WINDOWS else _start_posix
_join = _join_windows if ON_WINDOWS else _join_posix


# The barrier: nobody goes on before all have arrived

# The last thread to arrive begins the next generation, and the others wait for that. What a thread has written to any
# array before `wait`, every thread sees after it: a thread's arrival releases its writes to the last one to arrive,
# which acquires them all and releases them with the new generation.

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


def new_barrier() -> Any:
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


_yield = types.ExternalFunction("SwitchToThread" if ON_WINDOWS else "sched_yield", types.int32())


@intrinsic
def load(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`; acquires what the thread that stored it had released."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], SIZE.as_pointer()), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Atomic, and no more: it releases nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], SIZE.as_pointer()), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to what lies at `address`, and returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], SIZE.as_pointer()), args[1], "acq_rel")

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
