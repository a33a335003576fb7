"""Result files as Markdown: the README's short tables, and RESULTS.md's, which show everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from bench.cases import NETWORKS, Case
from bench.comparison import quartiles
from bench.contenders import FLOOR, GPU_PEERS, PEERS, contender
from bench.results import Bench, Result, fastest_peer
from bench.tasks import OPERATIONS

__all__ = ["everything", "final_accuracy", "heading", "seconds_to_target", "short", "spread", "table", "time_of"]

GPU_COLUMNS = ("cuda", "numba-cuda", "torch@cuda")

COLUMNS = ("cuda", "numba-cuda", "cpu", *GPU_PEERS, *PEERS, "numpy", FLOOR)
"""Contenders in the order of the tables' columns."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(results: Sequence[Result]) -> str:
    """The machines; the steps of S, M, N and L, and most other suites, in a line, with a column for each machine."""
    makers = (_steps, _activations, _shapes, _predictions, _fits, _estimators, _modules)
    columns = [{title: text for make in makers for title, text in make(each)} for each in results]
    titles = dict.fromkeys(title for column in columns for title in column)
    rows = [[title, *(column.get(title, "–") for column in columns)] for title in titles]
    return "\n\n".join([*map(heading, results), table(["", *map(_device, results)], rows)])


def heading(result: Result) -> str:
    """Machine, threads, versions, date."""
    machine = result.machine
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"**{device}** ({result.date}; Python {machine['python']}, {versions})"


def _device(result: Result) -> str:
    return str(result.machine["gpu"] or result.machine["cpu"])


def _network(name: str) -> str:
    case = NETWORKS[name]
    return f"{name}: {'-'.join(map(str, case.layer_sizes))}, {case.batch_size:,}"


def beside(what: str, result: Result, rows: Mapping[str, Mapping[str, Bench]]) -> str:
    """A line for each piece of work, a column for each contender: its time, and that over ours."""
    ours = result.ours_in(next(iter(rows.values()), {}))
    names = [name for name in COLUMNS if name != ours and any(name in row for row in rows.values())]
    header = [what, *(contender(name).label for name in (ours, *names))]
    return table(header, [[title, *_cells(row, ours, names)] for title, row in rows.items()])


def _cells(row: Mapping[str, Bench], ours: str, names: Sequence[str]) -> Iterator[str]:
    yield time_of(row[ours].median) if ours in row else "–"
    for name in names:
        if name not in row:
            yield "–"
        else:
            ratio = f" ({row[ours].times_as_fast(row[name]):.2f} ×)" if ours in row else ""
            yield f"{time_of(row[name].median)}{ratio}"


def time_of(seconds: float) -> str:
    """With three digits at least."""
    unit, size = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("µs", 1e-6))
    value = seconds / size
    return f"{value:.{max(0, 3 - len(f'{value:.0f}'))}f} {unit}"


# A line each


def _steps(result: Result) -> Iterator[list[str]]:
    """Time of a step, and how many times as long each peer takes."""
    for name, row in result.under("training step, "):
        if result.ours in row:
            ours = row[result.ours]
            peers = [
                f"{contender(who).label} {ours.times_as_fast(row[who]):.2f} ×"
                for who in COLUMNS
                if who in row and who in (*GPU_PEERS, *PEERS)
            ]
            yield [f"a training step of {_network(name)}", f"{time_of(ours.median)}; {', '.join(peers)}"]


def _against_peers(result: Result, prefix: str) -> list[tuple[float, str]]:
    """How many times as fast as the fastest peer, and at what, against whom; worst first."""
    found = []
    for title, row in result.under(prefix):
        peer = fastest_peer(row)
        if peer is not None and result.ours in row:
            ratio = row[result.ours].times_as_fast(peer)
            found.append((ratio, f"{title}, against {contender(peer.contender).label}"))
    return sorted(found)


def _activations(result: Result) -> Iterator[list[str]]:
    if found := _against_peers(result, "activation, "):
        worst, where = found[0]
        yield [
            "steps with tanh, gelu and silu on S, M and N: times as fast as the fastest peer",
            f"{worst:.2f} ({where}) to {found[-1][0]:.2f}",
        ]


def _shapes(result: Result) -> Iterator[list[str]]:
    if found := _against_peers(result, "random shape, "):
        worst, where = found[0]
        mean = prod(ratio for ratio, _ in found) ** (1 / len(found))
        yield [
            f"steps of {len(found)} random networks: times as fast as the fastest peer",
            f"{mean:.2f} in the geometric mean; {worst:.2f} at the least ({where})",
        ]


