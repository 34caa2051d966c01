"""`cmtool fetch`: download models, and weights that distances and measures need, ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import console, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.io.origins import Located


def fetchable() -> list[str]:
    """What can be fetched by name, for completion."""
    from cmtool.io.catalogue import RELEASED, WEIGHTS

    return [*RELEASED, *WEIGHTS]


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="Released names (see models ls), hf:owner/name[@revision][:file], https addresses, or weights: "
            "lpips-vgg, lpips-alex, inception.",
            autocompletion=fetchable,
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Download models ahead of time, and print where they are; what is here already is checked.

    They are kept in CMTOOL_CACHE, else XDG_CACHE_HOME/cmtool, else ~/.cache/cmtool, and those of the Hub in its own
    cache. A download that was cut goes on where it stopped. lpips-vgg and lpips-alex are what the LPIPS distance is
    made of, inception is what FID is defined by.
    """
    from cmtool.io import auxiliary, catalogue, origins

    for name in names:
        if Path(name).exists():
            raise UsageError(
                f"{name} is a path: there is nothing to fetch", "name a release, an address or hf:owner/name"
            )
    described = []
    for name in names:
        with console.fetching(name) as progress:
            if name in catalogue.WEIGHTS:
                located = origins.Located(auxiliary.fetch(name, progress), None, name)
            else:
                located = origins.resolve(name, progress=progress)
        described.append(_described(located))
        if located.released:
            console.note(f"{name}: licence {located.released.licence}")
        if not as_json:
            console.emit_line(located.path)
    if as_json:
        console.emit_json({"models": described})


def _described(located: Located) -> dict[str, Any]:
    from cmtool.io import origins

    path = located.path
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "source": located.source,
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": origins.checksum(path),
        "released": located.released.name if located.released else None,
        "licence": located.released.licence if located.released else None,
    }
