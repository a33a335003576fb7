"""The compiled losses, updates and dropout masks of `kernels/numba_cpu` against the NumPy reference, tile by tile."""

import math
import platform
import re

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.backends.numpy import OUTPUT_FORWARD, NumpyBackend, dropout_mask
from backprop_gpu.data import Entries
from backprop_gpu.losses import output_activation

pytest.importorskip("numba")

from backprop_gpu.kernels.numba_cpu import dropout as dropouts
from backprop_gpu.kernels.numba_cpu import output_delta as losses
from backprop_gpu.kernels.numba_cpu import update as updates
from backprop_gpu.kernels.numba_cpu.compile import executable
from backprop_gpu.kernels.numba_cpu.gemm import claim_panel
from backprop_gpu.kernels.numba_cpu.network import Batches
from backprop_gpu.kernels.numba_cpu.panels import VECTORS, panel_width

REFERENCE = NumpyBackend()

NO_ENTRIES = Entries(np.empty(0), np.empty(0, np.int32), np.empty(0, np.int64))

output_delta, output_forward, update, add, keep_factors, multiply = (
    executable(function.py_func)
    for function in (
        losses.output_delta,
        losses.output_forward,
        updates.update,
        updates.add,
        dropouts.keep_factors,
        dropouts.multiply,
    )
)

UNTOUCHED = -77.0
"""What is in memory around a tile, before and after."""

GARBAGE = 1e30
"""What the padding of z may hold."""

START, GAP = 3, 5
"""Entries before the first panel, which is so on no vector's boundary, and between panels."""

N_ROWS, FIRST = 11, 4
"""Rows of a tile, and the first of them among those of the mini-batch."""

SHAPES = [
    (1, 8),
    (1, 1),
    (2, 16),
    (7, 8),
    (7, 7),
    (10, 32),
    (4, 8),
    (16, 32),
    (17, 32),
    (33, 16),
    (33, 33),
    (65, 32),
    (65, 65),
    (24, 24),
    (16, 8),
]
"""(columns, width of a panel); row-major where they are equal."""

shapes = pytest.mark.parametrize(("n_columns", "width"), SHAPES, ids=[f"{n}in{w}" for n, w in SHAPES])


TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
"""Largest error by dtype, relative to the largest entry of the float64 reference."""


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    """Every dtype that the kernels are compiled for, whichever backends work."""
    return request.param


@pytest.fixture
def tolerance(dtype):
    """The tolerance table's entry for `dtype`."""
    return TOLERANCE[dtype]


@pytest.fixture
def close(tolerance):
    """close(actual, expected): within the tolerance of a finite float64 reference that is not all zero."""

    def close(actual, expected):
        assert np.isfinite(expected).all()
        assert np.abs(expected).max() > 0
        assert np.isfinite(actual).all()
        assert np.abs(actual - expected).max() / np.abs(expected).max() <= tolerance

    return close


