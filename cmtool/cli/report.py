"""`cmtool report`: one page about one run or several side by side."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool import __version__
from cmtool.cli import console, images, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.reporting.chart import Chart


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FOLDER", help="Write each chart there as a picture, too.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a page about runs: curves, samples over time, quality, side by side.

    The page is one file and needs no network. Numbers that `cmtool evaluate --out RUN/NAME.json` left in the folder of
    a run are shown with the protocol of each.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: a report is a page", "for example --out report.html")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", "name a file: report.html")
    images.check_folder("--out", out.parent)

    if png is not None:
        images.check_folder("--png", png)

    from cmtool.io.files import write_atomic
    from cmtool.io.run import read_report
    from cmtool.reporting.page import Run, charts, page

    names = _names(runs)
    read = [Run(name, *read_report(folder)) for name, folder in zip(names, runs, strict=True)]
    text = page(read, version=__version__)
    write_atomic(out, lambda file: file.write(text.encode()))
    pictures = [] if png is None else _pictures(png, charts(read))
    if as_json:
        told = [{"run": run.name, "steps": len(run.lines), "evaluations": len(run.results)} for run in read]
        console.emit_json({"page": str(out), "runs": told, "pictures": [str(file) for file in pictures]})
    else:
        for file in (out, *pictures):
            console.emit_line(file)


def _pictures(folder: Path, drawn: list[Chart]) -> list[Path]:
    """Each chart that shows something as a PNG that is named after its title."""
    from cmtool.io.files import write_atomic
    from cmtool.reporting.plot import picture

    made = []
    for chart in drawn:
        if chart.drawn():
            file = folder / (re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")[:80] + ".png")
            write_atomic(file, partial(picture(chart).save, format="PNG"))
            made.append(file)
    return made


def _names(runs: list[Path]) -> list[str]:
    """The last parts of the folders' names that tell them apart."""
    folders = [Path(folder).resolve() for folder in runs]
    if len(set(folders)) < len(folders):
        raise UsageError("a run is named twice", "name each once")
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]
