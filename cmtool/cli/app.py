"""The command `cmtool`: its commands, and the one place where errors become text and exit codes.

Nothing here, nor any command module at import, may load torch or numpy: help, completion and usage errors stay instant.
"""

from __future__ import annotations

import io
import os
import platform
import re
import sys
import traceback
from contextlib import nullcontext, redirect_stdout, suppress
from typing import Annotated, Any

import typer
from typer.main import get_command

from cmtool import __version__, errors, processes
from cmtool.cli import (
    average,
    bench,
    colorize,
    console,
    convert,
    data,
    deblur,
    denoise,
    doctor,
    evaluate,
    fetch,
    info,
    inpaint,
    interpolate,
    models,
    pairs,
    presets,
    report,
    sample,
    search,
    stats,
    stroke,
    studio,
    superres,
    train,
)

app = typer.Typer(
    name="cmtool",
    help="Train, distil, sample and edit with consistency models.",
    epilog="--quiet and --debug may also stand after the command.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    rich_markup_mode=None,  # plain help: twice as fast, and brackets in it mean nothing
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("train")(train.train)
app.command("distill")(train.distill)
app.command("pairs", short_help="Solve a model's ODE into noise-image pairs.")(pairs.pairs)
app.command("sample")(sample.sample)
app.command("inpaint")(inpaint.inpaint)
app.command("colorize")(colorize.colorize)
app.command("superres")(superres.superres)
app.command("deblur", short_help="Sharpen an image whose blur is known.")(deblur.deblur)
app.command("stroke", short_help="Make a picture out of rough strokes.")(stroke.stroke)
app.command("interpolate", short_help="Show the way from sample to sample.")(interpolate.interpolate)
app.command("denoise", short_help="Take noise out of an image.")(denoise.denoise)
app.command("studio", short_help="Edit by hand, in a browser.")(studio.studio)
app.command("evaluate", short_help="Measure the quality of samples.")(evaluate.evaluate)
app.command("search", short_help="Search for the times of a few network calls.")(search.search)
app.command("stats", short_help="Write reference statistics of images.")(stats.stats)
app.command("report", short_help="Write a page about runs.")(report.report)
app.command("info")(info.info)
app.command("convert", short_help="Write a model in another format, checked.")(convert.convert)
app.command("average", short_help="List or write a run's averaged weights.")(average.average)
app.command("fetch", short_help="Download models ahead of time.")(fetch.fetch)
app.command("bench", short_help="Measure this machine beside plain PyTorch.")(bench.bench)
app.command("doctor", short_help="Say what works on this machine.")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(presets.app, name="presets")
app.add_typer(data.app, name="data")

# typer hides its copy of click; the exceptions' common ancestors are reached through the one name it exports.
_UsageError: Any = typer.BadParameter.__bases__[0]
_ClickException: Any = _UsageError.__bases__[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cmtool {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes, only results.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    # `main` takes --quiet and --debug out, wherever they stand; here they are listed for the help and for completion.
    del version, quiet, debug


def main(argv: list[str] | None = None) -> int:
    """Run one command line in this process and return its exit code; never raises, never exits.

    Exit codes: 0 ok, 1 failure, 2 usage, 75 stopped but resumable, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a stand-in stream, or a closed one
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    argv, debug = _take(argv, "--debug")
    argv, quiet = _take(argv, "--quiet", "-q")
    console.set_quiet(quiet)
    try:
        rank, count, _ = processes.expected()
        if rank:  # the first process speaks for all
            console.set_quiet(True)
        if count > 1:
            _check_shared(argv)
            processes.when_silent(lambda error: _end(error, argv))
        with redirect_stdout(io.StringIO()) if rank else nullcontext():
            code = _call(argv)
            processes.leave()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone: nobody is left to tell. Python would flush once more at exit, hence the null device.
        with suppress(AttributeError, ValueError, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no mistake yet: show what there is
            print(error)
            return 2
        if debug:
            traceback.print_exc()
        message, hint, code = _explain(error, argv)
        if _is_told(error, message):
            console.error(message, hint)
        return code


def _call(argv: list[str]) -> int:
    """Let typer parse and run `argv`; exits become return values."""
    stdout, stderr = sys.stdout, sys.stderr
    try:
        result = get_command(app).main(args=argv, prog_name="cmtool", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SystemExit as error:  # completion leaves this way, and so does a broken pipe, after wrapping the streams
        broken = sys.stdout is not stdout
        sys.stdout, sys.stderr = stdout, stderr
        if broken:
            raise BrokenPipeError from error
        return error.code if isinstance(error.code, int) else 0


def _check_shared(argv: list[str]) -> None:
    """Refuse several processes where each would do the whole work."""
    command = _command_path(argv)
    if command.removeprefix("cmtool").strip() not in ("", *_SHARED) and not {"-h", "--help"} & set(argv):
        raise errors.UsageError(
            f"{command} works in one process, and torchrun has started several",
            f"run it without torchrun; {', '.join(_SHARED)} share their work",
        )


_SHARED = ("train", "distill", "pairs", "sample", "evaluate", "stats", "search")


def _is_told(error: Exception, message: str) -> bool:
    """Whether this process is the one of several to say it."""
    team = processes.current()
    if not team.many:  # what went wrong before they met, goes wrong for all
        return os.environ.get("RANK", "0") == "0"
    if processes.lost(error):  # on each machine: the other one's screen may be far away
        return team.local_rank == 0 or team.is_new(f"{message} {platform.node()}")
    return team.is_new(message)


def _end(error: errors.ProcessError, argv: list[str]) -> None:
    """Leave at once, since another process is gone: the main thread may wait for it for ever.

    One on each machine says it: its first process, or the second where the first of all is what is gone.
    """
    team = processes.current()
    try:
        if team.local_rank == 0 or (team.rank, team.local_rank) == (1, 1):
            console.error(error.message, f"{error.hint}{_goes_on(argv)}")
    finally:
        processes.end(error.exit_code)


def _goes_on(argv: list[str]) -> str:
    return "; --resume continues from the last checkpoint" if {"train", "distill"} & set(argv) else ""


def _take(argv: list[str], *names: str) -> tuple[list[str], bool]:
    """`argv` without the flag, and whether it was there; what follows `--` is left alone."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [arg for arg in argv[:end] if arg not in names]
    return kept + argv[end:], len(kept) < end


def _explain(error: Exception, argv: list[str]) -> tuple[str, str, int]:
    """Message, hint and exit code for anything that reached the top."""
    see = f"see {_command_path(argv)} --help"
    if isinstance(error, errors.UserError):
        return error.message, error.hint or see, error.exit_code
    if isinstance(error, _ClickException):
        message, hint = _usage(error)
        return message, hint + ("" if not hint else " " if hint.endswith("?") else "; ") + see, error.exit_code
    if processes.lost(error):
        return "another process of this command has ended", f"see what it said{_goes_on(argv)}", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        trains = _command_path(argv).split()[-1] in ("train", "distill")
        hint = "add --micro-batch auto or --checkpoint-activations" if trains else "try a smaller --batch"
        return f"out of memory: {error}", f"{hint}, or --device cpu", 1
    if isinstance(error, OSError) and error.strerror:
        places = ", ".join(repr(os.fspath(name)) for name in (error.filename, error.filename2) if isinstance(name, str))
        return f"{error.strerror}: {places}".rstrip(": "), "check the path, the permissions and the space left", 1
    return f"internal error: {type(error).__name__}: {error}", "report what --debug and cmtool doctor print", 1


def _usage(error: Any) -> tuple[str, str]:
    """What typer has to say about a command line, as message and hint."""
    unknown = re.match(r"No such command '(.*?)'", error.message)
    if unknown and error.ctx:
        return f"there is no command {unknown[1]!r}", errors.nearest(unknown[1], error.ctx.command.commands)
    if hasattr(error, "possibilities"):
        close = ", ".join(error.possibilities or ())
        return f"there is no option {error.option_name}", f"did you mean {close}?" if close else ""
    # Newer typers judge values by pydantic, whose words are for programmers.
    found = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else {}
    if found.get("type") in _EXPECTED:
        expected = _EXPECTED[found["type"]].format(**found.get("ctx", {}))
        return f"{error.param.opts[0]} {found['input']}: expected {expected}", ""
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:], ""


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # what torch says of a CPU's

_EXPECTED = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
}


def _command_path(argv: list[str]) -> str:
    """The command that `argv` names, as far as it names one: what to ask for help."""
    command: Any = get_command(app)
    path = ["cmtool"]
    for word in argv:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            path.append(word)
    return " ".join(path)
