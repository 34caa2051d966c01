"""`FlowMap`: what reaches the network, what comes back, and the oracles everything else is measured with."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cmtool.errors import UsageError
from cmtool.flow import (
    EDM,
    VE,
    VP,
    BoundaryEDM,
    Epsilon,
    FlowMap,
    Linear,
    LogRatio,
    ModelCard,
    PathTime,
    Piecewise,
    Sample,
    Trig,
    Velocity,
    VPrediction,
    guided,
    on_path,
)
from cmtool.flow.path import expand
from cmtool.networks.configs import MLPConfig
from tests import models
from tests.models import micro
from tests.oracles import GaussianConsistency, GaussianOracle, MixtureOracle, learned

PATHS = [VE(), Linear(), Trig(), VP()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)


class Spy(nn.Module):
    """Returns a fixed function of its input and keeps what it was called with."""

    def __init__(self, **config):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.config = SimpleNamespace(**config)
        self.calls = []

    def forward(self, x, noise, labels=None, **extra):
        self.x, self.noise, self.labels, self.extra = x, noise, labels, extra
        self.calls.append((x, noise, labels, extra))
        raw = (self.scale.to(x.dtype) * x).tanh()
        return raw if labels is None else raw + expand(labels, x).to(x.dtype) / 10


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_estimate_is_skip_x_plus_out_f():
    network = Spy()
    model = FlowMap(network, VE(), EDM(time_input=LogRatio(250.0)))
    x, t, labels = 3 * normal(2, 3, 4, 4), torch.tensor([0.5, 3.0]), torch.tensor([1, 2])
    found = model.denoised(x, t, labels)
    for i, sigma in enumerate((0.5, 3.0)):
        root = (sigma**2 + 0.25) ** 0.5
        raw = (2 * x[i] / root).tanh() + 0.1 * labels[i]
        expected = 0.25 / root**2 * x[i] + sigma * 0.5 / root * raw
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(network.x[i], x[i] / root)
    torch.testing.assert_close(network.noise, 250 * t.log())
    assert network.labels is labels


def test_only_the_inside_of_the_network_runs_in_low_precision():
    network = Spy()
    model = FlowMap(network, VE(), EDM()).compute_in(torch.bfloat16)
    x, t = normal(2, 3, 4, 4), torch.tensor([0.002, 80.0])
    for found in (model.denoised(x, t), model.jump(x, t, t / 2), model.velocity(x, t)):
        assert network.x.dtype == torch.bfloat16
        assert network.noise.dtype == torch.float32
        assert found.dtype == torch.float32
    # what the skip carries is not rounded to bfloat16: at t_min that is the whole image
    boundary = FlowMap(network, VE(), BoundaryEDM()).compute_in(torch.bfloat16)
    assert torch.equal(boundary.denoised(x, t)[0], x[0])
    assert model.compute_in(None).denoised(x, t).dtype == torch.float32
    assert network.x.dtype == torch.float32


@paths
def test_f_at_t_min_is_x_to_the_last_bit(path):
    model = models.model("consistency", path=path)
    for n in (1, 5):
        x = normal(n, 3, 8, 8)
        t = torch.full((n,), path.t_min)
        assert torch.equal(model.denoised(x, t), x)
        assert torch.equal(model.jump(x, t, t), x)


@paths
@pytest.mark.parametrize("kind", [EDM(), BoundaryEDM(), Piecewise(), Velocity()], ids=lambda kind: kind.kind)
def test_a_jump_to_where_one_is_changes_nothing(path, kind):
    model = FlowMap(Spy(), path, kind)
    t = torch.linspace(path.t_min, path.t_max, 10)[:-1]
    x = normal(9, 3, 4, 4)
    assert torch.equal(model.jump(x, t, t), x)


def test_meanflows_jump_is_a_straight_line():
    model = FlowMap(Spy(), Linear(), Velocity())
    x, t, s = normal(2, 3, 4, 4), torch.tensor([0.9, 0.4]), torch.tensor([0.0, 0.3])
    raw = (2 * x).tanh()
    torch.testing.assert_close(model.jump(x, t, s), x - (t - s)[:, None, None, None] * raw)
    torch.testing.assert_close(model.denoised(x, t), x - t[:, None, None, None] * raw)
    torch.testing.assert_close(model.velocity(x, t), raw)


@paths
def test_velocity_is_the_slope_of_the_jump(path):
    model = FlowMap(Spy().double(), path, EDM())
    t = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)[1:-1]
    x, h = normal(7, 3, 4, 4, dtype=torch.float64), 1e-6
    slope = (model.jump(x, t, t + h) - model.jump(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(model.velocity(x, t), slope, rtol=1e-6, atol=1e-6)


# What the network is asked: F, the landing, augmentation.

KINDS = [EDM(), BoundaryEDM(), Piecewise(), Velocity(), Epsilon(), VPrediction(), Sample()]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)


def between(path, n=7, dtype=torch.float64):
    """Times t inside the path and landings s < t, t_min the last."""
    t = torch.linspace(path.t_min, path.t_max, n + 2, dtype=dtype)[1:-1]
    return t, path.t_min + (t - path.t_min) * torch.linspace(0.9, 0, n, dtype=dtype)


@paths
@kinds
def test_estimate_jump_and_raw_are_made_of_the_same_f(path, kind):
    network = Spy()
    model = FlowMap(network.double(), path, kind)
    t, s = between(path)
    x, labels = normal(7, 3, 4, 4, dtype=torch.float64), torch.arange(7)
    raw = model.raw(x, t, labels=labels)
    for coefficients, found in (
        (kind.denoised(path, t), model.denoised(x, t, labels)),
        (kind.jump(path, t, s), model.jump(x, t, s, labels)),
    ):
        skip, out, inp = (expand(c, x) for c in coefficients)
        torch.testing.assert_close(found, skip * x + out * raw, rtol=1e-13, atol=1e-13)
        assert torch.equal(network.x, inp * x)
    torch.testing.assert_close(raw, (2 * inp * x).tanh() + expand(labels, x).double() / 10, rtol=1e-13, atol=1e-13)
    first, *others = network.calls
    for _, noise, given, extra in (first, *others):
        assert torch.equal(noise, kind.noise(path, t))
        assert given is labels
        assert extra == {}  # networks of one time without augmentation are called as ever
    augment = normal(7, 2)
    for call in (
        lambda: model.denoised(x, t, labels, augment),
        lambda: model.velocity(x, t, labels, augment),
        lambda: model.jump(x, t, s, labels, augment),
        lambda: model.raw(x, t, s, labels, augment),
    ):
        call()
        assert network.extra.keys() == {"augment"}
        assert network.extra["augment"] is augment


@paths
@kinds
def test_two_time_networks_are_told_how_far_the_jump_goes(path, kind):
    network = Spy(two_times=True)
    model = FlowMap(network, path, kind)
    assert model.two_times
    assert not FlowMap(Spy(two_times=False), path, kind).two_times
    assert not FlowMap(nn.Identity(), path, kind).two_times
    t, s = between(path, dtype=torch.float32)
    x, told = normal(7, 3, 4, 4), kind.noise(path, t)
    gap = told - kind.noise(path, s)
    assert bool((gap > 0).all())
    for call, expected in (
        (lambda: model.jump(x, t, s), gap),
        (lambda: model.raw(x, t, s), gap),
        (lambda: model.raw(x, t), torch.zeros(7)),
        (lambda: model.denoised(x, t), torch.zeros(7)),
        (lambda: model.velocity(x, t), torch.zeros(7)),
        (lambda: model.jump(x, t, t), torch.zeros(7)),
    ):
        call()
        assert torch.equal(network.noise, told)
        assert torch.equal(network.extra["gap"], expected)
        assert network.extra["gap"].dtype == torch.float32


def test_the_gap_is_finite_over_the_whole_straight_path():
    for told in (LogRatio(), PathTime()):
        network = Spy(two_times=True)
        model = FlowMap(network, Linear(), EDM(time_input=told))
        one, zero = torch.ones(1), torch.zeros(1)
        for t, s in ((one, zero), (one, one), (zero, zero)):
            found = model.jump(normal(1, 3, 4, 4), t, s)
            assert bool(found.isfinite().all())
            assert bool(network.extra["gap"].isfinite().all())
        assert float(network.extra["gap"]) == 0


@paths
@pytest.mark.parametrize(
    "kind", [EDM(), EDM(time_input=PathTime(3.0)), Velocity(), Epsilon(), VPrediction(), Sample()], ids=repr
)
def test_a_network_that_has_learned_the_flow_map_jumps_as_the_ode_does(path, kind):
    """Through parameterization, time input and gap, from and to anywhere; on the diagonal it is the denoiser."""
    oracle = GaussianOracle(path, 0.3, 0.4)
    model = learned(oracle, kind, two_times=True)
    t, s = between(path)
    x = normal(7, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.jump(x, t, s), oracle.jump(x, t, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.denoised(x, t), oracle.denoised(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.velocity(x, t), oracle.velocity(x, t), rtol=1e-8, atol=1e-8)
    assert torch.equal(model.jump(x, t, t), x)
    # one that is not told the landing can only be DDIM
    ignorant = learned(oracle, kind)
    torch.testing.assert_close(
        ignorant.jump(x, t, s), path.transport(x, oracle.denoised(x, t), t, s), rtol=1e-9, atol=1e-9
    )
    assert float((ignorant.jump(x, t, s) - model.jump(x, t, s)).abs().max()) > 5e-3


@paths
@pytest.mark.parametrize("kind", [BoundaryEDM(), Piecewise()], ids=lambda kind: kind.kind)
def test_a_network_that_has_learned_the_consistency_function(path, kind):
    oracle = GaussianConsistency(path, 0.3, 0.4)
    model = learned(oracle, kind)
    t, _ = between(path)
    x, low = normal(7, 1, 2, 2, dtype=torch.float64), torch.full_like(t, path.t_min)
    torch.testing.assert_close(model.denoised(x, t), oracle.denoised(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.jump(x, t, low), oracle.jump(x, t, low), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.jump(x, t, t), x)


# Another path.

VE_ENDS = [Linear().like(VE()), Trig()]
SMOOTH = (
    [(VE(), path) for path in VE_ENDS] + [(path, VE()) for path in VE_ENDS] + [(Linear(), Trig()), (Trig(), Linear())]
)
VIEWS = [*SMOOTH, (VP(), VE()), (VE(), VP()), (VP(), Linear().like(VP()))]
views = pytest.mark.parametrize(("own", "seen"), VIEWS, ids=lambda path: f"{path.kind}-{path.t_max:.4g}")


def shared(own, seen, n=25):
    """Times of `seen`, from end to end of what the two paths share, and landings below them."""
    low, high = (
        f([float(path.ratio(torch.tensor(t, dtype=torch.float64))) for path, t in ends])
        for f, ends in ((max, [(p, p.t_min) for p in (own, seen)]), (min, [(p, p.t_max) for p in (own, seen)]))
    )
    ratio = torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
    return seen.time(ratio), seen.time(low * (ratio / low) ** torch.linspace(0, 0.9, n, dtype=torch.float64))


@views
@pytest.mark.parametrize("kind", [GaussianOracle, MixtureOracle, GaussianConsistency])
def test_an_oracle_seen_on_another_path_is_the_oracle_of_that_path(own, seen, kind):
    view, expected = on_path(kind(own), seen), kind(seen)
    t, s = shared(own, seen)
    x = expected.path.mix(normal(25, 1, 2, 2, dtype=torch.float64), normal(25, 1, 2, 2, seed=1, dtype=torch.float64), t)
    close = {"rtol": 1e-7, "atol": 1e-9}
    if kind is GaussianConsistency:
        # it lands on its own t_min: only the jump says where that is
        if seen == seen.like(own):
            low = torch.full_like(t, seen.t_min)
            torch.testing.assert_close(view.jump(x, t, low), expected.jump(x, t, low), **close)
    else:
        torch.testing.assert_close(view.denoised(x, t), expected.denoised(x, t), **close)
        torch.testing.assert_close(view.velocity(x, t), expected.velocity(x, t), rtol=1e-6, atol=1e-6)
    if kind is not MixtureOracle:
        torch.testing.assert_close(view.jump(x, t, s), expected.jump(x, t, s), **close)


@pytest.mark.parametrize(("own", "seen"), SMOOTH, ids=lambda path: f"{path.kind}-{path.t_max:.4g}")
def test_its_ode_ends_at_the_same_image(own, seen):
    """A mixture's ODE, solved on the model's own path and along the view's velocity, from and to the same ratios."""
    model = MixtureOracle(own)
    view = on_path(model, seen)
    ratio = torch.tensor([20.0, 0.05], dtype=torch.float64)
    x = {path: path.sigma(path.time(ratio[0])) * normal(50, 1, 1, 1, dtype=torch.float64) for path in (own, seen)}

    def end(f, path, n=200):
        """Runge-Kutta of order four over ratios that fall geometrically."""
        times = path.time(torch.logspace(math.log10(20), math.log10(0.05), n + 1, dtype=torch.float64))
        z = x[path]
        for t, u in pairwise(times):
            h, at = u - t, (lambda share, t=t, u=u: (t + share * (u - t)).expand(50))
            k1 = f(z, at(0))
            k2 = f(z + h / 2 * k1, at(0.5))
            k3 = f(z + h / 2 * k2, at(0.5))
            k4 = f(z + h * k3, at(1))
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z / path.alpha(times[-1])

    there, here = end(view.velocity, seen), end(model.velocity, own)
    assert float(here.std()) > 0.3
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


