"""The processes of one command: alone, or one of several that torchrun started and that go on in step.

Nothing here knows what the processes do. `ALONE` answers for a single one without any communication, so that nobody
else has to ask how many there are. What the processes tell each other goes through the CPU (gloo); gradients have
their own way (`cmtool.training.distributed`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cmtool import pulse
from cmtool.errors import ProcessError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=15)  # longer than the slowest thing that one process does while the others wait: a save


class Processes:
    """A single process: it has all the work, and agrees with itself."""

    rank = 0
    count = 1
    local_rank = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, count: int) -> slice:
        """Which of `count` things are this process's: neighbours in the order of the ranks, the first ones one more."""
        each, more = divmod(count, self.count)
        first = self.rank * each + min(self.rank, more)
        return slice(first, first + each + (self.rank < more))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; a tensor of any shape, on any device, the same on all."""
        return values

    def smallest(self, values: Tensor) -> Tensor:
        """The least over all processes, entry by entry."""
        return values

    def told(self, value: T) -> T:
        """What the first process has; plain values or CPU tensors."""
        return value

    def gathered(self, value: T) -> list[T]:
        """What each process has, in the order of the ranks; all of it on the first, nothing on the others."""
        return [value]

    def wait(self) -> None:
        """Until all have come here."""

    def agreement(self) -> Agreement:
        """A new `Agreement`; all make theirs at the same place."""
        return Agreement()

    def is_new(self, message: str) -> bool:
        """Whether no other process has said this yet."""
        return True


class Agreement:
    """The largest number that any process has noted, the same for all of them at the same moment."""

    def __init__(self) -> None:
        self._mine = 0

    def note(self, number: int) -> None:
        """Say something; 0 is nothing."""
        self._mine = max(self._mine, number)

    def ask(self) -> int:
        """What all agree on; every process asks as often as the others."""
        return self._mine


class _Team(Processes):
    """One of several processes."""

    def __init__(self, rank: int, count: int, local_rank: int, store: Any, patience: float) -> None:
        import torch.distributed as dist

        self.rank, self.count, self.local_rank, self._store = rank, count, local_rank, store
        self._pulse = None
        if _when_silent is not None:
            self._pulse = pulse.Pulse(pulse.board(patience), rank, count, patience, _when_silent)
        # A group of its own: what is said here must not mix with the gradients, which others send in the background.
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        if self._pulse is not None:
            self._pulse.start()

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, "SUM")

    def smallest(self, values: Tensor) -> Tensor:
        return self._reduced(values, "MIN")

    def _reduced(self, values: Tensor, operation: str) -> Tensor:
        import torch.distributed as dist

        here = values.detach().cpu().clone()
        dist.all_reduce(here, op=getattr(dist.ReduceOp, operation), group=self.control)
        return here.to(values.device)

    def told(self, value: T) -> T:
        import torch.distributed as dist

        held: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(held, src=0, group=self.control)
        told: T = held[0]
        return told

    def gathered(self, value: T) -> list[T]:
        import torch.distributed as dist

        held: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, held, dst=0, group=self.control)
        return held or []

    def wait(self) -> None:
        import torch.distributed as dist

        dist.barrier(group=self.control)

    def part(self) -> None:
        """Wait for all a last time; nobody watches anybody afterwards."""
        self.wait()
        if self._pulse is not None:
            self._pulse.stop()

    def agreement(self) -> Agreement:
        return _Together(self)

    def is_new(self, message: str) -> bool:
        name = hashlib.sha256(message.encode()).hexdigest()
        try:
            return int(self._store.add(f"said/{name}", 1)) == 1
        except Exception:  # the one that keeps the books is gone, and has said what there was to say
            return False


class _Together(Agreement):
    """Asked at every step of a loop: the answer is that of the step before, so that nobody waits for it."""

    def __init__(self, team: _Team) -> None:
        super().__init__()
        self._team = team
        self._sent: tuple[Any, Tensor] | None = None

    def ask(self) -> int:
        import torch
        import torch.distributed as dist

        agreed = 0
        if self._sent is not None:
            work, value = self._sent
            work.wait()
            agreed = int(value)
        mine = torch.tensor(max(self._mine, agreed))
        self._sent = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._team.control, async_op=True), mine
        return agreed


ALONE = Processes()
_current = ALONE
_when_silent: Callable[[ProcessError], None] | None = None


def when_silent(report: Callable[[ProcessError], None]) -> None:
    """What to do when another process is gone without a word, see `cmtool.pulse`; `join` starts the watch.

    Args:
        report: called in a thread while the main thread waits, perhaps for ever: it has to end the process.
    """
    global _when_silent
    _when_silent = report


def current() -> Processes:
    """Those that `join` has found; `ALONE` before it was called."""
    return _current


def expected() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine, as torchrun has put them into the environment; else 0, 1, 0.

    Raises:
        UsageError: if they make no sense.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    texts = [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise UsageError(
            f"the environment names process {texts[0]!r} of {texts[1]!r}, {texts[2]!r} on this machine",
            "start several processes with torchrun; unset RANK and WORLD_SIZE for one",
        )
    rank, count, local_rank = map(int, texts)
    return rank, count, local_rank


def join() -> Processes:
    """Meet the other processes, where torchrun has started some.

    Raises:
        UsageError: if the environment makes no sense.
        ProcessError: if they are not to be found.
    """
    global _current
    rank, count, local_rank = expected()
    if count == 1 or _current.many:
        return _current
    patience = pulse.patience()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost connection means is said once, and in words
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        _current = _Team(rank, count, local_rank, store, patience)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {rank} of {count} has not met the others: {_first_line(error)}",
            "start all of them with torchrun, with the same --rdzv-endpoint",
        ) from error
    return _current


def leave() -> None:
    """Part from the others at the end of a command; without this a process may be aborted at its exit."""
    global _current
    if not isinstance(_current, _Team):
        return
    import gc

    import torch.distributed as dist

    try:
        _current.part()
        gc.collect()
        dist.destroy_process_group()
    finally:
        _current = ALONE


def end(code: int) -> NoReturn:
    """End this process without Python's farewell, which may wait for what never comes; what it said is not lost."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def lost(error: BaseException) -> bool:
    """Whether this is what a process gets when another one has gone."""
    if not _current.many or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))


def device(name: str) -> torch.device | None:
    """This process's own among several GPUs of a machine, for `auto` and `cuda`; None: as it is named."""
    import torch

    if not _current.many or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return None
    return torch.device("cuda", _current.local_rank % torch.cuda.device_count())


def same(processes: Processes, values: Sequence[int]) -> bool:
    """Whether all processes have these numbers."""
    import torch

    mine = torch.tensor([*values, *(-value for value in values)], dtype=torch.int64)
    least = processes.smallest(mine)
    return bool((least[: len(values)] == -least[len(values) :]).all())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
