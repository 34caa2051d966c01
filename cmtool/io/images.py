"""Image files and uint8 tensors: the only door through which pixels come in and go out.

Inside cmtool an image is float32 in [-1, 1]; on this side of the door it is uint8, shape [C, H, W], C = 1 or 3.
Whatever a file holds (palette, alpha, 16 bits, CMYK, a sideways camera picture) is brought to that form by the same
few lines, for single images here and for data sets in `data.py`. "-" means standard input or output.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import stat
import struct
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmtool.errors import DataError, UsageError
from cmtool.io.files import write_atomic

MAX_BYTES = 512 * 2**20
MAX_PIXELS = 89_478_485  # Pillow's own limit for an RGB image of a quarter gigabyte
PAD_LEVEL = 12  # the dark grey between the images of a grid
MASK_THRESHOLD = 128

# Pillow knows more formats, but some run other programs (EPS) and some take any bytes for an image (TGA, PCX).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "QOI")
SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".avif", ".ico", ".qoi"}
)
_WRITERS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class UnreadableImageError(DataError):
    """One image that cannot be read.

    Args:
        name: which image, as the user would call it.
        reason: what is wrong with it, in a few words; data sets count their losses by it.
    """

    def __init__(self, name: str, reason: str, hint: str = "open it in an image viewer, or export it again") -> None:
        super().__init__(f"expected an image in {name}, found: {reason}", hint)
        self.name = name
        self.reason = reason


def read_image(source: str | Path, channels: int = 3) -> Tensor:
    """Read an image file, whatever its mode, as the network will see it.

    Camera orientation is applied, animations give their first frame, 16-bit values are scaled to 8 bits, and
    transparent parts are laid on black.

    Args:
        source: a path, or "-" for standard input.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
    Returns:
        uint8 [channels, H, W].
    Raises:
        DataError: a file that is missing, broken, empty, no image, or larger than `MAX_PIXELS`.
    """
    return to_tensor(to_channels(flatten(*_read(source)), channels))


def read_encoded(data: bytes, name: str, channels: int, most_pixels: int) -> Tensor:
    """`read_image` of the bytes of a file, if it has no more than so many pixels.

    Raises:
        DataError: as `read_image`, and for one that has more.
    """
    with quiet_pillow():
        opened = open_image(data, name)
        if opened.width * opened.height > most_pixels:
            raise UnreadableImageError(name, f"more than {most_pixels:,} pixels", "make the image smaller first")
        return to_tensor(to_channels(flatten(*load(opened, name)), channels))


def png_bytes(image: Tensor) -> bytes:
    """A uint8 image [C, H, W] as the bytes of a PNG."""
    return _encode(image, ".png", "the image")


def read_image_with_mask(source: str | Path, channels: int = 3) -> tuple[Tensor, Tensor | None]:
    """Read an image together with the mask that its own transparency draws.

    Where the mask is False the colours are those of the file, not darkened by a half-transparent edge; where it is
    True they are black.

    Returns:
        uint8 [channels, H, W], and bool [1, H, W] (True: transparent, make this new), or None instead of the mask if
        the image has no alpha channel or a constant one. The image is then what `read_image` returns.
    Raises:
        DataError: as `read_image`.
    """
    colour, alpha = _read(source)
    holes = _holes(alpha)
    if holes is None:
        return to_tensor(to_channels(flatten(colour, alpha), channels)), None
    return to_tensor(to_channels(colour, channels)) * ~holes, holes


def read_mask(source: str | Path, invert: bool = False) -> Tensor:
    """Read a mask: which pixels to make new.

    White (a luma of 128 or more) means "make this new". If the file has an alpha channel that is not constant, alpha
    decides instead: transparent means "make this new".

    Args:
        source: a path, or "-" for standard input.
        invert: swap the two.
    Returns:
        bool [1, H, W], True where the image is to be made new. All True and all False are possible.
    Raises:
        DataError: as `read_image`.
    """
    colour, alpha = _read(source)
    holes = _holes(alpha)
    if holes is None:
        holes = to_tensor(to_channels(flatten(colour, alpha), 1)) >= MASK_THRESHOLD
    return ~holes if invert else holes


def read_soft_mask(source: str | Path, invert: bool = False) -> Tensor:
    """Read a mask with levels: how much of what is new shows at each pixel.

    The luma tells, from black (nothing) to white (all); of a file with an alpha channel that is not constant, how
    transparent it is. Arguments and errors as `read_mask`.

    Returns:
        float32 [1, H, W] in [0, 1].
    """
    colour, alpha = _read(source)
    if alpha is None or _holes(alpha) is None:
        share = to_tensor(to_channels(flatten(colour, alpha), 1)).float() / 255
    else:
        share = 1 - to_tensor(alpha).float() / 255
    return 1 - share if invert else share


def write_image(target: str | Path, image: Tensor) -> None:
    """Write an image; the format goes by the suffix, a PNG goes to standard output for "-".

    The file appears complete or not at all, and folders on the way are made. JPEG is the only lossy format here.

    Args:
        target: a path that ends in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff; or "-".
        image: uint8 [1, H, W] or [3, H, W].
    Raises:
        UsageError: another suffix, or standard output is a terminal.
        DataError: the folder cannot be written to.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected uint8 [1 or 3, H, W], got {image.dtype} {tuple(image.shape)}")
    if str(target) == "-":
        if sys.stdout.isatty():
            raise UsageError(
                "refused to write an image to the terminal", "pipe it, for example: ... --out - > image.png"
            )
        sys.stdout.buffer.write(_encode(image, ".png", "standard output"))
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    check_suffix(path)
    _write(path, _encode(image, path.suffix.lower(), str(path)))


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(Path(os.path.realpath(path)), lambda file: file.write(data))  # a link stays a link
    except OSError as error:
        hint = "name a file, not a folder" if path.is_dir() else "check the folder, its permissions and the space left"
        raise DataError(f"cannot write {str(path)!r}: {(error.strerror or str(error)).lower()}", hint) from None


