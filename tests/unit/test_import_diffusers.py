"""diffusers' folders that are damaged, hostile or of other models; and models that cannot become such a folder."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmtool.errors import CheckpointError
from cmtool.flow import EDM, VE, BoundaryEDM, FlowMap, LogRatio, Trig, on_path
from cmtool.flow.parameterization import Epsilon, Piecewise
from cmtool.flow.path import VP
from cmtool.io.exporters import diffusers as exporter
from cmtool.io.imported import assemble
from cmtool.io.importers import diffusers as importer
from cmtool.networks import ADMConfig, UNet2DConfig
from tests import models
from tests.models import micro

ADM = ADMConfig(
    resolution=8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=16
)
UNET = UNet2DConfig(
    resolution=8,
    widths=(8, 16),
    num_blocks=1,
    down_blocks=("DownBlock2D", "AttnDownBlock2D"),
    up_blocks=("AttnUpBlock2D", "UpBlock2D"),
    groups=4,
    middle_groups=4,
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def consistency(config=ADM, path=None, form=None, **card) -> FlowMap:
    return models.model("consistency", config, path, form or BoundaryEDM(time_input=LogRatio(250.0)), **card)


def denoiser(config=UNET) -> FlowMap:
    return models.model("denoiser", config, VP(), Epsilon())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A denoiser of discrete steps."""
    exporter.write(denoiser(), tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))


def refused(folder: Path, message: str, **options) -> CheckpointError:
    """Reading and assembling fails, in words, within seconds."""
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        assemble(importer.read(folder, **options))
    assert time.monotonic() - start < 5
    assert caught.value.hint
    return caught.value


def test_what_is_recognised(folder, tmp_path):
    assert importer.looks_like(folder)
    assert importer.looks_like(folder / "unet")
    (folder / "model_index.json").unlink()
    assert importer.looks_like(folder)
    run = tmp_path / "run"
    run.mkdir()
    assert not importer.looks_like(run)
    for text in ('{"preset": "cd"}', "[1]", "{", ""):
        (run / "config.json").write_text(text)
        assert not importer.looks_like(run)


# Files.


@pytest.mark.parametrize(
    ("name", "message"),
    [(CONFIG, "no config.json of a network"), (SCHEDULER, "no scheduler_config.json"), (WEIGHTS, "no weights")],
)
def test_missing_files(folder, name, message):
    (folder / name).unlink()
    refused(folder, message)


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, "model_index.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b'"text"', b"3", b"\xff\xfe\x00", b"[" * 100_000, b"{" + b'"a":{' * 50_000, b"9" * 10_000],
    ids=["empty", "open", "list", "text", "number", "no text", "deep list", "deep object", "long number"],
)
def test_files_that_are_no_objects(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, "no JSON")


def test_a_file_that_is_too_long(folder):
    with (folder / CONFIG).open("wb") as file:
        file.truncate(10**9)
    refused(folder, "too long")


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, WEIGHTS, "model_index.json", "unet"])
def test_links_in_a_circle(folder, name):
    path = folder / name
    if path.is_dir():
        path.rename(folder / "elsewhere")
    else:
        path.unlink()
    path.symlink_to(path.name)
    if name == "model_index.json":  # which is not needed
        assemble(importer.read(folder))
    else:
        refused(folder, "no ")


def test_links_are_followed(folder, tmp_path):
    """The hub's cache is made of links."""
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to("../../blob")
    assemble(importer.read(folder))


