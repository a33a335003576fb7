"""Looking a name up in one of the library's tables, with an error that names the nearest valid one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

__all__ = ["lookup", "unknown"]

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
