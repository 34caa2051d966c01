"""The other side: the methods in plain PyTorch as one writes them from the papers, around diffusers' UNet2DModel.

All in float32 (or under torch.autocast, if it is told so) and contiguous [B, C, H, W]. One file, few abstractions,
torch's own optimizers and modules: what a person has before anything is tuned. Sampling in one and two steps
is diffusers' own pipeline.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool.benchmark import shared
from cmtool.benchmark.rows import (
    AVERAGE,
    EDIT_STEPS,
    GRID,
    LEARNING_RATE,
    ROWS,
    SAMPLING_GRID,
    SECOND,
    SOLVER_STEPS,
    TARGET,
)
from cmtool.benchmark.shared import Setup
from cmtool.compat import repair_torchvision
from cmtool.errors import DependencyError
from cmtool.io.exporters.diffusers import config_json, from_openai, unet2d_of

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.002, 80.0, 7.0


def library() -> SimpleNamespace:
    """What is used of diffusers, quiet.

    Raises:
        DependencyError: it is not installed, or does not load.
    """
    repair_torchvision()
    try:
        from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
        from diffusers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"the peer is diffusers' UNet2DModel, and diffusers does not load: {error}",
            "pip install diffusers, or measure cmtool alone with --no-peer",
        ) from error
    logging.set_verbosity_error()
    return SimpleNamespace(
        UNet2DModel=UNet2DModel,
        ConsistencyModelPipeline=ConsistencyModelPipeline,
        CMStochasticIterativeScheduler=CMStochasticIterativeScheduler,
    )


def unet(setup: Setup, seed: int = 0) -> Any:
    """diffusers' UNet2DModel with the weights of `shared.network`."""
    config = {key: value for key, value in config_json(unet2d_of(setup.config)).items() if not key.startswith("_")}
    made = library().UNet2DModel(**config)
    made.load_state_dict(from_openai(shared.network(setup.config, seed).state_dict(), setup.config))
    return made.to(setup.device).eval()


def job(name: str, setup: Setup) -> Callable[[], Any]:
    """A row; each call is one round."""
    made = _training(name, setup) if ROWS[name].trains else torch.no_grad()(_sampling(name, setup))
    low = setup.peer_dtype != "float32"
    return torch.autocast(torch.device(setup.device).type, getattr(torch, setup.peer_dtype), enabled=low)(made)


# --- models ----------------------------------------------------------------------------------------------------------