def write_animation(target: str | Path, frames: Tensor, fps: float, scale: int = 1) -> None:
    """Write moving images without loss, over and over; the file is complete or absent.

    Args:
        target: a name that ends in .apng or .webp.
        frames: uint8 [N, C, H, W]. fps: frames a second. scale: enlarge them by this whole factor.
    Raises:
        DataError: if they do not fit into the format, or the file cannot be written.
    """
    large = frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    first, *others = map(_to_pil, large)
    webp = Path(target).suffix.lower() == ".webp"
    options: dict[str, Any] = {"lossless": True, "method": 4} if webp else {}
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
    try:
        first.save(buffer, "WEBP" if webp else "PNG", **more, **options)
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"cannot write {target}: {error}", "use smaller frames, or .apng") from None
    _write(Path(target), buffer.getvalue())


def check_suffix(target: str | Path) -> None:
    """Refuse a name that `write_image` could not write, before any work is done.

    Raises:
        UsageError: the suffix is none of an image format that can be written.
    """
    if str(target) != "-" and Path(target).suffix.lower() not in _WRITERS:
        raise UsageError(f"cannot write {str(target)!r}: not the name of an image", f"end it in {', '.join(_WRITERS)}")


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: clamp, then round (x + 1) * 127.5. Any shape."""
    if torch.isnan(x).any():
        raise ValueError("images with NaN have no colours")
    return x.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def from_uint8(u: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: u / 127.5 - 1. Any shape; `to_uint8` is the exact inverse."""
    if u.dtype != torch.uint8:
        raise ValueError(f"expected uint8, got {u.dtype}")
    return u.float().div(127.5).sub(1)


