"""Methods of the straight path from data to noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cmtool.training.presets.shape import Shape, brief, slower

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


def flow_ct(shape: Shape) -> Recipe:
    """Consistency training on the straight path: f = x - t F, which is x at t = 0 by itself.

    The stepwise derivation from flow matching with the pairs of Song et al. (2023), arXiv:2303.01469, algorithm 3:
    |f(x_t) - f-(x_r)|^2 / t^2, neighbours on a grid that is even in t.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.122 and
    0.118 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 59.5 % and 73.5 %,
    variety 1.92 and 1.52 of the real one.
    """
    from cmtool.training import parts as p

    return _stepwise("flow-ct", shape, p.Data(), p.Progressive(s0=2, s1=9), p.AdaptiveAverage(0.1))


def flow_cd(shape: Shape) -> Recipe:
    """Consistency distillation on the straight path, with an Euler step of a flow teacher between neighbours.

    Song et al. (2023), arXiv:2303.01469, algorithm 2, with x_r = x_t - (t - r) v(x_t, t) and the loss of `flow-ct`. A
    teacher of another path is read on this one.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.032 and
    0.030 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 98.0 % and 99.1 %,
    variety 0.90 and 0.92 of the real one.
    """
    from cmtool.training import parts as p

    teacher = p.Teacher(p.Euler(), 1, p.KarrasGrid(1.0))
    return _stepwise("flow-cd", shape, teacher, p.Constant(10), p.Online(), init_from_teacher=True)


def _stepwise(name: str, shape: Shape, trajectory: Any, curriculum: Any, target: Any, **rest: Any) -> Recipe:
    from cmtool.training import parts as p

    times = p.Adjacent(p.KarrasGrid(1.0), curriculum)
    objective = p.Consistency(trajectory, times, p.L2(), p.VelocityError(), target)
    path, parameterization = straight(shape)
    return p.Recipe(
        name, "consistency", objective, shape.small(), path=path, parameterization=parameterization, **brief(**rest)
    )


def reflow(shape: Shape) -> Recipe:
    """ReFlow: flow matching on pairs of a noise and the image that the teacher's ODE makes of it.

    Liu et al. (2022), arXiv:2209.03003. The straighter paths take few steps: `sample --solver euler --steps 1`. Pairs
    come from `cmtool pairs` (then `--data pairs.npz`), else they are solved on the fly, which costs the teacher's
    steps in every iteration.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.031 and
    0.027 where two samples of it are 0.024 apart.
    """
    from cmtool.training import parts as p

    pairs = None if shape.paired else p.Teacher(p.Heun(), 8, p.KarrasGrid((shape.path or p.VE()).rho))
    path, parameterization = straight(shape)
    return p.Recipe(
        "reflow",
        "denoiser",
        p.Denoising(p.LogNormal(0.0, 1.3), p.L2(), p.VelocityError(), pairs=pairs),
        shape.small(),
        path=path,
        parameterization=parameterization,
        init_from_teacher=True,
        **brief(),
    )


def meanflow(shape: Shape) -> Recipe:
    """MeanFlow: the mean velocity between two times, by its identity u = v - (t - s) du/dt. Trains or distils.

    Geng et al. (2025), arXiv:2505.13447: times are two sorted logit-normals of (-0.4, 1), three quarters of the batch
    lie on the diagonal (flow matching), losses are balanced by 1 / (loss + c). With a teacher, its velocity takes the
    place of the data's. Scaled for minutes on a CPU: logit-normals of (0, 1.4), since theirs hardly ever see the pure
    noise that a sample starts from. Derivatives are float32 whatever `--precision` is.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.052 and
    0.042 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 43.2 % and 38.4 %,
    variety 2.08 and 2.10 of the real one.
    """
    from cmtool.training import parts as p

    times = p.LogNormal(0.0, 1.4)
    diagonal = p.Denoising(times, p.L2(), p.VelocityError(), p.Adaptive())
    trajectory = p.Teacher() if shape.distils else p.Data()
    jumps = p.Tangent(trajectory, p.Pair(times, times), balance=p.Adaptive())
    path, parameterization = straight(shape)
    return p.Recipe(
        "meanflow",
        "flow_map",
        p.Mixture((p.Part(diagonal, 0.75), p.Part(jumps, 0.25))),
        shape.small(two_times=True),
        path=path,
        parameterization=parameterization,
        init_from_teacher=shape.distils,
        **brief(optimizer=slower(3e-4)),
    )


def shortcut(shape: Shape) -> Recipe:
    """Shortcut models: a jump is taught by two jumps of half its length.

    Frans et al. (2024), arXiv:2410.12557: jump lengths are powers of one half down to 1/128, an eighth to a quarter of
    the batch teaches jumps, the rest is flow matching; the half jumps are made by a target average. Scaled for minutes
    on a CPU: lengths down to 1/16, a target that follows within tens of steps.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.039 and
    0.035 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 60.7 % and 56.2 %,
    variety 1.75 and 1.76 of the real one.
    """
    from cmtool.training import parts as p

    diagonal = p.Denoising(p.LogNormal(0.0, 1.3), p.L2(), p.VelocityError())
    jumps = p.Consistency(p.Self(), p.Dyadic(levels=4), p.L2(), p.InverseJump(), p.MovingAverage(0.95))
    path, parameterization = straight(shape)
    return p.Recipe(
        "shortcut",
        "flow_map",
        p.Mixture((p.Part(diagonal, 0.75), p.Part(jumps, 0.25))),
        shape.small(two_times=True),
        path=path,
        parameterization=parameterization,
        **brief(),
    )


def straight(shape: Shape) -> tuple[Any, Any]:
    """Path and parameterization of a model on the straight path.

    A network that starts as a copy of one of Karras et al.'s parameterization keeps it, between the same noise levels:
    there it is the same function if it is told the noise level, and a start only if it is told another path's time.
    Every other predicts the velocity.
    """
    from cmtool.training import parts as p

    if isinstance(shape.parameterization, p.EDM):
        return shape.ends(p.Linear()), shape.told(p.EDM())
    return p.Linear(), p.Velocity()
