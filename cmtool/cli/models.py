"""`cmtool models`: the models that cmtool knows by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from cmtool.cli import console, options
from cmtool.io.files import sha256_of

app = typer.Typer(no_args_is_help=True, help="List the released models that --model takes by name.")

_FAMILIES = {
    "cmtool": "comes with cmtool",
    "openai": "OpenAI",
    "edm": "NVlabs EDM",
    "edm2": "NVlabs EDM2",
    "jcm": "OpenAI JAX",
}


@app.command("ls")
def ls(as_json: options.Json = False) -> None:
    """List the models known by name: what each is, origin, licence, size, SHA-256, how to sample, whether it is here.

    Sizes with a ~ are estimates. Publishers give no checksums: a file's is shown once it was fetched. Times are those
    that --steps 2 samples at.
    """
    from cmtool.io import checkpoint, origins
    from cmtool.io.box import BOXED, LICENCE
    from cmtool.io.catalogue import RELEASED

    described: list[dict[str, Any]] = []
    for boxed in BOXED.values():
        header = checkpoint.header(boxed.file)
        card = header["card"]
        described.append(
            {
                **asdict(boxed),
                "family": "cmtool",
                "role": card["role"],
                "resolution": card["resolution"],
                "num_classes": card["num_classes"],
                "licence": LICENCE,
                "parameters": header["parameters"],
                "size": header["bytes"],
                "sha256": sha256_of(boxed.file),
                "path": str(boxed.file),
                "times": card["times"],
                "sigmas": next(iter(card["times"].values()), []),
            }
        )
    for released in RELEASED.values():
        file = origins.kept(released)
        found = {
            "role": released.role,
            "estimated_size": released.estimated_size,
            "recorded_sha256": origins.checksum(file) if file else None,
            "path": str(file) if file else None,
            "sigmas": list(released.sigmas()),
        }
        described.append(asdict(released) | found)
    if as_json:
        console.emit_json({"folder": str(origins.folder()), "models": described})
    else:
        console.emit_rows([_row(model) for model in described])


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    sha256 = model["sha256"] or model.get("recorded_sha256")
    size = f"{model['size'] / 1e6:,.0f} MB" if model["size"] else f"~{model['estimated_size'] / 1e6:,.0f} MB"
    times = ",".join(f"{sigma:.4g}" for sigma in model["sigmas"])
    sampling = f"times {times}" if times else model.get("solver") or "-"
    return (
        model["name"],
        f"{model['title']}, {model['data']}",
        _FAMILIES[model["family"]],
        model["licence"],
        size,
        sha256[:12] if sha256 else "-",
        sampling,
        "here" if model["path"] else "-",
    )
