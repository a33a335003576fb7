"""Between two updates: the progress bar, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backprop_gpu.history import History

__all__ = ["ProgressBar", "interrupt_noted"]


@contextmanager
def interrupt_noted() -> Iterator[threading.Event]:
    """A first Ctrl-C is noted, to be honoured between two updates, so that none is cut in half; a second one raises.

    Only in the main thread, which is where Python delivers it, and only in place of Python's own handler.
    """
    noted = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ProgressBar:
    """Rows done out of all epochs' rows; by default silent where stderr is no terminal."""

    def __init__(self, epochs: int, history: History, shown: bool | None) -> None:
        from tqdm import tqdm

        self.epochs = epochs
        self.bar = tqdm(
            total=epochs * history.rows,
            initial=len(history) * history.rows,
            unit="row",
            unit_scale=True,
            # Where there is no stderr at all, tqdm would fail; where it is no terminal, None keeps it silent.
            disable=(None if shown is None else not shown) if sys.stderr else True,
            dynamic_ncols=True,
        )
        self.update = self.bar.update
        self.show(history)

    def show(self, history: History) -> None:
        """The epoch that comes next, and the metrics of the one before it."""
        last = {name: f"{values[-1]:.4g}" for name, values in history.metrics.items() if name != "learning_rate"}
        self.bar.set_description(f"epoch {min(len(history) + 1, self.epochs)}/{self.epochs}", refresh=False)
        self.bar.set_postfix(last, refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
