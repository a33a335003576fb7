"""Result files: what pytest-benchmark wrote, made compact, and read again as tables of samples.

A file is pytest-benchmark's own JSON, which `pytest-benchmark compare` reads: `machine_info`, `commit_info`,
`datetime`, and `benchmarks`, each with its `group` (the piece of work), `extra_info` (contender, case, variant, …) and
`stats`, whose `data` holds one entry a round, in the same order for every contender of a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.comparison import quartiles, ratios
from bench.contenders import BACKENDS, GPU_PEERS, IN_PLACE, PEERS

__all__ = ["FOLDER", "Bench", "Result", "all_results", "compact", "read"]

FOLDER = Path(__file__).parent / "results"

DIGITS = 5
"""Significant digits that a file keeps: more than a clock gives."""


@dataclass(frozen=True)
class Bench:
    """One contender's samples of one piece of work."""

    contender: str
    seconds: tuple[float, ...]
    """One entry for each round."""
    notes: Mapping[str, Any]

    @property
    def median(self) -> float:
        """Of the seconds."""
        return quartiles(self.seconds)[1]

    @property
    def case(self) -> Case:
        """The network and its data."""
        return Case.from_dict(self.notes["case"])

    def times_as_fast(self, other: Bench) -> float:
        """How many times as fast as another: the median of the rounds' ratios."""
        return self.ratios_to(other)[1]

    def ratios_to(self, other: Bench) -> tuple[float, float, float]:
        """How many times as fast as another: the quartiles of the rounds' ratios."""
        return ratios(other.seconds, self.seconds)


@dataclass(frozen=True)
class Result:
    """One file."""

    path: Path
    machine: Mapping[str, Any]
    date: str
    groups: Mapping[str, Mapping[str, Bench]]
    """By the piece of work and the contender."""

    def under(self, prefix: str) -> Iterator[tuple[str, Mapping[str, Bench]]]:
        """The pieces of work whose name begins so, and the rest of the name."""
        for group, row in self.groups.items():
            if group.startswith(prefix):
                yield group.removeprefix(prefix), row

    @property
    def ours(self) -> str:
        """The backend that the tables are about: the fastest kind that was measured, or the last where none was."""
        measured = {name for row in self.groups.values() for name in row}
        return next((name for name in BACKENDS if name in measured), BACKENDS[-1])

    def ours_in(self, row: Mapping[str, Bench]) -> str:
        """Who is ours in a piece of work: that backend, or what stands in another library's place."""
        return next((name for name in IN_PLACE if name in row), self.ours)

    def ratios(self) -> dict[tuple[str, str], tuple[float, float, float]]:
        """Quartiles of how many times as long as ours each other takes, by the piece of work and the contender."""
        return {
            (group, name): row[ours].ratios_to(bench)
            for group, row in self.groups.items()
            if (ours := self.ours_in(row)) in row
            for name, bench in row.items()
            if name != ours
        }


def fastest_peer(row: Mapping[str, Bench]) -> Bench | None:
    """The peer with the smallest median."""
    peers = [bench for name, bench in row.items() if name in (*PEERS, *GPU_PEERS)]
    return min(peers, key=lambda bench: bench.median, default=None)


def read(path: Path) -> Result:
    """A file's samples."""
    content = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, dict[str, Bench]] = {}
    for benchmark in content["benchmarks"]:
        notes = dict(benchmark["extra_info"])
        name = notes.pop("contender")
        groups.setdefault(benchmark["group"], {})[name] = Bench(name, tuple(benchmark["stats"]["data"]), notes)
    return Result(path, content["machine_info"], content["datetime"][:10], groups)


def all_results(folder: Path = FOLDER) -> list[Result]:
    """Every result file, by name."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def compact(content: Mapping[str, Any]) -> str:
    """pytest-benchmark's JSON with a line for each benchmark, and digits that mean something."""
    head = {name: value for name, value in content.items() if name != "benchmarks"}
    lines = ",\n".join(f"  {json.dumps(_rounded(benchmark))}" for benchmark in content["benchmarks"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "benchmarks": [\n{lines}\n ]\n}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
