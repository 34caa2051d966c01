"""Consistency models with neighbours a step apart, on the variance-exploding path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cmtool.training.presets.shape import Shape, brief, time_of

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


def cd(shape: Shape) -> Recipe:
    """Consistency distillation from a diffusion teacher, with a Heun step between neighbours.

    Song et al. (2023), arXiv:2303.01469, algorithm 2, with an online target and N = 18. Scaled for minutes on a CPU:
    squared l2 with the weight snr + 1 / sigma_data^2, under which an error of the network's raw output counts alike at
    all levels, as in its teacher. Chosen by a short search on digits, in `examples/LOG.md`.

    Measured on digits:train from the `edm` teacher with N = 10 (2 CPU cores with AMX, 2026-11-21): 267 s; 97.1 % of
    1,000 one-step samples (one run) show the class asked for, muddiness 1.36 times that of real digits.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.024 and
    0.022 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 97.1 % and 96.6 %,
    variety 0.91 and 0.93 of the real one; the second step in the middle of the grid.
    """
    from cmtool.training import parts as p

    path, parameterization, rho = student(shape)
    return p.Recipe(
        "cd",
        "consistency",
        p.Consistency(
            p.Teacher(grid=p.KarrasGrid(rho)),
            p.Adjacent(p.KarrasGrid(rho), p.Constant(18)),
            p.L2(),
            shape.balance(p.KarrasWeight()),
            p.Online(),
        ),
        shape.small(),
        path=path,
        parameterization=parameterization,
        init_from_teacher=True,
        **brief(two_step=time_of(path, 0.585)),  # index 11 of 18, as published for CIFAR-10
    )


def ct(shape: Shape) -> Recipe:
    """Consistency training without a teacher, with the growing grid N(k) and the target average mu(k).

    Song et al. (2023), arXiv:2303.01469, algorithm 3 and appendix C. Scaled for minutes on a CPU: N ends at 10 and
    mu0 = 0.1, so that the target follows within tens of steps; distance and weight of `cd`.

    Measured on digits:train (one CPU core with AMX, 2026-11-21): 600 steps at 270 images/s; 95.7 % of 1,000 one-step
    samples (one run) show the class asked for, muddiness 1.43 times that of real digits.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.191 and
    0.189 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 91.3 % and 90.4 %,
    variety 0.36 and 0.42 of the real one.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    return p.Recipe(
        "ct",
        "consistency",
        p.Consistency(
            p.Data(),
            p.Adjacent(p.KarrasGrid(path.rho), p.Progressive(s0=2, s1=9)),
            p.L2(),
            shape.balance(p.KarrasWeight()),
            p.AdaptiveAverage(0.1),
        ),
        shape.small(),
        path=path,
        parameterization=shape.form(p.BoundaryEDM()),
        **brief(),
    )


