"""Images and masks as people have them, and damaged ones: the right result or a clear error, in bounded memory."""

from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    """8x8 RGB, smooth enough for JPEG."""
    x, y = np.meshgrid(np.arange(8), np.arange(8))
    return np.stack([20 * x + 40, 20 * y + 40, 10 * (x + y) + 50], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory, whole):
    made = tmp_path_factory.mktemp("odd")
    mask = np.zeros((8, 8), np.uint8)
    mask[3:, 3:] = 255
    Image.fromarray(mask).save(made / "mask.png")
    Image.fromarray(whole).save(made / "image.png")
    return made


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def commands(place, student, file, out):
    """Each edit of the file, and the file as a mask."""
    ask = ("--model", student, "--out", out, "--steps", 1)
    yield ("inpaint", *ask, "--image", file, "--mask", place / "mask.png")
    yield ("inpaint", *ask, "--image", place / "image.png", "--mask", file)
    yield ("colorize", *ask, "--image", file)
    yield ("superres", *ask, "--image", file, "--factor", 2)


def alright(result, out) -> bool:
    """Whether there is an answer; else there are two lines and no file."""
    if result.code == 0:
        with Image.open(out) as made:
            made.load()
        out.unlink()
        return True
    result.error(result.code)
    assert result.code in (1, 2)
    assert not out.exists()
    return False


def odd_ones(whole) -> dict[str, tuple[bytes, bool]]:
    """Files, and whether they are images of 8x8."""
    image = Image.fromarray(whole)
    deep = (whole[..., 0].astype(np.uint16) * 257).astype("<u2")
    frames = [image, Image.fromarray(255 - whole)]
    turned = Image.Exif()
    turned[274] = 6
    return {
        "16 bits": (encoded(Image.fromarray(deep), "PNG"), True),
        "CMYK": (encoded(image.convert("CMYK"), "JPEG"), True),
        "palette": (encoded(image.convert("P"), "PNG"), True),
        "bits": (encoded(image.convert("1"), "PNG"), True),
        "grey with alpha": (encoded(image.convert("LA"), "PNG"), True),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "moving WebP": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), True),
        "turned": (encoded(image, "JPEG", exif=turned), True),
        "floats": (encoded(Image.fromarray(whole[..., 0] / np.float32(255)), "TIFF"), True),
        "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), False),
        "a line": (encoded(Image.new("RGB", (8, 1)), "PNG"), False),
        "nothing": (b"", False),
        "text": (b"hello", False),
    }


@pytest.mark.parametrize("name", odd_ones(np.zeros((8, 8, 3), np.uint8)))
def test_odd_images(cli, student, place, whole, name):
    data, fits = odd_ones(whole)[name]
    file, out = place / "odd", place / "out.png"
    file.write_bytes(data)
    for command in commands(place, student, file, out):
        done = alright(cli(*command), out)
        if command[0] != "superres":  # which wants smaller ones
            assert done == fits, command


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(cli, student, place, whole, kind):
    """Cut short, or with a byte changed: whatever it is, never a traceback, never half a result."""
    data, chance = encoded(Image.fromarray(whole), kind), np.random.default_rng(KINDS.index(kind))
    file, out = place / f"damaged.{kind.lower()}", place / "out.png"
    for number in range(12):
        broken = bytearray(data)
        if number < 6:
            broken = broken[: int(chance.integers(1, len(data)))]
        else:
            for at in chance.integers(0, len(data), 3):
                broken[at] = chance.integers(256)
        file.write_bytes(broken)
        command = list(commands(place, student, file, out))[number % 4]
        alright(cli(*command), out)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_a_header_that_promises_too_much(cli, student, place):
    """20,000 x 20,000 pixels of RGB would be 1.2 GB; their zeros fit into a file of a few kilobytes."""
    rows = zlib.compress(bytes(3 * 20_000 + 1) * 64, 9)
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    file, out = place / "huge.png", place / "out.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in commands(place, student, file, out):
        cli(*command).error(1, "huge.png", "pixels")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
