"""`fit` from end to end: seconds, and the accuracy on held-out rows after each epoch."""

import pytest

from bench import datasets

CONTENDERS = ("cpu", "numpy", "torch", "jax", "sklearn")

SEEDS = {"digits": 5, "mnist": 2}


@pytest.mark.parametrize("data", datasets.FITS)
def test_fit(data, contender, arena, rivals, replay):
    """All epochs, from several seeds."""
    if reason := datasets.missing(data):
        pytest.skip(reason)
    replay(f"fit, {data}", lambda: arena.fitted(data, rivals, rounds=SEEDS[data]))
