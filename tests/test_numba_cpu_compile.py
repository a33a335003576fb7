"""The disk cache of compiled code: the next process loads it, and never what is stale, damaged or another's."""

import ast
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import backprop_gpu
from backprop_gpu import kernels

numba = pytest.importorskip("numba", reason="the cpu backend needs Numba")

from numba.core.codegen import JITCodeLibrary  # noqa: E402

from backprop_gpu.kernels.numba_cpu import compile as compiling  # noqa: E402

X = np.array([0.5, -2.0, 3.25])
Y = 0.125 - 8.0 + 34.328125

PACKAGE, KERNELS = Path(backprop_gpu.__file__).parent, Path(kernels.__file__).parent


def sum_of_cubes(x):
    total = 0.0
    for i in range(x.size):
        total += x[i] * x[i] * x[i]
    return total


@pytest.fixture
def unchanged(monkeypatch):
    """The sources stay as they were imported, though somebody may be editing them while the tests run."""
    monkeypatch.setattr(compiling, "_sources_hash", lambda: compiling.SOURCES_HASH)


@pytest.fixture
def chosen(unchanged, tmp_path, monkeypatch):
    """The directory that BACKPROP_GPU_CACHE_DIR names."""
    monkeypatch.setenv("BACKPROP_GPU_CACHE_DIR", str(tmp_path / "chosen"))
    return tmp_path / "chosen"


@pytest.fixture
def places(unchanged, tmp_path, monkeypatch):
    """The parents of the user's cache directory and of the temporary one, with no directory chosen."""
    monkeypatch.delenv("BACKPROP_GPU_CACHE_DIR", raising=False)
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(compiling, "user_cache", lambda: home / "backprop_gpu")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    compiling._root.cache_clear()
    yield home, temporary
    compiling._root.cache_clear()


def use(x=X, expected=Y):
    """A process's first call of the function: how often it was loaded, and how often compiled."""
    code = compiling.EntryPoint(sum_of_cubes).specialised(x)
    assert code(x) == expected
    return sum(code.stats.cache_hits.values()), sum(code.stats.cache_misses.values())


LOADED, COMPILED = (1, 0), (0, 1)


def folders(root):
    """The folders of machine code, and whatever else lies beside them."""
    return sorted(root.glob("numba_cpu-*/*"))


# Keeping and loading


def test_machine_code_is_compiled_once_and_then_loaded(chosen):
    assert use() == COMPILED
    assert use() == LOADED
    assert len(folders(chosen)) == 1


def test_every_tuple_of_types_has_a_folder_of_its_own(chosen):
    frozen = X.copy()
    frozen.flags.writeable = False
    cases = [X, X.astype(np.float32), X.reshape(3, 1)[:, 0], np.repeat(X, 2)[::2], frozen]
    entry = compiling.EntryPoint(sum_of_cubes)
    assert [entry(x) for x in cases] == [Y] * 5
    kinds = {str(numba.typeof(x)) for x in cases}
    assert len(folders(chosen)) == len(kinds) == 4
    assert [use(x) for x in cases] == [LOADED] * 5


@pytest.mark.usefixtures("chosen")
def test_arguments_choose_their_code_by_their_types():
    entry = compiling.EntryPoint(sum_of_cubes)
    assert entry.specialised(X) is entry.specialised(X[:2].copy())
    assert entry.specialised(X) is not entry.specialised(X.astype(np.float32))
    outlines = [1, 2**63, 1.0, None, (X,), (X, X), X, X[:, None], X.astype(">f8"), np.float32(1)]
    assert len({compiling.outline(x) for x in outlines}) == len(outlines)
    assert entry.__name__ == "sum_of_cubes"


def test_the_code_takes_arguments_of_its_types_alone(chosen):
    code = compiling.EntryPoint(sum_of_cubes).specialised(X)
    with pytest.raises(TypeError, match="No matching definition"):
        code(X.astype(np.float32))
    assert use() == LOADED