# Configs.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel, and of diffusers' models cmtool reads"),
        ({"_class_name": None}, "_class_name is None"),
        ({"in_channels": -3}, "in_channels is -3"),
        ({"in_channels": 10**12}, "."),
        ({"in_channels": True}, "in_channels is True"),
        ({"in_channels": "3"}, "in_channels is 3"),
        ({"out_channels": 2.5}, r"out_channels is 2\.5"),
        ({"layers_per_block": 10**9}, "cannot be built"),
        ({"layers_per_block": -1}, "num_blocks is -1"),
        ({"block_out_channels": [10**12, 10**12]}, "cannot be built"),
        ({"block_out_channels": [10**30, 10**30]}, "cannot be built"),
        ({"block_out_channels": [-8, 16]}, "widths are"),
        ({"block_out_channels": [8] * 100_000}, "100000 widths"),
        ({"block_out_channels": []}, "0 widths"),
        ({"block_out_channels": 8}, "block_out_channels is 8"),
        ({"block_out_channels": [8, None]}, "block_out_channels is"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "1 up_blocks"),
        ({"sample_size": None}, "size of the images"),
        ({"sample_size": 10**9}, "sample_size is"),
        ({"sample_size": [8, 16]}, "square"),
        ({"sample_size": 7}, "cannot be halved"),
        ({"norm_num_groups": 3}, "cannot be built"),
        ({"norm_num_groups": 0}, "is 0"),
        ({"attention_head_dim": 5}, "heads of 5"),
        ({"attention_head_dim": -4}, "not negative"),
        ({"norm_eps": 0}, "positive"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"mid_block_scale_factor": float("inf")}, "mid_block_scale_factor is inf"),
        ({"freq_shift": 0.5}, r"no freq_shift 0\.5"),
        ({"act_fn": "mish"}, "no act_fn 'mish'"),
        ({"class_embed_type": "timestep"}, "no class_embed_type 'timestep'"),
        ({"mid_block_type": "Other"}, "no mid_block_type 'Other'"),
        ({"resnet_time_scale_shift": "spatial"}, "no resnet_time_scale_shift 'spatial'"),
        ({"time_embedding_type": "learned"}, "'learned', not one of"),
        ({"time_embedding_type": "fourier"}, "is no time it can take"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"num_class_embeds": 10**15}, "."),
        ({"num_class_embeds": 4}, "class_embedding.weight is missing"),
        ({"block_out_channels": [8, 32]}, "has shape"),
        ({"out_channels": 4}, "has shape"),
        ({"dropout": 1.5}, r"dropout is 1\.5"),
        ({"time_embedding_dim": -4}, "not negative"),
    ],
)
def test_configs_that_make_no_sense(folder, values, message):
    change(folder / CONFIG, **values)
    refused(folder, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler, which cmtool does not know"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "does not know"),
        ({"_class_name": 3}, "_class_name is 3"),
        ({"beta_schedule": "laplace"}, "does not know the beta_schedule 'laplace'"),
        ({"prediction_type": "flow_prediction"}, "does not know the prediction_type 'flow_prediction'"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": -5, "beta_schedule": "sigmoid"}, "num_train_timesteps is -5"),
        ({"trained_betas": [0.1, 0.2]}, "2 betas for 1000 steps"),
        ({"trained_betas": "all"}, "trained_betas is all"),
        ({"beta_end": 2.0}, "between 0 and 1"),
        ({"beta_start": float("nan")}, "beta_start is nan"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "something else than a step"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "something else than a step"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "time_embedding_type fourier"),
        ({"_class_name": "KarrasVeScheduler"}, "time_embedding_type fourier"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "no prediction_type 'sample'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.0}, r"sigma_data is 0\.0"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 90.0}, "t_min < t_max"),
        ({"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"_class_name": "CMStochasticIterativeScheduler", "rho": -7}, r"rho is -7\.0"),
    ],
)
def test_schedulers_that_make_no_sense(folder, values, message):
    change(folder / SCHEDULER, **values)
    refused(folder, message)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "vqvae", "transformer"])
@pytest.mark.parametrize("named", [True, False])
def test_pipelines_of_other_things(folder, part, named):
    if named:
        change(folder / "model_index.json", **{part: ["diffusers", "AutoencoderKL"]})
    else:
        (folder / part).mkdir()
    refused(folder, "text-to-image and latent pipelines are out of scope")


def test_sizes_that_do_not_fit(tmp_path):
    """A network of four channels in and three out has no image to denoise."""
    exporter.write(denoiser(replace(UNET, in_channels=4)), tmp_path / "model")
    refused(tmp_path / "model", "takes images of 4 channels and gives 3")


# Weights.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), r"conv_in\.bias is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is not part of the network"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(9)}), r"has shape \(9,\), not \(8,\)"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}), "no real numbers"),
        (lambda state: state["conv_in.bias"].fill_(float("nan")), "not finite"),
    ],
    ids=["missing", "extra", "shape", "whole numbers", "not a number"],
)
def test_tensors_that_do_not_fit(folder, damage, message):
    state = load_file(folder / WEIGHTS)
    damage(state)
    save_file(state, folder / WEIGHTS)
    refused(folder, message)


