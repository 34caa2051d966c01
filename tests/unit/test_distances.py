"""Distances and weights by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.autograd import functional
from torch.nn import functional as F

from cmtool.flow import EDM, VE, Linear, Trig
from cmtool.times import Times
from cmtool.training import distances, weights
from cmtool.training.distances import DISTANCES, L1, L2, LPIPS, PseudoHuber
from cmtool.training.weights import WEIGHTS
from tests.models import trunk

STATELESS = [L1(), L2(), L2(resize=4), PseudoHuber(), PseudoHuber(c=1.0)]
stateless = pytest.mark.parametrize("distance", STATELESS, ids=repr)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    a = torch.tensor([[[[1.0, -1.0]]], [[[0.0, 3.0]]]])
    b = torch.tensor([[[[0.0, 1.0]]], [[[0.0, -1.0]]]])
    torch.testing.assert_close(L1()(a, b), torch.tensor([1.5, 2.0]))
    torch.testing.assert_close(L2()(a, b), torch.tensor([2.5, 8.0]))
    huber = torch.tensor([math.sqrt(5 + 4) - 2, math.sqrt(16 + 4) - 2])
    torch.testing.assert_close(PseudoHuber(c=2.0)(a, b), huber)


@stateless
def test_one_number_a_sample_that_only_sees_its_own_pair(distance):
    a, b = normal(5, 3, 8, 8), normal(5, 3, 8, 8, seed=1)
    whole = distance(a, b)
    assert whole.shape == (5,)
    assert bool((whole > 0).all())
    for i in range(5):
        torch.testing.assert_close(distance(a[i : i + 1], b[i : i + 1])[0], whole[i])
    torch.testing.assert_close(distance(b, a), whole)
    assert torch.equal(distance(a, a).abs() < 1e-15, torch.ones(5, dtype=torch.bool))


@stateless
def test_the_gradient_is_finite_and_zero_where_both_are_equal(distance):
    a = normal(2, 3, 8, 8).requires_grad_()
    distance(a, a.detach().clone()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize(("side", "c"), [(32, 0.029930), (64, 0.059860), (256, 0.239439)])
def test_the_published_crossover_of_pseudo_huber(side, c):
    # far from zero d = |a - b| - c
    a = torch.zeros(1, 3, side, side, dtype=torch.float64)
    far = float(PseudoHuber()(a, a + 1e6 / math.sqrt(a.numel())))
    assert 1e6 - far == pytest.approx(c, abs=1e-6)


def test_pseudo_huber_is_one_norm_an_image_not_one_a_pixel():
    """Elementwise it would be a sum of |d| far from zero; the norm of the whole image is sqrt(n) smaller."""
    a, b = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 10.0)
    n = a.numel()
    assert float(PseudoHuber(c=0.03)(a, b)) == pytest.approx(10 * math.sqrt(n) - 0.03, rel=1e-6)
    # its gradient is the unit vector to the other image: every pixel's depends on all the others
    a.requires_grad_()
    PseudoHuber(c=1e-6)(a, b).sum().backward()
    torch.testing.assert_close(a.grad, torch.full_like(b, -1 / math.sqrt(n)))


@pytest.mark.parametrize("c", [0, -1, math.nan])
def test_a_distance_without_a_gradient_at_zero_is_refused(c):
    with pytest.raises(ValueError, match="positive"):
        PseudoHuber(c=c)


def test_l2_at_another_resolution():
    a, b = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    # halving bilinearly is the mean of 2x2 pixels
    torch.testing.assert_close(L2(resize=4)(a, b), L2()(F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)))
    assert L2(resize=8)(a, b).tolist() == pytest.approx(L2()(a, b).tolist())
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert float(L2(resize=4)(checkers, torch.zeros_like(checkers))) == pytest.approx(0, abs=1e-12)


def test_all_distances_are_known_by_name():
    assert set(DISTANCES) == {"l1", "l2", "pseudo_huber", "lpips"}
    assert [distances.needs_backbone(d) for d in (*STATELESS, LPIPS())] == [False] * 5 + [True]
    assert distances.build(STATELESS[0], None) is STATELESS[0]
    with pytest.raises(ValueError, match="trunk"):
        distances.build(LPIPS(), None)


# LPIPS, with a trunk of random weights: all but its taste can be checked.


@pytest.fixture(scope="module")
def lpips_module():
    return LPIPS("alex").build(trunk()), trunk()


@pytest.mark.slow
def test_lpips_has_the_given_trunk_and_is_frozen(lpips_module):
    module, state = lpips_module
    for name, value in module.model.net.state_dict().items():
        assert torch.equal(value, state["features." + name.split(".", 1)[1]])
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.train().training
    assert not any(part.training for part in module.modules())


@pytest.mark.slow
def test_lpips_compares_small_images_at_224(lpips_module):
    module, _ = lpips_module
    a, b = (normal(2, 3, 32, 32, seed=seed).float().tanh() for seed in (0, 1))
    found = module(a, b)
    assert found.shape == (2,)
    large = [F.interpolate(x, size=224, mode="bilinear") for x in (a, b)]
    torch.testing.assert_close(found, module.model(*large).flatten())
    assert bool((found > 1e-3).all())
    torch.testing.assert_close(module(a, a), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_lpips_has_a_gradient_also_at_zero_distance(lpips_module):
    module, _ = lpips_module
    a, b = (normal(1, 3, 32, 32, seed=seed).float().tanh() for seed in (0, 1))
    a.requires_grad_()
    (grad,) = torch.autograd.grad(module(a, b).sum(), a)
    assert float(grad.abs().max()) > 0
    (grad,) = torch.autograd.grad(module(a, a.detach().clone()).sum(), a)
    assert bool(grad.isfinite().all())


# The form for neighbours: the leading term of d(a, a + h u).


def leading(distance, a, u, power):
    """d(a, a + h u) / h^power for h that halves."""
    return [distance(a, a + h * u) / h**power for h in (0.2, 0.1, 0.05)]


@stateless
def test_the_form_for_neighbours_is_the_leading_term(distance):
    a, u = normal(3, 3, 8, 8), 0.001 * normal(3, 3, 8, 8, seed=1)
    metric = distance.metric(a, u)
    errors = [(found / metric - 1).abs().max() for found in leading(distance, a, u, 1 if distance.kind == "l1" else 2)]
    if distance.kind in ("l1", "l2"):  # is its own leading term
        assert max(errors) < 1e-8
    else:  # the next is of h^4
        assert float(errors[2]) < 1e-2
        assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.1)
    assert metric.shape == (3,)
    torch.testing.assert_close(distance.metric(a, -2 * u), metric * (2 if distance.kind == "l1" else 4))
    assert torch.equal(distance.metric(a, torch.zeros_like(u)), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("distance", [L2(), L2(resize=4), PseudoHuber(), PseudoHuber(c=1.0)], ids=repr)
def test_the_form_for_neighbours_is_half_the_hessian(distance):
    a, u = normal(1, 1, 8, 8), normal(1, 1, 8, 8, seed=1)
    _, product = functional.hvp(lambda x: distance(x, a).sum(), a, u)
    torch.testing.assert_close(distance.metric(a, u), (product * u).sum((1, 2, 3)) / 2)


@pytest.mark.slow
def test_the_form_of_lpips_for_neighbours(lpips_module):
    module = copy.deepcopy(lpips_module[0]).double()
    a, u = normal(2, 3, 32, 32).tanh(), 0.001 * normal(2, 3, 32, 32, seed=1)
    metric = module.metric(a, u)
    errors = [(found / metric - 1).abs().max() for found in leading(module, a, u, 2)]
    assert float(errors[2]) < 1e-2
    assert float(errors[2]) < 0.7 * float(errors[0])
    torch.testing.assert_close(module.metric(a, -2 * u), 4 * metric)
    # finite, and with a finite gradient, also where every feature of a pixel is dead
    flat = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    for layer in module.model.net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.data.fill_(-1.0)
    slope = u[:1].clone().requires_grad_()
    found = module.metric(flat, slope)
    (grad,) = torch.autograd.grad(found.sum(), slope)
    assert bool(found.isfinite().all())
    assert bool(grad.isfinite().all())


# Weights, on VE at t = 0.5, 1, 4 with neighbours at half of it and landings at a quarter.

T = torch.tensor([0.5, 1.0, 4.0])
OF_THE_RATIO = {
    "uniform": [1, 1, 1],
    "snr": [4, 1, 1 / 16],
    "snr_plus_one": [5, 2, 17 / 16],
    "truncated_snr": [4, 1, 1],
    "karras_weight": [8, 5, 4 + 1 / 16],
    "inverse_ratio": [2, 1, 1 / 4],
}
ON_VE = OF_THE_RATIO | {
    "inverse_gap": [4, 2, 0.5],
    "inverse_jump": [1 / 0.375**2, 1 / 0.75**2, 1 / 9],
    "velocity_error": [4, 1, 1 / 16],  # dx / dt = (x - D) / t
    "alpha": [1, 1, 1],
}


def weigh(weight, path, t):
    return weight(path, Times(t, t / 2, t / 4))


def test_every_weight_is_checked():
    assert ON_VE.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_by_hand(kind):
    found = weigh(WEIGHTS[kind](), VE(), T)
    torch.testing.assert_close(found, torch.tensor(ON_VE[kind], dtype=torch.float32))


@pytest.mark.parametrize("kind", OF_THE_RATIO)
@pytest.mark.parametrize("path", [Linear(), Trig()], ids=lambda path: path.kind)
def test_weights_are_functions_of_the_noise_to_signal_ratio(kind, path):
    found = weigh(WEIGHTS[kind](), path, path.time(T))
    torch.testing.assert_close(found, torch.tensor(OF_THE_RATIO[kind], dtype=torch.float32), rtol=1e-5, atol=0)


def test_weights_of_the_paths_own_time():
    t = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(weigh(weights.VelocityError(), Linear(), t), t**-2)
    torch.testing.assert_close(weigh(weights.VelocityError(power=1), Linear(), t), 1 / t)
    # TrigFlow: the velocity turns with D by 1 / sin t
    torch.testing.assert_close(weigh(weights.VelocityError(), Trig(), t), t.sin() ** -2)
    torch.testing.assert_close(weigh(weights.InverseJump(), Linear(), t), (0.75 * t) ** -2)
    torch.testing.assert_close(weigh(weights.InverseGap(), Trig(), t), 2 / t)
    torch.testing.assert_close(weigh(weights.Alpha(), Trig(), t), t.cos())
    torch.testing.assert_close(weigh(weights.Alpha(), Linear(), t), 1 - t)
    torch.testing.assert_close(weigh(weights.InverseRatio(), Trig(), t), 1 / (0.5 * t.tan()))


@pytest.mark.parametrize("path", [VE(), Linear(), Trig()], ids=lambda path: path.kind)
def test_the_velocity_error_is_the_slope_of_the_velocity_in_the_estimate(path):
    x, d = normal(2, 3, 1, 1, 1)
    t = path.time(T.double())
    slope = (path.ode_velocity(x, d + 1, t) - path.ode_velocity(x, d, t)).flatten()
    torch.testing.assert_close(weigh(weights.VelocityError(), path, t), slope**2)


def test_karras_weight_makes_the_effective_weight_of_f_one():
    """lambda(t) out(t)^2 = 1: Karras et al. (2022), eq. 144."""
    for data in (0.5, 1.3):
        _, out, _ = EDM(sigma_data=data).denoised(VE(), T)
        torch.testing.assert_close(weigh(weights.Karras(data), VE(), T) * out**2, torch.ones(3))


@pytest.mark.parametrize("path", [VE(), Linear(), Trig()], ids=lambda path: path.kind)
def test_karras_weight_in_continuous_time_is_that_of_a_grid_even_in_the_logarithm(path):
    """Neighbours a share of the ratio apart: what is linear in the derivative gains a factor of it, squares two."""
    t = path.time(T)
    plain = weigh(weights.Karras(), path, t)
    for power in (1, 2):
        torch.testing.assert_close(weigh(weights.Karras(power=power), path, t), plain * T**power)
