"""The first layer's products without those by 0: the same bits, and nothing multiplied that need not be."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse

import backprop_gpu as bp
from backprop_gpu import training

pytest.importorskip("numba")

from backprop_gpu.backends import cpu_plan
from backprop_gpu.kernels.numba_cpu import gemm, nonzero
from backprop_gpu.kernels.numba_cpu.compile import executable
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, HALF_BLOCK_ROWS, round_up, width

gemm_nn, gemm_tn = executable(gemm.gemm_nn.py_func), executable(gemm.gemm_tn.py_func)
note_nonzero, gemm_nn_where, gemm_tn_where = (
    executable(function.py_func) for function in (nonzero.note_nonzero, nonzero.gemm_nn_where, nonzero.gemm_tn_where)
)

UNTOUCHED = -77.0

DTYPES = ["float32", "float64"]


@pytest.fixture(autouse=True)
def teams(monkeypatch):
    """The networks here are so small that one thread would do every step."""
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_STEP", 1)
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_CALL", 1)


def sparse(n_rows, n_columns, part, dtype="float64", seed=0):
    """Standard normal numbers, of which all but about this part are 0, some of them −0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, n_columns)) * (rng.random((n_rows, n_columns)) < part)
    return x.astype(dtype)


class Product:
    """A, (n_rows, depth), in panels, some entries into an array; and what a product of it needs."""

    def __init__(self, A, n_columns, start=0):
        self.A, self.start, self.panel = A, start, width(A.dtype)
        (self.n_rows, self.depth), self.n_columns = A.shape, n_columns
        self.rows = round_up(self.n_rows, BLOCK_ROWS)
        rng = np.random.default_rng(1)
        self.a = np.concatenate([np.full(start, UNTOUCHED, A.dtype), self.in_panels(A, self.rows)])
        self.W = rng.standard_normal((self.depth, n_columns)).astype(A.dtype)
        self.delta = rng.standard_normal((self.n_rows, n_columns)).astype(A.dtype)
        self.bias = np.zeros(round_up(n_columns, self.panel), A.dtype)
        self.bias[:n_columns] = rng.standard_normal(n_columns)
        self.none = np.empty(0, A.dtype)
        self.nonzero = np.full(self.a.size // self.panel + nonzero.ROWS_AT_ONCE, 0xFFFFFFFF, np.uint32)
        old = self.in_panels(np.ones((self.rows, self.depth), A.dtype), self.rows)  # a larger tile was here before
        note_nonzero(np.append(self.a[:start], old), *self.left[1:], self.rows, self.depth, self.nonzero)
        note_nonzero(*self.left, self.n_rows, self.depth, self.nonzero)

    def in_panels(self, x, n_rows):
        full = np.zeros((n_rows, round_up(x.shape[1], self.panel)), x.dtype)
        full[: len(x), : x.shape[1]] = x
        return np.ascontiguousarray(full.reshape(n_rows, -1, self.panel).transpose(1, 0, 2)).ravel()

    @property
    def left(self):
        return self.a, self.start, self.rows * self.panel

    def forward(self, where):
        """What is in memory after C = A W + b."""
        c = np.full(self.rows * self.bias.size, UNTOUCHED, self.A.dtype)
        right, result = (self.in_panels(self.W, self.depth), 0, self.depth * self.panel), (c, 0, self.rows * self.panel)
        shape, bias = (self.n_rows, self.depth, self.n_columns), (self.bias, 0, self.panel)
        if where:
            gemm_nn_where(self.nonzero, self.left, right, result, shape, bias)
        else:
            gemm_nn(self.left, right, result, shape, bias, self.none)
        return c

    def gradients(self, where, accumulate=False, first=0):
        """What is in memory after C = Aᵀ δ, or C += Aᵀ δ, from column `first` of A on."""
        columns, zeros = (first, round_up(self.depth, BLOCK_ROWS)), np.zeros(self.panel, self.A.dtype)
        n_entries = (columns[1] - first) * self.panel
        c = np.full(n_entries * (self.bias.size // self.panel), UNTOUCHED, self.A.dtype)
        delta = self.in_panels(self.delta, self.rows), 0, self.rows * self.panel
        for p in range(self.bias.size // self.panel):
            result, shape, nothing = (c, p * n_entries), (self.n_rows, self.n_columns), (c, -1)
            if where:
                gemm_tn_where(self.nonzero, self.left, columns, delta, p, result, shape, accumulate, nothing)
            else:
                gemm_tn(self.left, columns, delta, p, result, shape, accumulate, zeros, self.none, True, nothing)
        return c


PANEL = width("float32")

SHAPES = [(1, 1, 1), (3, 5, 3), (13, PANEL, 7), (31, 2 * PANEL + 3, 11), (63, 37, PANEL + 1), (65, 41, 5), (263, 9, 3)]
"""Rows, columns of A and of W: fewer and more rows than are looked at, or summed, together."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("start", [0, 3 * PANEL + 16])
def test_products_have_the_bits_of_those_with_every_0(dtype, shape, part, start):
    n_rows, depth, n_columns = shape
    product = Product(sparse(n_rows, depth, part, dtype), n_columns, start)
    assert np.array_equal(product.forward(True), product.forward(False))
    for accumulate in (False, True):
        assert np.array_equal(product.gradients(True, accumulate), product.gradients(False, accumulate))
    last = round_up(depth, BLOCK_ROWS) - BLOCK_ROWS
    assert np.array_equal(product.gradients(True, first=last), product.gradients(False, first=last))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_0_is_not_multiplied(dtype):
    """Else NaN would come of NaN."""
    A = sparse(64, 3 * width(dtype), 1.0, dtype)
    A[8:16, 5], A[20, :], A[:, 40:44] = 0, 0, 0
    product = Product(A, 3)
    product.W[40:44] = np.nan
    product.W[5] = np.nan
    z = product.forward(True).reshape(product.rows, -1)
    assert np.isnan(z[:8, :3]).all()
    assert np.isfinite(z[8:16]).all()
    product.delta[20] = np.nan
    assert np.isfinite(product.gradients(True)).all()
    product.delta[21] = np.nan
    dW = product.gradients(True).reshape(A.shape[1], -1)
    assert np.isfinite(dW[40:44]).all()
    assert np.isnan(dW[:40, :3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_that_is_not_0_is_noted(dtype):
    panel = width(dtype)
    A = sparse(11, 2 * panel + 1, 0.2, dtype)
    A[3, 7], A[4, 8] = np.nan, np.finfo(dtype).smallest_subnormal
    product = Product(A, 1)
    words = product.nonzero[: 3 * product.rows].reshape(3, product.rows)[:, :11]
    bits = words[:, :, None] >> np.arange(panel, dtype=np.uint32) & 1
    noted = bits.transpose(1, 0, 2).reshape(11, -1)
    assert not noted[:, A.shape[1] :].any()
    assert np.array_equal(noted[:, : A.shape[1]] == 1, A != 0)


# In training

SIZES = [67, 41, 5]

every_split = pytest.mark.parametrize(
    "split",
    [
        {"split_rows": True},
        {"split_rows": True, "copies": True},
        {"split_rows": False},
        {"split_rows": False, "split_columns": True},
    ],
    ids=["rows", "rows, with copies", "blocks", "columns"],
)


def trainer_of(net, X, y, batch_size, optimizer):
    job = training._job(net, optimizer, net._take_in(X, y, None), batch_size, 0)
    return training._trainer(net, job)


@pytest.mark.parametrize("dtype", DTYPES)
@every_split
@pytest.mark.parametrize(("n_threads", "tile_rows"), [(1, 8), (2, 64), (3, 24)])
@pytest.mark.parametrize("sizes", [SIZES, [67, 5]], ids=str)
def test_training_and_the_gradient_have_the_same_bits(dtype, split, n_threads, tile_rows, sizes, monkeypatch):
    dense = cpu_plan.Plan(n_threads, round_up(tile_rows, BLOCK_ROWS), **split)
    plans = [dense, *(replace(dense, z_where=z, dW_where=dW) for z, dW in ((1, 1), (1, 0), (0, 1)))]
    X, y = sparse(331, sizes[0], 0.1, dtype), np.arange(331) % sizes[-1]
    found = []
    for plan in plans:
        monkeypatch.setattr(cpu_plan, "for_training", lambda *_, plan=plan: plan)
        net = bp.MLP(sizes, backend="cpu", dtype=dtype, seed=3, dropout=0.2)
        trainer = trainer_of(net, X, y, 83, bp.AdamW(clip_norm=0.5))
        loss = trainer.run(np.arange(331), np.full(4, 1e-2), np.full(4, 1e-2), 0, lambda _: True)
        gradients = np.empty_like(net.parameters)
        found.append((loss, trainer.gradient(gradients, 0.0), net.parameters, gradients))
    assert np.abs(found[0][2]).max() > 0
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def plan_of(X, sizes=(784, 256, 10), batch_size=128):
    net = bp.MLP(list(sizes), backend="cpu", dtype="float32", seed=0)
    trainer = trainer_of(net, X, np.arange(X.shape[0]) % sizes[-1], batch_size, bp.Adam())
    trainer._prepare(2)
    return trainer.plan


@pytest.mark.parametrize("kind", [np.asarray, scipy.sparse.csr_matrix], ids=["array", "CSR"])
@pytest.mark.parametrize(
    ("part", "z_where", "dW_where"), [(0.0, True, True), (0.1, True, True), (0.6, False, False), (1.0, False, False)]
)
def test_the_data_decides(part, z_where, dW_where, kind):
    plan = plan_of(kind(sparse(1000, 784, part, "float32")))
    assert (plan.z_where, plan.dW_where) == (z_where, dW_where)


def test_rows_and_columns_decide_each_for_its_product():
    X = np.zeros((1000, 784), "float32")
    X[:, ::HALF_BLOCK_ROWS] = 1  # the same columns in all rows, and one of each few
    plan = plan_of(X)
    assert (plan.z_where, plan.dW_where) == (True, False)
    X[...] = 0
    X[::HALF_BLOCK_ROWS] = 1
    data = cpu_plan.Nonzero.of(32, lambda _: X[:32])
    assert (data.in_rows, data.in_columns) == (1, 1 / HALF_BLOCK_ROWS)


def test_rows_from_all_of_the_data_are_looked_at():
    X = np.zeros((1000, 784), "float32")
    X[500:] = 1
    assert cpu_plan.Nonzero.of(1000, X.__getitem__).in_rows == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("shape", [(1000, PANEL - 1), (1, 784)], ids=str)
def test_where_there_is_little_to_gain_nothing_is_looked_for(shape):
    plan = plan_of(np.zeros(shape, "float32"), (shape[1], 256, 10), min(128, shape[0]))
    assert (plan.z_where, plan.dW_where) == (False, False)


def test_a_matrix_unit_leaves_less_to_gain(monkeypatch):
    X = sparse(1000, 784, 0.15, "float32")  # half of the columns in four rows
    data, architecture = cpu_plan.Nonzero.of(1000, X.__getitem__), bp.MLP([784, 1024, 10]).architecture
    assert cpu_plan.for_training(architecture, 512, "float32", 2, data).z_where
    monkeypatch.setattr(cpu_plan, "may_split", lambda _: True)
    assert not cpu_plan.for_training(architecture, 512, "float32", 2, data).z_where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[301, 256, 10], [784, 10]], ids=str)
def test_predictions_are_the_references(dtype, sizes, monkeypatch):
    X = sparse(2003, sizes[0], 0.1, dtype)
    made = []
    plan = cpu_plan.for_inference
    monkeypatch.setattr(cpu_plan, "for_inference", lambda *a: made.append(plan(*a)) or made[-1])
    outputs = {}
    for backend in ("numpy", "cpu"):
        net = bp.MLP(sizes, backend=backend, dtype=dtype, seed=0)
        outputs[backend] = net.predict_proba(X)
    assert [p.z_where for p in made] == [True]
    assert np.abs(outputs["cpu"] - outputs["numpy"]).max() <= {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert np.ptp(outputs["numpy"]) > 0
