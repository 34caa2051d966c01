"""What the commands that make images have in common: a model to load, and a place for each image."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.cli import console, options
from cmtool.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import Tensor

    from cmtool.flow.flow_map import FlowMap, Role
    from cmtool.generate import Generated
    from cmtool.io.imported import Imported

WRITABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READABLE = (*WRITABLE, ".gif", ".ppm", ".pgm", ".jp2")
_NOT_WRITABLE = (".gif", ".ppm", ".pgm", ".avif", ".heic", ".jp2", ".svg", ".npy", ".npz", ".zip", ".pt")


def places(out: str, seeds: Sequence[int]) -> list[str]:
    """Where the image of each seed goes; `-` is stdout.

    Args:
        out: `-`; a name with `{seed}` in it; a name that ends like an image (one image only); else a folder, in which
            the files are named by seed.
    Raises:
        UsageError: several images for one file or pipe, a kind of image that cannot be written, a terminal as pipe.
    """
    in_folder = [os.path.join(out, f"{seed:06d}.png") for seed in seeds]
    if "{seed}" in out:
        targets = [out.replace("{seed}", f"{seed:06d}") for seed in seeds]
    elif out.endswith(("/", os.sep)) or os.path.isdir(out):
        targets = in_folder
    elif out == "-" or out.lower().endswith(WRITABLE + _NOT_WRITABLE):
        if len(seeds) > 1:
            raise UsageError(
                f"--out {out} holds one image and {len(seeds)} are to be made",
                "give a folder, or a name with {seed} in it",
            )
        targets = [out]
    elif os.path.exists(out):
        raise UsageError(f"--out {out} is a file, and no image by its name", "give a folder, or a name like out.png")
    elif re.search(r"\.[A-Za-z]{2,4}$", out):
        raise UsageError(
            f"--out {out}: images of this kind cannot be written",
            f"use {', '.join(WRITABLE)}, or {out}/ if a folder is meant",
        )
    else:
        targets = in_folder
    check_target("--out", targets[0])
    return targets


def check_target(option: str, target: str) -> None:
    """Refuse a single file that could not be written, before any work is done."""
    if target == "-":
        if sys.stdout.isatty():
            raise UsageError(f"{option} - would write an image to the terminal", "add > image.png, or pipe it on")
    elif not target.lower().endswith(WRITABLE):
        raise UsageError(f"{option} {target}: images of this kind cannot be written", f"use {', '.join(WRITABLE)}")
    elif os.path.isdir(target):
        raise UsageError(f"{option} {target} is a folder", "name a file, not a folder")
    else:
        check_folder(option, Path(target).parent)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that could not be made or written to; folders on the way will be made."""
    above = Path(os.path.abspath(folder))
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise UsageError(f"{option}: {above} is a file, not a folder", "name another place")
    if not os.access(above, os.W_OK):
        raise UsageError(f"{option}: nothing can be written to {above}", "name another place")


