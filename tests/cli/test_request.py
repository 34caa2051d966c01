"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import typer
from typer.main import get_command

from cmtool.cli.request import taking


@dataclass(frozen=True, kw_only=True)
class Base:
    name: ClassVar[str] = "base"

    out: Annotated[Path, typer.Option("--out", help="Out.")]
    many: Annotated[list[int] | None, typer.Option("--many", help="Many.")] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed.")] = 3
    hidden: Annotated[str | None, typer.Option("--hidden", hidden=True, help="Hidden.")] = None


@dataclass(frozen=True, kw_only=True)
class More(Base):
    name: ClassVar[str] = "more"

    factor: Annotated[int, typer.Option("--factor", help="Factor.")]
    extra: Annotated[bool, typer.Option("--extra", help="Extra.")] = False
    hidden: Annotated[str | None, typer.Option("--shown", help="Shown.")] = None


@pytest.fixture
def ask():
    app, seen = typer.Typer(), []

    @app.command("base")
    @taking(Base)
    def base(request: Base) -> None:
        """The help of base."""
        seen.append(request)

    @app.command("more")
    @taking(More)
    def more(request: More) -> None:
        """The help of more."""
        seen.append(request)

    def call(*argv: str):
        get_command(app).main(args=list(argv), standalone_mode=False)
        return seen[-1]

    call.commands = get_command(app).commands
    return call


def test_a_command_gets_what_stands_on_the_command_line(ask):
    assert ask("base", "--out", "x") == Base(out=Path("x"))
    told = ask("more", "--factor", "2", "--out", "y", "--many", "4", "--many", "5", "--shown", "z", "--extra")
    assert told == More(out=Path("y"), factor=2, many=[4, 5], extra=True, hidden="z")
    assert (type(told), told.seed) == (More, 3)
    for argv in (["more", "--out", "x"], ["base", "--out", "x", "--seed", "-1"], ["base", "--out", "x", "--extra"]):
        with pytest.raises(typer.BadParameter.__bases__[0]):
            ask(*argv)


def test_required_options_come_first_then_a_commands_own(ask):
    names = [parameter.name for parameter in ask.commands["more"].params if parameter.name != "help"]
    assert names == ["out", "factor", "hidden", "extra", "many", "seed"]
    assert [parameter.hidden for parameter in ask.commands["base"].params if parameter.name == "hidden"] == [True]
    assert [parameter.hidden for parameter in ask.commands["more"].params if parameter.name == "hidden"] == [False]
    assert ask.commands["more"].help == "The help of more."
