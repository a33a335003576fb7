"""Every CUDA C++ kernel by itself on the CPU, its arrays aligned and not; `cuda_on_cpu/mutate.py` judges by these."""

import pytest

from cuda_on_cpu import emulated, missing, mutate
from cuda_on_cpu.cases import CASES, Device

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_alone(case):
    case.run(Device(emulated(checked=True)))


def test_the_mutants_that_are_known_can_be_made():
    """So that none is excused whose reason was of other code."""
    assert mutate.known()
    assert mutate.outdated() == []
