"""How good are generated digits? Class agreement, muddiness and copies, judged against real ones.

    class agreement   a support-vector classifier trained on real digits in grey says how often the class asked for is
                      the class seen
    muddiness         mean absolute difference of an image to its own 3x3 median filter, in [0, 1] units: noise that is
                      left over makes it larger than that of real digits, however well a classifier copes
    copies            distance to the nearest training image, beside that of real digits held out of the training

python examples/digits_judge.py FOLDER [FOLDER ...]: folders of <seed>.png made with `--labels 0-9`, so that the class
of an image is its seed modulo 10.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.svm import SVC

from cmtool.io.data import open_data


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a set of images."""

    agreement: float
    muddiness: float
    nearest: float  # median distance to the nearest training image, root mean square over the pixels


class Judge:
    """Trained on `digits:train`, calibrated on the held-out `digits:test`."""

    def __init__(self) -> None:
        train, test = open_data("digits:train"), open_data("digits:test")
        self.train = _rows(train.images.numpy())
        self.classifier = SVC(C=10).fit(_grey(self.train), train.labels.numpy())
        self.real = self(_rows(test.images.numpy()), test.labels.numpy())

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> Verdict:
        """Judge uint8 images [N, H, W, 3] that should show the digits `labels` [N]."""
        seen = self.classifier.predict(_grey(images))
        return Verdict(float((seen == labels).mean()), _muddiness(images), float(np.median(self._nearest(images))))

    def _nearest(self, images: np.ndarray) -> np.ndarray:
        flat = [x.reshape(len(x), -1).astype(np.float64) / 255 for x in (images, self.train)]
        squares = (flat[0] ** 2).sum(1)[:, None] + (flat[1] ** 2).sum(1) - 2 * flat[0] @ flat[1].T
        return np.sqrt(np.clip(squares.min(1), 0, None) / flat[0].shape[1])


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of a folder of <seed>.png, and seed modulo 10."""
    files = sorted(folder.glob("*.png"))
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return images, np.array([int(file.stem) % 10 for file in files])


def _rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def _grey(images: np.ndarray) -> np.ndarray:
    """Grey, stretched to its own range: the ink's colour must not help or hinder."""
    grey = images.astype(np.float64) @ (0.2989, 0.5870, 0.1140)
    low, high = grey.min((1, 2), keepdims=True), grey.max((1, 2), keepdims=True)
    return ((grey - low) / np.maximum(high - low, 1)).reshape(len(grey), -1)


def _muddiness(images: np.ndarray) -> float:
    def residue(image: np.ndarray) -> float:
        filtered = np.asarray(Image.fromarray(image).filter(ImageFilter.MedianFilter(3)), dtype=np.float64)
        return float(np.abs(image - filtered).mean() / 255)

    return float(np.mean([residue(image) for image in images]))


def table(rows: dict[str, Verdict], real: Verdict) -> str:
    """A Markdown table, the held-out real digits first."""
    lines = [
        "| images | class agreement | muddiness | of real | distance to nearest training image | of real |",
        "|---|---|---|---|---|---|",
    ]
    for name, v in {"real, held out": real, **rows}.items():
        lines.append(
            f"| {name} | {v.agreement:.1%} | {v.muddiness:.4f} | {v.muddiness / real.muddiness:.2f} "
            f"| {v.nearest:.4f} | {v.nearest / real.nearest:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    judge = Judge()
    print(table({folder: judge(*read_folder(Path(folder))) for folder in sys.argv[1:]}, judge.real))
