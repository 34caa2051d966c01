"""How alike two images are, pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SPREAD = 11, 1.5


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared error); infinite for equal images.

    Args:
        image, truth: uint8 [B, C, H, W].
    Returns:
        float64 [B].
    """
    error = (image.double() - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, 1 for equal images: Wang et al. (2004), IEEE TIP 13(4), eq. 13.

    Means over pixels and channels; Gaussian window of 11x11 and 1.5 pixels, no padding (of an image that is smaller the
    window is, too), K = 0.01 and 0.03 of 255.

    Args:
        image, truth: uint8 [B, C, H, W].
    Returns:
        float64 [B].
    """
    x, y = image.double(), truth.double()
    side = min(_WINDOW, *x.shape[-2:])
    side -= 1 - side % 2
    at = torch.arange(side, dtype=torch.float64) - side // 2
    window = torch.exp(-at.square() / (2 * _SPREAD**2))
    kernel = torch.outer(window, window) / window.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        return F.conv2d(flat, kernel[None, None]).unflatten(0, values.shape[:2])

    one, other = mean(x), mean(y)
    within = mean(x * x) - one**2, mean(y * y) - other**2
    between = mean(x * y) - one * other
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = (2 * one * other + c1) * (2 * between + c2) / ((one**2 + other**2 + c1) * (within[0] + within[1] + c2))
    return found.flatten(1).mean(1)