def grid(images: Tensor, columns: int | None = None, pad: int = 2, scale: int = 1) -> Tensor:
    """Lay images out in rows, dark lines between and around them.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
        columns: images a row; near-square by default.
        pad: width of the lines in pixels of the result.
        scale: enlarge each image by this whole factor, without smoothing.
    Returns:
        uint8 [C, rows * (scale H + pad) + pad, columns * (scale W + pad) + pad].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"expected uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    images = images.cpu().repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    count, channels, height, width = images.shape
    canvas = images.new_full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), PAD_LEVEL)
    for index in range(count):
        y, x = pad + index // columns * (height + pad), pad + index % columns * (width + pad)
        canvas[:, y : y + height, x : x + width] = images[index]
    return canvas


def captioned_rows(
    rows: Sequence[tuple[str, Tensor]], *, columns: int | None = None, scale: int = 1, pad: int = 2
) -> Tensor:
    """Stack rows of images, each with a short caption on its left.

    Args:
        rows: (caption, uint8 images [N, C, H, W]) pairs; N, the size and C may differ; captions may hold line breaks.
        columns: images a line; a longer row goes on below. All in one line by default.
        scale: enlarge each image by this whole factor, without smoothing, so that 16x16 images can be seen.
    Returns:
        uint8 [3, H', W'].
    """
    from PIL import ImageDraw, ImageFont

    if not rows:
        raise ValueError("no rows")
    strips = [grid(images, columns or len(images), pad, scale) for _, images in rows]
    size = max(11, min(18, min(strip.shape[1] for strip in strips) // 3))
    font = ImageFont.load_default(size)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), caption, font) for caption, _ in rows]
    heights = [
        max(strip.shape[1], math.ceil(box[3] - box[1]) + 2 * pad) for strip, box in zip(strips, boxes, strict=True)
    ]
    margin = math.ceil(max(box[2] - box[0] for box in boxes)) + size
    gap = max(pad, 2)
    shape = (margin + max(strip.shape[2] for strip in strips), sum(heights) + gap * (len(rows) - 1))
    canvas = Image.new("RGB", shape, (PAD_LEVEL,) * 3)
    draw = ImageDraw.Draw(canvas)
    y = 0
    for (caption, _), strip, height, box in zip(rows, strips, heights, boxes, strict=True):
        top = y + (height - box[3] + box[1]) / 2 - box[1]
        draw.multiline_text((size / 2 - box[0], top), caption, fill=(225, 225, 225), font=font)
        canvas.paste(_to_pil(strip), (margin, y + (height - strip.shape[1]) // 2))
        y += height + gap
    return to_tensor(canvas)


# What `data.py` shares.


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings and log messages off the terminal. Not for threads: enter it around them."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises on bad bytes into an `UnreadableImageError`.

    Pillow's plugins answer bad bytes with a dozen kinds of exception; only decoder calls belong inside.
    """
    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise UnreadableImageError(name, f"more than {MAX_PIXELS:,} pixels", "make the image smaller first") from None
    except Image.UnidentifiedImageError:
        hint = f"use one of these formats: {', '.join(_FORMATS)}"
        raise UnreadableImageError(name, "not an image in a known format", hint) from None
    except Exception as error:
        raise UnreadableImageError(name, "a broken or truncated image") from error


def open_image(data: bytes, name: str) -> Image.Image:
    """Read the header of an encoded image; the pixels wait for `load`.

    Raises:
        UnreadableImageError: no image, or one of more than `MAX_PIXELS`.
    """
    if not data:
        raise UnreadableImageError(name, "an empty file")
    with decoding(name):
        image = Image.open(io.BytesIO(data), formats=_known_formats())
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(name, f"more than {MAX_PIXELS:,} pixels", "make the image smaller first")
    return image


