"""Components as data: frozen dataclasses to plain JSON values and back.

The only (de)serialiser of the project. A component becomes `{"kind": "<name>", <fields>}`, where the name is looked up
in a table the caller passes, so that reading a file can never build anything that is not in the table.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from cmtool.errors import ConfigError, nearest

Kinds = Mapping[str, type]
_PLAIN = (bool, int, float, str, type(None))


def to_dict(component: Any) -> Any:
    """A component as JSON values; the inverse of `from_dict`.

    Dataclasses carry their `kind` class attribute when they have one; tuples become lists.
    """
    if dataclasses.is_dataclass(component) and not isinstance(component, type):
        kind = getattr(component, "kind", None)
        fields = {f.name: to_dict(getattr(component, f.name)) for f in dataclasses.fields(component)}
        return ({"kind": kind} if kind else {}) | fields
    if isinstance(component, (list, tuple)):
        return [to_dict(item) for item in component]
    if isinstance(component, Mapping):
        return {str(key): to_dict(value) for key, value in component.items()}
    if component is None or isinstance(component, (bool, int, float, str)):
        return component
    raise TypeError(f"{type(component).__name__} is not a component")


def from_dict(data: Any, hint: Any, kinds: Kinds, where: str = "config") -> Any:
    """Build what the type `hint` asks for out of JSON values.

    Args:
        data: JSON values, as `to_dict` makes them.
        hint: a dataclass, a protocol (then `data["kind"]` names a class of `kinds`), or a plain type.
        kinds: name -> dataclass for every component that may be named by `kind`.
        where: the dotted place, for messages.
    Raises:
        ConfigError: unknown kinds or fields, missing fields, values of another type.
    """
    if hint is Any:
        return data
    origin = get_origin(hint)
    components = _components(hint)
    if components and isinstance(data, Mapping) and "kind" in data:
        return _from_kind(data, components, kinds, where)
    if origin in (Union, types.UnionType):
        return _from_union(data, get_args(hint), kinds, where)
    if origin is Literal:
        if data not in get_args(hint):
            raise ConfigError(f"{where}: {data!r} is not one of {', '.join(map(repr, get_args(hint)))}")
        return data
    if origin in (tuple, list):
        if not isinstance(data, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {data!r}")
        inner = get_args(hint)
        if origin is tuple and inner[-1] is not Ellipsis and len(data) != len(inner):
            raise ConfigError(f"{where}: expected {len(inner)} values, found {len(data)}")
        items = [
            from_dict(item, inner[0] if inner[-1] is Ellipsis or origin is list else inner[i], kinds, f"{where}.{i}")
            for i, item in enumerate(data)
        ]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected named values, found {data!r}")
        inner = get_args(hint)[1]
        return {str(key): from_dict(value, inner, kinds, f"{where}.{key}") for key, value in data.items()}
    if hint in _PLAIN:
        return _plain(data, hint, where)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected the fields of a {getattr(hint, '__name__', hint)}, found {data!r}")
    if not dataclasses.is_dataclass(hint):
        raise ConfigError(f"{where}: the kind is missing", f"add kind = one of {', '.join(sorted(kinds))}")
    assert isinstance(hint, type)
    return _build(hint, dict(data), kinds, where)


def replace(component: Any, path: str, value: str, kinds: Kinds) -> Any:
    """`component` with the field at the dotted `path` set from the text `value` (`--set a.b=c`).

    The text is read as the field's own type: numbers, `true`/`false`, `none`, comma-separated lists; a field that holds
    a component takes the name of a kind (with that kind's defaults).
    """
    names = path.split(".")
    return _replace(component, names, value, kinds, path)


def _replace(component: Any, names: list[str], value: str, kinds: Kinds, path: str, hint: Any = None) -> Any:
    if isinstance(component, tuple):
        index = int(names[0]) if names[0].isdigit() else -1
        inner = get_args(hint)[:1]
        if len(names) == 1 and 0 <= index <= len(component) and inner and _components(inner[0]):
            # another component in its place, or one more at the end
            item = from_dict(_parse(value, inner[0], kinds), inner[0], kinds, f"--set {path}")
            return (*component[:index], item, *component[index + 1 :])
        if not 0 <= index < len(component):
            raise ConfigError(f"--set {path}: {names[0]!r} is not an index from 0 to {len(component) - 1}")
        if len(names) == 1:
            raise ConfigError(f"--set {path}: name one of its fields", _field_hint(component[index]))
        item = _replace(component[index], names[1:], value, kinds, path)
        return (*component[:index], item, *component[index + 1 :])
    if not dataclasses.is_dataclass(component):
        raise ConfigError(f"--set {path}: {names[0]!r} is not a part of {component!r}")
    hints = typing.get_type_hints(type(component))
    known = [f.name for f in dataclasses.fields(component)]
    if names[0] not in known:
        raise ConfigError(f"--set {path}: {type(component).__name__} has no {names[0]!r}", nearest(names[0], known))
    if len(names) > 1:
        new = _replace(getattr(component, names[0]), names[1:], value, kinds, path, hints[names[0]])
    else:
        new = from_dict(_parse(value, hints[names[0]], kinds), hints[names[0]], kinds, f"--set {path}")
    return _checked(lambda: dataclasses.replace(component, **{names[0]: new}), f"--set {path}")  # type: ignore[type-var]


def _parse(text: str, hint: Any, kinds: Kinds) -> Any:
    """The JSON value that the text stands for, guided by the type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null"):
            return None
        rest = [arg for arg in args if arg is not type(None)]
        if len(rest) == 1:
            return _parse(text, rest[0], kinds)
        for arg in rest:
            if arg in (bool, int, float):
                parsed = _parse(text, arg, kinds)
                if not isinstance(parsed, str):
                    return parsed
        return {"kind": text} if _components(hint) else text
    if origin in (tuple, list):
        return [_parse(part.strip(), args[0], kinds) for part in text.split(",") if part.strip()]
    if hint is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if hint is int and number.is_integer() else number
    if hint is str or origin is Literal:
        return text
    return {"kind": text}


def _plain(data: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(data, hint) and not (hint in (int, float) and isinstance(data, bool)):
        return data
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    raise ConfigError(f"{where}: expected {names[hint]}, found {data!r}")


def _components(hint: Any) -> tuple[type, ...]:
    """The classes of components among the alternatives of a type; a protocol or `object` stands for all of them."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(option for option in options if isinstance(option, type) and option not in _PLAIN)


def _from_kind(data: Mapping[str, Any], components: tuple[type, ...], kinds: Kinds, where: str) -> Any:
    open_to_all = not all(dataclasses.is_dataclass(cls) for cls in components)
    allowed = {kind: cls for kind, cls in kinds.items() if open_to_all or issubclass(cls, components)}
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in allowed:
        raise ConfigError(f"{where}: there is no kind {kind!r} here", nearest(str(kind), allowed))
    return _build(allowed[kind], {key: value for key, value in data.items() if key != "kind"}, kinds, where)


def _from_union(data: Any, options: tuple[Any, ...], kinds: Kinds, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    failure: ConfigError | None = None
    for option in options:
        try:
            return from_dict(data, option, kinds, where)
        except ConfigError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _build(cls: type, fields: dict[str, Any], kinds: Kinds, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in fields:
        if name not in known:
            raise ConfigError(f"{where}: {cls.__name__} has no {name!r}", nearest(name, known))
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise ConfigError(f"{where}: {cls.__name__} needs {name!r}")
    values = {name: from_dict(value, hints[name], kinds, f"{where}.{name}") for name, value in fields.items()}
    return _checked(lambda: cls(**values), where)


def _checked(make: Any, where: str) -> Any:
    """Components check their own values with ValueError; here it becomes a message for the user."""
    try:
        return make()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _field_hint(component: Any) -> str:
    if not dataclasses.is_dataclass(component):
        return ""
    return "fields: " + ", ".join(f.name for f in dataclasses.fields(component))
