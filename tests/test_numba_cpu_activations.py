"""σ and σ′ compiled for the CPU: the elementary functions beneath, and every activation against the NumPy backend."""

import math
import re

import numpy as np
import pytest
from scipy import special

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.backends.numpy import DERIVATIVE, OUTPUT_FORWARD

pytest.importorskip("numba")

from backprop_gpu.kernels.numba_cpu import activations, elementary
from backprop_gpu.kernels.numba_cpu.activations import CODES
from backprop_gpu.kernels.numba_cpu.compile import executable

apply, multiply_by_derivative = (executable(f.py_func) for f in (activations.apply, activations.multiply_by_derivative))

DTYPES = ("float32", "float64")

EDGES = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, math.inf, -math.inf, math.nan]


def assert_accurate(actual, expected, rtol, atol):
    """|actual − expected| ≤ rtol · |expected| + atol in every entry; NaN and ±∞ in the same places."""
    with np.errstate(over="ignore"):
        rounded = expected.astype(actual.dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~finite], rounded[~finite])
    error = np.abs(actual[finite].astype(np.float64) - expected[finite])
    bound = rtol * np.abs(expected[finite]) + atol
    assert (error <= bound).all(), f"{error[error > bound].max()} for {actual[finite][error > bound]}"


# Elementary functions


def normal_cdf(z):
    """Φ(z) from erfcx and an exponent of two parts, the first of them exact."""
    m = np.minimum(np.abs(z), 1000)
    high = m.astype(np.float32).astype(np.float64)
    e = np.exp(-0.5 * high * high) * np.exp(-0.5 * (m - high) * (m + high))
    tail = 0.5 * special.erfcx(m * math.sqrt(0.5)) * e
    return np.where(z > 0, 1 - tail, tail)


def normal_pdf(z):
    m = np.minimum(np.abs(z), 1000)
    high = m.astype(np.float32).astype(np.float64)
    return np.exp(-0.5 * high * high) * np.exp(-0.5 * (m - high) * (m + high)) / math.sqrt(2 * math.pi)


# name: reference in float64; exponents, largest |x| in float32 and in float64
ELEMENTARY = {
    "exp": (np.exp, 90, 720),
    "expm1": (np.expm1, 90, 720),
    "sigmoid": (special.expit, 90, 720),
    "tanh": (np.tanh, 30, 30),
    "normal_cdf": (normal_cdf, 14, 39),
    "normal_pdf": (normal_pdf, 14, 39),
    "sin": (np.sin, 1e4, 1e5),
    "cos": (np.cos, 1e4, 1e5),
}

# Largest error relative to the result; of sin and cos, absolute.
ELEMENTARY_TOLERANCE = {"float32": 4e-7, "float64": 2e-15}


def loop(f):
    """y = f(x) over vectors."""

    @executable
    def run(x, y):
        for i in range(len(x)):
            y[i] = f(x[i])

    return run


def evaluate(name, x):
    y = np.full_like(x, 7)
    loop(getattr(elementary, name))(x, y)
    return y


def dense(largest):
    """Both signs, evenly in the value and in the exponent."""
    even = np.linspace(-largest, largest, 20011)
    geometric = np.geomspace(largest * 1e-8, largest, 20011)
    return np.concatenate([even, geometric, -geometric])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTARY)
