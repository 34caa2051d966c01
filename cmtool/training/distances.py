"""Distances d(a, b) between two batches of images; one number a sample.

Each also has the form it takes for neighbours, `metric(a, u)`: the leading term of d(a, a + h u) as h goes to 0, which
is u^T G(a) u / 2 with the Hessian G of the smooth ones. Continuous-time consistency models are trained by it.

`L1`, `L2` and `PseudoHuber` are stateless. `LPIPS` needs a pretrained trunk: its config says which, `build` makes the
module from weights the caller has already read, so that a missing file is found before anything else starts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmtool.training.tangents import jvp


class Distance(Protocol):
    """(a, b) [B, C, H, W] each -> [B]; and its form for neighbours."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...

    def metric(self, a: Tensor, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L1:
    """Mean of |a - b| over channels and pixels."""

    kind: ClassVar[str] = "l1"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(1)

    def metric(self, a: Tensor, u: Tensor) -> Tensor:
        return u.abs().flatten(1).mean(1)


@dataclass(frozen=True)
class L2:
    """Mean of (a - b)^2 over channels and pixels (the square, not the norm).

    Args:
        resize: compare at this resolution, bilinear ("l2-32" of OpenAI's code is 32); None compares as is.
    """

    kind: ClassVar[str] = "l2"
    resize: int | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.resize is not None:
            a, b = (F.interpolate(x, size=self.resize, mode="bilinear") for x in (a, b))
        return (a - b).square().flatten(1).mean(1)

    def metric(self, a: Tensor, u: Tensor) -> Tensor:
        return self(u, torch.zeros_like(u))


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|a - b|^2 + c^2) - c with the norm of the whole image. Song and Dhariwal (2023), arXiv:2310.14189, eq. 7.

    Args:
        c: the crossover from square to norm; None is the paper's 0.00054 sqrt(d) for images of d numbers.
    """

    kind: ClassVar[str] = "pseudo_huber"
    c: float | None = None

    def __post_init__(self) -> None:
        # c = 0 would be the plain norm, whose gradient at zero distance is 0 / 0.
        if self.c is not None and not self.c > 0:
            raise ValueError(f"c must be positive, found {self.c}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        c = self._crossover(a)
        return ((a - b).square().flatten(1).sum(1) + c * c).sqrt() - c

    def metric(self, a: Tensor, u: Tensor) -> Tensor:
        return u.square().flatten(1).sum(1) / (2 * self._crossover(a))

    def _crossover(self, a: Tensor) -> float:
        return 0.00054 * math.sqrt(a[0].numel()) if self.c is None else self.c


@dataclass(frozen=True)
class LPIPS:
    """Learned perceptual similarity, Zhang et al. (2018), arXiv:1801.03924, from the `lpips` package.

    Images narrower than 256 are enlarged to 224 first, as Song et al. (2023) train it.
    """

    kind: ClassVar[str] = "lpips"
    net: Literal["vgg", "alex"] = "vgg"

    def build(self, backbone: Mapping[str, Tensor]) -> LPIPSModule:
        """The module, from the trunk's torchvision state dict (`features.N.weight`, ...)."""
        return LPIPSModule(self, backbone)


class LPIPSModule(nn.Module):
    """`LPIPS` with its weights; frozen."""

    def __init__(self, config: LPIPS, backbone: Mapping[str, Tensor]) -> None:
        super().__init__()
        lpips = import_lpips()
        with _old_torchvision_calls():
            self.model: Any = lpips.LPIPS(net=config.net, pnet_rand=True, verbose=False)
        # Both sides number the layers of `features` alike; lpips only groups them into slices.
        state = {name: backbone["features." + name.split(".", 1)[1]] for name in self.model.net.state_dict()}
        self.model.net.load_state_dict(state, strict=True)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape[-1] < 256:
            a, b = (F.interpolate(x, size=224, mode="bilinear") for x in (a, b))
        return self.model(a, b).flatten()

    def metric(self, a: Tensor, u: Tensor) -> Tensor:
        # Squared differences of features, so the leading term is that of the features' derivative along u.
        changes = jvp(self._features, (a,), (u,))[1]
        weighed = (lin(change.square()) for lin, change in zip(self.model.lins, changes, strict=True))
        return torch.stack([layer.mean((1, 2, 3)) for layer in weighed]).sum(0)

    def _features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normalised features that `forward` compares."""
        if x.shape[-1] < 256:
            x = F.interpolate(x, size=224, mode="bilinear")
        layers = self.model.net(self.model.scaling_layer(x))
        # The root of a sum of squares has no slope at 0, where every feature of a pixel is dead: a floor far below any
        # live one.
        return tuple(layer * (layer.square().sum(1, keepdim=True) + 1e-20).rsqrt() for layer in layers)

    def train(self, mode: bool = True) -> LPIPSModule:
        """Stays in evaluation mode: its dropout would make the distance random."""
        return super().train(False)


def import_lpips() -> Any:
    """The `lpips` package, or a DependencyError that says how to mend the installation."""
    from cmtool.compat import repair_torchvision
    from cmtool.errors import DependencyError

    repair_torchvision()
    try:
        with _old_torchvision_calls():
            import lpips
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"the LPIPS distance needs the lpips and torchvision packages, which do not load: {error}",
            "install a torchvision built for your torch, or choose --set objective.distance=pseudo_huber",
        ) from error
    return lpips


@contextmanager
def _old_torchvision_calls() -> Iterator[None]:
    """lpips still asks torchvision for models by `pretrained=`; that is nothing to warn our users of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def needs_backbone(distance: object) -> bool:
    """Whether the distance has to be built from pretrained weights."""
    return isinstance(distance, LPIPS)


def build(distance: Any, backbone: Mapping[str, Tensor] | None) -> Distance:
    """The callable of a distance's config."""
    if isinstance(distance, LPIPS):
        if backbone is None:
            raise ValueError("LPIPS needs the weights of its trunk")
        return distance.build(backbone)
    chosen: Distance = distance
    return chosen


AnyDistance = L1 | L2 | PseudoHuber | LPIPS
DISTANCES: dict[str, type] = {distance.kind: distance for distance in get_args(AnyDistance)}