def _predictions(result: Result) -> Iterator[list[str]]:
    rows = {name: row for name, row in result.under("predict, ") if {result.ours, "torch"} <= row.keys()}
    if rows:
        ratios = (f"{name} {row[result.ours].times_as_fast(row['torch']):.2f}" for name, row in rows.items())
        yield ["`predict` on 100,000 rows: times as fast as PyTorch eager", ", ".join(ratios)]


def _fits(result: Result) -> Iterator[list[str]]:
    for data, row in result.under("fit, "):
        if result.ours not in row:
            continue
        ours, peer = row[result.ours], row.get("sklearn")
        text = f"{time_of(ours.median)}, accuracy {final_accuracy(ours):.2%}"
        if peer:
            ratio = ours.times_as_fast(peer)
            text += f"; scikit-learn {time_of(peer.median)} ({ratio:.2f} ×), accuracy {final_accuracy(peer):.2%}"
        yield [f"`fit` on {data}, {len(ours.notes['curves'][0])} epochs", text]


def _estimators(result: Result) -> Iterator[list[str]]:
    if ratios := _in_place(result, "estimator, ", "sklearn"):
        yield ["`backprop_gpu.sklearn.MLPClassifier`: times as fast as scikit-learn's", ratios]


def _modules(result: Result) -> Iterator[list[str]]:
    if ratios := _in_place(result, "autograd, ", "torch"):
        yield ["`backprop_gpu.torch.FusedMLP`, forward and backward pass: times as fast as `nn.Sequential`", ratios]


def _in_place(result: Result, prefix: str, peer: str) -> str:
    """How many times as fast as the peer in whose place ours is put, for each piece of work."""
    rows = {name: row for name, row in result.under(prefix) if {result.ours_in(row), peer} <= row.keys()}
    return "; ".join(f"{name} {row[result.ours_in(row)].times_as_fast(row[peer]):.2f}" for name, row in rows.items())


# Accuracy


def final_accuracy(bench: Bench) -> float:
    """On held-out rows after the last epoch, the mean over the seeds."""
    finals = [curve[-1][1] for curve in bench.notes["curves"]]
    return sum(finals) / len(finals)


def seconds_to_target(bench: Bench) -> float | None:
    """Time until the end of the first epoch with the target's accuracy, the median; None where a run never had it."""
    target = bench.notes["target"]
    reached = [next((s for s, accuracy in curve if accuracy >= target), None) for curve in bench.notes["curves"]]
    return None if None in reached else quartiles([s for s in reached if s is not None])[1]


# Everything

SECTIONS = (
    ("Training steps", "training step, "),
    ("Training steps on one thread", "one thread, "),
    ("Other activations", "activation, "),
    ("Random networks", "random shape, "),
    ("Width and batch: two hidden layers of as many neurons as inputs, 10 classes", "width "),
    ("`predict`, 100,000 rows", "predict, "),
    *((f"Operation `{name}`, on the largest layer of each network", f"{name}, ") for name in OPERATIONS),
    ("`fit`, end to end", "fit, "),
    ("`backprop_gpu.sklearn` in scikit-learn's place, with the same settings", "estimator, "),
    ("`backprop_gpu.torch` in PyTorch's place: forward and backward pass under autograd", "autograd, "),
    ("A new process: import", "import"),
    ("A new process: until the first steps of M are done", "first step, "),
)


def everything(result: Result) -> str:
    """All tables of one file."""
    parts = [heading(result)]
    for title, prefix in SECTIONS:
        if rows := dict(result.under(prefix)):
            parts.append(f"### {title}\n\n{beside('', result, rows)}")
    return "\n\n".join(
        [
            *parts,
            *_peaks(result),
            *_accuracies(result),
            *_variants(result),
            *_roofline(result),
            *_ceilings(result),
            *_uncertain(result),
            _contended(result),
        ]
    )


def _peaks(result: Result) -> Iterator[str]:
    rows = [
        [
            cache,
            ", ".join(f"{contender(who).label} {quartiles(each.notes['peak_mb'])[1]:.0f}" for who, each in row.items()),
        ]
        for cache, row in result.under("first step, ")
    ]
    if rows:
        yield f"### Most memory of those new processes, MB\n\n{table(['compiled code on disk', ''], rows)}"


def _accuracies(result: Result) -> Iterator[str]:
    rows = [
        [data, contender(bench.contender).label, f"{final_accuracy(bench):.2%}", *_target(bench)]
        for data, row in result.under("fit, ")
        for bench in row.values()
    ]
    if rows:
        header = ["data", "", "accuracy at the end", "target", "time to it"]
        yield f"### Accuracy on held-out rows\n\n{table(header, rows)}"


