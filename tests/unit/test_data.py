"""Data sets from every kind of source: order, labels, policies, losses, and refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmtool import rng
from cmtool.errors import DataError, DependencyError, UsageError
from cmtool.io import data as io_data
from cmtool.io import images as io_images
from cmtool.io import sources as io_sources
from cmtool.io.data import BadFile, inspect_data, open_data
from cmtool.io.digits import GROUND, INKS, digits
from cmtool.io.pairs import About, read_pairs, write_pairs

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.tar.xz"


def noise(count, height=8, width=8, seed=0):
    return np.random.RandomState(seed).randint(256, size=(count, height, width, 3), dtype=np.uint8)


def encode(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def as_zip(root, files):
    with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return root / "set.zip"


def pngs(names, **options):
    return {name: encode(pixels) for name, pixels in zip(names, noise(len(names), **options), strict=True)}


def nhwc(dataset):
    return dataset.images.permute(0, 2, 3, 1).numpy()


PACKED = pytest.mark.parametrize("pack", [as_folder, as_zip])


class TestTrees:
    @PACKED
    def test_flat(self, tmp_path, pack):
        """In the order of the names, whatever the order on disk; no labels."""
        names = ["b.png", "a.png", "10.png", "9.png"]
        data = open_data(pack(tmp_path, pngs(names)))
        order = [names.index(name) for name in sorted(names)]
        assert np.array_equal(nhwc(data), noise(4)[order])
        assert (data.images.dtype, data.images.is_contiguous(), len(data)) == (torch.uint8, True, 4)
        assert (data.labels, data.class_names, data.report.classes) == (None, (), {})
        assert (data.report.used, data.report.resolution, data.report.channels) == (4, 8, 3)
        assert data.report.converted == data.report.dropped == {}

    @PACKED
    def test_class_folders(self, tmp_path, pack):
        """Deeper files belong to their top-level folder."""
        data = open_data(pack(tmp_path, pngs(["dog/x.png", "cat/b.png", "cat/a/deep/z.png", "ant/q.png"])))
        assert data.class_names == ("ant", "cat", "dog")
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == [0, 1, 1, 2]
        assert np.array_equal(nhwc(data), noise(4)[[3, 2, 1, 0]])
        assert data.report.classes == {"ant": 1, "cat": 2, "dog": 1}

    @PACKED
    def test_numbered_class_folders_keep_their_numbers(self, tmp_path, pack):
        data = open_data(pack(tmp_path, pngs([f"{n}/a.png" for n in range(12)])))
        assert data.class_names == tuple(map(str, range(12)))
        pixels = {n: noise(12)[n] for n in range(12)}
        for image, label in zip(nhwc(data), data.labels.tolist(), strict=True):
            assert np.array_equal(image, pixels[label])

    @PACKED
    def test_an_only_folder_is_a_wrapper(self, tmp_path, pack):
        names = ["cifar/train/cat/1.png", "cifar/train/dog/1.png"]
        assert open_data(pack(tmp_path, pngs(names))).class_names == ("cat", "dog")

    @PACKED
    def test_one_folder_is_no_class(self, tmp_path, pack):
        assert open_data(pack(tmp_path, pngs(["all/1.png", "all/2.png"]))).labels is None

    @PACKED
    def test_loose_images_beside_classes(self, tmp_path, pack):
        with pytest.raises(DataError, match=r"2 class folders, and images beside them \(first 'c.png'\)"):
            open_data(pack(tmp_path, pngs(["a/1.png", "b/1.png", "c.png"])))

    @PACKED
    def test_hidden_and_other_files(self, tmp_path, pack):
        hidden = ["__MACOSX/._a.png", ".git/x.png", "cat/.DS_Store", "dog/._1.png", ".hidden.png"]
        files = pngs(["cat/1.png", "dog/1.png", *hidden]) | {"README.md": b"x", "cat/labels.csv": b"y"}
        data = open_data(pack(tmp_path, files))
        assert data.report.classes == {"cat": 1, "dog": 1}
        assert data.report.ignored == 2

    def test_every_extension(self, tmp_path):
        picture = Image.fromarray(noise(1)[0])
        kinds = {"a.JPEG": "JPEG", "b.jpg": "JPEG", "c.PNG": "PNG", "d.webp": "WEBP", "e.bmp": "BMP", "f.gif": "GIF"}
        kinds |= {"g.tif": "TIFF", "h.TIFF": "TIFF", "i.ppm": "PPM", "j.pgm": "PPM", "k.jp2": "JPEG2000"}
        for name, kind in kinds.items():
            (picture.convert("L") if name == "j.pgm" else picture).save(tmp_path / name, kind)
        data = open_data(tmp_path)
        assert len(data) == len(kinds)
        assert data.report.converted == {"L": 1} | ({"P": 1} if "P" in data.report.converted else {})
        assert sum(inspect_data(tmp_path).formats.values()) == len(kinds)

    def test_links_are_followed_once(self, tmp_path):
        as_folder(tmp_path / "real", pngs(["1.png"]))
        (tmp_path / "set" / "cat").mkdir(parents=True)
        as_folder(tmp_path / "set" / "dog", pngs(["2.png"]))
        (tmp_path / "set" / "cat" / "1.png").symlink_to(tmp_path / "real" / "1.png")
        (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
        (tmp_path / "set" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        data = open_data(tmp_path / "set")
        assert data.report.classes == {"cat": 1, "dog": 1}
        assert data.report.dropped == {"no such file": 1}

    def test_names_of_any_bytes(self, tmp_path):
        name = os.fsdecode(b"caf\xe9\n[red].png")
        as_folder(tmp_path, {name: encode(noise(1)[0]), "ümlaut.png": b""})
        data = open_data(tmp_path)
        assert len(data) == 1
        json.dumps(data.report.first_bad.name)

    @PACKED
    def test_nothing_in_it(self, tmp_path, pack):
        place = pack(tmp_path, {})
        with pytest.raises(DataError, match="found nothing"):
            open_data(place)
        with pytest.raises(DataError, match="found 2 other files") as caught:
            inspect_data(pack(tmp_path, {"a.txt": b"", "b.csv": b""}))
        assert ".png" in caught.value.hint


class TestLabelsFile:
    names = ("00000/img0.png", "00000/img1.png", "00001/img2.png")

    def files(self, content):
        return pngs(self.names) | {
            "dataset.json": content if isinstance(content, bytes) else json.dumps(content).encode()
        }

    @PACKED
    def test_labels(self, tmp_path, pack):
        """The labels go by name; class 1 exists though it has no image."""
        labels = [[self.names[2], 0], [self.names[0], 2], [self.names[1], 0], ["not/there.png", 7]]
        data = open_data(pack(tmp_path, self.files({"labels": labels})))
        assert data.labels.tolist() == [2, 0, 0]
        assert data.class_names == ("0", "1", "2")
        assert data.report.classes == {"0": 2, "1": 0, "2": 1}
        assert data.report.ignored == 0

    @PACKED
    def test_null_means_no_labels_even_in_folders(self, tmp_path, pack):
        data = open_data(pack(tmp_path, self.files({"labels": None})))
        assert (data.labels, data.class_names) == (None, ())

    @PACKED
    def test_inside_a_wrapper(self, tmp_path, pack):
        labels = [[name.replace("/", "\\"), index] for index, name in enumerate(self.names)]
        files = {f"wrapped/{name}": content for name, content in self.files({"labels": labels}).items()}
        assert open_data(pack(tmp_path, files)).labels.tolist() == [0, 1, 2]

    @PACKED
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "holds no labels"),
            (b"\xff\xfe{", "holds no labels"),
            (b"[" * 100_000, "holds no labels"),
            ([], "holds no labels"),
            ({"classes": []}, "holds no labels"),
            ({"labels": [1, 2, 3]}, "holds no labels"),
            ({"labels": []}, "no label for 3 of 3 images, first '00000/img0.png'"),
            ({"labels": [[names[0], 0], [names[2], 0]]}, "no label for 1 of 3 images, first '00000/img1.png'"),
            ({"labels": [[name, [0, 1]] for name in names]}, "not a whole number"),
            ({"labels": [[name, 0.5] for name in names]}, "not a whole number"),
            ({"labels": [[name, True] for name in names]}, "not a whole number"),
            ({"labels": [[name, -1] for name in names]}, "labels from -1"),
            ({"labels": [[name, 10**30] for name in names]}, "labels from 10{30} to"),
        ],
    )
    def test_refused(self, tmp_path, pack, content, words):
        with pytest.raises(DataError, match=words) as caught:
            open_data(pack(tmp_path, self.files(content)))
        assert "dataset.json" in caught.value.message
        assert caught.value.hint

    def test_damaged_in_the_zip(self, tmp_path):
        path = as_zip(tmp_path, self.files({"labels": None}))
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo("dataset.json").header_offset
        content = bytearray(path.read_bytes())
        content[offset + 44] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read dataset\.json in .*damaged"):
            open_data(path)


class TestArrays:
    @pytest.mark.parametrize("key", ["images", "x", "arr_0", "data"])
    @pytest.mark.parametrize("label_key", [None, "labels", "y", "arr_1"])
    def test_npz(self, tmp_path, key, label_key):
        images, labels = noise(4), np.array([2, 0, 2, 1], np.int32)
        arrays = {key: images} | ({label_key: labels} if label_key else {})
        np.savez_compressed(tmp_path / "a.npz", **arrays)
        data = open_data(tmp_path / "a.npz")
        assert np.array_equal(nhwc(data), images)
        assert (data.labels.tolist() if label_key else data.labels) == ([2, 0, 2, 1] if label_key else None)
        assert data.class_names == (("0", "1", "2") if label_key else ())

    @pytest.mark.parametrize(
        ("layout", "mode"),
        [
            (lambda x: x, "RGB"),
            (lambda x: x.transpose(0, 3, 1, 2), "RGB"),
            (lambda x: x[..., 0], "L"),
            (lambda x: x[..., :1], "L"),
            (lambda x: x.transpose(0, 3, 1, 2)[:, :1], "L"),
            (lambda x: np.asfortranarray(x), "RGB"),
        ],
    )
    def test_layouts(self, tmp_path, layout, mode):
        np.save(tmp_path / "a.npy", layout(noise(5)))
        data = open_data(tmp_path / "a.npy")
        assert np.array_equal(nhwc(data), noise(5) if mode == "RGB" else noise(5)[..., :1].repeat(3, -1))
        assert data.report.converted == ({} if mode == "RGB" else {"L": 5})
        assert open_data(tmp_path / "a.npy", channels=1).images.shape == (5, 1, 8, 8)

    def test_a_column_of_labels(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=noise(3), y=np.array([[1], [0], [1]], np.uint8))
        assert open_data(tmp_path / "a.npz").labels.tolist() == [1, 0, 1]

    def test_the_suffix_may_lie(self, tmp_path):
        np.save(tmp_path / "a.npy", noise(3))
        np.savez(tmp_path / "b.npz", images=noise(3))
        (tmp_path / "a.npy").rename(tmp_path / "c.npz")
        (tmp_path / "b.npz").rename(tmp_path / "d.npy")
        assert open_data(tmp_path / "c.npz").fingerprint == open_data(tmp_path / "d.npy").fingerprint

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (noise(3).astype(np.float32) / 255, "expected uint8 images .* found float32 \\[3, 8, 8, 3\\]"),
            (noise(3).reshape(3, -1), "found uint8 \\[3, 192\\]"),
            (noise(3)[:0], "found uint8 \\[0, 8, 8, 3\\]|damaged"),
            (np.zeros((2, 3, 8, 3), np.uint8), "which axis holds the colours"),
            (np.zeros((2, 1, 8, 1), np.uint8), "which axis holds the colours"),
            (np.zeros((2, 8, 8, 4), np.uint8), "an axis of 1 or 3 colours"),
            (np.array([None, 1]), "pickled"),
            (np.zeros((), np.uint8), "found uint8 \\[\\]"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["npy", "npz"])
    def test_refused(self, tmp_path, array, words, suffix):
        path = tmp_path / f"a.{suffix}"
        np.save(path, array) if suffix == "npy" else np.savez(path, images=array)
        with pytest.raises(DataError, match=words) as caught:
            open_data(path)
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (np.zeros(4, int), "found int64 \\[4\\]"),
            (np.eye(3), "found float64 \\[3, 3\\]"),
            (np.array([0, -1, 1]), "labels from -1 to 1"),
            (np.array([0, 1, 10**6]), "labels from 0 to 1000000"),
            (np.array(["a", "b", "c"]), "whole numbers"),
        ],
    )
    def test_labels_refused(self, tmp_path, labels, words):
        np.savez(tmp_path / "a.npz", images=noise(3), labels=labels)
        with pytest.raises(DataError, match=words):
            open_data(tmp_path / "a.npz")

    def test_other_keys_are_named(self, tmp_path):
        np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
        with pytest.raises(DataError, match="found mu, sigma") as caught:
            open_data(tmp_path / "a.npz")
        assert caught.value.hint == "name one images, x, arr_0 or data"

    @pytest.mark.parametrize("content", [b"hello", b""])
    @pytest.mark.parametrize("name", ["images.npy", "images"])
    def test_a_member_that_is_no_array(self, tmp_path, name, content):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(DataError, match="found bytes that are no array") as caught:
            open_data(tmp_path / "a.npz")
        assert "numpy.savez" in caught.value.hint

    @pytest.mark.parametrize("suffix", ["npy", "npz"])
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "found an empty file"),
            (b"junk junk", "found neither an .npz nor an .npy file"),
            (b"\x80\x04K*.", "found neither an .npz nor an .npy file"),  # a pickle
            (b"\x93NUMPY", "damaged or cut off: EOF"),
            (b"PK\3\4 and no more", "damaged or cut off: file is not a zip file"),
        ],
    )
    def test_other_bytes(self, tmp_path, suffix, content, words):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        for use in (open_data, inspect_data):
            with pytest.raises(DataError, match=words) as caught:
                use(tmp_path / f"a.{suffix}")
            assert caught.value.hint

    def test_a_header_that_promises_too_much(self, tmp_path):
        np.save(tmp_path / "a.npy", noise(2))
        content = (tmp_path / "a.npy").read_bytes()
        (tmp_path / "a.npy").write_bytes(content.replace(b"(2, 8, 8, 3)", b"(9999999, 8, 8, 3)")[: len(content)])
        with pytest.raises(DataError, match="damaged or cut off"):
            open_data(tmp_path / "a.npy")


class TestPolicies:
    def test_nothing_is_touched_without_a_resolution(self, tmp_path):
        data = open_data(as_folder(tmp_path, pngs(["a.png"])), resize="lanczos")
        assert np.array_equal(nhwc(data), noise(1))
        assert (data.report.cropped, data.report.resized) == (0, 0)

    def test_mixed_sizes(self, tmp_path):
        files = pngs(["a.png", "b.png"]) | {"c.png": encode(noise(1, 6, 10)[0]), "d.png": encode(noise(1, 12, 12)[0])}
        with pytest.raises(DataError, match=r"found 8x8 \(2\), 10x6 \(1\), 12x12 \(1\)") as caught:
            open_data(as_folder(tmp_path, files))
        assert caught.value.hint.startswith("--resolution 6 ")
        data = open_data(tmp_path, resolution=6)
        assert (data.report.used, data.report.cropped, data.report.resized, data.report.enlarged) == (4, 1, 3, 0)

    def test_many_sizes_are_not_all_listed(self, tmp_path):
        files = {f"{n}.png": encode(noise(1, n, n)[0]) for n in range(2, 12)}
        with pytest.raises(DataError, match="and 6 more sizes"):
            open_data(as_folder(tmp_path, files))

    def test_one_size_but_not_square(self, tmp_path):
        with pytest.raises(DataError, match=r"one square size .* found 10x6 \(2\)"):
            open_data(as_folder(tmp_path, pngs(["a.png", "b.png"], height=6, width=10)))

    @pytest.mark.parametrize(("height", "width"), [(6, 11), (11, 6), (6, 10)])
    def test_the_middle_is_cut_out(self, tmp_path, height, width):
        pixels = noise(1, height, width)[0]
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels)}), resolution=6)
        top, left = (height - 6) // 2, (width - 6) // 2
        assert np.array_equal(nhwc(data)[0], pixels[top : top + 6, left : left + 6])
        assert (data.report.cropped, data.report.resized) == (1, 0)

    def test_box_is_the_mean_over_blocks(self, tmp_path):
        pixels = noise(1, 8, 8)[0]
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels)}), resolution=2)
        assert np.abs(nhwc(data)[0] - pixels.reshape(2, 4, 2, 4, 3).mean((1, 3))).max() <= 1  # rounded twice
        assert (data.report.cropped, data.report.resized, data.report.enlarged) == (0, 1, 0)

    @pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
    def test_each_filter_is_the_one_of_its_name(self, tmp_path, name):
        pixels = noise(1, 9, 9)[0]
        expected = Image.fromarray(pixels).resize((5, 5), getattr(Image.Resampling, name.upper()))
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels)}), resolution=5, resize=name)
        assert np.array_equal(nhwc(data)[0], np.asarray(expected))

    def test_transparency_is_laid_on_black_before_resizing(self, tmp_path):
        """Else the colours of invisible pixels would bleed in."""
        pixels = np.full((4, 4, 4), 255, np.uint8)
        pixels[:2, :, 3] = 0
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels)}), resolution=2)
        assert nhwc(data)[0, :, 0, 0].tolist() == [0, 255]
        assert data.report.converted == {"RGBA": 1}

    def test_enlarging_needs_a_word(self, tmp_path):
        files = pngs(["a.png"]) | {"small.png": encode(noise(1, 5, 9)[0])}
        with pytest.raises(DataError, match=r"at least 8x8 .* found 1 smaller, first small.png with 9x5") as caught:
            open_data(as_folder(tmp_path, files), resolution=8)
        assert "--resolution 5" in caught.value.hint
        assert "--upscale" in caught.value.hint
        data = open_data(tmp_path, resolution=8, upscale=True)
        assert (data.report.used, data.report.resized, data.report.enlarged) == (2, 1, 1)
        assert "1 enlarged" in data.report.summary()

    def test_crop_none_insists_on_squares(self, tmp_path):
        files = pngs(["a.png"]) | {"wide.png": encode(noise(1, 8, 9)[0])}
        with pytest.raises(DataError, match=r"square images .* first wide.png with 9x8") as caught:
            open_data(as_folder(tmp_path, files), resolution=4, crop="none")
        assert "--crop center" in caught.value.hint

    def test_resize_none_cuts_a_window(self, tmp_path):
        pixels = noise(1, 9, 12)[0]
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels)}), resolution=4, resize="none")
        assert np.array_equal(nhwc(data)[0], pixels[2:6, 4:8])
        with pytest.raises(DataError, match="at least 10x10") as caught:
            open_data(tmp_path, resolution=10, resize="none", upscale=True)
        assert caught.value.hint == "use --resolution 9 or less"

    def test_neither_crop_nor_resize(self, tmp_path):
        place = as_folder(tmp_path, pngs(["a.png"]))
        assert len(open_data(place, resolution=8, crop="none", resize="none")) == 1
        with pytest.raises(DataError, match="images of 6x6"):
            open_data(place, resolution=6, crop="none", resize="none")

    def test_the_camera_orientation_comes_first(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = noise(1, 5, 8)[0]
        data = open_data(as_folder(tmp_path, {"a.png": encode(pixels, exif=exif)}), resolution=5)
        turned = np.rot90(pixels, -1)
        assert np.array_equal(nhwc(data)[0], turned[1:6])

    def test_conversions_are_counted(self, tmp_path):
        picture = Image.fromarray(noise(1)[0])
        files = {f"{mode}.png": encode(picture.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
        files |= {"L2.png": files["L.png"], "deep.png": encode(np.full((8, 8), 30000, np.uint16))}
        data = open_data(as_folder(tmp_path, files))
        assert data.report.converted == {"L": 2, "1": 1, "I;16": 1, "LA": 1, "P": 1, "RGBA": 1}
        assert "converted 7 (2 L, 1 1, 1 I;16" in data.report.summary()
        assert (data.images[sorted(files).index("deep.png")] == 117).all()
        grey = open_data(tmp_path, channels=1)
        assert grey.images.shape == (8, 1, 8, 8)
        assert grey.report.converted == {"1": 1, "I;16": 1, "LA": 1, "P": 1, "RGB": 1, "RGBA": 1}

    def test_a_limit_is_spread_over_the_set(self, tmp_path):
        place = as_folder(tmp_path, pngs([f"{c}/{n}.png" for c in "abc" for n in range(4)]))
        data = open_data(place, limit=6)
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(data.images, open_data(place).images[::2])
        assert len(open_data(place, limit=100)) == 12

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"crop": "centre"}, "center"),
            ({"resize": "lancos"}, "lanczos"),
            ({"channels": 4}, "1 or 3"),
            ({"resolution": 0}, "--resolution"),
            ({"resolution": -8}, "--resolution"),
            ({"limit": 0}, "at least 1"),
        ],
    )
    def test_options_that_are_none(self, tmp_path, options, words):
        with pytest.raises(UsageError, match=words):
            open_data(as_folder(tmp_path, pngs(["a.png"])), **options)

    def test_more_than_the_memory_holds(self, tmp_path):
        place = as_folder(tmp_path, pngs(["a.png", "b.png"]))
        with pytest.raises(DataError, match=r"2 images of 2000000x2000000 need 22351\.7 GiB") as caught:
            open_data(place, resolution=2_000_000, upscale=True)
        assert "--resolution" in caught.value.hint


class TestLosses:
    def bad_files(self):
        whole = encode(noise(1, 32, 32)[0])
        return {"bad/cut.png": whole[:700], "bad/empty.png": b"", "bad/text.jpg": b"hello", "bad/cut2.png": whole[:600]}

    @PACKED
    def test_broken_files_are_dropped_and_counted(self, tmp_path, pack, monkeypatch):
        monkeypatch.setattr(io_data, "_CHUNK", 3)  # the first bad file is the first in order, not in time
        good = pngs([f"{folder}/{n}.png" for folder in ("a", "bad", "z") for n in range(5)], height=32, width=32)
        data = open_data(pack(tmp_path, good | self.bad_files()))
        assert len(data) == data.report.used == 15
        assert data.report.dropped == {
            "a broken or truncated image": 2,
            "an empty file": 1,
            "not an image in a known format": 1,
        }
        assert data.report.first_bad == BadFile("bad/cut.png", "a broken or truncated image")
        assert data.class_names == ("a", "bad", "z")
        assert data.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert np.array_equal(nhwc(data), noise(15, 32, 32))
        assert "dropped 4 (first: bad/cut.png: a broken or truncated image)" in data.report.summary()

    def test_a_class_without_readable_images_keeps_its_number(self, tmp_path):
        data = open_data(as_folder(tmp_path, pngs(["a/1.png", "c/1.png"]) | {"b/1.png": b"x"}))
        assert data.labels.tolist() == [0, 2]
        assert data.report.classes == {"a": 1, "b": 0, "c": 1}

    @PACKED
    @pytest.mark.parametrize("resolution", [None, 8])
    def test_nothing_usable(self, tmp_path, pack, resolution):
        with pytest.raises(DataError, match=r"no image .* can be read: .*first bad/cut.png"):
            open_data(pack(tmp_path, self.bad_files()), resolution=resolution)

    def test_a_first_file_that_is_broken_does_not_set_the_size(self, tmp_path):
        data = open_data(as_folder(tmp_path, pngs(["b.png"]) | {"a.png": encode(noise(1, 32, 32)[0])[:700]}))
        assert (len(data), data.report.resolution) == (1, 8)

    def test_zip_members(self, tmp_path):
        path = as_zip(tmp_path, pngs(["a.png", "b.png", "c.png"]))
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            offset = archive.getinfo("b.png").header_offset
        content[offset + 60] ^= 0xFF  # the checksum no longer fits
        path.write_bytes(content)
        data = open_data(path)
        assert (len(data), data.report.dropped) == (2, {"damaged in the zip": 1})
        assert data.report.first_bad.name == "b.png"

    def test_an_encrypted_member(self, tmp_path):
        path = as_zip(tmp_path, pngs(["a.png", "b.png"]))
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
        assert open_data(path).report.dropped == {"encrypted": 1}

    def test_a_zip_bomb_is_not_unpacked(self, tmp_path, monkeypatch):
        monkeypatch.setattr(io_sources, "MAX_BYTES", 2**20)
        path = as_zip(tmp_path, pngs(["a.png"]) | {"bomb.png": bytes(2**20 + 1)})
        read = zipfile.ZipExtFile.read
        monkeypatch.setattr(
            zipfile.ZipExtFile, "read", lambda self, n=-1: read(self, n) if self.name == "a.png" else 1 / 0
        )
        assert open_data(path).report.dropped == {"more than 1 MiB": 1}

    def test_a_bomb_that_lies_about_its_size(self, tmp_path):
        path = as_zip(tmp_path, pngs(["a.png"]) | {"bomb.png": bytes(2**24)})
        content = path.read_bytes().replace(struct.pack("<I", 2**24), struct.pack("<I", 100))
        path.write_bytes(content)
        assert open_data(path).report.dropped == {"damaged in the zip": 1}

    def test_an_image_bomb(self, tmp_path, monkeypatch):
        monkeypatch.setattr(io_images, "MAX_PIXELS", 100)
        place = as_folder(tmp_path, pngs(["a.png"]) | {"b.png": encode(noise(1, 11, 10)[0])})
        assert open_data(place).report.dropped == {"more than 100 pixels": 1}


class TestPlaces:
    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="no such file") as caught:
            open_data(tmp_path / "none")
        assert "name a folder" in caught.value.hint

    @pytest.mark.parametrize(("name", "close"), [("digit", "digits"), ("digits:tests", "digits:test")])
    def test_a_misspelt_set(self, name, close):
        with pytest.raises(DataError) as caught:
            open_data(name)
        assert caught.value.hint.startswith("did you mean")
        assert close in caught.value.hint

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("a.tar.xz", "tar -xf"), ("a.tgz", "tar -xf"), ("a.png", "name the folder"), ("a.csv", "into a folder")],
    )
    def test_other_files(self, tmp_path, name, hint):
        (tmp_path / name).write_bytes(b"content")
        with pytest.raises(DataError, match="expected a folder, a zip") as caught:
            open_data(tmp_path / name)
        assert hint in caught.value.hint

    @pytest.mark.parametrize("use", [open_data, inspect_data])
    def test_odd_names(self, use):
        for name in (" ", "-", "a\0b", "x" * 5000, "https://example.org/a.zip", "https://example.org/a.npz", "\0.npz"):
            with pytest.raises(DataError):
                use(name)

    @pytest.mark.parametrize("use", [open_data, inspect_data])
    def test_an_empty_name_is_not_the_current_folder(self, tmp_path, monkeypatch, use):
        monkeypatch.chdir(as_folder(tmp_path, pngs(["a.png"])))
        assert use(".")
        with pytest.raises(DataError, match="found an empty name") as caught:
            use("")
        assert caught.value.hint.startswith("name a folder")

    def test_a_zip_by_another_name(self, tmp_path):
        path = as_zip(tmp_path, pngs(["a.png"])).rename(tmp_path / "set.bin")
        assert len(open_data(path)) == 1

    @pytest.mark.parametrize("cut", [0, 10, 200, -30, -1])
    def test_a_truncated_zip(self, tmp_path, cut):
        path = as_zip(tmp_path, pngs(["a.png", "b.png"]))
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DataError, match="damaged or cut off"):
            open_data(path)


class TestGarbage:
    """Whatever the bytes, a data set or a DataError."""

    @staticmethod
    def whole(folder, suffix):
        if suffix == ".zip":
            return as_zip(
                folder, pngs(["a/1.png", "b/2.png"]) | {"dataset.json": b'{"labels": [["a/1.png", 0], ["b/2.png", 1]]}'}
            )
        if suffix == "pairs":
            np.savez(folder / "set.npz", **entries(count=2, side=2))
            return folder / "set.npz"
        path = folder / f"set{suffix}"
        np.save(path, noise(2)) if suffix == ".npy" else np.savez(path, images=noise(2), labels=np.arange(2))
        return path

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_damaged(self, tmp_path_factory, data):
        path = self.whole(
            tmp_path_factory.mktemp("damaged"), data.draw(st.sampled_from([".zip", ".npz", ".npy", "pairs"]))
        )
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        for use in (open_data, inspect_data):
            with contextlib.suppress(DataError):
                use(path)

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_pairs_with_anything_in_them(self, tmp_path_factory, data):
        """Damage behind the checksums: entries of odd types and shapes, headers with odd bytes."""
        path = tmp_path_factory.mktemp("odd") / "set.npz"
        arrays = entries(count=2, side=2)
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                content = bytearray(buffer.getvalue())
                for _ in range(data.draw(st.integers(0, 2))):
                    content[data.draw(st.integers(0, min(127, len(content) - 1)))] = data.draw(st.integers(0, 255))
                if data.draw(st.integers(0, 9)):
                    archive.writestr(f"{name}.npy", bytes(content))
        for use in (open_data, inspect_data):
            with contextlib.suppress(DataError):
                use(path)

    @settings(max_examples=60, deadline=None)
    @given(suffix=st.sampled_from([".zip", ".npz", ".npy"]), content=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, suffix, content):
        path = tmp_path_factory.mktemp("garbage") / f"set{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError):
            open_data(path)


class TestDataset:
    def test_batch(self, tmp_path):
        data = open_data(as_folder(tmp_path, pngs(["a/1.png", "a/2.png", "b/1.png"])))
        images, labels = data.batch(torch.tensor([2, 0, 2]))
        assert torch.equal(images, data.images[[2, 0, 2]])
        assert labels.tolist() == [1, 0, 1]
        plain = open_data(tmp_path / "a")
        assert plain.batch(torch.tensor([1]))[1] is None

    def test_the_fingerprint_is_that_of_pixels_and_labels(self, tmp_path):
        files = pngs(["a/1.png", "a/2.png", "b/1.png"])
        first = open_data(as_folder(tmp_path / "x", files)).fingerprint
        assert len(first) == 16
        assert int(first, 16) > 0
        assert open_data(as_zip(tmp_path, files)).fingerprint == first
        tiffs = {name.replace("png", "tif"): encode(Image.open(io.BytesIO(c)), "TIFF") for name, c in files.items()}
        assert open_data(as_folder(tmp_path / "y", tiffs)).fingerprint == first
        moved = {"a/1.png": files["a/1.png"], "b/0.png": files["a/2.png"], "b/1.png": files["b/1.png"]}
        assert open_data(as_folder(tmp_path / "z", moved)).fingerprint != first  # another label
        (tmp_path / "x" / "b" / "1.png").write_bytes(encode(noise(1, seed=9)[0]))
        assert open_data(tmp_path / "x").fingerprint != first  # another image
        flat = {name.replace("/", ""): content for name, content in files.items()}
        assert open_data(as_folder(tmp_path / "flat", flat)).fingerprint != first  # no labels

    def test_threads_do_not_change_it(self, tmp_path, monkeypatch):
        place = as_folder(tmp_path, pngs([f"{n:03}.png" for n in range(100)]))
        first = open_data(place)
        monkeypatch.setattr(io_data, "_CHUNK", 1)
        assert torch.equal(open_data(place).images, first.images)


def entries(count=5, channels=3, side=8, classes=3, **changes):
    """What a file of pairs holds; a change of None leaves the entry out."""
    shape = (channels, side, side)
    values = np.random.RandomState(0).uniform(-1, 1, (count, *shape)).astype(np.float16)
    about = {
        **{"format": "cmtool.pairs", "version": 1, "teacher": "runs/t", "solver": "heun", "steps": 18},
        **{"guidance": 1.0, "class_names": [f"c{k}" for k in range(classes)], "licence": ""},
        "noise": rng.noise([7], shape).flatten()[:8].tolist(),
    }
    about |= changes.pop("about", {})
    arrays = {"images": values, "seeds": np.arange(7, 7 + count), "about": np.array(json.dumps(about))}
    arrays |= {"labels": np.arange(count) % classes} if classes else {}
    return {name: array for name, array in (arrays | changes).items() if array is not None}


class TestPairs:
    def place(self, folder, **changes):
        np.savez(folder / "p.npz", **entries(**changes))
        return folder / "p.npz"

    def test_a_batch_has_the_noise_of_its_seeds(self, tmp_path):
        data = open_data(self.place(tmp_path))
        images, labels, eps = data.batch(torch.tensor([3, 0, 3]))
        assert images.dtype == eps.dtype == torch.float32
        assert np.array_equal(images.numpy(), entries()["images"][[3, 0, 3]].astype(np.float32))
        assert labels.tolist() == [0, 0, 0]
        for row, seed in zip(eps, (10, 7, 10), strict=True):
            assert torch.equal(row, rng.noise([seed], (3, 8, 8))[0])

    def test_what_is_written_is_read(self, tmp_path):
        values = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        seeds = [3, 2**63 - 1, 0, 5, 6, 1, 2]
        about = About("runs/über\n[red]", "dpm2", 3, 1.5, ("a", "b"), "CC BY-NC 4.0")
        labels = torch.tensor([0, 1, 1, 0, 0, 0, 0])
        batches = [(seeds[k : k + 3], labels[k : k + 3], values[k : k + 3]) for k in (0, 3, 6)]
        write_pairs(tmp_path / "p.npz", 7, iter(batches), about)
        found = read_pairs(str(tmp_path / "p.npz"))
        assert found.about == about
        assert (found.seeds.tolist(), found.labels.tolist()) == (seeds, labels.tolist())
        assert np.array_equal(found.images, values.half().numpy())
        whole = (tmp_path / "p.npz").read_bytes()
        write_pairs(tmp_path / "q.npz", 7, [(seeds, labels, values)], about)
        assert (tmp_path / "q.npz").read_bytes() == whole
        data = open_data(tmp_path / "p.npz")
        assert torch.equal(data.batch(torch.tensor([1]))[2], rng.noise([2**63 - 1], (1, 4, 4)))
        assert data.report.summary() == (
            "7 pairs, 4x4 grey; 2 classes; solved from runs/über\n[red] by dpm2, 3 steps, guidance 1.5"
        )

    def test_numpy_reads_it_without_pickles(self, tmp_path):
        write_pairs(tmp_path / "p.npz", 1, [([4], None, torch.zeros(1, 3, 2, 2))], About("t", "jump", 1))
        with np.load(tmp_path / "p.npz", allow_pickle=False) as content:
            assert set(content) == {"images", "seeds", "about"}
            assert json.loads(str(content["about"]))["solver"] == "jump"
            assert content["seeds"].tolist() == [4]

    def test_no_more_or_fewer_than_promised(self, tmp_path):
        for count in (1, 3):
            with pytest.raises(ValueError, match=f"{count} pairs were promised, 2 came"):
                write_pairs(tmp_path / "p.npz", count, [([0, 1], None, torch.zeros(2, 3, 2, 2))], About("t", "jump", 1))
        assert os.listdir(tmp_path) == []

    def test_without_labels(self, tmp_path):
        data = open_data(self.place(tmp_path, classes=0))
        assert (data.labels, data.class_names, data.report.classes) == (None, (), {})
        assert data.batch(torch.tensor([1]))[1] is None
        assert data.report.summary() == "5 pairs, 8x8 RGB; solved from runs/t by heun, 18 steps"

    def test_a_limit_is_spread_over_them(self, tmp_path):
        place = self.place(tmp_path)
        some, data = open_data(place, limit=2), open_data(place)
        assert (some.seeds.tolist(), some.labels.tolist(), some.report.used) == ([7, 9], [0, 2], 2)
        assert torch.equal(some.images, data.images[[0, 2]])
        assert some.report.classes == {"c0": 1, "c1": 0, "c2": 1}
        assert len(open_data(place, limit=9)) == 5

    def test_they_are_taken_as_they_are(self, tmp_path):
        place = self.place(tmp_path)
        for options in ({"resolution": 4}, {"resolution": 16, "upscale": True}, {"channels": 1}):
            with pytest.raises(DataError, match="no longer belongs to its noise") as caught:
                open_data(place, **options)
            assert caught.value.hint.startswith("leave out --")
        data = open_data(place, resolution=8, channels=3, crop="center", resize="lanczos", upscale=True)
        assert data.fingerprint == open_data(place).fingerprint
        for options in ({"crop": "centre"}, {"resolution": 0}, {"channels": 2}, {"limit": 0}):
            with pytest.raises(UsageError):
                open_data(place, **options)

    def test_pictures(self, tmp_path):
        data = open_data(self.place(tmp_path))
        expected = ((data.images.float() + 1) * 127.5).round().to(torch.uint8)
        assert torch.equal(data.pictures, expected)

    def test_the_fingerprint_is_that_of_images_labels_and_seeds(self, tmp_path):
        first = open_data(self.place(tmp_path)).fingerprint
        assert open_data(self.place(tmp_path, about={"teacher": "elsewhere"})).fingerprint == first
        images = entries()["images"].copy()
        images[2, 0, 1, 1] = 0
        changes = [{"images": images}, {"labels": np.array([0, 1, 2, 0, 2])}, {"seeds": np.array([7, 8, 9, 10, 12])}]
        assert len({first, *(open_data(self.place(tmp_path, **change)).fingerprint for change in changes)}) == 4

    def test_inspect(self, tmp_path):
        found = inspect_data(self.place(tmp_path))
        assert (found.kind, found.count, found.sizes, found.modes) == ("pairs", 5, {"8x8": 5}, {"RGB": 5})
        assert (found.classes, found.resolution, found.hint) == ({"c0": 2, "c1": 2, "c2": 1}, 8, "")
        assert found.pairs == About("runs/t", "heun", 18, 1.0, ("c0", "c1", "c2"))

    def test_other_arrays_with_seeds_are_no_pairs(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=noise(3), seeds=np.arange(3))
        assert open_data(tmp_path / "a.npz").seeds is None

    def test_numbers_of_any_width(self, tmp_path):
        data = open_data(
            self.place(tmp_path, labels=np.array([0, 1, 2, 0, 1], np.uint8), seeds=np.arange(7, 12, dtype="u4"))
        )
        assert data.labels.dtype == data.seeds.dtype == torch.int64

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"images": None}, "float16 .* found none"),
            ({"seeds": None}, "expected 5 seeds.* found none"),
            ({"labels": None}, "expected 5 labels.* found none"),
            ({"images": noise(5)}, "found uint8"),
            ({"images": entries()["images"].astype(np.float32)}, "found float32"),
            ({"images": entries()["images"].astype(">f2")}, "found >f2"),
            ({"images": entries()["images"][0]}, r"found float16 \[3, 8, 8\]"),
            ({"images": entries()["images"][:0]}, r"found float16 \[0, 3, 8, 8\]"),
            ({"images": entries()["images"][:, :, :4]}, r"square .* found float16 \[5, 3, 4, 8\]"),
            ({"images": entries()["images"][:, :2]}, r"1 or 3 channels .* \[5, 2, 8, 8\]"),
            ({"images": entries()["images"] * np.float16(2)}, r"in \[-1, 1\], found -2 to 2|in \[-1, 1\], found -1.99"),
            ({"images": np.where(entries()["images"] > 0.9, np.float16("nan"), entries()["images"])}, "nan"),
            ({"images": np.full((5, 3, 8, 8), np.inf, np.float16)}, "inf"),
            ({"images": np.full((5, 3, 8, 8), None)}, "pickled"),
            ({"seeds": np.arange(4)}, r"expected 5 seeds.* found int64 \[4\]"),
            ({"seeds": np.arange(5.0)}, "found float64"),
            ({"seeds": np.arange(5)[:, None]}, r"found int64 \[5, 1\]"),
            ({"seeds": np.array([7, 8, 9, 10, -1])}, "seeds from 0"),
            ({"seeds": np.array([7, 8, 9, 10, 2**63], np.uint64)}, "seeds from 0"),
            ({"seeds": np.array([None] * 5)}, "pickled"),
            ({"labels": np.arange(5)}, "labels from 0 to 4, and 3 class names"),
            ({"labels": np.array([0, 1, 2, 0, -1])}, "labels from -1 to 2"),
            ({"labels": np.eye(5)}, "expected 5 labels"),
            ({"about": {"class_names": []}}, "0 class names"),
            ({"about": {"format": "other"}}, "does not describe pairs"),
            ({"about": {"version": 2}}, "format 2; this cmtool reads format 1"),
            ({"about": {"version": True}}, "format True"),
            ({"about": {"version": None}}, "format None"),
            ({"about": {"version": "1"}}, "format '1'"),
            ({"about": {"teacher": 3}}, "incomplete"),
            ({"about": {"solver": None}}, "incomplete"),
            ({"about": {"licence": []}}, "incomplete"),
            ({"about": {"steps": 0}}, "incomplete"),
            ({"about": {"steps": True}}, "incomplete"),
            ({"about": {"steps": 1.5}}, "incomplete"),
            ({"about": {"guidance": "much"}}, "incomplete"),
            ({"about": {"guidance": float("inf")}}, "incomplete"),
            ({"about": {"class_names": "abc"}}, "incomplete"),
            ({"about": {"class_names": ["a", "b", 3]}}, "incomplete"),
            ({"about": {"noise": None}}, "incomplete"),
            ({"about": {"noise": [0.0]}}, "incomplete"),
            ({"about": {"noise": ["0"] * 8}}, "incomplete"),
            ({"about": {"noise": [0.0] * 8}}, "seed 7 no longer gives the noise"),
            ({"about": {"noise": [float("nan")] * 8}}, "incomplete|no longer"),
            ({"seeds": np.arange(8, 13)}, "seed 8 no longer gives the noise"),
        ],
    )
    def test_refused(self, tmp_path, changes, words):
        place = self.place(tmp_path, **changes)
        for use in (open_data, inspect_data):
            with pytest.raises(DataError, match=words) as caught:
                use(place)
            assert "p.npz" in caught.value.message
            assert caught.value.hint

    @pytest.mark.parametrize(
        "about",
        [
            *(np.array(text) for text in ("", "{", "[]", "3", '"x"', "null", "[" * 100_000, "{}")),
            *(np.array(["{}"]), np.array(b"{}"), np.array(3.5), np.zeros((0,)), np.array({"format": "cmtool.pairs"})),
        ],
    )
    def test_an_about_that_is_none(self, tmp_path, about):
        np.savez(tmp_path / "p.npz", **(entries() | {"about": about}))
        with pytest.raises(DataError, match=r"does not describe pairs|pickled"):
            open_data(tmp_path / "p.npz")

    def test_more_than_the_memory_holds(self, tmp_path, monkeypatch):
        place = self.place(tmp_path)
        monkeypatch.setattr(io_sources, "memory_limit", lambda: 100)
        with pytest.raises(DataError, match="unpacks to"):
            open_data(place)


class TestInspect:
    @PACKED
    def test_a_mixed_set(self, tmp_path, pack):
        files = pngs(["a/1.png", "a/2.png"]) | {
            "b/3.jpg": encode(noise(1, 12, 20)[0], "JPEG"),
            "b/4.png": encode(noise(1)[0, :, :, 0]),
            "b/5.png": b"",
            "notes.txt": b"x",
        }
        found = inspect_data(pack(tmp_path, files))
        assert (found.kind, found.count, found.ignored) == ("folder" if pack is as_folder else "zip", 4, 1)
        assert found.sizes == {"8x8": 3, "20x12": 1}
        assert found.modes == {"RGB": 3, "L": 1}
        assert found.formats == {"PNG": 3, "JPEG": 1}
        assert found.classes == {"a": 2, "b": 2}
        assert found.dropped == {"an empty file": 1}
        assert found.first_bad == BadFile("b/5.png", "an empty file")
        assert found.resolution is None
        assert "--resolution 8" in found.hint

    def test_one_size(self, tmp_path):
        found = inspect_data(as_folder(tmp_path, pngs(["a.png", "b.png"])))
        assert (found.resolution, found.hint, found.classes) == (8, "", {})

    def test_a_camera_picture_counts_as_it_is_seen(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        found = inspect_data(as_folder(tmp_path, {"a.png": encode(noise(1, 5, 8)[0], exif=exif)}))
        assert found.sizes == {"5x8": 1}

    def test_nothing_readable_is_no_error(self, tmp_path):
        found = inspect_data(as_folder(tmp_path, {"a.png": b"x", "b.png": b""}))
        assert (found.count, found.resolution, sum(found.dropped.values())) == (0, None, 2)

    def test_arrays_and_digits(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=noise(3), labels=np.array([0, 1, 1]))
        found = inspect_data(tmp_path / "a.npz")
        assert (found.kind, found.count, found.formats, found.classes) == ("npz", 3, {"array": 3}, {"0": 1, "1": 2})
        assert inspect_data("digits:test").sizes == {"16x16": 300}


class TestDigits:
    def test_the_set(self):
        data = open_data("digits")
        assert data.images.shape == (1797, 3, 16, 16)
        assert data.class_names == tuple("0123456789")
        # The counts that the UCI page states for this part of the set.
        assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert data.fingerprint == open_data("digits").fingerprint

    def test_they_are_the_same_everywhere(self):
        """Inks and split exactly, the drawing up to what the arithmetic of another processor may change."""
        images, labels = digits()
        inks = list(INKS)
        used = [inks[self.nearest_ink(image)] for image in images[:6]]
        assert used == ["pink", "orange", "violet", "pink", "orange", "teal"]
        assert labels[:6].tolist() == [0, 1, 2, 3, 4, 5]
        assert digits("test")[1][:12].tolist() == [1, 4, 8, 0, 9, 4, 5, 0, 5, 0, 5, 1]
        assert np.abs(images.mean((0, 1, 2)) - (50.966, 48.974, 54.716)).max() < 0.01

    @staticmethod
    def nearest_ink(image):
        brightest = image.reshape(-1, 3)[image.sum(-1).argmax()].astype(float)
        return int(np.abs(np.array(list(INKS.values())) - brightest).sum(-1).argmin())

    def test_the_split(self):
        whole, train, test = (open_data(name) for name in ("digits", "digits:train", "digits:test"))
        assert (len(train), len(test)) == (1497, 300)
        assert test.labels.bincount().tolist() == [30] * 10
        rows = [Counter(image.numpy().tobytes() for image in part.images) for part in (whole, train, test)]
        assert rows[0] == rows[1] + rows[2]
        assert not rows[1] & rows[2]

    def test_each_image_is_one_ink_on_the_ground(self):
        """Every pixel lies on the line from the ground to the ink, and the ink is reached."""
        images, _ = digits()
        inks, ground = np.array(list(INKS.values()), float), np.array(GROUND, float)
        used = set()
        for image in images[::20].astype(float):
            errors = []
            for ink in inks:
                cover = ((image - ground) @ (ink - ground)) / ((ink - ground) @ (ink - ground))
                errors.append(np.abs(ground + cover[..., None] * (ink - ground) - image).max())
                if errors[-1] < 1.01:
                    assert cover.max() > 0.99
                    assert abs(cover.min()) < 0.01
            assert sorted(errors)[0] < 1.01 < 8 < sorted(errors)[1]
            used.add(int(np.argmin(errors)))
        assert used == set(range(len(INKS)))

    def test_the_ink_says_nothing_about_the_digit(self):
        """Chi-squared over the table of digits and inks: 63 degrees of freedom, mean 63, deviation 11."""
        images, labels = digits()
        ink = [self.nearest_ink(image) for image in images]
        table = np.zeros((10, len(INKS)))
        np.add.at(table, (labels, ink), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        assert ((table - expected) ** 2 / expected).sum() < 63 + 3 * 11
        assert table.sum(0).min() > 180

    def test_inks_differ_in_hue_and_hardly_in_brightness(self):
        brightness = np.array(list(INKS.values())) @ np.array([0.299, 0.587, 0.114])
        assert brightness.max() / brightness.min() < 1.3
        hues = sorted(
            Image.new("RGB", (1, 1), ink).convert("HSV").getpixel((0, 0))[0] * 360 / 255 for ink in INKS.values()
        )
        gaps = np.diff([*hues, hues[0] + 360])
        assert gaps.min() > 15

    def test_eight_pixels_show_the_scans_themselves(self):
        from sklearn.datasets import load_digits

        images, _ = digits(resolution=8)
        for image, scan in zip(images[:50], load_digits().images / 16, strict=False):
            drawn = [GROUND + (np.array(ink) - GROUND) * scan[..., None] for ink in INKS.values()]
            assert min(np.abs(image - candidate).max() for candidate in drawn) <= 0.51

    def test_other_sizes_are_drawn_not_resized(self):
        large = open_data("digits:test", resolution=32)
        assert large.images.shape == (300, 3, 32, 32)
        assert large.report.resized == large.report.cropped == 0
        small = open_data("digits:test", resolution=16).images.float()
        assert (torch.nn.functional.avg_pool2d(large.images.float(), 2) - small).abs().mean() < 4

    def test_they_can_be_told_apart_in_grey(self):
        """The judge of the samples is an SVC on grey digits: on real ones it has to be nearly always right."""
        from sklearn.svm import SVC

        train, test = open_data("digits:train", channels=1), open_data("digits:test", channels=1)
        judge = SVC(gamma="scale").fit(train.images.flatten(1).numpy() / 255, train.labels.numpy())
        assert judge.score(test.images.flatten(1).numpy() / 255, test.labels.numpy()) > 0.96

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DependencyError) as caught:
            open_data("digits")
        assert caught.value.hint == "pip install 'cmtool[digits]'"

    def test_scikit_learn_is_not_needed_for_the_rest(self, tmp_path):
        as_folder(tmp_path, pngs(["a.png"]))
        code = (
            "import sys; from cmtool.io.data import open_data as o; o(sys.argv[1]); assert 'sklearn' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs ../shared/data")
def test_cifar_as_folder_and_as_zip(tmp_path):
    subprocess.run(["tar", "-xJf", CIFAR, "-C", tmp_path], check=True)
    root = tmp_path / "cifar10-test"
    with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as archive:
        for path in root.rglob("*.jpg"):
            archive.write(path, path.relative_to(tmp_path))
    folder, zipped = open_data(root), open_data(tmp_path / "cifar.zip")
    assert folder.images.shape == (10000, 3, 32, 32)
    assert folder.labels.bincount().tolist() == [1000] * 10
    assert folder.class_names[0] == "airplane"
    assert folder.fingerprint == zipped.fingerprint
    assert zipped.class_names == folder.class_names
