"""What a training run leaves behind: its metrics, epoch by epoch, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backprop_gpu.checks import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DivergenceError", "History"]


@dataclass
class History:
    """What happened in a training run. ``history["val_loss"]`` is a list with one number per completed epoch."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """loss (the mean over the epoch's mini-batches, as differentiated), learning_rate (at the epoch's end), and with
    validation data val_loss and val_accuracy or val_r2."""
    stopped: str = ""
    """Why the run ended: "epochs", "early stopping", "callback", "interrupted" or "diverged"."""
    best_epoch: int | None = None
    """Index of the epoch whose parameters early stopping kept."""
    rows: int = 0
    """Training rows in an epoch."""
    seconds: list[float] = field(default_factory=list, compare=False)
    """Time of each epoch's updates, validation apart."""

    def __getitem__(self, metric: str) -> list[float]:
        if metric not in self.metrics:
            raise KeyError(str(unknown("metric", metric, self.metrics)))
        return self.metrics[metric]

    def __len__(self) -> int:
        """Completed epochs."""
        return len(self.seconds)

    @property
    def rows_per_second(self) -> float:
        """Training rows per second of updates, over all epochs; NaN before the first."""
        return self.rows * len(self) / sum(self.seconds) if self.seconds else float("nan")

    def record(self, metrics: dict[str, float], seconds: float) -> None:
        """Add one epoch."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)
        self.seconds.append(seconds)

    def plot(self) -> Figure:
        """The curves of loss and score over the epochs; needs the `plot` extra. See `plotting.plot_history`."""
        from backprop_gpu.plotting import plot_history

        return plot_history(self)


class DivergenceError(ArithmeticError):
    """The loss is no longer finite; the network has the last parameters with which it was.

    `history` holds the epochs before; None for a stream.
    """

    def __init__(self, what: str, where: str, history: History | None = None) -> None:
        super().__init__(
            f"training diverged: {what} not finite {where}; the last finite parameters were kept "
            "(try a smaller learning_rate, clip_norm=1.0, or inputs scaled to about mean 0 and variance 1)"
        )
        self.what, self.where, self.history = what, where, history

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[str, str, History | None]]:
        """For pickling: an exception's own way calls it with the message alone."""
        return DivergenceError, (self.what, self.where, self.history)
