"""How many threads are used, running a compiled function on them, and the barrier where they meet."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backprop_gpu.backends import threads

# How many


@pytest.fixture
def machine(monkeypatch):
    """A machine with 48 CPUs and no limit on them."""
    for name in ("BACKPROP_GPU_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    monkeypatch.setattr(threads, "_cpus", lambda: 48)
    monkeypatch.setattr(threads, "_cpu_quota", lambda: None)
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_without_limits_every_cpu_is_used():
    assert threads.available() == 48


@pytest.mark.parametrize(
    ("value", "expected"),
    [("4", 4), ("4,2", 4), (" 3 ", 3), ("100", 48), ("", 48), ("0", 48), ("-2", 48), ("many", 48), (",2", 48)],
)
def test_openmp_threads_are_a_limit_and_others_values_are_not_judged(value, expected, machine):
    machine.setenv("OMP_NUM_THREADS", value)
    assert threads.available() == expected


def test_a_quota_is_a_limit(machine):
    machine.setattr(threads, "_cpu_quota", lambda: 6)
    assert threads.available() == 6
    machine.setenv("OMP_NUM_THREADS", "5")
    assert threads.available() == 5


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("60", 60), (" 7 ", 7), ("", 3), (" ", 3)])
def test_this_librarys_variable_overrides_all_limits(value, expected, machine):
    machine.setenv("OMP_NUM_THREADS", "3")
    machine.setenv("BACKPROP_GPU_NUM_THREADS", value)
    assert threads.available() == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "4,2"])
def test_a_bad_value_of_this_librarys_variable_is_refused(value, machine):
    machine.setenv("BACKPROP_GPU_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"BACKPROP_GPU_NUM_THREADS must be a number.*got '{value}'"):
        threads.available()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform has no CPU affinity")
def test_the_cpus_are_those_that_this_process_may_run_on():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert threads._cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert threads._cpus() == len(before)


V1, V2 = "3:cpuset:/x\n4:cpu,cpuacct:{}\n", "0::{}\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "250000 100000"}, 3),
        (V2.format("/"), {"cpu.max": "max 100000"}, None),
        (V2.format("/"), {"cpu.max": "5000 100000"}, 1),
        (V2.format("/"), {}, None),
        (V2.format("/a/b"), {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
        (V2.format("/a/b"), {"a/b/cpu.max": "200000 100000", "a/cpu.max": "400000 100000"}, 2),
        (V2.format("/docker/123"), {"cpu.max": "700000 100000"}, 7),
        (V2.format("/../outside"), {"cpu.max": "100000 50000"}, 2),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}, 5),
        (V1.format("/"), {"cpuset/cpu.max": "100000 100000", "cpu.max": "100000 100000"}, None),
        (V1.format("/") + V2.format("/"), {"cpu/cpu.cfs_quota_us": "3", "cpu/cpu.cfs_period_us": "1"}, 3),
        ("", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_a_containers_quota_is_rounded_up(groups, files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert threads._cpu_quota(tmp_path) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert threads._cpu_quota(tmp_path) is None


def test_a_limit_on_numpys_blas_is_one_here_for_as_long_as_it_lasts(machine):
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    machine.setitem(sys.modules, "threadpoolctl", threadpoolctl)
    if not threads._blas_libraries(threadpoolctl):
        pytest.skip("threadpoolctl knows no BLAS with several threads here")
    before = threads.available()
    with threadpoolctl.threadpool_limits(1):
        assert threads.available() == 1
    assert threads.available() == before


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (SimpleNamespace(internal_api="openblas", threading_layer="pthreads", num_threads=5), 5),
        (SimpleNamespace(internal_api="openblas", threading_layer="disabled", num_threads=1), 48),
        (SimpleNamespace(internal_api="mkl", threading_layer="sequential", num_threads=1), 48),
        (SimpleNamespace(internal_api="blis", threading_layer="openmp", num_threads=1), 48),
        (SimpleNamespace(internal_api="flexiblas", num_threads=6), 6),
    ],
)
def test_a_blas_that_has_one_thread_anyway_is_no_limit(library, expected, machine):
    class Controller:
        def select(self, user_api):
            assert user_api == "blas"
            return SimpleNamespace(lib_controllers=[library])

    machine.setitem(sys.modules, "threadpoolctl", type("threadpoolctl", (), {"ThreadpoolController": Controller}))
    assert threads.available() == expected


# Running, by threads that compiled code starts


@pytest.fixture(scope="module")
def team():
    pytest.importorskip("numba", reason="the cpu backend needs Numba")
    from backprop_gpu.kernels.numba_cpu import team

    return team


SQUARES = """
import numpy as np
from backprop_gpu.backends import threads
from backprop_gpu.kernels.numba_cpu import team
from backprop_gpu.kernels.numba_cpu.compile import compiled, executable

