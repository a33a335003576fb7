"""Compiles every variant that the library may launch, to machine code, and says which spill registers.

    python tests/cuda_nvrtc/everything.py [--kernel NAME ...] [--minutes N] [--record FILE] [architecture ...]

Some 8,500 variants for each of seven architectures, at about five a second and core. What is compiled is written down
in everything.jsonl beside this file, and left out by later calls until a source, an option or NVRTC is another, so that
all can be done in pieces of some `--minutes`. The order is drawn, the same each time: a piece is a sample of all.

An array in local memory is an error; a few bytes are spilled where the assembler prefers that to one block less at
once. Of what has been compiled, one variant in sixty spills, 20 bytes at most, but dense_backward with dropout in the
64 x 64 tile of float32: with some activations 44 to 72 from 8.0 on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # as the tests see it
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_nvrtc import compiler
from cuda_nvrtc.variants import ARCHITECTURES, KERNELS, Variant, assertions, everything, options

__all__ = ["Job", "jobs", "remaining", "report", "run", "sources"]

RECORD = Path(__file__).with_suffix(".jsonl")


class Job(NamedTuple):
    """One program, of variants that are in one file."""

    architecture: str
    variants: tuple[Variant, ...]

    def key(self, sources: str) -> str:
        """Of all that its machine code depends on."""
        of_host = assertions(self.variants[0].file, self.architecture)
        names = (self.architecture, *(variant.expression for variant in self.variants))
        return hashlib.sha256("\n".join((sources, of_host, *names)).encode()).hexdigest()[:16]


def sources() -> str:
    """What all programs depend on."""
    files = sorted(Path(KERNELS.folder).glob("*.cu*"))
    return "\n".join((compiler.version(), *options(), *(file.read_text() for file in files)))


def jobs(architectures: Sequence[str], kernels: Sequence[str]) -> list[Job]:
    """Programs for the architectures, of the kernels of these names, or of all; in an order that is drawn."""
    variants = [variant for variant in everything() if not kernels or variant.operation in kernels]

    def of(architecture: str) -> Iterator[Job]:
        wanted = [variant for variant in variants if variant.runs_on(architecture)]
        for _, of_file in groupby(sorted(wanted, key=lambda variant: variant.file), lambda variant: variant.file):
            rest = tuple(of_file)
            while rest:
                yield Job(architecture, rest[: compiler.PER_PROGRAM])
                rest = rest[compiler.PER_PROGRAM :]

    drawn = [job for architecture in architectures for job in of(architecture)]
    random.Random(0).shuffle(drawn)
    return drawn


def done(record: Path) -> dict[str, list[str]]:
    """What spills, by the keys of the jobs that are done."""
    lines = record.read_text().splitlines() if record.exists() else []
    return dict(json.loads(line) for line in lines)


def remaining(wanted: Sequence[Job], record: Path) -> list[Job]:
    """Those that are not done."""
    known, common = done(record), sources()
    return [job for job in wanted if job.key(common) not in known]


def compiled(job: Job) -> list[str]:
    """Which of the job's variants spill; CompileError if one does not compile, or has an array in local memory."""
    spilling = []
    for program in compiler.compile_all(job.variants, job.architecture, machine_code=True):
        for variant, resources in program.resources.items():
            line = f"{job.architecture}: {variant.expression}: {resources}"
            if resources.arrays:
                raise compiler.CompileError(line)
            if resources.spilled:
                spilling.append(line)
    return spilling


def run(wanted: Sequence[Job], record: Path, minutes: float) -> None:
    """As many of the jobs as there is time for."""
    end, common = time.monotonic() + 60 * minutes, sources()
    with record.open("a") as file, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for job, spilling in zip(wanted, pool.map(_before, repeat(end), wanted), strict=False):
            if spilling is not None:
                print(json.dumps((job.key(common), spilling)), file=file, flush=True)


def _before(end: float, job: Job) -> list[str] | None:
    return compiled(job) if time.monotonic() < end else None


def report(wanted: Sequence[Job], record: Path) -> None:
    """What is done of each architecture, and what spills."""
    known, common = done(record), sources()
    for architecture in sorted({job.architecture for job in wanted}, key=int):
        there = [job for job in wanted if job.architecture == architecture]
        ready = [job for job in there if job.key(common) in known]
        spilling = [line for job in ready for line in known[job.key(common)]]
        n_ready, n_all = (sum(len(job.variants) for job in some) for some in (ready, there))
        print(*spilling, sep="\n", end="\n" if spilling else "")
        print(f"{architecture}: {n_ready} of {n_all} variants compiled, {len(spilling)} spill", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="architecture", help="75, 80, …")
    parser.add_argument("--kernel", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when no more programs are begun")
    parser.add_argument("--record", type=Path, default=RECORD, help=f"of what is done ({RECORD})")
    chosen = parser.parse_args()
    wanted = jobs(chosen.architectures, chosen.kernel)
    run(remaining(wanted, chosen.record), chosen.record, chosen.minutes)
    report(wanted, chosen.record)


if __name__ == "__main__":
    main()
