"""Backpropagation against finite differences in float64: every activation × loss × depth, options, and at random."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.backends.numpy import NumpyBackend
from backprop_gpu.gradcheck import KINK_STEP, SMOOTH_STEP, GradCheck, LayerCheck
from backprop_gpu.losses import LOSSES

SMOOTH, KINKED = 1e-7, 1e-6
"""Largest relative error of a derivative; where there are kinks, differences need a smaller step and are coarser."""

REGRESSION = ["squared_error", "absolute_error", "huber"]


def network(layer_sizes, **options):
    """A float64 network whose biases are not zero."""
    net = bp.MLP(layer_sizes, dtype="float64", **options)
    values, n_weights = np.array(net.ops.to_numpy(net.parameters)), net.architecture.n_weights
    values[n_weights:] = np.random.default_rng(net.seed).uniform(-0.3, 0.3, len(values) - n_weights)
    net.parameters[...] = net.ops.asarray(values)
    return net


@pytest.fixture
def make_net(backend):
    """make_net(layer_sizes, **options): `network` on every backend that computes in float64."""
    if "float64" not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in float64")
    return partial(network, backend=backend.name)


def make_data(net, N, seed=0, probabilities=False):
    """(X, y) that suit the network's loss."""
    rng = np.random.default_rng(seed)
    n_in, n_out, loss = net.layer_sizes[0], net.layer_sizes[-1], net.architecture.loss.name
    X = rng.standard_normal((N, n_in))
    if loss == "cross_entropy":
        return X, rng.dirichlet(np.ones(n_out), N) if probabilities else rng.integers(0, n_out, N)
    if loss == "binary_cross_entropy":
        return X, rng.random((N, n_out)) if probabilities else rng.integers(0, 2, (N, n_out))
    return X, rng.poisson(2, (N, n_out)) if loss == "poisson" else rng.standard_normal((N, n_out))


def tolerance_for(net):
    arch = net.architecture
    output = bp.ACTIVATIONS.get(arch.output_activation)
    kinked = arch.loss.has_kink or any(a.has_kink for a in arch.activations) or (output and output.has_kink)
    return KINKED if kinked else SMOOTH


@pytest.fixture
def check(backend):
    """check(net, X, y, **options): gradients are finite, not all zero, and pass gradcheck on plenty of evidence."""

    def check(net, X, y, *, max_entries=5, **options):
        gradients = backend.to_numpy(net.backprop(X, y, **options).gradients)
        assert np.isfinite(gradients).all()
        assert gradients.any()
        report = bp.gradcheck(net, X, y, max_entries=max_entries, **options)
        errors = [error for layer in report.layers for error in (layer.dW, layer.db)]
        assert len(errors) == 2 * net.architecture.n_layers
        assert all(error <= tolerance_for(net) for error in errors), str(report)
        assert report.skipped <= report.checked / 4, str(report)
        return report

    return check


SIZES = {1: [5, 3], 2: [5, 7, 3], 3: [5, 7, 6, 3], 4: [5, 7, 6, 4, 3]}


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", bp.ACTIVATIONS)
def test_every_activation_loss_and_depth(make_net, check, activation, loss, depth):
    net = make_net(SIZES[depth], activation=activation, loss=loss, seed=depth)
    check(net, *make_data(net, 11))


def test_every_entry_of_a_small_network(make_net, check):
    net = make_net([5, 7, 6, 3], activation="mish")
    report = check(net, *make_data(net, 11), max_entries=10**6)
    assert report.checked == len(net.parameters) + 6
    assert report.skipped == 0


@pytest.mark.parametrize("output_activation", bp.ACTIVATIONS)
@pytest.mark.parametrize("loss", REGRESSION)
def test_every_output_activation(make_net, check, loss, output_activation):
    net = make_net([5, 7, 3], activation="tanh", loss=loss, output_activation=output_activation)
    check(net, *make_data(net, 11))


@pytest.mark.parametrize("loss", LOSSES)
def test_sample_weights(make_net, check, loss):
    net = make_net([5, 7, 3], activation="silu", loss=loss)
    X, y = make_data(net, 11)
    w = np.array([0, 3, 0.5, 1e-3, 2, 0, 1, 7, 1, 1, 0.25])
    check(net, X, y, sample_weight=w)
    assert not np.allclose(net.backprop(X, y, sample_weight=w).gradients, net.backprop(X, y).gradients)


