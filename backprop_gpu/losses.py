"""The losses that every backend serves: C, the mean over the mini-batch of each row's cost c.

With sample weights w, C = Σ w c / Σ w. A row's cost is the *sum* over its outputs, so ∂C/∂z of a row does not
depend on how many outputs the network has, and the loss that is reported is the one that is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.checks import fraction, lookup, positive, unknown

__all__ = [
    "LOSSES",
    "OUTPUT_ACTIVATIONS",
    "AbsoluteError",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Huber",
    "Loss",
    "Poisson",
    "SquaredError",
    "get",
    "output_activation",
]


@dataclass(frozen=True)
class Loss:
    """What every loss declares: its name, its task, and the output activations that it goes with."""

    name: ClassVar[str]
    task: ClassVar[Literal["classification", "regression"]]
    output_activations: ClassVar[tuple[str, ...]]
    """Valid activations of the output layer; the first is the default."""
    has_kink: ClassVar[bool] = False
    """c or its derivative jumps somewhere in a − y."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax with cross-entropy over K ≥ 2 classes: c = −Σₖ tₖ log softmax(z)ₖ, ∂c/∂z = softmax(z) − t.

    The target t is a one-hot row for an integer label, or a row of probabilities;
    `label_smoothing` = ε in [0, 1) replaces t by (1 − ε) t + ε / K.
    """

    label_smoothing: float = 0.0

    name: ClassVar[str] = "cross_entropy"
    task: ClassVar[Literal["classification", "regression"]] = "classification"
    output_activations: ClassVar[tuple[str, ...]] = ("softmax",)

    def __post_init__(self) -> None:
        fraction("label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """Sigmoid with binary cross-entropy, each output a yes or no of its own (one output: binary; several: multi-label).

    c = Σₖ log(1 + exp(zₖ)) − yₖ zₖ with yₖ in [0, 1], ∂c/∂z = sigmoid(z) − y.
    """

    name: ClassVar[str] = "binary_cross_entropy"
    task: ClassVar[Literal["classification", "regression"]] = "classification"
    output_activations: ClassVar[tuple[str, ...]] = ("sigmoid",)


@dataclass(frozen=True)
class SquaredError(Loss):
    """c = ½ Σₖ (aₖ − yₖ)², ∂c/∂a = a − y."""

    name: ClassVar[str] = "squared_error"
    task: ClassVar[Literal["classification", "regression"]] = "regression"
    output_activations: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS)


@dataclass(frozen=True)
class AbsoluteError(Loss):
    """c = Σₖ |aₖ − yₖ|, ∂c/∂a = sign(a − y)."""

    name: ClassVar[str] = "absolute_error"
    task: ClassVar[Literal["classification", "regression"]] = "regression"
    output_activations: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS)
    has_kink: ClassVar[bool] = True


@dataclass(frozen=True)
class Huber(Loss):
    """Squared up to `threshold` = t > 0, linear beyond: with e = a − y and m = min(|e|, t), c = Σₖ ½ m² + t(|e| − m).

    ∂c/∂a = clip(e, −t, t). (Huber's δ is called `threshold`: here `delta` is only ever ∂C/∂z.)
    """

    threshold: float = 1.0

    name: ClassVar[str] = "huber"
    task: ClassVar[Literal["classification", "regression"]] = "regression"
    output_activations: ClassVar[tuple[str, ...]] = tuple(ACTIVATIONS)
    has_kink: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("Huber's threshold", self.threshold)


@dataclass(frozen=True)
class Poisson(Loss):
    """Half the Poisson deviance of a count y ≥ 0 under the rate a = exp(z): c = Σₖ aₖ − yₖ zₖ + yₖ log yₖ − yₖ.

    ∂c/∂z = a − y; c ≥ 0, and 0 where a = y.
    """

    name: ClassVar[str] = "poisson"
    task: ClassVar[Literal["classification", "regression"]] = "regression"
    output_activations: ClassVar[tuple[str, ...]] = ("exp",)


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, SquaredError, AbsoluteError, Huber, Poisson)
}


OUTPUT_ACTIVATIONS = dict.fromkeys(name for loss in LOSSES.values() for name in loss.output_activations)
"""Every activation that an output layer may have: those of `ACTIVATIONS`, softmax and exp."""


def get(loss: str | Loss) -> Loss:
    """The loss of that name with its default settings; a Loss is returned as it is."""
    return loss if isinstance(loss, Loss) else lookup("loss", loss, LOSSES)()


def output_activation(loss: Loss, name: str | None) -> str:
    """The output layer's activation under `loss`: its default for None, ValueError for one that does not fit."""
    if name is None:
        return loss.output_activations[0]
    if name not in loss.output_activations:
        raise unknown(f"output activation for {loss.name}", name, loss.output_activations)
    return name
