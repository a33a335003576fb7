"""What tests of whole training steps share."""

import pytest

from backprop_gpu import training

every_split = pytest.mark.parametrize(
    "split",
    [
        {"split_rows": True},
        {"split_rows": True, "copies": True},
        {"split_rows": False},
        {"split_rows": False, "split_columns": True},
    ],
    ids=["rows", "rows, with copies", "blocks", "columns"],
)


def trainer_of(net, X, y, batch_size, optimizer, sample_weight=None):
    job = training._job(net, optimizer, net._take_in(X, y, sample_weight), batch_size, 0)
    return training._trainer(net, job), job
