"""Training steps on one thread, which `tests/test_bench_guard.py` compares with."""

import pytest

from bench.arena import Arena
from bench.guard import BACKENDS, GUARDED

CONTENDERS = (*BACKENDS, "floor")


@pytest.fixture(scope="module")
def one_thread():
    """Processes of their own, one processor each."""
    with Arena(threads=1, rounds=9) as arena:
        yield arena


@pytest.mark.parametrize("network", GUARDED)
def test_one_thread(network, contender, one_thread, rivals, replay):
    """The networks that the guard looks at."""
    replay(f"one thread, {network}", lambda: one_thread.compared("training", GUARDED[network], rivals))