def _target(bench: Bench) -> list[str]:
    seconds = seconds_to_target(bench)
    return [f"{bench.notes['target']:.1%}", "not reached" if seconds is None else time_of(seconds)]


def _variants(result: Result) -> Iterator[str]:
    """Which of a peer's ways was taken, where it has several."""
    rows = [
        [group, contender(bench.contender).label, bench.notes["variant"]]
        for group, row in result.groups.items()
        for bench in row.values()
        if bench.notes.get("variant") and group.startswith(("training step", "predict"))
    ]
    if rows:
        header = ["", "", "the fastest of its ways"]
        yield f"### Peers at their best\n\n{table(header, rows)}"


def _roofline(result: Result) -> Iterator[str]:
    """The products' share of the fastest large product that was measured in the same run."""
    peak = ceiling(result)
    if not peak:
        return
    rows = [
        [_network(name), *(f"{row[who].case.flops / row[who].median / peak:.0%}" for who in (result.ours, FLOOR))]
        for name, row in result.under("training step, ")
        if {result.ours, FLOOR} <= row.keys()
    ]
    if rows:
        header = [f"of {peak / 1e9:.0f} GFLOP/s", *(contender(who).label for who in (result.ours, FLOOR))]
        yield f"### A step's products, as a share of the fastest large product\n\n{table(header, rows)}"


def _ceilings(result: Result) -> Iterator[str]:
    """On a GPU, how near each operation comes to what the product and the copy of the same run allow."""
    peak, bandwidth = ceiling(result), _bandwidth(result)
    if not (result.machine["gpu"] and peak and bandwidth):
        return
    rows = []
    for operation in OPERATIONS:
        for layer, row in result.under(f"{operation}, "):
            case = next(iter(row.values())).case
            flops, traffic = _flops(operation, case), _traffic(operation, case)
            least = max(flops / peak, traffic / bandwidth)
            shares = [f"{least / row[name].median:.0%}" if name in row else "–" for name in GPU_COLUMNS]
            rows.append([f"`{operation}`, {layer}", *shares])
    header = [
        f"of {peak / 1e12:.1f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s",
        *(contender(name).label for name in GPU_COLUMNS),
    ]
    yield f"### Share of the ceilings\n\n{table(header, rows)}"


def _flops(operation: str, case: Case) -> float:
    return case.product_flops if operation.startswith("dense_") else 0.0


def _traffic(operation: str, case: Case) -> float:
    """Bytes of every array that the operation has to read or write, once."""
    (n_in, n_out), N = case.layer_sizes, case.batch_size
    numbers = {"output_delta": 2 * N * n_out, "update": 7 * n_in * n_out}
    return 4.0 * numbers.get(operation, N * n_in + n_in * n_out + N * n_out)


def _bandwidth(result: Result) -> float:
    """Bytes a second of the fastest contender's copy, read and written; 0 where not measured."""
    row = result.groups.get("ceiling, copy", {})
    return max((2 * 4 * prod(bench.case.layer_sizes) / bench.median for bench in row.values()), default=0.0)


def ceiling(result: Result) -> float:
    """Operations a second of the fastest contender's product of two matrices of 2048 × 2048; 0 where not measured."""
    row = result.groups.get("ceiling, product", {})
    return max((bench.case.product_flops / bench.median for bench in row.values()), default=0.0)


WIDE = 0.1
"""Quartiles that are further apart than this share of the median are told."""


def _uncertain(result: Result) -> Iterator[str]:
    """The ratios that differ much from round to round, the widest first."""
    wide = {key: found for key, found in result.ratios().items() if _width(found) > WIDE}
    rows = [
        [group, contender(name).label, spread(wide[group, name]), str(len(result.groups[group][name].seconds))]
        for group, name in sorted(wide, key=lambda key: -_width(wide[key]))
    ]
    if rows:
        text = f"of {len(result.ratios())}, those whose quartiles are over {WIDE:.0%} of the median apart"
        yield f"### Ratios that vary between rounds: {text}\n\n{table(['', '', 'median [quartiles]', 'rounds'], rows)}"


def _width(found: tuple[float, float, float]) -> float:
    low, middle, high = found
    return (high - low) / middle


def spread(found: tuple[float, float, float]) -> str:
    """A ratio, and its quartiles."""
    low, middle, high = found
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _contended(result: Result) -> str:
    benches = [bench for row in result.groups.values() for bench in row.values()]
    samples, contended = sum(len(b.seconds) for b in benches), sum(b.notes["contended"] for b in benches)
    return f"{samples:,} samples; {contended} of them were contended in spite of repetitions."
