"""Keeping work: model files, checkpoints, and runs that are killed and resumed."""

import os
import pickle
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backprop_gpu as bp
from backprop_gpu import storage

N, FEATURES, CLASSES = 61, 4, 3

pytestmark = pytest.mark.usefixtures("on_every_backend")


@pytest.fixture
def X():
    return np.random.default_rng(0).standard_normal((N, FEATURES))


@pytest.fixture
def y():
    return np.random.default_rng(1).integers(0, CLASSES, N)


def make_net(**options):
    return bp.MLP([FEATURES, 8, 5, CLASSES], ["gelu", "tanh"], dropout=[0.1, 0.2], alpha=0.01, seed=5, **options)


# Model files


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_network_comes_back_whole(tmp_path, dtype, X, y):
    net = make_net(dtype=dtype, loss=bp.CrossEntropy(label_smoothing=0.1))
    net.fit(X, y, epochs=1)
    net.metadata["classes"] = ["a", "b", "c"]
    net.save(tmp_path / "net.safetensors")
    again = bp.load(tmp_path / "net.safetensors")
    assert again.architecture == net.architecture
    assert np.array_equal(again.parameters, net.parameters)
    assert (again.dtype, again.seed, again.metadata) == (net.dtype, net.seed, net.metadata)
    assert np.array_equal(again.predict_proba(X), net.predict_proba(X))
    # Training goes on as it would have without the detour.
    assert again.fit(X, y, epochs=1) == net.fit(X, y, epochs=1)
    assert np.array_equal(again.parameters, net.parameters)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error", "absolute_error", "huber", "poisson"])
def test_every_loss_is_saved(tmp_path, loss):
    net = bp.MLP([3, 2], loss=loss)
    net.save(tmp_path / "net")
    assert bp.load(tmp_path / "net").architecture == net.architecture


def test_a_model_file_is_plain_safetensors(tmp_path):
    net = make_net()
    net.save(tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    assert sorted(tensors) == ["W.0", "W.1", "W.2", "b.0", "b.1", "b.2"]
    assert all(np.array_equal(tensors[f"W.{i}"], W) for i, W in enumerate(net.W))
    assert all(np.array_equal(tensors[f"b.{i}"], b) for i, b in enumerate(net.b))


def test_the_file_gets_the_permissions_of_any_new_file(tmp_path):
    make_net().save(tmp_path / "net")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_saving_through_a_link_writes_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "net")
    make_net().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert bp.load(tmp_path / "net").architecture == make_net().architecture


def damaged(path, change):
    """The file at `path`, written anew with its tensors and metadata changed, and a checksum that fits."""
    tensors, metadata = storage.read(path)
    change(tensors, metadata)
    storage.write(path, tensors, metadata)


def change_architecture(**values):
    return lambda tensors, metadata: metadata["architecture"].update(values)


def change(**values):
    return lambda tensors, metadata: metadata.update(values)


DAMAGE = {
    "no metadata": lambda tensors, metadata: metadata.clear(),
    "missing tensor": lambda tensors, metadata: tensors.pop("b.1"),
    "wrong shape": lambda tensors, metadata: tensors.update({"W.0": tensors["W.0"].T.copy()}),
    "no architecture": lambda tensors, metadata: metadata.pop("architecture"),
    "architecture a list": change(architecture=[1]),
    "huge layer": change_architecture(layer_sizes=[10**15, 10**15]),
    "unknown activation": change_architecture(activation=["evil", "tanh"]),
    "unknown loss": change_architecture(loss="evil"),
    "unknown key": change_architecture(evil=1),
    "loss settings": change_architecture(loss_settings={"evil": 1}),
    "bad dtype": change(dtype="int8"),
    "bad seed": change(seed="x"),
    "bad rng": change(rng={"bit_generator": "PCG64", "state": 1}),
    "negative rng": lambda tensors, metadata: metadata["rng"]["state"].update(state=-1),
    "foreign rng": change(rng=7),
    "bad notes": change(notes=3),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, case):
    path = tmp_path / "net.safetensors"
    make_net().save(path)
    damaged(path, DAMAGE[case])
    with pytest.raises(ValueError, match=r"net\.safetensors") as caught:
        bp.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"backprop_gpu": ""}, {"backprop_gpu": "{}"}])
