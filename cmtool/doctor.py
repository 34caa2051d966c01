"""What works on this machine, what does not, and what to do about it: the findings of `cmtool doctor`.

Everything is tried rather than asked for: the compiled code is loaded, packages are imported, and a model in the box
computes images and gradients, once as commands do and once by torch's own operations in double precision.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmtool import __version__, cache, compiled, memory, precision, rng
from cmtool.errors import UserError
from cmtool.flow.flow_map import FlowMap
from cmtool.io import auxiliary, box, catalogue, loading, machine, origins
from cmtool.networks import native, winograd

_GPU = Path("/dev/nvidia0")  # there where the driver of an NVIDIA GPU is loaded
_IMAGES = 4  # enough for the fast convolutions at the coarsest resolution that they take
# Of the largest value: rounding errors are a hundredth of that, and what is wrong is wrong by more.
_LARGEST = {torch.float32: 1e-2, torch.bfloat16: 0.2}
_SLOWER = "torch's own operations compute the same, slower"
_VARIABLES = re.compile(r"CMTOOL_\w+|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|CXX|HF_HUB_OFFLINE|TORCH_HOME|XDG_CACHE_HOME")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: of the thing.
        says: what was found.
        hint: what to do about it; empty where there is nothing to be done.
        broken: whether it ought to work, and does not.
    """

    name: str
    says: str
    hint: str = ""
    broken: bool = False


def examine(device: str = "auto") -> Iterator[Finding]:
    """Look at the installation and the machine, one thing after another; no network is asked.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", "mps": where images are computed.
    Raises:
        UsageError: for a device that this machine does not have.
    """
    on = precision.device(device)
    dtype = precision.compute_dtype("auto", on) or torch.float32
    yield _versions()
    yield _torch()
    yield _device(on)
    yield _precision(on, dtype)
    yield _compiled("fast noise", Path(rng.__file__))
    if on.type == "cpu":
        yield _compiled("fast norms", Path(native.__file__))
        yield _convolutions()
        yield Finding("memory", f"freed tensors are kept for the next ones {memory.keep()}")
    elif on.type == "cuda":
        yield _kernels()
    yield from _numbers(on, dtype)
    yield _lpips()
    yield from _weights()
    yield from _packages()
    yield _cache()
    yield _environment()


def _versions() -> Finding:
    says = f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("cmtool", says)


def _torch() -> Finding:
    threads, cores = torch.get_num_threads(), machine.cpu().cores
    says = f"{torch.__version__}, {threads} threads for {cores} cores"
    if threads > cores:
        return Finding("torch", says, f"OMP_NUM_THREADS={cores}: more threads than cores wait for each other")
    if torch.cuda.is_available():
        return Finding("torch", says)
    if torch.version.cuda:
        return Finding("torch", says, f"it is built for CUDA {torch.version.cuda}, and finds no GPU: see nvidia-smi")
    if _GPU.exists():
        return Finding("torch", says, "there is an NVIDIA GPU, and this torch is built without CUDA")
    return Finding("torch", says)


def _device(on: torch.device) -> Finding:
    if on.type == "cuda":
        about = torch.cuda.get_device_properties(on)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(on))
        says = f"{about.name}, compute {about.major}.{about.minor}, {free:.1f} of {total:.1f} GiB free"
    elif on.type == "cpu":
        found, free_bytes = machine.cpu(), machine.free_memory()
        free_memory = f", {free_bytes / 2**30:.1f} GiB free" if free_bytes else ""
        says = f"{found.name} ({' '.join(found.flags) or 'no vectors that matter'}){free_memory}"
    else:
        says = platform.processor()
    return Finding("device", f"{on}: {says}")


def _precision(on: torch.device, dtype: torch.dtype) -> Finding:
    if dtype == torch.bfloat16:
        return Finding("precision", "bfloat16 inside the network, float32 around it")
    lacking = {"cpu": "AMX tiles, which this processor lacks", "cuda": "the tensor cores that GPUs have since Ampere"}
    return Finding("precision", f"float32: bfloat16 is fast with {lacking.get(on.type, 'other devices')}")


def _compiled(name: str, module: Path) -> Finding:
    problem = compiled.problem(module.with_suffix(".cpp"))
    if not problem:
        return Finding(name, "compiled")
    remedy = "; install a C++ compiler, or name one in CXX" if "compiler" in problem else ""
    return Finding(name, problem, f"{_SLOWER}{remedy}")


def _convolutions() -> Finding:
    found = _compiled("fast convolutions", Path(winograd.__file__))
    if found.hint or winograd.library() is not None:
        return found
    return Finding(found.name, "none for this processor: torch's are as fast")


def _kernels() -> Finding:
    if native.kernels() is not None:
        return Finding("fast norms", "Triton kernels")
    return Finding("fast norms", "no Triton that works here", f"{_SLOWER}; pip install triton, and a C compiler")


