"""Choosing a backend: which work here, why the others do not, and what "auto" takes."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backends import selection
from backprop_gpu.backends.numpy import NumpyBackend


class Fake(NumpyBackend):
    """A backend of its own name."""

    name = "fake"


@pytest.fixture
def add_backend(monkeypatch):
    """add_backend(reason): a backend "fake", tried before all others, that says `reason` when it is probed."""

    def add(reason, dtypes=NumpyBackend.dtypes):
        module = ModuleType("backprop_gpu.backends.fake")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.probe = lambda: reason
        module.BACKEND = type("Fake", (Fake,), {"dtypes": dtypes})
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(selection, "MODULES", {"fake": "fake", **selection.MODULES})

    yield add
    selection._status.cache_clear()
    selection._instance.cache_clear()


def test_every_backend_works_or_says_why_not():
    assert [status.name for status in bp.backends()] == ["cuda", "numba-cuda", "cpu", "numpy"]
    assert all(status.works or status.reason for status in bp.backends())
    assert str(bp.backends()[-1]) == "numpy: works"


def test_auto_takes_the_first_that_works():
    expected = next(status.name for status in bp.backends() if status.automatic)
    assert bp.get_backend().name == bp.get_backend("auto").name == bp.MLP([2, 2]).backend == expected


def test_a_new_backend_that_works_is_taken(add_backend):
    add_backend(None)
    net = bp.MLP([2, 2])
    assert (net.backend, net.backend_reason) == ("fake", "the first that works here")
    assert bp.MLP([2, 2], backend="numpy").backend == "numpy"


def test_a_backend_that_cannot_work_is_passed_over_and_the_reason_told(add_backend):
    add_backend("no such device; pip install one")
    assert str(bp.backends()[0]) == "fake: no such device; pip install one"
    assert "fake: no such device" in bp.MLP([2, 2]).backend_reason
    with pytest.raises(RuntimeError, match=r"'fake' cannot work here: no such device.*backend='auto'"):
        bp.MLP([2, 2], backend="fake")


def test_auto_passes_over_a_backend_that_lacks_the_dtype(add_backend):
    add_backend(None, dtypes=("float32",))
    assert bp.MLP([2, 2], dtype="float32").backend == "fake"
    net = bp.MLP([2, 2], dtype="float64")
    assert net.backend != "fake"
    assert "fake: computes in float32, not in float64" in net.backend_reason
    with pytest.raises(ValueError, match="no backend of this machine computes in tf32"):
        bp.MLP([2, 2], dtype="tf32")


def test_a_backend_of_another_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'numpy'"):
        bp.get_backend("nunpy")
    with pytest.raises(TypeError, match="backend must be one of"):
        bp.get_backend(3)


def test_a_network_moves_to_another_backend_with_its_numbers(add_backend):
    net = bp.MLP([3, 4, 2], backend="numpy")
    add_backend(None)
    moved = net.copy(backend="fake")
    assert moved.backend == "fake"
    assert np.array_equal(moved.parameters, net.parameters)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float16"])
def test_a_narrow_dtype_keeps_its_parameters_in_float32(add_backend, dtype):
    add_backend(None, dtypes=(dtype,))
    net = bp.MLP([3, 4, 2], dtype=dtype)
    assert (net.dtype, str(net.parameters.dtype)) == (dtype, "float32")
    assert (net.copy().dtype, str(net.copy().parameters.dtype)) == (dtype, "float32")


@pytest.mark.gpu
def test_the_gpu_suite_has_a_gpu():
    """`pytest -m gpu` without one skips here, and says so; with one, every test of a backend runs there."""
    statuses = [status for status in bp.backends() if status.name in ("cuda", "numba-cuda")]
    if not any(status.automatic for status in statuses):
        pytest.skip(f"NOTHING RAN ON A GPU: {'; '.join(map(str, statuses))}")
