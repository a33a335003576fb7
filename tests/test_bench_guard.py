"""No loss of speed: a step's ratio to NumPy's bare products is that of the committed results of such a processor."""

import pytest

import backprop_gpu as bp
from bench import guard
from bench.cases import NETWORKS

BACKEND = next(name for name in guard.BACKENDS if any(s.automatic for s in bp.backends() if s.name == name))


@pytest.mark.parametrize("network", guard.GUARDED)
def test_a_step_has_lost_no_speed(network):
    result = guard.committed()
    expected = None if result is None else guard.expected_ratio(result, BACKEND, network)
    if expected is None:
        pytest.skip(f"bench/results/ has no results of the backend {BACKEND!r} on this kind of processor")
    ratio = guard.measured_ratio(BACKEND, NETWORKS[network])
    print(f"{network}: {ratio:.2f} times the products alone; committed: {expected:.2f}")
    assert ratio <= guard.LIMIT * expected


def test_the_guard_sees_half_of_the_work_done_twice():
    case = NETWORKS["M"]
    as_it_is = guard.measured_ratio(BACKEND, case)
    assert guard.measured_ratio(BACKEND, case, slowed=1.5) > guard.LIMIT * as_it_is
    assert guard.measured_ratio(BACKEND, case) <= guard.LIMIT * as_it_is
