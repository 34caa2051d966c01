"""cmtool: train, distil, sample and edit with consistency models.

The command line and this package have the same powers. Names are imported on first use, so that `import cmtool` and
`cmtool --help` stay fast: torch is loaded only when something needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "FlowMap": "cmtool.flow.flow_map",
    "load": "cmtool.io.loading",
    "save": "cmtool.io.checkpoint",
    "convert": "cmtool.io.converting",
    "sample": "cmtool.generate",
    "inpaint": "cmtool.generate",
    "colorize": "cmtool.generate",
    "superres": "cmtool.generate",
    "deblur": "cmtool.generate",
    "stroke": "cmtool.starts",
    "denoise": "cmtool.starts",
    "interpolate": "cmtool.starts",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cmtool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
