"""Likenesses of images whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from cmtool.evaluation.similarity import psnr, ssim


def noise(seed, shape=(2, 3, 16, 16)):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr():
    image = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    other = image.clone()
    other[1] += 10
    found = psnr(other, image)
    assert math.isinf(found[0])
    assert float(found[1]) == pytest.approx(20 * math.log10(25.5))


def test_ssim_of_flat_images_is_that_of_their_levels():
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    one, other = (torch.full((1, 3, 16, 16), int(level), dtype=torch.uint8) for level in (a, b))
    assert float(ssim(one, other)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_one_window_by_hand():
    """An image of 11x11 holds a single window: its weighted moments say all."""
    x, y = (noise(seed, (1, 1, 11, 11)).double()[0, 0] for seed in (0, 1))
    at = torch.arange(11.0, dtype=torch.float64) - 5
    weight = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mx, my = (float((weight * one).sum()) for one in (x, y))
    vx, vy = (float((weight * (one - m) ** 2).sum()) for one, m in ((x, mx), (y, my)))
    cov = float((weight * (x - mx) * (y - my)).sum())
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    found = ssim(x[None, None].to(torch.uint8), y[None, None].to(torch.uint8))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_symmetric_and_one_for_equal_images():
    one, other = noise(0), noise(1)
    assert ssim(one, one).tolist() == pytest.approx([1, 1])
    assert ssim(one, other).tolist() == pytest.approx(ssim(other, one).tolist())
    assert float(ssim(one, other).abs().max()) < 0.3
    slightly = (one.float() + 8 * torch.randn(one.shape)).clamp(0, 255).to(torch.uint8)
    assert float(ssim(slightly, one).min()) > 0.9
    assert ssim(noise(2, (1, 1, 4, 6)), noise(2, (1, 1, 4, 6))).tolist() == pytest.approx([1])  # smaller than a window
