"""The first layer's products without those by 0: the same bits, and nothing multiplied that need not be."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
from steps import every_split, trainer_of

import backprop_gpu as bp

pytest.importorskip("numba")

from backprop_gpu.backends import cpu, cpu_plan
from backprop_gpu.data import SparseRows
from backprop_gpu.kernels.numba_cpu import entries as of_entries
from backprop_gpu.kernels.numba_cpu import gemm, nonzero
from backprop_gpu.kernels.numba_cpu.compile import executable
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, round_up, width

gemm_nn, gemm_tn = executable(gemm.gemm_nn.py_func), executable(gemm.gemm_tn.py_func)
note_nonzero, gemm_nn_where, gemm_tn_where = (
    executable(function.py_func) for function in (nonzero.note_nonzero, nonzero.gemm_nn_where, nonzero.gemm_tn_where)
)
gemm_nn_of_entries, by_columns, gemm_tn_of_entries = (
    executable(function.py_func)
    for function in (of_entries.gemm_nn_of_entries, of_entries.by_columns, of_entries.gemm_tn_of_entries)
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

    def row_major(self, flat):
        """C without its padding."""
        columns = flat.reshape(-1, len(flat) // self.bias.size, self.panel).swapaxes(0, 1)
        return columns.reshape(len(columns), -1)[:, : self.n_columns]

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
        n_panels, shape, nothing = self.bias.size // self.panel, (self.n_rows, self.n_columns), (c, -1)
        if where:
            panels, result = (0, n_panels), (c, 0, n_entries)
            rows = np.zeros(nonzero.rows_words(self.n_rows, columns[1] - first), np.uint64)
            all_but_C = self.nonzero, self.left, columns, delta, panels
            gemm_tn_where(*all_but_C, result, shape, accumulate, rows, True, nothing)
            return c
        for p in range(n_panels):
            result = c, p * n_entries
            gemm_tn(self.left, columns, delta, p, result, shape, accumulate, zeros, self.none, True, nothing)
        return c


PANEL = width("float32")

SHAPES = [
    *((1, 1, 1), (3, 5, 3), (13, PANEL, 7), (31, 2 * PANEL + 3, 11), (63, 37, PANEL + 1), (65, 41, 5), (263, 9, 3)),
    *((7, 19, 2 * PANEL), (67, 13, 3 * PANEL - 1)),
]
"""Rows, columns of A and of W: fewer and more rows than are looked at, or summed, together; panels one by one and in
pairs."""


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

SIZES = [67, 101, 5]


def runs(plans, sizes, dtype, batch_size, monkeypatch):
    """What four steps leave by each of the plans, and what the gradient is then."""
    X, y, order = sparse(331, sizes[0], 0.1, dtype), np.arange(331) % sizes[-1], np.arange(4 * batch_size) % 331
    for plan in plans:
        monkeypatch.setattr(cpu_plan, "for_training", lambda *_, plan=plan: plan)
        net = bp.MLP(sizes, backend="cpu", dtype=dtype, seed=3, dropout=0.2)
        trainer, _ = trainer_of(net, X, y, batch_size, bp.AdamW(clip_norm=0.5))
        loss = trainer.run(order, np.full(4, 1e-2), np.full(4, 1e-2), 0, lambda _: True)
        gradients = np.empty_like(net.parameters)
        yield loss, trainer.gradient(gradients, 0.0), net.parameters, gradients


def assert_same_bits(found):
    first, *others = found
    assert np.abs(first[2]).max() > 0
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@every_split
@pytest.mark.parametrize(("n_threads", "tile_rows"), [(1, 8), (2, 64), (3, 24)])
@pytest.mark.parametrize("sizes", [SIZES, [67, 5]], ids=str)
def test_training_and_the_gradient_have_the_same_bits(dtype, split, n_threads, tile_rows, sizes, monkeypatch):
    dense = cpu_plan.Plan(n_threads, round_up(tile_rows, BLOCK_ROWS), **split)
    plans = [dense, *(replace(dense, z_where=z, dW_where=dW) for z, dW in ((1, 1), (1, 0), (0, 1)))]
    assert_same_bits(runs(plans, sizes, dtype, 83, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_more_rows_than_are_summed_at_once(dtype, monkeypatch):
    """Of more panels than are made at once: what was found for one chunk of rows is no use for the next."""
    assert cpu_plan.chunk_rows(dtype) < 331
    dense = cpu_plan.Plan(1, 64, split_rows=False)  # of several threads, each has other rows of every panel here
    sizes = [67, nonzero.PANELS_AT_ONCE * width(dtype) + 1, 5]
    assert_same_bits(runs([dense, replace(dense, dW_where=True)], sizes, dtype, 331, monkeypatch))


def plan_of(X, sizes=(784, 256, 10), batch_size=128):
    net = bp.MLP(list(sizes), backend="cpu", dtype="float32", seed=0)
    trainer, _ = trainer_of(net, X, np.arange(X.shape[0]) % sizes[-1], batch_size, bp.Adam())
    trainer._prepare(2)
    return trainer.plan


@pytest.mark.parametrize(
    ("part", "z_where", "dW_where"), [(0.0, True, True), (0.1, True, True), (0.6, False, False), (1.0, False, False)]
)
def test_the_data_decides(part, z_where, dW_where):
    plan = plan_of(sparse(1000, 784, part, "float32"))
    assert (plan.z_where, plan.dW_where) == (z_where, dW_where)


def test_rows_and_columns_decide_each_for_its_product(monkeypatch):
    monkeypatch.setattr(cpu_plan, "may_split", lambda _: False)  # with a matrix unit, half is not little enough
    X = np.zeros((1000, 784), "float32")
    few = nonzero.n_together(256, "float32")
    X[:, ::few] = 1  # the same columns in all rows, and one of each few
    plan = plan_of(X)
    assert (plan.z_where, plan.dW_where) == (True, False)
    X[...] = 0
    X[:: nonzero.FEW_OF_ONE] = 1
    data = cpu_plan.Nonzero.of(32, PANEL, lambda _: X[:32])
    assert (data.in_rows, data.in_columns) == (1, 1 / nonzero.FEW_OF_ONE)


def test_rows_from_all_of_the_data_are_looked_at():
    X = np.zeros((1000, 784), "float32")
    X[500:] = 1
    assert cpu_plan.Nonzero.of(1000, 256, X.__getitem__).in_rows == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("shape", [(1000, PANEL - 1), (1, 784)], ids=str)
def test_where_there_is_little_to_gain_nothing_is_looked_for(shape):
    plan = plan_of(np.zeros(shape, "float32"), (shape[1], 256, 10), min(128, shape[0]))
    assert (plan.z_where, plan.dW_where) == (False, False)


def test_a_matrix_unit_leaves_less_to_gain(monkeypatch):
    data, architecture = cpu_plan.Nonzero(0.6, 0.6), bp.MLP([784, 1024, 10]).architecture
    for has_unit in (False, True):
        monkeypatch.setattr(cpu_plan, "may_split", lambda _, has_unit=has_unit: has_unit)
        assert cpu_plan.for_training(architecture, 512, "float32", 2, data).z_where == (not has_unit)


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
    assert [p.z_where for p in made] == [len(sizes) > 2]
    assert np.abs(outputs["cpu"] - outputs["numpy"]).max() <= {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert np.ptp(outputs["numpy"]) > 0


# Sparse matrices


def unordered(X):
    """CSR of X with an element stored in two parts, a stored 0, and every row backwards; of 64-bit indices."""
    values, columns, starts = [], [], [0]
    for row in X:
        (found,) = row.nonzero()
        here = [(c, v) for c in found[::-1] for v in ((row[c],) if c % 3 else (row[c] / 2, row[c] / 2))]
        here.append((len(row) - 1, 0.0))
        columns += [c for c, _ in here]
        values += [v for _, v in here]
        starts.append(len(values))
    csr = scipy.sparse.csr_array(X.shape, dtype=X.dtype)
    csr.data, csr.indices, csr.indptr = np.array(values, X.dtype), np.array(columns), np.array(starts)
    return csr


def with_all_but_little(X):
    """Some rows without an element, and one of nothing but."""
    X[3:6], X[8] = 0, 1
    return X


KINDS = {"CSR": scipy.sparse.csr_array, "CSC": scipy.sparse.csc_matrix, "unordered": unordered}

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
@every_kind
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 2 * PANEL + 5, 11), (13, 7, 5 * PANEL + 3), (601, 19, 7)], ids=str)
def test_products_of_a_sparse_matrix_have_the_bits_of_the_dense_one(dtype, kind, shape):
    n_rows, depth, n_columns = shape
    A = sparse(n_rows, depth, 0.3, dtype)
    A[n_rows // 2] = 0
    rows = round_up(n_rows, BLOCK_ROWS) + BLOCK_ROWS  # the last ones are none of A's
    product = Product(np.concatenate([A, np.zeros((rows - n_rows, depth), dtype)]), n_columns)
    product.delta[n_rows:] = np.nan
    order = np.random.default_rng(0).permutation(n_rows)
    entries = SparseRows(kind(A[np.argsort(order)]).tocsr(), dtype).entries
    panel = product.panel
    c = np.full(rows * product.bias.size, UNTOUCHED, dtype)
    in_panels = product.in_panels(product.W, depth), 0, depth * panel, panel
    row_major = np.append(product.W, np.full(panel, np.nan, dtype)), 0, panel, n_columns
    shape = n_rows, rows, n_columns
    for right in (in_panels, row_major):
        gemm_nn_of_entries(entries, order, 0, right, (c, 0, rows * panel), shape, (product.bias, 0, panel))
        close(product.row_major(c), product.row_major(product.forward(False)), kind)

    sorted_entries = np.zeros(depth, np.int64), np.zeros(len(entries.values), np.int32), entries.values.copy()
    by_columns(entries, order, 0, n_rows, depth, sorted_entries)
    dense, blocks = Product(A, n_columns), round_up(depth, BLOCK_ROWS)
    dense.delta = product.delta[:n_rows]
    delta = dense.in_panels(dense.delta, dense.rows), 0, dense.rows * panel
    c = np.full(blocks * product.bias.size, UNTOUCHED, dtype)
    for p in range(product.bias.size // panel):
        gemm_tn_of_entries(sorted_entries, depth, (0, blocks), delta, p, (c, p * blocks * panel), (c, -1))
    close(c, dense.gradients(False), kind)


def close(actual, expected, kind):
    """The same bits, but where elements are stored in parts."""
    if kind is unordered:
        tolerance = {"float32": 1e-5, "float64": 1e-12}[expected.dtype.name]
        assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()
    else:
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_columns", [False, True])
@pytest.mark.parametrize(("n_threads", "tile_rows"), [(1, 8), (2, 64), (3, 24)])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("sizes", [SIZES, [67, 5]], ids=str)
def test_sparse_rows_train_to_the_bits_of_dense_ones(
    dtype, split_columns, n_threads, tile_rows, clip_norm, sizes, monkeypatch
):
    if split_columns and len(sizes) == 2:
        pytest.skip("the columns of an output layer are not divided")
    rows_of_tile = round_up(tile_rows, BLOCK_ROWS)
    plan = cpu_plan.Plan(n_threads, rows_of_tile, split_rows=False, split_columns=split_columns)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *a: replace(plan, by_entries=a[-1].sparse))
    X, y = with_all_but_little(sparse(731, sizes[0], 0.1, dtype)), np.arange(731) % 5
    found = []
    for rows in (X, scipy.sparse.csr_array(X)):
        net = bp.MLP(sizes, backend="cpu", dtype=dtype, seed=3, dropout=0.2, activation="gelu")
        trainer, _ = trainer_of(net, rows, y, 283, bp.AdamW(clip_norm=clip_norm))
        order, rates = np.random.default_rng(0).permutation(731), np.full(3, 1e-2)
        losses = [trainer.run(order, rates, rates, 3 * i, lambda _: True) for i in range(2)]
        gradients = np.empty_like(net.parameters)
        found.append((losses, trainer.gradient(gradients, 0.0), net.parameters, gradients))
    assert np.abs(found[0][2]).max() > 0
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def never_dense(monkeypatch):
    """A sparse matrix that is made dense is an error."""

    def refuse(*_, **__):
        raise AssertionError("made dense")

    for kind in (scipy.sparse.csr_array, scipy.sparse.csr_matrix):
        monkeypatch.setattr(kind, "toarray", refuse)


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("dtype", DTYPES)
@every_kind
def test_a_network_is_trained_and_asked_with_sparse_rows_as_they_are(dtype, kind):
    X, y = with_all_but_little(sparse(803, 301, 0.05, dtype)), np.arange(803) % 5
    found = []
    for rows in (X, kind(X)):
        net = bp.MLP([301, 256, 5], backend="cpu", dtype=dtype, seed=3)
        how = {"batch_size": 100, "optimizer": bp.SGD(0.1), "sample_weight": 1 + np.arange(803.0)}
        history = net.fit(rows, y, epochs=2, validation_fraction=0.1, **how)
        loss = net.partial_fit(rows, y, **how)
        found.append(
            (history["loss"], history["val_loss"], loss, net.parameters, net.predict(rows), net.predict_proba(rows))
        )
        found[-1] += tuple(net.evaluate(rows, y).values())
    same_bits = kind is not unordered and not cpu_plan.may_split(dtype)  # (sums in parts, or by a matrix unit)
    tolerance = 0 if same_bits else {"float32": 1e-5, "float64": 1e-12}[dtype]
    for actual, expected in zip(*reversed(found), strict=True):
        assert np.abs(np.subtract(actual, expected)).max() <= tolerance * np.abs(expected).max()


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[301, 5], [301, 1, 2], [2, 7, 3], [301, PANEL + 3, 41, 5]], ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 37])
def test_predictions_for_sparse_rows_are_the_references(dtype, sizes, n_rows):
    X = sparse(n_rows, sizes[0], 0.2, dtype)
    outputs = {}
    for backend, rows in (("numpy", X), ("cpu", scipy.sparse.csr_array(X))):
        net = bp.MLP(sizes, "sigmoid", backend=backend, dtype=dtype, seed=0)
        for b in net.b:
            b[...] = np.linspace(-1, 1, len(b))
        outputs[backend] = net.predict_proba(rows)
        labels = net.predict(rows)
        assert np.array_equal(labels, outputs[backend].argmax(axis=1))
    assert np.ptp(outputs["numpy"]) > 0
    assert np.abs(outputs["cpu"] - outputs["numpy"]).max() <= {"float32": 1e-5, "float64": 1e-12}[dtype]


def test_a_forward_pass_leaves_no_padding_undefined(monkeypatch):
    """The rows of W are read in whole panels, with what lies behind them."""
    made, memory = [], cpu_plan.Layout.memory
    monkeypatch.setattr(cpu_plan.Layout, "memory", lambda layout: made.append((layout, memory(layout))) or made[-1][1])
    net = bp.MLP([301, PANEL + 3, 5], "tanh", backend="cpu", seed=0)
    net.predict(scipy.sparse.csr_array(sparse(9, 301, 0.2, "float32")))
    ((layout, used),) = made
    last = layout.layers[0]["a"] + layout.stride
    columns = used.passes[last : last + 9 * PANEL].reshape(9, PANEL)
    assert columns[:, :3].all()
    assert not columns[:, 3:].any()


@pytest.mark.parametrize("sizes", [[301, 5], [301, 1, 2], [301, 256, 5]], ids=str)
def test_nothing_is_read_behind_the_parameters(sizes):
    net, entries = bp.MLP(sizes), SparseRows(scipy.sparse.csr_array(sparse(9, 301, 0.2)), "float32").entries
    *_, flat = cpu._arguments(net.architecture, entries, net.parameters, PANEL)
    assert len(flat) >= sizes[0] * sizes[1] + PANEL
    assert np.array_equal(flat[: len(net.parameters)], net.parameters)


def test_a_stream_goes_on_from_sparse_rows_to_dense_ones_and_back():
    X, y = sparse(400, 67, 0.1), np.arange(400) % 5
    found = []
    for kinds in ([np.asarray] * 4, [scipy.sparse.csr_array, np.asarray, np.asarray, scipy.sparse.csr_array]):
        net = bp.MLP(SIZES, backend="cpu", dtype="float64", seed=3)
        losses = [net.partial_fit(k(X[i * 100 : (i + 1) * 100]), y[:100], batch_size=50) for i, k in enumerate(kinds)]
        found.append((losses, net.parameters))
    for actual, expected in zip(*found, strict=True):  # a network as small as this one is divided otherwise for either
        assert np.abs(np.subtract(actual, expected)).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("data", [np.int64, np.bool_, np.float32, np.uint8])
def test_a_sparse_matrix_of_any_numbers_that_may_not_be_written_to(data):
    X = scipy.sparse.csr_array((sparse(300, 67, 0.1) > 0).astype(data))
    for part in (X.data, X.indices, X.indptr):
        part.flags.writeable = False
    y, found = np.arange(300) % 5, []
    for rows in (X.toarray(), X):
        net = bp.MLP(SIZES, backend="cpu", dtype="float64", seed=3)
        net.fit(rows, y, epochs=2, batch_size=100)
        found.append(net.parameters)
    assert np.abs(found[1] - found[0]).max() <= 1e-12 * np.abs(found[0]).max()


@pytest.mark.parametrize(
    "plan_for", [cpu_plan.for_training, lambda a, n, *rest: cpu_plan.for_inference(a, n, n, *rest)]
)
def test_tiles_and_memory_do_not_grow_with_the_columns_of_a_sparse_matrix(plan_for):
    plans, entries = [], []
    for n_in in (3000, 30_000):
        architecture = bp.MLP([n_in, 100, 4]).architecture
        plans.append(plan_for(architecture, 256, "float32", 2, cpu_plan.SPARSE))
        entries.append(cpu_plan.Layout(architecture, plans[-1], 256, "float32").n_passes)
    assert plans[0].by_entries
    assert plans[0].tile_rows == plans[1].tile_rows > BLOCK_ROWS
    assert entries[0] == entries[1]
