"""Every format reads back what was written, and what is wrong with a file is said with its place in it."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import backprop_gpu as bp
from backprop_gpu import datasets, tables
from backprop_gpu.datasets import Dataset
from backprop_gpu.scaling import Scaling

rng = np.random.default_rng(7)
IMAGES = rng.integers(0, 256, (6, 3, 2), dtype=np.uint8)
LABELS = np.array([3, 5, 3, 9, 5, 9], np.uint8)


def idx(array, code=8):
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def write(tmp_path):
    """write(name, content): a file in a folder of its own, as text, bytes, arrays for .npz or columns for .parquet."""

    def write(name, content):
        path = tmp_path / name
        if name.endswith(".npz") and isinstance(content, dict):
            np.savez(path, **content)
        elif name.endswith(".parquet") and isinstance(content, dict):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.fixture
def idx_folder(tmp_path):
    """A folder named and written as MNIST is, with 4 training and 2 test images."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(IMAGES[rows]))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[rows])))
    return folder


# What is read


def test_idx_folder_gzipped_or_not(idx_folder):
    data = datasets.load(str(idx_folder))
    assert data.X.dtype == np.uint8
    np.testing.assert_array_equal(data.X, IMAGES[:4].reshape(4, 6))
    np.testing.assert_array_equal(data.X_test, IMAGES[4:].reshape(2, 6))
    assert data.classes == (3, 5, 9)
    np.testing.assert_array_equal(data.y, [0, 1, 0, 2])
    np.testing.assert_array_equal(data.y_test, [1, 2])


