"""Losses, gradients, samplers, curricula and edits of openai/consistency_models, number by number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from cmtool.editing import AvgPool, Luma, project
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, LogRatio
from cmtool.networks import ADMConfig, build
from cmtool.sampler import sample
from cmtool.solvers import DDIM, DPMSolver2, Euler, Heun, solve
from cmtool.times import Adjacent, Constant, Karras, Progressive, Times
from cmtool.training import weights
from cmtool.training.distances import L1, L2
from cmtool.training.objectives import Consistency, Denoising
from cmtool.training.targets import AdaptiveAverage, MovingAverage
from cmtool.training.trajectory import Batch, Data, Predecessor, Teacher
from tests.parity.goldens import meta, tensors

TOLD = LogRatio(250.0)
WEIGHTS = {
    "uniform": weights.Uniform(),
    "snr": weights.SNR(),
    "snr+1": weights.SNRPlusOne(),
    "karras": weights.Karras(),
    "truncated-snr": weights.TruncatedSNR(),
}
DISTANCES = {"l1": L1(), "l2": L2(), "l2-32": L2(resize=32)}
CASES = [(norm, weighting) for norm in DISTANCES for weighting in WEIGHTS]
cases = pytest.mark.parametrize(("norm", "weighting"), CASES)


@cache
def network(variant: str, weights_of: str = "") -> FlowMap:
    """One of the original networks as a consistency model; `weights_of` names another weight set of it."""
    made = meta("openai")["unet_variants"][variant]
    config = ADMConfig(
        resolution=made["image_size"],
        num_classes=made["num_classes"] or 0,
        channels=made["model_channels"],
        channel_mult=tuple(made["channel_mult"]),
        num_blocks=made["num_res_blocks"],
        attention_resolutions=tuple(made["image_size"] // factor for factor in made["attention_resolutions"]),
        head_channels=made.get("num_head_channels", 0),
        num_heads=made.get("num_heads", 1),
        scale_shift_norm=made["use_scale_shift_norm"],
        resblock_updown=made["resblock_updown"],
    )
    model = FlowMap(build(config), VE(), BoundaryEDM(time_input=TOLD)).eval()
    model.network.load_state_dict(tensors(f"openai/{variant}{weights_of}.pt"))
    return model


def student() -> FlowMap:
    return network("imagenet64_like")


def target() -> FlowMap:
    return network("imagenet64_like", ".target")


def as_denoiser(model: FlowMap) -> FlowMap:
    """The same network under EDM's scalings."""
    return FlowMap(model.network, model.path, EDM(time_input=TOLD)).eval()


def teacher() -> FlowMap:
    return as_denoiser(network("imagenet64_like", ".teacher"))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal relative to the largest value: what float32 rounding is measured by."""
    assert found.shape == expected.shape
    error = float((found.detach() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"off by {error:.1e} of the largest value"


def close_each(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every number equal relative to itself."""
    assert found.shape == expected.shape
    error = float(((found.detach() - expected).abs() / expected.abs()).max())
    assert error <= tolerance, f"off by {error:.1e}"


# The two scalings.


@pytest.mark.parametrize("variant", ["imagenet64_like", "lsun256_like", "conv_resample"])
def test_both_scalings(variant):
    io = tensors(f"openai/{variant}.io.safetensors")
    model = network(variant)
    labels = io["y"] if model.network.config.num_classes else None
    with torch.no_grad():
        close(TOLD(VE(), io["sigma"]), io["rescaled_t"], 1e-7)
        close(model.denoised(io["x_t"], io["sigma"], labels), io["denoised_boundary"], 2e-6)
        close(as_denoiser(model).denoised(io["x_t"], io["sigma"], labels), io["denoised_edm"], 2e-6)


# Losses. The sampler of times and the noise are the stored ones; everything else is what training uses.


@dataclass(frozen=True)
class Stored:
    """Neighbours at the stored indices of the stored grid."""

    num: int = 40

    def __call__(self, path, n, progress, generator) -> Times:
        return Adjacent().neighbours(path, tensors("openai/losses.safetensors")["indices"], self.num)


@dataclass(frozen=True)
class Levels:
    """The noise levels of the denoising losses."""

    def __call__(self, path, n, progress, generator) -> Times:
        t = torch.tensor([0.002, 0.01, 0.1, 0.5, 1.0, 5.0, 20.0, 80.0])
        return Times(t, t, t)


def stored_batch() -> tuple[Batch, dict[str, Tensor]]:
    io = tensors("openai/losses.safetensors")
    return Batch(io["x_start"], io["y"], io["noise"]), io


def losses(objective, model, against=None) -> Tensor:
    batch, _ = stored_batch()
    with torch.no_grad():
        return objective(model, against or target(), batch, 0.0, torch.Generator().manual_seed(0)).per_sample


@cases
def test_distillation_losses(norm, weighting):
    config = Consistency(Teacher(Heun()), Stored(), DISTANCES[norm], WEIGHTS[weighting])
    close_each(losses(config.build(teacher()), student()), stored_batch()[1][f"cd.{norm}.{weighting}"], 2e-5)


@cases
def test_training_losses(norm, weighting):
    config = Consistency(Data(), Stored(), DISTANCES[norm], WEIGHTS[weighting])
    close_each(losses(config.build(), student()), stored_batch()[1][f"ct.{norm}.{weighting}"], 2e-5)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_denoising_losses(weighting):
    config = Denoising(Levels(), L2(), WEIGHTS[weighting])
    close_each(losses(config.build(), as_denoiser(student())), stored_batch()[1][f"edm.{weighting}"], 1e-5)


