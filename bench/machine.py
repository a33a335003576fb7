"""What the figures were measured on: it goes into every result file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.processes import ROOT, THREAD_VARIABLES, all_threads

__all__ = ["describe", "gpu_name", "revision"]

PACKAGES = ("backprop_gpu", "numpy", "numba", "torch", "jax", "scikit-learn", "cupy-cuda12x", "cupy-cuda13x")

SIMD = ("avx512f", "avx2", "asimd")
"""The widest first."""


def describe(threads: int) -> dict[str, Any]:
    """Processor, threads and versions; neither names of machines nor of users."""
    info = _cpuinfo()
    return {
        "cpu": _cpu_name(info),
        "simd": next((flag for flag in SIMD if flag in info), ""),
        "gpu": gpu_name(),
        "cores": os.cpu_count(),
        "threads": min(threads, all_threads()),
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": dict(_versions(PACKAGES)),
    }


def revision() -> dict[str, Any]:
    """The commit, and whether the code was changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "id": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "backprop_gpu", "kernels")),
    }


def gpu_name() -> str:
    """The first NVIDIA GPU's name; "" without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _cpu_name(info: str) -> str:
    """As the system tells it; virtual machines leave the model out, so family and model numbers are added."""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*: (.*)$", info, re.MULTILINE)
        return found[1].strip() if found else ""

    name = field("model name") or platform.processor() or platform.machine()
    numbers = f"family {field('cpu family')}, model {field('model')}" if field("cpu family") else ""
    return f"{name} ({numbers})" if numbers else name


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def slug(machine: Mapping[str, Any]) -> str:
    """A file name for the machine's results."""
    device = machine["gpu"] or f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