def test_npz(write):
    X, y = rng.normal(size=(5, 2, 2)), np.array([7, 7, 2, 2, 7])
    data = datasets.load(write("d.npz", {"X": X, "y": y, "X_test": X[:2], "y_test": y[2:4]}))
    np.testing.assert_array_equal(data.X, X.reshape(5, 4))
    np.testing.assert_array_equal(data.y, [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(data.y_test, [0, 0])
    assert data.classes == (2, 7)


def test_npz_with_several_values_to_predict(write):
    y = rng.normal(size=(5, 3))
    data = datasets.load(write("d.npz", {"X": np.ones((5, 2)), "y": y}))
    np.testing.assert_array_equal(data.y, y)
    assert data.classes is None


def test_csv_with_header_and_text_labels(write):
    data = datasets.load(write("d.csv", "a,b,kind\n1,2.5,dog\n-3,4e2,cat\n\n5,6,dog\n"))
    np.testing.assert_array_equal(data.X, [[1, 2.5], [-3, 400], [5, 6]])
    np.testing.assert_array_equal(data.y, [1, 0, 1])
    assert (data.classes, data.features, data.target) == (("cat", "dog"), ("a", "b"), "kind")
    assert "header line found" in data.note


def test_csv_without_header(write):
    data = datasets.load(write("d.csv", "1,2,0.5\n3,4,1.5\n"))
    np.testing.assert_array_equal(data.X, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(data.y, [0.5, 1.5])
    assert (data.classes, data.features, data.target) == (None, None, 2)
    assert "no header line found" in data.note


@pytest.mark.parametrize(
    "text", ["a;b;y\n1;2;u\n3;4;v\n", "a\tb\ty\n1\t2\tu\n3\t4\tv\n", '\ufeff"a","b","y"\r\n1,2,u\r\n3,4,v']
)
def test_csv_dialects(write, text):
    data = datasets.load(write("d.csv", text))
    np.testing.assert_array_equal(data.X, [[1, 2], [3, 4]])
    assert (data.features, data.classes) == (("a", "b"), ("u", "v"))


@pytest.mark.parametrize("target", ["y", "1", "-2"])
def test_csv_target_by_name_or_index(write, target):
    data = datasets.load(write("d.csv", "a,y,b\n1,10,2\n3,11,4\n"), target=target)
    np.testing.assert_array_equal(data.X, [[1, 2], [3, 4]])
    assert (data.classes, data.features, data.target) == ((10, 11), ("a", "b"), "y")


def test_csv_of_more_rows_than_are_converted_at_a_time(write, monkeypatch):
    monkeypatch.setattr(tables, "CSV_ROWS", 3)
    X = np.arange(22.0).reshape(11, 2)
    text = "a,b,y\n" + "".join(f"{a},{b},{i % 2}\n" for i, (a, b) in enumerate(X))
    np.testing.assert_array_equal(datasets.load(write("d.csv", text)).X, X)
    with pytest.raises(ValueError, match="line 12, column 'b'"):
        datasets.load(write("d.csv", text.replace("21.0", "x")))


def test_parquet(write):
    columns = {"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "__index_level_0__": [0, 1, 2], "flag": [True, False, True]}
    kind = pa.array(["dog", "cat", "dog"]).dictionary_encode()
    data = datasets.load(write("d.parquet", {**columns, "kind": kind}))
    np.testing.assert_array_equal(data.X, [[1, 0.5, 1], [2, 1.5, 0], [3, 2.5, 1]])
    assert data.X.dtype == np.float64
    assert (data.classes, data.features, data.target) == (("cat", "dog"), ("a", "b", "flag"), "kind")


def test_parquet_target_by_name(write):
    path = write("d.parquet", {"flag": [True, False, True], "a": [1.5, 2.5, 3.5]})
    data = datasets.load(path, target="flag")
    assert (data.classes, data.features) == ((0, 1), ("a",))


@pytest.mark.parametrize(
    ("name", "shape", "n_classes"),
    [
        ("digits", (1797, 64), 10),
        ("iris", (150, 4), 3),
        ("wine", (178, 13), 3),
        ("breast_cancer", (569, 30), 2),
        ("diabetes", (442, 10), None),
    ],
)
def test_built_in_sets(name, shape, n_classes):
    data = datasets.load(name)
    assert data.X.shape == shape
    assert (data.classes and len(data.classes)) == n_classes
    assert len(data.features) == shape[1]
    assert (data.X.dtype == np.uint8) == (name == "digits")


# Labels or values


def test_integers_are_labels_unless_the_task_says_otherwise(write):
    path = write("d.csv", "a,y\n1,5\n2,3\n3,5\n")
    assert datasets.load(path).classes == (3, 5)
    data = datasets.load(path, task="regression")
    assert data.classes is None
    np.testing.assert_array_equal(data.y, [5.0, 3.0, 5.0])


def test_whole_real_numbers_can_be_labels(write):
    path = write("d.csv", "a,y\n1,5.0\n2,3.0\n3,5.0\n")
    assert datasets.load(path).classes is None
    assert datasets.load(path, task="classification").classes == (3, 5)


def test_suspiciously_many_classes_are_noted(write):
    rows = "".join(f"{i},{i * 3}\n" for i in range(30))
    assert "--task regression" in datasets.load(write("d.csv", "a,y\n" + rows)).note
    assert "--task" not in datasets.load("digits").note


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([3, 9, 4], [3, 9], [0, 1, -1]),
        ([3.0, 9.5], [3, 9], [0, -1]),
        (["3", "x"], [3, 9], [0, -1]),
        ([1, 2], ["1", "x"], [0, -1]),
    ],
)
def test_labels_are_compared_as_they_are_written(labels, classes, expected):
    np.testing.assert_array_equal(datasets.label_indices(np.array(labels), classes), expected)


# Reading for a model


def for_model(path, **settings):
    known = {"n_features": 2, "features": ["a", "b"], "classes": ["u", "v"], "model_target": "y"}
    return datasets.load_for_model(path, **known | settings)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a,b,y\n1,2,v\n", [1]),
        ("y,b,a\nv,2,1\n", [1]),
        ("id,b,a\nrow one,2,1\n", None),
        ("a,b\n1,2\n", None),
        ("1,2\n", None),
    ],
)
def test_columns_go_by_name_then_by_position(write, text, labels):
    X, y = for_model(write("d.csv", text))
    np.testing.assert_array_equal(X, [[1, 2]])
    assert (None if y is None else y.tolist()) == labels


def test_a_nameless_target_is_where_it_was_or_where_the_user_says(write):
    path = write("d.csv", "u,1,2\nv,3,4\nu,5,6\n")
    for settings in ({"model_target": 0, "features": None}, {"target": "0"}):
        X, y = for_model(path, **settings)
        np.testing.assert_array_equal(X, [[1, 2], [3, 4], [5, 6]])
        np.testing.assert_array_equal(y, [0, 1, 0])
    with pytest.raises(ValueError, match="say which is --target"):
        for_model(path)


