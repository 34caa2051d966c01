"""What is written about the tool is true of it: links, commands, the reference."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cmtool.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "study_cifar10" / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "LOG.md",
    ROOT / "docs" / "api.md",
]


def test_the_reference_is_current():
    command = [sys.executable, ROOT / "docs" / "reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", outside_code):
        target = link[0] or link[1]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def command_lines() -> list[str]:
    """Every call of cmtool in the shell blocks of the README, one a line."""
    found = []
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\||&&|;|>", line.split(" # ")[0]):
                words = part.split("cmtool ", 1)
                if len(words) == 2 and re.fullmatch(r"(\s*\S*/?|.*-m )", words[0]):
                    found.append(words[1].strip())
    return found


def test_there_are_commands_to_check():
    assert len(command_lines()) > 30


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_their_options_exist(line):
    words = [word for word in shlex.split(line.replace("...", "x")) if word not in ("--quiet", "--debug")]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):  # typer brings its own click
        assert words, line
        name = words.pop(0)
        assert name in command.commands or name.startswith("-"), f"no command {name}: {line}"
        if name.startswith("-"):
            return
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-" and not re.fullmatch(r"-\d.*", word):
            assert word.split("=")[0] in known | {"-h", "--help"}, f"{word}: {line}"
