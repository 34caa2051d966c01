"""`cmtool colorize`: colours for a grey image."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cmtool.cli import editing, options

if TYPE_CHECKING:
    from cmtool.flow.flow_map import FlowMap


def colorize(
    model: options.Model,
    image: options.Image,
    out: options.Out,
    seeds: options.Seeds = "0",
    labels: options.Labels = None,
    times: options.Times = None,
    edit_steps: options.EditSteps = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Colour a grey image; its brightness stays. Of a colour image only the brightness is used."""

    def prepare(flow: FlowMap) -> editing.Edit:
        from cmtool import generate
        from cmtool.io.images import from_uint8, read_image

        known = read_image(image, 3)
        editing.check_size(flow, known, image)
        return partial(generate.colorize, flow, from_uint8(known)[None])

    request = editing.Request(model, image, out, seeds, labels, times, edit_steps, batch, device, precision, as_json)
    editing.run("colorize", request, prepare)