def test_idx_images_alone_are_read_for_a_model(idx_folder):
    X, y = for_model(str(idx_folder / "t10k-images-idx3-ubyte"), n_features=6)
    np.testing.assert_array_equal(X, IMAGES[4:].reshape(2, 6))
    assert y is None


def test_a_held_out_part_is_what_a_model_is_shown(idx_folder, write):
    X, y = for_model(str(idx_folder), n_features=6, classes=[3, 5, 9])
    np.testing.assert_array_equal(X, IMAGES[4:].reshape(2, 6))
    np.testing.assert_array_equal(y, [1, 2])
    X, y = for_model(write("d.npz", {"X": np.ones((2, 2))}))
    assert y is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,c,y\n1,2,v\n", "feature 'b' is not among the columns: a, c, y"),
        ("1,2,3,4\n", "4 columns; the model takes 2 features"),
    ],
)
def test_files_that_do_not_fit_the_model(write, text, message):
    with pytest.raises(ValueError, match=message):
        for_model(write("d.csv", text))
    with pytest.raises(ValueError, match="has 3 features; the model takes 2"):
        for_model(write("d.npz", {"X": np.ones((4, 3))}))


# Files that are wrong

CSV_ERRORS = [
    ("", "is empty"),
    ("a,b,y\n", "no rows"),
    ("a\n1\n2\n", "one column alone"),
    ("a,b,y\n1,2,u\n1,2\n", "line 3: expected 3 fields as in line 1, got 2, column 'y' is missing"),
    ("a,b,y\n1,2,u\n1,2,u,4\n", "line 3: expected 3 fields as in line 1, got 4"),
    ("a,b,y\n1,2,u\n\n1,red,u\n", "line 4, column 'b': expected a finite number, got 'red'"),
    ("a,b,y\n1,2,u\n1,,u\n", "line 3, column 'b': missing value"),
    ("a,b,y\n1,NaN,u\n1,2,u\n", "line 2, column 'b': missing value"),
    ("a,b,y\n1,2,u\n1,inf,v\n", "line 3, column 'b': expected a finite number, got 'inf'"),
    ("a,b,y\n1,2,u\n1,2,\n", "line 3, column 'y': missing value in the target"),
    ("a,b,y\n1,2,0.5\n1,2,inf\n", "line 3, column 'y': expected a finite number"),
    ("a,b,y\n1,2,u\n1,2,u\n", "a single class"),
    ("a,a,y\n1,2,u\n", "two columns are called 'a'"),
    (",a,y\n0,2,u\n", "column 0 has no name"),
    ("red,2,1\nblue,3,2\n", "line 1, column 0: expected a finite number, got 'red'.*a header line is one"),
    ("0,1,target\n1,2,3\n4,5,6\n", "may be a header in which columns are called by numbers"),
    ('a,b,y\n1,"2,u\n', "line 2: unexpected end of data"),
    (b"\xff\xfe\x00a", "not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), CSV_ERRORS)
def test_csv_errors_name_line_and_column(write, content, message):
    path = write("d.csv", content)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [("z", "unknown target column 'z'.*valid: a, b, y"), ("3", "out of range"), ("-4", "out of range")],
)
def test_targets_that_are_not_there(write, target, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(write("d.csv", "a,b,y\n1,2,u\n"), target=target)


def test_a_headerless_target_has_no_name(write):
    with pytest.raises(ValueError, match="--target must be an index; got 'y'"):
        datasets.load(write("d.csv", "1,2,3\n"), target="y")


def test_tasks_that_do_not_fit_the_target(write):
    path = write("d.csv", "a,y\n1,0.5\n2,1\n")
    with pytest.raises(ValueError, match=r"class labels are integers or text; the target is 0\.5 at row 0"):
        datasets.load(path, task="classification")
    with pytest.raises(ValueError, match="needs numbers as target; got the text 'u' at row 1"):
        datasets.load(write("e.csv", "a,y\n1,2\n2,u\n"), task="regression")


X, y = np.ones((4, 2)), np.array([0, 1, 0, 1])
NPZ_ERRORS = [
    ({"X": X}, "must hold the arrays X and y.*it holds X"),
    ({"X": X, "y": y, "z": y}, "it holds X, y, z"),
    ({"X": X, "y": y, "X_test": X}, "X_test without y_test"),
    ({"X": X, "y": y, "y_test": y}, "it holds X, y, y_test"),
    ({"X": X, "y": y[:3]}, r"one entry for each of the 4 rows of X; got shape \(3,\)"),
    ({"X": X[0], "y": y[:2]}, r"expected rows of features.*got shape \(2,\)"),
    ({"X": X[:0], "y": y[:0]}, r"expected rows of features.*got shape \(0, 2\)"),
    ({"X": X, "y": y, "X_test": X[:, :1], "y_test": y}, "X has 2 features and X_test 1"),
    ({"X": X, "y": y, "X_test": X, "y_test": y + 1}, "label 2 at row 1, which the training rows lack"),
    ({"X": np.where(X * y[:, None] > 0, np.nan, X), "y": y}, r"a missing value \(nan\) at row 1, column 0"),
    ({"X": X.astype(str), "y": y}, "expected real numbers, got dtype <U"),
    ({"X": X, "y": y.astype(complex)}, "expected integers, real numbers or text as target"),
    ({"X": X, "y": np.array([0.5, np.inf, 1, 2])}, "expected finite numbers, got inf"),
    ({"X": X, "y": np.stack([y, y], axis=1)}, "class labels must be one column"),
    ({"X": X, "y": y.astype(object)}, "not a .npz file of plain arrays"),
    (b"PK\x03\x04 and then nothing", "not a .npz file of plain arrays"),
    (b"", "not a .npz file of plain arrays"),
]


@pytest.mark.parametrize(("content", "message"), NPZ_ERRORS)
def test_npz_errors(write, content, message):
    path = write("d.npz", content)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(path)
    assert path in str(error.value)


def test_a_truncated_npz_is_refused_wherever_it_ends(write):
    content = Path(write("d.npz", {"X": X, "y": y})).read_bytes()
    for end in range(0, len(content), 41):
        with pytest.raises(ValueError, match="damaged"):
            datasets.load(write("cut.npz", content[:end]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, None, 3], "y": [0, 1, 0]}, "column 'a': missing value at row 1"),
        ({"a": [1.0, float("nan"), 3], "y": [0, 1, 0]}, r"a missing value \(nan\) at row 1, column 'a'"),
        ({"a": ["u", "v", "w"], "y": [0, 1, 0]}, "column 'a': expected numbers, got string"),
        ({"a": [1, 2, 3], "y": [0, None, 1]}, "column 'y': missing value at row 1"),
        ({"a": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}, "no rows"),
        ({"a": [1, 2, 3]}, "one column alone"),
        (b"PAR1 and then nothing", "not a Parquet file"),
    ],
)
def test_parquet_errors(write, columns, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(write("d.parquet", columns))


IDX_ERRORS = [
    (b"", "not an IDX file of unsigned bytes: it begins with nothing"),
    (b"\x89PNG....", "not an IDX file of unsigned bytes: it begins with 89 50 4e 47"),
    (idx(IMAGES[:4].astype(">f4"), code=0x0D), "not an IDX file of unsigned bytes: it begins with 00 00 0d 03"),
    (idx(IMAGES[:4])[:-1], "4 x 3 x 2 entries make 40 bytes with the header; got 39"),
    (idx(IMAGES[:4])[:9], "is damaged"),
    (idx(IMAGES[:4]) + b"\0", "got 41"),
    (b"\0\0\x08\x04" + b"\xff" * 16, "is damaged"),
    (gzip.compress(idx(IMAGES[:4]), mtime=0)[:-9], "is damaged"),
    (gzip.compress(idx(IMAGES[:4]), mtime=0)[:12] + b"????????????", "is damaged"),
    (idx(LABELS[:4]), r"expected images, \(N, height, width\)"),
    (idx(IMAGES[:3]), "3 train images need as many labels"),
    (idx(IMAGES[:4, :2]), "train images have 4 pixels and the t10k images 6"),
]


@pytest.mark.parametrize(("content", "message"), IDX_ERRORS)
def test_idx_errors(idx_folder, content, message):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load(str(idx_folder))


def test_a_folder_without_idx_files(tmp_path, idx_folder):
    with pytest.raises(ValueError, match=r"has no train-images-idx3-ubyte\[.gz\]"):
        datasets.load(str(tmp_path))
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"has no t10k-labels-idx1-ubyte\[.gz\]"):
        datasets.load(str(idx_folder))


