"""The table `kernels/cuda/resources.tsv`: registers of each kernel on each architecture, and its shared memory.

    python tests/cuda_nvrtc/resources.py

makes it anew, in a minute or two. `96+8` is 96 registers and 8 bytes of others in local memory: the assembler prefers
that where it lets one more block run at once. An array in local memory, or more than a few bytes, is an error.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as the tests see it
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_nvrtc import compiler
from cuda_nvrtc.compiler import Resources
from cuda_nvrtc.variants import ARCHITECTURES, Variant, representative

__all__ = ["MOST_SPILLED", "Row", "Table", "most_registers", "read"]

TABLE = Path(__file__).parents[2] / "kernels" / "cuda" / "resources.tsv"
REGISTERS_OF_PROCESSOR = 1 << 16
MOST_SPILLED = 8
"""Bytes; and on an architecture whose machine code the tests look at, none."""


@dataclass(frozen=True)
class Row:
    """One kernel."""

    used: dict[str, tuple[int, int]]
    """Registers, and bytes that are spilled, by the architectures that it is for."""
    shared_bytes: int
    static_shared: int


@dataclass(frozen=True)
class Table:
    nvrtc: str
    rows: dict[str, Row]
    """By name expression."""


def most_registers(variant: Variant) -> int:
    """With which a block can be launched at all: they are dealt by eights, and a thread has 255 at most."""
    return min(255, REGISTERS_OF_PROCESSOR // variant.threads // 8 * 8)


def read() -> Table:
    first, _, *lines = TABLE.read_text().splitlines()
    rows = {}
    for line in lines:
        *numbers, shared, static, expression = line.split("\t")
        used = {a: _parse(entry) for a, entry in zip(ARCHITECTURES, numbers, strict=True) if entry != "-"}
        rows[expression] = Row(used, int(shared), int(static))
    return Table(first.split()[-1], rows)


def _parse(entry: str) -> tuple[int, int]:
    registers, _, spilled = entry.partition("+")
    return int(registers), int(spilled or 0)


def _entry(resources: Resources | None) -> str:
    if resources is None:
        return "-"
    return f"{resources.registers}+{resources.spilled}" if resources.spilled else str(resources.registers)


def _measured(architecture: str) -> dict[Variant, Resources]:
    found: dict[Variant, Resources] = {}
    for compiled in compiler.compile_all(representative(), architecture, machine_code=True):
        found.update(compiled.resources)
    return found


def write() -> None:
    with ProcessPoolExecutor() as pool:
        of = dict(zip(ARCHITECTURES, pool.map(_measured, ARCHITECTURES), strict=True))
    lines = [
        f"# Registers a thread by compute capability, and bytes of shared memory; by NVRTC {compiler.version()}",
        "\t".join([*ARCHITECTURES, "shared", "static", "kernel"]),
    ]
    for variant in representative():
        there = [of[architecture].get(variant) for architecture in ARCHITECTURES]
        used = [resources for resources in there if resources]
        if any(resources.arrays or resources.spilled > MOST_SPILLED for resources in used):
            sys.exit(f"{variant.expression} uses local memory: {used}")
        numbers = [*map(_entry, there), str(variant.shared_bytes), str(used[-1].static_shared)]
        lines.append("\t".join([*numbers, variant.expression]))
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
