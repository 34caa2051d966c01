"""`cmtool inpaint`, `colorize` and `superres`: what is known stays, what does not fit is refused."""

from __future__ import annotations

import io
import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.cli import console
from cmtool.io import checkpoint
from cmtool.training.distances import LPIPS
from tests.models import trunk

LUMA = np.array([0.2989, 0.5870, 0.1140])


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def picture() -> np.ndarray:
    """8x8 RGB with every extreme in it."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    image[0, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [1, 254, 128]]
    return image


@pytest.fixture
def mask() -> np.ndarray:
    """White in the lower right."""
    mask = np.zeros((8, 8))
    mask[3:, 2:] = 255
    return mask


@pytest.fixture
def inputs(tmp_path, picture, mask):
    """image.png and mask.png in an empty current folder's parent."""
    (tmp_path / "image.png").write_bytes(png(picture))
    (tmp_path / "mask.png").write_bytes(png(mask))
    return tmp_path


def test_inpaint_keeps_known_pixels_and_makes_the_rest_new(cli, student, inputs, picture, mask):
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "mask.png")
    result = cli(*ask, "--out", inputs / "fixed.png")
    assert result.code == 0, result.stderr
    assert result.lines == [str(inputs / "fixed.png")]
    fixed, hole = read(inputs / "fixed.png"), mask > 0
    assert np.array_equal(fixed[~hole], picture[~hole])
    assert (fixed[hole] != picture[hole]).any(-1).mean() > 0.9
    assert cli(*ask, "--out", inputs / "again.png").code == 0
    assert np.array_equal(read(inputs / "again.png"), fixed)

    assert cli(*ask, "--invert-mask", "--out", inputs / "inverse.png").code == 0
    inverse = read(inputs / "inverse.png")
    assert np.array_equal(inverse[hole], picture[hole])
    assert (inverse[~hole] != picture[~hole]).any(-1).mean() > 0.9


def test_several_answers_each_by_its_own_seed(cli, student, inputs, mask):
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "mask.png")
    told = json.loads(cli(*ask, "--seeds", "0-4", "--batch", 2, "--out", inputs / "o", "--json").stdout)
    assert [entry["seed"] for entry in told["images"]] == [0, 1, 2, 3, 4]
    answers = [read(entry["path"]) for entry in told["images"]]
    assert len({answer.tobytes() for answer in answers}) == 5
    cli(*ask, "--seeds", "3", "--out", inputs / "3.png")
    assert np.abs(read(inputs / "3.png") - answers[3]).max() <= 1
    cli(*ask, "--seeds", "4,3", "--out", inputs / "n-{seed}.png")
    assert np.abs(read(inputs / "n-000003.png") - answers[3]).max() <= 1


def test_the_time_points_and_the_label_matter(cli, student, inputs):
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "mask.png", "--out", "-")
    default = cli(*ask, "--labels", "bee")
    assert default.code == 0, default.stderr
    for more in (["--steps", "1"], ["--times", "80,0.5"], ["--labels", "cow"]):
        assert cli(*ask, "--labels", "bee", *more).stdout != default.stdout
    # The whole grid of 4 points without t_min.
    assert cli(*ask, "--labels", "bee", "--steps", "3").stdout == default.stdout


def test_a_transparent_part_is_the_mask(cli, student, inputs, picture, mask):
    clear = np.dstack([picture, 255 - mask])
    (inputs / "clear.png").write_bytes(png(clear))
    ask = ("inpaint", "--model", student, "--out", inputs / "a.png", "--image")
    assert cli(*ask, inputs / "clear.png").code == 0
    known = mask == 0
    assert np.array_equal(read(inputs / "a.png")[known], picture[known])
    cli(*ask, "-", stdin=png(clear))
    assert np.array_equal(read(inputs / "a.png")[known], picture[known])
    cli(*ask, inputs / "image.png").error(2, "no transparent part", "--mask")


