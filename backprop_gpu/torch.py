"""PyTorch modules whose forward and backward pass are this library's, under autograd; and weights to and from `MLP`.

    mlp = FusedMLP([32, 64, 64, 3], activation="silu")        in place of nn.Sequential(nn.Linear(32, 64), nn.SiLU(), …)
    mlp = from_torch(sequential)                              the same parameters, so an optimizer goes on with them
    sequential = mlp.to_torch()

For layer l = 1 … L, a⁰ = X: z = a_prev Wᵀ + b, a = dropout(σ(z)), with PyTorch's weight W (n_out, n_in); the output
layer has no σ unless it is asked for. The whole network is one node of the graph.

What computes:

| tensors | forward, first derivatives | derivatives of derivatives |
|---|---|---|
| CPU, float32 and float64 | compiled passes of the `cpu` backend, a tile of rows at a time | composed |
| CPU, bfloat16 and float16 | the same in float32, with the results rounded once | composed, in float32 |
| CUDA | the `cuda` backend's operations, in the tensors' memory, on PyTorch's current stream | composed |
| other devices; `torch.func`'s grad, vmap, jvp …; tensor subclasses | composed | composed |

"Composed" means PyTorch's own operations. With create_graph=True the first gradient is composed too: of a fused one
there would be no derivative. Under torch.compile the module is a graph break: it runs as it is, and what stands around
it is compiled. On CUDA nothing has been measured yet, nor been run on a GPU.

On the CPU, work worth more than one thread is done by the threads that PyTorch has, its OpenMP team, as many as
`torch.get_num_threads()`; where its OpenMP has no such interface (Windows), and in a forked process, threads of our own
are started for each pass.

`torch.cuda.graph` captures both passes once the same shapes have been run outside: kernels are compiled in the first
run; later ones wait for nothing, and all their memory is PyTorch's allocator's.

Dropout draws one number from PyTorch's CPU generator in each forward pass, as the key of Philox masks that the backward
pass draws anew: `torch.manual_seed` repeats it, and nothing is stored. A CUDA graph would replay the same masks, so
dropout refuses to be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backprop_gpu import activations
from backprop_gpu._torch_layers import FUNCTIONS, MODULES, Layer, Sine, take_apart
from backprop_gpu._torch_passes import Compiled, Fused, Operations, Passes, composed
from backprop_gpu.activations import ACTIVATIONS, Activation
from backprop_gpu.architecture import Architecture
from backprop_gpu.backends.passes import Dropout, Network
from backprop_gpu.backends.selection import get_backend
from backprop_gpu.checks import lookup
from backprop_gpu.mlp import MLP

__all__ = ["FusedMLP", "Sine", "from_mlp", "from_torch", "to_mlp"]


class FusedMLP(nn.Module):
    """A multilayer perceptron as a PyTorch module, computed as a whole by this library.

    Its parameters, their names and their initial values are those of an `nn.Sequential` of `nn.Linear`, activations and
    `nn.Dropout` where a rate is given ("0.weight", "0.bias", "2.weight", …), so a `state_dict` loads and saves either
    way.
    Those modules are its children, and hold parameters and settings; they are not called, so hooks on them do not run.
    A `Dropout` child's own `p` and `training` count.

    On the CPU it keeps memory for the next passes, four pieces of up to 256 MiB at most: as much as what a forward pass
    leaves for its backward pass, for the last few numbers of rows.

    Parameters
    ----------
    layer_sizes : sequence of int
        Number of inputs, the width of every hidden layer, number of outputs.
    activation : str or sequence of str
        σ of the hidden layers, one for all or one for each: a name of `backprop_gpu.ACTIVATIONS`.
    bias : bool
        Whether z has b in it.
    dropout : float or sequence of float
        Probability, for each hidden layer or for all, that a neuron is left out in training; in [0, 1).
    output_activation : str
        σ of the output layer; "identity" for logits or values.
    device, dtype : optional
        Of the parameters, as in `nn.Linear`.

    Raises
    ------
    ValueError or TypeError for arguments that do not fit, as `MLP`. The forward pass raises what `nn.Linear` raises.

    Examples
    --------
    >>> import torch
    >>> from backprop_gpu.torch import FusedMLP
    >>> mlp = FusedMLP([2, 16, 1], activation="tanh")
    >>> mlp(torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        activation: str | Activation | Sequence[str | Activation] = "relu",
        bias: bool = True,
        dropout: float | Sequence[float] = 0.0,
        *,
        output_activation: str = "identity",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        lookup("output activation", output_activation, ACTIVATIONS)
        arch = Architecture.build(
            layer_sizes,
            activation=activation,
            loss="squared_error",
            output_activation=output_activation,
            dropout=dropout,
        )
        names = map(str, range(3 * arch.n_layers))
        rates = (*arch.dropout, 0.0)
        for (n_in, n_out), sigma, rate in zip(pairwise(arch.layer_sizes), arch.sigmas, rates, strict=True):
            self.add_module(next(names), nn.Linear(n_in, n_out, bias, device, dtype))
            if sigma != "identity" or len(self._modules) < 2 * arch.n_layers - 1:
                self.add_module(next(names), MODULES[sigma]())
            if rate:
                self.add_module(next(names), nn.Dropout(rate))
        self._settle()

    def _settle(self) -> None:
        """What follows from the children."""
        self._layers: list[Layer] = take_apart(self.named_children())
        sizes = (self._layers[0].n_in, *(layer.n_out for layer in self._layers))
        self._network = Network(sizes, tuple(layer.activation for layer in self._layers))
        self._drops = any(layer.dropout is not None for layer in self._layers)
        self._passes: dict[Any, Passes] = {}

    @classmethod
    def _of(cls, children: Iterator[tuple[str, nn.Module]], training: bool) -> FusedMLP:
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        for name, child in children:
            mlp.add_module(name, child)
        mlp._settle()
        mlp.training = training
        return mlp

    def __getstate__(self) -> dict[str, Any]:
        """All but memory and machine code: for pickle and deepcopy."""
        return {**self.__dict__, "_passes": {}}

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Number of inputs, the width of every hidden layer, number of outputs."""
        return self._network.layer_sizes

    def extra_repr(self) -> str:
        """The sizes."""
        return f"layer_sizes={list(self.layer_sizes)}"

    def to_torch(self) -> nn.Sequential:
        """The plain module: a copy of every child, with parameters of its own."""
        plain = nn.Sequential()
        for name, child in self.named_children():
            plain.add_module(name, deepcopy(child))
        plain.training = self.training
        return plain

    def forward(self, X: Tensor) -> Tensor:
        """The output, (…, n_outputs), for X (…, n_inputs)."""
        if torch.compiler.is_compiling():
            outside: Callable[[FusedMLP, Tensor], Tensor] = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
            return outside(self, X)
        return _forward(self, X)

    def _parameters_in_turn(self) -> list[Tensor | None]:
        """Weight and bias of each layer, as they are now: `functional_call` and parametrizations replace them."""
        return [_parameter(self._modules[layer.linear], name) for layer in self._layers for name in ("weight", "bias")]

    def _rates(self) -> tuple[float, ...] | None:
        """Dropout's rate for each layer, None where nothing is left out."""
        if not self._drops:
            return None
        rates = [self._rate(layer.dropout) for layer in self._layers]
        return tuple(rates) if any(rates) else None

    def _rate(self, name: str | None) -> float:
        module = self._modules[name] if name is not None else None
        return float(module.p) if module is not None and module.training else 0.0  # type: ignore[arg-type]

    def _passes_for(self, X: Tensor, computing_in: torch.dtype) -> Passes:
        key = X.dtype, computing_in, 0 if X.is_cuda else torch.get_num_threads()
        passes = self._passes.get(key)
        if passes is None:
            passes = self._passes[key] = _passes(self._network, X, computing_in)
        return passes


def _parameter(linear: Any, name: str) -> Tensor | None:
    """What getattr finds, in 0.1 µs in place of 0.5; a parametrized weight is an attribute only."""
    try:
        return linear._parameters[name]  # type: ignore[no-any-return]
    except KeyError:
        return getattr(linear, name)  # type: ignore[no-any-return]


def _passes(network: Network, X: Tensor, computing_in: torch.dtype) -> Passes:
    if X.is_cuda:
        ops = get_backend("cuda")
        hidden = Network(network.layer_sizes, (*network.sigmas[:-1], "identity"))
        return Operations(hidden, ops.computing_in(str(computing_in).removeprefix("torch.")))
    return Compiled(network, X.dtype, torch.get_num_threads())


def _forward(mlp: FusedMLP, X: Tensor) -> Tensor:
    parameters, rates = mlp._parameters_in_turn(), mlp._rates()
    autocast = _autocast_dtype(X) if isinstance(X, Tensor) else None
    if not _takes(mlp._network, X, parameters, rates, autocast is not None):
        return composed(mlp._network, X, parameters, rates)
    dtype = autocast or X.dtype
    if dtype not in WHOLE:  # narrow: computed in float32, rounded once
        wide = [None if p is None else p.float() for p in parameters]
        return _apply(mlp, X.float(), wide, rates, dtype).to(dtype)
    return _apply(mlp, X, parameters, rates, dtype)


WHOLE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)


