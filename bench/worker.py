"""One contender's process: `python -m bench.worker NAME THREADS` answers JSON lines on stdin with JSON on stdout.

Every contender has one of its own, kept for a whole run: no library's threads, allocator or settings touch another's.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from bench.cases import Case
from bench.contenders import contender
from bench.contenders.contract import Parameters, Unsupported, Variants, Work
from bench.datasets import FITS, Fit
from bench.estimators import JOBS
from bench.tasks import TASKS

TRIAL_SECONDS, TRIAL_RUN = 0.1, 0.02
"""How long each variant is tried, and in how long runs. The first ones tell little: one took 67 times as long, on S."""


class Worker:
    """Holds one contender and the work that it is at."""

    def __init__(self, name: str, threads: int) -> None:
        self.contender = contender(name)
        self.contender.set_up(threads)
        self.end()

    def build(self, what: str, case: dict[str, Any], search: float) -> dict[str, Any]:
        """Build the work in all variants, and take the first steps; after `search` seconds, no more of them."""
        self.end()
        self.task, self.case = TASKS[what], Case.from_dict(case)
        self.built = _built(self.task.variants(self.contender, self.case), self.task.multiple(self.case), search)
        return {}

    def begin(self) -> dict[str, Any]:
        """Find the fastest variant of what was built, and keep that one; answers its name and its check."""
        steps = self.task.multiple(self.case)
        seconds = {name: _trial(work, steps) for name, work in self.built.items()}
        variant = min(seconds, key=lambda name: seconds[name])
        self.work = self.built[variant]
        self.built = {}
        gc.collect()
        gc.freeze()  # or each collection takes up to 0.14 s, PyTorch's objects being so many
        self.work.reset()
        self.work.run(steps)
        result = self.work.result()
        number = None if result is None else self.task.number(self.case, result)
        return {"variant": variant, "variants": seconds, "number": number}

    def sample(self, n: int, runs: int, warmup: int) -> dict[str, float]:
        """Seconds of a repeat, and processors used, in the fastest of some runs of n repeats, after a warm-up.

        Each begins at the initial state. Nothing comes between warm-up and runs that would let other threads rest.
        """
        self.work.reset()
        self.work.run(warmup)
        gc.disable()
        fastest = min((_run(self.work, n) for _ in range(runs)), key=lambda run: run["seconds"])
        gc.enable()
        return fastest

    def end(self) -> dict[str, Any]:
        """Let go of the work."""
        self.work: Work | None = None
        self.built: dict[str, Work] = {}
        gc.unfreeze()
        return {}

    def fit(self, name: str, epochs: int, seed: int) -> dict[str, Any]:
        """[seconds, accuracy] after each epoch of fitting a data set."""
        fit, cpu, wall = FITS[name], time.process_time(), time.perf_counter()
        curve = list(self.contender.fit(fit, epochs, seed))
        cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
        return {"curve": [(seconds, accuracy(fit, parameters)) for seconds, parameters in curve], "cores": cores}

    def prepare_estimate(self, job: str) -> dict[str, Any]:
        """What comes once, before a job of `estimators` is timed: compiling, new processes."""
        warm_up = JOBS[job].warm_up()
        warm_up.do(self.contender.classifier(), warm_up)
        return {}

    def estimate(self, job: str) -> dict[str, float]:
        """Seconds of one of the calls that a job of `estimators` makes, and the accuracy in the end."""
        todo, kind = JOBS[job], self.contender.classifier()
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        score = todo.do(kind, todo)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"seconds": wall / todo.repeats, "score": score, "cores": cpu / wall}

    def about(self) -> dict[str, Any]:
        """Versions of what this process stands on."""
        names = {"sklearn": "scikit-learn"}
        packages = [names.get(name, name) for name in ("numpy", *self.contender.packages)]
        return {"versions": {name: importlib.metadata.version(name) for name in packages}}


def _built(variants: Variants, steps: int, search: float) -> dict[str, Work]:
    """Each variant after its first steps: one at least, and no more after `search` seconds."""
    built: dict[str, Work] = {}
    start = time.perf_counter()
    for name, build in variants.items():
        if built and time.perf_counter() - start > search:
            break
        built[name] = build()
        built[name].reset()
        built[name].run(steps)
    return built


def _trial(work: Work, steps: int) -> float:
    """Seconds a step, the best of several runs, or of two where they are long."""
    end = time.perf_counter() + TRIAL_SECONDS
    best = _run(work, steps)["seconds"]
    while True:
        n = max(1, round(TRIAL_RUN / best / steps)) * steps
        best = min(best, _run(work, n)["seconds"])
        if time.perf_counter() > end:
            return best


def _run(work: Work, n: int) -> dict[str, float]:
    """Seconds of a repeat, and processors used, over n repeats from the initial state."""
    work.reset()
    cpu, wall = time.process_time(), time.perf_counter()
    counted = work.run(n)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": (wall if counted is None else counted) / n, "cores": cpu / wall}


def accuracy(fit: Fit, parameters: Parameters) -> float:
    """Of these parameters, on the held-out rows."""
    net = fit.case.network()
    for mine, given in zip((*net.W, *net.b), (*parameters[0], *parameters[1]), strict=True):
        mine[...] = given
    _, _, X, y = fit.data()
    return float(np.mean(net.predict(X) == y))


def _answer(method: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return method(**arguments)
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception:
        return {"error": traceback.format_exc()}


def _own_stdout() -> TextIO:
    """What was stdout; from here on, anything that a library prints goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main(name: str, threads: str) -> None:
    """Answer until stdin ends."""
    answers = _own_stdout()
    worker = Worker(name, int(threads))
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(getattr(worker, request.pop("do")), request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