@dataclass(frozen=True)
class Steps:
    """From the stored points of the grid of 39 steps to the next."""

    def __call__(self, path, n, progress, generator) -> Times:
        t, s, _ = Stored()(path, n, progress, generator)
        return Times(t, s, s)


@pytest.mark.parametrize("solver", [DDIM(), Euler()], ids=lambda solver: solver.kind)
@pytest.mark.parametrize(("norm", "weighting"), [case for case in CASES if case[0] != "l2-32"])
def test_progressive_distillation_losses(norm, weighting, solver):
    """Two steps of the teacher in one, compared as clean images; both under EDM's scalings."""
    trajectory = Predecessor(solver, substeps=2)
    config = Consistency(trajectory, Steps(), DISTANCES[norm], WEIGHTS[weighting], compare_denoised=True)
    model = as_denoiser(student())
    found = losses(config.build(teacher()), model, model)
    close_each(found, stored_batch()[1][f"pd.{norm}.{weighting}"], 2e-5)


def test_distillation_gradients():
    config = Consistency(Teacher(Heun()), Stored(), L2())
    objective, model = config.build(teacher()), student()
    model.requires_grad_(True).zero_grad()
    objective(model, target(), stored_batch()[0], 0.0, torch.Generator().manual_seed(0)).value.backward()
    expected = tensors("openai/cd_l2_grads.safetensors")
    found = {name: parameter.grad for name, parameter in model.network.named_parameters()}
    model.requires_grad_(False).zero_grad()
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        error = float((found[name] - grad).abs().max())
        # gradients that are pure cancellation (biases before a norm) are measured against all the others
        assert error <= 1e-4 * float(grad.abs().max()) + 1e-7 * largest, name


# Samplers.


def samples(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start, noise of each step, labels, result."""
    io = tensors("openai/samplers.safetensors")
    draws = io[f"{name}.noise"]
    return 80 * draws[0], draws[1:], io["y"].long(), io[name]


def last(states) -> Tensor:
    *_, state = states
    return state.denoised if hasattr(state, "denoised") else state.x


def test_the_grid():
    sigmas = tensors("openai/samplers.safetensors")["sigmas_karras_40"]
    close_each(Karras().times(VE(), 40), sigmas[:-1], 1e-5)  # theirs is computed in float32
    assert float(sigmas[-1]) == 0


@pytest.mark.parametrize(
    ("name", "num", "indices"),
    [
        ("onestep.40", 40, [0]),
        ("multistep.40.0-22-39", 40, [0, 22]),
        ("multistep.151.0-17-18-150", 151, [0, 17, 18]),
    ],
)
def test_consistency_samplers(name, num, indices):
    start, noise, labels, expected = samples(name)
    times = Karras().times(VE(), num)[indices]
    # The result is clipped once more; the last of their draws is multiplied by zero.
    states = sample(student(), start, times, noise=lambda i: noise[i - 1], labels=labels)
    close(last(states), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "solver", "steps", "options"),
    [
        ("heun.12", Heun(), 12, {}),
        ("euler.12", Euler(), 12, {}),
        ("dpm.8", DPMSolver2(), 8, {}),
        ("ancestral.8", Euler(), 8, {"ancestral": True}),
    ],
)
def test_solvers(name, solver, steps, options):
    start, noise, labels, expected = samples(name)
    model = teacher()
    times = torch.cat([Karras().times(VE(), steps), torch.zeros(1)])

    def denoise(x, t):
        return model.denoised(x, t, labels).clamp(-1, 1)

    states = solve(solver, denoise, VE(), start, times, noise=(lambda i: noise[i - 1]) if options else None, **options)
    close(last(states).clamp(-1, 1), expected, 5e-5)  # their grid is rounded to float32


def test_the_sampler_of_progressive_distillation():
    """Each jump of a denoiser lands on the next point of a grid that ends at t_min."""
    start, noise, labels, expected = samples("progdist.4")
    model = teacher()
    times = Karras().times(VE(), 5)[:-1]
    states = sample(model, start, times, noise=lambda i: noise[i - 1], labels=labels, landing="next")
    close(last(states), expected, 5e-5)  # their grid is rounded to float32


# Curricula.


@pytest.mark.parametrize(
    ("name", "mu0", "s1"), [("adaptive_progressive", 0.95, 200), ("adaptive_progressive_cifar", 0.9, 150)]
)
def test_curricula(name, mu0, s1):
    for step, mu, num in meta("openai")["ema_and_scales"][name]:
        progress = step / 800_000
        found = Progressive(2, s1)(progress)
        assert found == num
        assert AdaptiveAverage(mu0, 2, "openai").decay(progress, found) == pytest.approx(mu, rel=1e-12)


def test_the_fixed_curriculum():
    for step, mu, num in meta("openai")["ema_and_scales"]["fixed"]:
        assert Constant(40)(step / 800_000) == num
        assert MovingAverage(0.95).decay(step / 800_000, 40) == mu


# Edits: one loop and a projection here, two functions of their own there.


@pytest.mark.parametrize("task", ["colorize", "superres"])
def test_edits(task):
    io = tensors("openai/editing.safetensors")
    op = Luma() if task == "colorize" else AvgPool(8)
    y = op.A(io["images"])
    close(op.pinv(y), io[f"{task}.projected_input"], 1e-6)
    times = Karras().times(VE(), 40)[io["ts"][:-1]]
    noise = io[f"{task}.noise"]
    states = list(
        sample(
            student(),
            io["x_T"],
            times,
            noise=lambda i: noise[i - 1],
            constrain=lambda x: project(op, x, y),
            labels=io["y"],
        )
    )
    close(states[-1].denoised, io[f"{task}.out"], 1e-5)
    assert len(states) == len(io["ts"]) - 1
