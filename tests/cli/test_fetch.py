"""`cmtool models ls` and `cmtool fetch`: what they print, and that they are quick to start."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cmtool.compat import repair_torchvision
from cmtool.io import auxiliary, catalogue, origins
from cmtool.io.box import BOXED
from tests.unit.test_origins import serving

BODY = b"weights" * 1000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    for name in ("CMTOOL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def address(monkeypatch):
    """A server that gives BODY for any path but /gone; `tiny_model` is a release on it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        gone = handler.path == "/gone"
        handler.send_response(404 if gone else 200)
        handler.send_header("Content-Length", "0" if gone else str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(b"" if gone else BODY)

    with serving(answer) as address:
        made = replace(catalogue.RELEASED["ct_imagenet64"], name="tiny_model", url=f"{address}/tiny.pt", file="tiny.pt")
        monkeypatch.setitem(catalogue.RELEASED, "tiny_model", made)
        yield address


def test_the_list(cli, cache):
    result = cli("models", "ls")
    assert (result.code, result.stderr) == (0, "")
    rows = {line.split()[0]: line for line in result.lines}
    assert list(rows) == [*BOXED, *catalogue.RELEASED]
    for word in ("consistency distillation, LPIPS, bedroom256", "MIT", "~2,105 MB", "times 80,4.366"):
        assert word in rows["cd_bedroom256_lpips"]
    for word in ("NVlabs EDM", "CC-BY-NC-SA-4.0", "--churn 40,0.05,50,1.003"):
        assert word in rows["edm-imagenet-64x64-cond-adm"]
    assert all(row.endswith("  here" if name in BOXED else "  -") for name, row in rows.items())
    assert not cache.parent.exists()


def test_the_list_says_what_is_here(cli, cache):
    cache.mkdir(parents=True)
    (cache / "ct_cat256.pt").write_bytes(BODY)
    origins.resolve("ct_cat256")  # accepted, and its checksum recorded
    (line,) = (line for line in cli("models", "ls").lines if line.startswith("ct_cat256 "))
    assert SHA[:12] in line
    assert line.endswith("here")
    described = json.loads(cli("models", "ls", "--json").stdout)
    assert described["folder"] == str(cache)
    models = {model["name"]: model for model in described["models"]}
    assert list(models) == [*BOXED, *catalogue.RELEASED]
    found = models["ct_cat256"]
    assert (found["path"], found["recorded_sha256"]) == (str(cache / "ct_cat256.pt"), SHA)
    assert (found["times"], found["grid_points"], found["role"]) == ([0, 62], 151, "consistency")
    assert models["cd_cat256_l2"]["path"] is None


def test_the_list_loads_nothing_slow():
    code = (
        "import sys; from cmtool.cli.app import main; assert main(['models', 'ls']) == 0;"
        "slow = {'torch', 'numpy', 'huggingface_hub', 'safetensors', 'rich'} & sys.modules.keys();"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_fetching_prints_where_the_files_are(cli, cache, address):
    result = cli("fetch", "tiny_model", f"{address}/other.pt")
    assert result.code == 0
    one, two = result.lines
    assert one == str(cache / "tiny.pt")
    assert two.endswith("/other.pt")
    assert (cache / "tiny.pt").read_bytes() == BODY
    assert "tiny_model: licence MIT" in result.stderr
    assert cli("--quiet", "fetch", "tiny_model") == (0, f"{one}\n".encode(), "")


def test_fetching_as_json(cli, cache, address):
    described = json.loads(cli("fetch", "tiny_model", "--json").stdout)
    assert described == {
        "models": [
            {
                "source": "tiny_model",
                "path": str(cache / "tiny.pt"),
                "bytes": len(BODY),
                "sha256": SHA,
                "released": "tiny_model",
                "licence": "MIT",
            }
        ]
    }


def test_fetching_what_is_not_to_be_had(cli, cache, address, monkeypatch, tmp_path):
    cli("fetch", "cd_imagenet64_l1").error(1, "no released checkpoint", "did you mean cd_imagenet64_l2")
    cli("fetch", f"{address}/gone").error(1, "cannot download", "404", "give its path")
    cli("fetch", tmp_path).error(2, "is a path", "hf:owner/name")
    cli("fetch").error(2, "NAME")
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    cli("fetch", "cd_imagenet64_l2").error(1, "offline", f"put it into {cache} as cd_imagenet64_l2.pt")
    cli("fetch", "--json", "tiny_model").error(1, "offline")


def test_a_release_by_name_is_a_model(cli, cache, student, monkeypatch, tmp_path):
    """What lies in the cache under a release's name is what --model reads."""
    cache.mkdir(parents=True)
    (cache / "ct_imagenet64.pt").write_bytes(student.read_bytes())
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    result = cli("sample", "--model", "ct_imagenet64", "--seeds", "0", "--out", tmp_path / "x.png")
    assert result.code == 0, result.stderr
    assert (tmp_path / "x.png").is_file()


@pytest.fixture
def weights(address, monkeypatch, tmp_path):
    """`lpips-vgg` on that server, and no folder of torch.hub's; returns the file's name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    name = f"vgg16-{SHA[:8]}.pth"
    monkeypatch.setitem(catalogue.WEIGHTS, "lpips-vgg", name)
    monkeypatch.setattr(auxiliary, "address", lambda _: f"{address}/{name}")
    return name


def test_weights_of_a_distance_are_fetched_checked_and_found(cli, cache, weights):
    result = cli("fetch", "lpips-vgg")
    assert (result.code, result.lines) == (0, [str(cache / weights)])
    assert (cache / weights).read_bytes() == BODY
    assert auxiliary.find("lpips-vgg") == cache / weights
    (described,) = json.loads(cli("fetch", "lpips-vgg", "--json").stdout)["models"]
    assert (described["source"], described["sha256"]) == ("lpips-vgg", SHA)


def test_weights_that_torch_has_fetched_are_not_fetched_again(cli, cache, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    cli("fetch", "lpips-vgg").error(1, "offline")
    there = tmp_path / "torch" / "hub" / "checkpoints" / weights
    there.parent.mkdir(parents=True)
    there.write_bytes(BODY)
    assert cli("fetch", "lpips-vgg").lines == [str(there)]
    assert not cache.exists()
    there.write_bytes(BODY[1:])
    cli("fetch", "lpips-vgg").error(1, "damaged", "delete it")


def test_weights_that_are_not_what_their_name_promises(cli, cache, weights, monkeypatch, address):
    monkeypatch.setitem(catalogue.WEIGHTS, "lpips-vgg", "vgg16-00000000.pth")
    cli("fetch", "lpips-vgg").error(1, "00000000", "not the right file")
    assert not [*cache.glob("*.pth"), *cache.glob("*.part")]  # what is wrong never lands
    (cache / "vgg16-00000000.pth").write_bytes(BODY)
    cli("fetch", "lpips-vgg").error(1, "00000000", "delete it")
    monkeypatch.setitem(catalogue.WEIGHTS, "lpips-vgg", "vgg16-00000001.pth")
    monkeypatch.setattr(auxiliary, "address", lambda _: f"{address}/gone")
    cli("fetch", "lpips-vgg").error(1, "lpips-vgg")
    assert [file.name for file in cache.glob("*.pth")] == ["vgg16-00000000.pth"]


@pytest.mark.parametrize("name", list(catalogue.WEIGHTS))
def test_addresses_are_those_of_the_packages_that_use_the_weights(name):
    repair_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    address, file = auxiliary.address(name), catalogue.WEIGHTS[name]
    assert address.startswith("https://")
    assert address.endswith(f"/{file}")
    assert len(auxiliary._promised(Path(file))) == 8
    assert name != "inception" or address == URL_INCEPTION_V3


def test_names_of_weights_are_no_models(cli):
    cli("fetch", "lpips-vg").error(1, "did you mean lpips-vgg")
    cli("fetch", "inceptoin").error(1, "did you mean inception")
    cli("sample", "--model", "lpips-vgg").error(1, "no model", "models ls")


def test_an_address_that_nobody_knows(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    cli("fetch", "lpips-alex").error(1, "torchvision", "install")
