"""The optimizers that every backend serves: parameters ← optimizer(parameters, gradients, state), in one flat pass.

An optimizer here is its settings only, frozen and comparable. Its state is one flat vector per slot, of the
parameters' layout, and belongs to the run. g is the gradient (with its L2 term, after clipping), η the step's
learning rate, t the step's number from 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from backprop_gpu import schedules
from backprop_gpu.checks import fraction, lookup, not_negative, positive
from backprop_gpu.schedules import Schedule

__all__ = ["OPTIMIZERS", "SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "get", "to_dict"]


@dataclass(frozen=True)
class Optimizer:
    """What every optimizer has.

    `learning_rate` is a number or a schedule. `clip_norm`: where the Euclidean norm of the *whole* gradient
    exceeds it, the gradient is scaled down to it (Pascanu et al., 2013); None leaves it alone.
    """

    learning_rate: float | Schedule = 1e-3
    clip_norm: float | None = None

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the state vectors, each of the parameters' size and dtype, zero at the start."""

    def __post_init__(self) -> None:
        schedules.get(self.learning_rate)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)

    @property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        return schedules.get(self.learning_rate)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent: v ← momentum · v − η g, w ← w + v; with `nesterov`, w ← w + momentum · v − η g.

    That is scikit-learn's form, in which the velocity v carries the learning rate.
    """

    learning_rate: float | Schedule = 1e-2
    momentum: float = 0.0
    nesterov: bool = False

    slots: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; got momentum=0")


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma & Ba, 2015): m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − η m̂ / (√v̂ + ε).

    m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) are the bias-corrected moments. With `epsilon_hat`, ε is the ε̂ of the
    paper's section 2 and of scikit-learn, which is added to √v, before the correction:
    w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε̂). That is the formula above with `epsilon_at(t)` for its ε.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    epsilon_hat: bool = field(default=False, kw_only=True)

    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("beta_1", self.beta_1)
        fraction("beta_2", self.beta_2)
        positive("epsilon", self.epsilon)

    def epsilon_at(self, step: int) -> float:
        """What update `step`, from 1, adds to √v̂: ε, or with `epsilon_hat` ε / √(1 − β₂ᵗ), as √v̂ = √v / √(1 − β₂ᵗ)."""
        return self.epsilon / math.sqrt(1 - self.beta_2**step) if self.epsilon_hat else self.epsilon


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled decay of the weights, never of the biases (Loshchilov & Hutter, 2019).

    Before Adam's update, W ← W (1 − η · weight_decay).
    """

    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("weight_decay", self.weight_decay)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman & Hinton, 2012): v ← decay · v + (1 − decay) g², w ← w − η g / (√v + ε)."""

    decay: float = 0.9
    epsilon: float = 1e-8

    slots: ClassVar[tuple[str, ...]] = ("v",)

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("decay", self.decay)
        positive("epsilon", self.epsilon)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}


def get(optimizer: str | Optimizer) -> Optimizer:
    """The optimizer of that name with its default settings; an Optimizer is returned as it is."""
    return optimizer if isinstance(optimizer, Optimizer) else lookup("optimizer", optimizer, OPTIMIZERS)()


def to_dict(optimizer: Optimizer, schedule: Schedule) -> dict[str, Any]:
    """The optimizer, with `schedule` for its learning rate, as JSON-ready values for a checkpoint to compare."""
    settings = {name: value for name, value in asdict(optimizer).items() if name != "learning_rate"}
    rate = {"learning_rate": type(schedule).__name__, **asdict(schedule)}
    return {"optimizer": type(optimizer).__name__, **settings, **rate}
