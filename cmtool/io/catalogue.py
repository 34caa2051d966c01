"""Checkpoints that others have released: what each is, where it lies, under which licence, how it is sampled.

A table and no more: nothing here opens a file or imports torch. `cmtool.io.origins` downloads what it names.

Sources: the READMEs of openai/consistency_models, openai/consistency_models_cifar10, NVlabs/edm and NVlabs/edm2 (names,
addresses, licences), their launch scripts, notebook and presets (times and solvers). Their publishers give neither
sizes nor checksums: sizes here are estimates, and a checksum is recorded at the first download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from cmtool.errors import nearest
from cmtool.io.box import BOXED

if TYPE_CHECKING:
    from cmtool.flow.flow_map import Role

Family = Literal["openai", "edm", "edm2", "jcm"]
Method = Literal["edm", "cd", "ct"]

_OPENAI = "https://openaipublic.blob.core.windows.net/consistency/"
_JCM = f"{_OPENAI}jcm_checkpoints/"
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
_EDM2 = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
_NON_COMMERCIAL = "CC-BY-NC-SA-4.0"


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    Args:
        name: what users write.
        title: what it is, in a few words.
        family: whose code made it, and with it the format: "openai", "edm", "edm2" or "jcm" (OpenAI's JAX code).
        url, file: where it is downloaded from, and the file's name in the cache.
        method: "edm" (a denoiser), "cd" (consistency distillation) or "ct" (consistency training).
        data, resolution, num_classes: what it was trained on; images are RGB, no classes means unconditional.
        licence: of the weights, as SPDX writes it.
        parameters: how many the network has; to three digits where this package does not build it.
        bytes_per_parameter: what the file holds for each: 4 are float32 weights, 2 float16 ones, 16 and 20 a training
            state with averages, moments of the optimizer and perhaps a target.
        grid_points: N of the grid that it was trained or is sampled on, from 80 down to 0.002 with rho 7.
        times: published time points for sampling in as many steps, as indices of that grid; empty where none are.
        solver: options of `cmtool sample` for a denoiser, as published.
        size: bytes, where they are known for certain.
        sha256: checksum, where it is known from a source to be trusted.
    """

    name: str
    title: str
    family: Family
    url: str
    file: str
    method: Method
    data: str
    resolution: int
    num_classes: int
    licence: str
    parameters: int
    bytes_per_parameter: int
    grid_points: int
    times: tuple[int, ...] = ()
    solver: str = ""
    size: int | None = None
    sha256: str | None = None

    @property
    def role(self) -> Role:
        """What the model was trained to do."""
        return "denoiser" if self.method == "edm" else "consistency"

    @property
    def estimated_size(self) -> int:
        """Bytes of the file, from the number of parameters."""
        return self.parameters * self.bytes_per_parameter

    def sigmas(self) -> tuple[float, ...]:
        """The recommended times as noise levels; empty where none are published.

        Points of `times.Karras` on the path `VE`, computed here so that a listing need not import torch.
        """
        top, bottom, last = 80.0 ** (1 / 7), 0.002 ** (1 / 7), self.grid_points - 1
        return tuple(80.0 if index == 0 else (top + index / last * (bottom - top)) ** 7 for index in self.times)


def _openai() -> Iterator[Released]:
    """ADM networks of the consistency models paper, arXiv:2303.01469."""
    published = {  # time points of two-step sampling in scripts/launch.sh; there are none for cd_cat256
        "cd_imagenet64_l2": (0, 22),
        "cd_imagenet64_lpips": (0, 22),
        "ct_imagenet64": (0, 106),
        "cd_bedroom256_l2": (0, 18),
        "cd_bedroom256_lpips": (0, 17),
        "ct_bedroom256": (0, 67),
        "ct_cat256": (0, 62),
    }
    methods: dict[str, tuple[Method, str]] = {
        "edm_{}_ema": ("edm", "EDM denoiser"),
        "cd_{}_l2": ("cd", "consistency distillation, l2"),
        "cd_{}_lpips": ("cd", "consistency distillation, LPIPS"),
        "ct_{}": ("ct", "consistency training, LPIPS"),
    }
    for data in ("imagenet64", "bedroom256", "cat256"):
        small = data == "imagenet64"
        for pattern, (method, title) in methods.items():
            name = pattern.format(data)
            yield Released(
                name=name,
                title=title,
                family="openai",
                url=f"{_OPENAI}{name}.pt",
                file=f"{name}.pt",
                method=method,
                data=data,
                resolution=64 if small else 256,
                num_classes=1000 if small else 0,
                licence="MIT",
                parameters=295_899_267 if small else 526_304_771,
                bytes_per_parameter=4,
                grid_points=40 if method != "ct" else 201 if small else 151,
                times=published.get(name, ()),
                solver="--solver heun --steps 40" if method == "edm" else "",
            )


