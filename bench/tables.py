"""Result files as Markdown: the README's short tables, and RESULTS.md's, which show everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

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
    """The steps of S, M, N and L, and most other suites in a line, over all CPUs, and of each GPU."""
    on_gpu = [[result] for result in results if result.machine["gpu"]]
    on_cpu = [result for result in results if not result.machine["gpu"]]
    return "\n\n".join(part for group in (on_cpu, *on_gpu) if group for part in _short(group))


def _short(results: Sequence[Result]) -> Iterator[str]:
    yield "\n".join(map(heading, results)) if len(results) == 1 else _machines(results)
    peers = [who for who in COLUMNS if who in (*GPU_PEERS, *PEERS) and any(_under(results, "training step, ", who))]
    if steps := list(_steps(results, peers)):
        yield table(["a training step of", "ours", *(contender(who).label for who in peers)], steps)
    makers = (_activations, _shapes, _predictions, _fits, _own_loops, _estimators, _modules)
    if lines := [line for make in makers for line in make(results)]:
        yield table(["", "times as fast as", ""], lines)


def _machines(results: Sequence[Result]) -> str:
    """The machines, and what was the same on all of them."""
    names = [f"{each.machine['cpu']}, {each.machine['threads']} threads, {each.machine['simd']}" for each in results]
    versions = [set(each.machine["versions"].items()) for each in results]
    same = [" ".join(pair) for pair in results[0].machine["versions"].items() if pair in set.intersection(*versions)]
    dates = span([each.date for each in results], str)
    text = f"**{len(results)} machines**: {'; '.join(names)} ({dates}; {', '.join(same)})."
    return f"{text} From the least to the most, of those measured:"


def heading(result: Result) -> str:
    """Machine, threads, versions, date."""
    machine = result.machine
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"**{device}** ({result.date}; Python {machine['python']}, {versions})"


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
            beside = f" ({ratio(row[ours].times_as_fast(row[name]))} ×)" if ours in row else ""
            yield f"{time_of(row[name].median)}{beside}"


def time_of(seconds: float) -> str:
    """With three digits at least."""
    unit, size = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("µs", 1e-6))
    value = seconds / size
    return f"{value:.{max(0, 3 - len(f'{value:.0f}'))}f} {unit}"


def span(values: Iterable[Any], form: Callable[[Any], str]) -> str:
    """The least and the most of what several machines gave."""
    ordered = sorted(values)
    least, most = form(ordered[0]), form(ordered[-1])
    return least if least == most else f"{least} – {most}"


def ratio(value: float) -> str:
    """Of two times."""
    return f"{value:.2f}"


# A line each, over the machines of a kind


def _under(results: Sequence[Result], prefix: str, who: str) -> Iterator[tuple[str, Bench, Bench]]:
    """Each piece of work whose name begins so, on each machine where ours and that contender were measured at it."""
    for result in results:
        for title, row in result.under(prefix):
            if {result.ours_in(row), who} <= row.keys():
                yield title, row[result.ours_in(row)], row[who]


def _ratios(results: Sequence[Result], prefix: str, who: str) -> dict[str, list[float]]:
    """How many times as fast as that contender, on each machine, by the piece of work."""
    found: dict[str, list[float]] = {}
    for title, ours, other in _under(results, prefix, who):
        found.setdefault(title, []).append(ours.times_as_fast(other))
    return found


def _steps(results: Sequence[Result], peers: Sequence[str]) -> Iterator[list[str]]:
    """Time of a step, and how many times as long each peer takes."""
    against = {who: _ratios(results, "training step, ", who) for who in peers}
    for name in NETWORKS:
        rows = [(each, row) for each in results for title, row in each.under("training step, ") if title == name]
        times = [row[each.ours].median for each, row in rows if each.ours in row]
        if times:
            ratios = [against[who].get(name) for who in peers]
            yield [_network(name), span(times, time_of), *(f"{span(r, ratio)} ×" if r else "–" for r in ratios)]


def _against_peers(result: Result, prefix: str) -> list[tuple[float, str]]:
    """How many times as fast as the fastest peer, and at what, against whom; worst first."""
    found = []
    for title, row in result.under(prefix):
        peer = fastest_peer(row)
        if peer is not None and result.ours in row:
            found.append((row[result.ours].times_as_fast(peer), f"{title}, against {contender(peer.contender).label}"))
    return sorted(found)


def _activations(results: Sequence[Result]) -> Iterator[list[str]]:
    found = [pair for result in results for pair in _against_peers(result, "activation, ")]
    if found:
        worst, where = min(found)
        what = "steps with tanh, gelu and silu on S, M and N"
        yield [what, "the fastest peer", f"{ratio(worst)} ({where}) – {ratio(max(found)[0])}"]


def _shapes(results: Sequence[Result]) -> Iterator[list[str]]:
    found = [pairs for result in results if (pairs := _against_peers(result, "random shape, "))]
    if found:
        worst, where = min(pair for pairs in found for pair in pairs)
        means = span([prod(r for r, _ in pairs) ** (1 / len(pairs)) for pairs in found], ratio)
        text = f"{means} in the geometric mean; {ratio(worst)} at the least ({where})"
        yield [f"steps of {len(found[0])} random networks", "the fastest peer", text]


def _predictions(results: Sequence[Result]) -> Iterator[list[str]]:
    yield from _in_place(results, "predict, ", "`predict` on 100,000 rows", "torch")


def _fits(results: Sequence[Result]) -> Iterator[list[str]]:
    for data, ratios in _ratios(results, "fit, ", "sklearn").items():
        both = [(ours, peer) for title, ours, peer in _under(results, "fit, ", "sklearn") if title == data]
        ours, theirs = (span(map(final_accuracy, benches), "{:.2%}".format) for benches in zip(*both, strict=True))
        epochs = len(both[0][0].notes["curves"][0])
        text = f"{span(ratios, ratio)}; accuracy {ours}, and {theirs}"
        yield [f"`fit` on {data}, {epochs} epochs", contender("sklearn").label, text]


def _own_loops(results: Sequence[Result]) -> Iterator[list[str]]:
    yield from _in_place(results, "own loop, ", "a loop of one's own: a call of `net.partial_fit` a step", "torch")


def _estimators(results: Sequence[Result]) -> Iterator[list[str]]:
    yield from _in_place(results, "estimator, ", "`backprop_gpu.sklearn.MLPClassifier`", "sklearn")


def _modules(results: Sequence[Result]) -> Iterator[list[str]]:
    what = "`backprop_gpu.torch.FusedMLP`, forward and backward pass"
    yield from _in_place(results, "autograd, ", what, "torch")


def _in_place(results: Sequence[Result], prefix: str, what: str, peer: str) -> Iterator[list[str]]:
    """A line of how many times as fast as the peer, for each piece of work."""
    if ratios := _ratios(results, prefix, peer):
        text = "; ".join(f"{title} {span(values, ratio)}" for title, values in ratios.items())
        yield [what, contender(peer).label, text]


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
    ("A loop of one's own: a call of `net.partial_fit` a step", "own loop, "),
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
