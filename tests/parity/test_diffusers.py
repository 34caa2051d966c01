"""diffusers as an oracle: its networks, schedules and pipelines against ours, in both directions."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cmtool.compat import repair_torchvision
from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, LogRatio
from cmtool.flow.parameterization import Epsilon, Sample, VPrediction
from cmtool.flow.path import VP
from cmtool.io.exporters import diffusers as exporter
from cmtool.io.imported import assemble
from cmtool.io.importers import diffusers as importer
from cmtool.networks import ADMConfig, UNet2DConfig, build
from cmtool.networks.configs import adm_imagenet64, adm_lsun256
from cmtool.sampler import sample
from cmtool.solvers import DDIM, solve
from cmtool.times import Karras
from tests import models

NAMES = (
    *("UNet2DModel", "ConsistencyModelPipeline", "CMStochasticIterativeScheduler", "DDPMPipeline", "DDPMScheduler"),
    *("DDIMScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVePipeline", "ScoreSdeVeScheduler"),
)


@cache
def oracle() -> SimpleNamespace:
    """diffusers, imported without what it and its dependencies warn of."""
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs diffusers")
    repair_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

        found = {name: getattr(diffusers, name) for name in NAMES} | {"KarrasVeScheduler": KarrasVeScheduler}
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
    return SimpleNamespace(**found)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks are faster on one thread than on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of every layer, the norms' too, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("time_proj"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))  # 16 times as large is all rounding
            elif parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                parameter.copy_(
                    float("norm" in name) * ("weight" in name) + 0.3 * torch.randn(parameter.shape, generator=generator)
                )


def unet(seed: int = 0, **options):
    made = oracle().UNet2DModel(**options).eval()
    randomise(made, seed)
    return made


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# --- networks ---------------------------------------------------------------------------------------------------------

PLAIN = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SKIP = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": None,
    "attention_head_dim": None,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "norm_eps": 1e-6,
    "mid_block_scale_factor": math.sqrt(2),
}
FOURIER = SKIP | {"time_embedding_type": "fourier", "center_input_sample": True}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
ADM_LIKE = (
    PLAIN
    | RESNET
    | {
        "block_out_channels": (32, 64, 64),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "attention_head_dim": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
)
VARIANTS = {
    "plain": PLAIN,
    "ddpm of google": PLAIN | {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
    "attention everywhere": PLAIN
    | {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "attention_head_dim": 8,
    },
    "attention on the way up only": PLAIN | {"down_block_types": ("DownBlock2D",) * 2},
    "resnet resampling": PLAIN | RESNET,
    "resnet down, conv up": PLAIN | {"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D",) * 2},
    "film, no norm in the middle": PLAIN | {"resnet_time_scale_shift": "scale_shift"},
    "film, norm in the middle": PLAIN | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "labels": PLAIN | {"num_class_embeds": 5},
    "no attention in the middle": PLAIN | {"add_attention": False},
    "no middle": PLAIN | {"mid_block_type": None},
    "middle scaled": PLAIN | {"mid_block_scale_factor": 1.5},
    "three levels, two blocks": PLAIN
    | {
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "one level": PLAIN
    | {
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "centred, wide embedding, one channel": PLAIN
    | {
        "center_input_sample": True,
        "time_embedding_dim": 24,
        "in_channels": 1,
        "out_channels": 1,
    },
    "skip": SKIP,
    "skip, fourier": FOURIER,
    "skip down only": SKIP | {"norm_num_groups": 8, "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    "skip up only": SKIP
    | {"norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")},
    "adm": ADM_LIKE,
    "adm, film, labels": ADM_LIKE | {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks(variant):
    theirs = unet(**VARIANTS[variant])
    config = importer.parse_config(json.loads(theirs.to_json_string()), "config.json")
    ours = build(config).eval()
    weights = theirs.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    ours.load_state_dict(weights)
    x = noise(2, config.in_channels, 16, 16)
    t = torch.tensor([0.4, 7.0] if config.embedding == "fourier" else [3.0, 871.5])
    labels = torch.tensor([0, 3]) if config.num_classes else None
    with torch.no_grad():
        expected = theirs(x, t, labels).sample
        if config.embedding == "fourier":
            found = ours(x, t.log()) / t[:, None, None, None]
        else:
            found = ours(x, t, labels)
    assert expected.abs().max() > 0.3
    assert difference(found, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert importer.parse_config(exporter.config_json(config), "config.json") == config
    adm = importer.adm_of(config)
    assert (adm is not None) == variant.startswith("adm")
    if adm is not None:
        as_adm = build(adm).eval()
        renamed = importer.to_openai(weights, adm)
        as_adm.load_state_dict(renamed)
        with torch.no_grad():
            assert difference(as_adm(x, t, labels), expected) <= 1e-5 * float(expected.abs().max())
        back = importer.from_openai(renamed, adm)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weights[name]) for name in weights)
        assert importer.unet2d_of(adm) == config


GOOGLE = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
OPENAI = {"downsample_type": "resnet", "upsample_type": "resnet", "attn_norm_num_groups": 32, "attention_head_dim": 64}
PUBLISHED = {
    "google/ddpm-cifar10-32": GOOGLE
    | {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "google/ddpm-cat-256": GOOGLE
    | {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    },
    "NCSN++ at 256x256": SKIP
    | {
        "sample_size": 256,
        "time_embedding_type": "fourier",
        "center_input_sample": True,
        "layers_per_block": 2,
        "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
        "down_block_types": (*("SkipDownBlock2D",) * 4, "AttnSkipDownBlock2D", *("SkipDownBlock2D",) * 2),
        "up_block_types": (*("SkipUpBlock2D",) * 2, "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 4),
    },
    "openai/diffusers-cd_imagenet64_l2": OPENAI
    | {
        "sample_size": 64,
        "layers_per_block": 3,
        "num_class_embeds": 1000,
        "resnet_time_scale_shift": "scale_shift",
        "block_out_channels": (192, 384, 576, 768),
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
        "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    },
    "openai/diffusers-cd_bedroom256_lpips": OPENAI
    | {
        "sample_size": 256,
        "block_out_channels": (256, 256, 512, 512, 1024, 1024),
        "down_block_types": (*("ResnetDownsampleBlock2D",) * 3, *("AttnDownBlock2D",) * 3),
        "up_block_types": (*("AttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 3),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    """Names and shapes, without memory; OpenAI's are the ADM sizes of the same name."""
    with torch.device("meta"):
        theirs = oracle().UNet2DModel(**PUBLISHED[name])
        config = importer.parse_config(json.loads(theirs.to_json_string()), "config.json")
        ours = build(config)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes
    adm = importer.adm_of(config)
    sizes = {"imagenet64": adm_imagenet64(), "bedroom256": adm_lsun256()}
    assert adm == next((size for data, size in sizes.items() if data in name), None)
    if adm is not None:
        with torch.device("meta"):
            expected = {key: tensor.shape for key, tensor in build(adm).state_dict().items()}
        renamed = importer.to_openai(theirs.state_dict(), adm)
        assert {key: tensor.shape for key, tensor in renamed.items()} == expected


