"""The models in the box: how the small ones that come with cmtool were made, to be made again.

    python examples/box.py --only digits-small                          a quarter of an hour on 2 cores
    python examples/box.py --only cifar10-small --data CIFAR_FOLDER     some six minutes of training on a GPU

Each is a teacher, a student, the times that `cmtool search` finds for it, and its weights in bfloat16: NAME.safetensors
in --out is the file that lies in `cmtool/box`. CIFAR_FOLDER holds the training images, a folder a class. With --short a
few steps of each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import cmtool
from cmtool.io import checkpoint
from cmtool.io.images import grid, to_uint8, write_image


@dataclass(frozen=True)
class Recipe:
    """Arguments of the commands."""

    data: str
    title: str  # of the data, in the model's card
    classes: tuple[str, ...]
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    again: tuple[str, ...]  # a second stage, from the student on; empty without one
    more: dict[str, list[float]]  # times of more calls than the two that are searched for: chosen by hand
    grid: int  # an edit takes a call for each of so many noise levels but the last: see `examples/edits.py`
    limit: int  # bytes


RECIPES = {
    "digits-small": Recipe(
        data="digits:train",
        title="scikit-learn's handwritten digits, 1,437 images",
        classes=tuple("0123456789"),
        teacher=("train", "--preset", "edm", "--iterations", "900"),
        student=("distill", "--preset", "cd", "--set", "objective.times.curriculum.num=10", "--iterations", "600"),
        again=(),
        more={"3": [80.0, 0.8229, 0.06276], "4": [80.0, 2.5, 0.4701, 0.06276]},
        grid=10,
        limit=2 * 2**20,
    ),
    "cifar10-small": Recipe(
        data="",
        title="CIFAR-10, 50,000 training images as JPEG",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        teacher=(
            *("train", "--preset", "edm", "--network", "small", "--set", "network.num_blocks=2", "--batch", "512"),
            *("--lr", "1e-3", "--set", "optimizer.clip_norm=1", "--iterations", "2900"),
        ),
        student=(
            *("train", "--preset", "ect", "--batch", "512", "--lr", "5e-4", "--set", "optimizer.clip_norm=1"),
            *("--iterations", "2100"),
        ),
        again=(  # neighbours a quarter as far apart as in the last of the student's four stages
            *("train", "--preset", "ect", "--batch", "512", "--lr", "5e-4", "--set", "optimizer.clip_norm=1"),
            *("--set", "objective.times.q=64", "--set", "objective.times.stages=1"),
            *("--iterations", "3000", "--seed", "1"),
        ),
        more={"3": [80.0, 17.0, 3.0], "4": [80.0, 24.4, 5.84, 2.0]},
        grid=40,
        limit=8 * 2**20,
    ),
}


def run(*arguments: str | Path) -> None:
    print("cmtool", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "cmtool", *map(str, arguments)], check=True)


def make(name: str, recipe: Recipe, out: Path, *, short: bool) -> Path:
    """Train the model of that name; its file."""
    folder = out / name
    teacher, student = folder / "teacher", folder / "student"
    less = ("--iterations", "2", "--batch", "4") if short else ()
    start = ("--teacher", teacher) if recipe.student[0] == "distill" else ("--init", teacher)
    run(*recipe.teacher, "--data", recipe.data, "--out", teacher, *less, "--overwrite")
    run(*recipe.student, *start, "--data", recipe.data, "--out", student, *less, "--overwrite")
    if recipe.again:
        student, first = folder / "again", student
        run(*recipe.again, "--init", first, "--data", recipe.data, "--out", student, *less, "--overwrite")
    many = ("-n", "16", "--points", "3") if short else ("-n", "2000")
    run("search", "--model", student, "--data", recipe.data, "--features", "random", "--steps", "2", *many, "--write")
    checkpoint.set_times(student, recipe.more)
    return finish(student, recipe, out / f"{name}.safetensors")


def finish(student: Path, recipe: Recipe, target: Path) -> Path:
    """The file that goes into the package: half the size, and a card that says what the images were, not where."""
    model = cmtool.load(student)
    known = {"data": recipe.title, "class_names": recipe.classes, "licence": "Apache-2.0", "teacher": "", "source": ""}
    model.card = replace(model.card, grid_points=recipe.grid, **known)
    checkpoint.save(model, target, dtype=torch.bfloat16)
    size = target.stat().st_size
    if size > recipe.limit:
        raise SystemExit(f"{target} takes {size:,} bytes, more than {recipe.limit:,}")
    images = cmtool.sample(model, 60, labels=list(range(10)), steps=4)
    write_image(target.with_suffix(".png"), grid(to_uint8(images), columns=20, scale=64 // images.shape[-1]))
    print(f"{target}: {size:,} bytes; {target.with_suffix('.png')}: 60 images of four calls")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, help="one of them")
    parser.add_argument("--data", help="the folder of the CIFAR-10 training images")
    parser.add_argument("--out", type=Path, default=Path("box"))
    parser.add_argument("--short", action="store_true", help="a few steps of each: does everything run?")
    options = parser.parse_args()
    for name, recipe in RECIPES.items():
        if options.only in (None, name):
            recipe = recipe if recipe.data else replace(recipe, data=options.data)
            if not recipe.data:
                raise SystemExit(f"{name} needs --data: the folder of the CIFAR-10 training images")
            make(name, recipe, options.out, short=options.short)


if __name__ == "__main__":
    main()
