"""Edits that are another start of the sampling loop: no constraint holds them, only what the noise leaves standing.

Strokes and noisy images that are followed, and samples on the way from one seed to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmtool.errors import DataError, UsageError
from cmtool.flow.flow_map import FlowMap
from cmtool.flow.tiled import tiled
from cmtool.generate import Times, check_images, edited, generate, labels_for, noise_of, path_times
from cmtool.sampler import sample as run_sampler
from cmtool.solvers import Heun
from cmtool.times import Karras

# The noise-to-signal ratios of Song et al. (2023), appendix D, for 256x256.
STROKE = (5.38, 2.24)
_PUBLISHED_SIDE = 256


def stroke_times(model: FlowMap) -> Tensor:
    """The default times of `stroke` on the model's path.

    The published noise levels, times side / 256: a picture of fewer pixels holds its coarse shapes in fewer of them,
    and the mean over k x k pixels of the noise shrinks with k. So the same shapes survive at every resolution.
    """
    path = model.path
    ratios = torch.tensor(STROKE, dtype=torch.float64) * model.card.resolution / _PUBLISHED_SIDE
    return path.time(ratios).clamp(path.t_min, path.t_max).float()


def stroke(
    model: FlowMap,
    images: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    labels: Sequence[int] | int | None = None,
    times: Times | None = None,
    batch: int | None = None,
) -> Tensor:
    """Pictures that follow rough strokes: noise is added to them and taken away by the model.

    Algorithm 4 of Song et al. (2023), arXiv:2303.01469, with nothing held; SDEdit, Meng et al. (2021),
    arXiv:2108.01073, in two network calls.

    Args:
        model: a consistency model.
        images: float32 [B, C, H, W] in [-1, 1], at least of the model's size; one serves all seeds.
        seeds: one result each; default 0 to B-1.
        labels: see `generate.labels_for`.
        times: decreasing path times, default `stroke_times`; the more noise at the first, the freer the result.
        batch: images at once, as `generate.generate`.
    Returns:
        float32 [len(seeds), C, H, W] in [-1, 1].
    Raises:
        UsageError: for a denoiser. DataError: for images of another kind.
    """
    images = check_images(images, model)
    if model.card.role == "denoiser":
        raise UsageError("stroke editing needs a consistency model, and this is a denoiser", "distil it first")
    points = stroke_times(model) if times is None else path_times(model, times)
    shape = tuple(images.shape[1:])
    over = tiled(model, *shape[1:])

    def part(at: slice, seeds: list[int]) -> Tensor:
        classes = labels_for(model, seeds, labels)
        noise = noise_of(seeds, model, shape)
        given = (images if len(images) == 1 else images[at]).to(model.device).expand(len(seeds), -1, -1, -1)
        start = model.path.diffuse(given, points.new_tensor(model.path.t_min), points[0], noise(0))
        wanted = None if classes is None else classes.to(model.device)
        for state in run_sampler(over, start, points, noise=noise, labels=wanted):
            x = state.denoised
        return x.clamp(-1, 1).to("cpu", copy=True)

    return edited(model, len(images), seeds, batch, part)


def denoise(
    model: FlowMap,
    images: Tensor,
    *,
    sigma: float | None = None,
    labels: Sequence[int] | int | None = None,
    batch: int | None = None,
) -> Tensor:
    """Take white noise away, in one network call an image.

    The image is read as a point x_t of the model's path with t such that sigma_t / alpha_t = `sigma`. A consistency
    model answers with one clean image, a denoiser with the mean of all that are possible.

    Args:
        images: float32 [B, C, H, W], clean values in [-1, 1], at least of the model's size.
        sigma: standard deviation of the noise in these units; None estimates it, image by image.
        labels: one class for all, or one an image, dealt as `generate.labels_for`.
        batch: images at once, as `generate.generate`.
    Returns:
        float32 [B, C, H, W] in [-1, 1].
    Raises:
        UsageError: for a noise level outside of the model's path. DataError: for images of another kind.
    """
    images = check_images(images, model)
    path, over = model.path, tiled(model, *images.shape[2:])
    levels = estimate_sigma(images) if sigma is None else torch.full((len(images),), float(sigma))
    most = float(path.ratio(torch.tensor(path.t_max)))
    if sigma is not None and not 0 <= sigma <= most:
        raise UsageError(f"the model knows noise up to {most:.3g}, and {sigma:.3g} is asked for", "in units of [-1, 1]")

    def part(at: slice, seeds: list[int]) -> Tensor:
        times = path.time(levels[at].double()).clamp(path.t_min, path.t_max).float().to(model.device)
        x_t = path.alpha(times)[:, None, None, None] * images[at].to(model.device)
        classes = labels_for(model, seeds, labels)
        wanted = None if classes is None else classes.to(model.device)
        with torch.inference_mode():
            if model.card.role == "denoiser":
                made = over.denoised(x_t, times, wanted)
            else:
                made = over.jump(x_t, times, torch.full_like(times, path.t_min), wanted)
        return made.clamp(-1, 1).to("cpu", copy=True)

    return edited(model, len(images), None, batch, part)


def estimate_sigma(images: Tensor) -> Tensor:
    """The standard deviation of white noise in images [B, C, H, W], H and W at least 2; [B], in their units.

    The median of the finest diagonal details of the Haar wavelet, |a - b - c + d| / 2 over 2x2 pixels, over 0.6745:
    Donoho and Johnstone (1994), Biometrika 81. Fine texture counts as noise.
    """
    a, b = images[..., 0:-1:2, 0:-1:2], images[..., 0:-1:2, 1::2]
    c, d = images[..., 1::2, 0:-1:2], images[..., 1::2, 1::2]
    details: Tensor = (a - b[..., : a.shape[-2], :] - c + d) / 2
    return details.abs().flatten(1).median(1).values / 0.6745


def interpolate(
    model: FlowMap,
    seeds: Sequence[int],
    *,
    frames: int = 8,
    steps: int | None = None,
    times: Times | None = None,
    labels: Sequence[int] | int | None = None,
    solver: str | None = None,
    batch: int | None = None,
) -> Tensor:
    """Samples on the way from seed to seed: between two their noise is interpolated on the sphere.

    Gaussian noise of many numbers lies near a sphere, and so do the points of the great circle between two, Shoemake
    (1985); those of a straight line do not. All noise of a sample is taken along, that of later steps, too: the images
    of the seeds themselves are those of `generate.sample`.

    Args:
        model: as `generate.generate`; a denoiser takes a solver.
        seeds: at least two.
        frames: steps from one seed to the next.
        steps, times, solver: as `generate.generate`.
        labels: one class for all; default that of the first seed.
        batch: images at once, as `generate.generate`.
    Returns:
        float32 [(len(seeds) - 1) frames + 1, C, H, W] in [-1, 1].
    Raises:
        UsageError: for fewer than two seeds or no frames, and as `generate.generate`.
    """
    if len(seeds) < 2 or frames < 1:
        raise UsageError("an interpolation takes at least two seeds, and a frame from each", "seeds 0 and 1, 8 frames")
    first = labels_for(model, [seeds[0]], labels)
    count = (len(seeds) - 1) * frames + 1
    shares = torch.arange(count) % frames / frames

    def noise(at: slice) -> Callable[[int], Tensor]:
        before = [seeds[number // frames] for number in range(count)[at]]
        after = [seeds[min(number // frames + 1, len(seeds) - 1)] for number in range(count)[at]]
        share = shares[at].to(model.device)
        return lambda stream: slerp(noise_of(before, model)(stream), noise_of(after, model)(stream), share)

    made = generate(
        model,
        range(count),
        steps=steps,
        times=times,
        labels=None if first is None else int(first),
        solver=solver,
        batch=batch,
        noise=noise,
    )
    return torch.cat([part.images for part in made])


def between(
    model: FlowMap,
    images: Tensor,
    *,
    frames: int = 8,
    steps: int = 18,
    labels: Sequence[int] | int | None = None,
    batch: int | None = None,
) -> Tensor:
    """Samples on the way from image to image: the noise that each comes from, interpolated on the sphere.

    Arguments and errors as `interpolate`, and

    Args:
        model: a denoiser: `invert` follows its ODE.
        images: float32 [N, C, H, W] in [-1, 1], two or more of the model's size.
        steps: of Heun's method, there and back.
    Returns:
        float32 [(N - 1) frames + 1, C, H, W] in [-1, 1]. Those of the images are the images, as nearly as both
        solutions are right.
    """
    if len(images) < 2 or frames < 1:
        raise UsageError("an interpolation takes at least two images, and a frame from each", "two images, 8 frames")
    known = labels_for(model, [0], labels)
    label = None if known is None else int(known)
    origins = invert(model, images, steps=steps, labels=label, batch=batch)
    count = (len(images) - 1) * frames + 1
    places, shares = torch.arange(count) // frames, torch.arange(count) % frames / frames
    after = (places + 1).clamp(max=len(images) - 1)
    whole = slerp(origins[places], origins[after], shares)

    def noise(at: slice) -> Callable[[int], Tensor]:
        return lambda _: whole[at].to(model.device)

    made = generate(model, range(count), steps=steps, labels=label, solver="heun", batch=batch, clip=False, noise=noise)
    return torch.cat([part.images for part in made]).clamp(-1, 1)


def invert(
    model: FlowMap,
    images: Tensor,
    *,
    steps: int = 18,
    labels: Sequence[int] | int | None = None,
    batch: int | None = None,
) -> Tensor:
    """The noise that the model's ODE makes these images of: solved from the images up to t_max by Heun's method.

    Args:
        model: a denoiser.
        images: float32 [B, C, H, W] in [-1, 1] of the model's size.
        steps: of the solution, on the grid of Karras et al. (2022).
        labels: see `generate.labels_for`.
        batch: images at once, as `generate.generate`.
    Returns:
        float32 [B, C, H, W], standard normal if the images are as likely as the model's own.
    Raises:
        UsageError: for another model than a denoiser. DataError: for images of another size.
    """
    if model.card.role != "denoiser":
        raise UsageError("an image is followed back along the ODE of a denoiser, and this is none", "name its teacher")
    images = check_images(images, model)
    side = model.card.resolution
    if tuple(images.shape[2:]) != (side, side):
        raise DataError(f"the images are {images.shape[3]}x{images.shape[2]}, the model's {side}x{side}", "resize them")
    points = Karras(model.card.grid_rho).times(model.path, steps + 1).flip(0)
    rule, path = Heun(), model.path

    def part(at: slice, seeds: list[int]) -> Tensor:
        x = images[at].to(model.device)
        classes = labels_for(model, seeds, labels)
        wanted = None if classes is None else classes.to(model.device)
        with torch.inference_mode():
            for t, s in pairwise(points.tolist()):
                x = rule.step(
                    lambda x, t: model.denoised(x, t, wanted),
                    path,
                    x,
                    x.new_full((len(x),), t),
                    x.new_full((len(x),), s),
                )
            return (x / path.sigma(points[-1].to(x))).to("cpu", copy=True)

    return edited(model, len(images), None, batch, part)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Points on the great circles from a to b, shapes [B, ...]; at `share` of the angle between them, [B]."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()
    share = share.double()
    # Of parallel ones the sine vanishes, and the straight line is the circle.
    sine = angle.sin()
    straight = sine < 1e-6
    safe = sine.where(~straight, torch.ones_like(sine))
    of_a = (((1 - share) * angle).sin() / safe).where(~straight, 1 - share)
    of_b = ((share * angle).sin() / safe).where(~straight, share)
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).to(a.dtype).view_as(a)
