"""The network itself: its parameters, its passes, its predictions, its copies."""

import copy
import pickle

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.architecture import Architecture

pytestmark = pytest.mark.usefixtures("on_every_backend")


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_w_and_b_are_views_into_the_parameters():
    net = bp.MLP([3, 5, 2])
    assert [W.shape for W in net.W] == [(3, 5), (5, 2)]
    assert [b.shape for b in net.b] == [(5,), (2,)]
    net.parameters[...] = np.arange(len(net.parameters))
    assert net.W[0].ravel().tolist() == list(range(15))
    assert net.W[1].ravel().tolist() == list(range(15, 25))
    assert np.concatenate(net.b).tolist() == list(range(25, 32))
    net.W[1][0, 1] = -1
    assert net.parameters[16] == -1
    assert all(W.flags.c_contiguous for W in net.W)


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), bp.MLP.copy]
)
def test_a_copy_is_equal_and_independent(through, rng):
    X, y = rng.standard_normal((20, 3)), rng.integers(0, 2, 20)
    net = bp.MLP([3, 5, 2], dropout=0.2)
    net.partial_fit(X, y)
    twin = through(net)
    assert np.array_equal(twin.parameters, net.parameters)
    assert np.shares_memory(twin.W[0], twin.parameters)
    assert not np.shares_memory(twin.parameters, net.parameters)
    assert twin.stream.state["m"] is not net.stream.state["m"]
    assert twin.partial_fit(X, y) == net.partial_fit(X, y)
    assert twin.fit(X, y, epochs=2) == net.fit(X, y, epochs=2)
    assert np.array_equal(twin.parameters, net.parameters)


def test_a_copy_in_float64_has_the_same_numbers():
    net = bp.MLP([3, 5, 2])
    assert net.copy(dtype="float64").parameters.dtype == np.float64
    assert np.array_equal(net.copy(dtype="float64").parameters, net.parameters)


def test_the_same_seed_means_the_same_weights_in_every_dtype():
    single, double = bp.MLP([7, 5, 3], seed=9), bp.MLP([7, 5, 3], seed=9, dtype="float64")
    assert np.array_equal(single.parameters, double.parameters.astype(np.float32))
    assert not np.array_equal(single.parameters, bp.MLP([7, 5, 3], seed=10).parameters)


@pytest.mark.parametrize(
    ("activation", "initialization", "variance"),
    [
        ("relu", "auto", 2 / 300),
        ("gelu", "auto", 2 / 300),
        ("tanh", "auto", 2 / 500),
        ("relu", "glorot", 2 / 500),
        ("tanh", "he", 2 / 300),
    ],
)
def test_initial_weights_have_the_variance_of_their_rule(activation, initialization, variance):
    net = bp.MLP([300, 200, 10], activation, initialization=initialization)
    assert net.W[0].var() == pytest.approx(variance, rel=0.02)
    assert abs(net.W[0].mean()) < 1e-3
    assert not np.concatenate(net.b).any()


def test_every_quantity_of_one_pass_fits_the_formulas(rng):
    X, y = rng.standard_normal((7, 3)), rng.integers(0, 4, 7)
    net = bp.MLP([3, 5, 2, 4], ["tanh", "relu"], dtype="float64", seed=1)
    g = net.backprop(X, y)
    sigma = [np.tanh, lambda z: np.maximum(z, 0), lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)]
    slope = [lambda z: 1 / np.cosh(z) ** 2, lambda z: (z > 0).astype(float)]
    inputs = [X, g.a[0], g.a[1]]
    for layer in range(3):
        assert np.array_equal(g.a_prev[layer], inputs[layer])
        assert np.allclose(g.z[layer], inputs[layer] @ net.W[layer] + net.b[layer], rtol=1e-13, atol=0)
        assert np.allclose(g.a[layer], sigma[layer](g.z[layer]), rtol=1e-13, atol=0)
        assert np.allclose(g.dW[layer], inputs[layer].T @ g.delta[layer], rtol=1e-12, atol=1e-16)
        assert np.allclose(g.db[layer], g.delta[layer].sum(axis=0), rtol=1e-12, atol=1e-16)
    assert np.allclose(g.delta[2], (g.a[2] - np.eye(4)[y]) / 7, rtol=1e-13, atol=1e-16)
    for layer in (1, 0):
        expected = (g.delta[layer + 1] @ net.W[layer + 1].T) * slope[layer](g.z[layer])
        assert np.allclose(g.delta[layer], expected, rtol=1e-12, atol=1e-16)
        assert np.abs(expected).max() > 1e-3
    assert g.loss == pytest.approx(-np.log(g.a[2][np.arange(7), y]).mean(), rel=1e-13)
    assert np.shares_memory(g.dW[0], g.gradients)
    assert np.array_equal(np.concatenate([*(dW.ravel() for dW in g.dW), *g.db]), g.gradients)