def _numbers(on: torch.device, dtype: torch.dtype) -> list[Finding]:
    """A model in the box, as commands compute it and by torch's own operations in double precision."""
    name = box.DEFAULT
    try:
        model = loading.load(box.BOXED[name].file)
        size, channels = model.card.resolution, model.card.channels
        noise = rng.noise(range(_IMAGES), (channels, size, size))
        exact, exact_slope = _one_call(model.double(), noise.double(), torch.float64)
        model = model.to(on, torch.float32)
        _one_call(model, noise.to(on), dtype)  # the first call finds its ways
        begun = time.perf_counter()
        images, slope = _one_call(model, noise.to(on), dtype)
        seconds = time.perf_counter() - begun
    except Exception as error:  # whatever it is, it is what the user has to know
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return [Finding("images", f"{name} cannot be computed: {reason}", "install cmtool and torch again", True)]
    found = [_difference("images", images, exact, dtype), _difference("gradients", slope, exact_slope, dtype)]
    return [*found, Finding("speed", f"{_IMAGES} images and their gradient in {seconds:.3f} s, by {name}")]


def _one_call(model: FlowMap, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images in one call, and the gradient of their mean square: that of all weights, as one vector."""
    model.requires_grad_().compute_in(None if dtype == noise.dtype else dtype)
    t = torch.full((len(noise),), model.path.t_max, dtype=noise.dtype, device=noise.device)
    labels = torch.arange(len(noise), device=noise.device) if model.card.num_classes else None
    made = model.jump(noise * t[0], t, torch.full_like(t, model.path.t_min), labels=labels)
    slopes = torch.autograd.grad(made.square().mean(), list(model.parameters()), allow_unused=True)
    flat = torch.cat([slope.double().flatten().cpu() for slope in slopes if slope is not None])
    return made.detach().double().cpu(), flat


def _difference(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> Finding:
    far = float((found - exact).abs().max() / exact.abs().max())
    says = f"{far:.1e} from double precision by torch's own operations"
    if far <= _LARGEST[dtype]:  # false for what is not finite
        return Finding(name, says)
    return Finding(name, says, "what is computed here is wrong: try CMTOOL_NATIVE=0, or --precision fp32", True)


def _lpips() -> Finding:
    from cmtool.training.distances import import_lpips

    try:
        import_lpips()
    except UserError as error:
        return Finding("lpips", error.message, error.hint, True)
    return Finding("lpips", "loads")


def _weights() -> list[Finding]:
    """What LPIPS and FID need besides their packages."""
    told = []
    for name in catalogue.WEIGHTS:
        file = auxiliary.find(name)
        if not file.is_file():
            told.append(Finding(f"weights {name}", f"not here: cmtool fetch {name}"))
        elif said := auxiliary.damage(file):
            told.append(Finding(f"weights {name}", said, f"delete it, and cmtool fetch {name}"))
        else:
            told.append(Finding(f"weights {name}", str(file)))
    return told


def _packages() -> list[Finding]:
    """What the distribution asks for, and what its extras do."""
    try:
        wanted = importlib.metadata.requires("cmtool") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("packages", "cmtool is not installed, only found", "pip install it")]
    found: dict[str, list[str]] = {}
    old: list[str] = []
    for text in wanted:
        name, least, extra = _requirement(text)
        if extra in ("test", "dev"):
            continue
        here = _version(name)
        found.setdefault(extra, []).append(f"{name} {here}" if here else "")
        if here and _number(here) < _number(least):
            old.append(f"{name} is {here}, and {least} is asked for")
    extras = {extra: packages for extra, packages in found.items() if extra}
    told = [Finding("packages", ", ".join(filter(None, found.get("", []))))]
    for extra, packages in extras.items():
        says = ", ".join(packages) if all(packages) else f"not installed: pip install 'cmtool[{extra}]'"
        told.append(Finding(f"extra {extra}", says))
    if old:
        told.append(Finding("versions", "; ".join(old), "pip install --upgrade"))
    return told


def _requirement(text: str) -> tuple[str, str, str]:
    """Name, least version and extra of a requirement as metadata have it; empty where there is none."""
    name = re.match(r"[\w.-]+", text)
    least, extra = re.search(r">=\s*([\d.]+)", text), re.search(r"extra\s*==\s*[\"'](\w+)", text)
    return name[0] if name else text, least[1] if least else "", extra[1] if extra else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _cache() -> Finding:
    folder = cache.folder("")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    says = f"{folder}, {kept / 1e6:,.0f} MB, {shutil.disk_usage(there).free / 1e9:,.0f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("cache", says, f"{there} cannot be written to: name another folder with CMTOOL_CACHE")
    return Finding("cache", f"{says}{', no downloads' if origins.kept_offline() else ''}")


def _environment() -> Finding:
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)]
    return Finding("environment", ", ".join(told) or "none of cmtool's variables is set")
