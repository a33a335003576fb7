"""Fitting: mini-batches, validation, early stopping, callbacks, schedules, streams, Ctrl-C, divergence."""

import gc
import io
import logging
import pickle
import signal
import weakref

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import training
from backprop_gpu.backends.contract import TrainingJob
from backprop_gpu.data import as_rows
from backprop_gpu.training import OperationTrainer

N, FEATURES, CLASSES = 97, 6, 3

pytestmark = pytest.mark.usefixtures("on_every_backend")


@pytest.fixture
def X():
    return np.random.default_rng(0).standard_normal((N, FEATURES))


@pytest.fixture
def y(X):
    return np.argmax(X[:, :CLASSES] + 0.1 * X[:, CLASSES:], axis=1)


def make_net(**options):
    return bp.MLP([FEATURES, 11, CLASSES], **{"seed": 3, "dtype": "float64", **options})


def error(actual, expected):
    """Largest difference, relative to the largest entry."""
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max() / np.abs(expected).max()


def by_hand(net, X, y, optimizer, batches, w=None, first_step=0):
    """Training as one would write it with the operations: backprop, then update."""
    ops = net.ops
    state = {slot: ops.zeros(net.parameters.shape, net.dtype) for slot in optimizer.slots}
    losses = []
    for step, batch in enumerate(batches):
        weight = None if w is None else w[batch]
        grads = net.backprop(X[batch], y[batch], sample_weight=weight, dropout_step=first_step + step)
        ops.update(
            net.parameters,
            grads.gradients,
            state,
            optimizer,
            learning_rate=float(optimizer.schedule.rates(np.array([step]))[0]),
            step=step + 1,
            n_weights=net.architecture.n_weights,
        )
        losses.append(grads.loss)
    return losses


