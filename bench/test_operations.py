"""The operations one by one, on layers of the networks M, N and L, and the ceiling: one large product."""

import pytest

from bench.cases import Case
from bench.tasks import OPERATIONS

CONTENDERS = ("cpu", "numpy", "torch", "jax", "floor")

LAYERS = {
    "M": Case((784, 256), 128, n_batches=1),
    "N": Case((64, 64), 16384, n_batches=1),
    "L": Case((1024, 1024), 512, n_batches=1),
}
"""The layer with the largest product of each network."""

LARGE = {
    "product": ("dense_forward", Case((2048, 2048), 2048, "identity", n_batches=1)),
    "copy": ("copy", Case((4096, 4096), 1, n_batches=1)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation, layer, contender, arena, rivals, replay):
    """Into arrays that are there, where the contender can."""
    replay(f"{operation}, {layer}", lambda: arena.compared(operation, LAYERS[layer], rivals, quick=True))


@pytest.mark.parametrize("ceiling", LARGE)
def test_ceiling(ceiling, contender, arena, rivals, replay):
    """What shares of the ceilings are taken of."""
    operation, case = LARGE[ceiling]
    replay(f"ceiling, {ceiling}", lambda: arena.compared(operation, case, rivals, quick=True))
