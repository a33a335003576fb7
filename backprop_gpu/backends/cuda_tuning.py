"""The fastest way of each product on this GPU, measured once where `tune=True` asks for it, and remembered on disk.

A way is a tile of the fused kernels, or "cublas": a product by cuBLAS and the epilogue in a pass of its own. Every way
must give the planned tile's numbers before it may win. Without tuning, the plan decides, by sizes alone.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from backprop_gpu.backends.contract import Array
from backprop_gpu.storage import user_cache

__all__ = ["Tuning", "Way"]

logger = logging.getLogger("backprop_gpu")

Way: TypeAlias = str
"""The type of a tile in CUDA C++, or "cublas"."""

ROUNDS, REPEATS = 5, 8
"""A way's time is the median of so many rounds, of so many launches each."""

AGREEMENT = {"float64": 1e-10, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a way's numbers may be from the planned tile's, relative to the largest."""

FILE = "cuda_tuning.json"


class Tuning:
    """What is known of the ways of products on one GPU."""

    def __init__(self, cp: Any, folder: Path | None = None) -> None:
        self.cp = cp
        self.path = (folder or _folder()) / FILE
        self.device = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)["name"].decode()

    def way(
        self,
        product: tuple[Any, ...],
        planned: Way,
        ways: Iterable[Way],
        launch_of: Callable[[Way], Callable[[], None]],
        outputs: list[Array],
        dtype: str,
    ) -> Way:
        """The fastest for `product`: as remembered, or measured now, with launches that overwrite `outputs`."""
        key = " ".join(map(str, (self.device, *product)))
        known = self._read()
        if key not in known:
            known[key] = self._fastest(planned, ways, launch_of, outputs, dtype)
            logger.info("tuning: %s takes %s", key, known[key])
            self._write({**self._read(), key: known[key]})
        return known[key]

    def fill(self, x: Array, dtype: str) -> None:
        """Random numbers, for products to be measured with: what a buffer holds before its first step may be NaN."""
        numbers = np.random.default_rng(0).standard_normal(x.shape).astype("float32")
        if x.dtype.name != "uint16":
            x.set(numbers.astype(x.dtype))
        elif dtype == "float16":
            x.set(numbers.astype(np.float16).view(np.uint16))
        else:
            x.set((numbers.view(np.uint32) >> 16).astype(np.uint16))

    def _fastest(
        self,
        planned: Way,
        ways: Iterable[Way],
        launch_of: Callable[[Way], Callable[[], None]],
        outputs: list[Array],
        dtype: str,
    ) -> Way:
        launch_of(planned)()
        expected = [self.cp.asnumpy(output) for output in outputs]
        seconds = {}
        for way in ways:
            launch = launch_of(way)
            launch()
            if all(_agree(self.cp.asnumpy(x), y, dtype) for x, y in zip(outputs, expected, strict=True)):
                seconds[way] = statistics.median(self._seconds(launch) for _ in range(ROUNDS))
            else:
                logger.warning("tuning: %s does not give the numbers of %s, and is left out", way, planned)
        return min(seconds, key=lambda way: seconds[way], default=planned)

    def _seconds(self, launch: Callable[[], None]) -> float:
        start, end = self.cp.cuda.Event(), self.cp.cuda.Event()
        start.record()
        for _ in range(REPEATS):
            launch()
        end.record()
        end.synchronize()
        return float(self.cp.cuda.get_elapsed_time(start, end)) / 1000 / REPEATS

    def _read(self) -> dict[str, Way]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, Way]) -> None:
        """In one step, so that no other process reads half of it; a folder that cannot be written to forgets."""
        fresh = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            fresh.replace(self.path)
        except OSError as error:
            logger.warning("tuning cannot be remembered: %s", error)


def _agree(x: Any, expected: Any, dtype: str) -> bool:
    x, expected = (_numbers(bits, dtype) for bits in (x, expected))
    return bool(np.abs(x - expected).max() <= AGREEMENT[dtype] * np.abs(expected).max())


def _numbers(x: Any, dtype: str) -> Any:
    """What arrays of 16-bit numbers hold, in float32."""
    if x.dtype != np.uint16:
        return x
    return x.view(np.float16).astype(np.float32) if dtype == "float16" else (x.astype(np.uint32) << 16).view(np.float32)


def _folder() -> Path:
    """$BACKPROP_GPU_CACHE_DIR, or the user's cache directory."""
    chosen = os.environ.get("BACKPROP_GPU_CACHE_DIR")
    return Path(chosen) if chosen else user_cache()
