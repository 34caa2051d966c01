"""Several processes of one command: who has what, and what they agree on. Those at work are in test_distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmtool import processes
from cmtool.errors import UsageError
from cmtool.processes import ALONE, Processes


def member(rank: int, count: int) -> Processes:
    one = Processes()
    one.rank, one.count = rank, count
    return one


@given(st.integers(0, 200), st.integers(1, 17))
def test_shares_are_neighbours_and_nearly_alike(total, count):
    shares = [range(total)[member(rank, count).share(total)] for rank in range(count)]
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(len, shares)) == len(shares[0])  # what is for one alone, the first gets


def test_a_single_process_has_everything_and_agrees_with_itself():
    values = torch.tensor([3.0, 1.0])
    assert ALONE.first
    assert not ALONE.many
    assert ALONE.sum(values) is values
    assert ALONE.smallest(values) is values
    assert ALONE.told("word") == "word"
    assert ALONE.gathered([1, 2]) == [[1, 2]]
    assert ALONE.is_new("word")
    assert processes.same(ALONE, [1, 2**62])
    agreed = ALONE.agreement()
    assert agreed.ask() == 0
    agreed.note(15)
    assert agreed.ask() == 15


def test_no_torchrun_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.expected() == (0, 1, 0)
    assert processes.join() is ALONE


@pytest.mark.parametrize("found", [("2", "2", "0"), ("x", "2", "0"), ("-1", "2", "0"), ("0", "", "0"), ("0", "2", "y")])
def test_an_environment_without_sense_is_told(monkeypatch, found):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), found, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="the environment names process"):
        processes.expected()


def test_an_error_of_a_lone_process_is_nobody_elses():
    assert not processes.lost(RuntimeError("gloo: Connection closed by peer"))
