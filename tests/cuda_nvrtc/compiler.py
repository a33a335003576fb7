"""NVRTC from its Python wheel: PTX or machine code of kernels, and what the assembler says about each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .variants import Variant, assertions, options

__all__ = [
    *("Compiled", "CompileError", "Resources"),
    *("architectures", "compile_all", "disassemble", "disassembler", "missing", "version"),
]

PER_PROGRAM = 24
"""Kernels of one program: an error is found sooner in few, and reading the headers costs little."""


class CompileError(Exception):
    """What NVRTC says."""


class Resources(NamedTuple):
    """What a thread, or a block, of a kernel takes."""

    registers: int
    spilled: int
    """Bytes of local memory for want of registers."""
    arrays: int
    """Bytes of local memory for arrays, which have to be there when an index is known at run time only."""
    static_shared: int


@dataclass
class Compiled:
    """A program for one architecture; without a cubin where only PTX was asked for."""

    architecture: str
    ptx: str = ""
    cubin: bytes = b""
    resources: dict[Variant, Resources] = field(default_factory=dict)
    names: dict[Variant, str] = field(default_factory=dict)
    """As they are in the PTX and in the machine code."""


def missing() -> str | None:
    """Why nothing can be compiled here, or None where it can."""
    for wheel in ("cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            return (
                f"compiling the CUDA kernels needs {wheel} (pip install {wheel}), which is there for Linux and Windows"
            )
    return None


def version() -> str:
    """Of NVRTC, as its wheel's name has it: 13.5.37."""
    return importlib.metadata.version("nvidia-cuda-nvrtc")


def architectures() -> list[int]:
    """Compute capabilities, times ten, that this NVRTC compiles for."""
    from cuda.bindings import nvrtc

    (numbers,) = _checked(nvrtc.nvrtcGetSupportedArchs())
    return list(numbers)


def compile_all(
    variants: Sequence[Variant], architecture: str, *, machine_code: bool, flags: Sequence[str] = options()
) -> Iterator[Compiled]:
    """All variants that are for the architecture, a program each for some of them."""
    wanted = [variant for variant in variants if variant.runs_on(architecture)]
    for file, of_file in groupby(sorted(wanted, key=lambda variant: variant.file), lambda variant: variant.file):
        rest = list(of_file)
        while rest:
            yield _compile(file, rest[:PER_PROGRAM], architecture, machine_code, flags)
            rest = rest[PER_PROGRAM:]


def _compile(
    file: str, variants: Sequence[Variant], architecture: str, machine_code: bool, flags: Sequence[str]
) -> Compiled:
    from cuda.bindings import nvrtc

    code = f'#include "{file}"\n{assertions(file, architecture)}\n'
    (program,) = _checked(nvrtc.nvrtcCreateProgram(code.encode(), b"program.cu", 0, [], []))
    try:
        for variant in variants:
            _checked(nvrtc.nvrtcAddNameExpression(program, variant.expression.encode()))
        kind = ("-arch=sm_", "--ptxas-options=-v") if machine_code else ("-arch=compute_",)
        all_flags = [flag.encode() for flag in (*flags, kind[0] + architecture, *kind[1:])]
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(all_flags), all_flags)
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or "warning" in log:
            raise CompileError(f"{file} for {architecture}:\n{log}")
        compiled = Compiled(architecture)
        for variant in variants:
            (name,) = _checked(nvrtc.nvrtcGetLoweredName(program, variant.expression.encode()))
            compiled.names[variant] = name.decode()
        if machine_code:
            compiled.cubin = _bytes(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            of_name = _resources(log)
            compiled.resources = {variant: of_name[name] for variant, name in compiled.names.items()}
        else:
            compiled.ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        return compiled
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple) -> list:
    status, *values = answer
    if status.value != 0:
        raise CompileError(status.name)
    return values


def _bytes(program, size, get) -> bytes:
    (n,) = _checked(size(program))
    filled = bytes(n + 1)  # NVRTC writes into it, and Python shares those of one byte: an empty log would change b" "
    _checked(get(program, filled))
    return filled[:n]


def _text(program, size, get) -> str:
    return _bytes(program, size, get).rstrip(b"\0").decode()


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")
_USED = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")


def _resources(log: str) -> dict[str, Resources]:
    """By the kernels' lowered names, from what `ptxas -v` prints."""
    found = {}
    for text in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = _ENTRY.match(text)[1]
        stack, spilled = map(int, _STACK.search(text).groups())
        shared = _STATIC_SHARED.search(text)
        arrays = 0 if spilled else stack  # a stack frame is a multiple of 8 bytes, and may be larger than its spills
        found[name] = Resources(int(_USED.search(text)[1]), spilled, arrays, int(shared[1]) if shared else 0)
    return found


# Machine code


def disassembler() -> Path | None:
    """nvdisasm of its wheel."""
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = list(spec.submodule_search_locations) if spec else []
    return next((path for folder in folders if (path := Path(folder) / "bin" / "nvdisasm").exists()), None)


def disassemble(compiled: Compiled) -> dict[Variant, list[str]]:
    """The instructions of each kernel, without their operands."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        command = [str(disassembler()), "-c", "-ndf", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^//-+ \.text\.(\w+) -+$", text, flags=re.M)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)", re.M)
    return {variant: instruction.findall(code[name]) for variant, name in compiled.names.items()}
