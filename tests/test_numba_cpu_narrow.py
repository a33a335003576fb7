"""The last columns of a product where they are few, and whole networks that have such layers."""

import importlib
from itertools import product as every

import numpy as np
import pytest
from conftest import TOLERANCE
from steps import every_split, trainer_of

import backprop_gpu as bp

pytest.importorskip("numba")

from backprop_gpu.backends import cpu_plan
from backprop_gpu.kernels.numba_cpu import narrow
from backprop_gpu.kernels.numba_cpu.compile import executable
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, HALF_BLOCK_ROWS, lanes, round_up, width

nn, tn, turned = (
    executable(function.py_func) for function in (narrow.gemm_nn_narrow, narrow.gemm_tn_narrow, narrow.gemm_tn_turned)
)

UNTOUCHED = -77.0


def most(dtype):
    """As many columns as are few at the most; none where a vector is too short for any."""
    return lanes(dtype) // narrow.PART_OF_VECTOR


def in_panels(x, n_rows, padding=0.0):
    """(panels, n_rows, panel), and what is not x's."""
    panel = width(x.dtype)
    full = np.full((n_rows, round_up(x.shape[1], panel)), padding, x.dtype)
    full[: len(x), : x.shape[1]] = x
    return np.ascontiguousarray(full.reshape(n_rows, -1, panel).transpose(1, 0, 2))


def row_major(x, n_columns):
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :n_columns]


def matrix(x):
    """As products take it: some entries into an array, and from panel to panel."""
    return np.append(np.full(5, UNTOUCHED, x.dtype), x), 5, x[0].size