def load(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Decode an opened image.

    Returns:
        Its colours, upright, in mode L or RGB and not darkened by alpha; its alpha in mode L, or None if it has none.
    Raises:
        UnreadableImageError: the pixels cannot be decoded.
    """
    with decoding(name), _quiet_libtiff if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
        colour, alpha = _split_alpha(image, name)
        turn = None
        with contextlib.suppress(Exception):  # an unreadable EXIF block is no reason to lose the image
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        if turn is not None:
            colour, alpha = colour.transpose(turn), alpha and alpha.transpose(turn)
        return colour, alpha


def flatten(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Lay an image on black."""
    if alpha is None or alpha.getextrema()[0] == 255:
        return colour
    return Image.composite(colour, Image.new(colour.mode, colour.size), alpha)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of mode L or RGB in the mode that has so many channels."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """An image of mode L or RGB as uint8 [C, H, W]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def read_bytes(path: Path, name: str) -> bytes:
    """A file's content, at most `MAX_BYTES` of it.

    Raises:
        UnreadableImageError: missing, a folder, not readable, or larger.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES:
                raise UnreadableImageError(name, f"more than {MAX_BYTES >> 20} MiB", "make the image smaller first")
            return _read_limited(file, name)
    except FileNotFoundError:
        raise UnreadableImageError(name, "no such file", "check the path") from None
    except IsADirectoryError:
        raise UnreadableImageError(name, "a folder", "name one image file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImageError(name, reason.lower(), "check the path and its permissions") from None


class _Hush:
    """Keeps C libraries off file descriptor 2 while any thread is inside.

    libtiff prints its complaints there itself, beside the error that Pillow raises.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stderr = -1

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                with contextlib.suppress(OSError):  # no descriptor 2: nothing to hide
                    self._stderr = os.dup(2)
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, 2)
                    os.close(null)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stderr >= 0:
                os.dup2(self._stderr, 2)
                os.close(self._stderr)
                self._stderr = -1


_quiet_libtiff = _Hush()


def _read_limited(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnreadableImageError(name, f"more than {MAX_BYTES >> 20} MiB", "make the image smaller first")
    return data


def _read(source: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """Colours and alpha of an image file or of standard input."""
    if str(source) == "-":
        name = "standard input"
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(
                "expected an image on standard input, found a terminal", "pipe one in: cat image.png | ..."
            )
        data = _read_limited(sys.stdin.buffer, name)
        if not data:
            raise UnreadableImageError(name, "nothing", "pipe one image in; standard input can be read only once")
    else:
        name = repr(str(source))
        data = read_bytes(Path(source), name)
    with quiet_pillow():
        return load(open_image(data, name), name)


@functools.cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _split_alpha(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """A decoded image of any mode as colours (mode L or RGB) and alpha (mode L or None)."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        clear = image.info.get("transparency")
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)), alpha
    if image.mode in ("I", "F"):
        return _levels(image, name), None
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        colour = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert colour is not None  # it is None only when asked to work in place
        return colour, None
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        full = image.convert("RGBA")
        return full.convert("RGB"), full.getchannel("A")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB"), None


def _levels(image: Image.Image, name: str) -> Image.Image:
    """A 32-bit image (mode I or F) in 8 bits.

    Such files do not say what white is. PNG and Netpbm hold 16 bits in mode I; a TIFF may hold anything, so the
    smallest usual white (1 for floats, 255, 65535) that is not below its largest value is taken.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # also refuses NaN
        raise UnreadableImageError(name, f"values from {low:g} to {high:g}", "scale them to 0..255 and save 8 bits")
    whites = (65535,) if image.mode == "I" and image.format in ("PNG", "PPM") else (255, 65535)
    white = 1 if image.mode == "F" and high <= 1 else next(white for white in whites if high <= white)
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _holes(alpha: Image.Image | None) -> Tensor | None:
    """bool [1, H, W]: where alpha is transparent; None if there is no alpha or it is the same everywhere."""
    if alpha is None:
        return None
    low, high = alpha.getextrema()
    return None if low == high else to_tensor(alpha) < MASK_THRESHOLD


def _to_pil(image: Tensor) -> Image.Image:
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _encode(image: Tensor, suffix: str, name: str) -> bytes:
    kind, options = _WRITERS[suffix]
    buffer = io.BytesIO()
    try:
        _to_pil(image).save(buffer, format=kind, **options)
    except (OSError, ValueError, struct.error) as error:  # each format has its own largest size
        size = f"{image.shape[2]}x{image.shape[1]}"
        raise DataError(f"cannot write {name}: a {size} image does not fit into {kind}: {error}", "use .png") from None
    return buffer.getvalue()
