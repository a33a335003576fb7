"""What a contender is: something that trains the same networks, in a process of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, TypeAlias

import numpy.typing as npt

from bench.cases import Case
from bench.datasets import Fit

__all__ = ["Contender", "Parameters", "Unsupported", "Variants", "Work"]

Array: TypeAlias = npt.NDArray[Any]
Parameters: TypeAlias = tuple[Sequence[Array], Sequence[Array]]
"""W, each (n_in, n_out), and b, on the host."""


class Unsupported(Exception):
    """The contender cannot do this work; the message says why."""


class Work(ABC):
    """Something to repeat and time, with every buffer and every compilation made before."""

    def reset(self) -> None:
        """Back to the state of the beginning, outside the timing."""
        return None

    @abstractmethod
    def run(self, n: int) -> float | None:
        """Do it n times, and return when all of it is done; the seconds that count, where not all of them do."""

    def result(self) -> Any:
        """What was computed, for the check: parameters, labels, or an operation's arrays. None where it has no use."""
        return None


Variants: TypeAlias = Mapping[str, Callable[[], Work]]
"""Ways to do the same work: the fastest is taken, and named in the results."""


class Contender(ABC):
    """One library, or one backend of ours. Its module imports the library in its methods only."""

    label: ClassVar[str]
    """What the tables call it."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What has to be installed."""

    def missing(self) -> str | None:
        """Why it cannot take part here, or None."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def set_up(self, threads: int) -> None:
        """Import what it stands on; so many threads, where the environment's variables do not say it."""
        return None

    def training(self, case: Case) -> Variants:
        """Training steps: forward, softmax cross-entropy, backward, Adam, one mini-batch after the other."""
        raise Unsupported("trains nothing")

    def own_loop(self, case: Case) -> Variants:
        """Training steps, each a call from a loop of one's own, with a mini-batch that is an array beforehand."""
        return self.training(case)

    def autograd(self, case: Case) -> Variants:
        """Forward and backward pass under PyTorch's autograd, from ∂C/∂out = `Case.d_out`."""
        raise Unsupported("is no PyTorch module")

    def prediction(self, case: Case) -> Variants:
        """Labels of all rows."""
        raise Unsupported("predicts nothing")

    def operation(self, name: str, case: Case) -> Variants:
        """One operation of the contract, on the arrays of `tasks.layer`."""
        raise Unsupported(f"has no {name}")

    def classifier(self) -> type:
        """The class with scikit-learn's interface."""
        raise Unsupported("has no estimator")

    def fit(self, fit: Fit, epochs: int, seed: int) -> Iterator[tuple[float, Parameters]]:
        """Train from the initial weights; after each epoch, the seconds of training so far, and the parameters."""
        raise Unsupported("fits nothing")
