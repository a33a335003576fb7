"""What the tests share: this machine's backends, the tolerance table, and formulas to compare with.

Tests of the operations take `backend` and `dtype`; a new module in `backprop_gpu/backends/` is covered by existing.
"""

import ctypes
import math
import os
import signal
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.special import expit, log_expit, ndtr

import backprop_gpu as bp
import cuda_on_cpu
from backprop_gpu.backends import cuda, selection
from backprop_gpu.backends.numpy import DERIVATIVE, FORWARD


def _has_gpu():
    """Whether the NVIDIA driver, asked directly, knows a GPU."""
    try:
        driver, n = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value > 0


# Numba reads this when it is first imported, so it is set before anything imports Numba, for this process and those
# that tests start. It changes `numba.cuda` alone: the cpu backend is compiled as ever. On a GPU, the kernels run there.
if not _has_gpu():
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    # The simulator's main thread polls the others without a pause; at the default of 5 ms, they hardly get to run.
    sys.setswitchinterval(1e-4)

GPU_BACKENDS = ("cuda", "numba-cuda")


def _execute_cuda_on_the_cpu():
    """Makes `backend="cuda"` run its kernels on the CPU, on a machine without a GPU; "auto" passes it over."""
    if _has_gpu() or cuda_on_cpu.missing():  # test_cuda_on_cpu.py says so
        return
    device = cuda_on_cpu.emulated(checked=True)
    cuda._cupy = lambda: device
    cuda.by_name_only = lambda: "it is executed on the CPU, for tests"


_execute_cuda_on_the_cpu()

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
"""Largest error of an operation by dtype, relative to the largest entry of its float64 reference."""


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c():
    """Ctrl-C as in a terminal, also where a shell started the tests in the background, with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


OPERATION_FILES = ("test_contract", "test_operations", "test_stability", "test_torch")
"""The test files that a slow candidate takes; whole trainings it has tests of its own for."""


MOST_ENTRIES = {1: 200, 2: 150, 3: 20_000}
"""What a slow candidate bears of a vector, a matrix and a product, whose shape a test is given."""

HEAVY = {"test_gradients_over_many_rows_keep_their_digits", "test_the_share_of_neurons_kept"}
"""Tests that it does not bear, whatever their parameters."""


def _work(parameters):
    """The size that a test is given, as a share of the most that is borne."""
    shape = parameters.get("shape", parameters.get("size", 1))
    shape = shape if isinstance(shape, tuple) else (shape,)
    return math.prod(shape) / MOST_ENTRIES[len(shape)]


@dataclass(frozen=True)
class Candidate:
    """A backend as the tests run it."""

    id: str
    name: str
    on_gpu: bool
    tests: tuple[str, ...] | None = None
    """The test files that take it; None is all."""
    slow: bool = False
    """Then it takes no more work than `MOST_ENTRIES`, and nothing of `HEAVY`."""

    def takes(self, item):
        """Whether it is up to a test."""
        if self.tests is not None and item.path.stem not in self.tests:
            return False
        return not self.slow or (item.originalname not in HEAVY and _work(item.callspec.params) <= 1)


def _candidates():
    """Every backend that works here; one that works by name only is simulated, and thousands of times slower."""
    for status in bp.backends():
        if status.automatic:
            yield Candidate(status.name, status.name, status.name in GPU_BACKENDS)
        elif status.name == "cuda" and status.works:
            yield Candidate("cuda-on-cpu", "cuda", False, OPERATION_FILES)
        elif status.works:
            yield Candidate(f"{status.name}-simulator", status.name, False, OPERATION_FILES, slow=True)


def _parameters(entries, on_gpu):
    return [pytest.param(entry, id=id, marks=[pytest.mark.gpu] if on_gpu(entry) else []) for id, entry in entries]


def pytest_collection_modifyitems(config, items):
    """Leaves out what a candidate is not up to."""
    refused = [item for item in items if _candidate(item) and not _candidate(item).takes(item)]
    config.hook.pytest_deselected(items=refused)
    items[:] = [item for item in items if item not in set(refused)]


def _candidate(item):
    candidate = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return candidate if isinstance(candidate, Candidate) else None


@pytest.fixture(scope="session", params=_parameters([(c.id, c) for c in _candidates()], lambda c: c.on_gpu))
def backend(request):
    """The operations of every backend that works on this machine."""
    return bp.get_backend(request.param.name)


@pytest.fixture
def on_every_backend(backend, monkeypatch):
    """Makes each backend in turn the one that "auto" takes, for tests of what stands above the operations."""
    modules = {backend.name: selection.MODULES[backend.name], **selection.MODULES}
    monkeypatch.setattr(selection, "MODULES", modules)
    status = selection._status
    monkeypatch.setattr(
        selection, "_status", lambda name: replace(status(name), reason="") if name == backend.name else status(name)
    )


def _on_gpu(status):
    return status.name in GPU_BACKENDS and status.automatic


@pytest.fixture(scope="session", params=_parameters([(s.name, s) for s in bp.backends()], _on_gpu))
def backend_status(request):
    """The status of every backend that there is, working or not."""
    return request.param


@pytest.fixture(scope="session", params=TOLERANCE)
def dtype(request, backend):
    """Every dtype of the tolerance table that the backend computes in."""
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend.name} does not compute in {request.param}")
    return request.param


@pytest.fixture(scope="session")
def tolerance(dtype):
    """The tolerance table's entry for `dtype`."""
    return TOLERANCE[dtype]


