"""Every operation of every backend against a float64 formula written here, on awkward sizes and layouts."""

import math

import numpy as np
import pytest
from scipy import special

import backprop_gpu as bp
from backprop_gpu.backends import numpy as numpy_backend
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.losses import LOSSES
from backprop_gpu.optimizers import OPTIMIZERS

SHAPES = [(1, 1, 1), (7, 13, 11), (5, 1, 2), (127, 3, 129), (129, 128, 1), (2, 129, 127)]
"""(N, n_in, n_out): ones, distinct primes, a tile and one more or less."""

SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
every_activation = pytest.mark.parametrize("activation", bp.ACTIVATIONS)


def matmul(A, B):
    """A B without BLAS, which the backends use."""
    return np.einsum("ij,jk->ik", A, B)


# dense_forward, output_forward


@shapes
@every_activation
def test_dense_forward(backend, put, draw, assert_close, sigma, activation, shape):
    N, n_in, n_out = shape
    a_prev, W, b = draw(N, n_in), draw(n_in, n_out, scale=2 / math.sqrt(n_in)), draw(n_out)
    z = put(np.full((N, n_out), np.nan))
    a, kept = backend.dense_forward(put(a_prev), put(W), put(b), activation, z=z)
    expected = matmul(a_prev, W) + b
    assert_close(z, expected)
    assert_close(a, sigma[activation][0](expected))
    assert kept is (z if bp.ACTIVATIONS[activation].derivative_from == "z" else a)


@every_activation
def test_dense_forward_without_a_z_buffer(backend, put, draw, assert_close, sigma, activation):
    a_prev, W, b = draw(7, 13), draw(13, 11, scale=0.5), draw(11)
    a, kept = backend.dense_forward(put(a_prev), put(W), put(b), activation)
    z = matmul(a_prev, W) + b
    expected = sigma[activation][0](z)
    assert_close(a, expected)
    assert_close(kept, z if bp.ACTIVATIONS[activation].derivative_from == "z" else expected)


@every_activation
def test_output_forward(backend, put, draw, assert_close, sigma, activation):
    for shape in ((1, 1), (7, 13), (127, 129)):
        z = draw(*shape, scale=2)
        assert_close(backend.output_forward(put(z), activation), sigma[activation][0](z))


@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (13, 10), (127, 129), (3, 1031)])
def test_softmax_and_exp(backend, put, draw, assert_close, shape):
    z = draw(*shape, scale=3)
    assert_close(backend.output_forward(put(z), "softmax"), special.softmax(z, axis=1))
    assert_close(backend.output_forward(put(z), "exp"), np.exp(z))


# dense_backward


@shapes
@every_activation
def test_dense_backward(backend, put, draw, assert_close, sigma, activation, shape):
    N, n_next, n_out = shape
    delta_next, W_next, z = draw(N, n_next), draw(n_out, n_next), draw(N, n_out, scale=2)
    forward, derivative = sigma[activation]
    kept = z if bp.ACTIVATIONS[activation].derivative_from == "z" else forward(z)
    delta = backend.dense_backward(put(delta_next), put(W_next), put(kept), activation)
    assert_close(delta, matmul(delta_next, W_next.T) * derivative(z))


# dense_gradients


