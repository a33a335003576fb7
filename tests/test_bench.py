"""The benchmarks measure what they say: the same work for all, samples in step, and tables from the files alone."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import agreement, comparison, distance, estimators, plots, report, results, tables
from bench.arena import Arena, Measured, void_where_scores_differ
from bench.cases import LARGEST_STEP, NETWORKS, Case, random_cases
from bench.comparison import Row, compare, interleaved, quartiles, ratios, settled
from bench.contenders import BACKENDS, FLOOR, GPU_PEERS, PEERS, contender
from bench.contenders.contract import Unsupported
from bench.datasets import FITS, missing
from bench.distance import Distance
from bench.fresh import first_step, import_seconds
from bench.processes import Failed, Others, Process
from bench.tasks import COPY, OPERATIONS, TASKS

ROOT = Path(__file__).parents[1]

SMALL = Case((7, 11, 5, 3), 13)

CONTENDERS = [
    name for name in (*BACKENDS, *PEERS, FLOOR) if name != "torch-compile" and contender(name).missing() is None
]
"""Those that work here, but for the one that compiles for many seconds."""


@pytest.fixture(autouse=True)
def _processors_are_near(monkeypatch):
    """Where they are not, every comparison would wait for it."""
    monkeypatch.setattr(comparison, "DISTANCE", Distance(3.0, 0.0, lambda: 0.0))


# Cases


def test_the_networks_are_those_of_the_readme():
    assert {name: case.layer_sizes for name, case in NETWORKS.items()} == {
        "S": (30, 64, 64, 2),
        "M": (784, 256, 128, 10),
        "N": (32, 64, 64, 64, 64, 16),
        "L": (784, 1024, 1024, 10),
    }


def test_flops_are_those_of_the_products_of_a_step():
    forward, gradients, backward = 7 * 11 + 11 * 5 + 5 * 3, 7 * 11 + 11 * 5 + 5 * 3, 11 * 5 + 5 * 3
    assert SMALL.flops == 2 * 13 * (forward + gradients + backward)
    assert SMALL.product_flops == 2 * 13 * forward


def test_random_shapes_are_the_same_each_time_and_within_their_bounds():
    cases = random_cases(60)
    assert cases == random_cases(60)
    assert cases[:5] == random_cases(5)
    assert {case.activation for case in cases} == {"relu", "tanh", "gelu", "silu"}
    for case in cases:
        assert 1 <= len(case.layer_sizes) - 1 <= 8
        assert min(case.layer_sizes) >= 1
        assert max(case.layer_sizes) <= 2048
        assert 1 <= case.batch_size <= 4096
        assert case.flops <= LARGEST_STEP


def test_mini_batches_are_the_rows_in_the_drawn_order():
    X, y = SMALL.data()
    batches, labels = SMALL.batches()
    np.testing.assert_array_equal(batches.reshape(-1, 7), X[SMALL.order()])
    np.testing.assert_array_equal(labels.ravel(), y[SMALL.order()])
    assert sorted(SMALL.order()) == list(range(SMALL.n_rows))


def test_a_case_survives_json():
    assert Case.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


# The same work


@pytest.fixture(params=CONTENDERS)
def worker(request):
    """A contender, ready."""
    chosen = contender(request.param)
    chosen.set_up(1)
    return chosen


def _variants(task, worker, case):
    try:
        return TASKS[task].variants(worker, case)
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
def test_every_variant_trains_to_the_loss_of_the_reference(activation, worker):
    case = Case((7, 11, 5, 3), 13, activation)
    expected, tolerance = TASKS["training"].expected(case)
    assert tolerance > 0
    for build in _variants("training", worker, case).values():
        try:
            work = build()
        except Unsupported as reason:
            pytest.skip(str(reason))
        for _ in range(2):  # from the beginning each time
            work.reset()
            work.run(case.n_batches)
            if (result := work.result()) is not None:
                assert abs(TASKS["training"].number(case, result) - expected) <= tolerance


def test_a_loop_of_ones_own_trains_to_the_loss_of_the_reference():
    case = Case((7, 11, 5, 3), 13)
    expected, tolerance = TASKS["own loop"].expected(case)
    (build,) = TASKS["own loop"].variants(contender("partial-fit"), case).values()
    work = build()
    for _ in range(2):  # from the beginning each time
        work.reset()
        work.run(case.n_batches)
        assert abs(TASKS["own loop"].number(case, work.result()) - expected) <= tolerance


def test_two_classes_are_two_outputs_for_everyone(worker):
    case = Case((5, 4, 2), 9)
    expected, tolerance = TASKS["training"].expected(case)
    for build in _variants("training", worker, case).values():
        work = build()
        work.reset()
        work.run(case.n_batches)
        if (result := work.result()) is not None:
            assert abs(TASKS["training"].number(case, result) - expected) <= tolerance


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("operation", [*OPERATIONS, COPY])
def test_operations_agree_with_the_reference(operation, activation, worker):
    case = Case((11, 5), 13, activation, n_batches=1)
    for build in _variants(operation, worker, case).values():
        work = build()
        work.run(3)
        if (result := work.result()) is not None:
            assert TASKS[operation].number(case, result) <= TASKS[operation].expected(case)[1]


def test_labels_agree_with_the_reference(worker):
    case = Case((7, 11, 5, 3), 200, n_batches=1)
    for build in _variants("prediction", worker, case).values():
        work = build()
        work.run(2)
        assert TASKS["prediction"].number(case, work.result()) <= TASKS["prediction"].expected(case)[1]


def test_fits_tell_rising_times_and_learn(worker):
    try:
        curve = list(worker.fit(FITS["digits"], 3, seed=0))
    except Unsupported as reason:
        pytest.skip(str(reason))
    seconds = [moment for moment, _ in curve]
    assert len(curve) == 3
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    from bench.worker import accuracy

    assert accuracy(FITS["digits"], curve[-1][1]) > 0.8


def test_peers_for_a_gpu_say_what_they_miss_without_one():
    for name in GPU_PEERS:
        reason = contender(name).missing()
        assert reason is None or "CUDA" in reason or "not installed" in reason


def test_data_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST", str(tmp_path / "nowhere"))
    assert "nowhere" in missing("mnist")
    assert missing("digits") is None


# Measuring


def test_quartiles_are_interpolated():
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)


def test_ratios_are_taken_pair_by_pair():
    # Both slow down together in the second round: their ratio does not.
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.0)


def test_every_round_has_every_contender_once_in_changing_order():
    drawn = interleaved(["a", "b", "c"], 20)
    rounds = [[name for i, name in drawn if i == k] for k in range(20)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_a_ratio_is_settled_when_its_quartiles_are_near_for_so_many_rounds():
    ours = [1.0] * 16
    spread = [2.0, 2.2] * 8  # quartiles 10 % apart: ± 2.3 % after 16 rounds, ± 4.6 % after 4
    assert settled([ours, spread])
    assert not settled([ours[:4], spread[:4]])
    assert settled([ours[:4], [2.0, 2.1, 2.0, 2.1]])
    assert not settled([ours[:3], [2.0] * 3])
    assert not settled([ours, [2.0] * 16, [2.0, 3.0] * 8])
    assert not settled([])


class Scripted:
    """A process whose answers are given beforehand, on a machine where others use what they are told to."""

    now = 0.0  # one clock for all of them
    threads = 2

    def __init__(self, monkeypatch, number=None, others=(), fails_at=None):
        self.number, self.others, self.samples, self.fails_at = number, list(others), 0, fails_at
        monkeypatch.setattr(comparison, "Others", lambda process: process)
        monkeypatch.setattr(comparison.time, "perf_counter", lambda: Scripted.now)

    def ask(self, do, **arguments):
        if do == "sample" and self.samples == self.fails_at:
            raise Failed("out of memory")
        if do == "begin":
            return {"variant": "", "variants": {"": 0.01}, "number": self.number}
        self.samples += 1
        Scripted.now += 1.0
        return {"seconds": float(self.samples), "cores": 1.0}

    def tell(self, do, **arguments):
        assert do == "build"

    def hear(self):
        return {}

    def seconds(self):
        return self.others.pop(0) if self.others else 0.0

    def wait_until_idle(self):
        pass


def test_a_sample_is_taken_again_while_something_else_runs(monkeypatch):
    process = Scripted(monkeypatch, others=[0.9, 0.5, 0.0])
    answer, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == 3
    assert answer["seconds"] == 3.0
    assert contention <= 1


def test_the_least_contended_sample_is_kept_where_all_are(monkeypatch):
    process = Scripted(monkeypatch, others=[0.9, 0.3, 0.5, 0.7, 0.0])
    answer, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == comparison.ATTEMPTS
    assert answer["seconds"] == 2.0
    assert contention > 1


def test_a_contender_that_lacks_its_usual_processors_is_contended(monkeypatch):
    process = Scripted(monkeypatch)
    _, contention = comparison.uncontended(process, [2.0, 2.0, 2.0], lambda: process.ask("sample"))
    assert contention > 1


def test_a_sample_is_taken_again_where_the_processors_have_moved_apart(monkeypatch):
    process = Scripted(monkeypatch)
    distances = iter([1.0, 4.0, 1.0, 1.0])  # before and after each sample
    monkeypatch.setattr(comparison, "DISTANCE", Distance(3.0, 1.0, lambda: next(distances), near=1.0))
    _, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == 2
    assert contention <= 1


def test_no_sample_is_taken_again_for_distance_once_patience_is_at_an_end(monkeypatch):
    process = Scripted(monkeypatch, others=[0.0, 0.9, 0.0])
    distances = iter([1.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(comparison, "DISTANCE", Distance(3.0, 0.0, lambda: next(distances)))
    _, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == 1
    assert contention > 1
    _, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == 3  # of which the second was contended otherwise too
    assert contention > 1


def test_one_thread_is_not_disturbed_by_distance(monkeypatch):
    process = Scripted(monkeypatch)
    process.threads = 1
    monkeypatch.setattr(comparison, "DISTANCE", Distance(3.0, 0.0, lambda: pytest.fail("nobody has to know")))
    _, contention = comparison.uncontended(process, [], lambda: process.ask("sample"))
    assert process.samples == 1
    assert contention <= 1


def test_samples_wait_until_the_processors_are_near_but_not_for_ever(monkeypatch):
    waited = []
    monkeypatch.setattr(distance.time, "sleep", waited.append)
    distances = iter([1.0, 4.0, 4.0, 2.0] + [4.0] * 9)
    apart = Distance(3.0, 4.5 * distance.PAUSE, lambda: next(distances), near=1.0)
    assert apart.wait_until_near() == pytest.approx(1 / 3)
    assert apart.wait_until_near() == pytest.approx(2 / 3)
    assert len(waited) == 2
    assert apart.wait_until_near() == pytest.approx(4 / 3)
    assert len(waited) == 5


def test_a_run_that_begins_with_processors_far_apart_waits_too(monkeypatch):
    monkeypatch.setattr(distance.time, "sleep", lambda _: None)
    distances = iter([4.0, 4.0, 1.0])
    apart = Distance(3.0, 1.0, lambda: next(distances), near=1.2)
    assert apart.wait_until_near() == pytest.approx(1 / 3)


def test_processors_that_are_never_near_are_waited_for_once(monkeypatch):
    waited = []
    monkeypatch.setattr(distance.time, "sleep", waited.append)
    apart = Distance(3.0, 2 * distance.PAUSE, lambda: 4.0, near=1.0)
    assert [apart.wait_until_near() for _ in range(3)] == [pytest.approx(1 / 3)] * 3
    assert len(waited) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to a processor here")
def test_a_cache_line_is_handed_on_by_each_processor_in_turn(monkeypatch):
    allowed, line = os.sched_getaffinity(0), np.zeros(32, np.int64)
    monkeypatch.setattr(distance.team, "new_barrier", lambda: line)
    seconds = distance.handover_seconds()
    assert os.sched_getaffinity(0) == allowed
    if len(allowed) == 1:
        pytest.skip("one processor has none to hand on to")
    assert line[0] == distance.HANDOVERS // len(allowed) * len(allowed) * distance.PARTS
    assert 0 < seconds < math.inf


def test_one_processor_is_near_itself(monkeypatch):
    monkeypatch.setattr(distance.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert Distance(3.0, 1.0).wait_until_near() == 0.0


@pytest.mark.parametrize("number", [math.nan, 0.0, 10.0])
def test_a_different_answer_voids_the_row(monkeypatch, number):
    measured = compare(SMALL, {"numpy": Scripted(monkeypatch, number=number)}, rounds=2)
    assert "training gives" in measured.rows["numpy"].void
    assert measured.rows["numpy"].seconds == []


def test_rounds_end_when_the_ratios_are_settled(monkeypatch):
    number = TASKS["training"].expected(SMALL)[0]
    steady = [Scripted(monkeypatch, number=number) for _ in range(2)]
    rows = compare(SMALL, dict(zip("ab", steady, strict=True)), rounds=9).rows
    assert [len(row.seconds) for row in rows.values()] == [comparison.FEWEST_ROUNDS] * 2
    monkeypatch.setattr(comparison, "SETTLED", -1.0)
    rows = compare(SMALL, dict(zip("ab", steady, strict=True)), rounds=9).rows
    assert [len(row.seconds) for row in rows.values()] == [9] * 2


def test_an_answer_within_the_tolerance_is_timed(monkeypatch):
    number = TASKS["training"].expected(SMALL)[0]
    measured = compare(SMALL, {"numpy": Scripted(monkeypatch, number=number)}, rounds=2)
    assert measured.rows["numpy"].void == ""
    assert len(measured.rows["numpy"].seconds) == 2


def test_a_contender_that_fails_on_the_way_is_void_and_the_others_go_on(monkeypatch):
    number = TASKS["training"].expected(SMALL)[0]
    good, bad = Scripted(monkeypatch, number=number), Scripted(monkeypatch, number=number, fails_at=2)
    rows = compare(SMALL, {"good": good, "bad": bad}, rounds=4).rows
    assert "out of memory" in rows["bad"].void
    assert rows["bad"].seconds == []
    assert len(rows["good"].seconds) == 4


def test_nothing_is_taken_again_on_a_machine_that_is_busy_throughout(monkeypatch):
    number = TASKS["training"].expected(SMALL)[0]
    monkeypatch.setattr(comparison, "FEWEST_ROUNDS", 20)
    process = Scripted(monkeypatch, number=number, others=[0.9] * 1000)
    row = compare(SMALL, {"numpy": process}, rounds=20).rows["numpy"]
    assert row.contended == 20
    assert process.samples == comparison.ATTEMPTS * comparison.ENOUGH + 20 - comparison.ENOUGH


# Processes


def test_what_else_runs_is_seen():
    with Process(FLOOR, 1) as process, Process("numpy", 1) as other:
        other.ask("about")
        quiet = Others(process)
        before = quiet.seconds()
        case = Case((64, 64, 64, 10), 512).to_dict()
        other.ask("build", what="training", case=case, search=1.0)
        other.ask("begin")
        assert quiet.seconds() - before > 0.02


def test_processes_answer_in_step():
    with Arena(threads=1, rounds=2) as arena:
        measured = arena.compared("training", SMALL, ["numpy", FLOOR])
        again = arena.compared("training", SMALL, ["numpy", FLOOR])
    assert again is measured
    assert [len(entry.row.seconds) for entry in measured.values()] == [2, 2]
    assert all(min(entry.row.seconds) > 0 and entry.row.void == "" for entry in measured.values())


def test_what_goes_wrong_in_a_process_comes_back():
    with Process(FLOOR, 1) as process:
        with pytest.raises(Failed, match="KeyError"):
            process.ask("build", what="nonsense", case=SMALL.to_dict(), search=1.0)
        assert process.ask("about")["versions"]["numpy"] == np.__version__


def test_a_process_that_ended_is_reported():
    process = Process(FLOOR, 1)
    process.process.kill()
    process.process.wait()
    with pytest.raises(Failed, match="ended with status"):
        process.ask("about")
    process.close()


def test_a_process_that_ended_is_started_again():
    with Arena(threads=1, rounds=2) as arena:
        (process,) = arena.running([FLOOR]).values()
        assert arena.running([FLOOR]) == {FLOOR: process}
        process.process.kill()
        process.process.wait()
        (other,) = arena.running([FLOOR]).values()
        assert other.ask("about")["versions"]
        process.close()


def test_new_processes_tell_their_seconds_and_memory(tmp_path):
    assert import_seconds("numpy") > 0
    answer = first_step("numpy", 1, str(tmp_path))
    assert answer["seconds"] > 0
    assert 10 < answer["peak_mb"] < 10_000


# Result files, tables and plots


def _benchmark(group, name, data, **notes):
    return {
        "group": group,
        "name": f"test[{name}]",
        "extra_info": {"contender": name, "contended": 0, **notes},
        "stats": {"data": data, "median": sorted(data)[len(data) // 2]},
    }


class Constant:
    """An estimator that says the same of every row."""

    def __init__(self, answer):
        self.answer = answer

    def fit(self, X, y):
        return self

    def partial_fit(self, X, y, classes):
        assert len(X) == len(y) == estimators.BATCH
        return self

    def predict(self, X):
        return np.full(len(X), self.answer)

    def score(self, X, y):
        return np.mean(self.predict(X) == y)


@pytest.mark.parametrize("job", ["fit, digits", "partial_fit, 200 rows", "predict, 1 row", "predict, 100 rows"])
def test_an_estimators_job_ends_in_its_accuracy(job):
    job = estimators.JOBS[job]
    scores = [job.do(lambda answer=answer, **settings: Constant(answer), job) for answer in (-1, 1)]
    assert scores[0] == 0
    assert 0 < scores[1] < 1 or job.rows == 1


def test_estimators_whose_accuracies_differ_are_void():
    measured = {who: Measured(Row(), {"scores": [score]}) for who, score in (("estimator", 0.98), ("sklearn", 0.9))}
    void_where_scores_differ(measured)
    assert all(each.row.void == "accuracies of 98.00%, 90.00%, which should be the same" for each in measured.values())
    measured["sklearn"].notes["scores"] = [0.975]
    void_where_scores_differ(again := {who: Measured(Row(), each.notes) for who, each in measured.items()})
    assert not any(each.row.void for each in again.values())


def test_an_estimator_is_measured_beside_scikit_learn():
    with Arena(threads=1, rounds=2) as arena:
        measured = arena.estimated("predict, 1 row", ["estimator", "sklearn"], rounds=2)
    for each in measured.values():
        assert not each.row.void
        assert len(each.row.seconds) == len(each.notes["scores"]) == 2


@pytest.fixture
def result(tmp_path):
    """A file with something of everything, in which ours takes 1 ms or 1 s, and the others 2, 3 … times as long."""
    machine = {"cpu": "A Processor", "gpu": "", "threads": 2, "simd": "avx2", "python": "3.12.0"}
    machine["versions"] = {"numpy": "2.0.0"}
    names = ("cpu", "torch", "jax", "sklearn", "numpy", "floor")

    def group(title, names=names, unit=1e-3, **notes):
        return [_benchmark(title, name, [unit * (i + 1)] * 3, **notes) for i, name in enumerate(names)]

    def noted(case, what="training"):
        return {"case": case.to_dict(), "what": what, "variant": "a way"}

    curves = [[[0.5, 0.9], [1.0, 0.98]]] * 3
    benchmarks = [
        *group("training step, S", **noted(NETWORKS["S"])),
        *group("training step, M", **noted(NETWORKS["M"])),
        *group("activation, S, tanh", names[:3], **noted(Case((30, 64, 64, 2), 200, "tanh"))),
        *group("random shape, 3-4-5, 6", names[:3], **noted(Case((3, 4, 5), 6))),
        *group("width 64, batch 32", names[:3], **noted(Case((64, 64, 64, 10), 32))),
        *group("width 64, batch 128", names[:3], **noted(Case((64, 64, 64, 10), 128))),
        *group("predict, S", names[:3], **noted(NETWORKS["S"], "prediction")),
        *group("dense_forward, M", names[:3], **noted(Case((784, 256), 128), "dense_forward")),
        *group("ceiling, product", names[:3], **noted(Case((2048, 2048), 2048), "dense_forward")),
        *group("fit, digits", names[:4], 1.0, target=0.97, curves=curves),
        *group("estimator, fit, digits", ("estimator", "sklearn"), 1.0, scores=[0.98] * 3),
        *group("own loop, S", ("partial-fit", "torch"), **noted(NETWORKS["S"], "own loop")),
        *group("autograd, S", ("fused-module", "torch"), **noted(NETWORKS["S"], "autograd")),
        *group("import", ("cpu", "torch"), 1.0),
        *group("first step, cold", ("cpu", "torch"), 1.0, peak_mb=[200.0]),
    ]
    content = {"machine_info": machine, "commit_info": {}, "datetime": "2030-01-02T03:04:05", "benchmarks": benchmarks}
    path = tmp_path / "a-processor.json"
    path.write_text(results.compact(content), encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(content))
    return results.read(path)


def test_tables_hold_times_and_ratios(result):
    text = tables.short([result])
    assert "**A Processor, 2 threads, avx2** (2030-01-02; Python 3.12.0, numpy 2.0.0)" in text
    assert "| a training step of | ours | PyTorch eager | JAX jit | scikit-learn |" in text
    assert "| S: 30-64-64-2, 200 | 1.00 ms | 2.00 × | 3.00 × | 4.00 × |" in text
    assert "2.00 in the geometric mean; 2.00 at the least (3-4-5, 6, against PyTorch eager)" in text
    assert "| `predict` on 100,000 rows | PyTorch eager | S 2.00 |" in text
    assert "| scikit-learn | 4.00; accuracy 98.00%, and 98.00% |" in text
    assert "| `backprop_gpu.sklearn.MLPClassifier` | scikit-learn | fit, digits 2.00 |" in text
    assert "| `backprop_gpu.torch.FusedMLP`, forward and backward pass | PyTorch eager | S 2.00 |" in text


def test_the_short_tables_go_from_the_least_to_the_most_over_the_processors(result):
    def changed(row, factor, leave_out=()):
        return {
            name: replace(bench, seconds=tuple(factor[name == "cpu"] * s for s in bench.seconds))
            for name, bench in row.items()
            if name not in leave_out
        }

    slower = {name: changed(row, (2, 3)) for name, row in result.groups.items() if name != "training step, M"}
    slower["training step, S"] = changed(result.groups["training step, S"], (2, 3), ["jax"])
    machine = {**result.machine, "cpu": "B Processor", "versions": {"numpy": "2.0.0", "torch": "3"}}
    other = replace(result, machine=machine, date="2030-02-03", groups=slower)
    text = tables.short([result, other])
    assert (
        "**2 machines**: A Processor, 2 threads, avx2; B Processor, 2 threads, avx2 (2030-01-02 – 2030-02-03; " in text
    )
    assert "| S: 30-64-64-2, 200 | 1.00 ms – 3.00 ms | 1.33 – 2.00 × | 3.00 × | 2.67 – 4.00 × |" in text
    assert "| M: 784-256-128-10, 128 | 1.00 ms | 2.00 × | 3.00 × | 4.00 × |" in text
    assert "1.33 – 2.00 in the geometric mean; 1.33 at the least (3-4-5, 6, against PyTorch eager)" in text
    on_gpu = replace(result, machine={**result.machine, "gpu": "A GPU"})
    assert tables.short([result, on_gpu]) == f"{tables.short([result])}\n\n{tables.short([on_gpu])}"


def test_everything_is_in_the_long_tables(result):
    text = tables.everything(result)
    assert "| S | 1.00 ms | 2.00 ms (2.00 ×) | 3.00 ms (3.00 ×) |" in text
    for title, prefix in tables.SECTIONS:
        assert (f"### {title}\n" in text) == any(True for _ in result.under(prefix))
    assert "| digits | PyTorch eager | 98.00% | 97.0% | 1.00 s |" in text
    assert "| cold | backprop_gpu, cpu 200, PyTorch eager 200 |" in text
    assert (
        "|  | backprop_gpu.sklearn | scikit-learn |\n| --- | --- | --- |\n| fit, digits | 1.00 s | 2.00 s (2.00 ×) |"
        in text
    )
    assert "samples; 0 of them were contended" in text


def _file(folder, name, **samples):
    """A result file with one piece of work, whose contenders took such seconds."""
    benchmarks = [_benchmark("a piece of work", who, seconds) for who, seconds in samples.items()]
    content = {"machine_info": {}, "commit_info": {}, "datetime": "2030-01-02", "benchmarks": benchmarks}
    path = folder / name
    path.write_text(results.compact(content), encoding="utf-8")
    return str(path)


def test_ratios_of_two_files_that_are_apart_are_listed(tmp_path, capsys):
    ours = [1.0, 1.0, 1.0]
    a = _file(tmp_path, "a.json", cpu=ours, torch=[2.0, 2.0, 2.0], jax=[1.5, 1.5, 1.5], floor=[0.5, 0.5, 0.5])
    b = _file(tmp_path, "b.json", cpu=ours, torch=[2.1, 2.3, 2.5], jax=[1.6, 1.6, 1.6], floor=[1.0, 1.0, 1.0])
    assert agreement.main([a, b]) == 1
    assert capsys.readouterr().out == (
        "ratios over 1.1: 2; more than 10% apart: 1\n"
        "|  |  | A | B | apart |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a piece of work | PyTorch eager | 2.00 [2.00, 2.00] | 2.30 [2.20, 2.40] | 15% |\n"
    )


def test_two_files_that_agree_or_lack_a_contender(tmp_path, capsys):
    a = _file(tmp_path, "a.json", cpu=[1.0], torch=[2.0], sklearn=[3.0])
    b = _file(tmp_path, "b.json", cpu=[2.0], torch=[4.3])
    assert agreement.main([a, b]) == agreement.main([b, a]) == 0
    text = "ratios in one file only: 1\nratios over 1.1: 1; more than 10% apart: 0\n"
    assert capsys.readouterr().out == 2 * text


def test_ratios_that_vary_are_shown_with_their_quartiles():
    row = {
        "cpu": results.Bench("cpu", (1.0, 1.0, 1.0), {"contended": 0}),
        "torch": results.Bench("torch", (2.0, 2.0, 3.0), {"contended": 0}),
        "jax": results.Bench("jax", (3.0, 3.1, 3.1), {"contended": 0}),
    }
    machine = {"gpu": "", "cpu": "A", "threads": 2, "simd": "", "python": "3.12.0", "versions": {}}
    text = tables.everything(results.Result(Path("a.json"), machine, "2030-01-02", {"a piece of work": row}))
    assert "of 2, those whose quartiles are over 10% of the median apart" in text
    assert "| a piece of work | PyTorch eager | 2.00 [2.00, 2.50] | 3 |" in text
    assert "| a piece of work | JAX jit" not in text


def test_operations_on_a_gpu_are_set_against_its_ceilings():
    """1 TFLOP/s and 1 TB/s: the product takes 2 · 100 · 1000 · 1000 operations, the update 28 bytes a parameter."""
    layer = Case((1000, 1000), 100, n_batches=1)

    def row(seconds, name="torch@cuda", case=layer):
        return {name: results.Bench(name, (seconds,), {"case": case.to_dict(), "contended": 0})}

    groups = {
        "ceiling, product": row(2e-3, case=Case((1000, 1000), 1000)),
        "ceiling, copy": row(8e-6),
        "dense_forward, wide": row(4e-4),
        "update, wide": row(5.6e-5),
    }
    machine = {"gpu": "A GPU", "python": "3.12.0", "versions": {}}
    text = tables.everything(results.Result(Path("a-gpu.json"), machine, "2030-01-02", groups))
    assert "| of 1.0 TFLOP/s and 1.00 TB/s |" in text
    assert "| `dense_forward`, wide | – | – | 50% |" in text
    assert "| `update`, wide | – | – | 50% |" in text


def test_ratios_in_tables_are_medians_of_the_rounds():
    ours = results.Bench("cpu", (1.0, 2.0, 4.0), {})
    assert ours.times_as_fast(results.Bench("jax", (3.0, 4.0, 4.0), {})) == 2.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.12345, "123 ms"),
        (1234.5, "1234 s"),
        (4.56e-5, "45.6 µs"),
        (9.996e-3, "10.0 ms"),
    ],
)
def test_times_have_three_digits(seconds, text):
    assert tables.time_of(seconds) == text


def test_every_plot_is_drawn(result, tmp_path):
    plots.draw(result, tmp_path / "plots")
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "plots").iterdir()}
    assert drawn.keys() == {f"a-processor-{name}.svg" for name in ("throughput", "accuracy", "ceiling")}
    assert set(plots.files(result).values()) == drawn.keys()
    assert all(text.lstrip().startswith("<?xml") and "nan" not in text.lower() for text in drawn.values())
    plots.draw(result, tmp_path / "again")
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "again").iterdir()} == drawn


@pytest.mark.parametrize(
    ("seconds", "fewest", "steps"),
    [
        ((1e-4, 5e-4), 1, 72),  # 7 ms of the fastest
        ((1e-3, 2e-3), 32, 32),
        ((1e-2, 5e-2), 32, 8),  # 0.4 s of the slowest
        ((1e-5, 1e-4), 32, 700),
        ((1.0, 2.0), 32, 4),  # as many as there are mini-batches
    ],
)
def test_a_run_has_as_many_steps_as_an_epochs_costs_need(seconds, fewest, steps):
    assert comparison._plan(seconds, 4, fewest)["n"] == steps


def test_the_readme_takes_its_figures_from_the_files_alone(monkeypatch, result):
    monkeypatch.setattr(report, "all_results", lambda: [])
    assert report.benchmarks() == "Speed on a CPU: not yet measured.\n\nSpeed on a GPU: not yet measured."
    monkeypatch.setattr(report, "all_results", lambda: [result])
    assert report.benchmarks() == f"{tables.short([result])}\n\nSpeed on a GPU: not yet measured."
    text = report.filled("".join(f"<!-- {name} -->\nold 12.3 ms\n<!-- /{name} -->\n" for name in report.TABLES))
    assert "old" not in text
    assert tables.short([result]) in text
    with pytest.raises(ValueError, match="no markers"):
        report.filled("")


def test_committed_results_are_complete():
    """Each was measured by all that it compares with, and its plots are there."""
    for found in results.all_results():
        assert found.machine["versions"].keys() >= {"numpy", "backprop_gpu"}
        for file in plots.files(found).values():
            assert (plots.FOLDER / file).exists()


def test_the_instructions_name_every_suite():
    text = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    suites = {path.name for path in (ROOT / "bench").glob("test_*.py")}
    assert suites <= set(re.findall(r"test_\w+\.py", text))


# The suites, run by pytest


def _measuring():
    """The environment without that of pytest-xdist, under which pytest-benchmark measures nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def _suites(tmp_path, *arguments):
    file = tmp_path / "benchmarks.json"
    environment = {**_measuring(), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", f"--benchmark-json={file}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, json.loads(file.read_text(encoding="utf-8")) if file.exists() and file.stat().st_size else None


def test_pytest_measures_the_selected_contenders_in_step(tmp_path):
    pytest.importorskip("pytest_benchmark")
    selection = "test_operation and dense_forward-M and (numpy or floor)"
    done, content = _suites(tmp_path, "bench/test_operations.py", "-k", selection, "--rounds=2", "--threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [benchmark["extra_info"]["contender"] for benchmark in content["benchmarks"]] == ["numpy", "floor"]
    assert [len(benchmark["stats"]["data"]) for benchmark in content["benchmarks"]] == [2, 2]
    assert content["machine_info"]["threads"] == 1
    assert content["machine_info"].keys() >= {"cpu", "versions", "simd"}
    assert "node" not in content["machine_info"]


def test_a_backend_that_is_not_there_is_skipped_by_name(tmp_path):
    pytest.importorskip("pytest_benchmark")
    code = "import bench.contenders.floor as f; f.Products.packages = ('no_such_package',)"
    (tmp_path / "without_floor.py").write_text(code, encoding="utf-8")
    done, _ = _suites(tmp_path, "-p", "without_floor", "bench/test_operations.py", "-k", "M-floor and dense_forward")
    assert "floor: no_such_package not installed" in done.stdout, done.stdout + done.stderr


def test_one_command_measures_writes_and_prints(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "mine.json"
    selection = "test_ceiling and product and floor"
    command = [sys.executable, "-m", "bench", "--output", str(file), "-k", selection, "--rounds=2", "--threads=1"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=_measuring(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = results.read(file).groups.values()
    assert len(group["floor"].seconds) == 2
    assert f"written to {file}" in done.stdout
    assert tables.heading(results.read(file)) in done.stdout
