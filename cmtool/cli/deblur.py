"""`cmtool deblur`: a sharp image from a blurred one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import editing
from cmtool.cli.request import taking
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.flow.flow_map import ModelCard


@dataclass(frozen=True, kw_only=True)
class Request(editing.Request):
    """The options of a deblurring."""

    kernel: Annotated[
        str,
        typer.Option(
            "--kernel", metavar="NAME|FILE", help="What blurred it: gaussian:SIGMA, box:SIDE, or a .npy, .txt or image."
        ),
    ]
    floor: Annotated[
        float,
        typer.Option(
            "--floor", metavar="SHARE", help="Frequencies of which the blur left less than this are made new."
        ),
    ] = 0.1


@taking(Request)
def deblur(request: Request) -> None:
    """Sharpen an image whose blur is known. Blurred again it is the image given, as far as the blur left anything.

    The blur goes around the edges: what leaves at the right comes in at the left.
    """
    if not 0 < request.floor < 1:
        raise UsageError(f"--floor {request.floor:g}: expected a share between 0 and 1", "0.1 suits 8-bit images")

    def read(request: Request, card: ModelCard) -> editing.Edit:
        from cmtool import generate
        from cmtool.editing import Blur
        from cmtool.io.images import from_uint8, read_image
        from cmtool.io.kernels import read_kernel

        op = Blur(read_kernel(request.kernel), request.floor)
        known = read_image(request.image, card.channels)
        editing.check_size(card, known, request.image)
        images = from_uint8(known)[None]
        call = partial(generate.deblur, images=images, kernel=op.kernel, floor=op.floor)
        return editing.Edit(call, known, op, op.A(op.pinv(images)))

    editing.run("deblur", request, read)
