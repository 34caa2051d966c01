"""The table of released checkpoints against the networks that this package builds and the published numbers."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pytest
import torch

from cmtool import networks
from cmtool.flow import VE
from cmtool.io import catalogue, origins
from cmtool.io.catalogue import RELEASED
from cmtool.networks import configs
from cmtool.times import Karras

every = pytest.mark.parametrize("name", RELEASED)


def test_what_there_is():
    families = {
        family: sum(row.family == family for row in RELEASED.values()) for family in ("openai", "edm", "edm2", "jcm")
    }
    assert families == {"openai": 12, "edm": 9, "edm2": 8, "jcm": 10}
    assert len({row.file for row in RELEASED.values()}) == len({row.url for row in RELEASED.values()}) == len(RELEASED)


@every
def test_a_row_is_consistent(name):
    row = RELEASED[name]
    assert row.name == name
    assert origins._checked(row.url) == row.url
    assert row.url.startswith("https://")
    assert origins._file_name(f"https://host/{row.file}") == row.file
    if row.family != "jcm":  # whose files are told apart by their folders
        assert PurePosixPath(urlsplit(row.url).path).name == row.file
    assert row.licence == {"openai": "MIT", "jcm": "Apache-2.0"}.get(row.family, "CC-BY-NC-SA-4.0")
    assert (row.role == "denoiser") == (row.method == "edm") == bool(row.solver)
    assert not (row.times and row.solver)
    assert str(row.resolution) in row.data or row.resolution == 32
    assert all(0 <= index < row.grid_points for index in row.times)


def test_addresses():
    """As the READMEs of their publishers give them."""
    for name, url in {
        "cd_bedroom256_lpips": "https://openaipublic.blob.core.windows.net/consistency/cd_bedroom256_lpips.pt",
        "edm_imagenet64_ema": "https://openaipublic.blob.core.windows.net/consistency/edm_imagenet64_ema.pt",
        "edm-ffhq-64x64-uncond-ve": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-ve.pkl",
        "edm2-img64-xl-fid": "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
        "edm2-img64-xl-0671088-0.040.pkl",
        "jcm-edm-cifar10": "https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/edm_cifar10_ema",
        "jcm-ct-lpips": "https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/ct-lpips/checkpoints/"
        "checkpoint_74",
    }.items():
        assert RELEASED[name].url == url
        assert catalogue.by_url(f"{url}?x=1#y") is RELEASED[name]


def network(row: catalogue.Released) -> configs.Config:
    """The network of a release, as this package describes it."""
    if row.family == "openai" or row.name.endswith("-adm"):
        return configs.adm_imagenet64() if row.resolution == 64 else configs.adm_lsun256()
    plus = row.name.endswith("-vp")
    if row.resolution == 32:
        return (configs.ddpmpp_cifar10 if plus else configs.ncsnpp_cifar10)(num_classes=row.num_classes)
    return configs.ddpmpp_ffhq64() if plus else configs.ncsnpp_ffhq64()


@cache
def count(config: configs.Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in networks.build(config).parameters())


@pytest.mark.parametrize("name", [name for name, row in RELEASED.items() if row.family != "edm2"])
def test_parameters_are_those_of_the_network(name):
    row = RELEASED[name]
    assert count(network(row)) == row.parameters
    assert network(row).num_classes == row.num_classes
    assert network(row).resolution == row.resolution


def test_sizes_are_near_those_that_others_report():
    assert RELEASED["edm_bedroom256_ema"].estimated_size == pytest.approx(2_105_395_349, rel=1e-3)
    assert RELEASED["edm-ffhq-64x64-uncond-vp"].estimated_size == pytest.approx(247_513_128, rel=2e-3)
    assert RELEASED["edm2-img64-xs-0134217-0.110"].estimated_size == pytest.approx(238 * 2**20, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        ("cd_imagenet64_l2", 1.382368),
        ("cd_imagenet64_lpips", 1.382368),
        ("ct_imagenet64", 1.912844),
        ("cd_bedroom256_lpips", 4.365562),
        ("cd_bedroom256_l2", 3.519699),
        ("ct_bedroom256", 3.991219),
        ("ct_cat256", 5.248503),
        ("jcm-cd-lpips", 0.585348),
        ("jcm-cd-l1", 0.585348),
        ("jcm-cd-l2", 0.585348),
    ],
)
def test_times_are_the_published_ones(name, sigma):
    assert RELEASED[name].sigmas() == pytest.approx((80.0, sigma), abs=1e-5)
    grid = Karras().times(VE(), RELEASED[name].grid_points)
    assert RELEASED[name].sigmas() == pytest.approx(grid[list(RELEASED[name].times)].tolist(), rel=1e-7)


def test_no_times_where_none_are_published():
    for name in ("cd_cat256_l2", "cd_cat256_lpips", "edm_imagenet64_ema", "jcm-continuous-cd-l2"):
        assert RELEASED[name].sigmas() == ()


def test_solvers_are_options_of_the_command():
    from typer.main import get_command

    from cmtool.cli import options
    from cmtool.cli.app import app

    known = {option for parameter in get_command(app).commands["sample"].params for option in parameter.opts}
    for row in RELEASED.values():
        words = row.solver.split()
        assert set(words[::2]) <= known
        if words:
            assert words[1] in options.SOLVERS
            assert int(words[3]) == row.grid_points
        if len(words) > 4:
            assert options.parse_churn(words[5])


def test_finding_by_name_and_file():
    row = RELEASED["ct_cat256"]
    assert catalogue.by_file("/somewhere/ct_cat256.pt") is row
    assert catalogue.by_file("ct_cat256.pkl") is None
    assert catalogue.by_url("https://example.org/ct_cat256.pt") is None
    assert "did you mean ct_cat256" in catalogue.suggest("ct_cat265")
    assert "cmtool models ls" in catalogue.suggest("zzzz")


def test_neither_the_table_nor_downloads_import_torch_or_the_hub():
    code = (
        "import sys; from cmtool.io import catalogue, origins;"
        "slow = {'torch', 'numpy', 'huggingface_hub', 'safetensors'} & sys.modules.keys(); assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
