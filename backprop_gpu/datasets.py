"""Reading data for the command line: built-in sets, IDX folders such as MNIST, .npz, .csv and .parquet files.

Every reader ends in one `Dataset`, or in a ValueError that says which file, line and column is off. What is read stays
in its own units: `Scaling` finds the network's units from the training rows alone, and afterwards folds them into the
weights, so that a saved model takes the data as it lies in the file.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu.mlp import MLP
from backprop_gpu.names import unknown

__all__ = ["BUILT_IN", "Dataset", "Scaling", "hold_out", "label_indices", "load", "load_for_model"]

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Label: TypeAlias = int | str
Task: TypeAlias = Literal["classification", "regression"]

CSV_ROWS = 4096
"""Lines of a CSV file that are converted at a time, so that the text of a big one is never held as a whole."""

SCALE_ROWS = 8192
"""Rows that are scaled at a time, so that no float64 copy of a whole image set is made."""

MISSING = ("", "nan", "na", "n/a", "null", "none", "?")
"""How a missing feature is written, in any case. A text target may well say NA: it is Namibia's code."""


@dataclass(frozen=True)
class Dataset:
    """Features and target to train on, as the network takes them but for the scaling."""

    name: str
    X: Array
    """(N, n_features) features in the file's own units: uint8 for images, else float64."""
    y: Array
    """(N,) int64 indices into `classes`; or (N,) or (N, n_targets) float64."""
    classes: tuple[Label, ...] | None = None
    """The labels, sorted; None for regression."""
    features: tuple[str, ...] | None = None
    """Names of the columns of X, where the source has them."""
    target: str | int | None = None
    """Name of the target's column, or its index where the columns have no names."""
    X_test: Array | None = None
    y_test: Array | None = None
    """A held-out part that the source brings along."""
    split: str = ""
    """How the held-out part came about."""
    note: str = ""
    """How the source was understood, where there is a choice."""


@dataclass(frozen=True)
class _Source:
    """What a reader found, before the target is understood as labels or values."""

    X: Array
    y: Array | None = None
    """As it stands: integers, real numbers or text."""
    features: tuple[str, ...] | None = None
    target: str | int | None = None
    X_test: Array | None = None
    y_test: Array | None = None
    note: str = ""


def load(source: str, *, target: str | None = None, task: Task | None = None) -> Dataset:
    """A data set to train on.

    Parameters
    ----------
    source : str
        A name in `BUILT_IN`, a folder of IDX files, or a .npz, .csv or .parquet file.
    target : str, optional
        Name or index (negative: from the end) of the target column of a .csv or .parquet; by default the last one.
    task : "classification" or "regression", optional
        By default what the target says: integers and text are labels, real numbers are values.

    Raises
    ------
    ValueError for data that cannot be understood, OSError where there is none, ImportError for a missing package.
    """
    found = _read(source, _TrainingColumns(target), target)
    if found.y is None:
        raise ValueError(f"{source} has no target to train on")
    y, classes = _encode(found.y, task, source)
    return Dataset(
        name=Path(source).name or source,
        X=found.X,
        y=y,
        classes=classes,
        features=found.features,
        target=found.target,
        X_test=found.X_test,
        y_test=None if found.y_test is None else _encode_test(found.y_test, classes, source),
        note="; ".join(filter(None, [found.note, _many_classes(classes, len(y))])),
    )


def load_for_model(
    source: str,
    *,
    n_features: int,
    classes: Sequence[Label] | None = None,
    features: Sequence[str] | None = None,
    model_target: str | int | None = None,
    target: str | None = None,
) -> tuple[Array, Array | None]:
    """(X, y) to predict with a model that was trained on `n_features` features; y is None where there is no target.

    Columns are found by the names `features`, where both the model and the file have names, else by position.
    `model_target` is the target as the model remembers it, `target` as the user asks for it. Of data that brings its
    own held-out part, that part is taken. A label that is not among `classes` is −1. Errors are those of `load`.
    """
    columns = _ModelColumns(n_features, tuple(features) if features else None, model_target, target)
    found = _read(source, columns, target)
    X, y = (found.X, found.y) if found.X_test is None else (found.X_test, found.y_test)
    if X.shape[1] != n_features:
        raise ValueError(f"{source} has {X.shape[1]} features; the model takes {n_features}")
    if y is None:
        return X, None
    return X, label_indices(y, classes) if classes else _values(y, source)


