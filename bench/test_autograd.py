"""Forward and backward pass under PyTorch's autograd: our module and the plain one."""

import pytest

from bench.cases import NETWORKS

CONTENDERS = ("fused-module", "torch")


@pytest.mark.parametrize("network", NETWORKS)
def test_autograd(network, contender, arena, rivals, replay):
    """Gradients of all parameters, from mini-batches that are tensors beforehand."""
    replay(f"autograd, {network}", lambda: arena.compared("autograd", NETWORKS[network], rivals))
