"""Stroke editing and denoising: where the loop starts, and what is known in closed form."""

from __future__ import annotations

import pytest
import torch

from cmtool import rng
from cmtool.errors import DataError, UsageError
from cmtool.flow.path import VE, Linear
from cmtool.generate import generate, labels_for
from cmtool.sampler import sample as run_sampler
from cmtool.starts import STROKE, between, denoise, estimate_sigma, interpolate, invert, slerp, stroke, stroke_times
from tests.models import micro, model
from tests.oracles import GaussianOracle

EDITED, TEACHER = model(), model("denoiser")


def pictures(count=1, side=8, seed=0):
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def test_the_published_times_at_the_published_size():
    large = model(config=micro(resolution=8))
    times = stroke_times(large)
    assert times.tolist() == pytest.approx([8 / 256 * STROKE[0], 8 / 256 * STROKE[1]], rel=1e-5)
    straight = model(config=micro(resolution=8), path=Linear())
    ratios = straight.path.ratio(stroke_times(straight).double())
    assert ratios.tolist() == pytest.approx(times.tolist(), rel=1e-4)  # the same levels on any path


def test_strokes_are_the_start_of_the_loop():
    image, times = pictures(), torch.tensor([5.0, 1.0])
    found = stroke(EDITED, image, seeds=[3], times=times)

    def noise(stream):
        return rng.noise([3], (3, 8, 8), stream)

    start = image + (25 - EDITED.path.t_min**2) ** 0.5 * noise(0)
    for state in run_sampler(EDITED, start, times, noise=noise):
        expected = state.denoised
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_more_noise_the_freer():
    """Almost none leaves the picture as it is."""
    image = pictures()
    kept = stroke(EDITED, image, times=[0.0021])
    assert float((kept - image).abs().max()) < 0.02
    changes = [float((stroke(EDITED, image, times=[t]) - image).abs().mean()) for t in (0.01, 0.3, 80.0)]
    assert changes == sorted(changes)


def test_an_image_of_strokes_serves_all_seeds_and_sizes():
    image = pictures(side=13)
    found = stroke(EDITED, image, seeds=[1, 2])
    assert found.shape == (2, 3, 13, 13)
    assert stroke(EDITED, image, seeds=[2]) == pytest.approx(found[1:], abs=1e-3)
    assert stroke(EDITED, image, seeds=[1, 2], batch=1) == pytest.approx(found, abs=1e-3)


def test_noise_is_read_as_a_point_of_the_path():
    image, times = pictures(2), torch.tensor([0.4, 0.4])
    expected = EDITED.jump(image, times, torch.full((2,), EDITED.path.t_min)).clamp(-1, 1)
    assert denoise(EDITED, image, sigma=0.4) == pytest.approx(expected, abs=1e-5)
    mean = TEACHER.denoised(image, times).clamp(-1, 1)
    assert denoise(TEACHER, image, sigma=0.4) == pytest.approx(mean, abs=1e-5)
    straight = model("denoiser", path=Linear())
    t = straight.path.time(torch.tensor([0.4, 0.4]))
    there = straight.denoised(straight.path.alpha(t)[:, None, None, None] * image, t).clamp(-1, 1)
    assert denoise(straight, image, sigma=0.4) == pytest.approx(there, abs=1e-5)


def test_an_image_without_noise_stays():
    image = pictures()
    assert denoise(EDITED, image, sigma=0.0) == pytest.approx(image, abs=0.02)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_the_noise_is_estimated(sigma):
    """On a smooth image, to the error of a median of so many numbers."""
    noisy = pictures(4, 64) + sigma * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert estimate_sigma(noisy).tolist() == pytest.approx([sigma] * 4, rel=0.06)
    assert float(estimate_sigma(pictures(1, 64)[..., :63, :]).max()) < 0.005  # odd sides, no noise
    small = noisy[..., :8, :8]
    assert denoise(EDITED, small) == pytest.approx(
        torch.cat([denoise(EDITED, one[None], sigma=float(estimate_sigma(one[None]))) for one in small]), abs=1e-4
    )


