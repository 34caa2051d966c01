"""What the commands that make images have in common: a model to load, and a place for each image."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cmtool.cli import options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.flow import FlowMap

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def load_model(
    source: Path, *, device: str, precision: str, role: Literal["denoiser", "consistency"] | None = None
) -> FlowMap:
    """The model at `source`, on the device and in the precision that the options name, ready to sample."""
    import torch

    from cmtool.io import checkpoint

    place = options.parse_device(device)
    model = checkpoint.load(source, role=role, device=place)
    fast = place.type == "cuda" and torch.cuda.is_bf16_supported()
    return model.compute_in(torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else None)


def places(out: str, seeds: Sequence[int]) -> list[str]:
    """Where the image of each seed goes; `-` is stdout.

    `out` is `-`, a name with `{seed}` in it, a name with an image suffix (one image only), or a folder, in which the
    files are named by seed.

    Raises:
        UsageError: several images for one file or for the pipe, or a terminal at the end of the pipe.
    """
    if "{seed}" in out:
        return [out.replace("{seed}", f"{seed:06d}") for seed in seeds]
    folder = out.endswith(("/", os.sep)) or os.path.isdir(out)
    if not folder and (out == "-" or out.lower().endswith(SUFFIXES)):
        if len(seeds) > 1:
            raise UsageError(
                f"--out {out} holds one image and {len(seeds)} are to be made",
                "give a folder, or a name with {seed} in it",
            )
        if out == "-":
            refuse_terminal("--out")
        return [out]
    if os.path.isfile(out):
        raise UsageError(f"--out {out} is a file that is no image", "give a folder, or a name that ends in .png")
    return [os.path.join(out, f"{seed:06d}.png") for seed in seeds]


def refuse_terminal(option: str) -> None:
    """An image is no text: `-` is for pipes and redirection."""
    if sys.stdout.isatty():
        raise UsageError(f"{option} - would write an image to the terminal", "add > image.png or | another command")


def refuse_two_results(as_json: bool, *targets: str | None) -> None:
    """stdout takes one result: an image, or the JSON object."""
    if [*targets, "-" if as_json else None].count("-") > 1:
        raise UsageError("stdout can take one result only, an image or the --json object", "write the images to files")


def write(target: str, image: Tensor) -> None:
    """Save one uint8 image [C, H, W], making the folder it goes to."""
    from cmtool.io import images

    if target != "-":
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    images.write_image(target, image)


def chunks(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    """`seeds` in pieces of at most `size`."""
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]
