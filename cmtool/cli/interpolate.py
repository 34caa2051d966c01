"""`cmtool interpolate`: the way from one sample to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.flow.flow_map import ModelCard


def interpolate(
    *,
    model: options.Model = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="A strip (.png, .jpg, ...), or an animation: .apng or .webp.")
    ],
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="LIST", help="Their order: 3,8. [default: 0,1]", **options.parsed(options.parse_seeds)
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Two or more images in place of seeds; of a diffusion model."),
    ] = None,
    frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, max=1000, help="From one to the next.")] = 8,
    labels: options.Labels = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Network calls [default: 1]; of a --solver [default: 18]."),
    ] = None,
    times: options.Times = None,
    solver: options.Solver = None,
    loop: Annotated[bool, typer.Option("--loop", help="Go back to the first seed at the end.")] = False,
    fps: Annotated[float, typer.Option("--fps", metavar="F", min=0.1, max=100, help="Frames a second.")] = 12.0,
    scale: Annotated[int, typer.Option("--scale", metavar="N", min=1, max=64, help="Enlarge without smoothing.")] = 1,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Show samples on the way from seed to seed, or from image to image, as a strip or an animation.

    The noise moves on a great circle; a model with classes stays in one: --labels, or that of the first seed. An image
    is followed back to its noise along the ODE of a diffusion model.
    """
    if image and seeds is not None:
        raise UsageError("--image and --seeds both say where to go", "give one of the two")
    if image and (times is not None or solver is not None):
        raise UsageError("--image is followed by Heun's method, there and back", "leave out --times and --solver")
    if image and len(image) < 2:
        raise UsageError("the way from an image needs a second one", "add another --image")
    wanted = options.parse_seeds(seeds or "0,1")
    wanted = [*wanted, wanted[0]] if loop else wanted
    files = [*(image or ()), *(image[:1] if image and loop else ())]
    images.one_result(as_json, out)
    moves = images.is_animation(out)
    if not moves:
        images.check_target("--out", out)

    import torch

    from cmtool import starts
    from cmtool.io.images import grid, to_uint8, write_animation, write_image

    model = images.chosen(model)
    flow = images.ready(images.read_model(model), device=device, precision=precision)
    chosen = images.labels(flow, labels)
    if files:
        known = torch.stack([_of_size(file, flow.card) for file in files])
        way = starts.between(flow, known, frames=frames, steps=steps or 18, labels=chosen, batch=batch)
    else:
        way = starts.interpolate(
            flow,
            wanted,
            frames=frames,
            steps=steps,
            times=None if times is None else options.parse_times(times),
            labels=chosen,
            solver=solver,
            batch=batch,
        )
    made = to_uint8(way)
    if moves:
        write_animation(out, made[:-1] if loop else made, fps, scale)
    else:
        write_image(out, grid(made, columns=frames if len(made) > 2 * frames else len(made), scale=scale))
    if as_json:
        what = {"between": files} if files else {"seeds": wanted}
        console.emit_json({"file": out, "images": len(made), **what, "model": model})
    elif out != "-":
        console.emit_line(out)


def _of_size(file: str, card: ModelCard) -> Tensor:
    """The image in a file, float32 [C, H, W], which has the size of the model's."""
    from cmtool.io.images import from_uint8, read_image

    found, side = read_image(file, card.channels), card.resolution
    if tuple(found.shape[1:]) != (side, side):
        raise DataError(
            f"--image {file} is {found.shape[2]}x{found.shape[1]}; the model makes {side}x{side}", "resize it first"
        )
    return from_uint8(found)
