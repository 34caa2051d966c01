"""`cmtool evaluate` and `cmtool stats`: numbers that are those of others, and the protocol that goes with them."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli.app import main
from cmtool.compat import repair_torchvision
from cmtool.io import extractors
from tests import team

SMALL = ["--precision", "fp32", "--batch", 4, "--set", "network.channels=8", "--sample-every", 0, "--iterations", 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders of smooth pictures of 8x8, and models that were hardly trained: `run` and its `teacher`."""
    root = tmp_path_factory.mktemp("evaluate")
    chance = np.random.default_rng(0)
    for name, count, level in (("some", 14, 200), ("other", 12, 255), ("few", 2, 255)):
        (root / name).mkdir()
        for number in range(count):
            coarse = chance.integers(0, level, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((8, 8), Image.Resampling.BILINEAR).save(root / name / f"{number:03d}.png")
    for name, preset in (("run", "ect"), ("teacher", "edm")):
        ask = ("train", "--data", root / "some", "--out", root / name, "--preset", preset, *SMALL)
        assert main([*map(str, ask), "-q"]) == 0
    return root


def told(cli, *args):
    result = cli("evaluate", *args, "--json")
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def numbers(cli, *args):
    return told(cli, *args)["results"][0]["metrics"]


def test_a_model_is_judged_with_its_protocol(cli, made, tmp_path):
    ask = ("--model", made / "run", "--data", made / "some", "-n", 12, "--steps", "1,2", "--precision", "fp32")
    found = told(cli, *ask, "--out", tmp_path / "result.json")
    assert [row["nfe"] for row in found["results"]] == [1, 2]
    for row in found["results"]:
        assert row["metrics"].keys() == {"fd_random@12", "precision_random@12", "recall_random@12"}
        assert row["seconds"] > 0
    assert found["samples"] == {"count": 12, "seeds": "0-11", "rounding": "to uint8, once"}
    assert (found["reference"]["images"], found["reference"]["resolution"]) == (14, 8)
    assert len(found["reference"]["fingerprint"]) == 16
    assert found["features"][0]["features"] == "random"
    assert (found["model"]["preset"], found["model"]["iterations"], len(found["model"]["sha256"])) == ("ect", 2, 64)
    assert found["computed"]["precision"] == "fp32"
    assert json.loads((tmp_path / "result.json").read_text()) == found
    lines = cli("evaluate", *ask).lines
    assert len(lines) == 6
    assert lines[0].split()[:3] == ["1", "call", "fd_random@12"]


def test_repeats_are_sets_of_the_next_seeds(cli, made):
    ask = ("--model", made / "run", "--data", made / "some", "--precision", "fp32", "-n", 6, "--steps", "1,2")
    found = told(cli, *ask, "--repeats", 3)
    assert (found["samples"]["count"], found["samples"]["seeds"]) == (6, "0-5,6-11,12-17")
    once = told(cli, *ask)
    for row, single in zip(found["results"], once["results"], strict=True):
        assert "repeats" not in single
        assert row["repeats"].keys() == row["metrics"].keys() == single["metrics"].keys()
        for name, values in row["repeats"].items():
            assert len(values) == 3
            assert row["metrics"][name] == pytest.approx(sum(values) / 3)
            assert values[0] == pytest.approx(single["metrics"][name], rel=1e-4)
        assert len(set(row["repeats"]["fd_random@6"])) == 3  # other seeds, other numbers
    lines = cli("evaluate", *ask, "--repeats", 2).lines
    assert lines[0].startswith("1 call   fd_random@6")
    assert "mean of 2: " in lines[0]
    assert "standard deviation" in lines[0]
    assert not any(line != line.rstrip() for line in cli("evaluate", *ask).lines)


def test_repeats_of_what_has_no_seeds(cli, made):
    some = ("--data", made / "some")
    cli("evaluate", "--images", made / "other", *some, "--repeats", 2).error(2, "--repeats")
    cli("evaluate", "--model", made / "run", *some, "--repeats", 0).error(2, "--repeats")
    cli("evaluate", "--model", made / "run", *some, "-n", 10**6, "--repeats", 2).error(2, "--repeats")
    ask = ("--model", made / "run", "--teacher", made / "teacher", "--metrics", "ode-error")
    cli("evaluate", *ask, "--repeats", 2).error(2, "--repeats")


def test_numbers_do_not_depend_on_how_they_are_computed(cli, made):
    ask = ("--model", made / "run", "--data", made / "some", "-n", 9, "--metrics", "fd,kd,precision,recall")
    ask = (*ask, "--precision", "fp32")
    whole = numbers(cli, *ask)
    assert numbers(cli, *ask, "--batch", 3) == pytest.approx(whole, rel=1e-4)
    first, second = team.cmtool(2, "evaluate", *ask, "--json")
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
    assert json.loads(first.out)["results"][0]["metrics"] == pytest.approx(whole, rel=1e-4)


def test_images_against_themselves(cli, made):
    found = numbers(cli, "--images", made / "some", "--data", made / "some", "--metrics", "fd,kd,precision,recall")
    assert found["fd_random@14"] == pytest.approx(0, abs=1e-9)
    assert (found["precision_random@14"], found["recall_random@14"]) == (1, 1)
    assert found["kd_random"] <= 0
    other = numbers(cli, "--images", made / "some", "--data", made / "other")
    assert other["fd_random@14"] > 0.01


def test_stored_statistics_are_as_good_as_the_images(cli, made, tmp_path):
    ask = ("--images", made / "some", "--metrics", "fd,kd,precision,recall")
    file = tmp_path / "ref.npz"
    assert cli("stats", "--data", made / "other", "--out", file).lines == [str(file)]
    cli("evaluate", *ask, "--data", file).error(1, "a mean and a covariance only", "--vectors")
    straight = numbers(cli, *ask, "--data", made / "other")
    assert numbers(cli, "--images", made / "some", "--metrics", "fd", "--data", file) == pytest.approx(
        {"fd_random@14": straight["fd_random@14"]}
    )
    made_again = cli("stats", "--data", made / "other", "--out", file, "--vectors", "--json")
    about = json.loads(made_again.stdout)
    assert (about["images"], about["dimension"], about["features"]) == (12, 480, "random")
    found = told(cli, *ask, "--data", file)
    assert found["results"][0]["metrics"] == pytest.approx(straight)
    assert found["reference"]["images"] == 12
    cli("evaluate", *ask, "--data", file, "--limit", 5).error(2, "--limit is for images")
    with np.load(file) as arrays:
        held = dict(arrays)
    changed = json.loads(str(held["about"])) | {"sha256": "0" * 64}
    np.savez(file, **held | {"about": np.array(json.dumps(changed))})
    cli("evaluate", *ask, "--data", file).error(1, "other weights of random", "cmtool stats")


def test_the_error_of_the_ode(cli, made):
    ask = ("--model", made / "run", "--metrics", "ode-error", "-n", 6)
    found = told(cli, *ask, "--teacher", made / "teacher")
    (row,) = found["results"]
    assert row["metrics"].keys() == {"ode_error@6", "ode_solution@6"}
    assert row["levels"][0] == pytest.approx(80)
    assert len(row["error_from_level"]) == len(row["levels"]) == 8
    assert row["metrics"]["ode_error@6"] == row["error_from_level"][0]
    cli("evaluate", *ask).error(2, "a --teacher is missing")
    both = ("--model", made / "run", "--data", made / "some", "-n", 6, "--metrics", "fd,ode-error")
    rows = told(cli, *both, "--teacher", made / "teacher")["results"]
    assert [sorted(row["metrics"]) for row in rows] == [["fd_random@6"], ["ode_error@6", "ode_solution@6"]]
    cli("evaluate", "--model", made / "run", "--data", made / "some", "--teacher", made / "teacher").error(
        2, "--metrics ode-error is missing"
    )
    cli("evaluate", *ask, "--teacher", made / "run").error(1, "a denoiser", "is needed")


# Inception.


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights in the real layout."""
    repair_torchvision()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    load, module.torch.load = module.torch.load, lambda *_, **__: {}
    kind = module.FeatureExtractorInceptionV3
    loaded = kind.load_state_dict
    kind.load_state_dict = lambda self, state: None
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            network = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    finally:
        module.torch.load, kind.load_state_dict = load, loaded
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


def test_numbers_are_those_of_torch_fidelity(cli, made, inception):
    import torch_fidelity

    metrics = ("--metrics", "fid,kid,is,precision,recall", "--features", "inception", "--weights", inception)
    found = numbers(cli, "--images", made / "some", "--data", made / "other", *metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_fidelity.calculate_metrics(
            input1=str(made / "some"),
            input2=str(made / "other"),
            **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
            **{"cuda": False, "verbose": False, "cache": False, "kid_subset_size": 12},
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(inception),
        )
    names = {
        "fid@14": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "is@14": "inception_score_mean",
        "is@14_std": "inception_score_std",
        "precision_inception@14": "precision",
        "recall_inception@14": "recall",
    }
    # The distances of random features are small differences of large numbers, in float32 with torch-fidelity.
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-3), ours


def test_weights_that_are_missing_are_told_before_anything_is_made(cli, made, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ask = ("--model", made / "run", "--data", made / "some")
    cli("evaluate", *ask, "--metrics", "fid").error(1, "weights-inception-2015-12-05-6726825d.pth", "--features random")
    cli("evaluate", *ask, "--metrics", "fd-dinov2").error(1, "facebookresearch/dinov2", "fetch it once")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half of it")
    cli("evaluate", *ask, "--metrics", "fid").error(1, "is damaged")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    cli("evaluate", *ask, "--metrics", "fid", "--weights", tmp_path / "w.pth").error(1, "another network")
    (tmp_path / "w.pth").write_bytes(b"none")
    cli("evaluate", *ask, "--metrics", "fid", "--weights", tmp_path / "w.pth").error(1, "cannot be read as weights")
    cli("evaluate", *ask, "--weights", tmp_path / "w.pth").error(2, "no metric asks for it")


def test_weights_run_nothing(cli, made, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"fc.weight": Evil()}))
    ask = ("--model", made / "run", "--data", made / "some", "--metrics", "fid", "--weights", tmp_path / "w.pth")
    cli("evaluate", *ask).error(1, "cannot be read as weights")
    assert not (tmp_path / "ran").exists()


def test_torch_fidelity_that_is_missing(cli, made, inception, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in list(sys.modules):
        if name.startswith("torch_fidelity."):
            monkeypatch.delitem(sys.modules, name)
    ask = ("--images", made / "some", "--data", made / "some", "--metrics", "fid", "--weights", inception)
    cli("evaluate", *ask).error(1, "torch-fidelity", "pip install 'cmtool[evaluate]'")


def test_foreign_statistics(cli, made, inception, tmp_path):
    file = tmp_path / "edm.npz"
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048))
    ask = ("--images", made / "few", "--data", file)
    found = numbers(cli, *ask, "--metrics", "fid", "--weights", inception)
    assert found["fid@2"] > 0
    cli("evaluate", *ask).error(1, "statistics of inception, and they are wanted of random")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"other": 1}))
    bad = ("--images", made / "few", "--metrics", "fid", "--weights", inception, "--data", tmp_path / "bad.pkl")
    cli("evaluate", *bad).error(1, "no statistics of fid")


# Networks of one's own.


class Means(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))


@pytest.mark.parametrize("form", ["ts", "pt2"])
def test_an_exported_network(cli, made, tmp_path, form):
    file = tmp_path / f"means.{form}"
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    if form == "ts":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(Means()).save(file)
    else:
        batch = torch.export.Dim("batch")
        torch.export.save(torch.export.export(Means(), (example,), dynamic_shapes=({0: batch},)), file)
    found = told(cli, "--images", made / "some", "--data", made / "other", "--features", file, "--metrics", "fd")
    assert found["features"][0]["features"] == "means"

    def colours(name):
        files = sorted((made / name).iterdir())
        return np.stack([np.asarray(Image.open(file)).reshape(-1, 3).mean(0) for file in files])

    from cmtool.evaluation.statistics import frechet, statistics

    expected = frechet(*(statistics(torch.from_numpy(colours(name))) for name in ("some", "other")))
    assert found["results"][0]["metrics"]["fd_means@14"] == pytest.approx(expected, rel=1e-4)


def test_an_exported_program_computes_where_it_is_told(tmp_path):
    """It remembers the device of its export in its operations; "meta" stands for a GPU."""
    file, example = tmp_path / "means.pt2", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    torch.export.save(torch.export.export(Means(), (example,)), file)
    for device in ("cpu", "meta"):
        module, _ = extractors.read_extractor(file, device)
        assert {str(node.kwargs["device"]) for node in module.graph.nodes if "device" in node.kwargs} == {device}
        assert module(example.to(device)).device.type == device


def test_networks_that_are_none(cli, made, tmp_path):
    ask = ("evaluate", "--images", made / "some", "--data", made / "other", "--features")
    cli(*ask, "randum").error(2, "no features 'randum'", "did you mean random")
    cli(*ask, tmp_path / "none.ts").error(1, "there is no such file")
    (tmp_path / "bad.ts").write_bytes(b"no network")
    cli(*ask, tmp_path / "bad.ts").error(1, "is no exported network", "torch.jit.save")

    class Whole(torch.nn.Module):
        def forward(self, images):
            return images.float().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Whole()).save(tmp_path / "whole.ts")
    result = cli(*ask, tmp_path / "whole.ts")
    assert result.code == 1
    assert "are no vectors" in result.stderr


def test_what_does_not_go_together(cli, made):
    run, some = ("--model", made / "run"), ("--data", made / "some")
    cli("evaluate", *run).error(2, "missing option '--data'")
    cli("evaluate", *run, "--images", made / "some", *some).error(2, "a --model or --images")
    cli("evaluate", *run, *some, "--metrics", "fido").error(2, "no metric 'fido'", "did you mean fid")
    cli("evaluate", *run, *some, "--steps", "1,,2").error(2, "an entry is empty")
    cli("evaluate", *run, *some, "--steps", "0").error(2, "'0' is no number of steps")
    cli("evaluate", *run, *some, "--steps", "1", "--times", "80").error(2, "the same thing twice")
    cli("evaluate", *run, "--data", made / "none").error(1, "no such file")
    cli("evaluate", *run, *some, "-n", 1).error(2, "--num")
    cli("evaluate", *run, *some, "--out", made).error(2, "is a folder")
    cli("evaluate", "--model", made / "teacher", *some, "-n", 4).error(2, "needs a solver", "--solver heun")
    cli("stats", *some, "--out", made / "x.txt").error(2, "an .npz")
    cli("stats", *some, "--out", made / "x.npz", "--channels", 2).error(2, "1 or 3")
    cli("stats", *some, "--out", made / "x.npz", "--limit", 1).error(2, "--limit")
    assert not (made / "x.npz").exists()
