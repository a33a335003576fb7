"""The checks that settings share: names and numbers, with one sentence for each that fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from operator import index
from typing import Any, TypeVar

__all__ = ["fraction", "integer", "lookup", "not_negative", "positive", "unknown"]

T = TypeVar("T")


def lookup(kind: str, name: object, table: Mapping[str, T]) -> T:
    """The entry of `table` called `name`; TypeError or ValueError, with the way out, where there is none."""
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be one of {', '.join(table)}; got {type(name).__name__} {name!r}")
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def unknown(kind: str, name: str, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not among the valid ones."""
    valid = list(valid)
    nearest = get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"unknown {kind} {name!r}; {guess}valid: {', '.join(valid)}")


def integer(name: str, value: Any, *, at_least: int) -> int:
    """`value` as an int; TypeError for what is none, ValueError below `at_least`."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {number}")
    return number


def positive(name: str, value: Any) -> None:
    """TypeError for what is no number, ValueError for one that is not above 0 and finite."""
    if not 0 < _number(name, value) < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value}")


def not_negative(name: str, value: Any) -> None:
    """TypeError for what is no number, ValueError for one that is not finite and at least 0."""
    if not 0 <= _number(name, value) < math.inf:
        raise ValueError(f"{name} must be at least 0; got {value}")


def fraction(name: str, value: Any) -> None:
    """TypeError for what is no number, ValueError for one outside [0, 1)."""
    if not 0 <= _number(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value}")


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number; got {value!r}")