@pytest.mark.parametrize("activation", bp.ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_l2_penalty(make_net, check, activation, alpha):
    net = make_net([5, 7, 3], activation=activation, alpha=alpha)
    check(net, *make_data(net, 11))


@pytest.mark.parametrize("activation", bp.ACTIVATIONS)
@pytest.mark.parametrize("step", [0, 2**32 + 3])
def test_dropout(make_net, check, activation, step):
    net = make_net([5, 17, 13, 3], activation=activation, dropout=[0.25, 0.5], seed=5)
    X, y = make_data(net, 11)
    check(net, X, y, dropout_step=step)
    assert not np.allclose(net.backprop(X, y, dropout_step=step).gradients, net.backprop(X, y).gradients)


def test_an_activation_for_each_layer(make_net, check):
    net = make_net([5, 7, 6, 8, 7, 3], activation=["gelu", "tanh", "softplus", "sine"], loss="squared_error")
    check(net, *make_data(net, 11))


def test_label_smoothing_and_rows_of_probabilities(make_net, check):
    for smoothing in (0.0, 0.3):
        for probabilities in (False, True):
            net = make_net([5, 7, 3], activation="tanh", loss=bp.CrossEntropy(label_smoothing=smoothing))
            check(net, *make_data(net, 11, probabilities=probabilities))


def test_probabilities_as_targets_of_binary_cross_entropy(make_net, check):
    net = make_net([5, 7, 3], activation="tanh", loss="binary_cross_entropy")
    check(net, *make_data(net, 11, probabilities=True))


@pytest.mark.parametrize("threshold", [1e-3, 0.3, 1.0, 100.0])
def test_huber_thresholds(make_net, check, threshold):
    net = make_net([5, 7, 3], activation="tanh", loss=bp.Huber(threshold=threshold))
    check(net, *make_data(net, 11))


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1], [1, 64, 1], [64, 1, 64]])
@pytest.mark.parametrize("N", [1, 64])
def test_networks_of_one_neuron_and_batches_of_one_row(make_net, check, sizes, N):
    net = make_net(sizes, activation="sigmoid", loss="squared_error")
    check(net, *make_data(net, N))


# A thousand random networks