def _apply(
    mlp: FusedMLP, X: Tensor, parameters: list[Tensor | None], rates: tuple[float, ...] | None, dtype: torch.dtype
) -> Tensor:
    passes, rows = mlp._passes_for(X, dtype), X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    dropout = None if rates is None else Dropout(rates, _key(X))
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (X, *parameters)):
        out: Tensor = Fused.apply(passes, dropout, rows, *parameters)  # type: ignore[no-untyped-call]
    else:
        out, _ = passes.forward(rows, parameters, dropout, keep=False)
    if passes.network is not mlp._network:
        out = FUNCTIONS[mlp._network.sigmas[-1]](out)
    return out if X.dim() == 2 else out.reshape(*X.shape[:-1], out.shape[-1])


def _key(X: Tensor) -> int:
    """A key for the dropout masks, from PyTorch's CPU generator."""
    if X.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout draws its key on the host, so a CUDA graph would replay the same masks; "
            "capture the module in eval(), or use dropout outside the graph"
        )
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _takes(
    network: Network,
    X: Tensor,
    parameters: Sequence[Tensor | None],
    rates: tuple[float, ...] | None,
    autocast: bool,
) -> bool:
    """Whether a backend can compute it. What it cannot is PyTorch's to compute, or to refuse."""
    if type(X) not in PLAIN or X.layout is not torch.strided:
        return False
    shape, dtype, device = X.shape, X.dtype, X.device
    if len(shape) == 0 or shape[-1] != network.layer_sizes[0] or dtype not in (*WHOLE, *NARROW):
        return False
    if device.type not in ("cpu", "cuda") or (rates is not None and max(rates) >= 1) or _transforms_active():
        return False
    for tensor, expected in zip(parameters, network.shapes, strict=True):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            return False
        if tensor.device != device or tensor.shape != expected:
            return False
        if tensor.dtype is not dtype and not (autocast and tensor.dtype in (torch.float32, *NARROW)):
            return False
    return True


