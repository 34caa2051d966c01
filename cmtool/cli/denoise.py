"""`cmtool denoise`: noise taken away."""

from __future__ import annotations

from typing import Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import UsageError


def denoise(
    *,
    model: options.Model = None,
    image: options.Image,
    out: options.Out,
    sigma: Annotated[
        float | None,
        typer.Option("--sigma", metavar="S", help="Standard deviation of the noise, in 255ths. [default: estimated]"),
    ] = None,
    labels: options.Labels = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Take white noise out of an image, in one network call.

    A consistency model answers with one clean image, a diffusion model with the mean of all that are possible, which is
    smoother and nearer to the truth on average.
    """
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise UsageError(f"--sigma {sigma:g}: the noise has a standard deviation from 0 on", "for example --sigma 25")
    images.one_result(as_json, out)
    (target,) = images.places(out, [0])

    from cmtool import starts
    from cmtool.generate import check_images
    from cmtool.io.images import from_uint8, read_image, to_uint8, write_image

    model = images.chosen(model)
    flow = images.ready(images.read_model(model), device=device, precision=precision)
    given = check_images(from_uint8(read_image(image, flow.card.channels)), flow)
    level = float(starts.estimate_sigma(given)) if sigma is None else sigma / 127.5
    if sigma is None:
        console.note(f"the noise is estimated: --sigma {127.5 * level:.1f}")
    made = starts.denoise(flow, given, sigma=level, labels=images.labels(flow, labels))
    write_image(target, to_uint8(made)[0])
    if as_json:
        console.emit_json({"images": [{"path": target}], "sigma": 127.5 * level, "image": image, "model": model})
    elif target != "-":
        console.emit_line(target)
