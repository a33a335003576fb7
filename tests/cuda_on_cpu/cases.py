"""Small cases of every kernel of `kernels/cuda/`, each compared with NumPy: what `mutate.py` kills mutants with.

A case is a function of a `Device`. Shapes are odd and small, with more than one tile and more than one turn of the ring
of stages; operands aligned and not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import backprop_gpu as bp
from backprop_gpu import losses
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.backends.cuda_kernels import Kernels, Whole, step_numbers, stretches
from backprop_gpu.backends.cuda_plan import NUMBERS, TILES, Parts, Tile
from backprop_gpu.backends.numpy import DERIVATIVE, FORWARD, OUTPUT_FORWARD

__all__ = ["CASES", "Case", "Device"]

TOLERANCE = {"float32": 1e-5, "tf32": 1e-5, "float64": 1e-12, "bfloat16": 2**-8, "float16": 2**-10}
"""Largest error relative to the largest entry: of sums, or, for 16-bit numbers, of rounding the result."""

REFERENCE = bp.get_backend("numpy")


class Device:
    """An emulated device, and the kernels of a folder on it."""

    def __init__(self, cp: Any, folder: Path | None = None) -> None:
        self.cp = cp
        self.kernels = Kernels(cp)
        self.kernels.folder = folder or self.kernels.folder

    def put(self, x: Any, dtype: str, *, aligned: bool = True) -> Any:
        """A copy of `x`: 512-byte aligned, or one entry beyond that."""
        host = stored(np.asarray(x), dtype)
        padded = np.concatenate([np.zeros(0 if aligned else 1, host.dtype), host.ravel()])
        return self.cp.asarray(padded)[padded.size - host.size :].reshape(host.shape)

    def hole(self, shape: tuple[int, ...], dtype: str, *, aligned: bool = True) -> Any:
        """An array that a kernel has to fill: NaN, and unwritten."""
        size = int(np.prod(shape))
        return self.cp.empty((size + (not aligned),), NUMBERS[dtype].array)[int(not aligned) :].reshape(shape)

    def get(self, x: Any, dtype: str = "") -> np.ndarray:
        """In float64, or as it is where it holds no numbers to compute in."""
        host = self.cp.asnumpy(x)
        if host.dtype == np.uint16:
            host = unpacked(host, dtype)
        return host.astype(np.float64) if host.dtype.kind == "f" else host


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x`, which `dtype` holds exactly, as it lies in memory."""
    if dtype == "bfloat16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return x.astype("float32" if dtype == "tf32" else dtype)


