"""Pictures: a small network beside the same network reversed, and the curves of a training run.

Needs matplotlib, imported only when a picture is made. No pyplot and no global state: a figure belongs to its caller,
is saved with ``figure.savefig("net.svg")``, and shows itself in a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu import data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from backprop_gpu.history import History
    from backprop_gpu.mlp import MLP

__all__ = ["MAX_LAYERS", "MAX_NEURONS", "draw_network", "plot_history"]

MAX_LAYERS, MAX_NEURONS = 5, 8
"""The largest network that `draw_network` takes: its layers, and the neurons (or inputs) of the widest."""

Floats: TypeAlias = npt.NDArray[np.float64]

POSITIVE, NEGATIVE, ZERO = "#2166ac", "#c0392b", "#b0b0b0"
INK, GREY = "#222222", "#6b6b6b"
FORWARD_FILL, BACKWARD_FILL, INPUT_FILL, COST_FILL = "#e8f0fa", "#fdeee3", "#f3f3f3", "#fff6d6"
FONT = "DejaVu Sans"
"""Comes with matplotlib and has every glyph used here, whatever font the caller has set."""
PLATE = {"boxstyle": "square,pad=0.3", "facecolor": "white", "edgecolor": "none"}
"""Behind a number that stands on an edge, and wide enough that the edge is not read as a minus sign."""

MAX_LABELS = 24
"""A layer of more edges goes without the numbers on them: they would hide each other."""

LOSS = "loss C"
SCORES = {"val_accuracy": "validation accuracy", "val_r2": "validation r2"}
CURVES = {"training": POSITIVE, "validation": "#d97706", "learning rate": GREY}
SCREEN_DPI = 80


# The network and the same network reversed


def draw_network(net: MLP, X: Any, y: Any) -> Figure:
    """The forward pass over one row, and below it the backward pass: the same network, read from right to left.

    Above, every neuron shows z = Σ w a_prev + b and a = σ(z), every edge its w. Below, ∂C/∂z of the output layer
    enters from the right, is multiplied by Wᵀ, and each hidden neuron is an amplifier with the gain σ′(z):
    ∂C/∂z = (Σ w ∂C/∂z_next) σ′(z). There every edge shows ∂C/∂w = a_prev · ∂C/∂z (+ alpha w). Edges are blue where
    their number is positive and red where it is negative, and the wider the larger it is. A layer of more than 24 edges
    goes without the numbers on them.

    Parameters
    ----------
    net : a network of at most 5 layers of at most 8 neurons, inputs too
    X : (1, n_inputs), one row
    y : (1,) or (1, n_outputs), as in `MLP.backprop`, which all numbers come from

    Raises
    ------
    ValueError for a larger network, for more than one row, and as `backprop`; ImportError without matplotlib.
    """
    _require_small(net.layer_sizes)
    numbers = _numbers(net, X, y)
    plan = _Plan(net.layer_sizes)
    board = _Board(plan.width, plan.height)
    _draw_title(board, plan, net, numbers)
    _draw_forward(_Panel(board, plan, plan.height - TITLE), net, numbers)
    _draw_backward(_Panel(board, plan, plan.panel_height), net, numbers)
    return board.figure


def _require_small(sizes: Sequence[int]) -> None:
    if len(sizes) - 1 > MAX_LAYERS or max(sizes) > MAX_NEURONS:
        raise ValueError(
            f"a picture has room for at most {MAX_LAYERS} layers of at most {MAX_NEURONS} neurons, inputs too; "
            f"got layer_sizes={list(sizes)}"
        )


def _draw_title(board: _Board, plan: _Plan, net: MLP, numbers: _Numbers) -> None:
    arch = net.architecture
    penalty = f" + ½ · {arch.alpha:g} $Σ\\, w^2$" if arch.alpha else ""
    board.text(plan.width / 2, plan.height - 0.3, f"$C$ = {_number(numbers.loss)}", fontsize=16, weight="bold")
    edges = "edges: blue > 0, red < 0, the wider the larger"
    board.text(plan.width / 2, plan.height - 0.62, f"{arch.loss.name}{penalty};   {edges}", fontsize=10.5, color=GREY)


@dataclass(frozen=True)
class _Numbers:
    """One row's forward and backward pass on the host; a list has one array per layer, for `gain` per hidden layer."""

    loss: float
    target: Floats
    W: list[Floats]
    b: list[Floats]
    a_prev: list[Floats]
    z: list[Floats]
    a: list[Floats]
    gain: list[Floats]
    delta: list[Floats]
    dW: list[Floats]
    db: list[Floats]


