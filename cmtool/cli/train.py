"""`cmtool train` and `cmtool distill`: the same options; `distill` adds a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from cmtool.cli import options, training
from cmtool.cli.request import taking
from cmtool.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a training, as they stand on the command line; None where they are not given."""

    distils: ClassVar[bool] = False

    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="The run folder to make.")] = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="digits, or a folder, .zip, .npz, .npy, .tar or .parquet of images, or what `data pack` wrote.",
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="The recipe; see `cmtool presets ls`. [default: flow-cd from a teacher, ect with --init, else ict]",
            autocompletion=options.preset_names,
        ),
    ] = None
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="SOURCE",
            help="Start from the weights of a model: any that sample takes.",
        ),
    ] = None
    iterations: Annotated[
        str | None, typer.Option("--iterations", metavar="COUNT", help="How long, in steps: 400k.")
    ] = None
    duration: Annotated[str | None, typer.Option("--duration", metavar="COUNT", help="How long, in images: 51.2M.")] = (
        None
    )
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", min=1, help="Images a step, over all devices.")
    ] = None
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate.")] = None
    network: Annotated[
        str | None,
        typer.Option(
            "--network", metavar="SIZE", help="tiny, small, adm-small or a published one [default: the preset's]."
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of `cmtool presets show NAME`; repeatable."),
    ] = None
    lpips_backbone: Annotated[
        Path | None,
        typer.Option("--lpips-backbone", metavar="FILE", help="The pretrained network of the LPIPS distance."),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of everything random. [default: 0]")
    ] = None
    resolution: Annotated[
        int | None, typer.Option("--resolution", metavar="N", min=1, help="Crop and resize the images to this side.")
    ] = None
    crop: Annotated[
        str | None, typer.Option("--crop", help="How they become square.", **options.one_of("--crop", options.CROPS))
    ] = None
    resize: Annotated[
        str | None,
        typer.Option("--resize", help="How they become smaller.", **options.one_of("--resize", options.RESIZES)),
    ] = None
    upscale: Annotated[bool | None, typer.Option("--upscale/--no-upscale", help="Let smaller images be enlarged.")] = (
        None
    )
    channels: Annotated[
        int | None, typer.Option("--channels", metavar="1|3", min=1, max=3, help="Grey or RGB. [default: 3]")
    ] = None
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Of a table (hf:owner/name, parquet): read each row as it comes, in every epoch anew; store nothing.",
        ),
    ] = False
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", min=0, max=64, help="Processes that decode data too large for the memory."
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="PATH", help="A run or its config.json: the options not given here."),
    ] = None
    micro_batch: Annotated[
        str | None,
        typer.Option(
            "--micro-batch",
            metavar="N|auto",
            help="Images whose gradient is computed at once: less memory, the same result. auto: as many as fit. "
            "[default: the batch]",
            **options.parsed(options.parse_micro_batch),
        ),
    ] = None
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations", help="Compute what the backward pass needs again: less memory, slower."
        ),
    ] = False
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Of several processes (torchrun), let each hold a part of all weights: less memory, slower."
        ),
    ] = False
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Let torch.compile work on the networks; of use on GPUs."),
    ] = None
    device: options.Device = "auto"
    precision: options.Precision = "auto"
    log_every: Annotated[int | None, typer.Option("--log-every", metavar="N", min=1, help="Steps between metrics.")] = (
        None
    )
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every", metavar="N", min=1, help="Steps between checkpoints, which come every half hour anyway."
        ),
    ] = None
    sample_every: Annotated[
        int | None, typer.Option("--sample-every", metavar="N", min=0, help="Steps between sample grids; 0 is never.")
    ] = None
    judge_every: Annotated[
        int | None,
        typer.Option(
            "--judge-every",
            metavar="N",
            min=0,
            help="Steps between measures of quality, the best is kept; 0 is never. [default: a tenth of 1,000 or more]",
        ),
    ] = None
    track: Annotated[
        str | None,
        typer.Option(
            "--track",
            metavar="NAMES",
            help="Write metrics also for tensorboard, wandb or both: tensorboard,wandb.",
            **options.parsed(options.parse_trackers),
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            "-n",
            help="Check everything, print the settings, the memory and the time it takes; start nothing.",
        ),
    ] = False
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue a run; nothing else is needed. With --data, start it if it is new.",
        ),
    ] = None
    stop_after: Annotated[
        int | None,
        typer.Option("--stop-after", metavar="N", min=1, help="Stop after N steps as a signal would: save, exit 75."),
    ] = None
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", min=1, help="Checkpoints to continue from that stay. [default: 2]"),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False
    as_json: options.Json = False
    # Those of `distill`, hidden here: `train` says where they belong.
    teacher: Annotated[str | None, typer.Option("--teacher", hidden=True, help="See distill.")] = None
    guidance: Annotated[float | None, typer.Option("--guidance", hidden=True, help="See distill.")] = None


@dataclass(frozen=True, kw_only=True)
class Distillation(Request):
    """The options of a training with a teacher."""

    distils: ClassVar[bool] = True

    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="SOURCE",
            help="The diffusion model to distil: a run, a file, a released name, hf:owner/name or https://.",
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", metavar="W", help="Classifier-free guidance of the teacher, built into the student."
        ),
    ] = None


@taking(Request)
def train(request: Request) -> None:
    """Train a model on images.

    A diffusion teacher, or a model that takes one step or a few and needs no teacher. Give --data, or a --config
    that names it.
    """
    if request.teacher is not None or request.guidance is not None:
        name = "--teacher" if request.teacher is not None else "--guidance"
        raise UsageError(
            f"train follows no teacher, and {name} is of one",
            "use cmtool distill --teacher; --init starts from a model's weights",
        )
    training.run(request)


@taking(Distillation)
def distill(request: Distillation) -> None:
    """Distil a diffusion model into one of few steps.

    The student of a teacher takes one step or a few. Give --teacher and --data, or a --config that names them.
    """
    training.run(request)
