"""EDM2: the magnitude-preserving U-Net of Karras et al. (2023), arXiv:2312.02696, configuration G.

No layer changes the root mean square of what passes through it, at the start and, because weights are normalised, at
any time: there are no biases and no norms over the image, and gains are the only scales that are learned. Numbers of
equations and figures below are those of the paper.

The state dict has the names and layouts of the EDM2 release (its `unet.*` entries without that prefix).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks.chance import drop
from cmtool.networks.configs import EDM2Config, level_resolutions
from cmtool.networks.convolution import convolve
from cmtool.networks.layers import MapGap, Resample, attend, look_up, prepare
from cmtool.networks.recomputed import Recomputed

EPS = 1e-4  # added to every magnitude that is divided by
SILU = 0.596  # root mean square of SiLU of a standard normal number, equation 81


class EDM2(nn.Module):
    """The EDM2 U-Net, figure 21; see `EDM2Config`.

    A forward pass in training calls `normalise_weights` first.
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        widths = [mult * config.channels for mult in config.channel_mult]
        noise_channels = config.noise_channels or widths[0]
        emb_channels = config.emb_channels or max(widths)

        self.emb_fourier = Fourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(config.num_classes, emb_channels) if config.num_classes else None
        # The one layer without normalised weights: it starts at zero, as the gains do.
        self.map_gap = MapGap(config.channels, emb_channels) if config.two_times else None

        def block(width: int, out: int, *, encoder: bool, attention: bool = False, up: bool | None = None) -> Block:
            resample = None if up is None else Resample((1, 1), up=up)
            return Block(config, width, out, emb_channels, encoder=encoder, attention=attention, resample=resample)

        resolutions = level_resolutions(config.resolution, config.channel_mult)
        levels = [(f"{r}x{r}", r in config.attention_resolutions, w) for r, w in zip(resolutions, widths, strict=True)]
        name, _, width = levels[0]
        # one more input channel, of ones, is all that there is of a bias
        self.enc = nn.ModuleDict({f"{name}_conv": MPConv(config.in_channels + 1, width, 3)})
        skips = [width]
        for level, (name, attention, out) in enumerate(levels):
            if level > 0:
                self.enc[f"{name}_down"] = block(width, width, encoder=True, up=False)
                skips.append(width)
            for index in range(config.num_blocks):
                self.enc[f"{name}_block{index}"] = block(width, out, encoder=True, attention=attention)
                width = out
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, (name, attention, out) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(width, width, encoder=False, attention=True)
                self.dec[f"{name}_in1"] = block(width, width, encoder=False)
            else:
                self.dec[f"{name}_up"] = block(width, width, encoder=False, up=True)
            for index in range(config.num_blocks + 1):
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), out, encoder=False, attention=attention)
                width = out
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.out_conv = MPConv(width, config.out_channels, 3)

    def normalise_weights(self) -> None:
        """Store all trained weights with magnitude 1, as they are used: forced weight normalisation, equation 66.

        Only how training goes on depends on it: updates of weights that have grown would count for less and less.
        Frozen weights stay as they are, since averages are sums of weights, and their lengths say what was summed.
        """
        for layer in self.modules():
            if isinstance(layer, MPConv) and layer.weight.requires_grad:
                try:
                    layer.normalise()
                except RuntimeError:  # inside a transform of torch.func nothing can be written; a later pass will
                    return

    def embed(self, noise: Tensor, labels: Tensor | None, gap: Tensor) -> Tensor:
        """Noise level, label and gap as one vector: [B, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None:
            # a linear map of the one-hot label, scaled to magnitude 1, is a row of a table
            table = self.emb_label.effective(emb.dtype, gain=math.sqrt(self.config.num_classes)).t()
            hidden = self.config.label_dropout if self.training else 0.0
            keep, share = balance(self.config.label_balance)
            emb = keep * emb + share * look_up(table, labels, emb.shape[0], hidden)
        if self.map_gap is not None:
            emb = emb + self.map_gap(gap)
        return F.silu(emb) / SILU

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        gap: Tensor | None = None,
    ) -> Tensor:
        """The raw network.

        Args:
            x: [B, in_channels, resolution, resolution], of variance 1; its type is the type computed in.
            noise: what the network is told about the noise level, [B], float32, of order one.
            labels: [B] whole numbers, negative for no label; None for no labels at all.
            augment: must be None: this architecture takes no augmentation vector.
            gap: how far the jump goes, in units of `noise`, [B], float32, of order one; or None for zeros.
        Returns:
            [B, out_channels, resolution, resolution] in the type of `x`.
        Raises:
            ValueError: inputs that this network does not take.
        """
        config = self.config
        x, noise, gap = prepare(
            *(x, noise, labels, augment, gap),
            num_classes=config.num_classes,
            augment_dim=0,
            two_times=config.two_times,
        )
        if self.training:
            self.normalise_weights()
        emb = self.embed(noise, labels, gap)  # stays in float32: blocks round what they make of it
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(concat(x, skips.pop(), config.concat_balance) if "_block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain).contiguous()


class MPConv(nn.Module):
    """Magnitude-preserving convolution, or linear layer (kernel 0), without bias: equation 47.

    The weights of every output have root mean square 1, whatever is stored, over the root of the number of inputs.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *(kernel, kernel) if kernel else ()))
        self.inputs = tuple(range(1, self.weight.ndim))

    def effective(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Tensor:
        """The weights in use, times `gain`, in the given type; normalised in float32 or better."""
        # In training a copy: the next forward pass may write into the parameter before this one's gradient is taken.
        weight = self.weight.to(torch.promote_types(dtype, torch.float32), copy=self.training)
        scale = gain / math.sqrt(weight[0].numel()) / magnitude(weight, *self.inputs)
        return (weight * scale).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """The layer, times `gain`, in the type of its input: [B, C] or [B, C, H, W]."""
        weight = self.effective(x.dtype, gain)
        return F.linear(x, weight) if weight.ndim == 2 else convolve(x, weight, padding=(weight.shape[-1] // 2,) * 2)

    @torch.no_grad()
    def normalise(self) -> None:
        """Store the weights as they are used."""
        self.weight.copy_(self.weight / magnitude(self.weight, *self.inputs))


class Block(Recomputed):
    """Residual block whose hidden layer the embedding scales, with optional self-attention.

    The encoder's blocks change the width before both branches and normalise every pixel there; the decoder's change it
    in each branch.
    """

    def __init__(
        self,
        config: EDM2Config,
        width: int,
        out: int,
        emb_channels: int,
        *,
        encoder: bool,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.resample = resample
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out if encoder else width, out, 3)
        self.emb_linear = MPConv(emb_channels, out)
        self.conv_res1 = MPConv(out, out, 3)
        self.conv_skip = MPConv(width, out, 1) if width != out else None
        self.num_heads = out // config.head_channels
        self.attn_qkv = MPConv(out, 3 * out, 1) if attention else None
        self.attn_proj = MPConv(out, out, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, width, H, W] and the embedding [B, emb_channels], in float32 or better."""
        config = self.config
        if self.resample is not None:
            x = self.resample(x)
        main = x if self.conv_skip is None else self.conv_skip(x)
        if self.encoder:
            x = main = normalise(main, 1)

        # Constant factors go into the weights, which are far fewer than the activations.
        y = self.conv_res0(F.silu(x), gain=1 / SILU)
        scale = 1 + self.emb_linear(emb, gain=self.emb_gain)
        y = F.silu(y * scale.to(y.dtype)[:, :, None, None])
        y = drop(y, config.dropout if self.training else 0.0)
        keep, share = balance(config.res_balance)
        x = torch.add(self.conv_res1(y, gain=share / SILU), main, alpha=keep)

        if self.attn_qkv is not None:
            assert self.attn_proj is not None
            y = attend(unit_qkv(self.attn_qkv, x, self.num_heads), self.num_heads)
            keep, share = balance(config.attn_balance)
            x = torch.add(self.attn_proj(y, gain=share), x, alpha=keep)
        return x.clamp(-config.clip_act, config.clip_act) if config.clip_act else x


class Fourier(nn.Module):
    """Cosines of the noise at random frequencies and phases, of magnitude 1, equation 75: [B] to [B, count]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(count))
        self.register_buffer("phases", 2 * math.pi * torch.rand(count))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        exact = dict(self.named_buffers())  # `network.bfloat16()` must not round angles of several turns
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = getattr(self, name)
            if moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self

    def forward(self, noise: Tensor) -> Tensor:
        angles = torch.addcmul(self.phases.to(noise.dtype), noise[:, None], self.freqs.to(noise.dtype))
        return math.sqrt(2) * angles.cos()


def magnitude(x: Tensor, *dims: int) -> Tensor:
    """Root mean square along `dims`, which stay with size 1, plus `EPS`; in float32 or better."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return EPS + norm / math.sqrt(math.prod(x.shape[dim] for dim in dims))


def normalise(x: Tensor, dim: int) -> Tensor:
    """x with root mean square 1 along a dimension; over channels this is pixel norm."""
    return x / magnitude(x, dim).to(x.dtype)


def balance(share: float) -> tuple[float, float]:
    """Factors of two independent signals of magnitude 1 whose sum has magnitude 1, too: equation 88.

    Args:
        share: of the second signal, from 0 to 1.
    """
    root = math.hypot(1 - share, share)
    return (1 - share) / root, share / root


def concat(x: Tensor, y: Tensor, share: float) -> Tensor:
    """x and y along channels, of magnitude 1 together; `share` is y's, however many its channels: equation 103."""
    keep, share = balance(share)
    total = x.shape[1] + y.shape[1]
    return torch.cat([x * (keep * math.sqrt(total / x.shape[1])), y * (share * math.sqrt(total / y.shape[1]))], dim=1)


def unit_qkv(conv: MPConv, x: Tensor, num_heads: int) -> Tensor:
    """Queries, keys and values for `attend`, each of magnitude 1 in every head and pixel: cosine attention.

    The stored rows of each head alternate q, k, v; `attend` takes them as three blocks.
    """
    weight = conv.effective(x.dtype).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    qkv = convolve(x, weight).unflatten(1, (3 * num_heads, -1))
    return normalise(qkv, 2).flatten(1, 2)
