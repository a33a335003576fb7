"""Elementary functions of one number, without a branch or a call, so that LLVM vectorises every loop over them.

Numba without Intel's SVML turns `math.exp` in a loop into one call of the C library per element. Here, a function is a
polynomial or a quotient of two, behind a range reduction. It is written once: called from compiled code with float32 or
float64, it computes in that type, and only the constants differ. NaN in, NaN out: `high if x > high else x` keeps a NaN
where `min` need not.

The coefficients minimise the largest relative error over the interval that their comment names (Remez's algorithm in
60 digits); the comment ends with that error, in float32 and in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numba import typeof, types
from numba.extending import overload, register_jitable

from backprop_gpu.kernels.numba_cpu.compile import INNER, named_apart

__all__ = [
    "called",
    "constant",
    "cos",
    "exp",
    "expm1",
    "inlined",
    "largest_angle",
    "log1p_unit",
    "normal_cdf",
    "normal_cdf_and_pdf",
    "normal_pdf",
    "sigmoid",
    "sigmoid_pair",
    "sin",
    "tanh",
    "written_anyway",
]

INLINED = {**INNER, "forceinline": True}

Function = Callable[..., Any]


def called(function: Function) -> Function:
    """Decorator: a function for compiled code alone; from Python, it runs as it stands."""
    jitable: Function = register_jitable(**INNER)(named_apart(function))
    return jitable


inlined = register_jitable(**INLINED)
"""Decorator: likewise, for the inside of a loop, which is not vectorised unless all that it calls is inlined."""


@inlined
def written_anyway(x: Any) -> Any:
    """x + 0, for an x that may be what the loop has read where it writes.

    Of "a[i] = 0 if a[i] < 0 else a[i]" LLVM makes a loop that writes only what changes. Without AVX-512 that takes
    `vmaskmovps`, on which AMD's processors spend a dozen cycles: relu took 0.8 ns a number on a Zen 3, and takes 0.1.
    It has to come with −0 too: for x > 0 LLVM knows that x + 0 is x, and with Python 3.13 made such a loop of elu.
    """
    return x + type(x)(0)


# What depends on the type


class Format(NamedTuple):
    """A binary format of IEEE 754, and the integer of its size."""

    float: Any
    int: Any
    bits: int
    mantissa_bits: int


FORMATS = {
    types.float32: Format(np.float32, np.int32, 32, 23),
    types.float64: Format(np.float64, np.int64, 64, 52),
}


def for_each_format(build: Callable[[Format], Function]) -> Function:
    """A function that is `build(format of its first argument)`."""

    def function(x: Any, *others: Any) -> Any:
        return build(FORMATS[typeof(x)])(x, *others)

    @overload(function, jit_options=INLINED, strict=False)
    def choose(x: Any, *others: Any) -> Function | None:
        return build(FORMATS[x]) if x in FORMATS else None

    return function


def constant(single: float, double: float) -> Function:
    """x → `single` where x is float32, `double` where it is float64, in the type of x."""

    @for_each_format
    def value(f: Format) -> Function:
        c = f.float(single if f.bits == 32 else double)
        return lambda x: c

    return value


def polynomial(single: Sequence[float], double: Sequence[float]) -> Function:
    """x → c₀ + c₁x + c₂x² + … by Horner's rule, with the coefficients c for the type of x.

    LLVM unrolls the loop.
    """

    @for_each_format
    def horner(f: Format) -> Function:
        *lower, highest = map(f.float, single if f.bits == 32 else double)
        rest = tuple(reversed(lower))

        def evaluate(x: Any) -> Any:
            y = highest
            for c in rest:
                y = y * x + c
            return y

        return evaluate

    return horner


@for_each_format
def power_of_two(f: Format) -> Function:
    """k → the float whose exponent field holds the lowest bits of k's mantissa."""
    to_float, to_int, shift = f.float, f.int, f.int(f.mantissa_bits)
    return lambda k: to_int(to_float(k).view(to_int) << shift).view(to_float)


@for_each_format
def negate_if_odd(f: Format) -> Function:
    """(x, k) → −x where the lowest bit of k's mantissa is set, else x."""
    to_float, to_int, shift = f.float, f.int, f.int(f.bits - 1)

    def negate(x: Any, k: Any) -> Any:
        sign = to_int(to_float(k).view(to_int) << shift)
        return to_int(to_float(x).view(to_int) ^ sign).view(to_float)

    return negate


def parts(value: Fraction, bits: int, count: int) -> list[float]:
    """`count` numbers whose sum is `value`, all but the last so short that their multiples are exact.

    The i-th is a multiple of 2^(−i · bits), and each is less than the last place of the one before.
    """
    result = []
    for i in range(1, count):
        result.append(Fraction(round(value * 2 ** (i * bits)), 2 ** (i * bits)))
        value -= result[-1]
    return [*map(float, result), float(value)]


