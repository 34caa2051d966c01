"""Parameterizations: published constants, boundary conditions to the last bit, and the same estimate on every path."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jvp

from cmtool.flow import (
    EDM,
    VE,
    VP,
    BoundaryEDM,
    CosineStep,
    Epsilon,
    Linear,
    LogRatio,
    PathTime,
    Piecewise,
    Sample,
    Trig,
    Velocity,
    VPrediction,
    VPTime,
)
from cmtool.flow.parameterization import PARAMETERIZATIONS, TIME_INPUTS

PATHS = [VE(), Linear(), Trig(), Linear(t_min=0.01, t_max=0.99), Trig(0.0, math.pi / 2), VP()]
DENOISERS = [EDM(), Velocity(), EDM(sigma_data=1.3), Epsilon(), Epsilon(-1, unit_input=False), VPrediction(), Sample()]
KINDS = [*DENOISERS, BoundaryEDM(), Piecewise(), BoundaryEDM(sigma_data=1.3)]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.kind}-{path.t_min:.3g}")
boundaries = pytest.mark.parametrize("kind", [BoundaryEDM(), Piecewise()], ids=lambda kind: kind.kind)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.kind}-{getattr(kind, 'sigma_data', '')}")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def inside(path, n=200, dtype=torch.float64):
    return torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64).to(dtype)


def where_it_says_something(kind, path, n=200):
    """Times at which the kind determines the image: pure noise, alpha = 0, has no image behind a predicted noise."""
    t = inside(path, n)
    return t[path.alpha(t) > 1e-9] if isinstance(kind, Epsilon) else t


def assert_coefficients(found, skip, out, inp, tolerance):
    for value, expected in zip(found, (skip, out, inp), strict=True):
        assert float(value) == pytest.approx(expected, rel=tolerance, abs=1e-15)


def test_every_kind_is_tested():
    assert {type(kind) for kind in KINDS} == set(PARAMETERIZATIONS.values())
    assert set(TIME_INPUTS.values()) == {LogRatio, PathTime, VPTime, CosineStep}


# Constants of Song et al. (2023), app. C, and Karras et al. (2022), table 1, with sigma_data = 0.5, eps = 0.002.
@pytest.mark.parametrize(
    ("t", "skip", "out", "inp"),
    [
        (80.0, 3.906293e-05, 0.499977735, 0.012499756),
        (1.382368, 0.115986907, 0.469508438, 0.680265629),
        (0.002, 1.0, 0.0, 1.999984),
    ],
)
def test_boundary_constants(t, skip, out, inp):
    assert_coefficients(BoundaryEDM().denoised(VE(), f64(t)), skip, out, inp, 3e-7)


def test_edm_constants():
    skip, out, inp = EDM().denoised(VE(), f64(1.382368))
    assert float(skip) == pytest.approx(0.115690331, rel=3e-7)
    assert float(out) == pytest.approx(0.470188704, rel=3e-7)
    assert float(inp) == pytest.approx(0.680265629, rel=3e-7)


@pytest.mark.parametrize("data", [0.5, 1.3])
def test_edm_on_trig_is_trigflow(data):
    path = Trig(sigma_data=data)
    t = inside(path)
    skip, out, inp = EDM(sigma_data=data).denoised(path, t)
    torch.testing.assert_close(skip, t.cos(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(out, data * t.sin(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(inp, torch.full_like(t, 1 / data), rtol=1e-12, atol=0)
    # the jump is a rotation: x_s = cos(t - s) x_t + sin(t - s) sigma_data F (F with the sign of EDM's output)
    s = t * torch.linspace(0, 1, len(t), dtype=t.dtype)
    skip, out, _ = EDM(sigma_data=data).jump(path, t, s)
    torch.testing.assert_close(skip, (t - s).cos(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out, data * (t - s).sin(), rtol=1e-12, atol=1e-14)


def test_velocity_on_linear_is_a_straight_line():
    t = inside(Linear())
    s = t * torch.linspace(0, 1, len(t), dtype=t.dtype)
    one = torch.ones_like(t)
    for found, expected in ((Velocity().denoised(Linear(), t), -t), (Velocity().jump(Linear(), t, s), s - t)):
        for value, target in zip(found, (one, expected, one), strict=True):
            torch.testing.assert_close(value, target, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("t", [80.0, 1.382368, 0.5, 0.002])
def test_what_openai_tells_its_networks(t):
    golden = {80.0: 1095.5067, 1.382368: 80.9495, 0.5: -173.2868, 0.002: -1553.6520}[t]
    assert float(LogRatio(250.0)(VE(), f64(t))) == pytest.approx(golden, abs=6e-5)
    assert float(EDM().noise(VE(), f64(t))) == pytest.approx(golden / 1000, abs=6e-8)
    trig = Trig()
    assert float(BoundaryEDM().noise(trig, trig.time(f64(t)))) == pytest.approx(golden / 1000, abs=6e-8)
    assert float(EDM(time_input=PathTime(3.0)).noise(VE(), f64(t))) == pytest.approx(3 * t)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.25, 250.0])
def test_what_networks_are_told_is_finite_at_both_ends(path, dtype, scale):
    """At t = 0 there is no noise, at t = 1 of the straight path nothing else."""
    t = inside(path, dtype=dtype)
    told, slope = jvp(lambda t: LogRatio(scale)(path, t), (t,), (torch.ones_like(t),))
    assert bool(told.isfinite().all())
    assert bool((told.diff() > 0).all())
    assert bool(slope[1:].isfinite().all())  # at t = 0 of a path without noise ln t has none
    inner = (path.ratio(t) > 1e-30) & (path.ratio(t) < 1e5)
    torch.testing.assert_close(told[inner], scale * path.ratio(t[inner]).log(), rtol=1e-6, atol=1e-6 * scale)


def test_the_floor_and_the_ceiling_of_the_log_ratio():
    ends = LogRatio(1.0)(Linear(), torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([math.log(1e-37), math.log(1e6)], rel=1e-6)
    assert LogRatio(1.0)(VE(), torch.tensor([1e-29])).tolist() == pytest.approx([math.log(1e-29)], rel=1e-6)


def test_what_networks_are_told_is_finite_where_denormal_numbers_are_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps them")
    try:
        assert bool(LogRatio()(Linear(), torch.zeros(3)).isfinite().all())
    finally:
        torch.set_flush_denormal(False)


@paths
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jump_to_where_one_is_keeps_every_bit(path, kind, dtype):
    t = inside(path, 999, dtype)
    skip, out, inp = kind.jump(path, t, t)
    assert torch.equal(skip, torch.ones_like(t))
    assert torch.equal(out.abs(), torch.zeros_like(t))
    assert bool(inp.isfinite().all())


@paths
@boundaries
@pytest.mark.parametrize("n", [1, 3, 8, 17, 64])
def test_the_boundary_condition_holds_to_the_last_bit(path, kind, n):
    # in batches of any size: vectorised functions may round otherwise than those of a single number
    t = torch.full((n,), path.t_min)
    for skip, out, _ in (kind.denoised(path, t), kind.jump(path, t, t)):
        assert torch.equal(skip, torch.ones(n))
        assert torch.equal(out.abs(), torch.zeros(n))


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_piecewise_function_is_the_network_from_the_first_time_after_t_min_on(path, dtype):
    """f = F, so skip = 0 and out = 1; on a path whose t_min scales the data, out is that scale."""
    low = torch.tensor(path.t_min, dtype=dtype)
    t = torch.stack([low, low.nextafter(low + 1), *inside(path, dtype=dtype)[1:]])
    skip, out, inp = Piecewise().denoised(path, t)
    inside_ = torch.ones_like(t)
    inside_[0] = 0
    assert torch.equal(skip, 1 - inside_)
    assert torch.equal(out, inside_ * path.alpha(low))
    assert torch.equal(inp, EDM().denoised(path, t).inp)  # the network's input is Karras et al.'s all the same
    if path.alpha(low) == 1:
        assert torch.equal(out, inside_)


@paths
@kinds
def test_a_jump_to_t_min_is_the_estimate_of_a_consistency_function(path, kind):
    """... and of a denoiser where t_min is free of noise."""
    if not isinstance(kind, BoundaryEDM) and path.sigma(f64(path.t_min)) > 0:
        return
    t = where_it_says_something(kind, path)
    t = t[1:] if isinstance(kind, Sample) else t  # its estimate is the network's also where the image is known
    jump, denoised = kind.jump(path, t, torch.full_like(t, path.t_min)), kind.denoised(path, t)
    for found, expected in zip(jump, denoised, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@paths
@kinds
def test_jumps_are_finite_over_the_whole_path(path, kind):
    t, s = torch.meshgrid(where_it_says_something(kind, path, 30), inside(path, 30), indexing="ij")
    below = s <= t
    for coefficient in kind.jump(path, t[below], s[below]):
        assert bool(coefficient.isfinite().all())


@paths
@pytest.mark.parametrize("kind", DENOISERS, ids=repr)
def test_the_jump_of_a_denoiser_is_ddim(path, kind):
    t = where_it_says_something(kind, path)[1:]
    s = path.t_min + (t - path.t_min) * torch.linspace(0, 1, len(t), dtype=t.dtype)
    generator = torch.Generator().manual_seed(0)
    x, raw = (torch.randn(len(t), generator=generator, dtype=t.dtype) for _ in range(2))
    skip, out, inp = kind.denoised(path, t)
    skip_s, out_s, inp_s = kind.jump(path, t, s)
    torch.testing.assert_close(
        skip_s * x + out_s * raw, path.transport(x, skip * x + out * raw, t, s), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(inp, inp_s)


@paths
@boundaries
def test_the_jump_of_a_consistency_function_follows_its_line(path, kind):
    t = inside(path)[1:]
    s = path.t_min + (t - path.t_min) * torch.linspace(0, 1, len(t), dtype=t.dtype)
    generator = torch.Generator().manual_seed(0)
    x, raw = (torch.randn(len(t), generator=generator, dtype=t.dtype) for _ in range(2))
    skip, out, _ = kind.denoised(path, t)
    f = skip * x + out * raw
    # In coordinates x / alpha and sigma / alpha: the straight line from (ratio_min, f) to (ratio_t, x).
    defined = path.alpha(t) > 0
    t, s, x, f, raw = (v[defined] for v in (t, s, x, f, raw))
    low = f64(path.t_min)
    share = (path.ratio(s) - path.ratio(low)) / (path.ratio(t) - path.ratio(low))
    line = f / path.alpha(low) + share * (x / path.alpha(t) - f / path.alpha(low))
    skip, out, _ = kind.jump(path, t, s)
    torch.testing.assert_close(skip * x + out * raw, path.alpha(s) * line, rtol=1e-9, atol=1e-9)
    # ... which lands on f.
    skip, out, _ = kind.jump(path, t, torch.full_like(t, path.t_min))
    torch.testing.assert_close(skip * x + out * raw, f, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [Linear(0.01, 0.99), Trig(), VP()], ids=lambda path: path.kind)
@pytest.mark.parametrize(
    "kind", [EDM(), BoundaryEDM(), Piecewise(), Epsilon(), VPrediction(), Sample()], ids=lambda kind: kind.kind
)
def test_all_paths_agree_at_equal_ratio(path, kind):
    """x_t / alpha is the VE sample at sigma / alpha: the estimate may not depend on how the path is drawn."""
    t = inside(path)
    ends = path.ratio(f64(path.t_min, path.t_max))
    ve = VE(float(ends[0]), float(ends[1]))
    skip, out, inp = kind.denoised(path, t)
    expected = kind.denoised(ve, path.ratio(t))
    # a consistency function lands on the path's own start, alpha_min times the VE's
    land = path.alpha(f64(path.t_min)) if isinstance(kind, BoundaryEDM) else 1.0
    torch.testing.assert_close(skip * path.alpha(t), land * expected.skip, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out, land * expected.out, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inp * path.alpha(t), expected.inp, rtol=1e-9, atol=1e-12)


@paths
def test_the_network_sees_and_makes_unit_variance(path):
    """Karras et al. (2022), eq. 117 and 123, for data of standard deviation sigma_data."""
    data = 0.5
    t = inside(path)[1:]
    alpha, sigma = path.alpha(t), path.sigma(t)
    skip, out, inp = EDM(sigma_data=data).denoised(path, t)
    one = torch.ones_like(t)
    torch.testing.assert_close(inp**2 * ((alpha * data) ** 2 + sigma**2), one)
    target = (1 - skip * alpha) ** 2 * data**2 + (skip * sigma) ** 2
    torch.testing.assert_close(target / out**2, one)


# What the networks of others predict, and what they are told.


@paths
def test_each_prediction_means_what_its_name_says(path):
    """From the right F, every kind gives back the image, and jumps to the image and the noise that it implies."""
    t = inside(path)
    t, s = t[(path.alpha(t) > 1e-9) & (path.sigma(t) > 1e-9)], f64(path.t_min + 0.3 * (path.t_max - path.t_min))
    s = torch.minimum(t, s)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(len(t), generator=generator, dtype=t.dtype) for _ in range(2))
    alpha, sigma = path.alpha(t), path.sigma(t)
    x, norm = alpha * x0 + sigma * eps, (alpha**2 + sigma**2).sqrt()
    said = {
        Epsilon(): eps,
        Epsilon(-1.0, unit_input=False): -eps,
        VPrediction(): (alpha * eps - sigma * x0) / norm,
        Sample(): x0,
    }
    for kind, raw in said.items():
        skip, out, inp = kind.denoised(path, t)
        torch.testing.assert_close(skip * x + out * raw, x0, rtol=1e-6, atol=1e-7)
        skip, out, _ = kind.jump(path, t, s)
        torch.testing.assert_close(skip * x + out * raw, path.alpha(s) * x0 + path.sigma(s) * eps, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            inp, torch.ones_like(t) if raw is said[Epsilon(-1.0, unit_input=False)] else 1 / norm
        )


def test_v_is_the_velocity_along_the_circle():
    """Where alpha = cos and sigma = sin, v = d x_t / dt."""
    path = Trig(0.0, math.pi / 2, sigma_data=1.0)
    t = inside(path)
    for found, expected in zip(VPrediction().denoised(path, t), Velocity().denoised(path, t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_vp_sde_is_told_its_own_time():
    """VPTime inverts sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, Karras et al. (2022), table 1."""
    t = f64(1e-5, 0.1, 0.5, 1.0)
    sigma = torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()
    torch.testing.assert_close(VPTime()(VE(), sigma), 999 * t, rtol=1e-9, atol=1e-9)
    assert float(sigma[-1]) == pytest.approx(152.17, rel=1e-4)


def test_the_vp_sde_agrees_with_ddpms_schedule():
    """The linear betas of Ho et al. are the SDE's in 1,000 steps: the same levels in the middle of a step."""
    k = torch.arange(0, 1000, 111, dtype=torch.float64)[1:]
    assert ((VPTime()(VP(), k) - (k + 0.5)) / k).abs().max() < 0.005


