"""The operations as Numba CUDA kernels, beside `kernels/cuda`; in a file: device functions, the kernel, its launch."""
