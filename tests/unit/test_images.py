"""Image files: every mode and every way to be broken, orientation, masks, atomic writes, grids."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmtool.errors import DataError, UsageError
from cmtool.io import images
from cmtool.io.images import (
    captioned_rows,
    from_uint8,
    grid,
    read_image,
    read_image_with_mask,
    read_mask,
    to_uint8,
    write_image,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)  # [16, 16, 3]


def chw(pixels):
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)))


def luma(rgb):
    """ITU-R 601."""
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def save(path, image, **options):
    image.save(path, **options)
    return path


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


class Pipe(io.TextIOWrapper):
    """A standard stream that may be a terminal."""

    def __init__(self, data=b"", terminal=False):
        super().__init__(io.BytesIO(data))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def png(width, height, depth, colour, rows, *chunks):
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")


class TestModes:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp", "qoi", "jp2"])
    def test_rgb_comes_back_exactly(self, tmp_path, suffix):
        options = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(suffix, {})
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(COLOURS), **options)
        assert torch.equal(read_image(path), chw(COLOURS))
        assert torch.equal(read_image(str(path)), chw(COLOURS))

    @pytest.mark.parametrize("suffix", ["JPG", "avif"])
    def test_lossy_rgb_comes_back_roughly(self, tmp_path, suffix):
        smooth = np.stack([np.tile(np.linspace(40, 200, 32), (32, 1))] * 3, -1).astype(np.uint8)
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(smooth), quality=95)
        assert (read_image(path).int() - chw(smooth).int()).abs().max() <= 6

    def test_grey_as_rgb_and_rgb_as_grey(self, tmp_path):
        grey = save(tmp_path / "grey.png", Image.fromarray(RAMP))
        assert torch.equal(read_image(grey, 1), chw(RAMP))
        assert torch.equal(read_image(grey), chw(RAMP).expand(3, -1, -1))
        colour = save(tmp_path / "colour.png", Image.fromarray(COLOURS))
        assert np.abs(read_image(colour, 1)[0].numpy() - luma(COLOURS)).max() <= 0.51

    def test_palette(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(COLOURS // 86 * 86).quantize(256, dither=0))
        assert mode_of(path) == "P"
        assert torch.equal(read_image(path), chw(COLOURS // 86 * 86))

    def test_bilevel(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(RAMP >= 128))
        assert mode_of(path) == "1"
        assert torch.equal(read_image(path, 1), chw((RAMP >= 128).astype(np.uint8) * 255))

    def test_alpha_is_laid_on_black(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(np.dstack([COLOURS, RAMP])))
        expected = COLOURS * (RAMP / 255)[..., None]
        assert np.abs(read_image(path).numpy() - expected.transpose(2, 0, 1)).max() <= 0.51

    def test_grey_with_alpha(self, tmp_path):
        grey = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())])
        path = save(tmp_path / "a.png", grey)
        assert np.abs(read_image(path, 1)[0].numpy() - RAMP * (RAMP.T / 255)).max() <= 0.51

    def test_premultiplied_alpha_is_not_applied_twice(self, tmp_path):
        dimmed = np.rint(COLOURS * (RAMP / 255)[..., None]).astype(np.uint8)
        path = save(tmp_path / "a.tif", Image.fromarray(np.dstack([dimmed, RAMP])))
        tag = struct.pack("<HHIH", 338, 3, 1, 2)  # ExtraSamples: alpha beside the colours ...
        content = path.read_bytes()
        assert content.count(tag) == 1
        path.write_bytes(content.replace(tag, struct.pack("<HHIH", 338, 3, 1, 1)))  # ... alpha multiplied into them
        expected = COLOURS * (RAMP / 255)[..., None]
        assert np.abs(read_image(path).numpy() - expected.transpose(2, 0, 1)).max() <= 2

    @pytest.mark.parametrize("mode", ["P", "L", "RGB"])
    def test_a_transparent_colour_becomes_black(self, tmp_path, mode):
        colours = COLOURS.copy()
        colours[:8] = 200
        picture = Image.fromarray(colours).convert("L") if mode == "L" else Image.fromarray(colours)
        if mode == "P":
            picture = picture.quantize(256, dither=0)
        clear = picture.getpixel((0, 0))
        path = save(tmp_path / "a.png", picture, transparency=clear)
        assert mode_of(path) == mode
        assert (read_image(path)[:, :8] == 0).all()
        assert (read_image(path)[:, 8:] > 0).float().mean() > 0.9

    def test_palette_with_an_alpha_table(self, tmp_path):
        picture = Image.fromarray(RAMP).convert("P")
        path = save(tmp_path / "a.png", picture, transparency=bytes(range(255, -1, -1)))
        expected = RAMP * ((255 - RAMP) / 255)
        assert np.abs(read_image(path, 1)[0].numpy() - expected).max() <= 0.51

    def test_cmyk(self, tmp_path):
        inks = np.array([[[0, 255, 255, 0], [255, 0, 255, 0], [255, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
        picture = Image.frombytes("CMYK", (4, 4), np.repeat(inks, 4, 0).tobytes())
        path = save(tmp_path / "a.tif", picture)
        assert mode_of(path) == "CMYK"
        expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]
        assert read_image(path)[:, 0].T.tolist() == expected
        jpeg = save(tmp_path / "a.jpg", picture.resize((64, 64), 0), quality=100, subsampling=0)
        assert mode_of(jpeg) == "CMYK"
        assert (read_image(jpeg)[:, 8, 8::16].T.int() - torch.tensor(expected)).abs().max() < 12

    def test_lab(self, tmp_path):
        pixels = np.array([[[255, 0, 0], [0, 0, 0], [138, 81, 70]]], np.uint8)  # white, black, red (D50)
        path = save(tmp_path / "a.tif", Image.frombytes("LAB", (3, 1), pixels.tobytes()))
        assert mode_of(path) == "LAB"
        expected = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
        assert (read_image(path)[:, 0].T.int() - expected).abs().max() <= 6

    def test_ycbcr_tiff(self, tmp_path):
        picture = Image.fromarray(COLOURS).convert("YCbCr")
        path = save(tmp_path / "a.tif", picture)
        assert (read_image(path).int() - chw(COLOURS).int()).abs().max() <= 3


class TestDeep:
    """More than 8 bits: scaled, not clipped."""

    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16) // 2 * 2 + 1

    def expected(self):
        return np.floor(self.values / 257 + 0.5).astype(np.uint8)

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
    def test_sixteen_bits(self, tmp_path, suffix):
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(self.values))
        assert (read_image(path, 1)[0].int() - chw(self.expected())[0].int()).abs().max() <= (suffix == "jp2")

    def test_big_endian_tiff(self, tmp_path):
        picture = Image.frombytes("I;16B", (16, 16), self.values.astype(">u2").tobytes())
        path = save(tmp_path / "a.tif", picture)
        assert mode_of(path) == "I;16B"
        assert torch.equal(read_image(path, 1), chw(self.expected()))

    def test_white_is_white_and_black_is_black(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(np.array([[0, 65535, 128 * 257]], np.uint16)))
        assert read_image(path, 1).flatten().tolist() == [0, 255, 128]

    def test_sixteen_bit_rgb_png(self, tmp_path):
        row = b"".join(struct.pack(">HHH", v, 65535 - v, 0) for v in (0, 20000, 65535))
        (tmp_path / "a.png").write_bytes(png(3, 1, 16, 2, [row]))
        expected = np.array([[0, 255, 0], [78, 177, 0], [255, 0, 0]])
        assert np.abs(read_image(tmp_path / "a.png")[:, 0].T.numpy() - expected).max() <= 1

    def test_a_transparent_level_of_sixteen_bits(self, tmp_path):
        row = struct.pack(">HHHH", 1000, 40000, 65535, 1000)
        (tmp_path / "a.png").write_bytes(png(4, 1, 16, 0, [row], (b"tRNS", struct.pack(">H", 40000))))
        assert read_image(tmp_path / "a.png", 1).flatten().tolist() == [4, 0, 255, 4]

    @pytest.mark.parametrize(("top", "white"), [(200, 255), (255, 255), (256, 65535), (65535, 65535)])
    def test_integer_tiff(self, tmp_path, top, white):
        path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0, top // 2, top]], np.int32)))
        assert mode_of(path) == "I"
        expected = [0, round(top // 2 * 255 / white), round(top * 255 / white)]
        assert read_image(path, 1).flatten().tolist() == expected

    @pytest.mark.parametrize(("top", "white"), [(0.5, 1), (1.0, 1), (200.0, 255), (60000.0, 65535)])
    def test_float_tiff(self, tmp_path, top, white):
        path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0, top / 2, top]], np.float32)))
        assert mode_of(path) == "F"
        assert read_image(path, 1).flatten().tolist() == [0, round(top / 2 * 255 / white), round(top * 255 / white)]

    @pytest.mark.parametrize("bad", [-1.0, 70000.0, float("nan"), float("inf")])
    def test_values_without_a_meaning_are_refused(self, tmp_path, bad):
        path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0, bad]], np.float32)))
        with pytest.raises(DataError, match="values from"):
            read_image(path)


class TestTurning:
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20

    @staticmethod
    def stored(upright, orientation):
        """The pixels as a camera stores them: the inverse of what the EXIF standard tells a viewer to do."""
        return {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.T,
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].T,
            8: np.rot90(upright, -1),
        }[orientation]

    @pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, tmp_path, orientation, suffix):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if suffix == "webp" else {}
        picture = Image.fromarray(np.ascontiguousarray(self.stored(self.upright, orientation)))
        path = save(tmp_path / f"a.{suffix}", picture, exif=exif, **options)
        assert torch.equal(read_image(path, 1), chw(self.upright))

    def test_the_mask_turns_with_the_image(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        alpha = np.where(self.upright > 100, 255, 0).astype(np.uint8)
        stored = np.dstack([np.rot90(self.upright, 1)] * 3 + [np.rot90(alpha, 1)])
        path = save(tmp_path / "a.png", Image.fromarray(stored), exif=exif)
        image, mask = read_image_with_mask(path)
        assert torch.equal(mask, chw(self.upright <= 100))
        assert torch.equal(image[:1], chw(np.where(self.upright > 100, self.upright, 0).astype(np.uint8)))

    @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
    def test_a_broken_exif_block_is_no_reason_to_refuse(self, tmp_path, exif):
        path = save(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=exif)
        assert read_image(path).shape == (3, 16, 16)

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
    def test_an_animation_gives_its_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
        path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], duration=50)
        assert (read_image(path).float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 5


class TestBroken:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "an empty file"),
            (b"hello, this is text", "not an image"),
            (b"\x89PNG\r\n\x1a\n", "not an image|broken"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
            (png(60000, 60000, 8, 2, [b""]), "more than 89,478,485 pixels"),
            (png(10000, 9000, 8, 0, [b""]), "more than 89,478,485 pixels"),
        ],
    )
    def test_content(self, tmp_path, content, words):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(DataError, match=words) as caught:
            read_image(tmp_path / "bad.png")
        assert "bad.png" in caught.value.message
        assert caught.value.hint

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif", "ppm", "jp2"])
    def test_truncated(self, tmp_path, suffix, capfd):
        noise = np.random.RandomState(0).randint(256, size=(64, 64, 3), dtype=np.uint8)
        whole = save(tmp_path / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="broken or truncated"):
            read_image(cut)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
    def test_libtiff_does_not_talk_to_the_terminal(self, tmp_path, compression, capfd):
        noise = np.random.RandomState(0).randint(256, size=(64, 64, 3), dtype=np.uint8)
        path = save(tmp_path / "a.tif", Image.fromarray(noise), compression=compression)
        content = bytearray(path.read_bytes())
        content[200:1000] = b"\xee" * 800
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            read_image(path)
        assert capfd.readouterr() == ("", "")
        os.write(2, b"still here")
        assert capfd.readouterr() == ("", "still here")

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            read_image(tmp_path / "none.png")
        with pytest.raises(DataError, match="a folder") as caught:
            read_mask(tmp_path)
        assert caught.value.hint == "name one image file in it"
        (tmp_path / "a.png").write_bytes(b"x")
        with pytest.raises(DataError, match="not a directory"):
            read_image(tmp_path / "a.png" / "b.png")
        with pytest.raises(DataError):
            read_image("a\0b.png")

    def test_a_file_beyond_the_limit_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images, "MAX_BYTES", 2**20)
        with open(tmp_path / "a.png", "wb") as file:
            file.truncate(2**20 + 1)
        monkeypatch.setattr(images, "_read_limited", lambda *_: pytest.fail("read"))
        with pytest.raises(DataError, match="more than 1 MiB"):
            read_image(tmp_path / "a.png")

    def test_an_endless_file_is_read_to_the_limit(self, monkeypatch):
        monkeypatch.setattr(images, "MAX_BYTES", 2**20)
        with pytest.raises(DataError, match="more than 1 MiB"):
            read_image("/dev/zero")

    def test_warnings_filters_and_logging_are_as_before(self, tmp_path):
        import logging
        import warnings

        before = list(warnings.filters), logging.getLogger("PIL").level
        (tmp_path / "bad.png").write_bytes(b"bad")
        with pytest.raises(DataError):
            read_image(tmp_path / "bad.png")
        assert (list(warnings.filters), logging.getLogger("PIL").level) == before

    def test_channels_are_a_matter_of_the_programmer(self, tmp_path):
        path = save(tmp_path / "a.png", Image.fromarray(RAMP))
        with pytest.raises(ValueError, match="channels"):
            read_image(path, 2)


def encoded(suffix):
    buffer = io.BytesIO()
    picture = Image.fromarray(np.dstack([COLOURS, RAMP]))
    picture = picture if suffix in ("PNG", "TIFF", "WEBP", "ICO") else picture.convert("RGB")
    picture.save(buffer, suffix, **({"compression": "tiff_lzw"} if suffix == "TIFF" else {}))
    return buffer.getvalue()


WHOLE = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000", "QOI")]
HEADS = [whole[:12] for whole in WHOLE] + [b"", b"P4\n8 8\n", b"P2\n2 2\n255\n", b"Pf\n2 2\n-1.0\n", b"II*\0\x08\0\0\0"]


def read_or_refuse(data):
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DataError):
        path = Path(folder, "a.png")
        path.write_bytes(data)
        image, mask = read_image_with_mask(path)
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert mask is None or mask.shape == (1, *image.shape[1:])


class TestGarbage:
    """Whatever the bytes: an image or a DataError."""

    @settings(max_examples=120, deadline=None)
    @given(st.sampled_from(HEADS), st.binary(max_size=300))
    def test_any_bytes(self, head, tail):
        read_or_refuse(head + tail)

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_damaged_files(self, data):
        whole = bytearray(data.draw(st.sampled_from(WHOLE)))
        for _ in range(data.draw(st.integers(0, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        read_or_refuse(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


class TestStandardInput:
    def test_an_image(self, tmp_path, monkeypatch):
        path = save(tmp_path / "a.png", Image.fromarray(COLOURS))
        monkeypatch.setattr(sys, "stdin", Pipe(path.read_bytes()))
        assert torch.equal(read_image("-"), chw(COLOURS))
        with pytest.raises(DataError, match="standard input, found: nothing") as caught:
            read_image("-")
        assert "only once" in caught.value.hint

    def test_a_terminal_is_refused(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Pipe(terminal=True))
        with pytest.raises(UsageError, match="terminal"):
            read_image("-")

    def test_no_stream_at_all(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(UsageError):
            read_mask("-")

    def test_garbage(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Pipe(b"hello"))
        with pytest.raises(DataError, match="standard input, found: not an image"):
            read_image("-")


class TestMasks:
    def test_white_means_new(self, tmp_path):
        path = save(tmp_path / "m.png", Image.fromarray(RAMP))
        mask = read_mask(path)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, chw(RAMP >= 128))
        assert torch.equal(read_mask(path, invert=True), chw(RAMP < 128))

    @pytest.mark.parametrize("kind", ["1", "RGB", "P", "I;16", "JPEG"])
    def test_every_mode(self, tmp_path, kind):
        white = RAMP >= 128
        picture = Image.fromarray(white.astype(np.uint8) * 255)
        path = tmp_path / ("m.jpg" if kind == "JPEG" else "m.png")
        if kind == "I;16":
            picture = Image.fromarray(white.astype(np.uint16) * 65535)
        elif kind != "JPEG":
            picture = picture.convert(kind)
        save(path, picture)
        assert torch.equal(read_mask(path), chw(white))

    def test_alpha_decides_where_there_is_one(self, tmp_path):
        """Transparent means new, whatever the colours are."""
        path = save(tmp_path / "m.png", Image.fromarray(np.dstack([np.full_like(COLOURS, 255), RAMP])))
        assert torch.equal(read_mask(path), chw(RAMP < 128))
        assert torch.equal(read_mask(path, invert=True), chw(RAMP >= 128))

    def test_a_constant_alpha_decides_nothing(self, tmp_path):
        opaque = np.full_like(RAMP, 255)
        path = save(tmp_path / "m.png", Image.fromarray(np.dstack([RAMP, RAMP, RAMP, opaque])))
        assert torch.equal(read_mask(path), chw(RAMP >= 128))

    @pytest.mark.parametrize("level", [0, 255])
    def test_all_or_nothing_is_for_the_caller_to_judge(self, tmp_path, level):
        path = save(tmp_path / "m.png", Image.new("L", (5, 3), level))
        assert torch.equal(read_mask(path), torch.full((1, 3, 5), level == 255))

    def test_an_image_and_its_own_mask_in_one_read(self, tmp_path, monkeypatch):
        path = save(tmp_path / "a.png", Image.fromarray(np.dstack([COLOURS, RAMP])))
        monkeypatch.setattr(sys, "stdin", Pipe(path.read_bytes()))
        image, mask = read_image_with_mask("-")
        assert torch.equal(mask, chw(RAMP < 128))
        # Known pixels keep their full colour, half-transparent ones too.
        assert torch.equal(image, chw(np.where(RAMP[..., None] < 128, 0, COLOURS).astype(np.uint8)))

    @pytest.mark.parametrize("alpha", [None, 0, 100, 255])
    def test_an_image_without_a_mask(self, tmp_path, alpha):
        layers = [COLOURS] if alpha is None else [COLOURS, np.full_like(RAMP, alpha)]
        path = save(tmp_path / "a.png", Image.fromarray(np.dstack(layers)))
        image, mask = read_image_with_mask(path)
        assert mask is None
        assert torch.equal(image, read_image(path))
        assert read_image_with_mask(path, 1)[0].shape == (1, 16, 16)


class TestWriting:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".TIFF"])
    def test_lossless(self, tmp_path, suffix, channels):
        image = chw(COLOURS)[:channels]
        path = tmp_path / "new" / "folders" / f"a{suffix}"
        write_image(path, image)
        assert torch.equal(read_image(path, channels), image)
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
    def test_jpeg_keeps_colours_at_full_resolution(self, tmp_path, suffix):
        stripes = np.zeros((16, 16, 3), np.uint8)
        stripes[:, ::2, 0], stripes[:, 1::2, 2] = 200, 200
        write_image(str(tmp_path / f"a{suffix}"), chw(stripes))
        assert (read_image(tmp_path / f"a{suffix}").int() - chw(stripes).int()).abs().float().mean() < 8

    def test_views_and_other_layouts(self, tmp_path):
        image = chw(COLOURS).flip(-1).permute(0, 2, 1)
        write_image(tmp_path / "a.png", image)
        assert torch.equal(read_image(tmp_path / "a.png"), image)

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        write_image(tmp_path / "a.png", chw(COLOURS))
        (tmp_path / "plain").write_text("x")
        assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "a.png").write_bytes(b"old")
        (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
        write_image(tmp_path / "link.png", chw(COLOURS))
        assert (tmp_path / "link.png").is_symlink()
        assert torch.equal(read_image(tmp_path / "real" / "a.png"), chw(COLOURS))

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(b"old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(DataError, match="no space left"):
            write_image(tmp_path / "a.png", chw(COLOURS))
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]

    @pytest.mark.parametrize("name", ["a.gif", "a.ppm", "a", "a.npz", ".png", "a.png.bak"])
    def test_unknown_suffix(self, tmp_path, name):
        with pytest.raises(UsageError) as caught:
            write_image(tmp_path / name, chw(COLOURS))
        assert ".png, .jpg" in caught.value.hint
        assert not list(tmp_path.iterdir())

    def test_places_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(DataError, match="cannot write"):
            write_image(tmp_path / "file" / "a.png", chw(COLOURS))
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(DataError) as caught:
            write_image(tmp_path / "folder.png", chw(COLOURS))
        assert "not a folder" in caught.value.hint

    def test_too_large_for_the_format(self, tmp_path):
        with pytest.raises(DataError, match="16384x1 image does not fit into WEBP"):
            write_image(tmp_path / "a.webp", torch.zeros(3, 1, 16384, dtype=torch.uint8))
        assert not list(tmp_path.iterdir())

    def test_standard_output_gets_a_png(self, monkeypatch):
        pipe = Pipe()
        monkeypatch.setattr(sys, "stdout", pipe)
        write_image("-", chw(COLOURS))
        data = pipe.buffer.getvalue()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])), COLOURS)

    def test_a_terminal_is_refused(self, monkeypatch):
        pipe = Pipe(terminal=True)
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(UsageError, match="terminal"):
            write_image("-", chw(COLOURS))
        assert pipe.buffer.getvalue() == b""

    @pytest.mark.parametrize(
        "bad", [torch.zeros(3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)]
    )
    def test_programmer_mistakes(self, tmp_path, bad):
        with pytest.raises(ValueError, match="uint8"):
            write_image(tmp_path / "a.png", bad)


class TestRange:
    def test_uint8_round_trip_is_exact(self):
        levels = torch.arange(256, dtype=torch.uint8)
        floats = from_uint8(levels)
        assert floats.dtype == torch.float32
        assert (floats[0], floats[255]) == (-1, 1)
        assert torch.equal(to_uint8(floats), levels)
        assert torch.equal(to_uint8(floats.double()), levels)

    def test_clamp_and_round(self):
        half = 1 / 127.5
        x = torch.tensor([-9.0, -1.0, -1 + 0.49 * half, -1 + 0.51 * half, 1.0, 9.0, float("inf")])
        assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255]

    def test_bfloat16_is_rounded_after_scaling(self):
        x = from_uint8(torch.arange(256, dtype=torch.uint8)).bfloat16()
        assert torch.equal(to_uint8(x), to_uint8(x.float()))

    def test_nan_and_wrong_types(self):
        with pytest.raises(ValueError, match="NaN"):
            to_uint8(torch.tensor([0.0, float("nan")]))
        with pytest.raises(ValueError, match="uint8"):
            from_uint8(torch.zeros(3))


class TestGrids:
    def test_each_image_in_its_place(self):
        tiles = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 4) + 100
        sheet = grid(tiles, columns=2, pad=1)
        assert sheet.shape == (3, 3 * 3 + 1, 2 * 5 + 1)
        seen = torch.zeros(sheet.shape[1:], dtype=torch.bool)
        for index in range(5):
            y, x = 1 + index // 2 * 3, 1 + index % 2 * 5
            assert (sheet[:, y : y + 2, x : x + 4] == 100 + index).all()
            seen[y : y + 2, x : x + 4] = True
        assert (sheet[:, ~seen] == images.PAD_LEVEL).all()

    @pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (64, 8, 8)])
    def test_near_square(self, count, columns, rows):
        sheet = grid(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), pad=2)
        assert sheet.shape == (1, rows * 10 + 2, columns * 10 + 2)

    def test_scale_repeats_pixels(self):
        tile = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
        sheet = grid(tile, pad=2, scale=3)
        assert torch.equal(sheet[:, 2:-2, 2:-2][:, 1::3, 1::3], tile[0])
        assert torch.equal(sheet[:, 2:-2, 2:-2], torch.kron(tile[0].long(), torch.ones(1, 3, 3).long()).to(torch.uint8))

    @pytest.mark.parametrize("bad", [torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4)])
    def test_nothing_to_show(self, bad):
        with pytest.raises(ValueError, match="expected uint8"):
            grid(bad)

    def test_captioned_rows(self):
        first = torch.randint(60, 256, (3, 3, 16, 16), dtype=torch.uint8)
        second = torch.randint(60, 256, (5, 1, 20, 20), dtype=torch.uint8)
        sheet = captioned_rows([("real", first), ("two\nsteps", second)], scale=3, pad=2)
        assert sheet.dtype == torch.uint8
        height, width = 3 * 16 + 4, 5 * (3 * 20 + 2) + 2
        margin = sheet.shape[2] - width
        assert torch.equal(sheet[:, :height, margin : margin + 3 * 50 + 2], grid(first, 3, 2, 3))
        assert torch.equal(sheet[:, -(3 * 20 + 4) :, margin:], grid(second, 5, 2, 3).expand(3, -1, -1))
        for part in (sheet[:, :height, :margin], sheet[:, height:, :margin]):
            assert (part > 150).any()  # something is written
            assert (part[:, :, -2:] == images.PAD_LEVEL).all()  # and does not run into the images

    def test_a_long_row_goes_on_below(self):
        tiles = torch.full((5, 3, 16, 16), 200, dtype=torch.uint8)
        assert captioned_rows([("a", tiles)], columns=2).shape[1] == 3 * 18 + 2
        with pytest.raises(ValueError, match="no rows"):
            captioned_rows([])
