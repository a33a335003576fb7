"""The cpu backend's whole steps: the reference's numbers for every way to divide them, and sound under threads."""

import importlib
import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from steps import every_split, trainer_of

import backprop_gpu as bp
from backprop_gpu.backends.contract import Dropout

pytest.importorskip("numba")
cpu_plan = importlib.import_module("backprop_gpu.backends.cpu_plan")
cpu_step = importlib.import_module("backprop_gpu.backends.cpu_step")
compiling = importlib.import_module("backprop_gpu.kernels.numba_cpu.compile")
gemm = importlib.import_module("backprop_gpu.kernels.numba_cpu.gemm")
panels = importlib.import_module("backprop_gpu.kernels.numba_cpu.panels")
step = importlib.import_module("backprop_gpu.kernels.numba_cpu.step")

RTOL = {"float32": 1e-5, "float64": 1e-12}
SIZES = [37, 41, 3, 67, 5]


@pytest.fixture(autouse=True)
def teams(monkeypatch):
    """The networks here are so small that one thread would do every step."""
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_STEP", 1)
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_CALL", 1)


def draw(n, sizes=SIZES, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, sizes[0])).astype(dtype), rng.integers(0, sizes[-1], n)


def network(backend, dtype="float64", sizes=SIZES, **settings):
    return bp.MLP(sizes, backend=backend, dtype=dtype, seed=3, **settings)


def run(trainer, n_rows, batch_size, learning_rate=1e-2, alpha=0.0):
    n_steps = -(-n_rows // batch_size)
    rates, alphas = np.full(n_steps, learning_rate), np.full(n_steps, alpha)
    return trainer.run(np.arange(n_rows), rates, alphas, 0, lambda _: True)


def assert_same(actual, expected, dtype):
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    assert np.abs(actual - expected).max() <= RTOL[dtype] * np.abs(expected).max()


# Every way to divide a step


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_split
@pytest.mark.parametrize(("n_threads", "tile_rows"), [(1, 8), (1, 64), (2, 8), (3, 24), (7, 16)])
def test_every_plan_gives_the_references_numbers(dtype, split, n_threads, tile_rows, monkeypatch):
    if n_threads == 1 and split.get("copies"):
        pytest.skip("one thread has no copies to keep alike")
    plan = cpu_plan.Plan(n_threads, panels.round_up(tile_rows, panels.BLOCK_ROWS), **split)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: plan)
    X, y = draw(331, dtype=dtype)
    w = np.random.default_rng(1).random(331)
    w[:20] = 0
    nets, totals = {}, {}
    for backend in ("numpy", "cpu"):
        net = network(backend, dtype, activation=["gelu", "sigmoid", "relu"], dropout=[0.2, 0.0, 0.3])
        trainer, _ = trainer_of(net, X, y, 83, bp.AdamW(clip_norm=0.5), w)
        totals[backend] = run(trainer, 331, 83, alpha=1e-2)
        nets[backend] = net.parameters
    assert totals["cpu"] == pytest.approx(totals["numpy"], rel=RTOL[dtype])
    assert_same(nets["cpu"], nets["numpy"], dtype)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@every_split
def test_one_member_makes_the_bits_of_as_many_as_there_are_threads(split, clip_norm, monkeypatch):
    plan = cpu_plan.Plan(3, 2 * panels.BLOCK_ROWS, **split)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: plan)
    X, y = draw(331)
    found, members, train = [], [], step.train.specialised
    monkeypatch.setattr(step.train, "specialised", lambda n, *rest: members.append(n) or train(n, *rest))
    for least in (1, 1 << 60):
        monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_CALL", least)
        net = network("cpu", dropout=0.2)
        trainer, job = trainer_of(net, X, y, 83, bp.Adam(clip_norm=clip_norm))
        found.append((run(trainer, 331, 83, alpha=1e-2), net.parameters, *job.state.values()))
    assert members == [3, 1]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@every_split
def test_runs_of_one_member_and_of_all_go_on_from_each_other(split, monkeypatch):
    """Whoever did not take part in a run has the outcome all the same in the next."""
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: cpu_plan.Plan(3, 2 * panels.BLOCK_ROWS, **split))
    X, y = draw(331)
    vectors = {}
    for backend in ("numpy", "cpu"):
        net = network(backend)
        trainer, job = trainer_of(net, X, y, 83, bp.Adam())
        for i, least in enumerate((1, 1 << 60, 1, 1, 1 << 60, 1)):
            monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_CALL", least)
            trainer.run(np.arange(331), np.full(4, 1e-2), np.zeros(4), 4 * i, lambda _: True)
        vectors[backend] = net.parameters, *job.state.values()
    for actual, expected in zip(vectors["cpu"], vectors["numpy"], strict=True):
        assert_same(actual, expected, "float64")


