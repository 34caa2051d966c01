"""Any file as a model, by what is in it; everything that is no model, in words."""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cmtool
from cmtool import networks
from cmtool.errors import CheckpointError, UsageError
from cmtool.flow import EDM, VE, Epsilon, FlowMap, LogRatio, ModelCard
from cmtool.io import checkpoint, loading, torchfile
from cmtool.networks import ADMConfig
from tests import models

ADM = ADMConfig(
    resolution=8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,), head_channels=32
)


@pytest.fixture(scope="module")
def adm() -> dict[str, torch.Tensor]:
    return models.model(config=ADM, parameterization=EDM(time_input=LogRatio(250.0))).network.state_dict()


@pytest.fixture
def file(adm, tmp_path) -> Path:
    path = tmp_path / "edm_8x8.pt"
    torch.save(adm, path)
    return path


# Containers.


def test_torch_files_old_and_new_and_safetensors_are_the_same_model(adm, tmp_path):
    paths = [
        tmp_path / name for name in ("edm_new_8x8.pt", "edm_old_8x8.pt", "edm_safe_8x8.safetensors", "edm_8x8.bin")
    ]
    torch.save(adm, paths[0])
    torch.save(adm, paths[1], _use_new_zipfile_serialization=False)
    save_file({name: tensor.contiguous() for name, tensor in adm.items()}, paths[2])
    shutil.copy(paths[0], paths[3])
    assert [loading.sniff(path) for path in paths] == ["torch", "torch", "safetensors", "torch"]
    for path in paths:
        model = cmtool.load(path)
        assert model.network.config == ADM
        assert model.card.role == "denoiser"
        for name, tensor in model.network.state_dict().items():
            assert torch.equal(tensor, adm[name])


def test_half_precision_becomes_float32(adm, tmp_path):
    path = tmp_path / "edm_8x8.pt"
    torch.save({name: tensor.half() for name, tensor in adm.items()}, path)
    weights = cmtool.load(path).network.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.equal(tensor, adm[name].half().float()) for name, tensor in weights.items())


def test_a_loaded_model_does_not_hang_on_its_file(file):
    """Weights mapped from a file would change, or crash the process, when somebody writes over it."""
    model = cmtool.load(file)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with file.open("r+b") as out:
        out.truncate(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_a_model_of_another_path_and_form_survives_its_own_file(tmp_path):
    from cmtool.flow import VP, CosineStep, Sample, VPrediction, VPTime

    for path, form in (
        (VP(betas="squaredcos_cap_v2", zero_snr=True), VPrediction()),
        (VP(num_steps=4, t_max=3.0, table=(0.1, 0.2, 0.3, 0.4)), Epsilon()),
        (VE(), Epsilon(-1.0, unit_input=False, time_input=LogRatio(1.0, unit=2.0))),
        (VE(), Sample(time_input=VPTime())),
        (VE(), Epsilon(time_input=CosineStep())),
    ):
        made = models.model("denoiser", path=path, parameterization=form, notes=("one", "two"), source="here")
        checkpoint.save(made, tmp_path / "m.safetensors")
        back = cmtool.load(tmp_path / "m.safetensors")
        assert (back.path, back.parameterization, back.card) == (made.path, made.parameterization, made.card)


def test_files_of_the_first_version_are_still_read(tmp_path):
    """Version 0.1.0 knew neither sources and notes in the card nor a unit of the time input."""
    import json

    made = models.model(config=models.micro(num_classes=2))
    checkpoint.save(made, tmp_path / "new.safetensors")
    raw = (tmp_path / "new.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    told = json.loads(header["__metadata__"]["cmtool.model"])
    assert told["card"].pop("source") == ""
    assert told["card"].pop("notes") == []
    assert told["parameterization"]["time_input"].pop("unit") == 1.0
    header["__metadata__"]["cmtool.model"] = json.dumps(told)
    text = json.dumps(header).encode()
    (tmp_path / "old.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    old = cmtool.load(tmp_path / "old.safetensors")
    assert old.card == made.card
    assert old.parameterization == made.parameterization


# What is no model, or a hostile one. Every file gives an error in words, within seconds and bounded memory.


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never_cmtool",)


def zipped(compress=zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/"), data)
    return out.getvalue()


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def bomb() -> bytes:
    return zipped(zipfile.ZIP_DEFLATED, x__data=b"1", **{"x__data.pkl": b"\0" * 50_000_000})


def lying(size: int) -> bytes:
    text = f'{{"a":{{"dtype":"F32","shape":[{size}],"data_offsets":[0,{4 * size}]}}}}'.encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


def stretched() -> bytes:
    """One number, read as often as it takes to fill any memory."""
    return saved({"input_blocks.0.0.weight": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))})


def archive(program: bytes) -> bytes:
    """torch's archive around any pickle."""
    return zipped(**{"x__data.pkl": program, "x__version": b"3"})


DEEP = b"\x80\x02}(" + b")" + b"\x85" * 300_000 + b"K\x01u."  # as a key: its hash goes down 300,000 calls
SHARED = b"\x80\x02}()" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)) + b"K\x01u."  # ... or takes 2^60 steps


def hidden() -> bytes:
    """A compressed archive that Python's reader no longer takes for one."""
    return bomb() + b"PK\x05\x06"


