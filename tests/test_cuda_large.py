"""Arrays of more than 2³¹ numbers: the CUDA C++ kernels run on the CPU, at the end of each array only.

The emulator's memory takes no room until it is touched, and of each grid only the last blocks run. An offset that does
not fit into 32 bits would be a signed overflow, an access out of bounds, or a read of what nobody wrote; all are found.
"""

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backends.cuda_kernels import Kernels, Whole, step_numbers, stretches
from backprop_gpu.backends.cuda_plan import TILES, Parts
from backprop_gpu.backends.numpy import NumpyBackend
from cuda_on_cpu import emulated, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

REFERENCE = NumpyBackend()
ROWS = 2**26 + 5
"""Of 33 columns or more: over 2³¹ numbers, while rows and columns are int32 all the same."""
LAST = 4
"""Blocks that run; they cover more rows than SHOWN, whichever the tile."""
SHOWN = 5
"""Last rows, which are compared."""


class Large:
    """A device of which the last blocks run, and arrays of which the last rows are filled."""

    def __init__(self):
        self.cp = emulated(checked=True)
        self.cp.emulator.memory_size = 1 << 40
        self.cp.emulator.last_blocks = LAST
        self.kernels = Kernels(self.cp)
        self.rng = np.random.default_rng(1)

    def filled(self, *shape, rows=LAST * 2048):
        """(array, its last rows in float64)."""
        x = self.cp.empty(shape, "float32")
        assert len(shape) == 1 or x.size > 2**31
        values = self.draw(min(rows, shape[0]), *shape[1:])
        x[len(x) - len(values) :] = self.cp.asarray(values)
        return x, values.astype(float)

    def draw(self, *shape):
        return self.rng.standard_normal(shape).astype("float32")

    def put(self, x):
        return self.cp.asarray(np.asarray(x, "float32"))


def tail(x, n=SHOWN):
    return x[len(x) - n :].get().astype(float)


def assert_close(actual, expected):
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture
def large():
    return Large()


# SHOWN rows at least are in the last row tile, which ROWS % 64 = 5 sees to.


def test_dense_forward(large):
    a_prev, values = large.filled(ROWS, 33)
    W, b = large.draw(33, 35), large.draw(35)
    a, z = (large.cp.empty((ROWS, 35), "float32") for _ in range(2))
    tile = TILES["float32"][1]
    large.kernels.dense_forward(a_prev, large.put(W), large.put(b), a, z, "silu", None, dtype="float32", tile=tile)()
    expected_z = np.empty((SHOWN, 35))
    expected, _ = REFERENCE.dense_forward(values[-SHOWN:], W.astype(float), b.astype(float), "silu", z=expected_z)
    assert_close(tail(a), expected)
    assert_close(tail(z), expected_z)


def test_dense_forward_on_the_tensor_cores(large):
    """With operands of 16 bits, in which small integers are exact."""
    a_prev, a = (large.cp.empty((ROWS, n), "uint16") for n in (48, 40))
    values, W = large.rng.integers(-3, 4, (1024, 48)), large.rng.integers(-3, 4, (48, 40))
    bits = [(x.astype("float32").view("uint32") >> 16).astype("uint16") for x in (values, W)]
    a_prev[ROWS - 1024 :] = large.cp.asarray(bits[0])
    tile, b = TILES["bfloat16"][1], large.put(np.zeros(40))
    large.kernels.dense_forward(
        a_prev, large.cp.asarray(bits[1]), b, a, None, "identity", None, dtype="bfloat16", tile=tile
    )()
    actual = (a[ROWS - SHOWN :].get().astype("uint32") << 16).view("float32")
    assert np.array_equal(actual, values[-SHOWN:] @ W)


def test_dense_backward(large):
    delta_next, values = large.filled(ROWS, 33)
    kept, of_sigma = large.filled(ROWS, 35)
    W_next, delta = large.draw(35, 33), large.cp.empty((ROWS, 35), "float32")
    tile = TILES["float32"][1]
    operands = (delta_next, large.put(W_next), kept, delta)
    large.kernels.dense_backward(*operands, "silu", None, dtype="float32", tile=tile)()
    expected = REFERENCE.dense_backward(values[-SHOWN:], W_next.astype(float), of_sigma[-SHOWN:], "silu")
    assert_close(tail(delta), expected)


