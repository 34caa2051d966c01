"""NVlabs' EDM2 networks: the `unet.*` entries of the release's state dicts.

Our EDM2 has the same names and layouts, so all that changes is the prefix; the head that weighs the loss (`logvar_*`)
is no part of the denoiser and is dropped. Names and shapes tell the network but for what has no weights: the width of
attention heads, the balances, the limit on activations and dropout. All released models have the same but for dropout,
which sampling does not use; the release's own keyword arguments, where a file has them, say it exactly.

The preconditioning around the network is that of EDM with sigma_data 0.5 and time input 0.25 ln sigma. Karras et al.
(2023), arXiv:2312.02696; weights under CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.networks import EDM2Config

MARK = "emb_fourier.phases"  # every such network has it, with or without the prefix, and no other
PREFIX = "unet."
LOSS_HEAD = "logvar_"
LEVEL = re.compile(r"enc\.([0-9]{1,6})x\1_block0\.conv_res1\.weight")
# the release's keyword argument -> our field
OPTIONS = {
    "channels_per_head": "head_channels",
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "res_balance",
    "attn_balance": "attn_balance",
    "clip_act": "clip_act",
    "dropout": "dropout",
}


def read_state(
    state: dict[str, Tensor], file: str, options: Mapping[str, Any] | None = None
) -> tuple[EDM2Config, dict[str, Tensor]]:
    """The network of a state dict, and its weights under our names.

    Args:
        state: the release's names, with or without the prefix; tensors may be on the meta device.
        file: where it came from, for messages.
        options: keyword arguments that the release's network was made with. What shapes tell is taken from the shapes.
    Raises:
        CheckpointError: no such network.
    """
    try:
        return convert(state, options)
    except ValueError as error:
        raise CheckpointError(f"{file} holds no EDM2 network: {error}", "get the file again") from error


def convert(
    state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None
) -> tuple[EDM2Config, dict[str, Tensor]]:
    """As `read_state`.

    Raises:
        ValueError: no such network.
    """
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if not name.startswith(LOSS_HEAD)}
    return infer(weights, options), weights


def infer(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> EDM2Config:
    """The network that has tensors of these names and shapes; arguments and errors as `convert`."""
    shapes = {name.removeprefix(PREFIX): tuple(value.shape) for name, value in state.items()}

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"{name} is missing")
        if len(shapes[name]) != rank or not all(shapes[name]):
            raise ValueError(f"{name} has shape {shapes[name]}")
        return shapes[name]

    shape(MARK, 1)
    resolutions = sorted((int(found[1]) for found in map(LEVEL.fullmatch, shapes) if found), reverse=True)
    if not resolutions or resolutions != [resolutions[0] >> level for level in range(len(resolutions))]:
        raise ValueError(f"its levels work at {', '.join(map(str, resolutions)) or 'no resolution at all'}")
    levels = [f"enc.{resolution}x{resolution}" for resolution in resolutions]
    widths = [shape(f"{level}_block0.conv_res1.weight", 4)[0] for level in levels]
    channels = math.gcd(*widths)
    num_blocks = 1
    while f"{levels[0]}_block{num_blocks}.conv_res1.weight" in shapes:
        num_blocks += 1
    emb_channels, noise_channels = shape("emb_noise.weight", 2)
    return EDM2Config(
        resolution=resolutions[0],
        in_channels=shape(f"{levels[0]}_conv.weight", 4)[1] - 1,  # one is of ones
        out_channels=shape("out_conv.weight", 4)[0],
        num_classes=shape("emb_label.weight", 2)[1] if "emb_label.weight" in shapes else 0,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        noise_channels=0 if noise_channels == widths[0] else noise_channels,
        emb_channels=0 if emb_channels == max(widths) else emb_channels,
        num_blocks=num_blocks,
        attention_resolutions=tuple(
            resolution
            for resolution, level in zip(resolutions, levels, strict=True)
            if f"{level}_block0.attn_qkv.weight" in shapes
        ),
        **_told(options or {}),
    )


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the release's keyword arguments give."""
    taps = options.get("resample_filter", (1, 1))
    if not isinstance(taps, (list, tuple)) or [_number(tap) for tap in taps] != [1, 1]:
        raise ValueError(f"its resample_filter is {reprlib.repr(taps)}, and only [1, 1] is known")
    fields: dict[str, Any] = {}
    for name, field in OPTIONS.items():
        if name in options:
            value = _number(0 if name == "clip_act" and options[name] is None else options[name])
            if value is None or (field == "head_channels" and value % 1):
                raise ValueError(f"its {name} is {reprlib.repr(options[name])}")
            fields[field] = int(value) if field == "head_channels" else value
    return fields


def _number(value: object) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        return None
    return float(value)
