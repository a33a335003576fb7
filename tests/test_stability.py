"""Numbers at the edges: huge, infinite, denormal and NaN; right limits, no warnings, no NaN made, no NaN lost."""

import math

import numpy as np
import pytest
from scipy import special

import backprop_gpu as bp
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.losses import LOSSES
from backprop_gpu.optimizers import OPTIMIZERS

SELU_SCALE, SELU_FLOOR = 1.0507009873554805, -1.7580993408473766

ASYMPTOTES = {
    "identity": ((1, 0), (1, 0)),
    "relu": ((0, 0), (1, 0)),
    "leaky_relu": ((0.01, 0), (1, 0)),
    "elu": ((0, -1), (1, 0)),
    "selu": ((0, SELU_FLOOR), (SELU_SCALE, 0)),
    "sigmoid": ((0, 0), (0, 1)),
    "tanh": ((0, -1), (0, 1)),
    "softplus": ((0, 0), (1, 0)),
    "silu": ((0, 0), (1, 0)),
    "gelu": ((0, 0), (1, 0)),
    "gelu_tanh": ((0, 0), (1, 0)),
    "mish": ((0, 0), (1, 0)),
}
"""Slope and intercept of σ towards −∞ and towards +∞; sine has none."""

HUGE = np.array([1e4, 1e10, 1e30, np.inf])

every_activation = pytest.mark.parametrize("activation", bp.ACTIVATIONS)
every_asymptote = pytest.mark.parametrize("activation", ASYMPTOTES)
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_regression = pytest.mark.parametrize("loss", ["squared_error", "absolute_error", "huber"])