def test_the_penalty_is_in_the_loss_and_in_the_gradient_of_the_weights_only(rng):
    X, y = rng.standard_normal((7, 3)), rng.integers(0, 2, 7)
    plain, penalised = bp.MLP([3, 5, 2], dtype="float64"), bp.MLP([3, 5, 2], dtype="float64", alpha=0.3)
    for net in (plain, penalised):
        net.b[0][...] = 1.0
    g, h = plain.backprop(X, y), penalised.backprop(X, y)
    assert h.loss - g.loss == pytest.approx(0.15 * sum((W**2).sum() for W in plain.W), rel=1e-12)
    assert np.allclose(h.dW[0] - g.dW[0], 0.3 * plain.W[0], rtol=1e-12, atol=1e-15)
    assert np.array_equal(h.db[0], g.db[0])
    assert penalised.evaluate(X, y)["loss"] == pytest.approx(h.loss, rel=1e-14)


def test_dropout_leaves_out_in_training_only_and_the_same_neurons_for_the_same_step(rng):
    X, y = rng.standard_normal((50, 3)), rng.integers(0, 2, 50)
    net = bp.MLP([3, 40, 2], "sigmoid", dropout=0.25)
    g, again, other = (net.backprop(X, y, dropout_step=step) for step in (4, 4, 5))
    dropped = g.a[0] == 0
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(dropped, g.delta[0] == 0)
    assert np.array_equal(g.gradients, again.gradients)
    assert not np.array_equal(dropped, other.a[0] == 0)
    assert (net.backprop(X, y).a[0] > 0).all()
    assert g.a[0][~dropped] == pytest.approx(net.backprop(X, y).a[0][~dropped] / 0.75, rel=1e-6)


# Predictions


def test_predictions_of_a_classifier(rng):
    X = rng.standard_normal((9, 3))
    net = bp.MLP([3, 4, 5])
    p = net.predict_proba(X)
    assert p.shape == (9, 5)
    assert p.sum(axis=1) == pytest.approx(np.ones(9), rel=1e-6)
    assert np.array_equal(net.predict(X), p.argmax(axis=1))
    assert net.evaluate(X, p.argmax(axis=1))["accuracy"] == 1.0


def test_predictions_of_a_binary_and_of_a_multi_label_classifier(rng):
    X = rng.standard_normal((40, 3))
    binary = bp.MLP([3, 4, 1], loss="binary_cross_entropy")
    assert binary.predict_proba(X).shape == (40, 1)
    assert np.array_equal(binary.predict(X), (binary.predict_proba(X)[:, 0] > 0.5).astype(int))
    several = bp.MLP([3, 4, 2], loss="binary_cross_entropy")
    labels = several.predict(X)
    assert np.array_equal(labels, (several.predict_proba(X) > 0.5).astype(int))
    wrong = labels.copy()
    wrong[:10, 1] ^= 1
    assert several.evaluate(X, wrong)["accuracy"] == 0.75


def test_predictions_of_a_regression(rng):
    X = rng.standard_normal((9, 3))
    assert bp.MLP([3, 4, 1], loss="huber").predict(X).shape == (9,)
    assert bp.MLP([3, 4, 2], loss="huber").predict(X).shape == (9, 2)
    assert (bp.MLP([3, 4, 1], loss="poisson").predict(X) > 0).all()
    bounded = bp.MLP([3, 4, 1], loss="squared_error", output_activation="sigmoid").predict(100 * X)
    assert ((bounded >= 0) & (bounded <= 1)).all()
    with pytest.raises(TypeError, match="no probabilities; use predict"):
        bp.MLP([3, 4, 1], loss="huber").predict_proba(X)


def test_r2_of_a_constant_target():
    net = bp.MLP([2, 1], loss="squared_error")
    net.parameters[...] = 0
    net.b[0][...] = 2
    X = np.ones((4, 2))
    assert net.evaluate(X, np.full(4, 2.0))["r2"] == 1.0
    assert net.evaluate(X, np.full(4, 3.0))["r2"] == 0.0


def test_an_output_that_is_no_number_has_no_label():
    net = bp.MLP([2, 3, 2])
    net.parameters[...] = 1e30
    with np.errstate(over="ignore", invalid="ignore"):
        net.W[1][0, 0] = -1e30
        with pytest.raises(ValueError, match="output for row 1 is not a number"):
            net.predict([[0.0, 0.0], [1e30, 1e30]])


