"""PyTorch: eager with its fastest Adam, torch.compile, and CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from bench.cases import LEARNING_RATE, Case
from bench.contenders.contract import Contender, Parameters, Unsupported, Variants, Work
from bench.datasets import Fit
from bench.tasks import COPY, layer, outputs

__all__ = ["FusedModule", "TorchCompile", "TorchEager", "TorchGraph"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

L2_FLUSH = 256 << 20
"""Bytes written to push everything else out of the L2 cache: 5 times an H100's."""


class _Torch(Contender):
    packages = ("torch",)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def missing(self) -> str | None:
        """Not installed, or no GPU."""
        absent = super().missing()
        if absent is None and self.device == "cuda":
            import torch

            return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
        return absent

    def set_up(self, threads: int) -> None:
        """PyTorch's own default is the number of cores that it knows of."""
        import torch

        torch.set_num_threads(threads)


class TorchEager(_Torch):
    """`nn.Sequential`, `cross_entropy`, `backward`, `Adam.step`, on mini-batches that are tensors beforehand."""

    label = "PyTorch eager"

    def training(self, case: Case) -> Variants:
        """With each implementation of Adam that PyTorch has."""
        return {name: partial(_Eager, case, self.device, adam) for name, adam in _ADAM.items()}

    def autograd(self, case: Case) -> Variants:
        """As it is."""
        return {"": partial(_Autograd, case, self.device, lambda model: model)}

    def prediction(self, case: Case) -> Variants:
        """All rows at once, and in pieces that stay in cache."""
        return {f"{rows} rows at a time": partial(_Prediction, case, self.device, rows) for rows in (case.n_rows, 8192)}

    def operation(self, name: str, case: Case) -> Variants:
        """The same numbers out of ATen's functions."""
        return {"": partial(_Operation, name, case, self.device)}

    def fit(self, fit: Fit, epochs: int, seed: int) -> Iterator[tuple[float, Parameters]]:
        """The loop that one writes by hand: a permutation an epoch, mini-batches by index, fused Adam."""
        import torch

        X, y, _, _ = (torch.from_numpy(x).to(self.device) for x in fit.data())
        model = _model(fit.case).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        generator, spent = torch.Generator().manual_seed(seed), 0.0
        for _ in range(epochs):
            start = time.perf_counter()
            for batch in torch.randperm(len(X), generator=generator).to(self.device).split(fit.case.batch_size):
                _step(model, optimizer, torch.nn.functional.cross_entropy, X[batch], y[batch])
            _synchronise(self.device)
            spent += time.perf_counter() - start
            yield spent, _parameters(model)


class FusedModule(_Torch):
    """`backprop_gpu.torch.from_torch` of the same `nn.Sequential`: ours, in PyTorch's loop."""

    label = "FusedMLP"

    def autograd(self, case: Case) -> Variants:
        """The same parameters."""
        from backprop_gpu.torch import from_torch

        return {"": partial(_Autograd, case, self.device, from_torch)}


class TorchCompile(_Torch):
    """The same through torch.compile: the loss and its gradient, or the whole step, as one graph."""

    label = "torch.compile"

    def training(self, case: Case) -> Variants:
        """Parts compiled, and options; what is nearly always the fastest comes first, for where only one is tried.

        A C++ wrapper spares Python between kernels: 181 → 107 µs on S, Zen 5.
        """
        options = {"max_autotune": True} if self.device == "cuda" else {"cpp_wrapper": True}
        return {
            f"whole step, {next(iter(options))}": partial(_WholeStep, case, self.device, {"options": options}),
            "whole step": partial(_WholeStep, case, self.device, {}),
            "compiled loss, fused Adam": partial(_CompiledLoss, case, self.device),
        }


class TorchGraph(_Torch):
    """The eager step, captured as a CUDA graph for each mini-batch and replayed."""

    label = "PyTorch, CUDA graph"

    def training(self, case: Case) -> Variants:
        """With fused Adam."""
        return {"": partial(_Captured, case, self.device)}


_ADAM = {"fused Adam": {"fused": True}, "foreach Adam": {"foreach": True}, "plain Adam": {"foreach": False}}


def _synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _timed(device: str, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float | None:
    """Do `work`; on a GPU, the seconds between two events on the device."""
    if device == "cpu":
        work()
        return None
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _model(case: Case) -> Any:
    """The network with the initial weights; PyTorch's weight is (n_out, n_in)."""
    import torch
    from torch import nn

    sigma = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}[case.activation]
    layers: list[nn.Module] = []
    for W, b in zip(*case.initial(), strict=True):
        linear = nn.Linear(*W.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(W.T))
            linear.bias.copy_(torch.from_numpy(b))
        layers += [linear, sigma()]
    return nn.Sequential(*layers[:-1])


def _parameters(model: Any) -> Parameters:
    values = [p.detach().cpu().numpy().copy() for p in model.parameters()]
    return [np.array(W.T) for W in values[::2]], values[1::2]


