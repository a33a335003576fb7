"""Runs the project's CUDA C++ kernels, and the host code that launches them, on a machine without a GPU."""

from .compiler import missing
from .emulated_cupy import emulated
from .emulator import SCHEDULES
from .errors import EmulationError

__all__ = ["SCHEDULES", "EmulationError", "emulated", "missing"]
