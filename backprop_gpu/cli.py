"""The command line: train, predict, info, gradcheck.

What is wrong with the input ends in one line on stderr and exit status 2, a run that failed in status 1, Ctrl-C in
status 130; only a bug of the program shows a traceback.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import backprop_gpu as bp
from backprop_gpu import datasets, losses, optimizers, storage
from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.checks import lookup, unknown
from backprop_gpu.datasets import BUILT_IN, Dataset, Task
from backprop_gpu.gradcheck import GradCheck
from backprop_gpu.losses import LOSSES, Loss
from backprop_gpu.scaling import Scaling
from backprop_gpu.training import BATCH_SIZE

__all__ = ["main"]

Array = npt.NDArray[Any]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

FAILURES = (bp.DivergenceError, RuntimeError, MemoryError)
MISTAKES = (ValueError, TypeError, OSError, ImportError)

BATCHES = 40
SMALLEST_BATCH = 16
"""Without --batch-size, an epoch has at least so many updates, unless mini-batches would become smaller than that:
a small data set needs small ones to learn in as many epochs."""

STOPPING_FRACTION = 0.1
"""Part of the training rows that early stopping watches; the held-out rows stay unseen."""

GRADCHECK_ROWS = 11
GRADCHECK_INPUTS = 5
GRADCHECK_OUTPUTS = 3
SMOOTH_LIMIT = 1e-7
KINKED_LIMIT = 1e-6
"""A kink forces a smaller step on the differences, and so costs them a digit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the program's own, and return the exit status."""
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        print(end="", flush=True)
        return status
    except BrokenPipeError:
        _discard_stdout()
        return OK
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except FAILURES as error:
        return _fail(_one_line(error), FAILED)
    except MISTAKES as error:
        return _fail(_one_line(error), BAD_INPUT)


def _run(argv: list[str]) -> int:
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train,
        "predict": _predict,
        "info": _info,
        "gradcheck": _gradcheck,
    }
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise unknown("command", argv[0], commands)
    try:
        arguments = _parser(commands).parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or OK)
    _require_backend(getattr(arguments, "backend", "auto"))
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments)


def _fail(message: str, status: int) -> int:
    print(f"backprop-gpu: error: {message}", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:
        _discard_stdout()
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{name}"
    return " ".join(str(error).split()) or type(error).__name__


def _discard_stdout() -> None:
    """`| head` has read enough, or the disk is full: keep the interpreter from trying once more, aloud, as it exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_backend(name: str) -> None:
    """A backend that cannot work here is a wrong argument, not a failed run."""
    if name == "auto":
        return
    try:
        bp.get_backend(name)
    except RuntimeError as error:
        raise ValueError(error) from error


# The arguments


class _Parser(argparse.ArgumentParser):
    """Leaves the printing of errors to `main`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help says more)")


