"""`cmtool colorize`: colours for a grey image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import editing, options
from cmtool.cli.request import taking
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.flow.flow_map import ModelCard


_WEIGHTS = {"bt601": (0.2989, 0.5870, 0.1140), "bt709": (0.2126, 0.7152, 0.0722)}


def parse_weights(text: str) -> tuple[float, float, float]:
    """What red, green and blue count in the brightness: a name, or three numbers, brought to a sum of 1.

    Raises:
        UsageError: neither.
    """
    if text in _WEIGHTS:
        return _WEIGHTS[text]
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        red = green = blue = math.nan
    total = red + green + blue
    if not (min(red, green, blue) >= 0 and 0 < total < math.inf):
        raise UsageError(f"--luma {text}: expected {', '.join(_WEIGHTS)} or three numbers", "for example 0.3,0.59,0.11")
    return red / total, green / total, blue / total


@dataclass(frozen=True, kw_only=True)
class Request(editing.Request):
    """The options of a colouring."""

    luma: Annotated[
        str,
        typer.Option(
            "--luma",
            metavar="NAME|R,G,B",
            help="What the colours count in the brightness: bt601, bt709 or three numbers.",
            **options.parsed(parse_weights),
        ),
    ] = "bt601"


@taking(Request)
def colorize(request: Request) -> None:
    """Colour a grey image; its brightness stays. Of a colour image only the brightness is used."""
    weights = parse_weights(request.luma)

    def read(request: Request, card: ModelCard) -> editing.Edit:
        from cmtool import generate
        from cmtool.editing import Luma
        from cmtool.io.images import from_uint8, read_image, to_uint8

        known = read_image(request.image, 3)
        editing.check_size(card, known, request.image)
        images, op = from_uint8(known)[None], Luma(weights)
        luma = op.A(images)
        shown = to_uint8(luma[0].expand(3, -1, -1))
        return editing.Edit(partial(generate.colorize, images=images, weights=weights), shown, op, luma)

    editing.run("colorize", request, read)
