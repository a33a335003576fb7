"""Contenders measured against each other: interleaved, after a check that they do the same work."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.cases import Case
from bench.distance import Distance
from bench.processes import Failed, Others, Process, Unsupported
from bench.tasks import TASKS

__all__ = ["ROUNDS", "Comparison", "Row", "compare", "interleaved", "quartiles", "ratios", "settled", "uncontended"]

FASTEST_RUN, SLOWEST_RUN = 0.007, 0.4
"""A run lasts at least 7 ms for the fastest contender, unless it would be over 0.4 s for the slowest."""
FEWEST_STEPS = 32
"""Steps of a run likewise, in the tables of S, M, N and L. What comes once in an epoch, packing our parameters and
starting a thread, takes 1.8 ms on M and 10 on L on a Zen 3, as long as 2 steps and a third of one; an epoch of MNIST
has 469 and 117 of those."""
RUNS, RUNS_SECONDS = 4, 0.4
"""A sample is the fastest of so many runs, one after the other, or of as many as the slowest contender makes in 0.4 s.
On a virtual machine every fourth run of 20 ms was slowed down by what no counter shows. Resampled from 1,600 of those,
two medians of 5 samples of 4 runs were 10 % apart for 8 rows of 132; two medians of 33 single runs for 15."""

FEWEST_ROUNDS, ROUNDS, SETTLED = 4, 9, 0.03
"""From four rounds on, measuring ends once the standard error of each ratio's median is below 3 %; or after nine."""
STANDARD_ERROR = 0.93
"""Of the median of n numbers, by the distance of their quartiles over √n, where they are normal."""

WARMUP = 0.08
"""Seconds of the same work before a sample. After a pause Linux wakes threads on one processor and takes up to 70 ms to
spread them: JAX on M takes 780 µs a step after 3 ms of warm-up, 530 µs after 70 ms; backprop_gpu 510 and 370 µs."""

OTHERS_SHARE = 0.05
"""A sample is contended when other processes take more than 5 % of a processor meanwhile,"""
CORES_DROP = 0.8
"""or when the contender had less than 0.8 of the processor time, by the wall clock, that it usually has,"""
FAR, PATIENCE = 3.0, 120.0
"""or when it has several threads and the processors are three times as far from each other as at their nearest; its
samples wait for that to pass, all of a run together 120 s. With 60 s, S had far ones only, on a Zen 4."""
ENOUGH = 8
"""Samples after which it can be said that the machine is busy throughout."""
ATTEMPTS, ATTEMPT_SECONDS = 4, 10.0
"""Contended samples are measured again, so many times in all and for so long; then the least contended one is kept, and
counted. Distance alone is no reason to, once nothing waits for it to pass any more: it lasts for tens of seconds."""

DISTANCE = Distance(FAR, PATIENCE)


@dataclass
class Row:
    """One contender's part in a comparison."""

    variant: str = ""
    """Which of its ways was the fastest."""
    variants: dict[str, float] = field(default_factory=dict)
    """Seconds of each way, from a short trial."""
    seconds: list[float] = field(default_factory=list)
    """Per repetition, one entry for each round."""
    cores: list[float] = field(default_factory=list)
    """Processor time over wall time of each."""
    contended: int = 0
    """Rounds in which something else ran all the same."""
    unsupported: str = ""
    """Why it cannot do this, so that there is nothing to time."""
    void: str = ""
    """How its answer differs from the others', so that nothing was timed."""


@dataclass
class Comparison:
    """All contenders on one case."""

    case: Case
    rows: dict[str, Row]
    repeats: int = 0
    """Steps, or whatever is repeated, in each run."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles, linearly interpolated."""
    ordered = sorted(values)

    def at(q: float) -> float:
        below, rest = divmod(q * (len(ordered) - 1), 1)
        above = min(int(below) + 1, len(ordered) - 1)
        return ordered[int(below)] * (1 - rest) + ordered[above] * rest

    return at(0.25), at(0.5), at(0.75)


