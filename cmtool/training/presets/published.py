"""The recipes of the papers, at their own scale. None was measured here: they take hours to days of GPUs.

A student, and whatever starts from another model (`--init`), has that model's network; published are then dropout,
augmentation and all that is no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cmtool.networks.configs import Config, adm_imagenet64, adm_lsun256, ddpmpp_cifar10, ncsnpp_cifar10
from cmtool.training.presets.consistency import student
from cmtool.training.presets.flows import straight
from cmtool.training.presets.shape import Shape, time_of

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


def edm_cifar10(shape: Shape) -> Recipe:
    """The teacher of Song et al. for CIFAR-10: NCSN++, 56M parameters, mirrored images.

    Song et al. (2023), arXiv:2303.01469, the config of their CIFAR-10 code, after Karras et al. (2022),
    arXiv:2206.00364: batch 512, 400,001 iterations, Adam 1e-3, warm-up over 10M images, dropout 0.13, average with a
    half-life of 0.5M images, without classes. It is what their `cd-cifar10` follows. Not measured here.
    """
    from cmtool.training import parts as p

    return _diffusion(
        "edm-cifar10",
        shape,
        _network(shape, ncsnpp_cifar10, dropout=0.13),
        optimizer=p.Optimizer(rule="adam", lr=1e-3, warmup=10_000_000),
        averages=(p.HalfLife(images=500_000, ramp_up=0.05),),
        iterations=400_001,
        batch=512,
        flip=True,
    )


def edm_cifar10_vp(shape: Shape) -> Recipe:
    """The model of Karras et al. for CIFAR-10: DDPM++, 56M parameters, augmented images.

    Karras et al. (2022), arXiv:2206.00364, the training options of their release (`cifar10-32x32-cond-vp` and
    `-uncond-vp`): batch 512, 200M images, Adam 1e-3, warm-up over 10M images, dropout 0.13, augmentation with
    probability 0.12, average with a half-life of 0.5M images. Published: FID 1.79 with classes, 1.97 without, by Heun's
    solver in 18 steps (35 network calls). ECT starts from it, and so do NVlabs' FastGen's sCM and TCM. Theirs turns
    gradients that are not finite into numbers; here such a training stops. Not measured here.
    """
    from cmtool.training import parts as p

    augment = p.Augment(0.12)
    return _diffusion(
        "edm-cifar10-vp",
        shape,
        _network(shape, ddpmpp_cifar10, dropout=0.13, augment_dim=augment.dim),
        optimizer=p.Optimizer(rule="adam", lr=1e-3, warmup=10_000_000),
        averages=(p.HalfLife(images=500_000, ramp_up=0.05),),
        iterations=390_625,
        batch=512,
        augment=augment,
    )


def edm_imagenet64(shape: Shape) -> Recipe:
    """The teacher of Song et al. for ImageNet at 64x64: ADM, 296M parameters.

    Song et al. (2023), arXiv:2303.01469, their launch script: batch 4096, lr 1e-4, RAdam, dropout 0.1, averages 0.999,
    0.9999 and 0.999943, mirrored images, weight snr + 1 / sigma_data^2, float16; 600,000 iterations (paper, appendix
    C). Not measured here.
    """
    from cmtool.training import parts as p

    return _diffusion(
        "edm-imagenet64",
        shape,
        _network(shape, adm_imagenet64, dropout=0.1),
        noise_scale=250.0,
        optimizer=p.Optimizer(lr=1e-4),
        averages=_openai_averages(),
        iterations=600_000,
        batch=4096,
        flip=True,
    )


def edm_lsun256(shape: Shape) -> Recipe:
    """The teacher of Song et al. for LSUN at 256x256: ADM, 527M parameters.

    Song et al. (2023), arXiv:2303.01469, appendix C: batch 2048 (their launch script: 256), lr 1e-4, RAdam, dropout
    0.1, mirrored images, float16, 600,000 iterations for bedrooms and 300,000 for cats. Not measured here.
    """
    from cmtool.training import parts as p

    return _diffusion(
        "edm-lsun256",
        shape,
        _network(shape, adm_lsun256, dropout=0.1),
        noise_scale=250.0,
        optimizer=p.Optimizer(lr=1e-4),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
        flip=True,
    )


def cd_cifar10(shape: Shape) -> Recipe:
    """Consistency distillation for CIFAR-10 as published: N = 18, LPIPS, online target.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 512, 800,000 iterations, RAdam 4e-4 (2e-4 with the l1
    distance), average 0.9999, no dropout, mirrored images, from their own teacher (`edm-cifar10`). Published, without
    classes: FID 3.55 in one step, 2.93 in two. Not measured here.
    """
    from cmtool.training import parts as p

    return _distilled(
        "cd-cifar10",
        shape,
        _network(shape, ncsnpp_cifar10, dropout=0.0),
        num=18,
        target=p.Online(),
        two_step=0.585348,  # index 11 of 18
        optimizer=p.Optimizer(lr=4e-4),
        averages=(p.Exponential(0.9999),),
        iterations=800_000,
        batch=512,
    )


def cd_imagenet64(shape: Shape) -> Recipe:
    """Consistency distillation for ImageNet at 64x64 as published: N = 40, LPIPS, target average 0.95.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 2048, 600,000 iterations, RAdam 8e-6, average 0.999943, no
    dropout, mirrored images, float16. Published: FID 6.20 in one step, 4.70 in two. Their LPIPS pools by means where
    ours takes maxima. Not measured here.
    """
    from cmtool.training import parts as p

    return _distilled(
        "cd-imagenet64",
        shape,
        _network(shape, adm_imagenet64, dropout=0.0),
        num=40,
        target=p.MovingAverage(0.95),
        noise_scale=250.0,
        two_step=1.382368,  # index 22 of 40
        optimizer=p.Optimizer(lr=8e-6),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
    )


def cd_lsun256(shape: Shape) -> Recipe:
    """Consistency distillation for LSUN at 256x256 as published: N = 40, LPIPS, target average 0.95.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 2048, 600,000 iterations, RAdam 1e-5, average 0.999943, no
    dropout, mirrored images, float16. Published: FID on bedrooms 7.80 in one step, 5.22 in two. Their LPIPS pools by
    means where ours takes maxima. Not measured here.
    """
    from cmtool.training import parts as p

    return _distilled(
        "cd-lsun256",
        shape,
        _network(shape, adm_lsun256, dropout=0.0),
        num=40,
        target=p.MovingAverage(0.95),
        noise_scale=250.0,
        two_step=4.365562,  # index 17 of 40
        optimizer=p.Optimizer(lr=1e-5),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
    )


def ct_cifar10(shape: Shape) -> Recipe:
    """Consistency training for CIFAR-10 as published: N from 2 to 151, LPIPS, mu0 = 0.9.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 512, 800,000 iterations, RAdam 4e-4, average 0.9999, no
    dropout, mirrored images. Published, without classes: FID 8.70 in one step, 5.83 in two. Not measured here.
    """
    from cmtool.training import parts as p

    return _trained(
        "ct-cifar10",
        shape,
        _network(shape, ncsnpp_cifar10, dropout=0.0),
        s1=150,
        mu0=0.9,
        optimizer=p.Optimizer(lr=4e-4),
        averages=(p.Exponential(0.9999),),
        iterations=800_000,
        batch=512,
    )


def ct_imagenet64(shape: Shape) -> Recipe:
    """Consistency training for ImageNet at 64x64 as published: N from 2 to 201, LPIPS, mu0 = 0.95.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 2048, 800,000 iterations, RAdam 8e-6 (their launch script:
    1e-4), average 0.999943, no dropout, mirrored images, float16. Published: FID 13.0 in one step, 11.1 in two. Their
    LPIPS pools by means where ours takes maxima. Not measured here.
    """
    from cmtool.training import parts as p

    return _trained(
        "ct-imagenet64",
        shape,
        _network(shape, adm_imagenet64, dropout=0.0),
        s1=200,
        mu0=0.95,
        noise_scale=250.0,
        two_step=1.912844,  # index 106 of 201
        optimizer=p.Optimizer(lr=8e-6),
        averages=_openai_averages(),
        iterations=800_000,
        batch=2048,
    )


def ct_lsun256(shape: Shape) -> Recipe:
    """Consistency training for LSUN at 256x256 as published: N from 2 to 151, LPIPS, mu0 = 0.95.

    Song et al. (2023), arXiv:2303.01469, table 3: batch 2048 (their launch script: 256), 1,000,000 iterations, RAdam
    1e-5 (launch script: 5e-5), average 0.999943, no dropout, mirrored images, float16. Published: FID on bedrooms 16.0
    in one step, 7.85 in two. Their LPIPS pools by means where ours takes maxima. Not measured here.
    """
    from cmtool.training import parts as p

    return _trained(
        "ct-lsun256",
        shape,
        _network(shape, adm_lsun256, dropout=0.0),
        s1=150,
        mu0=0.95,
        noise_scale=250.0,
        two_step=3.991219,  # index 67 of 151
        optimizer=p.Optimizer(lr=1e-5),
        averages=_openai_averages(),
        iterations=1_000_000,
        batch=2048,
    )


def ict_cifar10(shape: Shape) -> Recipe:
    """Improved consistency training for CIFAR-10: NCSN++, N doubling from 11 to 1281, Pseudo-Huber.

    Song and Dhariwal (2023), arXiv:2310.14189: ln sigma ~ N(-1.1, 2^2) on the grid, c = 0.00054 sqrt(d), weight
    1 / (t - r), an online target that drops the same units, noise features of scale 0.02 instead of 16, which here is a
    time input 800 times smaller. Uncertain, as we could not check them against the paper: batch 1,024, 400,000
    iterations, RAdam 1e-4, average 0.99993, dropout 0.3, mirrored images, and the published FID, without classes, of
    2.83 in one step and 2.46 in two. With a network of twice the depth: 2.51 and 2.24. The second time point is ECT's.
    Not measured here.
    """
    from cmtool.training import parts as p

    return _improved(
        "ict-cifar10",
        shape,
        _network(shape, ncsnpp_cifar10, dropout=0.3),
        noise_scale=0.25 * 0.02 / 16,
        two_step=0.821,
        averages=(p.Exponential(0.99993),),
        iterations=400_000,
        batch=1024,
    )


def ict_imagenet64(shape: Shape) -> Recipe:
    """Improved consistency training for ImageNet at 64x64: ADM, N doubling from 11 to 1281, Pseudo-Huber.

    Song and Dhariwal (2023), arXiv:2310.14189: as `ict-cifar10`, but for the time input. Uncertain, as we could not
    check them against the paper: batch 4,096, 800,000 iterations, RAdam 1e-4, average 0.99997, dropout 0.2, mirrored
    images, and the published FID of 4.02 in one step and 3.20 in two. With a network of twice the depth: 3.25 and 2.77.
    The second time point is ECT's. Not measured here.
    """
    from cmtool.training import parts as p

    return _improved(
        "ict-imagenet64",
        shape,
        _network(shape, adm_imagenet64, dropout=0.2),
        noise_scale=250.0,
        two_step=1.526,
        averages=(p.Exponential(0.99997),),
        iterations=800_000,
        batch=4096,
    )


def ect_cifar10(shape: Shape) -> Recipe:
    """Easy consistency tuning for CIFAR-10 as released, in eight stages from `edm-cifar10-vp`.

    Geng et al. (2024), arXiv:2406.14548, their script: DDPM++ from Karras et al.'s model (`--init`), batch 128, 200,000
    iterations, RAdam 1e-4, dropout 0.2, average 0.9999, the plain norm over t - r, images neither mirrored nor
    augmented, float32. Published, without classes: FID 3.86 in one step, 2.15 in two; after 100,000 iterations 4.54 and
    2.15, after 400,000 3.60 and 2.11. Theirs compares with the data itself where r reaches 0, and samples with another
    f than it trains; here r stops at t_min, where f is x. Not measured here.
    """
    from cmtool.training import parts as p

    return _tuned("ect-cifar10", shape, averages=(p.Exponential(0.9999),), iterations=200_000)


def ect_cifar10_fast(shape: Shape) -> Recipe:
    """Easy consistency tuning for CIFAR-10 in an hour of a GPU, in one stage from `edm-cifar10-vp`.

    Geng et al. (2024), arXiv:2406.14548, their script of that name: as `ect-cifar10`, with q = 256, so r = 255 / 256 t
    and less from the start, and average 0.9993. 8,000 iterations are those of NVlabs' FastGen; the script itself is
    stopped by hand. Not measured here.
    """
    from cmtool.training import parts as p

    return _tuned("ect-cifar10-fast", shape, q=256.0, stages=1, averages=(p.Exponential(0.9993),), iterations=8_000)


def tcm_cifar10(shape: Shape) -> Recipe:
    """Truncated consistency training for CIFAR-10, the second stage, from `ect-cifar10` or another first one.

    Lee et al. (2024), arXiv:2410.14895, as in NVlabs' FastGen: truncation at sigma = 1, a quarter of the batch there
    with a tenth of the weight, ln sigma from a Student t of 0.01 degrees of freedom, batch 1,024, 300,000 iterations,
    RAdam 5e-5, dropout 0.2, averages 0.9999, 0.99995 and 0.9996, images neither mirrored nor augmented. Published,
    without classes: FID 2.46 in one step; FastGen: 2.70. Theirs reaches r = 0.999 t and less by stages, in 9M of 307M
    images; here it is so from the start. Not measured here.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()

    def at(start: Any) -> Any:
        times = p.Mapped(start, q=1000.0, stages=1)
        return p.Consistency(p.Data(), times, p.PseudoHuber(_PLAIN_NORM), p.InverseGap(), p.Truncated(1.0))

    parts = (
        p.Part(at(p.LogStudentT(df=0.01, loc=0.0, scale=0.2, low=1.0)), share=0.75, weight=1.0),
        p.Part(at(p.Fixed(1.0)), share=0.25, weight=0.1),
    )
    return p.Recipe(
        "tcm-cifar10",
        "consistency",
        p.Mixture(parts),
        _network(shape, ddpmpp_cifar10, dropout=0.2),
        path=path,
        parameterization=shape.parameterization or p.EDM(),
        optimizer=p.Optimizer(lr=5e-5),
        averages=(p.Exponential(0.9999), p.Exponential(0.99995), p.Exponential(0.9996)),
        iterations=300_000,
        batch=1024,
        two_step=time_of(path, 1.0),
    )