@pytest.mark.parametrize("shape", [*SHAPES, (1031, 5, 3)], ids=[*SHAPE_IDS, "1031x5x3"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [False, True])
def test_dense_gradients(backend, put, draw, assert_close, shape, alpha, accumulate):
    N, n_in, n_out = shape
    a_prev, delta, W = draw(N, n_in), draw(N, n_out), draw(n_in, n_out)
    # Big beside the gradients of small N, so that neither term is lost in the tolerance of the other.
    old_dW, old_db = draw(n_in, n_out, scale=3), draw(n_out, scale=3)
    buffers = {"dW": put(old_dW), "db": put(old_db)}
    dW, db = backend.dense_gradients(
        put(a_prev), put(delta), W=put(W) if alpha else None, alpha=alpha, accumulate=accumulate, **buffers
    )
    assert_close(dW, accumulate * old_dW + matmul(a_prev.T, delta) + alpha * W)
    assert_close(db, accumulate * old_db + np.einsum("nk->k", delta))


def test_weights_without_a_penalty_add_nothing(backend, put, draw, assert_close):
    a_prev, delta = draw(7, 5), draw(7, 3)
    dW, _ = backend.dense_gradients(put(a_prev), put(delta), W=put(draw(5, 3)), alpha=0.0)
    assert_close(dW, matmul(a_prev.T, delta))


# output_delta


def one_hot(labels, n_classes):
    return np.array([[float(k == label) for k in range(n_classes)] for label in labels])


def cross_entropy(loss, z, y):
    smooth = loss.label_smoothing
    t = one_hot(y, z.shape[1]) if y.ndim == 1 else y
    t = t - smooth * t + smooth / z.shape[1]
    return -(t * special.log_softmax(z, axis=1)).sum(axis=1), special.softmax(z, axis=1) - t


def binary_cross_entropy(loss, z, y):
    return -(y * special.log_expit(z) + (1 - y) * special.log_expit(-z)).sum(axis=1), special.expit(z) - y


def poisson(loss, z, y):
    return special.kl_div(y, np.exp(z)).sum(axis=1), np.exp(z) - y


def huber(loss, e):
    return special.huber(loss.threshold, e), np.where(np.abs(e) < loss.threshold, e, loss.threshold * np.sign(e))


OF_Z = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy, "poisson": poisson}
"""(c, ∂c/∂z) of every row, where the loss has an output activation of its own."""

OF_ERROR = {
    "squared_error": lambda loss, e: (e**2 / 2, e),
    "absolute_error": lambda loss, e: (np.abs(e), np.where(e > 0, 1.0, -1.0)),
    "huber": huber,
}
"""c and ∂c/∂a of every entry, from e = a − y."""


@pytest.fixture
def mean_cost(sigma):
    """mean_cost(loss, output_activation, z, y, w): C and δ."""

    def mean_cost(loss, output_activation, z, y, w=None):
        w = np.ones(len(z)) if w is None else w
        if loss.name in OF_Z:
            c, dc_dz = OF_Z[loss.name](loss, z, y)
        else:
            forward, derivative = sigma[output_activation]
            c, dc_da = OF_ERROR[loss.name](loss, forward(z) - y)
            c, dc_dz = c.sum(axis=1), dc_da * derivative(z)
        return math.fsum(w * c) / math.fsum(w), dc_dz * (w / math.fsum(w))[:, None]

    return mean_cost


LOSS_SETTINGS = {
    "cross_entropy": (bp.CrossEntropy(), bp.CrossEntropy(label_smoothing=0.1)),
    "huber": (bp.Huber(), bp.Huber(threshold=0.3)),
}

LOSS_CASES = [
    (setting, output_activation)
    for name, loss in LOSSES.items()
    for setting in LOSS_SETTINGS.get(name, (loss(),))
    for output_activation in loss.output_activations
]

every_loss = pytest.mark.parametrize(
    ("loss", "output_activation"), LOSS_CASES, ids=[f"{loss}-{sigma}" for loss, sigma in LOSS_CASES]
)


def make_target(loss, draw, N, n_out):
    """A target of each kind that the loss takes, in a float64 that the dtype holds exactly, or int labels."""
    values = draw(N, n_out)
    if loss.name == "cross_entropy":
        return np.arange(3, 3 + N) * 7 % n_out
    if loss.name == "binary_cross_entropy":
        # 0, 1 and quarters between
        return np.clip(np.round(4 * values + 2), 0, 4) / 4
    values.flat[0] = -1.5  # not what z begins with: |a − y| has no derivative where they are equal
    return np.round(np.abs(3 * values)) if loss.name == "poisson" else values


def make_weights(draw, N):
    """Weights of very different sizes, every third one 0."""
    return np.abs(draw(N)) * (np.arange(N) % 3 != 1)