def _numbers(net: MLP, X: Any, y: Any) -> _Numbers:
    passed = net.backprop(X, y)
    n_rows = len(passed.z[0])
    if n_rows != 1:
        raise ValueError(f"a picture shows the numbers of exactly one row; got {n_rows} (the first: X[:1], y[:1])")

    return _Numbers(
        loss=passed.loss,
        target=_target_row(net, y),
        W=_host(net, net.W),
        b=_host(net, net.b),
        a_prev=_rows(net, passed.a_prev),
        z=_rows(net, passed.z),
        a=_rows(net, passed.a),
        gain=_rows(net, _gains(net, passed.z, passed.a)),
        delta=_rows(net, passed.delta),
        dW=_host(net, passed.dW),
        db=_host(net, passed.db),
    )


def _host(net: MLP, arrays: Sequence[Any]) -> list[Floats]:
    return [np.asarray(net.ops.to_numpy(x), np.float64) for x in arrays]


def _rows(net: MLP, arrays: Sequence[Any]) -> list[Floats]:
    return [x[0] for x in _host(net, arrays)]


def _gains(net: MLP, z: Sequence[Any], a: Sequence[Any]) -> list[Any]:
    """σ′(z) of each hidden layer: the backward operation, given ∂C/∂a = 1 for every neuron."""
    ops, gains = net.ops, []
    for z_l, a_l, activation in zip(z, a, net.architecture.activations, strict=False):  # the output layer has none
        ones, identity = np.ones((1, z_l.shape[1])), np.eye(z_l.shape[1])
        kept = z_l if activation.derivative_from == "z" else a_l
        dtype = str(z_l.dtype)
        gains.append(ops.dense_backward(ops.asarray(ones, dtype), ops.asarray(identity, dtype), kept, activation))
    return gains


def _target_row(net: MLP, y: Any) -> Floats:
    """What each output should be; a label is 1 for its class and 0 for the others."""
    n_outputs = net.layer_sizes[-1]
    target = data.as_target(y, net.architecture.loss, n_outputs, 1, "float64")
    return np.asarray(target[0] if target.ndim == 2 else np.eye(n_outputs)[target[0]], np.float64)


# Where things are, in inches

RADIUS = 0.45
"""Of a neuron's circle."""
PILL = (0.82, 0.48)
"""The box with a neuron's ∂C/∂z."""
AMPLIFIER = (0.95, 0.84)
"""The triangle with σ′(z), which ends at its ∂C/∂z."""
INPUT, COST = 0.34, 0.36
"""Radius of an input's circle, and half the side of C's box."""
COST_GAP = 2.1
"""From the output layer to C."""
MARGIN, TITLE = 0.8, 0.9
"""Beside the outer columns, and above the first panel."""
HEAD, FOOT = 1.15, 0.2
"""Of a panel: room for its caption and column heads, and room under the lowest neuron."""
MIN_WIDTH = 9.5


@dataclass(frozen=True)
class _Plan:
    """The columns, one for the inputs and one per layer, that both passes share."""

    sizes: tuple[int, ...]

    @property
    def pitch(self) -> float:
        """From one neuron of a layer to the next."""
        return 1.3 if max(self.sizes) <= 4 else 1.1

    @property
    def columns(self) -> Floats:
        """x of each column, and of C after the last, from 0."""
        gaps = [3.4 if n_in * n_out <= 6 else 4.5 for n_in, n_out in pairwise(self.sizes)]
        return np.cumsum([0.0, *gaps, COST_GAP])

    @property
    def width(self) -> float:
        return max(MIN_WIDTH, float(self.columns[-1]) + 2 * MARGIN)

    @property
    def panel_height(self) -> float:
        return HEAD + max(self.sizes) * self.pitch + FOOT

    @property
    def height(self) -> float:
        return TITLE + 2 * self.panel_height


