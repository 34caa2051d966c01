"""Folders that diffusers opens: a `UNet2DModel`, its scheduler and a model card.

A consistency model becomes a `ConsistencyModelPipeline`, a denoiser of discrete steps a `DDPMPipeline`, NCSN++ on its
own noise levels a `ScoreSdeVePipeline`, and an EDM denoiser a network and an `EDMEulerScheduler`, for which diffusers
has no pipeline of its own. Only what computes the same there is written; the rest is refused with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cmtool import __version__
from cmtool.errors import CheckpointError
from cmtool.flow.flow_map import FlowMap, ModelCard
from cmtool.flow.parameterization import EDM, BoundaryEDM, Epsilon, LogRatio, PathTime, Sample, VPrediction
from cmtool.flow.path import VE, VP
from cmtool.io.files import write_atomic
from cmtool.io.importers.diffusers import CLASS, CONSISTENCY, LICENCES, SCHEDULER, WEIGHTS, from_openai, unet2d_of
from cmtool.networks import ADMConfig, UNet2DConfig
from cmtool.times import Karras

_OTHERWISE = "convert it --to cmtool or --to onnx"
SCORE = LogRatio(1.0, unit=2.0)  # what NCSN++ of images in [0, 1] is told of our noise levels


class Plan(NamedTuple):
    """How a model is put into diffusers' terms."""

    config: UNet2DConfig
    state: dict[str, Tensor]
    scheduler: dict[str, Any]
    pipeline: str  # its class, or "" where none of diffusers' samples it


def write(model: FlowMap, folder: Path) -> None:
    """Write a model as a folder of diffusers, complete or not at all.

    Args:
        folder: a new one, or an empty one.
    Raises:
        CheckpointError: a model that diffusers has no equal of, a folder that is not empty or cannot be written to.
        ValueError: for a view (`on_path`, `guided`), whose file would be that of the model seen.
    """
    import safetensors.torch

    if hasattr(model, "seen"):
        raise ValueError("a model seen on another path or under guidance cannot be saved; save the model itself")
    plan = _plan(model)
    texts = {
        "unet/config.json": _text(config_json(plan.config)),
        f"scheduler/{SCHEDULER}": _text(plan.scheduler),
        "README.md": _readme(model, plan, folder.name),
    }
    if plan.pipeline:
        parts = {"scheduler": ["diffusers", plan.scheduler["_class_name"]], "unet": ["diffusers", CLASS]}
        texts["model_index.json"] = _text({"_class_name": plan.pipeline} | parts)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in plan.state.items()}
    temporary: Path | None = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not empty", "name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        data = safetensors.torch.save(state, {"format": "pt"})
        write_atomic(temporary / "unet" / f"{WEIGHTS}.safetensors", lambda file: file.write(data))
        for name, text in texts.items():
            write_atomic(temporary / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
        temporary.chmod((temporary / "unet").stat().st_mode & 0o777)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror or error}", "check the folder and its free space"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def config_json(config: UNet2DConfig) -> dict[str, Any]:
    """A network's config in diffusers' words: the inverse of `importers.diffusers.parse_config`."""
    return {
        "_class_name": CLASS,
        "sample_size": config.resolution,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "center_input_sample": config.center_input,
        "time_embedding_type": config.embedding,
        "time_embedding_dim": config.emb_channels or None,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": config.cosines_first,
        "down_block_types": list(config.down_blocks),
        "mid_block_type": "UNetMidBlock2D" if config.middle else None,
        "up_block_types": list(config.up_blocks),
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_blocks,
        "mid_block_scale_factor": config.middle_scale,
        "downsample_padding": config.downsample_padding,
        "downsample_type": config.downsample,
        "upsample_type": config.upsample,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": config.head_channels or None,
        "norm_num_groups": config.groups or None,
        "attn_norm_num_groups": config.middle_groups or None,
        "norm_eps": config.eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": config.middle_attention,
        "class_embed_type": None,
        "num_class_embeds": config.num_classes or None,
    }


