"""What `inpaint`, `colorize` and `superres` share: everything but what is known of the image."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import console, images, options
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.editing import Degradation
    from cmtool.flow.flow_map import FlowMap, ModelCard


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of an edit, as they stand on the command line."""

    model: options.Model = None
    image: options.Image
    out: options.Out
    seeds: options.Seeds = "0"
    labels: options.Labels = None
    times: options.Times = None
    steps: options.EditSteps = None
    compare: options.Compare = None
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="FILE", help="The true image: tell how near the answers come.")
    ] = None
    lpips_backbone: options.LpipsBackbone = None
    batch: options.Batch = None
    device: options.Device = "auto"
    precision: options.Precision = "auto"
    as_json: options.Json = False


@dataclass(frozen=True)
class Edit:
    """An edit of one image.

    Args:
        call: (model, seeds=, labels=, times=, steps=, batch=, progress=) -> float32 [len(seeds), C, H, W].
        shown: what is known, as a picture; uint8 [C, h, w].
        op: what is known of an image, and
        known: that it is; floats of images in [-1, 1].
    """

    call: Callable[..., Tensor]
    shown: Tensor
    op: Degradation
    known: Tensor

    def error(self, made: Tensor) -> float:
        """How far what is known of a finished image, uint8 [C, H, W], is from what it should be: levels of 255."""
        from cmtool.io.images import from_uint8

        found = self.op.A(from_uint8(made)[None]) - self.known
        return 127.5 * float(found.abs().max())


def run(title: str, request: Request, read: Callable[[Any, ModelCard], Edit]) -> None:
    """Read the image, load the model, compute the answer of each seed, write the answers; of a folder, of all images.

    Args:
        read: what is known of the image of a request, which is checked to suit a model of this card; the edit.
    """
    seeds = options.parse_seeds(request.seeds)
    if request.times is not None and request.steps is not None:
        raise UsageError("--steps and --times say the same thing twice", "give one of the two")
    images.one_result(request.as_json, request.out, request.compare)
    several = request.image != "-" and os.path.isdir(request.image)
    if several:
        images.check_folder("--out", Path(_folder_of(request)))
    else:
        images.places(request.out, seeds)
    if request.compare is not None:
        images.check_target("--compare", request.compare)
    if request.lpips_backbone is not None and request.truth is None:
        raise UsageError("--lpips-backbone compares with a --truth", "name the true image, or leave it out")
    if request.truth == "-":
        raise UsageError("--truth - reads no pipe", "give the true image as a file")
    each = _each(request) if several else [request]

    source = images.chosen(request.model)
    imported = images.read_model(source, role="consistency")
    card, loaded, failed = imported.card, None, []
    named = request.labels
    labels = None if named is None else options.parse_labels(named, card.num_classes, card.class_names)
    alike = None
    described = []
    for one in each:
        try:
            edit = read(one, card)
            truth = _truth(one, edit, card)
        except DataError as error:
            if not several:
                raise
            console.note(f"{one.image} is left out: {error.message}")
            failed.append(one.image)
            continue
        if loaded is None:
            loaded = images.ready(imported, device=request.device, precision=request.precision)
            alike = images.lpips(request.lpips_backbone, "cpu") if request.lpips_backbone is not None else None
        described += _answer(title, one, edit, truth, loaded, alike, seeds, labels)
    if request.as_json:
        console.emit_json({"images": described, "image": request.image, "model": source})
    if failed:
        raise DataError(
            f"{len(failed)} of {len(each)} images could not be edited, the first {failed[0]}",
            "the others are done; the lines above say why",
        )


def _folder_of(request: Request) -> str:
    """Where the answers to a folder of images go."""
    out = request.out
    if out == "-" or "{seed}" in out or out.lower().endswith(images.WRITABLE) or os.path.isfile(out):
        raise UsageError(f"--image {request.image} is a folder, and --out {out} is none", "name a folder: --out done/")
    if request.compare is not None:
        raise UsageError("--compare shows one image, and --image is a folder", "leave it out, or name a file")
    return out


def _each(request: Request) -> list[Any]:
    """A request for each image of a folder, by name; its answers are called as it is, with the seed if there are more.

    Masks and true images may be folders, too: the files of the same name, whatever they end in.
    """
    files = sorted(file for file in Path(request.image).iterdir() if file.suffix.lower() in images.READABLE)
    if not files:
        raise DataError(f"--image {request.image} holds no images", f"their names end in {', '.join(images.READABLE)}")
    stems = Counter(file.stem for file in files)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise DataError(f"--image {request.image} holds several images called {twice[0]}", "give them other names")
    many = "-{seed}" if len(options.parse_seeds(request.seeds)) > 1 else ""
    made = []
    for file in files:
        beside: dict[str, Any] = {
            name: _beside(name, place, file.stem)
            for name in ("truth", "mask")
            if (place := getattr(request, name, None)) is not None and os.path.isdir(place)
        }
        out = os.path.join(request.out, f"{file.stem}{many}.png")
        made.append(dataclasses.replace(request, image=str(file), out=out, **beside))
    return made


