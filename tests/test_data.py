"""Taking data in: every container that holds numbers trains the same network; bad data is refused, changing nothing."""

import importlib
import re

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import backprop_gpu as bp

N, FEATURES, CLASSES = 37, 5, 3

pytestmark = pytest.mark.usefixtures("on_every_backend")


@pytest.fixture
def X():
    return np.random.default_rng(7).standard_normal((N, FEATURES))


@pytest.fixture
def y():
    return np.random.default_rng(8).integers(0, CLASSES, N)


def make_net(loss="cross_entropy", n_outputs=CLASSES, **options):
    return bp.MLP([FEATURES, 7, n_outputs], loss=loss, **options)


def trained(X, y, **options):
    net = make_net(**options)
    net.fit(X, y, epochs=2, batch_size=8)
    return net.parameters


class DLPackOnly:
    """What an array of another library looks like: __dlpack__, and no __array__."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


class ArrayOnly:
    """What a NumPy-like container looks like: __array__."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.array(self.x, dtype)


CONTAINERS = {
    "list": lambda X: X.tolist(),
    "float32": lambda X: X.astype(np.float32),
    "fortran": np.asfortranarray,
    "strided": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "reversed": lambda X: X[::-1][::-1],
    "csr_array": sp.csr_array,
    "csr_matrix": sp.csr_matrix,
    "csc_array": sp.csc_array,
    "coo_array": sp.coo_array,
    "dataframe": pd.DataFrame,
    "dlpack": DLPackOnly,
    "array protocol": ArrayOnly,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_of_the_same_numbers_gives_the_same_run(container, X, y):
    assert np.array_equal(trained(CONTAINERS[container](X), y), trained(X, y))


@pytest.fixture
def one_at_a_time(monkeypatch):
    """A backend that takes several mini-batches of such rows at once, by their size, takes one."""
    pytest.importorskip("numba")
    monkeypatch.setattr(importlib.import_module("backprop_gpu.backends.cpu_step"), "BYTES_PER_CALL", 1)


@pytest.mark.usefixtures("one_at_a_time")
def test_a_memory_map_is_read_mini_batch_by_mini_batch(tmp_path, X, y, monkeypatch):
    path = tmp_path / "X.npy"
    np.save(path, X)
    mapped = np.load(path, mmap_mode="r")
    from backprop_gpu import data

    taken = []
    original = data.DenseRows.take

    def spy(self, indices):
        taken.append(original(self, indices))
        return taken[-1]

    monkeypatch.setattr(data.DenseRows, "take", spy)
    result = trained(mapped, y)
    assert max(len(rows) for rows in taken) <= 8
    assert np.shares_memory(data.as_rows(mapped, FEATURES, "float32").x, mapped)
    assert np.array_equal(result, trained(X, y))


@pytest.mark.usefixtures("one_at_a_time")
def test_sparse_rows_are_never_dense_as_a_whole(X, y, monkeypatch):
    sizes = []
    original = sp.csr_array.toarray

    def spy(self, *arguments, **options):
        sizes.append(self.shape[0])
        return original(self, *arguments, **options)

    monkeypatch.setattr(sp.csr_array, "toarray", spy)
    trained(sp.csr_array(X), y, backend="numpy")
    assert sizes
    assert max(sizes) <= 8


def test_wide_sparse_rows_are_predicted_a_few_at_a_time(monkeypatch):
    wide = sp.random_array((300, 5000), density=1e-3, format="csr", rng=np.random.default_rng(0))
    net = bp.MLP([5000, 2], backend="numpy")
    expected = net.predict_proba(wide)
    sizes = []
    original = sp.csr_array.toarray
    monkeypatch.setattr(sp.csr_array, "toarray", lambda self: sizes.append(self.shape) or original(self))
    monkeypatch.setattr("backprop_gpu.mlp.PREDICT_ENTRIES", 1 << 18)
    assert net.predict_proba(wide) == pytest.approx(expected, rel=1e-6)
    assert len(sizes) > 1
    assert max(rows * columns for rows, columns in sizes) <= 1 << 18


@pytest.mark.parametrize(
    ("part", "at", "value"), [("indices", 3, FEATURES), ("indices", 0, -1), ("indptr", 3, 9999), ("indptr", -1, 9999)]
)
def test_a_damaged_sparse_matrix_is_refused(X, y, part, at, value):
    damaged = sp.csr_array(X)
    getattr(damaged, part)[at] = value
    net = make_net()
    before = net.parameters.copy()
    for ask in (lambda: net.fit(damaged, y), lambda: net.predict(damaged)):
        with pytest.raises(ValueError, match="the sparse matrix is damaged: "):
            ask()
    assert np.array_equal(net.parameters, before)


def test_a_frame_of_numbers_and_booleans_is_numbers(y):
    frame = pd.DataFrame({"a": np.arange(N) % 2 == 0, "b": np.linspace(0, 1, N), "c": np.arange(N)})
    frame["d"] = frame["c"].astype("Int64")
    assert np.asarray(frame).dtype == object
    net = bp.MLP([4, 3])
    assert np.array_equal(net.predict_proba(frame), net.predict_proba(frame.to_numpy(float)))


@pytest.mark.parametrize(
    "convert",
    [list, pd.Series, lambda y: y.astype(np.uint8), lambda y: y.reshape(-1, 1), lambda y: np.eye(CLASSES)[y]],
    ids=["list", "series", "uint8", "column", "one-hot"],
)
def test_every_form_of_labels_gives_the_same_run(convert, X, y):
    assert np.abs(trained(X, convert(y)) - trained(X, y)).max() <= 1e-6


def with_value(x, value):
    x = np.array(x, dtype=float)
    x[3, 2] = value
    return x


def ragged():
    return [[1.0] * FEATURES] * (N - 1) + [[1.0]]


BAD_X = {
    "nan": (lambda X: with_value(X, np.nan), ValueError, "X must be finite; got nan at row 3, column 2"),
    "inf": (lambda X: with_value(X, -np.inf), ValueError, "X must be finite; got -inf at row 3, column 2"),
    "huge": (lambda X: with_value(X, 1e300), ValueError, "too large for float32"),
    "sparse nan": (
        lambda X: sp.csr_array(with_value(X, np.nan)),
        ValueError,
        "X must be finite; got nan at row 3, column 2",
    ),
    "empty": (lambda X: X[:0], ValueError, "X is empty"),
    "no features": (lambda X: X[:, :0], ValueError, f"must have {FEATURES} features"),
    "wrong features": (lambda X: X[:, :4], ValueError, f"must have {FEATURES} features"),
    "1-D": (lambda X: X[0], ValueError, "must be 2-D"),
    "3-D": (lambda X: X[None], ValueError, "must be 2-D"),
    "0-D": (lambda X: 3.0, ValueError, "must be 2-D"),
    "object": (lambda X: X.astype(object), TypeError, "got dtype object"),
    "text": (lambda X: X.astype(str), TypeError, "must hold real numbers"),
    "complex": (lambda X: X + 0j, TypeError, "must hold real numbers"),
    "ragged": (lambda X: ragged(), TypeError, "cannot be read as an array"),
    "masked": (lambda X: np.ma.masked_greater(X, 0), ValueError, "masked entries"),
    "text frame": (lambda X: pd.DataFrame({"a": ["x"] * N}), TypeError, "must hold real numbers"),
    "none": (lambda X: None, TypeError, "got dtype object"),
}


def assert_refused(net, call, error, message):
    """`call` raises `error` with one sentence that contains `message`, and leaves `net` as it was."""
    before, rng = net.parameters.copy(), net.rng.bit_generator.state
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert np.array_equal(net.parameters, before)
    assert net.rng.bit_generator.state == rng
    assert net.steps_taken == 0
    assert net.stream is None


@pytest.mark.parametrize("case", BAD_X)
@pytest.mark.parametrize("method", ["fit", "partial_fit", "predict", "predict_proba", "evaluate", "backprop"])
def test_bad_inputs_are_refused(case, method, X, y):
    spoil, error, message = BAD_X[case]
    net = make_net()
    target = () if method.startswith("predict") else (y,)
    assert_refused(net, lambda: getattr(net, method)(spoil(X), *target), error, message)


def test_numbers_are_looked_through_once(X, monkeypatch):
    """`predict` asks for it before each of the ways that it may take."""
    looks = []
    monkeypatch.setattr("backprop_gpu.data._require_finite", lambda x, dtype, name: looks.append(x))
    make_net().predict(X)
    assert len(looks) == 1


def test_the_row_of_a_bad_number_is_counted_over_all_chunks(X, monkeypatch):
    monkeypatch.setattr("backprop_gpu.data.CHUNK", 10)
    with pytest.raises(ValueError, match="nan at row 3, column 2"):
        make_net().predict(with_value(X, np.nan))


def test_probability_rows_are_divided_by_their_sum(X):
    p = np.random.default_rng(3).dirichlet(np.ones(CLASSES), N)
    net = make_net(dtype="float64")
    exact, rough = net.backprop(X, p), net.backprop(X, 1.0005 * p)
    assert np.abs(rough.delta[1] - exact.delta[1]).max() <= 1e-15
    assert rough.loss == pytest.approx(exact.loss, rel=1e-13)


def spoiled(y, value):
    y = np.array(y)
    y[4] = value
    return y


counts = np.arange(N) % 4
BAD_Y = {
    "label too large": ("cross_entropy", lambda y: spoiled(y, 3), ValueError, "labels 0 … 2, one for each of the 3"),
    "label negative": ("cross_entropy", lambda y: spoiled(y, -1), ValueError, "got -1 at row 4"),
    "float labels": ("cross_entropy", lambda y: y.astype(float), TypeError, "must hold integer class labels"),
    "nan labels": ("cross_entropy", lambda y: y * np.nan, TypeError, "must hold integer class labels"),
    "text labels": ("cross_entropy", lambda y: y.astype(str), TypeError, "must hold real numbers"),
    "object labels": ("cross_entropy", lambda y: y.astype(object), TypeError, "got dtype object"),
    "sparse labels": ("cross_entropy", lambda y: sp.csr_array(y.reshape(-1, 1)), TypeError, "cannot be sparse"),
    "single class": ("cross_entropy", lambda y: y * 0 + 1, ValueError, "single class (1)"),
    "rows not summing to 1": ("cross_entropy", lambda y: np.full((N, 3), 0.2), ValueError, "must sum to 1"),
    "negative probability": ("cross_entropy", lambda y: np.tile([1.5, -0.5, 0], (N, 1)), ValueError, "between 0 and 1"),
    "wrong columns": ("cross_entropy", lambda y: np.full((N, 2), 0.5), ValueError, "must have 3 columns"),
    "too short": ("cross_entropy", lambda y: y[:-1], ValueError, f"each of the {N} rows"),
    "scalar": ("cross_entropy", lambda y: 1, ValueError, f"each of the {N} rows"),
    "3-D": ("cross_entropy", lambda y: np.zeros((N, 3, 1)), ValueError, f"each of the {N} rows"),
    "binary 2": ("binary_cross_entropy", lambda y: np.full((N, 3), 2), ValueError, "must be 0 or 1"),
    "binary nan": ("binary_cross_entropy", lambda y: np.full((N, 3), np.nan), ValueError, "must be finite"),
    "values nan": ("squared_error", lambda y: np.full((N, 3), np.nan), ValueError, "y must be finite"),
    "values inf": ("huber", lambda y: np.full((N, 3), np.inf), ValueError, "y must be finite"),
    "values 1-D": ("squared_error", lambda y: y, ValueError, "must have 3 columns"),
    "negative counts": ("poisson", lambda y: np.full((N, 3), -1), ValueError, "cannot be negative"),
}


@pytest.mark.parametrize("case", BAD_Y)
def test_bad_targets_are_refused(case, X, y):
    loss, spoil, error, message = BAD_Y[case]
    net = make_net(loss)
    assert_refused(net, lambda: net.fit(X, spoil(y), epochs=1), error, message)


def test_a_single_class_is_refused_for_one_binary_output_but_not_for_a_rare_label(X):
    net = make_net("binary_cross_entropy", 1)
    assert_refused(net, lambda: net.fit(X, np.zeros(N)), ValueError, "single class (0)")
    rare = np.zeros((N, 3))
    rare[:9, 0] = 1
    make_net("binary_cross_entropy").fit(X, rare, epochs=1)


BAD_WEIGHTS = {
    "short": (np.ones(N - 1), "must have shape"),
    "2-D": (np.ones((N, 1)), "must have shape"),
    "negative": (spoiled(np.ones(N), -1.0), "at least 0 everywhere"),
    "all zero": (np.zeros(N), "above 0, in float32, somewhere"),
    "nan": (spoiled(np.ones(N), np.nan), "sample_weight must be finite"),
    "all zero in float32": (np.full(N, 1e-60), "above 0, in float32, somewhere"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_sample_weights_are_refused(case, X, y):
    weights, message = BAD_WEIGHTS[case]
    net = make_net()
    assert_refused(net, lambda: net.fit(X, y, sample_weight=weights), ValueError, message)


def test_bad_validation_data_is_named_as_such(X, y):
    net = make_net()
    bad = with_value(X, np.nan)
    assert_refused(net, lambda: net.fit(X, y, validation_data=(bad, y)), ValueError, "validation X must be finite")
    assert_refused(net, lambda: net.fit(X, y, validation_data=X), TypeError, "must be (X, y)")


def test_sample_weight_zero_is_as_good_as_absent(X, y):
    w = np.ones(N)
    w[5:] = 0
    with_zeros, without = make_net(dtype="float64"), make_net(dtype="float64")
    assert with_zeros.evaluate(X, y, sample_weight=w) == pytest.approx(without.evaluate(X[:5], y[:5]), rel=1e-12)
    grads, expected = with_zeros.backprop(X, y, sample_weight=w), without.backprop(X[:5], y[:5])
    assert np.abs(grads.gradients - expected.gradients).max() <= 1e-14
    assert np.abs(expected.gradients).max() > 1e-3
