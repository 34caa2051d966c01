"""Network configurations and named sizes; imports no torch, so that listing presets stays fast.

A size is a function of what the data fixes (resolution, image channels, number of classes); everything else about the
architecture is decided inside it. Change a field with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

Embedding = Literal["positional", "fourier"]
Encoder = Literal["standard", "residual"]
Decoder = Literal["standard"]
Resampling = Literal["conv", "resnet"]
DownBlock = Literal[
    "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"
]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"]


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
class UNet2DConfig:
    """The U-Net of diffusers' `UNet2DModel` in all that DDPM and NCSN++ models there use, under its names of blocks.

    Args:
        resolution, in_channels, out_channels, num_classes, dropout, label_dropout, two_times: see `DDPMppConfig`.
        widths: channels of each level, the finest first.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        down_blocks, up_blocks: the kind of each level, the finest first and the coarsest first. "Attn": attention after
            the residual blocks. "Skip": NCSN++'s blocks, which also see the image downsampled, or add up to the image;
            all levels have them or none.
        downsample, upsample: how the "Attn" levels resample, by a convolution or inside a residual block. The others'
            names say it.
        downsample_padding: zeros around the input of a downsampling convolution; with 0 they are right and below only.
        middle, middle_attention: whether there are middle blocks, and attention between them.
        middle_groups: groups of the norm of that attention, 0 for no norm.
        middle_scale: what the middle blocks' sums are divided by.
        head_channels: channels of one attention head; 0 for a single head.
        groups: of every norm; 0 for one to every four channels, 32 at most. The "Skip" levels have their own.
        eps: of every norm.
        embedding: "positional", or "fourier" of the noise as given, which is the logarithm of diffusers' time.
        cosines_first, freq_shift: the order of the positional features, and whether the last frequency is exactly
            1/10000 (1) or one step before it (0).
        emb_channels: width of the embedding, 0 for four times the first level's.
        scale_shift_norm: noise and label scale and shift the second norm (True) or are added before it (False).
        center_input: the network sees 2x - 1.
    Raises:
        ValueError: values that cannot be built.
    """

    kind: ClassVar[str] = "unet2d"

    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    widths: tuple[int, ...] = (128, 256, 256, 256)
    num_blocks: int = 2
    down_blocks: tuple[DownBlock, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_blocks: tuple[UpBlock, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    downsample: Resampling = "conv"
    upsample: Resampling = "conv"
    downsample_padding: int = 1
    middle: bool = True
    middle_attention: bool = True
    middle_groups: int = 32
    middle_scale: float = 1.0
    head_channels: int = 0
    groups: int = 32
    eps: float = 1e-5
    embedding: Embedding = "positional"
    cosines_first: bool = True
    freq_shift: int = 0
    emb_channels: int = 0
    scale_shift_norm: bool = False
    center_input: bool = False
    dropout: float = 0.0
    label_dropout: float = 0.0
    two_times: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_positive(self, "num_blocks")
        levels = len(self.widths)
        if not levels or len(self.down_blocks) != levels or len(self.up_blocks) != levels:
            raise ValueError(
                f"there are {levels} widths, {len(self.down_blocks)} down_blocks and {len(self.up_blocks)} up_blocks"
            )
        if min(self.widths) < 4 or any(width % 2 for width in self.widths):
            raise ValueError(f"widths are even and at least 4, found {self.widths}")
        if self.resolution % 2 ** (levels - 1):
            raise ValueError(f"resolution {self.resolution} cannot be halved {levels - 1} times")
        both: tuple[tuple[str, ...], ...] = (self.down_blocks, self.up_blocks)
        for blocks, choices in zip(both, (DownBlock, UpBlock), strict=True):
            for block in blocks:
                _check_choice("a level's block", block, choices)
            skip = sum("Skip" in block for block in blocks)
            if skip not in (0, levels):
                raise ValueError(f"Skip blocks stand beside others: {', '.join(blocks)}")
            if skip and (self.in_channels, self.out_channels) != (3, 3):
                raise ValueError("Skip blocks are made for images of 3 channels")
        _check_choice("downsample", self.downsample, Resampling)
        _check_choice("upsample", self.upsample, Resampling)
        _check_choice("embedding", self.embedding, Embedding)
        for name in ("downsample_padding", "freq_shift"):
            if getattr(self, name) not in (0, 1):
                raise ValueError(f"{name} is {getattr(self, name)}, not 0 or 1")
        if min(self.middle_groups, self.head_channels, self.groups, self.emb_channels) < 0:
            raise ValueError("middle_groups, head_channels, groups and emb_channels are not negative")
        if not (self.middle_scale > 0 and self.eps > 0):
            raise ValueError(f"middle_scale and eps are positive, found {self.middle_scale} and {self.eps}")
        attended = {
            width
            for blocks, widths in zip(both, (self.widths, self.widths[::-1]), strict=True)
            for block, width in zip(blocks, widths, strict=True)
            if "Attn" in block
        }
        if self.middle and self.middle_attention:
            attended.add(self.widths[-1])
        for width in attended:
            if self.head_channels and width % self.head_channels:
                raise ValueError(f"{width} channels do not split into heads of {self.head_channels}")


@dataclass(frozen=True)
class EDM2Config:
    """The magnitude-preserving U-Net of Karras et al. (2023), arXiv:2312.02696, configuration G.

    Args:
        resolution, in_channels, out_channels, num_classes, dropout, label_dropout, channels, channel_mult, two_times:
            see `DDPMppConfig`.
        noise_channels: number of Fourier features of the noise, 0 for as many as the first level has channels.
        emb_channels: width of the embedding, 0 for that of the widest level.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        attention_resolutions: levels with self-attention, as resolutions. The innermost level always has one more
            attention block, where the decoder begins.
        head_channels: channels of one attention head, or a little more: a layer has as many heads as fit.
        label_balance: share of the label in its sum with the noise, from 0 to 1.
        concat_balance: share of the encoder's features beside the decoder's.
        res_balance, attn_balance: share of the residual branch and of attention in their sums.
        clip_act: activations are held between minus and plus this after every block; 0 for no limit.
    Raises:
        ValueError: values that cannot be built.
    """

    kind: ClassVar[str] = "edm2"

    resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    noise_channels: int = 0
    emb_channels: int = 0
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_channels: int = 64
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0
    dropout: float = 0.0
    label_dropout: float = 0.0
    two_times: bool = False

    def __post_init__(self) -> None:
        _check_inputs(self)
        _check_levels(self)
        _check_positive(self, "head_channels")
        if min(self.noise_channels, self.emb_channels) < 0:
            raise ValueError("noise_channels and emb_channels are not negative")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")
        if not 0 <= self.clip_act < float("inf"):
            raise ValueError(f"clip_act is {self.clip_act}: it is a positive number, or 0 for no limit")
        resolutions = level_resolutions(self.resolution, self.channel_mult)
        for level, resolution in enumerate(resolutions):
            width = self.channels * self.channel_mult[level]
            if resolution in self.attention_resolutions or level == len(resolutions) - 1:
                heads = width // self.head_channels
                if not heads or width % heads:
                    raise ValueError(
                        f"{width} channels at resolution {resolution} do not split into {heads} heads of "
                        f"{self.head_channels} or more"
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


Config = DDPMppConfig | ADMConfig | UNet2DConfig | EDM2Config | MLPConfig


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
    augment_dim = getattr(config, "augment_dim", 0)
    if augment_dim < 0:
        raise ValueError(f"augment_dim is {augment_dim}: 0 means none")
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must lie in [0, 1)")
    if config.label_dropout and not config.num_classes:
        raise ValueError("label_dropout needs labels: num_classes is 0")


def _check_levels(config: DDPMppConfig | ADMConfig | EDM2Config) -> None:
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


def adm_small(resolution: int = 32, channels: int = 3, num_classes: int = 0) -> ADMConfig:
    """ADM with 3 to 7 million parameters (16x16 to 64x64), for training what OpenAI's format and diffusers can hold.

    No level is narrower than 64 channels, since both norm in 32 groups. Attention is only in the middle. Both are told
    250 ln sigma: `--set parameterization.time_input.scale=250`.
    """
    return ADMConfig(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=64,
        channel_mult=(1, 2) if resolution <= 16 else (1, 2, 2) if resolution <= 32 else (1, 2, 2, 2),
        num_blocks=1,
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


def edm2(width: int, dropout: float, resolution: int = 64, channels: int = 3, num_classes: int = 1000) -> EDM2Config:
    """A size of Karras et al. (2023), for ImageNet at 64x64 or for latents of ImageNet at 512x512, of 4 channels."""
    return EDM2Config(
        resolution=resolution,
        in_channels=channels,
        out_channels=channels,
        num_classes=num_classes,
        channels=width,
        attention_resolutions=(resolution // 4, resolution // 8),
        dropout=dropout,
    )


SIZES: dict[str, Callable[[int, int, int], Config]] = {
    "tiny": tiny,
    "small": small,
    "adm-small": adm_small,
    "ddpmpp-cifar10": ddpmpp_cifar10,
    "ncsnpp-cifar10": ncsnpp_cifar10,
    "ddpmpp-ffhq64": ddpmpp_ffhq64,
    "ncsnpp-ffhq64": ncsnpp_ffhq64,
    "adm-imagenet64": adm_imagenet64,
    "adm-lsun256": adm_lsun256,
    "edm2-img64-xs": partial(edm2, 128, 0.0),
    "edm2-img64-s": partial(edm2, 192, 0.0),
    "edm2-img64-m": partial(edm2, 256, 0.1),
    "edm2-img64-l": partial(edm2, 320, 0.1),
    "edm2-img64-xl": partial(edm2, 384, 0.1),
    "edm2-img512-xxs": partial(edm2, 64, 0.0),
    "edm2-img512-xs": partial(edm2, 128, 0.0),
    "edm2-img512-s": partial(edm2, 192, 0.0),
    "edm2-img512-m": partial(edm2, 256, 0.1),
    "edm2-img512-l": partial(edm2, 320, 0.1),
    "edm2-img512-xl": partial(edm2, 384, 0.1),
    "edm2-img512-xxl": partial(edm2, 448, 0.1),
}