# Added to a number of moderate size, it rounds it to an integer, which then stands in the lowest bits of the mantissa.
rounding = constant(1.5 * 2**23, 1.5 * 2**52)


# e^x, from x = n ln 2 + r (Cody and Waite, 1980)

LN2 = Fraction("0.6931471805599453094172321214581765680755")

log2_e = constant(1 / float(LN2), 1 / float(LN2))
ln2_high, ln2_low = map(constant, parts(LN2, 16, 2), parts(LN2, 42, 2))

# `rounding`, and the exponent's bias less 1: it turns n into the exponent field of 2ⁿ⁻¹.
rounding_to_exponent = constant(1.5 * 2**23 + 126, 1.5 * 2**52 + 1022)

# Of e^x: beyond them, the field is that of 0, or 2 · 2ⁿ⁻¹e^r is ∞.
smallest_exponent = constant(-126 * float(LN2), -1022 * float(LN2))
largest_exponent = constant(128.5 * float(LN2), 1024.5 * float(LN2))

# (e^r − 1) / r for |r| ≤ ½ ln 2: 1.1e-8 and 1.8e-17.
expm1_ratio = polynomial(
    [1, 0.5, 0.16666505577973773, 0.041667138086856015, 0.008369140043745803, 0.0013888872918278222],
    [
        1,
        0.5000000000000006,
        0.16666666666666563,
        0.04166666666657316,
        0.00833333333339835,
        0.0013888888932519436,
        0.00019841269706664163,
        2.4801504271106007e-05,
        2.755741517093669e-06,
        2.7626400720398257e-07,
        2.5052096997715522e-08,
    ],
)


@inlined
def reduce_exponent(x: Any) -> Any:
    """(r, 2ⁿ⁻¹) of x = n ln 2 + r with |r| ≤ ½ ln 2. Unlike 2ⁿ, 2ⁿ⁻¹ is finite wherever e^x is."""
    low, high, shift = smallest_exponent(x), largest_exponent(x), rounding_to_exponent(x)
    x = high if x > high else x
    x = low if x < low else x
    k = x * log2_e(x) + shift
    n = k - shift
    return (x - n * ln2_high(x)) - n * ln2_low(x), power_of_two(k)


@inlined
def exp(x: Any) -> Any:
    """e^x = 2ⁿ e^r; 0 where that is below 2^-125.5, in float64 2^-1021.5, and ∞ where it is too large."""
    r, half_scale = reduce_exponent(x)
    return type(x)(2) * (expm1_ratio(r) * r * half_scale + half_scale)


@inlined
def exp_of_sum(x: Any, correction: Any) -> Any:
    """e^(x + correction) for a correction that adding it to a large x would lose; at most 0.03, so r hardly grows."""
    r, half_scale = reduce_exponent(x)
    r += correction
    return type(x)(2) * (expm1_ratio(r) * r * half_scale + half_scale)


@inlined
def expm1(x: Any) -> Any:
    """e^x − 1 = 2ⁿ(e^r − 1) + (2ⁿ − 1), which keeps its digits around 0."""
    r, half_scale = reduce_exponent(x)
    return type(x)(2) * (expm1_ratio(r) * r * half_scale + (half_scale - type(x)(0.5)))


# What is made of it

# atanh(s) / s as a polynomial in s² ≤ 1/9: 4.0e-9 and 4.6e-17.
atanh_ratio = polynomial(
    [1, 0.3333315735616179, 0.20012454765170662, 0.13980303793071241, 0.14089166315465668],
    [
        1,
        0.33333333333341514,
        0.19999999997588966,
        0.14285714560917598,
        0.11111095194256268,
        0.09091436066298066,
        0.07681743698865424,
        0.06796495195040915,
        0.04936342485436995,
        0.08898500632051577,
    ],
)


@inlined
def log1p_unit(u: Any) -> Any:
    """log(1 + u) = 2 atanh(u / (2 + u)) for 0 ≤ u ≤ 1."""
    two = type(u)(2)
    s = u / (two + u)
    return two * s * atanh_ratio(s * s)


@inlined
def sigmoid_pair(x: Any) -> Any:
    """(sigmoid(x), sigmoid(−x)): 1 / (1 + e) and e / (1 + e) with e = e^−|x|, which cannot overflow."""
    e = exp(-abs(x))
    large = type(x)(1) / (type(x)(1) + e)
    small = e * large
    return (small, large) if x < type(x)(0) else (large, small)


