"""`cmtool inpaint`: new pixels in the masked part of an image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, editing, options
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from cmtool.flow.flow_map import FlowMap


def inpaint(
    model: options.Model,
    image: options.Image,
    out: options.Out,
    mask: Annotated[
        str | None,
        typer.Option("--mask", metavar="FILE", help="White: make this new. [default: the image's transparent part]"),
    ] = None,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Make the other part new instead.")] = False,
    seeds: options.Seeds = "0",
    labels: options.Labels = None,
    times: options.Times = None,
    edit_steps: options.EditSteps = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Make a part of an image new; the rest stays exactly as it is."""
    if image == "-" and mask == "-":
        raise UsageError("--image - and --mask - cannot share one pipe", "give one of the two as a file")

    def prepare(flow: FlowMap) -> editing.Edit:
        from cmtool import generate
        from cmtool.io.images import from_uint8, read_image, read_image_with_mask, read_mask

        if mask is not None:
            known, hole = read_image(image, flow.card.channels), read_mask(mask, invert_mask)
        else:
            known, transparent = read_image_with_mask(image, flow.card.channels)
            if transparent is None:
                raise UsageError(f"--image {image} has no transparent part to make new", "give a mask with --mask")
            hole = ~transparent if invert_mask else transparent
        editing.check_size(flow, known, image)
        if hole.shape[-2:] != known.shape[-2:]:
            sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (hole, known)]
            raise DataError(f"--mask {mask} is {sizes[0]}, --image {image} is {sizes[1]}", "give masks of equal size")
        if not hole.any():
            console.note("the mask is empty: the image stays as it is (white means new; see --invert-mask)")
        return partial(generate.inpaint, flow, from_uint8(known)[None], hole)

    request = editing.Request(model, image, out, seeds, labels, times, edit_steps, batch, device, precision, as_json)
    editing.run("inpaint", request, prepare)
