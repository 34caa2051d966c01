"""What a training will take before it is started: memory and time, from a rehearsal of a few images."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmtool.errors import ConfigError
from cmtool.training.distributed import local
from cmtool.training.trainer import Trainer

_SECONDS = 3.0  # of rehearsal, after which no larger size is tried
# Convolutions of a CPU lay out their numbers anew in memory that torch knows nothing of: 7.7M parameters at 32x32 make
# the process grow by 17 MiB an image (float32), and 13 are tensors.
_SCRATCH = 1.3
_MOST = 64  # images that are rehearsed
_PROBES = 2, 8  # images of 32x32 whose memory is measured: what both take alike is no image's
_SHARE = 0.8  # of the free memory that a micro-batch chosen by itself may fill


class Forecast(NamedTuple):
    """What is to be expected of a run."""

    parameters: int  # of the network
    weights_bytes: int  # all networks, gradients, averages and the optimizer's numbers
    scratch_bytes: int  # of a gradient, however many images it is of
    bytes_per_image: int  # of a micro-batch: activations and what is alive beside them at the worst moment
    memory_bytes: int  # of it all at the micro-batch of the run; without the program itself
    micro_batch: int
    images_per_second: float
    seconds: float  # to the last iteration


def forecast(trainer: Trainer) -> Forecast:
    """Rehearse a few images on the device of the run. The trainer's weights are moved: throw it away afterwards."""
    batch, own = trainer.recipe.batch, _own_images(trainer)
    micro = min(trainer.micro_batch or own, own)
    room = gradient_room(trainer)
    once, each = _pace(trainer, min(micro, _MOST) * trainer.processes.count)
    update = _seconds(trainer.rehearse_update, trainer)
    step = math.ceil(own / micro) * once + batch * each + update
    held = weights_bytes(trainer)
    return Forecast(
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        weights_bytes=held,
        scratch_bytes=room.fixed,
        bytes_per_image=room.per_image,
        memory_bytes=held + room.of(micro),
        micro_batch=micro,
        images_per_second=batch / step,
        seconds=step * (trainer.recipe.iterations - trainer.step),
    )


def fitting_micro_batch(trainer: Trainer, free: int) -> int | None:
    """The largest even piece of the batch whose gradient fits into `free` bytes; None if the whole batch does.

    Raises:
        ConfigError: if a single image does not fit.
    """
    batch = _own_images(trainer)
    room = gradient_room(trainer)
    left = _SHARE * free - (weights_bytes(trainer) - _held(trainer.networks)) - room.fixed
    most = int(left // room.per_image)
    if most < 1:
        raise ConfigError(
            f"not even one image fits: a step needs some {_gigabytes(weights_bytes(trainer))} for its weights and "
            f"{_gigabytes(room.of(1))} for an image, and {_gigabytes(free)} are free",
            "add --checkpoint-activations, or choose a smaller --network or --resolution",
        )
    return None if most >= batch else math.ceil(batch / math.ceil(batch / most))


def _own_images(trainer: Trainer) -> int:
    """How many images of a batch one process has, at most."""
    return math.ceil(trainer.recipe.batch / trainer.processes.count)


def weights_bytes(trainer: Trainer) -> int:
    """What is held from step to step: the networks, their copies in the compute type, gradients and the optimizer's."""
    networks, low = trainer.networks, trainer.model.compute_dtype
    size = _held(networks)
    if low is not None:
        size += sum(local(p).numel() * low.itemsize for p in _unique(networks) if p.dtype != low)
    trained = sum(local(p).numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return size + 3 * trained  # the gradient, and Adam's two moments


class Room(NamedTuple):
    """The memory that the gradient of some images takes, in bytes, beside what is kept anyway."""

    fixed: int
    per_image: int

    def of(self, images: int) -> int:
        """All of it."""
        return self.fixed + images * self.per_image


def gradient_room(trainer: Trainer) -> Room:
    """Measured on few images: the most memory that is alive at once, for two numbers of them."""
    # Of smaller images more: of few tiny ones other operations are the faster ones, with other needs.
    times = max(1, 32 // trainer.model.card.resolution) * trainer.processes.count
    counts = [trainer.rehearsal(probe * times) for probe in _PROBES]
    trainer.rehearse(counts[0])  # what is kept from step to step is there now: gradients, weights in the compute type
    scratch = 1.0 if trainer.device.type == "cuda" else _SCRATCH
    first, second = (scratch * _peak(partial(trainer.rehearse, count), trainer.device) for count in counts)
    few, more = (count / trainer.processes.count for count in counts)
    each = (second - first) / (more - few) if more > few else first / few
    return Room(max(0, math.ceil(first - few * each)), max(1, math.ceil(each)))


def _held(networks: Iterable[nn.Module]) -> int:
    return sum(local(p).numel() * p.element_size() for p in _unique(networks))


def _unique(networks: Iterable[nn.Module]) -> list[Tensor]:
    return list({id(p): p for network in networks for p in network.parameters()}.values())


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory alive at once among what `run` makes, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        run()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Follows the memory of every new tensor until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {_place(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            place = _place(tensor)
            if place not in old | self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(place)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, place, storage.nbytes())
        return out

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    """The tensors that have memory: the zeros of forward-mode derivatives have none."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf._is_zerotensor()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pace(trainer: Trainer, most: int) -> tuple[float, float]:
    """Seconds of a gradient that it takes however many images it is of, and seconds an image.

    By the two largest of a few sizes up to `most` that can be tried in short time.
    """
    begin, count, before = time.perf_counter(), trainer.rehearsal(1), (0, 0.0)
    while True:
        run = partial(trainer.rehearse, count)
        run()
        seconds = _seconds(run, trainer)
        found = fitted(before, (count, seconds))
        before, larger = (count, seconds), trainer.rehearsal(min(4 * count, most))
        if larger <= count or trainer.processes.told(time.perf_counter() - begin) > _SECONDS:
            return found
        count = larger


def fitted(few: tuple[int, float], more: tuple[int, float]) -> tuple[float, float]:
    """The line through two numbers of images and their seconds: where it begins, and its slope.

    It neither begins below zero nor falls, whatever else the machine was doing.
    """
    (n, t), (m, s) = few, more
    each = min(max((s - t) / (m - n), 0.0), s / m) if m > n else s / m
    return s - m * each, each


def _seconds(run: Callable[[], Any], trainer: Trainer) -> float:
    """Seconds of a run, the faster of two: others on the machine only delay it."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - start)
    return min(times)


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2g} GiB"