def test_masks_may_come_through_the_pipe(cli, student, inputs, picture, mask):
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--out", "-", "--mask")
    assert cli(*ask, "-", stdin=png(mask)).stdout == cli(*ask, inputs / "mask.png").stdout


def test_an_empty_mask_is_told(cli, student, inputs, picture):
    (inputs / "none.png").write_bytes(png(np.zeros((8, 8))))
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "none.png")
    result = cli(*ask, "--out", inputs / "same.png")
    assert "mask is empty" in result.stderr
    assert np.array_equal(read(inputs / "same.png"), picture)
    assert cli("-q", *ask, "--out", inputs / "same.png").stderr == ""


def test_colorize_keeps_the_luma(cli, student, inputs):
    grey = np.random.default_rng(1).integers(40, 216, (8, 8))
    (inputs / "grey.png").write_bytes(png(grey))
    result = cli("colorize", "--model", student, "--image", inputs / "grey.png", "--out", inputs / "colour.png")
    assert result.code == 0, result.stderr
    colour = read(inputs / "colour.png")
    assert np.abs(colour @ LUMA - grey * LUMA.sum()).max() <= 1.5
    assert (colour.max(-1) - colour.min(-1)).mean() > 5


def test_superres_keeps_the_block_means(cli, student, inputs):
    small = np.random.default_rng(2).integers(40, 216, (4, 4, 3))
    ask = ("superres", "--model", student, "--factor", "2", "--out")
    result = cli(*ask, "-", "--image", "-", stdin=png(small))
    assert result.code == 0, result.stderr
    large = read(io.BytesIO(result.stdout))
    assert np.abs(large.reshape(4, 2, 4, 2, 3).mean((1, 3)) - small).max() <= 1
    assert np.ptp(large.reshape(4, 2, 4, 2, 3), axis=(1, 3)).mean() > 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inpaint", "--image", "large.png", "--mask", "mask.png"], ["mask.png is 8x8", "large.png is 16x12"]),
        (["inpaint", "--image", "tiny.png", "--mask", "mask.png"], ["tiny.png is 3x2", "8x8"]),
        (["inpaint", "--image", "image.png", "--mask", "large.png"], ["large.png is 16x12", "image.png is 8x8"]),
        (["inpaint", "--image", "-", "--mask", "-"], ["one pipe"]),
        (["inpaint", "--image", "nowhere.png", "--mask", "mask.png"], ["nowhere.png"]),
        (["inpaint", "--image", "broken.png", "--mask", "mask.png"], ["broken.png"]),
        (["inpaint", "--image", "image.png", "--mask", "broken.png"], ["broken.png"]),
        (["inpaint", "--image", "-", "--mask", "mask.png"], ["standard input"]),
        (["colorize", "--image", "tiny.png"], ["3x2", "8x8"]),
        (["superres", "--image", "tiny.png", "--factor", "2"], ["6x4", "--factor 2", "8x8", "4x4"]),
        (["superres", "--image", "tiny.png", "--factor", "3"], ["9x6", "no multiple of 3"]),
        (["superres", "--image", "image.png", "--factor", "1"], ["--factor"]),
        (["superres", "--image", "image.png"], ["--factor"]),
        (["colorize", "--image", "image.png", "--times", "80", "--steps", "2"], ["twice"]),
        (["colorize", "--image", "image.png", "--labels", "9"], ["no class 9"]),
        (["colorize", "--image", "image.png", "--seeds", "0-2"], ["one image and 3"]),
    ],
)
def test_mistakes(cli, student, inputs, monkeypatch, argv, words):
    monkeypatch.chdir(inputs)
    Image.new("RGB", (16, 12)).save("large.png")
    Image.new("RGB", (3, 2)).save("tiny.png")
    (inputs / "broken.png").write_bytes((inputs / "image.png").read_bytes()[:60])
    result = cli(*argv, "--model", student, "--out", "out.png")
    assert result.code in (1, 2)
    result.error(result.code, *words)
    assert not os.path.exists("out.png")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inpaint", "--image", "nowhere.png", "--mask", "mask.png"], ["nowhere.png"]),
        (["inpaint", "--image", "image.png", "--mask", "large.png"], ["large.png is 16x12"]),
        (["inpaint", "--image", "image.png"], ["no transparent part"]),
        (["colorize", "--image", "tiny.png"], ["3x2", "8x8"]),
        (["colorize", "--image", "image.png", "--labels", "9"], ["no class 9"]),
        (["colorize", "--image", "image.png", "--out", "image.png/x/"], ["image.png is a file"]),
        (["superres", "--image", "tiny.png", "--factor", "2"], ["4x4"]),
    ],
)
def test_mistakes_are_found_before_the_weights_are_read(cli, student, inputs, monkeypatch, argv, words):
    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.chdir(inputs)
    monkeypatch.setattr(checkpoint, "load", fail)
    Image.new("RGB", (16, 12)).save("large.png")
    Image.new("RGB", (3, 2)).save("tiny.png")
    result = cli(argv[0], "--model", student, "--out", "out.png", *argv[1:])
    result.error(result.code, *words)