@st.composite
def configurations(draw):
    """(layer sizes, N, data seed, probabilities, weighted, options of the network)."""
    depth = draw(st.integers(1, 4))
    loss = draw(st.sampled_from(sorted(LOSSES)))
    widths = [draw(st.integers(1, 64)) for _ in range(depth)]
    n_out = draw(st.integers(2 if loss == "cross_entropy" else 1, 64))
    if loss == "cross_entropy":
        loss = bp.CrossEntropy(label_smoothing=draw(st.sampled_from([0.0, 0.1])))
    elif loss == "huber":
        loss = bp.Huber(threshold=draw(st.sampled_from([0.5, 1.0, 2.0])))
    else:
        loss = LOSSES[loss]()
    options = {
        "activation": [draw(st.sampled_from(sorted(bp.ACTIVATIONS))) for _ in range(depth - 1)],
        "loss": loss,
        "output_activation": draw(st.sampled_from(loss.output_activations)),
        "dropout": [draw(st.sampled_from([0.0, 0.1, 0.5])) for _ in range(depth - 1)],
        "alpha": draw(st.sampled_from([0.0, 1e-2, 1.0])),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    N, seed = draw(st.integers(1, 64)), draw(st.integers(0, 2**32))
    return [*widths, n_out], N, seed, draw(st.booleans()), draw(st.booleans()), options


def unresolved(net, loss, gradient, error):
    """The differences themselves err by εC / h, which is much beside a gradient that is nearly zero."""
    h = KINK_STEP if tolerance_for(net) == KINKED else SMOOTH_STEP
    return error <= 1e-3 and error * np.abs(gradient).max() <= 2 * np.finfo(float).eps * loss / h


def test_a_thousand_random_networks(backend, make_net):
    examples, checked, skipped, near_zero, all_zero = 0, 0, 0, 0, 0

    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(configurations())
    def passes_gradcheck(configuration):
        nonlocal examples, checked, skipped, near_zero, all_zero
        sizes, N, seed, probabilities, weighted, options = configuration
        net = make_net(sizes, **options)
        X, y = make_data(net, N, seed, probabilities)
        w = np.random.default_rng(seed).exponential(size=N) if weighted else None
        grads = net.backprop(X, y, sample_weight=w, dropout_step=seed)
        assert np.isfinite(backend.to_numpy(grads.gradients)).all()
        all_zero += not backend.to_numpy(grads.gradients).any()  # relu's outputs can all be 0
        report = bp.gradcheck(net, X, y, sample_weight=w, dropout_step=seed, max_entries=1)
        for layer, dW, db in zip(report.layers, grads.dW, grads.db, strict=True):
            for error, gradient in ((layer.dW, dW), (layer.db, db)):
                if np.isnan(error):
                    assert layer.skipped, "without a kink nearby there is a difference to compare with"
                elif not error <= tolerance_for(net):
                    assert unresolved(net, grads.loss, backend.to_numpy(gradient), error), str(report)
                    near_zero += 1
        examples, checked, skipped = examples + 1, checked + report.checked, skipped + report.skipped

    passes_gradcheck()
    assert examples >= 1000
    assert checked >= 5 * examples
    assert skipped <= checked / 50
    assert near_zero <= examples / 100
    assert all_zero <= examples / 100


# gradcheck itself: it must fail where the gradient is wrong, and say where it knows nothing


SABOTAGES = {}
"""The hook that each sabotage replaces, and what it is replaced with."""


def wrong(operation):
    """Registers a sabotaged version of one of NumpyBackend's operations."""

    def register(function):
        SABOTAGES[function.__name__] = (f"_{operation}", partial(function, getattr(NumpyBackend, f"_{operation}")))
        return function

    return register


@wrong("dense_backward")
def no_derivative(right, self, delta_next, W_next, kept, activation, dropout, delta):
    right(self, delta_next, W_next, kept, bp.ACTIVATIONS["identity"], dropout, delta)


@wrong("dense_backward")
def derivative_of_another_activation(right, self, delta_next, W_next, kept, activation, dropout, delta):
    right(self, delta_next, W_next, kept, bp.ACTIVATIONS["silu"], dropout, delta)


@wrong("dense_backward")
def transposed_weights(right, self, delta_next, W_next, kept, activation, dropout, delta):
    right(self, delta_next, W_next.T, kept, activation, dropout, delta)


@wrong("dense_backward")
def no_dropout_in_the_backward_pass(right, self, delta_next, W_next, kept, activation, dropout, delta):
    right(self, delta_next, W_next, kept, activation, None, delta)


@wrong("dense_backward")
def dropout_of_another_step(right, self, delta_next, W_next, kept, activation, dropout, delta):
    right(self, delta_next, W_next, kept, activation, dropout._replace(step=dropout.step + 1), delta)


@wrong("dense_gradients")
def no_db(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, alpha, accumulate, dW, db)
    db[...] = 0


@wrong("dense_gradients")
def no_dW(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, alpha, accumulate, dW, db)
    dW[...] = 0


@wrong("dense_gradients")
def transposed_dW(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, alpha, accumulate, dW, db)
    if dW.shape[0] == dW.shape[1]:
        dW[...] = dW.T.copy()


@wrong("dense_gradients")
def mean_for_db(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, alpha, accumulate, dW, db)
    db /= len(delta)


@wrong("dense_gradients")
def last_row_left_out(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev[:-1], delta[:-1], W, alpha, accumulate, dW, db)


@wrong("dense_gradients")
def no_penalty(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, 0.0, accumulate, dW, db)


@wrong("dense_gradients")
def one_entry_off_by_a_hundredth(right, self, a_prev, delta, W, alpha, accumulate, dW, db):
    right(self, a_prev, delta, W, alpha, accumulate, dW, db)
    dW.flat[np.abs(dW).argmax()] *= 1.01


@wrong("output_delta")
def no_division_by_N(right, self, z, target, loss, output_activation, sample_weight, delta):
    cost = right(self, z, target, loss, output_activation, sample_weight, delta)
    delta *= len(z)
    return cost


@wrong("output_delta")
def the_other_sign(right, self, z, target, loss, output_activation, sample_weight, delta):
    cost = right(self, z, target, loss, output_activation, sample_weight, delta)
    delta *= -1
    return cost


@wrong("output_delta")
def weights_only_in_the_cost(right, self, z, target, loss, output_activation, sample_weight, delta):
    cost = right(self, z, target, loss, output_activation, sample_weight, delta.copy())
    right(self, z, target, loss, output_activation, None, delta)
    return cost


@wrong("output_delta")
def smoothing_only_in_the_cost(right, self, z, target, loss, output_activation, sample_weight, delta):
    cost = right(self, z, target, loss, output_activation, sample_weight, delta.copy())
    right(self, z, target, bp.CrossEntropy(), output_activation, sample_weight, delta)
    return cost


@wrong("output_delta")
def twice_the_cost(right, self, z, target, loss, output_activation, sample_weight, delta):
    return 2 * right(self, z, target, loss, output_activation, sample_weight, delta)


@wrong("dense_forward")
def no_bias(right, self, a_prev, W, b, activation, dropout, a, z):
    right(self, a_prev, W, 0 * b, activation, dropout, a, z)


@wrong("dense_forward")
def another_activation(right, self, a_prev, W, b, activation, dropout, a, z):
    right(self, a_prev, W, b, bp.ACTIVATIONS["gelu" if activation.name == "mish" else "identity"], dropout, a, z)


@pytest.fixture
def thorough():
    """thorough(): gradcheck over a NumPy network that has something for every sabotage to spoil."""
    net = network(
        [5, 6, 6, 6],
        activation="mish",
        loss=bp.CrossEntropy(label_smoothing=0.1),
        dropout=0.3,
        alpha=0.1,
        backend="numpy",
    )
    X, y = make_data(net, 11)
    w = np.linspace(0.1, 2, 11)
    return lambda: bp.gradcheck(net, X, y, sample_weight=w, dropout_step=3, max_entries=1000)


def test_gradcheck_passes_what_is_right(thorough):
    report = thorough()
    assert report.worst <= SMOOTH
    assert report.skipped == 0


@pytest.mark.parametrize("name", SABOTAGES)
def test_gradcheck_catches(monkeypatch, thorough, name):
    operation, sabotaged = SABOTAGES[name]
    monkeypatch.setattr(NumpyBackend, operation, lambda self, *arguments: sabotaged(self, *arguments))
    assert thorough().worst > 1e-3


def test_gradcheck_catches_a_gradient_of_nan(monkeypatch, thorough):
    monkeypatch.setattr(NumpyBackend, "_dense_backward", lambda self, *arguments: arguments[-1].fill(np.nan))
    report = thorough()
    assert all(np.isnan(layer.dW) and np.isnan(layer.db) for layer in report.layers[:-1])
    assert not report.worst <= 1


def test_gradcheck_leaves_the_network_alone_and_takes_any_dtype():
    net = bp.MLP([5, 7, 3], activation="tanh", backend="numpy")
    before = net.parameters.copy()
    assert bp.gradcheck(net, *make_data(net, 11)).worst <= SMOOTH
    assert np.array_equal(net.parameters, before)
    assert net.dtype == "float32"


def test_differences_across_a_kink_are_left_out_and_without_any_there_is_no_evidence():
    net = network([5, 7, 3], activation="relu", backend="numpy")
    net.W[0][...] = 0
    net.b[0][...] = 0
    report = bp.gradcheck(net, *make_data(net, 11), max_entries=3)
    assert np.isnan([report.layers[0].dW, report.layers[0].db]).all()
    assert (report.layers[0].checked, report.layers[0].skipped) == (0, 8)
    assert (report.layers[1].checked, report.layers[1].skipped) == (8, 0)
    assert report.layers[1].worst <= KINKED
    assert not report.worst <= 1
    assert "8 near a kink left out" in str(report)


@pytest.mark.parametrize(
    ("options", "y"),
    [
        ({"loss": bp.Huber(threshold=0.25)}, 0.75),
        ({"loss": bp.Huber(threshold=0.25)}, 1.25),
        ({"loss": "absolute_error"}, 1.0),
        ({"loss": "squared_error", "output_activation": "elu"}, 1.0),
    ],
    ids=["huber-above", "huber-below", "absolute", "elu"],
)
def test_kinks_of_the_output_layer_are_left_out_where_they_are(options, y):
    net = network([1, 1], backend="numpy", **options)
    # elu's kink is at z = 0, those of the losses are reached from z = 1.
    net.parameters[...] = [1.0, -1.0 if "output_activation" in options else 0.0]
    at, away = (bp.gradcheck(net, [[x]], [[y]]) for x in (1.0, 1.01))
    assert (at.checked, at.skipped) == (0, 4)
    assert (away.checked, away.skipped) == (4, 0)
    assert away.worst <= KINKED


@pytest.mark.parametrize("bad", range(4))
def test_no_evidence_anywhere_is_not_a_good_worst_error(bad):
    errors = [float("nan") if i == bad else 1e-9 for i in range(4)]
    report = GradCheck((LayerCheck(*errors[:2], 1, 1), LayerCheck(*errors[2:], 1, 1)))
    assert not report.worst <= 1