def test_beyond_the_ends_of_its_path_the_model_is_asked_at_the_end():
    """The straight path from 0 to 1 over a teacher for noise levels 0.002 to 80."""
    for dtype in (torch.float32, torch.float64):
        teacher = GaussianOracle(VE(), 0.3, 0.5)
        view = on_path(teacher, Linear())
        eps = normal(4, 1, 2, 2, dtype=dtype)
        one, zero = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        top, low = 80 * one, 0.002 * one
        # t = 1: pure noise, seen as pure noise of the highest level
        torch.testing.assert_close(view.denoised(eps, one), teacher.denoised(80 * eps, top))
        torch.testing.assert_close(view.jump(eps, one, zero), teacher.jump(80 * eps, top, low))
        torch.testing.assert_close(view.velocity(eps, one), eps - teacher.denoised(80 * eps, top))
        # t = 0: a clean image, as it is
        torch.testing.assert_close(view.denoised(eps, zero), eps)
        torch.testing.assert_close(view.denoised(eps, zero), teacher.denoised(eps, low), rtol=0, atol=1e-4)
        # nothing happens between two times beyond the end: noise stays noise, an image an image
        torch.testing.assert_close(view.jump(eps, one, 0.995 * one), 0.995 * eps)
        torch.testing.assert_close(view.jump(eps, 0.001 * one, zero), eps / 0.999)
        # from one end to the other the error is what the teacher's ends leave, in noise and in data
        exact = GaussianOracle(Linear(), 0.3, 0.5)
        t = torch.tensor([0.999, 0.5, 0.01, 0.001], dtype=dtype)
        x = exact.path.mix(0.3 + 0.5 * normal(4, 1, 2, 2, seed=5, dtype=dtype), eps, t)
        torch.testing.assert_close(view.denoised(x, t), exact.denoised(x, t), rtol=0, atol=1e-2)
        torch.testing.assert_close(view.jump(x, t, zero), exact.jump(x, t, zero), rtol=0, atol=1e-2)


