"""Names and layouts of the ADM network in the EDM release, turned into OpenAI's, which are ours."""

from __future__ import annotations

import torch
from torch import Tensor

from cmtool.networks.configs import ADMConfig, level_resolutions

RES_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def openai_from_edm(state: dict[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The EDM release's ADM weights (names without `model.`) under OpenAI's names.

    A network too narrow for one head has no attention there; here the middle block gets one that adds zero.
    """
    state = {key: value for key, value in state.items() if not key.endswith(".resample_filter")}
    out = {"label_emb.weight": state.pop("map_label.weight").t()} if config.num_classes else {}

    def move(source: str, target: str) -> None:
        for part in ("weight", "bias"):
            if f"{source}.{part}" in state:
                out[f"{target}.{part}"] = state.pop(f"{source}.{part}")

    def move_block(source: str, target: str, attention: str) -> None:
        for old, new in RES_BLOCK.items():
            move(f"{source}.{old}", f"{target}.{new}")
        for part in ("weight", "bias"):
            if (rows := state.get(f"{source}.qkv.{part}")) is not None:
                state[f"{source}.qkv.{part}"] = qkv_blocks(rows)
        for old, new in ATTENTION.items():
            move(f"{source}.{old}", f"{attention}.{new}")

    move("map_layer0", "time_embed.0")
    move("map_layer1", "time_embed.2")
    names = [f"{resolution}x{resolution}" for resolution in level_resolutions(config.resolution, config.channel_mult)]
    move(f"enc.{names[0]}_conv", "input_blocks.0.0")
    encoder = [
        key
        for level, name in enumerate(names)
        for key in ([f"{name}_down"] if level else []) + [f"{name}_block{index}" for index in range(config.num_blocks)]
    ]
    for index, key in enumerate(encoder, start=1):
        move_block(f"enc.{key}", f"input_blocks.{index}.0", f"input_blocks.{index}.1")
    move_block(f"dec.{names[-1]}_in0", "middle_block.0", "middle_block.1")
    move_block(f"dec.{names[-1]}_in1", "middle_block.2", "")
    index = 0
    for level in range(len(names) - 1, -1, -1):
        for block in range(config.num_blocks + 1):
            move_block(f"dec.{names[level]}_block{block}", f"output_blocks.{index}.0", f"output_blocks.{index}.1")
            index += 1
        if level:
            last = 2 if f"output_blocks.{index - 1}.1.qkv.weight" in out else 1
            move_block(f"dec.{names[level - 1]}_up", f"output_blocks.{index - 1}.{last}", "")
    move("out_norm", "out.0")
    move("out_conv", "out.2")
    assert not state, f"left over: {sorted(state)}"
    if "middle_block.1.qkv.weight" not in out:
        width = len(out["middle_block.0.out_layers.0.weight"])
        for name, rows, kernel in (
            ("norm", width, ()),
            ("qkv", 3 * width, (width, 1, 1)),
            ("proj_out", width, (width, 1, 1)),
        ):
            out[f"middle_block.1.{name}.weight"] = torch.zeros(rows, *kernel)
            out[f"middle_block.1.{name}.bias"] = torch.zeros(rows)
    return out


def qkv_blocks(rows: Tensor) -> Tensor:
    """Rows that alternate q, k, v for each channel, as all of q, then all of k, then all of v."""
    return rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