def unpacked(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view(np.float16)


def representable(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` in float64, with no more digits than `dtype` has."""
    if dtype in ("tf32", "bfloat16"):
        digits = 13 if dtype == "tf32" else 16
        return (x.astype(np.float32).view(np.uint32) >> digits << digits).view(np.float32).astype(np.float64)
    return x.astype(dtype).astype(np.float64)


def normal(seed: int, *shape: int, dtype: str = "float64", scale: float = 1.0) -> np.ndarray:
    return representable(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within the tolerance of the largest entry; NaN and infinities in the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    assert finite.any()
    scale = np.abs(expected[finite]).max()
    assert scale > 0
    assert np.abs(actual[finite] - expected[finite]).max() <= tolerance * scale


def assert_each_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Every entry within the tolerance of itself."""
    with np.errstate(under="ignore"):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * 1e-3)


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    """The .cu file whose kernel it launches."""
    words: tuple[str, ...]
    """Names in the sources that it is about: mutate.py begins with the cases of the struct that it has changed."""
    run: Callable[[Device], None]


# Products


def _shape(tile: Tile, along: int, aligned: bool) -> tuple[int, int, int]:
    """(m, n, k) of a product with more than one tile each way, all of them with tails; the ring goes round."""
    if aligned:  # rows of a multiple of 16 bytes
        return tile.m + 8, tile.n + 24, along * tile.k + 8
    return tile.m + 5, tile.n + 11, along * tile.k + 7


def dense_forward(tile: Tile, *, aligned: bool, sigma: str, dropout: bool, keep_z: bool, narrow: bool = True) -> Any:
    def run(device: Device) -> None:
        dtype = tile.dtype
        output = dtype if narrow else "float32"  # as an operation by itself returns it
        m, n, k = _shape(tile, tile.stages + 1, aligned)
        a_prev, W, b = normal(1, m, k, dtype=dtype), normal(2, k, n, dtype=dtype), normal(3, n, dtype="float32")
        masked = Dropout(0.3, 2**40 + 3, 2, 2**32 - 2) if dropout else None
        counter = device.cp.asarray(np.array([5], np.uint32))
        a = device.hole((m, n), output, aligned=aligned)
        z = device.hole((m, n), output, aligned=aligned) if keep_z else None
        operands = device.put(a_prev, dtype, aligned=aligned), device.put(W, dtype, aligned=aligned)
        bias = device.put(b, "float64" if dtype == "float64" else "float32", aligned=aligned)
        settings = {"dtype": dtype, "tile": tile}
        device.kernels.dense_forward(*operands, bias, a, z, sigma, masked, counter, **settings)()
        if masked:
            masked = replace_step(masked, masked.step + 5)
        expected_z = np.empty((m, n))
        expected, _ = REFERENCE.dense_forward(a_prev, W, b, sigma, dropout=masked, z=expected_z)
        assert_close(device.get(a, output), expected, TOLERANCE[output])
        if masked:
            assert np.array_equal(device.get(a, output) == 0, expected == 0)
        if keep_z:
            assert_close(device.get(z, output), expected_z, TOLERANCE[output])

    return run


def replace_step(dropout: Dropout, step: int) -> Dropout:
    return dropout._replace(step=step % 2**32)


def dense_backward(tile: Tile, *, aligned: bool, sigma: str, dropout: bool) -> Any:
    def run(device: Device) -> None:
        dtype = tile.dtype
        m, n, k = _shape(tile, tile.stages + 1, aligned)
        delta_next, W_next = normal(1, m, k, dtype=dtype), normal(2, n, k, dtype=dtype)
        kept = normal(3, m, n, dtype=dtype)
        if bp.ACTIVATIONS[sigma].derivative_from == "a":
            kept = representable(FORWARD[sigma](kept), dtype)
        masked = Dropout(0.4, 77, 1, 3) if dropout else None
        counter = device.cp.asarray(np.array([2], np.uint32))
        delta = device.hole((m, n), dtype, aligned=aligned)
        operands = [device.put(x, dtype, aligned=aligned) for x in (delta_next, W_next, kept)]
        settings = {"dtype": dtype, "tile": tile}
        device.kernels.dense_backward(*operands, delta, sigma, masked, counter, **settings)()
        if masked:
            masked = replace_step(masked, masked.step + 2)
        expected = REFERENCE.dense_backward(delta_next, W_next, kept, sigma, dropout=masked)
        assert_close(device.get(delta, dtype), expected, TOLERANCE[dtype])

    return run


class WholeGradients:
    """The arrays of `Whole`, as an operation or a step gives them, and what has to be in them afterwards."""

    def __init__(self, device: Device, n_in: int, n_out: int, dtype: str, *, of_step: bool) -> None:
        self.device, self.of_step, cp = device, of_step, device.cp
        self.W, self.before = normal(5, n_in, n_out, dtype=dtype), normal(6, n_in + 1, n_out, dtype=dtype)
        self.alpha, self.scale = 0.3, 512.0 if of_step else 1.0
        aligned = n_out % 8 == 0
        if of_step:
            dW, db = (device.hole(shape, dtype, aligned=aligned) for shape in ((n_in, n_out), (n_out,)))
            numbers = np.array([[9, 9, 9, 9, 9], [9, self.alpha, 9, 9, 9]], np.float64)
            self.whole = Whole(
                dW,
                db,
                device.put(self.W, dtype, aligned=not aligned),
                numbers=cp.asarray(numbers),
                steps_done=cp.asarray(np.array([1], np.uint32)),
                loss_scale=cp.asarray(np.array([self.scale, 3.0])),
                squares=device.hole((1,), "float64"),
            )
        else:
            dW, db = (device.put(x, dtype, aligned=aligned) for x in (self.before[:-1], self.before[-1]))
            self.whole = Whole(dW, db, device.put(self.W, dtype), self.alpha, accumulate=True)

    def check(self, dW: np.ndarray, db: np.ndarray, tolerance: float) -> None:
        """Of the gradients that the parts make together."""
        before = 0 if self.of_step else self.before
        expected = np.vstack([dW, db]) / self.scale + before
        expected[:-1] += self.alpha * self.W
        assert_close(self.device.get(self.whole.dW), expected[:-1], tolerance)
        assert_close(self.device.get(self.whole.db), expected[-1], tolerance)
        if self.of_step:
            assert_each_close(self.device.get(self.whole.squares)[0], np.sum(expected**2), 10 * tolerance)


def dense_gradients(
    tile: Tile, *, aligned: bool, of_step: bool | None = None, n_parts: int = 3, one_tile: bool = False
) -> Any:
    def run(device: Device) -> None:
        dtype = tile.dtype
        output = "float64" if dtype == "float64" else "float32"
        n_in, n_out, rows_per_part = *_shape(tile, 0, aligned)[:2], (tile.stages + 1) * tile.k
        if one_tile:
            n_in, n_out = tile.m - 8, tile.n - 8
        n_rows = (n_parts - 1) * rows_per_part + tile.k + 3
        a_prev, delta = normal(1, n_rows, n_in, dtype=dtype), normal(2, n_rows, n_out, dtype=dtype)
        dW, db = device.hole((n_parts, n_in, n_out), output), device.hole((n_parts, n_out), output)
        operands = device.put(a_prev, dtype, aligned=aligned), device.put(delta, dtype, aligned=aligned)
        whole = None if of_step is None else WholeGradients(device, n_in, n_out, output, of_step=of_step)
        plan = Parts(tile, n_parts, rows_per_part)
        device.kernels.dense_gradients(*operands, dW, db, plan, whole and whole.whole)()
        parts = [slice(i * rows_per_part, (i + 1) * rows_per_part) for i in range(n_parts)]
        tolerance = TOLERANCE[output]
        assert_close(device.get(dW), np.stack([a_prev[p].T @ delta[p] for p in parts]), tolerance)
        assert_close(device.get(db), np.stack([delta[p].sum(axis=0) for p in parts]), tolerance)
        if whole:
            whole.check(a_prev.T @ delta, delta.sum(axis=0), tolerance)

    return run


def whole_gradients(n_in: int, n_out: int, n_parts: int, dtype: str, *, of_step: bool) -> Any:
    def run(device: Device) -> None:
        dW, db = normal(1, n_parts, n_in, n_out, dtype=dtype), normal(2, n_parts, n_out, dtype=dtype)
        whole = WholeGradients(device, n_in, n_out, dtype, of_step=of_step)
        device.kernels.whole_gradients(device.put(dW, dtype), device.put(db, dtype), whole.whole)()
        whole.check(dW.sum(axis=0), db.sum(axis=0), TOLERANCE[dtype])

    return run


def _products() -> Iterator[Case]:
    """Tiles of which each has something of its own: two passes, slices, narrow, of two kinds of numbers."""
    float32, float64, tf32, bfloat16, float16 = (TILES[dtype] for dtype in NUMBERS)
    tiles = (float32[4], bfloat16[4], float64[1], tf32[3], float32[1], float16[1], float32[0], bfloat16[0])
    sigmas = itertools.cycle(("silu", "tanh"))
    for i, (tile, sigma) in enumerate(zip(tiles, sigmas, strict=False)):
        math = "Simt" if tile.dtype in ("float32", "float64") else "TensorCores"
        words = (math, {"tf32": "Tf32", "bfloat16": "Bf16", "float16": "F16"}.get(tile.dtype, "Fragment"))
        name = f"{tile.expression} {{}}"
        aligned = i % 2 == 0
        for at in (aligned, not aligned) if i < 4 else (aligned,):
            suffix = "aligned" if at else "misaligned"
            settings = {"aligned": at, "sigma": sigma, "dropout": i % 3 == 0}
            yield Case(
                f"dense_forward {name.format(suffix)}",
                "dense_forward",
                (*words, "dense_forward", "dropout.cuh"),
                dense_forward(tile, keep_z=i % 3 < 2, narrow=at or math == "Simt", **settings),
            )
            yield Case(
                f"dense_backward {name.format(suffix)}",
                "dense_backward",
                (*words, "dense_backward", "dropout.cuh"),
                dense_backward(tile, **settings),
            )
            yield Case(
                f"dense_gradients {name.format(suffix)}",
                "dense_gradients",
                (*words, "dense_gradients", "ColumnSums", "WholeGradients", "gradients.cuh"),
                dense_gradients(tile, aligned=at, of_step=(True, False, None)[i % 3], n_parts=1 + 2 * (i < 4)),
            )


def _one_tile() -> Iterator[Case]:
    """Where one block of each part does all."""
    for tile, of_step in ((TILES["float32"][2], True), (TILES["float32"][2], None)):
        run = dense_gradients(tile, aligned=True, of_step=of_step, one_tile=True)
        yield Case(f"dense_gradients {tile.expression} one tile", "dense_gradients", ("dense_gradients",), run)


def tf32_rounding(tile: Tile) -> Any:
    """Operands of more digits than tf32 has are rounded to the nearest, not cut off."""

    def run(device: Device) -> None:
        m, n, k = _shape(tile, 1, aligned=True)
        a_prev, W = normal(1, m, k, dtype="float32"), normal(2, k, n, dtype="float32")
        a, b = device.hole((m, n), "float32"), device.put(np.zeros(n), "float32")
        operands = device.put(a_prev, "float32"), device.put(W, "float32")
        device.kernels.dense_forward(*operands, b, a, None, "identity", None, dtype="tf32", tile=tile)()
        assert_close(device.get(a), nearest_tf32(a_prev) @ nearest_tf32(W), TOLERANCE["tf32"])

    return run


def nearest_tf32(x: np.ndarray) -> np.ndarray:
    """Ties away from zero; in float64."""
    bits = x.astype(np.float32).view(np.uint32) + np.uint32(1 << 12)
    return (bits >> 13 << 13).view(np.float32).astype(np.float64)


def _tf32() -> Iterator[Case]:
    tile = TILES["tf32"][3]
    yield Case(f"dense_forward {tile.expression} rounds", "dense_forward", ("Tf32", "TensorCores"), tf32_rounding(tile))


def forward_pass(dtype: str, n: int, *misaligned: str, keep_z: bool = True, dropout: bool = False) -> Any:
    """What follows a product, where rows are of whole quads but for some arrays that begin between them."""

    def run(device: Device) -> None:
        m, output = 37, dtype if dtype in ("float32", "float64") else "float32"
        product, b = normal(1, m, n, dtype=output), normal(2, n, dtype=output)
        masked = Dropout(0.3, 5, 2, 1) if dropout else None
        counter = device.cp.asarray(np.array([5], np.uint32))
        a = device.hole((m, n), dtype, aligned="a" not in misaligned)
        z = device.hole((m, n), dtype, aligned="z" not in misaligned) if keep_z else None
        source = device.put(product, output, aligned="product" not in misaligned)
        bias = device.put(b, output, aligned="b" not in misaligned)
        device.kernels.dense_forward_pass(source, bias, a, z, "silu", masked, counter, dtype=dtype)()
        masked = masked and replace_step(masked, 6)
        expected, _ = REFERENCE.dense_forward(product, np.eye(n), b, "silu", dropout=masked)
        assert_close(device.get(a, dtype), expected, TOLERANCE[dtype])
        if keep_z:
            assert_close(device.get(z, dtype), product + b, TOLERANCE[dtype])

    return run


def backward_pass(dtype: str, n: int, *misaligned: str, dropout: bool = False) -> Any:
    """As `forward_pass`."""

    def run(device: Device) -> None:
        m, output = 37, dtype if dtype in ("float32", "float64") else "float32"
        product, kept = normal(1, m, n, dtype=output), normal(3, m, n, dtype=dtype)
        masked = Dropout(0.4, 7, 1, 3) if dropout else None
        counter = device.cp.asarray(np.array([2], np.uint32))
        delta = device.hole((m, n), dtype, aligned="delta" not in misaligned)
        source = device.put(product, output, aligned="product" not in misaligned)
        of_sigma = device.put(kept, dtype, aligned="kept" not in misaligned)
        device.kernels.dense_backward_pass(source, of_sigma, delta, "tanh", masked, counter, dtype=dtype)()
        masked = masked and replace_step(masked, 5)
        expected = REFERENCE.dense_backward(product, np.eye(n), kept, "tanh", dropout=masked)
        assert_close(device.get(delta, dtype), expected, TOLERANCE[dtype])

    return run


def bias_gradients(dtype: str, n_out: int) -> Any:
    def run(device: Device) -> None:
        output = "float64" if dtype == "float64" else "float32"
        delta, db = normal(1, 45, n_out, dtype=dtype), device.hole((3, n_out), output)
        plan = Parts(TILES[dtype][0], 3, 16)
        device.kernels.bias_gradients(device.put(delta, dtype), db, plan, dtype=dtype)()
        expected = np.stack([delta[i : i + 16].sum(axis=0) for i in (0, 16, 32)])
        assert_close(device.get(db), expected, TOLERANCE[output])

    return run


def _passes() -> Iterator[Case]:
    forward, backward = ("dense_forward", "Forward"), ("dense_backward", "Backward")
    for misaligned in ((), ("a",), ("z",), ("b",), ("product",)):
        run = forward_pass("float32", 40, *misaligned, dropout=not misaligned)
        yield Case(f"dense_forward_pass {misaligned}", "dense_forward", (*forward, "dense_forward_pass"), run)
    run = forward_pass("bfloat16", 43, keep_z=False)
    yield Case("dense_forward_pass in tails", "dense_forward", (*forward, "for_each_quad_of"), run)
    run = forward_pass("float64", 40, "a", keep_z=False)
    yield Case("dense_forward_pass without z", "dense_forward", forward, run)
    for misaligned in ((), ("delta",), ("kept",), ("product",)):
        run = backward_pass("float64", 40, *misaligned, dropout=not misaligned)
        yield Case(f"dense_backward_pass {misaligned}", "dense_backward", (*backward, "dense_backward_pass"), run)
    run = backward_pass("float16", 43)
    yield Case("dense_backward_pass in tails", "dense_backward", backward, run)
    for dtype, n_out in (("float64", 7), ("bfloat16", 131)):
        run = bias_gradients(dtype, n_out)
        yield Case("bias_gradients", "dense_gradients", ("bias_gradients",), run)
    for n_in, n_out, dtype, of_step in ((41, 13, "float32", True), (31, 16, "float64", False), (7, 8, "float32", True)):
        run = whole_gradients(n_in, n_out, 3, dtype, of_step=of_step)
        yield Case("whole_gradients", "dense_gradients", ("whole_gradients", "WholeGradients", "gradients.cuh"), run)


# Activations

SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-30, -1e-30, 50, -50, 999, -999, 1001, -1001, 1e30, -1e30])


def _arguments(sigma: str, dtype: str) -> np.ndarray:
    z = np.concatenate([SPECIAL, np.linspace(-9, 9, 201)])
    if sigma == "sine":  # up to the largest number, on both sides of where it is reduced in another way
        exponents = np.arange(0, 127 if dtype == "float32" else 1023, 1.75)
        z = np.concatenate([z, *(sign * 2**exponents for sign in (1, -1)), np.ldexp(1.1, [23, 24, 51, 52])])
    return z.astype(dtype).astype(np.float64)


def activation(sigma: str, dtype: str) -> Any:
    def run(device: Device) -> None:
        z, tolerance = _arguments(sigma, dtype), 10 * TOLERANCE[dtype]
        with np.errstate(all="ignore"):
            expected = OUTPUT_FORWARD[sigma](z.astype(dtype))
        a = device.hole((1, z.size), dtype)
        device.kernels.output_forward(device.put(z[None], dtype), a, sigma)()
        assert_each_close(device.get(a)[0], expected.astype(np.float64), tolerance)
        if sigma == "exp":
            return
        kept = expected if bp.ACTIVATIONS[sigma].derivative_from == "a" else z
        delta = device.hole((1, z.size), dtype)
        ones = device.put(np.ones((1, 1)), dtype), device.put(np.ones((z.size, 1)), dtype)
        settings = {"dtype": dtype, "tile": TILES[dtype][-1]}
        device.kernels.dense_backward(*ones, device.put(kept[None], dtype), delta, sigma, None, **settings)()
        with np.errstate(all="ignore"):
            expected = DERIVATIVE[sigma](kept.astype(dtype))
        assert_each_close(device.get(delta)[0], expected.astype(np.float64), tolerance)

    return run


def _activations() -> Iterator[Case]:
    for i, sigma in enumerate([*bp.ACTIVATIONS, "exp"]):
        words = ("".join(word.title() for word in sigma.split("_")), *HELPERS.get(sigma, ()))
        dtype = ("float64", "float32")[i % 2]
        yield Case(f"activation {sigma} {dtype}", "output_forward", words, activation(sigma, dtype))


HELPERS = {
    "sigmoid": ("sigmoid",),
    "softplus": ("softplus",),
    "gelu": ("normal_cdf", "normal_pdf", "gated"),
    "silu": ("gated",),
    "gelu_tanh": ("gelu_tanh_inner",),
}


def elementwise(*misaligned: str, n: int = 1028) -> Any:
    def run(device: Device) -> None:
        z, a = normal(1, 1, n), device.hole((1, n), "float64", aligned="a" not in misaligned)
        device.kernels.output_forward(device.put(z, "float64", aligned="z" not in misaligned), a, "tanh")()
        assert_close(device.get(a), np.tanh(z), TOLERANCE["float64"])

    return run


def softmax(n_rows: int, n_out: int, dtype: str) -> Any:
    def run(device: Device) -> None:
        z = _scores(n_rows, n_out, dtype)
        a = device.hole(z.shape, dtype)
        device.kernels.output_forward(device.put(z, dtype), a, "softmax")()
        expected = REFERENCE.output_forward(z.astype(dtype), "softmax").astype(np.float64)
        assert_each_close(device.get(a), expected, 10 * TOLERANCE[dtype])

    return run


def _scores(n_rows: int, n_out: int, dtype: str) -> np.ndarray:
    """Rows with infinities, with equal entries, and with large ones."""
    z = normal(4, n_rows, n_out, scale=3.0).astype(dtype).astype(np.float64)
    z[1], z[2] = 1e4, z[2] + 300
    if n_out > 1:
        z[3, 1], z[4, 0], z[5, :2], z[6, n_out - 1] = np.inf, -np.inf, np.inf, 1e20
        z[7] = -np.inf
    return z.astype(dtype).astype(np.float64)


# The output layer


def output_delta(
    loss: losses.Loss,
    n_rows: int,
    n_out: int,
    dtype: str,
    *,
    sigma: str | None = None,
    labels: bool = False,
    ordered: bool = False,
    weighted: bool = False,
    moderate: bool = False,
    output: str = "",
) -> Any:
    """Of awkward scores, some of which cost so much that all others are lost in the sum; or of moderate ones."""
    sigma = losses.output_activation(loss, sigma)
    output = output or dtype

    def run(device: Device) -> None:
        rng = np.random.default_rng(8)
        n_data = 3 * n_rows if ordered else n_rows
        order = rng.permutation(n_data).astype(np.int64) if ordered else None
        step, batch_size = (1, n_rows + 2) if ordered else (0, 0)
        places = slice(step * batch_size, step * batch_size + n_rows)
        rows = order[places] if ordered else slice(None)
        z, target = _scores_and_target(loss, sigma, rng, n_rows, n_out, n_data, dtype, labels)
        if moderate:
            z = normal(4, n_rows, n_out, dtype=dtype)
        weight = rng.integers(0, 3, n_rows).astype(dtype) if weighted else None
        if weighted:
            weight[3] = 0
        share = None
        if weighted:
            share = np.full(n_data, np.nan)
            share[places] = weight / weight.sum()
        scale = 1024.0 if output == "float16" else None
        put, kernels, cp = device.put, device.kernels, device.cp
        delta, C = device.hole(z.shape, output), device.hole((3,), "float64")
        kernels.output_delta(
            put(z, dtype),
            cp.asarray(target) if labels else put(target, dtype),
            delta,
            C,
            loss,
            sigma,
            order=None if order is None else cp.asarray(order),
            share=None if share is None else cp.asarray(share),
            steps_done=cp.asarray(np.array([step], np.uint32)) if ordered else None,
            batch_size=batch_size,
            delta_scale=None if scale is None else cp.asarray(np.array([scale])),
            scratch=kernels.scratch(kernels.output_delta_blocks(*z.shape)),
            dtype=output,
        )()
        of_rows = target[rows] if labels else target[rows].astype(dtype)
        expected_C, expected = REFERENCE.output_delta(
            z.astype(dtype), of_rows, loss, output_activation=sigma, sample_weight=weight
        )
        assert_each_close(device.get(C)[step], expected_C, 10 * TOLERANCE[dtype])
        assert_close(device.get(delta, output), expected.astype(np.float64) * (scale or 1.0), TOLERANCE[output])

    return run


def _scores_and_target(
    loss: losses.Loss,
    sigma: str,
    rng: np.random.Generator,
    n_rows: int,
    n_out: int,
    n_data: int,
    dtype: str,
    labels: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """z with awkward rows, and a target to match for all data."""
    z = _scores(n_rows, n_out, dtype) if sigma in ("softmax", "sigmoid") else normal(4, n_rows, n_out)
    if labels:
        return z, rng.integers(0, n_out, n_data).astype(np.int32)
    target = rng.random((n_data, n_out))
    if loss.name == "poisson":
        target = rng.integers(0, 4, (n_data, n_out)).astype(np.float64)
    if sigma == "sigmoid" and n_out > 1:
        z[7] = 0.5
    if loss.name in ("absolute_error", "huber"):
        target = np.round(4 * target) - 2
        z[0] = np.round(z[0])  # some errors of exactly 0
    return z, target.astype(dtype).astype(np.float64)


def shares(n_rows: int, weight_sum: bool) -> Any:
    def run(device: Device) -> None:
        weight = np.random.default_rng(3).integers(0, 5, n_rows).astype(np.float32) * weight_sum
        share = device.hole((n_rows,), "float64")
        device.kernels.shares(device.put(weight, "float32"), share)()
        expected = weight.astype(np.float64)
        if weight_sum:
            assert_each_close(device.get(share), expected / expected.sum(), 1e-12)
        else:
            assert not device.get(share).any()

    return run


def _output_layer() -> Iterator[Case]:
    for n_out, dtype in ((11, "float64"), (3, "float32"), (150, "float32")):
        words = ("Softmax", "output_softmax", "lanes_max", "finite", "Limits")
        yield Case(f"softmax {n_out} {dtype}", "output_forward", words, softmax(67, n_out, dtype))
    for misaligned in ("a", "z"):
        yield Case(f"output_forward {misaligned}", "output_forward", ("output_forward",), elementwise(misaligned))
    yield Case("output_forward of whole blocks", "output_forward", ("output_forward",), elementwise(n=1025))
    yield from _losses()
    yield Case("shares", "output_delta", ("shares",), shares(307, True))
    yield Case("shares of nothing", "output_delta", ("shares",), shares(130, False))


def _losses() -> Iterator[Case]:
    smoothed = bp.CrossEntropy(label_smoothing=0.1)
    squared, huber = bp.SquaredError(), bp.Huber(threshold=0.6)
    binary = bp.BinaryCrossEntropy()
    rows: tuple[tuple[tuple[str, ...], Any], ...] = (
        (("CrossEntropy", "Softmax"), output_delta(smoothed, 41, 11, "float64", labels=True, ordered=True)),
        (("CrossEntropy", "output_delta"), output_delta(smoothed, 37, 5, "float32", weighted=True)),
        (("CrossEntropy",), output_delta(bp.CrossEntropy(), 9, 150, "float32", labels=True, output="bfloat16")),
        (("CrossEntropy", "Softmax"), output_delta(smoothed, 41, 11, "float64", moderate=True)),
        (("BinaryCrossEntropyEntry",), output_delta(binary, 41, 7, "float64", moderate=True)),
        (("BinaryCrossEntropyEntry",), output_delta(binary, 131, 7, "float64", weighted=True)),
        (("BinaryCrossEntropyEntry",), output_delta(binary, 140, 1, "float32", ordered=True, output="float16")),
        (("PoissonEntry",), output_delta(bp.Poisson(), 131, 3, "float64", ordered=True, weighted=True)),
        (("OfError", "Squared", "Elementwise"), output_delta(squared, 131, 2, "float64", sigma="tanh", weighted=True)),
        (("OfError", "Squared"), output_delta(squared, 37, 2, "float64", sigma="silu", ordered=True)),
        (("Absolute",), output_delta(bp.AbsoluteError(), 37, 5, "float64", sigma="identity")),
        (("HuberError",), output_delta(huber, 37, 5, "float64", sigma="identity", ordered=True)),
    )
    for words, run in rows:
        yield Case(f"output_delta {len(rows)} {words[0]}", "output_delta", ("output_delta", *words), run)


# The flat vector

COUNTS = (519, 36, 701, 13)
"""Of W[0], W[1], b[0], b[1]: some begin where quads fit, and some do not."""


def update(
    optimizer: bp.optimizers.Optimizer,
    dtype: str,
    *misaligned: str,
    squares: tuple[float, ...] = (),
    loss_scale: tuple[float, float] | None = None,
    copy: str = "",
) -> Any:
    """With squares, gradients are whole, and clipped by what these say of the norm."""

    def run(device: Device) -> None:
        n, n_weights = sum(COUNTS), sum(COUNTS[:2])
        whole, norm = bool(squares), np.sqrt(sum(squares))
        scale_of_loss = device.cp.asarray(np.array(loss_scale)) if loss_scale else None
        n_parts = [1] * 4 if whole else [3, 1, 2, 4]
        table = stretches([(count, k, i < 2) for i, (count, k) in enumerate(zip(COUNTS, n_parts, strict=True))])
        if whole:
            table = stretches([(count, 1, i < 2) for i, count in enumerate(COUNTS)], 1)
        parts = normal(1, int(table[-1, 2] + table[-1, 1] * table[-1, 3]), dtype=dtype)
        g = np.concatenate(
            [parts[row[2] : row[2] + row[1] * row[3]].reshape(row[3], row[1]).sum(axis=0) for row in table]
        )
        parameters = normal(2, n, dtype=dtype)
        state = {slot: np.abs(normal(3 + i, n, dtype=dtype)) for i, slot in enumerate(optimizer.slots)}
        rates, alphas = np.array([0.1, 0.02, 0.3]), np.array([0.0, 0.05, 0.4])
        first, step = 6, 1
        put, cp, kernels = device.put, device.cp, device.kernels
        on_device = put(parameters, dtype, aligned="parameters" not in misaligned)
        slots = [put(state[slot], dtype, aligned=slot not in misaligned) for slot in optimizer.slots]
        counters = cp.asarray(np.array([step, 40], np.uint32))
        losses_before = np.array([1.0, 2.0, 3.0])
        C = cp.asarray(losses_before)
        narrow = device.hole((n,), copy, aligned="copy" not in misaligned) if copy else None
        n_blocks = kernels.parameter_blocks(list(COUNTS))
        kernels.update(
            on_device,
            slots,
            put(parts, dtype, aligned="parts" not in misaligned),
            cp.asarray(table),
            n_blocks,
            optimizer,
            numbers=cp.asarray(step_numbers(optimizer, rates, alphas, first)),
            squares=cp.asarray(np.array(squares)) if whole else None,
            loss_scale=scale_of_loss,
            counters=counters,
            losses=C,
            scratch=kernels.scratch(n_blocks),
            copy=narrow,
            dtype=copy,
        )()
        left_out = loss_scale is not None and not np.isfinite(norm)
        losses_before[step] += 0 if left_out else 0.5 * alphas[step] * np.sum(parameters[:n_weights] ** 2)
        if whole:
            limit = np.inf if optimizer.clip_norm is None else optimizer.clip_norm
            g = g * (1 if norm <= limit else limit / norm if np.isfinite(norm) else np.nan)
        else:
            g[:n_weights] += alphas[step] * parameters[:n_weights]
        expected = {slot: vector.copy() for slot, vector in state.items()}
        if not left_out:
            plain = replace(optimizer, clip_norm=None)
            settings = {"learning_rate": rates[step], "step": first + step + 1, "n_weights": n_weights}
            REFERENCE.update(parameters, g, expected, plain, **settings)
        tolerance = TOLERANCE[dtype]
        if whole and not left_out and not np.isfinite(norm):
            assert np.isnan(device.get(on_device)).all()
            return
        assert_close(device.get(on_device), parameters, tolerance)
        for slot, vector in zip(optimizer.slots, slots, strict=True):
            assert_close(device.get(vector), expected[slot], tolerance)
        assert_each_close(device.get(C), losses_before, tolerance)
        assert device.get(counters).tolist() == [step + 1, 41]
        if copy and not left_out:
            assert_close(device.get(narrow, copy), parameters, TOLERANCE[copy])
        if loss_scale:
            scale, since = (loss_scale[0] / 2, 0) if left_out else (loss_scale[0], loss_scale[1] + 1)
            assert device.get(scale_of_loss).tolist() == ([2 * scale, 0] if since == 2000 else [scale, since])

    return run


def sum_squares(n: int, dtype: str) -> Any:
    def run(device: Device) -> None:
        x = normal(1, n, dtype=dtype)
        result = device.hole((1,), "float64")
        launch = device.kernels.sum_squares(device.put(x, dtype), result)
        for _ in range(2):  # as in a graph, on the same scratch
            result[...] = 0.0
            launch()
            assert_each_close(device.get(result), np.array([np.dot(x, x)]), 1e-12)

    return run


def _flat_vector() -> Iterator[Case]:
    nesterov = bp.SGD(momentum=0.9, nesterov=True)
    adam, adamw = bp.Adam(epsilon=1e-3), bp.AdamW(epsilon=1e-3, weight_decay=0.3)
    clipped = replace(adam, clip_norm=0.9)
    for words, run in (
        (("Adam", "sum_of_parts", "Place", "Stretch"), update(adamw, "float64")),
        (("Sgd",), update(nesterov, "float32", copy="bfloat16")),
        (("Sgd",), update(bp.SGD(momentum=0.8), "float64")),
        (("RMSprop",), update(bp.RMSprop(epsilon=1e-3), "float64")),
        (("Adam", "clipping_of"), update(clipped, "float32", squares=(4.0, 0.0, 5.0), copy="float16")),
        (("LossScale", "clipping_of"), update(clipped, "float32", squares=(0.3, 0.3), loss_scale=(512.0, 1999.0))),
        (("LossScale", "clipping_of"), update(adam, "float32", squares=(1.0, np.inf), loss_scale=(512.0, 1999.0))),
        (("LossScale",), update(adam, "float32", squares=(1.0, 3.0), loss_scale=(512.0, 3.0))),
        (("clipping_of",), update(clipped, "float32", squares=(1.0, np.inf))),
        (("update",), update(adam, "float32", "m")),
        (("update",), update(adam, "float32", "v")),
        (("update",), update(bp.RMSprop(epsilon=1e-3), "float32", "parameters")),
        (("update",), update(adam, "float32", "parameters", "m")),
        (("update",), update(adam, "float32", "parameters", copy="bfloat16")),
        (("update", "sum_of_parts"), update(nesterov, "float32", "parts", "copy", copy="bfloat16")),
    ):
        yield Case(f"update {words[0]}", "update", ("update", *words), run)
    yield Case("sum_squares", "update", ("sum_squares",), sum_squares(3001, "float32"))
    of_blocks = sum_squares(140_000, "float32")  # more blocks than a block has threads
    yield Case("sum_squares of 137 blocks", "update", ("sum_squares", "grid_sum"), of_blocks)
    yield Case("sum_squares of one block", "update", ("sum_squares",), sum_squares(300, "float64"))


# Rows


def gather(columns: int, data_dtype: str, dtype: str, *misaligned: str) -> Any:
    def run(device: Device) -> None:
        data = normal(1, 23, columns, dtype=dtype)
        order = np.random.default_rng(2).permutation(23).astype(np.int64)
        batch = device.hole((5, columns), dtype, aligned="batch" not in misaligned)
        step = device.cp.asarray(np.array([2], np.uint32))
        source = device.put(data, data_dtype, aligned="data" not in misaligned)
        device.kernels.gather(source, device.cp.asarray(order), step, batch, 7, dtype=dtype)()
        np.testing.assert_array_equal(device.get(batch, dtype), data[order[14:19]])

    return run


def convert(n: int, from_dtype: str, dtype: str, *misaligned: str) -> Any:
    def run(device: Device) -> None:
        x = normal(1, n, dtype="bfloat16" if "bfloat16" in (dtype, from_dtype) else "float16")
        y = device.hole((n,), dtype, aligned="y" not in misaligned)
        narrow = dtype if NUMBERS[dtype].array == "uint16" else from_dtype
        device.kernels.convert(device.put(x, from_dtype, aligned="x" not in misaligned), y, narrow)()
        np.testing.assert_array_equal(device.get(y, dtype), x)

    return run


def _rows() -> Iterator[Case]:
    runs = (
        gather(519, "float32", "float32"),
        gather(520, "float32", "bfloat16"),
        gather(64, "float64", "float64", "data"),
        gather(64, "float32", "float32", "batch"),
        gather(3, "float32", "float16"),
    )
    for run in runs:
        yield Case("gather", "gather", ("gather", "numbers.cuh"), run)
    for run in (
        convert(1027, "float32", "bfloat16"),
        convert(1026, "float16", "float32", "x"),
        convert(1028, "float32", "float16", "y"),
        convert(513, "bfloat16", "float32"),
    ):
        yield Case("convert", "gather", ("convert", "numbers.cuh"), run)


def _numbered(cases: Iterator[Case]) -> tuple[Case, ...]:
    """Each with a name of its own."""
    return tuple(replace(case, name=f"{i:02} {case.name}") for i, case in enumerate(cases))


CASES = _numbered(
    itertools.chain(
        *(_rows(), _activations(), _output_layer(), _flat_vector(), _passes()),
        *(_tf32(), _one_tile(), _products()),
    )
)
"""All of them; together they launch every kernel and enter every struct of the sources."""
