"""Zero-shot editing: what is known of an image, as a linear operator, and the projection on it.

    project(x, y) = x + pinv(y - A x)

is the point nearest to x among all images with A x = y. With it as the constraint of the sampling loop, `Mask` is
inpainting, `Luma` colorization and `AvgPool` super-resolution: Algorithm 4 and appendix D of Song et al. (2023),
arXiv:2303.01469; `Blur`, deblurring, is one more. There the same projection is written as replacing coordinates in an
orthogonal basis.

For every operator A pinv A = A and pinv A is symmetric: pinv is the Moore-Penrose inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Degradation(Protocol):
    """A linear operator on images [B, C, H, W] and its pseudo-inverse.

    One whose known values are positive combinations of pixels, each of its own, says so: `disjoint = True`.
    """

    def A(self, x: Tensor) -> Tensor:
        """What is known of the image x."""
        ...

    def pinv(self, y: Tensor) -> Tensor:
        """The smallest image with A x = y."""
        ...


def project(op: Degradation, x: Tensor, y: Tensor) -> Tensor:
    """The image nearest to x whose A x is y; y must be in the range of A."""
    return x + op.pinv(y - op.A(x))


@dataclass(frozen=True, eq=False)
class Mask:
    """A x = known * x: the pixels outside the hole.

    Args:
        new: where to make new pixels; bool, broadcastable to [B, C, H, W].
    """

    new: Tensor
    disjoint: ClassVar[bool] = True

    def A(self, x: Tensor) -> Tensor:
        return x.masked_fill(self.new, 0.0)

    def pinv(self, y: Tensor) -> Tensor:
        return y.masked_fill(self.new, 0.0)


@dataclass(frozen=True)
class Luma:
    """A x = <w, x> over the channels: the brightness. pinv y = w y / <w, w>.

    The default weights are those of ITU-R BT.601, as in the paper. An image that is the same in all channels has
    A x = (sum w) times that value, so the known side of a grey image is `A` of its RGB form, not the grey value itself.
    """

    weights: tuple[float, float, float] = (0.2989, 0.5870, 0.1140)
    disjoint: ClassVar[bool] = True

    def A(self, x: Tensor) -> Tensor:
        return (x * self._w(x)).sum(1, keepdim=True)

    def pinv(self, y: Tensor) -> Tensor:
        w = self._w(y)
        return y * w / (w * w).sum()

    def _w(self, x: Tensor) -> Tensor:
        return x.new_tensor(self.weights).view(1, 3, 1, 1)


@dataclass(frozen=True)
class AvgPool:
    """A x = mean over factor x factor blocks: the small image. pinv repeats each pixel."""

    factor: int
    disjoint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"an enlargement needs a factor of at least 2, found {self.factor}")

    def A(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


@dataclass(frozen=True, eq=False)
class Blur:
    """A x = the image convolved with a kernel around the edges: what leaves at the right comes in at the left.

    Of frequencies that the kernel leaves less than `floor` of, nothing is known: A and pinv leave them out, since
    dividing by so little would make noise of rounding.

    Args:
        kernel: [h, w]; its middle, which stays in place, is at [h // 2, w // 2].
        floor: of the largest response.
    """

    kernel: Tensor
    floor: float = 0.1
    disjoint: ClassVar[bool] = False

    def A(self, x: Tensor) -> Tensor:
        return self._through(x, self._response(x))

    def pinv(self, y: Tensor) -> Tensor:
        response = self._response(y)
        return self._through(y, torch.where(response == 0, 0, 1 / response))

    def _through(self, x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[-2:])

    def _response(self, x: Tensor) -> Tensor:
        """What becomes of each frequency of an image like x; complex [H, W // 2 + 1]."""
        (height, width), kernel = x.shape[-2:], self.kernel.to(x)
        rows = (torch.arange(kernel.shape[0], device=x.device) - kernel.shape[0] // 2) % height
        columns = (torch.arange(kernel.shape[1], device=x.device) - kernel.shape[1] // 2) % width
        whole = x.new_zeros(height, width)
        whole.index_put_((rows[:, None], columns[None, :]), kernel, accumulate=True)
        response = torch.fft.rfft2(whole)
        size = response.abs()
        return response.masked_fill(size < self.floor * size.max(), 0)


def to_range(op: Degradation, x: Tensor, y: Tensor, rounds: int = 40) -> Tensor:
    """The image inside [-1, 1] nearest to x with A x = y, or as close to y as the range allows.

    Where the operator is `disjoint`, it is clamp(x + pinv(shift)) for some shift of what is known. A of that rises with
    the shift, since every known value is a positive combination of pixels of its own, so bisection finds it. (A plain
    clamp would change the luma or the block mean wherever x sticks out, and repeated projection only creeps towards the
    corners of colour space.) For other operators that creeping has to do: projection and clamp in turn come near to
    both, though not to the nearest such image.
    """
    if torch.equal(x.clamp(-1, 1), x):
        return x
    if not getattr(op, "disjoint", False):
        for _ in range(rounds):
            x = project(op, x.clamp(-1, 1), y)
        return x.clamp(-1, 1)
    weight = op.pinv(torch.ones_like(y))
    reach = (1 + x.abs().max()) / weight.where(weight > 0, torch.inf).min()  # far enough to clamp everything
    low, high = -reach * torch.ones_like(y), reach * torch.ones_like(y)
    for _ in range(rounds):
        shift = (low + high) / 2
        short = op.A((x + op.pinv(shift)).clamp(-1, 1)) < y
        low, high = torch.where(short, shift, low), torch.where(short, high, shift)
    return (x + op.pinv(high)).clamp(-1, 1)
