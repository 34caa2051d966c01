"""`cmtool search`: the times of the network calls that make the best samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.cli import console, images, judging, options
from cmtool.errors import UsageError

_METRICS = ("fd", "kd", "fid", "kid", "fd-dinov2")  # of those the least is the best


def search(
    model: options.OwnModel,
    data: judging.ReferenceOption,
    steps: Annotated[str, typer.Option("--steps", metavar="LIST", help="For how many network calls: 2,3,4.")] = "2",
    metric: Annotated[
        str, typer.Option("--metric", help="What is to be small.", **options.one_of("--metric", _METRICS))
    ] = "fd",
    features: judging.FeaturesOption = "random",
    weights: judging.WeightsOption = None,
    num: Annotated[
        int, typer.Option("--num", "-n", metavar="N", min=2, max=options.MAX_SEEDS, help="Samples a point: 0 to N-1.")
    ] = 2000,
    points: Annotated[
        int, typer.Option("--points", metavar="N", min=3, max=10_000, help="Points of the grid of times.")
    ] = 40,
    scan: Annotated[bool, typer.Option("--scan", help="Measure every point of the grid, too.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Store the times in the model, for --steps.")] = False,
    limit: judging.LimitOption = None,
    labels: options.Labels = None,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Search for the time points of 2, 3, ... network calls, one after another.

    The greedy ternary search of Song et al. (2023), on a grid of the model's path: all points are measured with the
    same seeds, and the best of all that were tried is taken, the times that the model takes now among them. Those found
    for three calls begin with those found for two.
    """
    wanted = options.parse_steps(steps)
    if min(wanted) < 2:
        raise UsageError("--steps 1: a single call is made at the largest time, always", "take 2 or more")
    if points < max(wanted):
        raise UsageError(f"--points {points} leave no choice for {max(wanted)} calls", "take more, 40 for example")

    from cmtool import precision as policy
    from cmtool import processes
    from cmtool.evaluation.judging import Judge, samples
    from cmtool.evaluation.metrics import parse_metrics
    from cmtool.evaluation.search import Tried
    from cmtool.evaluation.search import search as run
    from cmtool.generate import check_role
    from cmtool.io import checkpoint
    from cmtool.sampler import default_times
    from cmtool.times import Karras

    team = processes.join()
    target = _target(model) if write else None
    flow = images.ready(images.read_model(model), device=device, precision=precision)
    check_role(flow, None)
    place = policy.device(device)
    (measured,) = parse_metrics([metric], features)
    extractors = judging.open_features([measured.features], channels=flow.card.channels, weights=weights, device=place)
    size = (flow.card.resolution, flow.card.channels)
    references, about = judging.open_references(data, [measured], extractors, limit=limit, size=size, team=team)
    judge = Judge([measured], extractors, references, team)
    name = measured.name(num)
    chosen = images.labels(flow, labels)

    def score(times: tuple[float, ...]) -> float:
        made = (part for part, _ in samples(flow, range(num), team, times=times, labels=chosen, batch=batch))
        return judge(made)[name]

    def tell(tried: Tried) -> None:
        console.note(f"{_text(tried.times)}: {name} {tried.value:.6g}")

    grid = Karras(flow.card.grid_rho).times(flow.path, points + 1)[:-1]  # at t_min a call changes nothing
    landing = "next" if flow.card.role == "flow_map" else "t_min"
    found: dict[int, Any] = {}
    for result in run(score, grid, max(wanted), scan=scan, tell=tell):
        count = len(result.times)
        if count in wanted:
            before = tuple(float(t) for t in default_times(flow, count, landing))  # type: ignore[arg-type]
            known = score(before)
            better = result.value <= known  # what the model takes now is a candidate, too
            found[count] = {
                "times": list(result.times if better else before),
                name: min(result.value, known),
                "before": {"times": list(before), name: known},
                "tried": [{"time": one.times[-1], name: one.value, "scan": one.scanned} for one in result.tried],
            }
    if not team.first:
        return
    if target is not None:
        checkpoint.set_times(target, {str(count): entry["times"] for count, entry in found.items()})
        console.note(f"the times are in {target} now, for --steps {','.join(map(str, found))}")
    if as_json:
        console.emit_json(
            {
                "model": judging.identity(flow, model),
                "reference": about,
                "features": [extractor.about for extractor in extractors.values()],
                "samples": {"count": num, "seeds": f"0-{num - 1}"},
                "grid": [float(t) for t in grid],
                "steps": {str(count): entry for count, entry in found.items()},
                "written": str(target) if target else None,
                "computed": judging.machine(place, flow.compute_dtype),
            }
        )
        return
    for count, entry in found.items():
        before = entry["before"]
        console.emit_rows(
            [
                (f"{count} calls", "found", _text(entry["times"]), f"{name} {entry[name]:.6g}"),
                ("", "before", _text(before["times"]), f"{name} {before[name]:.6g}"),
            ]
        )


def _target(model: str) -> Path:
    """The file that the times are written to: the model's own."""
    from cmtool.io.checkpoint import MODEL_FILE

    path = Path(model)
    file = path / MODEL_FILE if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise UsageError(f"--write stores times in files of cmtool's, and {model} is none", "cmtool convert makes one")
    if not os.access(file.parent, os.W_OK):
        raise UsageError(f"--write: nothing can be written to {file.parent}", "copy the model first")
    return file


def _text(times: tuple[float, ...] | list[float]) -> str:
    return ",".join(f"{t:.4g}" for t in times)
