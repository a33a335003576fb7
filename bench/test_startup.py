"""New processes: the import, the time to the first steps with and without compiled code on disk, the memory."""

import pytest

from bench.arena import FIRST_STEPS
from bench.fresh import IMPORTS


@pytest.mark.parametrize("contender", IMPORTS)
def test_import(contender, arena, rivals, replay):
    """What `import` takes."""
    replay("import", lambda: arena.imported(rivals, rounds=3))


@pytest.mark.parametrize("cache", FIRST_STEPS)
@pytest.mark.parametrize("contender", ["cpu", "numpy", "torch", "torch-compile", "jax", "sklearn"])
def test_first_step(cache, contender, arena, rivals, replay):
    """From a bare interpreter to the end of the first pass over mini-batches."""
    replay(f"first step, {cache}", lambda: arena.first_steps(rivals, cache))
