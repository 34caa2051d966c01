"""`cmtool info`: what a model file says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.cli import console, options


def info(
    model: Annotated[Path, typer.Argument(metavar="PATH", help="A run folder or a .safetensors file.")],
    as_json: options.Json = False,
) -> None:
    """Say what a model is, without loading it."""
    from cmtool.io import checkpoint

    header = checkpoint.header(model)
    card = header.pop("card")
    described: dict[str, Any] = card | header
    if as_json:
        console.emit_json(described)
    else:
        console.emit_rows([(name, text) for name, value in _rows(described, card) if (text := _text(value))])


def _rows(described: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, Any]]:
    size, channels = card.get("resolution"), card.get("channels")
    classes = card.get("num_classes") or 0
    names = ", ".join(card.get("class_names") or ())
    grid = f"{card.get('grid_points')} points, rho {card.get('grid_rho')}"
    return [
        ("file", f"{described['file']} ({described['bytes'] / 1e6:.1f} MB, cmtool {described['version']})"),
        ("role", card.get("role")),
        ("images", f"{size}x{size}, {channels} channels"),
        ("classes", f"{classes}: {names}" if names else str(classes or "none")),
        ("network", f"{_component(described['network'])}, {described['parameters']:,} parameters"),
        ("path", _component(described["path"])),
        ("parameterization", _component(described["parameterization"])),
        ("grid", grid),
        *((f"times, {calls} calls", values) for calls, values in (card.get("times") or {}).items()),
        *((name, card.get(name)) for name in ("preset", "iterations", "average", "teacher")),
        ("guidance", None if card.get("guidance") == 1 else card.get("guidance")),
        *((name, card.get(name)) for name in ("data", "licence")),
    ]


def _component(value: dict[str, Any]) -> str:
    """A component on one line: its kind, then what it is set to."""
    fields = ", ".join(f"{name}={_text(field)}" for name, field in value.items() if name != "kind")
    return f"{value.get('kind', '')} ({fields})" if fields else str(value.get("kind", ""))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _component(value)
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
