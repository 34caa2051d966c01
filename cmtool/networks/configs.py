"""Network configurations and named sizes; imports no torch, so that listing presets stays fast.

A size is a function of what the data fixes (resolution, image channels, number of classes); everything else about the
architecture is decided inside it. Change a field with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

Embedding = Literal["positional", "fourier"]
Encoder = Literal["standard", "residual"]
Decoder = Literal["standard"]


@dataclass(frozen=True)
class DDPMppConfig:
    """DDPM++ and NCSN++ in the form of Karras et al. (2022), arXiv:2206.00364, table 7.

    Args:
        resolution: height and width of the images; halved once between two levels.
        in_channels, out_channels: channels of the input and of the output.
        num_classes: 0 for a network without labels.
        augment_dim: length of the augmentation vector, 0 for none.
        channels: width that `channel_mult` multiplies, one entry a level.
        channel_mult_emb, channel_mult_noise: widths of the embedding and of the noise features, in units of `channels`.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_resolutions: levels with self-attention. The innermost level always has one attention block.
        dropout: inside residual blocks. label_dropout: share of labels hidden in training, for guidance.
        embedding: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder: "standard" (DDPM++) or "residual" (NCSN++: every level sees the downsampled image).
        decoder: "standard" in both.
        resample_filter: taps of the separable filter for resampling by 2; (1, 1) or (1, 3, 3, 1).
        two_times: take a second time input, the gap of a jump.
    Raises:
        ValueError: values that cannot be built.
    """

    kind: ClassVar[str] = "ddpmpp"

    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    augment_dim: int = 0
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    num_blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    label_dropout: float = 0.0
    embedding: Embedding = "positional"
    encoder: Encoder = "standard"
    decoder: Decoder = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    two_times: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_levels(self)
        _check_choice("embedding", self.embedding, Embedding)
        _check_choice("encoder", self.encoder, Encoder)
        _check_choice("decoder", self.decoder, Decoder)
        _check_positive(self, "channel_mult_emb", "channel_mult_noise")
        taps = self.resample_filter
        if len(taps) < 2 or len(taps) % 2 or taps != taps[::-1] or sum(taps) <= 0:
            raise ValueError(f"resample_filter {taps} is not an even number of symmetric taps with a positive sum")


@dataclass(frozen=True)
class ADMConfig:
    """The U-Net of Dhariwal & Nichol (2021), arXiv:2105.05233, as released with Song et al. (2023), arXiv:2303.01469.

    Args:
        resolution, in_channels, out_channels, num_classes, dropout, label_dropout, channels, channel_mult, two_times:
            see `DDPMppConfig`.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_resolutions: levels with self-attention, as resolutions. The middle block always has attention.
        head_channels: channels of one attention head; 0 to give `num_heads` instead.
        num_heads: heads of every attention layer when `head_channels` is 0.
        scale_shift_norm: noise and label scale and shift the second norm (True) or are added before it (False).
        resblock_updown: resample inside residual blocks (True) or by a convolution of its own (False).
        group_channels: fewest channels in one group of a GroupNorm: 1 in OpenAI's code, 4 in Karras et al.'s. Both
            mean 32 groups in every published size.
    Raises:
        ValueError: values that cannot be built.
    """

    kind: ClassVar[str] = "adm"

    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int = 64
    num_heads: int = 1
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    dropout: float = 0.0
    label_dropout: float = 0.0
    group_channels: int = 1
    two_times: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_levels(self)
        _check_positive(self, "group_channels")
        if self.head_channels < 0 or (self.head_channels == 0 and self.num_heads < 1):
            raise ValueError("attention needs head_channels or, with head_channels 0, a positive num_heads")
        resolutions = level_resolutions(self.resolution, self.channel_mult)
        for level, resolution in enumerate(resolutions):
            width = self.channels * self.channel_mult[level]
            if resolution in self.attention_resolutions or level == len(resolutions) - 1:
                if self.head_channels and width % self.head_channels:
                    raise ValueError(
                        f"{width} channels at resolution {resolution} do not split into heads of {self.head_channels}"
                    )
                if not self.head_channels and width % self.num_heads:
                    raise ValueError(
                        f"{width} channels at resolution {resolution} do not split into {self.num_heads} heads"
                    )


@dataclass(frozen=True)
class MLPConfig:
    """A residual multi-layer perceptron for small vectors: toy densities and tests.

    Args:
        resolution, in_channels, out_channels, num_classes, augment_dim, dropout, label_dropout, two_times: see
            `DDPMppConfig`. A vector is an image of one pixel.
        width: of every hidden layer.
        depth: number of residual blocks.
    Raises:
        ValueError: values that cannot be built.
    """

    kind: ClassVar[str] = "mlp"

    resolution: int = 1
    in_channels: int = 2
    out_channels: int = 2
    num_classes: int = 0
    augment_dim: int = 0
    width: int = 128
    depth: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.0
    two_times: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_positive(self, "width", "depth")
        if self.width % 4:
            raise ValueError(f"width is {self.width}: it must be a multiple of 4")

    @property
    def num_blocks(self) -> int:
        """`depth`, under the name it has in the other configurations."""
        return self.depth


Config = DDPMppConfig | ADMConfig | MLPConfig


def level_resolutions(resolution: int, channel_mult: tuple[int, ...]) -> tuple[int, ...]:
    """The resolution of each level, the finest first."""
    return tuple(resolution >> level for level in range(len(channel_mult)))


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(map(repr, get_args(choices)))}")


def _check_positive(config: Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be at least 1")


def _check_inputs(config: Config) -> None:
    _check_positive(config, "resolution", "in_channels", "out_channels")
    if config.num_classes < 0:
        raise ValueError(f"num_classes is {config.num_classes}: 0 means no labels")
    if not isinstance(config, ADMConfig) and config.augment_dim < 0:
        raise ValueError(f"augment_dim is {config.augment_dim}: 0 means none")
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must lie in [0, 1)")
    if config.label_dropout and not config.num_classes:
        raise ValueError("label_dropout needs labels: num_classes is 0")


def _check_levels(config: DDPMppConfig | ADMConfig) -> None:
    _check_positive(config, "channels", "num_blocks")
    if config.channels % 4:
        raise ValueError(f"channels is {config.channels}: it must be a multiple of 4")
    if not config.channel_mult or min(config.channel_mult) < 1:
        raise ValueError(
            f"channel_mult {config.channel_mult} must name at least one level, each with a factor of 1 or more"
        )
    factor = 2 ** (len(config.channel_mult) - 1)
    if config.resolution % factor:
        raise ValueError(
            f"resolution {config.resolution} cannot be halved {len(config.channel_mult) - 1} times: "
            f"{len(config.channel_mult)} levels need a multiple of {factor}"
        )
    reached = level_resolutions(config.resolution, config.channel_mult)
    for resolution in config.attention_resolutions:
        if resolution not in reached:
            raise ValueError(
                f"attention resolution {resolution} is never reached: the levels work at {', '.join(map(str, reached))}"
            )


def tiny(resolution: int = 16, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """DDPM++ with 0.4 million parameters, for tests and for minutes on a laptop.

    `channels` is the number of image channels, here and in every other size.
    """
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=24,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(),
    )


def small(resolution: int = 32, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """DDPM++ with one to three million parameters, for training on a CPU.

    The finest levels are narrow, so that every level costs about the same; attention, which is slow to train on a CPU,
    is only in the middle.
    """
    mult = (1, 2) if resolution <= 16 else (1, 2, 4) if resolution <= 32 else (1, 2, 4, 4)
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=32,
        channel_mult=mult,
        num_blocks=2 if resolution <= 16 else 1,
        attention_resolutions=(),
    )


def ddpmpp_cifar10(resolution: int = 32, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """DDPM++ of Karras et al. (2022) for CIFAR-10 ("vp"), with its augmentation vector; 55.7M parameters."""
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        augment_dim=9,
        channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attention_resolutions=(resolution // 2,),
        dropout=0.13,
    )


def ncsnpp_cifar10(resolution: int = 32, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """NCSN++ of Karras et al. (2022) for CIFAR-10 ("ve"), with its augmentation vector; 56.5M parameters."""
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        augment_dim=9,
        channels=128,
        channel_mult=(2, 2, 2),
        channel_mult_noise=2,
        num_blocks=4,
        attention_resolutions=(resolution // 2,),
        dropout=0.13,
        embedding="fourier",
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )


def ddpmpp_ffhq64(resolution: int = 64, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """DDPM++ of Karras et al. (2022) for FFHQ at 64x64 ("vp"); AFHQv2 differs by dropout 0.25."""
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        augment_dim=9,
        channels=128,
        channel_mult=(1, 2, 2, 2),
        num_blocks=4,
        attention_resolutions=(resolution // 4,),
        dropout=0.05,
    )


def ncsnpp_ffhq64(resolution: int = 64, channels: int = 3, num_classes: int = 0) -> DDPMppConfig:
    """NCSN++ of Karras et al. (2022) for FFHQ at 64x64 ("ve"); AFHQv2 differs by dropout 0.25."""
    return DDPMppConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        augment_dim=9,
        channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_noise=2,
        num_blocks=4,
        attention_resolutions=(resolution // 4,),
        dropout=0.05,
        embedding="fourier",
        encoder="residual",
        resample_filter=(1, 3, 3, 1),
    )


def adm_imagenet64(resolution: int = 64, channels: int = 3, num_classes: int = 1000) -> ADMConfig:
    """ADM of Song et al. (2023) for ImageNet at 64x64, class-conditional; 295.9M parameters."""
    return ADMConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attention_resolutions=(resolution // 2, resolution // 4, resolution // 8),
    )


def adm_lsun256(resolution: int = 256, channels: int = 3, num_classes: int = 0) -> ADMConfig:
    """ADM of Song et al. (2023) for LSUN bedrooms and cats at 256x256."""
    return ADMConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_blocks=2,
        attention_resolutions=(resolution // 8, resolution // 16, resolution // 32),
        scale_shift_norm=False,
    )


SIZES: dict[str, Callable[[int, int, int], Config]] = {
    "tiny": tiny,
    "small": small,
    "ddpmpp-cifar10": ddpmpp_cifar10,
    "ncsnpp-cifar10": ncsnpp_cifar10,
    "ddpmpp-ffhq64": ddpmpp_ffhq64,
    "ncsnpp-ffhq64": ncsnpp_ffhq64,
    "adm-imagenet64": adm_imagenet64,
    "adm-lsun256": adm_lsun256,
}