def ratios(slower: Sequence[float], faster: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio of two contenders' times, round by round."""
    return quartiles([a / b for a, b in zip(slower, faster, strict=True)])


def compare(
    case: Case,
    contenders: Mapping[str, Process],
    what: str = "training",
    *,
    rounds: int = ROUNDS,
    fewest: int = FEWEST_STEPS,
    search: float = 60.0,
    say: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Measure them all at task `what` on `case`, in `rounds` rounds at most.

    Fewer are enough once the ratios to the first are settled. A run has `fewest` repeats at least, unless that is long
    for the slowest. All build and compile at the same time, and no other variants are tried after `search` seconds of
    it; nothing else happens at the same time as something else.
    """
    task = TASKS[what]
    comparison = Comparison(case, {name: Row() for name in contenders})
    say(f"{case}: building")
    for process in contenders.values():
        process.tell("build", what=task.name, case=case.to_dict(), search=search)
    expected = task.expected(case)
    for name, process in contenders.items():
        with _noted(comparison.rows[name]):
            process.hear()
    for name, process in contenders.items():
        if name in _running(comparison):
            _begin(process, comparison.rows[name], task.name, expected)
    if running := _running(comparison):
        multiple = task.multiple(case)
        plan = _plan([row.variants[row.variant] for row in running.values()], multiple, fewest)
        comparison.repeats = plan["n"]
        for i, order in enumerate(_orders(running, rounds)):
            say(f"{case}: round {i + 1} of {rounds}, {plan['runs']} runs of {plan['n']} repeats a sample")
            for name in order:
                _sample(contenders[name], running[name], plan, multiple, 1 if _busy(running.values()) else ATTEMPTS)
            if settled([row.seconds for row in _running(comparison).values()]):
                break
    return comparison


def _running(comparison: Comparison) -> dict[str, Row]:
    return {name: row for name, row in comparison.rows.items() if not (row.void or row.unsupported)}


def settled(rows: Sequence[Sequence[float]]) -> bool:
    """Whether the median of every row's ratio to the first row is known well enough."""
    if not rows or len(rows[0]) < FEWEST_ROUNDS:
        return False
    found = (ratios(row, rows[0]) for row in rows[1:])
    return all(STANDARD_ERROR * (high - low) <= SETTLED * middle * len(rows[0]) ** 0.5 for low, middle, high in found)


def interleaved(names: Mapping[str, Any] | Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """(round, name) for every name in every round, in an order drawn anew for each."""
    return [(i, name) for i, order in enumerate(_orders(names, rounds)) for name in order]


def _orders(names: Mapping[str, Any] | Sequence[str], rounds: int) -> list[list[str]]:
    draw = random.Random(0)
    return [draw.sample(list(names), len(names)) for _ in range(rounds)]


@contextmanager
def _noted(row: Row) -> Iterator[None]:
    """What a process could not do stands in its row."""
    try:
        yield
    except Unsupported as reason:
        row.unsupported = str(reason)
    except Failed as error:
        row.void, row.seconds = f"failed:\n{error}", []


def _begin(process: Process, row: Row, what: str, expected: tuple[float, float]) -> None:
    """Find the fastest variant of what was built, and check it."""
    with _noted(row):
        answer = process.ask("begin")
        row.variant, row.variants = answer["variant"], answer["variants"]
        number, (value, tolerance) = answer["number"], expected
        if number is not None and not abs(number - value) <= tolerance:
            row.void = f"its {what} gives {number:.7g}, where {value:.7g} ± {tolerance:.2g} is right"
        process.wait_until_idle()


def _plan(seconds: Sequence[float], multiple: int, fewest: int) -> dict[str, int]:
    """How often to repeat in a run, and the runs of a sample: the same for all."""
    n = _at_least(min(max(fewest, FASTEST_RUN / min(seconds)), SLOWEST_RUN / max(seconds)), multiple)
    return {"n": n, "runs": max(1, min(RUNS, int(RUNS_SECONDS / (n * max(seconds)))))}


def _at_least(n: float, multiple: int) -> int:
    return multiple * max(1, math.ceil(n / multiple))


def _busy(rows: Iterable[Row]) -> bool:
    """Whether most samples were contended so far, so that to take them again is of no use."""
    rows = list(rows)
    taken, contended = sum(len(row.seconds) for row in rows), sum(row.contended for row in rows)
    return taken >= ENOUGH and contended > taken / 2


def _sample(process: Process, row: Row, plan: Mapping[str, int], multiple: int, attempts: int) -> None:
    if row.void:
        return
    warmup = _at_least(WARMUP / row.variants[row.variant], multiple)
    with _noted(row):
        answer, contention = uncontended(
            process, row.cores, lambda: process.ask("sample", **plan, warmup=warmup), attempts
        )
        row.contended += contention > 1
        row.seconds.append(answer["seconds"])
        row.cores.append(answer["cores"])


def uncontended(
    process: Process, usual_cores: Sequence[float], take: Callable[[], dict[str, Any]], attempts: int = ATTEMPTS
) -> tuple[dict[str, Any], float]:
    """A sample, taken again where it was contended, and how contended it was: over 1 is too much."""
    taken: list[tuple[dict[str, Any], float]] = []
    deadline, again = time.perf_counter() + ATTEMPT_SECONDS, True
    while again and len(taken) < attempts and (not taken or time.perf_counter() < deadline):
        answer, contention, far = _attempt(process, usual_cores, take)
        taken.append((answer, max(contention, far)))
        again = contention > 1 or (far > 1 and DISTANCE.patience > 0)
    return min(taken, key=lambda pair: pair[1])


def _attempt(
    process: Process, usual_cores: Sequence[float], take: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], float, float]:
    """A sample, how contended it was, and how far the processors were from each other: both over 1 are too much."""
    several = process.threads > 1
    far = DISTANCE.wait_until_near() if several else 0.0
    others, start = Others(process), time.perf_counter()
    answer = take()
    share = others.seconds() / (time.perf_counter() - start)
    process.wait_until_idle()
    usual = median(usual_cores) if usual_cores else answer["cores"]
    cores = CORES_DROP * usual / max(answer["cores"], 1e-9)
    return answer, max(share / OTHERS_SHARE, cores), max(far, DISTANCE.excess() if several else 0.0)
