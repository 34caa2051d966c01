"""Continuous-time consistency models: neighbours that have closed in, by forward-mode derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cmtool.errors import ConfigError
from cmtool.training.presets.consistency import student
from cmtool.training.presets.shape import Shape, brief, slower

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


def sct(shape: Shape) -> Recipe:
    """Simplified continuous-time consistency training, on the great circle from data to noise (TrigFlow).

    Lu and Song (2024), arXiv:2410.11081: normalised tangents with a warm-up, ln(sigma_data tan t) ~ N(-1, 1.4^2), prior
    weight 1 / (sigma_data tan t) and a learned one. Published: 400,000 iterations of 512 images on CIFAR-10, warm-up
    10,000, RAdam 1e-4. Scaled for minutes on a CPU: N(-0.8, 2^2), since of theirs only one draw in 16,000 is as noisy
    as where a sample starts. Derivatives are float32 whatever `--precision` is.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.045 and
    0.029 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 10.4 % and 9.0 %,
    variety 0.14 and 0.69 of the real one.
    """
    from cmtool.training import parts as p

    if shape.keeps_form:
        raise ConfigError(
            "a network that predicts the velocity, the noise or the image of another path means nothing on this one",
            "start from a model of --preset edm, or from scratch",
        )
    return _trig("sct", shape, p.Data(), shape.ends(p.Trig()), shape.told(p.EDM(time_input=p.PathTime())))


def scd(shape: Shape) -> Recipe:
    """Simplified continuous-time consistency distillation, on TrigFlow, from any teacher.

    Lu and Song (2024), arXiv:2410.11081: as `sct`, with the teacher's velocity for the tangent. The teacher's network
    is the student's start: Karras et al.'s parameterization is the same function on this path.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.052 and
    0.019 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 99.9 % and 99.0 %,
    variety 0.36 and 0.64 of the real one.
    """
    from cmtool.training import parts as p

    told = shape.told(p.EDM(time_input=p.PathTime()))
    return _trig("scd", shape, p.Teacher(), shape.ends(p.Trig()), told, init=not shape.keeps_form)


def _trig(name: str, shape: Shape, trajectory: Any, path: Any, parameterization: Any, *, init: bool = False) -> Recipe:
    from cmtool.training import parts as p

    objective = p.Tangent(
        trajectory,
        p.Tangential(p.LogNormal(-0.8, 2.0)),
        scale=p.Alpha(),
        limit=p.Normalised(0.1),
        warmup=0.3,
        weight=p.InverseRatio(),
        balance=p.Learned(),
    )
    return p.Recipe(
        name,
        "consistency",
        objective,
        shape.small(),
        path=path,
        parameterization=parameterization,
        init_from_teacher=init,
        **brief(optimizer=slower(3e-4), two_step=1.1),
    )


def cd_continuous(shape: Shape) -> Recipe:
    """Consistency distillation in the limit of infinitely many grid points.

    Song et al. (2023), arXiv:2303.01469, appendix B: theorem 5 (`--set objective.stop_gradient=false`: theorems 3 and
    4), with squared l2 (`objective.distance=l1`, `lpips`: their forms), t^(1/7) uniform. Published: stop-gradient is
    better, LPIPS best, and the discrete form better than this one.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.027 and
    0.031 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 86.0 % and 81.0 %,
    variety 0.87 and 0.97 of the real one.
    """
    from cmtool.training import parts as p

    path, parameterization, rho = student(shape)
    return p.Recipe(
        "cd-continuous",
        "consistency",
        p.Continuous(
            p.Teacher(),
            p.Tangential(p.RhoUniform(p.KarrasGrid(rho))),
            p.L2(),
            p.VelocityError(power=1.0) if shape.speaks_velocity else p.KarrasWeight(power=1.0),
            stop_gradient=True,
        ),
        shape.small(),
        path=path,
        parameterization=parameterization,
        init_from_teacher=True,
        **brief(optimizer=slower(1e-4)),
    )


def ct_continuous(shape: Shape) -> Recipe:
    """Consistency training in the limit of infinitely many grid points. Start it from `edm`.

    Song et al. (2023), arXiv:2303.01469, theorem 6. Published: it must start from a diffusion model (`--init`), with a
    learning rate of 5e-6, and is then better than the discrete form.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.030 and
    0.029 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 83.4 % and 75.6 %,
    variety 0.88 and 1.01 of the real one.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    times = p.Tangential(p.RhoUniform(p.KarrasGrid(path.rho)))
    return p.Recipe(
        "ct-continuous",
        "consistency",
        p.Continuous(p.Data(), times, p.L2(), p.KarrasWeight(power=1.0), stop_gradient=True),
        shape.small(),
        path=path,
        parameterization=shape.form(p.BoundaryEDM()),
        **brief(optimizer=slower(1e-4)),
    )
