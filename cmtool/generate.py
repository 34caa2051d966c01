"""Sampling and editing by seed: the Python side of `cmtool sample`, `inpaint`, `colorize` and `superres`.

All of them are deterministic functions of (model, seeds): image k is the same image whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cmtool import networks, rng
from cmtool.editing import AvgPool, Blur, Degradation, Luma, Mask, project, to_range
from cmtool.errors import DataError, UsageError
from cmtool.flow.flow_map import FlowMap, guided
from cmtool.flow.tiled import tiled
from cmtool.io import machine
from cmtool.sampler import Landing, check_times, default_times
from cmtool.sampler import sample as run_sampler
from cmtool.solvers import DDIM, SOLVERS, Churn, Solver, solve
from cmtool.times import Karras

T = TypeVar("T")
Times = Sequence[float] | Tensor  # decreasing path times

# Pixels a batch by default, at most. On a CPU 8 images of 32x32 keep a thread as busy as any number, and more than some
# dozen leave the caches: 7.7M parameters make 28, 31, 33, 25 and 25 images a second in batches of 8, 16, 32, 64 and 128
# (two cores with AVX2, 2026-11-26). Images of 16x16, whose layers are over soon, want to be 64 or 128.
_PIXELS_A_THREAD, _PIXELS_ON_CPU, _PIXELS_ON_DEVICE = 2**13, 2**15, 2**20
# Of feature maps as wide as the first layer a network holds about so many at once, skip connections included: 11 to 21
# are alive at the peak of ADM, DDPM++, EDM2 and diffusers' U-Net.
_MAPS = 24
_WIDTH = 512  # taken for the width of a network without convolutions
_SHARE = 0.5  # of the free memory that a batch may take


class Generated(NamedTuple):
    """A batch of finished images."""

    seeds: list[int]
    labels: Tensor | None  # int64 [B]
    images: Tensor  # float32 [B, C, H, W] in [-1, 1], on the CPU
    nfe: int  # network calls each image took


def labels_for(model: FlowMap, seeds: Sequence[int], labels: Sequence[int] | int | None = None) -> Tensor | None:
    """The class of each seed: the one asked for, `labels[seed % len(labels)]` of a list, or the seed's own random one.

    Raises:
        UsageError: classes the model does not have.
    """
    classes = model.card.num_classes
    if not classes:
        if labels is not None:
            raise UsageError("this model knows no classes", "leave out --labels")
        return None
    if labels is None:
        return rng.labels(seeds, classes)
    wanted = [labels] if isinstance(labels, int) else list(labels)
    bad = [label for label in wanted if not 0 <= label < classes]
    if bad or not wanted:
        raise UsageError(f"the model has classes 0 to {classes - 1}, found {bad[0] if bad else 'none'}")
    return torch.tensor([wanted[seed % len(wanted)] for seed in seeds])


def generate(
    model: FlowMap,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    labels: Sequence[int] | int | None = None,
    solver: str | None = None,
    churn: Churn | None = None,
    landing: Landing | None = None,
    guidance: float = 1.0,
    batch: int | None = None,
    clip: bool = True,
    noise: Callable[[slice], Callable[[int], Tensor]] | None = None,
) -> Iterator[Generated]:
    """Sample one image a seed, batch by batch.

    Args:
        model: a consistency model, sampled by Algorithm 1 of Song et al. (2023); a two-time model, sampled by its
            jumps; or a denoiser, whose ODE is solved.
        seeds: one image each.
        steps: network calls (default 1); with a solver its steps (default 18).
        times: explicit decreasing path times instead of `steps`. For a solver, the points to solve through; a last step
            to t = 0 is added.
        labels: see `labels_for`.
        solver: euler, heun, dpm2, ddim or ancestral: solve dx/dt = (x - D) / t, on VE, with the model's estimate as D.
            A denoiser needs it; for a consistency model it is the deterministic view x' = (x - f) / t, whose samples
            spread the wider the more steps are made (see `cmtool.sampler`).
        churn: stochastic sampling of Karras et al. (2022) by a solver.
        landing: where a jump lands: "t_min" denoises and renoises, "next" goes on from the next time without noise.
            The default is "next" for two-time models, else "t_min".
        guidance: scale of classifier-free guidance; 1 is none. See `cmtool.flow.guided`.
        batch: images at once; if None, as many as suit the model and the device, see `in_batches`.
        clip: clamp estimates to the image range on the way.
        noise: in place of that of the seeds: of a slice of them, stream by stream, see `noise_of`.
    Yields:
        A `Generated` a batch.
    Raises:
        UsageError: a role without its sampler, steps or times that make no sense.
    """
    check_role(model, solver, landing)
    model = guided(model, guidance)
    how = landing or ("next" if model.card.role == "flow_map" else "t_min")
    if solver == "ancestral" and churn is not None:
        raise UsageError("ancestral sampling adds noise already", "leave out the churn, or take another solver")
    classes = labels_for(model, seeds, labels)
    if solver is not None:
        points = _solver_times(model, steps, times)
    elif times is not None:
        points = path_times(model, times)
    else:
        points = default_times(model, 1 if steps is None else steps, how)

    drawn = _Ahead(model, seeds) if noise is None else noise

    def make(at: slice) -> Generated:
        part, known = list(seeds[at]), None if classes is None else classes[at]
        wanted = None if known is None else known.to(model.device)
        stream = drawn(at)
        start = _start(model, points, stream)
        if solver is None:
            for state in run_sampler(model, start, points, noise=stream, labels=wanted, clip=clip, landing=how):
                x, nfe = state.denoised, state.step
        else:
            x, nfe = _solve(model, start, points, stream, wanted, solver, churn, clip)
        return Generated(part, known, x.clamp(-1, 1).cpu(), nfe)  # new tensors, outside of inference mode

    yield from in_batches(model, len(seeds), make, batch=batch, rows=1 if guidance == 1 else 2)


def in_batches(
    model: FlowMap, count: int, make: Callable[[slice], T], *, batch: int | None = None, rows: int = 1
) -> Iterator[T]:
    """What `make` makes of one slice of `count` images after another.

    Args:
        batch: images at once. If None, as many as suit the model, the device and its free memory, see
            `automatic_batch`; if they turn out too many for it, half as many, and so on: the images are the same.
        rows: what an image takes of the network's batch; 2 under guidance.
    Raises:
        UsageError: a batch of no image.
        torch.OutOfMemoryError: too little for a single image, or for the batch asked for.
    """
    if batch is not None and batch < 1:
        raise UsageError(f"a batch holds at least 1 image, found {batch}")
    first, size = 0, batch or automatic_batch(model, rows)
    if batch is None and count:
        size = math.ceil(count / math.ceil(count / size))  # no small rest at the end
    with networks.recorded(model.network):
        while first < count:
            at = slice(first, min(first + size, count))
            try:
                made = make(at)
            except torch.OutOfMemoryError:
                if batch is not None or at.stop == first + 1:
                    raise
                networks.forget(model.network)
                size = (at.stop - first) // 2
            else:
                yield made
                first = at.stop


def automatic_batch(model: FlowMap, rows: int = 1) -> int:
    """How many images to compute at once: enough to keep the device busy, and no more than its memory has room for.

    What an image needs is estimated from the network's first convolution; see `in_batches` for `rows`.
    """
    pixels = max(1, model.card.resolution**2)
    if model.device.type == "cpu":
        most = max(_PIXELS_ON_CPU, _PIXELS_A_THREAD * torch.get_num_threads())
    else:
        most = _PIXELS_ON_DEVICE
    width = next((weight.shape[0] for weight in model.network.parameters() if weight.ndim == 4), _WIDTH)
    needed = rows * _MAPS * width * pixels * (model.compute_dtype or torch.float32).itemsize
    free = free_memory(model.device)
    fits = most if free is None else int(_SHARE * free) // needed
    return max(1, min(most // (rows * pixels), fits))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where nobody knows."""
    if device.type != "cuda":
        return machine.free_memory()  # the memory of other accelerators is the machine's
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def sample(
    model: FlowMap,
    n: int | None = None,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    solver: str | None = None,
    landing: Landing | None = None,
    guidance: float = 1.0,
    batch: int | None = None,
) -> Tensor:
    """`n` images (seeds 0 to n-1), or one for each of `seeds`; arguments as `generate`.

    Returns:
        float32 [n, C, H, W] in [-1, 1].
    """
    if seeds is None:
        seeds = range(1 if n is None else n)
    elif n is not None and n != len(seeds):
        raise UsageError(f"n is {n}, but there are {len(seeds)} seeds", "give one of the two")
    if not len(seeds):
        raise UsageError("there is no image to make", "ask for at least one")
    parts = generate(
        model,
        list(seeds),
        steps=steps,
        times=times,
        labels=labels,
        solver=solver,
        landing=landing,
        guidance=guidance,
        batch=batch,
    )
    return _joined((part.images for part in parts), len(seeds))