class _Board:
    """A figure to draw on in inches, from the lower left."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = _new_figure(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        style = dict[str, Any](ha="center", va="center", fontsize=9, color=INK, zorder=4) | style
        self.axes.text(x, y, text, fontfamily=FONT, math_fontfamily="dejavusans", usetex=False, **style)

    def line(self, start: Floats, end: Floats, color: str, width: float) -> None:
        self.axes.plot([start[0], end[0]], [start[1], end[1]], color=color, lw=width, zorder=1)

    def arrow(self, start: Floats, end: Floats) -> None:
        style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (end[0], end[1]), (start[0], start[1]), arrowprops=style, zorder=2)

    def circle(self, center: Floats, radius: float, fill: str) -> None:
        from matplotlib.patches import Circle

        self._add(Circle((center[0], center[1]), radius), fill)

    def pill(self, center: Floats, size: tuple[float, float], fill: str) -> None:
        """A rounded box."""
        from matplotlib.patches import FancyBboxPatch

        corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
        self._add(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.14"), fill)

    def triangle(self, tip: Floats, size: tuple[float, float], fill: str) -> None:
        """An amplifier that points to the left."""
        from matplotlib.patches import Polygon

        self._add(Polygon(tip + np.array([(0, 0), (1, 0.5), (1, -0.5)]) * size, joinstyle="round"), fill)

    def _add(self, patch: Patch, fill: str) -> None:
        patch.set(facecolor=fill, edgecolor=INK, linewidth=1.1, zorder=3)
        self.axes.add_patch(patch)


@dataclass(frozen=True)
class _Panel:
    """One of the two passes on the board: its rows hang below `top`."""

    board: _Board
    plan: _Plan
    top: float

    @property
    def columns(self) -> Floats:
        """x of each column, and of C."""
        columns = self.plan.columns
        centred: Floats = columns + (self.plan.width - columns[-1]) / 2
        return centred

    @property
    def middle(self) -> float:
        """y of the middle of every layer."""
        return self.top - HEAD - max(self.plan.sizes) * self.plan.pitch / 2

    def points(self, column: int) -> Floats:
        """Where a layer's neurons are, from the top, (n, 2)."""
        n = self.plan.sizes[column]
        ys = self.middle + self.plan.pitch * ((n - 1) / 2 - np.arange(n))
        return np.column_stack([np.full(n, self.columns[:-1][column]), ys])

    @property
    def cost(self) -> Floats:
        """Where C is."""
        return np.array([self.columns[-1], self.middle])

    def caption(self, name: str, formula: str) -> None:
        """The panel's heading."""
        self.board.text(MARGIN / 2, self.top - 0.22, name, ha="left", fontsize=13, weight="bold")
        self.board.text(MARGIN / 2, self.top - 0.52, formula, ha="left", fontsize=10.5, color=GREY)

    def heads(self, names: Sequence[str], weights: Sequence[str]) -> None:
        """What stands above each column, and between it and the next."""
        y = self.top - HEAD + 0.1
        for x, name in zip(self.columns, names, strict=False):
            self.board.text(x, y, name, fontsize=10.5)
        for (left, right), name in zip(pairwise(self.columns), weights, strict=False):
            self.board.text((left + right) / 2, y, name, fontsize=11, color=GREY)


# The forward pass


def _draw_forward(panel: _Panel, net: MLP, numbers: _Numbers) -> None:
    panel.caption("Forward pass  ⟶", "$z = Σ\\, w\\, a_{prev} + b$,   $a = σ(z)$;   on each edge: $w$")
    heads = [f"layer {layer}: $σ$ = {name}" for layer, name in enumerate(net.architecture.sigmas, 1)]
    panel.heads(["inputs", *heads], [f"$W^{layer + 1}${_left_out(W)}" for layer, W in enumerate(numbers.W)])
    _draw_inputs(panel, numbers)
    for layer, W in enumerate(numbers.W):
        start, end = panel.points(layer), panel.points(layer + 1)
        _draw_edges(panel.board, _Edges(start, end, RADIUS if layer else INPUT, RADIUS, W), _largest(numbers.W))
        for point, z, a, b in zip(end, numbers.z[layer], numbers.a[layer], numbers.b[layer], strict=True):
            _draw_neuron(panel.board, point, z, a, b)
    _draw_targets(panel, numbers)


def _draw_inputs(panel: _Panel, numbers: _Numbers) -> None:
    for i, (point, x) in enumerate(zip(panel.points(0), numbers.a_prev[0], strict=True)):
        panel.board.circle(point, INPUT, INPUT_FILL)
        panel.board.text(point[0], point[1], f"$x_{i + 1}$\n{_number(x)}", linespacing=1.35)