class Panels:
    """Matrices of one shape, each in panels, one after the other in one vector."""

    def __init__(self, n_rows, n_columns, width, dtype, count=1):
        self.n_rows, self.n_columns, self.width = n_rows, n_columns, width
        self.stride = n_rows * width + GAP
        self.panels = -(-n_columns // width)
        self.size = self.panels * self.stride
        self.x = np.full(START + count * self.size, UNTOUCHED, dtype)
        self.layout = self.stride, width, n_rows, n_columns

    def start(self, number=0):
        return START + number * self.size

    def all_columns(self, number=0):
        """A view of one matrix: (panels, rows, columns of a panel)."""
        rows = self.x[self.start(number) : self.start(number) + self.size].reshape(self.panels, self.stride)
        return rows[:, : self.n_rows * self.width].reshape(self.panels, self.n_rows, self.width)

    def put(self, matrix, number=0, padding=0.0):
        padded = np.full((self.n_rows, self.panels * self.width), padding)
        padded[:, : self.n_columns] = matrix
        self.all_columns(number)[...] = padded.reshape(self.n_rows, self.panels, self.width).swapaxes(0, 1)

    def get(self, number=0):
        """One matrix, whose padding must be 0, as must what is around it be untouched."""
        columns = self.all_columns(number).swapaxes(0, 1).reshape(self.n_rows, -1)
        assert not columns[:, self.n_columns :].any()
        gaps = self.x[START:].reshape(-1, self.stride)[:, self.n_rows * self.width :]
        assert (gaps == UNTOUCHED).all()
        assert (self.x[:START] == UNTOUCHED).all()
        return columns[:, : self.n_columns]


# output_delta


def tile_delta(loss, z, target, weight=None, sigma=None, width=8):
    """(part of C, δ) of a tile: its rows are somewhere among the data's, in no order, one of them twice over."""
    loss = bp.losses.get(loss)
    n_rows, n_columns = z.shape
    rng = np.random.default_rng(n_columns)
    order = rng.permutation(n_rows + FIRST + 9)[: n_rows + FIRST]
    order[FIRST:] = np.roll(order[FIRST:], 3)
    share = np.full(len(order), np.nan)
    weight = np.ones(n_rows) if weight is None else weight
    share[FIRST:] = weight / weight.sum()
    data = np.zeros((n_rows + FIRST + 9, *target.shape[1:]), target.dtype)
    data[order[FIRST:]] = target
    labels, values = (data, np.empty((0, 0), z.dtype)) if data.ndim == 1 else (np.empty(0, np.int32), data)
    batches = Batches(np.empty((0, 0), z.dtype), labels, values, order, share, NO_ENTRIES)
    tile = Panels(n_rows, n_columns, width, z.dtype, count=2)
    tile.put(z, 0, GARBAGE)
    cost = output_delta(
        losses.CODES[loss.name],
        losses.setting(loss),
        losses.SIGMAS[output_activation(loss, sigma)],
        tile.x,
        tile.start(0),
        tile.start(1),
        *tile.layout,
        batches,
        FIRST,
    )
    return cost, tile.get(1)


def reference_delta(loss, z, target, weight=None, sigma=None):
    """(C, δ) by the NumPy backend, in float64."""
    target = target if target.ndim == 1 else target.astype(np.float64)
    weight = None if weight is None else weight.astype(np.float64)
    return REFERENCE.output_delta(z.astype(np.float64), target, loss, output_activation=sigma, sample_weight=weight)


def draw(n_columns, dtype, kind="z"):
    rng = np.random.default_rng([n_columns, len(kind)])
    draws = {
        "z": lambda: 2 * rng.standard_normal((N_ROWS, n_columns)),
        "normal": lambda: rng.standard_normal((N_ROWS, n_columns)),
        "fraction": lambda: rng.random((N_ROWS, n_columns)),
        "probabilities": lambda: rng.dirichlet(np.ones(n_columns), N_ROWS),
        "count": lambda: rng.poisson(2, (N_ROWS, n_columns)),
        "label": lambda: rng.integers(0, n_columns, N_ROWS),
    }
    return draws[kind]().astype(np.int32 if kind == "label" else dtype)


WEIGHT = np.array([1.0, 0, 2, 0.5, 3, 1, 0, 0.25, 1, 1, 4])

CASES = {
    "cross_entropy": (bp.CrossEntropy(), "label"),
    "smoothed": (bp.CrossEntropy(label_smoothing=0.1), "label"),
    "probabilities": (bp.CrossEntropy(), "probabilities"),
    "smoothed-probabilities": (bp.CrossEntropy(label_smoothing=0.3), "probabilities"),
    "binary_cross_entropy": (bp.BinaryCrossEntropy(), "fraction"),
    "squared_error": (bp.SquaredError(), "normal"),
    "absolute_error": (bp.AbsoluteError(), "normal"),
    "huber": (bp.Huber(threshold=0.7), "normal"),
    "poisson": (bp.Poisson(), "count"),
    "poisson-of-fractions": (bp.Poisson(), "fraction"),
}

cases = pytest.mark.parametrize(("loss", "kind"), CASES.values(), ids=CASES)
every_regression = pytest.mark.parametrize("loss", [bp.SquaredError(), bp.AbsoluteError(), bp.Huber(threshold=0.7)])


@shapes
@cases
def test_output_delta(dtype, close, tolerance, loss, kind, n_columns, width):
    z, target = draw(n_columns, dtype), draw(n_columns, dtype, kind)
    for weight in (None, WEIGHT):
        cost, delta = tile_delta(loss, z, target, weight, width=width)
        expected_cost, expected_delta = reference_delta(loss, z, target, weight)
        if loss.name == "cross_entropy" and n_columns == 1:  # a class that is certain
            assert abs(cost) <= tolerance
            assert np.abs(delta).max() <= tolerance
        else:
            close(cost, expected_cost)
            close(delta, expected_delta)


@every_regression
@pytest.mark.parametrize("sigma", bp.ACTIVATIONS)
@pytest.mark.parametrize(("n_columns", "width"), [(1, 8), (7, 7), (33, 16)])
def test_output_delta_under_every_activation(dtype, close, loss, sigma, n_columns, width):
    z, target = draw(n_columns, dtype), draw(n_columns, dtype, "fraction")
    cost, delta = tile_delta(loss, z, target, WEIGHT, sigma, width)
    expected_cost, expected_delta = reference_delta(loss, z, target, WEIGHT, sigma)
    close(cost, expected_cost)
    close(delta, expected_delta)


def test_a_row_may_be_in_the_mini_batch_twice(dtype, close):
    z, labels = draw(7, dtype), draw(7, dtype, "label")
    order = np.array([2, 2, 0])
    batches = Batches(np.empty((0, 0), dtype), labels, np.empty((0, 0), dtype), order, np.full(3, 1 / 3), NO_ENTRIES)
    tile = Panels(3, 7, 8, dtype, count=2)
    tile.put(z[:3])
    cost = output_delta(
        losses.CODES["cross_entropy"],
        0.0,
        losses.SOFTMAX,
        tile.x,
        tile.start(0),
        tile.start(1),
        *tile.layout,
        batches,
        0,
    )
    expected_cost, expected_delta = reference_delta("cross_entropy", z[:3], labels[order])
    close(cost, expected_cost)
    close(tile.get(1), expected_delta)


INFINITE = np.array(
    [
        [np.inf, 0, -np.inf],
        [0, np.inf, np.inf],
        [-np.inf, -np.inf, -np.inf],
        [1e4, 0, -1e4],
        [-1e30, 1e30, 0],
        [3e38, 1e38, -3e38],
        [1e-44, -1e-44, 0],
    ]
)


@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_huge_and_infinite_logits(dtype, tolerance, label, width, smoothing):
    loss = bp.CrossEntropy(label_smoothing=smoothing)
    for row in INFINITE.astype(dtype):
        z, target = row[None], np.array([label], np.int32)
        cost, delta = tile_delta(loss, z, target, width=width)
        expected_cost, expected_delta = REFERENCE.output_delta(z, target, loss)
        assert np.isfinite(delta).all()
        assert np.abs(delta - expected_delta).max() <= tolerance
        assert abs(cost - expected_cost) <= tolerance * max(1, expected_cost)


def test_many_infinite_logits_make_no_infinite_cost(dtype, close):
    z = np.full((1, 65), -np.inf, dtype)
    z[0, 40] = np.inf
    loss, target = bp.CrossEntropy(label_smoothing=0.1), np.array([3], np.int32)
    cost, delta = tile_delta(loss, z, target, width=32)
    expected_cost, expected_delta = REFERENCE.output_delta(z, target, loss)
    close(cost, np.float64(expected_cost))
    close(delta, expected_delta.astype(np.float64))


ELEMENTWISE = ["binary_cross_entropy", "squared_error", "absolute_error", "huber", "poisson"]


@pytest.mark.parametrize("loss", ELEMENTWISE)
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_elementwise_losses_of_huge_and_infinite_outputs(dtype, tolerance, loss, y):
    for value in INFINITE.astype(dtype).flat:
        z, target = np.full((1, 1), value), np.full((1, 1), y, dtype)
        with np.errstate(over="ignore"):
            expected_cost, expected_delta = REFERENCE.output_delta(z, target, loss)
        cost, delta = tile_delta(loss, z, target)
        assert delta[0, 0] == expected_delta[0, 0] or abs(delta - expected_delta).max() <= tolerance
        assert cost == expected_cost or abs(cost - expected_cost) <= tolerance * max(1, expected_cost)


@cases
@pytest.mark.parametrize("width", [5, 8, 16])
def test_whatever_z_is_in_a_row_of_weight_0_it_counts_for_nothing(dtype, close, loss, kind, width):
    z, target = draw(5, dtype), draw(5, dtype, kind)
    expected_cost, expected_delta = reference_delta(loss, z, target, WEIGHT)
    for value in (np.nan, np.inf, -np.inf):
        z[WEIGHT == 0] = value
        cost, delta = tile_delta(loss, z, target, WEIGHT, width=width)
        assert not delta[WEIGHT == 0].any()
        close(cost, expected_cost)
        close(delta, expected_delta)


@cases
@pytest.mark.parametrize("width", [5, 8, 16])
def test_nan_in_z_is_nan_out_where_it_should_be(dtype, loss, kind, width):
    for sign in (1, -1):
        z, target = draw(5, dtype), draw(5, dtype, kind)
        z[2, 1] = z[7, 4] = np.copysign(np.nan, sign)
        cost, delta = tile_delta(loss, z, target, width=width)
        expected = np.isnan(z)
        if loss.name == "cross_entropy":
            expected[[2, 7]] = True
        assert math.isnan(cost)
        assert np.array_equal(np.isnan(delta), expected)


@cases
def test_nan_in_the_target_is_nan_out(dtype, loss, kind):
    if kind == "label":
        return
    z, target = draw(5, dtype), draw(5, dtype, kind)
    target[3, 2] = np.nan
    cost, delta = tile_delta(loss, z, target)
    assert math.isnan(cost)
    assert np.array_equal(np.isnan(delta), np.isnan(target))


@cases
def test_nan_in_a_weight_is_nan_out(dtype, loss, kind):
    weight = np.where(np.arange(N_ROWS) == 2, np.nan, 1)
    cost, delta = tile_delta(loss, draw(5, dtype), draw(5, dtype, kind), weight)
    assert math.isnan(cost)
    assert np.isnan(delta).all()


@cases
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("width", [5, 8])
def test_a_row_of_weight_0_is_absent_whatever_it_holds(dtype, loss, kind, bad, width):
    z, target = draw(5, dtype), draw(5, dtype, kind)
    weight = np.where(np.arange(N_ROWS) % 3 == 1, 0.0, 1.5)
    expected_cost, expected_delta = tile_delta(loss, z, target, weight, width=width)
    z[weight == 0] = bad
    cost, delta = tile_delta(loss, z, target, weight, width=width)
    assert cost == expected_cost
    assert np.array_equal(delta, expected_delta)
    assert not delta[weight == 0].any()


@pytest.mark.parametrize("sigma", bp.ACTIVATIONS)
def test_a_row_of_weight_0_is_absent_under_every_activation(dtype, sigma):
    weight = np.where(np.arange(N_ROWS) % 3 == 1, 0.0, 1.5)
    z, target = draw(5, dtype), draw(5, dtype)
    z[weight == 0] = np.nan
    cost, delta = tile_delta("huber", z, target, weight, sigma)
    assert math.isfinite(cost)
    assert np.isfinite(delta).all()
    assert not delta[weight == 0].any()


@pytest.mark.parametrize("y", [0.75, 1.0, 1.5, 3.0, 1e5, 1e6])
def test_poisson_near_its_minimum_keeps_its_digits(dtype, y):
    z = np.array([[np.log(y) + 1e-2]], dtype)
    d = float(z[0, 0]) - math.log(y)
    exact = y * (d**2 / 2 + d**3 / 6 + d**4 / 24 + d**5 / 120)
    cost, _ = tile_delta("poisson", z, np.array([[y]], dtype))
    assert abs(cost / exact - 1) <= (1e-2 if dtype == "float32" else 1e-8)


def test_poisson_costs_nothing_where_the_rate_is_the_count(dtype):
    cost, delta = tile_delta("poisson", np.zeros((3, 2), dtype), np.ones((3, 2), dtype))
    assert cost == 0
    assert not delta.any()


@pytest.mark.parametrize("x", [10.0, 20, 30, 40])
def test_binary_cross_entropy_of_confident_outputs_keeps_its_digits(dtype, tolerance, x):
    for z, y in ((x, 1.0), (-x, 0.0)):
        cost, _ = tile_delta("binary_cross_entropy", np.array([[z]], dtype), np.array([[y]], dtype))
        expected = math.log1p(math.exp(-x))
        assert abs(cost - expected) <= tolerance * expected


# output_forward


def forward(sigma, z, width):
    tile = Panels(*z.shape, width, z.dtype)
    tile.put(z, padding=GARBAGE)
    output_forward(losses.SIGMAS[sigma], tile.x, tile.start(), *tile.layout)
    return tile.get()


@shapes
@pytest.mark.parametrize("sigma", ["softmax", "exp", "identity", "sigmoid", "softplus"])
def test_output_forward(dtype, close, sigma, n_columns, width):
    z = draw(n_columns, dtype)
    close(forward(sigma, z, width), OUTPUT_FORWARD[sigma](z.astype(np.float64)))


@pytest.mark.parametrize("sigma", losses.SIGMAS)
def test_output_forward_of_every_activation(dtype, close, sigma):
    z = draw(7, dtype)
    close(forward(sigma, z, 8), OUTPUT_FORWARD[sigma](z.astype(np.float64)))


@pytest.mark.parametrize("width", [3, 8])
def test_softmax_at_the_edges(dtype, tolerance, width):
    z = np.concatenate([INFINITE, [[1, np.nan, 2]]]).astype(dtype)
    a, expected = forward("softmax", z, width), OUTPUT_FORWARD["softmax"](z)
    assert np.abs(a[:-1] - expected[:-1]).max() <= tolerance
    assert np.isnan(a[-1]).all()


# update

OPTIMIZERS = {
    "sgd": bp.SGD(),
    "momentum": bp.SGD(momentum=0.9),
    "nesterov": bp.SGD(momentum=0.8, nesterov=True),
    "adam": bp.Adam(),
    "adam-other-settings": bp.Adam(beta_1=0.5, beta_2=0.9, epsilon=1e-3),
    "adam-epsilon-hat": bp.Adam(epsilon=1e-3, epsilon_hat=True),
    "adamw": bp.AdamW(weight_decay=0.3),
    "rmsprop": bp.RMSprop(decay=0.8),
}

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)

