"""The data sets of the end-to-end comparison, and how each is fitted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu import datasets
from bench.cases import Case

__all__ = ["FITS", "Fit", "missing"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Fit:
    """A data set, and the network, mini-batches and epochs to fit it with."""

    name: str
    case: Case
    epochs: int
    target: float
    """The accuracy whose time is told, on the held-out rows."""

    def data(self) -> tuple[Array, Array, Array, Array]:
        """X, y, and those held out; X is float32 in [0, 1]."""
        return _data(self.name)


FITS = {
    "digits": Fit("digits", Case((64, 128, 64, 10), 32), epochs=30, target=0.97),
    "mnist": Fit("mnist", Case((784, 256, 128, 10), 128), epochs=10, target=0.975),
}


def mnist_folder() -> Path:
    """$MNIST, or the folder of shared data beside the checkout."""
    return Path(os.environ.get("MNIST", Path(__file__).parents[2] / "shared/data/mnist"))


def missing(name: str) -> str | None:
    """Why the data set is not at hand, or None."""
    if name == "mnist" and not mnist_folder().is_dir():
        return f"MNIST's IDX files are not in {mnist_folder()}; the variable MNIST names another folder"
    return None


@cache
def _data(name: str) -> tuple[Array, Array, Array, Array]:
    found = datasets.load("digits") if name == "digits" else datasets.load(str(mnist_folder()))
    found = datasets.hold_out(found, 0.25, seed=0)
    X, X_test = (x.astype(np.float32) / found.X.max() for x in (found.X, found.X_test))
    return X, found.y, X_test, found.y_test
