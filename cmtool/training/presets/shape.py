"""What a preset is asked with, and what all of the brief ones share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cmtool.networks.configs import Config, small


@dataclass(frozen=True)
class Shape:
    """What the data, the teacher and the model to start from fix before a recipe is chosen."""

    resolution: int = 32
    channels: int = 3
    num_classes: int = 0
    network: Config | None = None  # of the model to start from: a student starts as its copy, ...
    path: Any = None  # ... at the same ratios of noise to signal ...
    parameterization: Any = None  # ... and is told the time the same way
    distils: bool = False  # whether there is a teacher
    paired: bool = False  # whether the data holds pairs of an image and its noise

    def small(self, *, two_times: bool = False) -> Config:
        """The network of the model to start from, else the small one for these images."""
        network = self.network or small(self.resolution, self.channels, self.num_classes)
        return replace(network, two_times=True) if two_times else network

    def ends(self, path: Any) -> Any:
        """`path` between the noise levels of the model to start from, if there is one."""
        return path if self.path is None else path.like(self.path)

    def told(self, default: Any) -> Any:
        """How the network is told the time: as before, where it was Karras et al.'s parameterization."""
        from cmtool.training import parts as p

        if isinstance(self.parameterization, p.EDM):
            return replace(
                default, sigma_data=self.parameterization.sigma_data, time_input=self.parameterization.time_input
            )
        return default

    def form(self, default: Any) -> Any:
        """The parameterization on the path of the model to start from: see `told`, and `keeps_form` for all others."""
        return self.parameterization if self.keeps_form else self.told(default)

    @property
    def keeps_form(self) -> bool:
        """Whether the model to start from predicts a velocity, the noise or the image: its output means that, or noise.

        Its jumps from t to s are x_t at s = t all the same, so that it is a consistency function as it is.
        """
        from cmtool.training import parts as p

        return self.parameterization is not None and not isinstance(self.parameterization, p.EDM)

    def balance(self, default: Any) -> Any:
        """The weight under which errors of the raw output count alike at all levels: 1 / out^2 of its form.

        `default` is that of Karras et al.'s parameterization.
        """
        from cmtool.training import parts as p

        known = {p.Epsilon: p.SNR(), p.VPrediction: p.SNRPlusOne(), p.Sample: p.Uniform()}
        return known.get(type(self.parameterization), default)

    @property
    def speaks_velocity(self) -> bool:
        """Whether the model to start from predicts a velocity of its own path."""
        from cmtool.training import parts as p

        return isinstance(self.parameterization, p.Velocity)


def time_of(path: Any, sigma: float) -> float:
    """The path's own time of a noise-to-signal ratio, which is sigma on the variance-exploding one."""
    import torch

    return float(path.time(torch.tensor(sigma, dtype=torch.float64)))


def slower(lr: float) -> Any:
    """The optimizer of `brief` at another learning rate: derivatives of a network diverge at its own."""
    return replace(brief()["optimizer"], lr=lr)


def brief(**changes: Any) -> dict[str, Any]:
    """Minutes on a CPU: large steps that fall to zero along a cosine, and a short average."""
    from cmtool.training import parts as p

    shared = {
        "optimizer": p.Optimizer(lr=1e-3, warmup=10_000, final=0.01),
        "averages": (p.HalfLife(images=20_000, ramp_up=0.1),),
        "iterations": 600,
        "batch": 128,
    }
    return shared | changes
