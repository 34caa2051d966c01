"""`cmtool superres`: a large image from a small one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import editing
from cmtool.cli.request import taking

if TYPE_CHECKING:
    from cmtool.flow.flow_map import ModelCard


@dataclass(frozen=True, kw_only=True)
class Request(editing.Request):
    """The options of an enlargement."""

    factor: Annotated[int, typer.Option("--factor", metavar="N", min=2, help="How many times larger.")]


@taking(Request)
def superres(request: Request) -> None:
    """Enlarge an image to the model's size. Averaged back down it is the image given."""

    def read(request: Request, card: ModelCard) -> editing.Edit:
        from cmtool import generate
        from cmtool.editing import AvgPool
        from cmtool.io.images import from_uint8, read_image

        known = read_image(request.image, card.channels)
        editing.check_size(card, known, request.image, request.factor)
        images = from_uint8(known)[None]
        call = partial(generate.superres, images=images, factor=request.factor)
        return editing.Edit(call, known, AvgPool(request.factor), images)

    editing.run("superres", request, read)