def _draw_neuron(board: _Board, point: Floats, z: float, a: float, b: float) -> None:
    board.circle(point, RADIUS, FORWARD_FILL)
    board.text(point[0], point[1], f"$z$ {_number(z)}\n$a$ {_number(a)}", linespacing=1.35)
    board.text(point[0], point[1] - RADIUS - 0.1, f"$b$ {_number(b)}", fontsize=7.5, color=GREY)


def _draw_targets(panel: _Panel, numbers: _Numbers) -> None:
    for point, y in zip(panel.points(-1), numbers.target, strict=True):
        start, end = _between(point, panel.cost, RADIUS, COST)
        panel.board.arrow(start, end)
        middle = (start + end) / 2
        panel.board.text(middle[0], middle[1], f"$y$ {_number(y)}", fontsize=8, color=GREY, bbox=PLATE)
    _draw_cost(panel, numbers)


def _draw_cost(panel: _Panel, numbers: _Numbers) -> None:
    panel.board.pill(panel.cost, (2 * COST, 2 * COST), COST_FILL)
    panel.board.text(panel.cost[0], panel.cost[1], f"$C$\n{_number(numbers.loss)}", linespacing=1.3)


# The backward pass


def _draw_backward(panel: _Panel, net: MLP, numbers: _Numbers) -> None:
    penalty = f" + {net.architecture.alpha:g} $w$" if net.architecture.alpha else ""
    edge = f"$∂C/∂w = a_{{prev}}\\;·\\;∂C/∂z${penalty}"
    formula = f"$∂C/∂z = σ′(z)\\, Σ\\, w\\, ∂C/∂z_{{next}}$;   on each edge: {edge}"
    panel.caption("Backward pass: the same network reversed  ⟵", formula)
    panel.heads(*_backward_heads(numbers))
    _draw_inputs(panel, numbers)
    for layer, dW in enumerate(numbers.dW):
        _draw_edges(panel.board, _backward_edges(panel, layer, dW), _largest(numbers.dW))
    for layer in range(len(numbers.gain)):
        _draw_amplifiers(panel, numbers, layer)
    _draw_output_deltas(panel, numbers)


def _backward_heads(numbers: _Numbers) -> tuple[list[str], list[str]]:
    n_layers = len(numbers.W)
    gains = [f"layer {layer}: gain $σ′(z)$" for layer in range(1, n_layers)]
    weights = ["", *(f"$(W^{layer})^T$" for layer in range(2, n_layers + 1))]  # nothing is sent on to the inputs
    notes = [name + _left_out(dW) for name, dW in zip(weights, numbers.dW, strict=True)]
    return ["inputs", *gains, f"layer {n_layers}: $∂C/∂z$ enters"], notes


def _draw_amplifiers(panel: _Panel, numbers: _Numbers, layer: int) -> None:
    columns = numbers.gain[layer], numbers.delta[layer], numbers.db[layer]
    for point, gain, delta, db in zip(panel.points(layer + 1), *columns, strict=True):
        tip = _shifted(point, (PILL[0] - AMPLIFIER[0]) / 2)
        panel.board.triangle(tip, AMPLIFIER, BACKWARD_FILL)
        text_x = tip[0] + 0.65 * AMPLIFIER[0]  # a triangle's room is on its wide side
        panel.board.text(text_x, tip[1], f"$σ′(z)$\n{_number(gain)}", fontsize=7.5)
        _draw_delta(panel.board, _shifted(point, -AMPLIFIER[0] / 2), delta, db)


def _backward_edges(panel: _Panel, layer: int, dW: Floats) -> _Edges:
    """From the right side of an amplifier, or the inputs, to the left side of the next layer's ∂C/∂z."""
    n_layers = len(panel.plan.sizes) - 1
    half = (PILL[0] + AMPLIFIER[0]) / 2
    start = _shifted(panel.points(layer), half if layer > 0 else 0.0)
    end = _shifted(panel.points(layer + 1), -half if layer < n_layers - 1 else -PILL[0] / 2)
    return _Edges(start, end, INPUT if layer == 0 else 0.0, 0.0, dW)


def _shifted(points: Floats, dx: float) -> Floats:
    shifted: Floats = points + np.array([dx, 0.0])
    return shifted


def _draw_output_deltas(panel: _Panel, numbers: _Numbers) -> None:
    for point, delta, db in zip(panel.points(-1), numbers.delta[-1], numbers.db[-1], strict=True):
        start, end = _between(panel.cost, _shifted(point, PILL[0] / 2), COST, 0.0)
        panel.board.arrow(start, end)
        _draw_delta(panel.board, point, delta, db)
    _draw_cost(panel, numbers)