def test_another_librarys_safetensors_are_refused(tmp_path, header):
    save_file({"W.0": np.ones((2, 2))}, tmp_path / "net", header)
    with pytest.raises(ValueError, match=r"not a model saved by backprop_gpu|is damaged"):
        bp.load(tmp_path / "net")


def test_a_file_of_a_later_format_is_refused_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "VERSION", 999)
    make_net().save(tmp_path / "net")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format version 999.*a newer release may read it"):
        bp.load(tmp_path / "net")


def test_no_flipped_bit_goes_unnoticed(tmp_path, X, y):
    path = tmp_path / "net"
    make_net().fit(X, y, epochs=1, checkpoint=path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position, bit in zip(rng.integers(0, len(content), 300), rng.integers(0, 8, 300), strict=True):
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged|not a model|format version"):
            bp.load(path)


def test_a_private_file_stays_private(tmp_path):
    make_net().save(tmp_path / "net")
    (tmp_path / "net").chmod(0o600)
    make_net().save(tmp_path / "net")
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o600


def test_the_same_network_is_saved_to_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_net().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("content", [b"", b"x", b"hello world, this is no model", pickle.dumps({"W": 1}), b"\xff" * 64])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "net").write_bytes(content)
    with pytest.raises(ValueError, match="not a model file"):
        bp.load(tmp_path / "net")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    make_net().save(tmp_path / "net")
    content = (tmp_path / "net").read_bytes()
    (tmp_path / "net").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a model file"):
        bp.load(tmp_path / "net")


def test_numpy_scalars_are_saved_as_numbers(tmp_path, X, y):
    net = make_net(loss=bp.CrossEntropy(np.float32(0.125)))
    net.metadata["best"] = np.float64(0.5)
    net.fit(X, y, epochs=1, optimizer=bp.Adam(np.float32(0.01)), checkpoint=tmp_path / "run")
    again = bp.load(tmp_path / "run")
    assert (again.architecture, again.metadata) == (net.architecture, {"best": 0.5})
    net.metadata["object"] = object()
    with pytest.raises(TypeError, match="not JSON-ready"):
        net.save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_an_unknown_backend_is_no_fault_of_the_file(tmp_path):
    make_net().save(tmp_path / "net")
    with pytest.raises(ValueError, match=r"^unknown backend"):
        bp.load(tmp_path / "net", backend="nunpy")


def test_a_missing_file_or_a_folder_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        bp.load(tmp_path / "none")
    with pytest.raises(OSError, match="directory"):
        bp.load(tmp_path)


@pytest.mark.parametrize("target", ["missing/net", ".", "file/net"])
def test_an_unwritable_path_is_an_oserror_before_any_training(tmp_path, target, X, y):
    (tmp_path / "file").touch()
    net, path = make_net(), tmp_path / target
    with pytest.raises(OSError, match=re.escape(str(path))):
        net.save(path)
    before = net.parameters.copy()
    with pytest.raises(OSError, match=re.escape(str(path))):
        net.fit(X, y, checkpoint=path)
    assert np.array_equal(net.parameters, before)


