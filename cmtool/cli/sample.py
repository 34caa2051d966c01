"""`cmtool sample`: images out of noise."""

from __future__ import annotations

from typing import Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import UsageError

_SHOWN, _LARGE = 32, 96  # images, where nothing is asked for, and pixels of a side that people can see


def sample(
    *,
    model: options.Model = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="A folder, a file, a name with {seed}; - writes a pipe.")
    ] = None,
    grid: Annotated[str | None, typer.Option("--grid", metavar="FILE", help="All images in one picture.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="LIST",
            help="One image a seed: 0-63,100. [default: 0]",
            **options.parsed(options.parse_seeds),
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", metavar="N", min=1, max=options.MAX_SEEDS, help="How many: the seeds 0 to N-1."),
    ] = None,
    labels: options.Labels = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Network calls [default: 1]; with --solver its steps [default: 18]."
        ),
    ] = None,
    times: options.Times = None,
    solver: options.Solver = None,
    churn: options.Churn = None,
    landing: options.Landing = None,
    guidance: options.Guidance = 1.0,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Keep estimates in the image range.")] = True,
    batch: options.Batch = None,
    role: options.Role = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Draw images from a model, one a seed.

    A consistency model makes an image in one network call, a better one in a few; so does a two-time model, without
    new noise between its jumps. A diffusion model (a teacher) needs a --solver. With a --solver, or --landing next, a
    consistency model follows x' = (x - f) / t: no new noise either, but the more steps, the wider its images spread.
    The image of a seed is the same whatever other seeds are asked for. With no place named, 32 images go into
    samples.png, made in as many calls as the model recommends.
    """
    if num is not None and seeds is not None:
        raise UsageError("--num and --seeds say the same thing twice", "give one of the two")
    shown = out is None and grid is None and not as_json  # somebody wants to see what this does
    usual = f"0-{_SHOWN - 1}" if shown else "0"
    wanted = options.parse_seeds(f"0-{num - 1}" if num is not None else seeds or usual)
    if shown:
        grid = images.free_name("samples", ".png")
    elif out is None and grid is None:
        raise UsageError("there is no place for the images", "add --out out/ or --grid grid.png")
    if steps is not None and times is not None:
        raise UsageError("--steps and --times say the same thing twice", "give one of the two")
    if solver is not None and landing is not None:
        raise UsageError("--landing is for jumps, and a --solver makes none", "give one of the two")
    if churn is not None and solver in (None, "ancestral"):
        without = "there is no --solver" if solver is None else "ancestral sampling adds its own"
        raise UsageError(f"--churn adds noise on the way of a solver, and {without}", "add --solver heun")
    added = None if churn is None else options.parse_churn(churn)
    images.one_result(as_json, out, grid)
    targets = [None] * len(wanted) if out is None else images.places(out, wanted)
    if grid is not None:
        images.check_target("--grid", grid)

    import torch

    from cmtool import processes
    from cmtool.generate import Churn, generate
    from cmtool.io.images import grid as arrange
    from cmtool.io.images import write_image

    team = processes.join()
    model = images.chosen(model)
    imported = images.read_model(model, role=role)  # type: ignore[arg-type]
    flow = images.ready(imported, device=device, precision=precision)
    if shown and steps is None and times is None and solver is None and flow.card.times:
        steps = max(map(int, flow.card.times))
        console.note(f"{steps} network calls an image, the most this model recommends: --steps 1 is one")
    share = team.share(len(wanted))  # several processes make a part each
    made = generate(
        flow,
        wanted[share],
        steps=steps,
        times=None if times is None else options.parse_times(times),
        labels=images.labels(flow, labels),
        solver=solver,
        churn=None if added is None else Churn(*added),
        landing=landing,  # type: ignore[arg-type]
        guidance=guidance,
        batch=batch,
        clip=clip,
    )
    results = []
    on_stdout = not as_json and grid != "-"
    for entry, image in images.save("sample", made, wanted[share], targets[share], on_stdout=on_stdout):
        results.append((entry, image if grid is not None else None))
    results = [result for part in team.gathered(results) for result in part]
    if not team.first:
        return
    if on_stdout and out is not None:
        for entry, _ in results[len(wanted[share]) :]:
            console.emit_line(entry["path"])
    if grid is not None:
        tiles = torch.stack([image for _, image in results if image is not None])
        large = {"columns": 8, "scale": max(1, _LARGE // flow.card.resolution)} if shown else {}
        write_image(grid, arrange(tiles, **large))
    described = [entry for entry, _ in results]
    if as_json:
        asked = {"solver": solver, "churn": added, "landing": landing, "guidance": None if guidance == 1 else guidance}
        given = {name: value for name, value in asked.items() if value is not None}
        console.emit_json({"images": described, "grid": grid, "model": model, **given})
    elif grid not in (None, "-") and out != "-":
        console.emit_line(grid)
