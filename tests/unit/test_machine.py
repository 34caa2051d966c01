"""What the operating system is asked: the processor, free memory and its limits, the memory of this process."""

from __future__ import annotations

import mmap
import os

import pytest

from cmtool.io import machine

MIB = 2**20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes the files a system shows."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")

    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def test_this_machine():
    cpu = machine.cpu()
    assert cpu.name
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    free = machine.free_memory()
    assert free is None or free > 2**20
    assert machine.memory() > 10 * MIB


def test_a_processor(system):
    system(
        "proc/cpuinfo",
        "processor: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma amx_bf16\n\nprocessor: 1\n",
    )
    assert machine.cpu()[:2] == ("Some CPU @ 2 GHz", ("avx2", "fma", "amx_bf16"))


def test_an_unknown_processor(system):
    assert machine.cpu().flags == ()
    assert isinstance(machine.cpu().name, str)


def test_free_memory(system):
    system("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   2048 kB\n")
    assert machine.free_memory() == 2 * MIB


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("1048576", "1000000", "", 48576),
        ("1048576", "1000000", "anon 5\ninactive_file 900000\n", 948576),  # a cache of files makes room
        ("max", "1000000", "", 2 * MIB),
        ("1048576", "2000000", "", 0),
        ("", "", "", 2 * MIB),
        ("rubbish", "1", "", 2 * MIB),
    ],
)
def test_a_container_sets_a_limit(system, limit, used, stat, expected):
    system("proc/meminfo", "MemAvailable: 2048 kB\n")
    system("proc/self/cgroup", "0::/a/b\n")
    system("cgroup/a/memory.max", limit)  # of the parent: it counts, too
    system("cgroup/a/memory.current", used)
    system("cgroup/a/memory.stat", stat)
    assert machine.free_memory() == expected


def test_the_first_version_of_control_groups(system):
    system("proc/meminfo", "MemAvailable: 2048 kB\n")
    system("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/id\n")
    system("cgroup/memory/memory.limit_in_bytes", "1000000")  # mounted as the root
    system("cgroup/memory/memory.usage_in_bytes", "400000")
    assert machine.free_memory() == 600000


def test_where_nothing_is_known(system, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError), raising=False)
    assert machine.free_memory() is None
    assert machine.memory() > 0
    machine.reset_peak()


def test_the_peak_is_seen():
    before = machine.memory()
    machine.reset_peak()
    # Not from an allocator: one may hold 64 MiB that were freed before and are resident still.
    with mmap.mmap(-1, 64 * MIB) as fresh:
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
    assert machine.peak_memory() - before > 50 * MIB
    if machine._PROC.exists():
        machine.reset_peak()
        assert machine.peak_memory() - before < 50 * MIB
