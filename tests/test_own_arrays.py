"""Rows that lie where the backend computes stay there, in inference: with a stand-in for a GPU backend."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import data
from backprop_gpu.backends import selection
from backprop_gpu.backends.numpy import NumpyBackend

N = 61


class DeviceArray(np.ndarray):
    """An array that only its backend may bring to the host."""


class Device(NumpyBackend):
    """NumPy's numbers in arrays of its own kind; notes the shape of all that comes to the host."""

    name = "device"

    def __init__(self):
        self.brought = []

    def asarray(self, x, dtype=None):
        return np.ascontiguousarray(x, dtype).view(DeviceArray)

    def empty(self, shape, dtype):
        return np.empty(shape, dtype).view(DeviceArray)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype).view(DeviceArray)

    def to_numpy(self, x):
        assert isinstance(x, DeviceArray)
        self.brought.append(x.shape)
        return np.array(x)

    def owns(self, x):
        return isinstance(x, DeviceArray)


@pytest.fixture
def ops(monkeypatch):
    """The stand-in, under the name "device"; nothing else may read its arrays on the host."""
    module = ModuleType("backprop_gpu.backends.device")
    module.__spec__ = ModuleSpec(module.__name__, None)
    module.probe, module.BACKEND = lambda: None, Device
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(selection, "MODULES", {"device": "device", **selection.MODULES})
    as_numeric = data._as_numeric

    def guarded(x, name):
        assert not isinstance(x, DeviceArray)
        return as_numeric(x, name)

    monkeypatch.setattr(data, "_as_numeric", guarded)
    ops = bp.get_backend("device")
    yield ops
    selection._status.cache_clear()
    selection._instance.cache_clear()


@pytest.fixture
def X():
    return np.random.default_rng(0).standard_normal((N, 7))


def test_hosts_own_no_arrays(X):
    assert not bp.get_backend("numpy").owns(X)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("given", ["float32", "float64", "int64"])
def test_a_networks_rows_stay_and_its_outputs_too(ops, X, dtype, given, monkeypatch):
    monkeypatch.setattr("backprop_gpu.mlp.PREDICT_ROWS", 20)
    net, y = bp.MLP([7, 5, 3], backend="device", dtype=dtype, seed=1), np.arange(N) % 3
    host = (10 * X).astype(given)
    rows = ops.asarray(host)
    expected = net.predict_proba(host), net.predict(host), net.evaluate(host, y)
    ops.brought.clear()
    p = net.predict_proba(rows)
    assert isinstance(p, DeviceArray)
    assert ops.brought == []
    np.testing.assert_array_equal(np.array(p), expected[0])
    np.testing.assert_array_equal(net.predict(rows), expected[1])
    assert net.evaluate(rows, y) == net.evaluate(rows, ops.asarray(y)) == expected[2]
    assert {shape[1:] for shape in ops.brought} <= {(3,), ()}


def with_entry(X, value):
    X = X.copy()
    X[3, 2] = value
    return X


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda X: X[:, :6], ValueError, "must have 7 features"),
        (lambda X: X[0], ValueError, "must be 2-D"),
        (lambda X: with_entry(X, np.nan), ValueError, "got nan at row 3, column 2"),
        (lambda X: with_entry(X, 1e300), ValueError, "too large for float32, at row 3, column 2"),
        (lambda X: X + 0j, TypeError, "real numbers"),
    ],
    ids=["features", "one row", "NaN", "too large", "complex"],
)
def test_bad_rows_are_refused_there(ops, X, change, error, message):
    net = bp.MLP([7, 5, 3], backend="device", seed=1)
    with pytest.raises(error, match=message), np.errstate(over="ignore"):
        net.predict(ops.asarray(change(X)))


def test_float64_rows_whose_squares_are_too_large_are_still_finite(ops, X):
    net = bp.MLP([7, 5, 3], "tanh", backend="device", dtype="float64", seed=1)
    assert np.isfinite(np.array(net.predict_proba(ops.asarray(1e200 * X)))).all()


@pytest.mark.parametrize("kind", ["binary", "multi-class", "values"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_estimators_rows_stay_too(ops, X, kind):
    ours = pytest.importorskip("backprop_gpu.sklearn")
    y = {"binary": X[:, 0] > 0, "multi-class": np.arange(N) % 3, "values": X[:, 0]}[kind]
    settings = {"hidden_layer_sizes": (5,), "max_iter": 3, "random_state": 0, "backend": "device"}
    model = (ours.MLPRegressor if kind == "values" else ours.MLPClassifier)(**settings).fit(X, y)
    rows = ops.asarray(X)
    score = model.score(X, y)
    ops.brought.clear()
    np.testing.assert_array_equal(model.predict(rows), model.predict(X))
    assert model.score(rows, y) == model.score(rows, ops.asarray(y)) == score
    assert rows.shape not in ops.brought
    if kind != "values":
        ops.brought.clear()
        p = model.predict_proba(rows)
        assert isinstance(p, DeviceArray)
        assert ops.brought == []
        np.testing.assert_allclose(np.array(p), model.predict_proba(X), rtol=1e-15)
    with pytest.raises(ValueError, match="7 features"):
        model.predict(rows[:, :6])