def test_dense_gradients_over_many_rows(large):
    a_prev, a = large.filled(ROWS, 33)
    delta, d = large.filled(ROWS, 35)
    n_parts = -(-ROWS // 2048)
    dW, db = large.cp.empty((n_parts, 33, 35), "float32"), large.cp.empty((n_parts, 35), "float32")
    large.kernels.dense_gradients(a_prev, delta, dW, db, Parts(TILES["float32"][1], n_parts, 2048))()
    n = ROWS - (n_parts - 1) * 2048
    assert_close(dW[n_parts - 1].get(), a[-n:].T @ d[-n:])
    assert_close(db[n_parts - 1].get(), d[-n:].sum(axis=0))


def test_dense_gradients_in_many_parts(large):
    n_parts, n_in, n_out = 33_000, 257, 256
    tile = TILES["float32"][2]
    n_rows = n_parts * tile.k
    a, d = large.draw(tile.k, n_in), large.draw(tile.k, n_out)
    a_prev, delta = large.cp.empty((n_rows, n_in), "float32"), large.cp.empty((n_rows, n_out), "float32")
    a_prev[n_rows - tile.k :], delta[n_rows - tile.k :] = large.put(a), large.put(d)
    dW, db = large.cp.empty((n_parts, n_in, n_out), "float32"), large.cp.empty((n_parts, n_out), "float32")
    assert dW.size > 2**31
    large.kernels.dense_gradients(a_prev, delta, dW, db, Parts(tile, n_parts, tile.k))()
    assert_close(dW[n_parts - 1, -1:, -tile.n :].get(), a[:, -1:].T @ d[:, -tile.n :])


def test_whole_gradients(large):
    """Of two parts, so that the second is beyond 2³¹; the weights at the end, whose gradients are."""
    n_in, n_out = 2**26, 33
    dW, parts = large.cp.empty((2, n_in, n_out), "float32"), large.draw(2, 64, n_out)
    for part in range(2):
        dW[part, n_in - 64 :] = large.put(parts[part])
    db, W = large.draw(2, n_out), large.draw(64, n_out)
    weights, gradient = (large.cp.empty((n_in, n_out), "float32") for _ in range(2))
    weights[n_in - 64 :] = large.put(W)
    whole = Whole(gradient, large.cp.empty((n_out,), "float32"), weights, 0.5)
    large.kernels.whole_gradients(dW, large.put(db), whole)()
    assert_close(tail(gradient), parts.sum(axis=0)[-SHOWN:] + 0.5 * W[-SHOWN:])
    assert_close(whole.db.get(), db.sum(axis=0))


def test_passes_after_cublas(large):
    product, values = large.filled(ROWS, 33)
    a, z, b = *(large.cp.empty((ROWS, 33), "float32") for _ in range(2)), large.draw(33)
    counter = large.cp.zeros((1,), "uint32")
    large.kernels.dense_forward_pass(product, large.put(b), a, z, "tanh", None, counter, dtype="float32")()
    assert_close(tail(z), values[-SHOWN:] + b)
    assert_close(tail(a), np.tanh(values[-SHOWN:] + b))
    large.kernels.dense_backward_pass(product, product, a, "silu", None, counter, dtype="float32")()
    expected = REFERENCE.dense_backward(values[-SHOWN:], np.eye(33), values[-SHOWN:], "silu")
    assert_close(tail(a), expected)
    n_parts = -(-ROWS // 2048)
    db = large.cp.empty((n_parts, 33), "float32")
    plan = Parts(TILES["float32"][0], n_parts, 2048)
    large.kernels.bias_gradients(product, db, plan, dtype="float32")()
    assert_close(tail(db, 1)[0], values[-(ROWS - (n_parts - 1) * 2048) :].sum(axis=0))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_output_layer(large, loss):
    z, values = large.filled(ROWS, 33)
    target, a = large.filled(ROWS, 33), large.cp.empty((ROWS, 33), "float32")
    softmax = loss == "cross_entropy"
    sigma = "softmax" if softmax else "tanh"
    large.kernels.output_forward(z, a, sigma)()
    assert_close(tail(a), REFERENCE.output_forward(values[-SHOWN:], sigma))
    # The rows of the data are taken by an order, whose last entries are the last rows, backwards.
    order, delta = large.cp.empty((ROWS,), "int64"), large.cp.empty((ROWS, 33), "float32")
    order[ROWS - 1024 :] = large.cp.asarray(ROWS - 1 - np.arange(1024))
    share = large.cp.empty((ROWS,), "float64")
    share[ROWS - 1024 :] = 1 / 1024
    large.kernels.output_delta(
        z,
        target[0],
        delta,
        large.cp.empty((1,), "float64"),
        bp.losses.get(loss),
        sigma,
        order=order,
        share=share,
        scratch=large.kernels.scratch(large.kernels.output_delta_blocks(ROWS, 33)),
        dtype="float32",
    )()
    of_rows = target[1][-1024:][::-1][-SHOWN:]
    _, expected = REFERENCE.output_delta(values[-SHOWN:], of_rows, bp.losses.get(loss), output_activation=sigma)
    assert_close(tail(delta), expected * SHOWN / 1024)


def test_update(large):
    n = 2**31 + 777
    vectors = [large.filled(n) for _ in range(3)]
    (parameters, w), (velocity, v), (gradients, g) = vectors
    optimizer = bp.SGD(momentum=0.9)
    large.kernels.update(
        parameters,
        [velocity],
        gradients,
        large.cp.asarray(stretches([(n, 1, True)])),
        large.kernels.parameter_blocks([n]),
        optimizer,
        numbers=large.cp.asarray(step_numbers(optimizer, np.array([0.1]), np.array([0.0]), 0)),
        counters=large.cp.zeros((2,), "uint32"),
        losses=large.cp.zeros((1,), "float64"),
        scratch=large.kernels.scratch(large.kernels.parameter_blocks([n])),
    )()
    state = {"velocity": v}
    REFERENCE.update(w, g, state, optimizer, learning_rate=0.1, step=1, n_weights=len(w))
    assert_close(tail(parameters, 300), w[-300:])
    assert_close(tail(velocity, 300), v[-300:])


@pytest.mark.parametrize("n_rows", [3, ROWS])
def test_gather(large, n_rows):
    """Few rows of large data, and many of small: either side may be beyond 2³¹."""
    data, values = large.filled(ROWS, 33)
    step = large.cp.asarray(np.array([1], np.uint32))
    order = large.cp.empty((2 * n_rows,), "int64")
    order[2 * n_rows - 3 :] = large.cp.asarray(np.array([ROWS - 1, ROWS - 77, ROWS - 1000]))
    large.cp.emulator.last_blocks = 3
    batch = large.cp.empty((n_rows, 33), "float32")
    large.kernels.gather(data, order, step, batch, n_rows, dtype="float32")()
    assert np.array_equal(tail(batch, 3), values[[-1, -77, -1000]])


def test_convert(large):
    n = 2**31 + 777
    x, values = large.filled(n)
    y = large.cp.empty((n,), "uint16")
    large.kernels.convert(x, y, "bfloat16")()
    actual = (y[n - 300 :].get().astype("uint32") << 16).view("float32")
    assert np.abs(actual - values[-300:]).max() <= 2**-8 * np.abs(values).max()


def test_sum_squares(large):
    n = 2**31 + 777
    x = large.cp.empty((n,), "float32")
    n_blocks, threads = 1024, 128
    stride = n_blocks * threads
    of_last = np.arange((n_blocks - 1) * threads, n, stride)
    for begin in of_last.tolist():
        x[begin : min(begin + threads, n)] = 0.5
    large.cp.emulator.last_blocks = 1
    launch = large.kernels.sum_squares(x, large.cp.empty((1,), "float64"))
    assert launch.grid == (n_blocks,)
    launch()
    of_block = launch.arguments[-2]
    assert of_block[n_blocks - 1].item() == 0.25 * np.minimum(n - of_last, threads).sum()