def _edm() -> Iterator[Released]:
    """Networks of the EDM paper, arXiv:2206.00364; vp is DDPM++, ve is NCSN++."""
    cifar, small = "--solver heun --steps 18", "--solver heun --steps 40"
    for name, parameters, solver in (
        ("cifar10-32x32-cond-vp", 55_735_299, cifar),
        ("cifar10-32x32-cond-ve", 56_400_643, cifar),
        ("cifar10-32x32-uncond-vp", 55_733_891, cifar),
        ("cifar10-32x32-uncond-ve", 56_397_827, cifar),
        ("ffhq-64x64-uncond-vp", 61_805_571, small),
        ("ffhq-64x64-uncond-ve", 62_761_091, small),
        ("afhqv2-64x64-uncond-vp", 61_805_571, small),
        ("afhqv2-64x64-uncond-ve", 62_761_091, small),
        ("imagenet-64x64-cond-adm", 295_899_267, "--solver heun --steps 256 --churn 40,0.05,50,1.003"),
    ):
        data, size, condition, network = name.split("-")
        title = {"vp": "EDM denoiser, DDPM++", "ve": "EDM denoiser, NCSN++", "adm": "EDM denoiser, ADM"}[network]
        classes = 0 if condition == "uncond" else 10 if data == "cifar10" else 1000
        yield Released(
            name=f"edm-{name}",
            title=title + (", with classes" if classes else ""),
            family="edm",
            url=f"{_EDM}edm-{name}.pkl",
            file=f"edm-{name}.pkl",
            method="edm",
            data={"cifar10": "cifar10", "ffhq": "ffhq64", "afhqv2": "afhqv2-64", "imagenet": "imagenet64"}[data],
            resolution=int(size.split("x")[0]),
            num_classes=classes,
            licence=_NON_COMMERCIAL,
            parameters=parameters,
            bytes_per_parameter=4,
            grid_points=int(solver.split()[3]),
            solver=solver,
        )


