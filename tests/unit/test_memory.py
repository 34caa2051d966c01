"""Memory that is kept for the next tensor: nothing is mixed up in it, it is used again, and nobody loses by it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from cmtool import compiled, memory

KEEPS = """
import os, random, resource, threading
import torch
from cmtool import compiled, memory
from cmtool.io import machine

MIB = 2**20
native = compiled.library(memory.SOURCE)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def tensor(mib):
    return torch.ones(int(mib * MIB) // 4)
"""
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library")
available = pytest.mark.skipif(compiled.library(memory.SOURCE) is None, reason="no compiler on this machine")


@pytest.fixture
def ask(monkeypatch):
    """A function that runs lines after `KEEPS` in a process of their own, and returns what they print."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)

    def run(lines, **variables):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run([sys.executable, "-c", KEEPS + lines], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


AGAIN = """
def make():
    tensors = [tensor(SIZE) for _ in range(COUNT)]  # all at once
    return sum(float(one[0]) for one in tensors)

memory.keep()
for _ in range(3):
    make()
before = faults()
for _ in range(5):
    make()
print(faults() - before)
"""
SMALL = AGAIN.replace("SIZE", "2").replace("COUNT", "40")
LARGE = AGAIN.replace("SIZE", "40").replace("COUNT", "3")  # more than glibc ever keeps by itself


@glibc
@pytest.mark.parametrize(
    ("lines", "native", "most"),
    [
        (SMALL, "0", 500),
        (LARGE, "0", 80_000),  # glibc does not always find a hole again
        pytest.param(SMALL, "1", 500, marks=available),
        pytest.param(LARGE, "1", 500, marks=available),
    ],
)
def test_freed_memory_is_used_again(ask, lines, native, most):
    assert int(ask(lines, CMTOOL_NATIVE=native)) < most


@glibc
def test_whoever_has_said_how_memory_is_to_be_kept_is_obeyed(ask):
    assert int(ask(SMALL, MALLOC_MMAP_THRESHOLD_="65536")) > 50_000  # 20,000 pages of 4 KiB, five times
    assert int(ask(LARGE, MALLOC_MMAP_THRESHOLD_="65536")) > 100_000  # 30,720 pages


@glibc
def test_other_libraries_for_memory_are_left_alone(ask):
    assert int(ask(LARGE, LD_PRELOAD="/nowhere/libtcmalloc.so")) > 100_000


@available
def test_holes_are_filled(ask):
    """What is kept between things that go: the holes are of the size of the next tensor, and it lies in one of them."""
    lines = """
memory.keep()
before, kept = machine.memory(), []
machine.reset_peak()
for _ in range(40):
    short = tensor(8)
    kept.append(tensor(8) + short[0])
    del short
print((machine.peak_memory() - before) / (40 * 8 * MIB))
"""
    assert float(ask(lines)) < 1.1


@available
def test_neighbours_become_one_gap(ask):
    lines = """
memory.keep()
tensors = [tensor(1 + index % 7 / 4) for index in range(100)]
random.Random(0).shuffle(tensors)
before, size = faults(), sum(one.numel() for one in tensors)
tensors.clear()
whole = torch.ones(size)  # as large as all together
print(faults() - before)
"""
    assert int(ask(lines)) < 1000  # of 43,000 pages


@available
def test_nothing_is_mixed_up(ask):
    """Tensors of all sizes come and go in several threads; each still has what was written into it, when it goes."""
    lines = """
early = [tensor(0.01), tensor(4)]  # of before: they go back where they came from
memory.keep()
wrong = []

def work(seed):
    chance, alive = random.Random(seed), []
    for turn in range(1500):
        if chance.random() < 0.55 or not alive:
            count = int(2 ** chance.uniform(8, 19))
            alive.append((torch.full((count,), turn + seed / 8), turn + seed / 8))
        else:
            one, value = alive.pop(chance.randrange(len(alive)))
            if chance.random() < 0.1:
                one.resize_(2 * len(one))[len(one) // 2 :] = value  # moves, and takes along what is there
            if not (one == value).all() or one.data_ptr() % 64:
                wrong.append((seed, turn))

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
early.clear()
for thread in threads: thread.join()
print(wrong)
"""
    assert ask(lines) == "[]"


@available
def test_a_child_of_fork_goes_on(ask):
    """Also while other threads ask for memory."""
    lines = """
memory.keep()
kept, stop = tensor(2), threading.Event()

def busy():
    while not stop.is_set():
        torch.empty(MIB)

threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
codes = []
for _ in range(30):
    child = os.fork()
    if not child:
        own = [torch.empty(MIB).fill_(2) for _ in range(3)]
        os._exit(0 if kept[-1] == 1 and all(one[-1] == 2 for one in own) else 1)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads: thread.join()
print(sum(codes), float(kept[-1]))
"""
    assert ask(lines) == "0 1.0"


@available
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own files")
def test_a_system_without_the_addresses(ask):
    lines = """
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * MIB,) * 2)
memory.keep()
print(native.keep(), float(tensor(8)[-1]))
"""
    assert ask(lines) == "0 1.0"


@available
def test_all_compilers_are_begun_at_once(ask, tmp_path):
    lines = """
compiled.begin()
compiled._compilers().shutdown()
"""
    ask(lines, CMTOOL_CACHE=str(tmp_path))
    names = {file.name.split("-")[0] for file in (tmp_path / "native").iterdir()}
    assert names == {"memory", "native", "rng", "winograd"}


def test_nothing_is_compiled_that_is_switched_off(ask, tmp_path):
    ask("memory.keep()", CMTOOL_CACHE=str(tmp_path), CMTOOL_NATIVE="0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cache", ["file/in/it", "x" * 300])
def test_a_cache_that_cannot_be(ask, tmp_path, cache):
    (tmp_path / "file").write_text("")
    assert ask("memory.keep(); print(float(tensor(8)[-1]))", CMTOOL_CACHE=str(tmp_path / cache)) == "1.0"
