"""scikit-learn's solvers on this library's operations: its learning rates, its penalty, its way of adding losses up.

A mini-batch of total weight S (its number of rows, without sample weights) is trained on C + ½ (alpha / S) Σ W². What
scikit-learn *reports* differs from that in two places, and its stopping rules look at what it reports:
- for the squared error of K outputs it reports C / K, the mean over the outputs, but differentiates C, their sum;
- an epoch's loss is the mean over its rows of the loss of their mini-batch, also where the rows have weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize

from backprop_gpu import training
from backprop_gpu.backends.contract import AfterStep, Array, Backend, Trainer
from backprop_gpu.data import Rows
from backprop_gpu.mlp import MLP
from backprop_gpu.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop
from backprop_gpu.schedules import Schedule

__all__ = [
    "STOCHASTIC_SOLVERS",
    "Epochs",
    "Problem",
    "Solver",
    "is_stochastic",
    "minimize_lbfgs",
    "optimizer_for",
    "with_clipping",
]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SMALLEST_RATE = 1e-6
"""An adaptive learning rate at or below this is not divided further: training stops."""


@dataclass(frozen=True)
class Problem:
    """What is minimised: a network's parameters on these rows."""

    net: MLP
    rows: Rows
    target: npt.NDArray[Any]
    sample_weight: npt.NDArray[Any] | None
    alpha: float
    """scikit-learn's L2 penalty, which each mini-batch divides by its weight."""

    @property
    def outputs_averaged(self) -> int:
        """K where scikit-learn reports the mean over K outputs of a loss whose sum it differentiates, else 1."""
        architecture = self.net.architecture
        return architecture.layer_sizes[-1] if architecture.loss.name == "squared_error" else 1

    def reported(self, cost: Any, penalty: Any) -> Any:
        """What scikit-learn calls the loss, from C without the penalty, and the penalty."""
        return cost / self.outputs_averaged + penalty


# Stochastic solvers


def optimizer_for(solver: str, settings: Any) -> Optimizer:
    """The library's optimizer behind the name of a solver, with an estimator's settings."""
    return STOCHASTIC_SOLVERS[solver](settings)


def with_clipping(optimizer: Optimizer, clip_norm: float | None) -> Optimizer:
    """The optimizer with an estimator's `clip_norm`, where that has one."""
    return optimizer if clip_norm is None else replace(optimizer, clip_norm=clip_norm)


def is_stochastic(solver: Any) -> bool:
    """Whether a solver works in mini-batches, and so has `partial_fit`."""
    return isinstance(solver, Optimizer) or (isinstance(solver, str) and solver in STOCHASTIC_SOLVERS)


def _sgd(settings: Any) -> SGD:
    # scikit-learn allows a momentum of 1, the library what is below it: the float next to 1 is both.
    momentum = min(float(settings.momentum), float(np.nextafter(1, 0)))
    return SGD(momentum=momentum, nesterov=bool(settings.nesterovs_momentum) and momentum > 0)


STOCHASTIC_SOLVERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": _sgd,
    "adam": lambda settings: Adam(**_adam(settings), epsilon_hat=True),
    "adamw": lambda settings: AdamW(**_adam(settings)),
    "rmsprop": lambda settings: RMSprop(epsilon=settings.epsilon),
}


def _adam(settings: Any) -> dict[str, Any]:
    return {"beta_1": settings.beta_1, "beta_2": settings.beta_2, "epsilon": settings.epsilon}