def _plan(model: FlowMap) -> Plan:
    config, state = _network(model)
    path, form, card = model.path, model.parameterization, model.card
    told = getattr(form, "time_input", None)
    fourier = config.embedding == "fourier"
    if card.role == "consistency":
        _check_consistency(model, config)
        scheduler = {
            "_class_name": CONSISTENCY,
            "num_train_timesteps": card.grid_points,
            "sigma_min": path.t_min,
            "sigma_max": path.t_max,
            "sigma_data": form.sigma_data,  # type: ignore[attr-defined]
            "s_noise": 1.0,
            "rho": card.grid_rho,
            "clip_denoised": True,
        }
        return Plan(config, state, scheduler, "ConsistencyModelPipeline")
    if card.role != "denoiser":
        raise CheckpointError("diffusers has no network with two times", _OTHERWISE)
    if isinstance(path, VP) and told == PathTime() and not fourier:
        kinds: dict[type, str] = {Epsilon: "epsilon", VPrediction: "v_prediction", Sample: "sample"}
        kind = kinds.get(type(form), "")
        if kind and getattr(form, "sign", 1) == 1 and (path.t_min, path.t_max) == (0, path.num_steps - 1):
            return Plan(config, state, _ddpm(path, kind), "" if config.num_classes else "DDPMPipeline")
    if isinstance(path, VE) and type(form) is EDM and told == LogRatio(0.25) and not fourier:
        scheduler = {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": path.t_min,
            "sigma_max": path.t_max,
            "sigma_data": form.sigma_data,
            "sigma_schedule": "karras",
            "prediction_type": "epsilon",
            "rho": card.grid_rho,
        }
        return Plan(config, state, scheduler, "")
    score = Epsilon(sign=-1.0, unit_input=False, time_input=SCORE)
    if isinstance(path, VE) and form == score and fourier and not config.center_input and not config.num_classes:
        scheduler = {
            "_class_name": "ScoreSdeVeScheduler",
            "sigma_min": path.t_min / 2,  # of images in [0, 1]
            "sigma_max": path.t_max / 2,
        }
        return Plan(replace(config, center_input=True), state, scheduler, "ScoreSdeVePipeline")
    raise CheckpointError(
        f"no scheduler of diffusers tells a network what this denoiser is told: {path}, {form}", _OTHERWISE
    )


def _ddpm(path: VP, kind: str) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": path.num_steps,
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "beta_schedule": path.betas,
        "trained_betas": list(path.table) or None,
        "rescale_betas_zero_snr": path.zero_snr,
        "prediction_type": kind,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "timestep_spacing": "trailing" if path.zero_snr else "leading",
    }


def _network(model: FlowMap) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    config: Any = getattr(model.network, "config", None)
    state: Mapping[str, Tensor] = model.network.state_dict()
    if getattr(config, "two_times", False):
        raise CheckpointError("diffusers has no network with two times", _OTHERWISE)
    if isinstance(config, UNet2DConfig):
        if config.middle and config.middle_attention and not config.middle_groups and not config.scale_shift_norm:
            raise CheckpointError("diffusers has no middle attention without a norm in such a network", _OTHERWISE)
        return config, dict(state)
    if isinstance(config, ADMConfig):
        try:
            return unet2d_of(config), from_openai(state, config)
        except ValueError as error:
            raise CheckpointError(f"diffusers has no network like this ADM: {error}", _OTHERWISE) from error
    kind = getattr(config, "kind", type(model.network).__name__)
    raise CheckpointError(
        f"diffusers has no network like {kind}: its {CLASS} lacks layers that this has",
        f"{_OTHERWISE}; what is trained with --network adm-small can be written for diffusers",
    )


def _check_consistency(model: FlowMap, config: UNet2DConfig) -> None:
    """Whether `CMStochasticIterativeScheduler` computes this consistency function.

    Raises:
        CheckpointError: the difference.
    """
    path, form = model.path, model.parameterization
    if not isinstance(path, VE):
        raise CheckpointError(
            f"diffusers' consistency models are on the path x0 + sigma noise, and this one is on {path.kind}",
            _OTHERWISE,
        )
    if type(form) is not BoundaryEDM:
        raise CheckpointError(
            f"diffusers' consistency models have the scalings boundary_edm, and this one has {form.kind}: "
            "it would be another function there",
            f"{_OTHERWISE}; to write for diffusers, train it with --set parameterization=boundary_edm",
        )
    if config.embedding != "positional" or form.time_input != LogRatio(250.0):
        # Positional frequencies run from 1 down and no other: a slower one cannot be had from the weights.
        raise CheckpointError(
            f"diffusers tells its consistency models 250 ln(sigma), and this one is told {_said(form.time_input)}",
            f"{_OTHERWISE}; to write for diffusers, train it with --set parameterization.time_input.scale=250",
        )


