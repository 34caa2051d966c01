"""Augmentation: warps against closed forms, labels that tell the whole warp, and nothing else touched."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmtool import spec
from cmtool.training import augment as module
from cmtool.training.augment import Augment

ALWAYS = Augment(p=1.0)
XFLIP, YFLIP, SCALE, COS, SIN, ANISO_X, ANISO_Y, RIGHT, DOWN = range(9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def label(*, xflip=0, yflip=0, scale=0, angle=0, stretch=0, axis=0, right=0, down=0):
    """One row of labels by the definition in the docstring; angles in radians."""
    values = [xflip, yflip, scale, math.cos(angle) - 1, math.sin(angle)]
    values += [stretch * math.cos(axis), stretch * math.sin(axis), right, down]
    return torch.tensor([values], dtype=torch.float32)


def turn(angle):
    """Counter-clockwise as displayed: y points down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


def forward(config, *, xflip=0, yflip=0, scale=0, angle=0, stretch=0, axis=0):
    """The linear part of the transform: where a point of the picture goes, about the middle."""
    growth = 2 ** (config.aniso_std * stretch)
    steps = [
        np.diag([1 - 2 * xflip, 1 - 2 * yflip]),
        np.eye(2) * 2 ** (config.scale_std * scale),
        turn(angle),
        turn(axis) @ np.diag([growth, 1 / growth]) @ turn(-axis),
    ]
    return np.linalg.multi_dot(steps[::-1])


def places(height, width):
    """x and y of all pixels from the middle of the image."""
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    return np.stack([x, y], axis=-1)


class Cosines:
    """A random band-limited image that is its own reflection about its outermost pixels, known at every real place.

    `band` is the highest frequency as a share of the Nyquist frequency.
    """

    def __init__(self, height, width, band, seed=0):
        draw = np.random.default_rng(seed)
        self.size = np.array([width - 1, height - 1])
        k, m = np.meshgrid(np.arange(width), np.arange(height))
        inside = (k / (width - 1)) ** 2 + (m / (height - 1)) ** 2 <= band**2
        self.waves = np.stack([k[inside], m[inside]])
        self.amplitudes = draw.standard_normal(inside.sum())
        self.amplitudes /= np.linalg.norm(self.amplitudes) / 2

    def __call__(self, xy):
        phase = np.pi * (xy / self.size + 0.5)
        waves = np.cos(phase[..., :1] * self.waves[0]) * np.cos(phase[..., 1:] * self.waves[1])
        return torch.from_numpy(waves @ self.amplitudes).float()[None, None]


def rms(x):
    return float(x.square().mean().sqrt())


# Closed forms.


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-5, 4)])
def test_a_shift_by_whole_pixels_moves_them(right, down):
    height, width = 16, 32
    smooth = Cosines(height, width, 0.5)
    moved = ALWAYS.apply(smooth(places(height, width)), label(right=right / width * 8, down=down / height * 8))
    expected = smooth(places(height, width) - [right, down])  # with what comes in from the reflection
    assert float((moved - expected).abs().max()) < 5e-3
    # Even white noise: to the dense grid and back is the identity.
    noise = torch.randn(1, 3, height, width, generator=generator())
    moved = ALWAYS.apply(noise, label(right=right / width * 8, down=down / height * 8))
    rows, columns = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    expected = noise.roll((down, right), (2, 3))
    assert rms((moved - expected)[..., rows, columns]) < 5e-3


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns(turns):
    noise = torch.randn(1, 3, 16, 16, generator=generator())
    turned = ALWAYS.apply(noise, label(angle=turns * math.pi / 2))
    assert rms(turned - torch.rot90(noise, turns, (2, 3))) < 5e-3  # rot90: from the vertical towards the left


def test_a_scale_of_one_standard_deviation_grows_by_a_fifth_of_an_octave():
    radius = np.linalg.norm(places(32, 32), axis=-1)
    for scale in (-1.0, 1.0, 2.0):
        grown = ALWAYS.apply(blob(np.eye(2) * 4), label(scale=scale))
        expected = torch.from_numpy(np.exp(-((radius / (4 * 2 ** (0.2 * scale))) ** 2) / 2)).float()
        assert float((grown - expected).abs().max()) < 0.01


def blob(spread):
    """exp(-|A^-1 x|^2 / 2): a round blob seen through the linear map A."""
    source = places(32, 32) @ np.linalg.inv(spread).T
    return torch.from_numpy(np.exp(-(source**2).sum(-1) / 2)).float()[None, None]


