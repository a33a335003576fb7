"""The guard against losing speed: a step's ratio to the floor, on one thread, beside that of the committed results.

No seconds are compared: they tell the machine and its load. Both times are of the processor, not of the clock, and the
best of the rounds, which other load cannot make better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import machine
from bench.cases import NETWORKS, Case
from bench.comparison import compare
from bench.contenders import CPU_BACKENDS, FLOOR
from bench.processes import Process, all_threads, processes
from bench.results import Result, all_results

__all__ = ["BACKENDS", "GUARDED", "LIMIT", "Slowed", "committed", "expected_ratio", "measured_ratio"]

LIMIT = 1.25
"""A ratio so many times the expected one is a loss: below 1.5, and above what the same code differs by."""

GUARDED = {name: NETWORKS[name] for name in ("S", "M", "N")}
BACKENDS = CPU_BACKENDS

ROUNDS = 7


class Slowed:
    """A contender's process that does `factor` times the work that it tells of: a loss of speed on purpose."""

    def __init__(self, process: Process, factor: float) -> None:
        self.inner, self.factor = process, factor

    def __getattr__(self, name: str) -> Any:
        """All else is that of the inner process."""
        return getattr(self.inner, name)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The inner process's answer; seconds are still for one step of those asked for."""
        if do != "sample":
            return self.inner.ask(do, **arguments)
        n = round(arguments["n"] * self.factor)
        answer = self.inner.ask(do, **{**arguments, "n": n})
        return {**answer, "seconds": answer["seconds"] * n / arguments["n"]}


def measured_ratio(backend: str, case: Case, *, slowed: float = 1.0) -> float:
    """Of the backend's step to the floor, on one thread."""
    with processes([backend, FLOOR], threads=1) as running:
        contenders: Mapping[str, Any] = {**running, backend: Slowed(running[backend], slowed)}
        rows = compare(case, contenders, rounds=ROUNDS).rows
    for row in rows.values():
        assert not row.void, row.void
    return best(rows[backend].seconds, rows[backend].cores) / best(rows[FLOOR].seconds, rows[FLOOR].cores)


def best(seconds: Sequence[float], cores: Sequence[float]) -> float:
    """The least processor time of all rounds."""
    return min(wall * share for wall, share in zip(seconds, cores, strict=True))


def committed() -> Result | None:
    """The committed results of this kind of processor, or None."""
    here = machine.describe(all_threads())
    same = (found for found in all_results() if all(found.machine[key] == here[key] for key in ("cpu", "simd")))
    return next(same, None)


def expected_ratio(result: Result, backend: str, network: str) -> float | None:
    """What `measured_ratio` should be; None where it was not measured."""
    row = result.groups.get(f"one thread, {network}", {})
    if not {backend, FLOOR} <= row.keys():
        return None
    ours, floor = (best(row[name].seconds, row[name].notes["cores"]) for name in (backend, FLOOR))
    return ours / floor
