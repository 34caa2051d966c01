"""`cmtool data inspect` and `cmtool data preview`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from cmtool.cli import options
from cmtool.io import fitting


def picture(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(60, 256, size=(height, width, 3), dtype=np.uint8))


@pytest.fixture
def mixed(tmp_path):
    """Two classes, two sizes, three modes, one broken file, one other file."""
    root = tmp_path / "mixed"
    for index, name in enumerate(["cat/1.png", "cat/2.png", "dog/[bold]3.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, index).save(root / name)
    picture(20, 12).convert("L").save(root / "dog" / "4.jpg")
    (root / "dog" / "5.png").write_bytes(b"hello")
    (root / "notes.txt").write_text("x")
    return root


@pytest.fixture
def square(tmp_path):
    root = tmp_path / "square"
    root.mkdir()
    for index in range(6):
        picture(8, 8, index).save(root / f"{index}.png")
    return root


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


class TestInspect:
    def test_json(self, cli, mixed):
        result = cli("data", "inspect", mixed, "--json")
        assert (result.code, result.stderr) == (0, "")
        assert json.loads(result.stdout) == {
            "source": str(mixed),
            "kind": "folder",
            "count": 4,
            "sizes": {"8x8": 3, "20x12": 1},
            "modes": {"RGB": 3, "L": 1},
            "formats": {"PNG": 3, "JPEG": 1},
            "classes": {"cat": 2, "dog": 2},
            "dropped": {"not an image in a known format": 1},
            "first_bad": {"name": "dog/5.png", "reason": "not an image in a known format"},
            "ignored": 1,
            "resolution": None,
            "hint": "use it with --resolution 8, or another size",
            "pairs": None,
        }

    def test_for_people(self, cli, mixed):
        result = cli("data", "inspect", mixed)
        assert (result.code, result.stderr) == (0, "")
        rows = dict(line.split("  ", 1) for line in result.lines)
        rows = {name: value.strip() for name, value in rows.items()}
        assert rows["images"] == "4"
        assert rows["sizes"] == "8x8 (3), 20x12 (1)"
        assert rows["classes"] == "2: cat (2), dog (2)"
        assert rows["first bad"] == "dog/5.png: not an image in a known format"
        assert "--resolution 8" in rows["resolution"]

    def test_names_are_printed_as_they_are(self, cli, mixed):
        (mixed / "dog" / "[bold]3.png").write_bytes(b"")
        (mixed / "dog" / "5.png").unlink()
        assert b"dog/[bold]3.png: an empty file" in cli("data", "inspect", mixed).stdout

    def test_many_classes_fit_on_one_line(self, cli, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for index in range(30):
                archive.writestr(f"class{index:02}/1.png", b"")
        result = cli("data", "inspect", tmp_path / "a.zip")
        assert result.code == 0
        assert len(result.lines) == 10
        assert "and 10 more" in result.stdout.decode()

    def test_digits(self, cli):
        found = json.loads(cli("data", "inspect", "digits", "--json").stdout)
        assert (found["count"], found["resolution"], found["sizes"]) == (1797, 16, {"16x16": 1797})

    def test_errors(self, cli, tmp_path):
        cli("data", "inspect", tmp_path / "none").error(1, "no such file")
        cli("data", "inspect", tmp_path, "--json").error(1, "found nothing")
        cli("data", "inspect", "digts").error(1, "did you mean digits")
        cli("data", "inspect").error(2)
        cli("data", "inspect", "").error(1, "found an empty name", "name a folder")
        for name, content in (("empty.npy", b""), ("junk.npz", b"junk")):
            (tmp_path / name).write_bytes(content)
        cli("data", "inspect", tmp_path / "empty.npy").error(1, "found an empty file", "copy or download")
        cli("data", "inspect", tmp_path / "junk.npz").error(1, "neither an .npz nor an .npy", "numpy.savez")
        (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
        cli("data", "inspect", tmp_path / "cut.zip").error(1, "damaged or cut off")


class TestPreview:
    def test_a_folder_of_files(self, cli, square, tmp_path):
        result = cli("data", "preview", square, "-n", 3, "--out", tmp_path / "new" / "out")
        names = [str(tmp_path / "new" / "out" / f"{index:06}.png") for index in range(3)]
        assert (result.code, result.lines) == (0, names)
        assert "3 images, 8x8 RGB" in result.stderr
        for name, index in zip(names, (0, 2, 4), strict=True):
            assert np.array_equal(pixels(name), pixels(square / f"{index}.png"))

    def test_a_grid(self, cli, square, tmp_path):
        result = cli("data", "preview", square, "--out", tmp_path / "grid.png", "--scale", 2, "-n", 4)
        assert (result.code, result.lines) == (0, [str(tmp_path / "grid.png")])
        sheet = pixels(tmp_path / "grid.png")
        assert sheet.shape == (2 * 18 + 2, 2 * 18 + 2, 3)
        assert np.array_equal(sheet[2:18:2, 2:18:2], pixels(square / "0.png"))
        assert np.array_equal(sheet[20:36:2, 20:36:2], pixels(square / "4.png"))

    def test_a_pipe(self, cli, square):
        result = cli("data", "preview", square, "--out", "-", "--channels", 1)
        assert result.code == 0
        with Image.open(io.BytesIO(result.stdout)) as sheet:
            assert (sheet.format, sheet.mode, sheet.size) == ("PNG", "L", (32, 22))

    def test_as_the_network_will_see_them(self, cli, mixed, tmp_path):
        options = ("--resolution", 6, "--resize", "bicubic", "--crop", "center")
        result = cli("data", "preview", mixed, "--out", tmp_path / "out", *options, "--json")
        found = json.loads(result.stdout)
        assert found["labels"] == ["cat", "cat", "dog", "dog"]
        assert found["report"]["dropped"] == {"not an image in a known format": 1}
        assert (found["report"]["cropped"], found["report"]["converted"]) == (1, {"L": 1})
        with Image.open(mixed / "cat" / "1.png") as image:
            assert np.array_equal(
                pixels(found["images"][0]), np.asarray(image.resize((6, 6), Image.Resampling.BICUBIC))
            )

    def test_enlarged_on_request(self, cli, square, tmp_path):
        cli("data", "preview", square, "--out", tmp_path / "a.png", "--resolution", 16).error(1, "--upscale")
        assert not (tmp_path / "a.png").exists()
        result = cli("data", "preview", square, "--out", tmp_path / "a.png", "--resolution", 16, "--upscale")
        assert result.code == 0
        assert "6 enlarged" in result.stderr

    def test_quiet(self, cli, square, tmp_path):
        assert cli("data", "preview", square, "--out", tmp_path / "a.png", "--quiet").stderr == ""

    def test_errors(self, cli, mixed, square, tmp_path):
        out = tmp_path / "out"
        cli("data", "preview", mixed, "--out", out).error(1, "8x8 (3), 20x12 (1)", "--resolution 8")
        cli("data", "preview", square).error(2, "--out")
        cli("data", "preview", square, "--out", out, "-n", 0).error(2)
        cli("data", "preview", square, "--out", tmp_path / "a.gif").error(2, ".png")
        cli("data", "preview", square, "--out", out, "--crop", "centre").error(2, "center")
        cli("data", "preview", square, "--out", out, "--resize", "lancos").error(2, "lanczos")
        cli("data", "preview", square, "--out", out, "--channels", 2).error(2, "1 or 3")
        cli("data", "preview", square, "--out", out, "--scale", 2).error(2, "folder")
        cli("data", "preview", square, "--out", "-", "--json").error(2)
        cli("data", "preview", tmp_path / "none", "--out", out).error(1, "no such file")
        cli("data", "preview", square, "--out", square / "0.png" / "a.png").error(2, "not a folder")
        assert not out.exists()


def test_the_words_of_the_options_are_those_of_the_library():
    """The options must not import the library to know them."""
    assert options.CROPS == fitting.CROPS
    assert options.RESIZES == fitting.RESIZES


def test_help_and_usage_errors_do_not_load_torch():
    code = (
        "import sys; from cmtool.cli.app import main; main(['data', 'preview', 'x', '--help']); "
        "main(['data', 'preview', 'x', '--crop', 'y']); main(['data', 'preview', 'x', '--out', 'a.gif']); "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


class TestPack:
    def test_a_packed_folder_is_a_source(self, cli, mixed, tmp_path):
        result = cli("data", "pack", mixed, tmp_path / "packed", "--resolution", 8, "--shard-images", 2, "--json")
        assert result.code == 0, result.stderr
        assert "4 images, 8x8 RGB; 2 classes" in result.stderr
        assert json.loads(result.stdout)["report"]["used"] == 4
        assert sorted(path.name for path in (tmp_path / "packed").glob("*.tar")) == ["00000.tar", "00001.tar"]
        found = json.loads(cli("data", "inspect", tmp_path / "packed", "--json").stdout)
        assert (found["kind"], found["count"], found["resolution"]) == ("shards", 4, 8)
        result = cli("data", "preview", tmp_path / "packed", "--out", tmp_path / "grid.png")
        assert result.code == 0, result.stderr

    def test_a_training_reads_it(self, cli, square, tmp_path):
        assert cli("data", "pack", square, tmp_path / "packed", "-q").code == 0
        run = ["train", "--preset", "edm", "--network", "tiny", "--batch", 4, "--iterations", 4, "--sample-every", 0]
        result = cli(*run, "--data", tmp_path / "packed", "--workers", 1, "--stop-after", 2, "--out", tmp_path / "run")
        assert result.code == 75, result.stderr
        assert json.loads((tmp_path / "run" / "config.json").read_text())["ways"]["workers"] == 1
        shard = tmp_path / "packed" / "00000.tar"
        kept = shard.read_bytes()
        at = int(np.load(tmp_path / "packed" / "index.npy")["offset"][4])
        shard.write_bytes(kept[:at] + bytes(100) + kept[at + 100 :])
        cli("train", "--resume", tmp_path / "run", "-q").error(
            1, "cannot be used any more: damaged", "cmtool data pack"
        )
        shard.write_bytes(kept)
        assert cli("train", "--resume", tmp_path / "run").code == 0

    def test_only_tables_are_streamed(self, cli, mixed, tmp_path):
        cli("data", "pack", mixed, tmp_path / "out", "--stream").error(1, "only tables are streamed", "--stream")

    def test_a_full_disk_is_told_before_it_is_full(self, cli, square, tmp_path, monkeypatch):
        from cmtool.io import shards

        usage = shards.shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage)
        pack = ("data", "pack", square, tmp_path / "out")
        cli(*pack, "--shard-images", 3).error(1, "the next shard needs", "MiB left", "make room")
        assert not list(tmp_path.glob(".out*"))
        assert cli(*pack).code == 0  # a single shard: nobody knows what it takes

    def test_errors(self, cli, mixed, tmp_path):
        cli("data", "pack", mixed).error(2, "FOLDER")
        cli("data", "pack", mixed, tmp_path / "out").error(1, "one square size", "--resolution")
        cli("data", "pack", tmp_path / "none", tmp_path / "out").error(1, "no such file")
        cli("data", "pack", mixed, mixed, "--resolution", 8).error(2, "is there already")
        cli("data", "pack", mixed, mixed / "notes.txt" / "x").error(2, "is a file, not a folder")
        cli("data", "pack", mixed, tmp_path / "out", "--shard-images", 0).error(2, "--shard-images")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