def numbers(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


CASES = [
    (dtype, before, few)
    for dtype in TOLERANCE
    for before, few in every((0, lanes(dtype), width(dtype), width(dtype) + lanes(dtype)), range(1, most(dtype) + 1))
]
"""Columns that are not few, and after them those that are."""


def test_few_are_a_quarter_of_a_vector():
    n = lanes("float32")
    few = [columns for columns in range(1, 2 * n + 1) if narrow.n_narrow(columns, "float32")]
    assert few == [*range(1, n // 4 + 1), *range(n + 1, n + n // 4 + 1)]
    assert [narrow.rows_turned(columns) for columns in (1, 2, 3, 4)] == [1, 2, 4, 4]


@pytest.mark.parametrize(("dtype", "before", "few"), CASES)
@pytest.mark.parametrize("n_rows", [HALF_BLOCK_ROWS, 7 * HALF_BLOCK_ROWS])
@pytest.mark.parametrize("depth", [1, 31, 131])
def test_forward(dtype, before, few, n_rows, depth):
    """C = A B + bias in the last vector, whose padding becomes 0; nothing else is written."""
    n, is_all = before + few, before == 0
    A, W, bias = numbers((n_rows, depth), dtype, 0), numbers((depth, n), dtype, 1), numbers(n, dtype, 2)
    rows = narrow.rows_turned(few) if is_all else round_up(n, BLOCK_ROWS)
    C = np.full((round_up(n, width(dtype)) // width(dtype), n_rows, width(dtype)), UNTOUCHED, dtype)
    c, start, stride = matrix(C)
    padded = np.append(bias, np.zeros(width(dtype), dtype))
    T = matrix(in_panels(np.ascontiguousarray(W.T), rows))
    nn(matrix(in_panels(A, n_rows)), T, (c, start, stride), (n_rows, depth, n), (padded, 0), few, is_all)
    written = row_major(c[start:].reshape(C.shape), C.shape[0] * width(dtype))
    expected = (A.astype(np.float64) @ W + bias)[:, before:]
    actual = written[:, before:n]
    assert np.abs(actual - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    end = before + lanes(dtype)
    assert (written[:, n:end] == 0).all()
    assert (written[:, :before] == UNTOUCHED).all()
    assert (written[:, end:] == UNTOUCHED).all()
    assert (c[:start] == UNTOUCHED).all()


@pytest.mark.parametrize(("dtype", "before", "few"), CASES)
@pytest.mark.parametrize("n_rows", [1, 13, 263, 1031])
@pytest.mark.parametrize(("first", "last"), [(0, 40), (BLOCK_ROWS, 2 * BLOCK_ROWS), (3 * BLOCK_ROWS, 67)])
def test_gradients_are_added_to(dtype, before, few, n_rows, first, last):
    """C += Aᵀ B in the last columns, of some columns of A."""
    n, panel = before + few, width(dtype)
    A, B, C = numbers((n_rows, 67), dtype, 0), numbers((n_rows, n), dtype, 1), numbers((last - first, n), dtype, 2)
    in_last = C[:, before // panel * panel :]
    c, start, _ = matrix(in_panels(in_last, len(C)))
    rows = round_up(n_rows, BLOCK_ROWS)
    tn(
        matrix(in_panels(A, rows)),
        (first, last),
        matrix(in_panels(B, rows)),
        (c, start),
        (n_rows, n),
        few,
    )
    written = c[start:].reshape(len(C), panel)
    expected = in_last.astype(np.float64)
    expected[:, -few:] += (A.astype(np.float64).T @ B)[first:last, before:]
    assert np.abs(written[:, : expected.shape[1]] - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    assert (written[:, : expected.shape[1] - few] == in_last[:, :-few]).all()
    assert (written[:, expected.shape[1] :] == 0).all()
    assert (c[:start] == UNTOUCHED).all()


@pytest.mark.parametrize(("dtype", "few"), [(dtype, n) for dtype in TOLERANCE for n in range(1, most(dtype) + 1)])
@pytest.mark.parametrize("n_rows", [1, 13, 263, 1031])
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwritten", "added to"])
def test_turned_gradients(dtype, few, n_rows, accumulate):
    """Cᵀ = Bᵀ A or Cᵀ += Bᵀ A, in the last two panels of three."""
    panel, count = width(dtype), narrow.rows_turned(few)
    A, B = numbers((n_rows, 2 * panel + 3), dtype, 0), numbers((n_rows, few), dtype, 1)
    C = numbers((2, count, panel), dtype, 2)
    c, start, stride = matrix(C)
    rows = round_up(n_rows, BLOCK_ROWS)
    turned(
        matrix(in_panels(A, rows)),
        (1, 3),
        matrix(in_panels(B, rows)),
        (c, start, stride),
        n_rows,
        few,
        accumulate,
    )
    product = np.zeros((count, 2 * panel))
    product[:few, : panel + 3] = B.astype(np.float64).T @ A[:, panel:]
    expected = product + row_major(C, 2 * panel) * accumulate
    actual = row_major(c[start:].reshape(C.shape), 2 * panel)
    assert np.abs(actual - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    assert (c[:start] == UNTOUCHED).all()


def narrow_networks(dtype):
    """Layers whose columns are all few, or of which the last are, between others and at the end."""
    n = lanes(dtype)
    return [[5, 3, 1], [3, 1, 1, 2], [37, n + 1, 2 * n + 2, 2], [19, 4, 133, 3], [30, 401, 1], [11, 2, 2 * n + 1]]


@every_split
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("n_rows", [1, 37, 331])
def test_steps_are_the_references(split, dtype, number, n_rows, monkeypatch):
    """SGD, which does not amplify roundings; a penalty and clipping, which would count padding."""
    sizes = narrow_networks(dtype)[number]
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_CALL", 1)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: cpu_plan.Plan(2, 13 * BLOCK_ROWS, **split))
    X, y = numbers((n_rows, sizes[0]), dtype, 0), numbers((n_rows, sizes[-1]), dtype, 1)
    outcomes = []
    for backend in ("numpy", "cpu"):
        net = bp.MLP(
            sizes,
            ["tanh", "sigmoid", "silu"][: len(sizes) - 2],
            backend=backend,
            dtype=dtype,
            seed=3,
            loss="squared_error",
            dropout=0.1,
        )
        trainer, _ = trainer_of(net, X, y, n_rows, bp.SGD(momentum=0.9, clip_norm=1.0))
        steps, order = np.full(3, 0.05), np.tile(np.arange(n_rows), 3)
        loss = trainer.run(order, steps, np.full(3, 0.1), 0, lambda _: True)
        outcomes.append((loss, np.array(net.parameters)))
    (expected_loss, expected), (loss, actual) = outcomes
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype])
    assert np.abs(actual - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
def test_predictions_are_the_references(dtype, number, activation, monkeypatch):
    monkeypatch.setattr(importlib.import_module("backprop_gpu.backends.cpu"), "FEW_PRODUCTS", 0)
    sizes = narrow_networks(dtype)[number]
    X = numbers((1031, sizes[0]), dtype, 0)
    expected, actual = (
        bp.MLP(sizes, activation, backend=backend, dtype=dtype, seed=3, loss="squared_error").predict(X)
        for backend in ("numpy", "cpu")
    )
    assert np.abs(expected).max() > 0
    assert np.abs(actual - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("n_out", [1, 2, 10])
def test_the_same_run_has_the_same_bits(n_out):
    X, y = numbers((4000, 64), "float64", 0), numbers((4000, n_out), "float64", 1)
    runs = []
    for _ in range(2):
        net = bp.MLP([64, 100, n_out], backend="cpu", dtype="float64", seed=0, loss="squared_error")
        net.fit(X, y, epochs=3, batch_size=200)
        runs.append(np.array(net.parameters))
    assert np.isfinite(runs[0]).all()
    assert (runs[0] == runs[1]).all()
