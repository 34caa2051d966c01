"""Paths: derivatives, inverses, and the laws that mix, transport and diffuse follow on every one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import jvp

from cmtool.flow.path import PATHS, VE, VP, Linear, Trig
from tests.oracles import GaussianOracle

ALL = [
    *(VE(), Linear(), Trig(), Linear(t_min=0.01, t_max=0.99), Trig(sigma_data=1.0), Trig(0.0, math.pi / 2)),
    *(VP(), VP(betas="squaredcos_cap_v2", t_max=990.0), VP(t_max=49.0, num_steps=50, beta_end=0.2)),
]
paths = pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.kind}-{path.t_max:.3g}")


def inside(path, n=64):
    """Times over the whole path, both ends included; float64."""
    return torch.linspace(path.t_min, path.t_max, n, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_path_is_tested():
    assert {type(path) for path in ALL} == set(PATHS.values())
    assert all(PATHS[path.kind] is type(path) for path in ALL)


@paths
def test_derivatives_are_those_of_autodiff(path):
    t = inside(path)
    d_alpha, d_sigma = path.derivative(t)
    ones = torch.ones_like(t)
    torch.testing.assert_close(d_alpha, jvp(path.alpha, (t,), (ones,))[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(d_sigma, jvp(path.sigma, (t,), (ones,))[1], rtol=1e-12, atol=1e-14)


@paths
def test_time_inverts_the_ratio_up_to_both_ends(path):
    t = inside(path)
    torch.testing.assert_close(path.time(path.ratio(t)), t, rtol=1e-12, atol=1e-14 * path.t_max if path.discrete else 0)
    torch.testing.assert_close(path.ratio(t), path.sigma(t) / path.alpha(t), rtol=0, atol=0)


@paths
def test_also_in_float32_no_ratio_is_negative_or_undefined(path):
    """The float32 next to pi / 2 lies above it, where cos is negative."""
    t = inside(path).float()
    ratio = path.ratio(t)
    assert bool((ratio.diff() > 0).all())
    assert float(ratio[0]) == pytest.approx(float(path.ratio(inside(path)[0])), rel=1e-6)
    assert float(ratio[-1]) > 0.999 * min(float(path.ratio(inside(path)[-1])), 1e7)
    torch.testing.assert_close(path.time(ratio), t, rtol=1e-5, atol=1e-9 * path.t_max)


@paths
def test_noise_grows_along_the_path(path):
    assert bool((path.ratio(inside(path)).diff() > 0).all())


def test_the_published_ends():
    assert (VE().t_min, VE().t_max) == (0.002, 80.0)
    assert (Linear().t_min, Linear().t_max) == (0.0, 1.0)
    # arctan(80 / 0.5), Lu and Song (2024); the same ratios as VE
    assert Trig().t_max == pytest.approx(1.5645464, abs=1e-7)
    ends = torch.tensor([Trig().t_min, Trig().t_max], dtype=torch.float64)
    torch.testing.assert_close(Trig().ratio(ends), torch.tensor([0.002, 80.0], dtype=torch.float64), rtol=1e-9, atol=0)


@paths
def test_velocity_is_the_derivative_of_mix(path):
    t = inside(path)
    x0, eps = normal(64, 3, 2, 2), normal(64, 3, 2, 2, seed=1)
    x_t, tangent = jvp(lambda t: path.mix(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x0, eps, t), tangent, rtol=1e-12, atol=1e-12)
    by_hand = path.alpha(t)[:, None, None, None] * x0 + path.sigma(t)[:, None, None, None] * eps
    torch.testing.assert_close(x_t, by_hand, rtol=0, atol=0)


@paths
def test_ode_velocity_is_the_conditional_one_when_the_data_is_known(path):
    t = inside(path)[1:]
    x0, eps = normal(63, 2, 3), normal(63, 2, 3, seed=1)
    torch.testing.assert_close(
        path.ode_velocity(path.mix(x0, eps, t), x0, t), path.velocity(x0, eps, t), rtol=1e-9, atol=1e-9
    )


def test_ode_velocity_on_ve_is_the_published_one():
    x, denoised, t = normal(5, 2), normal(5, 2, seed=1), torch.linspace(0.1, 70, 5, dtype=torch.float64)
    torch.testing.assert_close(VE().ode_velocity(x, denoised, t), (x - denoised) / t[:, None])


@paths
def test_transport_moves_along_mix_when_the_data_is_known(path):
    t = inside(path)[1:]
    s = path.t_min + (t - path.t_min) * torch.linspace(0, 1, 63, dtype=torch.float64)
    x0, eps = normal(63, 4), normal(63, 4, seed=1)
    moved = path.transport(path.mix(x0, eps, t), x0, t, s)
    torch.testing.assert_close(moved, path.mix(x0, eps, s), rtol=1e-10, atol=1e-10)


@paths
def test_transport_starts_with_the_ode_velocity(path):
    t = inside(path)[1:]
    x, denoised = normal(63, 4), normal(63, 4, seed=1)
    here, slope = jvp(lambda s: path.transport(x, denoised, t, s), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(here, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, path.ode_velocity(x, denoised, t), rtol=1e-9, atol=1e-9)


@paths
def test_implied_is_the_inverse_of_transport(path):
    """For every pair of times, the ends of the path among them: pure noise at t = 1 and pure data at s = 0."""
    times = inside(path, 12)
    pairs = torch.combinations(torch.arange(12))
    s, t = times[pairs[:, 0]], times[pairs[:, 1]]
    x_t, x_s = (normal(len(t), 3, 2, 2, seed=seed) for seed in (0, 1))
    denoised = path.implied(x_t, x_s, t, s)
    torch.testing.assert_close(path.transport(x_t, denoised, t, s), x_s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.implied(x_t, path.transport(x_t, x_s, t, s), t, s), x_s, rtol=1e-9, atol=1e-9)
    # of a noisy image on its way it is the image
    x0, eps = normal(len(t), 2, seed=2), normal(len(t), 2, seed=3)
    torch.testing.assert_close(path.implied(path.mix(x0, eps, t), path.mix(x0, eps, s), t, s), x0, rtol=1e-9, atol=1e-9)


def test_implied_on_ve_is_the_published_target():
    """Salimans and Ho (2022), eq. 8, in VE: (x_s - (s/t) x_t) / (1 - s/t) = x_t - t (x_s - x_t) / (s - t)."""
    x_t, x_s, t, s = 20 * normal(1, 3), 5 * normal(1, 3, seed=1), torch.tensor([20.0]), torch.tensor([7.0])
    torch.testing.assert_close(VE().implied(x_t, x_s, t, s), x_t - 20 * (x_s - x_t) / (7 - 20))


@pytest.mark.parametrize("other", ALL, ids=lambda path: f"{path.kind}-{path.t_max:.3g}")
@pytest.mark.parametrize("kind", [VE(), Linear(), Trig(), Trig(sigma_data=1.3)], ids=lambda path: path.kind)
def test_like_has_the_ends_of_the_other(kind, other):
    if isinstance(kind, VE) and other == Linear():
        with pytest.raises(ValueError, match="t_max=inf"):  # pure noise is nowhere on VE
            kind.like(other)
        return
    made = kind.like(other)
    assert type(made) is type(kind)
    assert getattr(made, "sigma_data", None) == getattr(kind, "sigma_data", None)
    for found, wanted in ((made.t_min, other.t_min), (made.t_max, other.t_max)):
        ratio = float(other.ratio(torch.tensor(wanted, dtype=torch.float64)))
        there = float(made.ratio(torch.tensor(found, dtype=torch.float64)))
        assert min(there, 1e12) == pytest.approx(min(ratio, 1e12), rel=1e-9)
    back = other.like(made)
    assert (back.t_min, back.t_max) == pytest.approx((other.t_min, other.t_max), rel=1e-12)


def test_the_default_ends_of_trig_are_those_of_ve():
    made = Trig().like(VE())
    assert (made.t_min, made.t_max) == pytest.approx((Trig().t_min, Trig().t_max), rel=1e-12)
    assert Trig().like(Linear()).t_max == pytest.approx(math.pi / 2)


@paths
def test_clamp_holds_times_between_the_ends(path):
    low, high = path.t_min, path.t_max
    t = torch.tensor([low - 1, low, (low + high) / 2, high, high + 1, math.inf], dtype=torch.float64)
    expected = torch.tensor([low, low, (low + high) / 2, high, high, high], dtype=torch.float64)
    assert torch.equal(path.clamp(t), expected)


def test_the_usual_grid_of_a_path():
    assert {kind: path.rho for kind, path in PATHS.items()} == {"ve": 7, "linear": 1, "trig": 1, "vp": 1}


def gains(path, s, t):
    """(a, b) of diffuse: x_t = a x_s + b eps."""
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return path.diffuse(one, s, t, zero), path.diffuse(zero, s, t, one)


@paths
def test_diffuse_keeps_the_marginals_and_composes(path):
    times = inside(path, 25)
    s, t, u = (
        times[torch.tensor(index)]
        for index in zip(*((i, j, k) for i in range(24) for j in range(i, 25) for k in range(j, 25)), strict=True)
    )
    a, b = gains(path, s, t)
    torch.testing.assert_close(a * path.alpha(s), path.alpha(t), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a**2 * path.sigma(s) ** 2 + b**2, path.sigma(t) ** 2, rtol=1e-12, atol=1e-14)
    defined = path.alpha(t) > 0  # from t = 1 on `Linear`, where no data is left, there is nowhere to go on to
    a2, b2 = gains(path, t[defined], u[defined])
    whole_a, whole_b = gains(path, s[defined], u[defined])
    torch.testing.assert_close(a2 * a[defined], whole_a, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a2**2 * b[defined] ** 2 + b2**2, whole_b**2, rtol=1e-9, atol=1e-12)


def test_diffuse_from_t_min_on_ve_is_the_renoising_of_algorithm_1():
    tau = torch.tensor([0.002, 0.8, 5.0], dtype=torch.float64)
    a, b = gains(VE(), torch.full_like(tau, 0.002), tau)
    torch.testing.assert_close(a, torch.ones_like(tau))
    torch.testing.assert_close(b, (tau**2 - 0.002**2).sqrt(), rtol=1e-12, atol=0)


@paths
def test_diffused_samples_have_the_moments_of_the_path(path):
    data = GaussianOracle(path)
    s, t = path.t_min + 0.2 * (path.t_max - path.t_min), path.t_min + 0.7 * (path.t_max - path.t_min)
    n = 200_000
    x_s = data.draw(s, n).double()
    x_t = path.diffuse(x_s, torch.tensor(s), torch.tensor(t), normal(n, 1, 1, 1, seed=5))
    variance = float(data.variance(torch.tensor(t, dtype=torch.float64)))
    mean = float(path.alpha(torch.tensor(t))) * data.mean
    assert float(x_t.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(x_t.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@paths
def test_diffuse_to_the_same_time_changes_nothing(path):
    t = inside(path)[:-1].float()
    x = normal(63, 3).float()
    assert torch.equal(path.diffuse(x, t, t, torch.ones_like(x)), x)


@paths
def test_diffuse_refuses_to_take_noise_away(path):
    t = inside(path, 4)
    with pytest.raises(ValueError, match="s <= t"):
        path.diffuse(torch.zeros(4, 1), t, t.flip(0), torch.zeros(4, 1))


@pytest.mark.parametrize(
    "ends", [(1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (0.1, math.inf), (math.nan, 1.0), (0.0, math.nan)]
)
def test_impossible_ends_are_refused(ends):
    with pytest.raises(ValueError, match="t_min"):
        VE(*ends)


# The discrete schedule.


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_vp_is_the_product_of_its_steps(betas):
    path = VP(betas=betas)
    k = torch.arange(1000, dtype=torch.float64)
    kept = path.alpha(k) ** 2
    torch.testing.assert_close(kept + path.sigma(k) ** 2, torch.ones_like(kept))
    beta = 1 - kept[1:] / kept[:-1]
    expected = {
        "linear": 1e-4 + (0.02 - 1e-4) * k[1:] / 999,
        "scaled_linear": (0.01 + (0.02**0.5 - 0.01) * k[1:] / 999) ** 2,
        "squaredcos_cap_v2": (
            1 - (torch.cos((k[1:] + 9) / 1008 * math.pi / 2) / torch.cos((k[1:] + 8) / 1008 * math.pi / 2)) ** 2
        ).clamp_max(0.999),
    }[betas]
    torch.testing.assert_close(beta, expected, rtol=1e-8, atol=1e-12)


def test_vp_takes_a_table_and_a_last_step_without_data():
    table = tuple(0.01 + 0.001 * k for k in range(20))
    path = VP(num_steps=20, t_max=19, table=table)
    kept = path.alpha(torch.arange(20, dtype=torch.float64)) ** 2
    torch.testing.assert_close(1 - kept[1:] / kept[:-1], torch.tensor(table[1:], dtype=torch.float64))
    empty = VP(num_steps=20, t_max=19, table=table, zero_snr=True)
    ends = empty.alpha(torch.tensor([0.0, 19.0], dtype=torch.float64))
    assert float(ends[0]) == pytest.approx(0.99**0.5)
    assert float(ends[1]) == pytest.approx(2.0**-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"betas": "sine"}, "sine"),
        ({"table": (0.1,)}, "1 betas"),
        ({"t_max": 1000.0}, "last step is 999"),
        ({"num_steps": 1, "t_max": 0.5}, "num_steps"),
        ({"beta_end": 1.5}, "between 0 and 1"),
    ],
)
def test_vp_checks_its_schedule(changes, words):
    with pytest.raises(ValueError, match=words):
        VP(**changes)
