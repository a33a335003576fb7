"""Labels of 100,000 rows."""

from dataclasses import replace

import pytest

from bench.cases import NETWORKS

CONTENDERS = ("cpu", "numpy", "torch", "jax", "sklearn")

ROWS = 100_000


@pytest.mark.parametrize("network", ["S", "M", "N"])
def test_predict(network, contender, arena, rivals, replay):
    """From rows in memory to labels in memory."""
    case = replace(NETWORKS[network], batch_size=ROWS, n_batches=1)
    replay(f"predict, {network}", lambda: arena.compared("prediction", case, rivals, quick=True))
