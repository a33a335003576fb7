"""The benchmarks in one command: `python -m bench`.

Runs every suite of this folder against what is installed, writes one result file, and prints its tables. With --keep
the file goes to bench/results/, under the machine's name, and README.md, RESULTS.md and the plots are written anew.
What is not known here goes to pytest, e.g. `python -m bench -k "training_step[S-"`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import machine, report, results
from bench.processes import ROOT


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="the GPU suite in place of the CPU suites")
    parser.add_argument("--keep", action="store_true", help="keep the results in bench/results/ and write the tables")
    parser.add_argument("--output", type=Path, help="the result file (default: bench-results.json)")
    arguments, for_pytest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmarks.json"
        status = pytest.main([*_suites(arguments.gpu), f"--benchmark-json={written}", "--benchmark-quiet", *for_pytest])
        if not (written.exists() and written.stat().st_size):
            return int(status) or 1
        content = json.loads(written.read_text(encoding="utf-8"))
    output = arguments.output or _output(content["machine_info"], arguments.keep)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(results.compact(content), encoding="utf-8")
    if arguments.keep:
        report.main([])
    print(f"\n{report.everything(results.read(output))}\n\nwritten to {output}")
    return int(status)


def _suites(gpu: bool) -> list[str]:
    folder = ROOT / "bench"
    suites = sorted(folder.glob("test_*.py"))
    return ["--rootdir", str(ROOT), *(str(path) for path in suites if (path.name == "test_gpu.py") == gpu)]


def _output(machine_info: dict[str, object], keep: bool) -> Path:
    return results.FOLDER / f"{machine.slug(machine_info)}.json" if keep else Path("bench-results.json")


if __name__ == "__main__":
    sys.exit(main())