@pytest.mark.parametrize("shape", [(1, 2), (7, 13), (129, 3), (5, 127)], ids=["1x2", "7x13", "129x3", "5x127"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@every_loss
def test_output_delta(backend, put, draw, assert_close, mean_cost, loss, output_activation, weighted, shape):
    z, y = draw(*shape, scale=2), make_target(loss, draw, *shape)
    w = make_weights(draw, len(z)) if weighted else None
    C, delta = backend.output_delta(
        put(z),
        put(y, dtype="int32") if y.ndim == 1 else put(y),
        loss,
        output_activation=output_activation,
        sample_weight=put(w) if weighted else None,
    )
    expected_C, expected_delta = mean_cost(loss, output_activation, z, y, w)
    assert_close(np.asarray(float(C)), expected_C)
    assert_close(delta, expected_delta)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", *(name for name in LOSSES if "cross" not in name)])
def test_output_delta_of_one_output_and_one_row(backend, put, draw, assert_close, mean_cost, loss):
    loss = LOSSES[loss]()
    z, y = draw(1, 1), np.array([[5.0 if loss.task == "regression" else 0.25]])
    C, delta = backend.output_delta(put(z), put(y), loss)
    expected_C, expected_delta = mean_cost(loss, loss.output_activations[0], z, y)
    assert_close(np.asarray(float(C)), expected_C)
    assert_close(delta, expected_delta)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_rows_of_probabilities(
    backend, put, draw, dtype, assert_close, mean_cost, smoothing, weighted
):
    loss = bp.CrossEntropy(label_smoothing=smoothing)
    z, y = draw(31, 7, scale=2), special.softmax(draw(31, 7), axis=1).astype(dtype).astype(np.float64)
    w = make_weights(draw, 31) if weighted else None
    C, delta = backend.output_delta(put(z), put(y), loss, sample_weight=put(w) if weighted else None)
    expected_C, expected_delta = mean_cost(loss, "softmax", z, y, w)
    assert_close(np.asarray(float(C)), expected_C)
    assert_close(delta, expected_delta)


def test_labels_and_one_hot_rows_are_the_same_target(backend, put, draw, tolerance):
    z, labels = draw(31, 7, scale=2), np.arange(31) % 7
    C, delta = backend.output_delta(put(z), put(labels, dtype="int32"), "cross_entropy")
    C_rows, delta_rows = backend.output_delta(put(z), put(one_hot(labels, 7)), "cross_entropy")
    assert abs(float(C) - float(C_rows)) <= tolerance * float(C)
    assert np.abs(backend.to_numpy(delta) - backend.to_numpy(delta_rows)).max() <= tolerance / 31


@every_loss
def test_a_loss_uses_its_own_output_activation_by_default(backend, put, draw, loss, output_activation):
    z, y = draw(7, 5), make_target(loss, draw, 7, 5)
    target = put(y, dtype="int32") if y.ndim == 1 else put(y)
    C, delta = backend.output_delta(put(z), target, loss)
    C_named, delta_named = backend.output_delta(put(z), target, loss, output_activation=loss.output_activations[0])
    assert float(C) == float(C_named)
    assert np.array_equal(backend.to_numpy(delta), backend.to_numpy(delta_named))


@every_loss
def test_weights_that_are_all_zero_give_zero(backend, put, draw, loss, output_activation):
    z, y = draw(7, 5), make_target(loss, draw, 7, 5)
    target = put(y, dtype="int32") if y.ndim == 1 else put(y)
    buffer = put(np.full((7, 5), np.nan))
    C, delta = backend.output_delta(
        put(z), target, loss, output_activation=output_activation, sample_weight=put(np.zeros(7)), delta=buffer
    )
    assert float(C) == 0
    assert (backend.to_numpy(delta) == 0).all()


def test_the_mean_cost_is_accumulated_in_float64(backend, put):
    # Each ½e², 2 or 2²⁵, is exact in every dtype; their sum is not in float32.
    z = np.full((1001, 1), 2.0)
    z[500] = 2.0**13
    C, _ = backend.output_delta(put(z), put(np.zeros((1001, 1))), "squared_error")
    expected = (1000 * 2 + 2.0**25) / 1001
    assert abs(float(C) - expected) <= 1e-13 * expected


def test_sum_squares_is_accumulated_in_float64(backend, put, draw):
    for x in (draw(1), draw(1031), draw(127, 129)):
        expected = math.fsum((x**2).ravel())
        assert abs(float(backend.sum_squares(put(x))) - expected) <= 1e-13 * expected
        assert abs(float(backend.sum_squares(put(x, offset=1))) - expected) <= 1e-13 * expected
    large = np.array([1e30, -1e30])
    assert abs(float(backend.sum_squares(put(large))) - 2e60) <= 1e-6 * 2e60


# update


def sgd(o, w, g, s, rate, step):
    s["velocity"] = o.momentum * s["velocity"] - rate * g
    return w + (o.momentum * s["velocity"] - rate * g if o.nesterov else s["velocity"])


def adam(o, w, g, s, rate, step):
    s["m"] = o.beta_1 * s["m"] + (1 - o.beta_1) * g
    s["v"] = o.beta_2 * s["v"] + (1 - o.beta_2) * g**2
    if o.epsilon_hat:  # the order of computation at the end of section 2 of the paper
        alpha_t = rate * math.sqrt(1 - o.beta_2**step) / (1 - o.beta_1**step)
        return w - alpha_t * s["m"] / (math.sqrt(s["v"]) + o.epsilon)
    m_hat, v_hat = s["m"] / (1 - o.beta_1**step), s["v"] / (1 - o.beta_2**step)
    return w - rate * m_hat / (math.sqrt(v_hat) + o.epsilon)


def rmsprop(o, w, g, s, rate, step):
    s["v"] = o.decay * s["v"] + (1 - o.decay) * g**2
    return w - rate * g / (math.sqrt(s["v"]) + o.epsilon)


ONE_PARAMETER = {bp.SGD: sgd, bp.Adam: adam, bp.AdamW: adam, bp.RMSprop: rmsprop}


def by_hand(optimizer, parameters, gradients, rates, n_weights):
    """Steps of the optimizer, parameter by parameter: (parameters, state)."""
    w = parameters.tolist()
    state = [dict.fromkeys(optimizer.slots, 0.0) for _ in w]
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(math.fsum(g**2))
        too_long = optimizer.clip_norm is not None and norm > optimizer.clip_norm
        for i, g_i in enumerate((g * optimizer.clip_norm / norm if too_long else g).tolist()):
            if isinstance(optimizer, bp.AdamW) and i < n_weights:
                w[i] -= rate * optimizer.weight_decay * w[i]
            w[i] = ONE_PARAMETER[type(optimizer)](optimizer, w[i], g_i, state[i], rate, step)
    return np.array(w), {slot: np.array([s[slot] for s in state]) for slot in optimizer.slots}


OPTIMIZER_CASES = [
    *(optimizer() for optimizer in OPTIMIZERS.values()),
    bp.SGD(momentum=0.9),
    bp.SGD(momentum=0.9, nesterov=True),
    bp.Adam(beta_1=0.0, beta_2=0.9, epsilon=1e-2),
    bp.Adam(epsilon=1e-2, epsilon_hat=True),
    bp.AdamW(beta_1=0.5, weight_decay=0.5),
    bp.AdamW(epsilon=1e-2, epsilon_hat=True, clip_norm=2.0),
    bp.AdamW(weight_decay=0.0),
    bp.RMSprop(decay=0.5, epsilon=0.1),
    *(optimizer(clip_norm=2.0) for optimizer in OPTIMIZERS.values()),
]

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZER_CASES, ids=repr)


def zero_state(optimizer, size, put):
    return {slot: put(np.zeros(size)) for slot in optimizer.slots}


@pytest.mark.parametrize(("size", "n_weights"), [(1, 1), (1, 0), (13, 11), (129, 127), (1031, 1000)])
@every_optimizer
def test_update(backend, put, draw, assert_close, optimizer, size, n_weights):
    parameters, gradients = draw(size), [draw(size, scale=0.3) for _ in range(5)]
    rates = [0.1, 0.05, 0.2, 0.01, 0.07]
    mine, state = put(parameters), zero_state(optimizer, size, put)
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        backend.update(mine, put(g), state, optimizer, learning_rate=rate, step=step, n_weights=n_weights)
    expected, expected_state = by_hand(optimizer, parameters, gradients, rates, n_weights)
    assert_close(mine, expected)
    for slot in optimizer.slots:
        assert_close(state[slot], expected_state[slot])


def test_update_reads_the_step_not_its_own_count(backend, put, draw, assert_close):
    # From zero moments, step 7: m̂ = 0.1 g / (1 − 0.9⁷), v̂ = 0.001 g² / (1 − 0.999⁷).
    parameters, g = draw(13), draw(13)
    mine, state = put(parameters), zero_state(bp.Adam(), 13, put)
    backend.update(mine, put(g), state, bp.Adam(), learning_rate=0.5, step=7, n_weights=13)
    m_hat, v_hat = 0.1 * g / (1 - 0.9**7), 0.001 * g**2 / (1 - 0.999**7)
    assert_close(mine, parameters - 0.5 * m_hat / (np.sqrt(v_hat) + 1e-8))


def test_the_learning_rate_is_the_steps_not_the_optimizers(backend, put, draw, assert_close):
    parameters, g = draw(13), draw(13)
    mine = put(parameters)
    backend.update(mine, put(g), zero_state(bp.SGD(), 13, put), bp.SGD(7.0), learning_rate=0.25, step=1, n_weights=13)
    assert_close(mine, parameters - 0.25 * g)


@every_optimizer
def test_an_update_without_decay_leaves_parameters_without_gradient(backend, put, draw, optimizer):
    parameters = draw(13)
    mine = put(parameters)
    state = zero_state(optimizer, 13, put)
    backend.update(mine, put(np.zeros(13)), state, optimizer, learning_rate=0.1, step=1, n_weights=0)
    assert np.array_equal(backend.to_numpy(mine), parameters)


@pytest.mark.parametrize("n_weights", [0, 1, 12, 13])
def test_adamw_decays_weights_and_never_biases(backend, put, draw, assert_close, n_weights):
    parameters, optimizer = draw(13), bp.AdamW(weight_decay=0.5)
    mine, state = put(parameters), zero_state(optimizer, 13, put)
    backend.update(mine, put(np.zeros(13)), state, optimizer, learning_rate=0.5, step=1, n_weights=n_weights)
    assert_close(mine, np.where(np.arange(13) < n_weights, 0.75 * parameters, parameters))
    assert np.array_equal(backend.to_numpy(mine)[n_weights:], parameters[n_weights:])


@pytest.mark.parametrize(
    ("clip_norm", "scale"), [(2.5, 0.5), (4.999, 4.999 / 5), (5.0, 1.0), (5.001, 1.0), (100.0, 1.0), (None, 1.0)]
)
def test_clipping_by_the_norm_of_the_whole_gradient(backend, put, assert_close, clip_norm, scale):
    g = np.array([0.0, 3.0, 0.0, -4.0, 0.0])  # of norm 5
    mine, optimizer = put(np.zeros(5)), bp.SGD(clip_norm=clip_norm)
    backend.update(mine, put(g), zero_state(optimizer, 5, put), optimizer, learning_rate=1.0, step=1, n_weights=3)
    assert_close(mine, -scale * g)
    if scale == 1:
        assert np.array_equal(backend.to_numpy(mine), -g)


def test_a_zero_gradient_is_not_clipped(backend, put, draw):
    parameters, optimizer = draw(5), bp.SGD(clip_norm=1.0)
    mine = put(parameters)
    backend.update(
        mine, put(np.zeros(5)), zero_state(optimizer, 5, put), optimizer, learning_rate=1.0, step=1, n_weights=5
    )
    assert np.array_equal(backend.to_numpy(mine), parameters)


# Dropout


def philox(counter, key):
    """Philox4x32-10, one counter at a time, in Python's integers: four words."""
    c, k = list(counter), [key % 2**32, key // 2**32]
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right // 2**32 ^ c[1] ^ k[0], right % 2**32, left // 2**32 ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def is_kept(dropout, row, column):
    words = philox((column // 4, row, dropout.layer, dropout.step % 2**32), dropout.seed)
    return words[column % 4] >= math.floor(dropout.rate * 2**32)


def kept_neurons(dropout, N, n_out):
    return np.array([[is_kept(dropout, row, column) for column in range(n_out)] for row in range(N)])


# The known answers of Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(counter, key) == words
    assert numpy_backend.philox(counter, key).tolist() == words


def test_philox_broadcasts_its_counters():
    words = numpy_backend.philox((np.arange(3)[None, :], np.arange(5)[:, None], 7, 2**32 - 1), 2**63 + 11)
    assert words.shape == (5, 3, 4)
    assert words.dtype == np.uint32
    assert words[4, 2].tolist() == philox((2, 4, 7, 2**32 - 1), 2**63 + 11)


@pytest.fixture
def forward_mask(backend, put, dtype):
    """forward_mask(dropout, N, n_out): what dense_forward makes of activations that are all 1."""

    def forward_mask(dropout, N, n_out):
        ones = put(np.ones((N, 1))), put(np.zeros((1, n_out))), put(np.ones(n_out))
        a, _ = backend.dense_forward(*ones, "identity", dropout=dropout)
        return backend.to_numpy(a)

    return forward_mask


def test_a_neuron_is_kept_from_its_word_on(forward_mask):
    """Row 0, columns 0 to 3 of layer 0 at step 0 under seed 0 read the words of the known answer for zeros."""
    for column, word in enumerate(KNOWN_ANSWERS[0][2]):
        at, between, above = (Dropout(w / 2**32, seed=0, layer=0, step=0) for w in (word, word + 0.75, word + 1))
        assert forward_mask(at, 1, 4)[0, column] > 0
        assert forward_mask(between, 1, 4)[0, column] > 0
        assert forward_mask(above, 1, 4)[0, column] == 0


DROPOUTS = [
    Dropout(0.5, seed=0, layer=0, step=0),
    Dropout(0.2, seed=2**64 - 59, layer=3, step=1000),
    Dropout(0.9, seed=2**32, layer=1, step=2**32 + 5),
    Dropout(1 / 3, seed=12345, layer=100, step=2**31),
]


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (31, 127), (129, 4)])
def test_the_mask_is_philoxs(forward_mask, tolerance, dropout, shape):
    kept = kept_neurons(dropout, *shape)
    expected = kept / (1 - dropout.rate)
    actual = forward_mask(dropout, *shape)
    assert np.array_equal(actual != 0, kept)
    assert np.abs(actual - expected).max() <= tolerance / (1 - dropout.rate)


def test_every_number_of_the_dropout_counts(forward_mask):
    base = Dropout(0.5, seed=3, layer=1, step=4)
    others = [base._replace(seed=3 + 2**32), base._replace(layer=2), base._replace(step=5), base._replace(seed=4)]
    masks = [forward_mask(dropout, 13, 11) != 0 for dropout in (base, *others)]
    assert len({mask.tobytes() for mask in masks}) == 5
    assert np.array_equal(forward_mask(base._replace(step=4 + 2**32), 13, 11) != 0, masks[0])


@pytest.mark.parametrize("rate", [0.0, 1e-10, 0.1, 0.5, 0.875, 1 - 2**-10])
def test_the_share_of_neurons_kept(forward_mask, rate):
    N, n_out = 257, 251
    a = forward_mask(Dropout(rate, seed=7, layer=0, step=0), N, n_out)
    # 5 standard deviations of a binomial share; at rate 0 all are kept.
    slack = 5 * math.sqrt(rate * (1 - rate) / (N * n_out))
    assert abs((a != 0).mean() - (1 - rate)) <= slack
    assert abs(a.max() - 1 / (1 - rate)) <= 1e-6 / (1 - rate)


@every_activation
@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_dropout_forward_and_backward(backend, put, draw, assert_close, sigma, activation, rate):
    N, n_in, n_out, n_next = 31, 7, 13, 5
    dropout = Dropout(rate, seed=99, layer=2, step=17)
    kept_share = kept_neurons(dropout, N, n_out) / (1 - rate)
    a_prev, W, b = draw(N, n_in), draw(n_in, n_out, scale=0.7), draw(n_out)
    forward, derivative = sigma[activation]
    z = matmul(a_prev, W) + b
    a, kept = backend.dense_forward(put(a_prev), put(W), put(b), activation, dropout=dropout)
    assert_close(a, forward(z) * kept_share)
    assert_close(kept, z if bp.ACTIVATIONS[activation].derivative_from == "z" else forward(z) * kept_share)

    delta_next, W_next = draw(N, n_next), draw(n_out, n_next)
    delta = backend.dense_backward(put(delta_next), put(W_next), kept, activation, dropout=dropout)
    assert_close(delta, matmul(delta_next, W_next.T) * kept_share * derivative(z))
    assert not backend.to_numpy(delta)[kept_share == 0].any()


# Layouts: views into larger arrays, as W[l] is into the flat parameters, and host arrays of every kind


def misaligned(x):
    return np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)


HOST_LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
    "misaligned": misaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.fixture(params=[1, 3, *HOST_LAYOUTS])
def place(request, backend, dtype, put):
    """place(x): `x` on the backend, from a host array of this layout or as a view that starts at this offset."""
    if isinstance(request.param, int):
        return lambda x: put(x, request.param)
    return lambda x: backend.asarray(HOST_LAYOUTS[request.param](np.array(x, dtype)), dtype)


def test_layouts_in_dense_forward(backend, draw, assert_close, place):
    a_prev, W, b = draw(37, 41), draw(41, 43, scale=0.3), draw(43)
    expected = np.sin(matmul(a_prev, W) + b)
    assert_close(backend.dense_forward(place(a_prev), place(W), place(b), "sine")[0], expected)


def test_layouts_in_output_forward_and_delta(backend, draw, assert_close, mean_cost, place):
    z, y, w = draw(37, 41), draw(37, 41), make_weights(draw, 37)
    assert_close(backend.output_forward(place(z), "softmax"), special.softmax(z, axis=1))
    C, delta = backend.output_delta(place(z), place(y), bp.Huber(0.5), sample_weight=place(w))
    expected_C, expected_delta = mean_cost(bp.Huber(0.5), "identity", z, y, w)
    assert_close(np.asarray(float(C)), expected_C)
    assert_close(delta, expected_delta)


def test_layouts_in_dense_backward(backend, draw, assert_close, place):
    delta_next, W_next, z = draw(37, 43), draw(41, 43), draw(37, 41)
    expected = matmul(delta_next, W_next.T) * np.cos(z)
    assert_close(backend.dense_backward(place(delta_next), place(W_next), place(z), "sine"), expected)


def test_layouts_in_dense_gradients(backend, draw, assert_close, place):
    a_prev, delta, W = draw(37, 41), draw(37, 43), draw(41, 43)
    dW, db = backend.dense_gradients(place(a_prev), place(delta), W=place(W), alpha=0.5)
    assert_close(dW, matmul(a_prev.T, delta) + 0.5 * W)
    assert_close(db, np.einsum("nk->k", delta))


@pytest.mark.parametrize("offset", [1, 3])
def test_outputs_that_are_views(backend, put, draw, assert_close, offset):
    N, n_in, n_out = 37, 41, 43

    def out(*shape):
        return put(np.full(shape, np.nan), offset)

    a_prev, W, b, y = draw(N, n_in), draw(n_in, n_out, scale=0.3), draw(n_out), draw(N, n_out)
    z = matmul(a_prev, W) + b
    a, kept = backend.dense_forward(put(a_prev), put(W), put(b), "silu", a=out(N, n_out), z=out(N, n_out))
    assert_close(a, z * special.expit(z))
    assert_close(kept, z)
    assert_close(backend.output_forward(put(y), "exp", a=out(N, n_out)), np.exp(y))
    assert_close(backend.output_delta(put(y), put(0 * y), "squared_error", delta=out(N, n_out))[1], y / N)
    below = backend.dense_backward(put(y), put(W), put(a_prev), "sine", delta=out(N, n_in))
    assert_close(below, matmul(y, W.T) * np.cos(a_prev))
    dW, db = backend.dense_gradients(put(a_prev), put(y), dW=out(n_in, n_out), db=out(n_out))
    assert_close(dW, matmul(a_prev.T, y))
    assert_close(db, np.einsum("nk->k", y))


@every_optimizer
def test_an_update_of_views(backend, put, draw, assert_close, optimizer):
    parameters, g = draw(129), draw(129)
    mine, state = put(parameters, offset=1), {slot: put(np.zeros(129), offset=3) for slot in optimizer.slots}
    backend.update(mine, put(g, offset=5), state, optimizer, learning_rate=0.1, step=1, n_weights=100)
    expected, _ = by_hand(optimizer, parameters, [g], [0.1], 100)
    assert_close(mine, expected)


# Schedules


def rates_of(schedule, *steps):
    return schedule.rates(np.array(steps)).tolist()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (bp.Constant(0.5), {0: 0.5, 10**9: 0.5}),
        (bp.StepDecay(1.0, every=10, factor=0.25), {0: 1.0, 9: 1.0, 10: 0.25, 19: 0.25, 20: 0.0625}),
        (bp.ExponentialDecay(2.0, every=10, factor=0.25), {0: 2.0, 5: 1.0, 10: 0.5, 20: 0.125}),
        (bp.InverseScaling(3.0), {0: 3.0, 3: 1.5, 8: 1.0, 99: 0.3}),
        (bp.InverseScaling(3.0, power=0.0), {0: 3.0, 99: 3.0}),
        (bp.InverseScaling(3.0, power=1.0), {0: 3.0, 2: 1.0}),
        (bp.Cosine(1.0, total_steps=8), {0: 1.0, 2: 0.5 + math.sqrt(0.125), 4: 0.5, 8: 0.0, 9: 0.0, 10**6: 0.0}),
        (
            bp.Cosine(1.0, warmup_steps=4, total_steps=12, final=0.2),
            {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 8: 0.6, 12: 0.2, 13: 0.2},
        ),
        (bp.Cosine(1.0, warmup_steps=1, total_steps=2), {0: 1.0, 1: 1.0, 2: 0.0}),
        (bp.Cosine(1.0, final=1.0, total_steps=2), {0: 1.0, 1: 1.0, 2: 1.0}),
    ],
    ids=repr,
)
def test_schedules(schedule, expected):
    actual = rates_of(schedule, *expected)
    assert np.abs(np.array(actual) - list(expected.values())).max() <= 1e-15


