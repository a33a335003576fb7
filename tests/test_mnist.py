"""MNIST at its real size, where the data is at hand."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import backprop_gpu as bp

MNIST = Path(__file__).parents[2] / "shared/data/mnist"

pytestmark = pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST's IDX files in ../shared/data/mnist")


def read(name, header):
    return np.frombuffer(gzip.decompress((MNIST / name).read_bytes()), np.uint8, offset=header)


@pytest.fixture(scope="module")
def mnist():
    def images(name):
        return read(name, 16).reshape(-1, 784).astype(np.float32) / 255

    train = images("train-images-idx3-ubyte.gz"), read("train-labels-idx1-ubyte.gz", 8)
    return train, (images("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz", 8))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_98_percent_of_the_test_digits_within_10_epochs(seed, mnist):
    (X, y), test = mnist
    net = bp.MLP([784, 256, 128, 10], seed=seed)
    net.fit(X, y, epochs=10, batch_size=128, optimizer=bp.Adam(bp.Cosine(2e-3)))
    accuracy = net.evaluate(*test)["accuracy"]
    print(f"seed {seed}: {accuracy:.2%}")
    assert accuracy >= 0.98


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learns_run(mnist):
    """Two epochs of 10,000 rows, in float32: the same loss curve, and as many test digits right."""
    theirs = pytest.importorskip("sklearn.neural_network")
    from backprop_gpu import sklearn as ours

    (X, y), (X_test, y_test) = mnist
    settings = {"hidden_layer_sizes": (256, 128), "max_iter": 2, "random_state": 0}
    a, b = (module.MLPClassifier(**settings).fit(X[:10_000], y[:10_000]) for module in (ours, theirs))
    assert np.abs(np.array(a.loss_curve_) / b.loss_curve_ - 1).max() <= 1e-3
    assert abs(a.score(X_test, y_test) - b.score(X_test, y_test)) <= 2e-3
    assert a.score(X_test, y_test) >= 0.9