def free_name(stem: str, ending: str) -> str:
    """The first of stem.ending, stem-2.ending, ... in this folder that nothing is called yet."""
    names = (f"{stem}{'' if number == 1 else f'-{number}'}{ending}" for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def is_animation(target: str) -> bool:
    """Whether a file is one of moving images, by its name."""
    return Path(target).suffix.lower() in (".apng", ".webp")


def one_result(as_json: bool, *targets: str | None) -> None:
    """stdout takes one result: an image, or the JSON object."""
    if [*targets, "-" if as_json else None].count("-") > 1:
        raise UsageError("stdout takes one result, an image or the --json object", "write the images to files")


def chosen(model: str | None) -> str:
    """What `--model` names; without it the model in the box, which is said."""
    if model is not None:
        return model
    from cmtool.io.box import BOXED, DEFAULT

    console.note(f"no --model: {DEFAULT} ({BOXED[DEFAULT].title}), which comes with cmtool")
    return DEFAULT


def read_model(source: str, *, role: Role | None = None, assume: Role | None = None) -> Imported:
    """What is known of the model at `source`, fetched first if it is elsewhere; arguments as `loading.load`."""
    from cmtool.io import loading

    with console.fetching(source) as update:
        return loading.read(source, role=role, assume=assume, progress=update)


def ready(imported: Imported, *, device: str, precision: str) -> FlowMap:
    """The model, on the device and in the precision that the options name, ready to sample."""
    from cmtool import precision as policy
    from cmtool.io.imported import assemble

    place = policy.device(device)
    model = assemble(imported).to(place)
    return model.compute_in(policy.compute_dtype(precision, place))  # type: ignore[arg-type]


def lpips(file: Path, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of two batches of images in [-1, 1], [B], with the trunk in a file."""
    import torch

    from cmtool.io.backbones import read_backbone
    from cmtool.training.distances import LPIPS

    backbone = read_backbone("vgg", file)
    net = "alex" if backbone["features.0.weight"].shape[-1] == 11 else "vgg"
    try:
        module = LPIPS(net).build(backbone).to(device)  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} holds another network than VGG-16 or AlexNet", "name torchvision's file"
        ) from error

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = module(a, b)
        return found

    return distance


def labels(model: FlowMap, text: str | None) -> list[int] | None:
    """The classes that `--labels` names, in this model's numbers."""
    return None if text is None else options.parse_labels(text, model.card.num_classes, model.card.class_names)


def save(
    title: str,
    made: Iterable[Generated],
    seeds: Sequence[int],
    targets: Sequence[str | None],
    *,
    on_stdout: bool,
    update: console.Update | None = None,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Write images as they are made, each batch while the next one is computed.

    Yields (description, uint8 image [C, H, W]) of each once it is written, in the order of `seeds`.

    Args:
        made: batches in the order of `seeds`.
        targets: a place for each seed; None: not written by itself.
        on_stdout: print the path of each file, as a result of the command.
        update: what shows how many images are done, where it is shown already; else it is shown here.
    """
    from concurrent.futures import ThreadPoolExecutor

    from cmtool.io.images import to_uint8, write_image

    def written() -> Iterator[tuple[dict[str, Any], Tensor]]:
        for entry, image, writing in waiting:
            if writing is not None:
                writing.result()
                if on_stdout:
                    console.emit_line(entry["path"])
            yield entry, image

    done = 0
    waiting: list[tuple[dict[str, Any], Tensor, Future[None] | None]] = []
    # One thread: several would wait for each other, as Pillow encodes under Python's lock, and lose the order.
    writer = ThreadPoolExecutor(1, "writer")
    try:
        with console.progress(title, len(seeds)) if update is None else nullcontext(update) as show:
            for batch in _and_error(made):
                yield from written()
                waiting = []
                if isinstance(batch, Exception):
                    raise batch
                if not bool(batch.images.isfinite().all()):
                    raise CheckpointError(
                        "the model makes images with values that are not finite",
                        "its weights may be damaged; cmtool info says more",
                    )
                classes = [None] * len(batch.seeds) if batch.labels is None else batch.labels.tolist()
                for seed, label, image in zip(batch.seeds, classes, to_uint8(batch.images), strict=True):
                    target = targets[done]
                    done += 1
                    if target == "-":  # from this thread: Ctrl-C gets it out of a pipe that nobody reads
                        write_image(target, image)
                    writing = None if target in (None, "-") else writer.submit(write_image, str(target), image)
                    waiting.append(({"path": target, "seed": seed, "label": label}, image, writing))
                show(done)
            yield from written()
    finally:
        writer.shutdown(cancel_futures=True)


def _and_error(made: Iterable[Generated]) -> Iterator[Generated | Exception]:
    """The batches, and at last the error that ended them, if one did: what was made before it is still written."""
    try:
        yield from made
    except Exception as error:
        yield error
