"""What a compiled pass knows of a network and of the memory that it works in: plain records, filled in on the host.

Offsets count elements. `passes` holds what the passes leave of every layer, in panels (see `panels`). With
`split_rows`, a thread keeps its tile to itself, so `passes` has one tile for each thread; without, it has the whole
mini-batch, for all threads to read when they compute ∂C/∂W. With `split_columns`, each thread has a copy of a⁰.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["LAYER", "PLAN", "Batches", "Memory", "borrowed"]

PLAN = np.dtype(
    [
        ("n_layers", "i8"),
        ("n_threads", "i8"),
        ("tile_rows", "i8"),  # rows that a thread takes through all layers at a time, a multiple of BLOCK_ROWS
        ("split_rows", "i8"),  # 1: a thread sums ∂C/∂W over its own rows; 0: it computes its own blocks over all rows
        ("copies", "i8"),  # 1: each member has the parameters and the state for itself; only with `split_rows`
        ("chunk_rows", "i8"),  # rows over which a block of ∂C/∂W is summed in one go
        ("panels_at_once", "i8"),  # of which ∂C/∂W is made at once, see `step.own_gradients`
        ("by_entries", "i8"),  # 1: X is sparse, and `passes` has nothing of it, see `entries`
        ("z_where", "i8"),  # 1: of the first layer's z = X W + b, products by 0 are left out, see `nonzero`
        ("dW_where", "i8"),  # 1: likewise of its ∂C/∂W = Xᵀ δ
        ("split_columns", "i8"),  # 1: of the first layer, a thread computes its own columns for all rows, see `parts`
        ("stride", "i8"),  # from panel to panel in `passes`
        ("span", "i8"),  # from thread to thread in `passes`; 0 where the threads share it
        ("n_weights", "i8"),  # of the packed parameters: padding counts
        ("n_parameters", "i8"),
        ("loss", "i8"),
        ("loss_setting", "f8"),
        ("sigma", "i8"),  # of the output layer
        ("optimizer", "i8"),
        ("clip_norm", "f8"),  # ∞ for none
        ("seed", "u8"),  # of the dropout masks
    ],
    align=True,
)

LAYER = np.dtype(
    [
        ("n_in", "i8"),
        ("n_out", "i8"),
        ("sigma", "i8"),  # code of σ; unused in the output layer
        ("from_z", "i8"),  # 1: σ′ needs z, so z is computed beside a; also in the output layer
        ("pads", "i8"),  # 1: σ(0) is not 0, so the padding of a has to be zeroed
        ("dropout", "f8"),
        ("first_column", "i8"),  # 0, but where these are a thread's columns of a layer
        ("W", "i8"),  # offsets in the packed parameters
        ("W_stride", "i8"),
        ("b", "i8"),
        ("few", "i8"),  # of n_out, the last columns that are taken from Wᵀ, see `narrow`; 0 for none
        ("turned", "i8"),  # 1: these are all, and the packed parameters hold Wᵀ in place of W, in panels W_stride apart
        ("T", "i8"),  # offset of Wᵀ in `transposed`; none for the first layer, nor where `turned`
        ("T_stride", "i8"),
        ("a_prev", "i8"),  # offsets in `passes`
        ("a", "i8"),
        ("delta", "i8"),
        ("z", "i8"),  # where from_z
        ("factors", "i8"),  # of dropout
    ],
    align=True,
)


class Memory(NamedTuple):
    """Every array that a training step writes, of one dtype but for `norms`.

    Of each of the first four there is one row, and with `copies` one for each thread; a pass has what `step.memory_of`
    takes of them.
    """

    parameters: Any
    """(n_parameters,): every W in panels of W_stride, or Wᵀ where `turned`, then every b, padded to whole panels."""
    transposed: Any
    """Wᵀ of every layer but the first, in panels: the backward pass reads it as the forward pass reads W. Inference has
    the rows for `few` columns in it alone, if there are any; of a layer that is `turned`, nothing is here."""
    slot_1: Any
    slot_2: Any
    """The optimizer's state, laid out as the parameters; without a second slot, any array."""
    gradients: Any
    """(n_threads, n_parameters), and with `copies` twice that."""
    sums: Any
    """(n_parameters,): the sum of the gradients; with `copies` each thread's own, else the first one's gradients."""
    passes: Any
    nonzero: Any
    """(·,) uint32: of X in `passes`, see `nonzero.note_nonzero`; empty where nothing is left out."""
    rows_where: Any
    """(n_threads, ·) uint64: what a thread's `nonzero.gemm_tn_where` needs; empty without it."""
    sorted_entries: Any
    """Three arrays (n_threads, ·), see `entries.by_columns`; a pass has each thread's. Empty of a dense X."""
    scratch: Any
    """(n_threads, ·): what a thread's products need, see `thirds.entries`."""
    zeros: Any
    """One panel's width of zeros: the bias of a product without one."""
    norms: Any
    """(n_threads, 8) float64: each thread's part of the squared norm of the gradient, a cache line apart; at the end of
    a run that of the parameters', and beside it whether all is finite (see `step.all_finite`)."""


class Batches(NamedTuple):
    """The rows to train on, in order."""

    x: Any
    """(n_rows, n_in), C-contiguous; (0, n_in) of a sparse X."""
    labels: Any
    """(n_rows,) int32, or empty."""
    target: Any
    """(n_rows, n_out), or empty."""
    order: Any
    """(n,) int64: indices of rows."""
    share: Any
    """(n,) float64: the part of each in the mean over its mini-batch, weight / Σ weight."""
    entries: Any
    """`data.Entries` of a sparse X; empty of a dense one."""


@intrinsic
def borrowed(typing_context, x):
    """The array `x`, or the tuple of arrays, without reference counts, for use while the caller's `x` lives.

    Every slice of an array counts up and down, atomically, and threads that slice the same array fight over the count.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_counts(context, builder, x, arguments[0])

    return x(x), generate


def _without_counts(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.BaseTuple):
        parts = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_without_counts(context, builder, *part) for part in parts])
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()