run, wait = team.run, team.wait

@compiled
def part_of_squares(t, n_threads, counters, out):
    out[t, 0] += t**2
    if wait(counters, n_threads):  # which ends when all are there
        out[t, 1] += out[:, 0].sum()

@executable
def in_parallel(n_threads, counters, out):
    return run(part_of_squares, n_threads, counters.ctypes.data, (n_threads, counters, out))

def squares(n_threads):
    out = np.zeros((n_threads, 2))
    threads.require(in_parallel(n_threads, team.new_barrier(), out))
    return out
"""


@pytest.fixture(scope="module")
def squares(team):
    """squares(n_threads): t² of each thread, and beside it the sum over all, which each has seen once."""
    names = {}
    exec(SQUARES, names)
    return names["squares"]


def _expected(n_threads):
    each = np.arange(n_threads) ** 2.0
    return np.stack([each, np.full(n_threads, each.sum())], 1)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7, 61])
def test_work_is_done_once_for_each_thread_and_by_as_many_threads(n_threads, squares):
    assert np.array_equal(squares(n_threads), _expected(n_threads))


def test_several_threads_may_run_teams_at_once(squares):
    right = np.zeros((5, 20), bool)

    def use(user):
        for i in range(20):
            right[user, i] = np.array_equal(squares(3), _expected(3))

    users = [threading.Thread(target=use, args=(user,)) for user in range(5)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert right.all()


def test_every_thread_has_ended_when_the_call_returns(squares):
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("this system does not list a process's threads")
    before = len(list(tasks.iterdir()))
    for _ in range(50):
        squares(5)
    assert len(list(tasks.iterdir())) < before + 50  # Linux lists the last ones for a moment more


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by Linux's resource.setrlimit")
def test_threads_that_cannot_be_started_stop_those_that_were():
    """And a training that needs them says what to do, and leaves the model as it was."""
    program = f"""{SQUARES}
import os, resource
from pathlib import Path
import backprop_gpu as bp

net = bp.MLP([5, 256, 256, 3], backend="cpu", seed=0)
X, y = np.random.default_rng(0).standard_normal((2000, 5)), np.arange(2000) % 3
os.environ["BACKPROP_GPU_NUM_THREADS"] = "100"
net.partial_fit(X, y, batch_size=2000)
squares(2)
before, n_threads = net.parameters.copy(), len(list(Path("/proc/self/task").iterdir()))
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, -1))  # of each thread
resource.setrlimit(resource.RLIMIT_AS, (size + (500 << 20), -1))
for fails in (lambda: squares(100), lambda: net.partial_fit(X, y, batch_size=2000)):
    try:
        fails()
    except RuntimeError as error:
        print(error)