def inpaint(
    model: FlowMap,
    images: Tensor,
    masks: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Make the masked pixels of images new; the others stay exactly as they are.

    Args:
        model: a consistency model.
        images: float32 [B, C, H, W] in [-1, 1]; one image serves all seeds.
        masks: bool [B, 1, H, W] or [1, H, W], true where to make new pixels.
        seeds: one result each; default 0 to B-1.
        labels, times, steps, progress: see `edit`.
        batch: images at once, as `generate`.
    Returns:
        float32 [len(seeds), C, H, W] in [-1, 1].
    """
    images = _images(images)
    masks = masks[None] if masks.ndim == 3 else masks
    if masks.dtype != torch.bool:
        raise DataError("a mask is true where to make new pixels: it must be of type bool")
    if masks.shape[-2:] != images.shape[-2:]:
        raise DataError(f"the mask is {_size(masks)}, the image {_size(images)}", "give a mask of the image's size")
    if len(masks) > 1 and len(images) not in (1, len(masks)):
        raise DataError(f"{len(images)} images do not go with {len(masks)} masks", "give one of either, or as many")

    def part(at: slice, seeds: list[int]) -> Tensor:
        op = Mask(_rows(masks, at).to(model.device))
        known = op.A(_rows(images, at).to(model.device))
        return edit(model, op, known, seeds=seeds, labels=labels, times=times, steps=steps, progress=progress)

    made = edited(model, max(len(images), len(masks)), seeds, batch, part).to(images)
    # Through the [-1, 1] clamp of other pixels the known ones could only lose: put them back as they came.
    return torch.where(masks, made, images)


def colorize(
    model: FlowMap,
    images: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int | None = None,
    weights: tuple[float, float, float] = Luma.weights,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Colour grey images; the luma stays.

    Args:
        images: float32 [B, 1 or 3, H, W] in [-1, 1]; of a colour image only the luma is used.
        weights: of R, G and B in the luma.
        seeds, labels, times, steps, progress: see `edit`.
        batch: images at once, as `generate`.
    Returns:
        float32 [len(seeds), 3, H, W] in [-1, 1].
    """
    images = _images(images)
    if model.card.channels != 3:
        raise UsageError("colorizing needs a model of colour images")
    if images.shape[1] not in (1, 3):
        raise DataError(f"an image to colour has 1 or 3 channels, found {images.shape[1]}")
    op = Luma(weights)

    def part(at: slice, seeds: list[int]) -> Tensor:
        known = op.A(_rows(images, at).to(model.device))
        return edit(model, op, known, seeds=seeds, labels=labels, times=times, steps=steps, progress=progress)

    return edited(model, len(images), seeds, batch, part)


def superres(
    model: FlowMap,
    images: Tensor,
    factor: int,
    *,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Enlarge images; the mean of every factor x factor block is the small image's pixel.

    Args:
        images: float32 [B, C, H / factor, W / factor] in [-1, 1], H and W the model's resolution.
        seeds, labels, times, steps, progress: see `edit`.
        batch: images at once, as `generate`.
    Returns:
        float32 [len(seeds), C, H, W] in [-1, 1].
    """
    images = _images(images)
    if factor < 2:
        raise UsageError(f"an enlargement needs a factor of at least 2, found {factor}")
    op = AvgPool(factor)

    def part(at: slice, seeds: list[int]) -> Tensor:
        return edit(
            model, op, _rows(images, at), seeds=seeds, labels=labels, times=times, steps=steps, progress=progress
        )

    return edited(model, len(images), seeds, batch, part)


def deblur(
    model: FlowMap,
    images: Tensor,
    kernel: Tensor,
    *,
    floor: float = 0.1,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Sharpen images whose blur is known; blurred again they are the images given, as far as it left anything.

    Args:
        images: float32 [B, C, H, W] in [-1, 1], convolved with `kernel` around the edges.
        kernel, floor: see `editing.Blur`.
        seeds, labels, times, steps, progress: see `edit`.
        batch: images at once, as `generate`.
    Returns:
        float32 [len(seeds), C, H, W] in [-1, 1].
    """
    images = _images(images)
    op = Blur(kernel.to(model.device), floor)

    def part(at: slice, seeds: list[int]) -> Tensor:
        known = op.A(op.pinv(_rows(images, at).to(model.device)))  # rounding is not of what a blur makes
        return edit(model, op, known, seeds=seeds, labels=labels, times=times, steps=steps, progress=progress)

    return edited(model, len(images), seeds, batch, part)


def edit(
    model: FlowMap,
    op: Degradation,
    known: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Zero-shot editing with any linear operator, of all images at once.

    Algorithm 4 of Song et al. (2023), arXiv:2303.01469. An image larger than the model's is made of overlapping tiles
    that agree, see `cmtool.flow.tiled`; what is known still holds exactly, for it is imposed on the whole.

    Args:
        model: a consistency model.
        op: what is known of an image.
        known: op.A(image) for one image, or for one image a seed.
        seeds: one result each; default one a known image.
        labels: see `labels_for`.
        times: decreasing path times; default the model's whole grid without t_min, as in the paper.
        steps: that many points of the grid instead, evenly spread.
        progress: told after each network call how many there have been (where images come in several batches: for
            this one).
    Returns:
        float32 [len(seeds), C, H, W] in [-1, 1] with op.A(result) = known as closely as the range allows.
    """
    if model.card.role == "denoiser":
        raise UsageError(
            "zero-shot editing needs a consistency model, and this is a denoiser", "distil it first: cmtool distill"
        )
    seeds = _seeds(seeds, len(known))
    known = known.detach().to(model.device)
    filled = op.pinv(known)
    card, shape = model.card, tuple(filled.shape[1:])
    if shape[0] != card.channels or min(shape[1:]) < card.resolution:
        raise DataError(
            f"the result would be {_size(filled)} with {shape[0]} channels, the model makes "
            f"{card.resolution}x{card.resolution} with {card.channels}",
            "give an image of at least the size this model makes",
        )
    model = tiled(model, *shape[1:])
    points = edit_times(model, steps) if times is None else path_times(model, times)
    classes = labels_for(model, seeds, labels)
    noise = noise_of(seeds, model, shape)
    wanted = None if classes is None else classes.to(model.device)
    t_min, t_max = points.new_tensor(model.path.t_min), points[0]
    start = model.path.diffuse(filled.expand(len(seeds), -1, -1, -1), t_min, t_max, noise(0))
    constrain = partial(project, op, y=known)
    for state in run_sampler(model, start, points, noise=noise, constrain=constrain, labels=wanted):
        x = state.denoised
        if progress is not None:
            progress(state.step)
    with torch.inference_mode():
        made = to_range(op, x, known)
    return made.to("cpu", copy=True)  # an ordinary tensor, outside of inference mode


def edit_times(model: FlowMap, steps: int | None = None) -> Tensor:
    """The model's grid without its last point t_min (where f changes nothing), or `steps` points of it."""
    grid = Karras(model.card.grid_rho).times(model.path, model.card.grid_points)[:-1]
    if steps is None or steps == len(grid):
        return grid
    if steps < 1:
        raise UsageError(f"editing needs at least 1 step, found {steps}")
    return Karras(model.card.grid_rho).times(model.path, steps + 1)[:-1]


def edited(
    model: FlowMap,
    rows: int,
    seeds: Sequence[int] | None,
    batch: int | None,
    part: Callable[[slice, list[int]], Tensor],
) -> Tensor:
    """The edits of `rows` known images (or of a single one), made by `part(slice, its seeds)`."""
    wanted = _seeds(seeds, rows)
    parts = in_batches(model, len(wanted), lambda at: part(at, wanted[at]), batch=batch)
    return _joined(parts, len(wanted))


def _seeds(seeds: Sequence[int] | None, rows: int) -> list[int]:
    """One seed a result, for one image or as many as there are seeds."""
    seeds = list(range(rows)) if seeds is None else list(seeds)
    if not seeds:
        raise UsageError("there is no image to make", "ask for at least one")
    if rows not in (1, len(seeds)):
        raise UsageError(f"{rows} images do not go with {len(seeds)} seeds")
    return seeds


def _rows(x: Tensor, at: slice) -> Tensor:
    """The rows of a slice; a single row is for all."""
    return x if len(x) == 1 else x[at]


def _joined(parts: Iterable[Tensor], count: int) -> Tensor:
    """All `count` rows in one tensor, without holding them twice."""
    whole, first = torch.empty(0), 0
    for part in parts:
        if len(part) == count:
            return part
        if first == 0:
            whole = part.new_empty(count, *part.shape[1:])
        whole[first : first + len(part)] = part
        first += len(part)
    return whole


def check_role(model: FlowMap, solver: str | None, landing: Landing | None = None) -> None:
    """Whether a model can be sampled in this way.

    Raises:
        UsageError: a denoiser without a solver, names that there are not.
    """
    if solver is not None and solver not in (*SOLVERS, "ancestral"):
        raise UsageError(f"there is no solver {solver!r}", f"one of {', '.join((*SOLVERS, 'ancestral'))}")
    if landing not in (None, "t_min", "next"):
        raise UsageError(f"there is no landing {landing!r}", "one of t_min, next")
    if solver is not None and landing is not None:
        raise UsageError("a solver makes no jumps, so there is no landing to choose", "give one of the two")
    if solver is None and landing != "next" and model.card.role == "denoiser":
        raise UsageError("this model is a denoiser and needs a solver", "add --solver heun --steps 18")


def path_times(model: FlowMap, times: Times) -> Tensor:
    """Times as a tensor, if they decrease and lie on the model's path; else a UsageError."""
    return check_times(model, torch.as_tensor(times, dtype=torch.float32, device="cpu"))


def _solver_times(model: FlowMap, steps: int | None, times: Sequence[float] | Tensor | None) -> Tensor:
    if times is not None:
        points = path_times(model, times)
    else:
        count = 18 if steps is None else steps
        if count < 1:
            raise UsageError(f"--steps must be at least 1, found {count}")
        grid, free = Karras(model.card.grid_rho), not _noise_at_the_end(model)  # one free of noise ends there
        points = grid.times(model.path, count + free) if count + free > 1 else torch.tensor([model.path.t_max])
    # EDM's last step goes all the way to the clean image; where no time is free of noise, `_solve` makes it.
    ends = points[-1] > 0 and not (model.path.t_min == 0 and _noise_at_the_end(model))
    return torch.cat([points, points.new_zeros(1)]) if ends else points


def _solve(
    model: FlowMap,
    start: Tensor,
    points: Tensor,
    noise: Callable[[int], Tensor],
    labels: Tensor | None,
    solver: str,
    churn: Churn | None,
    clip: bool,
) -> tuple[Tensor, int]:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        estimate = model.denoised(x, t, labels)
        return estimate.clamp(-1, 1) if clip else estimate

    ancestral = solver == "ancestral"
    rule: Solver = DDIM() if ancestral else SOLVERS[solver]()
    x, nfe = start, 0
    for state in solve(rule, denoise, model.path, start, points, noise=noise, churn=churn, ancestral=ancestral):
        x, nfe = state.x, state.nfe
    if model.path.t_min == 0 and _noise_at_the_end(model):  # there is no time at which the last of it is gone
        x, nfe = denoise(x, points[-1].to(x).expand(len(x))), nfe + 1
    return x, nfe


def _noise_at_the_end(model: FlowMap) -> bool:
    return float(model.path.sigma(torch.tensor(model.path.t_min, dtype=torch.float64))) > 0


def noise_of(seeds: list[int], model: FlowMap, shape: tuple[int, ...] | None = None) -> Callable[[int], Tensor]:
    """The noise of each step, for images of a shape, the model's own by default: stream -> float32 [B, *shape]."""
    return lambda stream: rng.noise(seeds, shape or model.card.image_shape, stream).to(model.device)


class _Ahead:
    """`noise_of` slices of seeds; on a GPU what the next one starts from is drawn while this one is computed."""

    def __init__(self, model: FlowMap, seeds: Sequence[int]) -> None:
        self._model, self._seeds = model, seeds
        self._next: tuple[slice, Future[Tensor]] | None = None
        self._thread = None if model.device.type == "cpu" else ThreadPoolExecutor(1)

    def __call__(self, at: slice) -> Callable[[int], Tensor]:
        found, self._next = self._next, None
        rest = noise_of(list(self._seeds[at]), self._model)
        if self._thread is None:
            return rest
        following = slice(at.stop, min(2 * at.stop - at.start, len(self._seeds)))
        if following.start < following.stop:
            drawing = self._thread.submit(rng.noise, list(self._seeds[following]), self._model.card.image_shape)
            self._next = following, drawing
        if found is None or found[0] != at:  # the first, or smaller than it was to be
            return rest
        start = found[1].result().to(self._model.device)
        return lambda stream: rest(stream) if stream else start


def _start(model: FlowMap, points: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
    # x_T ~ N(0, sigma_max^2): the data's share at t_max is lost in the noise, as in the reference.
    return model.path.sigma(points[0]) * noise(0)


def check_images(images: Tensor, model: FlowMap) -> Tensor:
    """Images [B, C, H, W] that a model can work on, at least of its size; a single one may come without B.

    Raises:
        DataError: for anything else.
    """
    images, card = _images(images), model.card
    if images.shape[1] != card.channels or min(images.shape[2:]) < card.resolution:
        raise DataError(
            f"the images are {_size(images)} with {images.shape[1]} channels, the model makes "
            f"{card.resolution}x{card.resolution} with {card.channels}",
            "give images of at least the size this model makes",
        )
    return images


def _images(images: Tensor) -> Tensor:
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError("images must be float tensors of shape [B, C, H, W] in [-1, 1]")
    return images


def _size(x: Tensor) -> str:
    return f"{x.shape[-1]}x{x.shape[-2]}"
