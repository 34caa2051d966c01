"""A classifier of CIFAR-10 images, whose features tell how like the real ones generated images are.

    python examples/cifar_judge.py --data CIFAR_FOLDER --test CIFAR_TEST_FOLDER --out judge.pt2

A residual network of 1.2M parameters, trained for some minutes on a CPU, exported with what `cmtool evaluate --features
judge.pt2` wants: uint8 images [B, 3, 32, 32] in, its 256 features [B, 256] before the last layer out. With --resolution
16 all of this is of smaller images. Distances in these features are called fd_judge, never FID: that is Inception's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool import precision
from cmtool.io.data import open_data


class Block(nn.Module):
    """A residual block, of half the resolution where `halve`: by a mean, as strided convolutions are slow on CPUs."""

    def __init__(self, width: int, out: int, *, halve: bool = False) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.two = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(out)])
        self.halve = halve
        self.skip = nn.Conv2d(width, out, 1, bias=False) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.halve else x
        h = self.one(F.relu(self.norms[0](x)))
        return self.skip(x) + self.two(F.relu(self.norms[1](h)))


class Classifier(nn.Module):
    """Logits [B, 10] of images in [-1, 1], and the features they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            *(Block(32, 32), Block(32, 64, halve=True), Block(64, 128, halve=True), Block(128, 256, halve=True)),
        )
        self.norm = nn.BatchNorm2d(256)
        self.last = nn.Linear(256, 10)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.first(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


class Features(nn.Module):
    """What is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images.float() / 127.5 - 1)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored by half, and moved by up to 3 pixels of 32."""
    size = images.shape[-1]
    most = 3 * size // 32
    mirrored = (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).to(images.device)
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(images, (most,) * 4, mode="reflect")[..., down : down + size, right : right + size]


def train(
    data: str, resolution: int, epochs: int, device: torch.device, limit: int | None = None, batch: int = 256
) -> Classifier:
    """A classifier of the folder's classes."""
    known = open_data(data, resolution=resolution, limit=limit)
    images, labels = known.images, known.labels
    model = Classifier().to(device, memory_format=torch.channels_last).train()
    low = precision.compute_dtype("auto", device)
    steps = epochs * (len(images) // batch)
    rule = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(rule, 0.2, total_steps=steps, pct_start=0.25)
    generator, start, step = torch.Generator().manual_seed(0), time.monotonic(), 0
    for epoch in range(epochs):
        for places in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            x = shifted(images[places].to(device).float() / 127.5 - 1, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=low is not None):
                logits = model(x.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[places].to(device), label_smoothing=0.1)
            rule.zero_grad(set_to_none=True)
            loss.backward()
            rule.step()
            schedule.step()
            step += 1
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}/{epochs}, loss {float(loss.detach()):.3f}, {seconds:.0f} s", flush=True)
    return model.eval().cpu().to(memory_format=torch.contiguous_format)  # as exporting wants them


@torch.inference_mode()
def accuracy(model: Classifier, data: str, resolution: int) -> float:
    known = open_data(data, resolution=resolution)
    right = [
        (model(images.float() / 127.5 - 1).argmax(1) == labels).float()
        for images, labels in zip(known.images.split(500), known.labels.split(500), strict=True)
    ]
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the training images")
    parser.add_argument("--test", help="the folder of the test images: tell the accuracy")
    parser.add_argument("--out", type=Path, default=Path("judge.pt2"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, help="train on so many images, evenly spread")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = train(options.data, options.resolution, options.epochs, precision.device(options.device), options.limit)
    if options.test:
        print(f"accuracy on {options.test}: {accuracy(model, options.test, options.resolution):.1%}")
    number = torch.export.Dim("number", min=1, max=2**20)
    images = torch.zeros(2, 3, options.resolution, options.resolution, dtype=torch.uint8)
    torch.export.save(torch.export.export(Features(model), (images,), dynamic_shapes=({0: number},)), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
