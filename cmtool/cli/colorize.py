"""`cmtool colorize`: colours for a grey image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cmtool.cli import editing
from cmtool.cli.request import taking

if TYPE_CHECKING:
    from cmtool.flow.flow_map import ModelCard


@taking(editing.Request)
def colorize(request: editing.Request) -> None:
    """Colour a grey image; its brightness stays. Of a colour image only the brightness is used."""

    def read(card: ModelCard) -> editing.Edit:
        from cmtool import generate
        from cmtool.editing import Luma
        from cmtool.io.images import from_uint8, read_image, to_uint8

        known = read_image(request.image, 3)
        editing.check_size(card, known, request.image)
        images, op = from_uint8(known)[None], Luma()
        luma = op.A(images)
        shown = to_uint8(luma[0].expand(3, -1, -1))
        return editing.Edit(partial(generate.colorize, images=images), shown, op, luma)

    editing.run("colorize", request, read)
