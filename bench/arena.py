"""Holds the contenders' processes and what they have been measured at, for as long as a run lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from bench.cases import Case
from bench.comparison import ATTEMPTS, FEWEST_STEPS, Comparison, Row, compare, interleaved, uncontended
from bench.contenders import contender
from bench.datasets import FITS
from bench.estimators import JOBS, TOLERANCE
from bench.fresh import IMPORTS, first_step, import_seconds
from bench.processes import Failed, Process, Unsupported

__all__ = ["Arena", "Measured", "void_where_scores_differ"]


SEARCH, QUICK_SEARCH = 60.0, 5.0
"""Seconds of building, beside the others, after which no further way of a peer is tried."""
QUICK_ROUNDS = 2 / 3
"""Of the rounds of others: there are many quick comparisons of a kind, and the report tells their worst, or a curve; or
a round takes seconds."""

FIRST_STEPS = {"cold": 1, "warm": 2}
"""Rounds of new processes."""


@dataclass
class Measured:
    """One contender's samples and what else there is to tell of them."""

    row: Row
    notes: dict[str, Any] = field(default_factory=dict)


class Arena:
    """Starts a process for a contender when it is first needed; measures each comparison once."""

    def __init__(self, threads: int, rounds: int, say: Callable[[str], object] = lambda _: None) -> None:
        self.threads, self.rounds, self.say = threads, rounds, say
        self.processes: dict[str, Process] = {}
        self.measured: dict[Any, dict[str, Measured]] = {}
        self.caches = TemporaryDirectory()
        """Compiled code of the processes that are new."""

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes.values():
            process.close()
        self.caches.cleanup()

    def running(self, names: Sequence[str]) -> dict[str, Process]:
        """The processes of those that can take part here."""
        for name in names:
            if not self._runs(name) and contender(name).missing() is None:
                self.processes[name] = Process(name, self.threads)
        return {name: self.processes[name] for name in names if name in self.processes}

    def _runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].process.poll() is None

    def compared(self, what: str, case: Case, names: Sequence[str], *, quick: bool = False) -> dict[str, Measured]:
        """Task `what` on `case`; `quick`: fewer rounds, and not all of a peer's ways where they take long to build."""
        return self._once((what, case), lambda: self._compare(what, case, names, quick))

    def fitted(self, name: str, names: Sequence[str], *, rounds: int) -> dict[str, Measured]:
        """A data set fitted end to end, `rounds` times, by as many seeds; notes: the curves, one for each round."""
        return self._once(("fit", name), lambda: self._fit(name, names, rounds))

    def estimated(self, job: str, names: Sequence[str], *, rounds: int) -> dict[str, Measured]:
        """A job of `estimators`; notes: scores, one for each round."""
        return self._once(("estimator", job), lambda: self._estimate(job, names, rounds))

    def imported(self, names: Sequence[str], *, rounds: int) -> dict[str, Measured]:
        """The import alone."""
        return self._once("import", lambda: self._in_turn(names, rounds, self._import))

    def first_steps(self, names: Sequence[str], cache: str) -> dict[str, Measured]:
        """A new process up to its first pass over M's mini-batches; notes: peak_mb, one for each round.

        With a cold cache there is one round, which leaves compiled code on disk for the warm ones.
        """
        if cache == "warm":
            self.first_steps(names, "cold")

        def step(name: str) -> dict[str, float]:
            return first_step(name, self.threads, self.caches.name)

        return self._once(("first step", cache), lambda: self._in_turn(names, FIRST_STEPS[cache], step))

    def _once(self, key: Any, measure: Callable[[], dict[str, Measured]]) -> dict[str, Measured]:
        if key not in self.measured:
            self.measured[key] = measure()
        return self.measured[key]

    def _compare(self, what: str, case: Case, names: Sequence[str], quick: bool) -> dict[str, Measured]:
        running, search = self.running(names), QUICK_SEARCH if quick else SEARCH
        rounds = math.ceil(QUICK_ROUNDS * self.rounds) if quick else self.rounds
        fewest = FEWEST_STEPS if what == "training" and not quick else 1
        comparison: Comparison = compare(case, running, what, rounds=rounds, fewest=fewest, search=search, say=self.say)
        for process in running.values():
            with suppress(Failed):  # its row says so
                process.ask("end")
        notes = {"case": case.to_dict(), "what": what, "repeats": comparison.repeats}
        return {name: Measured(row, dict(notes)) for name, row in comparison.rows.items()}

    def _fit(self, name: str, names: Sequence[str], rounds: int) -> dict[str, Measured]:
        running, fit = self.running(names), FITS[name]
        measured = {
            who: Measured(Row(), {"what": f"fit {name}", "target": fit.target, "curves": []}) for who in running
        }
        for process in running.values():
            with suppress(Unsupported):
                process.ask("fit", name=name, epochs=1, seed=0)  # compiles
        for seed, contestant in interleaved(running, rounds):
            self.say(f"fit {name}: round {seed + 1} of {rounds}, {contestant}")
            self._fit_once(running[contestant], measured[contestant], name, fit.epochs, seed)
        return measured

    def _fit_once(self, process: Process, measured: Measured, name: str, epochs: int, seed: int) -> None:
        row = measured.row
        try:
            answer, contention = uncontended(
                process, row.cores, lambda: process.ask("fit", name=name, epochs=epochs, seed=seed)
            )
        except Unsupported as reason:
            row.unsupported = str(reason)
            return
        row.contended += contention > 1
        row.cores.append(answer["cores"])
        row.seconds.append(answer["curve"][-1][0])
        measured.notes["curves"].append(answer["curve"])

    def _estimate(self, job: str, names: Sequence[str], rounds: int) -> dict[str, Measured]:
        running = self.running(names)
        measured = {who: Measured(Row(), {"what": f"estimator, {job}", "scores": []}) for who in running}
        for process in running.values():
            process.ask("prepare_estimate", job=job)
        for i, who in interleaved(running, rounds):
            self.say(f"{job}: round {i + 1} of {rounds}, {who}")
            process, row = running[who], measured[who].row
            attempts = 1 if JOBS[job].processes else ATTEMPTS
            answer, contention = uncontended(
                process, row.cores, lambda process=process: process.ask("estimate", job=job), attempts
            )
            row.contended += contention > 1 and not JOBS[job].processes
            row.cores.append(answer["cores"])
            row.seconds.append(answer["seconds"])
            measured[who].notes["scores"].append(answer["score"])
        void_where_scores_differ(measured)
        return measured

    def _import(self, name: str) -> dict[str, float]:
        return {"seconds": import_seconds(IMPORTS[name])}

    def _in_turn(
        self, names: Sequence[str], rounds: int, measure: Callable[[str], dict[str, float]]
    ) -> dict[str, Measured]:
        present = [name for name in names if contender(name).missing() is None]
        measured = {name: Measured(Row()) for name in present}
        for i, name in interleaved(present, rounds):
            self.say(f"new processes: round {i + 1} of {rounds}, {name}")
            answer = measure(name)
            measured[name].row.seconds.append(answer.pop("seconds"))
            for key, value in answer.items():
                measured[name].notes.setdefault(key, []).append(value)
        return measured


def void_where_scores_differ(measured: dict[str, Measured]) -> None:
    """Both rows are, as it cannot be told which is wrong."""
    scores = [measured[who].notes["scores"][-1] for who in measured]
    if scores and not max(scores) - min(scores) <= TOLERANCE:
        for each in measured.values():
            each.row.void = f"accuracies of {', '.join(f'{score:.2%}' for score in scores)}, which should be the same"
