"""Tiles of a large image: they cover it, agree, and leave no seams."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cmtool.editing import AvgPool, Luma, Mask
from cmtool.flow import tiled as module
from cmtool.flow.tiled import Tiled, tiled
from cmtool.generate import edit
from tests.models import micro, model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(count, value=3.0):
    return torch.full((count,), value)


def test_images_of_its_own_size_are_for_the_model_itself():
    made = model()
    assert tiled(made, 8, 8) is made


@pytest.mark.parametrize(("height", "width", "overlap"), [(8, 9, 2), (20, 13, 2), (32, 32, 4), (9, 40, 0), (17, 8, 7)])
def test_tiles_cover_the_image_and_share_what_they_should(height, width, overlap):
    found = tiled(model(), height, width, overlap)
    assert isinstance(found, Tiled)
    assert float(found._total.min()) > 0
    for axis, length in ((0, height), (1, width)):
        begins = sorted({corner[axis] for corner in found.corners})
        assert (begins[0], begins[-1]) == (0, length - 8)
        assert all(later - earlier <= 8 - overlap for earlier, later in pairwise(begins))
        assert len(begins) <= max(1, -(-(length - overlap) // (8 - overlap)))  # no more than it takes


def test_a_model_that_looks_at_single_pixels_does_not_notice(monkeypatch):
    """Weights add up to one everywhere."""
    made = model()
    monkeypatch.setattr(type(made), "jump", lambda self, x, t, s, *_: x * (s / t)[:, None, None, None] + 1)
    monkeypatch.setattr(type(made), "denoised", lambda self, x, t, *_: x / t[:, None, None, None])
    x = noise(3, 3, 20, 30)
    t, s = torch.tensor([2.0, 4.0, 8.0]), times(3, 1.0)
    over = tiled(made, 20, 30, 3)
    assert Tiled.jump(over, x, t, s) == pytest.approx(x * (s / t)[:, None, None, None] + 1, abs=1e-5)
    assert Tiled.denoised(over, x, t) == pytest.approx(x / t[:, None, None, None], abs=1e-5)


def test_the_number_of_tiles_at_once_changes_nothing(monkeypatch):
    made = model(config=micro(num_classes=3))
    over, x, labels = tiled(made, 12, 17), noise(2, 3, 12, 17), torch.tensor([0, 2])
    with torch.inference_mode():
        together = over.jump(x, times(2), times(2, 0.002), labels)
        monkeypatch.setattr(module, "_AT_ONCE", 1)
        alone = over.jump(x, times(2), times(2, 0.002), labels)
        single = torch.cat([over.jump(x[i : i + 1], times(1), times(1, 0.002), labels[i : i + 1]) for i in range(2)])
    assert alone == pytest.approx(together, abs=1e-4)
    assert single == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres"])
def test_what_is_known_holds_on_the_whole_image(task):
    made = model()
    truth = noise(1, 3, 32, 32).clamp(-1, 1)
    new = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    new[..., 5:30, 3:29] = True
    op = {"inpaint": Mask(new), "colorize": Luma(), "superres": AvgPool(4)}[task]
    known = op.A(truth)
    found = edit(made, op, known, seeds=[0, 1], steps=3)
    assert found.shape == (2, 3, 32, 32)
    assert op.A(found) == pytest.approx(known.expand(2, -1, -1, -1), abs=1e-5)
    assert found.abs().max() <= 1
    alone = edit(made, op, known, seeds=[0], steps=3)
    assert float((found[:1] - alone).abs().mean()) < 1e-3  # tiles of one image share their calls


def steps_at(image, borders):
    """The mean difference of neighbours across the borders, over that of all neighbours."""
    change = (image[..., 1:] - image[..., :-1]).abs().mean((0, 1, 2))
    return float(change[[border - 1 for border in borders]].mean() / change.mean())


def test_there_are_no_seams():
    """Where a tile begins or ends neighbours differ as much as elsewhere; tiles side by side would show."""
    made = model()
    x = 3.0 * noise(8, 3, 32, 32)
    found = {}
    with torch.inference_mode():
        for overlap in (0, 2, 4):
            over = tiled(made, 32, 32, overlap)
            begins = {corner[1] for corner in over.corners}
            borders = sorted(({*begins} | {begin + 8 for begin in begins}) - {0, 32})
            found[overlap] = steps_at(over.jump(x, times(8), times(8, 0.002)), borders)
    assert found[0] > 1.1
    assert found[2] < 1.05
    assert found[4] < 1.05


def test_refusals():
    with pytest.raises(ValueError, match="smaller than tiles"):
        tiled(model(), 8, 7)
    with pytest.raises(ValueError, match="cannot share"):
        tiled(model(), 16, 16, 8)
    with pytest.raises(TypeError, match="no raw output"):
        tiled(model(), 16, 16).raw()