# --- consistency models -----------------------------------------------------------------------------------------------


def consistency_pipeline(labels: bool = False, seed: int = 0, scheduler: dict | None = None, **options):
    extra = {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4} if labels else {}
    network = unet(seed, **(ADM_LIKE | extra | options))
    with torch.no_grad():
        network.conv_out.weight *= 0.3  # images that are not clipped all over
    return quiet(
        oracle().ConsistencyModelPipeline(network, oracle().CMStochasticIterativeScheduler(**(scheduler or {})))
    )


def images(pipeline, start: Tensor, indices: list[int], labels: Tensor | None = None, seed: int = 5) -> Tensor:
    """The pipeline's images in [0, 1] from standard normal `start`, renoised from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    steps = {"num_inference_steps": None, "timesteps": indices} if len(indices) > 1 else {"num_inference_steps": 1}
    out = pipeline(
        batch_size=len(start), latents=start, class_labels=labels, generator=generator, output_type="pt", **steps
    )
    return out.images


def ours(model: FlowMap, start: Tensor, indices: list[int], labels: Tensor | None = None, seed: int = 5) -> Tensor:
    """The same images from cmtool's loop; indices as diffusers has them, the last first."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(start.shape, generator=generator) for _ in indices]
    times = Karras(model.card.grid_rho).times(model.path, model.card.grid_points)[indices[::-1]]
    *_, last = sample(model, model.path.t_max * start, times, noise=lambda i: drawn[i - 1], labels=labels)
    return (last.denoised / 2 + 0.5).clamp(0, 1)