def test_the_cosine_steps_are_those_of_the_schedule():
    """u_j^2 = (1 - abar) / abar of the cosine schedule, but for the c1 that bounds the first steps."""
    told = CosineStep()
    levels = told.levels()
    assert levels.shape == (1001,)
    assert bool((levels[:-1] > levels[1:]).all())
    assert float(levels[-1]) == 0
    j = torch.arange(100, 1000, 50)
    bar = torch.cos(((1000 - j) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    free = torch.cos(torch.tensor(0.008 / 1.008 * math.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(levels[j], (free / bar.double() - 1).sqrt(), rtol=1e-5, atol=0)
    # a level is told its own step, and one slightly off the same
    index = torch.tensor([0, 5, 400, 998, 1000])
    assert told(VE(t_max=1e9), levels[index]).tolist() == (999 - index).tolist()
    assert told(VE(), levels[400:401] * 1.0005).tolist() == [599]


def test_half_the_unit_is_a_shift():
    t = f64(0.002, 1.0, 80.0)
    torch.testing.assert_close(LogRatio(1.0, unit=2.0)(VE(), t), (t / 2).log(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="unit"):
        LogRatio(unit=0.0)


def test_bad_signs_are_refused():
    with pytest.raises(ValueError, match="sign"):
        Epsilon(sign=0.5)
