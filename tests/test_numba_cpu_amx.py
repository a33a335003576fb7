"""Products by thirds: float32 as three bfloat16, and Intel's AMX, a unit that multiplies these."""

import ctypes
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

import backprop_gpu as bp

numba = pytest.importorskip("numba")

from backprop_gpu.backends import cpu_plan  # noqa: E402
from backprop_gpu.kernels.numba_cpu import amx, gemm, processor, thirds  # noqa: E402
from backprop_gpu.kernels.numba_cpu.compile import compiled, executable  # noqa: E402
from backprop_gpu.kernels.numba_cpu.panels import round_up  # noqa: E402


def needs_amx(test):
    """Skipped without the unit; marked, for `software_tiles`."""
    reason = "this processor has no AMX, or the system does not allow it"
    return pytest.mark.amx(pytest.mark.skipif(not processor.HAS_AMX, reason=reason)(test))


PANEL, ROWS, STEP = thirds.PANEL, thirds.ROWS, thirds.STEP


def in_panels(x, n_rows):
    """x with n_rows, in panels one after the other; what is none of x is NaN."""
    full = np.full((n_rows, round_up(x.shape[1], PANEL)), np.nan, np.float32)
    full[: len(x), : x.shape[1]] = x
    return np.ascontiguousarray(full.reshape(n_rows, -1, PANEL).transpose(1, 0, 2)).ravel()


def row_major(flat, n_rows, n_columns):
    return flat.reshape(-1, n_rows, PANEL).transpose(1, 0, 2).reshape(n_rows, -1)[:, :n_columns]