def _draw_delta(board: _Board, point: Floats, delta: float, db: float) -> None:
    board.pill(point, PILL, BACKWARD_FILL)
    board.text(point[0], point[1], f"$∂C/∂z$\n{_number(delta)}", linespacing=1.2)
    board.text(point[0], point[1] - PILL[1] / 2 - 0.11, f"$∂C/∂b$ {_number(db)}", fontsize=7.5, color=GREY)


# Edges, and the numbers on them


@dataclass(frozen=True)
class _Edges:
    """Every neuron of one column joined to every one of the next, from circle to circle."""

    left: Floats
    right: Floats
    left_radius: float
    right_radius: float
    values: Floats

    @property
    def ends(self) -> Floats:
        """(n_in · n_out, 2, 2): edge, its two ends, (x, y)."""
        return np.array([_between(p, q, self.left_radius, self.right_radius) for p in self.left for q in self.right])


def _between(p: Floats, q: Floats, p_radius: float, q_radius: float) -> tuple[Floats, Floats]:
    """The line from p to q, outside of the circles around its ends."""
    direction = (q - p) / np.linalg.norm(q - p)
    return p + p_radius * direction, q - q_radius * direction


def _draw_edges(board: _Board, edges: _Edges, largest: float) -> None:
    ends, values = edges.ends, edges.values.ravel()
    for (start, end), value in zip(ends, values, strict=True):
        board.line(start, end, _color(value), 0.5 + 3.0 * abs(value) / largest)
    if len(values) <= MAX_LABELS:
        for (start, end), value, place in zip(ends, values, _label_places(ends), strict=True):
            _label_edge(board, start, end, value, place)


def _left_out(values: Floats) -> str:
    return f"  ({values.size} numbers left out)" if values.size > MAX_LABELS else ""


def _label_edge(board: _Board, start: Floats, end: Floats, value: float, place: float) -> None:
    (x, y), (dx, dy) = start + place * (end - start), end - start
    angle = float(np.degrees(np.arctan2(dy, dx)))
    board.text(x, y, _number(value), fontsize=7.5, color=_color(value), rotation=angle, bbox=PLATE)