@pytest.mark.parametrize("stretch", [-1.5, 1.5])
@pytest.mark.parametrize("axis", [-1.2, 0, math.pi / 6, 1.5])
def test_a_stretch_grows_along_its_axis_and_shrinks_across(stretch, axis):
    growth = 2 ** (0.2 * stretch)
    stretched = ALWAYS.apply(blob(np.eye(2) * 3), label(stretch=stretch, axis=axis))
    expected = blob(3 * turn(axis) @ np.diag([growth, 1 / growth]) @ turn(-axis))
    assert float((stretched - expected).abs().max()) < 0.01


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 40), (24, 9)])
@pytest.mark.parametrize(("band", "bound"), [(0.25, 0.015), (0.5, 0.03), (0.75, 0.1)])
def test_all_together_is_the_image_at_the_transformed_places(height, width, band, bound):
    config = replace(ALWAYS, scale_std=0.3, aniso_std=0.15, translate_frac_std=0.2)
    draw = np.random.default_rng(height)
    for seed in range(6):
        scale, stretch, right, down = draw.standard_normal(4)
        linear = {
            **{"xflip": int(draw.integers(2)), "yflip": int(draw.integers(2)), "scale": abs(scale)},
            **{"angle": draw.uniform(-math.pi, math.pi), "stretch": stretch, "axis": draw.uniform(-1.5, 1.5)},
        }
        image = Cosines(height, width, band, seed)
        shift = np.array([right * 0.2 * width, down * 0.2 * height])
        expected = image((places(height, width) - shift) @ np.linalg.inv(forward(config, **linear)).T)
        found = config.apply(image(places(height, width)), label(**linear, right=right, down=down))
        assert rms(found - expected) < bound * rms(expected)


def test_shrinking_does_not_alias():
    wave = Cosines(32, 32, 0)
    wave.waves, wave.amplitudes = np.array([[26], [0]]), np.array([1.0])  # 0.84 of the Nyquist frequency
    image = wave(places(32, 32))
    assert rms(image) > 0.7
    shrunk = ALWAYS.apply(image, label(scale=-5 * math.log2(1.7)))
    assert rms(shrunk) < 0.1  # 1.4 of it: pixels taken at their places would keep it whole


def test_the_way_to_the_dense_grid_and_back_is_the_identity():
    cpu = torch.device("cpu")
    for n in (4, 5, 8, 33):
        up, down = module._up(n, cpu), module._down(n, cpu)
        reach = module._REACH
        beyond = torch.arange(-reach, 2 * n - 1 + reach).remainder(4 * n - 4)
        beyond = torch.minimum(beyond, 4 * n - 4 - beyond)
        torch.testing.assert_close(down @ up[beyond], torch.eye(n), atol=2e-3, rtol=0)


# Labels.


@pytest.mark.parametrize(
    ("name", "there", "back"),
    [
        ("xflip", {"xflip": 1}, {"xflip": 1}),
        ("yflip", {"yflip": 1}, {"yflip": 1}),
        ("scale", {"scale": 0.7}, {"scale": -0.7}),
        ("rotate", {"angle": 2.0}, {"angle": -2.0}),
        ("aniso", {"stretch": 0.8, "axis": 0.5}, {"stretch": -0.8, "axis": 0.5}),
        ("aniso", {"stretch": -0.8, "axis": -1.4}, {"stretch": 0.8, "axis": -1.4}),
        ("translate", {"right": 0.3, "down": -0.7}, {"right": -0.3, "down": 0.7}),
    ],
)
def test_the_opposite_label_undoes(name, there, back):
    image = Cosines(32, 32, 0.3)(places(32, 32))
    moved = ALWAYS.apply(image, label(**there))
    assert rms(moved - image) > 0.1
    undone = ALWAYS.apply(moved, label(**back))
    if "flip" in name:
        assert torch.equal(undone, image)
    assert rms((undone - image)[..., 10:22, 10:22]) < 0.03


def test_every_drawn_label_tells_its_transform():
    """Labels alone, read by the definition, give the image that `__call__` returned."""
    image = Cosines(24, 32, 0.3)
    images = image(places(24, 32)).expand(40, 1, 24, 32)
    found, labels = Augment(p=0.6)(images, generator())
    for picture, row in zip(found, labels.double().tolist(), strict=True):
        # The axis is never read the other way round: cos b is not negative.
        stretch = math.copysign(math.hypot(row[ANISO_X], row[ANISO_Y]), row[ANISO_X])
        linear = forward(
            ALWAYS,
            xflip=row[XFLIP],
            yflip=row[YFLIP],
            scale=row[SCALE],
            angle=math.atan2(row[SIN], row[COS] + 1),
            stretch=stretch,
            axis=math.atan2(row[ANISO_Y] * stretch, row[ANISO_X] * stretch),
        )
        shift = np.array([row[RIGHT] * 32 / 8, row[DOWN] * 24 / 8])
        expected = image((places(24, 32) - shift) @ np.linalg.inv(linear).T)
        assert rms(picture - expected[0]) < 0.05


