"""Learning-rate schedules: the rate of every update step, computed on the host in float64.

`step` counts update steps (mini-batches) from 0; an epoch has ceil(rows / batch_size) of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

__all__ = ["Constant", "Cosine", "ExponentialDecay", "InverseScaling", "Schedule", "StepDecay", "get"]

Floats = npt.NDArray[np.float64]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning rate as a function of the step; `initial` is where it starts, after warm-up if there is one."""

    initial: float

    def __post_init__(self) -> None:
        _require(
            self.initial > 0 and math.isfinite(self.initial),
            f"the learning rate must be a positive number; got {self.initial}",
        )

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
        _require(self.every >= 1, f"every must be at least 1 step; got {self.every}")
        _require(0 < self.factor <= 1, f"factor must be in (0, 1]; got {self.factor}")


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
        _require(self.power >= 0, f"power must be at least 0; got {self.power}")

    def rates(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rate of each of these steps."""
        return self.initial / np.power(steps + 1.0, self.power)


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
        _require(self.warmup_steps >= 0, f"warmup_steps must be at least 0; got {self.warmup_steps}")
        _require(0 <= self.final <= self.initial, f"final must be in [0, {self.initial}]; got {self.final}")
        _require(
            self.total_steps is None or self.total_steps > self.warmup_steps,
            f"total_steps must exceed warmup_steps = {self.warmup_steps}; got {self.total_steps}",
        )

    def for_run(self, total_steps: int | None) -> Cosine:
        """This schedule with `total_steps` filled in where it was None."""
        if self.total_steps is not None:
            return self
        _require(total_steps is not None, "Cosine needs total_steps where the length of the run is not known")
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
    return learning_rate if isinstance(learning_rate, Schedule) else Constant(float(learning_rate))
