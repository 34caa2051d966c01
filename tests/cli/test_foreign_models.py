"""Each kind of imported teacher is distilled on real images, and each kind of consistency model edits one."""

from __future__ import annotations

import itertools
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmtool import networks
from cmtool.flow import EDM, VE, VP, BoundaryEDM, Epsilon, Linear, LogRatio, Velocity
from cmtool.io import checkpoint
from cmtool.io.exporters import diffusers
from cmtool.io.importers import edm2
from cmtool.networks import ADMConfig, UNet2DConfig
from tests import models, pickles
from tests.unit.test_import_jax import reference
from tests.unit.test_import_jax import saved as saved_by_jax

CIFAR = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10-test.tar.xz"
SIDE = 32
ADM = ADMConfig(
    resolution=SIDE, channels=32, channel_mult=(1, 1), num_blocks=1, attention_resolutions=(), head_channels=16
)
DDPMPP = models.micro(SIDE, attention_resolutions=())
UNET = UNet2DConfig(
    resolution=SIDE,
    widths=(8, 16),
    down_blocks=("DownBlock2D", "AttnDownBlock2D"),
    up_blocks=("AttnUpBlock2D", "UpBlock2D"),
    num_blocks=1,
    groups=4,
    middle_groups=4,
)
OPENAI = LogRatio(250.0)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """Twenty real images."""
    if not CIFAR.exists():
        pytest.skip("needs ../shared/data")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(CIFAR) as archive:
        images = (member for member in archive if member.isfile() and member.name.endswith(".jpg"))
        for number, member in enumerate(itertools.islice(images, 20)):
            content = archive.extractfile(member)
            assert content is not None
            (folder / f"{number}.jpg").write_bytes(content.read())
    return folder


def weights(role, config, form):
    return models.model(role, config, parameterization=form).network.state_dict()


def write_pickle(path: Path, name: str, state: dict, side: int = SIDE) -> Path:
    constructed = {"img_resolution": side, "img_channels": 3, "label_dim": 0}
    made = pickles.network(state, name, constructed=constructed, sigma_data=0.5)
    path.write_bytes(pickles.dumps({"ema": made}))
    return path


def openai(folder: Path, name: str, form) -> Path:
    torch.save(weights("denoiser", ADM, form), folder / f"{name}_{SIDE}x{SIDE}.pt")
    return folder / f"{name}_{SIDE}x{SIDE}.pt"


def edm_names(config) -> dict:
    """Our DDPM++ weights as a pickle of NVlabs' has them: below the preconditioning, with the resampling filters."""
    state = {f"model.{name}": value for name, value in weights("denoiser", config, EDM()).items()}
    for place in (f"enc.{SIDE // 2}x{SIDE // 2}_down", f"dec.{SIDE}x{SIDE}_up"):
        for layer in ("conv0", "skip"):
            state[f"model.{place}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return state


def edm2_file(folder: Path) -> Path:
    config = networks.EDM2Config(
        resolution=SIDE, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=()
    )
    state = {f"{edm2.PREFIX}{name}": value for name, value in weights("denoiser", config, EDM()).items()}
    return write_pickle(folder / "edm2.pkl", "Precond", state)


def flow(folder: Path) -> Path:
    checkpoint.save(models.model("denoiser", DDPMPP, Linear(), Velocity()), folder / "flow.safetensors")
    return folder / "flow.safetensors"


def pipeline(folder: Path, role: str) -> Path:
    told = (VE(), BoundaryEDM(time_input=OPENAI), ADM) if role == "consistency" else (VP(), Epsilon(), UNET)
    diffusers.write(models.model(role, told[2], told[0], told[1]), folder / "pipeline")
    return folder / "pipeline"


def jax(folder: Path, name: str) -> Path:
    made = reference(channels=8, mult=(1, 2), blocks=1, attention=(16,), size=SIDE)
    return saved_by_jax(folder, made.params, name)


TEACHERS = {
    "OpenAI": lambda folder: openai(folder, "edm", EDM(time_input=OPENAI)),
    "NVlabs EDM": lambda folder: write_pickle(folder / "edm.pkl", "EDMPrecond", edm_names(DDPMPP)),
    "NVlabs EDM, VP scalings": lambda folder: write_pickle(folder / "vp.pkl", "VPPrecond", edm_names(DDPMPP)),
    "NVlabs EDM2": edm2_file,
    "diffusers DDPM": lambda folder: pipeline(folder, "denoiser"),
    "JAX": lambda folder: jax(folder, "edm_cifar10_ema"),
    "a flow model": flow,
}
STUDENTS = {
    "OpenAI": lambda folder: openai(folder, "cd", BoundaryEDM(time_input=OPENAI)),
    "ECT": lambda folder: write_pickle(folder / "ect.pkl", "ECMPrecond", edm_names(DDPMPP)),
    "diffusers": lambda folder: pipeline(folder, "consistency"),
    "JAX": lambda folder: jax(folder, "cd-l2/checkpoints/checkpoint_80"),
}


@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_is_distilled(cli, make, cifar, tmp_path):
    teacher = make(tmp_path)
    done = cli(
        *("distill", "--teacher", teacher, "--data", cifar, "--preset", "cd", "--iterations", 2, "--batch", 4),
        *("--sample-every", 2, "--log-every", 1, "--out", tmp_path / "run"),
    )
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(0 < line["loss"] < float("inf") and line["grad_norm"] > 0 for line in lines)
    told = json.loads(cli("info", tmp_path / "run", "--json").stdout)
    assert told["role"] == "consistency"
    assert told["boundary"] == 0
    if "NVlabs" in str(teacher) or teacher.suffix == ".pkl":
        assert told["licence"] == "CC-BY-NC-SA-4.0"
    assert cli("sample", "--model", tmp_path / "run", "--steps", 2, "--out", tmp_path / "x.png").code == 0


@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_is_sampled(cli, make, tmp_path):
    out = tmp_path / "x.png"
    done = cli("sample", "--model", make(tmp_path), "--solver", "heun", "--steps", 3, "--out", out)
    assert done.code == 0, done.stderr
    with Image.open(out) as image:
        assert image.size == (SIDE, SIDE)


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
def test_a_consistency_model_edits_a_real_image(cli, make, cifar, tmp_path):
    model, photo = make(tmp_path), cifar / "0.jpg"
    with Image.open(photo) as image:
        known = image.convert("RGB")
    known.resize((SIDE // 2, SIDE // 2)).save(tmp_path / "small.png")
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (8, 8, 24, 24))
    mask.save(tmp_path / "mask.png")
    edits = {
        "inpaint": ("--image", photo, "--mask", tmp_path / "mask.png"),
        "colorize": ("--image", photo),
        "superres": ("--image", tmp_path / "small.png", "--factor", 2),
    }
    for command, given in edits.items():
        out = tmp_path / f"{command}.png"
        done = cli(command, "--model", model, *given, "--steps", 2, "--out", out)
        assert done.code == 0, done.stderr
        with Image.open(out) as image:
            made = image.convert("RGB")
        assert made.size == (SIDE, SIDE)
        if command == "inpaint":  # what was known is what it was
            outside = [(x, y) for x in range(SIDE) for y in range(SIDE) if not (8 <= x < 24 and 8 <= y < 24)]
            assert all(made.getpixel(place) == known.getpixel(place) for place in outside)


def test_the_pickles_would_run_if_anybody_let_them():
    """What the files above embed is a call that Python's own reader makes."""
    data = pickles.dumps({"ema": pickles.network({}, "EDMPrecond", constructed={})})
    with pickles.homes(), pytest.raises(AssertionError, match="nothing reads these"):
        pickle.loads(data)