def test_names_that_are_nothing(write, idx_folder):
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        datasets.load("digit")
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder no/such\.csv"):
        datasets.load("no/such.csv")
    with pytest.raises(ValueError, match=r"expected a \.csv, \.parquet or \.npz file"):
        datasets.load(write("d.xlsx", "?"))
    with pytest.raises(ValueError, match="of IDX files, name the folder"):
        datasets.load(str(idx_folder / "train-images-idx3-ubyte"))
    with pytest.raises(ValueError, match="no columns to choose from"):
        datasets.load("digits", target="y")


@pytest.mark.parametrize(
    ("package", "source", "extra"), [("sklearn", "digits", "sklearn"), ("pyarrow", "d.parquet", "parquet")]
)
def test_a_missing_package_names_the_extra(write, monkeypatch, package, source, extra):
    path = source if source == "digits" else write(source, {"a": [1, 2], "y": [0, 1]})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "backprop_gpu\[{extra}\]"'):
        datasets.load(path)


# Holding out


def test_hold_out_splits_every_row_once_by_the_seed():
    data = datasets.load("iris")
    a, b, c = (datasets.hold_out(data, 0.2, seed) for seed in (3, 3, 4))
    assert (len(a.X), len(a.X_test)) == (120, 30)
    np.testing.assert_array_equal(a.X_test, b.X_test)
    assert not np.array_equal(a.X_test, c.X_test)
    rows = np.column_stack([np.vstack([a.X, a.X_test]), np.concatenate([a.y, a.y_test])])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(np.column_stack([data.X, data.y]), axis=0))


