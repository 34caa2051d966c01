"""How far a consistency model is from the solution of its teacher's probability-flow ODE.

A consistency function maps every point of a trajectory of dx/dt = v(x, t) to the trajectory's end. So from the same
noise its one step is compared with the teacher's ODE solved finely; and on the teacher's trajectory its answers at
several times with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmtool import rng
from cmtool.errors import UsageError
from cmtool.flow.flow_map import FlowMap, on_path
from cmtool.generate import in_batches, labels_for
from cmtool.solvers import Heun, solve
from cmtool.times import Karras

STEPS = 40  # of Heun's method; twice as many are the solution that is compared with
_LEVELS = 8  # times at which answers are compared


class OdeError(NamedTuple):
    """Mean squared errors over pixels in [-1, 1], means over the seeds."""

    error: float  # of one step from pure noise
    solution: float  # of the teacher's ODE in half as many steps: how well it is solved
    levels: list[float]  # noise-to-signal ratios
    from_level: list[float]  # error of the jump from the trajectory's point at each of them
    distance: float | None = None  # as `error`, in another distance
    steps: int = 2 * STEPS


def ode_error(
    student: FlowMap,
    teacher: FlowMap,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | int | None = None,
    steps: int = STEPS,
    batch: int | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> OdeError:
    """The PF-ODE solving error of a consistency or two-time model.

    The teacher is read on the student's path, its ODE solved from the student's t_max to t_min on the student's grid,
    with `steps` and twice as many steps of Heun's method.

    Args:
        student: a model that jumps. teacher: a denoiser of the same images.
        seeds: of the noise. labels: see `cmtool.generate.labels_for`.
        distance: of two batches of images, [B]; LPIPS, for example.
    Raises:
        UsageError: for a student that makes no jumps, or a teacher of other images.
    """
    if student.card.role == "denoiser":
        raise UsageError("a denoiser makes no jump whose error could be measured", "name a consistency model")
    if student.card.image_shape != teacher.card.image_shape:
        raise UsageError("the teacher makes other images than the model", "name the teacher it was distilled from")
    path = student.path
    follow = teacher if teacher.path == path else on_path(teacher, path)
    classes = labels_for(teacher if teacher.card.num_classes else student, seeds, labels)
    grid = Karras(student.card.grid_rho)
    coarse, fine = grid.times(path, steps + 1), grid.times(path, 2 * steps + 1)
    chosen = [round(i * 2 * steps / _LEVELS) for i in range(_LEVELS)]

    def part(at: slice) -> Tensor:
        noise = rng.noise(list(seeds[at]), student.card.image_shape, 0).to(student.device)
        start = path.sigma(coarse[0]) * noise
        known = None if classes is None else classes[at].to(student.device)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return follow.denoised(x, t, known if teacher.card.num_classes else None)

        def jump(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(x).expand(len(x))
            own = known if student.card.num_classes else None
            return student.jump(x, times, torch.full_like(times, path.t_min), own)

        with torch.inference_mode():
            *_, rough = solve(Heun(), denoise, path, start, coarse)
            visited = [start, *(state.x for state in solve(Heun(), denoise, path, start, fine))]
            end = visited[-1]
            answers = [jump(visited[index], fine[index]) for index in chosen]
            errors = [_mean_square(answer, end) for answer in answers]
            rows = [_mean_square(rough.x, end), *errors]
            if distance is not None:
                rows.append(distance(answers[0].clamp(-1, 1), end.clamp(-1, 1)))
        return torch.stack([row.double().cpu() for row in rows])

    found = torch.cat(list(in_batches(student, len(seeds), part, batch=batch)), dim=1).mean(1).tolist()
    levels = [float(path.ratio(fine[index])) for index in chosen]
    other = found[1 + _LEVELS] if distance is not None else None
    return OdeError(found[1], found[0], levels, found[1 : 1 + _LEVELS], other, 2 * steps)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