def test_a_device_file_is_not_replaced():
    with pytest.raises(OSError, match="not a plain file"):
        make_net().save(os.devnull)


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path):
    make_net().save(tmp_path / "net")
    before = (tmp_path / "net").read_bytes()
    # A limit on the size of files stands in for the full disk: the write fails half-way, just so.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"too large.*net"):
            bp.MLP([100, 100, 10]).save(tmp_path / "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "net").read_bytes() == before
    assert os.listdir(tmp_path) == ["net"]


# Checkpoints

RUN = """
import os, signal, sys
import numpy as np
import backprop_gpu as bp
from tqdm import tqdm

path, kill_after = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
X, y, w = rng.standard_normal((61, 4)), rng.integers(0, 3, 61), rng.random(61)
net = bp.MLP([4, 8, 5, 3], ["gelu", "tanh"], dropout=[0.1, 0.2], alpha=0.01, seed=5)
net.fit(X, y, epochs=1)  # so that the run starts in the middle of the random stream

def kill(net, history):
    if len(history) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

rows = [0]
def kill_in_the_middle(bar, n_rows):
    rows[0] += n_rows
    if 0 < -kill_after * 7 <= rows[0]:
        os.kill(os.getpid(), signal.SIGKILL)
tqdm.update = kill_in_the_middle

history = net.fit(
    X, y, epochs=12, batch_size=7, sample_weight=w, validation_fraction=0.2, checkpoint=path, callbacks=[kill],
    optimizer=bp.Adam(bp.Cosine(0.05, warmup_steps=10), clip_norm=1.0), early_stopping=bp.EarlyStopping(patience=4),
)
sys.stdout.buffer.write(repr((history.metrics, history.stopped, history.best_epoch)).encode() + b"|")
sys.stdout.buffer.write(net.parameters.tobytes())
"""


def run_and_kill(path, kill_after):
    """The run in a process of its own, killed after that many epochs, or after update −kill_after, about."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(RUN), path, str(kill_after)], capture_output=True)


def test_a_killed_run_ends_with_the_same_bits_when_resumed(tmp_path):
    whole = run_and_kill(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    for kill_after in (3, -12, 5):  # after epoch 3; in the middle of epoch 5, between two checkpoints; after epoch 5
        killed = run_and_kill(tmp_path / "killed", kill_after)
        assert killed.returncode == -signal.SIGKILL
    resumed = run_and_kill(tmp_path / "killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert b"early stopping" in whole.stdout
    assert resumed.stdout == whole.stdout
    assert bp.load(tmp_path / "killed").steps_taken == bp.load(tmp_path / "whole").steps_taken


def test_a_finished_run_is_not_trained_again(tmp_path, X, y):
    net, again = make_net(), make_net()
    history = net.fit(X, y, epochs=3, checkpoint=tmp_path / "run")
    assert again.fit(X, y, epochs=3, checkpoint=tmp_path / "run") == history
    assert np.array_equal(again.parameters, net.parameters)
    longer, whole = make_net(), make_net()
    assert longer.fit(X, y, epochs=5, checkpoint=tmp_path / "run") == whole.fit(X, y, epochs=5)
    assert np.array_equal(longer.parameters, whole.parameters)


def test_the_held_out_rows_are_the_same_wherever_the_run_is_resumed(tmp_path, X, y):
    settings = {"validation_fraction": 0.3, "checkpoint": tmp_path / "run"}
    whole, other = make_net(), make_net()
    make_net().fit(X, y, epochs=2, **settings)
    other.fit(X, y, epochs=1)  # its random state is not that of the run which it resumes
    assert other.fit(X, y, epochs=4, **settings) == whole.fit(X, y, epochs=4, validation_fraction=0.3)
    assert np.array_equal(other.parameters, whole.parameters)
    assert other.steps_taken == whole.steps_taken


def test_other_data_that_begins_alike_is_refused(tmp_path, X, y):
    make_net().fit(X, y, epochs=1, checkpoint=tmp_path / "run")
    other = X.copy()
    other[1:] += 1
    with pytest.raises(ValueError, match="run with another data"):
        make_net().fit(other, y, epochs=2, checkpoint=tmp_path / "run")


def test_a_run_that_a_callback_ended_stays_ended(tmp_path, X, y):
    def run():
        net = make_net()
        settings = {"checkpoint": tmp_path / "run", "callbacks": [lambda net, history: len(history) == 3]}
        return net.fit(X, y, epochs=9, **settings), net.parameters

    (history, parameters), (again, parameters_again) = run(), run()
    assert (history.stopped, len(history)) == ("callback", 3)
    assert again == history
    assert np.array_equal(parameters_again, parameters)


def test_a_checkpoint_holds_what_a_callback_changed(tmp_path, X, y):
    def halve(net, history):
        net.parameters[...] *= 0.5

    net = make_net()
    net.fit(X, y, epochs=2, checkpoint=tmp_path / "run", callbacks=[halve])
    assert np.array_equal(bp.load(tmp_path / "run").parameters, net.parameters)


def test_the_same_optimizer_written_otherwise_is_the_same(tmp_path, X, y):
    make_net().fit(X, y, epochs=1, checkpoint=tmp_path / "run", optimizer=bp.Adam(np.float64(1e-3)))
    make_net().fit(X, y, epochs=2, checkpoint=tmp_path / "run", optimizer=bp.Adam(bp.Constant(1e-3)))
    with pytest.raises(ValueError, match=r"another optimizer \(\{'beta_1': 0.9\}, now \{'beta_1': 0.5\}\)"):
        make_net().fit(X, y, epochs=2, checkpoint=tmp_path / "run", optimizer=bp.Adam(1e-3, beta_1=0.5))
    with pytest.raises(ValueError, match=r"another optimizer .*'epsilon_hat': True"):
        make_net().fit(X, y, epochs=2, checkpoint=tmp_path / "run", optimizer=bp.Adam(1e-3, epsilon_hat=True))


def test_notes_that_cannot_be_written_are_refused_before_the_first_epoch(tmp_path, X, y):
    net = make_net()
    net.metadata["object"] = object()
    with pytest.raises(TypeError, match="not JSON-ready"):
        net.fit(X, y, checkpoint=tmp_path / "run")
    assert net.steps_taken == 0


def test_a_checkpoint_is_also_a_model(tmp_path, X, y):
    net = make_net()
    net.fit(X, y, epochs=2, checkpoint=tmp_path / "run")
    assert np.array_equal(bp.load(tmp_path / "run").parameters, net.parameters)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("optimizer", {"optimizer": "sgd"}),
        ("batch_size", {"batch_size": 5}),
        ("shuffle", {"shuffle": False}),
        ("validation", {"validation_fraction": 0.5}),
        ("early_stopping", {"early_stopping": True}),
        ("data", {"sample_weight": np.arange(1, N + 1)}),
        ("data", {"X": np.ones((N, FEATURES))}),
        ("validation", {"validation_data": (np.zeros((2, FEATURES)), [0, 1])}),
    ],
)
def test_another_runs_checkpoint_is_refused_and_kept(tmp_path, what, change, X, y):
    make_net().fit(X, y, epochs=1, checkpoint=tmp_path / "run")
    content, net = (tmp_path / "run").read_bytes(), make_net()
    before = net.parameters.copy()
    with pytest.raises(ValueError, match=f"run with another .*{what}"):
        net.fit(**{"X": X, "y": y, "epochs": 2, "checkpoint": tmp_path / "run", **change})
    assert np.array_equal(net.parameters, before)
    assert (tmp_path / "run").read_bytes() == content


def change_training(**values):
    return lambda tensors, metadata: metadata["training"].update(values)


def change_history(**values):
    return lambda tensors, metadata: metadata["training"]["history"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.pop("optimizer.m.W.0"),
        lambda tensors, metadata: tensors.update({"optimizer.m.W.0": np.ones(1)}),
        lambda tensors, metadata: tensors.update({"best.W.0": np.ones(1)}),
        lambda tensors, metadata: metadata.update(training={}),
        lambda tensors, metadata: metadata.pop("rng"),
        change_training(start_rng=None),
        change_training(step="x"),
        change_history(metrics=None),
        change_history(metrics={"loss": [1.0, 2.0]}),
        change_history(best_epoch=7),
        change_history(evil=1),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, change, X, y):
    make_net().fit(X, y, epochs=1, checkpoint=tmp_path / "run")
    damaged(tmp_path / "run", change)
    assert_refused(tmp_path / "run", "damaged checkpoint", X, y)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: make_net().save(path), "without a training run"),
        (lambda path: path.write_bytes(b"hello"), "not a model file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path, spoil, message, X, y):
    spoil(tmp_path / "run")
    assert_refused(tmp_path / "run", message, X, y)


def assert_refused(path, message, X, y):
    """Neither the network nor the file changes."""
    content, net = path.read_bytes(), make_net()
    before, rng = net.parameters.copy(), net.rng.bit_generator.state
    with pytest.raises(ValueError, match=message):
        net.fit(X, y, epochs=2, checkpoint=path)
    assert np.array_equal(net.parameters, before)
    assert net.rng.bit_generator.state == rng
    assert path.read_bytes() == content
