"""Solvers: one step by hand, the order of convergence, and stochastic sampling that keeps the marginals."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from cmtool.flow import VE, Linear, Trig
from cmtool.solvers import DDIM, SOLVERS, Churn, DPMSolver2, Euler, Heun, solve
from cmtool.times import Karras
from tests.oracles import GaussianOracle, MixtureOracle

PATHS = [VE(), Linear(), Trig()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
solvers = pytest.mark.parametrize("kind", SOLVERS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def last(states):
    *_, state = states
    return state


# One step by hand, on VE with a denoiser that is no oracle.


def denoise(x, t):
    return (0.3 * x / (1 + t[:, None])).sin()


def slope(x, t):
    return (x - denoise(x, t)) / t[:, None]


def test_steps_by_hand():
    x = normal(3, 4)
    t, s = torch.tensor([[2.0, 0.5, 40.0], [1.5, 0.1, 20.0]], dtype=torch.float64)
    h = (s - t)[:, None]
    euler = x + h * slope(x, t)
    torch.testing.assert_close(Euler().step(denoise, VE(), x, t, s), euler)
    torch.testing.assert_close(Heun().step(denoise, VE(), x, t, s), x + h * (slope(x, t) + slope(euler, s)) / 2)
    m = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
    middle = x + (m - t)[:, None] * slope(x, t)
    torch.testing.assert_close(DPMSolver2().step(denoise, VE(), x, t, s), x + h * slope(middle, m))


@paths
@solvers
def test_a_solution_is_its_steps(path, kind):
    solver, oracle = SOLVERS[kind](), MixtureOracle(path)
    times = Karras().times(path, 6)[:-1].double()
    x = expected = normal(5, 1, 1, 1)
    calls = 0

    def counted(x, t):
        nonlocal calls
        calls += 1
        return oracle.denoised(x, t)

    for i, state in enumerate(solve(solver, counted, path, x, times), start=1):
        expected = solver.step(oracle.denoised, path, expected, times[i - 1].expand(5), times[i].expand(5))
        torch.testing.assert_close(state.x, expected)
        assert (state.step, state.t) == (i, float(times[i]))
        assert state.nfe == calls == i * solver.calls
    assert i == 4


@paths
@solvers
def test_a_solution_may_end_without_noise(path, kind):
    """The velocity there is 0 / 0: Heun's last step is Euler's, 2 n - 1 calls in all."""
    oracle = GaussianOracle(path)
    times = torch.cat([Karras().times(path, 12)[:11].double(), torch.zeros(1, dtype=torch.float64)])
    x = oracle.draw(path.t_max, 50, dtype=torch.float64)
    end = last(solve(SOLVERS[kind](), oracle.denoised, path, x, times))
    assert end.nfe == (21 if kind == "heun" else 11 * SOLVERS[kind].calls)
    exact = oracle.jump(x, times[:1].expand(50), times[-1:].expand(50))
    torch.testing.assert_close(end.x, exact, rtol=0, atol={"euler": 0.6, "ddim": 0.6, "heun": 0.2, "dpm2": 0.1}[kind])


def test_a_step_to_no_noise_is_finite_in_a_batch_where_others_are_not():
    t, s = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.1])
    x = torch.tensor([[0.4], [0.4]])
    for path in (Linear(), VE()):
        found = Heun().step(denoise, path, x, t, s)
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found[:1], Euler().step(denoise, path, x[:1], t[:1], s[:1]))
        torch.testing.assert_close(found[1:], Heun().step(denoise, path, x[1:], t[1:], s[1:]))


@paths
def test_ddim_is_exact_where_the_estimate_is_constant(path):
    """x_t = alpha_t D + sigma_t eps stays so at every s, one without noise and t_max included."""
    clean, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    t = torch.tensor([path.t_max, path.t_max, 0.7, 0.5], dtype=torch.float64)
    s = torch.tensor([path.t_min, 0.3, 0.1, 0.0], dtype=torch.float64)
    found = DDIM().step(lambda x, t: clean, path, path.mix(clean, eps, t), t, s)
    torch.testing.assert_close(found, path.mix(clean, eps, s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], clean[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [VE(), Linear()], ids=lambda path: path.kind)
def test_ddim_is_euler_where_the_path_is_straight(path):
    x = normal(3, 4)
    t, s = torch.tensor([[1.0, 0.5, 0.9], [0.4, 0.1, 0.01]], dtype=torch.float64)
    expected = Euler().step(denoise, path, x, t, s)
    torch.testing.assert_close(DDIM().step(denoise, path, x, t, s), expected, rtol=1e-12, atol=1e-12)


def test_ddim_on_the_circle_is_a_rotation():
    """TrigFlow: x_s = cos(t - s) x - sin(t - s) sigma_data F. Lu and Song (2024), arXiv:2410.11081, section 3."""
    path, x, raw = Trig(), normal(3, 4), normal(3, 4, seed=1)
    t, s = torch.tensor([[1.5, 0.5, 0.9], [1.1, 0.0, 0.004]], dtype=torch.float64)
    at, gap = t[:, None], (t - s)[:, None]
    clean = at.cos() * x - at.sin() * 0.5 * raw
    found = DDIM().step(lambda x, t: clean, path, x, t, s)
    torch.testing.assert_close(found, gap.cos() * x - gap.sin() * 0.5 * raw, rtol=1e-12, atol=1e-12)


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_a_straight_path(kind, dtype):
    """From t = 1, where there is no signal, to t = 0, where there is no noise and a logarithm of it is infinite."""
    clean, eps = normal(4, 1, 2, 2).to(dtype), normal(4, 1, 2, 2, seed=1).to(dtype)

    def told(x, t):
        return clean + 0 * t.log()[:, None, None, None]  # NaN at t = 0

    for num in (2, 3, 9):
        times = Karras(1.0).times(Linear(), num).to(dtype)
        state = last(solve(SOLVERS[kind](), told, Linear(), eps, times))
        torch.testing.assert_close(state.x, clean, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
        step = SOLVERS[kind]().step(told, Linear(), eps, times[:1].expand(4), times[-1:].expand(4))
        torch.testing.assert_close(step, clean, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


# Orders of convergence.


def fitted_order(errors: dict[int, float]) -> float:
    """Minus the slope of log error against log steps, by least squares."""
    n = torch.tensor(list(errors), dtype=torch.float64).log()
    e = torch.tensor(list(errors.values()), dtype=torch.float64).log()
    return -float(((n - n.mean()) * (e - e.mean())).sum() / ((n - n.mean()) ** 2).sum())


@paths
@solvers
def test_order_on_gaussian_data(path, kind):
    solver, oracle = SOLVERS[kind](), GaussianOracle(path, mean=0.3, std=0.5)
    x = oracle.draw(path.t_max, 32, dtype=torch.float64)
    errors = {}
    for n in (64, 128, 256):
        times = Karras().times(path, n + 1).double()
        exact = oracle.jump(x, times[:1].expand(32), times[-1:].expand(32))
        errors[n] = float((last(solve(solver, oracle.denoised, path, x, times)).x - exact).abs().max())
    assert fitted_order(errors) == pytest.approx(solver.order, abs=0.04)
    assert errors[256] < {1: 3e-2, 2: 4e-4}[solver.order]


@cache
def mixture_solution(path):
    """Start and end of the mixture's ODE on a grid fine enough to be exact beside what is tested."""
    oracle = MixtureOracle(path)
    x = path.sigma(torch.tensor(path.t_max, dtype=torch.float64)) * normal(32, 1, 1, 1)
    times = Karras().times(path, 2049).double()
    return x, last(solve(DPMSolver2(), oracle.denoised, path, x, times)).x