def hold_out(data: Dataset, fraction: float, seed: int) -> Dataset:
    """`data` with `fraction` of its rows, drawn by the seed, as the held-out part; or its own, where it has one."""
    if data.X_test is not None:
        return replace(data, split=f"{len(data.X_test):,} rows held out, as the data has them")
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1); got {fraction}")
    n_rows = len(data.X)
    n_test = max(1, round(fraction * n_rows)) if fraction else 0
    if n_test >= n_rows:
        raise ValueError(f"holding out {fraction:g} of {n_rows} rows leaves none to train on")
    if n_test == 0:
        return replace(data, split="none held out")
    # A stream of its own: the network draws its weights from default_rng(seed).
    test, train = np.split(np.random.default_rng([seed, 1]).permutation(n_rows), [n_test])
    split = f"{n_test:,} rows held out ({fraction:.0%}, drawn by seed {seed})"
    return replace(data, X=data.X[train], y=data.y[train], X_test=data.X[test], y_test=data.y[test], split=split)


# Which reader


def _read(source: str, columns: _Columns, target: str | None) -> _Source:
    """The source as its reader finds it, with finite features."""
    found = _reader(source, columns, target)()
    for name, X in (("X", found.X), ("X_test", found.X_test)):
        if X is not None:
            _require_finite(X, found.features, f"{source}, {name}")
    return found


def _reader(source: str, columns: _Columns, target: str | None) -> Callable[[], _Source]:
    """What reads the source; a name in BUILT_IN comes before a file of that name."""
    path = Path(source)
    suffix = path.suffix.lower()
    if source not in BUILT_IN and not path.exists():
        raise _no_such_source(source)
    if source not in BUILT_IN and suffix in TABLES and not path.is_dir():
        return partial(TABLES[suffix], path, columns)
    if target is not None:
        raise ValueError(f"--target names a column of a .csv or .parquet file; {source} has no columns to choose from")
    if source in BUILT_IN:
        return partial(_built_in, source)
    if path.is_dir():
        return partial(_read_idx_folder, path)
    if suffix == ".npz":
        return partial(_read_npz, path, needs_target=isinstance(columns, _TrainingColumns))
    return partial(_read_unnamed, path, columns)


def _read_unnamed(path: Path, columns: _Columns) -> _Source:
    """A file whose suffix says nothing: IDX images are taken for prediction, as they come without labels."""
    if "idx" in path.name and isinstance(columns, _ModelColumns):
        return _Source(_images(path))
    hint = "; of IDX files, name the folder" if "idx" in path.name else ""
    raise ValueError(f"{path}: expected a .csv, .parquet or .npz file, or a folder of IDX files{hint}")


def _no_such_source(source: str) -> Exception:
    if Path(source).suffix or len(Path(source).parts) > 1:
        return FileNotFoundError(f"there is no file or folder {source}")
    return ValueError(f"{unknown('data set', source, BUILT_IN)}; nor is there a file or folder of that name")


# Targets: labels become indices into sorted classes, values become float64


def _encode(y: Array, task: Task | None, where: str) -> tuple[Array, tuple[Label, ...] | None]:
    """(y as the network takes it, its classes): integers and text are labels unless `task` says otherwise."""
    is_labels = task == "classification" if task else y.dtype.kind != "f"
    if not is_labels:
        return _values(y, where), None
    labels = _labels(y, where)
    found, indices = np.unique(labels, return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"{where}: the target holds a single class ({found[0]}); a classifier needs at least two")
    return indices.astype(np.int64), tuple(found.tolist())