def test_elementary_functions(name, dtype):
    reference, single, double = ELEMENTARY[name]
    x = np.concatenate([dense(single if dtype == "float32" else double), EDGES]).astype(dtype)
    with np.errstate(all="ignore"):
        expected = reference(x.astype(np.float64))
    tolerance = ELEMENTARY_TOLERANCE[dtype]
    absolute = tolerance if name in ("sin", "cos") else 0
    # What would be subnormal may be 0.
    assert_accurate(evaluate(name, x), expected, 0 if absolute else tolerance, absolute + 2 * np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log1p_unit(dtype):
    u = np.concatenate([np.linspace(0, 1, 20011), np.geomspace(1e-30, 1, 20011), [math.nan]]).astype(dtype)
    assert_accurate(evaluate("log1p_unit", u), np.log1p(u.astype(np.float64)), ELEMENTARY_TOLERANCE[dtype], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_functions_keep_the_digits_of_small_numbers(dtype):
    x = np.geomspace(1e-30, 1e-4, 1009).astype(dtype)
    x = np.concatenate([x, -x])
    for name in ("expm1", "tanh", "sin"):
        assert_accurate(evaluate(name, x), getattr(np, name)(x.astype(np.float64)), ELEMENTARY_TOLERANCE[dtype], 0)


def test_elementary_functions_run_without_being_compiled():
    for x in (np.float32(0.7), np.float64(-0.7)):
        assert isinstance(elementary.normal_cdf(x), type(x))
        np.testing.assert_allclose(elementary.normal_cdf(x), special.ndtr(x), rtol=4e-7)
        np.testing.assert_allclose(elementary.cos(x), np.cos(x), rtol=4e-7)


# Activations

TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
"""Largest error, relative to the result or to 1."""

Z = np.concatenate([np.linspace(-30, 30, 4001), np.geomspace(1e-6, 1e3, 501), -np.geomspace(1e-6, 1e3, 501), EDGES])

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def forward(name, z):
    """σ(z) by the reference, in float64."""
    with np.errstate(all="ignore"):
        return OUTPUT_FORWARD[name](z.astype(np.float64))


def derivative(name, kept):
    with np.errstate(all="ignore"):
        return DERIVATIVE[name](kept.astype(np.float64))


def kept_for(name, z):
    return forward(name, z).astype(z.dtype) if ACTIVATIONS[name].derivative_from == "a" else z


def compiled_forward(name, z):
    a = np.full_like(z, 7)
    apply(CODES[name], z, 0, a, 0, len(z))
    return a


def test_every_activation_has_a_code():
    assert [*CODES] == [*ACTIVATIONS, "exp"]
    assert [*CODES.values()] == [*range(len(CODES))]


@every_dtype
@pytest.mark.parametrize("name", CODES)
def test_apply(name, dtype):
    z = Z.astype(dtype)
    assert_accurate(compiled_forward(name, z), forward(name, z), TOLERANCE[dtype], TOLERANCE[dtype])


@every_dtype
@every_activation
def test_multiply_by_derivative(name, dtype):
    kept = kept_for(name, Z.astype(dtype))
    delta = np.random.default_rng(1).uniform(0.5, 2, len(kept)).astype(dtype)
    expected = delta.astype(np.float64) * derivative(name, kept)
    multiply_by_derivative(CODES[name], kept, 0, 1.0, delta, 0, len(kept))
    assert_accurate(delta, expected, 2 * TOLERANCE[dtype], 2 * TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("name", [name for name, a in ACTIVATIONS.items() if a.derivative_from == "a"])
def test_the_scale_undoes_dropout(name, dtype):
    rate = 0.2
    a = kept_for(name, np.linspace(-3, 3, 101).astype(dtype))
    kept, delta = (a / (1 - rate)).astype(dtype), np.full_like(a, 1.5)
    multiply_by_derivative(CODES[name], kept, 0, 1 - rate, delta, 0, len(kept))
    expected = 1.5 * derivative(name, kept.astype(np.float64) * (1 - rate))
    assert_accurate(delta, expected, 2 * TOLERANCE[dtype], 2 * TOLERANCE[dtype])


COUNTS = [0, 1, 2, 7, 16, 67, 131]
"""Numbers in a run: less than a vector, vectors, and some over."""


@every_dtype
@pytest.mark.parametrize("name", CODES)
def test_apply_to_a_run(name, dtype):
    z = np.random.default_rng(2).standard_normal(149).astype(dtype)
    for count in COUNTS:
        a = np.full(151, 7, dtype)
        apply(CODES[name], z, 5, a, 3, count)
        assert_accurate(a[3 : 3 + count], forward(name, z[5 : 5 + count]), TOLERANCE[dtype], TOLERANCE[dtype])
        assert (a[:3] == 7).all()
        assert (a[3 + count :] == 7).all()


@every_dtype
@pytest.mark.parametrize("name", CODES)
def test_apply_in_place(name, dtype):
    z = np.random.default_rng(3).standard_normal(149).astype(dtype)
    for count in COUNTS:
        a, run = z.copy(), slice(5, 5 + count)
        apply(CODES[name], a, 5, a, 5, count)
        assert_accurate(a[run], forward(name, z[run]), TOLERANCE[dtype], TOLERANCE[dtype])
        a[run] = z[run]
        np.testing.assert_array_equal(a, z)


@every_dtype
def test_apply_from_one_part_of_an_array_to_another(dtype):
    x = np.random.default_rng(4).standard_normal(211).astype(dtype)
    z = x.copy()
    apply(CODES["tanh"], x, 100, x, 3, 97)
    assert_accurate(x[3:100], forward("tanh", z[100:197]), TOLERANCE[dtype], TOLERANCE[dtype])
    x[3:100] = z[3:100]
    np.testing.assert_array_equal(x, z)


@every_dtype
@every_activation
def test_multiply_a_run_by_the_derivative(name, dtype):
    rng = np.random.default_rng(5)
    kept, before = kept_for(name, rng.standard_normal(149).astype(dtype)), rng.standard_normal(151).astype(dtype)
    for count in COUNTS:
        delta, expected = before.copy(), before.astype(np.float64)
        expected[3 : 3 + count] *= derivative(name, kept[5 : 5 + count])
        multiply_by_derivative(CODES[name], kept, 5, 1.0, delta, 3, count)
        assert_accurate(delta, expected, 2 * TOLERANCE[dtype], 2 * TOLERANCE[dtype])
        delta[3 : 3 + count] = before[3 : 3 + count]
        np.testing.assert_array_equal(delta, before)


@every_dtype
def test_sine_of_large_angles(dtype):
    z = np.array([0.5, 1e3, -9e3, 3e4, -1e6, 1e10, -1e30, 0.25], dtype)
    a = compiled_forward("sine", z)
    assert_accurate(a, np.sin(z.astype(np.float64)), 0, TOLERANCE[dtype])
    delta = np.ones_like(z)
    multiply_by_derivative(CODES["sine"], z, 0, 1.0, delta, 0, len(z))
    assert_accurate(delta, np.cos(z.astype(np.float64)), 0, TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_stands_beside_a_number_does_not_change_it(name, dtype):
    """Such as what was left in the padding of a tile."""
    z = np.linspace(-7, 7, 103).astype(dtype)
    with_large = np.append(z, np.array(1e30, dtype))
    delta, beside = np.ones_like(z), np.ones_like(with_large)
    multiply_by_derivative(CODES[name], z, 0, 1.0, delta, 0, z.size)
    multiply_by_derivative(CODES[name], with_large, 0, 1.0, beside, 0, with_large.size)
    np.testing.assert_array_equal(delta, beside[:-1])
    apply(CODES[name], z, 0, delta, 0, z.size)
    apply(CODES[name], with_large, 0, beside, 0, with_large.size)
    np.testing.assert_array_equal(delta, beside[:-1])


@every_dtype
def test_unknown_codes(dtype):
    x = np.zeros(3, dtype)
    with pytest.raises(ValueError, match="no activation has this code"):
        apply(len(CODES), x, 0, x, 0, 3)
    with pytest.raises(ValueError, match="no activation has this code"):
        multiply_by_derivative(CODES["exp"], x, 0, 1.0, x, 0, 3)


# Machine code


def llvm(run, *arguments):
    """What LLVM has made of `run` for these arguments."""

    @executable
    def call(*arguments):
        run(*arguments)

    call(*arguments)
    (signature,) = call.signatures
    return call.inspect_llvm(signature)


VECTOR = r"<\d+ x (float|double)>"
LIBRARY_CALL = r"call .*@(llvm\.)?(exp|expm1|log1p|tanh|sin|cos|erfc)"


@every_dtype
@pytest.mark.parametrize("name", [name for name in CODES if name != "identity"])
def test_loops_are_vectorised(name, dtype):
    """A loop that calls the C library, or runs one number at a time, is ten times slower."""
    a = np.zeros(3, dtype)
    code = llvm(activations.forward_run(activations.FORWARD[name]), a, 0, a, 0, 3)
    assert re.search(rf"f(add|sub|mul|div|cmp) .*{VECTOR}", code)
    assert not re.search(LIBRARY_CALL, code)


@every_dtype
@every_activation
def test_loops_of_derivatives_are_vectorised(name, dtype):
    a = np.zeros(3, dtype)
    code = llvm(activations.backward_run(activations.DERIVATIVE[name]), a, 0, 1.0, a, 0, 3)
    assert re.search(rf"fmul .*{VECTOR}", code)
    assert not re.search(LIBRARY_CALL, code)
