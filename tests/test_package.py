"""The package as it is installed: what importing it brings in, what it ships, what it names."""

import ast
import importlib.metadata
import importlib.resources
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import backprop_gpu as bp

PACKAGE = Path(bp.__file__).parent
HEAVY = ["numba", "cupy", "sklearn", "torch", "scipy", "pandas", "matplotlib", "tqdm", "safetensors", "pyarrow"]


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, backprop_gpu; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("missing", ["numba", "cupy", "sklearn", "scipy", "matplotlib"])
def test_training_needs_none_of_the_optional_packages(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import backprop_gpu as bp
net = bp.MLP([2, 3, 2])
net.fit([[0.0, 1.0], [1.0, 0.0]], [0, 1], epochs=1)
print(net.predict([[0.0, 1.0]]).shape)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "(1,)"


def test_the_kernels_and_the_type_marker_ship():
    assert importlib.resources.files("backprop_gpu.kernels").joinpath("README.md").is_file()
    assert importlib.resources.files("backprop_gpu").joinpath("py.typed").is_file()


def test_the_version_is_that_of_the_distribution():
    assert bp.__version__ == importlib.metadata.version("backprop_gpu")


def test_every_public_name_exists_and_is_documented():
    assert sorted(bp.__all__) == sorted(set(bp.__all__))
    undocumented = [name for name in bp.__all__ if not getattr(bp, name).__doc__]
    assert undocumented == []


def imported_at_the_top(path):
    """The package's modules that a module imports when it is imported itself, not for typing or inside a function."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backprop_gpu"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("backprop_gpu")]
    return names


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_run_one_way():
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: [m for m in imported_at_the_top(path) if m in modules] for name, path in modules.items()}
    # `from backprop_gpu import data` loads the module, not what the package's own __init__ gathers.
    for name in graph:
        graph[name] = [m for m in graph[name] if m != "backprop_gpu"]
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("backprop_gpu.mlp") > order.index("backprop_gpu.training")
    assert order.index("backprop_gpu.training") > order.index("backprop_gpu.backends.contract")
