"""`cmtool train` and `cmtool distill`: the same command; `distill` adds a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli import options, training
from cmtool.errors import UsageError

Data = Annotated[
    str | None, typer.Option("--data", metavar="SOURCE", help="digits, or a folder, .zip, .npz or .npy of images.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="The recipe; see `cmtool presets ls`.", autocompletion=options.preset_names
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The run folder to make.")]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", metavar="PATH", help="The diffusion model to distil: a run or a file.")
]
NoTeacher = Annotated[
    Path | None, typer.Option("--teacher", hidden=True, help="See distill.")
]  # to say where it belongs
Iterations = Annotated[str | None, typer.Option("--iterations", metavar="COUNT", help="How long, in steps: 400k.")]
Duration = Annotated[str | None, typer.Option("--duration", metavar="COUNT", help="How long, in images: 51.2M.")]
Batch = Annotated[int | None, typer.Option("--batch", metavar="N", min=1, help="Images a step, over all devices.")]
LearningRate = Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate.")]
Init = Annotated[Path | None, typer.Option("--init", metavar="PATH", help="Start from the weights of this model.")]
Backbone = Annotated[
    Path | None, typer.Option("--lpips-backbone", metavar="FILE", help="The pretrained network of the LPIPS distance.")
]
Network = Annotated[
    str | None,
    typer.Option("--network", metavar="SIZE", help="tiny, small, or a published one [default: the preset's]."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Of everything random. [default: 0]")]
Resolution = Annotated[
    int | None, typer.Option("--resolution", metavar="N", min=1, help="Crop and resize the images to this side.")
]
Crop = Annotated[
    str | None, typer.Option("--crop", help="How they become square.", **options.one_of("--crop", options.CROPS))
]
Resize = Annotated[
    str | None,
    typer.Option("--resize", help="How they become smaller.", **options.one_of("--resize", options.RESIZES)),
]
Upscale = Annotated[bool | None, typer.Option("--upscale/--no-upscale", help="Let smaller images be enlarged.")]
Channels = Annotated[
    int | None, typer.Option("--channels", metavar="1|3", min=1, max=3, help="Grey or RGB. [default: 3]")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="PATH", help="A run or its config.json: the options not given here.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of `cmtool presets show NAME`; repeatable."),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", metavar="W", help="Classifier-free guidance of the teacher, built into the student."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Check everything, print the settings, start nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
LogEvery = Annotated[int | None, typer.Option("--log-every", metavar="N", min=1, help="Steps between metrics.")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", metavar="N", min=1, help="Steps between checkpoints.")]
SampleEvery = Annotated[
    int | None, typer.Option("--sample-every", metavar="N", min=0, help="Steps between sample grids; 0 is never.")
]


def train(
    out: Out,
    data: Data = None,
    preset: Preset = None,
    iterations: Iterations = None,
    duration: Duration = None,
    batch: Batch = None,
    lr: LearningRate = None,
    init: Init = None,
    lpips_backbone: Backbone = None,
    network: Network = None,
    seed: Seed = None,
    resolution: Resolution = None,
    crop: Crop = None,
    resize: Resize = None,
    upscale: Upscale = None,
    channels: Channels = None,
    config: Config = None,
    set_: Set = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    log_every: LogEvery = None,
    save_every: SaveEvery = None,
    sample_every: SampleEvery = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
    teacher: NoTeacher = None,
) -> None:
    """Train a model on images: a diffusion teacher, or a consistency model without one.

    Needs --data and --preset, or a --config that names them.
    """
    if teacher is not None:
        raise UsageError(
            "train follows no teacher", "use cmtool distill --teacher; --init starts from a model's weights"
        )
    training.run(training.Request(**locals()))


def distill(
    out: Out,
    teacher: Teacher = None,
    data: Data = None,
    preset: Preset = None,
    iterations: Iterations = None,
    duration: Duration = None,
    batch: Batch = None,
    lr: LearningRate = None,
    init: Init = None,
    lpips_backbone: Backbone = None,
    network: Network = None,
    seed: Seed = None,
    resolution: Resolution = None,
    crop: Crop = None,
    resize: Resize = None,
    upscale: Upscale = None,
    channels: Channels = None,
    config: Config = None,
    set_: Set = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    log_every: LogEvery = None,
    save_every: SaveEvery = None,
    sample_every: SampleEvery = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    guidance: Guidance = None,
    as_json: options.Json = False,
) -> None:
    """Distil a diffusion teacher into a model that takes one step or a few.

    Needs --teacher, --data and --preset, or a --config that names them.
    """
    training.run(training.Request(**locals(), distils=True))
