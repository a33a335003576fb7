"""The command line: what it prints, what it writes, and that what goes wrong ends in one line on stderr."""

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import cli, datasets
from backprop_gpu.cli import main

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
QUICK = ["--layers", "8", "--epochs", "2"]


@pytest.fixture
def run(capsys):
    """run(*argv): (exit status, stdout, stderr) of the command line."""

    def run(*argv):
        status = main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def ok(run):
    """ok(*argv): (stdout, stderr) of a command line that has to succeed."""

    def ok(*argv):
        status, out, err = run(*argv)
        assert status == 0, err
        return out, err

    return ok


@pytest.fixture
def refused(run):
    """refused(*argv, status=2): the one line on stderr of a command line that has to fail."""

    def refused(*argv, status=2):
        got, out, err = run(*argv)
        assert got == status, out + err
        assert err.startswith("backprop-gpu: error: ")
        assert err.count("\n") == 1
        return err

    return refused


@pytest.fixture
def table(tmp_path):
    """table(name, n): a CSV with a header and text labels of two clouds far from each other, and from 0."""

    def table(name="clouds.csv", n=60):
        rng = np.random.default_rng(5)
        lines = ["width,height,kind"]
        for i in range(n):
            x = rng.normal([300, -0.02], [10, 0.001]) + (i % 2) * np.array([60, 0.006])
            lines.append(f"{x[0]},{x[1]},{'cat' if i % 2 else 'dog'}")
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return table


@pytest.fixture
def script():
    """Runs the console script, as a shell would."""
    path = shutil.which("backprop-gpu", path=os.path.dirname(sys.executable))
    if path is None:
        pytest.skip("the console script is not installed beside this Python (pip install -e .)")

    def script(*argv, **settings):
        return subprocess.run([path, *argv], capture_output=True, text=True, timeout=60, **settings)

    return script


def score(out, what="accuracy"):
    return float(re.search(rf"{what} (-?[\d.]+)", out)[1])


def parameters(path):
    return bp.load(path, backend="numpy").parameters


def rows_of(text):
    return list(csv.reader(io.StringIO(text)))


# train


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_are_learnt_with_the_default_settings(ok, seed):
    out, err = ok("train", "digits", "--seed", seed)
    assert score(out) >= 0.97
    assert err == ""


def test_the_report_says_what_was_done(ok):
    out, _ = ok("train", "digits", *QUICK, "--backend", "numpy", "--optimizer", "adamw")
    for line in (
        r"data +digits: 1,797 rows, 64 features, 10 classes\n",
        r"split +1,438 rows to train on, 359 rows held out \(20%, drawn by seed 0\)\n",
        r"network +64 -> 8 relu -> 10 softmax; cross_entropy, float32, 610 parameters\n",
        r"training +AdamW, mini-batches of 32 rows, seed 0\n",
        r"backend +numpy: asked for by name\n",
        r"time +\d+\.\d\d s for 2 epochs, [\d,]+ rows per second\n",
        r"held out +accuracy 0\.\d{4} \(\d+ of 359 rows\)\n",
        r"saved +nothing",
    ):
        assert re.search(line, out), line


def test_quiet_prints_nothing(ok, tmp_path):
    assert ok("train", "iris", *QUICK, "--quiet", "--output", tmp_path / "m") == ("", "")
    assert bp.load(tmp_path / "m").layer_sizes == (4, 8, 3)