def test_a_file_of_a_later_version_is_named(cli, student, inputs, monkeypatch):
    """Whatever cannot be understood of the card, the model's own reader says so."""
    header = checkpoint.header

    def later(source):
        found = header(source)
        return found | {"card": found["card"] | {"colour_space": "lab"}}

    monkeypatch.setattr(checkpoint, "header", later)
    ask = ("colorize", "--model", student, "--image", inputs / "image.png", "--out", inputs / "out.png")
    cli(*ask).error(1, "does not know", "colour_space")


@pytest.mark.parametrize("argv", [["inpaint", "--mask", "mask.png"], ["colorize"], ["superres", "--factor", "2"]])
def test_a_teacher_cannot_edit(cli, teacher, inputs, monkeypatch, argv):
    monkeypatch.chdir(inputs)
    result = cli(*argv, "--image", "image.png", "--model", teacher, "--out", "out.png")
    result.error(1, "is a denoiser", "consistency model is needed", "cmtool distill")


EDITS = {
    "inpaint": ("--image", "image.png", "--mask", "mask.png"),
    "colorize": ("--image", "image.png"),
    "superres": ("--image", "small.png", "--factor", "2"),
}


@pytest.mark.parametrize("task", EDITS)
def test_answers_are_compared_with_the_truth(cli, student, inputs, picture, task):
    small = picture.reshape(4, 2, 4, 2, 3).mean((1, 3)).round()
    (inputs / "small.png").write_bytes(png(small))
    options = [str(inputs / word) if word.endswith(".png") else word for word in EDITS[task]]
    ask = (task, "--model", student, *options, "--seeds", "0-2", "--out", inputs / "out")
    ask = (*ask, "--truth", inputs / "image.png", "--compare", inputs / "all.png")
    result = cli(*ask)
    assert result.code == 0, result.stderr
    assert next(line for line in result.stderr.splitlines() if line.startswith("seed ")).startswith("seed 0: psnr ")
    told = json.loads(cli(*ask, "--json").stdout)["images"]
    for entry in told:
        made = read(entry["path"])
        error = ((made - picture) ** 2).mean()
        assert entry["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
        assert 0 < entry["ssim"] < 1
        if task == "inpaint":
            assert entry["constraint_error"] == 0
        elif task == "colorize":
            assert entry["constraint_error"] == pytest.approx(np.abs((made - picture) @ LUMA).max(), abs=2e-3)
        else:
            means = made.reshape(4, 2, 4, 2, 3).mean((1, 3))
            assert entry["constraint_error"] == pytest.approx(np.abs(means - small).max(), abs=2e-3)
        assert entry["constraint_error"] <= 0.75  # an image is rounded, and means of rounded pixels are not
    height, width, _ = read(inputs / "all.png").shape
    assert height > 3 * 96
    assert width > 3 * 96


def test_the_truth_itself_has_no_error(cli, student, inputs):
    """Where nothing is made new."""
    (inputs / "black.png").write_bytes(png(np.zeros((8, 8))))
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "black.png")
    told = json.loads(cli(*ask, "--out", inputs / "o.png", "--truth", inputs / "image.png", "--json").stdout)
    assert told["images"][0] | {"path": ""} == {
        **{"path": "", "image": str(inputs / "image.png"), "seed": 0, "label": told["images"][0]["label"]},
        **{"constraint_error": 0, "psnr": None, "ssim": 1.0},
    }


