"""`Tangent`: derivatives along a trajectory, and the losses of sCM and MeanFlow that are made of them."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.autograd import functional

from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, Linear, LogRatio, PathTime, Trig, Velocity
from cmtool.networks import MLPConfig
from cmtool.networks.chance import drop, seeded
from cmtool.times import Pair, Tangential, Times
from cmtool.training import weights
from cmtool.training.objectives import Continuous, Tangent
from cmtool.training.tangents import Adaptive, Clipped, Learned, Normalised, along, balance, coefficients_along
from cmtool.training.trajectory import Batch, Data, Teacher
from tests import models
from tests.objectives.gaussian import (
    GAUSSIAN,
    MEAN,
    STD,
    Shifted,
    Wide,
    gaussian_batch,
    generator,
    inside,
    normal,
    paths,
    short,
)
from tests.objectives.quadrature import Given, expectation
from tests.oracles import GaussianOracle, MixtureOracle, learned


def change(config, model, batch, progress=0.5, teacher=None):
    """What the objective wants added to the network's output: its gradient, undone."""
    model = FlowMap(Shifted(model.network, batch.x0.shape), model.path, model.parameterization)
    loss = config.build(teacher)(model, model, batch, progress, generator(2))
    loss.value.backward()
    size = batch.x0.numel()
    weight = config.weight(model.path, config.times(model.path, len(batch.x0), progress, generator(2)))
    found = -model.network.shift.grad * size / (2 * weight[:, None, None, None])
    torch.testing.assert_close(loss.per_sample, (weight * found.square().mean((1, 2, 3))).detach())
    torch.testing.assert_close(loss.value, loss.per_sample.mean())
    return found


def perceptron(parameterization, path, two_times=False, seed=0):
    """A smooth network with random weights, in float64."""
    config = MLPConfig(resolution=2, in_channels=1, out_channels=1, width=16, depth=1, two_times=two_times)
    return models.model("flow_map", config, path, parameterization, seed).double().requires_grad_(True)


# Derivatives along a trajectory.


def test_the_derivative_along_a_line_is_the_total_one():
    """f = x^2 t + sin(t) x: f' = (2 x t + sin t) v + x^2 + cos(t) x."""
    x, v, t = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    at = t[:, None, None, None]

    def ask(x, t):
        t = t[:, None, None, None]
        return x**2 * t + torch.sin(t) * x

    value, slope = along(ask, x, t, v)
    torch.testing.assert_close(value, ask(x, t))
    torch.testing.assert_close(slope, (2 * x * at + torch.sin(at)) * v + x**2 + torch.cos(at) * x)


@paths
@pytest.mark.parametrize(("two_times", "dropout"), [(False, 0.0), (True, 0.5)])
def test_the_derivative_of_a_network_is_that_of_differences(path, two_times, dropout):
    """One with attention; with the landing held fixed and, where it drops units, under one mask."""
    config = models.micro(in_channels=1, out_channels=1, two_times=two_times, dropout=dropout)
    model = models.model("flow_map", config, path, EDM()).double().train()
    x, v, t = (
        0.5 * normal(3, 1, 8, 8),
        normal(3, 1, 8, 8, seed=1),
        path.time(torch.tensor([0.1, 0.7, 5.0], dtype=torch.float64)),
    )
    s, h = torch.full_like(t, path.t_min), 1e-5

    def ask(x, t):
        return model.raw(x, t, s)

    def masked(asked):
        with seeded(torch.arange(3)):
            return asked()

    value, slope = masked(lambda: along(ask, x, t, v))
    with torch.no_grad():
        up, down = (masked(lambda step=step: ask(x + step * v, t + step)) for step in (h, -h))
        torch.testing.assert_close(value, masked(lambda: ask(x, t)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)
    assert float(slope.abs().mean()) > 1e-2


@paths
@pytest.mark.parametrize("kind", [EDM(), BoundaryEDM(), Velocity()], ids=lambda kind: kind.kind)
def test_the_derivatives_of_the_coefficients(path, kind):
    model = FlowMap(nn.Identity(), path, kind)
    t, s, h = inside(path, 0.2, 0.5, 0.9), inside(path, 0.0, 0.1, 0.6), 1e-6
    now, slope = coefficients_along(model, t, s)
    for found, value in zip(now, kind.jump(path, t, s), strict=True):
        assert torch.equal(found, value)
    for found, up, down in zip(slope, kind.jump(path, t + h, s), kind.jump(path, t - h, s), strict=True):
        torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


# At the exact flow map of Gaussian data there is nothing to change.

KINDS = [EDM(), EDM(time_input=PathTime()), BoundaryEDM(time_input=PathTime()), Velocity()]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.kind}-{kind.time_input.kind}")


