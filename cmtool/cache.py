"""Where cmtool keeps what can be made or fetched again: downloaded models, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """A folder of the cache; it need not exist.

    The cache is $CMTOOL_CACHE, else $XDG_CACHE_HOME/cmtool, else ~/.cache/cmtool.
    """
    if given := os.environ.get("CMTOOL_CACHE"):
        return Path(given).expanduser() / name
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()
    return base / "cmtool" / name
