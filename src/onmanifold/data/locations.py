"""Where data and caches live on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path | None:
    """``$ONMANIFOLD_DATA``, or None where it is unset."""
    value = os.environ.get("ONMANIFOLD_DATA")
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """``$ONMANIFOLD_CACHE``, else ``~/.cache/onmanifold``; not created."""
    value = os.environ.get("ONMANIFOLD_CACHE")
    return Path(value).expanduser() if value else Path.home() / ".cache" / "onmanifold"
