"""`cmtool data`: what a data set holds, what the network will see of it, and the same packed into shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.io.data import Inspection

app = typer.Typer(no_args_is_help=True, help="Look at image data before training on it; pack it.")

Source = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A folder or a zip of images (sub-folders or a dataset.json give the classes), an .npz (of images, or of "
        "cmtool pairs), an .npy, tar shards, parquet or arrow files, hf:owner/name, or one of digits, digits:train, "
        "digits:test.",
        show_default=False,
    ),
]
Count = Annotated[int, typer.Option("--count", "-n", metavar="N", min=1, help="How many images, evenly spaced.")]
Out = Annotated[str, typer.Option("--out", metavar="PATH", help="A folder: one PNG each. A file, or -: a grid.")]
Resolution = Annotated[
    int | None,
    typer.Option(
        "--resolution",
        metavar="N",
        min=1,
        help="Crop and resize to this side. [default: all images must have one size]",
        show_default=False,
    ),
]
Crop = Annotated[
    str,
    typer.Option("--crop", help="Cut out the middle, or insist on squares.", **options.one_of("--crop", options.CROPS)),
]
Resize = Annotated[
    str,
    typer.Option("--resize", help="The filter; none cuts out a window.", **options.one_of("--resize", options.RESIZES)),
]
Upscale = Annotated[bool, typer.Option("--upscale", help="Let images smaller than --resolution be enlarged.")]
Channels = Annotated[
    int | None,
    typer.Option(
        "--channels",
        metavar="1|3",
        min=1,
        max=3,
        help="Grey or RGB. [default: 3; of pairs, as they are]",
        show_default=False,
    ),
]
Scale = Annotated[int, typer.Option("--scale", metavar="N", min=1, max=64, help="Enlarge the pixels of a grid.")]


@app.command("inspect")
def inspect(source: Source, as_json: options.Json = False) -> None:
    """Say what is in a data set: count, sizes, modes, classes, first bad file."""
    from cmtool.io.data import inspect_data

    found = inspect_data(source)
    if as_json:
        console.emit_json(dataclasses.asdict(found))
    else:
        console.emit_rows(_rows(found))


@app.command("preview")
def preview(
    source: Source,
    out: Out,
    count: Count = 64,
    resolution: Resolution = None,
    crop: Crop = "center",
    resize: Resize = "box",
    upscale: Upscale = False,
    channels: Channels = None,
    scale: Scale = 1,
    as_json: options.Json = False,
) -> None:
    """Write images of a data set as the network will see them."""
    images.one_result(as_json, out)
    one_file = images.places(out, [0]) == [out]
    if scale > 1 and not one_file:
        raise UsageError("--scale enlarges a grid, and --out names a folder", "give --out a name like grid.png")

    from cmtool.io.data import open_data
    from cmtool.io.images import grid, write_image

    data = open_data(
        source,
        resolution=resolution,
        crop=crop,
        resize=resize,
        upscale=upscale,
        channels=channels,
        limit=count,
    )
    if one_file:
        targets = [out]
        write_image(out, grid(data.pictures, scale=scale))
    else:
        targets = images.places(out, range(len(data)))
        for target, image in zip(targets, data.pictures, strict=True):
            write_image(target, image)
    console.note(data.report.summary())
    if as_json:
        labels = None if data.labels is None else [data.class_names[label] for label in data.labels.tolist()]
        console.emit_json({"images": targets, "labels": labels, "report": dataclasses.asdict(data.report)})
    elif out != "-":
        for target in targets:
            console.emit_line(target)


@app.command("pack")
def pack(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.", show_default=False)],
    resolution: Resolution = None,
    crop: Crop = "center",
    resize: Resize = "box",
    upscale: Upscale = False,
    channels: Channels = None,
    shard_images: Annotated[
        int, typer.Option("--shard-images", metavar="N", min=1, help="Images a tar file.")
    ] = 10_000,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Of a table (hf:owner/name, parquet): read each row as it comes, store nothing else."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a data set as tar shards, cropped and resized once: to train on data larger than the memory.

    FOLDER is then a SOURCE like others, at once and whatever its size. Its shards are WebDataset's.
    """
    images.check_folder("FOLDER", target)

    from cmtool.io.data import pack as write

    with console.counting("pack") as update:
        report = write(
            source,
            target,
            resolution=resolution,
            crop=crop,
            resize=resize,
            upscale=upscale,
            channels=channels,
            shard_images=shard_images,
            stream=stream,
            progress=update,
        )
    console.note(report.summary())
    if as_json:
        console.emit_json({"folder": str(target), "report": dataclasses.asdict(report)})
    else:
        console.emit_line(target)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    """What `inspect` prints for people."""
    rows = [
        ("source", f"{found.source} ({found.kind})"),
        ("images", f"{found.count:,}"),
        ("sizes", _counts(found.sizes) or "unknown"),
        ("modes", _counts(found.modes) or "unknown"),
        ("formats", _counts(found.formats) or "unknown"),
        ("classes", f"{len(found.classes):,}: {_counts(found.classes, 20)}" if found.classes else "none"),
        ("other files", f"{found.ignored:,}"),
        ("dropped", _counts(found.dropped) or "none"),
    ]
    if found.first_bad:
        rows.append(("first bad", f"{found.first_bad.name}: {found.first_bad.reason}"))
    if found.pairs:
        rows.append(("pairs", found.pairs.summary()))
    rows.append(("resolution", str(found.resolution) if found.resolution else found.hint or "unknown"))
    return rows


def _counts(counts: Mapping[str, int], most: int = 8) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f" and {len(counts) - most:,} more" if len(counts) > most else "")
