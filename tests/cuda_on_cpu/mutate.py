"""Mutates the kernels of `kernels/cuda/` one line at a time, and says which mutants no case of `cases.py` notices.

    python tests/cuda_on_cpu/mutate.py --sample 300 --out mutants.jsonl

A mutant is killed when a checked run of a case fails, whether by its numbers, a race, an access out of bounds, a
read of what nobody wrote, a deadlock, or no end; or by the static_asserts that the tests compile with NVRTC. One that
does not compile counts for nothing, nor does one of which NVRTC makes the same PTX as of the original, or of which
`mutants.md` gives the reason why no run can tell it from the original; a row of that list is an error where its
mutation can no longer be made. What is known of other survivors is in `mutants.md` as well. Results are kept in --out
as they come, so a run that was cut short goes on where it was.
Functions of intrinsics.cuh are the emulator's own on the CPU, so mutants of them would not run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias
from unittest import mock

if __name__ == "__main__":  # as the tests see it
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_nvrtc import compiler as nvrtc
from cuda_nvrtc.variants import Variant, covering

from cuda_on_cpu import compiler, emulated
from cuda_on_cpu.cases import CASES, Case, Device
from cuda_on_cpu.kernels import CompileException
from cuda_on_cpu.mutations import Mutation, mutations

KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
KNOWN = Path(__file__).with_name("mutants.md")
EQUIVALENT = "No run can tell it from the original"
"""The heading of `mutants.md` under which a reason proves it."""
CACHE = "BACKPROP_GPU_CUDA_ON_CPU_CACHE"
SECONDS = 240
"""Of one process on the processor, after which a mutant counts as killed: all cases take a fifth of it."""
STEP_LIMIT = 10**8
"""More than any case takes."""
SYNCHRONISATION = re.compile(r"__sync|copy_async|__threadfence|is_last_block")


@dataclass
class Result:
    """What became of a mutant: "killed", "survived", "invalid" or "equivalent", and which case and message said so."""

    key: str
    kind: str
    verdict: str
    by: str


# Which cases see a mutation


def included(file: Path) -> set[str]:
    """The file and all that it includes."""
    names = re.findall(r'^#include "([^"]+)"', file.read_text(), re.M)
    return {file.name}.union(*(included(file.parent / name) for name in names))


def enclosing(text: str, line: int) -> set[str]:
    """Names of the struct and of the function that the line is in."""
    before = text.split("\n")[:line]
    structs = [m[1] for row in before if (m := re.match(r"struct (?:alignas\([^)]*\) )?(\w+)", row))]
    functions = [m[1] for row in before if (m := re.search(r"(?:__device__.*?|^ +)\b(\w+)\((?!.*;$)", row))]
    closed = next((row for row in reversed(before) if row.startswith("}")), "")
    return {*(structs[-1:] if closed != "};" or before[-1].startswith(" ") else []), *functions[-1:]}


def cases_for(mutation: Mutation) -> list[Case]:
    """The cases that compile the mutated line, those that are about it first."""
    names = enclosing((KERNELS / mutation.file).read_text(), mutation.line) | {mutation.file}
    files = {path.stem for path in KERNELS.glob("*.cu") if mutation.file in included(path)}
    seen = [case for case in CASES if case.file in files]
    if mutation.file == "activations.cuh":  # a struct that only its own cases enter, or a function of some
        about = [case for case in seen if names & set(case.words)]
        seen = about or [case for case in seen if case.name[3:].startswith("activation")]
    return sorted(seen, key=lambda case: not names & set(case.words))


# One mutant, in a process of its own


def judge(mutation: Mutation) -> tuple[str, str]:
    """(verdict, by) of running the cases on the mutated sources."""
    with tempfile.TemporaryDirectory() as folder, _built_modules_removed():
        mutated = Path(shutil.copytree(KERNELS, Path(folder) / "cuda"))
        source = mutated / mutation.file
        source.write_text(mutation.apply(source.read_text()))
        for case in cases_for(mutation):
            try:
                case.run(Device(emulated(checked=True, step_limit=STEP_LIMIT), mutated))
            except CompileException as error:
                return "invalid", _first_line(error)
            except Exception as error:
                return "killed", f"{case.name}: {type(error).__name__}: {_first_line(error)}"
        return _compiled(mutation, mutated)


def _compiled(mutation: Mutation, mutated: Path) -> tuple[str, str]:
    """What NVRTC, where it is there, says of one that no case notices."""
    if nvrtc.missing() is None:
        files = {path.name for path in KERNELS.glob("*.cu") if mutation.file in included(path)}
        about = [variant for variant in covering() if variant.file in files]
        try:
            if _same_ptx(about, mutated):
                return "equivalent", "the same PTX"
        except nvrtc.CompileError as error:
            return "killed", f"NVRTC: {_first_line(error)}"
    return "survived", f"{len(cases_for(mutation))} cases"


def _same_ptx(variants: Sequence[Variant], mutated: Path) -> bool:
    programs = (
        nvrtc.compile_all(variants, "80", machine_code=False, flags=("-std=c++17", f"-I{folder}"))
        for folder in (mutated, KERNELS)
    )
    return all(mutant.ptx == original.ptx for mutant, original in zip(*programs, strict=True))


@contextmanager
def _built_modules_removed() -> Iterator[None]:
    """Nobody will ask the cache for a mutant again."""
    build, built = compiler._build_module, []

    def noting(text: str, flags: list[str], target: Path) -> None:
        built.append(target)
        build(text, flags, target)

    try:
        with mock.patch.object(compiler, "_build_module", noting):
            yield
    finally:
        for path in built:
            path.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).split("\n") if line.strip()]
    return " ".join(lines[:2])[:200]


def _judge_apart(mutation: Mutation) -> Result:
    command = [sys.executable, __file__, "--one", json.dumps(asdict(mutation))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 0:  # this script's own mistake
        raise RuntimeError(done.stderr)
    verdict, by = json.loads(done.stdout) if done.returncode == 0 else ("killed", f"signal {-done.returncode}")
    return Result(mutation.key, mutation.kind, verdict, by)


# All of them


def chosen(sample: int, seed: int) -> list[Mutation]:
    """A sample of all mutations, and every one of a barrier, a fence or a copy's commit or wait."""
    everything = mutations(KERNELS)
    synchronisation = [m for m in everything if m.kind == "dropped statement" and SYNCHRONISATION.search(m.old)]
    rest = [m for m in everything if m not in synchronisation]
    picked = rest if sample <= 0 else random.Random(seed).sample(rest, min(sample, len(rest)))
    return synchronisation + picked


