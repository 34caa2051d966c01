"""Who is gone without a word, with a store that is a dictionary."""

from __future__ import annotations

import threading
import time

import pytest

from cmtool.errors import ProcessError, UsageError
from cmtool.pulse import Pulse, patience


class Board:
    """A store that can be cut off; a question then waits as long as torch's would."""

    def __init__(self):
        self.values, self.reachable = {}, threading.Event()
        self.reachable.set()

    def set(self, key, value):
        self.multi_get([])
        self.values[key] = value

    def multi_get(self, keys):
        if not self.reachable.wait(0.5):
            raise RuntimeError("timeout")
        return [self.values[key].encode() for key in keys]


@pytest.fixture
def watch():
    """Pulses on one board, started together; what each has reported."""
    made = []

    def watch(count, board, seconds=0.6):
        said = [[] for _ in range(count)]
        pulses = [Pulse(board, rank, count, seconds, said[rank].append) for rank in range(count)]
        for one in pulses:
            one.start()
        made.extend(pulses)
        return pulses, said

    yield watch
    for one in made:
        one.stop()


def soon(true):
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_the_living_are_left_alone(watch):
    pulses, said = watch(3, Board(), seconds=2)
    time.sleep(4)
    assert said == [[], [], []]
    for one in pulses:
        one.stop()
    time.sleep(3)
    assert said == [[], [], []]  # those that have parted watch nobody


def test_the_first_notices_any_other(watch):
    pulses, said = watch(4, Board())
    pulses[2].stop()
    soon(lambda: said[0])
    (error,) = said[0]
    assert isinstance(error, ProcessError)
    assert error.message == "process 2 of 4 has given no sign of life for 0.6 s"
    assert not said[1]  # they watch the first alone


def test_several_are_one_message(watch):
    board = Board()
    pulses, said = watch(4, board, seconds=1)
    for one in pulses[1:]:
        one.stop()
    pulses[0]._heard = dict.fromkeys((1, 2, 3), time.monotonic())  # of the same moment
    soon(lambda: said[0])
    assert said[0][0].message == "3 processes (the first is 1) of 4 have given no sign of life for 1 s"
    time.sleep(0.5)
    assert len(said[0]) == 1


def test_all_notice_the_first(watch):
    pulses, said = watch(3, Board())
    pulses[0].stop()
    soon(lambda: said[1] and said[2])
    assert [one.message for one in said[1]] == ["process 0 of 3 has given no sign of life for 0.6 s"]


def test_a_board_out_of_reach_is_the_first_gone(watch):
    board = Board()
    _, said = watch(2, board)
    board.reachable.clear()
    soon(lambda: said[0] and said[1])
    assert "process 0 of 2" in said[1][0].message


def test_a_moment_out_of_reach_is_forgiven(watch):
    board = Board()
    _, said = watch(2, board, seconds=3)
    for _ in range(2):
        board.reachable.clear()
        time.sleep(0.8)
        board.reachable.set()
        time.sleep(0.5)
    assert said == [[], []]


def test_who_was_held_up_itself_asks_again_first(watch, monkeypatch):
    _, said = watch(2, Board(), seconds=1.2)
    clock = time.monotonic
    monkeypatch.setattr("cmtool.pulse.time.monotonic", lambda: clock() + 100)  # as after a stop of all processes
    time.sleep(1)
    assert said == [[], []]


def test_patience(monkeypatch):
    monkeypatch.delenv("CMTOOL_PATIENCE", raising=False)
    assert patience() == 180
    monkeypatch.setenv("CMTOOL_PATIENCE", "2.5")
    assert patience() == 2.5
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("CMTOOL_PATIENCE", text)
        with pytest.raises(UsageError, match="a number of seconds"):
            patience()
