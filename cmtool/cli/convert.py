"""`cmtool convert`: a model in another format, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli import console, options
from cmtool.errors import UsageError

FORMATS = ("cmtool", "diffusers", "openai", "onnx")


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A run, a file, a released name, hf:owner/name or https://.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The file to write, or the folder of a pipeline.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="The format. [default: as DST ends; none is diffusers]",
            **options.one_of("--to", FORMATS),
        ),
    ] = None,
    role: options.Role = None,
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", metavar="N", min=1, help="Of its images, where SRC does not tell."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="What else SRC does not tell: network.head_channels=32; repeatable."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file or the pipeline at DST.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model in another format, read it back and say how far the two are apart.

    From anything that --model takes: to cmtool's own file, which says all of itself; to a folder that diffusers'
    ConsistencyModelPipeline opens; to an OpenAI state dict; or to ONNX, the one-step map. Nothing in a file is run.
    """
    settings = []
    for text in set_ or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected NAME=VALUE", "for example --set network.head_channels=32")
        settings.append((name.strip(), value.strip()))

    from cmtool.io import converting

    with console.fetching(source) as update:
        done = converting.convert(
            source,
            target,
            to,  # type: ignore[arg-type]
            role=role,  # type: ignore[arg-type]
            resolution=resolution,
            settings=settings,
            overwrite=overwrite,
            progress=update,
        )
    for note in done.notes:
        console.note(f"note: {note}")
    console.note(f"largest difference on fixed inputs: {done.difference:.2g}, of values up to {done.scale:.3g}")
    if as_json:
        console.emit_json(dataclasses.asdict(done))
    else:
        console.emit_line(done.target)
