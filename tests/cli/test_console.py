"""Progress where there is no terminal, and lines that stay lines."""

from __future__ import annotations

import io
import json

import pytest

from cmtool.cli import console


@pytest.fixture(autouse=True)
def _loud():
    console.set_quiet(False)


def run(monkeypatch, seconds: float, **kwargs) -> None:
    """100 steps of `seconds` each, on a clock of our own."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("sample", 100, **kwargs) as update:
        for step in range(1, 101):
            now[0] += seconds
            update(step, f"loss {step}")


def test_plain_lines_once_in_a_while_and_at_the_end(monkeypatch, capsys):
    run(monkeypatch, 1.0, every=30)
    assert capsys.readouterr().err.splitlines() == [
        "sample 30/100, 1:10 left, loss 30",
        "sample 60/100, 0:40 left, loss 60",
        "sample 90/100, 0:10 left, loss 90",
        "sample 100/100, loss 100",
    ]


def test_what_is_quickly_done_says_nothing(monkeypatch, capsys):
    run(monkeypatch, 0.01)
    assert capsys.readouterr() == ("", "")


def test_quiet_is_quiet(monkeypatch, capsys):
    console.set_quiet(True)
    run(monkeypatch, 100.0)
    console.note("hello")
    assert capsys.readouterr() == ("", "")


def test_results_are_not_silenced_wrapped_or_interpreted(capsys):
    console.set_quiet(True)
    long = "/tmp/" + "x" * 300 + " [bold]y"
    console.emit_line(long)
    console.emit_rows([("path", long), ("a", "1")])
    assert capsys.readouterr().out.splitlines() == [long, f"path  {long}", "a     1"]


def test_json_is_one_object(capsys):
    console.emit_json({"path": "caf\u00e9\udcff", "n": 1})
    assert json.loads(capsys.readouterr().out) == {"path": "caf\u00e9\udcff", "n": 1}
    with pytest.raises(ValueError, match="nan"):
        console.emit_json({"x": float("nan")})


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert console.clock(seconds) == text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_live_and_errors_are_painted(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with console.progress("sample", 3) as update:
        update(3, "loss 1 [red]")
        console.emit_line("result")  # stdout is a pipe here: its lines stay there
    console.error("it broke", "mend it " + "x" * 300)
    text = terminal.getvalue()
    assert "3/3" in text
    assert "loss 1 [red]" in text
    assert capsys.readouterr().out == "result\n"
    assert "\x1b[1;31merror:\x1b[0m it broke\n" in text
    assert text.endswith("mend it " + "x" * 300 + "\n")


def test_a_dumb_terminal_gets_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    run(monkeypatch, 1.0, every=50)
    assert terminal.getvalue().splitlines()[0] == "sample 50/100, 0:50 left, loss 50"
