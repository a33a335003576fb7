"""This library, on one of its backends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import backprop_gpu as bp
from backprop_gpu import data
from backprop_gpu.backends.contract import TrainingJob
from backprop_gpu.training import OperationTrainer
from bench.cases import LEARNING_RATE, Case
from bench.contenders.contract import Contender, Parameters, Variants, Work
from bench.datasets import Fit
from bench.tasks import layer, operate, outputs

__all__ = ["Estimator", "Ours", "PartialFit"]


class Ours(Contender):
    """What `fit` does in one epoch: the backend's trainer over many steps, which gathers each mini-batch by index."""

    def __init__(self, backend: str) -> None:
        self.backend, self.label = backend, f"backprop_gpu, {backend}"

    def missing(self) -> str | None:
        """Why the backend does not work here, or is only simulated; or None."""
        status = next(status for status in bp.backends() if status.name == self.backend)
        return None if status.automatic else str(status)

    def training(self, case: Case) -> Variants:
        """The trainer, as `fit` uses it."""
        return {"": partial(_Steps, case, self.backend)}

    def prediction(self, case: Case) -> Variants:
        """`MLP.predict`."""
        return {"": partial(_Prediction, case, self.backend)}

    def operation(self, name: str, case: Case) -> Variants:
        """The contract's operation, into arrays that are there."""
        return {"": partial(_Operation, name, case, self.backend)}

    def fit(self, fit: Fit, epochs: int, seed: int) -> Iterator[tuple[float, Parameters]]:
        """`MLP.fit`, its checks included, the callback's own time not."""
        X, y, _, _ = fit.data()
        net = bp.MLP(fit.case.layer_sizes, fit.case.activation, backend=self.backend, seed=seed)
        curve: list[tuple[float, Parameters]] = []
        start = time.perf_counter()

        def note(net: bp.MLP, history: bp.History) -> None:
            nonlocal start
            now = time.perf_counter()
            curve.append((now - start, _parameters(net)))
            start += time.perf_counter() - now

        optimizer = bp.Adam(LEARNING_RATE)
        net.fit(X, y, epochs=epochs, batch_size=fit.case.batch_size, optimizer=optimizer, callbacks=[note])
        yield from curve


class PartialFit(Contender):
    """`MLP.partial_fit`, on the backend that it takes by itself."""

    label = "net.partial_fit"

    def own_loop(self, case: Case) -> Variants:
        """A call a step."""
        return {"": partial(_Calls, case)}


class Estimator(Contender):
    """`backprop_gpu.sklearn.MLPClassifier`, on the backend that it takes by itself."""

    label = "backprop_gpu.sklearn"
    packages = ("sklearn",)

    def classifier(self) -> type:
        """Ours."""
        from backprop_gpu.sklearn import MLPClassifier

        return MLPClassifier


def _parameters(net: bp.MLP) -> Parameters:
    def copies(arrays: Any) -> list[Any]:
        return [np.array(net.ops.to_numpy(x)) for x in arrays]

    return copies(net.W), copies(net.b)


class _Steps(Work):
    def __init__(self, case: Case, backend: str) -> None:
        X, y = case.data()
        self.net, self.order = case.network(backend), case.order()
        net, optimizer = self.net, bp.Adam(LEARNING_RATE)
        self.start = np.array(net.ops.to_numpy(net.parameters))
        self.job = TrainingJob(
            architecture=net.architecture,
            parameters=net.parameters,
            optimizer=optimizer,
            state={slot: net.ops.zeros(net.parameters.shape, "float32") for slot in optimizer.slots},
            dtype=net.dtype,
            rows=data.as_rows(X, case.layer_sizes[0], "float32"),
            target=y.astype(np.int32),
            sample_weight=None,
            batch_size=case.batch_size,
            seed=0,
            steps_before=0,
        )
        self.trainer = net.ops.trainer(self.job) or OperationTrainer(net, self.job)

    def reset(self) -> None:
        """The initial weights, and Adam's moments 0."""
        self.net.parameters[...] = self.net.ops.asarray(self.start)
        for moment in self.job.state.values():
            moment[...] = 0

    def run(self, n: int) -> None:
        """n steps, round and round the mini-batches."""
        order = np.resize(self.order, n * self.job.batch_size)
        self.trainer.run(order, np.full(n, LEARNING_RATE), np.zeros(n), 0, lambda _: True)

    def result(self) -> Parameters:
        """W and b."""
        return _parameters(self.net)


class _Calls(Work):
    def __init__(self, case: Case) -> None:
        self.net, self.batches = case.network("auto"), list(zip(*case.batches(), strict=True))
        self.start = np.array(self.net.ops.to_numpy(self.net.parameters))
        self.optimizer = bp.Adam(LEARNING_RATE)

    def reset(self) -> None:
        """The initial weights, and a call behind, which makes what the others work in: its step is taken back."""
        self.run(1)
        self.net.parameters[...] = self.net.ops.asarray(self.start)
        self.net.stream.steps = 0
        for moment in self.net.stream.state.values():
            moment[...] = 0

    def run(self, n: int) -> None:
        """n calls, round and round the mini-batches."""
        for i in range(n):
            X, y = self.batches[i % len(self.batches)]
            self.net.partial_fit(X, y, batch_size=len(X), optimizer=self.optimizer)

    def result(self) -> Parameters:
        """W and b."""
        return _parameters(self.net)


class _Prediction(Work):
    def __init__(self, case: Case, backend: str) -> None:
        self.net, self.X = case.network(backend), case.data()[0]

    def run(self, n: int) -> None:
        """n times the labels of all rows."""
        for _ in range(n):
            self.labels = self.net.predict(self.X)

    def result(self) -> Any:
        """The labels."""
        return self.labels


class _Operation(Work):
    def __init__(self, name: str, case: Case, backend: str) -> None:
        self.ops = bp.get_backend(backend)
        self.call = partial(operate, self.ops, name, case, _moved(self.ops, layer(case)))
        self.out: dict[str, Any] = _moved(self.ops, outputs(name, layer(case)))
        written = self.call(self.out)
        self.first = [np.array(self.ops.to_numpy(x)) for x in written]
        self.out = self.out or dict(zip(_OUTPUTS[name], written, strict=True))

    def run(self, n: int) -> None:
        """n times, into the same arrays."""
        for _ in range(n):
            written = self.call(self.out)
        self.ops.to_numpy(written[0][:1])  # on a GPU, not before all is done

    def result(self) -> list[Any]:
        """What the first call wrote; later ones write the same, but for an update."""
        return self.first


_OUTPUTS = {
    "dense_forward": ("a",),
    "output_delta": ("delta",),
    "dense_backward": ("delta",),
    "dense_gradients": ("dW", "db"),
}


def _moved(ops: Any, x: Any) -> Any:
    """The same with its arrays on the backend."""
    if isinstance(x, np.ndarray):
        return ops.asarray(x)
    if isinstance(x, dict):
        return {name: _moved(ops, value) for name, value in x.items()}
    return type(x)(**{name: _moved(ops, value) for name, value in vars(x).items()})