@paths
@solvers
def test_order_on_a_mixture(path, kind):
    solver, oracle = SOLVERS[kind](), MixtureOracle(path)
    x, exact = mixture_solution(path)
    errors = {}
    for n in (64, 128, 256):
        found = last(solve(solver, oracle.denoised, path, x, Karras().times(path, n + 1).double())).x
        errors[n] = float((found - exact).square().mean().sqrt())
    assert fitted_order(errors) == pytest.approx(solver.order, abs=0.15)


@paths
def test_the_mixture_is_what_comes_out(path):
    """Transport of noise to data: the share of samples in each mode is the mode's weight."""
    oracle, n = MixtureOracle(path), 20_000
    x = path.sigma(torch.tensor(path.t_max, dtype=torch.float64)) * normal(n, 1, 1, 1)
    end = last(solve(Heun(), oracle.denoised, path, x, Karras().times(path, 41).double())).x.flatten()
    cuts = torch.tensor([-0.35, 0.4], dtype=torch.float64)

    def below(cut):
        spread = oracle.std * math.sqrt(2)
        shares = zip(oracle.means, oracle.weights, strict=True)
        return sum(weight * (1 + math.erf((cut - mean) / spread)) / 2 for mean, weight in shares)

    for cut in cuts.tolist():
        # (the start leaves out the data's own share at t_max, hence a little more than Monte-Carlo error)
        assert float((end < cut).double().mean()) == pytest.approx(below(cut), abs=4 * 0.5 / math.sqrt(n) + 0.005)


# Stochastic sampling. On Gaussian data everything is affine, x_end = a x_start + sum b_i noise_i + c, so that its mean
# and variance are known without drawing a single sample: run the rows of an identity matrix through it.


def moments(solver, oracle, times, **options):
    """Mean and variance of the end, for a start with the exact moments."""
    n = len(times)
    path = oracle.path
    start = torch.zeros(n + 1, 1, dtype=torch.float64)
    start[n] = 1.0

    def noise(i):
        rows = torch.zeros(n + 1, 1, dtype=torch.float64)
        rows[i] = 1.0
        return rows

    end = last(solve(solver, oracle.denoised, path, start, times, noise=noise, **options)).x.flatten()
    constant, gains = end[0], end[1:] - end[0]
    mean = constant + gains[-1] * path.alpha(times[0]) * oracle.mean
    variance = gains[-1] ** 2 * oracle.variance(times[0]) + gains[:-1].square().sum()
    return float(mean), float(variance), gains[:-1]


