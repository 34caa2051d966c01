"""What is made ahead comes in order, with its errors; what hangs is told, and does not keep the program."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from cmtool.io.ahead import ahead


class SilentError(Exception):
    pass


def made(items, count=2, patience=30.0, **how):
    return ahead(items, count, patience=patience, silent=SilentError, **how)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("count", [1, 3, 100])
def test_everything_comes_in_order(count):
    assert list(made(range(20), count)) == list(range(20))
    assert list(made([], count)) == []
    assert list(made([None, 0, ()], count)) == [None, 0, ()]


def test_so_many_are_made_ahead_and_no_more():
    seen = []
    items = made((seen.append(k) or k for k in range(10)), 3)
    assert next(items) == 0
    assert until(lambda: len(seen) == 4)
    time.sleep(0.1)
    assert len(seen) == 4  # one is used, three are ready


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("three")

    found = made(items(), 5)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(found)


def test_it_ends_with_who_uses_it():
    closed = threading.Event()

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.set()

    found = made(items())
    assert next(found) == 0
    found.close()
    assert closed.wait(10)
    assert until(lambda: not [thread for thread in threading.enumerate() if thread.name == "ahead"])


def test_one_within_the_other():
    def doubled():
        for k in made(range(1000), 1):
            yield 2 * k

    found = made(doubled())
    assert [next(found) for _ in range(3)] == [0, 2, 4]
    found.close()
    assert until(lambda: not [thread for thread in threading.enumerate() if thread.name == "ahead"])


def test_silence_is_an_error_and_slowness_is_none():
    stop = threading.Event()

    def items():
        yield 1
        stop.wait(30)

    found = made(items(), patience=0.2)
    assert next(found) == 1
    with pytest.raises(SilentError):
        next(found)
    stop.set()

    begin = time.monotonic()

    def slow():
        time.sleep(0.6)
        yield 1

    assert list(made(slow(), patience=0.2, alive=lambda: begin + 0.5)) == [1]
    with pytest.raises(SilentError):
        list(made(slow(), patience=0.2, alive=lambda: begin))


def test_what_hangs_does_not_keep_the_program():
    program = """
import threading
from cmtool.io.ahead import ahead
def items():
    yield 1
    threading.Event().wait()
found = ahead(items(), 2, patience=0.2, silent=lambda: SystemExit(7))
print(next(found), flush=True)
next(found)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "1\n", "")
