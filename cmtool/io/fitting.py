"""How an image of any size becomes one of a data set: what is cut out, what is resampled, what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmtool.errors import UsageError, nearest
from cmtool.io.images import flatten, load, to_channels

CROPS = ("center", "none")
RESIZES = ("box", "bilinear", "bicubic", "lanczos", "none")
_FILTERS = {name: Image.Resampling[name.upper()] for name in RESIZES if name != "none"}


def check_options(resolution: int | None, crop: str, resize: str, channels: int | None) -> None:
    """Refuse what no plan can have.

    Raises:
        UsageError: an option that is none.
    """
    for name, value, known in (("crop", crop, CROPS), ("resize", resize, RESIZES)):
        if value not in known:
            raise UsageError(f"--{name}: there is no {value!r}", nearest(value, known))
    if channels not in (None, 1, 3):
        raise UsageError(f"--channels {channels}: images have 1 or 3 channels", "--channels 3")
    if resolution is not None and resolution < 1:
        raise UsageError(f"--resolution {resolution}: not a size", "give a whole number of pixels, such as 32")


@dataclass(frozen=True)
class Plan:
    """What every image has to become. `exact`: it must be of that size already."""

    resolution: int
    crop: str
    resize: str
    upscale: bool
    channels: int
    exact: bool = False

    def misfit(self, size: tuple[int, int]) -> str:
        """Why an image of this size cannot become one of the data set; empty if it can."""
        short, square = min(size), size[0] == size[1]
        if self.exact:
            return "" if square and short == self.resolution else "another size"
        if self.crop == "none" and not square:
            return "not square"
        if self.resize == "none" and self.crop == "none":
            return "" if short == self.resolution else "another size"
        if short < self.resolution and (self.resize == "none" or not self.upscale):
            return "too small"
        return ""

    def window(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of the image that is kept: left, upper, right, lower."""
        side = self.resolution if self.resize == "none" else min(size)
        left, upper = (size[0] - side) // 2, (size[1] - side) // 2
        return left, upper, left + side, upper + side

    def decoded(self, opened: Image.Image, name: str) -> Image.Image:
        """The pixels of an opened image, upright, in its own size.

        Raises:
            UnreadableImageError: if they cannot be decoded.
        """
        return to_channels(flatten(*load(opened, name)), self.channels)

    def fitted(self, image: Image.Image) -> NDArray[np.uint8]:
        """What the data set has of a decoded image that is no misfit; uint8 [C, H, H]."""
        window, side = self.window(image.size), self.resolution
        if window != (0, 0, *image.size):
            image = image.crop(window)
        if image.width != side:
            image = image.resize((side, side), _FILTERS[self.resize])
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
