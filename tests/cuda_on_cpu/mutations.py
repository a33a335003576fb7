"""Small mistakes in CUDA C++: every place of a source where one can be made, one `Mutation` each.

Left alone are comments, directives and assertions, parameter lists of templates, and what says how fast and not what:
`#pragma unroll`, launch bounds, the padding of tiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutation", "mutations"]


@dataclass(frozen=True)
class Mutation:
    """One change of one line."""

    file: str
    line: int
    kind: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        lines = text.split("\n")
        assert lines[self.line - 1] == self.old
        lines[self.line - 1] = self.new
        return "\n".join(lines)

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}: {self.old.strip()} => {self.new.strip()}"


SKIPPED_LINES = re.compile(
    r"^\s*(?:#|//|template\b|typedef\b|using\b|static_assert\b|struct\b|class\b|enum\b|typedef\b|private:|extern\b)"
    r"|__launch_bounds__|__launch_bounds|\boperator\b|__global__"
)
SKIPPED_DEFINITIONS = re.compile(
    r"\b(?:STRIDE|C_STRIDE|FROM_Z|AT_ONCE|PASSES|M|N|K|SLICES|STAGES|THREADS|GATHER_THREADS|DELTA_THREADS"
    r"|OUTPUT_THREADS|UPDATE_THREADS) = "
)
"""Padding, and what the planner's table has as well: tests of the compiled sources compare the two."""

STATEMENT = re.compile(r"^(?P<indent>\s+)(?P<statement>[^{}]*;)\s*$")
DECLARATION = re.compile(
    r"^\s*(?:const|constexpr|static|typedef|using|unsigned|int|long|float|double|bool|char|return|break|continue|"
    r"extern|__shared__|auto|T|Sum|Input|Quad<|Chunk<|Fragment<|Product<|Gradient|ColumnSums<|NoObserver|Compute<|"
    r"typename|volatile|Target<|Place|Stretch|StepNumbers|else|case|default|public|private)\b"
)

REPLACEMENTS: tuple[tuple[str, str, str], ...] = (
    ("comparison", r" < ", " <= "),
    ("comparison", r" <= ", " < "),
    ("comparison", r" > ", " >= "),
    ("comparison", r" >= ", " > "),
    ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("logic", r" && ", " || "),
    ("logic", r" \|\| ", " && "),
    ("logic", r"!(?=[\w(])", ""),
    ("logic", r"\btrue\b", "false"),
    ("logic", r"\bfalse\b", "true"),
    ("sign", r" \+ ", " - "),
    ("sign", r" - ", " + "),
    ("sign", r" \+= ", " -= "),
    ("sign", r" -= ", " += "),
    ("sign", r"(?<=[(,=?:] )-(?=[\w(])|(?<=\()-(?=[\w(])", ""),
    ("operator", r" \* ", " + "),
    ("operator", r" / ", " * "),
    ("operator", r" % ", " / "),
    ("operator", r" \*= ", " = "),
    ("operator", r" /= ", " *= "),
    ("operator", r" \+= ", " = "),
    ("off by one", r" - 1\b(?!\.)", ""),
    ("off by one", r" \+ 1\b(?!\.)", ""),
    ("constant", r"(?<![\w.<])(?:0|1|2|3)(?![\w.])", "{+1}"),
    ("constant", r"(?<![\w.<])(?:4|8|16|32)(?![\w.])", "{*2}"),
    ("constant", r"\b\d+\.\d+(?=[^\w.e])", "{*1.01}"),
    ("constant", r"0x[0-9A-F]{8}u", "{+1}"),
    ("dropped term", r" [+-] [\w.\[\]]+(?=[;,)])", ""),
    ("dropped factor", r" [*] [\w.\[\]]+(?=[;,) ])", ""),
    ("guard", r"\bif \((?!constexpr)", "if (true || "),
    ("guard", r"(?<=[:=] )0 : ", "1 : "),
)