def test_cosine_takes_the_length_of_the_run():
    assert bp.Cosine(1.0).for_run(8) == bp.Cosine(1.0, total_steps=8)
    assert bp.Cosine(1.0, total_steps=5).for_run(8).total_steps == 5
    assert bp.Cosine(1.0, total_steps=5).for_run(None).total_steps == 5
    with pytest.raises(ValueError, match="total_steps"):
        bp.Cosine(1.0).for_run(None)
    assert bp.Constant(0.1).for_run(None) == bp.Constant(0.1)


@pytest.mark.parametrize(
    ("make", "blamed"),
    [
        (lambda: bp.Constant(0.0), "learning rate"),
        (lambda: bp.Constant(math.nan), "learning rate"),
        (lambda: bp.Cosine(math.inf), "learning rate"),
        (lambda: bp.StepDecay(0.1, every=0), "every"),
        (lambda: bp.StepDecay(0.1, every=1, factor=0.0), "factor"),
        (lambda: bp.ExponentialDecay(0.1, every=1, factor=1.5), "factor"),
        (lambda: bp.InverseScaling(0.1, power=-1.0), "power"),
        (lambda: bp.Cosine(0.1, warmup_steps=-1), "warmup_steps"),
        (lambda: bp.Cosine(0.1, final=0.2), "final"),
        (lambda: bp.Cosine(0.1, final=-0.1), "final"),
        (lambda: bp.Cosine(0.1, warmup_steps=5, total_steps=5), "total_steps"),
        (lambda: bp.SGD(learning_rate=-1.0), "learning.rate"),
        (lambda: bp.SGD(momentum=1.0), "momentum"),
        (lambda: bp.SGD(nesterov=True), "nesterov"),
        (lambda: bp.SGD(clip_norm=0.0), "clip_norm"),
        (lambda: bp.Adam(beta_1=1.0), "beta_1"),
        (lambda: bp.Adam(beta_2=-0.1), "beta_2"),
        (lambda: bp.Adam(epsilon=0.0), "epsilon"),
        (lambda: bp.AdamW(weight_decay=-1.0), "weight_decay"),
        (lambda: bp.RMSprop(decay=1.0), "decay"),
        (lambda: bp.Huber(0.0), "threshold"),
        (lambda: bp.Huber(math.inf), "threshold"),
        (lambda: bp.CrossEntropy(1.0), "label_smoothing"),
        (lambda: bp.CrossEntropy(-0.1), "label_smoothing"),
    ],
)
def test_settings_out_of_range_are_refused(make, blamed):
    with pytest.raises(ValueError, match=blamed):
        make()
