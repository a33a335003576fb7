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