@every_split
def test_the_gradient_of_all_rows_knows_no_dropout(split, monkeypatch):
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: cpu_plan.Plan(3, 2 * panels.BLOCK_ROWS, **split))
    X, y = draw(331)
    net = network("cpu", activation=["gelu", "sigmoid", "relu"], dropout=0.3)
    trainer, _ = trainer_of(net, X, y, 83, bp.SGD())
    gradients = np.empty_like(net.parameters)
    expected = network("numpy", activation=["gelu", "sigmoid", "relu"]).backprop(X, y)
    assert trainer.gradient(gradients, 0.0) == pytest.approx(expected.loss, rel=RTOL["float64"])
    assert_same(gradients, expected.gradients, "float64")


@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("threads", ["1", "3", "16"])
def test_mini_batches_smaller_than_a_tile_or_than_the_threads(n_rows, threads, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_NUM_THREADS", threads)
    X, y = draw(n_rows)
    parameters = {}
    for backend in ("numpy", "cpu"):
        net = network(backend)
        run(trainer_of(net, X, y, min(n_rows, 5), bp.SGD(momentum=0.5))[0], n_rows, min(n_rows, 5))
        parameters[backend] = net.parameters
    assert_same(parameters["cpu"], parameters["numpy"], "float64")


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2], [3, 1, 1, 2], [129, 257, 33]])
def test_layers_of_any_width(sizes):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((29, sizes[0])), rng.standard_normal((29, sizes[-1]))
    parameters = {}
    for backend in ("numpy", "cpu"):
        net = network(backend, sizes=sizes, loss="squared_error", activation="softplus")
        run(trainer_of(net, X, y, 10, bp.RMSprop())[0], 29, 10)
        parameters[backend] = net.parameters
        assert_same(net.predict(X), net._labels(net.forward(X).z[-1]), "float64")
    assert_same(parameters["cpu"], parameters["numpy"], "float64")


def test_a_plan_follows_from_sizes_alone_and_never_has_idle_threads():
    architecture = network("numpy").architecture
    for batch_size in (1, 8, 100, 4096):
        plans = {cpu_plan.for_training(architecture, batch_size, "float32", 64) for _ in range(3)}
        assert len(plans) == 1
        (plan,) = plans
        assert plan.n_threads * panels.BLOCK_ROWS <= max(batch_size, panels.BLOCK_ROWS)
        assert plan.tile_rows % panels.BLOCK_ROWS == 0


@pytest.mark.parametrize(("threads", "copies"), [(1, 1), (2, 2), (3, 1)])
def test_each_of_two_threads_has_a_copy_of_a_small_network(threads, copies):
    plans = [
        cpu_plan.for_training(network("numpy", sizes=sizes).architecture, 1000, "float32", threads)
        for sizes in ([30, 64, 64, 2], [784, 256, 128, 10])
    ]
    assert [(plan.n_threads, plan.n_copies) for plan in plans] == [(threads, copies), (threads, 1)]


def test_copies_stay_the_same(monkeypatch):
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: cpu_plan.Plan(3, 16, split_rows=True, copies=True))
    X, y = draw(331)
    trainer, _ = trainer_of(network("cpu", dropout=0.2), X, y, 83, bp.Adam(clip_norm=0.5))
    run(trainer, 331, 83, alpha=1e-2)
    for vectors in trainer.memory[:4]:
        assert len(vectors) == 3
        assert vectors[0].any()
        assert (vectors == vectors[0]).all()


def blocks_of(layout):
    """The blocks that each thread owns, in the order of their update."""
    return [[block for first, last, _ in groups for block in range(first, last)] for groups in layout.groups()]


def block_size(layout):
    return panels.BLOCK_ROWS * layout.panel


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[1, 2], [30, 64, 64, 2], [784, 256, 128, 10], [1009, 521, 257, 3]])
def test_a_thread_that_sums_over_rows_owns_a_run_of_blocks(sizes, n_threads):
    architecture = network("numpy", sizes=sizes).architecture
    layout = cpu_plan.Layout(architecture, cpu_plan.Plan(n_threads, panels.BLOCK_ROWS, True), 64, "float32")
    n_blocks = layout.n_weights // block_size(layout)
    for t, owned in enumerate(blocks_of(layout)):
        assert owned == list(range(owned[0], owned[0] + len(owned))) if owned else n_blocks < n_threads
        assert abs(len(owned) - n_blocks / n_threads) <= max(1, n_blocks / 8 / n_threads), t
    assert sorted(itertools.chain(*blocks_of(layout))) == list(range(n_blocks))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_rows", [1, 64, 1000, 5000])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "sizes", [[1, 2], [30, 64, 64, 2], [784, 256, 128, 10], [1009, 521, 257, 3], [8, 2048, 8], [5, 3, 2048]]
)
def test_groups_are_all_blocks_evenly(sizes, n_threads, n_rows, dtype):
    architecture = network("numpy", sizes=sizes).architecture
    layout = cpu_plan.Layout(architecture, cpu_plan.Plan(n_threads, panels.BLOCK_ROWS, False), n_rows, dtype)
    n_blocks = layout.n_weights // block_size(layout)
    assert sorted(itertools.chain(*blocks_of(layout))) == list(range(n_blocks))
    most = max(map(len, blocks_of(layout)))
    assert most <= (1 + 1 / cpu_plan.BLOCKS_PER_THREAD) * n_blocks / n_threads + len(layout.layers)
    for group in layout.groups().reshape(-1, 3):
        assert group[1] - group[0] <= cpu_plan.GROUP