def test_what_cannot_be_compared(cli, student, inputs):
    (inputs / "large.png").write_bytes(png(np.zeros((9, 9, 3))))
    ask = ("colorize", "--model", student, "--image", inputs / "image.png", "--out", inputs / "o.png")
    cli(*ask, "--truth", inputs / "large.png").error(1, "--truth", "is 9x9", "the result is 8x8")
    cli(*ask, "--truth", inputs / "none.png").error(1, "none.png")
    cli(*ask, "--truth", "-").error(2, "--truth -")
    cli(*ask, "--compare", inputs / "all.txt").error(2, "cannot be written")
    cli(*ask, "--compare", "-", "--json").error(2, "stdout takes one result")
    assert not (inputs / "o.png").exists()


@pytest.mark.parametrize("task", EDITS)
def test_larger_images_are_made_of_tiles(cli, student, inputs, task):
    image = np.random.default_rng(1).integers(0, 256, (14, 20, 3))
    mask = np.zeros((14, 20))
    mask[4:12, 3:17] = 255
    (inputs / "image.png").write_bytes(png(image))
    (inputs / "mask.png").write_bytes(png(mask))
    (inputs / "small.png").write_bytes(png(image[:7, :10]))
    options = [str(inputs / word) if word.endswith(".png") else word for word in EDITS[task]]
    ask = (task, "--model", student, *options, "--steps", 3, "--out", inputs / "made.png", "--json")
    result = cli(*ask)
    assert result.code == 0, result.stderr
    assert "the result is 20x14, made of tiles of 8x8" in result.stderr
    made = read(inputs / "made.png")
    assert made.shape == (14, 20, 3)
    assert json.loads(result.stdout)["images"][0]["constraint_error"] <= 0.75
    if task == "inpaint":
        assert np.array_equal(made[mask == 0], image[mask == 0])


@pytest.mark.parametrize("task", EDITS)
def test_every_network_call_is_shown(cli, student, inputs, monkeypatch, task):
    """Of large images one takes a while: progress by images would show nothing until the end."""
    shown = []

    @contextmanager
    def progress(title, total):
        yield lambda done, text="": shown.append((title, done, total))

    monkeypatch.setattr(console, "progress", progress)
    (inputs / "small.png").write_bytes(png(np.full((4, 4, 3), 90)))
    options = [str(inputs / word) if word.endswith(".png") else word for word in EDITS[task]]
    ask = (task, "--model", student, *options, "--seeds", "0-2", "--batch", 2, "--out", inputs / "out")
    assert cli(*ask, "--steps", 3).code == 0
    assert [done for _, done, _ in shown] == [2, 4, 6, 6, 7, 8, 9, 9]  # two images at once, then one
    assert {(title, total) for title, _, total in shown} == {(f"{task} (calls)", 9)}
    shown.clear()
    assert cli(*ask, "--times", "40,1").code == 0
    assert [done for _, done, _ in shown] == [2, 4, 4, 5, 6, 6]