def _step(model: Any, optimizer: Any, loss: Callable[..., Any], x: Any, y: Any) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


class _Steps(Work):
    """A model's steps on mini-batches that are tensors already."""

    def __init__(self, case: Case, device: str) -> None:
        import torch

        X, y = case.batches()
        self.device = device
        X, y = (torch.from_numpy(batches).to(device) for batches in (X, y))
        self.batches = list(zip(X, y, strict=True))
        self.model = _model(case).to(device)
        self.start = [p.detach().clone() for p in self.model.parameters()]

    def run(self, n: int) -> float | None:
        """n steps, round and round the mini-batches."""
        return _timed(self.device, lambda: [self.step(i % len(self.batches)) for i in range(n)])

    def step(self, i: int) -> None:
        """A step on mini-batch i."""
        raise NotImplementedError

    def result(self) -> Parameters:
        """W and b, W transposed."""
        return _parameters(self.model)


class _Eager(_Steps):
    def __init__(self, case: Case, device: str, adam: Mapping[str, bool]) -> None:
        super().__init__(case, device)
        from torch.nn.functional import cross_entropy
        from torch.optim import Adam

        self.optimizer = Adam(self.model.parameters(), lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPSILON, **adam)
        self.loss: Callable[..., Any] = cross_entropy

    def reset(self) -> None:
        """The initial weights, and Adam's state as it is before its first step."""
        import torch

        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self.start, strict=True):
                p.copy_(start)
                for value in self.optimizer.state[p].values():
                    value.zero_()

    def step(self, i: int) -> None:
        """A step on mini-batch i."""
        _step(self.model, self.optimizer, self.loss, *self.batches[i])


class _Autograd(Work):
    """Forward and backward pass of one mini-batch after another; the gradients are new each time."""

    def __init__(self, case: Case, device: str, convert: Callable[[Any], Any]) -> None:
        import torch

        self.device = device
        self.batches = torch.from_numpy(case.batches()[0]).to(device).unbind()
        self.d_out = torch.from_numpy(case.d_out()).to(device)
        self.model = _model(case).to(device)
        self.parameters = list(self.model.parameters())
        self.module = convert(self.model)

    def run(self, n: int) -> float | None:
        """n passes, round and round the mini-batches."""
        return _timed(self.device, lambda: [self.step(i % len(self.batches)) for i in range(n)])

    def step(self, i: int) -> None:
        """Both passes on mini-batch i."""
        for p in self.parameters:
            p.grad = None
        self.module(self.batches[i]).backward(self.d_out)

    def result(self) -> Parameters:
        """∂C/∂W, transposed, and ∂C/∂b of the first mini-batch."""
        self.step(0)
        values = [np.array(p.grad.cpu()) for p in self.parameters]
        return [np.array(W.T) for W in values[::2]], values[1::2]


class _CompiledLoss(_Eager):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, {"fused": True})
        import torch

        torch._dynamo.reset()
        model, loss = self.model, self.loss
        self.compiled = torch.compile(lambda x, y: loss(model(x), y), dynamic=False, fullgraph=True)

    def step(self, i: int) -> None:
        """A step on mini-batch i."""
        self.optimizer.zero_grad()
        self.compiled(*self.batches[i]).backward()
        self.optimizer.step()


class _Captured(_Eager):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, {"fused": True, "capturable": True})
        import torch

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(len(self.batches)):
                super().step(i)
        stream.synchronize()
        self.graphs = [torch.cuda.CUDAGraph() for _ in self.batches]
        for i, graph in enumerate(self.graphs):
            with torch.cuda.graph(graph):
                super().step(i)

    def step(self, i: int) -> None:
        """A step on mini-batch i."""
        self.graphs[i].replay()


class _WholeStep(_Steps):
    """Loss, gradient and Adam as one function of the parameters, in place, compiled as one graph."""

    def __init__(self, case: Case, device: str, settings: Mapping[str, Any]) -> None:
        super().__init__(case, device)
        import torch

        torch._dynamo.reset()
        self.P = [p.detach() for p in self.model.parameters()]
        self.m, self.v = ([torch.zeros_like(p) for p in self.P] for _ in range(2))
        self.t = torch.zeros((), device=device)
        self.compiled = torch.compile(_functional_step(self.model), dynamic=False, fullgraph=True, **settings)

    def reset(self) -> None:
        """The initial weights, and Adam's moments and step 0."""
        for p, start in zip(self.P, self.start, strict=True):
            p.copy_(start)
        for moment in (*self.m, *self.v, self.t):
            moment.zero_()

    def step(self, i: int) -> None:
        """A step on mini-batch i."""
        self.compiled(self.P, self.m, self.v, self.t, *self.batches[i])


