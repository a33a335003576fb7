"""The numba-cuda backend: whole steps and every tile in Numba's simulator or on a GPU; PTX; errors without one."""

import ctypes
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from steps import trainer_of

import backprop_gpu as bp
from backprop_gpu import training
from backprop_gpu.backends import numba_cuda, selection

STATUS = next(status for status in bp.backends() if status.name == "numba-cuda")

runs = pytest.mark.skipif(not STATUS.works, reason=str(STATUS))
"""Needs the simulator or a GPU."""

if STATUS.works:
    arrays, kernels, plan, step = (
        import_module(f"backprop_gpu.backends.numba_cuda_{name}") for name in ("arrays", "kernels", "plan", "step")
    )
    gemm = import_module("backprop_gpu.kernels.numba_cuda.gemm")

pytestmark = [pytest.mark.gpu] if STATUS.automatic else []

RTOL = {"float32": 1e-5, "float64": 1e-12}

SIZES = [5, 7, 6, 3]


def network(backend, sizes=SIZES, dtype="float64", **settings):
    return bp.MLP(sizes, backend=backend, dtype=dtype, seed=3, **settings)


def draw(n, sizes=SIZES, loss="cross_entropy", seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, sizes[0]))
    if loss == "cross_entropy":
        return X, rng.integers(0, sizes[-1], n)
    return X, rng.poisson(2, (n, sizes[-1])) if loss == "poisson" else rng.random((n, sizes[-1]))


def on_host(net, x=None):
    return np.array(net.ops.to_numpy(net.parameters if x is None else x))


def assert_same(actual, expected, dtype="float64"):
    assert np.isfinite(actual).all()
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    assert np.abs(actual - expected).max() <= RTOL[dtype] * np.abs(expected).max()


def take_steps(trainer, n_rows, batch_size, after_step=lambda _: True):
    n_steps = -(-n_rows // batch_size)
    return trainer.run(np.arange(n_rows), np.full(n_steps, 1e-2), np.zeros(n_steps), 0, after_step)


# Whole runs: the reference's losses and parameters

RUNS = {
    "kinked": {"activation": ["relu", "leaky_relu"], "optimizer": bp.SGD(0.05, momentum=0.9, nesterov=True)},
    "exponential": {"activation": ["elu", "selu"], "optimizer": bp.SGD(0.05, clip_norm=0.5), "alpha": 1e-2},
    "from a": {"activation": ["sigmoid", "tanh"], "optimizer": bp.Adam(0.01), "dropout": [0.2, 0.4]},
    "gated": {"activation": ["silu", "mish"], "optimizer": bp.AdamW(0.01, clip_norm=1.0), "weighted": True},
    "gelus": {"activation": ["gelu", "gelu_tanh"], "optimizer": bp.RMSprop(0.01), "dropout": 0.3, "alpha": 1e-2},
    "others": {"activation": ["softplus", "sine"], "optimizer": bp.AdamW(0.01, weight_decay=0.1), "alpha": 1e-3},
    "no hidden layer": {"sizes": [5, 3], "optimizer": bp.Adam(0.05)},
    "binary_cross_entropy": {"activation": "tanh", "loss": "binary_cross_entropy", "optimizer": bp.Adam(0.01)},
    "poisson": {"activation": "tanh", "loss": "poisson", "optimizer": bp.SGD(0.01), "weighted": True},
    "huber": {"activation": "identity", "loss": bp.Huber(0.3), "output_activation": "gelu", "optimizer": bp.Adam(0.01)},
    "smoothed": {"activation": "relu", "loss": bp.CrossEntropy(label_smoothing=0.1), "optimizer": bp.RMSprop(0.01)},
}


@runs
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float64") for name in RUNS), ("kinked", "float32"), ("gated", "float32")]
)
def test_a_run_is_the_references(name, dtype):
    settings = dict(RUNS[name])
    optimizer, weighted, sizes = (
        settings.pop("optimizer"),
        settings.pop("weighted", False),
        settings.pop("sizes", SIZES),
    )
    loss = settings.get("loss", "cross_entropy")
    X, y = draw(37, sizes, getattr(loss, "name", loss))
    w = np.random.default_rng(1).random(37) * (np.arange(37) % 5 != 0) if weighted else None
    fits = {}
    for backend in ("numpy", "numba-cuda"):
        # The reference in float64: Adam magnifies what float32 rounds, in both alike.
        net = network(backend, sizes, "float64" if backend == "numpy" else dtype, **settings)
        before = on_host(net)
        history = net.fit(X, y, epochs=3, batch_size=10, optimizer=optimizer, sample_weight=w)
        fits[backend] = np.array(history["loss"]), on_host(net) - before
    (losses, changes), (expected_losses, expected_changes) = fits["numba-cuda"], fits["numpy"]
    tolerance = 1e-3 if dtype == "float32" else 1e-9
    assert np.abs(losses - expected_losses).max() <= tolerance * np.abs(expected_losses).max()
    assert np.abs(changes - expected_changes).max() <= tolerance * np.abs(expected_changes).max()


@runs
def test_a_hundred_steps_have_the_references_loss_curve():
    X, y = draw(40, [5, 4, 3])
    curves = []
    for backend in ("numpy", "numba-cuda"):
        net = network(backend, [5, 4, 3], dropout=0.1)
        curves.append(net.fit(X, y, epochs=25, batch_size=10, optimizer=bp.Adam(0.01))["loss"])
    assert np.abs(np.array(curves[1]) / curves[0] - 1).max() <= 1e-9


@runs
@pytest.mark.parametrize("n_rows", [1, 2, 17])
def test_a_mini_batch_larger_than_what_is_left(n_rows):
    X, y = draw(n_rows)
    parameters = {}
    for backend in ("numpy", "numba-cuda"):
        net = network(backend)
        take_steps(trainer_of(net, X, y, min(n_rows, 16), bp.SGD(momentum=0.5))[0], n_rows, min(n_rows, 16))
        parameters[backend] = on_host(net)
    assert_same(parameters["numba-cuda"], parameters["numpy"])


@runs
@pytest.mark.parametrize("sizes", [[1, 1], [3, 1, 1, 2], [17, 33, 19]], ids=str)
def test_layers_of_any_width(sizes):
    X, y = draw(9, sizes, "squared_error")
    parameters = {}
    for backend in ("numpy", "numba-cuda"):
        net = network(backend, sizes, loss="squared_error", activation="softplus")
        take_steps(trainer_of(net, X, y, 5, bp.RMSprop())[0], 9, 5)
        parameters[backend] = on_host(net)
    assert_same(parameters["numba-cuda"], parameters["numpy"])


# How a run goes


@runs
def test_an_epoch_is_read_once_and_takes_3l_plus_2_launches(monkeypatch):
    net = network("numba-cuda", dropout=0.1)
    X, y = draw(30)
    trainer, _ = trainer_of(net, X, y, 10, bp.Adam())
    reads = []
    to_host = arrays.to_host
    monkeypatch.setattr(arrays, "to_host", lambda x: reads.append(x) or to_host(x))
    losses = take_steps(trainer, 30, 10)
    assert math.isfinite(losses)
    assert len(reads) == 1
    (sequence,) = trainer.sequences.values()
    assert len(sequence) == 3 * net.architecture.n_layers + 2


@runs
def test_the_same_bits_whenever_the_host_looks(monkeypatch):
    X, y = draw(50)
    results = []
    for seconds, first_read in ((0.25, 256), (0.25, 256), (0.0, 1), (1e6, 2)):
        monkeypatch.setattr(step, "SECONDS_PER_READ", seconds)
        monkeypatch.setattr(step, "FIRST_READ", first_read)
        net = network("numba-cuda", dtype="float32", dropout=0.2)
        history = net.fit(X, y, epochs=2, batch_size=8)
        results.append((on_host(net), history["loss"]))
    for parameters, losses in results[1:]:
        assert np.array_equal(parameters, results[0][0])
        assert losses == results[0][1]


@runs
def test_rows_elsewhere_than_in_memory_give_the_same_bits(monkeypatch, tmp_path):
    X, y = draw(50)
    np.save(tmp_path / "X.npy", X)
    nets = [network("numba-cuda") for _ in range(3)]
    nets[0].fit(X, y, epochs=2, batch_size=8)
    monkeypatch.setattr(step, "BYTES_PER_UPLOAD", 3 * 8 * 5 * 8)  # 3 mini-batches, less the targets
    nets[1].fit(np.load(tmp_path / "X.npy", mmap_mode="r"), y, epochs=2, batch_size=8)
    monkeypatch.setattr(arrays, "free_bytes", lambda: 1000)
    nets[2].fit(X, y, epochs=2, batch_size=8)
    for net in nets[1:]:
        assert np.array_equal(on_host(net), on_host(nets[0]))


@runs
def test_rows_on_the_device_stay_there(monkeypatch):
    X, y = draw(30)
    nets = [network("numba-cuda") for _ in range(2)]
    nets[0].fit(X, y, epochs=2, batch_size=8)
    rows = nets[1].ops.asarray(X)
    monkeypatch.setattr(type(nets[1].ops), "to_numpy", None)
    job = training._job(nets[1], bp.SGD(), nets[1]._take_in(rows, y, None), 8, 0)
    assert training._trainer(nets[1], job).resident
    probabilities = nets[1].predict_proba(rows)
    monkeypatch.undo()
    assert nets[1].ops.owns(probabilities)
    assert np.array_equal(on_host(nets[1], probabilities), nets[1].predict_proba(X))
    nets[1].fit(rows, y, epochs=2, batch_size=8)
    assert np.array_equal(on_host(nets[1]), on_host(nets[0]))


@runs
def test_a_stream_keeps_its_launches_and_leaves_the_callers_rows_alone(monkeypatch):
    built, sequence = [], step._Passes.sequence
    monkeypatch.setattr(step._Passes, "sequence", lambda passes, *rest: built.append(passes) or sequence(passes, *rest))
    X, y = draw(64)
    net, expected = (network("numba-cuda", dropout=0.5, alpha=1e-3) for _ in range(2))
    on_device, trainers = arrays.asarray(X[:16]), []
    for rows, first, w in (
        (X[:16], 0, None),
        (X[16:32], 16, None),
        (X[32:48], 32, 1.0 + y[32:48]),
        (on_device, 0, None),
        (X[48:], 48, None),
        (X[16:32], 16, None),
    ):
        labels = y[first : first + 16]
        built.clear()
        loss = net.partial_fit(rows, labels, sample_weight=w)
        trainers.append(len(built))
        assert loss == expected.partial_fit(rows, labels, sample_weight=w)
        expected.stream.trainer = None
        assert np.array_equal(on_host(net), on_host(expected))
    assert trainers == [1, 0, 0, 1, 1, 0]
    assert np.array_equal(arrays.to_host(on_device), X[:16])


@runs
def test_a_stream_whose_mini_batches_grow():
    X, y = draw(32)
    nets = [network("numba-cuda") for _ in range(2)]
    for n in (10, 32, 5):
        assert len({net.partial_fit(X[:n], y[:n], batch_size=32) for net in nets}) == 1
        nets[1].stream.trainer = None
    assert np.array_equal(*map(on_host, nets))


@runs
def test_an_array_of_the_host_is_refused():
    ops = bp.get_backend("numba-cuda")
    with pytest.raises(TypeError, match=r"device arrays; got ndarray \(ops.asarray"):
        ops.output_forward(np.ones((2, 3)), "tanh")


@runs
def test_a_run_that_is_told_to_stop_has_made_whole_steps(monkeypatch):
    monkeypatch.setattr(step, "FIRST_READ", 2)
    X, y = draw(40)
    net, expected = network("numba-cuda"), network("numpy")
    rows = []
    take_steps(trainer_of(net, X, y, 8, bp.SGD())[0], 40, 8, lambda n: bool(rows.append(n)))
    take_steps(trainer_of(expected, X, y, 8, bp.SGD())[0], sum(rows), 8)
    assert rows == [16]
    assert_same(on_host(net), on_host(expected))


@runs
def test_a_run_that_diverges_says_so():
    X, y = draw(20)
    net = network("numba-cuda", loss="squared_error", activation="identity")
    before = on_host(net)
    with pytest.raises(bp.DivergenceError):
        net.fit(X, np.eye(3)[y], epochs=400, batch_size=10, optimizer=bp.SGD(1e6))
    assert np.isfinite(on_host(net)).all()
    assert on_host(net).shape == before.shape


@runs
def test_inference_and_backprop_are_the_references():
    X, y = draw(11)
    net, expected = network("numba-cuda"), network("numpy")
    assert_same(net.predict_proba(X), expected.predict_proba(X))
    mine, theirs = net.backprop(X, y), expected.backprop(X, y)
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-12)
    for name in ("z", "a", "delta", "dW", "db"):
        for x, reference in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            assert_same(on_host(net, x), reference)


# Tiles


@runs
@pytest.mark.parametrize("name", gemm.TILES if STATUS.works else [])
def test_every_tile(name, monkeypatch):
    """One block of each, not quite full, and two panels of the sum: the plan chooses but one in the simulator."""
    tile = gemm.TILES[name]
    monkeypatch.setattr(plan, "tiles", lambda dtype: (tile,))
    n, m, k = tile.rows - 1, tile.columns - 1, tile.depth + 1
    rng = np.random.default_rng(0)
    ops, reference = bp.get_backend("numba-cuda"), bp.get_backend("numpy")

    def both(operation, *operands, **settings):
        mine = operation(ops)(*(ops.asarray(x, "float32") for x in operands), **settings)
        theirs = operation(reference)(*operands, **settings)
        for x, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in (mine, theirs)), strict=True):
            assert_same(ops.to_numpy(x), expected, "float32")

    A, B, b = rng.standard_normal((n, k)), rng.standard_normal((k, m)), rng.standard_normal(m)
    both(lambda backend: backend.dense_forward, A, B, b, activation="tanh")
    both(
        lambda backend: backend.dense_backward,
        A,
        np.ascontiguousarray(B.T),
        rng.standard_normal((n, m)),
        activation="sine",
    )
    both(lambda backend: backend.dense_gradients, np.ascontiguousarray(A.T), B)


@runs
def test_a_plan_covers_all_and_wastes_no_part():
    for n_in, n_out, n_rows in ((1, 1, 1), (784, 256, 128), (64, 64, 16384), (1031, 7, 4097), (2048, 2048, 100)):
        for dtype in ("float32", "float64"):
            division = plan.division((n_in, n_out), n_rows, dtype)
            assert (division.n - 1) * division.rows < n_rows <= division.n * division.rows
            assert division == plan.division((n_in, n_out), n_rows, dtype)
            assert plan.tile((n_rows, n_out), dtype) in plan.tiles(dtype)


@runs
def test_every_tile_has_threads_for_whole_panels():
    for tile in (*gemm.TILES.values(), gemm.TILE_IN_SIMULATOR):
        assert tile.rows * tile.depth % tile.threads == 0
        assert tile.columns * tile.depth % tile.threads == 0
        assert 2 * tile.depth * (tile.rows + tile.columns + 2) * 8 <= 48 << 10


@runs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [509, 512])
def test_products_of_512_terms_keep_their_digits(k, dtype):
    rng = np.random.default_rng(0)
    ops, reference = bp.get_backend("numba-cuda"), bp.get_backend("numpy")
    A, B, b = (rng.standard_normal(shape).astype(dtype) for shape in ((5, k), (k, 7), 7))
    calls = {
        "nn": lambda ops, put: ops.dense_forward(put(A), put(B), put(b), "identity")[:1],
        "nt": lambda ops, put: [ops.dense_backward(put(A), put(B.T), put(np.ones((5, 7))), "identity")],
        "tn": lambda ops, put: ops.dense_gradients(put(A.T), put(B)),
    }
    for layout, call in calls.items():
        actual = call(ops, lambda x: ops.asarray(np.ascontiguousarray(x), dtype))
        expected = call(reference, lambda x: np.ascontiguousarray(x, np.float64))
        for x, exact in zip(actual, expected, strict=True):
            error = np.abs(ops.to_numpy(x) - exact).max() / np.abs(exact).max()
            assert error <= (1e-6 if dtype == "float32" else 1e-12), layout


# Barriers: the simulator looks for no races, but they can be seen there


class Watched:
    """Shared memory that raises where two threads come to one entry between two barriers, and one of them writes."""

    def __init__(self, shape, dtype):
        self.values, self.readers, self.writers, self.written = np.empty(shape, dtype), {}, {}, set()

    def __getitem__(self, index):
        assert index in self.written, f"read before it is written: {index}"
        self._note(self.readers, index)
        return self.values[index]

    def __setitem__(self, index, value):
        self._note(self.writers, index)
        self.written.add(index)
        self.values[index] = value

    def _note(self, group, index):
        thread = threading.current_thread()
        here = index, thread.barriers
        group.setdefault(here, set()).add(thread.thread_id)
        writers = self.writers.get(here, set())
        assert not writers or len(writers | self.readers.get(here, set())) == 1, f"race at {index}"


@pytest.fixture
def watch(monkeypatch):
    """watch(missing): shared memory is watched; a thread's barrier `missing`, from 0, counts as if it were not."""
    if not STATUS.works or STATUS.automatic:
        pytest.skip("needs Numba's simulator")
    device = import_module("backprop_gpu.kernels.numba_cuda.device")
    thread = import_module("numba.cuda.simulator.kernel").BlockThread
    wait = thread.syncthreads

    def watch(missing=None):
        def syncthreads(self):
            wait(self)
            self.passed += 1
            self.barriers += self.passed - 1 != missing

        monkeypatch.setattr(thread, "passed", 0, raising=False)
        monkeypatch.setattr(thread, "barriers", 0, raising=False)
        monkeypatch.setattr(thread, "syncthreads", syncthreads)
        monkeypatch.setattr(device.Shared, "new", Watched)

    return watch


def test_no_thread_is_ahead_of_a_barrier(watch):
    """Every kernel with shared memory: products of several panels, rows of several lanes, sums of blocks."""
    watch()
    X, y = draw(20, [19, 9, 11])
    net = network("numba-cuda", [19, 9, 11], dropout=0.1, alpha=1e-2)
    net.fit(X, y, epochs=1, batch_size=20, optimizer=bp.Adam(clip_norm=0.1), sample_weight=np.arange(20.0))
    assert np.isfinite(net.predict_proba(X)).all()
    ops = net.ops
    z = ops.asarray(np.random.default_rng(0).standard_normal((2, 1025)))  # a whole block to a row
    loss, _ = ops.output_delta(z, ops.asarray(np.array([3, 1024], np.int32)), "cross_entropy")
    assert math.isfinite(float(loss))


def product_of_three_panels(ops):
    ops.dense_forward(*(ops.asarray(np.ones(shape)) for shape in ((3, 24), (24, 3), 3)), "identity")


def loss_of_rows_of_many_lanes(ops):
    z = np.random.default_rng(0).standard_normal((2, 9))
    ops.output_delta(ops.asarray(z), ops.asarray(np.array([3, 8], np.int32)), "cross_entropy")


@pytest.mark.parametrize(
    ("operation", "missing"),
    [(product_of_three_panels, number) for number in range(3)] + [(loss_of_rows_of_many_lanes, n) for n in range(12)],
)
def test_no_barrier_could_be_spared(watch, operation, missing):
    """The loss has three in each of a maximum and two sums over lanes, and three and a last in that over a block."""
    ops = bp.get_backend("numba-cuda")
    operation(ops)
    watch(missing)
    with pytest.raises(AssertionError, match="race at"):
        operation(ops)


# On a GPU: others' arrays, and streams


class Exports:
    """An array of ours that offers one protocol alone, as another library's would."""

    def __init__(self, array, *protocols):
        for protocol in protocols:
            setattr(type(self), protocol, property(lambda self, protocol=protocol: getattr(array, protocol)))


@pytest.fixture
def on_gpu():
    if not STATUS.automatic:
        pytest.skip(f"needs an NVIDIA GPU; {STATUS}")
    return bp.get_backend("numba-cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "protocols", [("__cuda_array_interface__",), ("__dlpack__", "__dlpack_device__")], ids=["interface", "dlpack"]
)
def test_arrays_come_in_and_go_out_without_a_copy(on_gpu, protocols):
    x = on_gpu.asarray(np.arange(12.0).reshape(3, 4))
    kind = type("Foreign", (Exports,), {})
    view = on_gpu.asarray(kind(x, *protocols))
    view[...] = on_gpu.asarray(np.ones((3, 4)))
    assert (on_gpu.to_numpy(x) == 1).all()
    assert view.__cuda_array_interface__["data"] == x.__cuda_array_interface__["data"]
    assert on_gpu.asarray(kind(x, *protocols), "float32").dtype == np.float32


@pytest.mark.gpu
def test_an_operation_runs_on_the_stream_that_its_arrays_name(on_gpu):
    cuda = import_module("numba.cuda")
    stream = cuda.stream()
    x = on_gpu.asarray(cuda.to_device(np.random.default_rng(0).standard_normal((33, 5)), stream=stream))
    assert x.stream
    a = on_gpu.output_forward(x, "tanh", a=arrays.empty((33, 5), "float64", stream))
    assert a.__cuda_array_interface__["stream"] == x.__cuda_array_interface__["stream"]
    assert_same(on_gpu.to_numpy(a), np.tanh(on_gpu.to_numpy(x)))


# PTX, without a driver


def test_kernels_compile_to_ptx(tmp_path):
    """One test, as processes share nothing: the program that it starts has as many as the machine has cores.

    With PTX_FOR=all in the environment, every kernel for every architecture; see the program.
    """
    program, output = Path(__file__).with_name("numba_cuda_ptx.py"), tmp_path / "facts.json"
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", "PYTHONPATH": str(program.parents[1])}
    probe = "from numba.cuda.cudadrv import nvrtc, nvvm; assert nvvm.is_available() and nvrtc.get_supported_ccs()"
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode != 0:
        pytest.skip("needs the numba-cuda13 or numba-cuda12 extra of this package: Numba-CUDA, libNVVM and NVRTC")
    everything = ["--all"] if os.environ.get("PTX_FOR") == "all" else []
    subprocess.run([sys.executable, str(program), str(output), *everything], env=environment, check=True)
    facts = json.loads(output.read_text())
    for dtype in RTOL:
        assert_every_activation_is_in_every_product(facts, dtype)
    assert_every_architecture_is_served(facts, everything)
    for name, by_architecture in facts.items():
        for architecture, seen in by_architecture.items():
            assert_as_it_should_be(name, seen, f"{name}, {architecture}")


def assert_every_activation_is_in_every_product(names, dtype):
    """In every tile, with dropout and without; in the output layer, under every loss that takes it."""
    tiles = {name.split(", ")[1] for name in names if name.startswith("dense_gradients") and name.endswith(dtype)}
    assert len(tiles) >= 4
    for activation in bp.ACTIVATIONS.values():
        for tile, dropout in itertools.product(tiles, ("", ", dropout")):
            for z in (", z",) if activation.derivative_from == "z" else ("", ", z"):
                assert f"dense_forward, {tile}, {activation.name}{dropout}{z}, {dtype}" in names
            assert f"dense_backward, {tile}, {activation.name}{dropout}, {dtype}" in names
        for loss, lanes in itertools.product(("squared_error", "absolute_error", "huber"), (1, 32, 128)):
            assert f"output_delta, {loss}, {activation.name}, rows, {lanes}, {dtype}" in names


def assert_every_architecture_is_served(facts, everything):
    """Each operation in each dtype by all; all of the smallest size, and every size, by the oldest and the newest.

    And each word of an operation (activation, loss, …) in each size by the oldest.
    """
    known = set().union(*facts.values())
    assert known >= {"75", "80", "86", "89", "90"}
    ends = set(sorted(known, key=int)[:: len(known) - 1])
    served = {}
    for name, by_architecture in facts.items():
        operation, *words, dtype = name.split(", ")
        size = next(filter(re.compile(r"\d+(x\d+)?").fullmatch, words), "")
        least = known if everything else ends if size in ("", "1", "32x32") else set()
        assert set(by_architecture) >= least, name
        cells = [((operation, dtype), known), ((operation, size), ends)]
        for cell, wanted in cells + [((operation, size, word), {"75"}) for word in (*words, dtype)]:
            served.setdefault(cell, (wanted, set()))[1].update(by_architecture)
    for cell, (wanted, met) in served.items():
        assert met >= wanted, cell


def assert_as_it_should_be(kernel, seen, name):
    """After the sum, a long epilogue may lay C out in local memory, once; sine calls, for a large angle's remainder."""
    assert seen["shared"] <= 48 << 10, name
    assert seen["atomics"] == 0, name
    assert "sine" in kernel or not seen["calls"], name
    if kernel.startswith("dense"):
        assert seen["panels"] == 1, name
        assert seen["local_while_multiplying"] == 0, name


# Where it does not work


@pytest.fixture
def not_simulated(monkeypatch):
    monkeypatch.setattr(numba_cuda, "simulated", lambda: False)
    monkeypatch.delenv("NUMBA_CUDA_DRIVER", raising=False)


def test_without_numba_cuda(not_simulated, monkeypatch):
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None)
    assert "Numba-CUDA is not installed; pip install 'numba-cuda[cu13]'" in numba_cuda.probe()


def test_without_a_driver(not_simulated, monkeypatch):
    def not_found(name):
        raise OSError(name)

    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: True)
    monkeypatch.setattr(ctypes, "CDLL", not_found)
    assert "no NVIDIA driver" in numba_cuda.probe()
    assert "backend='cpu'" in numba_cuda.probe()


@pytest.mark.parametrize(
    ("starts", "compiles", "capability", "expected"),
    [
        (False, True, (9, 0), "does not start (no device)"),
        (True, False, (9, 0), "no libNVVM, its compiler; pip install 'numba-cuda[cu13]'"),
        (True, True, (7, 0), "compute capability 7.0, below 7.5"),
        (True, True, (6, 1), "compute capability 6.1, below 7.5"),
        (True, True, (7, 5), None),
        (True, True, (12, 0), None),
    ],
)
def test_what_numba_finds_wrong(not_simulated, monkeypatch, starts, compiles, capability, expected):
    cuda = pytest.importorskip("numba.cuda")
    driver = SimpleNamespace(is_available=starts, initialization_error="no device")
    nvvm = SimpleNamespace(is_available=lambda: compiles)
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.driver", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.nvvm", nvvm)
    gpu = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(cuda, "get_current_device", lambda: gpu, raising=False)
    reason = numba_cuda.probe()
    assert reason is None if expected is None else expected in reason


@pytest.fixture
def asked_anew(not_simulated, monkeypatch):
    """What works is found out once, and again in a test that changes it, and after that."""
    selection._status.cache_clear()
    yield
    monkeypatch.undo()
    selection._status.cache_clear()


def no_numba_cuda(monkeypatch):
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: None)


def no_numba(monkeypatch):
    monkeypatch.setattr(numba_cuda, "probe", lambda: import_module("numba.no_such_module"))


def no_driver(monkeypatch):
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: True)
    monkeypatch.setattr(numba_cuda, "_no_driver", lambda: "no NVIDIA driver: libcuda.so.1 is not found; backend='cpu'")


def old_gpu(monkeypatch):
    monkeypatch.setattr(numba_cuda, "find_spec", lambda name: True)
    monkeypatch.setattr(numba_cuda, "_no_driver", lambda: None)
    monkeypatch.setattr(numba_cuda, "_unusable", lambda: "compute capability 7.0, below 7.5; backend='cpu'")


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (no_numba, "no_such_module.*; pip install 'numba-cuda"),
        (no_numba_cuda, "Numba-CUDA is not installed; pip install 'numba-cuda"),
        (no_driver, "no NVIDIA driver.*backend='cpu'"),
        (old_gpu, "compute capability 7.0, below 7.5.*backend='cpu'"),
    ],
)
def test_auto_moves_on_and_says_why(asked_anew, monkeypatch, cause, reason):
    cause(monkeypatch)
    with pytest.raises(RuntimeError, match=f"backend 'numba-cuda' cannot work here: .*{reason}.*; backend='auto'"):
        bp.get_backend("numba-cuda")
    net = bp.MLP([2, 2])
    assert net.backend != "numba-cuda"
    if "first that works" in net.backend_reason and net.backend != "cuda":
        assert re.search(f"numba-cuda: .*{reason}", net.backend_reason)


@runs
def test_auto_never_takes_the_simulator():
    if STATUS.automatic:
        pytest.skip("a GPU works here, so nothing is simulated")
    assert "only by name" in str(STATUS)
    assert bp.get_backend("auto").name != "numba-cuda"
    assert "numba-cuda: NUMBA_ENABLE_CUDASIM is set" in bp.MLP([2, 2]).backend_reason
    assert bp.MLP([2, 2], backend="numba-cuda").backend == "numba-cuda"


def test_a_missing_numba_names_what_installs_it():
    assert selection.DEPENDENCY["numba-cuda"] == "'numba-cuda[cu13]'"
    assert selection.DEPENDENCY["numba-cuda"] in numba_cuda.INSTALL
