"""`cmtool sample`: images out of noise."""

from __future__ import annotations

from typing import Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import UsageError


def sample(
    model: options.Model,
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="A folder, a file, a name with {seed}; - writes a pipe.")
    ] = None,
    grid: Annotated[str | None, typer.Option("--grid", metavar="FILE", help="Also all images in one picture.")] = None,
    seeds: options.Seeds = "0",
    labels: options.Labels = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Network calls; with --solver, solver steps. [default: 1; 18]")
    ] = None,
    times: options.Times = None,
    solver: options.Solver = None,
    rho: Annotated[
        float | None, typer.Option("--rho", min=0.1, help="Spacing of the solver's times. [default: 7]")
    ] = None,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Keep every estimate in the image range.")] = True,
    batch: options.Batch = 64,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Draw images from a model, one a seed.

    A consistency model needs one network call, more are better; a diffusion model (a teacher) needs a --solver.
    Image k is the same whatever other seeds are asked for.
    """
    wanted = options.parse_seeds(seeds)
    if out is None and grid is None:
        raise UsageError("nowhere to put the images", "give --out out/ or --grid grid.png")
    images.refuse_two_results(as_json, out, grid)
    if grid == "-":
        images.refuse_terminal("--grid")
    targets = images.places(out, wanted) if out is not None else [None] * len(wanted)

    import torch

    from cmtool import generate
    from cmtool.io.images import grid as arrange
    from cmtool.io.images import to_uint8

    flow = images.load_model(model, device=device, precision=precision)
    classes = images.classes(flow, wanted, labels)
    done: list[torch.Tensor] = []
