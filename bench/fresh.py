"""What a new process costs: importing, the first training step, and the memory that it takes.

`python -m bench.fresh NAME` trains M for one pass over its mini-batches in the contender's first variant, and prints
the seconds until then and the peak of the resident memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["IMPORTS", "first_step", "import_seconds"]

IMPORTS = {"cpu": "backprop_gpu", "torch": "torch", "jax": "jax", "sklearn": "sklearn.neural_network"}
"""What is imported to work with a contender."""

CACHES = ("BACKPROP_GPU_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
"""Where compiled code is kept on disk."""


def import_seconds(module: str) -> float:
    """Seconds of one import in a new interpreter."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(_output([sys.executable, "-c", code], os.environ))


def first_step(name: str, threads: int, caches: str) -> dict[str, float]:
    """{"seconds", "peak_mb"} of a new process that keeps compiled code in the folder `caches`, or finds it there."""
    command = [sys.executable, "-m", "bench.fresh", name, str(threads)]
    output = _output(command, {**os.environ, **dict.fromkeys(CACHES, caches)})
    answer: dict[str, float] = json.loads(output.splitlines()[-1])
    return answer


def _output(command: list[str], environment: Any) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def main(name: str, threads: str) -> None:
    """Import, build, train, and tell."""
    start = time.perf_counter()
    from bench.cases import NETWORKS
    from bench.contenders import contender

    chosen, case = contender(name), NETWORKS["M"]
    chosen.set_up(int(threads))
    work = next(iter(chosen.training(case).values()))()
    work.reset()
    work.run(case.n_batches)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """The most resident memory that this process had. getrusage would tell its parent's where that was more."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


if __name__ == "__main__":
    main(*sys.argv[1:])