RATES = [0.1, 0.05, 0.2, 0.01]


class Learner:
    """Parameters with the optimizer's state, in vectors of one layout."""

    def __init__(self, optimizer, parameters):
        self.optimizer, self.parameters = optimizer, parameters
        self.slots = [np.zeros_like(parameters) for _ in range(2)]
        self.step = 0

    def update(self, gradients, rate, start, stop, alpha=0.0, scale=1.0, biases=False):
        update(
            updates.CODES[type(self.optimizer)],
            updates.settings(self.optimizer),
            self.parameters,
            gradients,
            *self.slots,
            start,
            stop,
            rate,
            alpha,
            scale,
            self.step,
            biases,
        )


@every_optimizer
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize(("start", "split", "stop"), [(0, 1, 1), (3, 40, 40), (3, 3, 20), (1, 38, 300)])
def test_update(dtype, close, optimizer, alpha, start, split, stop):
    """Weights from start to split, biases from there to stop, as one run each; other entries are left alone."""
    rng = np.random.default_rng(stop)
    initial = rng.standard_normal(stop + 5).astype(dtype)
    learner = Learner(optimizer, initial.copy())
    expected = initial[start:stop].astype(np.float64)
    state = {slot: np.zeros_like(expected) for slot in optimizer.slots}
    for learner.step, rate in enumerate(RATES, start=1):
        g = rng.standard_normal(stop + 5).astype(dtype)
        learner.update(g, rate, start, split, alpha=alpha, scale=0.75)
        learner.update(g, rate, split, stop, scale=0.75, biases=True)
        penalty = alpha * np.where(np.arange(start, stop) < split, expected, 0)
        total = 0.75 * (g[start:stop].astype(np.float64) + penalty)
        REFERENCE.update(
            expected, total, state, optimizer, learning_rate=rate, step=learner.step, n_weights=split - start
        )
    close(learner.parameters[start:stop], expected)
    outside = np.r_[:start, stop : stop + 5]
    assert np.array_equal(learner.parameters[outside], initial[outside])
    for slot, (actual, name) in enumerate(zip(learner.slots, optimizer.slots, strict=False)):
        close(actual[start:stop], state[name])
        assert not learner.slots[slot][outside].any()


