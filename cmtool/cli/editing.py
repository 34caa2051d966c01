"""What `inpaint`, `colorize` and `superres` share: everything but what is known of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cmtool.cli import console, images, options
from cmtool.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.flow.flow_map import ModelCard
    from cmtool.generate import Generated

    # edit(model, seeds=, labels=, times=, steps=, batch=) -> float32 [len(seeds), C, H, W]
    Edit = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of an edit, as they stand on the command line."""

    model: options.Model
    image: options.Image
    out: options.Out
    seeds: options.Seeds = "0"
    labels: options.Labels = None
    times: options.Times = None
    edit_steps: options.EditSteps = None
    batch: options.Batch = None
    device: options.Device = "auto"
    precision: options.Precision = "auto"
    as_json: options.Json = False


def run(title: str, request: Request, read: Callable[[ModelCard], Edit]) -> None:
    """Read the image, load the model, compute the answer of each seed, write the answers.

    Args:
        read: reads what is known of the image, checks that it suits a model of this card, and returns the edit.
    """
    seeds = options.parse_seeds(request.seeds)
    if request.times is not None and request.edit_steps is not None:
        raise UsageError("--edit-steps and --times say the same thing twice", "give one of the two")
    times = None if request.times is None else options.parse_times(request.times)
    images.one_result(request.as_json, request.out)
    targets = images.places(request.out, seeds)

    from cmtool.generate import Generated, in_batches, labels_for

    imported = images.read_model(request.model, role="consistency")
    card = imported.card
    edit = read(card)
    named = request.labels
    labels = None if named is None else options.parse_labels(named, card.num_classes, card.class_names)
    model = images.ready(imported, device=request.device, precision=request.precision)

    def make(at: slice) -> Generated:
        part = seeds[at]
        made = edit(model, seeds=part, labels=labels, times=times, steps=request.edit_steps, batch=len(part))
        return Generated(part, labels_for(model, part, labels), made, 0)

    made = in_batches(model, len(seeds), make, batch=request.batch)
    described = [entry for entry, _ in images.save(title, made, seeds, targets, on_stdout=not request.as_json)]
    if request.as_json:
        console.emit_json({"images": described, "image": request.image, "model": request.model})


def check_size(card: ModelCard, image: Tensor, name: str, factor: int = 1) -> None:
    """Refuse an image that, enlarged `factor` times, is not of the model's size."""
    side = card.resolution
    height, width = image.shape[-2:]
    if (height * factor, width * factor) == (side, side):
        return
    grown = f" and becomes {width * factor}x{height * factor} by --factor {factor}" if factor > 1 else ""
    hint = f"give an image of {side // factor}x{side // factor}"
    if side % factor:
        hint = f"{side} is no multiple of {factor}: choose another --factor"
    raise DataError(f"--image {name} is {width}x{height}{grown}; the model makes {side}x{side}", hint)
