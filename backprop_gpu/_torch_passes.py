"""The forward and the backward pass of a whole network as one `torch.autograd.Function`.

Three ways to compute the same:

- `Compiled`: the `cpu` backend's whole passes, for float32 and float64 on the CPU;
- `Operations`: the operations of `backends.contract` one by one, on the arrays of any backend: CuPy's share the memory
  of CUDA tensors and run on PyTorch's current stream;
- `composed`: PyTorch's own operations. Second derivatives go this way, so do `torch.func`'s transforms and tensors that
  no backend takes, and so does everything that is to be refused, since PyTorch says best what is wrong.

PyTorch's weight is (n_out, n_in), this library's W its transpose. `Compiled` reads and writes PyTorch's layout as it
is; `transposed` is the one place where it is copied.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from backprop_gpu._torch_layers import FUNCTIONS
from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.backends import contract
from backprop_gpu.backends.numpy import dropout_mask
from backprop_gpu.backends.passes import Dropout, Network

__all__ = ["Compiled", "Fused", "Operations", "Passes", "composed", "transposed"]

Gradients = list[Tensor | None]
Bytes = npt.NDArray[np.uint8]


class Passes(Protocol):
    """A way to compute: X is (N, n_inputs); parameters are weight (n_out, n_in) and bias (n_out,) or None in turn."""

    network: Network

    def forward(
        self, X: Tensor, parameters: Sequence[Tensor | None], dropout: Dropout | None, *, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The output (N, n_outputs), and what `backward` wants later; nothing without `keep`."""

    def backward(
        self,
        X: Tensor,
        parameters: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        d_out: Tensor,
        dropout: Dropout | None,
        needs: Sequence[bool],
    ) -> Gradients:
        """∂C/∂X and ∂C/∂ each parameter, None where `needs` says so."""


class Fused(torch.autograd.Function):
    """out = network(X), for the parameters that come after X: the forward pass, and the backward pass on demand."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, dropout: Dropout | None, X: Tensor, *parameters: Tensor | None) -> Tensor:
        """See `Passes.forward`."""
        out, kept = passes.forward(X, parameters, dropout, keep=True)
        ctx.passes, ctx.dropout, ctx.n_parameters = passes, dropout, len(parameters)
        ctx.save_for_backward(X, *parameters, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """With create_graph=True the gradients are composed, so that they have gradients of their own."""
        X, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.n_parameters], rest[ctx.n_parameters :]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            gradients = composed_gradients(ctx.passes.network, X, parameters, d_out, ctx.dropout, needs)
        else:
            gradients = ctx.passes.backward(X, parameters, kept, d_out, ctx.dropout, needs)
        return None, None, *gradients


# PyTorch's own operations


def composed(
    network: Network, X: Tensor, parameters: Sequence[Tensor | None], dropout: Dropout | Sequence[float] | None
) -> Tensor:
    """The network in PyTorch's operations, X of any shape (…, n_inputs).

    dropout : masks by the same rule as those of the kernels, or rates for masks of PyTorch's own.
    """
    a = X
    for layer, sigma in enumerate(network.sigmas):
        weight = parameters[2 * layer]
        assert weight is not None
        a = FUNCTIONS[sigma](F.linear(a, weight, parameters[2 * layer + 1]))
        if isinstance(dropout, Dropout):
            a = _drop(a, layer, dropout)
        elif dropout is not None and dropout[layer]:
            a = F.dropout(a, dropout[layer])
    return a


def _drop(a: Tensor, layer: int, dropout: Dropout) -> Tensor:
    rate = dropout.rates[layer]
    if rate == 0:
        return a
    n_rows, n_columns = a.numel() // a.shape[-1], a.shape[-1]
    mask = dropout_mask((n_rows, n_columns), contract.Dropout(rate, dropout.seed, layer, 0))
    kept = torch.from_numpy(mask).to(a.device).reshape(a.shape)
    return torch.where(kept, a * (1 / (1 - rate)), 0.0)


def composed_gradients(
    network: Network,
    X: Tensor,
    parameters: Sequence[Tensor | None],
    d_out: Tensor,
    dropout: Dropout | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients as functions of X, the parameters and ∂C/∂out, from a forward pass in PyTorch's operations."""
    # Views, so that a tensor that comes twice (tied weights) counts for each place by itself.
    inputs = [
        tensor.view_as(tensor) if tensor is not None and needed else tensor
        for tensor, needed in zip((X, *parameters), needs, strict=True)
    ]
    first = inputs[0]
    assert first is not None
    with torch.autocast(first.device.type, enabled=False):
        out = composed(network, first, inputs[1:], dropout)
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True, materialize_grads=True))
    return [next(found) if needed else None for needed in needs]


