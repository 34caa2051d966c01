"""What can be asked of any model in numbers: the same answers before and after, and f(x, t_min) = x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmtool import rng
from cmtool.flow.flow_map import FlowMap

_LOUD = 4.0  # an image in [-1, 1] is at most 1; estimates of a network in order are seldom above 2


class OneStep(nn.Module):
    """The map from noise to image that a model is for: f(x, t), or D(x, t) of a denoiser."""

    def __init__(self, model: FlowMap) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] at the times t [B], labels [B] or None, to [B, C, H, W]."""
        if self.model.card.role == "denoiser":
            return self.model.denoised(x, t, labels)
        return self.model.jump(x, t, torch.full_like(t, self.model.path.t_min), labels)


class Question(NamedTuple):
    """One input of a model: x [1, C, H, W], t [1], labels [1] or None."""

    x: Tensor
    t: Tensor
    labels: Tensor | None


def questions(model: FlowMap) -> list[Question]:
    """Noisy images of fixed seeds at the two ends and in the middle of the path; those of `rng`, so always the same."""
    path, card = model.path, model.card
    low, high = (float(path.ratio(torch.tensor(t, dtype=torch.float64))) for t in (path.t_min, path.t_max))
    low, high = max(low, 1e-3), min(high, 1e4)
    made = []
    for seed, ratio in enumerate((high, (low * high) ** 0.5, low)):
        t = path.clamp(path.time(torch.tensor([ratio], dtype=torch.float64))).float()
        noise, image = (rng.noise([seed], card.image_shape, stream) for stream in (0, 1))
        labels = rng.labels([seed], card.num_classes) if card.num_classes else None
        made.append(Question(path.mix(image.clamp(-1, 1), noise, t), t, labels))
    return made


@torch.inference_mode()
def answers(model: FlowMap, asked: list[Question]) -> Tensor:
    """What the model makes of each question; float32 [3, C, H, W], on the CPU."""
    told = OneStep(model)
    device = model.device
    return torch.cat(
        [
            told(x.to(device), t.to(device), None if labels is None else labels.to(device)).cpu()
            for x, t, labels in asked
        ]
    )


class Findings(NamedTuple):
    """boundary: max |f(x, t_min) - x|, None for a denoiser; largest: of the answer to pure noise; doubts: in words."""

    boundary: float | None
    largest: float
    doubts: tuple[str, ...]


@torch.inference_mode()
def examine(model: FlowMap) -> Findings:
    """The boundary condition, and what looks wrong. Song et al. (2023), arXiv:2303.01469, section 3."""
    asked = questions(model)
    largest = float(answers(model, asked[:1]).abs().max())
    doubts = []
    boundary = None
    if model.card.role != "denoiser":
        x, _, labels = asked[-1]
        t = torch.full((1,), model.path.t_min)
        # what sampling computes, also where the parameterization alone would not give x
        boundary = float((answers(model, [Question(x, t, labels)]) - x).abs().max())
        if not boundary <= 1e-5 * float(x.abs().max()):
            doubts.append(f"f(x, t_min) is not x but off by {boundary:.2g}: this is no consistency function")
    if not largest <= _LOUD:
        doubts.append(
            f"from pure noise it makes values up to {largest:.2g}, far outside [-1, 1]: "
            "the time input or the scalings may be another convention's"
        )
    return Findings(boundary, largest, tuple(doubts))