@pytest.fixture
def draw(dtype):
    """draw(*shape): normal random numbers in float64 that `dtype` holds exactly, so rounding them costs nothing.

    The first is always 0.75, so that arrays of one entry do not end on relu's flat side.
    """
    rng = np.random.default_rng(20250)

    def draw(*shape, scale=1.0):
        x = scale * rng.standard_normal(shape)
        x.flat[0] = 0.75
        return x.astype(dtype).astype(np.float64)

    return draw


@pytest.fixture
def put(backend, dtype):
    """put(x): a copy of the host array `x` on the backend, in `dtype`.

    With offset=k it is a view that starts k entries into a larger array, as W[l] and b[l] are views into the flat
    parameters: C-contiguous, but not aligned to more than one entry.
    """

    def put(x, offset=0, dtype=dtype):
        x = np.asarray(x)
        flat = backend.zeros((x.size + offset,), dtype)
        view = flat[offset : offset + x.size].reshape(x.shape)
        view[...] = backend.asarray(x, dtype)
        return view

    return put


@pytest.fixture
def assert_close(backend, tolerance):
    """assert_close(actual, expected): within the tolerance of a finite reference that is not all zero."""

    def assert_close(actual, expected, tolerance=tolerance):
        actual, expected = np.asarray(backend.to_numpy(actual), np.float64), np.asarray(expected)
        assert expected.dtype == np.float64
        assert actual.shape == expected.shape
        assert np.isfinite(expected).all()
        assert np.abs(expected).max() > 0
        assert np.isfinite(actual).all()
        assert np.abs(actual - expected).max() / np.abs(expected).max() <= tolerance

    return assert_close


# σ and σ′ from SciPy and the textbook, in other forms than the library's where there are any, for moderate z

SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _softplus(z):
    return -log_expit(-z)


def _tanh_gate(z):
    """(tanh u, u′) of gelu_tanh."""
    c = math.sqrt(2 / math.pi)
    return np.tanh(c * (z + 0.044715 * z**3)), c * (1 + 3 * 0.044715 * z**2)


def _gelu_tanh_derivative(z):
    t, slope = _tanh_gate(z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * slope


def _mish_derivative(z):
    """e^z ω / δ² (Misra, 2019)."""
    e = np.exp(z)
    omega = 4 * (z + 1) + 4 * e**2 + e**3 + e * (4 * z + 6)
    return e * omega / (2 * e + e**2 + 2) ** 2


SIGMA = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z > 0, z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, z / 100), lambda z: np.where(z > 0, 1.0, 0.01)),
    "elu": (lambda z: np.where(z > 0, z, np.exp(z) - 1), lambda z: np.where(z > 0, 1.0, np.exp(z))),
    "selu": (
        lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * (np.exp(z) - 1)),
        lambda z: SELU_SCALE * np.where(z > 0, 1.0, SELU_ALPHA * np.exp(z)),
    ),
    "sigmoid": (expit, lambda z: expit(z) * expit(-z)),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "softplus": (_softplus, expit),
    "silu": (lambda z: z * expit(z), lambda z: expit(z) * (1 + z * expit(-z))),
    "gelu": (lambda z: z * ndtr(z), lambda z: ndtr(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)),
    "gelu_tanh": (lambda z: 0.5 * z * (1 + _tanh_gate(z)[0]), _gelu_tanh_derivative),
    "mish": (lambda z: z * np.tanh(_softplus(z)), _mish_derivative),
    "sine": (np.sin, np.cos),
}


@pytest.fixture(scope="session")
def sigma():
    """(σ, σ′) of every activation by name, as functions of a float64 z.

    One that the table above lacks is compared with the NumPy reference, which finite differences check.
    """
    return {name: SIGMA.get(name) or _reference(name) for name in bp.ACTIVATIONS}


def _reference(name):
    forward, derivative = FORWARD[name], DERIVATIVE[name]
    from_z = bp.ACTIVATIONS[name].derivative_from == "z"
    return forward, derivative if from_z else lambda z: derivative(forward(z))