def test_the_same_seed_saves_the_same_model(ok, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    for path, seed in ((a, 5), (b, 5), (c, 6)):
        ok("train", "iris", *QUICK, "--seed", seed, "--output", path)
    np.testing.assert_array_equal(parameters(a), parameters(b))
    assert not np.array_equal(parameters(a), parameters(c))


def test_options_reach_the_network(ok, tmp_path):
    path = tmp_path / "m"
    options = "--layers 6,5 --activation tanh,gelu --dropout 0.1,0.2 --alpha 0.01 --dtype float64 --batch-size 7"
    ok("train", "iris", *options.split(), "--epochs", 2, "--learning-rate", 0.002, "--output", path)
    net = bp.load(path)
    arch = net.architecture
    assert net.layer_sizes == (4, 6, 5, 3)
    assert [sigma.name for sigma in arch.activations] == ["tanh", "gelu"]
    assert (arch.dropout, arch.alpha, net.dtype) == ((0.1, 0.2), 0.01, "float64")
    assert net.steps_taken == 2 * -(-120 // 7)


@pytest.mark.parametrize("layers", ["none", ""])
def test_no_hidden_layer(ok, tmp_path, layers):
    out, _ = ok("train", "breast_cancer", "--layers", layers, "--output", tmp_path / "m")
    assert bp.load(tmp_path / "m").layer_sizes == (30, 2)
    assert score(out) >= 0.9


def test_early_stopping_watches_training_rows_only(ok, tmp_path):
    out, _ = ok("train", "wine", "--early-stopping", 1, "--epochs", 300, "--learning-rate", 0.02)
    assert "(early stopping)" in out
    assert "142 rows to train on, 36 rows held out" in out


def test_early_stopping_of_few_rows_leaves_room_for_a_mini_batch(ok, table):
    for n in (12, 20, 21):
        ok("train", table(n=n), *QUICK, "--early-stopping", 5)


def test_binary_cross_entropy(ok, tmp_path, table):
    data, model = table(), tmp_path / "m"
    out, _ = ok("train", data, "--loss", "binary_cross_entropy", "--output", model)
    assert score(out) == 1
    assert bp.load(model).layer_sizes[-1] == 1
    out, err = ok("predict", model, data, "--probabilities")
    assert rows_of(out)[0] == ["prediction", "probability_cat", "probability_dog"]
    assert score(err) == 1


# train → save → predict, on the data as it lies in the file


def held_out_csv(path, name):
    """The rows that `train --seed 0` held out of a built-in set, as a CSV of raw data."""
    data = datasets.hold_out(datasets.load(name), 0.2, 0)
    labels = data.y_test if data.classes is None else [data.classes[label] for label in data.y_test]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*data.features, "target"])
        writer.writerows([*map(float, x), label] for x, label in zip(data.X_test, labels, strict=True))
    return data


@pytest.mark.parametrize("name", ["digits", "wine"])
def test_predict_reproduces_the_held_out_accuracy_on_raw_data(ok, tmp_path, name):
    data = held_out_csv(tmp_path / "held_out.csv", name)
    out, _ = ok("train", name, "--epochs", 5, "--output", tmp_path / "m")
    predictions, err = ok("predict", tmp_path / "m", tmp_path / "held_out.csv")
    assert score(err) == score(out)
    net = bp.load(tmp_path / "m")
    assert net.evaluate(data.X_test, data.y_test)["accuracy"] == pytest.approx(score(out), abs=1e-4)
    assert [row[0] for row in rows_of(predictions)[1:]] == [str(data.classes[k]) for k in net.predict(data.X_test)]


def test_a_regression_answers_in_the_targets_units(ok, tmp_path):
    data = held_out_csv(tmp_path / "held_out.csv", "diabetes")
    out, _ = ok("train", "diabetes", "--layers", "none", "--learning-rate", 0.01, "--output", tmp_path / "m")
    assert score(out, "R2") > 0.3
    predictions, err = ok("predict", tmp_path / "m", tmp_path / "held_out.csv")
    assert score(err, "R2") == score(out, "R2")
    values = np.array([float(row[0]) for row in rows_of(predictions)[1:]])
    np.testing.assert_allclose(values, bp.load(tmp_path / "m").predict(data.X_test), rtol=1e-6)
    assert data.y.min() < values.mean() < data.y.max()


def test_counts_stay_in_their_units(ok, tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(50, 5, (200, 2))
    np.savez(tmp_path / "d.npz", X=X, y=rng.poisson(np.exp((X[:, 0] - 40) / 10)))
    out, _ = ok("train", tmp_path / "d.npz", "--loss", "poisson", "--layers", "8", "--output", tmp_path / "m")
    assert score(out, "R2") > 0
    assert (bp.load(tmp_path / "m").predict(X) > 0).all()


def test_text_labels_and_column_names_travel_with_the_model(ok, tmp_path, table):
    data, model = table(), tmp_path / "m"
    out, _ = ok("train", data, "--output", model)
    assert score(out) == 1
    assert bp.load(model).metadata == {"classes": ["cat", "dog"], "features": ["width", "height"], "target": "kind"}
    (tmp_path / "new.csv").write_text("height,id,width\n-0.02,first,300\n-0.014,second,360\n")
    predictions, err = ok("predict", model, tmp_path / "new.csv", "--probabilities")
    header, *rows = rows_of(predictions)
    assert header == ["prediction", "probability_cat", "probability_dog"]
    assert [row[0] for row in rows] == ["dog", "cat"]
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float).sum(axis=1), 1, rtol=1e-6)
    assert err == ""


