"""Trunks of LPIPS: where they are looked for, and that a wrong file is refused before it is used."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from cmtool.errors import DependencyError
from cmtool.io.backbones import FILES, VARIABLE, read_backbone

STATE = {"features.0.weight": torch.arange(4.0), "features.0.bias": torch.ones(1), "classifier.0.weight": torch.ones(2)}


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def promising(folder):
    """A file whose name holds the start of its hash, as torchvision's do."""
    torch.save(STATE, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()
    return (folder / "x.pth").rename(folder / f"vgg-{digest[:8]}.pth")


def test_only_the_features_are_read(tmp_path):
    for file in (promising(tmp_path), tmp_path / "trunk.safetensors"):
        if file.suffix == ".safetensors":
            save_file(STATE, file)
        state = read_backbone("vgg", file)
        assert state.keys() == {"features.0.weight", "features.0.bias"}
        assert torch.equal(state["features.0.weight"], torch.arange(4.0))


def test_the_option_goes_before_the_variable_and_that_before_the_standard_place(monkeypatch, tmp_path, hub):
    def asked(given=None):
        with pytest.raises(DependencyError) as caught:
            read_backbone("alex", given)
        assert FILES["alex"] in caught.value.hint
        return caught.value.message

    assert str(hub / FILES["alex"]) in asked()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable.pth"))
    assert "variable.pth" in asked()
    assert "option.pth" in asked(tmp_path / "option.pth")


def test_damaged_files_and_other_networks(tmp_path):
    file = promising(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DependencyError, match="damaged"):
        read_backbone("vgg", file)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "empty.pth", "text.safetensors", "list.pth"):
        with pytest.raises(DependencyError, match=r"cannot be read|something else"):
            read_backbone("vgg", tmp_path / name)
    torch.save({"layer1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with pytest.raises(DependencyError, match="something else"):
        read_backbone("vgg", tmp_path / "resnet.pth")
