"""`cmtool inpaint`: new pixels in the masked part of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, editing
from cmtool.cli.request import taking
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.flow.flow_map import ModelCard

_HOLE = 128  # level of what is to be made new, in pictures


@dataclass(frozen=True, kw_only=True)
class Request(editing.Request):
    """The options of an inpainting."""

    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="FILE", help="White: make this new. [default: the image's transparent part]"),
    ] = None
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Make the other part new instead.")] = False
    soft_mask: Annotated[
        bool, typer.Option("--soft-mask", help="Grey in --mask mixes: the lighter, the more of what is new.")
    ] = False


def blended(call: Callable[..., Tensor], images: Tensor, share: Tensor) -> Callable[..., Tensor]:
    """The answers of `call` mixed with the images they are of, by the share [1, H, W] that is new."""
    return lambda *args, **how: images + share * (call(*args, **how) - images)


@taking(Request)
def inpaint(request: Request) -> None:
    """Make a part of an image new; the rest stays exactly as it is."""
    if request.soft_mask and request.mask is None:
        raise UsageError("--soft-mask is of a --mask, and there is none", "give a grey picture with --mask")
    image, mask = request.image, request.mask
    if image == "-" and mask == "-":
        raise UsageError("--image - and --mask - cannot share one pipe", "give one of the two as a file")

    def read(request: Request, card: ModelCard) -> editing.Edit:
        from cmtool import generate
        from cmtool.editing import Mask
        from cmtool.io.images import from_uint8, read_image, read_image_with_mask, read_mask, read_soft_mask

        image, mask, invert, share = request.image, request.mask, request.invert_mask, None
        if mask is not None and request.soft_mask:
            known, share = read_image(image, card.channels), read_soft_mask(mask, invert)
            hole = share > 0
        elif mask is not None:
            known, hole = read_image(image, card.channels), read_mask(mask, invert)
        else:
            known, transparent = read_image_with_mask(image, card.channels)
            if transparent is None:
                raise UsageError(f"--image {image} has no transparent part to make new", "give a mask with --mask")
            hole = ~transparent if invert else transparent
        editing.check_size(card, known, image)
        if hole.shape[-2:] != known.shape[-2:]:
            sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (hole, known)]
            raise DataError(f"--mask {mask} is {sizes[0]}, --image {image} is {sizes[1]}", "give masks of equal size")
        if not hole.any():
            console.note("the mask is empty: the image stays as it is (white means new; see --invert-mask)")
        images, op = from_uint8(known)[None], Mask(hole[None])
        shown = known.masked_fill(hole, _HOLE)
        call = partial(generate.inpaint, images=images, masks=hole)
        return editing.Edit(call if share is None else blended(call, images, share), shown, op, op.A(images))

    editing.run("inpaint", request, read)
