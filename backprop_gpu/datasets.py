"""Reading data for the command line: built-in sets, IDX folders such as MNIST, .npz, .csv and .parquet files.

Every reader ends in one `Dataset`, or in a ValueError that says which file, line and column is off. What is read stays
in its own units; `scaling` finds the network's.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from backprop_gpu.checks import unknown
from backprop_gpu.data import chunks
from backprop_gpu.tables import TABLES, Columns, ModelColumns, Source, TrainingColumns, as_target, number

__all__ = ["BUILT_IN", "Dataset", "hold_out", "label_indices", "load", "load_for_model"]

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Label: TypeAlias = int | str
Task: TypeAlias = Literal["classification", "regression"]


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
    found = _read(source, TrainingColumns(target), target)
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
    columns = ModelColumns(n_features, tuple(features) if features else None, model_target, target)
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


def _read(source: str, columns: Columns, target: str | None) -> Source:
    """The source as its reader finds it, with finite features."""
    found = _reader(source, columns, target)()
    for name, X in (("X", found.X), ("X_test", found.X_test)):
        if X is not None:
            _require_finite(X, found.features, f"{source}, {name}")
    return found


def _reader(source: str, columns: Columns, target: str | None) -> Callable[[], Source]:
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
        return partial(_read_npz, path, needs_target=isinstance(columns, TrainingColumns))
    return partial(_read_unnamed, path, columns)


def _read_unnamed(path: Path, columns: Columns) -> Source:
    """A file whose suffix says nothing: IDX images are taken for prediction, as they come without labels."""
    if "idx" in path.name and isinstance(columns, ModelColumns):
        return Source(_images(path))
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
    return next((row for row, text in enumerate(texts) if number(text) is None), 0)


def _many_classes(classes: tuple[Label, ...] | None, n_rows: int) -> str:
    """A hint where the labels look like values."""
    few = classes is None or len(classes) <= max(20, n_rows // 10)
    return "" if few or classes is None else "so many classes are unusual; for values to predict: --task regression"


def _require_finite(X: Array, features: tuple[str, ...] | None, where: str) -> None:
    if X.dtype.kind != "f":
        return
    for start, rows in chunks(X):
        bad = ~np.isfinite(rows)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            name = repr(features[column]) if features else column
            value = X[start + row, column]
            what = "a missing value (nan)" if np.isnan(value) else f"{value:g}"
            raise ValueError(f"{where}: expected finite numbers, got {what} at row {start + row}, column {name}")


# NumPy


def _read_npz(path: Path, needs_target: bool) -> Source:
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
    return Source(X, y, X_test=X_test, y_test=y_test)


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
    y = as_target(arrays[y_name], f"{path}, {y_name}")
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


def _read_idx_folder(folder: Path) -> Source:
    """train-images-idx3-ubyte and train-labels-idx1-ubyte, and perhaps the two t10k files; each may end in .gz."""
    X, y = _idx_pair(folder, "train")
    if _idx_path(folder, "t10k", "images") is None:
        return Source(X, y)
    X_test, y_test = _idx_pair(folder, "t10k")
    if X_test.shape[1] != X.shape[1]:
        raise ValueError(f"{folder}: the train images have {X.shape[1]} pixels and the t10k images {X_test.shape[1]}")
    return Source(X, y, X_test=X_test, y_test=y_test)


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


def _built_in(name: str) -> Source:
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
    return Source(X, y, tuple(map(str, bunch.feature_names)), "target")
