"""The recipes of the papers, at their own scale. None was measured here: they take days of GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cmtool.errors import ConfigError
from cmtool.networks.configs import Config
from cmtool.training.presets.shape import Shape

if TYPE_CHECKING:
    from cmtool.training.recipe import Recipe


def edm_cifar10(shape: Shape) -> Recipe:
    """The teacher of Karras et al. for CIFAR-10: NCSN++, 56M parameters.

    Published (Song et al. 2023, config of their CIFAR-10 code): batch 512, 400,001 iterations, Adam 1e-3, warm-up over
    10M images, dropout 0.13, average with a half-life of 0.5M images, mirrored images. Not measured here:
    it takes days of a GPU.
    """
    from cmtool.networks.configs import ncsnpp_cifar10
    from cmtool.training.average import HalfLife
    from cmtool.training.recipe import Optimizer

    return _edm(
        "edm-cifar10",
        replace(ncsnpp_cifar10(shape.resolution, shape.channels, shape.num_classes), augment_dim=0),
        optimizer=Optimizer(rule="adam", lr=1e-3, warmup=10_000_000),
        averages=(HalfLife(images=500_000, ramp_up=0.05),),
        iterations=400_001,
        batch=512,
        flip=True,
    )


def edm_imagenet64(shape: Shape) -> Recipe:
    """The teacher of Song et al. for ImageNet at 64x64: ADM, 296M parameters.

    Published (their launch script): batch 4096, lr 1e-4, RAdam, dropout 0.1, averages 0.999, 0.9999 and 0.999943,
    mirrored images, weight snr + 1 / sigma_data^2; 600,000 iterations (paper, appendix C). Not measured here.
    """
    from cmtool.networks.configs import adm_imagenet64
    from cmtool.training.recipe import Optimizer

    return _edm(
        "edm-imagenet64",
        replace(adm_imagenet64(shape.resolution, shape.channels, shape.num_classes), dropout=0.1),
        optimizer=Optimizer(lr=1e-4),
        averages=_openai_averages(),
        iterations=600_000,
        batch=4096,
        flip=True,
        noise_scale=250.0,
    )


def edm_lsun256(shape: Shape) -> Recipe:
    """The teacher of Song et al. for LSUN at 256x256: ADM, 527M parameters.

    Published (paper, appendix C): batch 2048 (their launch script: 256), lr 1e-4, RAdam, dropout 0.1, 600,000
    iterations for bedrooms and 300,000 for cats. Not measured here.
    """
    from cmtool.networks.configs import adm_lsun256
    from cmtool.training.recipe import Optimizer

    return _edm(
        "edm-lsun256",
        replace(adm_lsun256(shape.resolution, shape.channels, shape.num_classes), dropout=0.1),
        optimizer=Optimizer(lr=1e-4),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
        flip=True,
        noise_scale=250.0,
    )


def cd_cifar10(shape: Shape) -> Recipe:
    """Consistency distillation for CIFAR-10 as published: N = 18, LPIPS, online target.

    Song et al. (2023), table 3: batch 512, 800,000 iterations, RAdam 4e-4 (2e-4 with the l1 distance), average 0.9999,
    no dropout, mirrored images. Published FID 3.55 in one step, 2.93 in two. Not measured here.
    """
    from cmtool.networks.configs import ncsnpp_cifar10
    from cmtool.training.average import Exponential
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer
    from cmtool.training.targets import Online

    network = ncsnpp_cifar10(shape.resolution, shape.channels, shape.num_classes)
    return _cd(
        "cd-cifar10",
        shape,
        shape.network or replace(network, augment_dim=0, dropout=0.0),
        num=18,
        target=Online(),
        distance=LPIPS(),
        optimizer=Optimizer(lr=4e-4),
        averages=(Exponential(0.9999),),
        iterations=800_000,
        batch=512,
        flip=True,
        two_step=0.585348,  # index 11 of 18
    )


def cd_imagenet64(shape: Shape) -> Recipe:
    """Consistency distillation for ImageNet at 64x64 as published: N = 40, LPIPS, target average 0.95.

    Song et al. (2023), table 3: batch 2048, 600,000 iterations, RAdam 8e-6, average 0.999943, no dropout, mirrored
    images. Published FID 6.20 in one step, 4.70 in two. Not measured here.
    """
    from cmtool.networks.configs import adm_imagenet64
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer
    from cmtool.training.targets import MovingAverage

    return _cd(
        "cd-imagenet64",
        shape,
        shape.network or adm_imagenet64(shape.resolution, shape.channels, shape.num_classes),
        num=40,
        target=MovingAverage(0.95),
        distance=LPIPS(),
        optimizer=Optimizer(lr=8e-6),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
        flip=True,
        noise_scale=250.0,
        two_step=1.382368,  # index 22 of 40
    )


def cd_lsun256(shape: Shape) -> Recipe:
    """Consistency distillation for LSUN at 256x256 as published: N = 40, LPIPS, target average 0.95.

    Song et al. (2023), table 3: batch 2048, 600,000 iterations, RAdam 1e-5, average 0.999943, no dropout, mirrored
    images. Published FID on bedrooms 7.80 in one step, 5.22 in two. Not measured here.
    """
    from cmtool.networks.configs import adm_lsun256
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer
    from cmtool.training.targets import MovingAverage

    return _cd(
        "cd-lsun256",
        shape,
        shape.network or adm_lsun256(shape.resolution, shape.channels, shape.num_classes),
        num=40,
        target=MovingAverage(0.95),
        distance=LPIPS(),
        optimizer=Optimizer(lr=1e-5),
        averages=_openai_averages(),
        iterations=600_000,
        batch=2048,
        flip=True,
        noise_scale=250.0,
        two_step=4.365562,  # index 17 of 40
    )


def ct_cifar10(shape: Shape) -> Recipe:
    """Consistency training for CIFAR-10 as published: N from 2 to 151, LPIPS, mu0 = 0.9.

    Song et al. (2023), table 3: batch 512, 800,000 iterations, RAdam 4e-4, average 0.9999, no dropout, mirrored images.
    Published FID 8.70 in one step, 5.83 in two. Not measured here.
    """
    from cmtool.networks.configs import ncsnpp_cifar10
    from cmtool.training.average import Exponential
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer

    network = ncsnpp_cifar10(shape.resolution, shape.channels, shape.num_classes)
    return _ct(
        "ct-cifar10",
        replace(network, augment_dim=0, dropout=0.0),
        s1=150,
        mu0=0.9,
        distance=LPIPS(),
        optimizer=Optimizer(lr=4e-4),
        averages=(Exponential(0.9999),),
        iterations=800_000,
        batch=512,
        flip=True,
    )


def ct_imagenet64(shape: Shape) -> Recipe:
    """Consistency training for ImageNet at 64x64 as published: N from 2 to 201, LPIPS, mu0 = 0.95.

    Song et al. (2023), table 3: batch 2048, 800,000 iterations, RAdam 8e-6 (their launch script: 1e-4), average
    0.999943, no dropout, mirrored images. Published FID 13.0 in one step, 11.1 in two. Not measured here.
    """
    from cmtool.networks.configs import adm_imagenet64
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer

    return _ct(
        "ct-imagenet64",
        adm_imagenet64(shape.resolution, shape.channels, shape.num_classes),
        s1=200,
        mu0=0.95,
        distance=LPIPS(),
        optimizer=Optimizer(lr=8e-6),
        averages=_openai_averages(),
        iterations=800_000,
        batch=2048,
        flip=True,
        noise_scale=250.0,
        two_step=1.912844,  # index 106 of 201
    )


def ct_lsun256(shape: Shape) -> Recipe:
    """Consistency training for LSUN at 256x256 as published: N from 2 to 151, LPIPS, mu0 = 0.95.

    Song et al. (2023), table 3: batch 2048 (their launch script: 256), 1,000,000 iterations, RAdam 1e-5 (launch script:
    5e-5), average 0.999943, no dropout, mirrored images. Published FID on bedrooms 16.0 in one step, 7.85 in two. Not
    measured here.
    """
    from cmtool.networks.configs import adm_lsun256
    from cmtool.training.distances import LPIPS
    from cmtool.training.recipe import Optimizer

    return _ct(
        "ct-lsun256",
        adm_lsun256(shape.resolution, shape.channels, shape.num_classes),
        s1=150,
        mu0=0.95,
        distance=LPIPS(),
        optimizer=Optimizer(lr=1e-5),
        averages=_openai_averages(),
        iterations=1_000_000,
        batch=2048,
        flip=True,
        noise_scale=250.0,
        two_step=3.991219,  # index 67 of 151
    )


def _edm(name: str, network: Config, *, times: Any = None, noise_scale: float = 0.25, **rest: Any) -> Recipe:
    from cmtool.flow.parameterization import EDM, LogRatio
    from cmtool.times import LogNormal
    from cmtool.training.objectives import Denoising
    from cmtool.training.recipe import Recipe

    parameterization = EDM(time_input=LogRatio(noise_scale))
    objective = Denoising(times or LogNormal())
    return Recipe(name, "denoiser", objective, network, parameterization=parameterization, **rest)


def _cd(
    name: str,
    shape: Shape,
    network: Config,
    *,
    num: int,
    target: Any,
    distance: Any,
    weight: Any = None,
    noise_scale: float = 0.25,
    **rest: Any,
) -> Recipe:
    from cmtool.flow.parameterization import EDM, BoundaryEDM, LogRatio
    from cmtool.flow.path import VE
    from cmtool.times import Adjacent, Constant
    from cmtool.training.objectives import Consistency
    from cmtool.training.recipe import Recipe
    from cmtool.training.trajectory import Teacher
    from cmtool.training.weights import Uniform

    times = Adjacent(curriculum=Constant(num))
    objective = Consistency(Teacher(), times, distance, weight or Uniform(), target)
    # The student starts as a copy of the teacher's network, so its inputs must mean what they meant to the teacher.
    told = shape.parameterization or BoundaryEDM(time_input=LogRatio(noise_scale))
    if not isinstance(told, EDM):
        raise ConfigError(
            f"the preset {name} follows a teacher of EDM's parameterization, and this one has {told.kind}",
            "use a teacher trained with --preset edm",
        )
    parameterization = BoundaryEDM(told.sigma_data, told.time_input)
    return Recipe(
        name,
        "consistency",
        objective,
        network,
        path=shape.path or VE(),
        parameterization=parameterization,
        init_from_teacher=True,
        **rest,
    )


def _ct(
    name: str,
    network: Config,
    *,
    s1: int,
    mu0: float,
    distance: Any,
    weight: Any = None,
    noise_scale: float = 0.25,
    **rest: Any,
) -> Recipe:
    from cmtool.flow.parameterization import BoundaryEDM, LogRatio
    from cmtool.times import Adjacent, Progressive
    from cmtool.training.objectives import Consistency
    from cmtool.training.recipe import Recipe
    from cmtool.training.targets import AdaptiveAverage
    from cmtool.training.trajectory import Data
    from cmtool.training.weights import Uniform

    times = Adjacent(curriculum=Progressive(s0=2, s1=s1))
    objective = Consistency(Data(), times, distance, weight or Uniform(), AdaptiveAverage(mu0))
    parameterization = BoundaryEDM(time_input=LogRatio(noise_scale))
    return Recipe(name, "consistency", objective, network, parameterization=parameterization, **rest)


def _openai_averages() -> tuple[Any, ...]:
    from cmtool.training.average import Exponential

    # The last is a half-life of 50M images at batch 4096; the first of the list is what is exported.
    return (Exponential(0.9999432189950708), Exponential(0.9999), Exponential(0.999))