@every_optimizer
def test_nan_in_a_gradient_or_a_parameter_stays_there(dtype, optimizer):
    learner = Learner(optimizer, np.ones(40, dtype))
    gradients = np.ones(40, dtype)
    gradients[17] = learner.parameters[23] = np.nan
    learner.step = 1
    learner.update(gradients, 0.5, 0, 40)
    bad = np.arange(40) == 17
    assert np.array_equal(np.isnan(learner.parameters), bad | (np.arange(40) == 23))
    for slot in learner.slots[: len(optimizer.slots)]:
        assert np.array_equal(np.isnan(slot), bad)


@every_optimizer
def test_an_infinite_parameter_without_a_penalty_makes_no_nan(dtype, optimizer):
    learner = Learner(optimizer, np.full(3, np.inf, dtype))
    learner.step = 1
    learner.update(np.ones(3, dtype), 0.5, 0, 3)
    assert (learner.parameters == np.inf).all()


@every_optimizer
def test_moments_that_have_decayed_to_denormal_numbers_become_0(dtype, optimizer):
    learner = Learner(optimizer, np.ones(40, dtype))
    learner.step = 1000
    for slot in learner.slots:
        slot[:] = 100 * np.finfo(dtype).smallest_subnormal
    learner.update(np.zeros(40, dtype), 0.5, 0, 40, biases=True)
    for slot in learner.slots[: len(optimizer.slots)]:
        assert not slot.any()
    assert (learner.parameters == 1).all()


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
@pytest.mark.parametrize("size", [1e-14, 1e-17, 1e-19, 1e-22, 1e-30])
def test_tiny_gradients_move_parameters_as_in_the_reference(dtype, close, name, size):
    """Also where their squares are denormal, and taken for 0: √v̂ is then lost beside ε."""
    optimizer = OPTIMIZERS[name]
    g = np.array([size, -3 * size, 0.5 * size], dtype)
    learner, expected = Learner(optimizer, np.zeros(3, dtype)), np.zeros(3)
    state = {slot: np.zeros(3) for slot in optimizer.slots}
    for learner.step in range(1, 4):
        learner.update(g, 0.5, 0, 3)
        REFERENCE.update(
            expected, g.astype(np.float64), state, optimizer, learning_rate=0.5, step=learner.step, n_weights=0
        )
    close(learner.parameters, expected)


