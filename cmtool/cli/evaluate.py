"""`cmtool evaluate`: numbers for samples, with all that makes them comparable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import console, images, judging, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.evaluation.judging import Judge
    from cmtool.flow.flow_map import FlowMap
    from cmtool.processes import Processes

_ODE = "ode-error"
_ODE_SEEDS = 256  # images whose ODE is solved, at most


def evaluate(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SOURCE", help="The model whose samples are judged. [default: as of sample]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help="What to compare with: images, or a file of cmtool stats, EDM or ADM."
        ),
    ] = None,
    pictures: Annotated[
        str | None, typer.Option("--images", metavar="SOURCE", help="Images to judge in place of a model's.")
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", metavar="LIST", help="fd, kd, precision, recall; fid, kid, is, fd-dinov2; ode-error."
        ),
    ] = "fd,precision,recall",
    features: judging.FeaturesOption = "random",
    weights: judging.WeightsOption = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="LIST", help="Network calls, a row each: 1,2,4. [default: 1; solvers: 18]"),
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", metavar="N", min=2, max=options.MAX_SEEDS, help="Samples: the seeds 0 to N-1.")
    ] = 10_000,
    repeats: Annotated[
        int,
        typer.Option("--repeats", metavar="R", min=1, help="Judge R such sets, the next seeds each: mean and spread."),
    ] = 1,
    limit: judging.LimitOption = None,
    labels: options.Labels = None,
    times: options.Times = None,
    solver: options.Solver = None,
    guidance: options.Guidance = 1.0,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="SOURCE", help="The diffusion model, for ode-error.")
    ] = None,
    backbone: options.LpipsBackbone = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON there, too.")] = None,
    batch: options.Batch = None,
    role: options.Role = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Judge a model's samples, or images, by their distance from a data set.

    Always at hand: fd (Fréchet distance), kd (kernel distance), precision and recall in the features of random filters.
    fid, kid and is take torch-fidelity and its Inception weights; a fid of fewer than 10,000 samples is called fid@N.
    The JSON holds the whole protocol. The same seeds give the same numbers, in any batches and any number of processes;
    other seeds give others: --repeats says by how much.
    """
    names = options.parse_names(metrics, "--metrics")
    _check(model, pictures, data, names, teacher, steps, times, out)
    if repeats > 1 and (pictures is not None or names == [_ODE]):
        raise UsageError("--repeats are other seeds of a model's samples, and none are judged here", "leave it out")
    if repeats * num > options.MAX_SEEDS:
        raise UsageError(f"--repeats {repeats} of {num} samples are too many", f"{options.MAX_SEEDS:,} in all at most")
    if backbone is not None and teacher is None:
        raise UsageError("--lpips-backbone is for the ODE error", f"add --metrics {_ODE} --teacher SOURCE")
    counts: list[int | None] = [None] if steps is None else [*options.parse_steps(steps)]

    from cmtool import precision as policy
    from cmtool import processes
    from cmtool.evaluation.judging import Judge, pictures_of
    from cmtool.evaluation.metrics import DEFINITIONS, parse_metrics
    from cmtool.generate import check_role

    team = processes.join()
    place = policy.device(device)
    wanted = parse_metrics([name for name in names if name != _ODE], features)
    model = images.chosen(model) if pictures is None else None
    flow = images.ready(images.read_model(model, role=role), device=device, precision=precision) if model else None  # type: ignore[arg-type]
    if flow is not None and wanted:
        check_role(flow, solver)
    shown = None
    if pictures is not None:
        from cmtool.io.data import open_data

        shown = open_data(pictures, workers=0)
    alike = images.lpips(backbone, place) if backbone is not None else None
    follow = None
    if teacher is not None:
        follow = images.ready(images.read_model(teacher, role="denoiser"), device=device, precision=precision)
    channels = flow.card.channels if flow is not None else shown.report.channels if shown is not None else 3
    extractors = judging.open_features(
        (one.features for one in wanted), channels=channels, weights=weights, device=place
    )
    result: dict[str, Any] = {"metrics": names, "definitions": DEFINITIONS}
    judge = None
    if wanted and data is not None:
        size = (flow.card.resolution, flow.card.channels) if flow is not None else None
        references, about = judging.open_references(data, wanted, extractors, limit=limit, size=size, team=team)
        judge = Judge(wanted, extractors, references, team)
        result |= {"reference": about, "features": [one.about for one in extractors.values()]}
    if flow is not None:
        chosen = images.labels(flow, labels)
        asked = {"solver": solver, "guidance": None if guidance == 1 else guidance, "labels": chosen}
        result["model"] = judging.identity(flow, str(model))
        sets = [range(first, first + num) for first in range(0, repeats * num, num)]
        result["samples"] = {
            "count": num,
            "seeds": ",".join(f"{seeds[0]}-{seeds[-1]}" for seeds in sets),
            "rounding": "to uint8, once",
            **{name: value for name, value in asked.items() if value is not None},
        }
        how = {"labels": chosen, "solver": solver, "guidance": guidance, "batch": batch}
        rows = [_row(flow, judge, sets, count, times, how, team) for count in counts] if judge is not None else []
        if follow is not None:
            rows += [_ode(flow, follow, str(teacher), min(num, _ODE_SEEDS), chosen, batch, alike)]
    else:
        assert shown is not None
        assert judge is not None
        result["images"] = {"source": pictures, "count": len(shown), "fingerprint": shown.fingerprint}
        rows = [{"metrics": judge(pictures_of(shown, team))}]
    result |= {"computed": judging.machine(place, flow.compute_dtype if flow is not None else None), "results": rows}
    if team.first:
        _tell(result, out, as_json)