def telling(found: Tensor) -> bool:
    """Whether images say anything: most pixels are not clipped, and they are not all alike."""
    inside = (found > 0) & (found < 1)
    return bool(inside.float().mean() > 0.6 and found.std() > 0.01)


@pytest.mark.parametrize("labels", [False, True])
def test_pipelines_of_consistency_models_are_read(tmp_path, labels):
    pipeline = consistency_pipeline(labels)
    folder = tmp_path / "diffusers-cd_imagenet64_l2"
    pipeline.save_pretrained(folder)
    model = assemble(importer.read(folder, "consistency"))
    assert isinstance(model.network.config, ADMConfig)
    assert (model.path, model.parameterization) == (VE(), BoundaryEDM(time_input=LogRatio(250.0)))
    card = model.card
    assert (card.role, card.grid_points, card.num_classes) == ("consistency", 40, 4 if labels else 0)
    assert card.times["2"] == pytest.approx((80.0, 1.382368), rel=1e-5)
    start, classes = noise(2, 3, 16, 16), torch.tensor([0, 3]) if labels else None
    for indices in ([0], [22, 0], [30, 12, 0]):
        expected = images(pipeline, start, indices, classes)
        assert telling(expected)
        assert difference(ours(model, start, indices, classes), expected) < 1e-5


@pytest.mark.parametrize("kind", ["adm", "adm, film, labels", "adm, convolutions", "unet2d"])
def test_consistency_models_are_written(tmp_path, kind):
    """What cmtool writes, diffusers opens and samples alike; and it comes back bit by bit."""
    config = {
        "adm": adm(),
        "adm, film, labels": adm(num_classes=4, scale_shift_norm=True, num_blocks=2),
        "adm, convolutions": adm(resblock_updown=False, head_channels=0),
        "unet2d": importer.parse_config(
            exporter.config_json(
                UNet2DConfig(
                    resolution=16,
                    widths=(16, 32),
                    num_blocks=1,
                    groups=8,
                    middle_groups=8,
                    down_blocks=("DownBlock2D", "AttnDownBlock2D"),
                    up_blocks=("UpBlock2D", "AttnUpBlock2D"),
                )
            ),
            "config.json",
        ),
    }[kind]
    model = models.model(
        "consistency",
        config,
        VE(0.003, 70.0),
        BoundaryEDM(0.6, LogRatio(250.0)),
        grid_points=30,
        grid_rho=6.0,
        licence="MIT",
        data="digits",
        notes=("a note",),
    )
    with torch.no_grad():
        final = model.network.out["2"] if kind.startswith("adm") else model.network.conv_out
        final.weight *= 0.3
    exporter.write(model, tmp_path / "folder")
    pipeline = quiet(oracle().ConsistencyModelPipeline.from_pretrained(tmp_path / "folder", local_files_only=True))
    start = noise(2, 3, 16, 16)
    labels = torch.tensor([1, 2]) if config.num_classes else None
    for indices in ([0], [17, 0]):
        expected = images(pipeline, start, indices, labels)
        assert telling(expected)
        assert difference(ours(model, start, indices, labels), expected) < 1e-5
    found = assemble(importer.read(tmp_path / "folder"))
    assert found.network.config == config
    assert (found.path, found.parameterization) == (model.path, model.parameterization)
    assert (found.card.licence, found.card.grid_points, found.card.grid_rho) == ("MIT", 30, 6.0)
    expected_state = model.network.state_dict()
    state = found.network.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def adm(**changes) -> ADMConfig:
    options = {
        "resolution": 16,
        "channels": 32,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attention_resolutions": (8,),
        "head_channels": 16,
        "scale_shift_norm": False,
    }
    return ADMConfig(**(options | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_resolutions": (16,)},
        {"resblock_updown": False, "attention_resolutions": (16, 8)},
        {"channel_mult": (1, 1, 2), "num_blocks": 2, "attention_resolutions": (4,), "num_classes": 3},
        {"attention_resolutions": (), "scale_shift_norm": True},
        {"channels": 24, "channel_mult": (1,), "head_channels": 0, "attention_resolutions": ()},  # 24 groups
        {"channels": 128, "channel_mult": (1, 1), "group_channels": 4, "head_channels": 0, "num_heads": 4},
    ],
)  # fmt: skip
def test_openai_names_and_back(changes):
    config = adm(**changes)
    state = models.model("consistency", config).network.state_dict()
    unet2d = importer.unet2d_of(config)
    theirs = importer.from_openai(state, config)
    loaded = oracle().UNet2DModel.from_config(exporter.config_json(unet2d)).eval()
    loaded.load_state_dict(theirs)  # every name and shape
    back = importer.to_openai(theirs, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    found = importer.adm_of(unet2d)
    assert found is not None
    assert importer.unet2d_of(found) == unet2d
    network = build(config).eval()
    network.load_state_dict(state)
    x, t = noise(2, 3, 16, 16), torch.tensor([-300.0, 900.0])
    labels = torch.tensor([2, 0]) if config.num_classes else None
    with torch.no_grad():
        expected = loaded(x, t, labels).sample
        assert difference(network(x, t, labels), expected) <= 1e-5 * float(expected.abs().max())


# --- denoisers of discrete steps --------------------------------------------------------------------------------------

BETAS = {
    "linear": {},
    "few steps": {"num_train_timesteps": 200, "beta_start": 1e-3, "beta_end": 0.05},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "table": {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.15, 0.4]},
    "zero snr": {"rescale_betas_zero_snr": True},
}


