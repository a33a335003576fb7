"""Learning-rate schedules: the rate of every update step, computed on the host in float64.

`step` counts update steps (mini-batches) from 0; an epoch has ceil(rows / batch_size) of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from backprop_gpu.checks import integer, not_negative, positive

__all__ = ["Constant", "Cosine", "ExponentialDecay", "InverseScaling", "Schedule", "StepDecay", "get"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning rate as a function of the step; `initial` is where it starts, after warm-up if there is one."""

    initial: float

    def __post_init__(self) -> None:
        positive("the learning rate", self.initial)

    @abstractmethod
    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""

    def for_run(self, total_steps: int | None) -> Schedule:
        """This schedule with what depends on the run's length filled in; None where the length is not known."""
        return self


@dataclass(frozen=True)
class Constant(Schedule):
    """rate = initial."""

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        return np.full(len(steps), self.initial)


@dataclass(frozen=True)
class _Decay(Schedule):
    """What the two geometric decays share."""

    every: int
    factor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("every", self.every, at_least=1)
        positive("factor", self.factor)
        if self.factor > 1:
            raise ValueError(f"factor must be at most 1, for a decay; got {self.factor}")


@dataclass(frozen=True)
class StepDecay(_Decay):
    """rate = initial · factor^⌊step / every⌋."""

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        return self.initial * np.power(self.factor, steps // self.every)


@dataclass(frozen=True)
class ExponentialDecay(_Decay):
    """rate = initial · factor^(step / every)."""

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        return self.initial * np.power(self.factor, steps / self.every)


@dataclass(frozen=True)
class InverseScaling(Schedule):
    """rate = initial / (step + 1)^power."""

    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("power", self.power)

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        return self.initial * np.power(steps.astype(np.float64) + 1, -self.power)


@dataclass(frozen=True)
class Cosine(Schedule):
    """A linear warm-up to `initial` over `warmup_steps`, then half a cosine down to `final` at `total_steps`.

    In warm-up rate = initial · (step + 1) / warmup_steps; after it, with p the part done of the steps that remain,
    rate = final + ½ (initial − final)(1 + cos πp) (Loshchilov & Hutter, 2017). `total_steps=None` takes the
    length of the run from `fit`; a stream (`partial_fit`) has none, so there it must be given.
    """

    warmup_steps: int = 0
    total_steps: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("warmup_steps", self.warmup_steps, at_least=0)
        not_negative("final", self.final)
        if self.final > self.initial:
            raise ValueError(f"final must be at most the initial rate {self.initial}; got {self.final}")
        if self.total_steps is not None:
            integer("total_steps", self.total_steps, at_least=1)
            self._require_decay(self.total_steps)

    def _require_decay(self, total_steps: int) -> None:
        if total_steps <= self.warmup_steps:
            raise ValueError(f"total_steps must exceed warmup_steps = {self.warmup_steps}; got {total_steps}")

    def for_run(self, total_steps: int | None) -> Cosine:
        """This schedule with `total_steps` filled in where it was None."""
        if self.total_steps is not None:
            return self
        if total_steps is None:
            raise ValueError("Cosine needs total_steps where the length of the run is not known")
        return replace(self, total_steps=total_steps)

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        assert self.total_steps is not None, "for_run fills total_steps in"
        warmup = self.initial * (steps + 1) / max(self.warmup_steps, 1)
        part = np.minimum((steps - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        decay = self.final + 0.5 * (self.initial - self.final) * (1 + np.cos(np.pi * part))
        rates: Floats = np.where(steps < self.warmup_steps, warmup, decay)
        return rates


def get(learning_rate: float | Schedule) -> Schedule:
    """A schedule as it is; a plain number as a constant one."""
    return learning_rate if isinstance(learning_rate, Schedule) else Constant(learning_rate)