def test_the_velocity_below_the_first_noise_level_stays_that_of_the_data():
    """An estimate that is off by t_min^2 would be divided by t, and dx/dt of the straight path blow up at its end."""
    view, exact = on_path(MixtureOracle(VE(), std=0.05), Linear()), MixtureOracle(Linear(), std=0.05)
    t = torch.logspace(-9, -2, 40, dtype=torch.float64)[:, None].expand(-1, 64).flatten()
    x0, eps = (normal(len(t), 1, 1, 1, seed=seed, dtype=torch.float64) for seed in (0, 1))
    x = exact.path.mix(0.7 + 0.05 * x0, eps, t)
    found, expected = view.velocity(x, t), exact.velocity(x, t)
    assert float(expected.abs().mean()) > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.002 / 0.05**2 * 0.25)
    known = t > 0.002
    torch.testing.assert_close(found[known], expected[known], rtol=0, atol=1e-9)
    # the image itself at t = 0, to the last bit
    zero = torch.zeros(64, dtype=torch.float64)
    assert torch.equal(view.denoised(x[:64], zero), x[:64])


@views
def test_a_jump_on_another_path_to_where_one_is_changes_nothing(own, seen):
    view = on_path(models.model("denoiser", path=own), seen)
    t = torch.linspace(seen.t_min, seen.t_max, 33)
    x = normal(33, 3, 8, 8)
    torch.testing.assert_close(view.jump(x, t, t), x, rtol=1e-6, atol=1e-7)


