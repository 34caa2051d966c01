"""`cmtool data inspect` and `cmtool data preview`: what a data set holds, and what the network will see of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console
from cmtool.cli.options import Json
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from cmtool.io.data import Dataset, Inspection

app = typer.Typer(no_args_is_help=True, help="Look at image data before training on it.")


class Crop(StrEnum):
    """How images become square."""

    CENTER = "center"
    NONE = "none"


class Resize(StrEnum):
    """How images become smaller; none cuts out a window instead."""

    BOX = "box"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"
    NONE = "none"


class Channels(StrEnum):
    """RGB or grey."""

    GREY = "1"
    RGB = "3"


Source = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A folder or a zip of images (class sub-folders or dataset.json give labels), an .npz, an .npy, or the "
        "embedded digits, digits:train, digits:test.",
        show_default=False,
    ),
]
ResolutionOption = Annotated[
    int | None,
    typer.Option("--resolution", min=1, help="Crop and resize to this side. [default: all images must have one size]"),
]
CropOption = Annotated[Crop, typer.Option("--crop", help="Cut out the central square, or insist on square images.")]
ResizeOption = Annotated[
    Resize, typer.Option("--resize", help="The filter that makes images smaller; none cuts out a window instead.")
]
UpscaleOption = Annotated[bool, typer.Option("--upscale", help="Let images smaller than --resolution be enlarged.")]
ChannelsOption = Annotated[Channels, typer.Option("--channels", help="3 for RGB, 1 for grey.")]


@app.command("inspect")
def inspect(source: Source, as_json: Json = False) -> None:
    """Say what is in a data set: count, sizes, modes, classes, the first bad file."""
    from cmtool.io.data import inspect_data

    found = inspect_data(source)
    if as_json:
        console.emit_json(dataclasses.asdict(found))
    else:
        console.emit_rows(_rows(found))


@app.command("preview")
def preview(
    source: Source,
    out: Annotated[
        str,
        typer.Option("--out", metavar="PATH", help="A folder: one PNG each. A file, or - for a pipe: a grid."),
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many images, evenly spaced.")] = 64,
    resolution: ResolutionOption = None,
    crop: CropOption = Crop.CENTER,
    resize: ResizeOption = Resize.BOX,
    upscale: UpscaleOption = False,
    channels: ChannelsOption = Channels.RGB,
    scale: Annotated[int, typer.Option("--scale", min=1, max=64, help="Enlarge the pixels of a grid.")] = 1,
    as_json: Json = False,
) -> None:
    """Write images of a data set as the network will see them."""
    if as_json and out == "-":
        raise UsageError("--json and --out - both want standard output", "write the grid to a file")
    folder = out.endswith(("/", os.sep)) or os.path.isdir(out) or (out != "-" and not Path(out).suffix)
    if folder and scale > 1:
        raise UsageError("--scale enlarges a grid, and --out names a folder", "end --out in .png, or leave out --scale")

    from cmtool.io.data import open_data
    from cmtool.io.images import check_suffix, grid, write_image

    if not folder:
        check_suffix(out)
    data = open_data(
        source,
        resolution=resolution,
        crop=crop.value,
        resize=resize.value,
        upscale=upscale,
        channels=int(channels),
        limit=count,
    )
    if folder:
        if os.path.exists(out) and not os.path.isdir(out):
            raise DataError(f"--out {out} is a file", "name a folder, or a file that ends in .png")
        targets = [os.path.join(out, f"{index:05d}.png") for index in range(len(data))]
        for target, image in zip(targets, data.images, strict=True):
            write_image(target, image)
    else:
        targets = [out]
        write_image(out, grid(data.images, scale=scale))
    console.note(data.report.summary())
    if as_json:
        console.emit_json({"images": targets, "labels": _labels(data), "report": dataclasses.asdict(data.report)})
    elif out != "-":
        for target in targets:
            console.emit_line(target)


def _labels(data: Dataset) -> list[str] | None:
    return None if data.labels is None else [data.class_names[label] for label in data.labels.tolist()]


def _rows(found: Inspection) -> list[tuple[str, str]]:
    """What `inspect` prints for people."""
    rows = [
        ("source", f"{found.source} ({found.kind})"),
        ("images", f"{found.count:,}"),
        ("sizes", _counts(found.sizes)),
        ("modes", _counts(found.modes)),
        ("formats", _counts(found.formats)),
        ("classes", f"{len(found.classes)}: {_counts(found.classes, 20)}" if found.classes else "none"),
    ]
    if found.ignored:
        rows.append(("other files", f"{found.ignored:,}, ignored"))
    rows.append(("dropped", _counts(found.dropped) if found.dropped else "none"))
    if found.first_bad:
        rows.append(("first bad", f"{found.first_bad.name}: {found.first_bad.reason}"))
    rows.append(("resolution", str(found.resolution) if found.resolution else found.hint or "unknown"))
    return rows


def _counts(counts: Mapping[str, int], most: int = 8) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most:,} more" if len(counts) > most else "")
