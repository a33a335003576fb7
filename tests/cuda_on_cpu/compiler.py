"""CUDA C++ source to a shared object: rewriting what g++ does not know, building, keeping it on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["CompileError", "build", "cache_folder", "missing", "read_source", "source_lines"]

HERE = Path(__file__).parent
RUNTIME_SOURCES = ("runtime.cpp", "checker.cpp")
HEADERS = ("runtime.h", "state.h", "device.h", "intrinsics.h")

COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-march=native",
    "-fno-strict-aliasing",  # kernels read float arrays as float4
    "-fno-gnu-unique",  # static variables of templates are each module's own
    "-w",  # g++ warns of what nvcc takes: #pragma unroll, unused device functions
    "-fmax-errors=5",
)
FAST_FLAGS = ("-O2",)
CHECKED_FLAGS = (
    "-O1",
    "-DCUDA_ON_CPU_CHECKED=1",
    "-fsanitize=thread,alignment,bounds-strict,signed-integer-overflow,integer-divide-by-zero,shift",
    "-fsanitize-coverage=trace-pc",
    "-fno-finite-loops",  # C++ lets g++ take it that loops end
    "--param=tsan-instrument-func-entry-exit=0",
)


class CompileError(Exception):
    """The source is not what NVRTC would take, or g++ did not take it."""


def missing() -> str | None:
    """Why kernels cannot be run on this machine's CPU, or None where they can."""
    if os.uname().sysname != "Linux":
        return f"running CUDA kernels on the CPU needs Linux, and this is {os.uname().sysname}"
    if shutil.which("g++") is None:
        return "running CUDA kernels on the CPU needs g++ (apt install g++)"
    if shutil.which("addr2line") is None:
        return "running CUDA kernels on the CPU needs addr2line (apt install binutils)"
    return None