@paths
@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        (Euler(), {"ancestral": True}, 1),
        (Heun(), {"ancestral": True}, 2),
        (Heun(), {"churn": Churn(10.0)}, 2),
        (DPMSolver2(), {"churn": Churn(10.0, t_low=0.05, t_high=20.0)}, 2),
        (Euler(), {"churn": Churn(5.0)}, 1),
    ],
    ids=lambda part: part.kind if hasattr(part, "kind") else None,
)
def test_noise_keeps_the_marginals(path, solver, options, order):
    oracle = GaussianOracle(path, mean=0.3, std=0.4)
    errors = {}
    for n in (64, 128, 256):
        times = Karras().times(path, n + 1).double()
        mean, variance, gains = moments(solver, oracle, times, **options)
        assert bool((gains != 0).any())
        drift = abs(mean - 0.3 * float(path.alpha(times[-1])))
        errors[n] = drift + abs(variance / float(oracle.variance(times[-1])) - 1)
    # What is left is the solver's error, and vanishes as fast as that.
    assert fitted_order(errors) > order - 0.1
    assert errors[256] < (0.06 if order == 1 else 4e-3)


@paths
def test_churn_only_acts_where_it_is_asked_to(path):
    oracle, times = GaussianOracle(path), Karras().times(path, 33).double()
    _, _, gains = moments(Heun(), oracle, times, churn=Churn(10.0, t_low=0.1, t_high=10.0))
    inside = (path.ratio(times) >= 0.1) & (path.ratio(times) <= 10.0)
    assert torch.equal(gains != 0, inside[:-1])
    _, _, louder = moments(Heun(), oracle, times, churn=Churn(10.0, t_low=0.1, t_high=10.0, noise=1.5))
    torch.testing.assert_close(louder, 1.5 * gains)


def test_churn_raises_the_noise_by_the_published_factor():
    t = torch.tensor(2.0, dtype=torch.float64)
    assert float(Churn(10.0).raised(VE(), t, 40)) == pytest.approx(2.5)
    assert float(Churn(1000.0).raised(VE(), t, 40)) == pytest.approx(2 * math.sqrt(2))
    assert float(Churn(0.0).raised(VE(), t, 40)) == 2.0
    assert float(Churn(10.0, t_low=3.0).raised(VE(), t, 40)) == 2.0
    trig = Trig()
    assert float(trig.ratio(Churn(10.0).raised(trig, trig.time(t), 40))) == pytest.approx(2.5)


def test_samples_have_the_moments_too():
    oracle, n = GaussianOracle(VE(), mean=0.3, std=0.5), 100_000
    times = torch.cat([Karras().times(VE(), 64), torch.zeros(1)])
    x, generator = oracle.draw(80.0, n, seed=1), torch.Generator().manual_seed(2)

    def draw(i):
        return torch.randn(x.shape, generator=generator)

    for options in ({"ancestral": True}, {"churn": Churn(10.0)}):
        states = solve(Heun(), oracle.denoised, VE(), x, times, noise=draw, **options)
        end = last(states).x.double()
        assert float(end.mean()) == pytest.approx(0.3, abs=4 * 0.5 / math.sqrt(n))
        assert float(end.var()) == pytest.approx(0.25, rel=4 * math.sqrt(2 / n) + 0.01)


# Refusals.


@pytest.mark.parametrize("times", [[1.0, 1.0], [1.0, 2.0], [3.0, 1.0, 1.5]])
def test_times_must_decrease(times):
    with pytest.raises(ValueError, match="decrease"):
        next(solve(Euler(), denoise, VE(), torch.zeros(1, 1), torch.tensor(times)))


def test_churn_and_ancestral_steps_would_share_their_noise():
    with pytest.raises(ValueError, match="one of"):
        next(
            solve(
                Euler(),
                denoise,
                VE(),
                torch.zeros(1, 1),
                torch.tensor([2.0, 1.0]),
                noise=lambda i: torch.zeros(1, 1),
                churn=Churn(1.0),
                ancestral=True,
            )
        )


@pytest.mark.parametrize("options", [{"ancestral": True}, {"churn": Churn(1.0)}])
def test_noise_must_come_from_somewhere(options):
    with pytest.raises(ValueError, match="noise"):
        next(solve(Euler(), denoise, VE(), torch.zeros(1, 1), torch.tensor([2.0, 1.0]), **options))


def test_a_churn_of_nothing_needs_no_noise():
    times = torch.tensor([2.0, 1.0])
    plain = last(solve(Heun(), denoise, VE(), torch.ones(1, 1), times)).x
    assert torch.equal(last(solve(Heun(), denoise, VE(), torch.ones(1, 1), times, churn=Churn(0.0))).x, plain)