def _beside(name: str, folder: str, stem: str) -> str:
    """The image of that name in another folder."""
    found = [
        file for file in sorted(Path(folder).glob(f"{glob.escape(stem)}.*")) if file.suffix.lower() in images.READABLE
    ]
    if not found:
        raise DataError(f"--{name} {folder} holds no image called {stem}", "give each image one of its name")
    return str(found[0])


def _truth(request: Request, edit: Edit, card: ModelCard) -> Tensor | None:
    """The true image, of the size of the answer."""
    if request.truth is None:
        return None
    from cmtool.io.images import read_image

    height, width = edit.op.pinv(edit.known).shape[-2:]
    truth = read_image(request.truth, card.channels)
    if truth.shape[-2:] != (height, width):
        raise DataError(
            f"--truth {request.truth} is {truth.shape[-1]}x{truth.shape[-2]}; the result is {width}x{height}",
            "name the image of that size",
        )
    return truth


def _answer(
    title: str,
    request: Request,
    edit: Edit,
    truth: Tensor | None,
    model: FlowMap,
    alike: Callable[[Tensor, Tensor], Tensor] | None,
    seeds: list[int],
    labels: list[int] | None,
) -> list[dict[str, Any]]:
    """Compute and write the answers for one image; what is said of each."""
    from cmtool.generate import Generated, edit_times, in_batches, labels_for

    card = model.card
    height, width = edit.op.pinv(edit.known).shape[-2:]
    if max(height, width) > card.resolution:
        console.note(f"the result is {width}x{height}, made of tiles of {card.resolution}x{card.resolution}")
    times = None if request.times is None else options.parse_times(request.times)
    calls = len(edit_times(model, request.steps) if times is None else times)
    on_stdout = not request.as_json and request.compare != "-"
    described, answers = [], []
    targets = images.places(request.out, seeds)
    # By calls: tiles of a large image can take minutes each.
    with console.progress(f"{title} (calls)", calls * len(seeds)) as update:

        def make(at: slice) -> Generated:
            part = seeds[at]
            made = edit.call(
                model,
                seeds=part,
                labels=labels,
                times=times,
                steps=request.steps,
                batch=len(part),
                progress=lambda call: update(calls * at.start + len(part) * call),
            )
            return Generated(part, labels_for(model, part, labels), made, 0)

        made = in_batches(model, len(seeds), make, batch=request.batch)
        for entry, image in images.save(
            title, made, seeds, targets, on_stdout=on_stdout, update=lambda done, text="": update(calls * done, text)
        ):
            entry |= {"constraint_error": round(edit.error(image), 3), **_likeness(image, truth, alike)}
            if truth is not None:
                known = ("psnr", "ssim", "lpips", "constraint_error")
                told = ", ".join(f"{name} {entry[name]:.4g}" for name in known if entry.get(name) is not None)
                console.note(f"seed {entry['seed']}: {told}")
            described.append({"image": request.image, **entry})
            answers.append(image)
    if request.compare is not None:
        _compare(request.compare, edit, truth, answers, seeds)
    return described


def _likeness(image: Tensor, truth: Tensor | None, alike: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, Any]:
    """How near an answer comes to the true image; null for a PSNR without end."""
    if truth is None:
        return {}
    from cmtool.evaluation.similarity import psnr, ssim
    from cmtool.io.images import from_uint8

    near, similar = float(psnr(image[None], truth[None])), float(ssim(image[None], truth[None]))
    found = {"psnr": console.finite(round(near, 3)), "ssim": round(similar, 4)}
    if alike is not None:
        found["lpips"] = round(float(alike(from_uint8(image)[None], from_uint8(truth)[None])), 5)
    return found


def _compare(target: str, edit: Edit, truth: Tensor | None, answers: list[Tensor], seeds: list[int]) -> None:
    """A picture of the truth, what is known, and the answers."""
    import torch

    from cmtool.io.images import captioned_rows, write_image

    height, width = answers[0].shape[-2:]
    grown = width // edit.shown.shape[-1]
    shown = edit.shown.repeat_interleave(grown, -2).repeat_interleave(grown, -1)
    rows = [("truth", truth[None])] if truth is not None else []
    rows += [("known", shown[None]), ("answers", torch.stack(answers))]
    write_image(target, captioned_rows(rows, columns=min(8, len(seeds)), scale=max(1, 96 // min(height, width))))


def check_size(card: ModelCard, image: Tensor, name: str, factor: int = 1) -> None:
    """Refuse an image that, enlarged `factor` times, is smaller than the model's."""
    side = card.resolution
    height, width = image.shape[-2:]
    if min(height, width) * factor >= side:
        return
    grown = f" and becomes {width * factor}x{height * factor} by --factor {factor}" if factor > 1 else ""
    hint = f"give an image of {side // factor}x{side // factor}"
    if side % factor:
        hint = f"{side} is no multiple of {factor}: choose another --factor"
    raise DataError(f"--image {name} is {width}x{height}{grown}; the model makes {side}x{side}", hint)