def cache_folder() -> Path:
    """Where what is built is kept: $BACKPROP_GPU_CUDA_ON_CPU_CACHE, or a folder beside other temporary files."""
    chosen = os.environ.get("BACKPROP_GPU_CUDA_ON_CPU_CACHE")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"backprop_gpu_cuda_on_cpu_{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Reading the source: quoted includes are put in place, as only then their __shared__ variables can be rewritten

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(["<])([^">\n]+)[">].*$')
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$", re.M)


def read_source(code: str, include_paths: Sequence[Path]) -> str:
    """`code` with all includes in place, between #line directives that keep errors at their file and line."""
    name = _file_name(code, include_paths)
    return "\n".join(_inline(code, name, include_paths, set()))


def _file_name(code: str, include_paths: Sequence[Path]) -> str:
    """The file that `code` was read from, if it is in an include path."""
    for folder in include_paths:
        for path in folder.glob("*.cu"):
            if path.read_text() == code:
                return path.name
    return "RawModule"


def _inline(code: str, name: str, include_paths: Sequence[Path], included: set[Path]) -> Iterable[str]:
    yield f'#line 1 "{name}"'
    for number, line in enumerate(_PRAGMA_ONCE.sub("", code).split("\n"), 1):
        match = _INCLUDE.match(line)
        if match is None:
            yield line
            continue
        path = _find(match[2], match[1] == '"', name, number, include_paths)
        if path not in included:
            text = path.read_text()
            if _PRAGMA_ONCE.search(text):
                included.add(path)
            yield from _inline(text, path.name, include_paths, included)
        yield f'#line {number + 1} "{name}"'


def _find(target: str, quoted: bool, name: str, number: int, include_paths: Sequence[Path]) -> Path:
    for folder in include_paths:
        if (folder / target).is_file():
            return (folder / target).resolve()
    kind = "file" if quoted else "header (NVRTC has no system headers)"
    raise CompileError(f"{name}({number}): catastrophic error: cannot open source {kind} {target!r}")


# Rewriting: g++ has no __shared__

_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
_SHARED = re.compile(r"(?<!\w)(extern\s+)?__shared__\s+([^;{}=]+);")
_ALIGNMENT = re.compile(r"^\s*(?:__align__|alignas)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)\s*")
_DECLARATOR = re.compile(r"^\s*(\w+)\s*((?:\[.*\])?)\s*$", re.S)
_WORDS_BEFORE_TYPE = {"volatile", "const", "typename", "unsigned", "signed", "long", "short", "struct"}


def rewrite(source: str) -> str:
    """Every `__shared__` declaration as a macro of device.h, launch bounds as a check; lines stay where they are."""
    source = _COMMENT_OR_STRING.sub(_blank_comment, source)
    source = _SHARED.sub(_rewrite_declaration, source)
    source = _check_launch_bounds(source)
    if re.search(r"(?<!\w)__shared__", source):
        raise CompileError("a __shared__ declaration that cuda_on_cpu does not know: write `__shared__ T name[n];`")
    return source


def _blank_comment(match: re.Match[str]) -> str:
    text = match[0]
    return text if text[0] in "\"'" else re.sub(r"[^\n]", " ", text)


def _rewrite_declaration(match: re.Match[str]) -> str:
    extern, declaration = match[1], match[2]
    alignment = "1"
    if found := _ALIGNMENT.match(declaration):
        alignment, declaration = found[1], declaration[found.end() :]
    type_, declarators = _split_type(declaration)
    macros = [_macro(extern, alignment, type_, declarator) for declarator in _split_commas(declarators)]
    return " ".join(macros) + "\n" * match[0].count("\n")


def _macro(extern: str | None, alignment: str, type_: str, declarator: str) -> str:
    match = _DECLARATOR.match(declarator)
    if match is None:
        raise CompileError(f"a __shared__ declaration that cuda_on_cpu does not know: {type_} {declarator}")
    name, dims = match[1], " ".join(match[2].split())
    if extern:
        return f"CUDA_ON_CPU_DYNAMIC_SHARED({name}, {type_})"
    # A comma in Tile<64, 8>::rows would end the macro's argument; in parentheses it does not. The type comes last.
    dims = re.sub(r"\[(.*?)\](?=\s*(?:\[|$))", r"[(\1)]", dims)
    return f"CUDA_ON_CPU_SHARED(({alignment}), {name}, {dims}, {type_})"


def _check_launch_bounds(source: str) -> str:
    """Puts the check of `__launch_bounds__(n)` at the beginning of the kernel's body."""
    pieces, start = [], 0
    for match in re.finditer(r"(?<!\w)__launch_bounds__\s*\(", source):
        end = _closing(source, match.end())
        body = re.compile(r"[{;]").search(source, end)
        if body is None or body[0] == ";":
            continue
        threads = _split_commas(source[match.end() : end])[0]
        pieces += [source[start : body.end()], f" CUDA_ON_CPU_LAUNCH_BOUNDS({' '.join(threads.split())})"]
        start = body.end()
    return "".join(pieces) + source[start:]


def _closing(text: str, position: int) -> int:
    """Where the parenthesis closes that was opened before `position`."""
    depth = 1
    while depth and position < len(text):
        depth += (text[position] == "(") - (text[position] == ")")
        position += 1
    return position - 1


def _split_type(declaration: str) -> tuple[str, str]:
    """`unsigned char a[2], b` to ("unsigned char", "a[2], b"): the type is words, one of them perhaps with <...>."""
    position, depth, words = 0, 0, []
    for token in re.finditer(r"::|\w+|<|>|.", declaration, re.S):
        if token[0] == "<":
            depth += 1
        elif token[0] == ">":
            depth -= 1
        if depth == 0 and re.fullmatch(r"\w+", token[0]):
            words.append(token.start())
        if depth == 0 and token[0] in "[,":
            break
    position = words[-1] if words else 0
    first_comma = _split_commas(declaration)[0]
    name = re.search(r"(\w+)\s*(?:\[.*)?$", first_comma, re.S)
    position = name.start(1) if name else position
    return " ".join(declaration[:position].split()), declaration[position:]


def _split_commas(text: str) -> list[str]:
    """Split at commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "<([") - (character in ">)]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


# Building

_KNOWN_OPTIONS = re.compile(
    r"(--?std=c\+\+\d+|--?D.+|-I.+|--include-path=.+|--define-macro=.+|--use_fast_math|--?fmad=\w+|--?lineinfo"
    r"|-lineinfo|--generate-line-info|--restrict|--extra-device-vectorization|--maxrregcount=\d+|-default-device"
    r"|--device-as-default-execution-space|-G|--ptxas-options=.*|--?w|--disable-warnings)"
)


def build(
    code: str, options: Sequence[str], names: Sequence[str], *, checked: bool, arch: str
) -> tuple[Path, list[str]]:
    """The shared object of a module, built unless it is on disk, and the names of its kernels in their order."""
    include_paths, defines = _parse(options)
    source = rewrite(read_source(code, include_paths))
    names = [*names, *_extern_c_kernels(source)]
    exports = "".join(f"CUDA_ON_CPU_EXPORT({i}, {name})\n" for i, name in enumerate(names))
    text = f'#include "device.h"\n{source}\n#line 1 "name_expressions"\n{exports}'
    flags = [*COMMON_FLAGS, *(CHECKED_FLAGS if checked else FAST_FLAGS), f"-D__CUDA_ARCH__={arch}0", "-D__CUDACC__=1"]
    flags += ["-D__CUDACC_RTC__=1", *defines, f"-I{HERE}"]
    key = _hash(text, *flags, _own_text(), _machine())
    target = cache_folder() / f"{key}.so"
    if not target.exists():
        _build_module(text, flags, target)
    return target, list(names)


def _parse(options: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The include paths, and the -D flags; other options of NVRTC change nothing here."""
    include_paths, defines = [], []
    for option in options:
        if not _KNOWN_OPTIONS.fullmatch(option):
            raise CompileError(f"nvrtc: error: unrecognized option {option} found")
        if option.startswith(("-I", "--include-path=")):
            include_paths.append(Path(option.removeprefix("--include-path=").removeprefix("-I")))
        elif option.startswith(("-D", "--define-macro=")):
            defines.append("-D" + option.removeprefix("--define-macro=").removeprefix("-D"))
    return include_paths, defines


def _extern_c_kernels(source: str) -> list[str]:
    launch_bounds = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    return re.findall(rf'extern\s+"C"\s+__global__\s+{launch_bounds}void\s+{launch_bounds}(\w+)\s*\(', source)


def _build_module(text: str, flags: list[str], target: Path) -> None:
    header = _compiled_header(flags)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, module = Path(folder) / "module.cpp", Path(folder) / "module.so"
        source.write_text(text)
        _run(["g++", f"-I{header.parent}", *flags, "-c", str(source), "-o", f"{source}.o"])
        # No -fsanitize here: the call-outs are answered by our own run-time. -Bsymbolic, or a kernel of the name `sync`
        # would be the C library's.
        _run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", str(module), f"{source}.o", str(runtime())])
        os.replace(module, target)


def _compiled_header(flags: list[str]) -> Path:
    """device.h for these flags, for g++ to read in 0.1 s in place of the 0.35 of a module's 0.5 to 0.7; 16 MB."""
    target = cache_folder() / f"header_{_hash(*flags, _own_text(), _machine())}" / "device.h.gch"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled = Path(folder) / target.name
            _run(["g++", *flags, "-x", "c++-header", str(HERE / "device.h"), "-o", str(compiled)])
            os.replace(compiled, target)
    return target


@functools.cache
def _own_text() -> str:
    return "".join((HERE / name).read_text() for name in (*RUNTIME_SOURCES, *HEADERS, "compiler.py"))


@functools.cache
def _machine() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo").read_text()
    return "".join(sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", info, re.M))))


def runtime() -> Path:
    """The run-time's shared object, which every module is linked to, so that all share its fibers."""
    target = cache_folder() / f"runtime_{_hash(_own_text(), _machine())}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            library = Path(folder) / target.name
            sources = [str(HERE / name) for name in RUNTIME_SOURCES]
            _run(["g++", "-std=c++17", "-O2", "-g1", "-fPIC", "-march=native", "-shared", *sources, "-o", str(library)])
            os.replace(library, target)
    return target


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr[:4000])


# Finding lines


def source_lines(module: Path, text: str) -> str:
    """`text` with each "@0x<offset>" as "at <file>:<line>", and the caller's line where that was inlined."""
    offsets = sorted(set(re.findall(r"@0x([0-9a-f]+)", text)))
    if not offsets:
        return text
    before = [hex(int(offset, 16) - 1) for offset in offsets]  # within the call, where the return address is after it
    command = ["addr2line", "--basenames", "--inlines", "--addresses", "-e", str(module), *before]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for block in re.split(r"^0x", output, flags=re.M)[1:]:
        address, *frames = block.split("\n")
        lines = [frame.split(" ")[0] for frame in frames if frame]
        ours = [line for line in lines if not line.startswith(HEADERS)] or lines
        place = f"at {ours[0]}" + "".join(f" (inlined at {line})" for line in ours[1:2])
        text = re.sub(rf"@0x0*{int(address, 16) + 1:x}\b", place, text)
    return text
