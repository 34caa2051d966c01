"""Where the time of a row goes on a CPU: a round of it under torch's profiler."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import ModuleType
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from cmtool.benchmark import ours
from cmtool.benchmark.rows import Row
from cmtool.benchmark.shared import Setup
from cmtool.benchmark.workers import Worker
from cmtool.networks import native, winograd

# Of torch's operations and our own, by their names; the first that fits.
KINDS = {
    "convolutions": r"convolution|winograd",
    "norms": r"native\.|group_norm|silu",
    "attention": r"attention|softmax|bmm",
    "matrix products": r"mm\b|matmul|linear\b",
    "optimizer and averages": r"fused_adam|foreach|lerp_|Optimizer|linalg_vector_norm",
    "sums, copies, noise": r"^aten::",
}
REST = "Python and bookkeeping"
_OWN: dict[ModuleType, tuple[str, ...]] = {
    winograd: ("forward", "input_gradient", "use_input_gradient", "weight_gradient"),
    native: ("forward", "backward", "tangent"),
}


def shares(row: Row, setup: Setup) -> dict[str, float]:
    """Shares of the time of a round of ours, by `KINDS` and `REST`; together 1. A norm that a convolution takes along
    counts as part of it.

    Raises:
        UserError: if the row fails.
    """
    with closing(Worker(f"row {row.name}", _profiled, row.name, setup, threads=setup.threads, returns=True)) as worker:
        worker.round()  # the first one is of a process that has never computed anything
        found: dict[str, float] = worker.round().value
    return found


def _profiled(name: str, setup: Setup) -> Callable[[], Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells on stderr when it begins and ends
    job = ours.job(name, setup)
    return lambda: measure(job)


def measure(job: Callable[[], Any]) -> dict[str, float]:
    """See `shares`; of anything."""
    with _named(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        start = time.perf_counter()
        job()
        seconds = time.perf_counter() - start
    spent = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), None)
        if kind is not None:
            spent[kind] += event.self_cpu_time_total / 1e6
    whole = max(seconds, sum(spent.values()))
    return {**{kind: each / whole for kind, each in spent.items()}, REST: 1 - sum(spent.values()) / whole}


@contextmanager
def _named() -> Iterator[None]:
    """Inside, the profiler knows what is computed by C++ of ours, of which it cannot know by itself."""
    before = [(module, name, getattr(module, name)) for module, names in _OWN.items() for name in names]
    try:
        for module, name, function in before:
            setattr(module, name, record_function(f"{module.__name__.rpartition('.')[2]}.{name}")(function))
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