def test_distributions():
    n = 40_000
    labels = ALWAYS.draw(n, generator())
    assert labels.dtype == torch.float32
    sigma = 5 / math.sqrt(n)
    for column in (XFLIP, YFLIP):
        assert set(labels[:, column].unique().tolist()) == {0, 1}
        assert abs(float(labels[:, column].mean()) - 0.5) < sigma / 2
    for column in (SCALE, RIGHT, DOWN):
        assert abs(float(labels[:, column].mean())) < sigma
        assert abs(float(labels[:, column].var()) - 1) < sigma * math.sqrt(2)
    angle = torch.atan2(labels[:, SIN], labels[:, COS] + 1)
    torch.testing.assert_close((labels[:, COS] + 1) ** 2 + labels[:, SIN] ** 2, torch.ones(n))
    uniform = torch.linspace(-math.pi, math.pi, n)
    assert float((angle.sort().values - uniform).abs().max()) < 2 * math.pi * 2 / math.sqrt(n)  # Kolmogorov-Smirnov
    oblique = labels[:, ANISO_Y] != 0
    assert abs(float(oblique.float().mean()) - 0.5) < sigma / 2
    stretch = torch.hypot(labels[:, ANISO_X], labels[:, ANISO_Y]).copysign(labels[:, ANISO_X])
    assert abs(float(stretch.mean())) < sigma
    assert abs(float(stretch.var()) - 1) < sigma * math.sqrt(2)
    axis = torch.atan(labels[:, ANISO_Y] / labels[:, ANISO_X])[oblique]
    uniform = torch.linspace(-math.pi / 2, math.pi / 2, len(axis))
    assert float((axis.sort().values - uniform).abs().max()) < math.pi * 2 / math.sqrt(len(axis))
    # Independent: no two columns go together.
    correlation = torch.corrcoef(torch.stack([*labels[:, [0, 1, 2, 5, 7, 8]].T, angle, axis.new_zeros(n).normal_()]))
    assert float((correlation - torch.eye(8)).abs().max()) < sigma


def test_a_smaller_largest_angle_and_no_oblique_stretch():
    labels = Augment(p=1.0, rotate_frac_max=0.25, aniso_rotate_prob=0.0).draw(2000, generator())
    angle = torch.atan2(labels[:, SIN], labels[:, COS] + 1).abs()
    assert math.pi / 4 * 0.99 < float(angle.max()) <= math.pi / 4 + 1e-6
    assert not labels[:, ANISO_Y].any()


@pytest.mark.parametrize("p", [0.12, 0.5])
def test_gates_open_as_often_as_told(p):
    n = 40_000
    config = Augment(p=p, aniso=0.5, rotate_frac=3.0)
    probabilities = (0.5, p / 2, p, min(1, 3 * p), p / 2, p)
    labels = config.draw(n, generator(1))
    done = torch.stack(
        [labels[:, columns].any(1) for columns in ([0], [1], [2], [3, 4], [5, 6], [7, 8])], dim=1
    ).float()
    for column, probability in enumerate(probabilities):
        assert abs(float(done[:, column].mean()) - probability) <= 5 * math.sqrt(probability * (1 - probability) / n)
    both = probabilities[2] * probabilities[5]
    assert abs(float((done[:, 2] * done[:, 5]).mean()) - both) < 5 * math.sqrt(both / n)


@pytest.mark.parametrize(
    ("off", "columns"),
    [
        ({"xflip": 0.0}, [0]),
        ({"yflip": 0.0}, [1]),
        ({"scale": 0.0}, [2]),
        ({"scale_std": 0.0}, [2]),
        ({"rotate_frac": 0.0}, [3, 4]),
        ({"rotate_frac_max": 0.0}, [3, 4]),
        ({"aniso": 0.0}, [5, 6]),
        ({"aniso_std": 0.0}, [5, 6]),
        ({"translate_frac": 0.0}, [7, 8]),
        ({"translate_frac_std": 0.0}, [7, 8]),
    ],
)
def test_what_is_off_has_no_label_and_leaves_the_others_alone(off, columns):
    expected = ALWAYS.draw(50, generator())
    expected[:, columns] = 0
    assert torch.equal(replace(ALWAYS, **off).draw(50, generator()), expected)


# What is left alone.


def test_no_augmentation_is_the_identity():
    images = torch.randn(64, 3, 8, 8, generator=generator())
    found, labels = Augment(p=0.0)(images, generator())
    assert torch.equal(found, images)
    assert labels.shape == (64, Augment().dim)
    assert not labels.any()
    assert found.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_unwarped_samples_keep_every_bit(memory_format, channels):
    images = torch.randn(256, channels, 12, 10, generator=generator()).contiguous(memory_format=memory_format)
    before = images.clone()
    found, labels = Augment(p=0.12)(images, generator())
    assert torch.equal(images, before)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=memory_format)
    assert found.stride() == images.stride()
    flipped = torch.where(labels[:, 0, None, None, None] == 1, images.flip(3), images)
    flipped = torch.where(labels[:, 1, None, None, None] == 1, flipped.flip(2), flipped)
    warped = labels[:, 2:].any(1)
    assert 50 < int(warped.sum()) < 150
    assert torch.equal(found[~warped], flipped[~warped])
    changed = (found[warped] - flipped[warped]).abs().amax((1, 2, 3))
    assert bool((changed > 1e-3).all())


