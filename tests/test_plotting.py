"""Pictures show the numbers of `backprop`, legibly, and refuse what they cannot show."""

from __future__ import annotations

import io
import pickle
import sys
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.plotting import MAX_LABELS, MAX_LAYERS, MAX_NEURONS, _number, draw_network, plot_history

matplotlib = pytest.importorskip("matplotlib")


def make_net(sizes=(2, 3, 2), activation="tanh", **settings):
    net = bp.MLP(list(sizes), activation, backend="numpy", dtype="float64", seed=5, **settings)
    rng = np.random.default_rng(11)
    for b in net.b:
        b[:] = rng.normal(size=b.shape)
    return net, rng.normal(size=(1, sizes[0]))


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def count(figure, text):
    return texts(figure).count(text)


def saved(figure, kind):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


# The numbers on the picture


@pytest.mark.parametrize("activation", ["tanh", "gelu"], ids=["derivative-from-a", "derivative-from-z"])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3, 2), (3, 4, 4, 2)], ids=str)
def test_every_neuron_shows_what_backprop_says(sizes, activation):
    net, X = make_net(sizes, activation)
    figure = draw_network(net, X, [1])
    passed = net.backprop(X, [1])
    for z, a, b in zip(passed.z, passed.a, net.b, strict=True):
        for z_j, a_j, b_j in zip(z[0], a[0], b, strict=True):
            assert f"$z$ {_number(z_j)}\n$a$ {_number(a_j)}" in texts(figure)
            assert f"$b$ {_number(b_j)}" in texts(figure)
    for delta, db in zip(passed.delta, passed.db, strict=True):
        for delta_j, db_j in zip(delta[0], db, strict=True):
            assert delta_j != 0
            assert f"$∂C/∂z$\n{_number(delta_j)}" in texts(figure)
            assert f"$∂C/∂b$ {_number(db_j)}" in texts(figure)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3, 2), (3, 4, 4, 2)], ids=str)
def test_every_edge_shows_w_above_and_its_gradient_below(sizes):
    net, X = make_net(sizes, alpha=0.25)
    figure = draw_network(net, X, [1])
    middle = figure.get_figheight() / 2
    edges = [text for text in figure.axes[0].texts if text.get_rotation() or text.get_text()[-1:].isdigit()]
    above = [text.get_text() for text in edges if text.get_position()[1] > middle]
    below = [text.get_text() for text in edges if text.get_position()[1] < middle]
    for W, dW in zip(net.W, net.backprop(X, [1]).dW, strict=True):
        assert all(_number(w) in above for w in W.ravel())
        assert all(_number(g) in below for g in dW.ravel())


@pytest.mark.parametrize("activation", ["sigmoid", "silu", "leaky_relu"])
def test_the_gain_is_what_the_backward_pass_multiplies_with(activation):
    net, X = make_net((2, 3, 2), activation)
    figure = draw_network(net, X, [0])
    passed = net.backprop(X, [0])
    gain = passed.delta[0] / (passed.delta[1] @ net.W[1].T)
    assert np.isfinite(gain).all()
    assert all(f"$σ′(z)$\n{_number(g)}" in texts(figure) for g in gain[0])


def test_inputs_cost_and_targets():
    net, X = make_net((2, 3, 3))
    figure = draw_network(net, X, [2])
    loss = net.backprop(X, [2]).loss
    assert f"$C$ = {_number(loss)}" in texts(figure)
    assert count(figure, f"$C$\n{_number(loss)}") == 2  # where the forward pass ends and the backward pass begins
    targets = [text for text in figure.axes[0].texts if text.get_text().startswith("$y$")]
    targets.sort(key=lambda text: text.get_position()[1], reverse=True)
    assert [text.get_text() for text in targets] == ["$y$ 0", "$y$ 0", "$y$ 1"]
    assert all(count(figure, f"$x_{i}$\n{_number(x)}") == 2 for i, x in enumerate(X[0], 1))


def test_values_and_penalty_of_a_regression():
    net, X = make_net((2, 3, 2), loss="squared_error", alpha=0.5)
    figure = draw_network(net, X, [[0.25, -1.5]])
    assert {"$y$ 0.250", "$y$ −1.50"} <= set(texts(figure))
    assert any("squared_error + ½ · 0.5" in text for text in texts(figure))
    assert any("∂C/∂w" in text and text.endswith("+ 0.5 $w$") for text in texts(figure))


def test_layers_are_named_with_their_activations():
    net, X = make_net((2, 3, 2), "elu")
    assert {"layer 1: $σ$ = elu", "layer 2: $σ$ = softmax"} <= set(texts(draw_network(net, X, [0])))


def test_colour_is_the_sign_and_width_the_size():
    net, X = make_net((2, 2))
    net.W[0][...] = [[2.0, -1.0], [0.0, 1.0]]
    lines = draw_network(net, X, [0]).axes[0].get_lines()[:4]
    widths = [line.get_linewidth() for line in lines]
    colors = [line.get_color() for line in lines]
    assert widths[0] > widths[1] == widths[3] > widths[2] > 0
    assert len({*colors}) == 3
    assert colors[0] == colors[3]


