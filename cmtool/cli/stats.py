"""`cmtool stats`: what images are compared with, computed once and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmtool.cli import console, images, judging, options
from cmtool.errors import UsageError


def stats(
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="The images.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The .npz to write.")],
    features: judging.FeaturesOption = "random",
    weights: judging.WeightsOption = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", metavar="N", min=1, help="Crop and resize the images to this side.")
    ] = None,
    channels: Annotated[int, typer.Option("--channels", metavar="1|3", min=1, max=3, help="Grey or RGB.")] = 3,
    limit: judging.LimitOption = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Keep each image's features, for kd, precision and recall.")
    ] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Write the mean and covariance of the features of images, for `cmtool evaluate --data FILE`.

    The file has EDM's form (mu and sigma), and says besides which images and features it is of.
    """
    if out.suffix != ".npz":
        raise UsageError(f"--out {out}: statistics are an .npz", "for example --out ref.npz")
    if channels == 2:
        raise UsageError("--channels 2: images have 1 or 3", "1 is grey, 3 is RGB")
    images.check_folder("--out", out.parent)

    from cmtool import precision as policy
    from cmtool import processes
    from cmtool.evaluation.judging import references_of
    from cmtool.io.data import open_data
    from cmtool.io.extractors import write_statistics

    team = processes.join()
    extractors = judging.open_features([features], channels=channels, weights=weights, device=policy.device(device))
    found = open_data(data, resolution=resolution, channels=channels, limit=limit, workers=0)
    if len(found) < 2:
        raise UsageError(f"--data {data}: a covariance takes at least 2 images", "name more images")
    console.note(f"data: {found.report.summary()}")
    with console.progress("stats", len(found) // team.count) as update:
        references = references_of(extractors, found, team, update)
    if not team.first:
        return
    (extractor,), (reference,) = extractors.values(), references.values()
    about = {
        **extractor.about,
        "source": data,
        "images": len(found),
        "fingerprint": found.fingerprint,
        "resolution": found.report.resolution,
    }
    known = reference.statistics
    write_statistics(out, known.mean, known.covariance, about, reference.vectors if vectors else None)
    if as_json:
        console.emit_json({"file": str(out), "dimension": len(known.mean), **about})
    else:
        console.emit_line(out)
