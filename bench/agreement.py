"""Whether two runs tell the same: `python -m bench.agreement A.json B.json`.

Lists every ratio over 1.1, in either file, that is more than 10 % apart between both, and exits with 1 if there is
one. `pytest-benchmark compare` compares seconds; machines differ in those, and change them within an hour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bench.contenders import contender
from bench.results import Result, read
from bench.tables import spread, table

__all__ = ["APART", "FROM", "Pair", "main", "pairs"]

FROM = 1.1
"""Ratios up to this are not compared: they claim nothing."""
APART = 1.1
"""Two that differ by more than 10 % do not agree."""

Quartiles: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Pair:
    """A ratio in two files: its quartiles in each."""

    group: str
    contender: str
    first: Quartiles
    second: Quartiles

    @property
    def apart(self) -> float:
        """The larger median over the smaller."""
        low, high = sorted((self.first[1], self.second[1]))
        return high / low


def pairs(a: Result, b: Result) -> Iterator[Pair]:
    """Every ratio that is in both, and over `FROM` in one of them."""
    second = b.ratios()
    for key, found in a.ratios().items():
        if key in second and max(found[1], second[key][1]) > FROM:
            yield Pair(*key, found, second[key])


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE", help="a result file")
    a, b = map(read, parser.parse_args(argv).files)
    compared = sorted(pairs(a, b), key=lambda pair: -pair.apart)
    apart = [pair for pair in compared if pair.apart > APART]
    if alone := len(a.ratios().keys() ^ b.ratios().keys()):
        print(f"ratios in one file only: {alone}")
    print(f"ratios over {FROM}: {len(compared)}; more than {APART - 1:.0%} apart: {len(apart)}")
    if apart:
        print(table(["", "", "A", "B", "apart"], list(map(_row, apart))))
    return 1 if apart else 0


def _row(pair: Pair) -> list[str]:
    both = (spread(pair.first), spread(pair.second))
    return [pair.group, contender(pair.contender).label, *both, f"{pair.apart - 1:.0%}"]


if __name__ == "__main__":
    sys.exit(main())