def _label_places(ends: Floats) -> Floats:
    """For each edge, the part of its length at which its label stands clear of the other labels and edges.

    Each label in turn takes its best place while the others stay where they are; three rounds settle it.
    """
    places = _possible_places(ends)
    labels = _label_points(ends, places)
    others = [np.arange(len(ends)) != i for i in range(len(ends))]
    fixed = 0.5 * (places - 0.5) ** 2
    fixed += [_closeness_to_edges(labels[i], ends[other]) for i, other in enumerate(others)]
    chosen = np.full(len(ends), places.shape[1] // 2)
    for _ in range(3):
        for i, other in enumerate(others):
            taken = labels[other, chosen[other]].reshape(-1, 2)
            chosen[i] = (fixed[i] + _closeness_to_labels(labels[i], taken)).argmin()
    return np.take_along_axis(places, chosen[:, None], axis=1)[:, 0]


def _possible_places(ends: Floats) -> Floats:
    """(edges, places): parts of each edge's length, half a label away from its ends and more."""
    margin = 0.36 / np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    return np.linspace(margin, 1 - margin, 39, axis=1)


def _label_points(ends: Floats, places: Floats) -> Floats:
    """(edges, places, 3, 2): three points along the label of each edge at each place."""
    start, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    unit = along / np.linalg.norm(along, axis=1, keepdims=True)
    centers = start[:, None] + places[..., None] * along[:, None]
    points: Floats = centers[:, :, None] + np.array([[-0.18], [0], [0.18]]) * unit[:, None, None]
    return points


def _closeness_to_labels(labels: Floats, taken: Floats) -> Floats:
    """For each place of a label, how much of it is within a line's height of the points of others."""
    distance = np.linalg.norm(labels[:, :, None] - taken, axis=-1)
    closeness: Floats = 10 * (np.maximum(0, 1 - distance / 0.22) ** 2).sum(axis=(1, 2))
    return closeness


def _closeness_to_edges(labels: Floats, ends: Floats) -> Floats:
    """For each place of a label, how much of it other edges cross or pass by."""
    start, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    part: Floats = np.clip(((labels[:, :, None] - start) * along).sum(-1) / (along**2).sum(-1), 0, 1)
    distance = np.linalg.norm(labels[:, :, None] - start - part[..., None] * along, axis=-1)
    closeness: Floats = (np.maximum(0, 1 - distance / 0.12) ** 2).sum(axis=(1, 2))
    return closeness


def _color(value: float) -> str:
    return ZERO if value == 0 else POSITIVE if value > 0 else NEGATIVE


def _largest(arrays: Sequence[Floats]) -> float:
    return max(float(np.abs(x).max()) for x in arrays) or 1.0


def _number(value: float) -> str:
    """Three digits and a true minus sign: 0.0223, −1.50, 1.2e−5; whole numbers as they are."""
    size = abs(value)
    if not np.isfinite(value) or (size < 1000 and size == np.floor(size)):
        text = f"{size:g}"
    elif 1e-3 <= size < 999.5:
        text = f"{size:#.3g}".rstrip(".")
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"−{text}" if value < 0 else text


# The curves of a training run


def plot_history(history: History) -> Figure:
    """The curves of a training run over its epochs, counted from 1.

    Loss, with the validation loss where there is one; on a log scale where all values are positive and span more than a
    factor of 10. Below it the validation score (accuracy or r2) and, where it varies, the learning rate. The epoch
    whose parameters early stopping kept is marked on every curve.

    Raises ValueError for a history without epochs; ImportError without matplotlib.
    """
    if not _n_epochs(history):
        raise ValueError("the history has no completed epoch to plot")
    panels = _curves(history.metrics)
    figure = _new_figure(7.0, 1.2 + 2.4 * len(panels), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves) in zip(rows, panels.items(), strict=True):
        _draw_curves(axes, label, curves, history.best_epoch)
    rows[0].set_title(_run_title(history), fontsize=11)
    _number_epochs(rows[-1], _n_epochs(history))
    return figure


def _n_epochs(history: History) -> int:
    return max((len(values) for values in history.metrics.values()), default=0)


def _curves(metrics: Mapping[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """What each panel shows: the name of its axis, and its curves by name."""
    losses = {"training": metrics.get("loss", []), "validation": metrics.get("val_loss", [])}
    panels = {LOSS: {name: values for name, values in losses.items() if values}}
    panels |= {label: {"validation": metrics[name]} for name, label in SCORES.items() if metrics.get(name)}
    rates = metrics.get("learning_rate", [])
    panels |= {"learning rate": {"learning rate": rates}} if len(set(rates)) > 1 else {}
    return panels


def _draw_curves(axes: Axes, label: str, curves: Mapping[str, list[float]], best_epoch: int | None) -> None:
    for name, values in curves.items():
        marker = "o" if len(values) == 1 else ""  # a line through one point cannot be seen
        axes.plot(np.arange(1, len(values) + 1), values, marker=marker, color=CURVES[name], label=name, lw=1.6)
        if best_epoch is not None:
            axes.plot(best_epoch + 1, values[best_epoch], "o", color=CURVES[name], ms=6)
    if best_epoch is not None:
        axes.axvline(best_epoch + 1, color=GREY, ls="--", lw=1.0, zorder=0, label=f"best epoch: {best_epoch + 1}")
    if label == LOSS and _spans_decades(np.concatenate(list(curves.values()))):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if label == LOSS:
        axes.legend(frameon=False)


def _spans_decades(values: Floats) -> bool:
    return bool(values.min() > 0 and values.max() > 10 * values.min())


def _run_title(history: History) -> str:
    n_epochs = _n_epochs(history)
    reason = f", stopped: {history.stopped}" if history.stopped not in ("", "epochs") else ""
    return f"{n_epochs} epoch{'s' * (n_epochs > 1)}{reason}"


def _number_epochs(axes: Axes, n_epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.5, n_epochs + 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


# The figure itself


def _new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """A white figure of that many inches, outside of pyplot, that shows itself in a notebook."""
    try:
        from matplotlib import figure as figures
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "backprop_gpu[plot]"') from error

    figure = figures.Figure(figsize=(width, height), facecolor="white", layout=layout)
    # IPython shows a figure by itself only once pyplot is imported; without, it looks for this method on the object.
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """The picture at twice the size it is shown in, which is sharp on any screen, with that size in CSS pixels."""
    buffer, (width, height) = BytesIO(), figure.get_size_inches() * SCREEN_DPI
    figure.savefig(buffer, format="png", dpi=2 * SCREEN_DPI)
    return buffer.getvalue(), {"width": round(width), "height": round(height)}