def test_strokes(cli, student, inputs):
    ask = ("stroke", "--model", student, "--image", inputs / "image.png", "--seeds", "0-1", "--out", inputs / "out")
    told = json.loads(cli(*ask, "--compare", inputs / "all.png", "--json").stdout)
    assert [entry["seed"] for entry in told["images"]] == [0, 1]
    assert told["times"] == pytest.approx([5.38 / 32, 2.24 / 32], rel=1e-4)
    first, second = (read(entry["path"]) for entry in told["images"])
    assert (first != second).any()
    assert read(inputs / "all.png").shape[0] > 2 * 96
    assert cli(*ask, "--times", "80,1").lines == [entry["path"] for entry in told["images"]]
    assert (read(told["images"][0]["path"]) != first).any()
    cli(*ask, "--times", "1,80").error(2, "does not fall")
    cli("stroke", "--model", student, "--image", inputs / "none.png", "--out", inputs / "o.png").error(1, "none.png")


def test_noise_is_taken_away(cli, student, teacher, inputs, picture):
    ask = ("denoise", "--image", inputs / "image.png", "--out", inputs / "clean.png")
    told = json.loads(cli(*ask, "--model", student, "--sigma", 25, "--json").stdout)
    assert told["sigma"] == pytest.approx(25)
    clean = read(inputs / "clean.png")
    assert (clean != picture).any()
    assert cli(*ask, "--model", teacher, "--sigma", 25).lines == [str(inputs / "clean.png")]
    assert (read(inputs / "clean.png") != clean).any()
    result = cli(*ask, "--model", student)
    assert result.code == 0
    assert "the noise is estimated: --sigma " in result.stderr
    assert cli(*ask, "--model", student, "--sigma", 0).code == 0
    assert np.abs(read(inputs / "clean.png") - picture).max() <= 2
    cli(*ask, "--model", student, "--sigma", -1).error(2, "from 0 on")
    cli(*ask, "--model", student, "--sigma", 1e6).error(2, "knows noise up to")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(trunk(), file)
    return file


