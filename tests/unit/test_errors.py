"""Errors a user can mend: their text, exit codes, and the names they offer."""

from __future__ import annotations

import inspect

import pytest

from cmtool import errors


def test_text():
    error = errors.DataError("no images in x", "look in y")
    assert (error.message, error.hint) == ("no images in x", "look in y")
    assert str(error) == "no images in x (look in y)"
    assert str(errors.DataError("no images in x")) == "no images in x"


def test_the_tree_and_its_exit_codes():
    kinds = {
        name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
    }
    assert all(issubclass(kind, errors.UserError) for kind in kinds.values())
    usage = {"UsageError", "ConfigError"}
    assert {name: kind.exit_code for name, kind in kinds.items()} == {name: 2 if name in usage else 1 for name in kinds}
    assert issubclass(errors.DivergenceError, errors.TrainingError)
    drawn = errors.__doc__ or ""
    assert all(name in drawn for name in kinds)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("huen", "did you mean heun?"),
        ("euler2", "did you mean euler?"),
        ("zzzz", "known names: dpm2, euler, heun"),
        ("", "known names: dpm2, euler, heun"),
    ],
)
def test_nearest(name, text):
    assert errors.nearest(name, ["heun", "euler", "dpm2"]) == text
