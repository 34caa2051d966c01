"""What is forgotten between a pass and its gradient, and made again for it: memory for time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.networks import native
from cmtool.networks.chance import Chance, current_chance, entered
from cmtool.networks.modes import derived


class Recomputed(nn.Module):
    """A part of a network that may forget what is inside it, and compute it again when the gradient needs it.

    That is activation checkpointing: a pass more for a fraction of the memory. Set with `networks.recompute`.
    """

    recompute = False

    def __call__(self, *args: Any) -> Any:
        if not self.recompute or not torch.is_grad_enabled():
            return super().__call__(*args)
        from torch.utils.checkpoint import checkpoint

        chance, own = current_chance(), super().__call__

        def run(*args: Any) -> Any:
            with all_forgotten(), entered(chance and Chance(chance.seeds, made)):
                out, now = own(*args), current_chance()
                return out, now.made if now else 0

        made = chance.made if chance else 0
        out, after = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=chance is None)
        if chance:
            chance.made = after
        return out


_forgets = True  # whether it is; not inside of a part that forgets everything anyway


def remade(out: Tensor, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """A norm's output, which the convolution after it shall make again in its gradient rather than keep.

    That is half of what a residual block keeps, for a small part of the time of a convolution in float32. Where
    bfloat16 makes convolutions ten times as fast it would be a larger one.
    """
    if _forgets and x.dtype == torch.float32 and native.usable(x) and not derived():
        x, rest = x.detach(), tuple(one.detach() if isinstance(one, Tensor) else one for one in rest)
        out._made = out._version, lambda: native.forward(x, *rest)[0]  # type: ignore[attr-defined]
    return out


@contextmanager
def all_forgotten() -> Iterator[None]:
    """Inside, what is kept counts for nothing: it is forgotten all at once."""
    global _forgets
    before, _forgets = _forgets, False
    try:
        yield
    finally:
        _forgets = before


@contextmanager
def forgetting(x: Tensor) -> Iterator[None]:
    """Autograd keeps how x was made, if that is known and x still the same, where it would keep x."""
    version, make = getattr(x, "_made", (None, None))
    if version is None or version != x._version:
        yield
        return
    place = x.data_ptr(), x.shape, x.stride()  # and no reference to x, which would keep it

    def pack(tensor: Tensor) -> Any:
        return make if (tensor.data_ptr(), tensor.shape, tensor.stride()) == place else tensor

    def unpack(kept: Any) -> Tensor:
        found: Tensor = kept if isinstance(kept, Tensor) else kept()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