def test_lpips_of_an_answer(cli, student, inputs, backbone):
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png", "--mask", inputs / "mask.png", "--json")
    ask = (*ask, "--out", inputs / "o.png", "--lpips-backbone", backbone)
    (entry,) = json.loads(cli(*ask, "--truth", inputs / "image.png").stdout)["images"]
    a, b = (torch.from_numpy(read(inputs / name)).permute(2, 0, 1)[None] / 127.5 - 1 for name in ("o.png", "image.png"))
    expected = float(LPIPS("alex").build(trunk())(a, b))
    assert entry["lpips"] == pytest.approx(expected, abs=1e-4)
    assert expected > 0
    cli(*ask).error(2, "compares with a --truth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, inputs / "other.pth")
    result = cli(*ask[:-1], inputs / "other.pth", "--truth", inputs / "image.png")
    assert result.code == 1
    assert "another network" in result.stderr


def test_deblurring_keeps_what_the_blur_left(cli, student, inputs, picture):
    rows = np.fft.fft2(picture, axes=(0, 1))
    kernel = np.zeros((8, 8))
    kernel[np.ix_([-1, 0, 1], [-1, 0, 1])] = np.outer([1, 2, 1], [1, 2, 1]) / 16
    response = np.fft.fft2(kernel)[:, :, None]
    blurred = np.fft.ifft2(rows * response, axes=(0, 1)).real.round()
    (inputs / "blurred.png").write_bytes(png(blurred))
    np.save(inputs / "kernel.npy", np.outer([1, 2, 1], [1, 2, 1]))
    (inputs / "kernel.txt").write_text("1 2 1\n2 4 2\n1 2 1\n")
    (inputs / "kernel.png").write_bytes(png(np.outer([1, 2, 1], [1, 2, 1]) * 10))
    ask = ("deblur", "--model", student, "--image", inputs / "blurred.png", "--truth", inputs / "image.png")
    answers = []
    for name in ("kernel.npy", "kernel.txt", "kernel.png"):
        result = cli(*ask, "--kernel", inputs / name, "--out", inputs / "sharp.png", "--json")
        assert result.code == 0, result.stderr
        answers.append(read(inputs / "sharp.png"))
        entry = json.loads(result.stdout)["images"][0]
        assert entry["constraint_error"] < 20  # the extremes of the picture are at the ends of the range
    assert (answers[0] == answers[1]).all()
    assert (answers[0] == answers[2]).all()
    again = np.fft.ifft2(np.fft.fft2(answers[0], axes=(0, 1)) * response, axes=(0, 1)).real
    assert np.sqrt(((again - blurred) ** 2).mean()) < 8
    assert cli(*ask, "--kernel", "gaussian:0.8", "--out", inputs / "sharp.png").code == 0


@pytest.mark.parametrize(
    ("kernel", "code", "words"),
    [
        ("gaussian:x", 2, ["expected a size in pixels"]),
        ("gaussian:1e9", 2, ["expected a size in pixels"]),
        ("box:1.5", 2, ["expected a size in pixels"]),
        ("blurry", 2, ["is no kernel by name and no file", "gaussian:1.5"]),
        ("bad.npy", 1, ["is no table of numbers"]),
        ("bad.txt", 1, ["is no table of numbers"]),
        ("flat.npy", 1, ["no table"]),
        ("zero.npy", 1, ["has a sum of 0"]),
        ("nan.npy", 1, ["has a sum of nan"]),
    ],
)
def test_what_is_no_kernel(cli, student, inputs, monkeypatch, kernel, code, words):
    monkeypatch.chdir(inputs)
    np.save("flat.npy", np.ones(4))
    np.save("zero.npy", np.zeros((3, 3)))
    np.save("nan.npy", np.full((3, 3), np.nan))
    (inputs / "bad.npy").write_bytes(b"nothing")
    (inputs / "bad.txt").write_text("1 2\nthree 4\n")
    ask = ("deblur", "--model", student, "--image", "image.png", "--out", "o.png")
    cli(*ask, "--kernel", kernel).error(code, *words)
    cli(*ask, "--kernel", "box:3", "--floor", "1.5").error(2, "--floor 1.5")
    assert not (inputs / "o.png").exists()


def folder_of(tmp_path, name, count=3, side=8, seed=0):
    made = tmp_path / name
    made.mkdir()
    pictures = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3))
    for number, picture in enumerate(pictures):
        (made / f"{number}.png").write_bytes(png(picture))
    return made, pictures


def test_a_folder_of_images_with_a_mask_each(cli, student, inputs, mask):
    many, pictures = folder_of(inputs, "many")
    masks, _ = folder_of(inputs, "masks", 0)
    for number in range(3):
        (masks / f"{number}.PNG").write_bytes(png(np.roll(mask, number, 0)))
    ask = ("inpaint", "--model", student, "--image", many, "--mask", masks, "--steps", 2)
    result = cli(*ask, "--out", inputs / "done", "--truth", many, "--json")
    assert result.code == 0, result.stderr
    described = json.loads(result.stdout)["images"]
    assert [entry["path"] for entry in described] == [str(inputs / "done" / f"{number}.png") for number in range(3)]
    for number, entry in enumerate(described):
        made, kept = read(entry["path"]), np.roll(mask, number, 0) == 0
        assert entry["image"] == str(many / f"{number}.png")
        assert (made[kept] == pictures[number][kept]).all()
        assert not (made[~kept] == pictures[number][~kept]).all()
        assert entry["psnr"] > 0
    # One at a time they are the same.
    alone = ("inpaint", "--model", student, "--image", many / "1.png", "--mask", masks / "1.PNG", "--steps", 2)
    assert cli(*alone, "--out", inputs / "1.png").code == 0
    assert (read(inputs / "1.png") == read(inputs / "done" / "1.png")).all()


