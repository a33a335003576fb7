"""A function on all threads of the team that another library's OpenMP keeps, called from compiled code.

PyTorch's threads wait for the next piece of work for a while by looking for it again and again, and so take a piece
over in 2 µs; but a thread that is started beside them shares a core with one that waits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

__all__ = ["run"]

POINTER, INT, SIZE = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)


@intrinsic
def run(typing_context, function, gomp_parallel, get_thread_num, get_num_threads, team_size, n_threads, arguments):
    """function(thread, *arguments) on threads 0 … n_threads − 1 of a team of `team_size`; False where it was not run.

    The second to the fourth are addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; function is
    `compiled`, and its result is dropped. A team may turn out smaller than asked for (in a parallel region of the
    caller's, or by OMP_THREAD_LIMIT): if it has not n_threads members, none of them does anything.
    """
    of_function = signature(types.none, types.intp, *arguments.types)

    def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
        result = function.dispatcher.get_compile_result(of_function)
        context.add_linking_libs([result._asdict()["library"]])
        shared = [*values[2:4], values[5], *cgutils.unpack_tuple(builder, values[6]), SIZE(0)]
        memory = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, shared))
        member = _member(context, builder.module, memory.type, result)
        address = builder.inttoptr(
            values[1], ir.FunctionType(ir.VoidType(), [member.type, POINTER, INT, INT]).as_pointer()
        )
        data, size = builder.bitcast(memory, POINTER), builder.trunc(values[4], INT)
        builder.call(address, [member, data, size, INT(0)])
        done = builder.load(cgutils.gep_inbounds(builder, memory, 0, len(shared) - 1))
        return builder.icmp_signed("!=", done, SIZE(0))

    size = types.intp
    return types.boolean(function, size, size, size, size, size, arguments), generate


def _member(context: Any, module: Any, shared: Any, result: Any) -> Any:
    """void member(void *data), what each thread of the team calls."""
    name = module.get_unique_name("member")
    member = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
    member.linkage = "internal"
    builder = ir.IRBuilder(member.append_basic_block())
    memory = builder.bitcast(member.args[0], shared)
    get_thread_num, get_num_threads, n_threads, *arguments, _ = cgutils.unpack_tuple(builder, builder.load(memory))
    kind = ir.FunctionType(INT, []).as_pointer()
    thread, size = (
        builder.sext(builder.call(builder.inttoptr(address, kind), []), SIZE)
        for address in (get_thread_num, get_num_threads)
    )
    takes_part = builder.and_(builder.icmp_signed("<", thread, n_threads), builder.icmp_signed("<=", n_threads, size))
    with builder.if_then(takes_part):
        context.call_internal_no_propagate(builder, result.fndesc, result.signature, [thread, *arguments])
        with builder.if_then(builder.icmp_signed("==", thread, SIZE(0))):
            builder.store(SIZE(1), cgutils.gep_inbounds(builder, memory, 0, len(arguments) + 3))
    builder.ret_void()
    return member