def test_threads_that_ask_at_the_same_time_get_the_same_code(chosen):
    entry, found = compiling.EntryPoint(sum_of_cubes), []
    threads = [threading.Thread(target=lambda: found.append(entry.specialised(X))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert len(set(found)) == 1
    assert len(folders(chosen)) == 1


@pytest.mark.usefixtures("chosen")
def test_numbas_own_cache_directory_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "InTreeCacheLocator", raising=False)
    assert use() == COMPILED
    assert str(tmp_path / "numba") == numba.config.CACHE_DIR
    assert numba.config.CACHE_LOCATOR_CLASSES == "InTreeCacheLocator"
    assert not (tmp_path / "numba").exists()
    assert use() == LOADED


def test_without_a_compiler_it_is_the_plain_function(chosen, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert compiling.EntryPoint(sum_of_cubes).specialised(X) is sum_of_cubes
    assert not chosen.exists()


def test_an_error_of_the_compiler_is_raised(chosen):
    with pytest.raises(numba.core.errors.TypingError):
        compiling.EntryPoint(lambda x: x.no_such_attribute)(X)
    assert folders(chosen) == []


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2)])
def test_python_cannot_call_what_only_compiled_code_may(arguments):
    add_seven = compiling.compiled(lambda x: x + 7)
    with pytest.raises(TypeError, match=r"only_compiled_code_may_call_this|expected 1, got"):
        add_seven(*arguments)
    assert compiling.executable(lambda x: add_seven(x) + 1)(1) == 9


def test_only_entry_points_become_machine_code(monkeypatch):
    """At ten levels of calls, LLVM did the innermost function's work ten times."""
    made = []
    finalize = JITCodeLibrary._finalize_specific
    monkeypatch.setattr(JITCodeLibrary, "_finalize_specific", lambda self: made.append(self.name) or finalize(self))
    inner = compiling.compiled(lambda x: x + 7)
    outer = compiling.compiled(lambda x: inner(x) * 2)
    assert compiling.executable(lambda x: outer(x))(1) == 16
    assert len(made) == 1


# Processes


ENTRY = """
import sys
import numpy as np
from backprop_gpu.kernels.numba_cpu import team
from backprop_gpu.kernels.numba_cpu.compile import entry_point
from backprop_gpu.kernels.numba_cpu.called import add_some

@entry_point
def total(x, counters):
    team.wait(counters, 1)
    s = x.dtype.type(0)
    for i in range(x.size):
        s += x[i]
    return add_some(s)

for dtype in sys.argv[1:]:
    arguments = np.arange(5, dtype=dtype), team.new_barrier()
    code = total.specialised(*arguments)
    print(dtype, code(*arguments), len(code.stats.cache_hits), len(code.stats.cache_misses))
"""
CALLED = """
from backprop_gpu.kernels.numba_cpu.compile import compiled

@compiled
def add_some(x):
    return x + 7
"""


@pytest.fixture
def start(tmp_path, chosen):
    """start(*dtypes): a process that calls an entry point of a copy of this package for each."""
    copy = tmp_path / "installed" / "backprop_gpu"
    shutil.copytree(PACKAGE, copy, ignore=lambda folder, names: {"kernels", "__pycache__"} & set(names))
    folder = copy / "kernels" / "numba_cpu"
    folder.mkdir(parents=True)
    shutil.copy(KERNELS / "__init__.py", copy / "kernels")
    for name in ("__init__.py", "compile.py", "processor.py", "team.py"):
        shutil.copy(KERNELS / "numba_cpu" / name, folder)
    (folder / "entry.py").write_text(ENTRY)
    (folder / "called.py").write_text(CALLED)

    def start(*dtypes):
        return subprocess.Popen(
            [sys.executable, "-Werror", "-m", "backprop_gpu.kernels.numba_cpu.entry", *dtypes],
            env={**os.environ, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def said(process):
    out, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 0
    return out.splitlines()


def test_processes_at_the_same_time_and_then_one_whose_called_function_has_changed(start, chosen, tmp_path):
    first = [start("float32", "float64"), start("float64", "float32"), start("float32")]
    assert [sorted(line.split()[:2] for line in said(process)) for process in first] == [
        [["float32", "17.0"], ["float64", "17.0"]],
        [["float32", "17.0"], ["float64", "17.0"]],
        [["float32", "17.0"]],
    ]
    assert said(start("float64", "float32")) == ["float64 17.0 1 0", "float32 17.0 1 0"]
    assert len(folders(chosen)) == 2
    assert list((tmp_path / "installed").rglob("*.nb[ic]")) == []

    called = tmp_path / "installed/backprop_gpu/kernels/numba_cpu/called.py"
    before = called.stat()
    called.write_text(CALLED.replace("7", "8"))
    os.utime(called, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert called.stat().st_size == before.st_size
    assert said(start("float32")) == ["float32 18.0 0 1"]


# What the machine code depends on


def test_a_change_of_any_source_changes_the_directory(tmp_path, monkeypatch):
    shutil.copytree(KERNELS / "numba_cpu", tmp_path / "numba_cpu")
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "numba_cpu" / "compile.py"))
    before = compiling._sources_hash()
    (tmp_path / "numba_cpu" / "team.py").write_text("changed")
    changed = compiling._sources_hash()
    (tmp_path / "numba_cpu" / "new.py").touch()
    longer = compiling._sources_hash()
    monkeypatch.setattr(compiling, "CONSTANTS", compiling.CONSTANTS[:1])
    assert len({before, changed, longer, compiling._sources_hash()}) == 4


def test_every_module_that_a_kernel_imports_is_among_the_sources():
    own, constants = f"{compiling.__package__}.", {module.__name__ for module in compiling.CONSTANTS}
    imported = set()
    for source in (KERNELS / "numba_cpu").glob("*.py"):
        if source.name != "compile.py":
            nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
            imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in imported if f"{name}.".startswith("backprop_gpu.") and not f"{name}.".startswith(own)}
    assert ours <= constants