@pytest.mark.parametrize("optimizer", [bp.Adam(epsilon=1e-30), bp.RMSprop(epsilon=1e-30)], ids=["adam", "rmsprop"])
def test_squares_of_tiny_gradients_count_where_epsilon_is_smaller_still(dtype, close, optimizer):
    g = np.array([1e-18, -1e-18], dtype)
    learner, expected = Learner(optimizer, np.ones(2, dtype)), np.ones(2)
    state = {slot: np.zeros(2) for slot in optimizer.slots}
    learner.step = 1
    learner.update(g, 0.5, 0, 2)
    REFERENCE.update(expected, g.astype(np.float64), state, optimizer, learning_rate=0.5, step=1, n_weights=0)
    close(learner.parameters, expected)


def test_a_second_moment_that_overflows_makes_no_nan(dtype):
    for name in ("adam", "adamw", "rmsprop"):
        learner = Learner(OPTIMIZERS[name], np.ones(2, dtype))
        learner.step = 1
        learner.update(np.array([0.9 * float(np.finfo(dtype).max), 1], dtype), 0.5, 0, 2, biases=True)
        assert np.isfinite(learner.parameters).all()


def test_an_optimizer_of_another_kind_is_refused():
    class Lion(bp.optimizers.Optimizer):
        pass

    with pytest.raises(TypeError, match=r"no compiled update for Lion; there is one for SGD, Adam, AdamW, RMSprop"):
        updates.settings(Lion())


