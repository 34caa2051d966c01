"""The embedded data set: real handwritten digits in coloured ink, no download.

scikit-learn ships 1,797 scans of digits (8x8, 17 grey levels; the test part of the UCI "Optical Recognition of
Handwritten Digits" set). They are drawn larger, as ink on a dark ground. The colour of the ink says nothing about the
digit, and all inks are about equally bright, so that colorizing a grey digit has many right answers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.errors import DependencyError

RESOLUTION = 16
PARTS = ("all", "train", "test")
CLASS_NAMES = tuple("0123456789")
GROUND = (14, 16, 26)
INKS = {
    "red": (255, 92, 92),
    "orange": (255, 150, 30),
    "yellow": (212, 194, 24),
    "green": (70, 214, 90),
    "teal": (30, 210, 205),
    "blue": (80, 160, 255),
    "violet": (170, 125, 255),
    "pink": (255, 100, 205),
}
NUM_TEST_PER_CLASS = 30
_INK_SEED = 2023
_SPLIT_SEED = 8


def digits(part: str = "all", resolution: int = RESOLUTION) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits as RGB images; the same bytes on every call.

    Args:
        part: "all" (1,797), or the fixed split of it into "train" (1,497) and "test" (30 of each class).
        resolution: the side of the images, a sixteenth of it left free on each side; 8 shows the scans as they are.
    Returns:
        uint8 [N, resolution, resolution, 3] and the digits, int64 [N].
    Raises:
        DependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DependencyError("the digits need scikit-learn", "pip install 'cmtool[digits]'") from None
    scans = load_digits()
    labels = scans.target.astype(np.int64)
    # RandomState: numpy promises that its numbers never change.
    inks = np.array(list(INKS.values()))[np.random.RandomState(_INK_SEED).randint(len(INKS), size=len(labels))]
    rows = np.flatnonzero({"all": labels >= 0, "test": _held_out(labels), "train": ~_held_out(labels)}[part])

    margin = resolution // 16  # the scans fill their squares to the rim
    side = resolution - 2 * margin
    cover = np.zeros((resolution, resolution, 1), np.float32)
    images = np.empty((len(rows), resolution, resolution, 3), np.uint8)
    for image, row in zip(images, rows, strict=True):
        scan = Image.fromarray((scans.images[row] / 16).astype(np.float32))
        drawn = np.asarray(scan.resize((side, side), Image.Resampling.LANCZOS))
        cover[margin : margin + side, margin : margin + side, 0] = np.clip(drawn, 0, 1)
        image[:] = np.rint(GROUND + (inks[row] - np.array(GROUND)) * cover)
    return images, labels[rows]


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which scans are the test part: equally many of each class."""
    random = np.random.RandomState(_SPLIT_SEED)
    held_out = np.zeros(len(labels), bool)
    for label in range(len(CLASS_NAMES)):
        held_out[random.permutation(np.flatnonzero(labels == label))[:NUM_TEST_PER_CLASS]] = True
    return held_out
