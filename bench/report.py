"""Write the tables of README.md from what they describe: `python -m bench.report`, or `--check` to compare only."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.losses import LOSSES

README = Path(__file__).parents[1] / "README.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


TABLES: dict[str, Callable[[], str]] = {"activations": activations, "losses": losses}


def filled(text: str) -> str:
    """`text` with each table between its markers, <!-- name --> and <!-- /name -->, written anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no markers for the table {name!r}")
        body = make()
        text = pattern.sub(rf"\g<1>{body}\n\g<2>", text)
    return text


def main(arguments: Sequence[str]) -> int:
    """Fill README.md in; with --check, only say whether it is up to date."""
    text = README.read_text(encoding="utf-8")
    if "--check" in arguments:
        return 0 if filled(text) == text else 1
    README.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