def landings(path, where):
    t = path.time(torch.tensor([0.05, 0.4, 1.5, 6.0], dtype=torch.float64))
    s = t * torch.tensor([0.0, 0.2, 0.9, 0.5]).double() * (where == "between")
    return Given(t, t, s.clamp_min(path.t_min))


@paths
@kinds
@pytest.mark.parametrize("where", ["t_min", "between"])
def test_the_exact_flow_map_is_left_as_it_is(path, kind, where):
    oracle, batch = GaussianOracle(path, MEAN, STD), gaussian_batch(4)
    wrong = learned(GaussianOracle(path, MEAN, 0.8), kind, two_times=True)
    for config in (
        Tangent(Teacher(), landings(path, where)),
        Tangent(Teacher(), landings(path, where), scale=weights.Alpha(), limit=Normalised()),
    ):
        found = change(config, learned(oracle, kind, two_times=True), batch, teacher=oracle)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-8)
        # (in every sample, were the model another)
        assert float(change(config, wrong, batch, teacher=oracle).abs().amax((1, 2, 3)).min()) > 1e-4


@paths
def test_a_consistency_function_is_a_flow_map_with_one_landing(path):
    """A network that is told one time, on a path that starts at the data itself."""
    path = replace(path, t_min=0.0)
    oracle, batch = GaussianOracle(path, MEAN, STD), gaussian_batch(4)

    class ToData(GaussianOracle):
        def denoised(self, x_t, t, labels=None, augment=None):
            return self.jump(x_t, t, torch.zeros_like(t))

    kind = EDM(time_input=PathTime())
    for std, exact in ((STD, True), (0.8, False)):
        found = change(
            Tangent(Teacher(), landings(path, "t_min")), learned(ToData(path, MEAN, std), kind), batch, teacher=oracle
        )
        assert (float(found.abs().max()) < 1e-8) == exact


# The published forms, on a real network.


def jvp(ask, x, t, v):
    """What `along` returns, by differentiating backwards twice."""
    return functional.jvp(ask, (x, t), (v, torch.ones_like(t)))


@pytest.mark.parametrize(
    ("warmup", "progress", "r"), [(0.0, 0.0, 1.0), (0.4, 0.0, 0.0), (0.4, 0.1, 0.25), (0.4, 0.7, 1.0)]
)
@pytest.mark.parametrize("limit", [None, Normalised(0.1), Clipped(0.5)], ids=["all of it", "normalised", "clipped"])
def test_the_tangent_of_trigflow(warmup, progress, r, limit):
    """Lu and Song (2024), eq. 8: cos(t) df/dt = -cos^2 (sd F - dx/dt) - r cos sin (x + sd dF/dt), f = cos x - sin sd F.

    Their F is minus ours. F goes to F + g, and the loss is |F - F- - g|^2.
    """
    sd, path = 0.5, Trig(0.0, 1.5)
    model, teacher = (perceptron(EDM(sd, PathTime()), path, seed=seed) for seed in (0, 1))
    batch, t = gaussian_batch(3), inside(path, 0.1, 0.5, 0.9)
    times = Given(t, t, torch.zeros_like(t))
    x_t, cos, sin = path.mix(batch.x0, batch.eps, t), t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    velocities = {
        Data(): cos * sd * batch.eps - sin * batch.x0,  # z = sd eps
        Teacher(): -sd * teacher.raw(x_t, t).detach(),  # sd F of the teacher
    }
    for trajectory, v in velocities.items():
        raw, d_raw = jvp(lambda x, at: -model.raw(x, at), x_t, t, v)
        g = -(cos**2) * (sd * raw - v) - r * cos * sin * (x_t + sd * d_raw)
        if isinstance(limit, Normalised):
            g = g / (g.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.1)
        elif isinstance(limit, Clipped):
            g = g.clamp(-0.5, 0.5)
        config = Tangent(trajectory, times, weights.Alpha(), limit, warmup, weights.InverseRatio())
        found = change(config, model, batch, progress, teacher)
        torch.testing.assert_close(found, -g, rtol=1e-7, atol=1e-9)
        assert float(g.abs().mean()) > 0.01


