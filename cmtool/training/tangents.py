"""Derivatives along a trajectory, and what continuous-time objectives do to them before they become a loss."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmtool.flow.flow_map import FlowMap
from cmtool.flow.parameterization import Coefficients
from cmtool.flow.path import Path

# --- derivatives -----------------------------------------------------------------------------------------------------


def along(ask: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """ask(x, t) and its total derivative d/dt while dx/dt = velocity: one forward-mode pass.

    Args:
        ask: of (x [B, ...], t [B]) to a tensor.
        velocity: shape of `x`.
    """
    one = torch.ones_like(t)
    # The fused attention kernels have no forward-mode derivative, and compiled code has none.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        if torch.is_grad_enabled():  # the derivative will be differentiated, which only torch.func's can be everywhere
            return jvp(ask, (x, t), (velocity, one))
        _load_forward_mode()
        with forward_ad.dual_level():  # plain tensors, which compiled passes take
            value, change = forward_ad.unpack_dual(ask(forward_ad.make_dual(x, velocity), forward_ad.make_dual(t, one)))
            return value, torch.zeros_like(value) if change is None else change


def jvp(ask: Callable[..., Any], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """`torch.func.jvp`: ask(*at) and its derivative along a direction, which can be differentiated again."""
    _load_forward_mode()
    done: Any = torch.func.jvp(ask, at, direction)
    return done


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load what its first forward-mode derivative needs, without its warning of its own TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script. is ")
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))


def coefficients_along(model: FlowMap, t: Tensor, s: Tensor) -> tuple[Coefficients, Coefficients]:
    """The coefficients of a jump from t to s, and their derivatives with respect to t."""

    def ask(at: Tensor) -> tuple[Tensor, ...]:
        return tuple(model.parameterization.jump(model.path, at, s))

    done = jvp(ask, (t,), (torch.ones_like(t),))
    return Coefficients(*done[0]), Coefficients(*done[1])


@contextmanager
def full_precision(model: FlowMap) -> Iterator[None]:
    """The network in the type of its input: a derivative in half precision is mostly rounding."""
    kept = model.compute_dtype
    model.compute_in(None)
    try:
        yield
    finally:
        model.compute_in(kept)


# --- limits on a tangent ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalised:
    """g / (|g| + c), |g| the root mean square over the image; c = 0.1 in Lu and Song (2024), section 4.1.

    The paper writes the plain norm; the mean makes c mean the same at every resolution.
    """

    kind: ClassVar[str] = "normalised"
    c: float = 0.1

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, found {self.c}")

    def __call__(self, tangent: Tensor) -> Tensor:
        norm = tangent.square().flatten(1).mean(1).sqrt()
        return tangent / (norm + self.c).reshape(-1, *(1,) * (tangent.ndim - 1))


@dataclass(frozen=True)
class Clipped:
    """Every entry held in [-limit, limit]. The alternative of Lu and Song (2024), section 4.1: limit = 1."""

    kind: ClassVar[str] = "clipped"
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"the limit must be positive, found {self.limit}")

    def __call__(self, tangent: Tensor) -> Tensor:
        return tangent.clamp(-self.limit, self.limit)


AnyLimit = Normalised | Clipped
LIMITS: dict[str, type] = {limit.kind: limit for limit in get_args(AnyLimit)}

# --- balances: how much each sample counts, learned or from its own loss --------------------------------------------


@dataclass(frozen=True)
class Adaptive:
    """loss / sg(loss + c)^power. Geng et al. (2025), arXiv:2505.13447, eq. 22: power = 1.

    Args:
        c: their c divided by the number of values of an image, since our squared error is a mean.
    """

    kind: ClassVar[str] = "adaptive"
    power: float = 1.0
    c: float = 1e-3

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, found {self.c}")

    def build(self) -> Balance:
        return _AdaptiveBalance(self)


@dataclass(frozen=True)
class Learned:
    """exp(w(t)) loss - w(t) with a small network w: all times come to count alike. Lu and Song (2024), section 4.2.

    Without it the loss of a noise level counts by its size. Karras et al. (2023), arXiv:2312.02696, eq. 21.
    """

    kind: ClassVar[str] = "learned"
    channels: int = 64

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"channels must be even and positive, found {self.channels}")

    def build(self) -> Balance:
        return _LearnedBalance(self)


class Balance(nn.Module):
    """(losses [B], path, t [B]) -> what is minimised [B]."""

    def forward(self, losses: Tensor, path: Path, t: Tensor) -> Tensor:
        return losses


class _AdaptiveBalance(Balance):
    def __init__(self, config: Adaptive) -> None:
        super().__init__()
        self.config = config

    def forward(self, losses: Tensor, path: Path, t: Tensor) -> Tensor:
        return losses / (losses.detach() + self.config.c) ** self.config.power


class _LearnedBalance(Balance):
    frequencies: Tensor

    def __init__(self, config: Learned) -> None:
        super().__init__()
        half = config.channels // 2
        # From half a turn over all noise levels up to several: w is a smooth function of the level.
        self.register_buffer("frequencies", torch.logspace(-1.0, 1.0, half), persistent=False)
        self.out = nn.Linear(2 * half, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, losses: Tensor, path: Path, t: Tensor) -> Tensor:
        angles = path.ratio(t).clamp(1e-6, 1e6).log()[:, None] * self.frequencies
        w = self.out(torch.cat([angles.cos(), angles.sin()], 1).to(self.out.weight.dtype)).squeeze(1)
        return w.exp() * losses - w


AnyBalance = Adaptive | Learned
BALANCES: dict[str, type] = {balance.kind: balance for balance in get_args(AnyBalance)}


def balance(config: Any) -> Balance:
    """The module of a balance; None leaves the losses as they are."""
    made: Balance = Balance() if config is None else config.build()
    return made
