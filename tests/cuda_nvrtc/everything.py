"""Compiles every variant that the library may launch, to machine code, and says which use local memory.

    python tests/cuda_nvrtc/everything.py [architecture ...]

Some 8,500 variants for each of seven architectures, at about five a second and core. An array in local memory is an
error; a few bytes are spilled where the assembler prefers that to one block less at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # as the tests see it
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_nvrtc import compiler
from cuda_nvrtc.variants import ARCHITECTURES, Variant, everything

__all__: list[str] = []

PER_JOB = 4 * compiler.PER_PROGRAM


def _spilling(architecture: str, variants: Sequence[Variant]) -> list[str]:
    """Those of the variants that use local memory; CompileError if one does not compile."""
    return [
        f"{architecture}: {variant.expression}: {resources}"
        for compiled in compiler.compile_all(variants, architecture, machine_code=True)
        for variant, resources in compiled.resources.items()
        if resources.spilled or resources.arrays
    ]


def main(architectures: Sequence[str]) -> None:
    with ProcessPoolExecutor() as pool:
        for architecture in architectures:
            wanted = [variant for variant in everything() if variant.runs_on(architecture)]
            jobs = [wanted[i : i + PER_JOB] for i in range(0, len(wanted), PER_JOB)]
            spilling = [line for lines in pool.map(_spilling, [architecture] * len(jobs), jobs) for line in lines]
            print(*spilling, sep="\n")
            print(f"{architecture}: {len(wanted)} variants compiled, {len(spilling)} use local memory", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ARCHITECTURES)