@dataclass
class Solver:
    """An optimizer on its way: its state, its learning rate, and scikit-learn's three rules for changing that."""

    optimizer: Optimizer
    schedule: Schedule | None
    """The library's schedule, step by step; None for `rule`, which is applied between epochs."""
    rule: str
    """constant, invscaling or adaptive."""
    learning_rate_init: float
    power_t: float
    steps_before: int
    """Updates that the network had before: dropout counts on from there."""
    step: int = 0
    """Updates so far."""
    learning_rate: float = field(init=False)
    state: dict[str, Array] | None = field(default=None, repr=False)
    ops: Backend | None = field(default=None, repr=False)
    """The backend of `state`."""
    trainer: Trainer | None = field(default=None, repr=False)
    """The last `partial_fit`'s, which has its memory; no copy and no file has it."""

    def __post_init__(self) -> None:
        self.learning_rate = float(self.learning_rate_init)

    def state_on(self, net: MLP) -> dict[str, Array]:
        """The optimizer's slots as arrays of the network's backend, zero before the first step."""
        if self.state is None:
            shape, dtype = net.parameters.shape, net.parameters.dtype
            self.state = {slot: net.ops.zeros(shape, dtype) for slot in self.optimizer.slots}
        elif self.ops is not net.ops:
            self.state = {slot: net.ops.asarray(x, net._array_dtype) for slot, x in self._host_state().items()}
        self.ops = net.ops
        return self.state

    def _host_state(self) -> dict[str, npt.NDArray[Any]]:
        return {slot: x if self.ops is None else self.ops.to_numpy(x) for slot, x in (self.state or {}).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "state": self.state and self._host_state(), "ops": None, "trainer": None}

    def rates(self, n_epochs: int, n_steps: int, rows_seen: int, n_rows: int) -> Floats:
        """(n_epochs, n_steps): the learning rate of each of the next updates, in epochs of `n_rows` rows."""
        if self.schedule is None:
            later = [self._rate_after(rows_seen + i * n_rows) for i in range(1, n_epochs)]
            return np.repeat([[self.learning_rate], *([rate] for rate in later)], n_steps, axis=1)
        rates = self.schedule.rates(np.arange(self.step, self.step + n_epochs * n_steps)).reshape(n_epochs, n_steps)
        self.learning_rate = float(rates[-1, -1])
        return rates

    def _rate_after(self, rows_seen: int) -> float:
        """The rule's rate after an epoch; inverse scaling goes by the rows seen since the first fit."""
        if self.rule != "invscaling":
            return self.learning_rate
        return float(self.learning_rate_init / (rows_seen + 1) ** self.power_t)

    def epoch_ends(self, rows_seen: int) -> None:
        """Apply the rule."""
        self.learning_rate = self._rate_after(rows_seen)

    def stagnates(self) -> str:
        """What follows from no more improvement, in words; "Stopping." ends them where training is to stop."""
        if self.rule != "adaptive":
            return "Stopping."
        if self.learning_rate <= SMALLEST_RATE:
            return "Learning rate too small. Stopping."
        self.learning_rate /= 5.0
        return f"Setting learning rate to {self.learning_rate:f}"


