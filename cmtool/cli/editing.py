"""What `inpaint`, `colorize` and `superres` share: everything but what is known of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli import console, images, options
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.editing import Degradation
    from cmtool.flow.flow_map import ModelCard
    from cmtool.generate import Generated


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of an edit, as they stand on the command line."""

    model: options.Model = None
    image: options.Image
    out: options.Out
    seeds: options.Seeds = "0"
    labels: options.Labels = None
    times: options.Times = None
    edit_steps: options.EditSteps = None
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
        call: (model, seeds=, labels=, times=, steps=, batch=) -> float32 [len(seeds), C, H, W].
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


def run(title: str, request: Request, read: Callable[[ModelCard], Edit]) -> None:
    """Read the image, load the model, compute the answer of each seed, write the answers.

    Args:
        read: reads what is known of the image, checks that it suits a model of this card, and returns the edit.
    """
    seeds = options.parse_seeds(request.seeds)
    if request.times is not None and request.edit_steps is not None:
        raise UsageError("--edit-steps and --times say the same thing twice", "give one of the two")
    times = None if request.times is None else options.parse_times(request.times)
    images.one_result(request.as_json, request.out, request.compare)
    targets = images.places(request.out, seeds)
    if request.compare is not None:
        images.check_target("--compare", request.compare)
    if request.lpips_backbone is not None and request.truth is None:
        raise UsageError("--lpips-backbone compares with a --truth", "name the true image, or leave it out")
    if request.truth == "-":
        raise UsageError("--truth - reads no pipe", "give the true image as a file")

    from cmtool.generate import Generated, in_batches, labels_for
    from cmtool.io.images import read_image

    source = images.chosen(request.model)
    imported = images.read_model(source, role="consistency")
    card = imported.card
    edit = read(card)
    height, width = edit.op.pinv(edit.known).shape[-2:]
    truth = None
    if request.truth is not None:
        truth = read_image(request.truth, card.channels)
        if truth.shape[-2:] != (height, width):
            raise DataError(
                f"--truth {request.truth} is {truth.shape[-1]}x{truth.shape[-2]}; the result is {width}x{height}",
                "name the image of that size",
            )
    named = request.labels
    labels = None if named is None else options.parse_labels(named, card.num_classes, card.class_names)
    if max(height, width) > card.resolution:
        console.note(f"the result is {width}x{height}, made of tiles of {card.resolution}x{card.resolution}")
    model = images.ready(imported, device=request.device, precision=request.precision)

    def make(at: slice) -> Generated:
        part = seeds[at]
        made = edit.call(model, seeds=part, labels=labels, times=times, steps=request.edit_steps, batch=len(part))
        return Generated(part, labels_for(model, part, labels), made, 0)

    made = in_batches(model, len(seeds), make, batch=request.batch)
    alike = images.lpips(request.lpips_backbone, "cpu") if request.lpips_backbone is not None else None
    on_stdout = not request.as_json and request.compare != "-"
    described, answers = [], []
    for entry, image in images.save(title, made, seeds, targets, on_stdout=on_stdout):
        entry |= {"constraint_error": round(edit.error(image), 3), **_likeness(image, truth, alike)}
        if truth is not None:
            known = ("psnr", "ssim", "lpips", "constraint_error")
            told = ", ".join(f"{name} {entry[name]:.4g}" for name in known if entry.get(name) is not None)
            console.note(f"seed {entry['seed']}: {told}")
        described.append(entry)
        answers.append(image)
    if request.compare is not None:
        _compare(request.compare, edit, truth, answers, seeds)
    if request.as_json:
        console.emit_json({"images": described, "image": request.image, "model": source})


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