def read_scheduler(folder, scheduler, **options):
    """The importer's reading of a plain network with this scheduler."""
    theirs = unet(**(PLAIN | options))
    theirs.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return theirs, importer.read(folder)


@pytest.mark.parametrize("betas", BETAS)
def test_discrete_schedules(tmp_path, betas):
    scheduler = oracle().DDPMScheduler(**BETAS[betas])
    _, imported = read_scheduler(tmp_path, scheduler)
    path = imported.path
    assert isinstance(path, VP)
    assert imported.card.role == "denoiser"
    steps = torch.arange(len(scheduler.betas), dtype=torch.float64)
    bar = scheduler.alphas_cumprod.double()
    assert path.t_max == len(steps) - 1
    if betas == "zero snr":
        assert float(bar[-1]) == 0
        assert float(path.alpha(steps[-1])) == pytest.approx(2.0**-12)
        steps, bar = steps[:-1], bar[:-1]
    torch.testing.assert_close(path.alpha(steps), bar.sqrt(), rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(path.sigma(steps), (1 - bar).sqrt(), rtol=2e-4, atol=3e-6)


@pytest.mark.parametrize(
    ("kind", "labels"), [("epsilon", False), ("epsilon", True), ("v_prediction", False), ("sample", False)]
)
def test_predictions_of_discrete_steps(tmp_path, kind, labels):
    scheduler = oracle().DDPMScheduler(prediction_type=kind, clip_sample=False)
    theirs, imported = read_scheduler(tmp_path, scheduler, num_class_embeds=3 if labels else None)
    expected_form = {"epsilon": Epsilon(), "v_prediction": VPrediction(), "sample": Sample()}[kind]
    assert imported.parameterization == expected_form
    model = assemble(imported)
    x, classes = noise(2, 3, 16, 16), torch.tensor([0, 2]) if labels else None
    for t in (0, 17, 500, 999):
        with torch.no_grad():
            out = theirs(x, t, classes).sample
        expected = scheduler.step(out, t, x).pred_original_sample
        found = model.denoised(x, torch.full((2,), float(t)), classes)
        assert difference(found, expected) <= 1e-4 * float(expected.abs().max())

    exporter.write(model, tmp_path / "written")
    written = oracle().DDPMScheduler.from_pretrained(tmp_path / "written", subfolder="scheduler")
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert written.config[name] == scheduler.config[name]
    assert (tmp_path / "written" / "model_index.json").exists() != labels  # the pipeline knows no labels
    network = (
        oracle().UNet2DModel.from_pretrained(tmp_path / "written", subfolder="unet")
        if labels
        else oracle().DDPMPipeline.from_pretrained(tmp_path / "written").unet
    )
    with torch.no_grad():
        assert torch.equal(network.eval()(x, 17, classes).sample, theirs(x, 17, classes).sample)


def test_a_variance_that_is_predicted_too_is_left_out(tmp_path):
    scheduler = oracle().DDPMScheduler(variance_type="learned_range", clip_sample=False)
    theirs, imported = read_scheduler(tmp_path, scheduler, out_channels=6)
    assert any("variance" in note for note in imported.card.notes)
    model = assemble(imported)
    x = noise(2, 3, 16, 16)
    with torch.no_grad():
        out = theirs(x, 300).sample
    expected = scheduler.step(out, 300, x).pred_original_sample
    found = model.denoised(x, torch.full((2,), 300.0))
    assert difference(found, expected) <= 1e-4 * float(expected.abs().max())


def test_ddim(tmp_path):
    scheduler = oracle().DDIMScheduler(clip_sample=False)
    theirs, imported = read_scheduler(tmp_path, scheduler)
    model = assemble(imported)
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps
    start = x = noise(2, 3, 16, 16)
    for t in steps:
        with torch.no_grad():
            x = scheduler.step(theirs(x, t).sample, t, x, eta=0.0).prev_sample
    *_, last = solve(DDIM(), model.denoised, model.path, start, steps.double())
    found = model.denoised(last.x, torch.full((2,), float(steps[-1])))  # the last step: to the clean image
    assert steps[-1] == 0
    assert difference(found, x) <= 1e-4 * float(x.abs().max())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside the scheduler
def test_a_scheduler_on_noise_levels_tells_the_step(tmp_path):
    """Euler's scheduler divides by sqrt(sigma^2 + 1), the network is told the step: the same denoiser."""
    scheduler = oracle().EulerDiscreteScheduler()
    theirs, imported = read_scheduler(tmp_path, scheduler)
    model = assemble(imported)
    scheduler.set_timesteps(5)
    for i in (0, 2, 4):
        scheduler._step_index = i
        t, level = scheduler.timesteps[i], float(scheduler.sigmas[i])
        x = level * noise(2, 3, 16, 16)
        with torch.no_grad():
            out = theirs(scheduler.scale_model_input(x, t), t).sample
        expected = scheduler.step(out, t, x).pred_original_sample
        at = torch.full((2,), float(t))
        found = model.denoised(x * model.path.alpha(at)[:, None, None, None], at)
        assert difference(found, expected) <= 2e-4 * float(expected.abs().max())


# --- denoisers on noise levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["adm", "unet2d"])
def test_edm_denoisers_are_written(tmp_path, network):
    config = adm() if network == "adm" else importer.unet2d_of(adm(resblock_updown=False))
    config = config if network == "adm" else replace(config, eps=1e-6)
    model = models.model("denoiser", config, VE(0.004, 60.0), EDM(0.7))
    exporter.write(model, tmp_path / "edm")
    theirs = oracle().UNet2DModel.from_pretrained(tmp_path / "edm", subfolder="unet").eval()
    scheduler = oracle().EDMEulerScheduler.from_pretrained(tmp_path / "edm", subfolder="scheduler")
    scheduler.set_timesteps(6)
    assert float(scheduler.sigmas[0]) == pytest.approx(60.0)
    assert float(scheduler.sigmas[5]) == pytest.approx(0.004)
    x = 3 * noise(2, 3, 16, 16)
    for i, t in enumerate(scheduler.timesteps):
        scheduler._step_index = i
        with torch.no_grad():
            out = theirs(scheduler.scale_model_input(x, t), t).sample
        expected = scheduler.step(out, t, x).pred_original_sample
        found = model.denoised(x, scheduler.sigmas[i].expand(2))
        assert difference(found, expected) <= 1e-5 * float(expected.abs().max())
    back = assemble(importer.read(tmp_path / "edm"))
    assert (back.path, back.parameterization, back.network.config) == (model.path, model.parameterization, config)
    assert torch.equal(back.denoised(x, torch.full((2,), 0.3)), model.denoised(x, torch.full((2,), 0.3)))


def test_edm_networks_that_predict_v(tmp_path):
    scheduler = oracle().EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0)
    theirs, imported = read_scheduler(tmp_path, scheduler)
    model = assemble(imported)
    scheduler.set_timesteps(4)
    scheduler._step_index = 1
    x = 3 * noise(2, 3, 16, 16)
    with torch.no_grad():
        out = theirs(scheduler.scale_model_input(x, scheduler.timesteps[1]), scheduler.timesteps[1]).sample
    expected = scheduler.step(out, scheduler.timesteps[1], x).pred_original_sample
    assert difference(model.denoised(x, scheduler.sigmas[1].expand(2)), expected) <= 1e-5 * float(expected.abs().max())