def _parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="backprop-gpu",
        description="Train multilayer perceptrons at hardware speed, and use them.",
        epilog="First steps: backprop-gpu train digits",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"backprop_gpu {bp.__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add_arguments, text) in _COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(sub)
        sub.set_defaults(command=commands[name])
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="what to train on, see above")
    add = parser.add_argument_group("data").add_argument
    add(
        "--target",
        metavar="COLUMN",
        help="target column of a .csv or .parquet: name, or index from 0 (default: the last)",
    )
    add("--task", metavar="TASK", help="classification or regression (default: what the target says)")
    add(
        "--test-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="part of the rows to hold out, drawn by the seed (default: %(default)s), unless the data has a test part",
    )
    add = parser.add_argument_group("network").add_argument
    add(
        "--layers",
        type=_widths,
        default="256,128",
        metavar="N,N,...",
        help="hidden widths, or none (default: %(default)s)",
    )
    add(
        "--activation",
        type=_names,
        default="relu",
        metavar="NAME",
        help="one for all hidden layers, or one for each: a,b",
    )
    add(
        "--loss",
        metavar="NAME",
        help=f"{', '.join(LOSSES)} (default: cross_entropy for labels, squared_error for values)",
    )
    add(
        "--dropout",
        type=_numbers,
        default=0.0,
        metavar="P",
        help="probability, one for all hidden layers or one for each",
    )
    add("--alpha", type=float, default=0.0, metavar="A", help="L2 penalty on the weights (default: %(default)s)")
    add("--dtype", default="float32", metavar="NAME", help="what to compute in (default: %(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--optimizer", default="adam", metavar="NAME", help="sgd, adam, adamw, rmsprop (default: %(default)s)")
    add(
        "--learning-rate",
        type=float,
        metavar="R",
        help="default: the optimizer's own, 0.01 for sgd and 0.001 for the others",
    )
    add("--epochs", type=int, default=30, metavar="N", help="passes over the training rows (default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="rows per update (default: 16 to 128, by the number of rows)")
    add(
        "--early-stopping",
        type=int,
        metavar="PATIENCE",
        help="stop after this many epochs without progress on a tenth of the training rows, set apart; keep the best",
    )
    add("--checkpoint", metavar="PATH", help="written after every epoch; the same command goes on from there")
    _add_backend(add)
    add("--seed", type=_seed, default=0, metavar="N", help="the same seed gives the same run (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="MODEL.safetensors", help="save the trained model, for predict and for backprop_gpu.load")
    add("--quiet", action="store_true", help="print nothing but errors")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a file that train --output or MLP.save wrote")
    parser.add_argument("data", metavar="DATA", help="what to predict, see above")
    add = parser.add_argument
    add("--output", metavar="OUT.csv", help="write there instead of on stdout")
    add("--probabilities", action="store_true", help="add a column with the probability of each class")
    add("--target", metavar="COLUMN", help="target column of a .csv or .parquet, if the model does not know it")
    _add_backend(add)


def _add_info(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def _add_gradcheck(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--activation", type=_names, default="all", metavar="NAME", help="one, several (a,b) or all (default: all)")
    add("--loss", type=_names, default="all", metavar="NAME", help="one, several (a,b) or all (default: all)")
    add("--layers", type=_widths, default="7,4", metavar="N,N,...", help="hidden widths (default: %(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="seed of the weights and the data (default: %(default)s)")
    _add_backend(add)


def _add_backend(add: Callable[..., Any]) -> None:
    add("--backend", default="auto", metavar="NAME", help="auto, or one that info lists (default: %(default)s)")


_DATA = f"""\
DATA is one of
  a built-in set   {", ".join(BUILT_IN)} (from scikit-learn)
  a folder         of IDX files, named as MNIST's: train-images-idx3-ubyte[.gz], ...
  FILE.csv         with a header line or without; columns of numbers, and a target
  FILE.parquet     likewise
  FILE.npz         with arrays X and y, and perhaps X_test and y_test"""

_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "train": (
        _add_train,
        "train a network, tell how well it does on held-out rows, and save it\n\n"
        f"{_DATA}\n\n"
        "Integers and text in the target are labels to tell apart, real numbers are values to predict.\n"
        "Inputs are scaled from the training rows, and the scaling becomes part of the saved network.",
    ),
    "predict": (
        _add_predict,
        "predict with a saved network: CSV on stdout, one line for each row\n\n"
        f"{_DATA}\n\n"
        "Columns go by their names, where the model and the file have names. If the target is there too,\n"
        "it is left out, and the score is printed on stderr. Of data with a test part, that part is taken.",
    ),
    "info": (_add_info, "show versions, and which backends work here, and why the others do not"),
    "gradcheck": (
        _add_gradcheck,
        "check backpropagation against finite differences\n\n"
        f"In float64, on small random data; the worst relative error must stay below {SMOOTH_LIMIT:g},\n"
        f"or {KINKED_LIMIT:g} with relu and others that have a kink.",
    ),
}


def _widths(text: str) -> list[int]:
    """128,64; none or nothing for no hidden layer."""
    if text.strip().lower() in ("", "none"):
        return []
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths such as 128,64, or none; got {text!r}") from None
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"every layer needs at least 1 neuron; got {text!r}")
    return widths


def _names(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    return names if len(names) > 1 else names[0]


def _numbers(text: str) -> float | list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or one for each hidden layer; got {text!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2^64); got {text!r}")
    return int(text)


# Files that are to be written


def _require_outputs(outputs: Sequence[str | None], inputs: Sequence[str]) -> None:
    """OSError or ValueError, before the work, where a file could not be written or would destroy another."""
    taken = {os.path.realpath(path): path for path in inputs}
    for path in filter(None, outputs):
        real = os.path.realpath(path)
        if real in taken:
            raise ValueError(f"{path} is named twice; name another file to write to")
        taken[real] = path
        try:
            storage.require_writable(path)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}" if error.strerror else str(error)) from error


# train


def _train(arguments: argparse.Namespace) -> int:
    _require_outputs([arguments.output, arguments.checkpoint], [arguments.data])
    loss, task = _loss_and_task(arguments)
    optimizer = _optimizer(arguments)
    data = datasets.load(arguments.data, target=arguments.target, task=task)
    data = datasets.hold_out(data, arguments.test_fraction, arguments.seed)
    net = _network(data, loss or losses.get("cross_entropy" if data.classes else "squared_error"), arguments)
    if arguments.batch_size is None:
        arguments.batch_size = _batch_size(int(len(data.X) * (1 - _watched_fraction(arguments))))
    say = _silent if arguments.quiet else _say
    _tell_plan(say, data, net, optimizer, arguments)
    trained, history = _fit(data, net, optimizer, arguments)
    if arguments.output is not None:
        trained.save(arguments.output)
    _tell_result(say, data, trained, history)
    say("saved", _saved(arguments, trained))
    return INTERRUPTED if history.stopped == "interrupted" else OK


def _fit(
    data: Dataset, net: bp.MLP, optimizer: optimizers.Optimizer, arguments: argparse.Namespace
) -> tuple[bp.MLP, bp.History]:
    """Train `net` on scaled data; the network that takes the data as it lies in the file, and what happened."""
    scaling = Scaling.of(data.X, data.y if _scales_target(net) else None)
    stopping = None if arguments.early_stopping is None else bp.EarlyStopping(arguments.early_stopping)
    net.metadata = {**_notes(data), _UNFINISHED: True}
    history = net.fit(
        scaling.inputs(data.X, _host_dtype(net)),
        scaling.targets(data.y),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=optimizer,
        early_stopping=stopping,
        validation_fraction=_watched_fraction(arguments),
        checkpoint=arguments.checkpoint,
        progress=False if arguments.quiet else None,
    )
    trained = scaling.folded(net)
    trained.metadata = _notes(data)
    return trained, history


_UNFINISHED = "inputs_are_scaled"
"""A note in a checkpoint: its network takes scaled inputs, so it is not for `predict` yet."""


def _loss_and_task(arguments: argparse.Namespace) -> tuple[Loss | None, Task | None]:
    """What --loss and --task say, which must agree; None where they say nothing."""
    tasks: dict[str, Task] = {"classification": "classification", "regression": "regression"}
    task = None if arguments.task is None else lookup("task", arguments.task, tasks)
    if arguments.loss is None:
        return None, task
    loss = losses.get(arguments.loss)
    if task not in (None, loss.task):
        raise ValueError(f"--loss {loss.name} is for {loss.task}, but --task says {task}; leave one of them out")
    return loss, loss.task


def _optimizer(arguments: argparse.Namespace) -> optimizers.Optimizer:
    kind = lookup("optimizer", arguments.optimizer, optimizers.OPTIMIZERS)
    return kind() if arguments.learning_rate is None else kind(learning_rate=arguments.learning_rate)


def _network(data: Dataset, loss: Loss, arguments: argparse.Namespace) -> bp.MLP:
    return bp.MLP(
        [data.X.shape[1], *arguments.layers, _n_outputs(data, loss)],
        arguments.activation,
        loss,
        dropout=arguments.dropout,
        alpha=arguments.alpha,
        dtype=arguments.dtype,
        backend=arguments.backend,
        seed=arguments.seed,
    )


def _n_outputs(data: Dataset, loss: Loss) -> int:
    if data.classes is None:
        return 1 if data.y.ndim == 1 else int(data.y.shape[1])
    if loss.name == "cross_entropy":
        return len(data.classes)
    if len(data.classes) != 2:
        raise ValueError(
            f"--loss {loss.name} tells two classes apart; the target has {len(data.classes)} (cross_entropy)"
        )
    return 1


def _watched_fraction(arguments: argparse.Namespace) -> float:
    return 0.0 if arguments.early_stopping is None else STOPPING_FRACTION


def _scales_target(net: bp.MLP) -> bool:
    """A regression whose output layer is linear; a rate or a count stays in its units."""
    arch = net.architecture
    return arch.loss.task == "regression" and arch.output_activation == "identity"


def _host_dtype(net: bp.MLP) -> str:
    return "float64" if net.dtype == "float64" else "float32"


def _batch_size(n_rows: int) -> int:
    """A power of two up to the library's default, that still leaves some updates in an epoch of few rows."""
    fitting = 1 << max(n_rows // BATCHES, 1).bit_length() - 1
    return min(n_rows, max(SMALLEST_BATCH, min(BATCH_SIZE, fitting)))


def _notes(data: Dataset) -> dict[str, Any]:
    """What `predict` wants to know of the data, ready for JSON."""
    notes = {"classes": data.classes, "features": data.features, "target": data.target}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in notes.items() if v is not None}


# What train tells


Say = Callable[[str, str], None]


def _say(what: str, text: str) -> None:
    try:
        print(f"{what:<10}{text}", flush=True)
    except BrokenPipeError:  # nobody reads the report, but the model is still wanted
        _discard_stdout()


def _silent(what: str, text: str) -> None:
    """--quiet."""


def _tell_plan(
    say: Say, data: Dataset, net: bp.MLP, optimizer: optimizers.Optimizer, arguments: argparse.Namespace
) -> None:
    n_rows = len(data.X) + (0 if data.X_test is None else len(data.X_test))
    kinds = f"{len(data.classes)} classes" if data.classes else "values to predict"
    say("data", f"{data.name}: {n_rows:,} rows, {data.X.shape[1]} features, {kinds}{data.note and f' ({data.note})'}")
    say("split", f"{len(data.X):,} rows to train on, {data.split}")
    say("network", _layers(net))
    say("training", f"{type(optimizer).__name__}, mini-batches of {arguments.batch_size} rows, seed {net.seed}")
    say("backend", f"{net.backend}: {net.backend_reason}")


def _layers(net: bp.MLP) -> str:
    arch = net.architecture
    layers = [f"{size} {sigma}" for size, sigma in zip(arch.layer_sizes[1:], arch.sigmas, strict=True)]
    chain = " -> ".join([str(arch.layer_sizes[0]), *layers])
    return f"{chain}; {arch.loss.name}, {net.dtype}, {arch.n_parameters:,} parameters"


def _tell_result(say: Say, data: Dataset, net: bp.MLP, history: bp.History) -> None:
    epochs = f"{len(history)} epoch{'s' if len(history) != 1 else ''}"
    stopped = "" if history.stopped == "epochs" else f" ({history.stopped})"
    speed = f", {history.rows_per_second:,.0f} rows per second" if history.seconds else ""
    say("time", f"{sum(history.seconds):.2f} s for {epochs}{speed}{stopped}")
    if data.X_test is not None and data.y_test is not None:
        say("held out", _score(net, data.X_test, data.y_test))
    else:
        say("trained", f"{_score(net, data.X, data.y)} (on the training rows; none were held out)")


def _saved(arguments: argparse.Namespace, net: bp.MLP) -> str:
    if arguments.output is None:
        return "nothing; --output MODEL.safetensors keeps the model"
    wider = f", as {net.dtype}: the unscaled data needs it" if net.dtype != arguments.dtype else ""
    return f"{arguments.output}{wider}"


def _score(net: bp.MLP, X: Array, y: Array) -> str:
    """Accuracy, or R² and the root of the mean squared error, on raw data; a label of −1 is a miss."""
    predicted = net.predict(X)
    if net.architecture.loss.task == "classification":
        right = predicted == y
        return f"accuracy {right.mean():.4f} ({right.sum():,} of {len(y):,} rows)"
    metrics = net.evaluate(X, y)
    error = float(np.sqrt(np.mean((predicted.astype(np.float64) - y) ** 2)))
    return f"R2 {metrics['r2']:.4f}, root mean squared error {error:.4g} ({len(y):,} rows)"


# predict


def _predict(arguments: argparse.Namespace) -> int:
    _require_outputs([arguments.output], [arguments.model, arguments.data])
    net = bp.load(arguments.model, backend=arguments.backend)
    if net.metadata.get(_UNFINISHED):
        raise ValueError(
            f"{arguments.model} is the checkpoint of a run; `train --output` writes the model to predict with"
        )
    if arguments.probabilities and net.architecture.loss.task != "classification":
        raise ValueError(f"--probabilities: a network with loss {net.architecture.loss.name} has none")
    classes = _classes(net)
    X, y = datasets.load_for_model(
        arguments.data,
        n_features=net.layer_sizes[0],
        classes=classes,
        features=net.metadata.get("features"),
        model_target=net.metadata.get("target"),
        target=arguments.target,
    )
    _write(_csv_text(_table(net, X, classes, arguments.probabilities)), arguments.output)
    if y is not None:
        print(_score(net, X, y), file=sys.stderr)
    return OK


def _classes(net: bp.MLP) -> list[int | str] | None:
    """The names of the classes, or their numbers where the model does not name them; None for a regression."""
    arch = net.architecture
    if arch.loss.task != "classification":
        return None
    n_classes = arch.layer_sizes[-1] if arch.loss.name == "cross_entropy" else 2
    if arch.loss.name == "binary_cross_entropy" and arch.layer_sizes[-1] > 1:
        raise ValueError("a network with several yes-or-no outputs is not for the command line; use backprop_gpu.load")
    classes = net.metadata.get("classes", list(range(n_classes)))
    if not isinstance(classes, list) or len(classes) != n_classes:
        raise ValueError(f"the model's note of its classes does not fit its {n_classes} classes: {classes!r}")
    return classes


def _table(net: bp.MLP, X: Array, classes: list[int | str] | None, probabilities: bool) -> Iterator[list[str]]:
    """A header, and a line for each row of X."""
    if classes is None:
        values = net.predict(X).reshape(len(X), -1)
        yield ["prediction"] if values.shape[1] == 1 else [f"prediction_{k}" for k in range(values.shape[1])]
        yield from ([str(value) for value in row] for row in values)
        return
    p = net.predict_proba(X)
    p = np.hstack([1 - p, p]) if p.shape[1] == 1 else p
    columns = [f"probability_{label}" for label in classes] if probabilities else []
    yield ["prediction", *columns]
    for label, row in zip(net.predict(X), p, strict=True):
        yield [str(classes[label]), *(str(value) for value in row[: len(columns)])]


def _csv_text(rows: Iterator[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(text: str, path: str | None) -> None:
    """On stdout, or as a file that appears whole or not at all."""
    if path is None:
        print(text, end="", flush=True)
        return
    with storage.replacing(path) as file:
        file.write(text.encode())


# info


def _info(arguments: argparse.Namespace) -> int:
    print(f"backprop_gpu {bp.__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("backends, in the order in which auto tries them:")
    for status in bp.backends():
        state = "works" if status.automatic else f"{'by name only' if status.works else 'no'}: {status.reason}"
        print(f"  {status.name:<12}{state}")
    print("for data:")
    for module, package, extra, what in _READERS:
        version = _version(module, package) or f'no: pip install "backprop_gpu[{extra}]"'
        print(f"  {package:<14}{version} ({what})")
    return OK


_READERS = (
    ("sklearn", "scikit-learn", "sklearn", "built-in sets"),
    ("pyarrow", "pyarrow", "parquet", ".parquet files"),
)


def _version(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.metadata.version(package)


# gradcheck


def _gradcheck(arguments: argparse.Namespace) -> int:
    activations = _chosen("activation", arguments.activation, ACTIVATIONS)
    chosen_losses = _chosen("loss", arguments.loss, LOSSES)
    first = max(map(len, ["activation", *activations]))
    print("  ".join(["activation".ljust(first), *chosen_losses]))
    checks = []
    for activation in activations:
        row = [_Check.of(activation, loss, arguments) for loss in chosen_losses]
        print("  ".join([activation.ljust(first), *(check.shown() for check in row)]), flush=True)
        checks += row
    return _verdict(checks)


def _chosen(kind: str, names: str | list[str], table: Mapping[str, Any]) -> list[str]:
    """The names asked for, each in the table; "all" stands for every one."""
    names = [names] if isinstance(names, str) else names
    for name in names:
        lookup(kind, name, {"all": None, **table})
    return list(table) if "all" in names else names


@dataclass(frozen=True)
class _Check:
    """The gradient check of one activation with one loss."""

    activation: str
    loss: str
    limit: float
    report: GradCheck

    @classmethod
    def of(cls, activation: str, loss: str, arguments: argparse.Namespace) -> _Check:
        """The check on random data; biases are random too, since zeros would put neurons on a kink."""
        rng = np.random.default_rng(arguments.seed)
        sizes = [GRADCHECK_INPUTS, *arguments.layers, GRADCHECK_OUTPUTS]
        net = bp.MLP(sizes, activation, loss, dtype="float64", backend=arguments.backend, seed=arguments.seed)
        for b in net.b:
            b[...] = net.ops.asarray(rng.normal(0, 0.5, b.shape))
        X = rng.normal(size=(GRADCHECK_ROWS, GRADCHECK_INPUTS))
        kinked = LOSSES[loss].has_kink or any(sigma.has_kink for sigma in net.architecture.activations)
        report = bp.gradcheck(net, X, _random_target(loss, rng), seed=arguments.seed)
        return cls(activation, loss, KINKED_LIMIT if kinked else SMOOTH_LIMIT, report)

    @property
    def passed(self) -> bool:
        """Whether the worst error is a number below the limit: NaN, no evidence, is a failure."""
        return self.report.worst <= self.limit

    def shown(self) -> str:
        """The worst error, in the width of its column's heading."""
        return f"{self.report.worst:.1e}{'' if self.passed else '!'}".rjust(len(self.loss))


def _random_target(loss: str, rng: np.random.Generator) -> Array:
    shape = (GRADCHECK_ROWS, GRADCHECK_OUTPUTS)
    if loss == "cross_entropy":
        return rng.integers(0, GRADCHECK_OUTPUTS, GRADCHECK_ROWS)
    if loss == "binary_cross_entropy":
        return rng.integers(0, 2, shape)
    return rng.poisson(2.0, shape) if loss == "poisson" else rng.normal(size=shape)


def _verdict(checks: Sequence[_Check]) -> int:
    failed = [check for check in checks if not check.passed]
    compared, left_out = (sum(getattr(c.report, what) for c in checks) for what in ("checked", "skipped"))
    print(
        f"{'FAIL' if failed else 'PASS'}: {len(checks) - len(failed)} of {len(checks)} within {SMOOTH_LIMIT:g}, "
        f"or {KINKED_LIMIT:g} with a kink; {compared:,} derivatives compared, {left_out:,} near a kink left out"
    )
    if not failed:
        return OK
    names = ", ".join(f"{check.activation} with {check.loss}" for check in failed)
    raise RuntimeError(f"backpropagation and finite differences disagree for {names}")
