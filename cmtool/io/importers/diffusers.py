"""Folders of diffusers: `UNet2DModel` with the config of its scheduler, which says what the network was trained to be.

A network that our ADM is exactly becomes an ADM under OpenAI's names, so that it can be written in OpenAI's and
diffusers' formats alike; every other one becomes a `UNet2D`, whose names are diffusers' own. What the schedulers stand
for is written down in `_told`. Pipelines in a latent space or with text are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cmtool import networks
from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import ModelCard, Role
from cmtool.flow.parameterization import (
    EDM,
    AnyParameterization,
    BoundaryEDM,
    Epsilon,
    LogRatio,
    PathTime,
    Sample,
    VPrediction,
)
from cmtool.flow.path import VE, VP, AnyPath, Betas
from cmtool.io import checkpoint
from cmtool.io.imported import Imported, blank, check_fit, other_role
from cmtool.networks.configs import ADMConfig, DownBlock, Resampling, UNet2DConfig, UpBlock, level_resolutions

CLASS = "UNet2DModel"
WEIGHTS = "diffusion_pytorch_model"
SCHEDULER = "scheduler_config.json"
CONSISTENCY = "CMStochasticIterativeScheduler"
MAX_JSON = 16 * 2**20  # bytes; an index of the weights is the longest there is
MAX_RESOLUTION = 8192

# Schedulers of a discrete noise schedule, and those whose first and last beta are others where the config has none.
_LATENT = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
DISCRETE = {
    f"{name}Scheduler": (0.00085, 0.012) if name in _LATENT else (1e-4, 0.02)
    for name in (
        *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "DDIMInverse", "PNDM", "DEISMultistep", "UniPCMultistep"),
        *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "SASolver"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "RePaint"),
        *_LATENT,
    )
}
LICENCES = {"mit": "MIT", "apache-2.0": "Apache-2.0", "cc0-1.0": "CC0-1.0", "bsd-3-clause": "BSD-3-Clause"}


def looks_like(folder: Path) -> bool:
    """Whether a folder is diffusers': it has an index of a pipeline, or the config of a model with a class name."""
    if (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file():
        return True
    if _weights(folder):
        return True
    try:
        return "_class_name" in _json(folder / "config.json")
    except CheckpointError:
        return False


def read(folder: Path, role: Role | None = None, assume: Role | None = None) -> Imported:
    """The model in a pipeline's folder, or in that of a `UNet2DModel` alone.

    Args:
        role: what is needed; where no scheduler tells, also what it is read as.
        assume: what to read it as where neither a scheduler nor `role` tells.
    Raises:
        CheckpointError: other models than `UNet2DModel`, schedulers and options that have no equal here, damaged
            files, another role than needed.
    """
    place = _unet_folder(folder)
    config = parse_config(_json(place / "config.json"), str(place / "config.json"))
    told = _told(folder, config, role or assume)
    if role not in (None, told.role):
        raise other_role(str(folder), told.role, role)
    name = _name(folder)
    notes = list(told.notes)

    state = _modern(_tensors(place, notes))
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{place}: {key} is {tensor.dtype}, no real numbers", "get the folder again")
    check_fit(blank(config, str(place), len(state)), state, str(place))
    if config.out_channels == 2 * config.in_channels and isinstance(told.path, VP):
        config = replace(config, out_channels=config.in_channels)
        for part in ("conv_out.weight", "conv_out.bias"):
            state[part] = state[part][: config.in_channels].clone()
        notes.append("the network also predicts a variance, which is left out")
    if config.out_channels != config.in_channels:
        raise CheckpointError(
            f"{place} takes images of {config.in_channels} channels and gives {config.out_channels}",
            "only networks that predict an image of the same size are read",
        )
    if told.negate:
        for part in ("conv_out.weight", "conv_out.bias"):
            state[part] = -state[part]
    if told.centred:
        config = replace(config, center_input=False)
    times = _published(name, told, notes)
    adm = adm_of(config)
    if adm is not None:
        state = to_openai(state, adm)
    card = ModelCard(
        role=told.role,
        resolution=config.resolution,
        channels=config.in_channels,
        num_classes=config.num_classes,
        grid_points=told.grid_points,
        grid_rho=told.grid_rho,
        times=times,
        licence=_licence(folder),
        source=f"diffusers, {name}",
        notes=tuple(notes),
    )
    return Imported(adm or config, told.path, told.form, card, state, "diffusers", str(folder))


# --- what the scheduler says ------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What the config of a scheduler says of the network."""

    role: Role
    path: AnyPath
    form: AnyParameterization
    grid_points: int = 18
    grid_rho: float = 7.0
    negate: bool = False  # the network predicts minus what the form says
    centred: bool = False  # the network's 2x - 1 is the map from the scheduler's images to ours
    notes: tuple[str, ...] = ()


def _told(folder: Path, config: UNet2DConfig, wanted: Role | None) -> Told:
    places = (folder / "scheduler" / SCHEDULER, folder / SCHEDULER)
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        return _untold(folder, config, wanted)
    fields = Fields(_json(place), str(place))
    name = fields.get("_class_name", str, "")
    try:
        if name in ("ScoreSdeVeScheduler", "KarrasVeScheduler"):
            return _score(name, fields, config)
        if config.embedding == "fourier":
            raise CheckpointError(
                f"{folder} has a Fourier embedding of the time and a {name}, which is no time it can take",
                "such networks go with a ScoreSdeVeScheduler",
            )
        if name == CONSISTENCY:
            return _consistency(fields)
        if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
            return _edm(fields)
        if name in DISCRETE:
            return _discrete(name, fields)
    except ValueError as error:
        raise CheckpointError(f"{place} describes no noise schedule: {error}", "get the file again") from error
    raise CheckpointError(
        f"{place} is of a {name or 'scheduler without a name'}, which cmtool does not know",
        f"known are {CONSISTENCY}, DDPM's and its relatives, EDM's and ScoreSdeVe",
    )


def _untold(folder: Path, config: UNet2DConfig, wanted: Role | None) -> Told:
    hint = "name the folder of the whole pipeline" if folder.name == "unet" else f"put {SCHEDULER} beside it"
    if wanted == "consistency" and config.embedding == "positional":
        note = "without a scheduler it is read as OpenAI's consistency models are: sigma 0.002 to 80, told 250 ln sigma"
        return Told("consistency", VE(), BoundaryEDM(time_input=LogRatio(250.0)), 40, notes=(note,))
    if wanted is None:
        raise CheckpointError(
            f"{folder} has no {SCHEDULER}, which tells what the network was trained to be",
            f"{hint}, or add --role consistency",
        )
    raise CheckpointError(
        f"{folder} has no {SCHEDULER}, which tells how its images were noised and what it predicts",
        f'{hint}; {{"_class_name": "DDPMScheduler"}} is the schedule of DDPM with noise predicted',
    )


def _consistency(fields: Fields) -> Told:
    """f = c_skip x + c_out F with the boundary at sigma_min, told 250 ln sigma."""
    notes = []
    points = fields.get("num_train_timesteps", int, 40)
    if not 2 <= points <= 100_000:
        raise ValueError(f"num_train_timesteps is {points}")
    if fields.get("s_noise", float, 1.0) != 1:
        notes.append(f"its scheduler renoises with noise of size {fields.get('s_noise', float, 1.0):g}; here it is 1")
    if not fields.get("clip_denoised", bool, True):
        notes.append("its scheduler does not clip images on the way; sample it with --no-clip")
    path = VE(fields.get("sigma_min", float, 0.002), fields.get("sigma_max", float, 80.0))
    data, rho = fields.positive("sigma_data", 0.5), fields.positive("rho", 7.0)
    return Told("consistency", path, BoundaryEDM(data, LogRatio(250.0)), points, rho, notes=tuple(notes))


def _edm(fields: Fields) -> Told:
    """Karras et al.'s preconditioning, told ln(sigma) / 4; "v_prediction" there is minus its F."""
    path = VE(fields.get("sigma_min", float, 0.002), fields.get("sigma_max", float, 80.0))
    form = EDM(fields.positive("sigma_data", 0.5), LogRatio(0.25))
    kind = fields.get("prediction_type", str, "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise CheckpointError(f"{fields.file}: there is no prediction_type {kind!r}", "epsilon or v_prediction")
    notes = ("the sign of the last layer is turned: the network predicted v",) if kind == "v_prediction" else ()
    return Told(
        "denoiser", path, form, grid_rho=fields.positive("rho", 7.0), negate=kind == "v_prediction", notes=notes
    )


def _discrete(name: str, fields: Fields) -> Told:
    """Steps of DDPM; the network is told the step, also where the scheduler walks on sigma / alpha."""
    start, end = DISCRETE[name]
    steps = fields.get("num_train_timesteps", int, 1000)
    betas = fields.get("beta_schedule", str, "linear")
    table = fields.numbers("trained_betas")
    start, end = fields.get("beta_start", float, start), fields.get("beta_end", float, end)
    if not 2 <= steps <= 100_000:
        raise ValueError(f"num_train_timesteps is {steps}")
    if not table and betas == "sigmoid":
        slope = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        table = tuple((start + slope * (end - start)).tolist())
    elif not table and betas not in get_args(Betas):
        raise CheckpointError(
            f"{fields.file}: cmtool does not know the beta_schedule {betas!r}",
            f"known are {', '.join(get_args(Betas))} and sigmoid, or a table trained_betas",
        )
    if fields.get("use_flow_sigmas", bool, False) or fields.get("timestep_type", str, "discrete") != "discrete":
        raise CheckpointError(
            f"{fields.file}: networks told something else than a step are not read from a {name}", "no other way yet"
        )
    path = VP(
        t_max=steps - 1.0,
        betas=betas if not table else "linear",
        beta_start=start if not table else VP.beta_start,
        beta_end=end if not table else VP.beta_end,
        num_steps=steps,
        table=table,
        zero_snr=fields.get("rescale_betas_zero_snr", bool, False),
    )
    forms: dict[str, AnyParameterization] = {
        "epsilon": Epsilon(time_input=PathTime()),
        "v_prediction": VPrediction(),
        "sample": Sample(),
    }
    kind = fields.get("prediction_type", str, "epsilon")
    if kind not in forms:
        raise CheckpointError(
            f"{fields.file}: cmtool does not know the prediction_type {kind!r}", f"known are {', '.join(forms)}"
        )
    return Told("denoiser", path, forms[kind], steps, path.rho)


def _score(name: str, fields: Fields, config: UNet2DConfig) -> Told:
    """NCSN++ of Song et al. (2021): F / sigma is the score of images in [0, 1].

    With y in [0, 1] at noise level s, the network sees 2y - 1, is told ln s and gives s times the score: the estimate
    is y + s^2 score = y + s F. In our images x = 2y - 1, at sigma = 2s, that is D = x + sigma F, told ln(sigma / 2).
    The pipeline of KarrasVeScheduler runs the same networks; its noise levels are of images in [-1, 1].
    """
    if config.embedding != "fourier" or not config.center_input:
        raise CheckpointError(
            f"{fields.file}: a {name} is read with networks that have time_embedding_type fourier and "
            "center_input_sample, as NCSN++ has them",
            "no other way yet",
        )
    if name == "ScoreSdeVeScheduler":
        low, high = fields.get("sigma_min", float, 0.01), fields.get("sigma_max", float, 1348.0)
        path = VE(2 * low, 2 * high)
    else:
        path = VE(fields.get("sigma_min", float, 0.02), fields.get("sigma_max", float, 100.0))
    form = Epsilon(sign=-1.0, unit_input=False, time_input=LogRatio(1.0, unit=2.0))
    return Told("denoiser", path, form, centred=True)


def _published(name: str, told: Told, notes: list[str]) -> dict[str, tuple[float, ...]]:
    """The published time points of a released consistency model, known by the folder's name."""
    from cmtool.io.catalogue import RELEASED

    if told.role != "consistency":
        return {}
    for known, released in RELEASED.items():
        found = re.search(rf"(?<![a-z0-9]){re.escape(known)}(?![a-z0-9_])", name.lower())
        if found and released.family == "openai" and (released.grid_points, VE()) == (told.grid_points, told.path):
            sigmas = released.sigmas()
            if sigmas:
                notes.append(f"recommended times are those published for {known}, known by the folder's name")
                return {str(len(sigmas)): sigmas}
    return {}


# --- the network's config ---------------------------------------------------------------------------------------------


class Fields:
    """The values of a JSON object, each checked for its type when it is asked for."""

    def __init__(self, raw: Mapping[str, Any], file: str) -> None:
        self.raw = raw
        self.file = file

    def get(self, name: str, kind: type, default: Any, *, optional: bool = False) -> Any:
        """The value, or the default where there is none; null is a value if `optional` or the default says so."""
        value = self.raw.get(name, default)
        if value is None and (optional or default is None):
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if not fits or (kind is float and not math.isfinite(value)):
            raise self.wrong(name, value)
        return value

    def positive(self, name: str, default: float) -> float:
        value: float = self.get(name, float, default)
        if value <= 0:
            raise self.wrong(name, value)
        return value

    def items(self, name: str, kind: type, default: tuple[Any, ...]) -> tuple[Any, ...]:
        value = self.raw.get(name, list(default))
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.wrong(name, value)
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is float for item in value):
            raise self.wrong(name, value)
        return tuple(value)

    def wrong(self, name: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} is {str(value)[:60]}, which makes no sense", "get the file again")


def parse_config(raw: Mapping[str, Any], file: str) -> UNet2DConfig:
    """The config of a `UNet2DModel`, its own defaults where fields are missing.

    Raises:
        CheckpointError: another class, values that make no sense, options that `UNet2D` does not have.
    """
    fields = Fields(raw, file)
    name = fields.get("_class_name", str, "")
    if name != CLASS:
        raise CheckpointError(
            f"{file} is of a {name or 'model without a class name'}, and of diffusers' models cmtool reads {CLASS}",
            "text-to-image and latent pipelines are out of scope",
        )

    def only(option: str, value: object, *allowed: object) -> None:
        if value not in allowed:
            raise CheckpointError(
                f"{file}: cmtool has no {option} {value!r}", f"it reads {', '.join(map(repr, allowed))}"
            )

    only("act_fn", fields.get("act_fn", str, "silu"), "silu", "swish")
    only("class_embed_type", fields.get("class_embed_type", str, None), None)
    kind = fields.get("mid_block_type", str, "UNetMidBlock2D", optional=True)
    only("mid_block_type", kind, "UNetMidBlock2D", None)
    middle = kind is not None
    shift = fields.get("resnet_time_scale_shift", str, "default")
    only("resnet_time_scale_shift", shift, "default", "scale_shift")
    freq_shift = fields.get("freq_shift", float, 0.0)
    only("freq_shift", freq_shift, 0.0, 1.0)
    widths = fields.items("block_out_channels", int, (224, 448, 672, 896))
    groups = fields.get("norm_num_groups", int, 32, optional=True)
    # without a number of its own the middle attention has the network's, or with scale and shift no norm at all
    quarter = min(widths[-1] // 4, 32) if widths else 0
    own = 0 if shift == "scale_shift" else quarter if groups is None else groups
    middle_groups = fields.get("attn_norm_num_groups", int, None)
    middle_attention = fields.get("add_attention", bool, True)
    head = fields.get("attention_head_dim", int, 8, optional=True)
    if 0 in (groups, head, middle_groups):
        raise CheckpointError(f"{file}: a number of groups or head channels is 0", "get the file again")

    def blocks(option: str, default: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(block.removeprefix("UNetRes") for block in fields.items(option, str, default))

    attn = "AttnDownBlock2D"
    classes = fields.get("num_class_embeds", int, None)
    if classes is not None and classes < 1:
        raise fields.wrong("num_class_embeds", classes)
    try:
        return UNet2DConfig(
            resolution=_resolution(raw, file),
            in_channels=fields.get("in_channels", int, 3),
            out_channels=fields.get("out_channels", int, 3),
            num_classes=classes or 0,
            widths=widths,
            num_blocks=fields.get("layers_per_block", int, 2),
            down_blocks=blocks("down_block_types", ("DownBlock2D", attn, attn, attn)),
            up_blocks=blocks("up_block_types", (*("AttnUpBlock2D",) * 3, "UpBlock2D")),
            downsample=fields.get("downsample_type", str, "conv"),
            upsample=fields.get("upsample_type", str, "conv"),
            downsample_padding=fields.get("downsample_padding", int, 1),
            middle=middle,
            middle_attention=middle_attention if middle else True,
            middle_groups=(own if middle_groups is None else middle_groups) if middle and middle_attention else 32,
            middle_scale=fields.get("mid_block_scale_factor", float, 1.0) if middle else 1.0,
            head_channels=head or 0,
            groups=groups or 0,
            eps=fields.get("norm_eps", float, 1e-5),
            embedding=fields.get("time_embedding_type", str, "positional"),
            cosines_first=fields.get("flip_sin_to_cos", bool, True),
            freq_shift=int(freq_shift),
            emb_channels=fields.get("time_embedding_dim", int, None) or 0,
            scale_shift_norm=shift == "scale_shift",
            center_input=fields.get("center_input_sample", bool, False),
            dropout=fields.get("dropout", float, 0.0),
        )
    except ValueError as error:
        raise CheckpointError(f"{file} describes no network that cmtool has: {error}", "get the file again") from error


def _resolution(raw: Mapping[str, Any], file: str) -> int:
    size = raw.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is None:
        raise CheckpointError(
            f"{file} does not say the size of the images, sample_size", "write it there: the network takes any"
        )
    if type(size) is not int or not 1 <= size <= MAX_RESOLUTION:
        raise CheckpointError(
            f"{file}: sample_size is {str(size)[:60]}, and cmtool's images are square", "get the file again"
        )
    return size


# --- ADM under diffusers' names; also the exporter's ------------------------------------------------------------------


def adm_of(config: UNet2DConfig) -> ADMConfig | None:
    """The ADM that computes the same, if there is one."""
    widths, last = config.widths, len(config.widths) - 1
    attention = ["Attn" in name for name in config.down_blocks]
    resampling = {
        *(_resampling(name, config.downsample) for name in config.down_blocks[:last]),
        *(_resampling(name, config.upsample) for name in config.up_blocks[:last]),
    }
    same = (
        attention == ["Attn" in name for name in reversed(config.up_blocks)]
        and resampling in (set(), {"conv"}, {"resnet"})
        and (config.downsample_padding == 1 or "conv" not in resampling)
        and (config.middle, config.middle_attention, config.middle_scale) == (True, True, 1.0)
        and config.middle_groups == config.groups != 0
        and (config.embedding, config.cosines_first, config.freq_shift) == ("positional", True, 0)
        and config.emb_channels in (0, 4 * widths[0])
        and config.eps == 1e-5
        and not config.center_input
        and not any(width % widths[0] for width in widths)
    )
    if not same:
        return None
    resolutions = level_resolutions(config.resolution, widths)
    try:
        adm = ADMConfig(
            resolution=config.resolution,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_classes=config.num_classes,
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_blocks=config.num_blocks,
            attention_resolutions=tuple(side for side, on in zip(resolutions, attention, strict=True) if on),
            head_channels=config.head_channels,
            scale_shift_norm=config.scale_shift_norm,
            resblock_updown="conv" not in resampling,
            dropout=config.dropout,
            label_dropout=config.label_dropout,
            two_times=config.two_times,
        )
    except ValueError:
        return None
    return adm if _group_counts(adm) == {config.groups} else None


def unet2d_of(config: ADMConfig) -> UNet2DConfig:
    """The `UNet2D` that computes the same.

    Raises:
        ValueError: there is none, and why.
    """
    groups = _group_counts(config)
    if len(groups) > 1:
        raise ValueError(f"its norms have {', '.join(map(str, sorted(groups)))} groups, and there all have as many")
    if config.channel_mult[0] != 1:
        raise ValueError(f"its first level is {config.channel_mult[0]} times as wide as its time embedding")
    widths = tuple(mult * config.channels for mult in config.channel_mult)
    resolutions = level_resolutions(config.resolution, config.channel_mult)
    attention = [side in config.attention_resolutions for side in resolutions]
    head = config.head_channels
    if not head and config.num_heads > 1:
        heads = {width // config.num_heads for width, on in zip(widths, attention, strict=True) if on}
        heads.add(widths[-1] // config.num_heads)
        if len(heads) > 1:
            raise ValueError(f"it has {config.num_heads} attention heads at every width, and there all are as wide")
        (head,) = heads
    how: Resampling = "resnet" if config.resblock_updown else "conv"
    down: DownBlock = "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D"
    up: UpBlock = "ResnetUpsampleBlock2D" if config.resblock_updown else "UpBlock2D"
    (count,) = groups
    return UNet2DConfig(
        resolution=config.resolution,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_classes=config.num_classes,
        widths=widths,
        num_blocks=config.num_blocks,
        down_blocks=tuple("AttnDownBlock2D" if on else down for on in attention),
        up_blocks=tuple("AttnUpBlock2D" if on else up for on in reversed(attention)),
        downsample=how,
        upsample=how,
        middle_groups=count,
        head_channels=head,
        groups=count,
        scale_shift_norm=config.scale_shift_norm,
        dropout=config.dropout,
        label_dropout=config.label_dropout,
        two_times=config.two_times,
    )


def to_openai(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The tensors of diffusers' network under the names and in the layouts of our ADM, which are OpenAI's."""
    out: dict[str, Tensor] = {}
    for ours, theirs in _layers(config):
        for part in ("weight", "bias"):
            names = [f"{name}.{part}" for name in theirs]
            if names[0] in state:
                value = torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
                pixelwise = part == "weight" and ours.endswith((".qkv", ".proj_out"))
                out[f"{ours}.{part}"] = value[:, :, None, None] if pixelwise else value
    return out


def from_openai(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The inverse of `to_openai`."""
    out: dict[str, Tensor] = {}
    for ours, theirs in _layers(config):
        for part in ("weight", "bias"):
            value = state.get(f"{ours}.{part}")
            if value is not None:
                pixelwise = part == "weight" and ours.endswith((".qkv", ".proj_out"))
                value = value[:, :, 0, 0] if pixelwise else value
                for name, rows in zip(theirs, value.chunk(len(theirs)), strict=True):
                    out[f"{name}.{part}"] = rows
    return out


_RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",  # where the width changes
}


def _layers(config: ADMConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every layer of the ADM with the one that it is in diffusers, or the three: queries, keys and values."""

    def block(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for one, other in _RESBLOCK.items():
            yield f"{ours}.{one}", (f"{theirs}.{other}",)

    def attend(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield f"{ours}.norm", (f"{theirs}.group_norm",)
        yield f"{ours}.qkv", tuple(f"{theirs}.to_{name}" for name in "qkv")
        yield f"{ours}.proj_out", (f"{theirs}.to_out.0",)

    def resample(ours: str, theirs: str, conv: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        if config.resblock_updown:
            yield from block(ours, theirs)
        else:
            yield f"{ours}.{conv}", (f"{theirs}.conv",)

    resolutions = level_resolutions(config.resolution, config.channel_mult)
    levels = list(enumerate(side in config.attention_resolutions for side in resolutions))

    yield "time_embed.0", ("time_embedding.linear_1",)
    yield "time_embed.2", ("time_embedding.linear_2",)
    yield "label_emb", ("class_embedding",)
    yield "input_blocks.0.0", ("conv_in",)
    index = 1
    for level, attention in levels:
        for number in range(config.num_blocks):
            yield from block(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{number}")
            if attention:
                yield from attend(f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{number}")
            index += 1
        if level < len(levels) - 1:
            yield from resample(f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", "op")
            index += 1
    yield from block("middle_block.0", "mid_block.resnets.0")
    yield from attend("middle_block.1", "mid_block.attentions.0")
    yield from block("middle_block.2", "mid_block.resnets.1")
    index = 0
    for up, (level, attention) in enumerate(reversed(levels)):
        for number in range(config.num_blocks + 1):
            yield from block(f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{number}")
            if attention:
                yield from attend(f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{number}")
            if level and number == config.num_blocks:
                yield from resample(f"output_blocks.{index}.{1 + attention}", f"up_blocks.{up}.upsamplers.0", "conv")
            index += 1
    yield "out.0", ("conv_norm_out",)
    yield "out.2", ("conv_out",)


def _resampling(name: str, of_attention: str) -> str:
    """How a level resamples: "conv", "resnet", or "skip" for those of NCSN++."""
    return "skip" if "Skip" in name else of_attention if "Attn" in name else "resnet" if "Resnet" in name else "conv"


def _group_counts(config: ADMConfig) -> set[int]:
    with torch.device("meta"):
        network = networks.build(config)
    return {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}


# --- files ------------------------------------------------------------------------------------------------------------


def _unet_folder(folder: Path) -> Path:
    """Where the network's config lies.

    Raises:
        CheckpointError: a pipeline of other parts, or none.
    """
    index = folder / "model_index.json"
    parts = _json(index) if index.is_file() else {}
    for name in ("vae", "vqvae", "text_encoder", "tokenizer", "transformer", "prior", "bert"):
        if name in parts or (folder / name).is_dir():
            raise CheckpointError(
                f"{folder} is a pipeline with a {name}: text-to-image and latent pipelines are out of scope",
                f"cmtool reads pipelines of a {CLASS} and a scheduler, in pixels",
            )
    for place in (folder / "unet", folder):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{folder} has no config.json of a network, neither in unet/ nor beside model_index.json",
        "get the whole folder again",
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: a file that is none.
    """
    try:
        if not path.is_file():  # nor a device without an end
            raise CheckpointError(f"there is no file {path}", "get the folder again")
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise CheckpointError(f"{path} is too long for a config", "get the file again")
        value = json.loads(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON", "get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object but a {type(value).__name__}", "get the file again")
    return value


def _weights(folder: Path) -> Path | None:
    """The file of the weights, or the index of several: full precision before half, safetensors before pickles."""
    names = [
        f"{WEIGHTS}.{ending}"
        for variant in ("", "fp16.")
        for ending in (
            f"{variant}safetensors",
            f"safetensors.index.{variant}json",
            f"{variant}bin",
            f"bin.index.{variant}json",
        )
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _tensors(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    place = _weights(folder)
    if place is None:
        raise CheckpointError(
            f"{folder} has no weights: there is no {WEIGHTS}.safetensors or .bin", "get the whole folder again"
        )
    if ".fp16." in place.name:
        notes.append("the weights are those of half precision: there are no others")
    if place.suffix != ".json":
        return _one(place)
    shards = _json(place).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{place} has no weight_map", "get the file again")
    state: dict[str, Tensor] = {}
    for name in sorted({str(value) for value in shards.values()}):
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):
            raise CheckpointError(f"{place} names a file of weights that is none: {name[:80]!r}", "get the file again")
        part = _one(folder / name)
        twice = state.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{folder} has {min(twice)} in two files", "get the folder again")
        state |= part
    return state


def _one(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no {path}", "get the whole folder again")
    if path.suffix == ".safetensors":
        return checkpoint.read_tensors(path)
    from cmtool.io import torchfile

    return torchfile.read(path)


_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are now: attention was named otherwise, and a Fourier embedding stored twice."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, layer = name.rpartition(".attentions.")
        parts = layer.split(".")
        if head and len(parts) == 3 and parts[1] in _OLD:
            name = f"{head}.attentions.{parts[0]}.{_OLD[parts[1]]}.{parts[2]}"
        elif name == "time_proj.W":
            if "time_proj.weight" in state:
                continue
            name = "time_proj.weight"
        out[name] = tensor
    return out


def _name(folder: Path) -> str:
    """The folder's name, or that of the repository in a cache of the hub."""
    parts = Path(os.path.abspath(folder)).parts
    for part in reversed(parts[-4:]):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return parts[-1]


def _licence(folder: Path) -> str:
    """The licence that the front matter of the model card names; nothing where there is none."""
    try:
        with (folder / "README.md").open("rb") as file:
            lines = file.read(2**16).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        found = re.fullmatch(r"license:\s*[\"']?([\w.+ -]{1,60}?)[\"']?\s*", line)
        if found:
            return LICENCES.get(found[1].lower(), found[1])
    return ""