def test_scores_of_images_between_0_and_1(tmp_path):
    """y + sigma^2 score(y) on [0, 1] is, as 2y - 1, our estimate at twice the noise level."""
    scheduler = oracle().ScoreSdeVeScheduler(sigma_max=50.0)
    theirs, imported = read_scheduler(tmp_path, scheduler, **FOURIER)
    assert imported.path == VE(0.02, 100.0)
    model = assemble(imported)
    scheduler.set_timesteps(40)
    scheduler.set_sigmas(40)
    y = noise(2, 3, 16, 16) + 0.5
    for k in (0, 1, 20, 39):
        level, below = scheduler.discrete_sigmas[k], scheduler.discrete_sigmas[k - 1] if k else torch.tensor(0.0)
        with torch.no_grad():
            score = theirs(y, level.expand(2)).sample
        mean = scheduler.step_pred(score, (k + 0.5) / 39, y).prev_sample_mean
        drift = (mean - y) / (level**2 - below**2)  # the score, as the scheduler uses it
        expected = 2 * (y + level**2 * drift) - 1
        found = model.denoised(2 * y - 1, (2 * level).expand(2))
        assert difference(found, expected) <= 2e-5 * float(expected.abs().max())

    exporter.write(model, tmp_path / "written")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = oracle().ScoreSdeVePipeline.from_pretrained(tmp_path / "written")
    assert (pipeline.scheduler.config.sigma_min, pipeline.scheduler.config.sigma_max) == (0.01, 50.0)
    with torch.no_grad():
        assert torch.equal(pipeline.unet.eval()(y, level.expand(2)).sample, score)
    assert importer.read(tmp_path / "written").parameterization == imported.parameterization