@pytest.fixture(autouse=True)
def _errors_are_raised():
    """Overflow, 0 / 0 and 1 / 0 raise, but where a backend has said that they are meant."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield


@pytest.fixture
def activate(backend, put):
    """activate(activation, z): (σ(z), σ′(z)) of a vector, out of dense_forward and dense_backward."""

    def activate(activation, z):
        one = put(np.ones((1, 1)))
        a, kept = backend.dense_forward(put(np.reshape(z, (-1, 1))), one, put(np.zeros(1)), activation)
        slope = backend.dense_backward(put(np.ones((len(z), 1))), one, kept, activation)
        return tuple(backend.to_numpy(x)[:, 0].astype(np.float64) for x in (a, slope))

    return activate


@pytest.fixture
def derivative(backend, put):
    """derivative(activation, kept): σ′ of a vector of what the forward pass keeps."""

    def derivative(activation, kept):
        one = put(np.ones((1, 1)))
        rows = put(np.ones((len(kept), 1)))
        return backend.to_numpy(backend.dense_backward(rows, one, put(np.reshape(kept, (-1, 1))), activation))[:, 0]

    return derivative


@pytest.fixture
def cost(backend, put):
    """cost(loss, z, y, w=None, output_activation=None): C as a float and δ on the host."""

    def cost(loss, z, y, w=None, output_activation=None):
        target = put(y, dtype="int32") if np.ndim(y) == 1 else put(y)
        weight = None if w is None else put(w)
        C, delta = backend.output_delta(put(z), target, loss, output_activation=output_activation, sample_weight=weight)
        return float(C), backend.to_numpy(delta)

    return cost


# Activations


@every_asymptote
def test_activations_meet_their_asymptotes(activate, tolerance, activation):
    for sign, (slope, intercept) in zip((-1, 1), ASYMPTOTES[activation], strict=True):
        z = sign * HUGE
        expected = slope * z if slope else np.full(len(z), float(intercept))
        a, a_slope = activate(activation, z)
        assert np.array_equal(np.isinf(a), np.isinf(expected))
        assert np.array_equal(np.sign(a), np.sign(expected))
        finite = np.isfinite(expected)
        assert (np.abs(a[finite] - expected[finite]) <= tolerance * np.abs(expected[finite])).all()
        assert np.isfinite(a_slope).all()
        assert np.abs(a_slope - slope).max() <= tolerance


def test_sine_has_no_limit_and_says_nothing(activate):
    a, slope = activate("sine", np.array([-np.inf, np.inf]))
    assert np.isnan(a).all()
    assert np.isnan(slope).all()


def test_sine_of_large_arguments(activate, dtype, tolerance):
    z = np.array([1e4, -1e4, 12345.678, 1e5, -1e7]).astype(dtype).astype(np.float64)
    a, slope = activate("sine", z)
    assert np.abs(a - np.sin(z)).max() <= tolerance
    assert np.abs(slope - np.cos(z)).max() <= tolerance


@every_activation
def test_activations_of_the_smallest_numbers(activate, sigma, dtype, tolerance, activation):
    smallest = float(np.finfo(dtype).smallest_subnormal)
    z = np.array([0.0, -0.0, smallest, -smallest, float(np.finfo(dtype).tiny)])
    forward, slope_of = sigma[activation]
    a, slope = activate(activation, z)
    assert np.abs(a - forward(z)).max() <= tolerance
    expected = slope_of(z)
    # A kink is at 0, and around it a denormal may be flushed or rounded to 0: either side's slope will do.
    other = slope_of(-np.ones(5) * float(np.finfo(dtype).eps)) if bp.ACTIVATIONS[activation].has_kink else expected
    assert np.minimum(np.abs(slope - expected), np.abs(slope - other)).max() <= tolerance


@pytest.mark.parametrize(("activation", "at_zero"), [("relu", 0), ("leaky_relu", 0.01), ("elu", 1), ("selu", 1.7581)])
def test_the_slope_at_a_kink_is_the_left_one(derivative, activation, at_zero):
    assert np.abs(derivative(activation, np.zeros(2)) - at_zero).max() <= 1e-4


@every_activation
def test_nan_in_is_nan_out_of_dense_forward(activate, activation):
    a, slope = activate(activation, np.array([1.0, np.nan, -1.0, np.nan]))
    assert np.isnan(a).tolist() == [False, True, False, True]
    assert np.isnan(slope).tolist() == [False, True, False, True]


@every_activation
def test_nan_in_is_nan_out_of_dense_backward(derivative, activation):
    assert np.isnan(derivative(activation, np.array([0.5, np.nan, -0.25]))).tolist() == [False, True, False]


@every_activation
def test_nan_in_delta_next_is_nan_out(backend, put, activation):
    delta_next = put(np.array([[1.0], [np.nan], [1.0]]))
    delta = backend.dense_backward(delta_next, put(np.ones((1, 1))), put(np.full((3, 1), 0.5)), activation)
    assert np.isnan(backend.to_numpy(delta)[:, 0]).tolist() == [False, True, False]


def test_nan_in_is_nan_out_of_dense_gradients(backend, put):
    a_prev, delta = np.ones((5, 3)), np.ones((5, 2))
    a_prev[4, 1] = delta[0, 1] = np.nan
    dW, db = backend.dense_gradients(put(a_prev), put(delta))
    assert np.isnan(backend.to_numpy(dW)).tolist() == [[False, True], [True, True], [False, True]]
    assert np.isnan(backend.to_numpy(db)).tolist() == [False, True]


@every_activation
def test_nan_in_is_nan_out_of_output_forward(backend, put, activation):
    a = backend.to_numpy(backend.output_forward(put(np.array([[1.0, np.nan, -1.0]])), activation))
    assert np.isnan(a).tolist() == [[False, True, False]]


# Relative accuracy in the tails, where a careless formula loses its digits

TAILS = {
    "sigmoid": (-4, -80, -300),
    "softplus": (-4, -80, -300),
    "silu": (-4, -80, -300),
    "mish": (-4, -80, -300),
    "gelu": (-4, -5, -30),
    "gelu_tanh": (-4, -5, -8),
    "elu": (-1e-3, -1e-30, -1e-200),
    "selu": (-1e-3, -1e-30, -1e-200),
    "tanh": (-1e-3, -1e-30, -1e-200),
    "sine": (-1e-3, -1e-30, -1e-200),
}
"""Where the tail of σ begins, and how far it is followed in float32 and in float64."""


def _gelu_tanh_gate(z):
    return special.expit(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


IN_THE_TAIL = {
    "elu": np.expm1,
    "selu": lambda z: -SELU_FLOOR * np.expm1(z),
    "gelu_tanh": lambda z: z * _gelu_tanh_gate(z),
}
"""σ where the shared formula, in float64, is itself too coarse there."""


def _tail(activation, dtype):
    begin, end_float32, end_float64 = TAILS[activation]
    z = np.geomspace(begin, end_float32 if dtype == "float32" else end_float64, 20)
    return z.astype(dtype).astype(np.float64)


def _relative_error(actual, expected):
    assert np.isfinite(actual).all()
    assert (expected != 0).all()
    return np.abs(actual / expected - 1).max()


@pytest.mark.parametrize("activation", TAILS)
def test_small_activations_keep_their_digits(activate, sigma, dtype, tolerance, activation):
    z = _tail(activation, dtype)
    expected = IN_THE_TAIL.get(activation, sigma[activation][0])(z)
    assert _relative_error(activate(activation, z)[0], expected) <= tolerance


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "silu", "mish", "gelu"])
def test_small_derivatives_keep_their_digits(activate, sigma, dtype, tolerance, activation):
    z = _tail(activation, dtype)
    assert _relative_error(activate(activation, z)[1], sigma[activation][1](z)) <= tolerance


# Softmax and the losses


def test_softmax_at_the_edges(backend, put):
    z = np.array(
        [
            [1e4, 0, -1e4],
            [1e30, -1e30, 0],
            [-1e30, -1e30, -1e30],
            [np.inf, 1, np.inf],
            [-np.inf, 1, 1],
            [1e30, 1e30, -np.inf],
            [3e38, 1e38, 0],
        ]
    )
    expected = [[1, 0, 0], [1, 0, 0], [1 / 3] * 3, [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0], [1, 0, 0]]
    a = backend.to_numpy(backend.output_forward(put(z), "softmax"))
    assert np.isfinite(a).all()
    assert np.abs(a - expected).max() <= 1e-7


def test_softmax_of_a_row_with_nan_is_nan_and_of_the_others_is_not(backend, put):
    a = backend.to_numpy(backend.output_forward(put(np.array([[1.0, 2], [np.nan, 2], [3, 4]])), "softmax"))
    assert np.isnan(a).tolist() == [[False, False], [True, True], [False, False]]


def test_exp_overflows_to_infinity_in_silence(backend, put):
    a = backend.to_numpy(backend.output_forward(put(np.array([[-np.inf, -1e4, 0, 1e4, 1e30, np.inf, np.nan]])), "exp"))
    assert a[0, :6].tolist() == [0, 0, 1, np.inf, np.inf, np.inf]
    assert np.isnan(a[0, 6])


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_cross_entropy_of_huge_logits(cost, tolerance, size):
    z = np.array([[size, 0.0, -size], [size, 0.0, -size], [0.0, 0.0, -size]])
    C, delta = cost("cross_entropy", z, np.array([0, 1, 0]))
    assert abs(C - (0 + size + math.log(2)) / 3) <= tolerance * size
    assert np.abs(delta - np.array([[0, 0, 0], [1, -1, 0], [-0.5, 0.5, 0]]) / 3).max() <= tolerance


def test_cross_entropy_of_infinite_logits(cost, tolerance):
    z = np.array([[np.inf, 0.0, -np.inf], [np.inf, np.inf, 0.0]])
    C, delta = cost("cross_entropy", z, np.array([0, 1]))
    assert abs(C - (0 + math.log(2)) / 2) <= tolerance
    assert np.abs(delta - np.array([[0, 0, 0], [0.5, -0.5, 0]]) / 2).max() <= tolerance
    C, delta = cost("cross_entropy", np.array([[-np.inf, 0.0]]), np.array([0]))
    assert C > 1e30
    assert delta.tolist() == [[-1, 1]]


@pytest.mark.parametrize("size", [1e4, 1e30, np.inf])
def test_binary_cross_entropy_of_huge_logits(cost, tolerance, size):
    C, delta = cost("binary_cross_entropy", np.array([[size], [-size]]), np.array([[1.0], [0.0]]))
    assert C == 0
    assert np.abs(delta).max() == 0
    C, delta = cost("binary_cross_entropy", np.array([[size], [-size]]), np.array([[0.0], [1.0]]))
    assert C > 1e30 if np.isinf(size) else abs(C - size) <= tolerance * size
    assert delta.tolist() == [[0.5], [-0.5]]


def test_binary_cross_entropy_of_confident_outputs_keeps_its_digits(cost, tolerance):
    z = np.array([10.0, 20, 30, 40])
    for x in z:
        C_yes, _ = cost("binary_cross_entropy", np.array([[x]]), np.array([[1.0]]))
        C_no, _ = cost("binary_cross_entropy", np.array([[-x]]), np.array([[0.0]]))
        expected = math.log1p(math.exp(-x))
        assert abs(C_no - expected) <= tolerance * expected
        assert abs(C_yes - expected) <= tolerance * expected


@every_regression
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("output_activation", ASYMPTOTES)
def test_regression_losses_of_huge_outputs(cost, dtype, tolerance, loss, size, output_activation):
    C, delta = cost(loss, np.array([[size], [-size]]), np.zeros((2, 1)), output_activation=output_activation)
    (left, floor), (right, ceiling) = ASYMPTOTES[output_activation]
    a = [right * size + ceiling, left * -size + floor]
    with np.errstate(over="ignore"):
        # A row's cost is of the arrays' dtype, so a square beyond it is infinite; it is not NaN.
        c = {"squared_error": np.square(a) / 2, "absolute_error": np.abs(a), "huber": special.huber(1, a)}[loss]
        total = c.astype(dtype).astype(np.float64).sum() / 2
    dc_da = a if loss == "squared_error" else np.clip(np.sign(a), -1, 1)
    assert math.isinf(C) == math.isinf(total)
    assert total == C or abs(C - total) <= tolerance * abs(total)
    expected = np.array(dc_da) * [right, left] / 2
    assert np.isfinite(delta).all()
    assert np.abs(delta[:, 0] - expected).max() <= tolerance * max(1, np.abs(expected).max())


@every_regression
@pytest.mark.parametrize("output_activation", ASYMPTOTES)
def test_regression_losses_of_infinite_outputs_make_no_nan(cost, loss, output_activation):
    C, delta = cost(loss, np.array([[np.inf], [-np.inf]]), np.zeros((2, 1)), output_activation=output_activation)
    assert not math.isnan(C)
    assert not np.isnan(delta).any()


def test_poisson_costs_nothing_where_the_rate_is_the_count(cost):
    C, delta = cost("poisson", np.zeros((2, 3)), np.ones((2, 3)))
    assert C == 0
    assert not delta.any()


def test_poisson_at_the_edges(cost):
    C, delta = cost("poisson", np.array([[-np.inf], [-1e4], [-1e30]]), np.zeros((3, 1)))
    assert C == 0
    assert not delta.any()
    for size in (1e4, 1e30, np.inf):
        C, delta = cost("poisson", np.array([[size], [0.0]]), np.array([[3.0], [1.0]]))
        assert math.isinf(C)
        assert delta.tolist() == [[np.inf], [0]]
    C, delta = cost("poisson", np.array([[-1e4]]), np.array([[3.0]]))
    assert abs(C - (3e4 + 3 * math.log(3) - 3)) <= 1e-5 * C
    assert delta.tolist() == [[-3]]


def _target(loss):
    return np.array([0, 1, 1, 0]) if loss == "cross_entropy" else np.array([[0.0, 1], [1, 0], [0.5, 1], [1, 1]])


@every_loss
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30, 1e-44, -1e-44])
def test_no_loss_makes_nan_of_finite_numbers(cost, loss, size):
    z = np.array([[size, -size], [0.0, size], [size, size], [0.0, 0.0]])
    for w in (None, np.array([0.0, 1, 2, 3])):
        C, delta = cost(loss, z, _target(loss), w)
        assert not math.isnan(C)
        assert not np.isnan(delta).any()


@every_loss
def test_nan_in_z_is_nan_out_of_every_loss(cost, loss):
    z = np.array([[1.0, 2], [np.nan, 1], [3, 0], [1, np.nan]])
    C, delta = cost(loss, z, _target(loss))
    assert math.isnan(C)
    together = loss == "cross_entropy"  # whose softmax mixes a row's outputs
    assert np.isnan(delta).tolist() == [[False] * 2, [True, together], [False] * 2, [together, True]]


@every_regression
@every_activation
def test_nan_in_z_is_nan_out_under_every_output_activation(cost, loss, activation):
    z = np.array([[1.0, 2], [np.nan, 1]])
    C, delta = cost(loss, z, np.zeros((2, 2)), output_activation=activation)
    assert math.isnan(C)
    assert np.isnan(delta).tolist() == [[False, False], [True, False]]


@every_loss
def test_nan_in_the_target_is_nan_out(cost, loss):
    y = np.array([[0.25, 0.75], [np.nan, 0.5]])
    C, delta = cost(loss, np.array([[1.0, 2], [3, 4]]), y)
    assert math.isnan(C)
    assert np.isnan(delta).tolist() == [[False, False], [True, False]]


@every_loss
def test_nan_in_a_weight_is_nan_out(cost, loss):
    C, delta = cost(loss, np.ones((4, 2)), _target(loss), np.array([1.0, np.nan, 1.0, 1.0]))
    assert math.isnan(C)
    assert np.isnan(delta).all()


@pytest.mark.parametrize(("loss", "z"), [("poisson", 1e4), ("poisson", np.inf), ("squared_error", np.inf)])
def test_a_row_of_weight_0_is_absent_where_its_cost_is_infinite(cost, loss, z):
    C, delta = cost(loss, np.array([[z], [0.0]]), np.array([[1.0], [3.0]]), np.array([0.0, 2.0]))
    alone, delta_alone = cost(loss, np.array([[0.0]]), np.array([[3.0]]))
    assert math.isfinite(alone)
    assert alone == C
    assert delta.tolist() == [[0], *delta_alone.tolist()]


@every_loss
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_only_the_ratios_of_weights_count(cost, tolerance, loss, scale):
    z, w = np.array([[1.0, -2], [0.5, 1], [3, 0], [1, 1]]), np.array([1.0, 2, 0, 4])
    C, delta = cost(loss, z, _target(loss), w)
    scaled, delta_scaled = cost(loss, z, _target(loss), scale * w)
    assert abs(scaled - C) <= tolerance * C
    assert np.abs(delta_scaled - delta).max() <= tolerance * np.abs(delta).max()


# Updates


@pytest.fixture
def step(backend, put):
    """step(optimizer, gradients): the parameters after one update of ones, on the host, and the state."""

    def step(optimizer, gradients, parameters=None):
        size = len(gradients)
        mine = put(np.ones(size) if parameters is None else parameters)
        state = {slot: put(np.zeros(size)) for slot in optimizer.slots}
        backend.update(mine, put(gradients), state, optimizer, learning_rate=0.5, step=1, n_weights=size)
        return backend.to_numpy(mine), {slot: backend.to_numpy(x) for slot, x in state.items()}

    return step


every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
def test_nan_in_a_gradient_is_nan_in_its_parameter(step, optimizer):
    parameters, state = step(optimizer(), np.array([1.0, np.nan, -1.0]))
    assert np.isnan(parameters).tolist() == [False, True, False]
    assert all(np.isnan(slot).tolist() == [False, True, False] for slot in state.values())


@every_optimizer
def test_nan_in_a_parameter_stays(step, optimizer):
    parameters, _ = step(optimizer(), np.ones(3), np.array([1.0, np.nan, -1.0]))
    assert np.isnan(parameters).tolist() == [False, True, False]


@every_optimizer
def test_nan_in_a_clipped_gradient_is_nan_everywhere(step, optimizer):
    parameters, _ = step(optimizer(clip_norm=1.0), np.array([1.0, np.nan, -1.0]))
    assert np.isnan(parameters).all()


@every_optimizer
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_updates_by_tiny_and_large_gradients_are_finite(step, dtype, optimizer, clip_norm):
    smallest = float(np.finfo(dtype).smallest_subnormal)
    for g in ([0.0, 0.0], [smallest, -smallest], [1e-30, 1.0], [1e4, -1e15], [1e15, 1e-44]):
        parameters, state = step(optimizer(clip_norm=clip_norm), np.array(g))
        assert np.isfinite(parameters).all()
        assert all(np.isfinite(slot).all() for slot in state.values())


def test_clipping_holds_where_the_norm_is_beyond_float32(step, tolerance):
    parameters, _ = step(bp.SGD(clip_norm=5.0), np.array([3e30, -4e30]), np.zeros(2))
    assert np.abs(parameters - [-1.5, 2.0]).max() <= 2 * tolerance


@every_optimizer
def test_a_norm_too_large_for_any_number_shows_as_nan(step, optimizer):
    parameters, _ = step(optimizer(clip_norm=5.0), np.array([np.inf, 1.0]))
    assert np.isnan(parameters).all()


@pytest.mark.parametrize("optimizer", [bp.Adam, bp.AdamW, bp.RMSprop])
def test_a_second_moment_that_overflows_makes_no_nan_and_no_warning(step, dtype, optimizer):
    parameters, _ = step(optimizer(), np.array([0.9 * float(np.finfo(dtype).max), 1.0]))
    assert np.isfinite(parameters).all()


@pytest.mark.parametrize("y", [1.0, 1e5, 1e6])
def test_poisson_near_its_minimum_keeps_its_digits(cost, dtype, y):
    z = np.array([[np.log(y) + 1e-2]], dtype).astype(float)
    d = z - np.log(y)
    exact = float(y * (d**2 / 2 + d**3 / 6 + d**4 / 24 + d**5 / 120)[0, 0])
    assert abs(cost("poisson", z, np.array([[y]]))[0] / exact - 1) <= (1e-2 if dtype == "float32" else 1e-8)


@pytest.mark.parametrize("y", [0.0, 7.0])
def test_poisson_of_an_infinite_rate_is_infinite(cost, y):
    assert cost("poisson", np.array([[np.inf]]), np.array([[y]]))[0] == np.inf


def test_gradients_over_many_rows_keep_their_digits(backend, put, dtype, tolerance):
    delta = np.random.default_rng(0).random((16384, 3)).astype(dtype)
    _, db = backend.dense_gradients(put(np.ones((16384, 1))), put(delta))
    exact = delta.astype(np.longdouble).sum(axis=0)
    # One long float32 sum is 20 times further off, which the tolerance would let pass.
    assert np.abs(backend.to_numpy(db) / exact - 1).max() <= min(2 * np.finfo("float32").eps, tolerance)


# Dropout


def test_a_neuron_left_out_is_0_whatever_it_was(backend, put):
    dropout = Dropout(0.5, seed=5, layer=0, step=0)
    ones = put(np.ones((1, 1))), put(np.zeros(64))
    kept = backend.to_numpy(
        backend.dense_forward(ones[0], put(np.ones((1, 64))), ones[1], "identity", dropout=dropout)[0]
    )
    assert 0 < np.count_nonzero(kept) < 64
    for bad in (np.nan, np.inf, -np.inf):
        for activation in ("identity", "relu", "gelu", "silu", "leaky_relu"):
            a, _ = backend.dense_forward(
                put(np.full((1, 1), bad)), put(np.ones((1, 64))), ones[1], activation, dropout=dropout
            )
            a = backend.to_numpy(a)
            assert (a[kept == 0] == 0).all()
            if np.isnan(bad):
                assert np.isnan(a[kept != 0]).all()


def test_a_derivative_left_out_is_0_and_nan_elsewhere_stays(backend, put):
    dropout = Dropout(0.5, seed=5, layer=0, step=0)
    W_next, kept = put(np.ones((64, 1))), put(np.full((1, 64), 0.5))
    clean = backend.to_numpy(backend.dense_backward(put(np.ones((1, 1))), W_next, kept, "tanh", dropout=dropout))
    bad = backend.to_numpy(backend.dense_backward(put(np.full((1, 1), np.nan)), W_next, kept, "tanh", dropout=dropout))
    assert 0 < np.count_nonzero(clean) < 64
    assert np.array_equal(np.isnan(bad), clean != 0)
    assert (bad[clean == 0] == 0).all()
