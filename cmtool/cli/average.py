"""`cmtool average`: the averages of the weights that a run has kept, and those that can be made of them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, options
from cmtool.errors import CheckpointError, UsageError, nearest

if TYPE_CHECKING:
    from cmtool.flow.flow_map import FlowMap
    from cmtool.io.run import RunFolder
    from cmtool.training.average import Power

_LARGE_ERROR = 0.1  # of a profile; below, one mistakes it for the wanted one
_LARGE_GAIN = 100.0  # of the rounding errors of snapshots, 1e-4 of a weight


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Write this average.")] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option("--sigma-rel", metavar="WIDTH", help="Make a power-function average this wide: up to 0.2887."),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=1, help="As of this step. [default: the last one kept]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The .safetensors file to write.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the averages of the weights that a run has kept, or write one as a model.

    --sigma-rel makes a power-function average that the run has not kept, out of the snapshots of those it has: its
    width, relative to the length of the training, is chosen afterwards. Snapshots of two widths are enough.
    """
    if name is not None and sigma_rel is not None:
        raise UsageError("--name and --sigma-rel do not go together", "give one of the two")
    writes = name is not None or sigma_rel is not None
    if writes and out is None:
        raise UsageError("missing option '--out'", "name the model file to write: --out average.safetensors")
    for option, value in (("--out", out), ("--step", step)):
        if value is not None and not writes:
            raise UsageError(f"{option} needs an average to write", "add --name or --sigma-rel")
    if out is not None and out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: a model file ends in .safetensors", f"for example --out {out.stem}.safetensors")
    wanted = None if sigma_rel is None else _power(sigma_rel)

    from cmtool.io.run import RunFolder

    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise CheckpointError(f"there is no run in {run}", "name the folder that a training has made")
    if out is None:
        _list(folder, as_json)
        return
    stored = folder.averages()
    if not stored:
        model = folder.path / "model.safetensors"
        raise CheckpointError(f"the run {run} keeps one average of the weights only", f"use {model} as it is")
    if any(out.resolve() == file.resolve() for files in stored.values() for file in files.values()):
        raise UsageError(f"--out {out} is one of the run's own snapshots", "name another file")

    if wanted is not None:
        made = _reconstruct(folder, stored, wanted, step)
    else:
        assert name is not None
        if name not in stored:
            raise UsageError(f"--name: there is no average {name!r} in {run}", nearest(name, stored))
        made = _load(stored[name][_step(name, stored[name], step)])

    from cmtool.io import checkpoint

    checkpoint.save(made, out)
    if as_json:
        card = made.card
        console.emit_json({"run": str(run), "model": str(out), "average": card.average, "step": card.iterations})
    else:
        console.emit_line(out)


def _power(sigma_rel: float) -> Power:
    from cmtool.training.average import Power

    try:
        return Power(sigma_rel)
    except ValueError as error:
        raise UsageError(f"--sigma-rel: {error}", "for example --sigma-rel 0.07") from error


def _list(folder: RunFolder, as_json: bool) -> None:
    """Print what there is: names and steps."""
    from cmtool.io import checkpoint

    steps = {name: list(files) for name, files in folder.averages().items()}
    if not steps:
        card = checkpoint.header(folder.path)["card"]
        steps = {card.get("average") or "unnamed": [card.get("iterations") or 0]}
    if as_json:
        averages = [{"name": name, "steps": made} for name, made in steps.items()]
        console.emit_json({"run": str(folder.path), "averages": averages})
    else:
        console.emit_rows([(name, ",".join(map(str, made))) for name, made in steps.items()])


def _step(name: str, files: Mapping[int, Path], step: int | None) -> int:
    """The step that is asked for, if there is a snapshot of it."""
    if step is None:
        return max(files)
    if step not in files:
        close = sorted(sorted(files, key=lambda made: abs(made - step))[:3])
        raise UsageError(
            f"--step {step}: the run has no snapshot of {name} from this step",
            f"{'the nearest are' if len(close) > 1 else 'there is'} {', '.join(map(str, close))}",
        )
    return step


def _load(file: Path) -> FlowMap:
    from cmtool.io import checkpoint

    return checkpoint.load(file)


def _reconstruct(
    folder: RunFolder, stored: Mapping[str, Mapping[int, Path]], wanted: Power, step: int | None
) -> FlowMap:
    """The power-function average that ends at `step`, out of all snapshots up to there."""
    from cmtool.training.average import Profile, combine, fit

    gammas = _gammas(folder)
    snapshots = sorted(
        (made, gammas[name], file) for name in stored.keys() & gammas.keys() for made, file in stored[name].items()
    )
    if snapshots:
        step = _step("a power-function average", {made: file for made, _, file in snapshots}, step)
    used = [entry for entry in snapshots if entry[0] <= (step or 0)]
    if len(used) < 2:
        when = f" up to step {step}" if snapshots else ""
        raise CheckpointError(
            f"--sigma-rel needs two snapshots or more of power-function averages, the run {folder.path} has "
            f"{len(used)}{when}",
            "train with averages of the kind power, two of them for any width; --name takes what there is",
        )
    found = fit([Profile(made, gamma) for made, gamma, _ in used], Profile(used[-1][0], wanted.gamma))
    if found.error > _LARGE_ERROR or found.gain > _LARGE_GAIN:
        console.note(
            f"the snapshots do not resolve {wanted.name} well: its profile is {100 * found.error:.0f} % off, rounding "
            f"errors grow {found.gain:.0f} times; a width between those kept, or more checkpoints, would do better"
        )
    model = _load(used[-1][2])
    with console.progress(wanted.name, len(used)) as update:

        def parts() -> Iterator[tuple[float, FlowMap]]:
            for done, (coefficient, (_, _, file)) in enumerate(zip(found.coefficients, used, strict=True), 1):
                yield coefficient, _load(file)
                update(done)

        combine(model, parts())
    model.card = replace(model.card, average=f"{wanted.name} (post-hoc)")
    return model


def _gammas(folder: RunFolder) -> dict[str, float]:
    """The exponents of the run's power-function averages, by their names."""
    from cmtool import spec
    from cmtool.training.average import AVERAGES, Average, Power

    recipe = folder.config()["recipe"]
    told = recipe.get("averages", []) if isinstance(recipe, dict) else []
    rules = spec.from_dict(told, tuple[Average, ...], AVERAGES, "recipe.averages")
    return {rule.name: rule.gamma for rule in rules if isinstance(rule, Power)}