def _functional_step(model: Any) -> Callable[..., Any]:
    from torch.func import functional_call, grad_and_value
    from torch.nn.functional import cross_entropy

    names = [name for name, _ in model.named_parameters()]

    def loss(P: Any, x: Any, y: Any) -> Any:
        return cross_entropy(functional_call(model, dict(zip(names, P, strict=True)), (x,)), y)

    gradients_of = grad_and_value(loss)

    def step(P: Any, m: Any, v: Any, t: Any, x: Any, y: Any) -> Any:
        gradients, cost = gradients_of(P, x, y)
        t += 1
        c1, c2 = 1 - BETA1**t, 1 - BETA2**t
        for p_i, m_i, v_i, g in zip(P, m, v, gradients, strict=True):
            m_i.mul_(BETA1).add_(g, alpha=1 - BETA1)
            v_i.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            p_i.sub_(LEARNING_RATE * (m_i / c1) / ((v_i / c2).sqrt() + EPSILON))
        return cost

    return step


class _Prediction(Work):
    def __init__(self, case: Case, device: str, rows: int) -> None:
        import torch

        self.model = _model(case).to(device)
        self.device, self.pieces = device, torch.from_numpy(case.data()[0]).to(device).split(rows)

    def run(self, n: int) -> None:
        """n times the labels of all rows."""
        import torch

        with torch.inference_mode():
            for _ in range(n):
                self.labels = torch.cat([self.model(x).argmax(1) for x in self.pieces])
        _synchronise(self.device)

    def result(self) -> Any:
        """The labels."""
        return self.labels.cpu().numpy()


class _Operation(Work):
    def __init__(self, name: str, case: Case, device: str) -> None:
        import torch

        def on_device(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {key: torch.from_numpy(np.ascontiguousarray(x)).to(device) for key, x in arrays.items()}

        x = on_device(vars(layer(case)))
        x["labels"] = x["labels"].long()
        if name == "update":
            start = outputs(name, layer(case))
            x |= on_device({key: start[key] for key in ("parameters", "gradients")})
            x["parameters"] = torch.nn.Parameter(x["parameters"])
            x["parameters"].grad = x["gradients"]
            x["optimizer"] = torch.optim.Adam([x["parameters"]], lr=LEARNING_RATE, fused=True)
        if name == COPY:
            x["kept"] = torch.empty_like(x["W"])
        self.device, self.call = device, partial(_OPERATIONS[name], x, case.activation)
        self.flush = torch.empty(L2_FLUSH if device == "cuda" else 0, dtype=torch.uint8, device=device)
        with torch.no_grad():
            self.written = [value.detach().clone() for value in self.call()]

    def run(self, n: int) -> float | None:
        """n times; on a GPU, with nothing of it in the L2 cache."""
        import torch

        with torch.no_grad():
            if self.device == "cpu":
                for _ in range(n):
                    self.call()
                return None
            return sum(_timed(self.device, self.call, self.flush.zero_) for _ in range(n))

    def result(self) -> list[Any]:
        """What the first call gave."""
        return [value.cpu().numpy() for value in self.written]


def _dense_forward(x: Mapping[str, Any], activation: str) -> list[Any]:
    import torch
    from torch.nn import functional

    z = torch.addmm(x["b"], x["a_prev"], x["W"])
    if activation == "identity":
        return [z]
    return [torch.relu_(z) if activation == "relu" else getattr(functional, activation)(z)]


def _output_delta(x: Mapping[str, Any], activation: str) -> list[Any]:
    """The loss, and its gradient as autograd takes it: from the logarithms of the probabilities."""
    import torch

    log_p = torch.log_softmax(x["z"], 1)
    torch.nn.functional.nll_loss(log_p, x["labels"])
    delta = log_p.exp_()
    delta.scatter_add_(1, x["labels"][:, None], delta.new_full((len(delta), 1), -1.0))
    return [delta.div_(len(delta))]


def _dense_backward(x: Mapping[str, Any], activation: str) -> list[Any]:
    import torch

    aten, dA = torch.ops.aten, torch.mm(x["delta"], x["W"].T)
    if activation == "relu":
        return [aten.threshold_backward(dA, x["kept"], 0)]
    if activation not in ("gelu", "silu", "tanh", "sigmoid"):
        raise Unsupported(f"has no {activation}_backward")
    return [getattr(aten, f"{activation}_backward")(dA, x["kept"])]


def _dense_gradients(x: Mapping[str, Any], activation: str) -> list[Any]:
    import torch

    return [torch.mm(x["a_prev"].T, x["delta"]), x["delta"].sum(0)]


def _copy(x: Mapping[str, Any], activation: str) -> list[Any]:
    return [x["kept"].copy_(x["W"])]


def _update(x: Mapping[str, Any], activation: str) -> list[Any]:
    x["optimizer"].step()
    return [x["parameters"]]


_OPERATIONS = {
    "copy": _copy,
    "dense_forward": _dense_forward,
    "output_delta": _output_delta,
    "dense_backward": _dense_backward,
    "dense_gradients": _dense_gradients,
    "update": _update,
}