def test_a_source_that_changed_after_its_import_leaves_no_code(chosen, monkeypatch):
    monkeypatch.setattr(compiling, "_sources_hash", lambda: "of other sources")
    assert use() == use() == COMPILED
    assert folders(chosen) == []


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("name", "value"), [("CPU_NAME", "nehalem"), ("CPU_FEATURES", "+sse2"), ("OPT", 1), ("BOUNDSCHECK", 1)]
)
def test_the_cpu_and_numbas_configuration_have_directories_of_their_own(name, value, monkeypatch):
    before = compiling._directory()
    monkeypatch.setattr(numba.config, name, value)
    assert compiling._directory() != before
    monkeypatch.undo()


# Damage


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)),
    "a block of zeros": lambda data: data[: len(data) // 3] + bytes(len(data) // 3) + data[len(data) // 3 * 2 :],
    "one bit": lambda data: data[:-300] + bytes([data[-300] ^ 1]) + data[-299:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damaged_machine_code_is_compiled_again(damage, suffix, chosen):
    use()
    (file,) = chosen.rglob(f"*.{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    assert use() == COMPILED
    assert use() == LOADED


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc", "checksum"])
def test_missing_files_are_compiled_again(pattern, chosen):
    use()
    (file,) = chosen.rglob(pattern)
    file.unlink()
    assert use() == COMPILED
    assert use() == LOADED


def test_machine_code_that_is_whole_but_cannot_be_loaded_is_compiled_again(chosen):
    use()
    (folder,) = folders(chosen)
    next(folder.rglob("*.nbc")).write_bytes(b"no pickle")
    (folder / "checksum").write_text(compiling._checksum(folder))
    assert use() == COMPILED


def test_a_full_disk_costs_the_cache_and_nothing_else(chosen):
    resource = pytest.importorskip("resource", reason="file sizes are limited on POSIX alone")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert use() == COMPILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folders(chosen) == []
    assert use() == COMPILED
    assert use() == LOADED


# Places


def test_the_users_cache_directory_is_taken_and_kept_private(places):
    home, temporary = places
    assert use() == COMPILED
    assert use() == LOADED
    assert len(folders(home / "backprop_gpu")) == 1
    assert list(temporary.iterdir()) == []
    if sys.platform != "win32":
        assert (home / "backprop_gpu").stat().st_mode & 0o777 == 0o700


def test_where_the_users_cache_directory_cannot_be_written_temporary_files_serve(places, caplog):
    home, temporary = places
    home.write_text("a file, not a directory")
    with caplog.at_level(logging.INFO, "backprop_gpu"):
        assert use() == COMPILED
    assert use() == LOADED
    (root,) = temporary.iterdir()
    assert len(folders(root)) == 1
    assert "kept elsewhere" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_without_a_home_temporary_files_serve(places, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiling, "user_cache", no_home)
    assert compiling._root("").parent == places[1]


def test_without_any_place_the_code_is_compiled_and_not_kept(places, monkeypatch):
    home, temporary = places
    home.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    assert use() == use() == COMPILED
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_directory_that_others_may_write_to_is_refused(mode, places):
    home, temporary = places
    (home / "backprop_gpu").mkdir(parents=True)
    (home / "backprop_gpu").chmod(mode)
    assert compiling._root("").parent == temporary


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_directory_of_another_user_or_a_link_is_refused(places, monkeypatch):
    home, temporary = places
    target = temporary / "elsewhere"
    target.mkdir(mode=0o700)
    home.mkdir()
    (home / "backprop_gpu").symlink_to(target)
    assert compiling._root("").name.startswith("backprop_gpu-")
    compiling._root.cache_clear()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    (home / "backprop_gpu").unlink()
    assert compiling._root("") is None


def test_a_chosen_directory_that_cannot_be_written_is_warned_of_and_not_replaced(places, monkeypatch, caplog):
    home, temporary = places
    (temporary / "file").touch()
    monkeypatch.setenv("BACKPROP_GPU_CACHE_DIR", str(temporary / "file" / "within"))
    assert use() == use() == COMPILED
    assert not home.exists()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "BACKPROP_GPU_CACHE_DIR" in warning
    assert "every process compiles again" in warning


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/backprop_gpu"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/backprop_gpu"),
        ("linux", {}, "/home/me/.cache/backprop_gpu"),
        ("darwin", {}, "/home/me/Library/Caches/backprop_gpu"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/backprop_gpu"),
        ("win32", {}, "/home/me/AppData/Local/backprop_gpu"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")
def test_the_users_cache_directory_is_the_platforms(platform, variables, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert compiling.user_cache() == Path(expected)


def test_the_directories_used_last_are_kept_and_others_removed(chosen):
    chosen.mkdir()
    (chosen / "not ours").mkdir()
    old = [chosen / f"numba_cpu-{age:016}" for age in range(20)]
    for age, path in enumerate(old):
        (path / "something").mkdir(parents=True)
        os.utime(path, (10**9 - age, 10**9 - age))
    new = compiling._directory()
    assert set(chosen.iterdir()) == {new, chosen / "not ours", *old[: compiling.KEPT - 1]}
    os.utime(new, (1, 1))
    assert compiling._directory() == new
    assert new.stat().st_mtime > 10**9


# Code that two processes have kept


TWINS = """
import sys
import numpy as np
from backprop_gpu.kernels.numba_cpu.compile import entry_point
from backprop_gpu.kernels.numba_cpu.elementary import called

def run_of(c):
    @called
    def run(x, start, count):
        for i in range(count):
            x[start + i] = np.sin(x[start + i]) + c
            if x[start + i] > 100:
                x[start + i] = np.exp(-x[start + i])
    return run

plus_one, plus_two = run_of(1.0), run_of(2.0)

@entry_point
def one(x):
    plus_one(x, 0, 2)
    plus_one(x, 2, x.size - 2)
    plus_one(x, 0, 0)

@entry_point
def two(x):
    plus_two(x, 0, 2)
    plus_two(x, 2, x.size - 2)
    plus_two(x, 0, 0)

for name in sys.argv[1:]:
    x = np.zeros(5)
    globals()[name](x)
    print(*map(int, x))
"""


def test_closures_of_one_factory_that_two_processes_have_compiled_are_told_apart(tmp_path):
    """Each process counts its functions from 1: without names of their own, the first one loaded would serve both."""
    script = tmp_path / "twins.py"
    script.write_text(TWINS)

    def printed(*names):
        environment = os.environ | {compiling.VARIABLE: str(tmp_path / "cache")}
        command = [sys.executable, str(script), *names]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")

    ones, twos = "1 1 1 1 1", "2 2 2 2 2"
    assert printed("one")[:-1] == [ones]
    assert printed("two")[:-1] == [twos]
    assert printed("one", "two")[:-1] == [ones, twos]
    assert printed("two", "one")[:-1] == [twos, ones]


def test_no_two_runs_of_the_activations_have_one_name():
    from backprop_gpu.kernels.numba_cpu import activations

    choices = (activations.apply.py_func, activations.multiply_by_derivative.py_func)
    runs = [f for choose in choices for f in set(map(choose.__globals__.get, activations.FORWARD)) - {None}]
    assert len(runs) >= len(activations.FORWARD)
    assert len({f.__qualname__ for f in runs}) == len(runs)
