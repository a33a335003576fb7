"""Whole training steps: the networks S, M, N and L, other activations, random shapes, and a grid of width and batch."""

from dataclasses import replace

import pytest

from bench.cases import NETWORKS, Case, random_cases
from bench.contenders import PEERS

WIDTHS, BATCHES = (64, 256, 1024), (32, 256, 2048)


def pytest_generate_tests(metafunc):
    """As many random shapes as --shapes says."""
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", range(metafunc.config.getoption("shapes")))


@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(network, contender, arena, rivals, replay):
    """The networks of the README's table."""
    replay(f"training step, {network}", lambda: arena.compared("training", NETWORKS[network], rivals))


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu"])
@pytest.mark.parametrize("network", ["S", "M", "N"])
@pytest.mark.parametrize("contender", ["cpu", *PEERS])
def test_activation(network, activation, contender, arena, rivals, replay):
    """Those with other activations."""
    case = replace(NETWORKS[network], activation=activation)
    replay(f"activation, {case}", lambda: arena.compared("training", case, rivals, quick=True))


@pytest.mark.parametrize("contender", ["cpu", *PEERS])
def test_random_shape(shape, contender, arena, rivals, replay):
    """Anything: widths 1–2048, depths 1–8, batches 1–4096, all four activations."""
    case = random_cases(shape + 1)[-1]
    replay(f"random shape, {case}", lambda: arena.compared("training", case, rivals, quick=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("contender", ["cpu", "torch", "jax"])
def test_width_and_batch(width, batch, contender, arena, rivals, replay):
    """What the plot of throughput shows."""
    case = Case((width, width, width, 10), batch, n_batches=4 if batch < 2048 else 1)
    replay(f"width {width}, batch {batch}", lambda: arena.compared("training", case, rivals, quick=True))
