"""How good zero-shot edits are: images that the model has never seen, against the simplest answers there are.

    python examples/edits.py --data CIFAR_TEST_FOLDER --out edits

For each edit and number of network calls: PSNR and SSIM to the true images, their distance in random features (the
stated substitute for LPIPS, whose weights are not at hand everywhere), how far the answers are from what was known
(levels of 255, after rounding), and seconds an image. Beside them: bicubic enlargement, the image left grey, the hole
filled by biharmonic equations (scikit-image, if it is installed). 39 calls are OpenAI's settings: all levels of
a grid of 40 but the last. Results are kept in --out: results.jsonl, table.md, and a picture of each edit, in which six
images have three answers each. `-n 8 --steps 39` makes little more than the pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import cmtool
from cmtool import precision
from cmtool.editing import AvgPool, Degradation, Luma, Mask
from cmtool.evaluation.features import RandomFeatures
from cmtool.evaluation.similarity import psnr, ssim
from cmtool.flow import FlowMap
from cmtool.io.data import open_data
from cmtool.io.images import captioned_rows, from_uint8, to_uint8, write_image

_EXACT = 58.9  # dB that rounding to 8 bits leaves: some images are grey, and grey answers the truth
STEPS = "1,2,4,8,16,39"  # the last: as OpenAI


@dataclass(frozen=True)
class Task:
    """An edit: what is known of an image, our answer, and the simple one."""

    name: str
    op: Degradation
    answer: Callable[..., Tensor]
    seen: Callable[[Tensor], Tensor]  # what is known, as a picture
    floor: str
    simple: Callable[[Tensor], Tensor | None]


def hole(side: int) -> Tensor:
    """The middle quarter; bool [1, side, side]."""
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, side // 4 : -(side // 4), side // 4 : -(side // 4)] = True
    return mask


def biharmonic(images: Tensor, mask: Tensor) -> Tensor | None:
    """The hole filled smoothly; None without scikit-image."""
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError:
        return None
    known = images.masked_fill(mask, 0.0).permute(0, 2, 3, 1).numpy()
    filled = [inpaint_biharmonic(image, mask[0].numpy(), channel_axis=-1) for image in known]
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2).float().clamp(-1, 1)


def bicubic(small: Tensor, factor: int) -> Tensor:
    """Enlarged by Pillow."""
    found = [
        np.asarray(
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((image.shape[2] * factor,) * 2, Image.BICUBIC)
        )
        for image in to_uint8(small)
    ]
    return from_uint8(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2))


def grey(images: Tensor) -> Tensor:
    return (Luma().A(images) / sum(Luma.weights)).expand(-1, 3, -1, -1)


def tasks(model: FlowMap) -> list[Task]:
    mask = hole(model.card.resolution)

    def enlarge(factor: int) -> Task:
        op = AvgPool(factor)
        return Task(
            f"superres x{factor}",
            op,
            lambda images, **how: cmtool.superres(model, op.A(images), factor, **how),
            lambda images: F.interpolate(op.A(images), scale_factor=factor),
            "bicubic",
            lambda images: bicubic(op.A(images), factor),
        )

    return [
        Task(
            "inpaint",
            Mask(mask[None]),
            lambda images, **how: cmtool.inpaint(model, images, mask, **how),
            lambda images: images.masked_fill(mask, 0.0),
            "biharmonic",
            lambda images: biharmonic(images, mask),
        ),
        Task(
            "colorize",
            Luma(),
            lambda images, **how: cmtool.colorize(model, images, **how),
            grey,
            "left grey",
            grey,
        ),
        enlarge(2),
        enlarge(4),
    ]


class Ruler:
    """How near answers come to the true images."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.features = truth, RandomFeatures()
        self.known = self.features(truth).vectors

    def __call__(self, task: Task, answers: Tensor) -> dict[str, float]:
        made = to_uint8(answers)
        off = task.op.A(from_uint8(made)) - task.op.A(from_uint8(self.truth))
        apart = (self.features(made).vectors - self.known).square().mean(1).sqrt()
        return {
            "psnr": float(psnr(made, self.truth).clamp(max=_EXACT).mean()),
            "ssim": float(ssim(made, self.truth).mean()),
            "features": float(apart.mean()),
            "constraint": 127.5 * float(off.abs().amax()),
        }


def rows(model: FlowMap, truth: Tensor, labels: list[int] | None, steps: list[int]) -> Iterator[dict]:
    """What there is to say of each edit and number of calls."""
    images, ruler = from_uint8(truth), Ruler(truth)
    count = len(images)
    for task in tasks(model):
        simple = task.simple(images)
        if simple is not None:
            yield {"edit": task.name, "by": task.floor, "calls": 0, **ruler(task, simple)}
        for calls in steps:
            name = f"{calls} calls" + (", as OpenAI" if calls == 39 else "")
            start = time.perf_counter()
            answers = task.answer(images, seeds=range(count), labels=labels, steps=calls)
            seconds = (time.perf_counter() - start) / count
            yield {"edit": task.name, "by": name, "calls": calls, **ruler(task, answers), "seconds": seconds}


def picture(task: Task, truth: Tensor, labels: list[int] | None, calls: int) -> Tensor:
    """Six of the images: real, what is known, the simple answer, and three others; uint8 [3, H, W]."""
    chosen = torch.linspace(0, len(truth) - 1, min(6, len(truth))).long()
    images, told = from_uint8(truth[chosen]), None if labels is None else [labels[index] for index in chosen.tolist()]
    simple = task.simple(images)
    shown = [("real", images), ("known", task.seen(images))]
    shown += [] if simple is None or task.floor == "left grey" else [(task.floor, simple)]
    for answer in range(3):
        seeds = range(answer * len(images), (answer + 1) * len(images))
        shown.append(("" if answer else "answers", task.answer(images, seeds=seeds, labels=told, steps=calls)))
    return captioned_rows([(name, to_uint8(one)) for name, one in shown], scale=2)


def table(found: list[dict]) -> str:
    lines = ["| edit | by | PSNR | SSIM | in features | off the known | s/image |", "|---|---|---|---|---|---|---|"]
    for row in found:
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else ""
        lines.append(
            f"| {row['edit']} | {row['by']} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['features']:.3f} | "
            f"{row['constraint']:.2f} | {seconds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--data", required=True, help="images the model has not seen, a folder a class")
    parser.add_argument("--out", type=Path, default=Path("edits"))
    parser.add_argument("-n", type=int, default=500, help="images, evenly spread over the data")
    parser.add_argument("--steps", default=STEPS, help="numbers of network calls; the pictures are of the last")
    parser.add_argument(
        "--labels", action="store_true", help="tell the model the classes; else each image has a random one"
    )
    options = parser.parse_args()
    place = precision.device("auto")
    model = cmtool.load(options.model, role="consistency", device=place)
    model = model.compute_in(precision.compute_dtype("auto", place))
    data = open_data(options.data, resolution=model.card.resolution)
    images, labels = data.batch(torch.linspace(0, len(data) - 1, options.n).round().long())[:2]
    options.out.mkdir(parents=True, exist_ok=True)
    told = labels.tolist() if options.labels and labels is not None else None
    steps = [int(calls) for calls in options.steps.split(",")]
    found = []
    for row in rows(model, images, told, steps):
        found.append(row)
        print(json.dumps(row), flush=True)
    for task in tasks(model):
        file = options.out / f"{task.name.replace(' ', '-')}.png"
        write_image(str(file), picture(task, images, told, steps[-1]))
    (options.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (options.out / "table.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
