"""Dropout masks by Philox4x32-10 (Salmon et al., 2011), by the rule in `backends.contract.Dropout`.

Nothing is stored: forward and backward pass work each neuron's word out anew. A thread's columns are not neighbours
(see `gemm.py`), so three of the four words of every block go unused: some 100 integer operations for a neuron, beside
the 2 n_in of its product.
"""

from __future__ import annotations

from typing import Any

from backprop_gpu.kernels.numba_cuda.device import device, word

__all__ = ["is_kept"]

LOW, HALF = word(0xFFFFFFFF), word(32)
MULTIPLIER_0, MULTIPLIER_1 = word(0xD2511F53), word(0xCD9E8D57)
WEYL_0, WEYL_1 = word(0x9E3779B9), word(0xBB67AE85)


# Device functions


@device
def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any) -> Any:
    """The four 32-bit words of a counter of four 32-bit words."""
    k0, k1 = seed & LOW, seed >> HALF
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return c0, c1, c2, c3


@device
def is_kept(row: Any, column: Any, rate: Any, seed: Any, layer: Any, step: Any) -> Any:
    """Whether neuron `column` of row `row` of the mini-batch is kept; rate : float64, the others integers."""
    w0, w1, w2, w3 = philox(word(column // 4), word(row), word(layer), word(step) & LOW, word(seed))
    left = w0 if column % 4 == 0 else w1
    right = w2 if column % 4 == 2 else w3
    return (left if column % 4 < 2 else right) >= word(rate * 4294967296.0)