def pd_cifar10(shape: Shape) -> Recipe:
    """Progressive distillation for CIFAR-10 as in Song et al.: from 4,096 steps to one.

    Salimans and Ho (2022), arXiv:2202.00512, in the form of Song et al. (2023), arXiv:2303.01469, the config of their
    CIFAR-10 code: 50,000 iterations a stage, 100,000 for each of the last two, batch 512, Adam 5e-5, gradients of norm
    1 at most, squared l2 under max(snr, 1), no dropout, no average, mirrored images. Published, without classes: FID
    8.34 in one step, 5.58 in two. Theirs lowers the learning rate along a line to 0 in each stage, here along a cosine.
    The result is the model of one step; for that of two, `--set objective.times.curriculum.end=2 --iterations 650000`.
    Not measured here.
    """
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    return p.Recipe(
        "pd-cifar10",
        "flow_map",
        p.Consistency(
            p.Predecessor(p.DDIM(), 2, p.KarrasGrid(path.rho)),
            p.NextGrid(p.Halving(4096), p.KarrasGrid(path.rho)),
            p.L2(),
            p.TruncatedSNR(),
            p.Online(),
            compare_denoised=True,
        ),
        _network(shape, ncsnpp_cifar10, dropout=0.0),
        path=path,
        parameterization=shape.parameterization or p.EDM(),
        init_from_teacher=True,
        optimizer=p.Optimizer(rule="adam", lr=5e-5, final=0.0, clip_norm=1.0),
        averages=(p.Exponential(0.0),),
        iterations=750_000,
        batch=512,
        flip=True,
    )


