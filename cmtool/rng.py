"""Random numbers: one stream a sample, and initial weights that leave torch's generators alone.

Every image has a seed, and everything random about it (its start, its label, the noise of each step) is a stream of
that seed alone. So image k is the same image for any batch size, order or number of devices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool import compiled

MAX_SEED = 2**63 - 1
_LABEL_STREAM = 2**32  # far from the streams of noise, which are step numbers
_EACH = 2**17  # numbers that are worth a thread


def noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise of one seed a row.

    Drawn on the CPU from a counter-based generator (Philox) whose key is (seed, stream), so that neither other rows nor
    the device matter.

    Args:
        seeds: one integer a sample, 0 <= seed < 2^63.
        shape: shape of one sample.
        stream: which of the seed's streams: 0 is the start x_T, i the noise of step i.
    Returns:
        float32 tensor of shape [len(seeds), *shape] on the CPU.
    """
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    workers = max(1, min(torch.get_num_threads(), out.size // _EACH))
    if workers == 1:
        _fill(out, seeds, stream)
    elif (normals := _normals()) is not None:  # a GPU would wait for one core
        keys = np.array(seeds, dtype=np.uint64)
        normals(keys.ctypes.data, stream, len(keys), out.size // len(keys), out.ctypes.data, workers)
    else:  # numpy draws without the interpreter's lock, but asks for it between rows
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda first: _fill(out[first::workers], seeds[first::workers], stream), range(workers)))
    return torch.from_numpy(out)


def _fill(rows: NDArray[np.float32], seeds: Sequence[int], stream: int) -> None:
    """Each row the numbers that `_generator` of its seed draws; to set a state is cheaper than a new generator."""
    bits = np.random.Philox(key=0)
    draw = np.random.Generator(bits).standard_normal
    state: Any = dict(bits.state)
    for row, seed in zip(rows, seeds, strict=True):
        state["state"] = {"counter": np.zeros(4, np.uint64), "key": np.array([seed, stream], np.uint64)}
        bits.state = state
        draw(dtype=np.float32, out=row)


@functools.cache
def _normals() -> Callable[..., None] | None:
    """`normals` of rng.cpp, with numpy's own ziggurat; None where there is no compiler, or numpy hides it."""
    lib = compiled.library(Path(__file__).with_suffix(".cpp"))
    # The way that numpy's documentation shows to call its distributions from elsewhere.
    fill = getattr(ctypes.CDLL(np.random._generator.__file__), "random_standard_normal_fill_f", None)
    if lib is None or fill is None:
        return None
    lib.normals.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_long, ctypes.c_long, ctypes.c_void_p),
        ctypes.c_int,
    ]
    lib.normals.restype = None
    return functools.partial(lib.normals, ctypes.cast(fill, ctypes.c_void_p))


def labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """One class index a seed, uniform over `num_classes`; int64 [len(seeds)]."""
    drawn = [int(_generator(seed, _LABEL_STREAM).integers(num_classes)) for seed in seeds]
    return torch.tensor(drawn, dtype=torch.int64)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def derive(seed: int, *streams: int) -> int:
    """A new seed from a seed and any number of stream numbers, well mixed (for torch's own generators)."""
    return int(np.random.SeedSequence((seed, *streams)).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def forked(seed: int, device: torch.device | str) -> Iterator[None]:
    """Run a block with torch's global generators (CPU and `device`) set to `seed`, and put them back afterwards.

    For initial weights. The dropout that two passes share is decided by `networks.chance.seeded`.
    """
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        yield