def test_the_prior_weight_of_trigflow():
    t = inside(Trig(), 0.1, 0.5, 0.9)
    torch.testing.assert_close(weights.InverseRatio()(Trig(), Times(t, t, t)), 1 / (0.5 * t.tan()))
    torch.testing.assert_close(weights.Alpha()(Trig(), Times(t, t, t)), t.cos())


@pytest.mark.parametrize("times", ["pairs", "diagonal"])
def test_the_target_of_meanflow(times):
    """Geng et al. (2025), eq. 10 and 11: u_tgt = v - (t - s) (v du/dx + du/dt); on the diagonal that is v."""
    path = Linear()
    model, teacher = (perceptron(Velocity(), path, two_times) for two_times in (True, False))
    batch, t = gaussian_batch(3), torch.tensor([0.2, 0.6, 0.95], dtype=torch.float64)
    s = t.clone() if times == "diagonal" else torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)
    x_t, gap = path.mix(batch.x0, batch.eps, t), (t - s)[:, None, None, None]
    for trajectory, v in {Data(): batch.eps - batch.x0, Teacher(): teacher.raw(x_t, t).detach()}.items():
        u, du = jvp(lambda x, at: model.raw(x, at, s), x_t, t, v)
        target = v - gap * du
        config = Tangent(trajectory, Given(t, t, s))
        found = change(config, model, batch, teacher=teacher)
        torch.testing.assert_close(u + found, target, rtol=1e-7, atol=1e-9)
        assert float((gap * du).abs().mean()) > 0.01 or times == "diagonal"
        # eq. 22, p = 1: the loss over itself
        balanced = replace(config, balance=Adaptive(1.0, 1e-3)).build(teacher)(model, model, batch, 0.5, generator())
        squares = (u - target).square().mean((1, 2, 3))
        torch.testing.assert_close(balanced.value, (squares / (squares + 1e-3)).mean(), rtol=1e-7, atol=0)
        torch.testing.assert_close(balanced.per_sample, squares, rtol=1e-6, atol=0)
        # and the gradient is that of |u - u_tgt|^2, u told both times
        plain = config.build(teacher)(model, model, batch, 0.5, generator()).value
        by_hand = (model.raw(x_t, t, s) - target.detach()).square().mean()
        every = list(model.parameters())
        for one, other in zip(*(torch.autograd.grad(loss, every) for loss in (plain, by_hand)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [EDM(), Velocity()], ids=lambda kind: kind.kind)
@paths
def test_the_change_undoes_the_tangent_while_the_derivative_stays(path, kind):
    """F + change makes (skip v + out' F) + (skip' x + out dF/dt) vanish, whatever the sign of out."""
    model, oracle, batch = perceptron(kind, path, True), GaussianOracle(path, MEAN, STD), gaussian_batch(3)
    times = Given(inside(path, 0.2, 0.5, 0.8), inside(path, 0.2, 0.5, 0.8), inside(path, 0.05, 0.1, 0.7))
    found = change(Tangent(Teacher(), times), model, batch, teacher=oracle)
    x_t = path.mix(batch.x0, batch.eps, times.t)
    v = oracle.velocity(x_t, times.t)

    def jumped(x, t, more):
        skip, out, _ = (c[:, None, None, None] for c in kind.jump(path, t, times.s))
        return skip * x + out * (model.raw(x, t, times.s) + more)

    _, before = jvp(lambda x, t: jumped(x, t, 0.0), x_t, times.t, v)
    _, after = jvp(lambda x, t: jumped(x, t, found), x_t, times.t, v)
    torch.testing.assert_close(after, torch.zeros_like(after), rtol=0, atol=1e-7)
    assert float(before.abs().mean()) > 1e-3


# From the data or from a teacher.


class Wavy(nn.Module):
    """A smooth network of one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x, noise, labels=None):
        return torch.sin(self.weight * x + noise[:, None, None, None])


MIXTURE = MixtureOracle(VE())
ORACLES = {
    "gaussian": (lambda path: GaussianOracle(path, MEAN, STD), GAUSSIAN),
    "mixture": (MixtureOracle, [(w, m, MIXTURE.std) for w, m in zip(MIXTURE.weights, MIXTURE.means, strict=True)]),
}


@short
@pytest.mark.parametrize("data", ORACLES)
@pytest.mark.parametrize("kind", [EDM(time_input=PathTime()), Velocity()], ids=lambda kind: kind.kind)
def test_in_expectation_the_data_pull_as_the_exact_teacher_does(path, data, kind):
    """E[dx_t/dt | x_t] is the teacher's velocity, in which the gradient is linear unless it is limited or balanced."""
    oracle, components = ORACLES[data]
    batch, times, rule = expectation(path, components, inside(path, 0.3, 0.7), n=48)

    def gradient(trajectory, **rest):
        model = FlowMap(Wavy(), path, kind)
        config = Tangent(trajectory, times, weight=rule, **rest)
        config.build(oracle(path))(model, model, batch, 0.5, generator()).value.backward()
        return float(model.network.weight.grad)

    linear = [{}, {"scale": weights.Alpha()}, {"warmup": 0.8}]
    for rest in linear:
        assert gradient(Data(), **rest) == pytest.approx(gradient(Teacher(), **rest), rel=1e-4)
        assert abs(gradient(Data(), **rest)) > 1e-4
    for rest in ({"limit": Normalised()}, {"limit": Clipped(0.3)}, {"balance": Adaptive()}):
        # (the weights of the quadrature are in the balanced losses: that much is certain to differ)
        assert abs(gradient(Data(), **rest) / gradient(Teacher(), **rest) - 1) > 1e-3


@short
def test_in_expectation_the_data_leave_the_exact_flow_map_as_it_is(path):
    """MeanFlow's objective from data: every sample pulls, and together they do not."""
    batch, times, rule = expectation(path, GAUSSIAN, inside(path, 0.4, 0.8), n=20, s=inside(path, 0.1, 0.5))
    pulls = []
    for std in (STD, 0.6):
        model = learned(GaussianOracle(path, MEAN, std), Velocity(), two_times=True)
        shape = batch.x0.shape
        model = FlowMap(Shifted(model.network, shape), path, Velocity())
        Tangent(Data(), times, weight=rule).build()(model, model, batch, 0.0, generator()).value.backward()
        pulls.append(model.network.shift.grad)
    # by odd and even parts of x: the mean, and the slope
    x_t = path.mix(batch.x0, batch.eps, times.t)
    for test in (torch.ones_like(x_t), x_t, x_t**2):
        assert abs(float((pulls[0] * test).sum())) < 1e-7
    assert abs(float((pulls[1] * x_t).sum())) > 1e-3
    assert float(pulls[0].abs().sum()) > 1e-2


# Limits and balances by hand.


def test_limits():
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.3, 0.1]]).double()[:, None, None]
    size = math.sqrt(12.5)
    by_hand = torch.tensor([3 / (size + 0.1), -4 / (size + 0.1)]).double()
    torch.testing.assert_close(Normalised()(g)[0].flatten(), by_hand)
    torch.testing.assert_close(Normalised(2.0)(g)[0], g[0] / (size + 2))
    assert torch.equal(Normalised()(g)[1], g[1])  # no 0 / 0
    torch.testing.assert_close(Clipped()(g)[0].flatten(), torch.tensor([1.0, -1.0]).double())
    assert torch.equal(Clipped(1.0)(g)[2], g[2])
    # the size means the same at every resolution
    assert float(Normalised()(torch.full((1, 3, 4, 4), 2.0)).mean()) == pytest.approx(2 / 2.1)
    assert float(Normalised()(torch.full((1, 1, 16, 16), 2.0)).mean()) == pytest.approx(2 / 2.1)


