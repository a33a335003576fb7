"""Write the tables and plots from what they describe: `python -m bench.report`, or `--check` to compare only.

Tables stand between markers. Those of the activations and losses in README.md, and of the floors in kernels/README.md,
come from the code; that of the speed from the files in bench/results/, as do bench/RESULTS.md and bench/plots/. No
figure is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.losses import LOSSES
from bench import floors, plots
from bench.results import Result, all_results
from bench.tables import everything, short, table

README = Path(__file__).parents[1] / "README.md"
KERNELS = Path(__file__).parents[1] / "kernels" / "README.md"
PAGE_HEAD = (
    "# Results\n\nWritten by `python -m bench.report` from the files in `results/`; README.md says how to read it.\n"
)
RESULTS = Path(__file__).parent / "RESULTS.md"


# What the code says


def activations() -> str:
    """Every activation with its formula, its derivative, and what the backward pass keeps for it."""
    rows = [
        [f"`{row.name}`", f"`{row.formula}`", f"`{row.derivative}`", row.derivative_from, row.initialization]
        for row in ACTIVATIONS.values()
    ]
    return table(["activation", "a = σ(z)", "σ′", "computed from", "initialization"], rows)


def losses() -> str:
    """Every loss with its task and the output activations that go with it."""
    rows = []
    for loss in LOSSES.values():
        default, *others = loss.output_activations
        rows.append([f"`{loss.name}`", loss.task, default + (", or any activation above" if others else "")])
    return table(["loss", "task", "output activation"], rows)


def gpu_floors() -> str:
    """What a step must move and compute, and the least time that this takes on an H100."""
    return table(["network, batch", "launches", "MB", "million operations", "µs at least"], list(floors.rows()))


# What was measured


def benchmarks() -> str:
    """The short tables of every machine that was measured."""
    found = all_results()
    devices = {"GPU" if result.machine["gpu"] else "CPU" for result in found}
    missing = [f"Speed on a {device}: not yet measured." for device in ("CPU", "GPU") if device not in devices]
    measured = [short(found)] if found else []
    return "\n\n".join([*measured, *missing])


def page() -> str:
    """bench/RESULTS.md."""
    return PAGE_HEAD + "".join(f"\n## {_section(result)}\n" for result in all_results())


def _section(result: Result) -> str:
    pictures = "\n".join(f"![{name}](plots/{file})" for name, file in plots.files(result).items())
    return f"{result.path.stem}\n\n{everything(result)}\n\n{pictures}"


# Files

Tables: TypeAlias = Mapping[str, Callable[[], str]]

TABLES: Tables = {"activations": activations, "losses": losses, "benchmarks": benchmarks}
KERNEL_TABLES: Tables = {"floors": gpu_floors}


def filled(text: str, tables: Tables = TABLES) -> str:
    """`text` with each table between its markers, <!-- name --> and <!-- /name -->, written anew."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the text has no markers for the table {name!r}")
        body = make()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write the README files, RESULTS.md and the plots; with --check, only say whether the texts are up to date."""
    texts = {README: filled(_read(README)), KERNELS: filled(_read(KERNELS), KERNEL_TABLES), RESULTS: page()}
    if "--check" in arguments:
        stale = [path.name for path, text in texts.items() if _read(path) != text]
        for name in stale:
            print(f"{name} is out of date: python -m bench.report", file=sys.stderr)
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for result in all_results():
        plots.draw(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
