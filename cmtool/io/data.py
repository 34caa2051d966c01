"""Data sets: many images from one place, in memory, all of one size, with a count of what was done to them.

`open_data` reads the embedded digits, a folder, a zip, an array file, or pairs of images and noise. Nothing happens in
silence: images are cropped and resized only on request, enlarged only on a second request, and files that cannot be
read are dropped and counted. What does not fit the request is an error and not a loss, so that a data set never shrinks
by a forgotten option.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool import rng
from cmtool.errors import DataError, UsageError
from cmtool.io.fitting import Plan, check_options
from cmtool.io.images import UnreadableImageError, load, quiet_pillow, to_uint8
from cmtool.io.pairs import About, Pairs, read_pairs
from cmtool.io.shards import SHARD_IMAGES, Writer, encode
from cmtool.io.sources import Source, Streamed, memory_limit, open_source
from cmtool.io.stored import Reader, StoredDataset, default_workers
from cmtool.io.stored import fingerprint as stored_fingerprint

T = TypeVar("T")
_CHUNK = 64
_SOME = 64  # images that have to fit into memory, or none of a batch would


@dataclass(frozen=True)
class BadFile:
    """A file that was dropped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What became of a source: every image used, changed or dropped is counted here.

    `converted` counts by the mode of the file (Pillow's names: L, P, RGBA, I;16, ...), `dropped` by reason; `ignored`
    are files that do not look like images by their name; `classes` holds the images used of each class; `pairs` says
    how pairs were made, and is None for plain images.
    """

    source: str
    used: int
    resolution: int
    channels: int
    crop: str
    resize: str
    converted: dict[str, int]
    cropped: int
    resized: int
    enlarged: int
    dropped: dict[str, int]
    first_bad: BadFile | None
    ignored: int
    classes: dict[str, int]
    pairs: About | None = None

    def summary(self) -> str:
        """One line for people."""
        colours = "RGB" if self.channels == 3 else "grey"
        things = ("pair" if self.pairs else "image") + ("" if self.used == 1 else "s")
        parts = [f"{self.used:,} {things}, {self.resolution}x{self.resolution} {colours}"]
        parts += [f"{len(self.classes)} class" + ("es" if len(self.classes) > 1 else "")] if self.classes else []
        parts += [self.pairs.summary()] if self.pairs else []
        if self.converted:
            modes = ", ".join(f"{count:,} {mode}" for mode, count in self.converted.items())
            parts.append(f"converted {sum(self.converted.values()):,} ({modes})")
        for count, verb in ((self.cropped, "cropped"), (self.resized, "resized"), (self.enlarged, "enlarged")):
            parts += [f"{count:,} {verb}"] if count else []
        if self.dropped:
            parts.append(f"dropped {sum(self.dropped.values()):,}")
        text = "; ".join(parts)
        return f"{text} (first: {self.first_bad.name}: {self.first_bad.reason})" if self.first_bad else text


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory; with `seeds`, each is the end of an ODE that started from the noise of its seed.

    images: uint8 [N, C, H, H], or of pairs float16 in [-1, 1]; labels: int64 [N] or None; class_names: one name a
    label, empty without labels; seeds: int64 [N] of pairs, else None.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    report: Report
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """The images at `indices` (int64 [B]) and their labels, int64 [B] or None; of pairs also their noise.

        Returns:
            (images uint8 [B, C, H, H], labels), or of pairs (images float32 [B, C, H, H] in [-1, 1], labels, eps
            float32 [B, C, H, H]); the ODE started from sigma(t_max) * eps.
        """
        images, labels = self.images[indices], None if self.labels is None else self.labels[indices]
        if self.seeds is None:
            return images, labels
        return images.float(), labels, rng.noise(self.seeds[indices].tolist(), images.shape[1:])

    @property
    def highest_label(self) -> int | None:
        """None without labels."""
        return None if self.labels is None else int(self.labels.max())

    @property
    def pictures(self) -> Tensor:
        """The images as uint8, whatever they are stored as."""
        return self.images if self.images.dtype == torch.uint8 else to_uint8(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 over shape, pixels, labels, seeds: equal if and only if the data is."""
        pixels = hashlib.sha256(self.images.contiguous().numpy().data).digest()
        return fingerprint(tuple(self.images.shape), pixels, self.labels, self.seeds)


Data = Dataset | StoredDataset


def fingerprint(shape: tuple[int, ...], pixels: bytes, labels: Tensor | None, seeds: Tensor | None = None) -> str:
    """What `Dataset.fingerprint` says of images of a shape, of which only the SHA-256 of all pixels is at hand."""
    digest = hashlib.sha256(repr(shape).encode() + pixels)
    for tensor in (labels, seeds):
        digest.update(b"-" if tensor is None else tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Inspection:
    """What a source holds, before anything is done to it.

    `count` images can be read; `sizes` ("WxH", upright), `modes` and `formats` count them. `resolution` is what
    `open_data` gives without being asked for one, None if it would refuse; then `hint` says what to ask for. `pairs`
    says how pairs were made, and is None for plain images.
    """

    source: str
    kind: str
    count: int
    sizes: dict[str, int]
    modes: dict[str, int]
    formats: dict[str, int]
    classes: dict[str, int]
    dropped: dict[str, int]
    first_bad: BadFile | None
    ignored: int
    resolution: int | None
    hint: str
    pairs: About | None = None


def open_data(
    source: str | Path,
    *,
    resolution: int | None = None,
    crop: str = "center",
    resize: str = "box",
    upscale: bool = False,
    channels: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> Data:
    """Read a data set into memory, or open one that stays where it is.

    Sources:
        `digits`, `digits:train`, `digits:test`: the embedded digits (`io/digits.py`); a folder named so is ./digits.
        A folder or a zip: all images in it at any depth, in the order of their names. A `dataset.json` at its root
        gives the labels, {"labels": [[name, int], ...] or null} (the format of EDM); without one the top-level
        sub-folders are the classes, in the order of their names (of their values, if all are whole numbers). A folder
        that holds nothing but one folder is looked through, and is no class.
        `.npz` (images under images, x, arr_0 or data; labels, if any, under labels, y or arr_1) and `.npy`: uint8,
        [N, H, W], [N, H, W, C] or [N, C, H, W].
        A folder that `cmtool data pack` wrote; a `.tar`, a folder of them or `data-{000..041}.tar` (WebDataset);
        `.parquet` and `.arrow` files, folders of them, data sets saved by Hugging Face's `datasets`,
        `hf:owner/name[@revision][:[subset/]split]` from the hub. These stay where they are, and so does a folder or an
        `.npy` too large for the memory.
        An `.npz` that `cmtool pairs` wrote (`io/pairs.py`): images with the noise that each was solved from. They are
        taken as they are, for an image that is cut or resized no longer belongs to its noise.

    Args:
        source: as above.
        resolution: the side wanted. None: all images must have one square size, and are taken as they are.
        crop: "center" cuts the largest central square; "none" refuses images that are not square.
        resize: the filter: "box", "bilinear", "bicubic" or "lanczos". "none" never resamples: "center" then cuts a
            window of `resolution` out of the middle.
        upscale: let images smaller than `resolution` be enlarged; refused otherwise.
        channels: 3 for RGB, 1 for grey; None: 3, or what pairs have. Transparent parts are laid on black.
        limit: read at most so many images, evenly spaced over the source.
        workers: processes that decode images of what stays where it is; 0 for none; None is for `default_workers`.
    Raises:
        DataError: nothing usable, images that do not fit the request, labels that make no sense, too much data.
        UsageError: an option that is none.
        DependencyError: the digits without scikit-learn.
    """
    check_options(resolution, crop, resize, channels)
    if limit is not None and limit < 1:
        raise UsageError(f"cannot take {limit} images", "take at least 1")

    pairs = read_pairs(str(source))
    if pairs is not None:
        return _paired(str(source), pairs, resolution, channels, limit)
    channels = channels or 3
    with quiet_pillow(), open_source(str(source), resolution) as opened:
        chosen = opened.evenly(limit)
        plan = Plan(resolution or _first_side(opened, chosen), crop, resize, upscale, channels, resolution is None)
        too_large = not _fits(len(chosen), plan) and _fits(_SOME, plan)
        stays = limit is None and opened.lasting and (opened.large or too_large)
        if stays:
            tally = _foreseen(opened, plan)
        else:
            pixels, tally = _fill(opened, chosen, plan)
    if tally.first_misfit:
        raise _misfit_error(opened.name, plan, tally)
    if not tally.kept:
        raise _nothing_usable(opened.name, tally)
    report = _report(opened, plan, tally)
    if stays:
        return _stored(opened, plan, tally, report, default_workers() if workers is None else workers)
    labels = None if opened.labels is None else torch.tensor([int(opened.labels[index]) for index in tally.kept])
    return Dataset(torch.from_numpy(pixels), labels, opened.class_names, report)


def _report(opened: Source, plan: Plan, tally: _Tally) -> Report:
    return Report(
        source=opened.name,
        used=len(tally.kept),
        resolution=plan.resolution,
        channels=plan.channels,
        crop=plan.crop,
        resize=plan.resize,
        converted=_sorted(tally.converted),
        cropped=tally.cropped,
        resized=tally.resized,
        enlarged=tally.enlarged,
        dropped=_sorted(tally.dropped),
        first_bad=tally.first_bad,
        ignored=opened.ignored,
        classes=opened.count_classes(tally.kept),
    )


def _stored(opened: Source, plan: Plan, tally: _Tally, report: Report, workers: int) -> StoredDataset:
    kept = None if len(tally.kept) == len(opened.names) else np.asarray(tally.kept, np.int64)
    labels = None
    if opened.labels is not None:
        every = torch.from_numpy(np.asarray(opened.labels, np.int32))
        labels = every if kept is None else every[torch.from_numpy(kept)]
    unchanged = opened.packed is not None and (opened.packed["resolution"], opened.packed["channels"]) == (
        plan.resolution,
        plan.channels,
    )
    print_ = opened.fingerprint if unchanged else stored_fingerprint(opened, plan, kept, labels)
    return StoredDataset(Reader(opened, plan, kept, labels), opened.class_names, report, print_, workers)


def _foreseen(source: Source, plan: Plan) -> _Tally:
    """What will become of all images, by their headers; of packed ones, by the first."""
    everything = range(len(source.names))

    def look(places: range) -> _Tally:
        tally = _Tally()
        for place in places:
            try:
                opened = source.open(place)
            except UnreadableImageError as error:
                tally.drop(error)
                continue
            tally.sizes[opened.size] += 1
            if plan.misfit(opened.size):
                tally.misfits += 1
                tally.first_misfit = tally.first_misfit or (source.names[place], opened.size)
                continue
            tally.expect(opened.mode, opened.size, plan)
            tally.kept.append(place)
        return tally

    if source.packed is None:
        return _in_chunks(everything, look)
    tally = look(everything[:1])
    for name in ("cropped", "resized", "enlarged", "misfits"):
        setattr(tally, name, getattr(tally, name) * len(everything))
    tally.converted = Counter({mode: len(everything) for mode in tally.converted})
    tally.kept = everything if tally.kept else []  # type: ignore[assignment]  # as good as a list, and small
    return tally


def _fits(count: int, plan: Plan) -> bool:
    """Whether so many images fit into memory."""
    return count * plan.channels * plan.resolution**2 <= memory_limit()


def inspect_data(source: str | Path) -> Inspection:
    """Look at every image of a source (see `open_data`) without asking anything of it.

    Raises:
        DataError: the source itself cannot be read, or holds no image file at all. Broken images are no error here.
    """
    pairs = read_pairs(str(source))
    if pairs is not None:
        return _inspect_pairs(str(source), pairs)
    with quiet_pillow(), open_source(str(source)) as opened:
        tally = _in_chunks(range(len(opened.names)), lambda chunk: _survey(opened, chunk))
    sizes = [size for size, _ in tally.sizes.most_common()]
    ready = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
    hint = "" if ready or not sizes else f"use it with --resolution {_shortest(tally)}, or another size"
    return Inspection(
        source=opened.name,
        kind=opened.kind,
        count=len(tally.kept),
        sizes={f"{width}x{height}": tally.sizes[width, height] for width, height in sizes},
        modes=_sorted(tally.modes),
        formats=_sorted(tally.formats),
        classes=opened.count_classes(tally.kept),
        dropped=_sorted(tally.dropped),
        first_bad=tally.first_bad,
        ignored=opened.ignored,
        resolution=sizes[0][0] if ready else None,
        hint=hint,
    )


# Packing.


def pack(
    source: str | Path,
    target: str | Path,
    *,
    resolution: int | None = None,
    crop: str = "center",
    resize: str = "box",
    upscale: bool = False,
    channels: int | None = None,
    shard_images: int = SHARD_IMAGES,
    stream: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a data set as tar shards that `open_data` reads image by image; see `cmtool.io.shards`.

    Memory does not grow with the data. The fingerprint is that of the same images in memory.

    Args:
        target: the new folder. shard_images: images a shard.
        stream: read a table of `datasets` row by row as it arrives, and store nothing but the shards.
        progress: told how many images are done, of how many; of 0 where nobody knows.
        source and the others: as `open_data`.
    Raises:
        DataError: as `open_data`, and for pairs. UsageError: if the target is there already.
    """
    check_options(resolution, crop, resize, channels)
    if shard_images < 1:
        raise UsageError(f"a shard holds at least 1 image, found {shard_images}", "for example --shard-images 10000")
    if read_pairs(str(source)) is not None:
        raise DataError(f"{str(source)!r} holds pairs, which are no images to pack", "train on the .npz itself")
    with (
        quiet_pillow(),
        nullcontext(Streamed(str(source))) if stream else open_source(str(source), resolution) as opened,
        Writer(Path(target), shard_images=shard_images) as out,
    ):
        parts: Iterable[Source] = opened.parts() if isinstance(opened, Streamed) else [opened]
        plan: Plan | None = None
        total, origin = _Tally(), hashlib.sha256()
        for part in parts:
            every = range(len(part.names))
            side = resolution or (plan.resolution if plan else _first_side(part, every))
            plan = Plan(side, crop, resize, upscale, channels or 3, resolution is None)
            work = partial(_packed, part, plan)
            begin = total.seen
            for tally, made in _in_chunks_bounded(every, work):
                total.add(tally.moved(begin))
                for place, encoded, pixels, digest in made if not total.first_misfit else ():
                    out.add(encoded, pixels, None if part.labels is None else int(part.labels[place]))
                    origin.update(digest)
                progress(total.seen, 0 if stream else len(every))
        if plan is not None and total.first_misfit:
            raise _misfit_error(opened.name, plan, total)
        if plan is None or not total.kept:
            raise _nothing_usable(opened.name, total)
        if isinstance(opened, Streamed):
            opened = opened.whole()
        report = _report(opened, plan, total)
        labels = None if opened.labels is None else torch.from_numpy(np.asarray(opened.labels, np.int64)[total.kept])
        out.finish(
            {
                "source": opened.name,
                "source_sha256": origin.hexdigest(),
                "count": out.count,
                "resolution": plan.resolution,
                "channels": plan.channels,
                "crop": crop,
                "resize": resize,
                "class_names": list(opened.class_names),
                "fingerprint": fingerprint((out.count, plan.channels, *[plan.resolution] * 2), out.pixels, labels),
                "report": dataclasses.asdict(report),
            }
        )
    return report


def _packed(source: Source, plan: Plan, places: range) -> tuple[_Tally, list[tuple[int, bytes, bytes, bytes]]]:
    """Images of a source as PNG and as pixels, and a digest of what they were before they were cropped."""
    tally, made = _Tally(), []
    for place in places:
        name = source.names[place]
        try:
            opened = source.open(place)
            mode, size = opened.mode, opened.size
            image = plan.decoded(opened, name)
        except UnreadableImageError as error:
            tally.drop(error)
            continue
        tally.sizes[size] += 1
        if plan.misfit(size):
            tally.misfits += 1
            tally.first_misfit = tally.first_misfit or (name, size)
            continue
        tally.expect(mode, image.size, plan)
        tally.kept.append(place)
        pixels = np.ascontiguousarray(plan.fitted(image))
        made.append((place, encode(pixels), pixels.tobytes(), hashlib.sha256(np.asarray(image).tobytes()).digest()))
    return tally, made


# Pairs.


def _paired(source: str, pairs: Pairs, resolution: int | None, channels: int | None, limit: int | None) -> Dataset:
    """All pairs, or `limit` of them evenly spaced, as they are."""
    count, own_channels, side, _ = pairs.images.shape
    for option, asked, own in (("resolution", resolution, side), ("channels", channels, own_channels)):
        if asked not in (None, own):
            raise DataError(
                f"the pairs in {source!r} have {option} {own}; changed to {asked}, an image no longer belongs to its "
                "noise",
                f"leave out --{option}, or make pairs with another teacher",
            )
    chosen = slice(None) if limit is None or limit >= count else [k * count // limit for k in range(limit)]
    labels = None if pairs.labels is None else torch.from_numpy(pairs.labels[chosen])
    images, seeds = torch.from_numpy(pairs.images[chosen]), torch.from_numpy(pairs.seeds[chosen])
    report = Report(
        source=source,
        used=len(images),
        resolution=side,
        channels=own_channels,
        crop="none",
        resize="none",
        converted={},
        cropped=0,
        resized=0,
        enlarged=0,
        dropped={},
        first_bad=None,
        ignored=0,
        classes=_count_classes(labels, pairs.about),
        pairs=pairs.about,
    )
    return Dataset(images, labels, pairs.about.class_names, report, seeds)


def _inspect_pairs(source: str, pairs: Pairs) -> Inspection:
    count, channels, side, _ = pairs.images.shape
    return Inspection(
        source=source,
        kind="pairs",
        count=count,
        sizes={f"{side}x{side}": count},
        modes={"RGB" if channels == 3 else "L": count},
        formats={"array": count},
        classes=_count_classes(None if pairs.labels is None else torch.from_numpy(pairs.labels), pairs.about),
        dropped={},
        first_bad=None,
        ignored=0,
        resolution=side,
        hint="",
        pairs=pairs.about,
    )


def _count_classes(labels: Tensor | None, about: About) -> dict[str, int]:
    if labels is None:
        return {}
    counts = labels.bincount(minlength=len(about.class_names)).tolist()
    return dict(zip(about.class_names, counts, strict=True))


# From files to pixels.


@dataclass
class _Tally:
    """Counts over some of the images."""

    kept: list[int] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    cropped: int = 0
    resized: int = 0
    enlarged: int = 0
    misfits: int = 0
    first_bad: BadFile | None = None
    first_misfit: tuple[str, tuple[int, int]] | None = None

    def drop(self, error: UnreadableImageError) -> None:
        self.dropped[error.reason] += 1
        self.first_bad = self.first_bad or BadFile(error.name, error.reason)

    @property
    def seen(self) -> int:
        """Images counted so far."""
        return len(self.kept) + sum(self.dropped.values()) + self.misfits

    def expect(self, mode: str, size: tuple[int, int], plan: Plan) -> None:
        """Count what becomes of an image that fits, of this mode in its file and this upright size."""
        if mode != ("L" if plan.channels == 1 else "RGB"):
            self.converted[mode] += 1
        left, upper, right, lower = plan.window(size)
        self.cropped += (right - left, lower - upper) != size
        self.resized += right - left != plan.resolution
        self.enlarged += right - left < plan.resolution

    def moved(self, begin: int) -> _Tally:
        """The same of images that follow after `begin` others."""
        return dataclasses.replace(self, kept=[begin + place for place in self.kept]) if begin else self

    def add(self, later: _Tally) -> None:
        """Take in the counts of later images."""
        for name, value in vars(later).items():
            if name.startswith("first"):
                setattr(self, name, getattr(self, name) or value)
            elif isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, Counter):
                getattr(self, name).update(value)
        self.kept += later.kept


def _fill(source: Source, chosen: Sequence[int], plan: Plan) -> tuple[NDArray[np.uint8], _Tally]:
    """Decode the chosen images into one array [N, C, H, H]; those that fail leave no gap."""
    side = plan.resolution
    shape = (len(chosen), plan.channels, side, side)
    need, room = math.prod(shape) / 2**30, memory_limit() / 2**30
    if need > room:
        message = (
            f"{len(chosen):,} images of {side}x{side} need {need:.1f} GiB, this machine has {room:.1f} GiB for them"
        )
        raise DataError(message, "use a smaller --resolution or fewer images")
    pixels = np.empty(shape, np.uint8)
    hopeless = False

    def work(places: range) -> _Tally:
        nonlocal hopeless
        tally = _Tally()
        for place in places:
            name = source.names[chosen[place]]
            try:
                opened = source.open(chosen[place])
                mode, size = opened.mode, opened.size
                if not hopeless:  # else only headers are read, to say how many misfits there are
                    image = plan.decoded(opened, name)
            except UnreadableImageError as error:
                tally.drop(error)
                continue
            tally.sizes[size] += 1
            if plan.misfit(size):
                tally.misfits += 1
                tally.first_misfit = tally.first_misfit or (name, size)
                hopeless = True
            if hopeless:
                continue
            tally.expect(mode, image.size, plan)
            pixels[place] = plan.fitted(image)
            tally.kept.append(place)
        return tally

    tally = _in_chunks(range(len(chosen)), work)
    for place, kept in enumerate(tally.kept):
        if place != kept:
            pixels[place] = pixels[kept]
    pixels = pixels[: len(tally.kept)]
    tally.kept = [chosen[place] for place in tally.kept]
    return pixels, tally


def _survey(source: Source, indices: range) -> _Tally:
    """Count what some of the images are."""
    tally = _Tally()
    for index in indices:
        try:
            image = source.open(index)
            mode, encoding = image.mode, image.format
            colour, _ = load(image, source.names[index])
        except UnreadableImageError as error:
            tally.drop(error)
            continue
        tally.kept.append(index)
        tally.sizes[colour.size] += 1
        tally.modes[mode] += 1
        tally.formats[encoding or "array"] += 1
    return tally


def _in_chunks(places: range, work: Callable[[range], _Tally]) -> _Tally:
    """Run `work` over `places` in a few threads (decoders release the interpreter) and add up in order."""
    total = _Tally()
    for tally in _in_chunks_bounded(places, work):
        total.add(tally)
    return total


def _in_chunks_bounded(places: range, work: Callable[[range], T]) -> Iterator[T]:
    """The same, result after result; only a few are made ahead, so that they do not fill the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(8, cores)
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), _CHUNK):
            waiting.append(pool.submit(work, places[start : start + _CHUNK]))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _first_side(source: Source, chosen: Sequence[int]) -> int:
    """The shorter side of the first readable image."""
    tally = _Tally()
    for index in chosen:
        try:
            colour, _ = load(source.open(index), source.names[index])
            return min(colour.size)
        except UnreadableImageError as error:
            tally.drop(error)
    raise _nothing_usable(source.name, tally)


def _shortest(tally: _Tally) -> int:
    return min(min(size) for size in tally.sizes)


def _misfit_error(source: str, plan: Plan, tally: _Tally) -> DataError:
    assert tally.first_misfit is not None
    name, (width, height) = tally.first_misfit
    reason = plan.misfit((width, height))
    others = "smaller" if reason == "too small" else "others"
    which = f"found {tally.misfits:,} {others}, first {name} with {width}x{height}"
    if plan.exact:
        sizes = [f"{width}x{height} ({count:,})" for (width, height), count in tally.sizes.most_common()]
        which = f"found {', '.join(sizes[:4])}" + (f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else "")
        hint = f"--resolution {_shortest(tally)} crops and resizes all images to one size"
        return DataError(f"expected images of one square size in {source!r}, {which}", hint)
    if reason == "not square":
        return DataError(f"expected square images in {source!r}, {which}", "cut out the middle with --crop center")
    wanted = f"{plan.resolution}x{plan.resolution}"
    if reason == "another size":
        return DataError(f"expected images of {wanted} in {source!r}, {which}", "resize them, with --resize box")
    hint = f"use --resolution {_shortest(tally)}"
    hint += " or less" if plan.resize == "none" else ", or allow enlarging with --upscale"
    return DataError(f"expected images of at least {wanted} in {source!r}, {which}", hint)


def _nothing_usable(source: str, tally: _Tally) -> DataError:
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in tally.dropped.most_common(3))
    first = f", first {tally.first_bad.name}" if tally.first_bad else ""
    return DataError(
        f"no image in {source!r} can be read: {reasons}{first}", "open one in an image viewer, or copy them again"
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
