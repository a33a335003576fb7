"""Who is compared: our backends, the peers that a user would pick instead, and the floor."""

from __future__ import annotations

from importlib import import_module

from bench.contenders.contract import Contender

__all__ = ["BACKENDS", "CPU_BACKENDS", "FLOOR", "GPU_BACKENDS", "GPU_PEERS", "IN_PLACE", "PEERS", "contender"]

CPU_BACKENDS, GPU_BACKENDS = ("cpu", "numpy"), ("cuda", "numba-cuda")
BACKENDS = (*GPU_BACKENDS, *CPU_BACKENDS)
FLOOR = "floor"
IN_PLACE = ("partial-fit", "fused-module", "estimator")
"""Ours in a loop of one's own, and in the place of a module of PyTorch's or an estimator of scikit-learn's."""
PEERS = ("torch", "torch-compile", "jax", "sklearn")
GPU_PEERS = ("torch@cuda", "torch-compile@cuda", "torch-graph@cuda", "jax@cuda", "cupy@cuda")

CLASSES = {
    FLOOR: ("floor", "Products"),
    "torch": ("torch_peers", "TorchEager"),
    "fused-module": ("torch_peers", "FusedModule"),
    "partial-fit": ("ours", "PartialFit"),
    "estimator": ("ours", "Estimator"),
    "torch-compile": ("torch_peers", "TorchCompile"),
    "torch-graph": ("torch_peers", "TorchGraph"),
    "jax": ("jax_peer", "Jax"),
    "sklearn": ("sklearn_peer", "ScikitLearn"),
    "cupy": ("cupy_peer", "CuPy"),
}
"""Module and class of each by its name, without the device."""


def contender(name: str) -> Contender:
    """The contender of this name; what it stands on is imported when it is put to work, not here."""
    if name in BACKENDS:
        found: Contender = import_module("bench.contenders.ours").Ours(name)
        return found
    library, _, device = name.partition("@")
    module, kind = CLASSES[library]
    made: Contender = getattr(import_module(f"bench.contenders.{module}"), kind)(*filter(None, [device]))
    return made