HOSTILE = {
    "a deep key": (archive(DEEP), "cannot be read"),
    "a key of shared parts": (archive(SHARED), "cannot be read"),
    "a deep key, old": (loading._LEGACY + b"." + b"\x80\x02M\xe9\x03." + DEEP, ""),
    "a hidden bomb": (hidden(), ""),
    "two ends": (bomb() + zipped(**{"x__data.pkl": b"\x80\x02}."}), ""),
    "empty": (b"", "is empty"),
    "one byte": (b"\x80", ""),
    "text": (b"hello world, this is no model at all", "no file of weights"),
    "zeros": (b"\0" * 4096, "no file of weights"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "LFS pointer"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "HDF5"),
    "gzip": (b"\x1f\x8b\x08\0" + b"\0" * 64, "gzip"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "GGUF"),
    "another archive": (zipped(hello=b"world"), "data.pkl"),
    "no end": (saved({"a": torch.zeros(9)})[:-200], ""),
    "compressed bomb": (bomb(), "compressed"),
    "os.system": (saved({"a": Evil()}), "asks for"),
    "os.system, old": (None, "asks for"),
    "a list": (saved([torch.zeros(3)]), "not the tensors"),
    "nothing": (saved({}), "not the tensors"),
    "a training state": (saved({"model": {"a": torch.zeros(1)}, "step": 3}), "no plain state dict"),
    "numbers as names": (saved({1: torch.zeros(1)}), "no plain state dict"),
    "complex": (saved({"a": torch.zeros(2, dtype=torch.complex64)}), "asks for"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), ""),
    "stretched": (stretched(), "cannot be read"),
    "unknown network": (saved({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}), "does not know"),
    "diffusers weights": (saved({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)}), "without its config"),
    "lying safetensors": (lying(10**12), ""),
    "safetensors of nothing": (struct.pack("<Q", 2) + b"{}", ""),
    "safetensors header too long": (struct.pack("<Q", 2**40) + b"{" + b"\0" * 64, ""),
    "safetensors deep": (struct.pack("<Q", 200_000) + b'{"a":' * 40_000, ""),
    "msgpack cut": (b"\x81\xa6params", ""),
    "msgpack huge": (b"\xdf\xff\xff\xff\xff\xa1a\x01", ""),
    "msgpack deep": (b"\x81\xa1a" * 50_000, ""),
    "pickle cut": (pickle.dumps({"ema": list(range(1000))})[:-20], ""),
    "pickle os.system": (pickle.dumps({"ema": Evil()}), ""),
    "pickle of nothing": (pickle.dumps({"ema": {}}), ""),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_model_says_so(data, words, tmp_path, monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    if data is None:
        out = io.BytesIO()
        torch.save({"a": Evil()}, out, _use_new_zipfile_serialization=False)
        data = out.getvalue()
    path = tmp_path / "cd_x.pt"
    path.write_bytes(data)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"cd_x\.pt") as caught:
        cmtool.load(path)
    assert words in str(caught.value)
    assert caught.value.hint
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert not Path("/tmp/never_cmtool").exists()


def test_the_evil_file_would_have_done_it(tmp_path):
    """The traps above are real: Python's own reader springs them."""

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "x.pt").write_bytes(saved({"a": Touch()}))
    with pytest.raises(CheckpointError):
        torchfile.read(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("cut", [1, 10, 100, 1000, 5000])
def test_a_file_that_is_cut_off(file, cut):
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) - cut])
    with pytest.raises(CheckpointError):
        cmtool.load(file)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="is no run"):
        cmtool.load(tmp_path)


def test_what_is_neither_a_file_nor_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        cmtool.load(tmp_path / "pipe.pt")
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless" / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="endless"):
        cmtool.load(tmp_path / "endless")


@pytest.mark.parametrize("role", ["king", ""])
def test_a_role_that_there_is_not(role, file):
    with pytest.raises(UsageError, match="no role"):
        cmtool.load(file, role=role)


def test_a_file_that_may_not_be_read(file, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        loading.sniff(file)


# Memory.


def test_a_checkpoint_is_never_in_memory_more_than_about_twice(tmp_path):
    """The peak of a process that loads 160 MB, over one that loads next to nothing."""
    config = ADMConfig(resolution=16, channels=128, channel_mult=(1, 2, 3), num_blocks=2, attention_resolutions=(8,))
    with torch.device("meta"):
        shapes = networks.build(config).state_dict()
    size = sum(4 * tensor.numel() for tensor in shapes.values())
    assert size > 120e6
    code = (
        "import sys, resource, cmtool; cmtool.load(sys.argv[1]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, tmp_path / "edm_16x16.pt")
    little = models.model("denoiser", ADM, parameterization=EDM(time_input=LogRatio(250.0)))
    torch.save(little.network.state_dict(), tmp_path / "edm_8x8.pt")
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, name], capture_output=True, check=True, text=True).stdout)
        for name in (tmp_path / "edm_16x16.pt", tmp_path / "edm_8x8.pt")
    ]
    assert peaks[0] - peaks[1] < 2.2 * size


def test_the_card_of_a_released_model_is_completed_by_the_catalogue(adm, tmp_path):
    """The narrow network under a released name: what the file does not say, the catalogue does."""
    path = tmp_path / "cd_bedroom256_lpips.pt"
    torch.save(adm, path)
    card = cmtool.load(path).card
    assert (card.role, card.licence, card.data, card.grid_points) == ("consistency", "MIT", "bedroom256", 40)
    assert card.times["2"] == pytest.approx((80, 4.365562), rel=1e-6)


def test_a_card_knows_nothing_it_was_not_told():
    assert ModelCard("denoiser", 8).notes == ()
    assert isinstance(models.model(), FlowMap)