def lying(raw: bytes) -> bytes:
    """The header says that the first tensor is a thousand times as large."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"] = [10**12]
    header[name]["data_offsets"][1] = 4 * 10**12
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "cut in the header": lambda raw: raw[:100],
    "no end of the header": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    "a lie": lying,
    "noise": lambda raw: bytes(range(256)) * 10,
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_weights(folder, how):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(BROKEN[how](raw))
    refused(folder, "not a complete safetensors file|cannot be read")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


def test_pickles_are_not_run(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    bin_file = folder / "unet" / "diffusion_pytorch_model.bin"
    touched = tmp_path / "touched"
    torch.save({"conv_in.weight": Hostile(touched)}, bin_file)
    refused(folder, "asks for")
    bin_file.write_bytes(pickle.dumps(Hostile(touched)))
    refused(folder, ".")
    torch.save([torch.zeros(3)], bin_file)
    refused(folder, "not the tensors of a network")
    assert not touched.exists()


# Weights in several files.


@pytest.fixture
def shards(folder) -> Path:
    """The same weights in two files with an index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / "unet" / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(shards):
    model = assemble(importer.read(shards))
    expected = denoiser().network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["../../x.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "a\\b.safetensors", "x.pkl", 5, None, ["x"]],
)
def test_shards_outside_the_folder(shards, tmp_path, name):
    state = denoiser().network.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    index = shards / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    change(index, weight_map=dict.fromkeys(state, name))
    refused(shards, "names a file of weights that is none")