@inlined
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^−x)."""
    e = exp(-abs(x))
    one = type(x)(1)
    return (e if x < type(x)(0) else one) / (one + e)


@inlined
def tanh(x: Any) -> Any:
    """−u / (2 + u) with u = e^(−2|x|) − 1, and the sign of x."""
    u = expm1(type(x)(-2) * abs(x))
    return np.copysign(u / (type(x)(2) + u), x)


# The normal distribution

# Φ(−m) e^(m²/2) = numerator / denominator for 0 ≤ m ≤ 13.3 and 37.7, where Φ(−m) underflows: 5.0e-9 and 4.8e-17.
mills_numerator = polynomial(
    [0.5, 0.4356928390887701, 0.18131152597921324, 0.03998575982327623, 0.0040204205560362555],
    [
        0.5,
        0.7740332770998524,
        0.5928291371472306,
        0.2884638245845217,
        0.09730964931718256,
        0.02350344751125033,
        0.004064061822499627,
        0.0004867686924949669,
        3.692309812879535e-05,
        1.370976808377681e-06,
    ],
)
mills_denominator = polynomial(
    [1, 1.6692705971096242, 1.1945041526180749, 0.46439290008735784, 0.10023681496000914, 0.010077556683555398],
    [
        1,
        2.3459511150025607,
        2.5574564493535745,
        1.7104686277965306,
        0.7795803088585875,
        0.2539210933343281,
        0.06012768164554026,
        0.010279644743818228,
        0.001223584697262742,
        9.255248175424143e-05,
        3.436529231754522e-06,
    ],
)

# Φ(−m) is 0 from there on, and `rounding_to_half` leaves 12 and 26 significant bits of what is below: their square is
# exact, and little is left out.
largest_deviation = constant(16, 40)
rounding_to_half = constant(1.5 * 2**15, 1.5 * 2**32)

ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


@inlined
def normal_cdf_and_pdf(z: Any) -> Any:
    """(Φ(z), φ(z)): Φ(−|z|) is a quotient of polynomials times e^(−z²/2), and Φ(|z|) = 1 − Φ(−|z|).

    z² = h² + (m − h)(m + h), with m = |z| and its leading half h: rounding z² would cost Φ(−13) six bits.
    """
    largest, shift, half = largest_deviation(z), rounding_to_half(z), type(z)(0.5)
    m = abs(z)
    m = largest if m > largest else m
    h = (m + shift) - shift
    e = exp_of_sum(-half * h * h, -half * (m - h) * (m + h))
    tail = e * (mills_numerator(m) / mills_denominator(m))
    return type(z)(1) - tail if z > type(z)(0) else tail, type(z)(ONE_OVER_SQRT_2PI) * e


@inlined
def normal_cdf(z: Any) -> Any:
    """Φ(z) = ½ erfc(−z / √2)."""
    return normal_cdf_and_pdf(z)[0]


@inlined
def normal_pdf(z: Any) -> Any:
    """φ(z) = e^(−z²/2) / √(2π)."""
    return normal_cdf_and_pdf(z)[1]


# sin and cos

PI = Fraction("3.1415926535897932384626433832795028841972")

one_over_pi = constant(1 / math.pi, 1 / math.pi)
pi_high, pi_middle, pi_low = map(constant, parts(PI, 9, 3), parts(PI, 34, 3))

largest_angle = constant(1e4, 1e5)

# sin(r) / r as a polynomial in r², |r| ≤ ½π: 4.3e-9 and 2.1e-19.
sin_ratio = polynomial(
    [1, -0.16666657950701377, 0.008333050060141354, -0.00019808999349939558, 2.605049014114497e-06],
    [
        1,
        -0.16666666666666666,
        0.008333333333333186,
        -0.00019841269841208324,
        2.7557319211167214e-06,
        -2.505210688462859e-08,
        1.6058940567795462e-10,
        -7.643018158089179e-13,
        2.721483245181142e-15,
    ],
)


@inlined
def shifted_sin(x: Any, offset: Any) -> Any:
    """sin(x + offset · π) = ± sin(r) with r = x − (n − offset)π, |r| ≤ ½π; offset is 0 or ½."""
    shift = rounding(x)
    k = (x * one_over_pi(x) + offset) + shift
    n = (k - shift) - offset
    r = ((x - n * pi_high(x)) - n * pi_middle(x)) - n * pi_low(x)
    return negate_if_odd(r * sin_ratio(r * r), k)


@inlined
def sin(x: Any) -> Any:
    """sin(x), to the same absolute accuracy for all |x| ≤ `largest_angle`."""
    return shifted_sin(x, type(x)(0))


@inlined
def cos(x: Any) -> Any:
    """cos(x) = sin(x + ½π), likewise."""
    return shifted_sin(x, type(x)(0.5))