def _said(told: object) -> str:
    if isinstance(told, LogRatio):
        return f"{told.scale:g} ln(sigma{'' if told.unit == 1 else f' / {told.unit:g}'})"
    return getattr(told, "kind", "something else")


# --- the model card ---------------------------------------------------------------------------------------------------


def _readme(model: FlowMap, plan: Plan, name: str) -> str:
    card = model.card
    licence = {text: key for key, text in LICENCES.items()}.get(card.licence, card.licence.lower())
    front = [
        "---",
        *([f"license: {licence}"] if licence and "\n" not in licence else []),
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        f"- {'consistency-model' if card.role == 'consistency' else 'diffusion'}",
        "---",
    ]
    what = "A consistency model" if card.role == "consistency" else "A diffusion model"
    classes = f" of {card.num_classes} classes" if card.num_classes else ""
    rows = [
        ("Licence", card.licence or "unknown"),
        ("Source", card.source),
        ("Teacher", card.teacher),
        ("Data", card.data),
        ("Preset", card.preset),
        ("Classes", ", ".join(card.class_names)),
        *(("Note", note) for note in card.notes),
    ]
    table = [f"- {title}: {' '.join(text.split())}" for title, text in rows if text]
    body = [
        f"# {name}",
        f"{what} for images{classes}, {card.resolution}x{card.resolution}, {card.channels} channels, "
        f"written by cmtool {__version__}.",
        "\n".join(table),
        "## Sampling",
        _sampling(model, plan),
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(part for part in body if part) + "\n"


def _sampling(model: FlowMap, plan: Plan) -> str:
    labels = ", class_labels=0" if model.card.num_classes else ""
    if plan.pipeline == "ConsistencyModelPipeline":
        calls = [f"pipe(num_inference_steps=1{labels}).images[0]  # one step"]
        for steps, times in sorted(model.card.times.items()):
            indices, told = _indices(model.card, model, times)
            calls.append(
                f"pipe(num_inference_steps=None, timesteps={indices}{labels}).images[0]  # {steps} steps, {told}"
            )
        lines = [
            "from diffusers import ConsistencyModelPipeline",
            "",
            'pipe = ConsistencyModelPipeline.from_pretrained("this folder")',
            *calls,
        ]
    elif plan.pipeline:
        steps = f"num_inference_steps={model.path.num_steps}" if isinstance(model.path, VP) else ""
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained("this folder")',
            f"pipe({steps}).images[0]",
        ]
    else:
        scheduler = plan.scheduler["_class_name"]
        given = ", class_labels=torch.tensor([0])" if labels else ""
        lines = [
            "import torch",
            f"from diffusers import {scheduler}, {CLASS}",
            "",
            f'unet = {CLASS}.from_pretrained("this folder", subfolder="unet")',
            f'scheduler = {scheduler}.from_pretrained("this folder", subfolder="scheduler")',
            "scheduler.set_timesteps(50)",
            f"x = torch.randn(1, {model.card.channels}, {model.card.resolution}, {model.card.resolution})",
            "x = x * scheduler.init_noise_sigma",
            "for t in scheduler.timesteps:",
            "    with torch.no_grad():",
            f"        out = unet(scheduler.scale_model_input(x, t), t{given}).sample",
            "    x = scheduler.step(out, t, x).prev_sample  # in the end the image, in [-1, 1]",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _indices(card: ModelCard, model: FlowMap, times: tuple[float, ...]) -> tuple[list[int], str]:
    """Time points as diffusers takes them: indices of the grid, the last first; and what they are."""
    grid = Karras(card.grid_rho).times(model.path, card.grid_points).double()
    found = [int((grid - time).abs().argmin()) for time in times]
    exact = all(abs(float(grid[index]) - time) <= 1e-4 * time for index, time in zip(found, times, strict=True))
    sigmas = ", ".join(f"{time:.4g}" for time in times)
    return found[::-1], f"sigma {sigmas}" if exact else f"the nearest to sigma {sigmas}"


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
