"""Non-leaking augmentation: warped training images, and labels that tell the network how each was warped.

Augmented images are trained on with the labels of their warp, and sampling uses the label of no warp (zeros), so the
model learns from distorted images and never draws one. Karras et al. (2022), arXiv:2206.00364, appendix F.2, table 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SIZE = 4

# The low-pass filter of the two times denser grid that images are warped on: a windowed sinc of 2 * REACH + 1 taps. The
# cut-off makes the gain at the Nyquist frequency of the image 1 / sqrt(2). Then H(f)^2 + H(1/2 - f)^2 = 1 within 0.14%,
# so that going to the dense grid and back is the identity, and shifts by whole pixels change next to nothing.
_REACH = 8
_KAISER_BETA = 8.6
_CUTOFF = 0.55713597


@dataclass(frozen=True)
class Augment:
    """Draws flips, scalings, rotations, stretches and shifts, and applies them to images.

    Each transform is drawn by itself, with probability min(1, p * multiplier); they act in the order of the labels. A
    multiplier or a strength of 0 switches a transform off: its labels stay 0, and the other draws stay what they were.

    The labels are float32 [B, 9], all zero where nothing was done, in the order and meaning of the published networks:

    | column | name | value a | what happens to the picture, as displayed |
    |---|---|---|---|
    | 0 | xflip | 0 or 1 | 1: left and right change places |
    | 1 | yflip | 0 or 1 | 1: top and bottom change places |
    | 2 | scale | N(0, 1) | grows by 2^(scale_std a) |
    | 3, 4 | rotate | cos a - 1, sin a | turns by a, counter-clockwise; a uniform in +-pi rotate_frac_max |
    | 5, 6 | aniso | a cos b, a sin b | grows by 2^(aniso_std a) along b, shrinks by as much across it |
    | 7, 8 | translate | N(0, 1) twice | moves right by translate_frac_std a widths, down by as many heights |

    Here b, counter-clockwise from the horizontal, is uniform in +-pi / 2 with probability `aniso_rotate_prob`, else 0.
    Half a turn of b is the same stretch, so this is the distribution of the paper, which draws b from +-pi. There,
    however, (a, b) and (-a, b + pi) share their labels and do the opposite; here the labels tell the whole transform.

    Which way is positive is our reading of the paper's matrices, with y pointing down; no published network was asked.

    Args:
        p: probability of a transform with multiplier 1. Published: 0.12 on CIFAR-10, 0.15 on FFHQ and AFHQ.
        xflip: multiplier of the mirror images. An open gate flips with probability 1/2, so the default mirrors half of
            the images at any p > 0.
        yflip, scale, rotate_frac, aniso, translate_frac: multipliers of the other transforms.
        scale_std: standard deviation of log2 of the scale.
        rotate_frac_max: largest angle, in half turns.
        aniso_std: standard deviation of log2 of the stretch.
        aniso_rotate_prob: probability that a stretch is not along the axes.
        translate_frac_std: standard deviation of the shift, in widths and heights.
    """

    kind: ClassVar[str] = "augment"
    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            top = 1.0 if field.name in ("p", "rotate_frac_max", "aniso_rotate_prob") else math.inf
            if not (0 <= value <= top and math.isfinite(value)):
                limits = "in [0, 1]" if top == 1 else "finite and not negative"
                raise ValueError(f"{field.name} must be {limits}, found {value}")

    @property
    def dim(self) -> int:
        """Length of the label vector: the network's `augment_dim`."""
        return 9

    @property
    def probabilities(self) -> tuple[float, ...]:
        """How often each transform is drawn, in the order of the labels; flips are then done half of the time."""
        transforms = (
            *((self.xflip, 1.0), (self.yflip, 1.0), (self.scale, self.scale_std)),
            *((self.rotate_frac, self.rotate_frac_max), (self.aniso, self.aniso_std)),
            (self.translate_frac, self.translate_frac_std),
        )
        return tuple(min(1.0, self.p * multiplier) if strength else 0.0 for multiplier, strength in transforms)

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Transform a batch at random.

        Args:
            images: float32 [B, C, H, W] in [-1, 1].
            generator: source of all randomness, on the device of the images.
        Returns:
            The images as by `apply`, and their labels, float32 [B, 9].
        """
        labels = self.draw(len(images), generator)
        return self.apply(images, labels), labels

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Labels of n random transforms; float32 [n, 9] on the generator's device.

        Takes the same random numbers whatever the settings and the outcome, and never waits for the device.
        """
        uniform = torch.rand(n, 11, generator=generator, device=generator.device).unbind(1)
        normal = torch.randn(n, 4, generator=generator, device=generator.device).unbind(1)
        gates = [u < probability for u, probability in zip(uniform, self.probabilities, strict=False)]
        flip_x, flip_y, turn, tilt, oblique = uniform[6:]
        angle = math.pi * self.rotate_frac_max * (2 * turn - 1)
        axis = torch.where(oblique < self.aniso_rotate_prob, math.pi * (tilt - 0.5), 0)
        scale, stretch, right, down = normal
        values = (
            *((0, (flip_x < 0.5).float()), (1, (flip_y < 0.5).float()), (2, scale)),
            *((3, angle.cos() - 1), (3, angle.sin()), (4, stretch * axis.cos()), (4, stretch * axis.sin())),
            *((5, right), (5, down)),
        )
        return torch.stack([torch.where(gates[gate], value, 0) for gate, value in values], dim=1)

    def apply(self, images: Tensor, labels: Tensor) -> Tensor:
        """The transforms that `labels` describe.

        Flips move pixels and change none; images that need no more come out to the bit. The rest is one affine warp on
        a grid of twice the density, low-passed before and after; what lies outside an image is its reflection about the
        outermost pixels. Values may leave [-1, 1] a little, as those of any band-limited image do.

        Args:
            images: float32 [B, C, H, W], H and W at least 4.
            labels: float32 [B, 9].
        Returns:
            New images, in the shape and memory format of `images`.
        Raises:
            ValueError: images or labels of another type or shape.
        """
        if images.ndim != 4 or images.dtype != torch.float32 or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"expected float32 images [B, C, H, W] of {MIN_SIZE} pixels or more, "
                f"found {images.dtype} {list(images.shape)}"
            )
        if labels.shape != (len(images), self.dim):
            raise ValueError(f"expected labels of shape {[len(images), self.dim]}, found {list(labels.shape)}")
        flags = labels[:, :2, None, None, None] != 0
        out = torch.where(flags[:, 0], images.flip(3), images)
        out = torch.where(flags[:, 1], out.flip(2), out)
        needed = (labels[:, 2:] != 0).any(1)
        if images.is_cuda:
            # Asking which images need it would wait for the device; warping all of them costs less.
            return out.copy_(torch.where(needed[:, None, None, None], self._warp(out, labels), out))
        # Also for devices whose `grid_sample` lacks the cubic mode.
        chosen = needed.nonzero().squeeze(1)
        if len(chosen):
            out[chosen] = self._warp(out[chosen].cpu(), labels[chosen].cpu()).to(out.device)
        return out

    def _warp(self, images: Tensor, labels: Tensor) -> Tensor:
        height, width = images.shape[2:]
        (xx, xy, yx, yy), (right, down) = self._inverse(labels)
        # Where every point of the dense grid comes from, in halves of the image: its outermost pixels are at -1 and 1.
        xx, xy, yx, yy = *(2 / (width - 1) * part for part in (xx, xy)), *(2 / (height - 1) * part for part in (yx, yy))
        x = _dense(width, images.device) - (right * width)[:, None]
        y = _dense(height, images.device) - (down * height)[:, None]
        source_x = (xx[:, None] * x)[:, None, :] + (xy[:, None] * y)[:, :, None]
        source_y = (yx[:, None] * x)[:, None, :] + (yy[:, None] * y)[:, :, None]
        grid = torch.stack((source_x, source_y), dim=-1)
        dense = _up(height, images.device) @ images @ _up(width, images.device).T
        warped = F.grid_sample(dense, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
        return _down(height, images.device) @ (warped @ _down(width, images.device).T)

    def _inverse(self, labels: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """The linear map from the result back to the source, row by row and with y pointing down, and the shift.

        source = M (result - shift), the shift in widths and heights; every entry is of shape [B].
        """
        size, cos, sin, u, v, right, down = labels[:, 2:].unbind(1)
        cos = cos + 1
        # The inverse of the stretch: growth 2^-k along the axis at angle b is cosh k - sinh k on 2 b.
        k = math.log(2) * self.aniso_std * torch.where(u < 0, -1, 1) * torch.hypot(u, v)
        twice = 2 * torch.atan2(v, u)
        along, across = k.cosh() - k.sinh() * twice.cos(), k.cosh() + k.sinh() * twice.cos()
        mixed = k.sinh() * twice.sin()
        rows = (
            *(cos * along - sin * mixed, cos * mixed - sin * across),
            *(sin * along + cos * mixed, sin * mixed + cos * across),
        )
        shrink = torch.exp2(-self.scale_std * size)
        return tuple(shrink * entry for entry in rows), (
            self.translate_frac_std * right,
            self.translate_frac_std * down,
        )


# --- the dense grid --------------------------------------------------------------------------------------------------
# Its points are the pixels and the middles between them: 2 n - 1 of them, and REACH more on either side of a result.


def _taps() -> np.ndarray:
    """The low-pass filter; sums to 1."""
    offsets = np.arange(-_REACH, _REACH + 1)
    taps = np.sinc(_CUTOFF * offsets) * np.kaiser(2 * _REACH + 3, _KAISER_BETA)[1:-1]
    return taps / taps.sum()


@lru_cache(maxsize=32)
def _dense(n: int, device: torch.device) -> Tensor:
    """Places of the dense grid with its margins, in pixels from the middle; float32 [2 n - 1 + 2 REACH]."""
    points = np.arange(2 * n - 1 + 2 * _REACH) - _REACH
    return torch.from_numpy(points / 2 - (n - 1) / 2).to(device, torch.float32)


@lru_cache(maxsize=32)
def _up(n: int, device: torch.device) -> Tensor:
    """n pixels, reflected at both ends, to the dense grid; float32 [2 n - 1, n]."""
    matrix = np.zeros((2 * n - 1, n))
    points = np.arange(2 * n - 1)
    for offset, tap in zip(range(-_REACH, _REACH + 1), _taps(), strict=True):
        rows = points[(points + offset) % 2 == 0]
        phase = (rows + offset) // 2 % (2 * n - 2)
        np.add.at(matrix, (rows, np.minimum(phase, 2 * n - 2 - phase)), tap)
    matrix /= matrix.sum(1, keepdims=True)  # an even image stays even
    return torch.from_numpy(matrix).to(device, torch.float32)


@lru_cache(maxsize=32)
def _down(n: int, device: torch.device) -> Tensor:
    """The dense grid with its margins to n pixels; float32 [n, 2 n - 1 + 2 REACH]."""
    matrix = np.zeros((n, 2 * n - 1 + 2 * _REACH))
    for row in range(n):
        matrix[row, 2 * row : 2 * row + 2 * _REACH + 1] = _taps()
    return torch.from_numpy(matrix).to(device, torch.float32)