def test_dead_neurons_are_drawn_as_zeros():
    net, X = make_net((2, 3, 2), "relu")
    net.b[0][:] = -100
    figure = draw_network(net, X, [0])
    assert count(figure, "$σ′(z)$\n0") == count(figure, "$∂C/∂z$\n0") == 3
    assert not any("−0" in text and "−0." not in text for text in texts(figure))


def test_other_dtypes_are_drawn_too():
    net, X = make_net()
    exact = draw_network(net, X, [0])
    assert len(texts(draw_network(net.copy(dtype="float32"), X, [0]))) == len(texts(exact))


def test_draw_is_the_same_picture():
    net, X = make_net()
    assert texts(net.draw(X, [0])) == texts(draw_network(net, X, [0]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (-2.0, "−2"),
        (999.0, "999"),
        (1.4999, "1.50"),
        (-0.02231, "−0.0223"),
        (0.00123, "0.00123"),
        (123.4, "123"),
        (999.7, "1.0e3"),
        (1000.0, "1.0e3"),
        (-0.0000123, "−1.2e−5"),
        (4.56e-13, "4.6e−13"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_three_digits_and_a_true_minus_sign(value, text):
    assert _number(value) == text


# Legibility

SHAPES = [(1, 1), (2, 1), (2, 2, 2), (2, 3, 2), (3, 4, 4, 2), (2, 8, 8, 3), (8, 8), (2, 3, 3, 3, 3, 2)]


def boxes(figure):
    """Each text with its box in pixels, shrunk by a hair; edge labels are left to the next test."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    upright = [text for text in figure.axes[0].texts if text.get_text() and not text.get_bbox_patch()]
    return [(text.get_text(), text.get_window_extent(renderer).padded(-1)) for text in upright]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_no_text_hides_another_or_leaves_the_figure(sizes):
    net, X = make_net(sizes, loss="squared_error")
    figure = draw_network(net, X, np.zeros((1, sizes[-1])))
    page = figure.bbox
    for name, box in boxes(figure):
        assert page.x0 <= box.x0 < box.x1 <= page.x1, name
        assert page.y0 <= box.y0 < box.y1 <= page.y1, name
    for (name, box), (other, other_box) in combinations(boxes(figure), 2):
        assert not box.overlaps(other_box), (name, other)


def along(text):
    """Three points along a label, from end to end, in inches."""
    angle = np.radians(text.get_rotation())
    return text.get_position() + np.outer([-0.18, 0, 0.18], [np.cos(angle), np.sin(angle)])


@pytest.mark.parametrize("sizes", [*SHAPES, (3, 8), (5, 4)], ids=str)
def test_no_edge_label_hides_another(sizes):
    net, X = make_net(sizes, loss="squared_error")
    figure = draw_network(net, X, np.zeros((1, sizes[-1])))
    labels = [along(text) for text in figure.axes[0].texts if text.get_bbox_patch()]
    distances = [np.linalg.norm(p[:, None] - q, axis=-1).min() for p, q in combinations(labels, 2)]
    assert min(distances) >= 0.2  # inches: the height of these labels on their plates is 0.17


def test_a_layer_of_many_edges_goes_without_numbers_and_says_so():
    net, X = make_net((3, 8, 8, 3))
    assert 3 * 8 <= MAX_LABELS < 8 * 8
    figure = draw_network(net, X, [0])
    labels = [text for text in figure.axes[0].texts if text.get_bbox_patch()]
    assert len(labels) == 2 * (3 * 8 + 8 * 3) + 3
    assert sum("64 numbers left out" in text for text in texts(figure)) == 2


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_glyph_is_drawn(kind):
    net, X = make_net(alpha=0.5)
    assert len(saved(draw_network(net, X, [0]), kind)) > 1000  # a missing glyph is a warning, and so an error


def test_the_callers_settings_do_not_spoil_the_picture():
    net, X = make_net()
    with matplotlib.rc_context({"font.family": "monospace", "mathtext.fontset": "cm", "figure.facecolor": "black"}):
        figure = draw_network(net, X, [0])
        assert {name for text in figure.axes[0].texts if text.get_text() for name in text.get_fontfamily()} == {
            "DejaVu Sans"
        }
        assert figure.get_facecolor() == (1, 1, 1, 1)


# What cannot be drawn


@pytest.mark.parametrize("sizes", [(2, MAX_NEURONS + 1, 2), (9, 2), [2] * (MAX_LAYERS + 2)], ids=str)
def test_a_large_network_is_refused(sizes):
    net, X = make_net(sizes)
    with pytest.raises(ValueError, match=r"at most 5 layers of at most 8 neurons.*got layer_sizes=\["):
        net.draw(X, [0])


def test_several_rows_are_refused():
    net, X = make_net()
    with pytest.raises(ValueError, match=r"exactly one row; got 3"):
        net.draw(np.repeat(X, 3, axis=0), [0, 1, 0])


def test_bad_input_is_refused_as_by_backprop():
    net, X = make_net()
    with pytest.raises(ValueError, match="2 features"):
        net.draw(np.ones((1, 5)), [0])
    with pytest.raises(ValueError, match="labels 0 … 1"):
        net.draw(X, [7])


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    net, X = make_net()
    for draw in (lambda: net.draw(X, [0]), make_history().plot):
        with pytest.raises(ImportError, match=r'needs matplotlib.*pip install "backprop_gpu\[plot\]"'):
            draw()


# The figure


@pytest.mark.parametrize("make", [lambda: draw_network(*make_net(), [0]), lambda: make_history().plot()])
def test_a_figure_shows_itself_in_a_notebook_and_leaves_pyplot_alone(make):
    pyplot_before = "matplotlib.pyplot" in sys.modules
    figure = make()
    png, size = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    width = int.from_bytes(png[16:20], "big")
    assert abs(width - 2 * size["width"]) <= 2
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    assert pickle.loads(pickle.dumps(figure))._repr_png_()[1] == size


def test_an_svg_is_well_formed():
    net, X = make_net()
    for figure in (draw_network(net, X, [0]), make_history().plot()):
        assert ElementTree.fromstring(saved(figure, "svg")).tag.endswith("svg")


# The curves of a training run


def make_history(n_epochs=20, **settings):
    t = np.arange(n_epochs)
    metrics = {"loss": np.exp(-t / 4), "learning_rate": np.full(n_epochs, 0.1), "val_loss": np.exp(-t / 5) + 0.01}
    return bp.History({name: values.tolist() for name, values in metrics.items()}, **settings)


def curve(axes, label):
    (line,) = (line for line in axes.get_lines() if line.get_label() == label)
    return line


def labels(figure):
    return [axes.get_ylabel() for axes in figure.axes]


def test_losses_are_drawn_over_epochs_from_1():
    history = make_history()
    (axes,) = plot_history(history).axes
    for label, metric in [("training", "loss"), ("validation", "val_loss")]:
        np.testing.assert_array_equal(curve(axes, label).get_xdata(), np.arange(1, 21))
        np.testing.assert_array_equal(curve(axes, label).get_ydata(), history[metric])


@pytest.mark.parametrize(
    ("loss", "scale"),
    [([1.0, 0.5, 0.05], "log"), ([1.0, 0.5, 0.2], "linear"), ([1.0, 0.0, 0.0], "linear"), ([5.0, -1.0], "linear")],
)
def test_the_scale_is_logarithmic_where_that_helps(loss, scale):
    (axes,) = plot_history(bp.History({"loss": loss})).axes
    assert axes.get_yscale() == scale


@pytest.mark.parametrize(("metric", "label"), [("val_accuracy", "accuracy"), ("val_r2", "r2")])
def test_the_score_has_an_axis_of_its_own(metric, label):
    history = make_history()
    history.metrics[metric] = np.linspace(0.1, 0.9, 20).tolist()
    figure = history.plot()
    assert labels(figure) == ["loss C", f"validation {label}"]
    np.testing.assert_array_equal(curve(figure.axes[1], "validation").get_ydata(), history[metric])


def test_a_learning_rate_that_varies_is_drawn():
    history = make_history()
    history.metrics["learning_rate"] = np.linspace(0.1, 0.01, 20).tolist()
    assert labels(history.plot()) == ["loss C", "learning rate"]


def test_the_best_epoch_is_marked_and_the_reason_to_stop_told():
    figure = make_history(best_epoch=12, stopped="early stopping").plot()
    (axes,) = figure.axes
    assert set(curve(axes, "best epoch: 13").get_xdata()) == {13}
    assert sum(list(line.get_xdata()) == [13] for line in axes.get_lines()) == 2
    assert axes.get_title() == "20 epochs, stopped: early stopping"


def test_one_epoch_is_a_visible_point():
    figure = make_history(1, stopped="epochs").plot()
    (axes,) = figure.axes
    assert curve(axes, "training").get_marker() == "o"
    assert axes.get_title() == "1 epoch"
    saved(figure, "png")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_a_real_run_is_drawn():
    net, _ = make_net()
    X = np.random.default_rng(0).normal(size=(60, 2))
    y = (X[:, 0] > 0).astype(int)
    optimizer = bp.Adam(learning_rate=bp.Cosine(0.1))
    history = net.fit(
        X, y, epochs=8, validation_fraction=0.25, optimizer=optimizer, early_stopping=True, progress=False
    )
    figure = history.plot()
    assert labels(figure) == ["loss C", "validation accuracy", "learning rate"]
    saved(figure, "png")


@pytest.mark.parametrize("history", [bp.History(), bp.History({"loss": []})], ids=["new", "no-epoch"])
def test_an_empty_history_is_refused(history):
    with pytest.raises(ValueError, match="no completed epoch"):
        history.plot()
