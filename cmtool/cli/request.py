"""Commands whose options are the fields of a dataclass: what several commands share is written once, and inherited."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


def taking(request: type[R]) -> Callable[[Callable[[R], None]], Callable[..., None]]:
    """Let typer call `command(request)`, with an option for every field of the dataclass `request`.

    A field is declared as a parameter would be: `name: Annotated[type, typer.Option(...)] = default`. Required ones
    come first, then those of the class itself, then the inherited ones.
    """
    hints = typing.get_type_hints(request, include_extras=True)

    def place(field: dataclasses.Field[Any]) -> int:
        return 0 if field.default is dataclasses.MISSING else 1 + (field.name not in inspect.get_annotations(request))

    fields = sorted(dataclasses.fields(request), key=place)  # type: ignore[arg-type]
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields
    ]

    def declare(command: Callable[[R], None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            command(request(**given))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {field.name: hints[field.name] for field in fields}
        return call

    return declare
