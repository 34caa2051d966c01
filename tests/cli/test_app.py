"""The boundary: errors, exit codes, help, completion, and how little is imported for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

import cmtool
from cmtool import errors
from cmtool.cli import app as boundary
from cmtool.cli import console


def python(code: str, *argv: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *argv], capture_output=True, text=True, timeout=60, **kwargs
    )


def raising(monkeypatch, error: BaseException) -> None:
    """Make every command line end in `error`."""

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(boundary, "_call", fail)


def test_version(cli):
    assert cli("--version") == (0, f"cmtool {cmtool.__version__}\n".encode(), "")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["sample", "--help"], ["train", "-h"], ["presets", "--help"]])
def test_help_goes_to_stdout(cli, argv):
    result = cli(*argv)
    assert result.code == 0
    assert result.stderr == ""
    assert b"Usage: cmtool" in result.stdout


def test_no_command_prints_the_help_and_is_a_usage_error(cli):
    result = cli()
    assert result.code == 2
    assert b"distill" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smaple"], ["smaple", "did you mean sample?", "see cmtool --help"]),
        (["frobnicate"], ["frobnicate", "known names"]),
        (["presets", "sohw"], ["did you mean show?", "see cmtool presets --help"]),
        (["sample", "--sead", "3"], ["--sead", "did you mean --seeds,", "see cmtool sample --help"]),
        (["sample", "--zzz"], ["--zzz", "see cmtool sample --help"]),
        (["sample", "-Z"], ["-Z", "see cmtool sample --help"]),
        (["--verbsoe"], ["--verbsoe", "see cmtool --help"]),
        (["distill"], ["missing option '--out'", "for example --out runs/first"]),
        (["sample", "--json"], ["there is no place for the images", "add --out"]),
        (["sample", "--model"], ["--model", "requires an argument"]),
        (["sample", "--model", "m", "extra"], ["extra", "see cmtool sample --help"]),
        (["sample", "--model", "m", "--steps", "two"], ["--steps two: expected a whole number", "see cmtool sample"]),
        (["sample", "--model", "m", "--steps", "0"], ["--steps 0: expected 1 or more", "see cmtool sample --help"]),
        (["sample", "--model", "m", "--guidance", "x"], ["--guidance x: expected a number"]),
        (["train", "--out", "x", "--channels", "4"], ["--channels 4: expected 3 or less"]),
        (["train", "--out", "x", "--seed", "-1"], ["--seed -1: expected 0 or more"]),
        (["sample", "--model", "m", "--seeds", "5-3"], ["5-3"]),
        (["sample", "--model", "m", "--solver", "huen"], ["huen", "did you mean heun?"]),
        (["sample", "--model", "m", "--device", "gpu"], ["gpu", "cpu"]),
        (["sample", "--model", "m", "--times", "1,2"], ["--times 1,2"]),
    ],
)
def test_usage_errors_are_two_lines_that_help(cli, argv, words):
    cli(*argv).error(2, *words)


def test_user_errors_carry_their_exit_code(cli, monkeypatch):
    for kind, code in (
        (errors.DataError, 1),
        (errors.UsageError, 2),
        (errors.ConfigError, 2),
        (errors.TrainingError, 1),
    ):
        raising(monkeypatch, kind("no images in x", "look there"))
        assert cli("sample").error(code) == "error: no images in x\nhint: look there\n"


def test_an_error_without_a_hint_still_has_two_lines(cli, monkeypatch):
    raising(monkeypatch, errors.ConfigError("bad"))
    assert cli("presets", "show").error(2) == "error: bad\nhint: see cmtool presets show --help\n"


def test_messages_are_folded_and_cannot_steer_the_terminal(cli, monkeypatch):
    raising(monkeypatch, errors.DataError("a\n  b\x1b[2J [red]c[/red]", "d\r\ne" + " long" * 60))
    text = cli("sample").error(1)
    assert text.startswith("error: a b\\x1b[2J [red]c[/red]\nhint: d e long long")


def test_a_bug_is_called_one_and_shows_its_traceback_only_with_debug(cli, monkeypatch):
    raising(monkeypatch, ZeroDivisionError("by\nzero"))
    cli("sample").error(1, "internal error: ZeroDivisionError: by zero", "--debug")
    for argv in (["--debug", "sample"], ["sample", "--debug"]):
        result = cli(*argv)
        assert result.code == 1
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-2].startswith("error: internal error")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), 1, ["Permission denied", "/root/x"]),
        (OSError(28, "No space left on device"), 1, ["No space left"]),
        (MemoryError("17 GB"), 1, ["out of memory", "--batch"]),
    ],
)
def test_what_the_machine_refuses_is_no_bug(cli, monkeypatch, error, code, words):
    raising(monkeypatch, error)
    text = cli("sample").error(code, *words)
    assert "internal" not in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupt(cli, monkeypatch, error):
    raising(monkeypatch, error)
    assert cli("sample") == (130, b"", "")


@pytest.mark.parametrize("early", [True, False])
def test_an_interrupt_is_quiet_from_the_first_import_on(early):
    module = "cmtool.cli" if early else "cmtool.spec"
    done = python(
        "import runpy, sys\n"
        "class Stopped:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopped())\n"
        "runpy.run_module('cmtool', run_name='__main__')",
        *("presets", "show", "cd"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_broken_pipe_is_quiet(cli, monkeypatch):
    raising(monkeypatch, BrokenPipeError())
    assert cli("sample") == (1, b"", "")


def test_help_into_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"'{sys.executable}' -m cmtool --help | head -c 1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""


def test_global_flags_after_a_double_dash_are_arguments():
    assert boundary._take(["a", "-q", "--", "-q"], "-q") == (["a", "--", "-q"], True)
    assert boundary._take(["a", "--", "-q"], "-q") == (["a", "--", "-q"], False)


@pytest.mark.parametrize("argv", [["-q", "--version"], ["--quiet", "--version"], ["--version", "-q"]])
def test_quiet_holds_for_one_call(cli, argv):
    assert cli(*argv).code == 0
    assert console._quiet
    assert cli("--version").code == 0
    assert not console._quiet


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["distill", "--help"],
        ["sample", "--help"],
        ["inpaint", "--help"],
        ["colorize", "--help"],
        ["superres", "--help"],
        ["info", "--help"],
        ["data", "--help"],
        ["data", "inspect", "--help"],
        ["presets", "ls"],
        ["presets", "ls", "--json"],
        ["presets", "show", "cd", "--no-recipe"],
        ["presets", "show", "cdd"],
        ["smaple"],
        ["sample", "--sead", "3"],
        ["sample", "--model", "m", "--out", "o", "--seeds", "5-3"],
        ["sample", "--model", "m", "--out", "o", "--solver", "x"],
        ["--show-completion", "bash"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(argv):
    done = python(
        "import sys\n"
        "from cmtool.cli.app import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'lpips', 'sklearn', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert code in (0, 2), code\n",
        *argv,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def complete(line: str, word: int) -> list[str]:
    env = os.environ | {"_CMTOOL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    done = python(
        "import sys\nfrom cmtool.cli.app import main\ncode = main([])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)",
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "word", "expected"),
    [
        ("cmtool sam", 1, ["sample"]),
        ("cmtool presets s", 2, ["show"]),
        ("cmtool sample --seed", 2, ["--seeds"]),
        ("cmtool sample --solver h", 3, ["heun"]),
        ("cmtool sample --precision ", 3, ["auto", "fp32", "bf16"]),
    ],
)
def test_completion(line, word, expected):
    assert complete(line, word) == expected


def test_completion_of_presets_offers_their_names():
    assert {"cd", "ct"} <= set(complete("cmtool presets show c", 3))
    assert {"edm", "cd", "ct"} <= set(complete("cmtool train --preset ", 3))


def test_completion_script(cli, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = python("import sys\nfrom cmtool.cli.app import main\nsys.exit(main(['--show-completion', 'bash']))")
    assert done.returncode == 0, done.stderr
    assert "_CMTOOL_COMPLETE=complete_bash" in done.stdout


def test_a_narrow_encoding_does_not_break_output():
    done = python(
        "from cmtool.cli import console\nfrom cmtool.cli.app import main\nmain(['--version'])\n"
        "console.emit_line('caf\\u00e9 \\u2603')\nconsole.note('\\u2603')\nmain(['--help'])",
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "caf? ?" in done.stdout


_BUSY = """
import atexit, threading, time, torch
import cmtool.__main__ as entry
import cmtool.cli.app as app

def work():
    while True:
        kept = [torch.ones(64, 64) @ torch.ones(64, 64) for _ in range(100)]
        del kept

def main():
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    print("answer")
    return 75

app.main = main
atexit.register(print, "farewell")
entry.run()
"""


def test_threads_inside_torch_do_not_break_the_end():
    """Python stops them where they are, which C++ takes for a fatal error."""
    run = subprocess.run(
        [sys.executable, "-c", _BUSY], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (run.returncode, run.stdout, run.stderr) == (75, "answer\nfarewell\n", "")