def pixels(t: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return t[:, None, None, None]


def edm_denoised(net: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma). Karras et al. (2022), arXiv:2206.00364, table 1."""
    s = pixels(sigma)
    c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
    c_out = s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (s**2 + SIGMA_DATA**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, sigma.log() / 4).sample


def consistency(net: Any, x: Tensor, sigma: Tensor, scale: float = 0.25) -> Tensor:
    """f(x, sigma). Song et al. (2023), arXiv:2303.01469, appendix C; the network is told `scale` ln sigma."""
    s = pixels(sigma)
    c_skip = SIGMA_DATA**2 / ((s - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
    c_out = SIGMA_DATA * (s - SIGMA_MIN) / (s**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (s**2 + SIGMA_DATA**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, scale * sigma.log()).sample


def karras_sigmas(n: int) -> Tensor:
    """n noise levels from 80 down to 0.002. Karras et al. (2022), eq. 5."""
    ramp = torch.linspace(0, 1, n)
    top, bottom = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (top + ramp * (bottom - top)) ** RHO


# --- losses ----------------------------------------------------------------------------------------------------------


def edm_loss(net: Any, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Denoising, weighted. Karras et al. (2022), eq. 2."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    denoised = edm_denoised(net, x0 + pixels(sigma) * noise, sigma)
    return (pixels(weight) * (denoised - x0) ** 2).mean()


def cd_loss(net: Any, target: Any, teacher: Any, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, heun: bool) -> Tensor:
    """Consistency distillation with squared l2. Song et al. (2023), algorithm 2."""
    x_t = x0 + pixels(t) * noise
    with torch.no_grad():
        d = (x_t - edm_denoised(teacher, x_t, t)) / pixels(t)
        x_r = x_t + pixels(r - t) * d
        if heun:
            d_r = (x_r - edm_denoised(teacher, x_r, r)) / pixels(r)
            x_r = x_t + pixels(r - t) * (d + d_r) / 2
        goal = consistency(target, x_r, r)
    return ((consistency(net, x_t, t) - goal) ** 2).mean()


def ect_neighbour(t: Tensor) -> Tensor:
    """r of the first stage. Geng et al. (2024), arXiv:2406.14548: q = 2, k = 8, b = 1."""
    return (t * (1 - 0.5 * (1 + 8 * torch.sigmoid(-t)))).clamp(min=SIGMA_MIN)


def ect_loss(net: Any, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Easy consistency tuning with Pseudo-Huber; f is one DDIM step to the smallest noise level."""

    def jump(x: Tensor, sigma: Tensor) -> Tensor:
        keep = pixels(SIGMA_MIN / sigma)
        return keep * x + (1 - keep) * edm_denoised(net, x, sigma)

    with torch.no_grad():
        goal = jump(x0 + pixels(r) * noise, r)
    c = 0.00054 * math.sqrt(x0[0].numel())
    distance = (((jump(x0 + pixels(t) * noise, t) - goal) ** 2).sum((1, 2, 3)) + c**2).sqrt() - c
    return (distance / (t - r)).mean()


class AdaptiveWeight(nn.Module):
    """The learned weight w(t) of Karras et al. (2023), arXiv:2312.02696, eq. 21: Fourier features, one layer."""

    frequencies: Tensor

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1, channels // 2))
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """[B] to [B]."""
        angles = sigma.log()[:, None] * self.frequencies
        return self.linear(torch.cat([angles.cos(), angles.sin()], 1))[:, 0]


def scd_loss(
    net: Any, teacher: Any, weight: AdaptiveWeight, x0: Tensor, noise: Tensor, t: Tensor, warm: float
) -> Tensor:
    """sCM distillation on TrigFlow. Lu and Song (2024), arXiv:2410.11081, algorithm 1, with the sign of F as EDM's.

    f lands at the smallest noise level instead of at 0; the norm of a tangent is its root mean square.
    """
    sigma = SIGMA_DATA * torch.tan(t)
    cos, sin = pixels(torch.cos(t)), pixels(torch.sin(t))
    x_t = cos * x0 + sin * SIGMA_DATA * noise
    gap = pixels(t - math.atan(SIGMA_MIN / SIGMA_DATA))

    def raw(x: Tensor, t: Tensor) -> Tensor:
        told = torch.log(SIGMA_DATA * torch.tan(t)) / 4
        out: Tensor = net(x / SIGMA_DATA, told).sample
        return out

    with torch.no_grad():
        dx_dt = (cos * x_t - edm_denoised(teacher, x_t / cos, sigma)) / sin
        with sdpa_kernel(SDPBackend.MATH):
            done: Any = torch.func.jvp(raw, (x_t, t), (dx_dt, torch.ones_like(t)))
        out, d_out = done
        g = gap.cos() * (dx_dt + SIGMA_DATA * out) + warm * gap.sin() * (SIGMA_DATA * d_out - x_t)
        g = cos * g
        g = g / ((g**2).mean((1, 2, 3), keepdim=True).sqrt() + 0.1)
    prediction = raw(x_t, t)
    losses = ((prediction - (prediction.detach() - g)) ** 2).mean((1, 2, 3)) / sigma
    w = weight(sigma)
    return (w.exp() * losses - w).mean()


# --- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) weights."""
    for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
        mine.mul_(decay).add_(theirs, alpha=1 - decay)


def _copy(net: Any) -> Any:
    return copy.deepcopy(net).requires_grad_(False)


def _training(name: str, setup: Setup) -> Callable[[], Any]:
    device, batch = setup.device, setup.batch
    images, sigmas = shared.pictures(setup), karras_sigmas(GRID).to(device)
    net = unet(setup).train()
    average = _copy(net)
    target = _copy(net) if name.startswith("cd-") else None
    teacher = None if name in ("edm", "ect") else unet(setup).requires_grad_(False)
    weight = AdaptiveWeight().to(device) if name == "scd" else None
    if name == "scd":
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):  # its forward-mode derivative fails on what attention returns
                module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    parameters = [*net.parameters(), *(weight.parameters() if weight is not None else ())]
    optimizer: torch.optim.Optimizer = torch.optim.RAdam(parameters, lr=LEARNING_RATE)
    if name == "edm":
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))

    def log_normal(mean: float, std: float) -> Tensor:
        return (mean + std * torch.randn(batch, device=device)).exp().clamp(1.01 * SIGMA_MIN, SIGMA_MAX)

    def loss(x0: Tensor, noise: Tensor) -> Tensor:
        if name == "edm":
            return edm_loss(net, x0, noise, log_normal(-0.6, 1.3))
        if name == "ect":
            t = log_normal(-1.1, 2.0)
            return ect_loss(net, x0, noise, t, ect_neighbour(t))
        if weight is not None:
            t = torch.atan(log_normal(-0.8, 2.0) / SIGMA_DATA)
            return scd_loss(net, teacher, weight, x0, noise, t, 0.0)
        index = torch.randint(GRID - 1, (batch,), device=device)
        return cd_loss(net, target, teacher, x0, noise, sigmas[index], sigmas[index + 1], heun=name == "cd-heun")

    def step() -> None:
        chosen = images[torch.randint(len(images), (batch,))]
        x0 = chosen.to(device).float() / 127.5 - 1
        optimizer.zero_grad()
        loss(x0, torch.randn_like(x0)).backward()
        optimizer.step()
        if target is not None:
            follow(target, net, TARGET)
        follow(average, net, AVERAGE)

    return step


