"""`cmtool presets`: the recipes that come with cmtool."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from cmtool.cli import console, options

app = typer.Typer(no_args_is_help=True, help="List the training recipes, or show one.")


@app.command("ls")
def ls(as_json: options.Json = False) -> None:
    """List the presets, a line each."""
    from cmtool.training import presets

    summaries = {name: presets.summary(name) for name in presets.PRESETS}
    if as_json:
        console.emit_json({"presets": [{"name": name, "summary": text} for name, text in summaries.items()]})
    else:
        console.emit_rows(list(summaries.items()))


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset.", autocompletion=options.preset_names)],
    recipe: Annotated[bool, typer.Option("--recipe/--no-recipe", help="Every setting, as --set names it.")] = True,
    resolution: Annotated[int, typer.Option("--resolution", metavar="N", min=1, help="Images of the recipe.")] = 32,
    as_json: options.Json = False,
) -> None:
    """Say what a preset is: the paper, the numbers, and every setting that --set reaches."""
    from cmtool.training import presets

    text = inspect.getdoc(presets.preset(name)) or ""
    described: dict[str, Any] = {"name": name, "summary": presets.summary(name), "text": text}
    if recipe:
        from cmtool import spec

        described["recipe"] = spec.to_dict(presets.preset(name)(presets.Shape(resolution)))
    if as_json:
        console.emit_json(described)
        return
    console.emit_line(text)
    if recipe:
        console.emit_line("")
        console.emit_rows(list(options.settings(described["recipe"])))
