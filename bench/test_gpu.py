"""On an NVIDIA GPU: the training steps, the grid, the operations and their ceilings. Not yet run on one.

Times of PyTorch and CuPy are between events on the device, the others' to the moment when the host has the result;
each repetition of an operation finds the L2 cache flushed. Clocks stay as they are.
"""

from dataclasses import replace

import pytest

from bench.cases import NETWORKS, Case
from bench.contenders import GPU_BACKENDS, GPU_PEERS
from bench.machine import gpu_name
from bench.tasks import OPERATIONS

CONTENDERS = (*GPU_BACKENDS, *GPU_PEERS)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_name(), reason="needs an NVIDIA GPU")]

LAYERS = {
    "wide": Case((4096, 4096), 4096, n_batches=1),
    "narrow": Case((64, 64), 1 << 18, n_batches=1),
}

LARGE = {
    "product": ("dense_forward", Case((8192, 8192), 8192, "identity", n_batches=1)),
    "copy": ("copy", Case((8192, 8192), 1, n_batches=1)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(network, contender, arena, rivals, replay):
    """The networks of the README's table."""
    replay(f"training step, {network}", lambda: arena.compared("training", NETWORKS[network], rivals))


@pytest.mark.parametrize("batch", [128, 2048, 32768])
@pytest.mark.parametrize("width", [64, 256, 1024])
def test_width_and_batch(width, batch, contender, arena, rivals, replay):
    """What the plot of throughput shows."""
    case = Case((width, width, width, 10), batch)
    replay(f"width {width}, batch {batch}", lambda: arena.compared("training", case, rivals, quick=True))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("contender", [*GPU_BACKENDS, "torch@cuda"])
def test_operation(operation, layer, contender, arena, rivals, replay):
    """On layers that fill the device."""
    replay(f"{operation}, {layer}", lambda: arena.compared(operation, LAYERS[layer], rivals, quick=True))


@pytest.mark.parametrize("network", ["S", "M", "N"])
@pytest.mark.parametrize("contender", [*GPU_BACKENDS, "torch@cuda"])
def test_predict(network, contender, arena, rivals, replay):
    """Rows on the host for ours, on the device for PyTorch."""
    case = replace(NETWORKS[network], batch_size=100_000, n_batches=1)
    replay(f"predict, {network}", lambda: arena.compared("prediction", case, rivals, quick=True))


@pytest.mark.parametrize("ceiling", LARGE)
@pytest.mark.parametrize("contender", ["torch@cuda"])
def test_ceiling(ceiling, contender, arena, rivals, replay):
    """What shares of the ceilings are taken of."""
    operation, case = LARGE[ceiling]
    replay(f"ceiling, {ceiling}", lambda: arena.compared(operation, case, rivals, quick=True))
