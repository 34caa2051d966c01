"""`cmtool sample`: seeds, labels, places, pipes, and roles."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli import images
from cmtool.errors import UsageError
from cmtool.flow import Linear, Velocity
from cmtool.generate import generate
from cmtool.io import checkpoint
from cmtool.io import images as files
from cmtool.solvers import Churn
from tests.models import micro, model


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_one_image_a_seed_named_by_it(cli, student, tmp_path):
    result = cli("sample", "--model", student, "--seeds", "0-2,100", "--out", tmp_path / "out")
    assert result.code == 0, result.stderr
    names = ["000000.png", "000001.png", "000002.png", "000100.png"]
    assert result.lines == [str(tmp_path / "out" / name) for name in names]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert len({read(line).tobytes() for line in result.lines}) == 4
    assert read(result.lines[0]).shape == (8, 8, 3)


def test_the_files_hold_what_the_library_makes(cli, student, tmp_path):
    ask = ("sample", "--model", student, "--seeds", "3,5", "--labels", "1", "--steps", "2", "--precision", "fp32")
    cli(*ask, "--out", tmp_path)
    made = next(generate(checkpoint.load(student), [3, 5], steps=2, labels=1)).images
    for seed, image in zip((3, 5), files.to_uint8(made), strict=True):
        assert torch.equal(files.read_image(tmp_path / f"{seed:06d}.png"), image)


def test_an_image_does_not_depend_on_its_company(cli, student, tmp_path):
    def ask(out, seeds, *more):
        assert cli("sample", "--model", student, "--seeds", seeds, "--out", tmp_path / out, *more).code == 0
        return read(tmp_path / out / "000007.png")

    together = ask("a", "0-9", "--batch", 4)
    for other in (ask("b", "7", "--batch", 1), ask("c", "9-12,7,3", "--batch", 5)):
        assert np.abs(together - other).max() <= 1


def test_labels_follow_the_seed_not_the_order(cli, student, tmp_path):
    def labels(seeds, *more):
        result = cli("sample", "--model", student, "--seeds", seeds, "--out", tmp_path, "--json", *more)
        return {entry["seed"]: entry["label"] for entry in json.loads(result.stdout)["images"]}

    assert labels("0-5", "--labels", "0-2") == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}
    assert labels("4,3", "--labels", "0-2") == {4: 1, 3: 0}
    assert labels("0-2", "--labels", "cow,ant") == {0: 2, 1: 0, 2: 2}
    drawn = labels("0-63")
    assert set(drawn.values()) == {0, 1, 2}
    assert labels("40-50") == {seed: drawn[seed] for seed in range(40, 51)}


def test_json_is_one_object_and_the_only_thing_on_stdout(cli, plain, tmp_path):
    grid = tmp_path / "grid.png"
    result = cli("sample", "--model", plain, "--seeds", "4,2", "--out", tmp_path, "--grid", grid, "--json")
    told = json.loads(result.stdout)
    assert told["images"] == [
        {"path": str(tmp_path / "000004.png"), "seed": 4, "label": None},
        {"path": str(tmp_path / "000002.png"), "seed": 2, "label": None},
    ]
    assert told["grid"] == str(grid)
    assert result.stderr == ""


def test_a_grid_holds_the_images_in_order(cli, plain, tmp_path):
    result = cli("sample", "--model", plain, "--seeds", "0-3", "--out", tmp_path / "o", "--grid", tmp_path / "g.png")
    assert result.lines[-1] == str(tmp_path / "g.png")
    grid = read(tmp_path / "g.png")
    assert grid.shape == (22, 22, 3)
    for index, (y, x) in enumerate([(2, 2), (2, 12), (12, 2), (12, 12)]):
        assert np.array_equal(grid[y : y + 8, x : x + 8], read(result.lines[index]))


def test_one_file_a_pattern_and_a_grid_alone(cli, plain, tmp_path):
    cli("sample", "--model", plain, "--seeds", "9", "--out", tmp_path / "a.png")
    assert cli("sample", "--model", plain, "--seeds", "8-9", "--out", tmp_path / "b/x-{seed}.png").code == 0
    assert sorted(os.listdir(tmp_path / "b")) == ["x-000008.png", "x-000009.png"]
    assert np.abs(read(tmp_path / "a.png") - read(tmp_path / "b" / "x-000009.png")).max() <= 1
    assert cli("sample", "--model", plain, "--seeds", "8-9", "--grid", tmp_path / "g.png").lines == [
        str(tmp_path / "g.png")
    ]


def test_a_pipe_carries_the_image_and_nothing_else(cli, plain, tmp_path):
    piped = cli("sample", "--model", plain, "--seeds", "9", "--out", "-")
    cli("sample", "--model", plain, "--seeds", "9", "--out", tmp_path / "a.png")
    assert np.array_equal(read(io.BytesIO(piped.stdout)), read(tmp_path / "a.png"))
    piped = cli("sample", "--model", plain, "--seeds", "8-9", "--out", tmp_path / "o", "--grid", "-")
    assert read(io.BytesIO(piped.stdout)).shape == (12, 22, 3)


def test_a_denoiser_is_sampled_with_a_solver(cli, teacher, tmp_path):
    made = {}
    for solver in ("euler", "heun", "dpm2", "ancestral"):  # ddim is Euler's step on this path
        out = tmp_path / f"{solver}.png"
        result = cli("sample", "--model", teacher, "--solver", solver, "--steps", "3", "--out", out, "--labels", "1")
        assert result.code == 0, result.stderr
        made[solver] = read(out).tobytes()
    assert len(set(made.values())) == 4


@pytest.mark.parametrize(
    ("model", "argv", "words"),
    [
        ("teacher", ["--out", "x.png"], ["needs a solver", "--solver heun"]),
        ("teacher", ["--out", "x.png", "--landing", "t_min"], ["needs a solver", "--solver heun"]),
        ("student", ["--out", "x.png", "--landing", "next", "--solver", "heun"], ["--landing", "--solver", "one"]),
        ("student", ["--out", "x.png", "--landing", "nxt"], ["'nxt'", "next"]),
        ("student", ["--out", "x.png", "--solver", "huen"], ["'huen'", "heun"]),
        ("student", ["--out", "x.png", "--guidance", "2"], ["labels dropped", "label_dropout"]),
        ("plain", ["--out", "x.png", "--guidance", "2"], ["classes", "leave out"]),
        ("student", ["--out", "x.png", "--guidance", "nan"], ["--guidance nan", "finite", "--guidance 2"]),
        ("student", ["--out", "x.png", "--guidance", "-inf"], ["--guidance -inf", "finite"]),
        ("student", ["--out", "x.png", "--guidance", "much"], ["--guidance", "number"]),
        ("teacher", ["--out", "x.png", "--churn", "4"], ["--churn", "no --solver"]),
        ("teacher", ["--out", "x.png", "--churn", "4", "--solver", "ancestral"], ["--churn", "ancestral", "heun"]),
        ("teacher", ["--out", "x.png", "--churn", "nan", "--solver", "heun"], ["--churn nan", "from 0 on"]),
        ("teacher", ["--out", "x.png", "--churn=-1", "--solver", "heun"], ["-1", "from 0 on"]),
        ("teacher", ["--out", "x.png", "--churn", "4,x", "--solver", "heun"], ["'x' is not a number"]),
        ("teacher", ["--out", "x.png", "--churn", "4,,1", "--solver", "heun"], ["empty"]),
        ("teacher", ["--out", "x.png", "--churn", "4,2,1", "--solver", "heun"], ["from 2 to 1"]),
        ("teacher", ["--out", "x.png", "--churn", "1,2,3,4,5", "--solver", "heun"], ["1 to 4 numbers, found 5"]),
        ("student", ["--out", "x.png", "--labels", "3"], ["no class 3", "0-2", "ant"]),
        ("student", ["--out", "x.png", "--labels", "catt"], ["catt", "ant"]),
        ("plain", ["--out", "x.png", "--labels", "0"], ["knows no classes"]),
        ("plain", ["--json"], ["no place", "--out"]),
        ("plain", ["--out", "x.png", "--seeds", "0-3"], ["one image and 4", "{seed}"]),
        ("plain", ["--out", "-", "--seeds", "0-3"], ["one image and 4"]),
        ("plain", ["--out", "x.gif"], ["x.gif", ".png"]),
        ("plain", ["--out", "x/{seed}.gif"], [".gif", ".png"]),
        ("plain", ["--out", "o", "--grid", "grid"], ["--grid grid", ".png"]),
        ("plain", ["--out", "-", "--json"], ["one result"]),
        ("plain", ["--out", "-", "--grid", "-"], ["one result"]),
        ("plain", ["--out", "x.png", "--times", "80", "--steps", "1"], ["twice"]),
        ("plain", ["--out", "x.png", "--times", "90"], ["90", "80"]),
        ("plain", ["--out", "x.png", "--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_mistakes(cli, folder, tmp_path, monkeypatch, model, argv, words):
    monkeypatch.chdir(tmp_path)
    result = cli("sample", "--model", folder / f"{model}.safetensors", *argv)
    assert result.code in (1, 2)
    result.error(result.code, *words)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="session")
def more(tmp_path_factory):
    """A teacher and a student with dropped labels, and a two-time model of the straight path."""
    folder = tmp_path_factory.mktemp("more")
    dropped = {"config": micro(num_classes=3, label_dropout=0.2), "grid_points": 4}
    checkpoint.save(model("denoiser", **dropped), folder / "teacher.safetensors")
    checkpoint.save(model(**dropped), folder / "student.safetensors")
    two_times = micro(num_classes=3, label_dropout=0.2, two_times=True)
    straight = model("flow_map", two_times, Linear(), Velocity(), grid_rho=1.0)
    checkpoint.save(straight, folder / "flow.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "argv", "options"),
    [
        ("student", ["--solver", "euler", "--steps", "3"], {"solver": "euler", "steps": 3}),
        ("student", ["--landing", "next", "--steps", "3"], {"landing": "next", "steps": 3}),
        ("student", ["--guidance", "2.5"], {"guidance": 2.5}),
        ("teacher", ["--landing", "next", "--steps", "3"], {"landing": "next", "steps": 3}),
        (
            "teacher",
            ["--solver", "heun", "--steps", "3", "--guidance", "-1"],
            {"solver": "heun", "steps": 3, "guidance": -1.0},
        ),
        (
            "teacher",
            ["--solver", "heun", "--steps", "3", "--churn", "1,0.1,50,1.003"],
            {"solver": "heun", "steps": 3, "churn": Churn(1.0, 0.1, 50.0, 1.003)},
        ),
        ("teacher", ["--solver", "ddim", "--churn", "9"], {"solver": "ddim", "churn": Churn(9.0)}),
        ("flow", ["--steps", "3"], {"steps": 3}),
        ("flow", ["--times", "1,0.5", "--landing", "t_min"], {"times": [1.0, 0.5], "landing": "t_min"}),
        ("flow", ["--solver", "heun", "--times", "1,0.5"], {"solver": "heun", "times": [1.0, 0.5]}),
        ("flow", ["--guidance", "0"], {"guidance": 0.0}),
    ],
)
def test_every_way_to_sample_is_that_of_the_library(cli, more, tmp_path, name, argv, options):
    file = more / f"{name}.safetensors"
    ask = ("sample", "--model", file, "--seeds", "3,5", "--labels", "1", "--precision", "fp32", "--out", tmp_path)
    result = cli(*ask, *argv, "--json")
    assert result.code == 0, result.stderr
    made = next(generate(checkpoint.load(file), [3, 5], labels=1, **options)).images
    for seed, image in zip((3, 5), files.to_uint8(made), strict=True):
        assert torch.equal(files.read_image(tmp_path / f"{seed:06d}.png"), image)
    told = json.loads(result.stdout)
    asked = {key: options.get(key) for key in ("solver", "landing", "guidance") if key in options}
    if "churn" in options:
        asked["churn"] = [float(number) for number in argv[argv.index("--churn") + 1].split(",")]
    assert {key: told[key] for key in told if key not in ("images", "grid", "model")} == asked
    plain = next(
        generate(checkpoint.load(file), [3, 5], labels=1, **({"solver": "euler"} if name == "teacher" else {}))
    )
    assert float((plain.images - made).abs().max()) > 0.01  # what was asked for makes a difference


def test_a_scale_of_one_is_no_guidance(cli, plain, tmp_path):
    result = cli("sample", "--model", plain, "--out", tmp_path, "--guidance", "1", "--json")
    assert result.code == 0, result.stderr
    assert "guidance" not in json.loads(result.stdout)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("there.png", ["--grid", "there.png", "folder"]),
        ("file/grid.png", ["--grid", "file", "not a folder"]),
        ("file/deep/er/grid.png", ["--grid", "file", "not a folder"]),
        ("grid.gif", ["--grid", ".png"]),
        ("shut/grid.png", ["--grid", "nothing can be written", "shut"]),
    ],
)
def test_a_bad_place_for_the_grid_is_told_before_the_model_is_loaded(cli, tmp_path, monkeypatch, grid, words):
    (tmp_path / "there.png").mkdir()
    (tmp_path / "shut").mkdir()
    (tmp_path / "file").write_text("")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("shut") and access(path, mode))
    monkeypatch.setattr(images, "read_model", lambda *_, **__: pytest.fail("the model was loaded"))
    cli("sample", "--model", tmp_path / "any", "--grid", tmp_path / grid).error(2, *words)
    cli("sample", "--model", tmp_path / "any", "--out", tmp_path / "o", "--grid", tmp_path / grid).error(2, *words)


def test_models_that_are_none(cli, student, tmp_path):
    def ask(model):
        return cli("sample", "--model", model, "--out", tmp_path / "x.png")

    ask(tmp_path / "nowhere").error(1, "no model", "nowhere")
    ask(tmp_path).error(1, "no run", str(tmp_path))
    (tmp_path / "text.safetensors").write_text("hello")
    ask(tmp_path / "text.safetensors").error(1, "no file of weights")
    whole = student.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    ask(tmp_path / "cut.safetensors").error(1, "not a complete safetensors")
    (tmp_path / "rot.safetensors").write_bytes(whole[:20] + b"\xff\x00" + whole[22:])
    ask(tmp_path / "rot.safetensors").error(1)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    ask(tmp_path / "empty.safetensors").error(1)


def test_an_image_is_not_written_to_a_terminal(monkeypatch):
    monkeypatch.setattr(images.sys.stdout, "isatty", lambda: True)
    with pytest.raises(UsageError, match="terminal"):
        images.places("-", [0])


def test_what_can_be_written_is_what_is_said():
    assert set(images.WRITABLE) == set(files._WRITERS)


def test_a_shell_pipeline(student, tmp_path):
    """The real thing, with real pipes: sample, shrink, enlarge again."""
    small = tmp_path / "small.png"
    Image.new("RGB", (4, 4), (90, 120, 40)).save(small)
    tool = f"{shlex.quote(sys.executable)} -m cmtool"
    line = (
        f"set -o pipefail; cat {small} | {tool} superres --model {student} --image - --factor 2 --out - "
        f"| {tool} colorize --model {student} --image - --out - > {tmp_path}/large.png"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "large.png").shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["fixed.pgn", "a.txt", "x.xyz"])
def test_a_mistyped_ending_makes_no_folder(cli, folder, tmp_path, name):
    ask = ("sample", "--model", folder / "student.safetensors", "--out")
    cli(*ask, tmp_path / name).error(2, "cannot be written", ".png", f"{name}/")
    assert not (tmp_path / name).exists()
    assert cli(*ask, f"{tmp_path / name}/").code == 0
    assert (tmp_path / name / "000000.png").is_file()


def test_num_is_how_many(cli, student, tmp_path):
    result = cli("sample", "--model", student, "-n", 3, "--out", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["000000.png", "000001.png", "000002.png"]
    assert result.lines == [str(tmp_path / "out" / f"{seed:06d}.png") for seed in range(3)]
    both = cli("sample", "--model", student, "-n", 3, "--seeds", "0-2", "--out", tmp_path / "x")
    both.error(2, "--num and --seeds", "one of the two")
    cli("sample", "--model", student, "-n", 0, "--out", tmp_path / "x").error(2, "-n")


def test_files_are_written_while_the_next_batch_is_made(cli, student, tmp_path, monkeypatch):
    """In the order of the seeds, each whole; a batch is on the disk when the next but one begins."""
    events, write = [], files.write_image
    monkeypatch.setattr(files, "write_image", lambda path, image: (write(path, image), events.append(str(path))))

    def made(*args, **rest):
        for part in generate(*args, **rest):
            events.append(part.seeds)
            yield part

    monkeypatch.setattr("cmtool.generate.generate", made)
    result = cli("sample", "--model", student, "-n", 6, "--batch", 2, "--out", tmp_path / "out")
    assert result.code == 0, result.stderr
    assert [event for event in events if isinstance(event, str)] == result.lines
    assert [event for event in events if isinstance(event, list)] == [[0, 1], [2, 3], [4, 5]]
    assert events.index(result.lines[1]) < events.index([4, 5])


def test_a_disk_that_fills_up_ends_it(cli, student, tmp_path, monkeypatch):
    write = files.write_image

    def full(path, image):
        if "000003" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, image)

    monkeypatch.setattr(files, "write_image", full)
    result = cli("sample", "--model", student, "-n", 8, "--batch", 2, "--out", tmp_path / "out")
    assert result.code == 1
    assert "No space left on device" in result.stderr
    assert result.lines == [
        str(tmp_path / "out" / f"{seed:06d}.png") for seed in range(3)
    ]  # what is there, and no more


def test_what_was_made_before_an_error_is_kept(cli, student, tmp_path, monkeypatch):
    def failing(*args, **rest):
        yield next(generate(*args, **rest))
        raise MemoryError("17 GB")

    monkeypatch.setattr("cmtool.generate.generate", failing)
    result = cli("sample", "--model", student, "-n", 8, "--batch", 2, "--out", tmp_path / "out")
    assert result.code == 1
    assert "out of memory" in result.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["000000.png", "000001.png"]
    assert len(result.lines) == 2


@pytest.mark.parametrize("ending", ["png", "apng", "webp"])
def test_the_way_from_seed_to_seed(cli, plain, tmp_path, ending):
    out = tmp_path / f"way.{ending}"
    ask = ("interpolate", "--model", plain, "--seeds", "3,8", "--frames", 4, "--out", out, "--scale", 2)
    assert cli(*ask).lines == [str(out)]
    told = json.loads(cli(*ask, "--loop", "--fps", 20, "--json").stdout)
    assert (told["images"], told["seeds"]) == (9, [3, 8, 3])
    assert cli("sample", "--model", plain, "--seeds", "3,8", "--out", tmp_path / "alone").code == 0
    first, second = (np.asarray(Image.open(tmp_path / "alone" / f"{seed:06d}.png").copy()) for seed in (3, 8))
    with Image.open(out) as found:
        if ending == "png":
            assert found.size == (4 * (16 + 2) + 2, 3 * (16 + 2) + 2)
            return
        assert found.n_frames == 8  # the last would be the first again
        frames = []
        for number in (0, 4):
            found.seek(number)
            frames.append(np.asarray(found.convert("RGB").copy())[::2, ::2])
        assert found.info["duration"] == 50
    assert np.abs(frames[0].astype(int) - first).max() <= 1
    assert np.abs(frames[1].astype(int) - second).max() <= 1


def test_the_way_from_image_to_image(cli, teacher, plain, tmp_path):
    chance = np.random.default_rng(0)
    for name in "ab":
        coarse = chance.integers(60, 200, (2, 2, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((8, 8), Image.BICUBIC).save(tmp_path / f"{name}.png")
    ask = ("--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--out", tmp_path / "way.png")
    result = cli("interpolate", "--model", teacher, *ask, "--steps", 6, "--frames", 2, "--json")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["images"] == 3
    with Image.open(tmp_path / "way.png") as found:
        strip = np.asarray(found)
    for name, left in (("a", 2), ("b", 2 + 2 * 10)):  # frames of 8 pixels, 2 apart
        with Image.open(tmp_path / f"{name}.png") as image:
            off = strip[2:10, left : left + 8].astype(int) - np.asarray(image)
        assert np.sqrt((off**2).mean()) < 25  # six steps there, and six back
    many = ("interpolate", "--model", teacher)
    cli("interpolate", "--model", plain, *ask).error(2, "of a denoiser", "name its teacher")
    cli(*many, *ask, "--seeds", "1,2").error(2, "--image and --seeds")
    cli(*many, *ask, "--times", "80").error(2, "followed by Heun's method")
    cli(*many, *ask[:2], "--out", tmp_path / "w.png").error(2, "needs a second one")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    cli(*many, *ask).error(1, "b.png is 9x8")


def test_ways_that_lead_nowhere(cli, plain, teacher, tmp_path):
    ask = ("interpolate", "--model", plain)
    cli(*ask, "--seeds", "3", "--out", tmp_path / "w.png").error(2, "at least two seeds")
    cli(*ask, "--out", tmp_path / "w.mp4").error(2, "cannot be written")
    cli(*ask).error(2, "--out")
    cli("interpolate", "--model", teacher, "--out", tmp_path / "w.png").error(2, "needs a solver")
    assert not list(tmp_path.iterdir())