def test_on_its_own_path_a_model_is_itself():
    model = models.model()
    assert on_path(model, VE()) is model
    view = on_path(model, Trig())
    assert view.path == Trig()
    assert view.card is model.card
    assert view.network is model.network
    assert len(list(view.parameters())) == len(list(model.parameters()))
    with pytest.raises(TypeError, match="raw"):
        view.raw(torch.zeros(1, 3, 8, 8), torch.ones(1))


@views
def test_a_view_of_a_view(own, seen):
    model = MixtureOracle(own)
    twice = on_path(on_path(model, seen), Trig(0.1, 1.4, sigma_data=0.7))
    expected = on_path(model, Trig(0.1, 1.4, sigma_data=0.7))
    t = torch.linspace(0.1, 1.4, 9, dtype=torch.float64)
    x = normal(9, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(twice.denoised(x, t), expected.denoised(x, t), rtol=1e-9, atol=1e-9)
    back = on_path(on_path(model, seen), own)
    t, _ = shared(own, seen, 9)
    u = own.time(seen.ratio(t))
    torch.testing.assert_close(back.denoised(x, u), model.denoised(x, u), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seen", [Linear().like(VE()), Trig(), Trig(sigma_data=1.0).like(VE())], ids=repr)
@pytest.mark.parametrize("kind", [EDM(), BoundaryEDM(), Piecewise(), EDM(time_input=LogRatio(250.0))], ids=repr)
def test_a_copy_of_the_weights_on_another_path_is_the_model_seen_there(seen, kind):
    """Told ln(sigma / alpha), the network cannot know the path: this is why a student may start as its teacher."""
    for model, close in (
        (FlowMap(Spy().double(), VE(), kind), {"rtol": 1e-10, "atol": 1e-10}),
        (models.model("denoiser", parameterization=kind), {"rtol": 2e-4, "atol": 2e-4}),
    ):
        dtype = torch.float64 if isinstance(model.network, Spy) else torch.float32
        view, copy = on_path(model, seen), FlowMap(model.network, seen, kind)
        t = seen.time(torch.logspace(-2.6, 1.9, 9, dtype=dtype))
        s = seen.clamp(0.7 * t)
        s[-1] = seen.t_min
        x = seen.mix(normal(9, 3, 8, 8, dtype=dtype), normal(9, 3, 8, 8, seed=1, dtype=dtype), t)
        torch.testing.assert_close(copy.jump(x, t, s), view.jump(x, t, s), **close)
        if not isinstance(kind, BoundaryEDM):  # f is an image at t_min, and each path has its own
            torch.testing.assert_close(copy.denoised(x, t), view.denoised(x, t), **close)


# Guidance.

MEANS = (-0.4, 0.5, 0.9)
SCALES = [0.0, 0.5, 2.0, 7.5, -1.0]


@paths
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["denoiser", "consistency", "flow_map"])
def test_guidance_moves_the_mean_of_gaussian_classes(path, scale, kind):
    """Classes N(m, s^2) and N(m0, s^2) without a label: guided, they are N(m0 + w (m - m0), s^2), in jumps too."""
    oracle = {"denoiser": GaussianOracle, "consistency": GaussianConsistency, "flow_map": GaussianOracle}[kind]
    parameterization = Piecewise() if kind == "consistency" else EDM()
    model = learned(oracle(path, 0.1, 0.3), parameterization, kind == "flow_map", MEANS)
    view, labels = guided(model, scale), torch.tensor([0, 1, 2, 2, 1, 0, -1])
    t, s = between(path)
    s = torch.full_like(t, path.t_min) if kind == "consistency" else s
    x = normal(7, 1, 2, 2, dtype=torch.float64)
    denoised, jumped, raw = view.denoised(x, t, labels), view.jump(x, t, s, labels), view.raw(x, t, s, labels)
    velocity = view.velocity(x, t, labels)
    for i, label in enumerate(labels.tolist()):
        mean = 0.1 + scale * (MEANS[label] - 0.1) if label >= 0 else 0.1
        expected, at = oracle(path, mean, 0.3), (x[i : i + 1], t[i : i + 1])
        close = {"rtol": 1e-8, "atol": 1e-8}
        torch.testing.assert_close(denoised[i : i + 1], expected.denoised(*at), **close)
        if kind != "denoiser":
            torch.testing.assert_close(jumped[i : i + 1], expected.jump(*at, s[i : i + 1]), **close)
        if kind != "consistency":
            torch.testing.assert_close(velocity[i : i + 1], expected.velocity(*at), rtol=1e-6, atol=1e-6)
    plain, named = model.raw(x, t, s), model.raw(x, t, s, labels)
    torch.testing.assert_close(raw, plain + scale * (named - plain))


def test_guidance_asks_once_for_twice_the_batch():
    network = Spy(num_classes=3, label_dropout=0.1, two_times=True)
    view = guided(FlowMap(network, VE(), EDM()), 3.0)
    x, t, s, labels = normal(2, 3, 4, 4), torch.tensor([5.0, 2.0]), torch.tensor([1.0, 0.5]), torch.tensor([2, 0])
    augment = normal(2, 4)
    for call in (view.denoised, view.velocity, lambda *a: view.jump(a[0], a[1], s, *a[2:])):
        before = len(network.calls)
        call(x, t, labels, augment)
        assert len(network.calls) == before + 1
        assert network.labels.tolist() == [2, 0, -1, -1]
        assert torch.equal(network.x, network.x[:2].repeat(2, 1, 1, 1))
        assert torch.equal(network.extra["augment"], augment.repeat(2, 1))
        assert len(network.extra["gap"]) == len(network.noise) == 4
    # without labels there is nothing to guide towards, and nothing to pay for
    found = view.denoised(x, t)
    assert len(network.x) == 2
    assert network.labels is None
    torch.testing.assert_close(found, FlowMap(network, VE(), EDM()).denoised(x, t))


def test_scales_that_change_nothing():
    model = models.model(config=micro(num_classes=3, label_dropout=0.1))
    assert guided(model, 1.0) is model
    assert guided(models.model(), 1.0).card.num_classes == 0  # nothing to do, nothing to refuse
    x, t, labels = normal(2, 3, 8, 8), torch.tensor([5.0, 2.0]), torch.tensor([2, 0])
    torch.testing.assert_close(guided(model, 0.0).denoised(x, t, labels), model.denoised(x, t))
    assert not torch.allclose(model.denoised(x, t, labels), model.denoised(x, t))
    assert torch.equal(guided(model, 4.0).jump(x, t, t, labels), x)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_guidance_needs_classes_and_dropped_labels(scale):
    for config in (micro(), MLPConfig(in_channels=2, out_channels=2)):
        with pytest.raises(UsageError, match="none"):
            guided(models.model(config=config), scale)
    with pytest.raises(UsageError, match="label_dropout"):
        guided(models.model(config=micro(num_classes=3)), scale)
    with pytest.raises(UsageError, match="label_dropout"):
        guided(on_path(models.model(config=micro(num_classes=3)), Trig()), scale)
    guided(FlowMap(Spy(), VE(), EDM()), scale)  # a network that says nothing of itself may be anything


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_guidance_is_finite(scale):
    with pytest.raises(UsageError, match="finite"):
        guided(models.model(config=micro(num_classes=3, label_dropout=0.1)), scale)


@views
def test_guidance_and_paths_go_together(own, seen):
    model = models.model("denoiser", micro(num_classes=3, label_dropout=0.1), own)
    t, s = (times.float() for times in shared(own, seen, 5))
    x, labels = normal(5, 3, 8, 8), torch.tensor([0, 1, 2, -1, 1])
    inside, outside = on_path(guided(model, 3.0), seen), guided(on_path(model, seen), 3.0)
    plain = on_path(model, seen)
    assert inside.path == outside.path == seen
    for ask in (lambda m: m.denoised(x, t, labels), lambda m: m.jump(x, t, s, labels)):
        torch.testing.assert_close(ask(inside), ask(outside), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ask(inside), ask(plain))


def test_the_compute_type_passes_through_views():
    network = Spy(num_classes=3, label_dropout=0.1)
    model = FlowMap(network, VE(), EDM())
    x, t, labels = normal(2, 3, 4, 4), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    for view in (on_path(guided(model, 2.0), Trig()), guided(on_path(model, Linear()), 2.0)):
        for dtype, inside in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
            assert view.compute_in(dtype) is view
            assert view.denoised(x, t, labels).dtype == view.jump(x, t, t / 2, labels).dtype == torch.float32
            assert network.x.dtype == inside
            assert model.compute_dtype is view.compute_dtype is dtype
    # a view of a model that computes in bfloat16 does so too, and says so
    view = guided(on_path(model.compute_in(torch.bfloat16), Trig()), 2.0)
    assert view.compute_dtype is torch.bfloat16
    view.denoised(x, t, labels)
    assert network.x.dtype == torch.bfloat16


def test_calling_it_says_what_to_call():
    model = FlowMap(Spy(), VE(), EDM(), ModelCard("denoiser", 4))
    with pytest.raises(TypeError, match="denoised"):
        model(torch.zeros(1, 3, 4, 4), torch.ones(1))


def test_the_card_has_the_image_shape():
    assert ModelCard("denoiser", 32, channels=1).image_shape == (1, 32, 32)


# The oracles themselves.


def points(path, n=6):
    """Times away from the ends, where finite differences work."""
    span = path.t_max - path.t_min
    return torch.linspace(path.t_min + 0.02 * span, path.t_max - 0.02 * span, n, dtype=torch.float64)


@paths
@pytest.mark.parametrize("kind", [GaussianOracle, MixtureOracle])
def test_the_oracles_denoiser_is_tweedies_formula(path, kind):
    """D = (x + sigma^2 d/dx log p(x)) / alpha, with p the density of x_t by numerical convolution."""
    oracle = kind(path)
    z, weight = quadrature(100)
    for t in (points(path, 7) if path.kind != "ve" else torch.tensor([0.05, 0.3, 1.0, 5.0])).tolist():
        alpha, sigma = float(path.alpha(torch.tensor(t))), float(path.sigma(torch.tensor(t)))
        means = oracle.means if kind is MixtureOracle else (oracle.mean,)
        weights = oracle.weights if kind is MixtureOracle else (1.0,)
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        above, below = torch.zeros_like(x), torch.zeros_like(x)
        for mean, share in zip(means, weights, strict=True):
            x0 = mean + oracle.std * z
            likelihood = torch.exp(-((x[:, None] - alpha * x0) ** 2) / (2 * sigma**2))
            above += share * (likelihood * weight * x0).sum(1)
            below += share * (likelihood * weight).sum(1)
        found = oracle.denoised(x[:, None, None, None], torch.full((9,), t, dtype=torch.float64)).flatten()
        torch.testing.assert_close(found, above / below, rtol=2e-3, atol=2e-3)


def quadrature(n):
    """Nodes and weights of expectations under N(0, 1), by the trapezoid rule (spectrally accurate here)."""
    z = torch.linspace(-8, 8, 40 * n, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    return z, weight / weight.sum()


@paths
def test_the_gaussian_jump_solves_the_ode(path):
    oracle = GaussianOracle(path)
    t = points(path)
    x, h = normal(6, 1, 1, 1, dtype=torch.float64), 1e-6
    slope = (oracle.jump(x, t, t + h) - oracle.jump(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(oracle.velocity(x, t), slope, rtol=1e-6, atol=1e-6)


@paths
def test_gaussian_jumps_compose(path):
    for oracle in (GaussianOracle(path), GaussianConsistency(path)):
        t = points(path)
        x, r = normal(6, 1, 1, 1, dtype=torch.float64), 0.6 * t
        s = torch.full_like(t, path.t_min)
        torch.testing.assert_close(oracle.jump(oracle.jump(x, t, r), r, s), oracle.jump(x, t, s))
        torch.testing.assert_close(oracle.jump(x, t, t), x, rtol=1e-14, atol=1e-14)


def test_the_gaussian_consistency_function_is_the_one_known_for_ve():
    """mu + sqrt((s^2 + eps^2) / (s^2 + t^2)) (x - mu)."""
    model = GaussianConsistency(VE(), mean=0.3, std=0.5)
    x, t = normal(5, 1, 1, 1, dtype=torch.float64), torch.tensor([0.002, 0.1, 1, 10, 80], dtype=torch.float64)
    factor = ((0.25 + 0.002**2) / (0.25 + t**2)).sqrt()[:, None, None, None]
    torch.testing.assert_close(model.denoised(x, t), 0.3 + factor * (x - 0.3))