def ict(shape: Shape) -> Recipe:
    """Improved consistency training: doubling grid, log-normal times, Pseudo-Huber of whole images, no target average.

    Song and Dhariwal (2023), arXiv:2310.14189. Published: N from 11 to 1281 over 400,000 iterations of 1,024 images on
    CIFAR-10. Scaled for minutes on a CPU: N from 5 to 33; the rest is theirs, ln sigma ~ N(-1.1, 2^2) on the grid, c =
    0.00054 sqrt(d), weight 1 / (t - r).

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.045 and
    0.038 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 78.7 % and 80.3 %,
    variety 0.62 and 0.71 of the real one.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    return p.Recipe(
        "ict",
        "consistency",
        p.Consistency(
            p.Data(),
            p.Adjacent(p.KarrasGrid(path.rho), p.Doubling(s0=4, s1=32), p.LogNormalIndex(-1.1, 2.0)),
            p.PseudoHuber(),
            p.InverseGap(),
            p.Online(),
        ),
        shape.small(),
        path=path,
        parameterization=shape.form(p.BoundaryEDM()),
        **brief(),
    )


def ect(shape: Shape) -> Recipe:
    """Easy consistency tuning: neighbours at a share of the noise level that shrinks by stages. Start it from `edm`.

    Geng et al. (2024), arXiv:2406.14548: r = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), q = 2, k = 8, b = 1,
    ln sigma ~ N(-1.1, 2^2), the plain norm, weight 1 / (t - r), and weights from a diffusion model (`--init`).
    Trained and sampled with the same f, which is x at t_min; the original samples with another one than it trains.
    Scaled for minutes on a CPU: four stages instead of eight, the norm with c = 0.00054 sqrt(d).

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.040 and
    0.040 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 99.1 % and 99.6 %,
    variety 0.69 and 0.80 of the real one.
    """
    from cmtool.training import parts as p

    return p.Recipe(
        "ect",
        "consistency",
        p.Consistency(
            p.Data(), p.Mapped(p.LogNormal(-1.1, 2.0), stages=4), p.PseudoHuber(), p.InverseGap(), p.Online()
        ),
        shape.small(),
        path=shape.path or p.VE(),
        parameterization=shape.form(p.EDM()),
        **brief(two_step=time_of(shape.path or p.VE(), 0.821)),
    )


def tcm(shape: Shape) -> Recipe:
    """Truncated consistency training: a second stage that learns only the noisy end. Start it from `ect` or `ict`.

    Lee et al. (2024), arXiv:2410.14895: below sigma = 1 the frozen first stage (`--init`) answers; a quarter of the
    batch stands at the boundary, with a tenth of the weight; ln sigma follows a Student t of 0.01 degrees of freedom,
    cut at the boundary. Scaled for minutes on a CPU: the mapping of `ect`'s last stage.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.035 and
    0.037 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 99.4 % and 99.2 %,
    variety 0.78 and 0.86 of the real one.
    """
    from cmtool.training import parts as p

    def at(start: Any) -> Any:
        times = p.Mapped(start, q=16.0, stages=1)
        return p.Consistency(p.Data(), times, p.PseudoHuber(), p.InverseGap(), p.Truncated(1.0))

    return p.Recipe(
        "tcm",
        "consistency",
        p.Mixture(
            (
                p.Part(at(p.LogStudentT(low=1.0)), share=0.75, weight=1.0),
                p.Part(at(p.Fixed(1.0)), share=0.25, weight=0.1),
            )
        ),
        shape.small(),
        path=shape.path or p.VE(),
        parameterization=shape.parameterization or p.EDM(),
        **brief(two_step=time_of(shape.path or p.VE(), 1.0)),
    )


def direct(shape: Shape) -> Recipe:
    """Direct consistency: regression on the end of the teacher's whole trajectory, without a target network.

    Vouitsis et al. (2024), arXiv:2411.08954. The sub-steps run from t to t_min, evenly in the grid's coordinate; they
    and the solver are `--set objective.trajectory.substeps=` and `objective.trajectory.solver=`.

    Measured in one and two steps (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.061 and
    0.022 where two samples of it are 0.024 apart; digits, 300 steps of 128, class agreement 98.5 % and 97.3 %,
    variety 0.87 and 0.93 of the real one.
    """
    from cmtool.training import parts as p

    path, parameterization, rho = student(shape)
    return p.Recipe(
        "direct",
        "consistency",
        p.Consistency(
            p.Teacher(p.Heun(), 9, p.KarrasGrid(rho)),
            p.Landing(p.OnGrid(p.KarrasGrid(rho), p.Constant(18))),
            p.L2(),
            p.KarrasWeight(),
            p.Online(),
        ),
        shape.small(),
        path=path,
        parameterization=parameterization,
        init_from_teacher=True,
        **brief(),
    )


def pd(shape: Shape) -> Recipe:
    """Progressive distillation: two steps of the teacher in one, then the student becomes the teacher.

    Salimans and Ho (2022), arXiv:2202.00512, in the form of Song et al. (2023): DDIM on the Karras grid, clean images
    compared under max(snr, 1). Their stages are 50,000 iterations from 4,096 steps down, the last two twice as long.
    Scaled for minutes on a CPU: 8, 4, 2 and 1 steps. The result is a model of one step; `--set
    objective.times.curriculum.end=2` stops at two.

    Measured in one step (`examples/family.py`, CPU, 2026-11-21, one run): mixture, distance 0.039 where two samples
    of it are 0.024 apart; digits, 300 steps of 128, class agreement 99.5 %, variety 0.77 of the real one.
    """
    from cmtool.training import parts as p

    rho = (shape.path or p.VE()).rho
    return p.Recipe(
        "pd",
        "flow_map",
        p.Consistency(
            p.Predecessor(p.DDIM(), 2, p.KarrasGrid(rho)),
            p.NextGrid(p.Halving(8), p.KarrasGrid(rho)),
            p.L2(),
            p.TruncatedSNR(),
            p.Online(),
            compare_denoised=True,
        ),
        shape.small(),
        path=shape.path or p.VE(),
        parameterization=shape.parameterization or p.EDM(),
        init_from_teacher=True,
        **brief(),
    )


def student(shape: Shape) -> tuple[Any, Any, float]:
    """Path, parameterization and grid spacing of a consistency student that starts as a copy of its teacher.

    A teacher of velocities on `Linear` fulfils f(x, 0) = x already; Karras et al.'s becomes `BoundaryEDM`.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    return path, shape.form(p.BoundaryEDM()), path.rho