OPTIMIZERS = {
    "sgd": bp.SGD(0.1),
    "momentum": bp.SGD(0.05, momentum=0.9),
    "nesterov": bp.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": bp.Adam(0.01),
    "adamw": bp.AdamW(0.01, weight_decay=0.1),
    "epsilon hat": bp.Adam(0.01, epsilon=1e-2, epsilon_hat=True),
    "rmsprop": bp.RMSprop(0.01, clip_norm=0.5),
    "decaying": bp.Adam(bp.ExponentialDecay(0.02, every=3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_is_backprop_and_update_mini_batch_by_mini_batch(name, X, y):
    options = {"dropout": 0.3, "alpha": 0.01}
    w = np.random.default_rng(1).random(N) + 0.5
    net, expected = make_net(**options), make_net(**options)
    history = net.fit(X, y, epochs=1, batch_size=20, optimizer=OPTIMIZERS[name], shuffle=False, sample_weight=w)
    batches = [np.arange(i, min(i + 20, N)) for i in range(0, N, 20)]
    losses = by_hand(expected, X, y, OPTIMIZERS[name], batches, w)
    assert error(net.parameters, expected.parameters) <= 1e-12
    assert history["loss"] == [pytest.approx(np.average(losses, weights=[w[b].sum() for b in batches]), rel=1e-12)]
    assert not np.array_equal(net.parameters, make_net(**options).parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3)])
def test_100_steps_are_those_of_the_reference(name, dtype, tolerance, X, y):
    """Trained alike, on this backend in this dtype and by the NumPy reference in float64, the loss curves agree."""
    options = {"dropout": 0.2, "alpha": 1e-3, "activation": "gelu"}
    net, reference = make_net(dtype=dtype, **options), make_net(backend="numpy", **options)
    settings = {"epochs": 20, "batch_size": 20, "optimizer": OPTIMIZERS[name]}
    curve, expected = (np.array(each.fit(X, y, **settings)["loss"]) for each in (net, reference))
    assert net.steps_taken == 100
    assert np.isfinite(curve).all()
    assert np.abs(curve / expected - 1).max() <= tolerance
    assert np.ptp(expected) > 0.1


def test_a_trainer_takes_the_rate_and_the_penalty_of_each_step(X, y):
    net, expected = make_net(alpha=7.0), make_net()
    ops, optimizer = net.ops, bp.SGD()
    job = TrainingJob(
        architecture=net.architecture,
        parameters=net.parameters,
        optimizer=optimizer,
        state={"velocity": ops.zeros(net.parameters.shape, "float64")},
        rows=as_rows(X, FEATURES, "float64"),
        target=y.astype(np.int32),
        sample_weight=None,
        dtype="float64",
        batch_size=50,
        seed=net.seed,
        steps_before=0,
    )
    trainer = ops.trainer(job) or OperationTrainer(net, job)
    rates, alphas = np.array([0.1, 0.2]), np.array([0.5, 0.0])
    order = np.arange(N)[::-1]
    total = trainer.run(order, rates, alphas, 0, lambda n_rows: True)
    loss = 0.0
    for rate, alpha, batch in zip(rates, alphas, (order[:50], order[50:]), strict=True):
        grads = expected.backprop(X[batch], y[batch])
        n_weights = expected.architecture.n_weights
        weights = expected.parameters[:n_weights].copy()
        loss += len(batch) * (grads.loss + 0.5 * alpha * (weights**2).sum())
        expected.parameters[...] -= rate * grads.gradients
        expected.parameters[:n_weights] -= rate * alpha * weights
    assert error(net.parameters, expected.parameters) <= 1e-12
    assert total == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_several_epochs_in_one_run_are_epoch_after_epoch(weighted, X, y):
    w = np.random.default_rng(1).random(N) if weighted else None
    nets = [make_net(dropout=0.3) for _ in range(2)]
    orders = np.stack([np.random.default_rng(i).permutation(N)[:-3] for i in range(3)])
    n_steps = -(-orders.shape[1] // 20)
    rates, alphas = np.linspace(0.1, 0.2, 3 * n_steps).reshape(3, -1), np.linspace(0, 1, 3 * n_steps).reshape(3, -1)
    jobs = [training._job(net, bp.Adam(), net._take_in(X, y, w), 20, 5) for net in nets]
    whole, one_by_one = (training._trainer(net, job) for net, job in zip(nets, jobs, strict=True))
    losses = whole.run_epochs(orders, rates, alphas, 0, lambda n: True)
    if losses is None:
        pytest.skip(f"{nets[0].backend}'s trainer has no such path")
    assert losses.shape == (3, n_steps, 2)
    step = 0
    for epoch in range(3):
        for i in range(n_steps):
            batch = orders[epoch, 20 * i : 20 * (i + 1)]
            at = np.s_[epoch, i : i + 1]
            W = nets[1].ops.to_numpy(nets[1].parameters)[: nets[1].architecture.n_weights]
            assert losses[epoch, i, 1] == pytest.approx(0.5 * alphas[epoch, i] * (W**2).sum(), rel=1e-12)
            total = one_by_one.run(batch, rates[at], alphas[at], step, lambda n: True)
            weight = len(batch) if w is None else w[batch].sum()
            assert losses[epoch, i].sum() == pytest.approx(total / weight, rel=1e-12)
            step += 1
    assert error(nets[0].parameters, nets[1].parameters) <= 1e-12


def test_several_epochs_that_are_told_to_stop_say_what_they_made(X, y):
    net = make_net()
    trainer = training._trainer(net, training._job(net, bp.SGD(), net._take_in(X, y, None), 20, 0))
    seen = []
    shape = (400, -(-N // 20))
    orders = np.tile(np.arange(N), (400, 1))
    losses = trainer.run_epochs(orders, np.full(shape, 0.1), np.zeros(shape), 0, lambda n: bool(seen.append(n)))
    if losses is None:
        pytest.skip(f"{net.backend}'s trainer has no such path")
    made = np.isfinite(losses).all(axis=2).ravel()
    assert 0 < made.sum() < made.size
    assert np.isnan(losses.reshape(-1, 2)[made.sum() :]).all()
    n_rows = np.tile(np.diff(np.append(np.arange(0, N, 20), N)), 400)
    assert sum(seen) == n_rows[made].sum()


@pytest.mark.parametrize("batch_size", [7, N])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_all_rows_together(batch_size, weighted, X, y):
    w = np.random.default_rng(1).random(N) if weighted else None
    net = make_net(dropout=0.3)  # which a gradient has none of
    job = training._job(net, bp.SGD(), net._take_in(X, y, w), batch_size, 0)
    gradients, before = net.ops.empty(net.parameters.shape, "float64"), np.array(net.ops.to_numpy(net.parameters))
    for alpha in (0.0, 0.3):  # the second overwrites the first
        cost = training._trainer(net, job).gradient(gradients, alpha)
        if cost is None:
            pytest.skip(f"{net.backend}'s trainer has no such path")
        expected = make_net(alpha=alpha).backprop(X, y, sample_weight=w)
        penalty = 0.5 * alpha * sum((W**2).sum() for W in make_net().W)
        assert cost == pytest.approx(expected.loss - penalty, rel=1e-12)
        assert error(gradients, expected.gradients) <= 1e-12
    assert np.array_equal(net.ops.to_numpy(net.parameters), before)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_run(X, y):
    def run(seed):
        net = make_net(seed=seed, dropout=0.2)
        return net.fit(X, y, epochs=3, validation_fraction=0.2), net.parameters

    (history, parameters), (again, parameters_again), (other, parameters_other) = run(3), run(3), run(4)
    assert history == again
    assert np.array_equal(parameters, parameters_again)
    assert history != other
    assert not np.array_equal(parameters, parameters_other)


def test_seed_none_draws_one_and_tells_it(X, y):
    net = make_net(seed=None)
    assert np.array_equal(make_net(seed=net.seed).parameters, net.parameters)
    assert net.seed != make_net(seed=None).seed


@pytest.fixture
def orders(monkeypatch):
    """The order of the rows in every epoch of a fit, as its trainer is given it."""
    seen, make = [], training._trainer

    def spied(*arguments):
        trainer = make(*arguments)
        run = trainer.run
        monkeypatch.setattr(trainer, "run", lambda order, *rest: seen.append(order) or run(order, *rest), raising=False)
        return trainer

    monkeypatch.setattr(training, "_trainer", spied)
    return seen


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own(X, y, orders):
    make_net().fit(X, y, epochs=2, batch_size=7)
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert not np.array_equal(*orders)


def test_validation_fraction_holds_rows_out_of_training(X, y):
    net = make_net()
    history = net.fit(X, y, epochs=4, validation_fraction=0.25)
    assert history.rows == N - round(0.25 * N)
    assert len(history["val_loss"]) == len(history["val_accuracy"]) == len(history["loss"]) == 4


def test_the_smallest_fraction_holds_out_one_row_and_the_others_keep_their_order(X, y, orders):
    history = make_net().fit(X, y, epochs=1, validation_fraction=1e-9, shuffle=False)
    assert history.rows == len(orders[0]) == N - 1
    assert (np.diff(orders[0]) > 0).all()


def test_a_second_fit_goes_on_with_new_dropout_masks_and_a_fresh_optimizer(X, y):
    net, expected = make_net(dropout=0.4), make_net(dropout=0.4)
    for _ in range(2):
        net.fit(X, y, epochs=1, batch_size=N, shuffle=False, optimizer=bp.Adam(0.01))
    assert net.steps_taken == 2
    for step in range(2):
        by_hand(expected, X, y, bp.Adam(0.01), [np.arange(N)], first_step=step)
    assert error(net.parameters, expected.parameters) <= 1e-12


def test_validation_data_is_what_evaluate_says(X, y):
    net = make_net()
    history = net.fit(X[:60], y[:60], epochs=3, validation_data=(X[60:], y[60:]))
    assert net.evaluate(X[60:], y[60:]) == {"loss": history["val_loss"][-1], "accuracy": history["val_accuracy"][-1]}


def test_a_regression_is_validated_by_r2(X):
    values = X @ np.random.default_rng(2).standard_normal((FEATURES, CLASSES))
    net = make_net(loss="squared_error", activation="tanh")
    history = net.fit(X, values, epochs=100, validation_fraction=0.2, optimizer=bp.Adam(0.01))
    assert history["val_r2"][-1] > 0.9
    residual = ((net.predict(X) - values) ** 2).sum(axis=0)
    expected = 1 - residual / ((values - values.mean(axis=0)) ** 2).sum(axis=0)
    assert net.evaluate(X, values)["r2"] == pytest.approx(expected.mean(), rel=1e-12)
    assert net.evaluate(X, values)["loss"] == pytest.approx(0.5 * residual.sum() / N, rel=1e-12)


def test_early_stopping_restores_the_best_parameters(X, y):
    seen = []
    net = make_net()
    noise = np.random.default_rng(5).integers(0, CLASSES, 40)  # labels that cannot be learnt: val_loss must turn
    validation = (np.random.default_rng(6).standard_normal((40, FEATURES)), noise)
    history = net.fit(
        X,
        y,
        epochs=200,
        optimizer=bp.Adam(0.02),
        validation_data=validation,
        early_stopping=bp.EarlyStopping(patience=4),
        callbacks=[lambda net, history: seen.append(net.parameters.copy())],
    )
    best = int(np.argmin(history["val_loss"]))
    assert history.stopped == "early stopping"
    assert history.best_epoch == best
    assert len(history) == best + 1 + 4 < 200
    assert np.array_equal(net.parameters, seen[best])
    assert net.evaluate(*validation)["loss"] == history["val_loss"][best]


def test_early_stopping_can_watch_the_accuracy_or_the_training_loss(X, y):
    history = make_net().fit(
        X, y, epochs=50, validation_fraction=0.2, early_stopping=bp.EarlyStopping(2, monitor="val_accuracy")
    )
    assert history["val_accuracy"][history.best_epoch] == max(history["val_accuracy"])
    history = make_net().fit(X, y, epochs=50, early_stopping=bp.EarlyStopping(2, min_delta=10.0))
    assert (len(history), history.best_epoch) == (3, 0)
    with pytest.raises(ValueError, match=r"'val_accuracy'; .*valid: loss"):
        make_net().fit(X, y, early_stopping=bp.EarlyStopping(monitor="val_accuracy"))


def test_callbacks_see_every_epoch_and_may_end_the_run(X, y):
    calls = []

    def stop_after_three(net, history):
        calls.append((net, len(history)))
        return len(history) == 3

    net = make_net()
    history = net.fit(X, y, epochs=10, callbacks=[stop_after_three])
    assert calls == [(net, 1), (net, 2), (net, 3)]
    assert (history.stopped, len(history)) == ("callback", 3)


def test_callbacks_may_come_from_a_generator_and_answer_anything_but_true(X, y):
    calls = []

    def answering(answer):
        return lambda net, history: calls.append(answer) or answer

    answers = [None, 1, "yes", np.array([True, False])]
    history = make_net().fit(X, y, epochs=4, callbacks=(answering(answer) for answer in answers))
    assert (history.stopped, len(calls)) == ("epochs", 16)


def test_an_error_in_a_callback_leaves_the_best_parameters(X, y):
    def fail(net, history):
        if len(history) == 4:
            raise OSError("no such server")

    net = make_net()
    seen = []
    callbacks = [lambda net, history: seen.append(net.parameters.copy()), fail]
    with pytest.raises(OSError, match="no such server"):
        net.fit(X, y, epochs=9, callbacks=callbacks, early_stopping=bp.EarlyStopping(5, min_delta=100.0))
    assert np.array_equal(net.parameters, seen[0])


def test_a_schedule_spans_the_run(X, y):
    history = make_net().fit(X, y, epochs=5, batch_size=32, optimizer=bp.Adam(bp.Cosine(0.01, warmup_steps=4)))
    rates = history["learning_rate"]
    assert rates[0] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.001


def test_a_stream_of_chunks_is_one_epoch_in_order(X, y):
    net, expected = make_net(dropout=0.2), make_net(dropout=0.2)
    losses = [net.partial_fit(X[i : i + 16], y[i : i + 16], optimizer=bp.Adam(0.01)) for i in range(0, 96, 16)]
    history = expected.fit(X[:96], y[:96], epochs=1, batch_size=16, optimizer=bp.Adam(0.01), shuffle=False)
    assert np.array_equal(net.parameters, expected.parameters)
    assert np.mean(losses) == pytest.approx(history["loss"][0], rel=1e-12)
    assert net.steps_taken == expected.steps_taken == 6


def test_a_stream_may_hold_a_single_class_and_needs_the_length_of_a_cosine(X, y):
    net = make_net()
    net.partial_fit(X[:4], np.ones(4, int))
    with pytest.raises(ValueError, match="Cosine needs total_steps"):
        net.partial_fit(X, y, optimizer=bp.Adam(bp.Cosine(0.01)))
    net.partial_fit(X, y, optimizer=bp.Adam(bp.Cosine(0.01, total_steps=100)))


def test_a_stream_may_end_with_a_smaller_piece(X, y):
    net, expected = make_net(), make_net()
    net.partial_fit(X[:10], y[:10], batch_size=32)
    expected.partial_fit(X[:10], y[:10])
    assert np.array_equal(net.parameters, expected.parameters)


@pytest.mark.parametrize("optimizer", [bp.SGD(0.1, momentum=0.9), bp.Adam(0.01, clip_norm=1.0), bp.RMSprop(0.01)])
def test_a_stream_goes_on_with_the_memory_of_its_last_call(X, y, optimizer):
    net, expected, kept = make_net(dropout=0.2), make_net(dropout=0.2), []
    for i in range(0, 96, 16):
        weight = None if i < 48 else 1.0 + y[i : i + 16]
        if i == 64:
            for each in (net, expected):
                each.W[0][1] *= 0.5  # parameters are the user's between calls
        for each in (net, expected):
            each.partial_fit(X[i : i + 16], y[i : i + 16], optimizer=optimizer, sample_weight=weight)
        kept.append(net.stream.trainer)
        expected.stream.trainer = None
    assert np.array_equal(net.parameters, expected.parameters)
    assert all(np.array_equal(net.stream.state[k], expected.stream.state[k]) for k in optimizer.slots)
    one = net.backend in ("cpu", "numpy")  # where steps are graphs, those with weights are others
    assert all(trainer is kept[0 if one else 3 * (i // 3)] for i, trainer in enumerate(kept))
    assert (kept[0] is not None) == (net.backend in ("cpu", "cuda"))


def test_a_stream_keeps_neither_the_rows_nor_what_a_failure_left(X, y):
    net, expected = make_net(loss="squared_error"), make_net(loss="squared_error")
    targets = np.eye(CLASSES)[y]
    rows = X.copy()
    gone = weakref.ref(rows)
    net.partial_fit(rows, targets)
    del rows
    gc.collect()
    assert gone() is None
    expected.partial_fit(X, targets)
    with pytest.raises(bp.DivergenceError):
        net.partial_fit(1e200 * X, targets)
    for each in (net, expected):
        each.partial_fit(X, targets)
    assert np.array_equal(net.parameters, expected.parameters)


@pytest.mark.parametrize("when", ["before the updates", "after the updates"])
def test_an_interrupted_stream_has_taken_all_or_nothing(X, y, monkeypatch, when):
    net, expected, get_trainer = make_net(), make_net(), training._trainer

    def interrupted(net, job, last=None):
        trainer = get_trainer(net, job, last)

        def run(*arguments):
            del trainer.run
            if when == "before the updates":
                signal.raise_signal(signal.SIGINT)
            total = trainer.run(*arguments)
            signal.raise_signal(signal.SIGINT)
            return total

        trainer.run = run
        return trainer

    for each in (net, expected):
        each.partial_fit(X, y)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            net.partial_fit(X, y)
    if when == "after the updates" and net.backend == "cpu":  # which does not need to undo anything
        expected.partial_fit(X, y)
    for _ in range(2):
        assert np.array_equal(net.parameters, expected.parameters)
        assert net.steps_taken == expected.steps_taken
        for each in (net, expected):
            each.partial_fit(X, y)


def test_a_stream_with_another_optimizer_or_another_batch_size_is_as_without_memory(X, y):
    net, expected = make_net(), make_net()
    for batch_size, rate in ((16, 0.01), (16, 0.02), (7, 0.02), (16, 0.01)):
        for each in (net, expected):
            each.partial_fit(X, y, batch_size=batch_size, optimizer=bp.Adam(rate))
        expected.stream.trainer = None
    assert np.array_equal(net.parameters, expected.parameters)


def test_a_fit_ends_the_stream_before_it(X, y):
    net = make_net(dropout=0.2)
    net.partial_fit(X, y)
    net.fit(X, y, epochs=2)
    assert net.stream is None
    net.partial_fit(X, y)
    assert net.steps_taken == 4
    assert (net.stream.steps_before, net.stream.steps) == (3, 1)


def test_ctrl_c_between_epochs_returns_the_model_as_far_as_it_got(X, y):
    def press(net, history):
        if len(history) == 2:
            signal.raise_signal(signal.SIGINT)

    net, expected = make_net(), make_net()
    history = net.fit(X, y, epochs=50, callbacks=[press])
    expected.fit(X, y, epochs=2)
    assert (history.stopped, len(history)) == ("interrupted", 2)
    assert np.array_equal(net.parameters, expected.parameters)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_within_an_epoch_finishes_the_update_under_way(X, y, monkeypatch):
    net, expected = make_net(backend="numpy"), make_net(backend="numpy")  # it updates where it can be interrupted
    update, updates = net.ops.update, []

    def press_in_the_13th(*arguments, **options):
        updates.append(1)
        if len(updates) == 13:
            signal.raise_signal(signal.SIGINT)
        update(*arguments, **options)

    monkeypatch.setattr(net.ops, "update", press_in_the_13th)
    history = net.fit(X, y, epochs=50, batch_size=10, shuffle=False)
    assert (history.stopped, len(history), net.steps_taken) == ("interrupted", 1, 13)
    batches = [np.arange(i, min(i + 10, N)) for i in range(0, N, 10)]
    by_hand(expected, X, y, bp.Adam(), [*batches, *batches[:3]])
    assert error(net.parameters, expected.parameters) <= 1e-12


def test_a_second_ctrl_c_raises(X, y):
    def press_twice(net, history):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_net().fit(X, y, epochs=50, callbacks=[press_twice])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("optimizer", [bp.SGD(1e6), bp.SGD(1e200)], ids=["overflowing", "at once"])
def test_a_diverging_run_stops_and_keeps_the_last_finite_parameters(optimizer, X, y):
    kept = []
    net = make_net(loss="squared_error")
    with pytest.raises(bp.DivergenceError, match=r"in epoch \d+; .*learning_rate") as caught:
        net.fit(
            X,
            np.eye(CLASSES)[y],
            epochs=100,
            optimizer=optimizer,
            callbacks=[lambda net, history: kept.append(net.parameters.copy())],
        )
    expected = kept[-1] if kept else make_net(loss="squared_error").parameters
    assert np.isfinite(net.parameters).all()
    assert np.array_equal(net.parameters, expected)
    assert len(caught.value.history) == len(kept)


def test_a_divergence_error_survives_pickling(X, y):
    with pytest.raises(bp.DivergenceError) as caught:
        make_net().fit(1e200 * X, y, epochs=3, optimizer=bp.SGD(1e200))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.history) == (str(caught.value), caught.value.history)
    assert again.history.stopped == "diverged"


def test_divergence_under_early_stopping_leaves_the_best_parameters(X, y):
    kept = []

    def blow_up(net, history):
        kept.append(net.parameters.copy())
        if len(history) == 3:
            net.parameters[...] = 1e200

    net = make_net(loss="squared_error")
    with pytest.raises(bp.DivergenceError):
        net.fit(X, np.eye(CLASSES)[y], epochs=9, early_stopping=True, callbacks=[blow_up])
    assert np.array_equal(net.parameters, kept[2])


def test_parameters_that_overflow_in_the_last_update_count_as_divergence(X, y):
    net = make_net(dtype="float32")
    before = net.parameters.copy()
    with pytest.raises(bp.DivergenceError, match="the parameters are not finite in epoch 1"):
        net.fit(1e3 * X, y, epochs=1, batch_size=N, optimizer=bp.SGD(1e38))
    assert np.array_equal(net.parameters, before)


def test_a_diverging_stream_keeps_the_last_finite_parameters(X, y):
    net = make_net(loss="squared_error", dtype="float32")
    net.partial_fit(X, np.eye(CLASSES)[y])
    before, state = net.parameters.copy(), {k: v.copy() for k, v in net.stream.state.items()}
    for batch_size, rows, what in ((2, X, "the loss is"), (N, X, "the parameters are"), (N, 1e20 * X, "the loss is")):
        with pytest.raises(bp.DivergenceError, match=f"{what} not finite on these rows"):
            net.partial_fit(rows, np.eye(CLASSES)[y], batch_size=batch_size, optimizer=bp.Adam(1e39))
        assert np.array_equal(net.parameters, before)
        assert all(np.array_equal(net.stream.state[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"epochs": 2.5}, TypeError, "epochs must be an integer; got 2.5"),
        ({"validation_fraction": "0.1"}, TypeError, "validation_fraction must be a number; got '0.1'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": N + 1}, ValueError, f"batch_size={N + 1} is larger than the {N} training rows"),
        ({"batch_size": N, "validation_fraction": 0.1}, ValueError, "larger than the 87 training rows"),
        ({"optimizer": "adma"}, ValueError, "unknown optimizer 'adma'; did you mean 'adam'?"),
        ({"optimizer": 3}, TypeError, "optimizer must be one of"),
        ({"validation_fraction": 1.0}, ValueError, r"validation_fraction must be in \[0, 1\)"),
        ({"validation_fraction": 0.999}, ValueError, "leaves none to train on"),
        ({"validation_fraction": float("nan")}, ValueError, "validation_fraction"),
        ({"early_stopping": bp.EarlyStopping(monitor="los")}, ValueError, "did you mean 'loss'"),
        ({"early_stopping": 0}, TypeError, "early_stopping must be an EarlyStopping, True or None; got 0"),
        ({"early_stopping": 5}, TypeError, "early_stopping must be an EarlyStopping, True or None; got 5"),
        ({"callbacks": print}, TypeError, "list of functions"),
        ({"callbacks": None}, TypeError, "list of functions"),
        ({"callbacks": ["print"]}, TypeError, "must be functions"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(options, error, message, X, y):
    net = make_net()
    before, rng = net.parameters.copy(), net.rng.bit_generator.state
    with pytest.raises(error, match=message):
        net.fit(X, y, **options)
    assert np.array_equal(net.parameters, before)
    assert net.rng.bit_generator.state == rng


def test_validation_given_twice_is_refused(X, y):
    with pytest.raises(ValueError, match="not both"):
        make_net().fit(X, y, validation_fraction=0.1, validation_data=(X, y))


@pytest.mark.parametrize(("which", "weight_held_out"), [("training", 1.0), ("held-out", 0.0)])
def test_a_part_of_the_rows_without_any_weight_is_refused(which, weight_held_out, X, y):
    net = make_net()
    held_out = np.random.default_rng()
    held_out.bit_generator.state = rng = net.rng.bit_generator.state
    w = np.full(N, 1 - weight_held_out)
    w[held_out.permutation(N)[: round(0.2 * N)]] = weight_held_out
    with pytest.raises(ValueError, match=f"every {which} row has sample_weight 0"):
        net.fit(X, y, sample_weight=w, validation_fraction=0.2)
    assert net.rng.bit_generator.state == rng


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bp.SGD(-1.0), "learning rate must be a positive number"),
        (lambda: bp.SGD(float("nan")), "learning rate must be a positive number"),
        (lambda: bp.SGD(nesterov=True), "nesterov needs a momentum"),
        (lambda: bp.SGD(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: bp.Adam(beta_1=1.0), "beta_1"),
        (lambda: bp.Adam(epsilon=0.0), "epsilon"),
        (lambda: bp.Adam(clip_norm=0.0), "clip_norm"),
        (lambda: bp.AdamW(weight_decay=-1.0), "weight_decay"),
        (lambda: bp.RMSprop(decay=2.0), "decay"),
        (lambda: bp.Cosine(0.1, warmup_steps=10, total_steps=10), "total_steps must exceed"),
        (lambda: bp.Cosine(0.1, final=0.2), "final"),
        (lambda: bp.StepDecay(0.1, every=0), "every"),
        (lambda: bp.ExponentialDecay(0.1, every=1, factor=0.0), "factor"),
        (lambda: bp.InverseScaling(0.1, power=-1.0), "power"),
        (lambda: bp.EarlyStopping(0), "patience"),
        (lambda: bp.EarlyStopping(min_delta=-1.0), "min_delta"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO, False), (Terminal, True)])
def test_the_progress_bar_is_silent_where_there_is_no_terminal(stream, shown, X, y, monkeypatch):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    make_net().fit(X, y, epochs=2)
    assert ("epoch" in stderr.getvalue()) == shown


def test_training_works_where_there_is_no_stderr(X, y, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert len(make_net().fit(X, y, epochs=1)) == 1


def test_training_does_not_mind_a_strict_numpy(X, y):
    with np.errstate(all="raise"):
        for activation in bp.ACTIVATIONS:
            net = make_net(activation=activation, dtype="float32")
            net.fit(30 * X, y, epochs=1, optimizer=bp.Adam(1e-5))
            net.evaluate(30 * X, y)


def test_history_counts_and_compares_without_times(X, y):
    history = make_net().fit(X, y, epochs=2)
    assert history.rows_per_second > 0
    assert len(history.seconds) == len(history) == 2
    with pytest.raises(KeyError, match="did you mean 'loss'"):
        history["lost"]
    assert np.isnan(bp.History().rows_per_second)


def test_training_says_which_backend_runs(caplog):
    with caplog.at_level(logging.INFO, "backprop_gpu"):
        net = make_net()
    assert net.backend in caplog.text
    assert net.backend_reason in caplog.text
