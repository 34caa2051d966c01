"""Imported once by the process that workers are forked from: a worker then starts at once, with everything loaded."""

from __future__ import annotations

import warnings
from contextlib import suppress

from cmtool.benchmark import measure, ours, peer
from cmtool.errors import DependencyError

__all__ = ["measure", "ours", "peer"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with suppress(DependencyError):  # a worker that needs it says so
        peer.library()
