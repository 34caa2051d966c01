"""Measuring in a process of its own: what one side needs of memory is then what its process needs.

Workers are forked from a process that has imported everything and computed nothing (threads of torch do not survive a
fork), and compute only when they are told to, so that of all of them one is at work at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from cmtool.errors import UserError
from cmtool.io import machine

_MOMENT, _PATIENCE = 1.0, 5.0  # seconds until a process that is to end is asked to, and then is made to
_HINT = "try a smaller --batch, or leave the row out of --rows"

Make = Callable[..., Callable[[], Any]]


class Round(NamedTuple):
    """One round: how long it took, the peak memory so far in bytes (None if unknown), and what the job returned."""

    seconds: float
    memory: int | None
    value: Any = None


class Worker:
    """A process that makes a job and runs a round of it whenever it is asked.

    Args:
        title: what it does, for errors.
        make: called there with `given`, returns the job; both must be known by name, as they are sent there.
        threads: of torch; 0 leaves its choice.
        returns: whether what the job returns is sent back with each round.
    Raises:
        UserError: if the job cannot be made.
    """

    def __init__(self, title: str, make: Make, *given: Any, threads: int = 0, returns: bool = False) -> None:
        self.title = title
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(["cmtool.benchmark.preload"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, given, threads, returns), daemon=True)
        try:
            with _no_gpus():  # a process that has looked for GPUs cannot be forked into ones that use torch
                self._process.start()
            theirs.close()
            self._answer()
        except BaseException:
            self.close()
            raise

    def round(self) -> Round:
        """Run the job once.

        Raises:
            UserError: if the job fails or the process dies.
        """
        try:
            self._pipe.send(True)
        except OSError:
            self._died()
        found: Round = self._answer()
        return found

    def close(self) -> None:
        """End the process, whatever it is doing; one that waits for a word leaves by itself, and tidies up."""
        self._pipe.close()
        if self._process.pid is not None:
            self._process.join(_MOMENT)
            self._process.terminate()
            self._process.join(_PATIENCE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process.close()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._died()
        if isinstance(answer, _Failure):
            raise UserError(f"{self.title}: {answer.message}", answer.hint or _HINT)
        return answer

    def _died(self) -> None:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        raise UserError(f"{self.title}: the process ended unexpectedly ({how})", _HINT) from None


@contextmanager
def _no_gpus() -> Iterator[None]:
    """New processes see none."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Failure(NamedTuple):
    message: str
    hint: str


def _serve(pipe: Connection, make: Make, given: tuple[Any, ...], threads: int, returns: bool) -> None:
    """What a worker does: make the job, then a round for every word that comes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    warnings.simplefilter("ignore")
    try:
        if threads:
            torch.set_num_threads(threads)
        before = machine.memory()
        job = make(*given)
        machine.reset_peak()
        pipe.send(None)
        while True:
            pipe.recv()
            start = time.perf_counter()
            value = job()
            seconds = time.perf_counter() - start
            answer = Round(seconds, max(0, machine.peak_memory() - before) or None, value if returns else None)
            del value
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        pipe.send(_Failure(error.message, error.hint))
    except Exception as error:
        pipe.send(_Failure(f"{type(error).__name__}: {error}", ""))