def test_many_rows_are_predicted_in_pieces_with_the_same_result(rng, monkeypatch):
    X, y, w = rng.standard_normal((101, 3)), rng.integers(0, 2, 101), rng.random(101)
    net = bp.MLP([3, 4, 2], dtype="float64", alpha=0.1)
    whole, p = net.evaluate(X, y, sample_weight=w), net.predict_proba(X)
    monkeypatch.setattr("backprop_gpu.mlp.PREDICT_ROWS", 7)
    assert net.evaluate(X, y, sample_weight=w) == pytest.approx(whole, rel=1e-13)
    assert net.predict_proba(X) == pytest.approx(p, rel=1e-13)
    assert whole["loss"] == pytest.approx(net.backprop(X, y, sample_weight=w).loss, rel=1e-13)


# Construction


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer_sizes": [3]}, ValueError, "at least the number of inputs and of outputs"),
        ({"layer_sizes": []}, ValueError, "at least the number of inputs and of outputs"),
        ({"layer_sizes": [3, 0, 2]}, ValueError, "at least 1 neuron"),
        ({"layer_sizes": [3, -4, 2]}, ValueError, "at least 1 neuron"),
        ({"layer_sizes": [3, 2.5]}, TypeError, "sequence of integers"),
        ({"layer_sizes": 7}, TypeError, "sequence of integers"),
        ({"layer_sizes": "abc"}, TypeError, "sequence of integers"),
        ({"layer_sizes": [3, 1]}, ValueError, "at least 2 outputs"),
        ({"activation": "rellu"}, ValueError, "unknown activation 'rellu'; did you mean 'relu'?"),
        ({"activation": 3}, TypeError, "activation must be one of"),
        ({"activation": ["relu"]}, ValueError, "one for each of the 2 hidden layers; got 1"),
        ({"activation": "softmax"}, ValueError, "unknown activation 'softmax'"),
        ({"layer_sizes": [3, 2], "activation": "rellu"}, ValueError, "did you mean 'relu'?"),
        ({"loss": "crossentropy"}, ValueError, "did you mean 'cross_entropy'?"),
        (
            {"loss": "huber", "output_activation": "softmax"},
            ValueError,
            "unknown output activation for huber 'softmax'",
        ),
        ({"loss": "cross_entropy", "output_activation": "relu"}, ValueError, "valid: softmax"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"dropout": [0.1]}, ValueError, "one for each of the 2 hidden layers"),
        ({"dropout": float("nan")}, ValueError, "dropout"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be at least 0"),
        ({"initialization": "xavier"}, ValueError, "unknown initialization 'xavier'"),
        ({"dtype": "float23"}, ValueError, "did you mean 'float32'?"),
        ({"dtype": None}, TypeError, "dtype must be one of"),
        ({"dtype": "bfloat16", "backend": "numpy"}, ValueError, "computes in float32 and float64, not in bfloat16"),
        ({"backend": "cdua"}, ValueError, "did you mean 'cuda'?"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "seed must be an integer; got 1.5"),
        ({"dropout": "0.5"}, TypeError, "dropout must be a number; got '0.5'"),
        ({"alpha": None}, TypeError, "alpha must be a number; got None"),
    ],
)
def test_bad_arguments_are_refused_with_the_way_out(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        bp.MLP(**{"layer_sizes": [3, 4, 4, 2], **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: bp.Huber(0.0), lambda: bp.Huber(float("nan")), lambda: bp.CrossEntropy(1.0)])
def test_bad_loss_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"threshold|label_smoothing"):
        make()


def test_the_architecture_survives_json():
    built = Architecture.build([3, 4, 5, 2], activation=["sine", "mish"], loss=bp.Huber(0.5), dropout=0.1, alpha=0.2)
    assert Architecture.from_dict(built.to_dict()) == built


def test_repr_says_what_the_network_is():
    assert repr(bp.MLP([784, 256, 10], "gelu", backend="numpy")) == (
        "MLP([784, 256, 10], gelu, cross_entropy, float32, backend='numpy', 203,530 parameters)"
    )


def test_numpy_types_are_welcome():
    settings = {"activation": np.array(["relu", "tanh"]), "dropout": np.array([0.1, 0.2])}
    net = bp.MLP(np.array([3, 4, 5, 2]), dtype=np.float64, seed=np.int64(3), **settings)
    assert net.architecture.dropout == (0.1, 0.2)
    assert net.dtype == "float64"
    assert net.layer_sizes == (3, 4, 5, 2)