def test_predict_writes_a_file_whole_or_not_at_all(ok, refused, tmp_path, table):
    data, model, output = table(), tmp_path / "m", tmp_path / "out.csv"
    ok("train", data, *QUICK, "--output", model)
    on_stdout, _ = ok("predict", model, data)
    assert ok("predict", model, data, "--output", output)[0] == ""
    assert output.read_text() == on_stdout
    (tmp_path / "bad.csv").write_text("width,height\n1,two\n")
    refused("predict", model, tmp_path / "bad.csv", "--output", output)
    assert output.read_text() == on_stdout


def test_npz_with_a_test_part_and_images(ok, tmp_path):
    rng = np.random.default_rng(1)
    y = np.arange(120) % 3
    X = (rng.integers(0, 60, (120, 4, 4)) + 60 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "d.npz", X=X[:90], y=y[:90], X_test=X[90:], y_test=y[90:])
    out, _ = ok("train", tmp_path / "d.npz", "--output", tmp_path / "m")
    assert "90 rows to train on, 30 rows held out, as the data has them" in out
    predictions, err = ok("predict", tmp_path / "m", tmp_path / "d.npz")
    assert len(rows_of(predictions)) == 31
    assert score(err) == score(out) == 1


def test_parquet(ok, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    data = datasets.load("iris")
    columns = {name: data.X[:, i] for i, name in enumerate(data.features)}
    kind = [data.classes[label] for label in data.y]
    pq.write_table(pa.table({"kind": kind, **columns}), tmp_path / "d.parquet")
    out, _ = ok("train", tmp_path / "d.parquet", "--target", "kind", "--output", tmp_path / "m")
    assert score(out) >= 0.85
    _, err = ok("predict", tmp_path / "m", tmp_path / "d.parquet")
    assert score(err) >= 0.9


def test_a_model_without_notes_predicts_class_numbers(ok, tmp_path):
    bp.MLP([2, 3], seed=1).save(tmp_path / "m")
    (tmp_path / "d.csv").write_text("1,2\n3,4\n")
    out, _ = ok("predict", tmp_path / "m", tmp_path / "d.csv")
    assert {row[0] for row in rows_of(out)[1:]} <= {"0", "1", "2"}


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"needs the MNIST files in {MNIST}")
def test_mnist(ok, tmp_path):
    out, _ = ok("train", MNIST, "--epochs", 1, "--layers", "32", "--output", tmp_path / "m")
    assert "60,000 rows to train on, 10,000 rows held out" in out
    assert score(out) > 0.9
    predictions, err = ok("predict", tmp_path / "m", MNIST)
    assert score(err) == score(out)
    alone, _ = ok("predict", tmp_path / "m", MNIST / "t10k-images-idx3-ubyte.gz")
    assert alone == predictions


# Checkpoints, Ctrl-C, divergence


def test_a_checkpoint_is_resumed_and_only_the_final_model_is_folded(ok, refused, tmp_path, table, monkeypatch):
    data, checkpoint = table(), tmp_path / "c"
    command = ["train", data, *QUICK, "--seed", 3]
    ok(*command, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(bp.MLP, "fit", _interrupted_after_the_first_epoch)
        assert main([*map(str, command), "--checkpoint", str(checkpoint)]) == 130
    assert "is the checkpoint of a run" in refused("predict", checkpoint, data)
    ok(*command, "--checkpoint", checkpoint, "--output", tmp_path / "resumed")
    whole, resumed = (bp.load(tmp_path / name, backend="numpy") for name in ("whole", "resumed"))
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)
    assert resumed.metadata == whole.metadata
    assert "another seed" in refused(*command[:-1], 4, "--checkpoint", checkpoint)


fit = bp.MLP.fit


def _interrupted_after_the_first_epoch(net, *args, **settings):
    return fit(net, *args, **settings, callbacks=[lambda net, history: signal.raise_signal(signal.SIGINT)])


def test_ctrl_c_keeps_the_model_as_far_as_it_got(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bp.MLP, "fit", _interrupted_after_the_first_epoch)
    status, out, err = run("train", "digits", "--output", tmp_path / "m")
    assert (status, err) == (130, "")
    assert "for 1 epoch, " in out
    assert "(interrupted)" in out
    assert 0.5 < score(out) <= 1
    assert bp.load(tmp_path / "m").layer_sizes[0] == 64