def test_the_stochastic_pipeline_of_such_networks(tmp_path):
    scheduler = oracle().KarrasVeScheduler()
    theirs, imported = read_scheduler(tmp_path, scheduler, **FOURIER)
    assert imported.path == VE(0.02, 100.0)
    model = assemble(imported)
    x = 2 * noise(2, 3, 16, 16)
    for level in (0.05, 2.0, 90.0):
        with torch.no_grad():  # its pipeline's formula
            out = level / 2 * theirs((x + 1) / 2, torch.tensor(level / 2)).sample
        expected = scheduler.step(out, level, 0.01, x).pred_original_sample
        found = model.denoised(x, torch.full((2,), level))
        assert difference(found, expected) <= 2e-5 * float(expected.abs().max())


# --- other forms of the same folders ----------------------------------------------------------------------------------


def test_layouts(tmp_path):
    """Everything at the root, pickles, old names of attention, half precision, shards: one and the same network."""
    theirs = unet(**PLAIN)
    scheduler = oracle().DDPMScheduler()
    expected = theirs.state_dict()

    def check(folder, exact=True):
        found = importer.read(folder).state
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name] if exact else expected[name].half())

    pipeline = oracle().DDPMPipeline(theirs, scheduler)
    pipeline.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")

    old = tmp_path / "old"
    theirs.save_pretrained(old, safe_serialization=False)
    scheduler.save_pretrained(old)
    check(old)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in expected.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        renamed[name] = tensor
    assert renamed.keys() != expected.keys()
    torch.save(renamed, old / "diffusion_pytorch_model.bin")
    check(old)

    shards = tmp_path / "shards"
    theirs.save_pretrained(shards / "unet", max_shard_size="60KB")
    scheduler.save_pretrained(shards / "scheduler")
    assert len(list((shards / "unet").glob("*.safetensors"))) > 2
    check(shards)

    half = tmp_path / "half"
    theirs.half().save_pretrained(half / "unet", variant="fp16")
    scheduler.save_pretrained(half / "scheduler")
    assert any("half" in note for note in importer.read(half).card.notes)
    check(half, exact=False)
    theirs.float()


def test_a_network_alone_needs_a_role(tmp_path):
    unet(**ADM_LIKE).save_pretrained(tmp_path)
    assert importer.looks_like(tmp_path)
    with pytest.raises(CheckpointError, match=r"no scheduler_config\.json"):
        importer.read(tmp_path)
    with pytest.raises(CheckpointError, match="how its images were noised"):
        importer.read(tmp_path, "denoiser")
    imported = importer.read(tmp_path, "consistency")
    assert imported.parameterization == BoundaryEDM(time_input=LogRatio(250.0))
    assert any("without a scheduler" in note for note in imported.card.notes)
    assert importer.read(tmp_path, assume="consistency").card == imported.card


def test_another_role(tmp_path):
    consistency_pipeline().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a consistency model"):
        importer.read(tmp_path, "denoiser")
    assert importer.read(tmp_path, assume="denoiser").card.role == "consistency"
