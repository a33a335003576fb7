"""What the suites share. `pytest bench/` measures; pytest-benchmark's options, tables and files show and keep it.

A suite's test is one contender at one piece of work. The first test of a piece of work measures *all* its contenders
that were selected, interleaved, each in a process of its own; this test and the others then hand pytest-benchmark
their samples, by a clock that is set instead of running. So the samples of one round stand at the same place in each
contender's data, and ratios can be taken pair by pair.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning

from bench import machine
from bench.arena import Arena, Measured
from bench.comparison import ROUNDS
from bench.contenders import CPU_BACKENDS, FLOOR, PEERS, contender
from bench.processes import all_threads

Measurement: TypeAlias = Callable[[], dict[str, Measured]]

CONTENDERS = (*CPU_BACKENDS, *PEERS, FLOOR)
"""Who takes part, where a suite does not say otherwise."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this folder's suites."""
    group = parser.getgroup("backprop_gpu benchmarks")
    group.addoption(
        "--rounds", type=int, default=ROUNDS, help="samples of each contender at most (default: %(default)s)"
    )
    group.addoption("--threads", type=int, default=all_threads(), help="threads of each (default: all processors)")
    group.addoption("--shapes", type=int, default=10, help="random shapes in the sweep (default: %(default)s)")


class Replay:
    """A clock that stands still but for `advance`, which moves it by the next of the given durations."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """What pytest-benchmark takes for the time."""
        return self.now

    def play(self, benchmark: Any, durations: Sequence[float]) -> None:
        """Make them the rounds of `benchmark`."""
        left = iter(durations)

        def advance() -> None:
            self.now = next(left)

        def rewind() -> None:
            self.now = 0.0

        benchmark.pedantic(advance, setup=rewind, rounds=len(durations))


CLOCK = Replay()


def pytest_configure(config: pytest.Config) -> None:
    """That nothing was measured, or on another machine than what it is compared with, is no error."""
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contender, where the test does not name its own."""
    marks = metafunc.definition.iter_markers("parametrize")
    named = any("contender" in mark.args[0] for mark in marks)
    if "contender" in metafunc.fixturenames and not named:
        metafunc.parametrize("contender", getattr(metafunc.module, "CONTENDERS", CONTENDERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that replay samples the clock to do it by."""
    for item in items:
        if "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Iterator[Arena]:
    """The contenders' processes."""
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    say = reporter.write_line if pytestconfig.get_verbosity() > 0 and reporter else lambda _: None
    with Arena(pytestconfig.getoption("threads"), pytestconfig.getoption("rounds"), say) as arena:
        yield arena


@pytest.fixture
def rivals(request: pytest.FixtureRequest) -> list[str]:
    """The contenders selected for this test's piece of work."""

    def work(item: Any) -> tuple[Any, ...]:
        parameters = {key: value for key, value in item.callspec.params.items() if key != "contender"}
        return item.path, item.originalname, parameters

    items = [item for item in request.session.items if hasattr(item, "callspec")]
    mine = work(request.node)
    return [item.callspec.params["contender"] for item in items if work(item) == mine]


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, Measurement], Measured]:
    """replay(group, measure): measure, and hand this contender's samples to pytest-benchmark; skips one that cannot."""
    name = request.node.callspec.params["contender"]

    def replay(group: str, measure: Measurement) -> Measured:
        if reason := contender(name).missing():
            pytest.skip(f"{name}: {reason}")
        if benchmark.disabled:
            pytest.skip("nothing to do with --benchmark-disable: a suite's work is to measure")
        measured = measure()[name]
        row = measured.row
        if row.unsupported:
            pytest.skip(f"{name}: {row.unsupported}")
        assert not row.void, f"void: {row.void}"
        benchmark.group = group
        benchmark.extra_info.update(measured.notes, contender=name, contended=row.contended)
        if row.cores:
            benchmark.extra_info["cores"] = [round(cores, 2) for cores in row.cores]
        if row.variants:
            benchmark.extra_info.update(variant=row.variant, variants=row.variants)
        CLOCK.play(benchmark, row.seconds)
        return measured

    return replay


# What stands in the result files


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Machine, threads and versions, in place of what names the machine."""
    machine_info.clear()
    machine_info.update(machine.describe(config.getoption("threads")))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Which code it was."""
    commit_info.clear()
    commit_info.update(machine.revision())