def draw(*shape, seed=0):
    """Numbers of many magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)).astype(np.float32)


# The thirds


def nothing(n_rows, depth):
    """Scratch memory in which both of each pair are NaN."""
    return np.full(thirds.entries(n_rows, depth), 0x7FC07FC0, np.uint32).view(np.float32)


def pairs_of(entries):
    """(…, 2): the two bfloat16 of each entry, as float32."""
    bits = entries.view(np.uint32)
    return np.stack([bits << 16, bits & 0xFFFF0000], axis=-1).astype(np.uint32).view(np.float32)


def left_factor(scratch, n_rows, depth):
    """(3, n_rows, whole steps): what `thirds_of_rows` and `thirds_of_columns` have made."""
    n_tiles, n_steps = -(-n_rows // ROWS), -(-depth // STEP)
    tiles = pairs_of(scratch[: n_tiles * n_steps * thirds.LEFT_STEP]).reshape(n_tiles, n_steps, 3, ROWS, ROWS, 2)
    return tiles.transpose(2, 0, 3, 1, 5, 4).reshape(3, n_tiles * ROWS, n_steps * STEP)[:, :n_rows]


def right_factor(scratch, depth):
    """(3, whole steps, PANEL): what `thirds_of_panel` has made."""
    n_steps = -(-depth // STEP)
    tiles = pairs_of(scratch[: n_steps * thirds.RIGHT_STEP]).reshape(n_steps, 3, 2, ROWS, ROWS, 2)
    return tiles.transpose(1, 0, 5, 3, 2, 4).reshape(3, n_steps * STEP, PANEL)


def assert_are_thirds(parts, x):
    """Each a bfloat16, of falling size, whose sum is x without an error; 0 where there is none of x."""
    assert (parts.astype(np.float64).sum(axis=0)[: x.shape[0], : x.shape[1]] == x).all()
    assert (np.abs(parts[1]) <= 2.0**-8 * np.abs(parts[0])).all()
    assert (np.abs(parts[2]) <= 2.0**-8 * np.abs(parts[1])).all()
    assert np.abs(parts).max(axis=(1, 2)).min() > 0
    beyond = parts.copy()
    beyond[:, : x.shape[0], : x.shape[1]] = 0
    assert not beyond.any()


@pytest.mark.parametrize("depth", [1, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 33])
def test_thirds_of_rows(n_rows, depth):
    x, scratch = draw(n_rows, depth), nothing(n_rows, depth)
    executable(thirds.thirds_of_rows.py_func)(in_panels(x, n_rows), 0, n_rows * PANEL, n_rows, depth, scratch, 0)
    assert_are_thirds(left_factor(scratch, n_rows, depth), x)


@pytest.mark.parametrize("depth", [1, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize(("first", "last"), [(0, 8), (0, 16), (8, 32), (24, 40), (40, 96)])
def test_thirds_of_columns(first, last, depth):
    """From a multiple of 8 on, which need not be in the same panel as the 8 columns behind it."""
    x, scratch = draw(depth, 96), nothing(last - first, depth)
    executable(thirds.thirds_of_columns.py_func)(in_panels(x, depth), 0, depth * PANEL, first, last, depth, scratch, 0)
    assert_are_thirds(left_factor(scratch, last - first, depth), x[:, first:last].T)


@pytest.mark.parametrize("first_pair", [0, 4, 16])
@pytest.mark.parametrize("depth", [1, 16, 17, 31, 32, 33, 64, 100])
def test_thirds_of_a_panel(depth, first_pair):
    x, scratch = draw(depth, PANEL), nothing(0, depth)
    executable(thirds.thirds_of_panel.py_func)(in_panels(x, depth), 0, depth, first_pair, scratch, 0)
    row = np.arange(depth)
    there = (row % STEP % ROWS >= first_pair) | (row >= depth // STEP * STEP)  # else somebody else has made them
    parts = right_factor(scratch, depth)
    assert np.isnan(parts[:, :depth][:, ~there]).all()
    if there.any():
        parts[:, :depth][:, ~there] = 0
        assert_are_thirds(parts, np.where(there[:, None], x, 0))


def test_the_thirds_of_what_is_no_number():
    x = np.zeros((4, PANEL), np.float32)
    x[0, 3], x[1, 5], x[2, 7] = np.nan, np.inf, np.float32(3.4e38)
    scratch = np.zeros(thirds.entries(4, PANEL), np.float32)
    executable(thirds.thirds_of_rows.py_func)(in_panels(x, 4), 0, 4 * PANEL, 4, PANEL, scratch, 0)
    with np.errstate(invalid="ignore"):
        total = left_factor(scratch, 4, PANEL).sum(axis=0)
    assert np.isnan(total[[0, 1, 2], [3, 5, 7]]).all()
    assert np.isfinite(total).sum() == total.size - 3


# The products


def scratch_for(n_rows, depth):
    return cpu_plan.zeros(4 * thirds.entries(n_rows, depth)).view(np.float32)


@compiled
def product_nn(A, B, C, shape, bias, scratch):
    amx.begin(A[0])
    gemm._gemm_nn_by_thirds(A, B, C, shape, bias, scratch)
    amx.end(A[0])


@compiled
def product_tn(A, columns, B, c, shape, accumulate, zeros, scratch):
    amx.begin(A[0])
    first, last = columns
    for p in range((shape[1] + 31) // 32):
        C, nothing = (c, p * (last - first) * 32), (c, -1)
        gemm._gemm_tn_by_thirds(A, columns, B, p, C, shape, accumulate, zeros, scratch, p == 0, nothing)
    amx.end(A[0])


product_nn, product_tn = executable(product_nn.py_func), executable(product_tn.py_func)


def assert_is_float32s(actual, A, B, added=0.0):
    """In 2⁻²⁴ Σ |a b|, of which a float32 sum of K products errs by K at the most.

    Measured for K of 32, 64 and 97: 3.8, 5.4 and 5.3, where NumPy errs by 4.3, 5.3 and 6.2.
    """
    exact, size = A.astype(float) @ B + added, np.abs(A.astype(float)) @ np.abs(B) + np.abs(added)
    assert np.isfinite(actual).all()
    assert np.abs(exact).max() > 0
    assert (np.abs(actual - exact) <= 2.0**-24 * (8 + len(B) / 16) * size).all()


@needs_amx
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 64, 97, 160])
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 31, 32, 33, 63, 96, 131])
def test_a_product_is_as_exact_as_float32(n_rows, depth):
    for n_columns in (1, 16, 17, 32, 33, 70, 130):
        A, B, bias = draw(n_rows, depth), draw(depth, n_columns, seed=1), np.zeros(160, np.float32)
        bias[:n_columns] = draw(n_columns, seed=2)
        guard = n_rows + 3
        c = np.full(guard * round_up(n_columns, PANEL), 7, np.float32)
        b = np.nan_to_num(in_panels(B, depth))  # the padding of weights is 0
        a, scratch = in_panels(A, guard), scratch_for(n_rows, depth)
        stride, shape = guard * PANEL, (n_rows, depth, n_columns)
        product_nn((a, 0, stride), (b, 0, depth * PANEL), (c, 0, stride), shape, (bias, 0, PANEL), scratch)
        found = row_major(c, guard, n_columns)
        assert_is_float32s(found[:n_rows], A, B, bias[:n_columns])
        assert (found[n_rows:] == 7).all()


@needs_amx
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 64, 97, 160])
@pytest.mark.parametrize(("first", "last"), [(0, 8), (0, 16), (8, 64), (24, 160), (0, 264)])
def test_a_product_of_columns_is_as_exact_as_float32(first, last, depth):
    for n_columns, accumulate in itertools.product((1, 16, 33, 70, 130), (False, True)):
        A, B = draw(depth, last), draw(depth, n_columns, seed=1)
        c = np.full((last - first) * round_up(n_columns, PANEL), np.nan, np.float32)
        before = draw(last - first, n_columns, seed=2)
        if accumulate:
            c[...] = in_panels(before, last - first)
        b = np.nan_to_num(in_panels(B, depth))
        zeros, scratch = np.zeros(PANEL, np.float32), scratch_for(last - first, depth)
        a, stride = in_panels(A, depth), depth * PANEL
        product_tn((a, 0, stride), (first, last), (b, 0, stride), c, (depth, n_columns), accumulate, zeros, scratch)
        found = row_major(c, last - first, n_columns)
        assert_is_float32s(found, A[:, first:].T, B, before.astype(float) if accumulate else 0.0)
        assert accumulate or not c.reshape(-1, last - first, PANEL)[-1, :, (n_columns - 1) % PANEL + 1 :].any()


@needs_amx
def test_a_long_sum_is_no_less_exact_than_numpys():
    A, B = (np.random.default_rng(seed).random((512, 4096), np.float32) for seed in range(2))
    exact = A.astype(float) @ B.astype(float).T + 3
    c, scratch = np.zeros(512 * 512, np.float32), scratch_for(512, 4096)
    b = in_panels(np.ascontiguousarray(B.T), 4096)
    a, bias = (in_panels(A, 512), 0, 512 * PANEL), (np.full(512, 3, np.float32), 0, PANEL)
    product_nn(a, (b, 0, 4096 * PANEL), (c, 0, 512 * PANEL), (512, 4096, 512), bias, scratch)
    errors = [np.linalg.norm(found - exact) for found in (row_major(c, 512, 512), A @ B.T + 3)]
    assert 0 < errors[0] <= 1.1 * errors[1]


@needs_amx
def test_what_is_no_number_stays_in_its_row_and_its_column():
    A, B = draw(40, 64), draw(64, 40, seed=1)
    A[17, 5], B[9, 33] = np.inf, np.nan
    c, scratch = np.zeros(40 * 64, np.float32), scratch_for(40, 64)
    a, b, bias = (
        (in_panels(A, 40), 0, 40 * PANEL),
        (in_panels(B, 64), 0, 64 * PANEL),
        (np.zeros(64, np.float32), 0, PANEL),
    )
    product_nn(a, b, (c, 0, 40 * PANEL), (40, 64, 40), bias, scratch)
    bad = ~np.isfinite(row_major(c, 40, 40))
    expected = np.zeros((40, 40), bool)
    expected[17], expected[:, 33] = True, True
    assert (bad == expected).all()


def test_only_large_products_of_float32_are_computed_so():
    by_thirds = executable(amx.by_thirds.py_func)
    assert by_thirds(np.zeros(1, np.float32), 128, 784, 256) == processor.HAS_AMX
    assert not by_thirds(np.zeros(1, np.float64), 128, 784, 256)
    for shape in ((1, 784, 256), (128, 10, 256), (128, 784, 10), (64, 64, 64)):
        assert not by_thirds(np.zeros(1, np.float32), *shape)


# The steps


@needs_amx
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(
    "split",
    [
        {"split_rows": True},
        {"split_rows": True, "copies": True},
        {"split_rows": False},
        {"split_rows": False, "split_columns": True},
    ],
)
def test_training_is_the_references(split, clip_norm, monkeypatch):
    plan = cpu_plan.Plan(2, 96, **split)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: plan)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((421, 160), np.float32), rng.integers(0, 5, 421)
    parameters = {}
    for backend, dtype in (("numpy", "float64"), ("cpu", "float32")):
        net = bp.MLP(
            [160, 300, 224, 5],
            activation=["gelu", "sigmoid"],
            alpha=1e-2,
            dropout=[0.2, 0.0],
            backend=backend,
            dtype=dtype,
            seed=0,
        )
        start = net.parameters.astype(float)
        net.fit(X.astype(dtype), y, epochs=2, batch_size=193, optimizer=bp.AdamW(clip_norm=clip_norm))
        parameters[backend] = net.parameters - start
    change = np.linalg.norm(parameters["numpy"])
    assert 0 < np.linalg.norm(parameters["cpu"] - parameters["numpy"]) <= 1e-3 * change


@needs_amx
def test_a_mini_batch_of_more_rows_than_a_sum_takes(monkeypatch):
    monkeypatch.setattr(cpu_plan, "CHUNK_ROWS_OF_THIRDS", 64)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((300, 160)), rng.integers(0, 5, 300)
    gradients = {}
    for backend, dtype in (("numpy", "float64"), ("cpu", "float32")):
        net = bp.MLP([160, 300, 5], backend=backend, dtype=dtype, seed=0)
        start = net.parameters.astype(float)
        net.fit(X.astype(dtype), y, epochs=1, batch_size=300, optimizer=bp.SGD(1.0, momentum=0.0))
        gradients[backend] = net.parameters - start
    error = np.abs(gradients["cpu"] - gradients["numpy"]).max()
    assert 0 < error <= 1e-5 * np.abs(gradients["numpy"]).max()


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [31, 100, 128, 200, 1500])
@pytest.mark.parametrize("sizes", [[30, 64, 64, 2], [784, 256, 128, 10], [100, 2048, 33, 3000], [257, 100]])
def test_there_is_scratch_memory_for_every_product(sizes, batch_size, threads):
    architecture = bp.MLP(sizes, backend="numpy").architecture
    plan = cpu_plan.for_training(architecture, batch_size, "float32", threads)
    layout = cpu_plan.Layout(architecture, plan, batch_size, "float32")
    n_scratch, by_thirds = layout._n_scratch(), executable(amx.by_thirds.py_func)
    x = np.zeros(1, np.float32)
    summed = plan.tile_rows if plan.split_rows else cpu_plan.chunk_rows("float32")
    widest = max(sizes) + 8 if plan.split_rows else 8 * int(np.diff(layout.groups()[..., :2]).max())
    for n_in, n_out in itertools.pairwise(sizes):
        products = [(batch_size if plan.split_columns else plan.tile_rows, n_in, n_out)]
        products += [(plan.tile_rows, n_out, n_in), (min(widest, round_up(n_in, 8)), min(summed, batch_size), n_out)]
        for most, longest, n_columns in products:
            for n_rows, depth in itertools.product({1, 32, most // 2, most}, {1, 32, longest // 32 * 32, longest}):
                if 0 < n_rows <= most and 0 < depth <= longest and by_thirds(x, n_rows, depth, n_columns):
                    assert thirds.entries(n_rows, min(depth, amx.MOST_DEPTH)) <= n_scratch


# The same without the unit


@pytest.mark.skipif(processor.HAS_AMX, reason="the unit itself is there")
@pytest.mark.skipif("+avx512f" not in processor.FEATURES, reason="panels have the unit's width with AVX-512 alone")
def test_the_products_with_tiles_in_software(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "software_tiles", "-m", "amx", __file__]
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": folder, "BACKPROP_GPU_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# The permission


class Refusing:
    """A C library whose system calls fail."""

    def syscall(self, *_):
        return -1


def test_tiles_are_used_only_where_the_system_allows_it(monkeypatch):
    assert processor._may_use_tiles() == processor.HAS_AMX
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Refusing())
    assert not processor._may_use_tiles()


@pytest.mark.parametrize("features", ["+avx512f,+amx-tile", "+avx512f,+amx-bf16", "+avx512f,-amx-tile,+amx-bf16"])
def test_no_tiles_without_all_that_they_take(features, monkeypatch):
    monkeypatch.setattr(processor, "FEATURES", features)
    assert not processor._may_use_tiles()