def test_damaged_shards(shards):
    first, second = sorted((shards / "unet").glob("*.safetensors"))
    raw = first.read_bytes()
    first.write_bytes(raw[: len(raw) // 2])
    refused(shards, "not a complete safetensors file")
    first.write_bytes(second.read_bytes())
    refused(shards, "in two files")
    first.unlink()
    refused(shards, "there is no .*00001-of-00002")
    index = shards / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for weight_map in (None, [], {}, "x"):
        change(index, weight_map=weight_map)
        refused(shards, "no weight_map")


# What the folder tells besides.


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\ntags:\n- x\n---\n# Title", "MIT"),
        ("---\ntags:\n- license: no\nlicense: 'Apache-2.0'\n---\n", "Apache-2.0"),
        ("---\nlicense: openrail++\n---\n", "openrail++"),
        ("---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"),
        ("# Title\nlicense: mit\n", ""),
        ("---\ntitle: x\n---\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_licences(folder, text, licence):
    (folder / "README.md").write_text(text)
    assert importer.read(folder).card.licence == licence


def test_no_model_card(folder):
    (folder / "README.md").unlink()
    assert importer.read(folder).card.licence == ""


def test_released_models_are_known_by_name(tmp_path):
    names = {
        "diffusers-cd_imagenet64_lpips": (40, (80.0, 1.382368)),
        "models--openai--diffusers-ct_cat256/snapshots/0123abc": (151, (80.0, 5.248503)),
        "diffusers-ct_imagenet64": (40, None),  # made for another grid: not that model
        "diffusers-cd_imagenet64_lpips2": (40, None),
        "mine": (40, None),
    }
    for name, (points, times) in names.items():
        exporter.write(consistency(grid_points=points), tmp_path / name)
        card = importer.read(tmp_path / name).card
        assert ("2" in card.times) == (times is not None), name
        if times is not None:
            assert card.times["2"] == pytest.approx(times, rel=1e-5)
            assert any("known by the folder's name" in note for note in card.notes)
    assert importer.read(tmp_path / list(names)[1]).card.source == "diffusers, openai/diffusers-ct_cat256"


def test_options_of_sampling_are_noted(tmp_path):
    exporter.write(consistency(), tmp_path / "model")
    change(tmp_path / "model" / SCHEDULER, s_noise=1.01, clip_denoised=False)
    notes = importer.read(tmp_path / "model").card.notes
    assert len(notes) == 2
    assert "1.01" in notes[0]
    assert "--no-clip" in notes[1]


# Writing.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: consistency(form=BoundaryEDM()), r"this one is told 0\.25 ln\(sigma\)"),
        (lambda: consistency(form=EDM(time_input=LogRatio(250.0))), "this one has edm"),
        (lambda: consistency(form=Piecewise(time_input=LogRatio(250.0))), "this one has piecewise"),
        (lambda: consistency(path=Trig()), "this one is on trig"),
        (lambda: consistency(micro()), "no network like ddpmpp"),
        (lambda: consistency(replace(ADM, channels=16, head_channels=0)), "16, 24, 32 groups"),
        (lambda: consistency(replace(ADM, channel_mult=(2, 2))), "2 times as wide"),
        (lambda: consistency(replace(ADM, two_times=True)), "no network with two times"),
        (lambda: models.model("flow_map", ADM, VE(), EDM()), "no network with two times"),
        (lambda: models.model("denoiser", ADM, VE(), EDM(time_input=LogRatio(250.0))), "no scheduler of diffusers"),
        (lambda: models.model("denoiser", ADM, VP(t_max=500.0), Epsilon()), "no scheduler of diffusers"),
        (lambda: models.model("denoiser", ADM, VP(), Epsilon(sign=-1.0)), "no scheduler of diffusers"),
    ],
)
def test_models_that_diffusers_has_no_equal_of(tmp_path, make, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        exporter.write(make(), tmp_path / "model")
    assert "--to cmtool" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_heads_of_several_widths(tmp_path):
    with pytest.raises(CheckpointError, match="2 attention heads at every width"):
        exporter.write(
            consistency(replace(ADM, head_channels=0, num_heads=2, attention_resolutions=(8,))), tmp_path / "model"
        )


def test_views_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="save the model itself"):
        exporter.write(on_path(consistency(), Trig()), tmp_path / "model")


def test_places_that_are_taken(tmp_path):
    model = consistency()
    (tmp_path / "empty").mkdir()
    exporter.write(model, tmp_path / "empty")
    for taken in (tmp_path / "empty", tmp_path / "file"):
        if not taken.exists():
            taken.write_text("x")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            exporter.write(model, taken)
    with pytest.raises(CheckpointError, match="cannot write"):
        exporter.write(model, tmp_path / "file" / "inside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_atomic", full)
    with pytest.raises(CheckpointError, match="No space left"):
        exporter.write(consistency(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_and_its_card(tmp_path):
    model = consistency(
        grid_points=40, licence="MIT", source="cmtool", data="digits", teacher="a\nteacher", notes=("one\n---", "two"),
        times={"2": (80.0, 1.3823682069778442), "3": (80.0, 10.0, 0.8)},
    )  # fmt: skip
    exporter.write(model, tmp_path / "model")
    files = sorted(str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*.*"))
    assert files == ["README.md", "model_index.json", SCHEDULER, CONFIG, WEIGHTS]
    assert json.loads((tmp_path / "model" / "model_index.json").read_text()) == {
        "_class_name": "ConsistencyModelPipeline",
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    raw = (tmp_path / "model" / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    readme = (tmp_path / "model" / "README.md").read_text()
    assert readme.startswith("---\nlicense: mit\n")
    assert "timesteps=[22, 0]).images[0]  # 2 steps, sigma 80, 1.382" in readme
    assert "# 3 steps, the nearest to sigma 80, 10, 0.8" in readme
    for text in ("- Licence: MIT", "- Data: digits", "- Teacher: a teacher", "- Note: one ---", "- Note: two"):
        assert text in readme.splitlines()
    mode = (tmp_path / "model").stat().st_mode & 0o777
    assert mode == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