def scd_cifar10(shape: Shape) -> Recipe:
    """Simplified continuous-time consistency distillation for CIFAR-10, from any teacher.

    Lu and Song (2024), arXiv:2410.11081, appendix G: batch 512, 400,000 iterations, RAdam 1e-4 with betas 0.9 and 0.99,
    ln(sigma_data tan t) ~ N(-1, 1.4^2), tangents normalised with c = 0.1 and warmed up over 10,000 iterations, no
    dropout, average with a half-life of 0.5M images, float32. Published, without classes: FID 3.66 in one step, 2.52 in
    two, from a TrigFlow teacher of FID 2.15. Theirs has double normalisation in DDPM++ and divides tangents by their
    norm, here by its root mean square. Images are neither mirrored nor augmented, as in NVlabs' FastGen; the paper's
    choice is not known to us. Not measured here.
    """
    from cmtool.training import parts as p

    return _simplified("scd-cifar10", shape, p.Teacher(), dropout=0.0, init=not shape.keeps_form)


def sct_cifar10(shape: Shape) -> Recipe:
    """Simplified continuous-time consistency training for CIFAR-10, from `edm-cifar10-vp`.

    Lu and Song (2024), arXiv:2410.11081, appendix G: as `scd-cifar10`, with dropout 0.2 and the velocity of the data.
    Published, without classes: FID 2.85 in one step, 2.06 in two. NVlabs' FastGen, from Karras et al.'s model
    (`--init`): 3.23 in one step after 350,000 iterations, with times up to sigma = 800. The network and the norm differ
    from theirs as in `scd-cifar10`. Not measured here.
    """
    from cmtool.training import parts as p

    return _simplified("sct-cifar10", shape, p.Data(), dropout=0.2)


