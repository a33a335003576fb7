"""The operations for the CPU, compiled by Numba; nothing is compiled before it is called."""
