"""SVG plots of a result file: throughput against batch for each width, time to accuracy, share of the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import NETWORKS
from bench.contenders import contender
from bench.results import Bench, Result
from bench.tables import COLUMNS, ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "files"]

FOLDER = Path(__file__).parent / "plots"

INK, MUTED, GRID, SURFACE = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
COLOURS = ("#0b6e4f", "#d1495b", "#2e6fbb", "#b07d12", "#7a4fb5", "#59636e", "#8a939c")
"""Ours first."""


def files(result: Result) -> dict[str, str]:
    """What can be drawn of a result, and the file's name in the folder of plots."""
    return {title: f"{result.path.stem}-{name}.svg" for title, name in _drawable(result).items()}


def draw(result: Result, folder: Path = FOLDER) -> None:
    """Write them."""
    folder.mkdir(exist_ok=True)
    for title, name in _drawable(result).items():
        figure = PLOTS[title][1](result)
        figure.savefig(folder / f"{result.path.stem}-{name}.svg", metadata={"Date": None})


def _drawable(result: Result) -> dict[str, str]:
    measured = tuple(result.groups)
    return {
        title: name
        for title, (name, _, needed) in PLOTS.items()
        if all(any(group.startswith(prefix) for group in measured) for prefix in needed)
    }


def _axes(n: int, title: str, **settings: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "backprop_gpu"  # the same drawing is the same file
    figure, axes = plt.subplots(1, n, figsize=(1 + 3.4 * n, 3.6), layout="constrained", squeeze=False, **settings)
    plt.close(figure)
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    for ax in axes[0]:
        ax.grid(True, color=GRID, linewidth=0.6)
        ax.tick_params(colors=MUTED, labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def _colour(result: Result, name: str) -> str:
    names = [result.ours, *(name for name in COLUMNS if name != result.ours)]
    present = [name for name in names if any(name in row for row in result.groups.values())]
    return COLOURS[min(present.index(name), len(COLOURS) - 1)]


def _throughput(result: Result) -> Figure:
    rows = [(row[next(iter(row))].case, row) for _, row in result.under("width ")]
    widths = {width: list(group) for width, group in groupby(rows, key=lambda pair: pair[0].layer_sizes[0])}
    figure, axes = _axes(len(widths), "Training throughput against the batch: three layers, float32, Adam", sharex=True)
    for ax, (width, group) in zip(axes, widths.items(), strict=True):
        for name in group[0][1]:
            points = [(case.batch_size, case.batch_size / row[name].median) for case, row in group if name in row]
            ax.loglog(*zip(*points, strict=True), "o-", ms=4, lw=1.6, color=_colour(result, name), label=_label(name))
        ax.set_title(f"width {width}", color=INK, fontsize=9)
        ax.set_xticks(batches := [case.batch_size for case, _ in group], [str(batch) for batch in batches])
        ax.minorticks_off()
        ax.set_xlabel("batch", color=MUTED, fontsize=8)
    axes[0].set_ylabel("rows a second", color=MUTED, fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _accuracy(result: Result) -> Figure:
    rows: dict[str, Mapping[str, Bench]] = dict(result.under("fit, "))
    figure, axes = _axes(len(rows), "Accuracy on held-out rows against training time")
    for ax, (data, row) in zip(axes, rows.items(), strict=True):
        for name, bench in row.items():
            for i, curve in enumerate(bench.notes["curves"]):
                label = _label(name) if i == 0 else None
                ax.plot(*zip(*curve, strict=True), lw=1.4, color=_colour(result, name), label=label)
        target = next(iter(row.values())).notes["target"]
        ax.axhline(target, color=MUTED, lw=0.8, ls=":")
        ax.set_ylim(target - 0.04, None)
        ax.set_xscale("log")
        ax.set_title(f"{data} (target {target:.1%})", color=INK, fontsize=9)
        ax.set_xlabel("seconds", color=MUTED, fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _ceiling(result: Result) -> Figure:
    rows = dict(result.under("training step, "))
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    peak = ceiling(result)
    figure, (ax,) = _axes(1, "Products of a training step, share of the fastest large product")
    figure.set_size_inches(7, 3.6)
    for i, name in enumerate(names):
        at = [k + (i - (len(names) - 1) / 2) * 0.8 / len(names) for k, row in enumerate(rows.values()) if name in row]
        shares = [NETWORKS[n].flops / row[name].median / peak for n, row in rows.items() if name in row]
        ax.bar(at, shares, width=0.72 / len(names), color=_colour(result, name), label=_label(name))
    ax.set_xticks(range(len(rows)), list(rows))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _label(name: str) -> str:
    return contender(name).label


PLOTS: dict[str, tuple[str, Callable[[Result], Figure], tuple[str, ...]]] = {
    "throughput against batch": ("throughput", _throughput, ("width ",)),
    "time to accuracy": ("accuracy", _accuracy, ("fit, ",)),
    "share of the ceiling": ("ceiling", _ceiling, ("ceiling, product", "training step, ")),
}
"""Title: file name, function, and what has to have been measured."""
