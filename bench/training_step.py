"""The training step of every contender side by side: `python -m bench.training_step --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.cases import NETWORKS, Case, random_cases
from bench.comparison import ROUNDS, Comparison, Row, compare, quartiles, ratios
from bench.contenders import BACKENDS, FLOOR, PEERS, contender
from bench.processes import all_threads, processes
from bench.tables import spread

__all__ = ["main", "table"]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and print one table for each network."""
    arguments = _parser().parse_args(argv)
    names = [*arguments.backends, *arguments.peers, *([] if arguments.no_floor else [FLOOR])]
    for name in names:
        if reason := contender(name).missing():
            print(f"skipped {name}: {reason}", file=sys.stderr)
    networks = [NETWORKS[name] for name in arguments.networks]
    cases = [replace(case, activation=activation) for activation in arguments.activations for case in networks]
    cases += random_cases(arguments.shapes)
    with processes(names, arguments.threads) as running:
        for case in cases:
            comparison = compare(case, running, rounds=arguments.rounds, say=_say)
            _say("")
            print(table(comparison, arguments.threads), end="\n\n", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--activations", nargs="+", default=["relu"])
    parser.add_argument("--shapes", type=int, default=0, help="so many random shapes on top")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=all_threads())
    return parser


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def table(comparison: Comparison, threads: int) -> str:
    """One comparison in plain text: times, and for each of our backends how many times slower the others are."""
    rows = comparison.rows
    ours = [name for name in rows if name in BACKENDS and rows[name].seconds]
    lines = [
        f"{comparison.case} ({_describe(comparison.case)}): {comparison.repeats} steps a sample, {threads} threads",
        f"  {'µs a step':42} {'median':>9} {'quartiles':>19} {'cores':>6} {'contended':>9}"
        + "".join(f" {'÷ ' + name:>22}" for name in ours),
    ]
    lines += [_line(name, row, [rows[mine] for mine in ours]) for name, row in rows.items()]
    return "\n".join(lines + [_summary(mine, rows) for mine in ours])


def _describe(case: Case) -> str:
    return f"{'-'.join(map(str, case.layer_sizes))}, batch {case.batch_size}, {case.activation}"


def _line(name: str, row: Row, ours: Sequence[Row]) -> str:
    label = contender(name).label + (f" ({row.variant})" if row.variant else "")
    if not row.seconds:
        return f"  {label:42} {row.unsupported or 'void: ' + row.void.splitlines()[-1]}"
    low, middle, high = (1e6 * seconds for seconds in quartiles(row.seconds))
    cores = quartiles(row.cores)[1]
    beside = "".join(f" {spread(ratios(row.seconds, mine.seconds)):>22}" for mine in ours)
    return f"  {label:42} {middle:9.1f} {f'{low:.1f} – {high:.1f}':>19} {cores:6.2f} {row.contended:9}{beside}"


def _summary(mine: str, rows: dict[str, Row]) -> str:
    timed = {name: row for name, row in rows.items() if name in PEERS and row.seconds}
    peers = {name: ratios(row.seconds, rows[mine].seconds)[1] for name, row in timed.items()}
    if not peers:
        return f"  {mine}: no peer to compare with"
    fastest = min(peers, key=lambda name: peers[name])
    times = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in peers.items())
    return f"  {mine}: {peers[fastest]:.2f} times as fast as the fastest peer ({fastest}); {times}"


if __name__ == "__main__":
    sys.exit(main())
