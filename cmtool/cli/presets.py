"""`cmtool presets`: the recipes that come with cmtool."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import console, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from cmtool.training.presets import Shape
    from cmtool.training.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="List the training recipes, or show one.")

TRAIN, INIT, BOTH, DISTIL = "train", "train --init", "train, distill", "distill"  # in the order of the list
# The command that each preset is for. Its recipe knows, too, but to ask it would load torch.
COMMANDS = {
    **dict.fromkeys(("edm", "flow", "ct", "ict", "sct", "flow-ct", "shortcut"), TRAIN),
    **dict.fromkeys(("ect", "tcm", "ct-continuous"), INIT),
    "meanflow": BOTH,
    **dict.fromkeys(("cd", "cd-continuous", "scd", "flow-cd", "direct", "pd", "reflow"), DISTIL),
    **dict.fromkeys(("edm-cifar10", "edm-cifar10-vp", "edm-imagenet64", "edm-lsun256"), TRAIN),
    **dict.fromkeys(("ct-cifar10", "ct-imagenet64", "ct-lsun256", "ict-cifar10", "ict-imagenet64"), TRAIN),
    "meanflow-cifar10": TRAIN,
    **dict.fromkeys(("ect-cifar10", "ect-cifar10-fast", "tcm-cifar10", "sct-cifar10", "ct-continuous-cifar10"), INIT),
    **dict.fromkeys(("cd-cifar10", "cd-imagenet64", "cd-lsun256"), DISTIL),
    **dict.fromkeys(("pd-cifar10", "scd-cifar10", "cd-continuous-cifar10"), DISTIL),
}


@app.command("ls")
def ls(as_json: options.Json = False) -> None:
    """List the presets: name, command, method.

    First those for minutes on a CPU, then the published ones, named after their data.
    """
    from cmtool.training import presets

    listed = [(name, COMMANDS[name], presets.summary(name)) for name in sorted(presets.PRESETS, key=_place)]
    if as_json:
        columns = ("name", "command", "summary")
        console.emit_json({"presets": [dict(zip(columns, row, strict=True)) for row in listed]})
    else:
        console.emit_rows(listed)


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
    described["command"] = COMMANDS[name]
    if recipe:
        from cmtool import spec

        described["recipe"] = spec.to_dict(resolve(name, presets.Shape(resolution)))
    if as_json:
        console.emit_json(described)
        return
    console.emit_line(f"{text}\n")
    for command in COMMANDS[name].split(", "):
        teacher = " --teacher TEACHER" if command == DISTIL else ""
        start = command.replace(INIT, f"{INIT} MODEL")
        console.emit_line(f"cmtool {start}{teacher} --data SOURCE --preset {name} --out RUN")
    if recipe:
        console.emit_line("")
        console.emit_rows(list(options.settings(described["recipe"])))


def resolve(name: str, shape: Shape) -> Recipe:
    """The preset's recipe for data of this shape.

    Raises:
        ConfigError: an unknown name. UsageError: no network of the preset makes such images.
    """
    from cmtool.training import presets

    make = presets.preset(name)
    try:
        return make(shape)
    except ValueError as error:
        side = f"{shape.resolution}x{shape.resolution}"
        raise UsageError(
            f"the preset {name} does not go with {side} images: {error}", "choose another --resolution"
        ) from error


def _place(name: str) -> tuple[bool, int]:
    """Where a preset stands in the list: by length of the training, then by command."""
    from cmtool.training import presets

    published = presets.PRESETS[name].__module__.endswith(".published")
    return published, (TRAIN, INIT, BOTH, DISTIL).index(COMMANDS[name])