# --- sampling --------------------------------------------------------------------------------------------------------


def _sampling(name: str, setup: Setup) -> Callable[[], Any]:
    net = unet(setup).requires_grad_(False)
    if name == "heun-18":
        return lambda: heun(net, _noise(setup))
    if name == "inpaint-10":
        images = (shared.pictures(setup)[: setup.batch].float() / 127.5 - 1).to(setup.device)
        hole = shared.mask(setup).to(setup.device)
        return lambda: inpaint(net, images, hole)
    found = library()
    pipeline = found.ConsistencyModelPipeline(net, found.CMStochasticIterativeScheduler(SAMPLING_GRID))
    pipeline.set_progress_bar_config(disable=True)
    steps: dict[str, Any] = {"num_inference_steps": 1}
    if name == "sample-2":
        steps = {"num_inference_steps": None, "timesteps": [SECOND, 0]}
    return lambda: pipeline(batch_size=setup.batch, output_type="pt", **steps).images


def _noise(setup: Setup) -> Tensor:
    side = setup.config.resolution
    return torch.randn(setup.batch, setup.config.in_channels, side, side, device=setup.device)


def heun(net: Any, noise: Tensor) -> Tensor:
    """Karras et al. (2022), algorithm 1: two network calls a step, one in the last."""
    sigmas = F.pad(karras_sigmas(SOLVER_STEPS), (0, 1)).tolist()
    x = SIGMA_MAX * noise
    ones = torch.ones(len(x), device=x.device)
    for sigma, after in pairwise(sigmas):
        d = (x - edm_denoised(net, x, sigma * ones)) / sigma
        x_next = x + (after - sigma) * d
        if after > 0:
            d_next = (x_next - edm_denoised(net, x_next, after * ones)) / after
            x_next = x + (after - sigma) * (d + d_next) / 2
        x = x_next
    return x.clamp(-1, 1)


def inpaint(net: Any, images: Tensor, hole: Tensor) -> Tensor:
    """Song et al. (2023), algorithm 4: the pixels in the hole are made new."""
    known = torch.where(hole, 0.0, images)
    sigmas = karras_sigmas(EDIT_STEPS + 1)[:-1].tolist()
    ones = torch.ones(len(images), device=images.device)
    x = known + SIGMA_MAX * torch.randn_like(images)
    result = images
    for index, sigma in enumerate(sigmas):
        if index:
            x = result + math.sqrt(sigma**2 - SIGMA_MIN**2) * torch.randn_like(images)
        x0 = consistency(net, x, sigma * ones, scale=250.0).clamp(-1, 1)
        result = torch.where(hole, x0, images)
    return result