def test_hold_out_keeps_the_datas_own_part_and_refuses_what_leaves_nothing():
    own = Dataset("own", np.ones((3, 1)), np.arange(3), X_test=np.ones((2, 1)), y_test=np.arange(2))
    assert len(datasets.hold_out(own, 0.5, 0).X) == 3
    data = Dataset("one", np.ones((1, 1)), np.zeros(1))
    assert datasets.hold_out(data, 0.0, 0).X_test is None
    with pytest.raises(ValueError, match="leaves none to train on"):
        datasets.hold_out(data, 0.2, 0)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        datasets.hold_out(data, 1.0, 0)


# Scaling


def test_scaling_gives_every_feature_mean_0_and_variance_1():
    X = rng.normal([3, -50, 0.1], [2, 9, 0], (40, 3))
    scaled = Scaling.of(X, None).inputs(X, "float64")
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 0], atol=1e-12)


def test_pixels_are_scaled_as_a_whole():
    X = IMAGES.reshape(6, 6)
    scaled = Scaling.of(X, None).inputs(X, "float64")
    np.testing.assert_allclose(scaled, (X - X.mean()) / X.std(), rtol=1e-12)
    assert Scaling.of(np.full((3, 2), 9, np.uint8), None).X_scale.tolist() == [1, 1]


@pytest.mark.parametrize("layers", [[], [7, 5]])
def test_folding_answers_for_raw_data_as_the_network_did_for_scaled(layers):
    X, y = rng.normal([3, -50, 7], [2, 9, 0.1], (30, 3)), rng.normal([100, -2], [30, 0.1], (30, 2))
    scaling = Scaling.of(X, y)
    net = bp.MLP([3, *layers, 2], "tanh", "squared_error", dtype="float64", backend="numpy")
    expected = net.predict(scaling.inputs(X, "float64")) * scaling.y_scale + scaling.y_offset
    np.testing.assert_allclose(scaling.folded(net).predict(X), expected, rtol=1e-10)
    np.testing.assert_allclose(scaling.targets(y).std(axis=0), 1)


def test_features_far_from_zero_are_folded_in_float64():
    X = rng.normal(1.7e9, 1e3, (50, 1))
    scaling = Scaling.of(X, None)
    net = bp.MLP([1, 6, 2], backend="numpy")
    folded = scaling.folded(net)
    assert folded.dtype == "float64"
    np.testing.assert_allclose(folded.predict_proba(X), net.predict_proba(scaling.inputs(X, "float32")), atol=1e-5)
    assert Scaling.of(X - 1.7e9, None).folded(net).dtype == "float32"
