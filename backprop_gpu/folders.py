"""Where files of the library are kept for a user, between one process and the next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """The folder of backprop_gpu in the user's cache directory, by the rules of the operating system."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "backprop_gpu"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "backprop_gpu"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "backprop_gpu"