def test_a_folder_with_several_seeds(cli, student, inputs):
    many, _ = folder_of(inputs, "many", 2)
    result = cli("colorize", "--model", student, "--image", many, "--out", inputs / "done", "--seeds", "3,5")
    assert result.code == 0, result.stderr
    names = [f"{number}-00000{seed}.png" for number in range(2) for seed in (3, 5)]
    assert result.lines == [str(inputs / "done" / name) for name in names]


def test_a_bad_image_of_a_folder_is_left_out_and_told(cli, student, inputs):
    many, _ = folder_of(inputs, "many")
    (many / "1.png").write_bytes(b"no image")
    (many / "notes.txt").write_text("not looked at")
    result = cli("colorize", "--model", student, "--image", many, "--out", inputs / "done")
    assert result.code == 1
    assert "1.png is left out" in result.stderr
    assert "error: 1 of 3 images could not be edited" in result.stderr
    assert sorted(file.name for file in (inputs / "done").iterdir()) == ["0.png", "2.png"]


def test_what_a_folder_does_not_go_with(cli, student, inputs, mask):
    many, _ = folder_of(inputs, "many")
    empty, _ = folder_of(inputs, "empty", 0)
    ask = ("inpaint", "--model", student, "--image", many, "--mask", inputs / "mask.png")
    for out in ("-", "one.png", "{seed}"):
        cli(*ask, "--out", out).error(2, "is a folder, and --out")
    cli(*ask, "--out", inputs / "done", "--compare", inputs / "c.png").error(2, "--compare shows one image")
    colour = ("colorize", "--model", student, "--image")
    cli(*colour, empty, "--out", inputs / "done").error(1, "holds no images")
    cli(*colour, many, "--truth", empty, "--out", inputs / "done").error(1, "holds no image called 0")
    (many / "1.bmp").write_bytes(png(np.zeros((8, 8, 3))))
    cli(*colour, many, "--out", inputs / "done").error(1, "several images called 1")
    assert not (inputs / "done").exists()


def test_a_soft_mask_mixes(cli, student, inputs, picture):
    levels = np.zeros((8, 8))
    levels[:, 2:4], levels[:, 4:6], levels[:, 6:] = 64, 128, 255
    (inputs / "soft.png").write_bytes(png(levels))
    (inputs / "hard.png").write_bytes(png(255 * (levels > 0)))
    ask = ("inpaint", "--model", student, "--image", inputs / "image.png")
    assert cli(*ask, "--mask", inputs / "soft.png", "--soft-mask", "--out", inputs / "soft-out.png").code == 0
    assert cli(*ask, "--mask", inputs / "hard.png", "--out", inputs / "hard-out.png").code == 0
    share = (levels / 255)[:, :, None]
    expected = picture + share * (read(inputs / "hard-out.png") - picture)
    assert np.abs(read(inputs / "soft-out.png") - expected).max() <= 1
    assert (read(inputs / "soft-out.png")[:, :2] == picture[:, :2]).all()
    cli(*ask, "--soft-mask", "--out", inputs / "x.png").error(2, "--soft-mask is of a --mask")


def test_the_brightness_that_stays_can_be_another(cli, student, inputs, picture):
    for text, weights in (("bt709", (0.2126, 0.7152, 0.0722)), ("1,1,2", (0.25, 0.25, 0.5))):
        result = cli(
            "colorize", "--model", student, "--image", inputs / "image.png", "--out", inputs / "o.png", "--luma", text
        )
        assert result.code == 0, result.stderr
        made = read(inputs / "o.png") @ np.array(weights)
        assert np.abs(made - picture @ np.array(weights)).max() <= 1.01
    for text in ("bt2020", "1,2", "0,0,0", "1,nan,1", "-1,1,1"):
        ask = ("colorize", "--model", student, "--image", inputs / "image.png", "--out", inputs / "o.png")
        cli(*ask, "--luma", text).error(2, f"--luma {text}")
