"""`fit`, `predict` and `GridSearchCV`: scikit-learn's MLPClassifier, and ours in its place."""

import pytest

from bench.estimators import JOBS

CONTENDERS = ("estimator", "sklearn")

SAMPLES = 3


@pytest.mark.parametrize("job", JOBS)
def test_estimator(job, contender, arena, rivals, replay):
    """The same settings, the same weights to begin with."""
    if reason := JOBS[job].missing():
        pytest.skip(reason)
    replay(f"estimator, {job}", lambda: arena.estimated(job, rivals, rounds=SAMPLES))