def test_impossible():
    with pytest.raises(UsageError, match="needs a consistency model"):
        stroke(TEACHER, pictures())
    with pytest.raises(UsageError, match="is not on the model's path"):
        stroke(EDITED, pictures(), times=[90.0])
    with pytest.raises(DataError, match="4x4 with 3 channels"):
        stroke(EDITED, pictures(side=4))
    with pytest.raises(DataError, match="8x8 with 1 channels"):
        denoise(EDITED, pictures()[:, :1])
    with pytest.raises(UsageError, match="knows noise up to 80"):
        denoise(EDITED, pictures(), sigma=81.0)
    with pytest.raises(DataError, match="float"):
        denoise(EDITED, (pictures() * 127).to(torch.int8))


def test_the_way_between_seeds_begins_and_ends_with_their_images():
    for made, how in ((EDITED, {"steps": 2}), (TEACHER, {"solver": "heun", "steps": 3})):
        found = interpolate(made, [4, 9, 2], frames=3, **how)
        alone = torch.cat([part.images for part in generate(made, [4, 9, 2], **how)])
        assert found.shape == (7, 3, 8, 8)
        assert found[::3] == pytest.approx(alone, abs=1e-4)
        changes = (found[1:] - found[:-1]).abs().mean((1, 2, 3))
        assert float(changes.min()) > 0
        assert interpolate(made, [4, 9, 2], frames=3, batch=2, **how) == pytest.approx(found, abs=1e-3)


def test_images_are_followed_back_to_their_noise():
    """Of Gaussian data the ODE is known: deviations grow as those of the marginals. The error falls fourfold."""
    oracle = GaussianOracle(VE(), mean=0.0, std=0.4, image_shape=(3, 4, 4))
    x = 0.4 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.clamp(-1, 1)
    end = (0.4**2 + 80.0**2) ** 0.5 / (0.4**2 + 0.002**2) ** 0.5 * x / 80
    errors = [float((invert(oracle, x, steps=steps) - end).abs().max()) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    assert errors[2] < 0.02
    way = between(oracle, x[:3], frames=2, steps=60)
    assert way.shape == (5, 3, 4, 4)
    assert way[::2] == pytest.approx(x[:3], abs=0.02)


def test_a_way_stays_in_one_class():
    made = model(config=micro(num_classes=3))
    found = interpolate(made, [0, 1], frames=2, labels=2)
    alone = torch.cat([part.images for part in generate(made, [0, 1], labels=2)])
    assert found[::2] == pytest.approx(alone, abs=1e-4)
    by_chance = interpolate(made, [0, 1], frames=2)
    (first,) = labels_for(made, [0])
    assert by_chance == pytest.approx(interpolate(made, [0, 1], frames=2, labels=int(first)), abs=1e-6)


def test_the_great_circle():
    """Norms and angles of orthogonal and of other vectors; the noise stays as long as noise is."""
    a, b = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    half = slerp(a, b, torch.full((3,), 0.5))
    assert half == pytest.approx(torch.tensor([[0.5**0.5] * 2, [2 * 0.5**0.5] * 2, [1.0, 1.0]]), abs=1e-6)
    x, y = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.5, 0.9):
        assert float(slerp(x, y, torch.tensor([share])).std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(slerp(x, y, torch.tensor([0.0])), x)
    assert slerp(x, y, torch.tensor([1.0])) == pytest.approx(y, abs=1e-6)


def test_impossible_ways():
    with pytest.raises(UsageError, match="at least two seeds"):
        interpolate(EDITED, [1])
    with pytest.raises(UsageError, match="at least two seeds"):
        interpolate(EDITED, [1, 2], frames=0)
    with pytest.raises(UsageError, match="needs a solver"):
        interpolate(TEACHER, [1, 2])
