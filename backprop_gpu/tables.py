"""Tables on disk: .csv and .parquet files, as features and a target found among named or numbered columns."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu.checks import unknown

__all__ = ["TABLES", "Columns", "ModelColumns", "Source", "TrainingColumns", "as_target", "number"]

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

CSV_ROWS = 4096
"""Lines of a CSV file that are converted at a time, so that the text of a big one is never held as a whole."""

MISSING = ("", "nan", "na", "n/a", "null", "none", "?")
"""How a missing feature is written, in any case. A text target may well say NA: it is Namibia's code."""


@dataclass(frozen=True)
class Source:
    """What a reader found, before the target is understood as labels or values."""

    X: Array
    y: Array | None = None
    """As it stands: integers, real numbers or text."""
    features: tuple[str, ...] | None = None
    target: str | int | None = None
    X_test: Array | None = None
    y_test: Array | None = None
    note: str = ""


# Columns of a table


@dataclass(frozen=True)
class TrainingColumns:
    """Every column is a feature but the target."""

    target: str | None

    def choose(self, names: Sequence[str] | None, n_columns: int) -> tuple[list[int], int | None]:
        """(indices of the features, index of the target) among `n_columns`, which may have names."""
        if n_columns < 2:
            raise ValueError("one column alone; expected at least one feature and the target")
        target = _column_index("-1" if self.target is None else self.target, names, n_columns)
        return [column for column in range(n_columns) if column != target], target


@dataclass(frozen=True)
class ModelColumns:
    """The columns that a model was trained on, found by name or else by position; the target where it is there."""

    n_features: int
    features: tuple[str, ...] | None
    model_target: str | int | None
    target: str | None

    def choose(self, names: Sequence[str] | None, n_columns: int) -> tuple[list[int], int | None]:
        """(indices of the features, index of the target or None) among `n_columns`, which may have names."""
        if names is not None and self.features is not None:
            return self._by_name(list(names), self.features)
        if self.target is not None:
            target = _column_index(self.target, names, n_columns)
        elif n_columns == self.n_features:
            return list(range(n_columns)), None
        else:
            target = self._remembered_target(names, n_columns)
        return [column for column in range(n_columns) if column != target], target

    def _by_name(self, names: list[str], features: tuple[str, ...]) -> tuple[list[int], int | None]:
        missing = [name for name in features if name not in names]
        if missing:
            raise ValueError(f"the model's feature {missing[0]!r} is not among the columns: {', '.join(names)}")
        if self.target is not None:
            target: int | None = _column_index(self.target, names, len(names))
        else:
            target = next((index for index, name in enumerate(names) if name == self.model_target), None)
        return [names.index(name) for name in features], target

    def _remembered_target(self, names: Sequence[str] | None, n_columns: int) -> int:
        if n_columns != self.n_features + 1:
            raise ValueError(
                f"{n_columns} columns; the model takes {self.n_features} features (and perhaps the target)"
            )
        if isinstance(self.model_target, int):
            return _column_index(str(self.model_target), None, n_columns)
        if names is not None and self.model_target is not None and self.model_target in names:
            return list(names).index(self.model_target)
        raise ValueError(f"one column more than the model's {self.n_features} features: say which is --target")


Columns: TypeAlias = TrainingColumns | ModelColumns


def _column_index(target: str, names: Sequence[str] | None, n_columns: int) -> int:
    """The column called `target`, or with that index."""
    if names is not None and target in names:
        return list(names).index(target)
    try:
        index = int(target)
    except ValueError:
        if names is None:
            raise ValueError(f"the columns have no names, so --target must be an index; got {target!r}") from None
        raise unknown("target column", target, names) from None
    if not -n_columns <= index < n_columns:
        raise ValueError(f"target column {index} is out of range: there are {n_columns} columns, 0 … {n_columns - 1}")
    return index % n_columns


def _named(names: Sequence[str] | None, indices: Sequence[int]) -> tuple[str, ...] | None:
    return None if names is None else tuple(names[index] for index in indices)


# CSV


