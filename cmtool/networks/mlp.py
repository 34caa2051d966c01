"""MLP: a residual multi-layer perceptron for small vectors, kept as images of one pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cmtool.networks.chance import drop
from cmtool.networks.configs import MLPConfig
from cmtool.networks.layers import Linear, MapGap, look_up, prepare, unit_features
from cmtool.networks.recomputed import Recomputed


class MLP(nn.Module):
    """The residual perceptron; see `MLPConfig`. Smooth everywhere, so that it has derivatives of all orders."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, config.resolution**2

        self.map_label = nn.Embedding(config.num_classes, width) if config.num_classes else None
        self.map_augment = Linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        self.map_gap = MapGap(width, width) if config.two_times else None
        self.map_layer0 = Linear(width, width)
        self.map_layer1 = Linear(width, width)

        self.enter = Linear(config.in_channels * pixels, width)
        self.blocks = nn.ModuleList([Block(width, config.dropout) for _ in range(config.depth)])
        self.leave = Linear(width, config.out_channels * pixels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None, gap: Tensor) -> Tensor:
        """Everything that is not the vector, as one vector: [B, width]."""
        emb = unit_features(noise, self.config.width)
        if self.map_label is not None:
            hidden = self.config.label_dropout if self.training else 0.0
            emb = emb + look_up(self.map_label.weight.to(emb.dtype), labels, emb.shape[0], hidden)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        if self.map_gap is not None:
            emb = emb + self.map_gap(gap)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

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
            x: [B, in_channels, resolution, resolution]; its type is the type computed in.
            noise: what the network is told about the noise level, [B], float32, of order one.
            labels: [B] whole numbers, negative for no label; None for no labels at all.
            augment: [B, augment_dim], or None for zeros.
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
            augment_dim=config.augment_dim,
            two_times=config.two_times,
        )
        emb = self.embed(noise, labels, augment, gap).to(x.dtype)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.leave(F.silu(h)).unflatten(1, (config.out_channels, config.resolution, config.resolution))


class Block(Recomputed):
    """Residual block whose hidden layer the embedding scales and shifts.

    The scale is what makes it sharp: between two modes of the data the slope of a denoiser grows like 1 / sigma. There
    is no norm, because inputs are of order one as they come and their length matters.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer0 = Linear(width, width)
        self.affine = Linear(width, 2 * width)
        self.layer1 = Linear(width, width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.affine(emb).chunk(2, dim=1)
        h = F.silu(self.layer0(x) * (1 + scale) + shift)
        return x + self.layer1(drop(h, self.dropout if self.training else 0.0))
