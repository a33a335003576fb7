"""Compiles the project's CUDA C++ kernels for every architecture, and looks at the result, without a GPU."""
