"""Random numbers: independence of everything but the seed, and masks shared between two passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmtool import rng

SHAPE = (3, 8, 8)


@given(seeds=st.lists(st.integers(0, rng.MAX_SEED), min_size=1, max_size=6), stream=st.integers(0, 1000))
def test_a_seeds_noise_depends_on_nothing_else(seeds, stream):
    whole = rng.noise(seeds, SHAPE, stream)
    for row, seed in zip(whole, seeds, strict=True):
        assert torch.equal(row, rng.noise([seed], SHAPE, stream)[0])
    assert torch.equal(whole.flip(0), rng.noise(seeds[::-1], SHAPE, stream))


def test_noise_is_the_same_on_every_machine():
    """Fixed numbers: a change here changes every image that anyone has named by its seed."""
    found = rng.noise([0, 1, 2**40], (2,), stream=3).flatten().tolist()
    assert found == pytest.approx([-0.2006754, -1.124339, -0.6072086, -0.7753307, 1.0803925, 0.3890558], abs=1e-6)


def test_the_global_generators_have_no_part_in_it():
    torch.manual_seed(1)
    first = rng.noise([7], SHAPE)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, rng.noise([7], SHAPE))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_streams_differ():
    draws = [rng.noise([seed], SHAPE, stream)[0] for seed in (0, 1, 2, 2**62) for stream in (0, 1, 2, 17)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())  # uncorrelated, so neither equal nor negated


def test_noise_is_standard_normal():
    x = rng.noise(range(200), (1000,)).double()
    n = x.numel()
    assert x.dtype == torch.float64
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((x**power).mean()) == pytest.approx(moment, abs=4 * math.sqrt(spread / n))
    # rows are unrelated to each other: the largest of 200 x 199 / 2 correlations of 1000 numbers
    correlation = torch.corrcoef(x).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5.5 / math.sqrt(1000)


def test_labels_are_uniform_and_belong_to_the_seed():
    drawn = rng.labels(range(10_000), 10)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert bool(((counts - 1000).abs() < 4 * math.sqrt(1000)).all())
    assert torch.equal(rng.labels([5, 77, 5], 10), drawn[torch.tensor([5, 77, 5])])
    assert rng.labels([], 10).dtype == torch.int64


def test_derived_seeds_differ_and_repeat():
    seeds = {
        rng.derive(seed, *streams) for seed in range(20) for streams in ((0,), (1, 0), (1, 1), (2, 0), (2, 1), (0, 1))
    }
    assert len(seeds) == 120
    assert rng.derive(3, 1, 4) == rng.derive(3, 1, 4)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_forked_blocks_drop_the_same_units_and_leave_no_trace():
    drop, x = nn.Dropout(0.5), torch.ones(1000)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    masks = []
    for seed in (11, 11, 12):
        with rng.forked(seed, "cpu"):
            masks.append(drop(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert 400 < int((masks[0] > 0).sum()) < 600


def test_forked_puts_the_generators_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), rng.forked(5, "cpu"):
        torch.rand(3) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forked_shares_masks_on_an_accelerator():
    drop, x = nn.Dropout(0.5), torch.ones(1000, device="cuda")
    before = torch.cuda.get_rng_state()
    masks = []
    for seed in (11, 11, 12):
        with rng.forked(seed, "cuda"):
            masks.append(drop(x))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("cores", "size", "compiled"),
    [(1, 14, False), (3, 14, False), (16, 14, False), (3, 14, True), (16, 14, True), (2, 60_001, True)],
)
def test_threads_draw_what_one_stream_a_row_is(cores, size, compiled, monkeypatch):
    """Bit for bit; of 60,001 numbers some come from the ziggurat's tail, and the last is half a word."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(rng, "_EACH", 5)
    if compiled:
        if rng._normals() is None:
            pytest.skip("no compiler on this machine")
        monkeypatch.setattr(rng, "_fill", None)
    else:
        monkeypatch.setattr(rng, "_normals", lambda: None)
    seeds = [5, 0, rng.MAX_SEED, 5, 77]
    found = rng.noise(seeds, (1, size), stream=3)
    for row, seed in zip(found, seeds, strict=True):
        expected = np.random.Generator(np.random.Philox(key=[seed, 3])).standard_normal((1, size), dtype=np.float32)
        assert np.array_equal(row.numpy(), expected)


@pytest.mark.parametrize("hidden", ["compiler", "ziggurat"])
def test_without_a_compiler_or_numpys_function_numpy_draws(hidden, monkeypatch, tmp_path):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path))
    if hidden == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        monkeypatch.setattr(rng.ctypes, "CDLL", lambda file: object())
    assert rng._normals.__wrapped__() is None