def _read_csv(path: Path, columns: Columns) -> Source:
    """A CSV file: comma, semicolon or tab, UTF-8, with a header line or without one.

    The first line is a header where none of its fields is a number.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            return _parse_csv(path, csv.reader(file, delimiter=delimiter, strict=True), columns)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _parse_csv(path: Path, reader: Any, columns: Columns) -> Source:
    rows = _csv_rows(path, reader)
    line, first = next(rows, (0, None))
    if first is None:
        raise ValueError(f"{path} is empty")
    names = _header(first, path)
    if names is None:
        rows = chain([(line, first)], rows)
    features, target = _in_file(path, lambda: columns.choose(names, len(first)))
    table = _CsvTable(path, names, len(first), features, target)
    X, texts, lines = table.parse(rows)
    y = None if target is None else table.target_values(texts, lines)
    note = "no header line found" if names is None else "header line found"
    shown = target if names is None or target is None else names[target]
    return Source(X, y, _named(names, features), shown, note=note)


def _csv_rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _header(first: list[str], path: Path) -> list[str] | None:
    names = [field.strip() for field in first]
    if any(number(name) is not None for name in names):
        return None
    if "" in names:
        raise ValueError(f"{path}, line 1: column {names.index('')} has no name (pandas: to_csv(…, index=False))")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: two columns are called {twice[0]!r}")
    return names


def number(text: str) -> float | None:
    """The number that `text` is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _in_file(path: Path, choose: Callable[[], tuple[list[int], int | None]]) -> tuple[list[int], int | None]:
    try:
        return choose()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _CsvTable:
    """The columns to take from a CSV file, and what to call them in an error."""

    path: Path
    names: list[str] | None
    n_columns: int
    features: list[int]
    target: int | None

    def parse(self, rows: Iterator[tuple[int, list[str]]]) -> tuple[Floats, list[str], list[int]]:
        """(features, (N, n_features) float64; the target's text; the line of each row)."""
        blocks, texts, lines = [], list[str](), list[int]()
        while chunk := list(islice(rows, CSV_ROWS)):
            for line, row in chunk:
                if len(row) != self.n_columns:
                    raise self._ragged(line, len(row))
            blocks.append(self._numbers(chunk))
            lines += [line for line, _ in chunk]
            texts += [] if self.target is None else [row[self.target].strip() for _, row in chunk]
        if not blocks:
            raise ValueError(f"{self.path} has a header line, but no rows")
        return np.concatenate(blocks), texts, lines

    def _numbers(self, chunk: list[tuple[int, list[str]]]) -> Floats:
        pick = itemgetter(*self.features) if len(self.features) > 1 else lambda row: (row[self.features[0]],)
        fields = chain.from_iterable(pick(row) for _, row in chunk)
        try:
            flat = np.fromiter(map(float, fields), np.float64, len(chunk) * len(self.features))
        except ValueError:
            self._refuse(chunk)
        if not np.isfinite(flat).all():
            self._refuse(chunk)
        return flat.reshape(len(chunk), len(self.features))

    def _refuse(self, chunk: list[tuple[int, list[str]]]) -> NoReturn:
        """The error for the first feature that is not a finite number."""
        fields = ((line, column, row[column]) for line, row in chunk for column in self.features)
        line, column, text = next(f for f in fields if not math.isfinite(_nan_if_none(number(f[2]))))
        where = f"{self.path}, line {line}, column {self._name(column)}"
        if text.strip().lower() in MISSING:
            raise ValueError(
                f"{where}: missing value{f' ({text})' if text.strip() else ''}; fill it in or leave it out"
            )
        hint = " (a header line is one in which no field is a number)" if line == 1 else ""
        raise ValueError(f"{where}: expected a finite number, got {text!r}; encode text as numbers first{hint}")

    def target_values(self, texts: list[str], lines: list[int]) -> Array:
        """The target as int64, else as float64, else as text."""
        assert self.target is not None
        where = f"column {self._name(self.target)}"
        for line, text in zip(lines, texts, strict=True):
            if text.lower() in ("", "nan"):
                raise ValueError(f"{self.path}, line {line}, {where}: missing value in the target")
        y = _parsed(texts)
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise ValueError(
                f"{self.path}, line {lines[int((~np.isfinite(y)).argmax())]}, {where}: expected a finite number"
            )
        if self.names is None and number(texts[0]) is None and texts.count(texts[0]) == 1 and len(texts) > 1:
            raise ValueError(
                f"{self.path}, line 1: the label {texts[0]!r} occurs nowhere else, so this may be a header in which "
                "columns are called by numbers; give them names"
            )
        return y

    def _name(self, column: int) -> str:
        return str(column) if self.names is None else repr(self.names[column])

    def _ragged(self, line: int, n_fields: int) -> ValueError:
        last = "" if self.names is None or n_fields > self.n_columns else f", column {self._name(n_fields)} is missing"
        return ValueError(
            f"{self.path}, line {line}: expected {self.n_columns} fields as in line 1, got {n_fields}{last}"
        )


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value


def _parsed(texts: list[str]) -> Array:
    """Text as int64 where every entry is an integer, as float64 where every one is a number, or as it is."""
    array = np.array(texts)
    for dtype in (np.int64, np.float64):
        try:
            return array.astype(dtype)
        except (ValueError, OverflowError):
            continue
    return array


# Parquet


def _read_parquet(path: Path, columns: Columns) -> Source:
    """A Parquet file of numeric columns and a target; a pandas index that was written along is no column."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('reading .parquet needs pyarrow: pip install "backprop_gpu[parquet]"') from error
    with path.open("rb") as file:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a Parquet file, or it is damaged: {error}") from error
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    features, target = _in_file(path, lambda: columns.choose(names, len(names)))
    if table.num_rows == 0:
        raise ValueError(f"{path} has columns, but no rows")
    taken = [_parquet_numbers(table[names[index]], f"{path}, column {names[index]!r}") for index in features]
    X = np.stack(taken, axis=1, dtype=np.float64, casting="unsafe")
    y = None if target is None else _parquet_target(table[names[target]], f"{path}, column {names[target]!r}")
    return Source(X, y, _named(names, features), None if target is None else names[target])


def _parquet_numbers(column: Any, where: str) -> Array:
    _require_no_nulls(column, where)
    values = _parquet_values(column)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers, got {column.type}; encode text and dates as numbers first")
    return values


def _parquet_target(column: Any, where: str) -> Array:
    _require_no_nulls(column, where)
    return as_target(_parquet_values(column), where)


def _parquet_values(column: Any) -> Array:
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_decimal(column.type):
        column = column.cast("float64")
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    values: Array = np.array(column.to_pylist()) if is_text else column.to_numpy()
    return values


def _require_no_nulls(column: Any, where: str) -> None:
    if column.null_count:
        row = int(column.is_null().to_numpy().argmax())
        raise ValueError(f"{where}: missing value at row {row}")


def as_target(y: Array, where: str) -> Array:
    """Integers, finite real numbers or text; (N, 1) counts as (N,)."""
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"{where}: expected finite numbers, got {y[~np.isfinite(y)][0]:g}")
    if y.dtype.kind in "bu":
        return y.astype(np.int64)
    if y.dtype.kind not in "ifU":
        raise ValueError(f"{where}: expected integers, real numbers or text as target; got dtype {y.dtype}")
    return y


TABLES: dict[str, Callable[[Path, Columns], Source]] = {".csv": _read_csv, ".parquet": _read_parquet}
