"""Every CUDA C++ kernel by itself on the CPU, its arrays aligned and not; `cuda_on_cpu/mutate.py` judges by these."""

import pytest

from cuda_on_cpu import emulated, missing
from cuda_on_cpu.cases import CASES, Device

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_alone(case):
    case.run(Device(emulated(checked=True)))
