"""The JAX models of Song et al. (2023), arXiv:2303.01469, for CIFAR-10: openai/consistency_models_cifar10, Apache-2.0.

A file is the whole state of a training run as flax writes it, usually called `checkpoint_80` or alike. Taken from it
are the averaged weights, `params_ema`, which all published numbers are of; the rest is passed over unread.

The network is the NCSN++ of Song et al. (2021), arXiv:2011.13456: our DDPM++ with Fourier features and a residual
encoder. flax names a layer by its class and how many of the class came before it in the same module, stores kernels as
[height, width, in, out], and has queries, keys and values as three layers where ours are rows that alternate. Neither
the resolution nor which levels have attention stands in the names and shapes, if all levels have one width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, count
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import ModelCard, Role
from cmtool.flow.parameterization import EDM, BoundaryEDM, LogRatio
from cmtool.flow.path import VE
from cmtool.io import msgpack
from cmtool.io.catalogue import RELEASED
from cmtool.io.imported import Imported, other_role
from cmtool.networks.configs import DDPMppConfig, level_resolutions, ncsnpp_cifar10
from cmtool.times import Karras

# What all released models share and their weights do not tell.
RESOLUTION = 32
MAX_LEVELS = 6  # from there down to 1x1
ATTENTION = 16
GRID_POINTS = 18
SECOND_STEP = 11  # index in that grid of the published second time point of consistency distillation

BLOCK, ATTENTION_BLOCK, PYRAMID = "ResnetBlockBigGANpp", "AttnBlockpp", "Downsample"
FLOATS = ("float16", "bfloat16", "float32", "float64")


def read(path: Path, role: Role | None = None, assume: Role | None = None) -> Imported:
    """The model of a file.

    Args:
        path: the file; its name and those of the two folders around it may tell what it is (`cd-l2/checkpoints/...`).
        role: what is needed. assume: what to take it for if neither a name nor `role` tells.
    Raises:
        CheckpointError: damaged files, other networks, a role that is not told anywhere, or another than a name tells.
    """
    file = str(path)
    state = msgpack.read(path)
    params = Params(_averaged(state, file), file)
    config, notes = infer(params)
    told, method = told_by_name(path)
    if told is not None and role not in (None, told) and _is_released(path):
        raise other_role(file, told, role)
    found = role or told or assume
    if found is None:
        raise CheckpointError(
            f"{file} does not tell whether it is a diffusion or a consistency model, nor does its name",
            "add --role denoiser or --role consistency",
        )
    if found == "flow_map":
        raise other_role(file, "consistency", found)
    noising, told_time = VE(), LogRatio(0.25)
    grid = Karras().times(noising, GRID_POINTS)
    released = config == _released()
    rate = _scalar(state.get("ema_rate"))
    card = ModelCard(
        role=found,
        resolution=config.resolution,
        channels=config.in_channels,
        grid_points=GRID_POINTS,
        grid_rho=noising.rho,
        times={"2": tuple(grid[[0, SECOND_STEP]].tolist())} if found == "consistency" and method == "cd" else {},
        iterations=int(_scalar(state.get("step"))),
        average=f"params_ema ({rate:g})" if 0 < rate < 1 else "params_ema",
        data="CIFAR-10" if released else "",
        licence="Apache-2.0",
        source=f"OpenAI consistency models for CIFAR-10 (JAX), {path.name}",
        notes=tuple(notes),
    )
    form = EDM(time_input=told_time) if found == "denoiser" else BoundaryEDM(time_input=told_time)
    return Imported(config, noising, form, card, weights(params, config), "jax", file)


def _is_released(path: Path) -> bool:
    """Whether the file, or one of the two folders around it, is called like a released one."""
    runs = {PurePath(entry.file).name.split("-checkpoint_")[0] for entry in RELEASED.values() if entry.family == "jcm"}
    return any(name.lower().split("-checkpoint_")[0] in runs for name in path.absolute().parts[:-4:-1])


def told_by_name(path: Path) -> tuple[Role | None, str]:
    """The role that the name of the file, or else of one of the two folders around it, tells, and the method."""
    for name in path.absolute().parts[:-4:-1]:
        words = set(re.split(r"[^a-z0-9]+", name.lower()))
        student = next((word for word in ("cd", "ct", "continuous") if word in words), "")
        if student and "edm" not in words:
            return "consistency", "continuous" if "continuous" in words else student
        if "edm" in words and not student:
            return "denoiser", "edm"
    return None, ""


class Params:
    """flax's parameters under names like `AttnBlockpp_0/NIN_2/W`, each of which is to be taken once.

    Raises:
        CheckpointError: from all methods, for what is missing or has another type or number of dimensions.
    """

    def __init__(self, tree: Mapping[str, Any], file: str) -> None:
        self.file = file
        self.arrays = dict(self._flat(tree, ""))

    def _flat(self, tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, msgpack.Array]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from self._flat(value, f"{prefix}{name}/")
            elif isinstance(value, msgpack.Array) and value.dtype in FLOATS:
                yield f"{prefix}{name}", value
            else:
                what = value.dtype if isinstance(value, msgpack.Array) else type(value).__name__
                raise self.error(f"the parameter {prefix}{name} is {what}, not an array of floating-point numbers")

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file} does not hold the NCSN++ of the released models: {problem}",
            "known are the files of openai/consistency_models_cifar10",
        )

    def modules(self, kind: str) -> int:
        """How many modules of a class the network has."""
        return len({name.split("/")[0] for name in self.arrays if name.startswith(f"{kind}_")})

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.arrays:
            raise self.error(f"{name} is missing")
        shape = self.arrays[name].shape
        if len(shape) != dimensions or not all(shape):
            raise self.error(f"{name} has shape {shape}")
        return shape

    def take(self, name: str, dimensions: int) -> np.ndarray:
        """The values, still in the file."""
        self.shape(name, dimensions)
        return self.arrays.pop(name).numpy()


def infer(params: Params) -> tuple[DDPMppConfig, list[str]]:
    """The network that has parameters of these names and shapes, and what had to be guessed.

    Raises:
        CheckpointError: the parameters of another network.
    """
    in_channels, channels = params.shape("Conv_0/kernel", 4)[2:]
    out_channels = params.shape("Conv_1/kernel", 4)[3]
    if out_channels != in_channels:  # a denoiser and a consistency model in one
        raise params.error(f"{out_channels} channels come out of it, and {in_channels} go in")
    frequencies = params.shape("GaussianFourierProjection_0/W", 1)[0]
    noise_channels, emb_channels = params.shape("Dense_0/kernel", 2)
    levels = 1 + params.modules(PYRAMID)
    blocks = params.modules(BLOCK)
    # A level has n blocks in the encoder and n + 1 in the decoder; there is one block down and one up between two
    # levels, and there are two in the middle: 2 n + 3 blocks a level.
    num_blocks, rest = divmod(blocks, levels)
    if not 2 <= levels <= MAX_LEVELS or rest or num_blocks < 5 or num_blocks % 2 == 0:
        raise params.error(f"it has {blocks} residual blocks on {levels} levels")
    num_blocks = (num_blocks - 3) // 2
    widths = [params.shape(f"{BLOCK}_{level * (num_blocks + 1)}/Conv_0/kernel", 4)[3] for level in range(levels)]
    if noise_channels != 2 * frequencies or any(width % channels for width in (*widths, noise_channels, emb_channels)):
        raise params.error(f"the widths {(noise_channels, emb_channels, *widths)} are no multiples of {channels}")
    try:
        resolutions = level_resolutions(RESOLUTION, tuple(widths))
        config = DDPMppConfig(
            resolution=RESOLUTION,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            channel_mult=tuple(width // channels for width in widths),
            channel_mult_emb=emb_channels // channels,
            channel_mult_noise=noise_channels // channels,
            num_blocks=num_blocks,
            attention_resolutions=_attention(params, widths, num_blocks, resolutions),
            embedding="fourier",
            encoder="residual",
            resample_filter=(1, 3, 3, 1),
        )
    except ValueError as error:
        raise params.error(str(error)) from error
    if config == _released():
        return config, []
    return config, [f"the resolution {RESOLUTION} is a guess: the weights do not tell (that of CIFAR-10)"]


def _attention(params: Params, widths: list[int], num_blocks: int, resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """The resolutions with attention: the levels whose widths are those of the attention blocks, in their order.

    Where several choices of levels would do, it is the released one, 16x16.
    """
    found = [params.shape(f"{ATTENTION_BLOCK}_{i}/NIN_0/W", 2)[0] for i in range(params.modules(ATTENTION_BLOCK))]
    # One block in the middle; a level has one for each block of the encoder, and one in the decoder.
    number, rest = divmod(len(found) - 1, num_blocks + 1)
    choices = [
        tuple(resolutions[level] for level in chosen)
        for chosen in combinations(range(len(widths)), max(number, 0))
        if found
        == [
            *(widths[level] for level in chosen for _ in range(num_blocks)),
            widths[-1],
            *(widths[level] for level in reversed(chosen)),
        ]
    ]
    if rest or not choices:
        raise params.error(f"it has {len(found)} attention blocks, of the widths {found[:20]}")
    if len(choices) > 1 and (ATTENTION,) not in choices:
        raise params.error(f"the shapes do not tell which {number} of its levels have attention")
    return choices[0] if len(choices) == 1 else (ATTENTION,)


def weights(params: Params, config: DDPMppConfig) -> dict[str, Tensor]:
    """The parameters under our names and in our layouts, float32, in memory of their own; all of them are taken.

    Raises:
        CheckpointError: a parameter that is missing or is not part of the network.
    """
    state: dict[str, Tensor] = {}
    blocks, attentions = count(), count()

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = _tensor(params.take(f"{theirs}/scale", 1))
        state[f"{ours}.bias"] = _tensor(params.take(f"{theirs}/bias", 1))

    def dense(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = _tensor(params.take(f"{theirs}/kernel", 2).T)
        state[f"{ours}.bias"] = _tensor(params.take(f"{theirs}/bias", 1))

    def conv(ours: str, theirs: str, kernel: str = "kernel") -> None:
        # In memory [out, height, width, in]: what torch calls channels-last.
        values = params.take(f"{theirs}/{kernel}", 4).transpose(3, 0, 1, 2)
        state[f"{ours}.weight"] = _tensor(values).permute(0, 3, 1, 2)
        state[f"{ours}.bias"] = _tensor(params.take(f"{theirs}/bias", 1))

    def per_pixel(ours: str, *theirs: str) -> None:
        """Linear maps of each pixel as one 1x1 convolution, whose rows are those of the maps in turn."""
        for part, dimensions in (("W", 2), ("b", 1)):
            if len({params.shape(f"{name}/{part}", dimensions) for name in theirs}) > 1:
                raise params.error(f"{theirs[0]}/{part} and those after it differ in shape")
        rows = np.stack([params.take(f"{name}/W", 2).T for name in theirs], axis=1)
        biases = np.stack([params.take(f"{name}/b", 1) for name in theirs], axis=1)
        state[f"{ours}.weight"] = _tensor(rows).flatten(0, 1)[:, :, None, None]
        state[f"{ours}.bias"] = _tensor(biases).flatten()

    def block(ours: str, *, attention: bool = False) -> None:
        theirs = f"{BLOCK}_{next(blocks)}"
        norm(f"{ours}.norm0", f"{theirs}/GroupNorm_0")
        conv(f"{ours}.conv0", f"{theirs}/Conv_0")
        dense(f"{ours}.affine", f"{theirs}/Dense_0")
        norm(f"{ours}.norm1", f"{theirs}/GroupNorm_1")
        conv(f"{ours}.conv1", f"{theirs}/Conv_1")
        if f"{theirs}/Conv_2/kernel" in params.arrays:
            conv(f"{ours}.skip", f"{theirs}/Conv_2")
        if attention:
            theirs = f"{ATTENTION_BLOCK}_{next(attentions)}"
            norm(f"{ours}.norm2", f"{theirs}/GroupNorm_0")
            per_pixel(f"{ours}.qkv", *(f"{theirs}/NIN_{index}" for index in range(3)))
            per_pixel(f"{ours}.proj", f"{theirs}/NIN_3")

    # The order is that in which flax comes by the blocks, which is what numbers them.
    state["map_noise.freqs"] = _tensor(params.take("GaussianFourierProjection_0/W", 1))
    dense("map_layer0", "Dense_0")
    dense("map_layer1", "Dense_1")
    resolutions = level_resolutions(config.resolution, config.channel_mult)
    levels = [(f"{resolution}x{resolution}", resolution in config.attention_resolutions) for resolution in resolutions]
    conv(f"enc.{levels[0][0]}_conv", "Conv_0")
    for level, (name, attention) in enumerate(levels):
        if level > 0:
            block(f"enc.{name}_down")
            conv(f"enc.{name}_aux_residual", f"{PYRAMID}_{level - 1}/Conv2d_0", "weight")
        for index in range(config.num_blocks):
            block(f"enc.{name}_block{index}", attention=attention)
    for level, (name, attention) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            block(f"dec.{name}_in0", attention=True)
            block(f"dec.{name}_in1")
        else:
            block(f"dec.{name}_up")
        for index in range(config.num_blocks + 1):
            block(f"dec.{name}_block{index}", attention=attention and index == config.num_blocks)
    norm(f"dec.{levels[0][0]}_aux_norm", "GroupNorm_0")
    conv(f"dec.{levels[0][0]}_aux_conv", "Conv_1")
    if params.arrays:
        more = f" (and {len(params.arrays) - 1} more)" if len(params.arrays) > 1 else ""
        raise params.error(f"{min(params.arrays)} is not part of it{more}")
    return state


def _tensor(values: np.ndarray) -> Tensor:
    """A copy in float32; values beyond its range become infinite, which `assemble` refuses."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))


def _averaged(state: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    params = state.get("params_ema")
    if not isinstance(params, dict):
        some = ", ".join(sorted(state)[:5])
        raise CheckpointError(
            f"{file} was written by flax, and holds no averaged weights params_ema but {some or 'nothing'}",
            "known are the files of openai/consistency_models_cifar10",
        )
    return params


def _scalar(value: Any) -> float:
    """A number of the state, which may be stored as an array; 0 if it is none."""
    if isinstance(value, msgpack.Array):
        value = value.numpy().item() if value.shape == () else None
    number = float(value) if isinstance(value, (int, float, np.integer, np.floating)) else 0.0
    return number if 0 <= number < 2**53 else 0.0


def _released() -> DDPMppConfig:
    """The network of all released models, as the weights tell it."""
    return replace(ncsnpp_cifar10(), augment_dim=0, dropout=0.0)