PLAIN = (Tensor, nn.Parameter)
"""Tensors that are no more than numbers in memory: subclasses may mean something else."""


def _autocast_dtype(X: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for; float64 it leaves alone."""
    kind = "cpu" if X.is_cpu else "cuda"
    if X.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether a transform of `torch.func` is at work, whose tensors hide what is underneath."""


# Conversions


def from_torch(module: nn.Sequential) -> FusedMLP:
    """A `FusedMLP` of the very modules of an `nn.Sequential`: parameters, names, settings and mode are shared.

    module : each layer a Linear, then at most one activation, then at most one Dropout.

    Raises TypeError or ValueError that names the first layer which it cannot take, and why.
    """
    if not isinstance(module, nn.Sequential):
        raise TypeError(
            f"from_torch takes an nn.Sequential of Linear, activations and Dropout; got {type(module).__name__}: "
            "convert the Sequential in it, and put the result in its place"
        )
    return FusedMLP._of(iter(module.named_children()), module.training)


def to_mlp(module: nn.Sequential | FusedMLP, loss: str = "cross_entropy", **settings: Any) -> MLP:
    """An `MLP` with a copy of the weights, to be trained or saved without PyTorch.

    module : as for `from_torch`; on any device, in any dtype
    loss, settings : as for `MLP`: output_activation, alpha, dtype ("float64" for a float64 module, else "float32"),
        backend, seed. The loss's own output activation (softmax, sigmoid, exp) is on top of the module's outputs; with
        a regression loss it is the module's last activation.

    A Linear without bias becomes a layer with b = 0. Raises as `from_torch` and `MLP`.
    """
    mlp = module if isinstance(module, FusedMLP) else from_torch(module)
    network = mlp._network
    parameters = [None if p is None else p.detach().cpu() for p in mlp._parameters_in_turn()]
    settings.setdefault(
        "dtype", "float64" if parameters[0] is not None and parameters[0].dtype == torch.float64 else "float32"
    )
    if network.sigmas[-1] != "identity":
        settings.setdefault("output_activation", network.sigmas[-1])
    dropout = [_dropout_rate(mlp, layer) for layer in mlp._layers[:-1]]
    net = MLP(network.layer_sizes, list(network.sigmas[:-1]), loss, dropout=dropout, **settings)
    for layer in range(len(network.sigmas)):
        weight, bias = parameters[2 * layer], parameters[2 * layer + 1]
        assert weight is not None
        _put(net, net.W[layer], weight.t())
        _put(net, net.b[layer], torch.zeros(len(weight)) if bias is None else bias)
    return net


def _dropout_rate(mlp: FusedMLP, layer: Layer) -> float:
    return float(mlp._modules[layer.dropout].p) if layer.dropout is not None else 0.0  # type: ignore[union-attr, arg-type]


def _put(net: MLP, target: Any, values: Tensor) -> None:
    target[...] = net.ops.asarray(np.ascontiguousarray(values.double().numpy()), target.dtype.name)


def from_mlp(net: MLP) -> FusedMLP:
    """A `FusedMLP` with a copy of an `MLP`'s weights, on the CPU; `.to_torch()` makes the plain module of it.

    Its outputs are what PyTorch's losses take: logits for cross_entropy (`CrossEntropyLoss`) and binary_cross_entropy
    (`BCEWithLogitsLoss`), logarithms of the rate for poisson (`PoissonNLLLoss`), values for the others.
    """
    arch = net.architecture
    regression = arch.output_activation in ACTIVATIONS and arch.loss.name != "binary_cross_entropy"
    mlp = FusedMLP(
        arch.layer_sizes,
        [activations.get(sigma) for sigma in arch.activations],
        dropout=list(arch.dropout),
        output_activation=arch.output_activation if regression else "identity",
        dtype=getattr(torch, net.parameters.dtype.name),
    )
    with torch.no_grad():
        for layer, W, b in zip(mlp._layers, net.W, net.b, strict=True):
            linear = mlp._modules[layer.linear]
            linear.weight.copy_(_tensor(net, W).t())  # type: ignore[union-attr, operator]
            linear.bias.copy_(_tensor(net, b))  # type: ignore[union-attr, operator]
    return mlp


_tensor = partial(lambda net, x: torch.from_numpy(np.array(net.ops.to_numpy(x))))
