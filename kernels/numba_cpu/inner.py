"""Functions that only other compiled functions call: translated each by itself, optimised where they end up.

Numba optimises every function with all that it calls, and makes machine code of that, though machine code is wanted
for the entry points alone. At ten levels of calls, a training step so went through LLVM ten times: 32 s; now 15.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

__all__ = ["InnerCompiler"]


class InnerCompiler(CompilerBase):  # type: ignore[misc]
    """Numba's compiler, as `pipeline_class`, for such a function; called from Python, it raises TypeError."""

    def define_pipelines(self) -> list[Any]:
        """One pipeline: Numba's own."""
        state = self.state
        state.flags.no_cpython_wrapper = state.flags.no_cfunc_wrapper = True
        state["library"] = InnerLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(state)]


class InnerLibrary(JITCodeLibrary):  # type: ignore[misc]
    """LLVM code of a function and of those that it calls, to be linked into that of its caller."""

    def _optimize_final_module(self) -> None:
        """Not here."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """What Python gets to call; Numba asks for it when it has compiled a function."""
        return _refusal()

    @property
    def codegen(self) -> InnerLibrary:
        """Numba gives a function's environment to the machine code that has been loaded: none of this has."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """See `codegen`."""


@cache
def _refusal() -> int:
    """The address of a function that says TypeError to whatever Python calls it with."""
    only_compiled_code_may_call_this.compile(())
    result = only_compiled_code_may_call_this.overloads[()]._asdict()
    return int(result["library"].get_pointer_to_function(result["fndesc"].llvm_cpython_wrapper_name))


@numba.njit
def only_compiled_code_may_call_this() -> None:
    """See `entry_point` for a function that Python may call."""
    raise TypeError("only compiled code may call this")
