"""`cmtool superres`: a large image from a small one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import editing, options

if TYPE_CHECKING:
    from cmtool.flow.flow_map import FlowMap


def superres(
    model: options.Model,
    image: options.Image,
    out: options.Out,
    factor: Annotated[int, typer.Option("--factor", metavar="N", min=2, help="How many times larger.")],
    seeds: options.Seeds = "0",
    labels: options.Labels = None,
    times: options.Times = None,
    edit_steps: options.EditSteps = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Enlarge an image to the model's size; averaged back down it is the image given."""

    def prepare(flow: FlowMap) -> editing.Edit:
        from cmtool import generate
        from cmtool.io.images import from_uint8, read_image

        known = read_image(image, flow.card.channels)
        editing.check_size(flow, known, image, factor)
        return partial(generate.superres, flow, from_uint8(known)[None], factor)

    request = editing.Request(model, image, out, seeds, labels, times, edit_steps, batch, device, precision, as_json)
    editing.run("superres", request, prepare)
