"""`cmtool interpolate`: the way from one sample to another."""

from __future__ import annotations

from typing import Annotated

import typer

from cmtool.cli import console, images, options


def interpolate(
    *,
    model: options.Model = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="A strip (.png, .jpg, ...), or an animation: .apng or .webp.")
    ],
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="LIST", help="Their order: 3,8.", **options.parsed(options.parse_seeds))
    ] = "0,1",
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
    """Show samples on the way from seed to seed, as a strip or an animation.

    The noise moves on a great circle; a model with classes stays in one: --labels, or that of the first seed.
    """
    wanted = options.parse_seeds(seeds)
    wanted = [*wanted, wanted[0]] if loop else wanted
    images.one_result(as_json, out)
    moves = images.is_animation(out)
    if not moves:
        images.check_target("--out", out)

    from cmtool import starts
    from cmtool.io.images import grid, to_uint8, write_animation, write_image

    model = images.chosen(model)
    flow = images.ready(images.read_model(model), device=device, precision=precision)
    chosen = images.labels(flow, labels)
    made = to_uint8(
        starts.interpolate(
            flow,
            wanted,
            frames=frames,
            steps=steps,
            times=None if times is None else options.parse_times(times),
            labels=chosen,
            solver=solver,
            batch=batch,
        )
    )
    if moves:
        write_animation(out, made[:-1] if loop else made, fps, scale)
    else:
        write_image(out, grid(made, columns=frames if len(made) > 2 * frames else len(made), scale=scale))
    if as_json:
        console.emit_json({"file": out, "images": len(made), "seeds": wanted, "model": model})
    elif out != "-":
        console.emit_line(out)