class Epochs:
    """Passes over training rows: one update for each mini-batch, on the backend's trainer."""

    def __init__(self, problem: Problem, solver: Solver, batch_size: int, in_stream: bool) -> None:
        net = problem.net
        self.problem, self.solver, self.batch_size = problem, solver, batch_size
        taken = (problem.rows, problem.target, problem.sample_weight)
        settings = (solver.optimizer, taken, batch_size, solver.steps_before, solver.state_on(net))
        job = training._job(net, *settings, in_stream)
        self.trainer = training._trainer(net, job, solver.trainer)

    def run(self, orders: Indices, rows_seen: int, after_step: AfterStep) -> list[float]:
        """Train on the rows in every row of `orders`, an epoch, after `rows_seen` rows since the first fit.

        Returns the loss of each epoch that was not interrupted, as scikit-learn reports it.
        """
        n_epochs, size = orders.shape
        starts = np.arange(0, size, self.batch_size)
        n_rows = np.diff(starts, append=size)
        weights = self._weights(orders, starts, n_rows)
        # A mini-batch without weight is no part of the cost, and so has no penalty; scikit-learn divides by 0 there.
        alphas = np.divide(self.problem.alpha, weights, out=np.zeros(weights.shape), where=weights > 0)
        rates = self.solver.rates(n_epochs, len(starts), rows_seen, size)
        rows_done, interrupted = 0, False

        def after(n: int) -> bool:
            nonlocal rows_done, interrupted
            rows_done += n
            interrupted = not after_step(n)
            return not interrupted

        losses = self.trainer.run_epochs(orders, rates, alphas, self.solver.step, after)
        if losses is None:
            losses = self._run_by_run(orders, rates, alphas, weights, after)
        done, rest = divmod(rows_done, size) if interrupted else (n_epochs, 0)
        self.solver.step += done * len(starts) + -(-rest // self.batch_size)
        reported = self.problem.reported(losses[:done, :, 0], losses[:done, :, 1])
        means: list[float] = ((reported * n_rows).sum(axis=1) / size).tolist()
        return means

    def _weights(self, orders: Indices, starts: Indices, n_rows: Indices) -> Floats:
        """The total weight of each mini-batch, (n_epochs, n_steps)."""
        w = self.problem.sample_weight
        if w is None:
            return np.tile(n_rows.astype(np.float64), (len(orders), 1))
        return np.add.reduceat(w[orders].astype(np.float64), starts, axis=1)

    def _run_by_run(
        self, orders: Indices, rates: Floats, alphas: Floats, weights: Floats, after_step: AfterStep
    ) -> Floats:
        """`Trainer.run_epochs` for a trainer that has none: one run for each mini-batch, to have its loss."""
        losses = np.full((*rates.shape, 2), np.nan)
        going_on = True

        def after(n: int) -> bool:
            nonlocal going_on
            going_on = after_step(n)
            return going_on

        for i, (epoch, step) in enumerate(np.ndindex(rates.shape)):
            batch = orders[epoch, step * self.batch_size : (step + 1) * self.batch_size]
            at = np.s_[epoch, step : step + 1]
            weight, penalty = weights[epoch, step], self.problem.net._penalty(float(alphas[epoch, step]))
            total = self.trainer.run(batch, rates[at], alphas[at], self.solver.step + i, after)
            losses[epoch, step] = (total / weight - penalty if weight else 0.0), penalty
            if not (going_on and np.isfinite(total)):
                break
        return losses


# L-BFGS


def minimize_lbfgs(problem: Problem, *, max_iter: int, max_fun: int, tol: float) -> Any:
    """SciPy's L-BFGS on all rows at once; leaves the parameters where it ends and returns SciPy's result."""
    net = problem.net
    function = _FullCost(problem)
    start = np.array(net.ops.to_numpy(net.parameters))
    options = {"maxfun": max_fun, "maxiter": max_iter, "gtol": tol}
    result = scipy.optimize.minimize(function, start, method="L-BFGS-B", jac=True, options=options)
    net.parameters[...] = net.ops.asarray(result.x, net._array_dtype)
    return result


class _FullCost:
    """(the reported loss, the gradient) of a flat vector of parameters."""

    def __init__(self, problem: Problem) -> None:
        net = problem.net
        self.problem = problem
        self.gradients = net.ops.empty(net.parameters.shape, net.parameters.dtype)
        self.n_rows = len(problem.rows)
        self.chunks = net._chunks(self.n_rows)  # so that a sparse X is never dense as a whole
        self.weight = self._weight(slice(None))
        self.alpha = problem.alpha / self.weight
        taken = (problem.rows, problem.target, problem.sample_weight)
        batch_size = len(range(self.n_rows)[self.chunks[0]])
        self.trainer = training._trainer(net, training._job(net, SGD(), taken, batch_size, 0))

    def __call__(self, x: Floats) -> tuple[float, Floats]:
        net = self.problem.net
        net.parameters[...] = net.ops.asarray(x, net._array_dtype)
        cost = self.trainer.gradient(self.gradients, self.alpha)
        if cost is None:
            cost, gradient = self._chunk_by_chunk()
        else:
            gradient = net.ops.to_numpy(self.gradients).astype(np.float64)
        return self.problem.reported(cost, net._penalty(self.alpha)), gradient

    def _chunk_by_chunk(self) -> tuple[float, Floats]:
        """C without the penalty, and the gradient, for a trainer that has neither."""
        cost, gradient = 0.0, np.zeros(self.gradients.shape)
        for chunk in self.chunks:
            share = self._weight(chunk) / self.weight
            cost += share * self._chunk(chunk)
            gradient += share * self.problem.net.ops.to_numpy(self.gradients)
        return cost - self.problem.net._penalty(self.alpha), gradient

    def _weight(self, chunk: slice) -> float:
        """The rows' weights, added up; their number, where they have none."""
        w = self.problem.sample_weight
        return len(range(self.n_rows)[chunk]) if w is None else float(w[chunk].sum(dtype=np.float64))

    def _chunk(self, chunk: slice) -> float:
        """C of a chunk, with the whole penalty; overwrites `gradients`."""
        problem, ops = self.problem, self.problem.net.ops
        w = problem.sample_weight
        forward = problem.net.forward(ops.asarray(problem.rows.take(chunk)))
        loss, _ = problem.net.backward(
            forward,
            ops.asarray(problem.target[chunk]),
            None if w is None else ops.asarray(w[chunk]),
            self.gradients,
            alpha=self.alpha,
        )
        return loss