def test_ctrl_c_elsewhere_is_one_line(refused, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load", interrupted)
    assert "interrupted" in refused("train", "digits", status=130)


def test_divergence_fails_and_leaves_the_old_model(refused, tmp_path):
    output = tmp_path / "m"
    output.write_text("what was there")
    message = refused("train", "wine", "--optimizer", "sgd", "--learning-rate", 1e9, "--output", output, status=1)
    assert "diverged" in message
    assert output.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [output]


# Mistakes: one line, status 2, no traceback

MISTAKES = [
    ([], "arguments are required: COMMAND"),
    (["trian", "digits"], "did you mean 'train'?"),
    (["train"], "arguments are required: DATA"),
    (["train", "digit"], "did you mean 'digits'?"),
    (["train", "no/such.csv"], "there is no file or folder no/such.csv"),
    (["train", "digits", "--epohcs", "3"], "unrecognized arguments"),
    (["train", "digits", "--epochs", "many"], "invalid int value: 'many'"),
    (["train", "digits", "--epochs", "0"], "epochs must be at least 1"),
    (["train", "digits", "--batch-size", "0"], "batch_size must be at least 1"),
    (["train", "digits", "--batch-size", "9999"], "larger than the 1438 training rows"),
    (["train", "digits", "--early-stopping", "0"], "patience must be at least 1"),
    (["train", "digits", "--activation", "rleu"], "did you mean 'relu'?"),
    (["train", "digits", "--activation", "relu,tanh,relu"], "one for each of the 2 hidden layers; got 3"),
    (["train", "digits", "--loss", "crossentropy"], "did you mean 'cross_entropy'?"),
    (["train", "digits", "--loss", "binary_cross_entropy"], "the target has 10"),
    (["train", "digits", "--loss", "huber", "--task", "classification"], "leave one of them out"),
    (["train", "iris", "--loss", "huber"], "needs numbers as target; got the text 'setosa'"),
    (["train", "diabetes", "--loss", "poisson", "--task", "regresion"], "did you mean 'regression'?"),
    (["train", "digits", "--optimizer", "adm"], "did you mean 'adam'?"),
    (["train", "digits", "--backend", "cpuu"], "did you mean 'cpu'?"),
    (["train", "digits", "--dtype", "float23"], "did you mean 'float32'?"),
    (["train", "digits", "--layers", "128;64"], "expected widths such as 128,64"),
    (["train", "digits", "--layers", "128,0"], "at least 1 neuron"),
    (["train", "digits", "--dropout", "half"], "expected a number"),
    (["train", "digits", "--dropout", "1.5"], "dropout must be in [0, 1)"),
    (["train", "digits", "--alpha", "-1"], "alpha must be at least 0"),
    (["train", "digits", "--learning-rate", "-1"], "must be a positive number"),
    (["train", "digits", "--seed", "-1"], "expected an integer in [0, 2^64)"),
    (["train", "digits", "--test-fraction", "1"], "must be in [0, 1)"),
    (["train", "digits", "--target", "y"], "no columns to choose from"),
    (["predict", "no/such/model", "digits"], "No such file or directory: no/such/model"),
    (["gradcheck", "--activation", "relu,tahn"], "did you mean 'tanh'?"),
    (["gradcheck", "--loss", "hubert"], "did you mean 'huber'?"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda value: " ".join(value) if value != [] else "nothing")
def test_mistakes(refused, argv, message):
    assert message in refused(*argv)


BROKEN = {
    "text.csv": "a,b,y\n1,red,0\n",
    "ragged.csv": "a,b,y\n1,2,0\n1,2\n",
    "gap.csv": "a,b,y\n1,,0\n",
    "empty.csv": "",
    "noise.npz": "PK and noise",
    "noise.parquet": "PAR1 and noise",
    "train-images-idx3-ubyte": "noise",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(refused, tmp_path, name):
    path = tmp_path / name
    path.write_text(BROKEN[name])
    assert str(path) in refused("train", tmp_path if "idx" in name else path)
    assert str(path) in refused("predict", path, "digits")


def test_unwritable_outputs_are_found_before_training(refused, tmp_path):
    assert "cannot write" in refused("train", "digits", "--output", tmp_path / "no" / "m")
    assert "not a plain file" in refused("train", "digits", "--output", tmp_path)
    assert "cannot write" in refused("train", "digits", "--checkpoint", tmp_path / "no" / "c")
    assert "named twice" in refused("train", "digits", "--output", tmp_path / "m", "--checkpoint", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_not_overwritten(refused, table):
    data = table()
    before = data.read_bytes()
    assert "named twice" in refused("train", data, "--output", data)
    assert data.read_bytes() == before


def test_models_that_do_not_fit(ok, refused, tmp_path):
    ok("train", "iris", *QUICK, "--output", tmp_path / "m")
    assert "has 13 features; the model takes 4" in refused("predict", tmp_path / "m", "wine")
    ok("train", "diabetes", *QUICK, "--output", tmp_path / "r")
    assert "has none" in refused("predict", tmp_path / "r", "diabetes", "--probabilities")
    net = bp.MLP([4, 3])
    net.metadata = {"classes": ["only one"]}
    net.save(tmp_path / "n")
    assert "does not fit its 3 classes" in refused("predict", tmp_path / "n", "iris")
    bp.MLP([4, 2], loss="binary_cross_entropy").save(tmp_path / "b")
    assert "not for the command line" in refused("predict", tmp_path / "b", "iris")


def test_a_backend_that_does_not_work_is_refused(refused):
    for status in bp.backends():
        if not status.works:
            assert "cannot work here" in refused("train", "digits", "--backend", status.name)


# info, gradcheck, help


def test_info(ok):
    out, _ = ok("info")
    assert f"backprop_gpu {bp.__version__}" in out
    assert np.__version__ in out
    for status in bp.backends():
        assert f"{status.name} " in out
        assert status.reason in out


def test_gradcheck_passes(ok):
    out, _ = ok("gradcheck", "--activation", "relu,gelu", "--backend", "numpy")
    header, relu, gelu, verdict = out.splitlines()
    assert header.split()[0] == "activation"
    assert (relu.split()[0], len(relu.split())) == ("relu", 7)
    assert all(float(error) <= 1e-7 for error in gelu.split()[1:])
    assert verdict.startswith("PASS: 12 of 12")


def test_gradcheck_covers_everything_by_default():
    arguments = cli._parser(dict.fromkeys(cli._COMMANDS, len)).parse_args(["gradcheck"])
    assert cli._chosen("activation", arguments.activation, bp.ACTIVATIONS) == list(bp.ACTIVATIONS)
    assert len(cli._chosen("loss", arguments.loss, cli.LOSSES)) == 6


@pytest.mark.parametrize("worst", [1e-3, float("nan")])
def test_gradcheck_fails(run, monkeypatch, worst):
    layer = bp.gradcheck(bp.MLP([2, 2]), [[1.0, 2.0]], [1]).layers[0]
    broken = type(layer)(worst, worst, layer.checked, layer.skipped)
    monkeypatch.setattr(bp, "gradcheck", lambda *args, **settings: cli.GradCheck((broken,)))
    status, out, err = run("gradcheck", "--activation", "tanh", "--loss", "huber")
    assert status == 1
    assert "FAIL: 0 of 1" in out
    assert err == "backprop-gpu: error: backpropagation and finite differences disagree for tanh with huber\n"


def test_help_and_version(ok):
    assert ok("--version")[0] == f"backprop_gpu {bp.__version__}\n"
    assert "backprop-gpu train digits" in ok("--help")[0]
    out, _ = ok("train", "--help")
    for text in ("breast_cancer", "train-images-idx3-ubyte", ".parquet", "--early-stopping PATIENCE", "256,128"):
        assert text in out
    assert out.isascii()


# The console script


def test_script_trains_without_a_bar_where_stderr_is_no_terminal(script):
    done = script("train", "iris", "--epochs", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "held out" in done.stdout


def test_script_fails_in_one_line(script):
    done = script("train", "digits", "--activation", "rleu")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"backprop-gpu: error: .*did you mean 'relu'.*\n", done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="closes a POSIX pipe before the report is written")
def test_script_is_quiet_where_nobody_reads_and_still_saves(script, tmp_path):
    read, write = os.pipe()
    os.close(read)
    path = shutil.which("backprop-gpu", path=os.path.dirname(sys.executable))
    for argv in (["info"], ["train", "iris", "--epochs", "2", "--output", str(tmp_path / "m")]):
        done = subprocess.run([path, *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    os.close(write)
    assert bp.load(tmp_path / "m").layer_sizes[-1] == 3