def _edm2() -> Iterator[Released]:
    """EDM2 networks of pixels, arXiv:2312.02696, and those of its autoguidance, arXiv:2406.02507."""
    millions = {"xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119}
    for name, file, title in (
        ("s-fid", "s-1073741-0.075", "EDM2-S denoiser, best FID"),
        ("m-fid", "m-2147483-0.060", "EDM2-M denoiser, best FID"),
        ("l-fid", "l-1073741-0.040", "EDM2-L denoiser, best FID"),
        ("xl-fid", "xl-0671088-0.040", "EDM2-XL denoiser, best FID"),
        ("s-1073741-0.045", "s-1073741-0.045", "EDM2-S denoiser, to be autoguided for FID"),
        ("s-1073741-0.105", "s-1073741-0.105", "EDM2-S denoiser, to be autoguided for DINOv2"),
        ("xs-0134217-0.110", "xs-0134217-0.110", "EDM2-XS denoiser, the guide of s-1073741-0.045"),
        ("xs-0134217-0.175", "xs-0134217-0.175", "EDM2-XS denoiser, the guide of s-1073741-0.105"),
    ):
        yield Released(
            name=f"edm2-img64-{name}",
            title=title,
            family="edm2",
            url=f"{_EDM2}edm2-img64-{file}.pkl",
            file=f"edm2-img64-{file}.pkl",
            method="edm",
            data="imagenet64",
            resolution=64,
            num_classes=1000,
            licence=_NON_COMMERCIAL,
            parameters=millions[name.split("-")[0]] * 10**6,
            bytes_per_parameter=2,
            grid_points=32,
            solver="--solver heun --steps 32",
        )


def _jcm() -> Iterator[Released]:
    """NCSN++ networks of the consistency models paper for CIFAR-10, unconditional, as states of a JAX training."""
    rows: tuple[tuple[str, str, Method, str], ...] = (
        ("jcm-edm-cifar10", "edm_cifar10_ema", "edm", "EDM denoiser"),
        ("jcm-cd-l1", "cd-l1/checkpoints/checkpoint_80", "cd", "consistency distillation, l1"),
        ("jcm-cd-l2", "cd-l2/checkpoints/checkpoint_80", "cd", "consistency distillation, l2"),
        ("jcm-cd-lpips", "cd-lpips/checkpoints/checkpoint_80", "cd", "consistency distillation, LPIPS"),
        ("jcm-ct-lpips", "ct-lpips/checkpoints/checkpoint_74", "ct", "consistency training, LPIPS"),
        *(
            (
                f"jcm-continuous-cd-{kind}",
                f"cifar10-continuous-cd-{kind}/checkpoints/checkpoint_40",
                "cd",
                f"continuous-time distillation, {title}",
            )
            for kind, title in (
                ("l2", "l2"),
                ("l2-stopgrad", "l2, stop-gradient"),
                ("lpips-stopgrad", "LPIPS, stop-gradient"),
            )
        ),
        (
            "jcm-continuous-ct-l2",
            "continuous-ct-l2/checkpoints/checkpoint_80",
            "ct",
            "continuous-time consistency training, l2",
        ),
        (
            "jcm-continuous-ct-lpips",
            "continuous-ct-lpips/checkpoints/checkpoint_40",
            "ct",
            "continuous-time consistency training, LPIPS",
        ),
    )
    for name, place, method, title in rows:
        yield Released(
            name=name,
            title=title,
            family="jcm",
            url=f"{_JCM}{place}",
            # Nine of the ten files are called checkpoint_N: the run's folder tells them apart.
            file=place.replace("/checkpoints/", "-"),
            method=method,
            data="cifar10",
            resolution=32,
            num_classes=0,
            licence="Apache-2.0",
            parameters=56_397_827,
            bytes_per_parameter=20 if name == "jcm-ct-lpips" else 16,
            grid_points=151 if name == "jcm-ct-lpips" else 18,
            times=(0, 11) if name.startswith("jcm-cd-") else (),  # the notebook's, for a distilled model
            solver="--solver heun --steps 18" if method == "edm" else "",
        )


RELEASED: dict[str, Released] = {
    released.name: released for family in (_openai, _edm, _edm2, _jcm) for released in family()
}


# Weights that distances and measures are made of, as torchvision and torch-fidelity name their files: the last eight
# digits are the first of their SHA-256.
WEIGHTS = {
    "lpips-vgg": "vgg16-397923af.pth",
    "lpips-alex": "alexnet-owt-7be5be79.pth",
    "inception": "weights-inception-2015-12-05-6726825d.pth",
}


def suggest(name: str) -> str:
    """The nearest names, or where they are listed."""
    close = nearest(name, [*BOXED, *RELEASED, *WEIGHTS])
    return close if close.endswith("?") else "cmtool models ls lists the released checkpoints"


def by_file(file: str | PurePath) -> Released | None:
    """The released checkpoint whose file is called so, wherever it lies."""
    return _FILES.get(PurePath(file).name)


def by_url(url: str) -> Released | None:
    """The released checkpoint that this address belongs to."""
    return _URLS.get(urlsplit(url)._replace(query="", fragment="").geturl())


_FILES = {released.file: released for released in RELEASED.values()}
_URLS = {released.url: released for released in RELEASED.values()}