def _encode_test(y: Array, classes: tuple[Label, ...] | None, where: str) -> Array:
    if classes is None:
        return _values(y, where)
    indices = label_indices(y, classes)
    if (indices < 0).any():
        row = int((indices < 0).argmax())
        raise ValueError(f"{where}: the held-out target has label {y[row]} at row {row}, which the training rows lack")
    return indices


def label_indices(y: Array, classes: Sequence[Label]) -> npt.NDArray[np.int64]:
    """Index of each label of (N,) `y` in `classes`, compared as they are written; −1 for one that is not there."""
    if y.ndim != 1:
        raise ValueError(f"class labels must be one column, shape (N,); got shape {y.shape}")
    index_of = {str(label): index for index, label in enumerate(classes)}
    found, inverse = np.unique(y, return_inverse=True)
    return np.array([index_of.get(_written(label), -1) for label in found.tolist()], np.int64)[inverse]


def _written(label: float | str) -> str:
    """3 and 3.0 are one class: a column with a gap in it makes its integers real numbers."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _labels(y: Array, where: str) -> Array:
    """(N,) integers or text."""
    if y.ndim != 1:
        raise ValueError(
            f"{where}: class labels must be one column, shape (N,); got shape {y.shape} "
            "(for values to predict: --task regression)"
        )
    if y.dtype.kind != "f":
        return y
    bad = y != np.rint(y)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{where}: class labels are integers or text; the target is {y[row]:g} at row {row} "
            "(for values to predict: --task regression)"
        )
    return y.astype(np.int64)


def _values(y: Array, where: str) -> Floats:
    """Real numbers as float64."""
    if y.dtype.kind == "U":
        bad = _first_not_number(y)
        raise ValueError(
            f"{where}: a regression needs numbers as target; got the text {str(y[bad])!r} at row {bad} "
            "(for labels: --task classification)"
        )
    return y.astype(np.float64)


def _first_not_number(texts: Iterable[str]) -> int:
    return next((row for row, text in enumerate(texts) if _number(text) is None), 0)


def _many_classes(classes: tuple[Label, ...] | None, n_rows: int) -> str:
    """A hint where the labels look like values."""
    few = classes is None or len(classes) <= max(20, n_rows // 10)
    return "" if few or classes is None else "so many classes are unusual; for values to predict: --task regression"


def _require_finite(X: Array, features: tuple[str, ...] | None, where: str) -> None:
    if X.dtype.kind != "f":
        return
    for start in range(0, len(X), SCALE_ROWS):
        bad = ~np.isfinite(X[start : start + SCALE_ROWS])
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            name = repr(features[column]) if features else column
            value = X[start + row, column]
            what = "a missing value (nan)" if np.isnan(value) else f"{value:g}"
            raise ValueError(f"{where}: expected finite numbers, got {what} at row {start + row}, column {name}")


# Columns of a table


@dataclass(frozen=True)
class _TrainingColumns:
    """Every column is a feature but the target."""

    target: str | None

    def choose(self, names: Sequence[str] | None, n_columns: int) -> tuple[list[int], int | None]:
        """(indices of the features, index of the target) among `n_columns`, which may have names."""
        if n_columns < 2:
            raise ValueError("one column alone; expected at least one feature and the target")
        target = _column_index("-1" if self.target is None else self.target, names, n_columns)
        return [column for column in range(n_columns) if column != target], target


@dataclass(frozen=True)
class _ModelColumns:
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


_Columns: TypeAlias = _TrainingColumns | _ModelColumns


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


def _read_csv(path: Path, columns: _Columns) -> _Source:
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


def _parse_csv(path: Path, reader: Any, columns: _Columns) -> _Source:
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
    return _Source(X, y, _named(names, features), shown, note=note)


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
    if any(_number(name) is not None for name in names):
        return None
    if "" in names:
        raise ValueError(f"{path}, line 1: column {names.index('')} has no name (pandas: to_csv(…, index=False))")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}, line 1: two columns are called {twice[0]!r}")
    return names


def _number(text: str) -> float | None:
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
        line, column, text = next(f for f in fields if not math.isfinite(_nan_if_none(_number(f[2]))))
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
        if self.names is None and _number(texts[0]) is None and texts.count(texts[0]) == 1 and len(texts) > 1:
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


def _read_parquet(path: Path, columns: _Columns) -> _Source:
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
    return _Source(X, y, _named(names, features), None if target is None else names[target])


def _parquet_numbers(column: Any, where: str) -> Array:
    _require_no_nulls(column, where)
    values = _parquet_values(column)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers, got {column.type}; encode text and dates as numbers first")
    return values


def _parquet_target(column: Any, where: str) -> Array:
    _require_no_nulls(column, where)
    return _as_target(_parquet_values(column), where)


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


def _as_target(y: Array, where: str) -> Array:
    """Integers, finite real numbers or text; (N, 1) counts as (N,)."""
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"{where}: expected finite numbers, got {y[~np.isfinite(y)][0]:g}")
    if y.dtype.kind in "bu":
        return y.astype(np.int64)
    if y.dtype.kind not in "ifU":
        raise ValueError(f"{where}: expected integers, real numbers or text as target; got dtype {y.dtype}")
    return y


TABLES: dict[str, Callable[[Path, _Columns], _Source]] = {".csv": _read_csv, ".parquet": _read_parquet}


# NumPy


def _read_npz(path: Path, needs_target: bool) -> _Source:
    """A .npz file of the arrays X and y, and perhaps X_test and y_test; nothing in it is ever unpickled."""
    arrays = _npz_arrays(path)
    known = {"X", "y", "X_test", "y_test"}
    required = {"X", "y"} if needs_target else {"X"}
    if not required <= arrays.keys() or not arrays.keys() <= known or ("y_test" in arrays and "X_test" not in arrays):
        raise ValueError(
            f"{path} must hold the arrays X and y, and may hold X_test and y_test; "
            f"it holds {', '.join(arrays) or 'none'}"
        )
    if needs_target and "X_test" in arrays and "y_test" not in arrays:
        raise ValueError(f"{path} holds X_test without y_test; give both or neither")
    X, y = _npz_pair(arrays, "X", "y", path)
    X_test, y_test = _npz_pair(arrays, "X_test", "y_test", path) if "X_test" in arrays else (None, None)
    if X_test is not None and X_test.shape[1] != X.shape[1]:
        raise ValueError(f"{path}: X has {X.shape[1]} features and X_test {X_test.shape[1]}")
    return _Source(X, y, X_test=X_test, y_test=y_test)


def _npz_arrays(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except Exception as error:  # of any kind: zip, zlib, struct and NumPy's parser each fail in their own way
            raise ValueError(f"{path} is not a .npz file of plain arrays, or it is damaged: {error}") from error


def _npz_pair(arrays: Mapping[str, Array], X_name: str, y_name: str, path: Path) -> tuple[Array, Array | None]:
    X = _as_features(arrays[X_name], f"{path}, {X_name}")
    if y_name not in arrays:
        return X, None
    y = _as_target(arrays[y_name], f"{path}, {y_name}")
    if y.ndim not in (1, 2) or len(y) != len(X):
        raise ValueError(
            f"{path}: {y_name} must have one entry for each of the {len(X)} rows of {X_name}; got shape {y.shape}"
        )
    return X, y


def _as_features(X: Array, where: str) -> Array:
    """(N, …) as (N, n_features): images row by row; uint8 stays, everything else becomes float64."""
    if X.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected real numbers, got dtype {X.dtype}")
    if X.ndim < 2 or X.size == 0:
        raise ValueError(f"{where}: expected rows of features, shape (N, n_features); got shape {X.shape}")
    X = X.reshape(len(X), -1)
    return X if X.dtype == np.uint8 else X.astype(np.float64)


# IDX, the format of MNIST


def _read_idx_folder(folder: Path) -> _Source:
    """train-images-idx3-ubyte and train-labels-idx1-ubyte, and perhaps the two t10k files; each may end in .gz."""
    X, y = _idx_pair(folder, "train")
    if _idx_path(folder, "t10k", "images") is None:
        return _Source(X, y)
    X_test, y_test = _idx_pair(folder, "t10k")
    if X_test.shape[1] != X.shape[1]:
        raise ValueError(f"{folder}: the train images have {X.shape[1]} pixels and the t10k images {X_test.shape[1]}")
    return _Source(X, y, X_test=X_test, y_test=y_test)


def _idx_pair(folder: Path, part: str) -> tuple[Array, Array]:
    X, y = _images(_require_idx(folder, part, "images")), _read_idx(_require_idx(folder, part, "labels"))
    if y.ndim != 1 or len(y) != len(X):
        raise ValueError(f"{folder}: {len(X)} {part} images need as many labels; got labels of shape {y.shape}")
    return X, y.astype(np.int64)


def _images(path: Path) -> Array:
    """(N, n_pixels) uint8."""
    images = _read_idx(path)
    if images.ndim < 2 or images.size == 0:
        raise ValueError(f"{path}: expected images, (N, height, width); got shape {images.shape}")
    return images.reshape(len(images), -1)


def _require_idx(folder: Path, part: str, what: str) -> Path:
    path = _idx_path(folder, part, what)
    if path is None:
        raise ValueError(
            f"{folder} has no {_idx_names(part, what)[0]}[.gz]; a folder must hold IDX files, named as MNIST's"
        )
    return path


def _idx_path(folder: Path, part: str, what: str) -> Path | None:
    return next((folder / name for name in _idx_names(part, what) if (folder / name).is_file()), None)


def _idx_names(part: str, what: str) -> list[str]:
    """The name in the original, and how some unpacking programs leave it."""
    dimensions = {"images": 3, "labels": 1}[what]
    stems = [f"{part}-{what}{mark}idx{dimensions}-ubyte" for mark in "-."]
    return [stem + suffix for stem in stems for suffix in ("", ".gz")]


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes: 0 0 8 and the number of dimensions, each dimension in four bytes, the entries."""
    content = _plain_bytes(path)
    if content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
    expected = start + math.prod(shape)
    if len(content) != expected:
        size = " x ".join(map(str, shape))
        raise ValueError(f"{path} is damaged: {size} entries make {expected} bytes with the header; got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _plain_bytes(path: Path) -> bytes:
    """The file's content, unpacked where it begins as gzip does, whatever its name."""
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


# Built-in sets


BUILT_IN: dict[str, Task] = {
    "digits": "classification",
    "iris": "classification",
    "wine": "classification",
    "breast_cancer": "classification",
    "diabetes": "regression",
}
"""The small sets that scikit-learn carries inside its package, and what they are for."""


def _built_in(name: str) -> _Source:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f'the data set {name!r} comes with scikit-learn: pip install "backprop_gpu[sklearn]"'
        ) from error
    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    # The digits are pixels from 0 to 16, which uint8 says: pixels are scaled as a whole.
    X = bunch.data.astype(np.uint8) if name == "digits" else bunch.data
    y = bunch.target if name == "diabetes" else np.array(bunch.target_names)[bunch.target]
    return _Source(X, y, tuple(map(str, bunch.feature_names)), "target")