def test_views_of_other_tensors_are_read_as_they_are():
    images = torch.randn(8, 3, 20, 20, generator=generator())[:, :, 2:-2:2, ::2]
    labels = ALWAYS.draw(8, generator())
    assert torch.equal(ALWAYS.apply(images, labels), ALWAYS.apply(images.contiguous(), labels))


def test_a_sample_does_not_depend_on_its_neighbours():
    images = torch.randn(6, 3, 16, 16, generator=generator())
    labels = ALWAYS.draw(6, generator())
    together = ALWAYS.apply(images, labels)
    for i in range(6):
        torch.testing.assert_close(ALWAYS.apply(images[i : i + 1], labels[i : i + 1]), together[i : i + 1])


def test_one_seed_gives_one_result_and_takes_the_same_numbers_whatever_comes_of_it():
    images = torch.randn(32, 3, 8, 8, generator=generator())
    first, second, other, off = generator(3), generator(3), generator(4), generator(3)
    found, labels = Augment(p=0.5)(images, first)
    again, same = Augment(p=0.5)(images, second)
    assert torch.equal(found, again)
    assert torch.equal(labels, same)
    assert not torch.equal(labels, Augment(p=0.5)(images, other)[1])
    Augment(p=0.0, xflip=0.0)(images, off)
    assert torch.equal(first.get_state(), off.get_state())


@given(
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    channels=st.sampled_from([1, 3]),
    batch=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_any_size(height, width, channels, batch, seed):
    """Even images stay even, and mirroring before is turning the whole warp round."""
    even = torch.linspace(-1, 1, batch * channels).reshape(batch, channels, 1, 1).expand(-1, -1, height, width)
    found, labels = ALWAYS(even, generator(seed))
    assert found.shape == even.shape
    torch.testing.assert_close(found, even.contiguous(), atol=2e-6, rtol=0)
    images = torch.randn(batch, channels, height, width, generator=generator(seed))
    mirrored = labels * torch.tensor([1, 1, 1, 1, -1, 1, -1, -1, 1])
    torch.testing.assert_close(
        ALWAYS.apply(images.flip(3), mirrored), ALWAYS.apply(images, labels).flip(3), atol=2e-3, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_a_gpu():
    images = torch.randn(64, 3, 32, 32, generator=generator())
    labels = Augment().draw(64, generator())
    found = Augment().apply(images.cuda().contiguous(memory_format=torch.channels_last), labels.cuda())
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.cpu(), Augment().apply(images, labels), atol=1e-3, rtol=0)
    drawn, _ = Augment()(images.cuda(), torch.Generator("cuda").manual_seed(0))
    assert drawn.is_cuda


# Configuration and bad input.


def test_the_defaults_are_the_published_ones():
    assert Augment().probabilities == pytest.approx((1, 0.12, 0.12, 0.12, 0.12, 0.12))
    assert Augment(p=0).probabilities == (0,) * 6


def test_a_config_is_its_fields():
    config = Augment(p=0.15, yflip=0.0, rotate_frac=0.0)
    data = spec.to_dict(config)
    assert data["kind"] == "augment"
    assert spec.from_dict(data, Augment, {"augment": Augment}) == config


@pytest.mark.parametrize(
    "bad",
    [
        *({"p": -0.1}, {"p": 1.5}, {"p": math.nan}, {"xflip": -1}, {"yflip": math.inf}, {"scale": math.nan}),
        *({"rotate_frac": -1}, {"aniso": -1}, {"translate_frac": -0.5}, {"scale_std": -0.2}, {"aniso_std": math.inf}),
        *({"rotate_frac_max": 1.5}, {"aniso_rotate_prob": 2}, {"translate_frac_std": -1}),
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} must be"):
        Augment(**bad)


@pytest.mark.parametrize(
    "images",
    [
        *(torch.zeros(2, 3, 3, 8), torch.zeros(2, 3, 8, 3), torch.zeros(3, 8, 8)),
        *(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 8, dtype=torch.float64)),
    ],
)
def test_bad_images(images):
    with pytest.raises(ValueError, match="expected float32 images"):
        Augment()(images, generator())


def test_bad_labels():
    for labels in (torch.zeros(2, 6), torch.zeros(3, 9), torch.zeros(9)):
        with pytest.raises(ValueError, match="expected labels of shape"):
            Augment().apply(torch.zeros(2, 3, 8, 8), labels)