# The cpu backend's whole passes


class Compiled:
    """Compiled passes on PyTorch's number of threads, or fewer where something else limits this process."""

    def __init__(self, network: Network, dtype: torch.dtype, n_threads: int) -> None:
        from backprop_gpu.backends import cpu_passes, cpu_plan  # not before they are needed: Numba takes its time

        self.network = network
        self._passes = cpu_passes.Passes(network, str(dtype).removeprefix("torch."), n_threads, _team())
        self._memory = Memory(dtype, cpu_plan.zeros)

    def forward(
        self, X: Tensor, parameters: Sequence[Tensor | None], dropout: Dropout | None, *, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Passes`."""
        X, held = _plain(X), [p if p is None else p.contiguous() for p in parameters]
        n_rows = X.shape[0]
        out = X.new_empty((n_rows, self.network.layer_sizes[-1]))
        kept = [self._memory.take(self._passes.n_kept(n_rows))] if keep else []
        if n_rows:
            to = kept[0].data_ptr() if keep else 0
            self._passes.forward(n_rows, X.data_ptr(), _addresses(held), out.data_ptr(), to, dropout)
        return out, kept

    def backward(
        self,
        X: Tensor,
        parameters: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        d_out: Tensor,
        dropout: Dropout | None,
        needs: Sequence[bool],
    ) -> Gradients:
        """See `Passes`."""
        n_rows = X.shape[0]
        gradients: Gradients = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None
            for tensor, needed in zip((X, *parameters), needs, strict=True)
        ]
        if n_rows == 0:
            return [g if g is None else g.zero_() for g in gradients]
        d_out, held = _plain(d_out), [p if p is None else p.contiguous() for p in parameters]
        n_deltas = self._passes.n_deltas(n_rows)
        deltas = self._memory.take(n_deltas) if n_deltas else None
        self._passes.backward(
            n_rows,
            _addresses(held),
            kept[0].data_ptr(),
            d_out.data_ptr(),
            0 if deltas is None else deltas.data_ptr(),
            _addresses(gradients),
            dropout,
        )
        return gradients


SMALL, HUGE, SIZES = 1 << 20, 256 << 20, 4
"""Bytes of what is left to PyTorch's allocator, and of what is kept for later, in so many sizes, one of each.

Network M, forward and backward under autograd, takes 1.03 times as long if its 0.6 MB are kept, in each of four runs.
"""


class Memory:
    """Vectors to work with, of which large ones are used again and again.

    The C library may give what is free back to the system, for it to bring in every page anew: network N under autograd
    took 3.6 ms in one process, and 8 ms in the next.
    """

    def __init__(self, dtype: torch.dtype, zeros: Callable[[int], Bytes]) -> None:
        self._dtype, self._zeros = dtype, zeros
        self._free: dict[int, Bytes] = {}

    def take(self, size: int) -> Tensor:
        """`size` numbers, whatever they are: until nobody holds the tensor, nor a view of it."""
        n_bytes = size * self._dtype.itemsize
        if not SMALL <= n_bytes <= HUGE:
            return torch.empty(size, dtype=self._dtype)
        memory = self._free.pop(n_bytes, None)
        if memory is None:
            memory = self._zeros(n_bytes)
        view = memory[:]  # PyTorch holds it as long as it needs the memory
        weakref.finalize(view, self._give_back, memory).atexit = False
        return torch.from_numpy(view).view(self._dtype)

    def _give_back(self, memory: Bytes) -> None:
        if len(self._free) >= SIZES:
            self._free.clear()
        self._free[memory.size] = memory


@cache
def _team() -> tuple[int, int, int] | None:
    """Addresses of what starts PyTorch's own threads, in the OpenMP library that it uses; None where it has none.

    Looked up among the libraries that PyTorch's own depends on: a process may hold several OpenMPs.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):
        return None
    run, thread, size = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return run, thread, size


def _plain(x: Tensor) -> Tensor:
    """`x` with its numbers in memory one after another, as they are."""
    return x.resolve_neg().contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


# The operations of a backend


def transposed(weight: Tensor) -> Tensor:
    """A copy of PyTorch's weight (n_out, n_in) as this library's W (n_in, n_out), or the other way round."""
    return weight.detach().t().contiguous()


class Operations:
    """The operations one by one. σ of the output layer has to be the identity: there is no operation for it alone."""

    def __init__(self, network: Network, ops: contract.Backend) -> None:
        self.network, self.ops = network, ops

    def forward(
        self, X: Tensor, parameters: Sequence[Tensor | None], dropout: Dropout | None, *, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Keeps W, a, and what σ′ is computed from, of each layer."""
        a, kept = _plain(X), []
        with self._stream(X):
            for layer, sigma in enumerate(self.network.sigmas):
                weight, bias = parameters[2 * layer], parameters[2 * layer + 1]
                assert weight is not None
                W = transposed(weight)
                b = W.new_zeros(W.shape[1]) if bias is None else bias.detach().contiguous()
                out = self._empty((len(a), W.shape[1]), a)
                z = self._empty(out.shape, a) if ACTIVATIONS[sigma].derivative_from == "z" else None
                self.ops.dense_forward(
                    self._array(a),
                    self._array(W),
                    self._array(b),
                    sigma,
                    dropout=_of_layer(dropout, layer),
                    a=self._array(out),
                    z=None if z is None else self._array(z),
                )
                kept += [W, a, out if z is None else z] if keep else []
                a = out
        return a, kept

    def backward(
        self,
        X: Tensor,
        parameters: Sequence[Tensor | None],
        kept: Sequence[Tensor],
        d_out: Tensor,
        dropout: Dropout | None,
        needs: Sequence[bool],
    ) -> Gradients:
        """∂C/∂W is returned as a transposed view; autograd brings it into the layout of a new `grad`."""
        gradients: Gradients = [None] * len(needs)
        delta = _plain(d_out)
        with self._stream(X):
            for layer in reversed(range(len(self.network.sigmas))):
                W, a_prev = kept[3 * layer], kept[3 * layer + 1]
                if any(needs[2 * layer + 1 : 2 * layer + 3]):
                    dW, db = self._empty(W.shape, W), self._empty(W.shape[1:], W)
                    self.ops.dense_gradients(
                        self._array(a_prev), self._array(delta), dW=self._array(dW), db=self._array(db)
                    )
                    gradients[2 * layer + 1] = dW.t() if needs[2 * layer + 1] else None
                    gradients[2 * layer + 2] = db if needs[2 * layer + 2] else None
                if not any(needs[: 2 * layer + 1]):
                    break
                below = self._empty(a_prev.shape, W)
                self.ops.dense_backward(
                    self._array(delta),
                    self._array(W),
                    self._array(kept[3 * layer - 1] if layer else a_prev),
                    self.network.sigmas[layer - 1] if layer else "identity",
                    dropout=_of_layer(dropout, layer - 1) if layer else None,
                    delta=self._array(below),
                )
                delta = below
            else:
                gradients[0] = delta
        return gradients

    def _empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of PyTorch's own allocator, which knows the stream that it is used on."""
        return like.new_empty(tuple(shape))

    def _array(self, tensor: Tensor) -> Any:
        """The backend's view of a tensor's memory."""
        tensor = tensor.detach()
        return self.ops.asarray(tensor if tensor.is_cuda else tensor.numpy())

    @contextmanager
    def _stream(self, X: Tensor) -> Iterator[None]:
        """Makes PyTorch's current stream and device CuPy's, for the operations inside."""
        with _cupy_stream(X) if X.is_cuda else nullcontext():
            yield


@contextmanager
def _cupy_stream(X: Tensor) -> Iterator[None]:
    import cupy

    cuda, device = cupy.cuda, X.device.index
    stream = cuda.ExternalStream(torch.cuda.current_stream(X.device).cuda_stream, device)
    with cuda.Device(device), stream, cuda.using_allocator(_torch_memory().malloc):
        yield


@cache
def _torch_memory() -> Any:
    """PyTorch's caching allocator for CuPy: what is allocated while a CUDA graph is captured has to be that graph's."""
    import cupy

    def allocate(size: int, device: int) -> int:
        stream = cupy.cuda.get_current_stream().ptr
        return int(torch.cuda.caching_allocator_alloc(size, device, stream))

    def free(address: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(address)  # type: ignore[no-untyped-call]

    return cupy.cuda.PythonFunctionAllocator(allocate, free)


def _of_layer(dropout: Dropout | None, layer: int) -> contract.Dropout | None:
    if dropout is None or dropout.rates[layer] == 0:
        return None
    return contract.Dropout(dropout.rates[layer], dropout.seed, layer, 0)