@executable
def sum_squares(gradients, parameters, alpha, start, stop):
    return updates.sum_squares(gradients, parameters, alpha, start, stop)


@executable
def sum_squares_of_run(x, start, stop):
    return updates.sum_squares_of_run(x, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 3), (1, 300), (0, 1000)])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_sum_squares(dtype, tolerance, start, stop, alpha):
    g, w = np.random.default_rng(0).standard_normal((2, 1000)).astype(dtype)
    g[:start] = w[stop:] = np.nan
    exact = math.fsum(np.square(g[start:stop].astype(float) + alpha * w[start:stop].astype(float)))
    assert abs(sum_squares(g, w, alpha, start, stop) - exact) <= tolerance * exact


@pytest.mark.parametrize("n", [0, 1, 7, 8192])
def test_sum_squares_of_a_run_loses_no_more_than_its_vectors_do(dtype, n):
    x = np.random.default_rng(0).standard_normal(n + 5).astype(dtype)
    exact = float((x[3 : n + 3].astype(np.longdouble) ** 2).sum())
    assert abs(sum_squares_of_run(x, 3, n + 3) - exact) <= 16 * np.finfo(dtype).eps * exact


def test_sum_squares_holds_beyond_float32_and_shows_nan():
    g = np.full(100, 1e30, np.float32)
    assert sum_squares(g, g, 0.0, 0, 100) == pytest.approx(1e62, rel=1e-6)
    assert sum_squares_of_run(g, 0, 100) == pytest.approx(1e62, rel=1e-6)
    g[63] = np.nan
    assert math.isnan(sum_squares(g, g, 0.0, 0, 100))
    assert math.isnan(sum_squares_of_run(g, 0, 100))