# Scaling


@dataclass(frozen=True)
class Scaling:
    """x ↦ (x − offset) / scale, for inputs and for values to predict; found from the training rows, in float64."""

    X_offset: Floats
    """(n_features,)"""
    X_scale: Floats
    y_offset: Floats | None
    """(n_targets,), or None where the target stays in its units."""
    y_scale: Floats | None

    FLOAT32_LIMIT = 1e3
    """|offset| / scale from which float32 no longer holds a raw feature to a ten-thousandth of its spread."""

    @classmethod
    def of(cls, X: Array, y: Array | None) -> Scaling:
        """Mean 0 and variance 1 for each feature of (N, n_features) `X`, and for `y` unless it is None.

        Pixels (uint8) get one mean and one deviation for all, which leaves a pixel that is hardly ever set small.
        A constant feature gets scale 1.
        """
        if X.dtype == np.uint8:
            mean, std = _pixel_moments(X)
            X_offset, X_scale = np.full(X.shape[1], mean), np.full(X.shape[1], std)
        else:
            X_offset, X_scale = _moments(X)
        return cls(X_offset, X_scale, *(_moments(y.reshape(len(y), -1)) if y is not None else (None, None)))

    def inputs(self, X: Array, dtype: str) -> Array:
        """Scaled (N, n_features) `X` as `dtype`, computed in float64."""
        scaled = np.empty(X.shape, dtype)
        for start in range(0, len(X), SCALE_ROWS):
            rows = slice(start, start + SCALE_ROWS)
            scaled[rows] = (X[rows] - self.X_offset) / self.X_scale
        return scaled

    def targets(self, y: Array) -> Array:
        """Scaled `y`, of its shape; labels and unscaled targets as they are."""
        if self.y_offset is None or self.y_scale is None:
            return y
        scaled: Array = ((y.reshape(len(y), -1) - self.y_offset) / self.y_scale).reshape(y.shape)
        return scaled

    @property
    def needs_float64(self) -> bool:
        """Whether some raw feature is so far from 0, for its spread, that float32 would blur it."""
        return bool((np.abs(self.X_offset) > self.FLOAT32_LIMIT * self.X_scale).any())

    def folded(self, net: MLP) -> MLP:
        """A copy of `net` that takes raw inputs and answers in the target's units; computed in float64.

        Of net's dtype, but at least float32, and float64 where `needs_float64`: raw data has other ranges than scaled.
        """
        wide = net.copy(dtype="float64")
        W, b = ([np.array(wide.ops.to_numpy(x)) for x in views] for views in (wide.W, wide.b))
        W[0] = W[0] / self.X_scale[:, None]
        b[0] = b[0] - self.X_offset @ W[0]
        if self.y_offset is not None and self.y_scale is not None:
            W[-1] = W[-1] * self.y_scale
            b[-1] = b[-1] * self.y_scale + self.y_offset
        for view, values in zip((*wide.W, *wide.b), (*W, *b), strict=True):
            view[...] = wide.ops.asarray(values)
        narrow = net.dtype != "float64" and not self.needs_float64
        return wide.copy(dtype="float32") if narrow else wide


def _moments(x: Array) -> tuple[Floats, Floats]:
    """(mean, standard deviation) of each column, with 1 for a constant one: its rounded deviation need not be 0."""
    constant = x.max(axis=0) == x.min(axis=0)
    return x.mean(axis=0, dtype=np.float64), np.where(constant, 1.0, x.std(axis=0, dtype=np.float64))


def _pixel_moments(X: Array) -> tuple[float, float]:
    """(mean, standard deviation) of all pixels, exactly, from how often each of the 256 values occurs."""
    blocks = (X[start : start + SCALE_ROWS].reshape(-1) for start in range(0, len(X), SCALE_ROWS))
    counts = sum(np.bincount(block, minlength=256) for block in blocks)
    mean = float(np.average(np.arange(256), weights=counts))
    deviation = float(np.average((np.arange(256) - mean) ** 2, weights=counts)) ** 0.5
    return mean, deviation or 1.0