def test_adaptive_weights_by_hand():
    losses = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    found = balance(Adaptive(power=0.5, c=0.01))(losses, VE(), torch.ones(2))
    factor = (losses.detach() + 0.01) ** -0.5
    torch.testing.assert_close(found, losses * factor)
    found.sum().backward()
    torch.testing.assert_close(losses.grad, factor)  # the factor is a constant
    assert balance(None)(losses, VE(), torch.ones(2)) is losses


def test_learned_weights_come_to_rest_at_the_inverse_loss():
    """exp(w) loss - w is least at exp(-w) = loss, for each noise level by itself."""
    torch.manual_seed(0)
    made = balance(Learned(16)).double()
    levels = torch.tensor([0.01, 0.3, 5.0, 60.0], dtype=torch.float64)
    losses = torch.tensor([0.02, 0.7, 3.0, 11.0], dtype=torch.float64)
    torch.testing.assert_close(made(losses, VE(), levels), losses)  # at first all count alike
    optimizer = torch.optim.LBFGS(made.parameters(), lr=1.0, max_iter=200, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value = made(losses, VE(), levels).sum()
        value.backward()
        return value

    optimizer.step(step)
    torch.testing.assert_close(made(losses, VE(), levels), 1 + losses.log(), rtol=1e-4, atol=1e-4)
    # so that what is minimised has the slope of losses that are 1 everywhere
    leaf = losses.clone().requires_grad_()
    made(leaf, VE(), levels).sum().backward()
    torch.testing.assert_close(leaf.grad * losses, torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0)


def test_learned_weights_are_functions_of_the_noise_level():
    made = balance(Learned(8)).double()
    nn.init.normal_(made.out.weight, generator=generator())
    ratio, losses = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    values = [made(losses, path, path.time(ratio)) for path in (VE(), Linear(), Trig())]
    torch.testing.assert_close(values[1], values[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(values[2], values[0], rtol=1e-7, atol=0)
    assert len(values[0].unique()) == 3
    for path in (Linear(), replace(Trig(), t_min=0.0)):  # also where the level is 0 or infinite
        ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
        assert bool(made(losses[:2], path, ends).isfinite().all())


def test_a_balance_moves_what_counts_and_not_what_is_reported():
    batch, oracle = gaussian_batch(8), GaussianOracle(VE(), MEAN, STD)
    model = learned(GaussianOracle(VE(), MEAN, 0.8), EDM(), two_times=True)
    config = Tangent(Teacher(), Wide(Tangential()))
    plain = config.build(oracle)(model, model, batch, 0.5, generator(2))
    objective = replace(config, balance=Learned()).build(oracle)
    objective.balance.out.bias.data.fill_(math.log(3.0))
    learning = objective(model, model, batch, 0.5, generator(2))
    torch.testing.assert_close(learning.per_sample, plain.per_sample)
    expected = 3.0 * plain.value - math.log(3.0)
    torch.testing.assert_close(learning.value, expected, rtol=1e-6, atol=1e-6)
    assert len(list(objective.parameters())) == 2
    assert float(plain.terms["tangent loss"]) == float(plain.value)


@dataclass(frozen=True)
class Halves:
    """A weight that tells its samples apart."""

    def __call__(self, path, times):
        return 1 / (1 + times.t)


@pytest.mark.parametrize("diagonal", [0.0, 0.75])
def test_times_reach_the_loss(diagonal):
    path, batch, oracle = Linear(), gaussian_batch(8), GaussianOracle(Linear(), MEAN, STD)
    model = learned(GaussianOracle(path, MEAN, 0.8), Velocity(), two_times=True)
    times = Wide(Pair(diagonal=diagonal))
    found = change(Tangent(Teacher(), times, weight=Halves()), model, batch, teacher=oracle)
    t, _, s = times(path, 8, 0.5, generator(2))
    assert int((t == s).sum()) == round(8 * diagonal)
    assert found.shape == batch.x0.shape


@pytest.mark.parametrize("config", [Tangent(Data()), Continuous(Data()), Continuous(Teacher(), stop_gradient=False)])
def test_the_output_and_its_derivative_share_their_dropout(config):
    """Every call of a step drops the same units, and every step others."""
    model, batch = FlowMap(Drawing(), VE(), EDM()), gaussian_batch(4)
    objective = config.build(GaussianOracle(VE(), MEAN, STD))
    for seed in (0, 1):
        objective(model, model, batch, 0.0, generator(seed)).value.backward()
    calls = len(model.network.drawn) // 2
    assert calls == (1 if config == Continuous(Teacher(), stop_gradient=False) else 2)
    first, second = set(model.network.drawn[:calls]), set(model.network.drawn[calls:])
    assert len(first) == len(second) == 1
    assert first != second


class Drawing(nn.Module):
    """A network that keeps what it draws."""

    def __init__(self):
        super().__init__()
        self.weight, self.drawn = nn.Parameter(torch.ones(())), []

    def forward(self, x, noise, labels=None):
        kept = drop(torch.ones(len(x), 64), 0.5).view(-1, 16) @ 2.0 ** torch.arange(16)  # 16 choices are one number
        self.drawn.append(tuple(float(number) for number in kept))
        return self.weight * torch.sin(x)


def test_the_derivative_is_computed_in_full_precision():
    """bfloat16 inside the network is for the forward pass only, and comes back after the derivative."""
    model = models.model("flow_map", models.micro(in_channels=1, out_channels=1, two_times=True), Linear(), Velocity())
    batch = Batch(normal(3, 1, 8, 8).float(), None, normal(3, 1, 8, 8, seed=1).float())
    t = torch.tensor([0.3, 0.6, 0.9])
    config, losses = Tangent(Data(), Given(t, t, t / 2)), []
    for dtype in (None, torch.bfloat16):
        model.compute_in(dtype)
        losses.append(config.build()(model, model, batch, 0.0, generator()).per_sample)
        assert model.compute_dtype is dtype
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normalised(0.0),
        lambda: Clipped(0.0),
        lambda: Adaptive(c=0.0),
        lambda: Learned(channels=7),
        lambda: Learned(channels=0),
        lambda: Tangent(warmup=1.5),
        lambda: Tangent(warmup=-0.1),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="found"):
        make()


def test_log_ratio_and_path_time_are_told_alike():
    """The same function of x and t, told in two ways, has the same derivative."""
    path, batch, oracle = Trig(), gaussian_batch(4), GaussianOracle(Trig(), MEAN, STD)
    found = [
        change(
            Tangent(Teacher(), landings(path, "between")),
            learned(GaussianOracle(path, MEAN, 0.8), EDM(time_input=time_input), two_times=True),
            batch,
            teacher=oracle,
        )
        for time_input in (LogRatio(), LogRatio(250.0), PathTime(), PathTime(1000.0))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-8)


def test_the_first_derivative_says_nothing():
    """In a program of its own: torch warns once, of what it loads for it."""
    program = (
        "import warnings; warnings.simplefilter('error'); import torch; from cmtool.training.tangents import along;"
        "print(along(lambda x, t: x * t, torch.full((1, 1), 3.0), torch.full((1,), 2.0), torch.full((1, 1), 5.0)))"
    )
    for grad in ("", "torch.set_grad_enabled(False);"):
        command = [sys.executable, "-c", program.replace("print", grad + "print")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "13." in done.stdout
