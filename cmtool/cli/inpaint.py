"""stub"""

from __future__ import annotations
from cmtool.cli import options


def inpaint(
    model: options.Model, seeds: options.Seeds = "0", device: options.Device = "auto", times: options.Times = None
) -> None:
    """Stub [x]."""
