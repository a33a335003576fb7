"""MLPClassifier and MLPRegressor: scikit-learn's checks, scikit-learn's run, and what they have more than it.

scikit-learn's own test suite of its MLP runs in test_sklearn_own_suite.py.
"""

import copy
import doctest
import inspect
import pickle
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

import scipy.sparse
import sklearn
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelBinarizer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import backprop_gpu as bp
from backprop_gpu import sklearn as ours
from backprop_gpu.backends.numpy import NumpyBackend

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

NAMES = ("MLPClassifier", "MLPRegressor")


@parametrize_with_checks([ours.MLPClassifier(), ours.MLPRegressor()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_importing_the_package_does_not_import_scikit_learn():
    code = "import sys, backprop_gpu; print('sklearn' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_is_scikit_learns_and_the_rest_is_keyword_only(name):
    parameters = inspect.signature(getattr(ours, name)).parameters
    expected = inspect.signature(getattr(theirs, name)).parameters
    if "loss" in expected or name == "MLPClassifier":  # scikit-learn 1.6 has no loss in its regressor
        assert list(parameters)[: len(expected)] == list(expected)
    for parameter in parameters.values():
        if parameter.name in expected:
            assert parameter.default == expected[parameter.name].default
        else:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.name == "loss"


def test_the_docstrings_examples_print_what_they_say():
    assert doctest.testmod(ours) == (0, 19)


# The same run


def problems():
    X_digits, y_digits = load_digits(return_X_y=True)
    X_cancer, y_cancer = load_breast_cancer(return_X_y=True)
    X_labels, Y_labels = make_multilabel_classification(301, random_state=0)
    X_values, Y_values = make_regression(333, 12, n_targets=3, random_state=0)
    Y_values /= Y_values.std(axis=0)
    return {
        "multi-class": ("MLPClassifier", X_digits[:777] / 16, y_digits[:777]),
        "binary": ("MLPClassifier", StandardScaler().fit_transform(X_cancer), y_cancer),
        "multi-label": ("MLPClassifier", X_labels, Y_labels),
        "one value": ("MLPRegressor", X_values, Y_values[:, 0]),
        "three values": ("MLPRegressor", X_values, Y_values),
        "counts": ("MLPRegressor", X_values, np.floor(np.exp(Y_values))),
    }


PROBLEMS = problems()

SGD = {
    "nesterov": {"learning_rate_init": 0.05},
    "momentum": {"nesterovs_momentum": False, "batch_size": 64, "alpha": 0.1},
    "plain": {"momentum": 0, "shuffle": False, "hidden_layer_sizes": 7},
    "momentum of one": {"momentum": 1.0, "learning_rate_init": 1e-4},
    "invscaling": {"learning_rate": "invscaling", "learning_rate_init": 0.05, "activation": "tanh"},
    "adaptive": {"learning_rate": "adaptive", "tol": 0.05, "n_iter_no_change": 2, "alpha": 1.0},
    "early stopping": {"early_stopping": True, "activation": "logistic", "learning_rate_init": 0.1, "batch_size": 50},
    "stops early": {"early_stopping": True, "tol": 0.5, "n_iter_no_change": 3},
    "a row at a time": {"batch_size": 1, "max_iter": 2, "activation": "identity", "learning_rate_init": 1e-4},
    "no hidden layer": {"hidden_layer_sizes": (), "activation": "logistic"},
}

FITTED = ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_")
CURVES = ("loss_curve_", "validation_scores_", "best_loss_", "best_validation_score_", "loss_")


def both(name, X, y, sample_weight=None, backend="numpy", **settings):
    """Our model and scikit-learn's, fitted alike; a skip where this scikit-learn, before 1.7, has less."""
    settings = {"hidden_layer_sizes": (30, 20), "random_state": 3, "max_iter": 20, **settings}
    weight = {} if sample_weight is None else {"sample_weight": sample_weight}
    expected = getattr(theirs, name)
    if not {*settings, *weight} <= {
        *inspect.signature(expected).parameters,
        *inspect.signature(expected.fit).parameters,
    }:
        pytest.skip(f"scikit-learn {sklearn.__version__} has no such setting")
    actual = getattr(ours, name)(backend=backend, **settings)
    return actual.fit(X, y, **weight), expected(**settings).fit(X, y, **weight)


def assert_same(actual, expected, tolerance):
    """Within the tolerance of the largest entry, and finite; None is None."""
    if expected is None:
        assert actual is None
        return
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1e-300)


def assert_same_run(a, b, tolerance=1e-9):
    assert {name: getattr(a, name) for name in FITTED} == {name: getattr(b, name) for name in FITTED}
    for W, W_expected in zip(a.coefs_ + a.intercepts_, b.coefs_ + b.intercepts_, strict=True):
        assert W.dtype == W_expected.dtype
        assert_same(W, W_expected, tolerance)
    for name in CURVES:
        assert_same(getattr(a, name), getattr(b, name), tolerance)


@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_sgd_makes_the_same_run(problem, settings):
    name, X, y = PROBLEMS[problem]
    if problem == "counts":
        settings = {"loss": "poisson", "learning_rate_init": 1e-4, **settings}
    assert_same_run(*both(name, X, y, solver="sgd", **settings))


@pytest.mark.parametrize("problem", ["multi-class", "binary", "multi-label", "one value", "three values"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_sgd_makes_the_same_run_with_weights(problem, early_stopping):
    name, X, y = PROBLEMS[problem]
    weight = np.random.default_rng(0).integers(0, 4, len(X))
    assert_same_run(*both(name, X, y, weight, solver="sgd", early_stopping=early_stopping, batch_size=90))


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_adam_makes_the_same_run(problem, activation):
    name, X, y = PROBLEMS[problem]
    loss = {"loss": "poisson"} if problem == "counts" else {}
    # A rounding in a tiny gradient is magnified by Adam, so the parameters agree to fewer digits than with sgd.
    a, b = both(name, X, y, activation=activation, **loss)
    assert_same_run(a, b, 1e-6)
    assert np.abs(np.array(a.loss_curve_) / b.loss_curve_ - 1).max() <= 1e-3


@pytest.mark.parametrize("problem", PROBLEMS)
def test_adam_has_the_same_loss_curve_on_every_backend(problem, on_every_backend):
    name, X, y = PROBLEMS[problem]
    loss = {"loss": "poisson", "learning_rate_init": 1e-4} if problem == "counts" else {}
    a, b = both(name, X, y, backend="auto", max_iter=100, **loss)
    assert a.n_iter_ == b.n_iter_
    assert np.abs(np.array(a.loss_curve_) / b.loss_curve_ - 1).max() <= 1e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_lbfgs_has_the_same_loss(problem, weighted):
    name, X, y = PROBLEMS[problem]
    weight = np.random.default_rng(0).uniform(0, 3, len(X)) if weighted else None
    a, b = both(name, X, y, weight, solver="lbfgs", activation="tanh", alpha=0.01)
    assert_same(a.loss_, b.loss_, 1e-3)
    assert a.n_iter_ == b.n_iter_
    if weight is None:
        assert_same(a.coefs_[0], b.coefs_[0], 1e-6)


def test_lbfgs_takes_many_rows_in_several_passes(monkeypatch):
    monkeypatch.setattr(bp.MLP, "_chunks", lambda net, n: [slice(i, min(i + 100, n)) for i in range(0, n, 100)])
    name, X, y = PROBLEMS["three values"]
    weight = np.arange(len(X)) % 3
    a, b = both(name, X, y, weight, solver="lbfgs", activation="tanh", alpha=0.1)
    assert_same(a.coefs_[0], b.coefs_[0], 1e-6)


def test_partial_fit_makes_the_same_run():
    _, X, y = PROBLEMS["multi-class"]
    a = ours.MLPClassifier(solver="sgd", random_state=1, backend="numpy", learning_rate="invscaling")
    b = theirs.MLPClassifier(solver="sgd", random_state=1, learning_rate="invscaling")
    for start in range(0, 700, 100):
        rows = slice(start, start + 100)
        for model in (a, b):
            model.partial_fit(X[rows], y[rows], classes=np.arange(10))
        a = pickle.loads(pickle.dumps(a))  # the optimizer's state goes along
    assert_same_run(a, b)


@pytest.mark.parametrize(
    "y",
    [
        [3, -1, 7, 3, 7],
        ["b", "aa", "c", "b", "c"],
        [True, False, True, True, False],
        [5, 9, 9, 5, 5],
        [2, 2, 2, 2, 2],
        [1.0, 0.0, 2.0, 1.0, 2.0],
        [[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]],
    ],
    ids=["integers", "strings", "booleans", "two", "one", "floats", "multi-label"],
)
def test_classes_are_told_apart_as_by_a_label_binarizer(y):
    X, y = np.random.default_rng(0).standard_normal((5, 3)), np.array(y)
    model = ours.MLPClassifier(hidden_layer_sizes=(4,), max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    expected = LabelBinarizer().fit(y)
    for some in (y, y[1:3], y[:1]):
        indicators = model._indicators(some)
        assert indicators.dtype == bool
        assert np.array_equal(indicators, expected.transform(some).astype(bool))


def test_partial_fit_goes_on_with_the_memory_of_its_last_call():
    _, X, y = PROBLEMS["multi-class"]
    a, b = (ours.MLPClassifier(random_state=1, backend="cpu") for _ in range(2))
    kept = []
    for start in range(0, 700, 100):
        rows = slice(start, start + 100)
        a.partial_fit(X[rows], y[rows], classes=np.arange(10))
        kept.append(a._optimizer.trainer)
        b = pickle.loads(pickle.dumps(b)).partial_fit(X[rows], y[rows], classes=np.arange(10))  # without memory
    assert_same(a.coefs_[0], b.coefs_[0], 0)
    assert all(trainer is kept[0] is not None for trainer in kept)
    c = ours.MLPRegressor(solver="sgd", learning_rate_init=1e300)
    with pytest.raises(ValueError, match="non-finite"):
        c.partial_fit(X, y)
    assert c._optimizer.trainer is None


@pytest.mark.parametrize("problem", ["binary", "three values"])
def test_a_warm_start_makes_the_same_run(problem):
    name, X, y = PROBLEMS[problem]
    a, b = both(name, X, y, solver="sgd", warm_start=True, max_iter=3, learning_rate="invscaling")
    for model in (a, b):
        model.set_params(max_iter=5).fit(X, y)
    assert len(a.loss_curve_) == 8
    assert_same_run(a, b)


def test_random_state_goes_on_as_scikit_learns_does():
    _, X, y = PROBLEMS["binary"]
    states = [np.random.RandomState(5), np.random.RandomState(5)]
    ours.MLPClassifier(max_iter=2, random_state=states[0]).fit(X, y)
    theirs.MLPClassifier(max_iter=2, random_state=states[1]).fit(X, y)
    assert states[0].uniform() == states[1].uniform()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_float32_and_every_backend_run_alike(problem, on_every_backend):
    name, X, y = PROBLEMS[problem]
    loss = {"loss": "poisson", "learning_rate_init": 1e-4} if problem == "counts" else {}
    a, b = both(name, X.astype(np.float32), y, solver="sgd", backend="auto", **loss)
    assert a.coefs_[0].dtype == np.float32
    assert_same(a.loss_curve_, b.loss_curve_, 1e-4)
    assert_same(a.coefs_[0], b.coefs_[0], 1e-3)


@pytest.mark.parametrize("container", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_sparse_rows_make_the_same_run(container, solver):
    name, X, y = PROBLEMS["multi-class"]
    dense, _ = both(name, X, y, solver=solver)
    sparse = clone(dense).fit(container(X), y)
    assert_same(sparse.coefs_[0], dense.coefs_[0], 1e-9)
    assert (sparse.predict(container(X)) == dense.predict(X)).all()


def test_the_penalty_of_several_outputs_is_counted_once():
    """For K outputs the reported loss is C / K, but its penalty is whole."""
    _, X, y = PROBLEMS["three values"]
    a, b = both("MLPRegressor", X, y, solver="sgd", alpha=10.0, max_iter=1, batch_size=100)
    assert_same(a.loss_, b.loss_, 1e-12)


def test_verbose_prints_what_scikit_learn_prints(capsys):
    _, X, y = PROBLEMS["binary"]
    printed = []
    for module, more in ((ours, {"backend": "numpy"}), (theirs, {})):
        settings = {"solver": "sgd", "learning_rate": "adaptive", "early_stopping": True, "tol": 0.9, "max_iter": 90}
        module.MLPClassifier(random_state=0, verbose=True, n_iter_no_change=2, **settings, **more).fit(X, y)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "Setting learning rate to" in printed[0]
    assert "Learning rate too small. Stopping." in printed[0]


# The estimator's manners


def test_predictions_are_scikit_learns():
    for name, X, y in PROBLEMS.values():
        model = getattr(ours, name)(max_iter=5, random_state=0).fit(X, y)
        other = model.to_sklearn()
        assert np.asarray(model.predict(X)).dtype == other.predict(X).dtype
        if name == "MLPClassifier":
            assert (model.predict(X) == other.predict(X)).all()
            np.testing.assert_allclose(model.predict_proba(X), other.predict_proba(X), rtol=1e-9)
            np.testing.assert_allclose(model.predict_log_proba(X), other.predict_log_proba(X), rtol=1e-9, atol=1e-12)
        else:
            np.testing.assert_allclose(model.predict(X), other.predict(X), rtol=1e-9, atol=1e-12)
        assert abs(model.score(X, y) - other.score(X, y)) <= 1e-12


def test_string_labels_pipelines_searches_and_copies():
    _, X, y = PROBLEMS["binary"]
    labels = np.array(["malignant", "benign"])[y]
    pipeline = make_pipeline(StandardScaler(), ours.MLPClassifier(max_iter=20, random_state=0))
    assert cross_val_score(pipeline, X, labels, cv=3).min() > 0.9
    search = GridSearchCV(
        ours.MLPClassifier(max_iter=3, random_state=0), {"alpha": [0.1, 1], "dropout": [0, 0.3]}, cv=2
    )
    best = search.fit(X, labels).best_estimator_
    assert set(best.predict(X)) <= {"malignant", "benign"}
    for again in (pickle.loads(pickle.dumps(best)), copy.deepcopy(best)):
        np.testing.assert_array_equal(again.predict_proba(X), best.predict_proba(X))
        assert not np.shares_memory(again.coefs_[0], best.coefs_[0])


def test_a_search_in_two_processes_ends():
    _, X, y = PROBLEMS["multi-class"]
    grid = {"alpha": [1e-4, 1e-2], "hidden_layer_sizes": [(8,), (16,)]}
    search = GridSearchCV(ours.MLPClassifier(max_iter=2, random_state=0), grid, cv=2, n_jobs=2).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_weights_are_routed():
    with sklearn.config_context(enable_metadata_routing=True):
        model = ours.MLPClassifier(max_iter=2).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        _, X, y = PROBLEMS["binary"]
        scores = cross_val_score(model, X, y, params={"sample_weight": np.arange(len(X))}, cv=2)
    assert np.isfinite(scores).all()


def test_parameters_assigned_or_changed_in_place_are_the_models():
    _, X, y = PROBLEMS["one value"]
    model = ours.MLPRegressor(hidden_layer_sizes=(5,), max_iter=2, random_state=0, backend="numpy").fit(X, y)
    before = model.predict(X)
    model.intercepts_[1] += 1
    np.testing.assert_allclose(model.predict(X), before + 1)
    model.intercepts_[1] = model.intercepts_[1] + 1
    np.testing.assert_allclose(model.predict(X), before + 2)
    model.coefs_ = [np.zeros_like(W) for W in model.coefs_]
    assert np.ptp(model.predict(X)) == 0


def test_a_backend_with_arrays_elsewhere_leaves_read_only_copies(monkeypatch):
    _, X, y = PROBLEMS["binary"]
    settings = {"early_stopping": True, "solver": "sgd", "max_iter": 5, "random_state": 0, "backend": "numpy"}
    expected = ours.MLPClassifier(**settings).fit(X, y)
    monkeypatch.setattr(NumpyBackend, "to_numpy", lambda ops, x: np.array(x))
    model = ours.MLPClassifier(**settings, callbacks=[lambda model: model.score(X, y)]).fit(X, y)
    assert_same_run(model, expected, 1e-15)
    with pytest.raises(ValueError, match="read-only"):
        model.coefs_[0][...] = 0
    model.coefs_ = [np.zeros_like(W) for W in model.coefs_]
    assert np.ptp(model.predict_proba(X), axis=0).max() == 0
    again = pickle.loads(pickle.dumps(expected)).set_params(early_stopping=False)
    expected.set_params(early_stopping=False).partial_fit(X, y)
    assert_same(again.partial_fit(X, y).coefs_[0], expected.coefs_[0], 1e-15)


def test_settings_changed_after_the_fit_change_predictions_as_in_scikit_learn():
    _, X, y = PROBLEMS["one value"]
    a, b = both("MLPRegressor", X, y, solver="sgd")
    for model in (a, b):
        model.set_params(activation="tanh")
    np.testing.assert_allclose(a.predict(X), b.predict(X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("X", [[[1.0, np.nan]], [[np.inf, 1.0]], [[1e308, 1e308, 1e308]], np.ones((0, 2)), [1.0, 2.0]])
def test_bad_rows_raise_what_scikit_learn_raises(X):
    X = np.array(X)
    model = ours.MLPRegressor(hidden_layer_sizes=(3,), max_iter=1, random_state=0).fit(
        [[1.0, 2.0], [3.0, 5.0]], [1.0, 2.0]
    )
    with pytest.raises(ValueError, match=r"X|array") as expected:
        model.to_sklearn().predict(X)
    with pytest.raises(ValueError, match=r"X|array") as raised:
        model.predict(X)
    assert str(raised.value) == str(expected.value)


def test_large_finite_rows_are_no_error():
    model = ours.MLPRegressor(hidden_layer_sizes=(3,), max_iter=1, random_state=0).fit(
        [[1.0, 2.0], [3.0, 5.0]], [1.0, 2.0]
    )
    assert np.isfinite(model.predict(np.full((1, 2), 1e300))).all()


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [raise_interrupt, lambda: signal.raise_signal(signal.SIGINT)])
def test_an_interrupted_run_keeps_what_it_has(interrupt):
    _, X, y = PROBLEMS["binary"]
    model = ours.MLPClassifier(callbacks=[lambda model: interrupt() if model.n_iter_ == 3 else None])
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model.fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) == 3
    assert model.score(X, y) > 0.5


def test_an_interrupt_between_two_epochs_that_nobody_watches(on_every_backend, monkeypatch):
    """Such epochs are one call of the trainer; those that were whole count."""
    _, X, y = PROBLEMS["binary"]
    seen = []

    def update(progress, n_rows):
        seen.append(n_rows)
        if sum(seen) > 3 * len(X):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("backprop_gpu._sklearn_base._NoProgress.update", update)
    cpu_step = sys.modules.get("backprop_gpu.backends.cpu_step")  # whose calls would last 0.1 s
    if cpu_step is not None:
        monkeypatch.setattr(cpu_step, "SECONDS_PER_CALL", 0.0)
    model = ours.MLPClassifier(random_state=0)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model.fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) == sum(seen) // len(X) >= 3
    assert model.t_ == model.n_iter_ * len(X)
    assert np.isfinite(model.loss_curve_).all()


@pytest.mark.parametrize("rule", ["constant", "invscaling", "adaptive", bp.Cosine(0.05)])
@pytest.mark.parametrize("problem", ["binary", "three values"])
def test_epochs_that_nobody_watches_are_those_that_somebody_does(problem, rule, on_every_backend):
    name, X, y = PROBLEMS[problem]
    settings = {
        "learning_rate": rule,
        "solver": "sgd",
        "learning_rate_init": 0.01,
        "tol": 0.002,
        "n_iter_no_change": 3,
        "max_iter": 61,
        "random_state": 0,
    }
    watched, unwatched = (getattr(ours, name)(**settings, callbacks=[print] if w else None) for w in (True, False))
    weight = np.random.default_rng(0).uniform(0, 2, len(X))
    assert watched.fit(X, y, weight).loss_curve_ == unwatched.fit(X, y, weight).loss_curve_
    for W, expected in zip(unwatched.coefs_, watched.coefs_, strict=True):
        np.testing.assert_array_equal(W, expected)


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_it_says_when_it_has_not_converged():
    _, X, y = PROBLEMS["binary"]
    for solver in ("adam", "lbfgs"):
        with pytest.warns(ConvergenceWarning, match=r"reached and the|failed to converge") as warned:
            ours.MLPClassifier(solver=solver, max_iter=2).fit(X, y)
        assert solver == "lbfgs" or warned[0].filename == __file__


# More


def test_the_librarys_activations_per_layer_agree_with_the_network():
    _, X, y = PROBLEMS["multi-class"]
    model = ours.MLPClassifier((12, 9), ["gelu", "mish"], max_iter=3, random_state=0, backend="numpy").fit(X, y)
    net = bp.MLP([64, 12, 9, 10], ["gelu", "mish"], dtype="float64", backend="numpy")
    net.parameters[...] = np.concatenate([np.ravel(x) for x in model.coefs_ + model.intercepts_])
    np.testing.assert_allclose(model.predict_proba(X), net.predict_proba(X), rtol=1e-12)


@pytest.mark.parametrize("activation", bp.ACTIVATIONS)
def test_every_activation_learns(activation):
    _, X, y = PROBLEMS["binary"]
    assert ours.MLPClassifier((8,), activation, max_iter=60, random_state=0).fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("loss", ["absolute_error", "huber", bp.Huber(threshold=0.1), bp.SquaredError()])
def test_every_loss_learns(loss):
    _, X, Y = PROBLEMS["three values"]
    model = ours.MLPRegressor(loss, max_iter=200, random_state=0, learning_rate_init=0.01).fit(X, Y)
    assert model.score(X, Y) > 0.9


def test_the_output_layer_may_have_an_activation():
    _, X, Y = PROBLEMS["counts"]
    model = ours.MLPRegressor(output_activation="softplus", max_iter=20, random_state=0).fit(X, Y)
    assert model.out_activation_ == "softplus"
    assert (model.predict(X) >= 0).all()


@pytest.mark.parametrize("problem", ["multi-class", "binary"])
def test_smoothed_labels_make_less_confident_classifiers(problem):
    _, X, y = PROBLEMS[problem]
    plain, smooth = (
        ours.MLPClassifier(loss=loss, max_iter=60, random_state=0).fit(X, y)
        for loss in ("cross_entropy", bp.CrossEntropy(label_smoothing=0.2))
    )
    assert smooth.predict_proba(X).max() < plain.predict_proba(X).max()
    assert smooth.out_activation_ == "softmax"
    assert smooth.n_outputs_ == len(smooth.classes_)
    assert smooth.score(X, y) > 0.95
    np.testing.assert_allclose(smooth.to_sklearn().predict_proba(X), smooth.predict_proba(X), rtol=1e-9)


@pytest.mark.parametrize(
    "solver", ["adamw", "rmsprop", bp.AdamW(weight_decay=0.1), bp.SGD(learning_rate=bp.Cosine(0.1), momentum=0.9)]
)
def test_the_librarys_optimizers_learn(solver):
    _, X, y = PROBLEMS["binary"]
    model = ours.MLPClassifier((10,), solver=solver, max_iter=40, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.9
    assert pickle.loads(pickle.dumps(clone(model))).fit(X, y).loss_curve_ == model.loss_curve_


def test_a_schedule_sets_the_rate_of_every_update():
    _, X, y = PROBLEMS["binary"]
    rates = []
    model = ours.MLPClassifier(
        learning_rate=bp.StepDecay(0.01, every=3, factor=0.1),
        max_iter=3,
        callbacks=[lambda model: rates.append(model._optimizer.learning_rate)],
    ).fit(X, y)
    np.testing.assert_allclose(rates, [0.01, 0.001, 0.0001])
    assert model.n_iter_ == 3


def test_dropout_leaves_neurons_out_of_training_only():
    _, X, y = PROBLEMS["binary"]
    a, b = (ours.MLPClassifier(dropout=[0.5], max_iter=5, random_state=0).fit(X, y) for _ in range(2))
    assert a.loss_curve_ == b.loss_curve_
    assert a.loss_curve_ != ours.MLPClassifier(max_iter=5, random_state=0).fit(X, y).loss_curve_
    np.testing.assert_array_equal(a.predict_proba(X), a.predict_proba(X))


def test_clipping_bounds_a_step():
    _, X, y = PROBLEMS["one value"]
    settings = {"solver": "sgd", "momentum": 0, "max_iter": 1, "batch_size": len(X), "random_state": 0}
    start = ours.MLPRegressor(learning_rate_init=1e-300, **settings).fit(X, y)
    end = ours.MLPRegressor(learning_rate_init=1.0, clip_norm=0.01, **settings).fit(X, y)
    pairs = zip(end.coefs_ + end.intercepts_, start.coefs_ + start.intercepts_, strict=True)
    assert np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs)) == pytest.approx(0.01)


@pytest.mark.parametrize("problem", ["multi-class", "binary"])
def test_class_weights_are_sample_weights(problem):
    _, X, y = PROBLEMS[problem]
    by_class = {label: 1.0 + label for label in np.unique(y)}
    settings = {"solver": "sgd", "max_iter": 5, "random_state": 0}
    a = ours.MLPClassifier(class_weight=by_class, **settings).fit(X, y)
    b = ours.MLPClassifier(**settings).fit(X, y, sample_weight=1.0 + y)
    assert_same_run(a, b, 1e-12)
    c = ours.MLPClassifier(class_weight=by_class, **settings).partial_fit(X[:9], y[:9], classes=np.unique(y))
    d = ours.MLPClassifier(**settings).partial_fit(X[:9], y[:9], 1.0 + y[:9], classes=np.unique(y))
    assert_same_run(c, d, 1e-12)


def test_balanced_classes_count_alike():
    rng = np.random.default_rng(0)
    y = (rng.uniform(size=2000) < 0.05).astype(int)
    X = rng.normal(size=(2000, 1)) + y[:, None]
    rare = [
        ours.MLPClassifier((5,), class_weight=weight, max_iter=30, random_state=0).fit(X, y).predict(X).mean()
        for weight in (None, "balanced")
    ]
    assert rare[0] < 0.05 < 0.2 < rare[1]


def test_multi_label_classes_have_weights_too():
    _, X, Y = PROBLEMS["multi-label"]
    model = ours.MLPClassifier(class_weight="balanced", max_iter=5, random_state=0).fit(X, Y)
    assert model.predict(X).shape == Y.shape


def test_validation_data_is_scored_and_can_stop():
    _, X, y = PROBLEMS["binary"]
    labels = np.array(["malignant", "benign"])[y]
    train, validation = (X[:400], labels[:400]), (X[400:], labels[400:])
    watched = ours.MLPClassifier(max_iter=5, random_state=0).fit(*train, validation_data=validation)
    assert len(watched.validation_scores_) == len(watched.loss_curve_) == 5
    assert watched.validation_scores_[-1] == watched.score(*validation)
    unwatched = ours.MLPClassifier(max_iter=5, random_state=0).fit(*train)
    assert watched.loss_curve_ == unwatched.loss_curve_
    stopped = ours.MLPClassifier(early_stopping=True, n_iter_no_change=3, random_state=0, learning_rate_init=0.1)
    stopped.fit(*train, validation_data=(*validation, np.ones(169)))
    assert stopped.n_iter_ < 200
    assert stopped.score(*validation) == stopped.best_validation_score_ == max(stopped.validation_scores_)
    assert stopped.t_ == stopped.n_iter_ * 400


def test_a_callback_sees_the_model_and_can_stop_it():
    _, X, y = PROBLEMS["binary"]
    scores = []
    model = ours.MLPClassifier(
        callbacks=[lambda model: scores.append(model.score(X, y)), lambda model: model.n_iter_ == 4]
    ).fit(X, y)
    assert len(scores) == model.n_iter_ == 4
    assert scores[-1] == model.score(X, y)


def test_a_progress_bar_is_shown_on_request(capsys):
    _, X, y = PROBLEMS["binary"]
    ours.MLPClassifier(max_iter=3, progress_bar=True).fit(X, y)
    assert "epoch 3/3" in capsys.readouterr().err
    ours.MLPClassifier(max_iter=3).fit(X, y)
    assert capsys.readouterr().err == ""


def test_the_dtype_is_the_inputs_unless_it_is_given():
    _, X, y = PROBLEMS["one value"]
    for given, dtype, expected in [
        (np.float64, None, np.float64),
        (np.float32, None, np.float32),
        (np.int64, None, np.float64),
        (np.float64, "float32", np.float32),
    ]:
        model = ours.MLPRegressor(hidden_layer_sizes=(4,), max_iter=2, dtype=dtype).fit(X.astype(given), y)
        assert {W.dtype for W in model.coefs_} == {np.dtype(expected)}
        assert model.predict(X).dtype == expected


# Conversion


@pytest.mark.parametrize("problem", PROBLEMS)
def test_conversion_both_ways_keeps_predictions(problem):
    name, X, y = PROBLEMS[problem]
    fitted = getattr(theirs, name)(hidden_layer_sizes=(9, 5), activation="logistic", max_iter=4, random_state=0).fit(
        X, y
    )
    model = ours.from_sklearn(fitted, backend="numpy")
    back = model.to_sklearn()
    assert type(model) is getattr(ours, name)
    assert type(back) is getattr(theirs, name)
    assert back.get_params() == fitted.get_params()
    np.testing.assert_array_equal(back.predict(X), fitted.predict(X))
    np.testing.assert_allclose(model.predict(X), fitted.predict(X), rtol=1e-9, atol=1e-12)
    model.coefs_[0][...] = 0
    assert np.abs(fitted.coefs_[0]).max() > 0
    for other in (model, back):
        other.partial_fit(X, y)
    if name == "MLPClassifier":
        np.testing.assert_array_equal(model.classes_, fitted.classes_)


def test_what_scikit_learn_has_not_cannot_become_its():
    _, X, y = PROBLEMS["one value"]
    for settings in ({"activation": "gelu"}, {"loss": "huber"}, {"output_activation": "softplus"}):
        model = ours.MLPRegressor(max_iter=1, **settings).fit(X, y)
        with pytest.raises(ValueError, match="scikit-learn has"):
            model.to_sklearn()
    model = ours.MLPRegressor(hidden_layer_sizes=(4, 3), activation=["tanh", "relu"], max_iter=1).fit(X, y)
    with pytest.raises(ValueError, match="one activation for all layers"):
        model.to_sklearn()


def test_what_is_only_about_training_is_left_out():
    _, X, y = PROBLEMS["one value"]
    model = ours.MLPRegressor(solver=bp.AdamW(), activation="sigmoid", dropout=0.1, max_iter=2).fit(X, y)
    back = model.to_sklearn()
    assert (back.solver, back.activation, back.learning_rate) == ("adam", "logistic", "constant")
    np.testing.assert_allclose(back.predict(X), model.predict(X), rtol=1e-9, atol=1e-12)


def test_only_fitted_models_of_scikit_learns_are_converted():
    with pytest.raises(NotFittedError):
        ours.from_sklearn(theirs.MLPClassifier())
    with pytest.raises(NotFittedError):
        ours.MLPClassifier().to_sklearn()
    with pytest.raises(TypeError, match="scikit-learn's MLPClassifier or MLPRegressor"):
        ours.from_sklearn(StandardScaler())


# Bad input

BAD = {
    "activation": ({"activation": "rleu"}, "activation"),
    "activations": ({"activation": ["relu", "relu"]}, "2 entries for 1 hidden layers"),
    "hidden_layer_sizes": ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes must be > 0"),
    "solver": ({"solver": "newton"}, "solver"),
    "backend": ({"backend": "abacus"}, "backend"),
    "dtype": ({"dtype": "int8"}, "dtype"),
    "dropout": ({"dropout": 1.0}, "dropout"),
    "clip_norm": ({"clip_norm": 0.0}, "clip_norm"),
    "class_weight": ({"class_weight": "even"}, "class_weight"),
    "loss": ({"loss": "hinge"}, "loss"),
    "callbacks": ({"callbacks": 3}, "callbacks"),
    "two schedules": ({"solver": bp.Adam(), "learning_rate": bp.Constant(0.1)}, "one of its own"),
    "softmax of labels": ({"loss": "binary_cross_entropy"}, "multi-class y has one softmax"),
    "an activation that is none": ({"activation": [3]}, "activation"),
    "no weight": ({"class_weight": dict.fromkeys(range(10), 0.0)}, "every row has weight 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(settings, message):
    _, X, y = PROBLEMS["multi-class"]
    with pytest.raises((ValueError, TypeError), match=message):
        ours.MLPClassifier(**settings).fit(X, y)


def test_bad_targets_and_weights_are_refused():
    _, X, y = PROBLEMS["one value"]
    _, X_labels, Y_labels = PROBLEMS["multi-label"]
    with pytest.raises(ValueError, match="cannot be negative"):
        ours.MLPRegressor("poisson").fit(X, y)
    with pytest.raises(ValueError, match="Negative values"):
        ours.MLPRegressor().fit(X, y, sample_weight=np.full(len(X), -1.0))
    with pytest.raises(ValueError, match="loss for regression"):
        ours.MLPRegressor(bp.CrossEntropy()).fit(X, y)
    with pytest.raises(ValueError, match="sigmoid for each label"):
        ours.MLPClassifier(loss="cross_entropy").fit(X_labels, Y_labels)
    with pytest.raises(ValueError, match="all rows at once"):
        ours.MLPClassifier(class_weight="balanced").partial_fit(X, y > 0, classes=[False, True])
    with pytest.raises(ValueError, match="lbfgs"):
        ours.MLPRegressor(solver="lbfgs").fit(X, y, validation_data=(X, y))
    with pytest.raises(TypeError, match="validation_data must be"):
        ours.MLPRegressor().fit(X, y, validation_data=X)
    with pytest.raises(ValueError, match="11 features"):
        ours.MLPRegressor().fit(X, y, validation_data=(X[:, 1:], y))
    with pytest.raises(ValueError, match="total_steps"):
        ours.MLPRegressor(learning_rate=bp.Cosine(0.1)).partial_fit(X, y)