SWAPPED_NAMES = (
    *(
        "row column",
        "m n",
        "m0 n0",
        "row0 column0",
        "a_tile b_tile",
        "a_prev delta",
        "row_end column_end",
        "left right",
    ),
    *("n_in n_out", "n_rows n_out", "n_next n_out", "blockIdx.x blockIdx.y", "A_ALONG B_ALONG", "k_begin k_end"),
    *("ROWS COLUMNS", "row_place column_place", "warp_m warp_n", "WARP_M WARP_N", "parts parts_b", "slot_1 slot_2"),
    *("s1 s2", "fits b_fits", "a_fits z_fits", "values bias", "high0 high1", "low0 low1", "k0 k1", "m v", "step layer"),
    *("beta_1 beta_2", "correction_1 correction_2", "keep scale", "g w", "label values", "begin parts_begin"),
    *("delta_fits kept_fits", "data batch", "from to", "largest total", "z a", "C_ROWS C_STRIDE", "ahead tile", "i j"),
)
OPPOSITE = dict(pair for names in SWAPPED_NAMES for pair in (names.split(), names.split()[::-1]))

TERNARY = re.compile(r"(?<=[=(,&] )?([\w.()<>= !+\-*/\[\]]+?) \? ([^?:]+) : ([^?:;]+)(?=;)")


def mutations(folder: Path) -> list[Mutation]:
    """All of a folder's sources but intrinsics.cuh, which the CPU replaces."""
    files = sorted([*folder.glob("*.cuh"), *folder.glob("*.cu")])
    return [mutation for path in files if path.name != "intrinsics.cuh" for mutation in _of_file(path)]


def _of_file(path: Path) -> Iterator[Mutation]:
    seen, text = set(), path.read_text()
    names = set(re.findall(r"[A-Za-z_][\w.]*", text))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or SKIPPED_LINES.search(line) or SKIPPED_DEFINITIONS.search(line):
            continue
        for kind, new in _of_line(line, names):
            if new != line and (number, new) not in seen:
                seen.add((number, new))
                yield Mutation(path.name, number, kind, line, new)


def _of_line(line: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """(kind, changed line), with names that the file has."""
    signature, code, comment = _split(line)
    for kind, new in _of_code(code, names):
        yield kind, signature + new + comment


def _of_code(code: str, names: set[str]) -> Iterator[tuple[str, str]]:
    match = STATEMENT.match(code)
    if match and not DECLARATION.match(code) and _balanced(match["statement"]):
        yield "dropped statement", f"{match['indent']};"
    for kind, pattern, replacement in REPLACEMENTS:
        for found in re.finditer(pattern, code):
            new = _replacement(found[0], replacement)
            if kind == "comparison" and _is_bound(code, found.start()):
                continue
            if replacement.startswith("if (true") and not _closes(code, found.end()):
                continue
            yield kind, code[: found.start()] + new + code[found.end() :]
    for found in re.finditer(r"[A-Za-z_][\w.]*", code):
        if OPPOSITE.get(found[0]) in names:
            yield "wrong name", code[: found.start()] + OPPOSITE[found[0]] + code[found.end() :]
    if ternary := TERNARY.search(code):
        condition, yes, no = ternary.groups()
        yield "swapped operands", code[: ternary.start()] + f"{condition} ? {no} : {yes}" + code[ternary.end() :]


def _split(line: str) -> tuple[str, str, str]:
    """A function's signature, which stays as it is, the code, and the comment."""
    end = line.find("//") if "//" in line else len(line)
    begin = line.find("{", 0, end) + 1 if "__device__" in line else 0
    if "__device__" in line and not begin:
        begin = end
    return line[:begin], line[begin:end], line[end:]


def _replacement(old: str, new: str) -> str:
    if new == "{+1}":
        return f"0x{int(old[:-1], 16) + 1:X}u" if old.startswith("0x") else str(int(old) + 1)
    if new == "{*2}":
        return str(2 * int(old))
    if new == "{*1.01}":
        return str(float(old) * 1.01 or 0.01)
    return new


def _closes(code: str, begin: int) -> bool:
    """Whether the bracket that is open at `begin` closes in this line."""
    depth = 1
    for character in code[begin:]:
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return True
    return False


CHOICE = re.compile(r"([^=,;?:(]+) [<>]=? ([^,;?:]+?) \? ([^,;?:]+) : ([^,;?:]+?)(?=[;,]|\)*;|$)")


def _is_bound(code: str, at: int) -> bool:
    """Whether the comparison at `at` picks the smaller or the larger: of two equals, either."""
    return any(
        choice.start() <= at < choice.start(3) and {choice[1].strip(), choice[2]} == {choice[3], choice[4].strip(") ")}
        for choice in CHOICE.finditer(code)
    )


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in ("()", "[]"))