@pytest.mark.parametrize("columns", [False, True])
def test_a_group_tells_whether_it_is_the_same_rows_of_w_as_the_one_before(columns):
    architecture = network("numpy", sizes=[784, 256, 128, 10]).architecture
    layout = cpu_plan.Layout(architecture, cpu_plan.Plan(2, panels.BLOCK_ROWS, False, columns), 128, "float32")
    ranges = [layout._blocks_of(layer) for layer in layout.layers]
    in_panel = layout.layers["W_stride"] // block_size(layout)
    for groups in layout.groups():
        before = (-1, 0, 0, 0)
        for first, last, fresh in groups[groups[:, 1] > groups[:, 0]]:
            (index,) = (i for i, (low, high) in enumerate(ranges) if low <= first < high)
            panel, row = divmod(first - ranges[index][0], in_panel[index])
            here = index, row, last - first, panel
            assert fresh == (here[:3] != before[:3])
            assert fresh or panel == before[3] + 1
            before = here


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[30, 64, 64, 2], [784, 256, 128, 10], [1009, 521, 257, 3]])
def test_a_threads_columns_are_a_layer_whose_blocks_it_owns(sizes, n_threads):
    architecture = network("numpy", sizes=sizes).architecture
    plan = cpu_plan.Plan(n_threads, panels.BLOCK_ROWS, split_rows=False, split_columns=True)
    layout = cpu_plan.Layout(architecture, plan, 64, "float32")
    size, first, parts = panels.BLOCK_ROWS * layout.panel, layout.layers[0], layout.parts
    assert parts["n_out"].sum() == sizes[1]
    assert list(parts["first_column"]) == [0, *np.cumsum(parts["n_out"])[:-1]]
    for name, stride in {"W": first["W_stride"], "b": layout.panel, "a": layout.stride, "delta": layout.stride}.items():
        assert list(parts[name] - first[name]) == list(parts["first_column"] // layout.panel * stride)
    assert len(set(parts["a_prev"])) == n_threads
    blocks = blocks_of(layout)
    assert sorted(block for owned in blocks for block in owned) == list(range(layout.n_weights // size))
    for part, owned in zip(parts, blocks, strict=True):
        of_first = [block for block in owned if block * size < layout.layers[1]["W"]]
        columns = -(-part["n_out"] // layout.panel)
        assert set(of_first) == set(range(part["W"] // size, (part["W"] + columns * part["W_stride"]) // size))
    assert np.diff(layout.groups()[..., :2], axis=2).max() <= cpu_plan.GROUP


@pytest.mark.parametrize(("text", "kib"), [("2048K\n", 2048), ("512K", 512), ("", 512), ("2M\n", 512), (None, 512)])
def test_the_cache_is_as_large_as_the_system_says(text, kib, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_plan, "CACHE", tmp_path / "size")
    if text is not None:
        cpu_plan.CACHE.write_text(text)
    assert cpu_plan._cache_bytes() == kib << 10


@pytest.mark.parametrize("widths", [(8, 1 << 10), (1 << 10, 1 << 10, 8), (8, 1 << 12, 1 << 12), (8, 1 << 17, 8)])
def test_a_tile_is_as_high_as_the_widest_product_allows(widths, monkeypatch):
    monkeypatch.setattr(cpu_plan, "TILE_BYTES", 512 << 10)
    columns = [panels.round_up(n, panels.width("float32")) for n in widths]
    row = 4 * max(map(sum, pairwise(columns)))
    rows = cpu_plan.rows_in_cache(widths, "float32")
    assert rows % panels.BLOCK_ROWS == 0
    assert panels.BLOCK_ROWS <= rows <= cpu_plan.TILE_ROWS
    assert rows * row <= 512 << 10 or rows == panels.BLOCK_ROWS
    assert (rows + panels.BLOCK_ROWS) * row > 512 << 10 or rows == cpu_plan.TILE_ROWS


def test_threads_take_as_many_rows():
    rows_of = step.rows_of.py_func
    assert [rows_of(t, 2, 200) for t in range(2)] == [(0, 100), (100, 200)]
    for n_threads, n_rows in ((3, 1), (3, 7), (2, 13), (4, 1009)):
        ranges = [rows_of(t, n_threads, n_rows) for t in range(n_threads)]
        assert [r for low, high in ranges for r in range(low, high)] == list(range(n_rows))
        sizes = [high - low for low, high in ranges]
        assert max(sizes) - min(sizes) < 2 * panels.HALF_BLOCK_ROWS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_panels_of_a_mini_batch_are_no_whole_pages_apart(dtype):
    architecture, itemsize = network("numpy").architecture, np.dtype(dtype).itemsize
    for n_rows in (1, 31, 128, 512, 1000):
        layout = cpu_plan.Layout(architecture, cpu_plan.Plan(1, panels.BLOCK_ROWS, False), n_rows, dtype)
        assert layout.stride >= n_rows * panels.width(dtype)
        assert layout.stride * itemsize % 4096 != 0


def test_a_thread_takes_part_where_there_is_work_for_it(monkeypatch):
    monkeypatch.undo()

    def n_threads(sizes, batch_size, dtype="float32"):
        return cpu_plan.for_training(network("numpy", sizes=sizes).architecture, batch_size, dtype, 2).n_threads

    assert n_threads([64, 64, 64, 10], 32) == 1
    assert n_threads([64, 64, 64, 10], 256) == n_threads([30, 64, 64, 2], 200) == 2
    sizes = [32, 96, 16]  # whole vectors on every processor
    assert n_threads(sizes, 128, "float64") == 2  # where a multiply-add takes twice as long
    assert n_threads(sizes, 128) == 1
    assert n_threads([1024, 1024, 1024, 10], 7) == 2  # to share the update
    assert n_threads([256, 256, 256, 10], 7) == 1
    assert n_threads([784, 256, 128, 10], 1) == 2  # to share the first layer's columns
    assert n_threads([784, 33, 10], 1) == 1


def test_columns_are_split_where_every_thread_gets_about_as_many(monkeypatch):
    monkeypatch.undo()
    panel = panels.width("float32")
    for n_panels, batch_size, threads in itertools.product((1, 3, 8, 11, 22), (1, 8, 128, 129), (1, 2, 3, 8, 64)):
        sizes = [784, n_panels * panel - 1, 128, 10]
        architecture = network("numpy", sizes=sizes).architecture
        plan = cpu_plan.for_training(architecture, batch_size, "float32", threads)
        assert plan.n_threads <= threads
        if plan.split_columns:
            assert batch_size <= cpu_plan.COLUMNS_ROWS
            assert plan.n_threads > 1
            assert -(-n_panels // plan.n_threads) * plan.n_threads <= cpu_plan.EVEN * n_panels
            assert plan.n_threads <= max(2, sizes[1] // cpu_plan.COLUMNS_PER_THREAD)
        if n_panels == 8 and threads == 2 and batch_size <= 128:
            assert plan == replace(plan, n_threads=2, split_columns=True)
    assert not cpu_plan.for_training(network("numpy", sizes=[2048, 256]).architecture, 128, "float32", 2).split_columns


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_threads_that_share_the_update_alone_give_the_references_numbers(batch_size, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_NUM_THREADS", "5")
    monkeypatch.setattr(cpu_plan, "PARAMETERS_PER_THREAD", 1000)
    monkeypatch.setattr(cpu_plan, "PRODUCTS_PER_STEP", 1)
    monkeypatch.setattr(cpu_plan, "SPLIT_ROWS_BYTES", 0)
    sizes = [37, 101, 67, 5]
    X, y = draw(29, sizes)
    parameters = {}
    for backend in ("numpy", "cpu"):
        net = network(backend, sizes=sizes, activation="tanh")
        trainer, _ = trainer_of(net, X, y, batch_size, bp.Adam())
        run(trainer, 29, batch_size)
        parameters[backend] = net.parameters
    assert trainer.plan.n_threads == 5
    assert_same(parameters["cpu"], parameters["numpy"], "float64")


# The whole forward pass


PATHS = ["whole", "operations"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Inference in one compiled pass, or by the five operations."""
    few = 0 if request.param == "whole" else 1 << 60
    monkeypatch.setattr(importlib.import_module("backprop_gpu.backends.cpu"), "FEW_PRODUCTS", few)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [[1, 1, 2], [37, 41, 67], [31, 64, 33], SIZES])
@pytest.mark.parametrize(("n_rows", "threads"), [(1, 1), (131, 1), (1031, 3)])
def test_inference_is_the_references(path, dtype, sizes, n_rows, threads, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_NUM_THREADS", str(threads))
    monkeypatch.setattr(cpu_plan, "PRODUCTS_TO_START", 1)
    X, y = draw(n_rows, sizes, dtype)
    net, reference = (network(backend, dtype, sizes, activation="gelu") for backend in ("cpu", "numpy"))
    assert_same(net.predict_proba(X), reference.predict_proba(X), dtype)
    assert np.array_equal(net.predict(X), net.predict(X))
    assert np.array_equal(net.predict(X), reference.predict(X))
    actual, expected = net.evaluate(X, y), reference.evaluate(X, y)
    assert actual == {name: pytest.approx(value, rel=RTOL[dtype]) for name, value in expected.items()}


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_predictions_that_are_no_classes(path, loss):
    X, _ = draw(131)
    net, reference = (network(backend, loss=loss) for backend in ("cpu", "numpy"))
    assert_same(net.predict(X), reference.predict(X), "float64")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("call", ["predict", "predict_proba", "evaluate"])
def test_bad_rows_are_told_as_ever(path, value, call):
    X, y = draw(131)
    X[83, 36] = value
    net = network("cpu", "float32", activation="tanh")  # which makes a finite number of inf
    with pytest.raises(ValueError, match=r"X must be finite; got .* at row 83, column 36"):
        getattr(net, call)(X, *([y] if call == "evaluate" else []))


def test_rows_whose_sum_alone_is_too_large_are_good(path):
    X = np.full((131, SIZES[0]), 3e38, "float32")
    net = network("cpu", "float32", activation="tanh")
    net.W[0][...] *= 1e-3
    assert np.isfinite(net.predict_proba(X)).all()
    assert set(net.predict(X)) <= set(range(SIZES[-1]))


def test_an_output_that_is_not_a_number_has_no_label(path):
    X, _ = draw(20, [4, 3])
    net = network("cpu", sizes=[4, 3])
    net.b[0][1] = np.nan
    with pytest.raises(ValueError, match="output for row 0 is not a number"):
        net.predict(X)


def test_the_first_of_equal_outputs_wins_even_if_infinite(path):
    net = network("cpu", sizes=[4, 35])
    net.parameters[...] = 0
    net.b[0][...] = -np.inf
    for values, winner in (((1, 2, 2), 33), ((1, np.inf, np.inf), 33), ((-np.inf,) * 3, 0)):
        net.b[0][[3, 33, 34]] = values
        assert net.predict(np.ones((20, 4))).tolist() == [winner] * 20


# Accuracy


def gradient(backend, dtype, X, y, sizes):
    net = network(backend, dtype, sizes=sizes)
    if backend == "numpy":
        return net.backprop(X, y).gradients
    trainer, _ = trainer_of(net, X, y, len(X), bp.SGD(clip_norm=1e30))  # for which the whole gradient is kept
    run(trainer, len(X), len(X))
    flat = np.empty_like(net.parameters)
    memory = trainer.memory
    step.store(0, 1, trainer.layers, memory.sums[0] if trainer.plan.copies else memory.gradients[0], flat)
    return flat


@pytest.mark.parametrize("sizes", [[32, 64, 64, 16], [100, 500, 10]], ids=["rows split", "blocks split"])
def test_float32_gradients_of_16384_rows_are_nearly_as_good_as_numpys(sizes):
    X, y = draw(16384, sizes, "float32")
    exact = gradient("numpy", "float64", X, y, sizes)
    error = {b: np.abs(gradient(b, "float32", X, y, sizes) - exact).max() for b in ("numpy", "cpu")}
    assert 0 < error["cpu"] <= 2 * error["numpy"]


@pytest.mark.parametrize(("sizes", "batch"), [([30, 64, 64, 2], 200), ([784, 256, 128, 10], 128)])
def test_float32_parameters_after_5_adam_steps_are_those_of_float64(sizes, batch):
    X, y = draw(5 * batch, sizes, "float32")
    parameters = {}
    for backend, dtype in (("numpy", "float64"), ("cpu", "float32")):
        net = network(backend, dtype, sizes=sizes)
        start = net.parameters.copy()
        run(trainer_of(net, X, y, batch, bp.Adam())[0], 5 * batch, batch, 1e-3)
        parameters[backend] = net.parameters.astype("float64") - start
    change = np.linalg.norm(parameters["numpy"])
    assert 0 < np.linalg.norm(parameters["cpu"] - parameters["numpy"]) <= 1e-3 * change


# The same bits


def trained(**settings):
    X, y = draw(500, dtype="float32")
    net = network("cpu", "float32", dropout=0.1)
    history = net.fit(X, y, epochs=3, batch_size=64, **settings)
    return np.concatenate([net.parameters, history["loss"]])


def test_a_run_repeats_its_bits_however_often_it_returns_to_python(monkeypatch):
    first = trained()
    assert np.array_equal(first, trained())
    monkeypatch.setattr(cpu_step, "SECONDS_PER_CALL", 0.0)
    assert np.array_equal(first, trained())
    monkeypatch.setattr(cpu_step, "SECONDS_PER_CALL", 1e6)
    assert np.array_equal(first, trained())


def test_rows_elsewhere_than_in_memory_give_the_same_bits(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_step, "BYTES_PER_CALL", 1 << 14)
    X, y = draw(500, dtype="float32")
    np.save(tmp_path / "X.npy", X)
    nets = [network("cpu", "float32") for _ in range(3)]
    read_only = X.copy()
    read_only.flags.writeable = False
    for net, rows in zip(nets, (X, np.load(tmp_path / "X.npy", mmap_mode="r"), read_only), strict=True):
        net.fit(rows, y, epochs=2, batch_size=64)
    assert np.array_equal(nets[0].parameters, nets[1].parameters)
    assert np.array_equal(nets[0].parameters, nets[2].parameters)


# Threads and processes


def test_several_python_threads_may_train_at_once():
    expected = trained()
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(expected, result) for result in pool.map(lambda _: trained(), range(8)))


FORKED = """
import multiprocessing, numpy as np, backprop_gpu as bp
from backprop_gpu.backends import cpu_plan
cpu_plan.PRODUCTS_PER_STEP = cpu_plan.PRODUCTS_PER_CALL = 1  # so that there are teams
def train(seed):
    rng = np.random.default_rng(0)
    net = bp.MLP([7, 40, 3], backend="cpu", seed=1)
    net.fit(rng.standard_normal((300, 7)), rng.integers(0, 3, 300), epochs=5, batch_size=50)
    return net.parameters
expected = train(0)
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(np.array_equal(expected, result) for result in pool.map(train, range(6)))
print("alike")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_workers_train():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert result.stdout == "alike\n", result.stderr


def test_a_run_that_is_told_to_stop_has_made_whole_steps():
    X, y = draw(400)
    net, expected = network("cpu"), network("numpy")
    trainer, _ = trainer_of(net, X, y, 40, bp.SGD())
    rows = []
    trainer.run(np.arange(400), np.full(10, 0.01), np.zeros(10), 0, lambda n: bool(rows.append(n)))
    run(trainer_of(expected, X, y, 40, bp.SGD())[0], sum(rows), 40)
    assert 0 < sum(rows) < 400
    assert_same(net.parameters, expected.parameters, "float64")


# Products, on other machines too


PRODUCTS = """
import numpy as np
from backprop_gpu.kernels.numba_cpu import amx, gemm, nonzero
from backprop_gpu.kernels.numba_cpu.compile import executable
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, VECTOR_BYTES, round_up, width
from backprop_gpu.kernels.numba_cpu.thirds import entries

gemm_nn, gemm_tn = executable(gemm.gemm_nn.py_func), executable(gemm.gemm_tn.py_func)
begin, end = executable(amx.begin.py_func), executable(amx.end.py_func)
note_nonzero, gemm_nn_where, gemm_tn_where = (
    executable(function.py_func) for function in (nonzero.note_nonzero, nonzero.gemm_nn_where, nonzero.gemm_tn_where)
)

def in_panels(x, n_rows):
    w = width(x.dtype)
    full = np.zeros((n_rows, round_up(x.shape[1], w)), x.dtype)
    full[: len(x), : x.shape[1]] = x
    return np.ascontiguousarray(full.reshape(n_rows, -1, w).transpose(1, 0, 2)).ravel()

def row_major(flat, n_rows, n_columns, rows):
    w = width(flat.dtype)
    return flat.reshape(-1, rows, w).transpose(1, 0, 2).reshape(rows, -1)[:n_rows, :n_columns]

rng = np.random.default_rng(0)
for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-14)):
    w = width(dtype)
    assert w % BLOCK_ROWS == 0 and w % 4 == 0
    shapes = [(1, 1, 1), (BLOCK_ROWS - 1, 5, 3), (BLOCK_ROWS + 1, w - 1, w + 1), (31, 2 * w + 3, 2 * w), (13, w, 7)]
    shapes += [(7, 5, w + m) for m in range(1, w)]  # each number of vectors in the last panel, whole or not
    shapes += [(103, 160, 257), (161, 129, 300)]  # enough for a unit of its own, where there is one
    for n, k, m in shapes:
        A, B, D = (rng.standard_normal(shape).astype(dtype) for shape in ((n, k), (k, m), (n, m)))
        zeros, bias = np.zeros(w, dtype), np.zeros(round_up(m, w), dtype)
        bias[:m] = rng.standard_normal(m)
        rows = round_up(n, BLOCK_ROWS)
        a, b, d = in_panels(A, rows), in_panels(B, k), in_panels(D, rows)
        c = np.full(rows * round_up(m, w), np.nan, dtype)
        scratch = np.full(max(entries(n, k), entries(k, n)), np.nan, dtype)
        begin(a)
        gemm_nn((a, 0, rows * w), (b, 0, k * w), (c, 0, rows * w), (n, k, m), (bias, 0, w), scratch)
        expected = A.astype(float) @ B + bias[:m]
        assert np.abs(row_major(c, n, m, rows) - expected).max() <= tolerance * np.abs(expected).max()
        k_rows = round_up(k, BLOCK_ROWS)
        g = np.full(k_rows * round_up(m, w), np.nan, dtype)
        for p in range(round_up(m, w) // w):
            for accumulate in (False, True):
                c_start = p * k_rows * w
                matrices = (a, 0, rows * w), (0, k_rows), (d, 0, rows * w), p, (g, c_start), (n, m)
                gemm_tn(*matrices, accumulate, zeros, scratch, True, (g, 0))
        end(a)
        expected = 2 * (A.astype(float).T @ D)
        assert np.abs(row_major(g, k, m, k_rows) - expected).max() <= tolerance * np.abs(expected).max()
        A *= rng.random(A.shape) < 0.2
        A[0, 0] = 1
        a = in_panels(A, rows)
        words = np.zeros(a.size // w + nonzero.ROWS_AT_ONCE, np.uint32)
        left = a, 0, rows * w
        note_nonzero(*left, n, k, words)
        gemm_nn_where(words, left, (b, 0, k * w), (c, 0, rows * w), (n, k, m), (bias, 0, w))
        expected = A.astype(float) @ B + bias[:m]
        assert np.abs(row_major(c, n, m, rows) - expected).max() <= tolerance * np.abs(expected).max()
        right, panels, result = (d, 0, rows * w), (0, round_up(m, w) // w), (g, 0, k_rows * w)
        where = np.zeros(nonzero.rows_words(n, k_rows), np.uint64)
        gemm_tn_where(words, left, (0, k_rows), right, panels, result, (n, m), False, where, True, (g, -1))
        expected = A.astype(float).T @ D
        assert np.abs(row_major(g, k, m, k_rows) - expected).max() <= tolerance * np.abs(expected).max()
print(VECTOR_BYTES)
"""


@pytest.mark.parametrize(
    ("cpu", "vector_bytes"), [("", None), ("haswell", 32), ("skylake-avx512", 64), ("generic", 16)]
)
def test_products_for_every_width_of_vector(cpu, vector_bytes):
    llvm = pytest.importorskip("llvmlite.binding")
    if cpu not in ("", "generic") and not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip(f"{cpu} is not a processor of this architecture")
    features = llvm.get_host_cpu_features()
    if cpu == "skylake-avx512" and not features.get("avx512f"):
        pytest.skip("this processor has no AVX-512")
    named = {"haswell": "+avx,+avx2,+fma", "skylake-avx512": "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512dq"}
    chosen = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": named.get(cpu, "")} if cpu else {}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRODUCTS)], env=os.environ | chosen, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert vector_bytes is None or int(result.stdout) == vector_bytes


MASKED_STORES = """
import re
import numpy as np
from backprop_gpu.kernels.numba_cpu import activations, output_delta
from backprop_gpu.kernels.numba_cpu.compile import executable

loops = {
    "σ": (activations.apply.py_func, 0, "x", 0, "x", 0, 1),
    "σ′": (activations.multiply_by_derivative.py_func, 0, "x", 0, 1.0, "x", 0, 1),
    "most": (output_delta.most_of_columns, "x", 0, 1, 1, 1),
}
for name, (function, *arguments) in loops.items():
    for dtype in ("float32", "float64"):
        compiled = executable(function)
        compiled(*(np.zeros(2, dtype) if argument == "x" else argument for argument in arguments))
        (code,) = compiled.inspect_asm().values()
        assert len(re.findall(r"vmulp[sd]|vmaxp[sd]|vblendvp[sd]", code)) > 0, (name, dtype, "not vectorised")
        stores = re.findall(r"vp?maskmov[a-z]+\\s+%ymm\\d+, %ymm\\d+, .*", code)
        assert not stores, (name, dtype, stores)
"""


def test_no_loop_writes_only_what_changes():
    # Without AVX-512 that is a masked store, for which AMD's processors take a dozen cycles.
    llvm = pytest.importorskip("llvmlite.binding")
    if not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip("masked stores of AVX2: this is not a processor of that architecture")
    chosen = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MASKED_STORES)], env=os.environ | chosen, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_product_asks_for_the_weights_that_it_needs_next():
    product, n = compiling.executable(gemm.gemm_nn.py_func), 2 * panels.width("float32")
    a, c, zeros = np.ones(n * n, np.float32), np.empty(n * n, np.float32), np.zeros(n, np.float32)
    stride = n * n // 2
    square, scratch = (a, 0, stride), np.empty(0, np.float32)
    product(square, square, (c, 0, stride), (n, n, n), (zeros, 0, 0), scratch)
    assert (c == n).all()
    (code,) = product.inspect_llvm().values()
    assert "call void @llvm.prefetch" in code


def test_dropout_of_the_operations_is_the_contracts():
    ops = bp.get_backend("cpu")
    reference = bp.get_backend("numpy")
    rng = np.random.default_rng(0)
    a, W, b = rng.standard_normal((13, 5)), rng.standard_normal((5, 37)), rng.standard_normal(37)
    dropout = Dropout(0.3, 2**40 + 1, 2, 9)
    actual, expected = (x.dense_forward(a, W, b, "tanh", dropout=dropout)[0] for x in (ops, reference))
    assert_same(actual, expected, "float64")
    assert np.array_equal(actual == 0, expected == 0)


# From run to run


def padding(trainer):
    """Which entries of the packed parameters are none of the network's."""
    used = np.zeros_like(trainer.memory.parameters[0])
    LOAD(0, 1, trainer.layers, 0, np.ones_like(trainer.job.parameters), used)
    return used == 0


LOAD = compiling.executable(step.load_vector.py_func)
LANES = panels.lanes("float64")


@every_split
@pytest.mark.parametrize("optimizer", [bp.AdamW(clip_norm=0.5), bp.RMSprop()], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("n_out", [91, 10 * LANES + 1, max(2, LANES // 4)], ids=["many", "many and one", "few"])
def test_the_padding_of_every_vector_stays_zero(split, n_out, optimizer, monkeypatch):
    """Else the penalty, and so the loss, counts weights that the network does not have."""
    sizes = [37, 102, n_out]  # of more blocks than a thread's buffer holds, with narrow ones late
    plan = cpu_plan.Plan(2, 2 * panels.BLOCK_ROWS, **split)
    monkeypatch.setattr(cpu_plan, "for_training", lambda *_: plan)
    X, y = draw(331, sizes)
    totals = {}
    for backend in ("numpy", "cpu"):
        trainer, _ = trainer_of(network(backend, sizes=sizes, activation="sigmoid"), X, y, 83, optimizer)
        totals[backend] = [run(trainer, 331, 83, alpha=1.0) for _ in range(3)]
    assert totals["cpu"] == pytest.approx(totals["numpy"], rel=RTOL["float64"])
    unused = padding(trainer)
    assert unused.any()
    for vector in (trainer.memory.parameters, trainer.memory.slot_1, trainer.memory.slot_2):
        assert not vector[:, unused[: vector.shape[1]]].any()


@pytest.mark.parametrize("threads", ["1", "2", "3"])
@pytest.mark.parametrize("sizes", [[8, 64, 64, 2], [37, 300, 250, 5]], ids=["packed by one", "packed by all"])
def test_many_runs_that_put_parameters_back_are_the_references(sizes, threads, monkeypatch, tmp_path):
    """Every epoch packs and unpacks: early stopping, callbacks and checkpoints change the vectors in between."""
    monkeypatch.setenv("BACKPROP_GPU_NUM_THREADS", threads)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, sizes[0]))
    y = np.column_stack([X[:, 0] * X[:, 1], np.sin(X[:, 2]), *X.T[: sizes[-1] - 2]])

    def halve(net, history):
        if len(history) % 7 == 3:
            net.W[1][...] *= 0.5

    results = {}
    for backend in ("numpy", "cpu"):
        net = network(backend, sizes=sizes, activation=["silu", "tanh"], loss=bp.Huber(1.0), dropout=0.05, alpha=1e-3)
        settings = {
            "batch_size": 64,
            "optimizer": bp.AdamW(5e-3, clip_norm=1.0),
            "validation_fraction": 0.2,
            "early_stopping": bp.EarlyStopping(patience=3),
            "callbacks": [halve],
            "checkpoint": tmp_path / backend,
        }
        net.fit(X, y, epochs=9, **settings)
        net.parameters[...] = 0  # the checkpoint has them
        history = net.fit(X, y, epochs=20, **settings)
        results[backend] = (net.parameters, history["loss"], history["val_r2"])
    for actual, expected in zip(results["cpu"], results["numpy"], strict=True):
        assert_same(np.array(actual), np.array(expected), "float64")


@pytest.mark.parametrize("sizes", [[9, 7, 3], [129, 300, 250, 5]])
def test_vectors_that_are_not_aligned_are_trained_in_place(sizes):
    X, y = draw(60, sizes)
    parameters = {}
    for aligned in (True, False):
        net = network("cpu", sizes=sizes)
        if not aligned:
            raw = np.zeros(net.parameters.nbytes + 1, np.uint8)
            odd = raw[1:].view(np.float64)
            odd[...] = net.parameters
            net._bind(odd)
            assert not net.parameters.flags.aligned
        run(trainer_of(net, X, y, 20, bp.Adam())[0], 60, 20)
        parameters[aligned] = np.array(net.parameters)
    assert np.array_equal(parameters[True], parameters[False])


def test_large_memory_is_zeroed_aligned_and_a_processs_own():
    for n_bytes in (1, 1000, cpu_plan.HUGE_PAGE // 4, 3 * cpu_plan.HUGE_PAGE + 5):
        x = cpu_plan.zeros(n_bytes)
        assert x.shape == (n_bytes,)
        assert x.ctypes.data % cpu_plan.ALIGNMENT == 0
        assert not x.any()
        x[...] = 1


PRIVATE = """
import os
from backprop_gpu.backends.cpu_plan import zeros
x = zeros(1 << 22)
if os.fork() == 0:
    x[...] = 1
    os._exit(0)
os.wait()
print(x.any())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_writes_to_memory_of_its_own():
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", PRIVATE], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr
