"""The CUDA C++ backend: every tile and alignment, whole steps as graphs, streams, memory, and its refusals.

On a machine with an NVIDIA GPU the kernels run there (`pytest -m gpu`), and the tests of the emulation alone do not.
"""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

import backprop_gpu as bp
import cuda_on_cpu
from backprop_gpu import training
from backprop_gpu.backends import (
    cuda,
    cuda_blas,
    cuda_data,
    cuda_plan,
    cuda_products,
    cuda_step,
    cuda_tuning,
    selection,
)
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.backends.cuda import CudaBackend
from backprop_gpu.backends.cuda_kernels import Kernels
from backprop_gpu.backends.cuda_plan import NUMBERS
from backprop_gpu.backends.numpy import NumpyBackend
from backprop_gpu.optimizers import OPTIMIZERS
from cuda_on_cpu.emulator import Operation

NARROW = ("tf32", "bfloat16", "float16")
REFERENCE = NumpyBackend()


def devices():
    status = next(status for status in bp.backends() if status.name == "cuda")
    if status.automatic:
        return [pytest.param("gpu", marks=pytest.mark.gpu)]
    skip = [pytest.mark.skip(reason=f"no GPU, and none to be emulated: {cuda_on_cpu.missing()}")]
    return [pytest.param("cpu", marks=skip if cuda_on_cpu.missing() else [])]


@pytest.fixture(scope="module", params=devices())
def fast(request):
    """CuPy, or what stands for it, for numbers."""
    return cuda._cupy() if request.param == "gpu" else cuda_on_cpu.emulated()


@pytest.fixture(scope="module", params=devices())
def checked(request):
    """CuPy, or what stands for it and looks for races, reads and writes out of bounds, and reads before writes."""
    return cuda._cupy() if request.param == "gpu" else cuda_on_cpu.emulated(checked=True)


@pytest.fixture
def emulated():
    """emulated(**settings): a device of its own, never a GPU."""
    if cuda_on_cpu.missing():
        pytest.skip(f"nothing can be emulated: {cuda_on_cpu.missing()}")
    return cuda_on_cpu.emulated


def draw(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def relative_error(actual, expected):
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max() / np.abs(expected).max()


# Products: every tile in every layout, aligned and not, at its edges


def put(backend, x, offset):
    """`x` on the device, `offset` entries into a larger array."""
    flat = backend.zeros((x.size + offset,), x.dtype)
    view = flat[offset:].reshape(x.shape)
    view[...] = backend.asarray(x)
    return view


def rounded(x, dtype):
    """The float32 array `x` with as many bits as the dtype has."""
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    dropped = {"bfloat16": 16, "tf32": 13}[dtype]
    bits = x.view(np.uint32).astype(np.uint64)
    half, odd = np.uint64(1 << (dropped - 1)), (bits >> np.uint64(dropped)) & np.uint64(1)
    bits = bits + (half - np.uint64(1) + odd if dtype == "bfloat16" else half)  # to even; tf32: ties away from 0
    return (bits >> np.uint64(dropped) << np.uint64(dropped)).astype(np.uint32).view(np.float32)


def tolerance(dtype, k, naive):
    """float32: 1e-6 over k up to 512; narrow dtypes: twice the error of a product of rounded operands."""
    if dtype in NARROW:
        return 2 * naive
    return 1e-12 if dtype == "float64" else 1e-6 if k <= 512 else 1e-5


TILES = [(dtype, tile) for dtype, tiles in cuda_plan.TILES.items() for tile in tiles]
every_tile = pytest.mark.parametrize(("dtype", "tile"), TILES, ids=[f"{d}-{t.m}x{t.n}x{t.k}" for d, t in TILES])

EDGES = {
    "one": lambda tile: (1, 1, 1),
    "less": lambda tile: (tile.m - 1, tile.n - 3, tile.k - 1),
    "more": lambda tile: (tile.m + 1, tile.n + 1, 2 * tile.k + 1),
    "aligned": lambda tile: (tile.m + 16, tile.n + 32, 4 * tile.k + 16),
}
"""m, n and k of a product, by the tile's."""


def operate(backend, operation, tile, m, n, k, offset):
    """(actual, expected, error of a naive product of rounded operands) for each output of the operation."""
    dtype = backend.dtype
    kind = "float64" if tile.dtype == "float64" else "float32"
    narrow = (lambda x: rounded(x, dtype)) if dtype else (lambda x: x)
    if operation == "dense_forward":
        a, b, bias = draw(m, k, dtype=kind), draw(k, n, seed=1, dtype=kind), draw(n, seed=2, dtype=kind)
        actual, _ = backend.dense_forward(
            put(backend, a, offset), put(backend, b, offset), put(backend, bias, 1), "identity"
        )
        return [(actual, a.astype(float) @ b.astype(float) + bias, narrow(a) @ narrow(b) + bias)]
    if operation == "dense_backward":
        a, b, kept = draw(m, k, dtype=kind), draw(n, k, seed=1, dtype=kind), draw(m, n, seed=2, dtype=kind)
        actual = backend.dense_backward(
            put(backend, a, offset), put(backend, b, offset), put(backend, kept, offset), "silu"
        )
        slope = REFERENCE.dense_backward(np.ones((m, 1)), np.ones((n, 1)), kept.astype(float), "silu")
        return [(actual, (a.astype(float) @ b.T.astype(float)) * slope, (narrow(a) @ narrow(b).T) * slope)]
    a, b = draw(k, m, dtype=kind), draw(k, n, seed=1, dtype=kind)
    dW, db = backend.dense_gradients(put(backend, a, offset), put(backend, b, offset))
    return [
        (dW, a.T.astype(float) @ b.astype(float), narrow(a).T @ narrow(b)),
        (db, b.sum(axis=0, dtype=float), narrow(b).sum(axis=0)),
    ]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("operation", cuda_plan.LAYOUTS)
@every_tile
def test_every_tile(checked, monkeypatch, dtype, tile, operation, edge):
    monkeypatch.setattr(cuda_plan, "tile", lambda *_: tile)
    monkeypatch.setattr(cuda_plan, "parts", lambda n_rows, *_, **__: cuda_plan.Parts(tile, *parts_of(n_rows, tile)))
    backend = CudaBackend(checked).computing_in(dtype)
    m, n, k = EDGES[edge](tile)
    for actual, exact, naive in operate(backend, operation, tile, m, n, k, offset=0 if edge == "aligned" else 1):
        error = relative_error(backend.to_numpy(actual), exact)
        assert error <= tolerance(dtype, k, relative_error(naive, exact))


def parts_of(n_rows, tile):
    """Two parts where there are rows for them."""
    rows = max(tile.k, math.ceil(n_rows / 2 / tile.k) * tile.k)
    return math.ceil(n_rows / rows), rows


def test_large_products_under_every_schedule(emulated):
    """Shapes that the planner divides by itself; the emulation compares the bytes that each schedule gives."""
    backend = CudaBackend(emulated(schedules=cuda_on_cpu.SCHEDULES))
    for m, n, k in ((211, 193, 307), (4, 257, 509), (521, 10, 131)):
        for operation in cuda_plan.LAYOUTS:
            for actual, exact, _ in operate(backend, operation, SimpleNamespace(dtype="float32"), m, n, k, 0):
                assert relative_error(backend.to_numpy(actual), exact) <= 1e-6


def test_an_operation_repeats_to_the_bit(fast):
    backend = CudaBackend(fast)
    a, delta = backend.asarray(draw(3001, 17)), backend.asarray(draw(3001, 5, seed=1))
    results = [backend.dense_gradients(a, delta) for _ in range(2)]
    for x, y in zip(*results, strict=True):
        assert backend.to_numpy(x).tobytes() == backend.to_numpy(y).tobytes()


# The plan


H100 = cuda_plan.Device(90, 132, 227 << 10, 228 << 10, 13.0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("n_rows", [1, 31, 32, 33, 1000, 1024, 1025, 16384, 1_000_003])
@pytest.mark.parametrize("dtype", cuda_plan.TILES)
def test_parts_take_all_rows_and_none_is_long(n_rows, dtype, whole):
    for n_in, n_out in ((1, 1), (784, 256), (4096, 4096)):
        plan = cuda_plan.parts(n_rows, n_in, n_out, dtype, H100, whole=whole)
        assert (plan.n_parts - 1) * plan.rows_per_part < n_rows <= plan.n_parts * plan.rows_per_part
        assert plan.rows_per_part % plan.tile.k == 0
        assert plan.rows_per_part <= cuda_plan.MOST_ROWS_PER_PART


def test_no_grid_is_too_large():
    """Along y and z there are 65,535 blocks at most."""
    plan = cuda_plan.parts(2**31 - 1, 30, 5, "float32", H100)
    assert plan.n_parts <= 65_535
    assert plan.n_parts * plan.rows_per_part >= 2**31 - 1
    assert plan.rows_per_part % plan.tile.k == 0
    wide = cuda_plan.tile(8, 4_000_000, 8, "float32", H100)
    assert wide.blocks(1, 4_000_000) <= 65_535
    assert cuda_plan.parts(8, 8, 4_000_000, "float32", H100).tile.blocks(1, 4_000_000) <= 65_535
    for plan_of in (cuda_plan.tile, cuda_plan.parts):
        with pytest.raises(ValueError, match="at most 4 million outputs"):
            plan_of(8, 8, 10**7, "float32", H100) if plan_of is cuda_plan.parts else plan_of(
                8, 10**7, 8, "float32", H100
            )


GPUS = {
    "T4": cuda_plan.Device(75, 40, 64 << 10, 64 << 10, 5.0),
    "A100": cuda_plan.Device(80, 108, 163 << 10, 164 << 10, 10.2),
    "RTX 3090": cuda_plan.Device(86, 82, 99 << 10, 100 << 10, 6.7),
    "H100": H100,
    "RTX 5090": cuda_plan.Device(120, 170, 99 << 10, 100 << 10, 4.4),
}
SHAPES = [
    (200, 64, 30),
    (128, 256, 784),
    (512, 1024, 784),
    (16384, 64, 64),
    (16384, 10, 64),
    (4096, 4096, 4096),
    (1, 1, 1),
]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_plan_takes_only_what_the_gpu_holds(gpu):
    for dtype, number in cuda_plan.NUMBERS.items():
        if gpu.capability < number.oldest_capability:
            with pytest.raises(ValueError, match=f"no kernels for {dtype} on a GPU of compute capability 7.5"):
                cuda_plan.tile(8, 8, 8, dtype, gpu)
            continue
        for m, n, k in SHAPES:
            for tile in (cuda_plan.tile(m, n, k, dtype, gpu), cuda_plan.parts(m, n, k, dtype, gpu).tile):
                shared = max(map(tile.shared_bytes, cuda_plan.LAYOUTS.values())) + cuda_plan.STATIC_BYTES
                assert shared <= gpu.shared_per_block


def test_a_plan_goes_by_the_shared_memory_of_a_block():
    """Of a GPU that has little of it, no large tile."""
    little = H100._replace(shared_per_block=40 << 10)
    for dtype in cuda_plan.TILES:
        assert cuda_plan.tile(4096, 4096, 4096, dtype, H100) != cuda_plan.tile(4096, 4096, 4096, dtype, little)
        assert cuda_plan.parts(16384, 4096, 4096, dtype, little).tile in little.tiles(dtype)
    with pytest.raises(ValueError, match="with 1024 bytes of shared memory for a block; choose another dtype"):
        cuda_plan.tile(8, 8, 8, "float32", H100._replace(shared_per_block=1024))


def test_a_plan_goes_by_processors_rates_and_copies():
    """Few slow processors are full with large tiles; many fast ones need smaller ones."""
    for dtype, shape in (("float32", (512, 1024, 784)), ("float16", (512, 1024, 1024))):
        small, large = (cuda_plan.tile(*shape, dtype, GPUS[name]) for name in ("H100", "T4"))
        assert large.m * large.n > small.m * small.n
    rows = (200, 30, 64, "float32")
    assert cuda_plan.parts(*rows, H100).n_parts > cuda_plan.parts(*rows, H100._replace(n_processors=2)).n_parts
    # Where copies are not asynchronous, a stage is dearer, and rounds that wait for them are.
    wide = (512, 1024, 784, "float64")
    assert cuda_plan.tile(*wide, GPUS["T4"]) != cuda_plan.tile(*wide, GPUS["T4"]._replace(capability=80))
    # Where memory is slow, parts are dearer.
    wide = (4096, 256, 256, "float32")
    slow = H100._replace(bytes_per_cycle=0.1)
    assert cuda_plan.parts(*wide, slow).n_parts < cuda_plan.parts(*wide, H100).n_parts


def test_what_a_device_reports_is_what_the_plan_goes_by(emulated):
    """Clocks as well, where CUDA reports them."""
    cp = emulated(compute_capability="86")
    gpu = CudaBackend(cp).kernels.gpu
    assert (gpu.capability, gpu.n_processors, gpu.shared_per_block, gpu.shared_per_processor) == (
        86,
        132,
        99 << 10,
        100 << 10,
    )
    attributes = dict(cp.cuda.Device().attributes)
    assert gpu.bytes_per_cycle == cuda_plan.H100_BYTES_PER_CYCLE
    reported = {"ClockRate": 1_980_000, "MemoryClockRate": 2_619_000, "GlobalMemoryBusWidth": 5120}
    assert cuda_plan.device(90, attributes | reported).bytes_per_cycle == pytest.approx(12.8, abs=0.1)
    newer = cuda_plan.device(103, attributes)
    assert newer.rate("float32") == cuda_plan.RATES[100].float32


@pytest.mark.parametrize("capability", ["75", "86"])
def test_every_tile_that_a_gpu_holds_can_be_launched_there(emulated, capability):
    backend = CudaBackend(emulated(compute_capability=capability))
    for dtype in ("float32", "float16"):
        largest = max(backend.kernels.gpu.tiles(dtype), key=lambda tile: tile.m * tile.n)
        array = NUMBERS[dtype].array
        operands = [backend.zeros((8, 8), array) for _ in range(2)]
        outputs = [backend.empty(shape, "float32") for shape in ((1, 8, 8), (1, 8))]
        backend.kernels.dense_gradients(*operands, *outputs, cuda_plan.Parts(largest, 1, largest.k))()
        assert not outputs[0].get().any()


def test_small_batches_and_skinny_outputs_get_small_tiles():
    for dtype in cuda_plan.TILES:
        assert cuda_plan.tile(128, 256, 784, dtype, H100).m <= 64
        assert cuda_plan.tile(16384, 10, 64, dtype, H100).n <= 32
        assert cuda_plan.tile(4096, 4096, 4096, dtype, H100).m >= 64


# Whole steps


SIZES = [13, 19, 11, 3]


@pytest.fixture
def on(monkeypatch):
    """on(cp): networks of `backend="cuda"` use it."""

    def on(cp):
        monkeypatch.setattr(selection, "_instance", lambda name: CudaBackend(cp) if name == "cuda" else REFERENCE)

    return on


def data(loss="cross_entropy", n=101, n_out=SIZES[-1]):
    X = draw(n, SIZES[0], seed=1)
    if loss == "cross_entropy":
        return X, np.arange(n) * 7 % n_out
    y = np.abs(draw(n, n_out, seed=2))
    return X, np.minimum(y, 1) if loss == "binary_cross_entropy" else np.round(y) if loss == "poisson" else y


def trained(
    backend, X, y, *, dtype="float64", epochs=2, batch_size=32, optimizer="adam", sample_weight=None, **settings
):
    """(losses, parameters) of a run."""
    net = bp.MLP(SIZES, backend=backend, dtype=dtype, seed=3, **settings)
    history = net.fit(
        X, y, epochs=epochs, batch_size=batch_size, optimizer=optimizer, sample_weight=sample_weight, progress=False
    )
    return np.array(history["loss"]), net.ops.to_numpy(net.parameters)


def assert_same_run(actual, expected, dtype="float64"):
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) <= {"float64": 1e-11, "float32": 1e-4}[dtype]


SETTINGS = {
    "plain": {},
    "from z": {"activation": ["gelu", "mish"]},
    "dropout": {"activation": ["tanh", "silu"], "dropout": [0.25, 0.5]},
    "penalty": {"alpha": 0.1},
    "huber": {"loss": bp.Huber(0.5), "output_activation": "tanh"},
    "poisson": {"loss": "poisson"},
    "binary": {"loss": "binary_cross_entropy"},
    "smoothed": {"loss": bp.CrossEntropy(label_smoothing=0.1)},
    "one row": {"batch_size": 1, "epochs": 1},
    "all rows": {"batch_size": 101},
    "clipped": {"optimizer": bp.AdamW(clip_norm=0.1), "alpha": 0.01},
    "nesterov": {"optimizer": bp.SGD(momentum=0.9, nesterov=True)},
    "epsilon hat": {"optimizer": bp.Adam(epsilon=1e-3, epsilon_hat=True)},
    **{name: {"optimizer": name} for name in OPTIMIZERS},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_agree_with_the_reference(checked, on, setting):
    on(checked)
    settings = SETTINGS[setting]
    loss = bp.losses.get(settings.get("loss", "cross_entropy")).name
    X, y = data(loss)
    assert_same_run(trained("cuda", X, y, **settings), trained("numpy", X, y, **settings))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_against_float64(fast, on, optimizer, dtype):
    """Its loss, and all parameters after it, relative to the largest."""
    on(fast)
    X, y = data()
    net = bp.MLP(SIZES, backend="cuda", dtype=dtype, activation=["gelu", "tanh"], dropout=0.3, alpha=0.1, seed=3)
    reference = net.copy(backend="numpy", dtype="float64")
    settings = {"optimizer": replace(bp.optimizers.get(optimizer), learning_rate=0.1), "epochs": 1, "batch_size": 101}
    losses = [each.fit(X, y, progress=False, **settings)["loss"] for each in (net, reference)]
    limit = {"float32": 1e-5, "float64": 1e-12}[dtype]
    assert relative_error(*map(np.array, losses)) <= limit
    assert relative_error(net.ops.to_numpy(net.parameters), reference.parameters) <= limit


def test_weighted_rows(checked, on):
    on(checked)
    X, y = data()
    w = np.random.default_rng(0).random(len(X)) * (np.arange(len(X)) % 3 != 1)
    assert_same_run(trained("cuda", X, y, sample_weight=w), trained("numpy", X, y, sample_weight=w))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_hundred_steps_give_the_references_loss_curve(fast, on, dtype):
    on(fast)
    X, y = data(n=331)
    settings = {"dtype": dtype, "epochs": 10, "dropout": 0.1, "activation": ["gelu", "relu"], "batch_size": 32}
    assert_same_run(trained("cuda", X, y, **settings), trained("numpy", X, y, **settings), dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_dtypes_follow_the_references_loss_curve(fast, on, dtype):
    """To what rounding the operands costs: 2⁻⁸ of bfloat16's numbers, 2⁻¹¹ of the others'."""
    on(fast)
    X, y = data(n=331)
    settings = {"epochs": 10, "activation": ["silu", "tanh"]}
    losses, parameters = trained("cuda", X, y, dtype=dtype, **settings)
    expected, _ = trained("numpy", X, y, dtype="float32", **settings)
    assert parameters.dtype == np.float32
    assert relative_error(losses, expected) <= (4e-3 if dtype == "bfloat16" else 5e-4)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize("activation", bp.ACTIVATIONS)
def test_gradients_against_finite_differences(fast, on, activation):
    on(fast)
    X, y = data(n=7)
    net = bp.MLP(SIZES, activation=activation, backend="cuda", dtype="float64", seed=3)
    assert bp.gradcheck(net, X, y).worst <= (1e-6 if bp.ACTIVATIONS[activation].has_kink else 1e-7)


def test_a_run_repeats_to_the_bit(fast, on):
    on(fast)
    X, y = data()
    runs = [trained("cuda", X, y, dtype="float32", dropout=0.3)[1].tobytes() for _ in range(2)]
    assert runs[0] == runs[1]


def job_of(net, X, y, batch_size=32, optimizer="adam"):
    return training._job(net, bp.optimizers.get(optimizer), net._take_in(X, y, None), batch_size, 0)


def run(trainer, n_rows, batch_size=32, first_step=0, after_step=lambda n_rows: True):
    n_steps = -(-n_rows // batch_size)
    return trainer.run(np.arange(n_rows), np.full(n_steps, 0.01), np.zeros(n_steps), first_step, after_step)


@pytest.mark.parametrize(
    ("dtype", "optimizer"), [("float32", bp.Adam()), ("float32", bp.Adam(clip_norm=0.1)), ("float16", bp.Adam())]
)
def test_an_epoch_stays_on_the_device(emulated, on, dtype, optimizer):
    """3 L + 2 launches a step, all of them from graphs; one synchronisation, no allocation in a second epoch."""
    cp = emulated()
    on(cp)
    X, y = data(n=331)
    net = bp.MLP(SIZES, backend="cuda", dtype=dtype)
    trainer = net.ops.trainer(job_of(net, X, y, optimizer=optimizer))
    run(trainer, 331)
    cp.emulator.reset()
    run(trainer, 331, first_step=11)
    counters = cp.emulator.counters
    copies = 0 if dtype == "float32" else 1  # of the parameters, once a run
    assert counters.launches.total() == 11 * (3 * 3 + 2) + copies
    assert counters.direct_launches.total() == copies
    assert counters.graph_launches == 4  # 8 steps, 2, and the last 11 rows
    assert counters.synchronisations == 1
    assert counters.allocations == 0
    assert counters.captures == 0


def test_a_stream_keeps_its_graph_and_its_memory(emulated, on):
    """Only the first call captures, wherever the rows of the others come from; the bits are those of a new trainer."""
    cp = emulated()
    on(cp)
    X, y = data(n=96)
    net, expected = (bp.MLP(SIZES, backend="cuda", dropout=0.5, seed=1) for _ in range(2))
    kinds = [np.asarray, cp.asarray, np.asarray, cp.asarray, sparse.csr_matrix, sparse.csr_matrix]
    captures = []
    for i, kind in enumerate(kinds):
        rows = slice(16 * i, 16 * i + 16)
        cp.emulator.reset()
        loss = net.partial_fit(kind(X[rows]), y[rows])
        counters = cp.emulator.counters
        captures.append(counters.captures)
        assert counters.graph_launches == 1
        assert counters.bytes_to_host <= 24
        looks = 1 + (kind is cp.asarray)  # at the parameters, and at rows of the device, whether they are finite
        assert counters.direct_launches == {"sum_squares<float>": looks}
        assert counters.synchronisations <= 2 + looks
        assert loss == expected.partial_fit(X[rows], y[rows])
        expected.stream.trainer = None
        assert np.array_equal(net.ops.to_numpy(net.parameters), expected.ops.to_numpy(expected.parameters))
    assert captures == [1, 0, 0, 0, 1, 0]  # sparse rows come by another way


def test_a_stream_leaves_the_callers_rows_alone_and_takes_weights_from_any_call_on(emulated, on):
    cp = emulated()
    on(cp)
    X, y = data(n=64)
    X = X.astype(np.float32)
    first = cp.asarray(X[:32])  # as it lies, there is nothing to convert
    net, expected = (bp.MLP(SIZES, backend="cuda", seed=1) for _ in range(2))
    for rows, labels, w in (
        (first, y[:32], None),
        (X[32:], y[32:], None),
        (X[32:], y[32:], 1.0 + y[32:]),
        (X[:32], y[:32], 1.0 + y[:32]),
        (X[32:], y[32:], None),
    ):
        assert net.partial_fit(rows, labels, sample_weight=w) == expected.partial_fit(rows, labels, sample_weight=w)
        expected.stream.trainer = None
        assert np.array_equal(net.ops.to_numpy(net.parameters), expected.ops.to_numpy(expected.parameters))
    assert np.array_equal(cp.asnumpy(first), X[:32])


def test_a_stream_of_float16_keeps_its_loss_scale(emulated, on):
    """Found once, and not anew in each call, which would leave out the first step of each."""
    cp = emulated()
    on(cp)
    X, y = data(n=64)
    net = bp.MLP(SIZES, backend="cuda", dtype="float16", seed=1)
    net.parameters[...] = cp.asarray(20 * net.ops.to_numpy(net.parameters))
    before, changed = net.ops.to_numpy(net.parameters), []
    for _ in range(30):
        net.partial_fit(X, y)
        after = net.ops.to_numpy(net.parameters)
        changed.append(not np.array_equal(before, after))
        before = after
    assert changed.index(True) > 0
    assert all(changed[changed.index(True) :])


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", cuda_plan.TILES)
def test_every_step_is_three_launches_a_layer_and_two(emulated, on, monkeypatch, dtype, n_layers):
    """Whatever the optimizer, clipped or not, with and without dropout."""
    launches = []
    note = lambda name: lambda *_, **__: launches.append(name)  # noqa: E731
    monkeypatch.setattr(Kernels, "function", lambda self, file, expression, shared_bytes=0: note(expression))
    cp = emulated()
    on(cp)
    sizes = [*[13, 19, 11, 7][:n_layers], 3]
    X, y = data(n=32)
    for name, clip_norm, rate in itertools.product(OPTIMIZERS, (None, 0.1), (0.0, 0.5)):
        net = bp.MLP(sizes, backend="cuda", dtype=dtype, dropout=rate if n_layers > 1 else 0.0)
        job = job_of(net, X, y, optimizer=replace(bp.optimizers.get(name), clip_norm=clip_norm))
        trainer = net.ops.trainer(job)
        step = trainer._step(32)
        launches.clear()
        with trainer.stream:
            step(trainer.stream, trainer.beside)
        assert len(launches) == 3 * n_layers + 2, launches


def test_clipped_steps_give_the_same_bits_under_every_schedule(emulated, on):
    """The last block of a tile makes its whole gradients, whichever that is."""
    on(emulated(schedules=cuda_on_cpu.SCHEDULES))
    X, y = data(n=101)
    settings = {"optimizer": bp.AdamW(clip_norm=0.1), "alpha": 0.01, "epochs": 1, "batch_size": 101}
    assert_same_run(trained("cuda", X, y, **settings), trained("numpy", X, y, **settings))


def test_a_caller_that_has_enough_stops_the_run_there(fast, on, monkeypatch):
    monkeypatch.setattr(cuda_data, "STEPS_PER_WINDOW", 3)
    monkeypatch.setattr(cuda_data.ResidentData, "steps", 3)
    on(fast)
    X, y = data()
    parameters = {}
    for n_rows, answers in ((96, [True]), (101, [False])):
        net, seen = bp.MLP(SIZES, backend="cuda", dropout=0.5), []
        job = job_of(net, X, y)

        def after_step(n, seen=seen, answers=answers):
            seen.append(n)
            return answers[0]

        run(net.ops.trainer(job), n_rows, after_step=after_step)
        assert seen[0] == 96
        parameters[n_rows] = net.ops.to_numpy(net.parameters)
    assert np.array_equal(parameters[96], parameters[101])


def test_steps_go_on_from_where_a_run_ended(fast, on):
    """Dropout masks and bias corrections count on, whatever the calls that the steps come in."""
    on(fast)
    X, y = data(n=96)
    parameters = []
    for calls in ([96], [32, 64]):
        net, done = bp.MLP(SIZES, backend="cuda", dropout=0.5), 0
        trainer = net.ops.trainer(job_of(net, X, y))
        for n in calls:
            order = np.arange(done, done + n)
            trainer.run(order, np.full(n // 32, 0.01), np.zeros(n // 32), done // 32, lambda n_rows: True)
            done += n
        parameters.append(net.ops.to_numpy(net.parameters))
    assert np.array_equal(*parameters)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_streams_are_ordered(emulated, on, late):
    """The trainer's stream after the caller's, and that after the trainer's, also where all run late."""
    cp = emulated(late=late)
    on(cp)
    X, y = data()
    expected = trained("numpy", X, y)
    with cp.cuda.Stream(non_blocking=True):
        assert_same_run(trained("cuda", X, y), expected)


ORDERS = {"at once": None, "late": 0, "first": 1, "second": 2, "third": 3, "fourth": 4}
"""Which stream runs at once where others run late."""


def in_order(cp, order):
    """The emulated device, its streams in that order."""
    cp.emulator.prompt = ORDERS[order] or 0
    return cp


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_comes_between_what_its_caller_does(emulated, on, monkeypatch, order):
    """On the caller's stream, also where the run ends by Ctrl-C."""

    def interrupted(n_rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_data.ResidentData, "steps", 2)
    X, y = data(n=96)
    parameters = []
    for cp in (emulated(), in_order(emulated(late=ORDERS[order] is not None), order)):
        on(cp)
        with cp.cuda.Stream(non_blocking=True):
            net = bp.MLP(SIZES, backend="cuda", seed=3)
            trainer, start = net.ops.trainer(job_of(net, X, y)), cp.asarray(-net.ops.to_numpy(net.parameters))
            net.parameters[...] = start
            with pytest.raises(KeyboardInterrupt):
                run(trainer, 96, after_step=interrupted)
            parameters.append(net.ops.to_numpy(net.parameters))
    assert np.array_equal(*parameters)


@pytest.mark.parametrize("order", ORDERS)
def test_data_that_does_not_fit_is_streamed(emulated, on, monkeypatch, order):
    """In four windows an epoch, so that each of the two places for them is used again."""
    X, y = data()
    on(emulated())
    expected = trained("cuda", X, y)
    monkeypatch.setattr(cuda_data, "BYTES_PER_WINDOW", 32 * X.shape[1] * 8)
    monkeypatch.setattr(cuda_data, "SHARE_OF_MEMORY", 0.0)
    for rows in (sparse.csr_array(X), X):
        on(in_order(emulated(late=ORDERS[order] is not None), order))
        assert_same_run(trained("cuda", rows, y), expected)


def test_float16_leaves_out_a_step_that_overflows_and_scales_down(fast, on, monkeypatch):
    on(fast)
    monkeypatch.setattr(cuda_step, "FIRST_LOSS_SCALE", 2.0**30)
    X, y = data(n=32)
    net = bp.MLP(SIZES, backend="cuda", dtype="float16")
    before = net.ops.to_numpy(net.parameters)
    trainer = net.ops.trainer(job_of(net, X, y))
    run(trainer, 32)
    assert np.array_equal(net.ops.to_numpy(net.parameters), before)
    assert trainer.buffers.loss_scale.get().tolist() == [2.0**29, 0]
    for step in range(1, 20):
        run(trainer, 32, first_step=step)
    scale, steps_since = trainer.buffers.loss_scale.get()
    assert 2.0**10 < scale < 2.0**29
    assert steps_since > 0
    assert not np.array_equal(net.ops.to_numpy(net.parameters), before)


def test_parameters_changed_from_outside_between_runs(fast, on):
    """Also where steps work with a narrow copy of them."""
    on(fast)
    X, y = data(n=64)
    parameters = []
    for _ in range(2):
        net = bp.MLP(SIZES, backend="cuda", dtype="bfloat16")
        start = net.ops.to_numpy(net.parameters)
        trainer = net.ops.trainer(job_of(net, X, y, optimizer="sgd"))
        if parameters:
            run(trainer, 64)
            net.parameters[...] = net.ops.asarray(start)
        run(trainer, 64)
        parameters.append(net.ops.to_numpy(net.parameters))
    assert np.array_equal(*parameters)


# Arrays of others


def test_arrays_on_the_device_are_taken_as_they_are(fast):
    backend = CudaBackend(fast)
    x = fast.asarray(draw(5, 7))
    assert backend.asarray(x).data.ptr == x.data.ptr
    assert backend.asarray(SimpleNamespace(__cuda_array_interface__=x.__cuda_array_interface__)).data.ptr == x.data.ptr
    exchanged = SimpleNamespace(__dlpack__=x.__dlpack__, __dlpack_device__=x.__dlpack_device__)
    assert backend.asarray(exchanged).data.ptr == x.data.ptr


def test_rows_on_the_device_are_trained_on_and_predicted_there(emulated, on):
    cp = emulated()
    on(cp)
    X, y = data()
    results = []
    for place in (np.asarray, cp.asarray):
        net, rows, target = bp.MLP(SIZES, backend="cuda", seed=3), place(X), place(y)
        cp.emulator.reset()
        net.fit(rows, target, epochs=2, batch_size=32, validation_data=(rows, target), progress=False)
        proba, metrics, parameters = (
            net.predict_proba(rows),
            net.evaluate(rows, target),
            net.ops.to_numpy(net.parameters),
        )
        results.append((net.ops.to_numpy(proba), net.predict(rows), metrics, parameters))
        if place is cp.asarray:
            assert isinstance(proba, cp.ndarray)
            assert cp.emulator.counters.bytes_to_device < X.nbytes + 8192  # orders, labels and tables
    for host, device in zip(*results, strict=True):
        np.testing.assert_equal(device, host)
    net.fit(rows, y, epochs=1, validation_fraction=0.3, progress=False)
    X[2, 1] = np.nan
    rows = cp.asarray(X)
    with pytest.raises(ValueError, match="nan at row 2, column 1"):
        net.fit(rows, y)


def test_an_array_that_is_not_contiguous_is_copied(fast):
    backend = CudaBackend(fast)
    x = draw(6, 8)
    taken = backend.asarray(fast.asarray(x)[:, ::2])
    assert taken.flags.c_contiguous
    assert np.array_equal(backend.to_numpy(taken), x[:, ::2])


def test_an_array_on_another_device_is_refused(fast):
    class Elsewhere(fast.ndarray):
        device = SimpleNamespace(id=7)

    backend = CudaBackend(fast)
    x = fast.empty((3,), "float32")
    x.__class__ = Elsewhere
    with pytest.raises(ValueError, match=r"on GPU 7, and the current device is GPU 0; use `with cupy.cuda.Device\(7\)"):
        backend.asarray(x)


def test_arrays_that_no_kernel_can_read_are_refused(fast):
    backend = CudaBackend(fast)
    x = draw(4, 4)
    with pytest.raises(TypeError, match=r"a_prev must be a CuPy array on the GPU; got numpy.ndarray.*ops.asarray"):
        backend.dense_forward(x, x, x[0].copy(), "relu")
    on_device = fast.asarray(draw(4, 8))
    with pytest.raises(ValueError, match="W must be C-contiguous; got strides"):
        backend.dense_forward(on_device[:, :4].copy(), on_device[:, ::2], on_device[0, :4], "relu")
    for unreadable, error in ((x, "x must be a CuPy array"), (on_device[:, ::2], "x must be C-contiguous")):
        with pytest.raises((TypeError, ValueError), match=error):
            backend.sum_squares(unreadable)


# What it says when it cannot


def driver(**settings):
    """A CuPy of which only what `probe` asks is there."""

    class CUDARuntimeError(RuntimeError):
        pass

    def answer(value):
        def ask():
            if isinstance(value, str):
                raise CUDARuntimeError(value)
            return value

        return ask

    defaults = {
        "driver": 13000,
        "built_for": 12090,
        "n_devices": 1,
        "capability": "90",
        "nvrtc": (12, 9),
        "free": 1 << 30,
    }
    settings = {**defaults, **settings}
    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=answer(settings["driver"]),
        runtimeGetVersion=answer(settings["built_for"]),
        getDeviceCount=answer(settings["n_devices"]),
    )

    class Device:
        compute_capability = settings["capability"]

        @property
        def mem_info(self):
            return answer(settings["free"])(), 80 << 30

    nvrtc = SimpleNamespace(getVersion=answer(settings["nvrtc"]))
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=Device, nvrtc=nvrtc))


OLD = {"n_devices": "cudaErrorInsufficientDriver"}
"""What CUDA answers when there is no driver, or one older than it needs."""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"driver": 0, **OLD}, "there is no NVIDIA driver; install one that offers CUDA 12.0"),
        ({"driver": 0, "built_for": 13020, **OLD}, "there is no NVIDIA driver; install one that offers CUDA 13.0"),
        ({"n_devices": "cudaErrorNoDevice"}, "no GPU .cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES.*nvidia-smi"),
        ({"n_devices": 0}, "CUDA_VISIBLE_DEVICES"),
        ({"driver": 11080, **OLD}, "offers CUDA 11.8, and CuPy is built for 12.9; update the driver"),
        ({"driver": 12040, "built_for": 13000, **OLD}, "offers CUDA 12.4, and CuPy is built for 13.0.*cupy-cuda12x"),
        ({"built_for": 11080}, "CuPy is built for CUDA 11.8, and 12.0 is the oldest.*uninstall.*install cupy-cuda13x"),
        ({"capability": "70"}, "compute capability 7.0, and the kernels need 7.5"),
        (
            {"nvrtc": "failed to load libnvrtc.so.12"},
            "no NVRTC.*libnvrtc.so.12.*CUDA 12 toolkit.*'cuda-toolkit.cudart,nvrtc.==12",
        ),
        ({"free": 3 << 20}, "3 of the GPU's 81920 MiB are free, and 32 are the least.*end what else runs"),
        ({"free": "cudaErrorDevicesUnavailable"}, "cannot be used .cudaErrorDevicesUnavailable.; end what else runs"),
    ],
)
def test_a_machine_that_cannot_says_why(settings, reason):
    import re

    assert re.search(reason, cuda.probe(driver(**settings)))


def test_a_machine_that_can():
    assert cuda.probe(driver()) is None
    assert cuda.probe(driver(driver=12000, built_for=12090)) is None


def test_a_missing_cupy_names_the_package(monkeypatch):
    def missing():
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(cuda, "_cupy", missing)
    status = selection._status.__wrapped__("cuda")
    assert not status.works
    assert "pip install cupy-cuda12x 'cuda-toolkit[cudart,nvrtc]==12.*'" in status.reason


def test_narrow_dtypes_by_compute_capability(emulated):
    assert CudaBackend(emulated(compute_capability="75")).dtypes == ("float32", "float64", "float16")
    assert CudaBackend(emulated(compute_capability="80")).dtypes == tuple(cuda_plan.NUMBERS)


def test_turing_trains(emulated, on):
    """Without asynchronous copies, with half as deep an mma."""
    on(emulated(checked=True, compute_capability="75"))
    X, y = data()
    assert_same_run(trained("cuda", X, y), trained("numpy", X, y))
    losses, _ = trained("cuda", X, y, dtype="float16")
    assert relative_error(losses, trained("numpy", X, y, dtype="float32")[0]) <= 5e-4


def test_out_of_memory_says_how_much_was_wanted_and_what_to_change(emulated, on):
    cp = emulated()
    on(cp)
    X, y = data()
    net = bp.MLP([SIZES[0], 4096, 3], backend="cuda")
    before = net.ops.to_numpy(net.parameters)
    cp.emulator.memory_size = cp.emulator.memory.used + (1 << 20)
    with pytest.raises(MemoryError, match=r"batch_size=101 takes \d+ MiB of the GPU.*smaller batch_size"):
        net.fit(X, y, batch_size=101)
    cp.emulator.memory_size = 80 << 30
    assert np.array_equal(net.ops.to_numpy(net.parameters), before)
    net.fit(X, y, batch_size=10, epochs=1)


def test_no_memory_for_an_array_says_what_is_free(emulated, on):
    cp = emulated()
    on(cp)
    X, y = data()
    net = bp.MLP(SIZES, backend="cuda")
    before = net.ops.to_numpy(net.parameters)
    cp.emulator.memory_size = cp.emulator.memory.used + 1000
    for act in (
        lambda: bp.MLP([SIZES[0], 4096, 3], backend="cuda"),
        lambda: net.predict_proba(X),
        lambda: net.backprop(X, y),
        lambda: net.ops.zeros((5000,), "float32"),
    ):
        with pytest.raises(MemoryError, match=r"0 of the GPU's \d+ MiB are free.*take fewer rows at a time"):
            act()
    cp.emulator.memory_size = 80 << 30
    assert np.array_equal(net.ops.to_numpy(net.parameters), before)


@pytest.mark.parametrize("settings", [{"free": 3 << 20}, {"n_devices": 0}])
def test_auto_falls_back_and_says_why(monkeypatch, caplog, settings):
    monkeypatch.setattr(cuda, "_cupy", lambda: driver(**settings))
    monkeypatch.setattr(selection, "_status", selection._status.__wrapped__)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot work here: .*CUDA_VISIBLE_DEVICES.*backend='auto'"):
        bp.get_backend("cuda")
    caplog.set_level("INFO", "backprop_gpu")
    assert bp.get_backend("auto").name != "cuda"
    assert "cuda: " in caplog.text
    assert "CUDA_VISIBLE_DEVICES" in caplog.text


def test_dropout_of_the_operations_and_of_the_steps_is_the_same(fast):
    backend = CudaBackend(fast)
    ones = [backend.asarray(x) for x in (np.ones((9, 1)), np.zeros((1, 6)), np.ones(6))]
    dropout = Dropout(0.5, seed=2**40 + 3, layer=1, step=2**32 + 7)
    a, _ = backend.dense_forward(*ones, "identity", dropout=dropout)
    counted = backend.empty((9, 6), "float64")
    counter = backend.cp.asarray(np.array([7], np.uint32))
    at_0 = dropout._replace(step=0)
    backend.kernels.dense_forward(*ones, counted, None, "identity", at_0, counter, dtype="float64")()
    assert np.array_equal(backend.to_numpy(a), backend.to_numpy(counted))
    assert 0 < (backend.to_numpy(a) == 0).mean() < 1


# Tuning


class EmulatedCublas:
    """The five functions of cuBLAS that the library calls, with NumPy, on an emulated device's memory and streams."""

    def __init__(self, cp, spoilt=False):
        self.cp, self.spoilt, self.streams, self.calls = cp, spoilt, [], 0

    def cublasCreate_v2(self, handle):
        handle._obj.value = len(self.streams) + 1
        self.streams.append(None)
        return 0

    def cublasSetStream_v2(self, handle, stream):
        self.streams[handle.value - 1] = stream.value
        return 0

    def cublasSetWorkspace_v2(self, handle, workspace, size):
        assert workspace.value % 256 == 0
        return 0

    def cublasGemmEx(
        self, handle, op_a, op_b, m, n, k, alpha, A, a_type, lda, B, b_type, ldb, beta, C, c_type, ldc, *_
    ):
        """Column-major: C = alpha op(A) op(B) + beta C."""
        assert self.streams[handle.value - 1] == self.cp.cuda.get_current_stream().ptr
        assert a_type == b_type
        assert (alpha._obj.value, beta._obj.value) == (1, 0)
        a, b = (self.matrix(*x) for x in ((A, a_type, lda, m, k, op_a), (B, b_type, ldb, k, n, op_b)))
        c = self.matrix(C, c_type, ldc, m, n, 0)
        self.calls += 1

        def run():
            c[...] = wide(a, a_type) @ wide(b, b_type) + self.spoilt
            self.cp.emulator.memory.mark_written(c)

        self.cp.emulator.streams.submit(Operation("cublasGemmEx", run))
        return 0

    def matrix(self, pointer, kind, stride, rows, columns, transposed):
        dtype = np.dtype({0: "float32", 1: "float64", 2: "float16", 14: "uint16"}[kind])
        if transposed:
            return self.matrix(pointer, kind, stride, columns, rows, 0).T
        assert stride >= rows
        memory = self.cp.emulator.memory.at(pointer.value, stride * columns * dtype.itemsize)
        return memory.view(dtype).reshape(columns, stride).T[:rows]


def wide(x, kind):
    return (
        (x.astype(np.uint32) << 16).view(np.float32) if kind == 14 else x.astype(np.promote_types(x.dtype, np.float32))
    )


@pytest.fixture
def cublas(emulated, on, monkeypatch, tmp_path):
    """cublas(): an emulated device with cuBLAS, which `backend="cuda"` then uses, and folders of its own."""

    def cublas(**settings):
        cp = emulated()
        on(cp)
        library = EmulatedCublas(cp, **settings)
        monkeypatch.setattr(cuda_blas.Blas, "cublas", library)
        monkeypatch.setenv("BACKPROP_GPU_CACHE_DIR", str(tmp_path))
        return library

    return cublas


def in_favour_of(monkeypatch, fastest):
    """Makes the measured times say that the ways of which `fastest` is true are fast."""

    def measured(self, launch):
        launch()
        return 1.0 if fastest(launch) else 2.0

    monkeypatch.setattr(cuda_tuning.Tuning, "_seconds", measured)


def uses_cublas(launch):
    return isinstance(launch, cuda_products.InOrder)


@pytest.mark.parametrize("dtype", cuda_plan.TILES)
def test_cublas_with_a_fused_pass_gives_the_same_run(cublas, monkeypatch, dtype):
    library = cublas()
    in_favour_of(monkeypatch, uses_cublas)
    monkeypatch.setattr(cuda_plan, "TILES", {dtype: cuda_plan.TILES[dtype][1:2]})  # one of them to compare with
    X, y = data(n=101)
    net = bp.MLP(SIZES, backend="cuda", dtype=dtype, seed=3, dropout=0.2, activation=["gelu", "tanh"])
    reference = net.copy(backend="numpy", dtype="float64" if dtype == "float64" else "float32")
    history = net.fit(X, y, epochs=2, batch_size=32, tune=True, progress=False)
    expected = reference.fit(X, y, epochs=2, batch_size=32, progress=False)
    tolerances = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 4e-3}
    assert relative_error(np.array(history["loss"]), np.array(expected["loss"])) <= tolerances.get(dtype, 5e-4)
    known = json.loads((cuda_tuning._folder() / cuda_tuning.FILE).read_text())
    assert set(known.values()) == {"cublas"}
    assert library.calls


def test_what_was_measured_is_remembered(cublas, monkeypatch):
    cublas()
    X, y = data()
    in_favour_of(monkeypatch, lambda launch: not uses_cublas(launch) and launch.threads == 128)
    bp.MLP(SIZES, backend="cuda").fit(X, y, epochs=1, tune=True, progress=False)
    known = json.loads((cuda_tuning._folder() / cuda_tuning.FILE).read_text())
    assert len(known) == 3 + 2 + 3
    assert all("64, 64, 16" in way for way in known.values())
    monkeypatch.setattr(cuda_tuning.Tuning, "_seconds", None)  # which would fail
    bp.MLP(SIZES, backend="cuda").fit(X, y, epochs=1, tune=True, progress=False)


def test_a_way_with_other_numbers_never_wins(cublas, monkeypatch, caplog):
    cublas(spoilt=True)
    in_favour_of(monkeypatch, uses_cublas)
    X, y = data()
    bp.MLP(SIZES, backend="cuda").fit(X, y, epochs=1, tune=True, progress=False)
    known = json.loads((cuda_tuning._folder() / cuda_tuning.FILE).read_text())
    assert "cublas" not in known.values()
    assert "cublas does not give the numbers" in caplog.text


def test_without_cublas_the_tiles_are_measured(emulated, on, monkeypatch, tmp_path, caplog):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    on(emulated())
    monkeypatch.setattr(cuda_blas, "CDLL", absent)
    monkeypatch.setenv("BACKPROP_GPU_CACHE_DIR", str(tmp_path / "none" / "yet"))
    X, y = data(n=32)
    expected = trained("numpy", X, y, epochs=1)
    net = bp.MLP(SIZES, backend="cuda", dtype="float64", seed=3)
    history = net.fit(X, y, epochs=1, batch_size=32, tune=True, progress=False)
    assert_same_run((np.array(history["loss"]), net.ops.to_numpy(net.parameters)), expected)
    assert "tuning without cuBLAS, among the tiles alone: libcublas.so.13: cannot open" in caplog.text


def test_cublas_is_found_where_cupy_loads_it_from(monkeypatch):
    """A wheel's is loaded by CuPy, when its own module cublas is first asked for, and then found by its name."""
    loaded = []

    class Cuda:
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 13020)

        @property
        def cublas(self):
            loaded.append("libcublas.so.13")

    def find(name):
        if name not in loaded:
            raise OSError(f"{name}: cannot open shared object file")
        return name

    monkeypatch.setattr(cuda_blas, "CDLL", find)
    assert cuda_blas.Blas(SimpleNamespace(cuda=Cuda())).missing() is None
    monkeypatch.setattr(Cuda, "cublas", property(lambda self: find("libcublas.so.12")))
    assert "libcublas.so.12: cannot open" in cuda_blas.Blas(SimpleNamespace(cuda=Cuda())).missing()


@pytest.mark.parametrize("content", ["", "[1]", '{"a": '])
def test_a_damaged_memory_of_measurements_is_forgotten(fast, tmp_path, content):
    (tmp_path / cuda_tuning.FILE).write_text(content)
    tuning = cuda_tuning.Tuning(fast, tmp_path)
    way = tuning.way(("x",), "a", ["a"], lambda way: lambda: None, [], "float32")
    assert way == "a"
    assert list(tuning._read().values()) == ["a"]