def _check(
    model: str | None,
    pictures: str | None,
    data: str | None,
    names: list[str],
    teacher: str | None,
    steps: str | None,
    times: str | None,
    out: Path | None,
) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if model is not None and pictures is not None:
        raise UsageError("evaluate takes a --model or --images, not both", "leave one of the two out")
    if data is None and names != [_ODE]:
        raise UsageError("missing option '--data'", "what to compare with: images, or a file of statistics")
    if (_ODE in names) != (teacher is not None):
        missing = "a --teacher" if teacher is None else f"--metrics {_ODE}"
        raise UsageError(f"the ODE error takes both: {missing} is missing", f"add --metrics {_ODE} --teacher SOURCE")
    if _ODE in names and pictures is not None:
        raise UsageError(f"{_ODE} is of a model, and images have none", f"leave out {_ODE}, or name a --model")
    if steps is not None and times is not None:
        raise UsageError("--steps and --times say the same thing twice", "give one of the two")
    if out is not None:
        images.check_folder("--out", out.parent)
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder", "name a file: result.json")


def _row(
    flow: FlowMap,
    judge: Judge,
    sets: list[range],
    steps: int | None,
    times: str | None,
    how: dict[str, Any],
    team: Processes,
) -> dict[str, Any]:
    """The numbers of samples in so many calls; of several sets of seeds the means, and what they are means of."""
    from statistics import fmean

    from cmtool.evaluation.judging import samples

    used = {"nfe": 0}
    given = None if times is None else options.parse_times(times)
    began = time.monotonic()
    title = "samples" if steps is None else f"samples, {steps} steps"

    def made(seeds: range) -> Iterator[Tensor]:
        done = 0
        with console.progress(title, len(seeds[team.share(len(seeds))])) as update:
            for part, nfe in samples(flow, seeds, team, steps=steps, times=given, **how):
                used["nfe"] = nfe
                done += len(part)
                yield part
                update(done)

    found = [judge(made(seeds)) for seeds in sets]
    numbers = {name: [one[name] for one in found] for name in found[0]}
    return {
        "steps": steps,
        "times": given,
        "nfe": used["nfe"],
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {name: fmean(values) for name, values in numbers.items()},
        **({"repeats": numbers} if len(sets) > 1 else {}),
    }


def _ode(
    flow: FlowMap,
    follow: FlowMap,
    teacher: str,
    count: int,
    labels: list[int] | None,
    batch: int | None,
    alike: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Any]:
    from cmtool.evaluation.ode_error import ode_error

    found = ode_error(flow, follow, range(count), labels=labels, batch=batch, distance=alike)
    lpips = {} if found.distance is None else {f"ode_lpips@{count}": found.distance}
    return {
        "teacher": judging.identity(follow, teacher),
        "solver": f"heun, {found.steps} steps",
        "metrics": {f"ode_error@{count}": found.error, f"ode_solution@{count}": found.solution, **lpips},
        "levels": found.levels,
        "error_from_level": found.from_level,
    }


def _tell(result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if out is not None:
        from cmtool.io.files import write_atomic

        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_atomic(out, lambda file: file.write(text.encode()))
    if as_json:
        console.emit_json(result)
        return
    lines = []
    for row in result["results"]:
        calls = row.get("nfe")
        label = f"{calls} call{'s' * (calls != 1)}" if calls else "ode" if "teacher" in row else "images"
        for name, value in row["metrics"].items():
            lines.append((label, name, f"{value:.6g}", _spread(row.get("repeats", {}).get(name, []))))
    console.emit_rows(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    from statistics import stdev

    least, most, deviation = min(values), max(values), stdev(values)
    return f"mean of {len(values)}: {least:.6g} to {most:.6g}, standard deviation {deviation:.2g}"
