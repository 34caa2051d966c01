"""Sampling and editing by seed: image k is the same image whatever is made beside it, and what is known stays."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import cmtool
from cmtool import rng
from cmtool.editing import AvgPool, Luma, Mask
from cmtool.errors import DataError, UsageError
from cmtool.flow import EDM, VE, VP, BoundaryEDM, Linear, ModelCard, Trig, Velocity
from cmtool.generate import (
    _Ahead,
    automatic_batch,
    colorize,
    edit,
    edit_times,
    free_memory,
    generate,
    in_batches,
    inpaint,
    labels_for,
    sample,
    superres,
)
from cmtool.sampler import default_times
from cmtool.sampler import sample as run_sampler
from cmtool.solvers import SOLVERS, Churn, Heun, solve
from cmtool.times import Karras
from tests import models
from tests.models import micro
from tests.oracles import GaussianConsistency, GaussianOracle, learned

LEVEL = 1 / 127.5  # of uint8, in image units
CONSISTENCY = models.model(config=micro(num_classes=4), times={"2": (80.0, 0.8)})
DENOISER = models.model("denoiser", config=micro(num_classes=4))
DROPPED = models.model("denoiser", config=micro(num_classes=4, label_dropout=0.1))
FLOW = models.model(
    "flow_map", micro(num_classes=4, label_dropout=0.1, two_times=True), Linear(), Velocity(), grid_rho=1.0
)
KINDS = {
    "one step": (CONSISTENCY, {}),
    "three steps": (CONSISTENCY, {"steps": 3}),
    "heun": (DENOISER, {"solver": "heun", "steps": 4}),
    "ancestral": (DENOISER, {"solver": "ancestral", "steps": 4}),
    "churn": (DENOISER, {"solver": "dpm2", "steps": 4, "churn": Churn(2.0)}),
    "the ODE view": (CONSISTENCY, {"solver": "euler", "steps": 4}),
    "jumps": (FLOW, {"steps": 3}),
    "jumps of a denoiser": (DENOISER, {"landing": "next", "steps": 3}),
    "renoised jumps": (FLOW, {"landing": "t_min", "steps": 3}),
    "guided": (DROPPED, {"solver": "ddim", "steps": 4, "guidance": 2.0}),
    "guided jumps": (FLOW, {"steps": 2, "guidance": 3.0}),
}
kinds = pytest.mark.parametrize(("model", "options"), KINDS.values(), ids=KINDS)


def images(model, seeds, **options):
    parts = list(generate(model, seeds, **options))
    assert [seed for part in parts for seed in part.seeds] == list(seeds)
    return torch.cat([part.images for part in parts])


def pictures(n, seed=0, channels=3, side=8):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Image k.


@kinds
def test_an_image_does_not_depend_on_its_neighbours_or_place(model, options):
    alone = [images(model, [5, *range(100, 103)], batch=4, **options)[0]]
    for place in range(4):
        seeds = [200 + place, 300, 400, 2**62]
        seeds[place] = 5
        alone.append(images(model, seeds, batch=4, **options)[place])
    assert all(torch.equal(image, alone[0]) for image in alone)
    other = images(model, [6], batch=1, **options)[0]
    assert float((other - alone[0]).abs().max()) > 0.1


@kinds
def test_an_image_does_not_depend_on_the_batch_size(model, options):
    seeds = list(range(11))
    found = [images(model, seeds, batch=batch, **options) for batch in (1, 2, 4, 11, 100, None)]
    for each in found[1:]:
        assert float((each - found[0]).abs().max()) < LEVEL / 4
    assert float(found[0].std()) > 0.05
    torch.manual_seed(1)  # nothing global takes part
    assert torch.equal(images(model, seeds, batch=4, **options), found[2])


@kinds
def test_images_are_images_and_no_part_of_a_graph(model, options):
    made = sample(model, 3, **{name: value for name, value in options.items() if name != "churn"})
    assert made.shape == (3, 3, 8, 8)
    assert made.dtype == torch.float32
    assert float(made.abs().max()) <= 1
    assert not made.requires_grad
    made.add_(1).requires_grad_()  # an ordinary tensor: it may be changed and differentiated


def test_noise_and_labels_come_from_the_seed():
    (part,) = generate(CONSISTENCY, [3, 2**62])
    labels = rng.labels([3, 2**62], 4)
    assert torch.equal(part.labels, labels)
    x = 80 * rng.noise([3, 2**62], (3, 8, 8))
    expected = CONSISTENCY.denoised(x, torch.full((2,), 80.0), labels).clamp(-1, 1)
    torch.testing.assert_close(part.images, expected)
    assert part.nfe == 1


def test_two_steps_are_algorithm_1():
    (part,) = generate(CONSISTENCY, [3, 4], steps=2, labels=1)
    labels = torch.tensor([1, 1])
    x = 80 * rng.noise([3, 4], (3, 8, 8))
    x0 = CONSISTENCY.denoised(x, torch.full((2,), 80.0), labels).clamp(-1, 1)
    x = x0 + math.sqrt(0.8**2 - 0.002**2) * rng.noise([3, 4], (3, 8, 8), 1)
    expected = CONSISTENCY.denoised(x, torch.full((2,), 0.8), labels).clamp(-1, 1)
    torch.testing.assert_close(part.images, expected)
    assert part.nfe == 2


def test_a_denoisers_ode_is_solved_to_the_end():
    (part,) = generate(DENOISER, [3, 4], solver="heun", steps=5, labels=2)
    times = torch.cat([Karras().times(VE(), 5), torch.zeros(1)])
    labels = torch.tensor([2, 2])

    def denoise(x, t):
        return DENOISER.denoised(x, t, labels).clamp(-1, 1)

    *_, state = solve(Heun(), denoise, VE(), 80 * rng.noise([3, 4], (3, 8, 8)), times)
    torch.testing.assert_close(part.images, state.x.clamp(-1, 1))
    assert part.nfe == state.nfe == 9


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 18), ("heun", 35), ("dpm2", 36), ("ancestral", 18)])
def test_solvers_count_their_calls(solver, nfe):
    assert next(generate(DENOISER, [0], solver=solver)).nfe == nfe


def test_explicit_times():
    (part,) = generate(CONSISTENCY, [1], times=[80.0, 5.0, 1.0])
    assert part.nfe == 3
    (part,) = generate(DENOISER, [1], solver="euler", times=[80.0, 5.0, 1.0])
    assert part.nfe == 3
    (given,) = generate(CONSISTENCY, [1], times=torch.tensor([80.0, 0.8]))
    (recommended,) = generate(CONSISTENCY, [1], steps=2)
    assert torch.equal(given.images, recommended.images)


@pytest.mark.parametrize("path", [VE(), Trig(), Linear()], ids=lambda path: path.kind)
@pytest.mark.parametrize("solver", ["heun", "ancestral"])
def test_a_gaussian_denoiser_makes_gaussian_images(path, solver):
    model = GaussianOracle(path, mean=0.1, std=0.2, image_shape=(3, 8, 8))
    made = torch.cat([part.images for part in generate(model, range(300), solver=solver, steps=64, clip=False)])
    n = made.numel()
    assert float(made.mean()) == pytest.approx(0.1, abs=4 * 0.2 / math.sqrt(n) + 2e-3)
    assert float(made.std()) == pytest.approx(0.2, rel=4 / math.sqrt(2 * n) + (0.15 if solver == "ancestral" else 0.01))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("path", [VE(), Linear(), Trig(), Trig(0.0, math.pi / 2)], ids=lambda path: path.kind)
def test_a_gaussian_consistency_model_makes_gaussian_images(path, steps):
    model = GaussianConsistency(path, mean=0.1, std=0.2, image_shape=(3, 8, 8))
    made = sample(model, 300, steps=steps)
    n = made.numel()
    assert float(made.mean()) == pytest.approx(0.1, abs=4 * 0.2 / math.sqrt(n) + 1e-3)
    assert float(made.std()) == pytest.approx(0.2, rel=4 / math.sqrt(2 * n) + 1e-3)


# The straight and the trigonometric path, from pure noise to clean images.


def convergence(make, exact, steps):
    """Largest errors of the images against the exact ones, by number of steps."""
    return [float((make(n) - exact.clamp(-1, 1)).abs().max()) for n in steps]


STRAIGHT = [Linear(), Trig(0.0, math.pi / 2)]


@pytest.mark.parametrize("path", STRAIGHT, ids=lambda path: path.kind)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solution_converges_to_the_closed_form_with_the_order_of_its_solver(path, solver):
    """The ODE of Gaussian data from x_1 = eps to x_0 = mean + std eps."""
    model = GaussianOracle(path, mean=0.1, std=0.2, image_shape=(3, 8, 8))
    model.card = replace(model.card, grid_rho=path.rho)
    exact = 0.1 + 0.2 * rng.noise([3, 4], (3, 8, 8))
    errors = convergence(lambda n: images(model, [3, 4], solver=solver, steps=n, clip=False), exact, steps=(16, 32, 64))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** SOLVERS[solver].order, rel=0.2)
    assert errors[-1] < (0.03 if SOLVERS[solver].order == 1 else 3e-3)


@pytest.mark.parametrize("path", STRAIGHT, ids=lambda path: path.kind)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solution_of_few_steps_on_the_straight_path(path, solver):
    """Neither end is special to the caller: 1, 2, 3 steps, or times given, and no number is lost at t = 0 or 1."""
    model = models.model("denoiser", path=path, parameterization=Velocity(), grid_rho=path.rho)
    for steps in (1, 2, 3):
        (part,) = generate(model, [3], solver=solver, steps=steps)
        assert bool(part.images.isfinite().all())
        assert part.nfe == SOLVERS[solver].calls * steps - (solver == "heun")
        times = torch.linspace(path.t_max, 0, steps + 1)
        torch.testing.assert_close(images(model, [3], solver=solver, times=times[:-1]), part.images)
        torch.testing.assert_close(images(model, [3], solver=solver, times=times), part.images)
    # one step of Euler (Heun's, where it ends without noise) follows the velocity, one of DDIM is the estimate
    x = path.sigma(torch.tensor(path.t_max)) * rng.noise([3], (3, 8, 8))
    t = torch.full((1,), path.t_max)
    estimate = model.denoised(x, t).clamp(-1, 1)
    one = x - path.t_max * path.ode_velocity(x, estimate, t) if solver in ("euler", "heun") else estimate
    if solver != "dpm2":
        torch.testing.assert_close(images(model, [3], solver=solver, steps=1), one.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", [VE(), *STRAIGHT, Trig()], ids=lambda path: f"{path.kind}-{path.t_min:.1g}")
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_two_time_model_jumps_along_the_ode(path, steps):
    exact = GaussianOracle(path, mean=0.1, std=0.2, image_shape=(3, 8, 8))
    model = learned(exact, EDM(), two_times=True, grid_rho=path.rho)
    (part,) = generate(model, [3, 4], steps=steps)
    t_max, t_min = torch.full((2,), path.t_max), torch.full((2,), path.t_min)
    start = path.sigma(t_max[0]) * rng.noise([3, 4], (3, 8, 8))
    torch.testing.assert_close(part.images, exact.jump(start, t_max, t_min).clamp(-1, 1), rtol=0, atol=2e-3)
    assert part.nfe == steps
    # the other landing renoises on the way: other images of the same data
    other = images(model, [3, 4], steps=steps, landing="t_min")
    assert torch.allclose(other, part.images, atol=2e-3) == (steps == 1)
    assert float(other.std()) == pytest.approx(0.2, rel=0.15)


def test_the_landing_is_that_of_the_role_unless_asked_for():
    noise = [rng.noise([3, 4], (3, 8, 8), stream) for stream in range(3)]

    def by_hand(model, landing):
        times = default_times(model, 3, landing)
        start = model.path.sigma(times[0]) * noise[0]
        *_, state = run_sampler(
            model, start, times, noise=noise.__getitem__, labels=torch.tensor([1, 1]), landing=landing
        )
        return state.denoised.clamp(-1, 1)

    for model, default in ((FLOW, "next"), (CONSISTENCY, "t_min")):
        made = {
            landing: sample(model, seeds=[3, 4], steps=3, labels=1, landing=landing)
            for landing in ("t_min", "next", None)
        }
        for landing in ("t_min", "next"):
            torch.testing.assert_close(made[landing], by_hand(model, landing))
        assert torch.equal(made[None], made[default])
        assert float((made["t_min"] - made["next"]).abs().max()) > 0.1
    torch.testing.assert_close(
        sample(DENOISER, seeds=[3, 4], steps=3, labels=1, landing="next"), by_hand(DENOISER, "next")
    )


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_the_ode_view_of_a_consistency_model_solves_its_equation(solver, order):
    """x' = (x - f(x, t)) / t with f = m + k (x - m), k = sqrt((s^2 + e^2) / (s^2 + t^2)), from t = 80 to e = t_min:

    (x_e - m) / (x_t - m) = (e / t) exp(c / s (asinh(s / e) - asinh(s / t))), c^2 = s^2 + e^2. It is not the data's ODE:
    the samples are about twice as wide as the data.
    """
    mean, std, low, high = 0.1, 0.1, 0.002, 80.0
    oracle = GaussianConsistency(VE(), mean, std, image_shape=(3, 8, 8))
    c = math.sqrt(std**2 + low**2)
    gain = low / high * math.exp(c / std * (math.asinh(std / low) - math.asinh(std / high)))
    exact = mean + gain * (80 * rng.noise([3, 4], (3, 8, 8)) - mean)
    assert gain * 80 == pytest.approx(2 * std, rel=0.03)
    for model in (oracle, learned(oracle, BoundaryEDM())):
        errors = convergence(
            lambda n, model=model: images(model, [3, 4], solver=solver, steps=n, clip=False), exact, steps=(64, 128)
        )
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
        assert errors[-1] < (0.05 if order == 1 else 0.005)


# Guidance.


@pytest.mark.parametrize("path", [VE(), Linear()], ids=lambda path: path.kind)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["denoiser", "consistency", "flow_map"])
def test_guided_images_are_those_of_the_gaussian_that_guidance_makes(path, scale, kind):
    """Of classes N(m, s^2), and N(m0, s^2) where the label is hidden: the Gaussian with mean m0 + w (m - m0)."""
    oracle = {"denoiser": GaussianOracle, "consistency": GaussianConsistency, "flow_map": GaussianOracle}[kind]
    parameterization = BoundaryEDM() if kind == "consistency" else EDM()
    options = {"solver": "heun", "steps": 6} if kind == "denoiser" else {"steps": 2}
    shape, card = (3, 8, 8), {"grid_rho": path.rho}
    means, seeds = (-0.3, 0.1, 0.35), [3, 4, 5]
    model = learned(oracle(path, 0.05, 0.2, shape), parameterization, kind == "flow_map", means, **card)
    made = images(model, seeds, labels=[0, 1, 2], guidance=scale, **options)
    for image, seed in zip(made, seeds, strict=True):
        mean = 0.05 + scale * (means[seed % 3] - 0.05)
        single = learned(oracle(path, mean, 0.2, shape), parameterization, kind == "flow_map", **card)
        torch.testing.assert_close(image, images(single, [seed], **options)[0], rtol=0, atol=5e-4)
    assert torch.equal(sample(model, seeds=seeds, labels=[0, 1, 2], guidance=scale, **options), made)
    if scale == 1:
        assert torch.equal(images(model, seeds, labels=[0, 1, 2], **options), made)


def test_clipping_on_the_way_can_be_left_out():
    wide = models.model(parameterization=BoundaryEDM(sigma_data=3.0))
    for options in ({}, {"landing": "next"}, {"solver": "heun"}):
        free, clipped = (images(wide, [3, 4], steps=3, clip=clip, **options) for clip in (False, True))
        assert float((free - clipped).abs().max()) > 0.05
    # and without it the jumps of Gaussian data end where one of them does, however far from the range
    exact = GaussianConsistency(VE(), mean=0.5, std=1.0, image_shape=(3, 8, 8))
    one, three = (images(exact, [3, 4], clip=False, landing="next", steps=steps) for steps in (1, 3))
    torch.testing.assert_close(three, one, rtol=0, atol=1e-4)


def test_guidance_also_works_on_the_labels_of_the_seeds():
    plain, strong = (images(DROPPED, range(4), solver="euler", steps=3, guidance=w) for w in (1.0, 4.0))
    assert float((plain - strong).abs().max()) > 0.01
    drawn = rng.labels(range(4), 4).tolist()
    again = images(DROPPED, range(4), solver="euler", steps=3, guidance=4.0, labels=drawn)
    torch.testing.assert_close(again, strong)


# Which class.


def test_labels_asked_for():
    seeds = [0, 1, 2, 3, 4, 5, 10, 11]
    assert labels_for(CONSISTENCY, seeds, [2, 0, 3]).tolist() == [2, 0, 3, 2, 0, 3, 0, 3]
    assert labels_for(CONSISTENCY, seeds, 1).tolist() == [1] * 8
    assert torch.equal(labels_for(CONSISTENCY, seeds), rng.labels(seeds, 4))
    assert labels_for(models.model(), seeds) is None
    (part,) = generate(CONSISTENCY, [7], labels=[0, 1])
    assert part.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "words"), [([4], "0 to 3, found 4"), (-1, "found -1"), ([0, 9], "found 9"), ([], "none")]
)
def test_classes_the_model_does_not_have(labels, words):
    with pytest.raises(UsageError, match=words):
        labels_for(CONSISTENCY, [0], labels)


def test_a_model_without_classes_takes_none():
    with pytest.raises(UsageError, match="no classes"):
        labels_for(models.model(), [0], 1)


# Refusals.


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (DENOISER, {}, "needs a solver"),
        (DENOISER, {"solver": "rk45"}, "'rk45'"),
        (CONSISTENCY, {"solver": "heun", "landing": "next"}, "makes no jumps"),
        (CONSISTENCY, {"solver": "heun", "landing": "t_min"}, "makes no jumps"),
        (CONSISTENCY, {"landing": "there"}, "'there'"),
        (DENOISER, {"landing": "there"}, "'there'"),
        (DENOISER, {"landing": "t_min"}, "needs a solver"),
        (DENOISER, {"landing": "next", "steps": 0}, "at least 1"),
        (DENOISER, {"landing": "next", "times": [90.0]}, "90 is not on"),
        (FLOW, {"times": [1.5, 0.5]}, "1.5 is not on"),
        (CONSISTENCY, {"guidance": 2.0}, "label_dropout"),
        (models.model(), {"guidance": 2.0}, "has none"),
        (DROPPED, {"guidance": math.nan, "solver": "heun"}, "finite"),
        (DROPPED, {"guidance": math.inf, "solver": "heun"}, "finite"),
        (CONSISTENCY, {"steps": 0}, "at least 1"),
        (DENOISER, {"solver": "heun", "steps": 0}, "at least 1"),
        (CONSISTENCY, {"times": [1.0, 2.0]}, "decrease"),
        (CONSISTENCY, {"times": [100.0]}, "100 is not on"),
        (CONSISTENCY, {"times": []}, "no time points"),
        (CONSISTENCY, {"batch": 0}, "at least 1 image"),
        (CONSISTENCY, {"batch": -2}, "at least 1 image"),
        (CONSISTENCY, {"labels": 4}, "0 to 3"),
        (DENOISER, {"solver": "ancestral", "churn": Churn(1.0)}, "ancestral"),
    ],
)
def test_impossible_requests(model, options, words):
    with pytest.raises(UsageError, match=words):
        next(generate(model, [0], **options))


def test_how_many():
    assert torch.equal(sample(CONSISTENCY, 2), sample(CONSISTENCY, seeds=[0, 1]))
    assert len(sample(CONSISTENCY)) == 1
    assert len(sample(CONSISTENCY, 2, seeds=[8, 9])) == 2
    with pytest.raises(UsageError, match="3, but there are 2"):
        sample(CONSISTENCY, 3, seeds=[8, 9])
    for nothing in ({"n": 0}, {"seeds": []}):
        with pytest.raises(UsageError, match="no image"):
            sample(CONSISTENCY, **nothing)


# Editing.

MASK = torch.zeros(1, 8, 8, dtype=torch.bool)
MASK[:, 2:5, 1:7] = True
EDITED = models.model(grid_points=6)


def test_inpainting_keeps_known_pixels_to_the_last_bit():
    x = pictures(1)
    made = inpaint(EDITED, x, MASK, seeds=[0, 1, 2])
    assert made.shape == (3, 3, 8, 8)
    hole = MASK.expand(3, 3, 8, 8)
    assert torch.equal(made[~hole], x.expand(3, -1, -1, -1)[~hole])
    assert float((made[0] - made[1])[hole[0]].abs().max()) > 0.01
    assert float((made - x)[hole].abs().max()) > 0.1
    made.add_(0)
    # what was in the hole does not matter
    other = torch.where(MASK, pictures(1, seed=9), x)
    assert torch.equal(inpaint(EDITED, other, MASK, seeds=[0, 1, 2]), made)


def test_inpainting_many_images_with_many_masks():
    x, masks = pictures(2), torch.stack([MASK, ~MASK])
    both = inpaint(EDITED, x, masks)
    for i in range(2):
        one = inpaint(EDITED, x[i], masks[i], seeds=[i])
        torch.testing.assert_close(one[0], both[i], rtol=0, atol=LEVEL / 4)
    # one image, two masks
    two = inpaint(EDITED, x[0], masks, seeds=[0, 1])
    assert torch.equal(two[1][MASK.expand(3, -1, -1)], x[0][MASK.expand(3, -1, -1)])


def test_colorizing_keeps_the_luma():
    for x in (pictures(2), 3 * pictures(2, seed=1)):  # the second touches the corners of colour space
        x = x.clamp(-1, 1)
        made = colorize(EDITED, x, seeds=[0, 1])
        assert float(made.abs().max()) <= 1
        torch.testing.assert_close(Luma().A(made), Luma().A(x), rtol=0, atol=1e-5)
        made.add_(0)
        # only the luma counts
        grey = Luma().A(x).expand(-1, 3, -1, -1) / sum(Luma.weights)
        torch.testing.assert_close(colorize(EDITED, grey, seeds=[0, 1]), made, rtol=0, atol=1e-4)
        torch.testing.assert_close(colorize(EDITED, grey[:, :1], seeds=[0, 1]), made, rtol=0, atol=1e-4)
    assert float((made - grey).abs().max()) > 0.1


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_keeps_the_block_means(factor):
    for small in (pictures(2, side=8 // factor), (3 * pictures(2, 1, side=8 // factor)).clamp(-1, 1)):
        made = superres(EDITED, small, factor, seeds=[0, 1])
        assert made.shape == (2, 3, 8, 8)
        assert float(made.abs().max()) <= 1
        torch.testing.assert_close(AvgPool(factor).A(made), small, rtol=0, atol=1e-5)
        made.add_(0)
    assert float((made - AvgPool(factor).pinv(small)).abs().max()) > 0.1


@pytest.mark.parametrize(
    "change", [lambda **o: inpaint(EDITED, pictures(1), MASK, **o), lambda **o: colorize(EDITED, pictures(1), **o)]
)
def test_an_answer_does_not_depend_on_the_other_seeds(change):
    whole = change(seeds=[4, 9, 17])
    again = change(seeds=[9, 17, 4])
    assert torch.equal(whole, again[torch.tensor([2, 0, 1])])
    torch.testing.assert_close(change(seeds=[9]), whole[1:2], rtol=0, atol=LEVEL / 4)


@pytest.mark.parametrize("op", [Mask(MASK[None]), Luma(), AvgPool(2)], ids=lambda op: type(op).__name__)
def test_an_edit_with_the_exact_model_is_a_sample_of_the_conditional_distribution(op):
    model = GaussianConsistency(VE(), mean=0.1, std=0.2, image_shape=(3, 8, 8))
    truth = model.draw(0.002, 1, seed=3).clamp(-1, 1)
    n = 300
    made = edit(model, op, op.A(truth), seeds=range(n))
    torch.testing.assert_close(op.A(made), op.A(truth).expand(n, -1, -1, -1), rtol=0, atol=1e-5)
    made = made.double()
    free = made - op.pinv(op.A(made))
    dimension = {Mask: 54, Luma: 128, AvgPool: 144}[type(op)]
    spread = float(((free - free.mean(0)) ** 2).sum()) / (n - 1) / dimension
    assert spread == pytest.approx(0.04, rel=4 * math.sqrt(2 / (n * dimension)) + 1e-3)


def test_the_default_is_the_papers_grid():
    """Song et al. (2023), algorithm 4: all N points; the last, t_min, would change nothing."""
    model = models.model(grid_points=40)
    grid = Karras().times(VE(), 40)
    assert torch.equal(edit_times(model), grid[:-1])
    assert torch.equal(edit_times(model, 39), grid[:-1])
    five = edit_times(model, 5)
    assert len(five) == 5
    assert float(five[0]) == 80.0
    assert float(five[-1]) > 0.002
    x = pictures(1)
    explicit = inpaint(model, x, MASK, times=grid[:-1])
    assert torch.equal(inpaint(model, x, MASK), explicit)
    assert not torch.equal(inpaint(model, x, MASK, steps=5), explicit)
    assert torch.equal(inpaint(model, x, MASK, steps=5), inpaint(model, x, MASK, times=five))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: inpaint(DENOISER, pictures(1), MASK), UsageError, "needs a consistency model"),
        (lambda: inpaint(EDITED, pictures(1), MASK.float()), DataError, "bool"),
        (lambda: inpaint(EDITED, pictures(1), MASK[:, :4]), DataError, "mask is 8x4, the image 8x8"),
        (lambda: inpaint(EDITED, pictures(3), torch.stack([MASK, MASK])), DataError, "2 masks"),
        (lambda: inpaint(EDITED, pictures(2), MASK, seeds=[0, 1, 2]), UsageError, "2 images do not go with 3 seeds"),
        (lambda: inpaint(EDITED, pictures(1, side=4), MASK[:, :4, :4]), DataError, "4x4"),
        (lambda: inpaint(EDITED, (pictures(1) * 127).byte(), MASK), DataError, "float"),
        (lambda: inpaint(EDITED, pictures(1), MASK, seeds=[]), UsageError, "no image"),
        (lambda: colorize(EDITED, pictures(1, side=4)), DataError, "4x4"),
        (lambda: colorize(EDITED, pictures(1, channels=4)), DataError, "1 or 3 channels, found 4"),
        (
            lambda: colorize(models.model(config=micro(in_channels=1, out_channels=1)), pictures(1)),
            UsageError,
            "colour",
        ),
        (lambda: superres(EDITED, pictures(1, side=2), 2), DataError, "4x4"),
        (lambda: superres(EDITED, pictures(1, side=4), 1), UsageError, "at least 2"),
        (lambda: superres(EDITED, pictures(1, side=4), 2, steps=0), UsageError, "at least 1"),
        (lambda: superres(EDITED, pictures(1, side=4), 2, times=[90.0]), UsageError, "90 is not on"),
        (lambda: superres(EDITED, pictures(1, side=4), 2, labels=1), UsageError, "no classes"),
    ],
)
def test_impossible_edits(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_public_names_are_these():
    assert cmtool.sample is sample
    assert (cmtool.inpaint, cmtool.colorize, cmtool.superres) == (inpaint, colorize, superres)


# A discrete schedule: no time of its path is free of noise, so the last call denoises.


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2", "ddim", "ancestral"])
def test_solvers_end_on_clean_images_of_discrete_steps(solver):
    """Gaussian images: their mean and spread, from noise at the last of 1,000 steps to an estimate at the first."""
    oracle = GaussianOracle(VP(), 0.3, 0.25)
    oracle.card = ModelCard("denoiser", 1, 1, grid_rho=1.0)
    parts = list(generate(oracle, range(2000), steps=100, solver=solver, clip=False, batch=2000))
    assert float(parts[0].images.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(parts[0].images.std()) == pytest.approx(0.25, abs=0.05 if solver == "ancestral" else 0.03)
    calls = {"heun": 198, "dpm2": 199}.get(solver, 100)  # the step to t = 0 is one of Euler
    assert parts[0].nfe == calls


@pytest.mark.parametrize("solver", ["euler", "heun", "ancestral"])
def test_one_step_of_discrete_steps_is_one_estimate(solver):
    oracle = GaussianOracle(VP(), 0.3, 0.25)
    oracle.card = ModelCard("denoiser", 1, 1, grid_rho=1.0)
    (made,) = generate(oracle, range(5), steps=1, solver=solver, clip=False)
    assert made.nfe == 1
    x = oracle.path.sigma(torch.tensor(999.0)) * rng.noise(range(5), (1, 1, 1))
    torch.testing.assert_close(made.images, oracle.denoised(x, torch.full((5,), 999.0)).clamp(-1, 1))


# Batches.


class Cramped:
    """A network for so many images at once."""

    def __init__(self, model, most):
        self.model, self.most, self.sizes = model, most, []
        self.forward = model.network.forward

    def __enter__(self):
        def forward(x, *args, **rest):
            self.sizes.append(len(x))
            if len(x) > self.most:
                raise torch.OutOfMemoryError("too much")
            return self.forward(x, *args, **rest)

        self.model.network.forward = forward
        return self

    def __exit__(self, *_):
        del self.model.network.forward


def test_one_step_costs_one_call_an_image_and_nothing_else():
    with Cramped(CONSISTENCY, 99) as calls:
        sample(CONSISTENCY, 11)
        assert calls.sizes == [11]
        sample(CONSISTENCY, 11, batch=4)
        assert calls.sizes == [11, 4, 4, 3]


def test_noise_drawn_ahead_is_the_same_noise(monkeypatch):
    """As on a GPU, where the next batch's is drawn meanwhile; also where batches turn out too large."""
    drawn = []
    original = rng.noise

    def noise(seeds, shape, stream=0):
        drawn.append((tuple(seeds), stream))
        return original(seeds, shape, stream)

    monkeypatch.setattr(rng, "noise", noise)
    seeds = [5, 3, 8, 1, 9, 2, 7]
    ahead = _Ahead(CONSISTENCY, seeds)
    with ThreadPoolExecutor(1) as thread:
        ahead._thread = thread
        for at in (slice(0, 3), slice(3, 6), slice(3, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
            stream = ahead(at)
            for number in (0, 1):
                assert torch.equal(stream(number), original(seeds[at], CONSISTENCY.card.image_shape, number))
    asked = [part for part, stream in drawn if stream == 0]
    assert asked.count((1, 9, 2)) == 1  # once, before it was asked for, though it then was too many
    assert asked.count((5, 3, 8)) == asked.count((9,)) == asked.count((2,)) == 1


def test_batches_that_do_not_fit_are_halved():
    expected = sample(CONSISTENCY, 13, labels=[1, 2, 3])
    with Cramped(CONSISTENCY, 3) as calls:
        parts = list(generate(CONSISTENCY, range(13), labels=[1, 2, 3]))
        assert calls.sizes == [13, 6, 3, 3, 3, 3, 1]
        torch.testing.assert_close(torch.cat([part.images for part in parts]), expected, rtol=1e-4, atol=1e-5)
        assert torch.cat([part.labels for part in parts]).tolist() == ([1, 2, 3] * 5)[:13]
        with pytest.raises(torch.OutOfMemoryError):
            sample(CONSISTENCY, 13, batch=4)  # as many as asked for, or none
    with Cramped(CONSISTENCY, 0), pytest.raises(torch.OutOfMemoryError):
        sample(CONSISTENCY, 13)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_what_is_made_in_batches_is_everything_once(count, monkeypatch):
    monkeypatch.setattr("cmtool.generate.automatic_batch", lambda model, rows: 10)
    made = list(in_batches(CONSISTENCY, count, lambda at: list(range(count))[at]))
    assert [one for part in made for one in part] == list(range(count))
    sizes = [len(part) for part in made]
    assert len(sizes) == math.ceil(count / 10)
    assert max(sizes) - min(sizes) <= 1  # no small rest
    assert list(in_batches(CONSISTENCY, 0, lambda at: at)) == []
    with pytest.raises(UsageError, match="at least 1"):
        next(in_batches(CONSISTENCY, 3, lambda at: at, batch=0))


def test_a_batch_fits_into_the_memory(monkeypatch):
    assert free_memory(torch.device("cpu")) is None or free_memory(torch.device("cpu")) > 2**20
    sizes = []
    for free in (None, 2**40, 2**22, 2**20, 0):
        monkeypatch.setattr("cmtool.generate.free_memory", lambda device, free=free: free)
        sizes.append(automatic_batch(CONSISTENCY))
        assert automatic_batch(CONSISTENCY, rows=2) in (sizes[-1] // 2, max(1, sizes[-1] // 2))
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] >= sizes[4] == 1


def test_edits_in_batches_are_the_edits():
    known, masks = pictures(5), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    for make in (
        lambda **rest: inpaint(CONSISTENCY, known, masks, labels=1, steps=2, **rest),
        lambda **rest: inpaint(CONSISTENCY, known[:1], masks, labels=1, steps=2, **rest),
        lambda **rest: inpaint(CONSISTENCY, known[:1], masks[:1], seeds=[4, 2, 9], labels=1, steps=2, **rest),
        lambda **rest: colorize(CONSISTENCY, known, labels=1, steps=2, **rest),
        lambda **rest: superres(CONSISTENCY, known[:, :, ::2, ::2], 2, labels=1, steps=2, **rest),
    ):
        torch.testing.assert_close(make(batch=2), make(), rtol=1e-4, atol=1e-5)


def test_results_are_ordinary_tensors():
    for made in (sample(CONSISTENCY, 2), colorize(CONSISTENCY, pictures(1), labels=1, steps=1)):
        assert not made.is_inference()
        made.clone().requires_grad_().sum().backward()
        made.mul_(2)