def cd_continuous_cifar10(shape: Shape) -> Recipe:
    """Continuous-time consistency distillation for CIFAR-10: LPIPS, with stop-gradient.

    Song et al. (2023), arXiv:2303.01469, appendix B, theorem 5, the config of their CIFAR-10 code: batch 512, 800,000
    iterations at most, RAdam 5e-6, dropout 0.3 (left in by the config; the paper's table 3 has none), average 0.9999,
    t^(1/7) uniform, weight 1, mirrored images. Without stop-gradient (`--set objective.stop_gradient=false`, squared
    l2 or l1) the learning rate is 1e-3. Published: stop-gradient is better, LPIPS best, and discrete distillation
    better still. The released l2 without stop-gradient takes the root of the square; here it is the square of theorem
    3. Not measured here.
    """
    from cmtool.training import parts as p

    return _continuous("cd-continuous-cifar10", shape, p.Teacher(), init=True)


def ct_continuous_cifar10(shape: Shape) -> Recipe:
    """Continuous-time consistency training for CIFAR-10: LPIPS, from `edm-cifar10`.

    Song et al. (2023), arXiv:2303.01469, appendix B, theorem 6: as `cd-continuous-cifar10`, with the velocity of the
    data. Published: the start from a diffusion model (`--init`) matters, and this is better than discrete training
    from it. Not measured here.
    """
    from cmtool.training import parts as p

    return _continuous("ct-continuous-cifar10", shape, p.Data())


