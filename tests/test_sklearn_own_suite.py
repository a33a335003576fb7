"""scikit-learn's own tests of its MLP, from the installed package, with their import line changed and nothing else.

Each of its tests is one here, under its own name. What it lets pass, a run that ends before it has converged, these let
pass too.
"""

import importlib.resources
import inspect

import pytest

pytest.importorskip("sklearn")

THEIR_IMPORT = "from sklearn.neural_network import MLPClassifier, MLPRegressor\n"
OUR_IMPORT = "from backprop_gpu.sklearn import MLPClassifier, MLPRegressor\n"

PRIVATE = {"test_gradient": "_loss_grad_lbfgs"}
"""The tests that reach into what is scikit-learn's alone, and the attribute that they touch. `gradcheck` does what the
one does."""


def borrowed():
    """The suite's names, with our classes in place of scikit-learn's."""
    file = importlib.resources.files("sklearn.neural_network.tests") / "test_mlp.py"
    source = file.read_text(encoding="utf-8")
    assert source.count(THEIR_IMPORT) == 1
    names = {"__name__": __name__}
    exec(compile(source.replace(THEIR_IMPORT, OUR_IMPORT), str(file), "exec"), names)
    return names


def marks(name):
    yield pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
    if name in PRIVATE:
        yield pytest.mark.xfail(raises=AttributeError, strict=True, reason=f"touches the private {PRIVATE[name]}")


SUITE = borrowed()
TESTS = {name: test for name, test in SUITE.items() if name.startswith("test_")}
for _name, _test in TESTS.items():
    # Its own marks, which stand nearer to the test, go on counting more.
    _test.pytestmark = [*(mark.mark for mark in marks(_name)), *getattr(_test, "pytestmark", [])]
globals().update(TESTS)


@pytest.fixture
def global_random_seed():
    """What scikit-learn's conftest gives by default."""
    return 42


def test_that_is_all_of_the_suite_on_our_classes():
    assert len(TESTS) >= 30
    assert {SUITE[name].__module__ for name in ("MLPClassifier", "MLPRegressor")} == {"backprop_gpu.sklearn"}


@pytest.mark.parametrize(("name", "attribute"), PRIVATE.items())
def test_what_is_left_out_touches_a_private_attribute(name, attribute):
    assert attribute.startswith("_")
    assert f"mlp.{attribute}(" in inspect.getsource(TESTS[name])
