"""OpenAI's `.pt` files of consistency models: the plain state dict of an ADM U-Net.

Our ADM has the same names and layouts, so nothing is renamed. All but three facts stand in the names and shapes: the
width of attention heads, the resolution (the network is convolutional) and what the model was trained to be, which the
names of the released files tell. Song et al. (2023), arXiv:2303.01469; code and weights under MIT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import ModelCard, Role
from cmtool.flow.parameterization import EDM, BoundaryEDM, LogRatio
from cmtool.flow.path import VE
from cmtool.io.catalogue import RELEASED, Released
from cmtool.io.imported import Imported, other_role
from cmtool.networks import ADMConfig

MARK = "input_blocks.0.0.weight"  # every such network has it, and no other
METHOD = re.compile(r"(?<![a-z])(edm|cd|ct)_")  # how OpenAI's names begin
# (channels, channel_mult) of the released networks -> resolution
RELEASED_SHAPES = {(192, (1, 2, 3, 4)): 64, (256, (1, 1, 2, 2, 4, 4)): 256}
HEADS = (64, 32, 16)  # widths of a head that the original's attention knows


def read(state: dict[str, Tensor], file: str, role: Role | None = None, assume: Role | None = None) -> Imported:
    """The model of a state dict.

    Args:
        state: OpenAI's names; tensors may be on the meta device.
        file: its name, which may tell what it is.
        role: what is needed. assume: what to take it for if neither its name nor `role` tells.
    Raises:
        CheckpointError: no such network, a role that is not told anywhere, or another than the name tells.
    """
    name = PurePath(file).name
    known = _released(name)
    method = METHOD.search(name.lower())
    told: Role | None = None if method is None else "denoiser" if method[1] == "edm" else "consistency"
    if known is not None and role not in (None, known.role):
        raise other_role(file, known.role, role)
    found = role or told or assume
    if found is None:
        raise CheckpointError(
            f"{file} holds an ADM network, and its name does not tell whether it is a diffusion or a consistency model",
            "add --role denoiser or --role consistency",
        )
    if found == "flow_map":
        raise other_role(file, "consistency", found)
    config, notes = infer(state, file)
    if role is None and known is None and method is not None:
        notes.append(f"that it is a {found} is what its name says ({method[0]}...); --role says otherwise")
    elif told is None and role is None:
        notes.append(f"that it is a {found} is a guess: neither the weights nor the file's name tell it (--role does)")
    told_time = LogRatio(250.0)
    card = ModelCard(
        role=found,
        resolution=config.resolution,
        channels=config.in_channels,
        num_classes=config.num_classes,
        grid_points=known.grid_points if known else 40,
        times={"2": known.sigmas()} if known and known.times else {},
        data=known.data if known else "",
        licence=known.licence if known else "",
        source=f"OpenAI consistency models, {name}",
        notes=tuple(notes),
    )
    form = EDM(time_input=told_time) if found == "denoiser" else BoundaryEDM(time_input=told_time)
    return Imported(config, VE(), form, card, state, "openai", file)


def _released(name: str) -> Released | None:
    """The released model that a file name names, also in a longer one: a copy is often called something more."""
    named = [entry for entry in RELEASED.values() if entry.family == "openai" and entry.name in name.lower()]
    return max(named, key=lambda entry: len(entry.name), default=None)


def infer(state: Mapping[str, Tensor], file: str = "the state dict") -> tuple[ADMConfig, list[str]]:
    """The network that has tensors of these names and shapes, and what had to be guessed.

    Raises:
        CheckpointError: the tensors of no ADM network.
    """
    try:
        return _infer(state, file)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, TypeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{file} has the names of an ADM network and not its shapes: {what}", "get the file again"
        ) from error


def _infer(state: Mapping[str, Tensor], file: str) -> tuple[ADMConfig, list[str]]:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(state[name].shape)

    emb_channels, channels = shape("time_embed.0.weight")
    width, in_channels = shape(MARK)[:2]
    out_channels = shape("out.2.weight")[0]
    if out_channels == 2 * in_channels:
        raise CheckpointError(
            f"{file} predicts noise and a variance: a model of guided diffusion, not of consistency models",
            "use the edm_, cd_ or ct_ files, or a diffusers folder",
        )
    outputs = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("output_blocks."))
    if outputs > len(state):
        raise ValueError(f"there are no {outputs} output blocks")
    ends = [_up(state, block) for block in range(outputs)]
    levels = 1 + sum(end is not None for end in ends)
    num_blocks = outputs // levels - 1
    mult, attention = [], []
    for level in range(levels):
        first = 1 + level * (num_blocks + 1)
        width = shape(f"input_blocks.{first}.0.out_layers.3.weight")[0]
        if width % channels:
            raise ValueError(f"{width} channels are no multiple of {channels}")
        mult.append(width // channels)
        if f"input_blocks.{first}.1.qkv.weight" in state:
            attention.append(level)
    if emb_channels != 4 * channels:
        raise ValueError(f"the embedding has {emb_channels} channels, not {4 * channels}")
    notes: list[str] = []
    resolution = _resolution(file, channels, tuple(mult), attention, notes)
    rows = shape("middle_block.0.emb_layers.1.weight")[0]
    config = ADMConfig(
        resolution=resolution,
        in_channels=in_channels,
        out_channels=out_channels,
        num_classes=shape("label_emb.weight")[0] if "label_emb.weight" in state else 0,
        channels=channels,
        channel_mult=tuple(mult),
        num_blocks=num_blocks,
        attention_resolutions=tuple(resolution >> level for level in attention),
        head_channels=_heads([mult[level] * channels for level in {*attention, levels - 1}], notes),
        scale_shift_norm=rows == 2 * shape("middle_block.0.out_layers.3.weight")[0],
        resblock_updown="conv" not in ends,
    )
    return config, notes


def _up(state: Mapping[str, Tensor], block: int) -> str | None:
    """How an output block ends: with "conv" or "resblock" that doubles the resolution, or with neither."""
    for child in (1, 2):
        if f"output_blocks.{block}.{child}.conv.weight" in state:
            return "conv"
        if f"output_blocks.{block}.{child}.in_layers.0.weight" in state:
            return "resblock"
    return None


def _resolution(file: str, channels: int, mult: tuple[int, ...], attention: list[int], notes: list[str]) -> int:
    """What the file's name tells, else the released networks' own, else attention from 32x32 down."""
    step = 2 ** (len(mult) - 1)
    name = PurePath(file).name.lower()
    told = [int(number) for number in re.findall(r"(?<!\d)(\d{1,4})x\1(?!\d)", name)]
    told += [int(number) for number in re.findall(r"(?:imagenet|ffhq|afhqv2|celeba|lsun|bedroom|cat)-?(\d{2,4})", name)]
    told += [32] if "cifar" in name else []
    for number in told:
        if number >= step and number % step == 0:
            return number
    released = RELEASED_SHAPES.get((channels, mult))
    if released is not None:
        return released
    guess = 32 * 2 ** attention[0] if attention else 8 * step
    guess = max(guess, step)
    notes.append(
        f"the resolution {guess} is a guess: neither the weights nor the file's name tell it "
        "(cmtool convert --resolution sets it)"
    )
    return guess


def _heads(widths: list[int], notes: list[str]) -> int:
    """Channels of one head: 64 in all that is released, else the largest of which every layer has two or more."""
    for head in HEADS:
        if all(width % head == 0 and width >= 2 * head for width in widths):
            break
    else:
        head = 0
    if head != 64:
        notes.append(
            f"attention heads of {head or 'all'} channels are a guess: the weights do not tell "
            "(cmtool convert --set network.head_channels sets it)"
        )
    return head
