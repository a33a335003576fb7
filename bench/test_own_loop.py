"""Training steps from a loop of one's own: a call of `net.partial_fit` a step, and PyTorch's loop."""

import pytest

from bench.cases import NETWORKS

CONTENDERS = ("partial-fit", "torch")


@pytest.mark.parametrize("network", NETWORKS)
def test_own_loop(network, contender, arena, rivals, replay):
    """Forward pass, loss, backward pass and Adam, from mini-batches that are arrays beforehand."""
    replay(f"own loop, {network}", lambda: arena.compared("own loop", NETWORKS[network], rivals))
