"""`cmtool info`: what a model is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cmtool.cli import console, options


def info(
    model: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run, a file, a released name, hf:owner/name or https://.")
    ],
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Ask the network, too: the boundary f(x, t_min) = x.")
    ] = True,
    role: options.Role = None,
    as_json: options.Json = False,
) -> None:
    """Say what a model is, and what looks wrong with it.

    Of any file that cmtool can load: network, path, scalings, what the network is told of the time, sizes, where it
    comes from and under which licence. With the check it is loaded and asked once or twice.
    """
    from cmtool.io import loading

    with console.fetching(model) as update:
        described, imported = loading.describe(model, role=role, progress=update)  # type: ignore[arg-type]
    card = described.pop("card")
    doubts = [*(card.get("notes") or ())]
    checked: dict[str, Any] = {}
    if check:
        from cmtool.io import checks
        from cmtool.io.imported import assemble

        flow = assemble(imported or loading.read(model, role=role))  # type: ignore[arg-type]
        findings = checks.examine(flow)
        checked = {"boundary": console.finite(findings.boundary), "largest": console.finite(findings.largest)}
        doubts += findings.doubts
    described = card | described | checked | {"notes": doubts}
    if as_json:
        console.emit_json(described)
    else:
        rows = [(name, text) for name, value in _rows(described, card) if (text := _text(value))]
        console.emit_rows([*rows, *(("note", doubt) for doubt in doubts)])


def _rows(described: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, Any]]:
    from cmtool.io.loading import FORMATS, time_input

    size, channels = card.get("resolution"), card.get("channels")
    classes = card.get("num_classes") or 0
    names = ", ".join(card.get("class_names") or ())
    grid = f"{card.get('grid_points')} points, rho {card.get('grid_rho')}"
    version = f" {described['version']}" if described["version"] else ""
    boundary = described.get("boundary")
    return [
        ("file", f"{described['file']} ({described['bytes'] / 1e6:.1f} MB)"),
        ("format", f"{FORMATS[described['format']]}{version}"),
        ("role", card.get("role")),
        ("images", f"{size}x{size}, {channels} channels"),
        ("classes", f"{classes}: {names}" if names else str(classes or "none")),
        ("network", f"{_component(described['network'])}, {described['parameters']:,} parameters"),
        ("weights", described.get("dtypes")),
        ("path", _component(described["path"])),
        ("parameterization", _component(described["parameterization"])),
        ("time input", time_input(described["parameterization"])),
        ("grid", grid),
        *((f"times, {calls} calls", values) for calls, values in (card.get("times") or {}).items()),
        *((name, card.get(name) or None) for name in ("preset", "iterations", "average", "teacher")),
        ("guidance", None if card.get("guidance", 1) == 1 else card.get("guidance")),
        *((name, card.get(name)) for name in ("data", "source", "licence")),
        ("boundary", None if boundary is None else f"max |f(x, t_min) - x| = {boundary:.2g}"),
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