def test_sum_squares_without_a_penalty_leaves_the_parameters_out():
    g, w = np.full(3, 2.0), np.full(3, np.inf)
    assert sum_squares(g, w, 0.0, 0, 3) == 12


def test_add(dtype):
    x, y = np.random.default_rng(0).standard_normal((2, 100)).astype(dtype)
    expected = x.copy()
    expected[3:91] += y[3:91]
    add(x, y, 3, 91)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_claim_stores_a_number_of_every_cache_line_again_as_it_is(dtype):
    bits = np.random.default_rng(0).integers(0, 256, 3 * panel_width(np.empty(0, dtype)) * np.dtype(dtype).itemsize)
    x = bits.astype(np.uint8).view(dtype)  # NaN among them
    before = x.tobytes()

    @executable
    def claim(x):
        claim_panel(x, panel_width(x))

    claim(x)
    assert x.tobytes() == before
    (code,) = claim.inspect_asm().values()
    if platform.machine() in ("x86_64", "AMD64"):
        assert len(re.findall(r"movq\s+(\S+), (%\w+)\n\s*movq\s+\2, \1\n", code)) == VECTORS


# Dropout

DROPOUTS = [
    Dropout(0.5, seed=0, layer=0, step=0),
    Dropout(0.2, seed=2**64 - 59, layer=3, step=1000),
    Dropout(0.9, seed=2**32, layer=1, step=2**32 + 5),
    Dropout(1 / 3, seed=12345, layer=100, step=2**31),
    Dropout(0.0, seed=7, layer=1, step=1),
]


@shapes
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_keep_factors(dtype, n_columns, width, dropout):
    tile = Panels(N_ROWS, n_columns, width, dtype)
    keep_factors(
        tile.x,
        tile.start(),
        *tile.layout,
        FIRST,
        0,
        dropout.rate,
        np.uint64(dropout.seed),
        dropout.layer,
        dropout.step,
    )
    kept = dropout_mask((FIRST + N_ROWS, n_columns), dropout)[FIRST:]
    assert np.array_equal(tile.get(), kept * np.dtype(dtype).type(1 / (1 - dropout.rate)))


@pytest.mark.parametrize("width", [8, 16])
def test_rows_and_columns_far_into_the_mini_batch(dtype, width):
    dropout, row, column = DROPOUTS[3], 5000, 96
    tile = Panels(N_ROWS, 10, width, dtype)
    settings = dropout.rate, np.uint64(dropout.seed), dropout.layer, dropout.step
    keep_factors(tile.x, tile.start(), *tile.layout, row, column, *settings)
    assert np.array_equal(tile.get() != 0, dropout_mask((row + N_ROWS, column + 10), dropout)[row:, column:])


def test_multiply(dtype):
    rng = np.random.default_rng(0)
    x, factors = rng.standard_normal(100).astype(dtype), np.full(90, 1.25, dtype)
    factors[::3] = 0
    x[7:10] = x[20:23] = np.nan, np.inf, -np.inf
    expected = x.copy()
    kept = 5 + np.flatnonzero(factors[2:82])
    expected[5:85] = 0
    expected[kept] = 1.25 * x[kept]
    multiply(x, 5, factors, 2, 80)
    assert np.array_equal(x, expected, equal_nan=True)
    assert not x[5:85][factors[2:82] == 0].any()