assert len(list(Path("/proc/self/task").iterdir())) < n_threads + 30  # Linux lists some for a moment more
assert np.array_equal(net.parameters, before)
os.environ["BACKPROP_GPU_NUM_THREADS"] = "2"
net.partial_fit(X, y, batch_size=2000)
assert not np.array_equal(net.parameters, before)
print(squares(2).tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == ""
    first, second, squares = result.stdout.splitlines()
    assert first == second
    assert first.startswith("the system starts no more threads for this process")
    assert first.endswith("BACKPROP_GPU_NUM_THREADS=1")
    assert squares == str(_expected(2).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning", "ignore:.*JAX is multithreaded:RuntimeWarning")
def test_a_forked_child_runs_teams_too(squares):
    assert np.array_equal(squares(3), _expected(3))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if np.array_equal(squares(3), _expected(3)) and threads.available() >= 1 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblibs_workers_run_teams_too(backend, team):
    """In a process of its own, because joblib leaves workers behind."""
    pytest.importorskip("joblib", reason="joblib is not installed")
    program = f"""
import joblib

def total(n_threads):
    names = {{}}
    exec({SQUARES!r}, names)
    return float(names["squares"](n_threads)[-1, -1]), names["threads"].available()

if __name__ == "__main__":
    results = joblib.Parallel(n_jobs=2, backend={backend!r})(joblib.delayed(total)(n) for n in (2, 3, 4))
    print([total for total, _ in results], min(n for _, n in results) >= 1)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (result.stdout, result.stderr) == ("[1.0, 5.0, 14.0] True\n", "")


# The barrier


def _on_threads(n_threads, work):
    """work(t) for each, at the same time."""
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, range(n_threads)))


@pytest.fixture(scope="module")
def rounds(team):
    """rounds(t, n_threads, n_rounds, counters, written): how often another thread's writing was not seen."""
    from backprop_gpu.kernels.numba_cpu.compile import executable

    wait = team.wait

    @executable
    def rounds(t, n_threads, n_rounds, counters, written):
        unseen = 0
        for i in range(1, n_rounds + 1):
            for k in range(t, written.size, n_threads):
                written[k] = i
            if not wait(counters, n_threads):
                return -i
            for k in range(written.size):
                if written[k] != i:
                    unseen += 1
            if not wait(counters, n_threads):
                return -i
        return unseen

    return rounds


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_after_the_barrier_every_thread_sees_what_all_have_written(n_threads, team, rounds):
    counters, written, unseen = team.new_barrier(), np.zeros(101), np.full(n_threads, -1)
    n_rounds = 3000 if n_threads > 2 else 100_000

    def work(t):
        unseen[t] = rounds(t, n_threads, n_rounds, counters, written)

    _on_threads(n_threads, work)
    assert unseen.tolist() == [0] * n_threads
    assert (written == n_rounds).all()


def test_its_counters_lie_in_cache_lines_of_their_own(team):
    for counters in (team.new_barrier() for _ in range(10)):
        assert counters.ctypes.data % 128 == 0
        assert counters.nbytes == 256
        assert not counters.any()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_stopped_barrier_lets_all_who_wait_go(missing, team, rounds):
    counters = team.new_barrier()

    def work(t):
        if t == missing:
            counters[team.GENERATION] = team.STOPPED
            return t
        return rounds(t, 3, 10, counters, np.zeros(3))

    assert _on_threads(3, work) == [t if t == missing else -1 for t in range(3)]


def test_a_stop_in_the_middle_is_not_lost(team, rounds):
    """The threads that go on for ever unless they see it: one stops them from outside their rounds."""
    counters = team.new_barrier()

    def work(t):
        if t < 2:
            return rounds(t, 2, 2**62, counters, np.zeros(2))
        while counters[team.GENERATION] < 1000:
            pass
        counters[team.GENERATION] = team.STOPPED
        return -1

    assert max(_on_threads(3, work)) < 0


@pytest.mark.parametrize(
    ("triple", "instruction"),
    [("x86_64-unknown-linux-gnu", "pause"), ("aarch64-unknown-linux-gnu", "yield"), ("riscv64-unknown-elf", None)],
)
def test_the_processor_is_told_that_the_loop_waits(triple, instruction, team):
    ir, llvm = pytest.importorskip("llvmlite.ir"), pytest.importorskip("llvmlite.binding")
    module = ir.Module()
    builder = ir.IRBuilder(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "spin").append_basic_block())
    team.call_pause(builder, triple)
    team.call_pause(builder, triple)
    builder.ret_void()
    if instruction is None:
        assert "call" not in str(module)
        return
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this llvmlite does not compile for {triple}")
    assembly = target.create_target_machine().emit_assembly(llvm.parse_assembly(str(module)))
    assert assembly.split().count(instruction) == 2
