"""Our side: cmtool as its users call it, the trainer with presets and the sampling functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmtool import memory, networks
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
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, LogRatio, ModelCard
from cmtool.flow.flow_map import Role
from cmtool.generate import generate, inpaint
from cmtool.times import Karras
from cmtool.training import parts as p
from cmtool.training.presets import Shape, preset
from cmtool.training.trainer import Trainer

_ENDLESS = 10**9  # iterations: every round is a step at the beginning of a training


class Pictures:
    """`shared.pictures` as the trainer asks for them."""

    def __init__(self, setup: Setup) -> None:
        self.images = shared.pictures(setup)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, None]:
        """uint8 [B, C, H, W], no labels."""
        return self.images[indices], None


def job(name: str, setup: Setup) -> Callable[[], Any]:
    """A row; each call is one round."""
    if setup.device == "cpu":
        memory.keep()  # as every command does
    return _training(name, setup) if ROWS[name].trains else _sampling(name, setup)


def recipe(name: str, setup: Setup) -> p.Recipe:
    """The preset of a training row, with the settings that the peer has too.

    Distillation has a squared l2 distance of weight 1 and a moving target; the learning rate is constant. Everything
    else is the preset's.
    """
    config = setup.config
    shape = Shape(
        config.resolution,
        config.in_channels,
        network=config,
        path=VE(),
        parameterization=EDM(),
        distils=name not in ("edm", "ect"),
    )
    chosen = preset(name.split("-")[0])(shape)
    objective: Any = chosen.objective
    if name.startswith("cd-"):
        solver = p.Euler() if name == "cd-euler" else p.Heun()
        objective = replace(
            objective,
            trajectory=replace(objective.trajectory, solver=solver),
            times=replace(objective.times, curriculum=p.Constant(GRID)),
            weight=p.Uniform(),
            target=p.MovingAverage(TARGET),
        )
    return replace(
        chosen,
        objective=objective,
        optimizer=replace(chosen.optimizer, lr=LEARNING_RATE, warmup=0, final=1.0),
        averages=(p.Exponential(AVERAGE),),
        batch=setup.batch,
        iterations=_ENDLESS,
    )


def model(setup: Setup, role: Role, *, scale: float = 0.25, seed: int = 0) -> FlowMap:
    """A model of the row's network; the network is told `scale` ln sigma."""
    config = setup.config
    card = ModelCard(role, config.resolution, config.in_channels, grid_points=SAMPLING_GRID)
    form: Any = BoundaryEDM if role == "consistency" else EDM
    made = FlowMap(shared.network(config, seed), VE(), form(time_input=LogRatio(scale)), card)
    made = made.to(setup.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made.requires_grad_(False).eval().compute_in(_dtype(setup))


def _sampled(setup: Setup, role: Role, scale: float = 0.25) -> FlowMap:
    made = model(setup, role, scale=scale)
    if setup.compiled:
        networks.compile_(made.network)
    return made


def second_time() -> float:
    """The second time point of sampling in two steps."""
    return float(Karras().times(VE(), SAMPLING_GRID)[SECOND])


def _dtype(setup: Setup) -> torch.dtype | None:
    return None if setup.dtype == "float32" else getattr(torch, setup.dtype)


def _training(name: str, setup: Setup) -> Callable[[], Any]:
    chosen = recipe(name, setup)
    config = setup.config
    start = model(setup, "denoiser")
    given: dict[str, Any] = {"teacher": start} if chosen.objective.needs_teacher else {"init": start}
    card = ModelCard(chosen.role, config.resolution, config.in_channels)
    given |= {"device": setup.device, "compute_dtype": _dtype(setup), "compiled": setup.compiled}
    trainer = Trainer(chosen, Pictures(setup), card, **given)
    steps = trainer.run()
    return lambda: next(steps)


def _sampling(name: str, setup: Setup) -> Callable[[], Any]:
    seeds = list(range(setup.batch))
    if name == "heun-18":
        teacher = _sampled(setup, "denoiser")
        return lambda: list(generate(teacher, seeds, solver="heun", steps=SOLVER_STEPS, batch=setup.batch))
    student = _sampled(setup, "consistency", scale=250.0)
    if name == "inpaint-10":
        images = shared.pictures(setup)[: setup.batch] / 127.5 - 1
        return lambda: inpaint(student, images, shared.mask(setup), seeds=seeds, steps=EDIT_STEPS)
    times = [student.path.t_max, *([second_time()] if name == "sample-2" else [])]
    return lambda: list(generate(student, seeds, times=times, batch=setup.batch))