def check_cases() -> None:
    """Fills the cache, and makes sure that the kernels as they are pass."""
    for case in CASES:
        case.run(Device(emulated(checked=True, step_limit=STEP_LIMIT)))


def run(wanted: Sequence[Mutation], out: Path, workers: int) -> Iterator[Result]:
    """The results of all wanted mutants, those that `out` has already among them."""
    done = {row["key"]: Result(**row) for row in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    yield from (done[mutation.key] for mutation in wanted if mutation.key in done)
    left = [mutation for mutation in wanted if mutation.key not in done]
    if not left:
        return
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {CACHE: cache}):
        check_cases()
        with ThreadPoolExecutor(workers) as pool, out.open("a") as file:
            for result in pool.map(_judge_apart, left):
                print(json.dumps(asdict(result)), file=file, flush=True)
                yield result


# What is known of survivors

Place: TypeAlias = tuple[str, str]
"""The file and the change of a mutation; lines move."""


def place(key: str) -> Place:
    """Of a mutation's key."""
    before, change = key.split(": ", 1)
    return before.split(":")[0], change


def known() -> dict[Place, str]:
    """The heading in `mutants.md` under which each known survivor stands."""
    found, heading = {}, ""
    for line in KNOWN.read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif row := re.match(r"\| `([^`]+)` \| `(.+)` \| ", line):
            found[row[1], row[2].replace("\\|", "|")] = heading
    return found


def outdated() -> list[Place]:
    """Known survivors that can no longer be made, and equivalent ones of which it is not clear which they are."""
    possible = Counter(place(mutation.key) for mutation in mutations(KERNELS))
    return [
        row for row, heading in known().items() if possible[row] != 1 and (heading == EQUIVALENT or not possible[row])
    ]


def report(results: Sequence[Result], n_possible: int) -> None:
    headings = known()
    heading_of = {result.key: headings.get(place(result.key), "NEW") for result in results}
    verdicts = Counter(
        "listed" if result.verdict == "survived" and heading_of[result.key] == EQUIVALENT else result.verdict
        for result in results
    )
    valid = verdicts["killed"] + verdicts["survived"]
    print(f"\n{len(results)} of {n_possible} mutants; {verdicts['invalid']} do not compile, ", end="")
    print(f"{verdicts['equivalent']} compile to the same PTX, {verdicts['listed']} are listed as equivalent")
    print(f"killed: {verdicts['killed']} of {valid}, {verdicts['killed'] / max(valid, 1):.1%}")
    for result in results:
        if result.verdict == "survived":
            print(f"{heading_of[result.key]:40} {result.kind:18} {result.key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=300, help="mutants to try; 0 is all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="where results are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes at once")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        print(json.dumps(judge(Mutation(**json.loads(arguments.one)))))
        return
    if gone := outdated():
        sys.exit("\n".join(["mutants.md has mutations that cannot be made, or in two places:", *map(": ".join, gone)]))
    wanted, results = chosen(arguments.sample, arguments.seed), []
    for result in run(wanted, arguments.out, arguments.workers):
        results.append(result)
        print(f"{len(results)}/{len(wanted)} {result.verdict:8} {result.key} [{result.by}]", flush=True)
    report(results, len(mutations(KERNELS)))


if __name__ == "__main__":
    main()