def meanflow_cifar10(shape: Shape) -> Recipe:
    """MeanFlow for CIFAR-10: three quarters of the batch off the diagonal, t and s of different laws, augmented images.

    Geng et al. (2025), arXiv:2505.13447, as improved in their PyTorch release and repeated in NVlabs' FastGen: t and s
    logit-normal of (-0.6, 1.6) and (-4, 1.6), sorted; losses balanced by (loss + c)^-0.75; batch 1,024, Adam 6e-4 with
    a warm-up over 10M images, dropout 0.2, mirrored images augmented with probability 0.12 but not turned over or
    rotated, averages 0.9999, 0.99995 and 0.9996; 1,000,000 iterations (FastGen; the release: 800,000). Published,
    without classes: FID 2.92 in one step; the release: 2.80, FastGen: 2.82. Theirs tells the network t and t - s by the
    same features; here the gap has its own. Derivatives are float32 whatever `--precision` is. Not measured here.
    """
    from cmtool.training import parts as p

    path, parameterization = straight(shape)
    augment = p.Augment(0.12, yflip=0.0, rotate_frac=0.0)
    published = {"channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1)} if shape.network is None else {}
    return p.Recipe(
        "meanflow-cifar10",
        "flow_map",
        p.Tangent(
            p.Data(),
            p.Pair(p.LogNormal(-0.6, 1.6), p.LogNormal(-4.0, 1.6), diagonal=0.25),
            balance=p.Adaptive(power=0.75, c=1e-3 / (shape.channels * shape.resolution**2)),
        ),
        _network(shape, ddpmpp_cifar10, dropout=0.2, augment_dim=augment.dim, two_times=True, **published),
        path=path,
        parameterization=parameterization,
        optimizer=p.Optimizer(rule="adam", lr=6e-4, warmup=10_000_000),
        averages=(p.Exponential(0.9999), p.Exponential(0.99995), p.Exponential(0.9996)),
        iterations=1_000_000,
        batch=1024,
        flip=True,
        augment=augment,
    )


# What several of them share.

_PLAIN_NORM = 1e-8  # c of a Pseudo-Huber distance that is the norm, but for a gradient at 0


def _network(shape: Shape, size: Callable[[int, int, int], Config], dropout: float, **changes: Any) -> Config:
    """The network of the model to start from, else the published one; in both with this dropout and these changes.

    The published ones for CIFAR-10 take an augmentation vector, which is left out where nothing is augmented.
    """
    network: Any = shape.network
    if network is None:
        network = size(shape.resolution, shape.channels, shape.num_classes)
        changes = {"augment_dim": 0, **changes}
    known = {field.name for field in fields(network)}
    made: Config = replace(network, dropout=dropout, **{name: changes[name] for name in changes if name in known})
    return made


def _student(shape: Shape, noise_scale: float = 0.25) -> tuple[Any, Any, float]:
    """`student`, told `noise_scale` ln sigma where there is no model to start from."""
    from cmtool.training import parts as p

    if shape.parameterization is None:
        shape = replace(shape, parameterization=p.EDM(time_input=p.LogRatio(noise_scale)))
    return student(shape)


def _openai_averages() -> tuple[Any, ...]:
    """The first is exported: a half-life of 50M images at batch 4096."""
    from cmtool.training import parts as p

    return (p.Exponential(0.9999432189950708), p.Exponential(0.9999), p.Exponential(0.999))


def _diffusion(name: str, shape: Shape, network: Config, *, noise_scale: float = 0.25, **rest: Any) -> Recipe:
    from cmtool.training import parts as p

    told = shape.told(p.EDM(time_input=p.LogRatio(noise_scale)))
    return p.Recipe(
        name,
        "denoiser",
        p.Denoising(p.LogNormal(-1.2, 1.2), p.L2(), p.KarrasWeight()),
        network,
        path=shape.path or p.VE(),
        parameterization=shape.parameterization if shape.keeps_form else told,
        **rest,
    )


def _distilled(
    name: str,
    shape: Shape,
    network: Config,
    *,
    num: int,
    target: Any,
    two_step: float,
    noise_scale: float = 0.25,
    **rest: Any,
) -> Recipe:
    from cmtool.training import parts as p

    path, parameterization, rho = _student(shape, noise_scale)
    grid = p.KarrasGrid(rho)
    times = p.Adjacent(grid, p.Constant(num))
    return p.Recipe(
        name,
        "consistency",
        p.Consistency(p.Teacher(grid=grid), times, p.LPIPS(), p.Uniform(), target),
        network,
        path=path,
        parameterization=parameterization,
        init_from_teacher=True,
        flip=True,
        two_step=time_of(path, two_step),
        **rest,
    )


def _trained(
    name: str,
    shape: Shape,
    network: Config,
    *,
    s1: int,
    mu0: float,
    two_step: float | None = None,
    noise_scale: float = 0.25,
    **rest: Any,
) -> Recipe:
    from cmtool.training import parts as p

    path, parameterization, rho = _student(shape, noise_scale)
    times = p.Adjacent(p.KarrasGrid(rho), p.Progressive(s0=2, s1=s1))
    return p.Recipe(
        name,
        "consistency",
        p.Consistency(p.Data(), times, p.LPIPS(), p.Uniform(), p.AdaptiveAverage(mu0)),
        network,
        path=path,
        parameterization=parameterization,
        flip=True,
        two_step=None if two_step is None else time_of(path, two_step),
        **rest,
    )


def _improved(name: str, shape: Shape, network: Config, *, noise_scale: float, two_step: float, **rest: Any) -> Recipe:
    from cmtool.training import parts as p

    path, parameterization, rho = _student(shape, noise_scale)
    times = p.Adjacent(p.KarrasGrid(rho), p.Doubling(s0=10, s1=1280), p.LogNormalIndex(-1.1, 2.0))
    return p.Recipe(
        name,
        "consistency",
        p.Consistency(p.Data(), times, p.PseudoHuber(), p.InverseGap(), p.Online()),
        network,
        path=path,
        parameterization=parameterization,
        optimizer=p.Optimizer(lr=1e-4),
        flip=True,
        two_step=time_of(path, two_step),
        **rest,
    )


def _tuned(name: str, shape: Shape, *, q: float = 2.0, stages: int = 8, **rest: Any) -> Recipe:
    from cmtool.training import parts as p

    path = shape.path or p.VE()
    times = p.Mapped(p.LogNormal(-1.1, 2.0), q=q, k=8.0, b=1.0, stages=stages)
    return p.Recipe(
        name,
        "consistency",
        p.Consistency(p.Data(), times, p.PseudoHuber(_PLAIN_NORM), p.InverseGap(), p.Online()),
        _network(shape, ddpmpp_cifar10, dropout=0.2),
        path=path,
        parameterization=shape.parameterization or p.EDM(),
        optimizer=p.Optimizer(lr=1e-4),
        batch=128,
        two_step=time_of(path, 0.821),
        **rest,
    )


def _simplified(name: str, shape: Shape, trajectory: Any, *, dropout: float, init: bool = False) -> Recipe:
    from cmtool.training import parts as p

    return p.Recipe(
        name,
        "consistency",
        p.Tangent(
            trajectory,
            p.Tangential(p.LogNormal(-1.0, 1.4)),
            scale=p.Alpha(),
            limit=p.Normalised(0.1),
            warmup=10_000 / 400_000,
            weight=p.InverseRatio(),
            balance=p.Learned(),
        ),
        _network(shape, ddpmpp_cifar10, dropout=dropout),
        path=shape.ends(p.Trig()),
        parameterization=shape.told(p.EDM(time_input=p.PathTime())),
        init_from_teacher=init,
        optimizer=p.Optimizer(lr=1e-4, betas=(0.9, 0.99)),
        averages=(p.HalfLife(images=500_000, ramp_up=0.05),),
        iterations=400_000,
        batch=512,
        two_step=1.1,
    )


def _continuous(name: str, shape: Shape, trajectory: Any, *, init: bool = False) -> Recipe:
    from cmtool.training import parts as p

    path, parameterization, rho = _student(shape)
    times = p.Tangential(p.RhoUniform(p.KarrasGrid(rho)))
    return p.Recipe(
        name,
        "consistency",
        p.Continuous(trajectory, times, p.LPIPS(), p.Uniform(), stop_gradient=True),
        _network(shape, ncsnpp_cifar10, dropout=0.3),
        path=path,
        parameterization=parameterization,
        init_from_teacher=init,
        optimizer=p.Optimizer(lr=5e-6),
        averages=(p.Exponential(0.9999),),
        iterations=800_000,
        batch=512,
        flip=True,
    )
