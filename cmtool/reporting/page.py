"""One self-contained HTML page about runs: curves, samples over time, quality, and the protocol of each number."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from cmtool.reporting.chart import Chart, Line, svg

_SHOWN = 6  # sample grids of a run, at most

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.2rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); gap: .8rem; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: #444; }
svg .grid { stroke: #e4e4e4; } figcaption { font-size: .85rem; color: #333; }
figcaption span { margin-right: 1rem; white-space: nowrap; }
figcaption i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; border-radius: 2px; }
.grids img { width: 100%; height: auto; image-rendering: pixelated; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td { white-space: nowrap; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .5rem 0; } pre { overflow-x: auto; background: #f6f6f6; padding: .7rem; font-size: .8rem; }
.none { color: #666; }
@media (max-width: 600px) { body { padding: .7rem; } svg text { font-size: 19px; } }
"""


@dataclass
class Run:
    """What a report tells of a run."""

    name: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    grids: Sequence[tuple[int, bytes]]  # step and PNG
    results: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # of cmtool evaluate --out


def page(runs: Sequence[Run], *, version: str) -> str:
    """The page.

    Args:
        runs: at least one; names tell them apart. version: of cmtool.
    """
    names = ", ".join(run.name for run in runs)
    body = [
        f"<h1>{escape(names)}</h1>",
        f"<p>{len(runs)} run{'s' * (len(runs) != 1)}, reported by cmtool {escape(version)}.</p>",
        _overview(runs),
        "<h2>Training</h2>",
        _drawn(_curves(runs)),
        *_quality(runs),
        *_odes(runs),
        "<h2>Samples over time</h2>",
        *map(_samples, runs),
        "<h2>Protocol</h2>",
        *map(_protocol, runs),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(names)}: cmtool report</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts of the page."""
    return [*_curves(runs), *_quality_charts(runs), *_ode_charts(runs)]


def _drawn(shown: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(map(svg, shown))}</div>'


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        recipe = run.config.get("recipe", {})
        last: Mapping[str, Any] = run.lines[-1] if run.lines else {}
        steps = f"{last.get('step', 0):,} of {recipe.get('iterations', 0):,}"
        best = min(_proxies(run), default=None)
        rows.append(
            [run.name, recipe.get("preset"), steps, last.get("images"), recipe.get("batch"), last.get("loss"), best]
        )
    head = ["run", "preset", "steps", "images", "batch", "last loss", "best fd_random"]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="number">{value:.5g}</td>'
        if isinstance(value, int):
            return f'<td class="number">{value:,}</td>'
        return f"<td>{escape(str('' if value is None else value))}</td>"

    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'


def _series(run: Run, name: str) -> Line:
    return Line(run.name, [(line["step"], line[name]) for line in run.lines if line.get(name) is not None])


def _proxies(run: Run) -> list[float]:
    return [value for line in run.lines for name, value in line.items() if name.startswith("fd_random@")]


def _proxy(run: Run) -> Line:
    points = [
        (line["step"], value) for line in run.lines for name, value in line.items() if name.startswith("fd_random@")
    ]
    return Line(run.name, points)


def _curves(runs: Sequence[Run]) -> list[Chart]:
    parts = [
        Chart([_series(run, "loss") for run in runs], title="Loss", x="step", y="loss", log_y=True),
        Chart(
            [_series(run, "grad_norm") for run in runs], title="Norm of the gradient", x="step", y="norm", log_y=True
        ),
        Chart([_series(run, "images_per_second") for run in runs], title="Speed", x="step", y="images/s"),
    ]
    if any(_proxies(run) for run in runs):
        title = "Quality while training: Fréchet distance in random features, no FID"
        parts.append(Chart([_proxy(run) for run in runs], title=title, x="step", y="fd_random", log_y=True, dots=True))
    for run in runs:
        levels = sorted({level for line in run.lines for level in line.get("loss_by_noise") or {}}, key=float)
        lines = [
            Line(
                f"{level} to {float(level) * 10:g}",
                [
                    (line["step"], line["loss_by_noise"][level])
                    for line in run.lines
                    if (line.get("loss_by_noise") or {}).get(level) is not None
                ],
            )
            for level in levels
        ]
        parts.append(Chart(lines, title=f"Loss by noise level: {run.name}", x="step", y="loss", log_y=True))
    return parts


def _rows(run: Run) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return [(result, row) for result in run.results for row in result.get("results", ()) if row.get("nfe")]


def _quality_rows(runs: Sequence[Run]) -> list[tuple[str, int, str, float, float]]:
    """Run, calls, metric, value, seconds a 1,000 images."""
    return [
        (run.name, row["nfe"], name, value, 1000 * row["seconds"] / result["samples"]["count"])
        for run in runs
        for result, row in _rows(run)
        for name, value in row["metrics"].items()
    ]


def _quality_charts(runs: Sequence[Run]) -> list[Chart]:
    """Numbers of `cmtool evaluate` against calls and against seconds."""
    rows, made = _quality_rows(runs), []
    for metric in dict.fromkeys(row[2] for row in rows if not row[2].endswith("_std")):
        mine = [row for row in rows if row[2] == metric]
        for axis in ("network calls", "seconds a 1,000 images"):
            lines = [
                Line(
                    run.name,
                    sorted(
                        (row[1] if axis == "network calls" else row[4], row[3]) for row in mine if row[0] == run.name
                    ),
                )
                for run in runs
            ]
            made.append(Chart(lines, f"{metric} against {axis}", axis, metric, log_x=True, dots=True))
    return made


def _quality(runs: Sequence[Run]) -> list[str]:
    rows = _quality_rows(runs)
    if not rows:
        return []
    head = ["run", "calls", "metric", "value", "seconds a 1,000 images"]
    return ["<h2>Quality</h2>", _drawn(_quality_charts(runs)), _table(head, rows)]


def _ode_rows(runs: Sequence[Run]) -> list[tuple[Run, Mapping[str, Any]]]:
    return [
        (run, row)
        for run in runs
        for result in run.results
        for row in result.get("results", ())
        if "error_from_level" in row
    ]


def _ode_charts(runs: Sequence[Run]) -> list[Chart]:
    """The ODE error from each level of noise."""
    lines = [
        Line(run.name, sorted(zip(row["levels"], row["error_from_level"], strict=True))) for run, row in _ode_rows(runs)
    ]
    title = "Mean squared error of the jump from each noise level of the teacher's trajectory"
    axes = ("noise-to-signal ratio", "error")
    return [Chart(lines, title, *axes, log_x=True, log_y=True, dots=True)] if lines else []


def _odes(runs: Sequence[Run]) -> list[str]:
    rows = [(run.name, name, value) for run, row in _ode_rows(runs) for name, value in row["metrics"].items()]
    if not rows:
        return []
    return ["<h2>Error of the ODE</h2>", _drawn(_ode_charts(runs)), _table(["run", "number", "value"], rows)]


def _samples(run: Run) -> str:
    if not run.grids:
        return f'<h3>{escape(run.name)}</h3><p class="none">No sample grids.</p>'
    last = len(run.grids) - 1
    count = min(_SHOWN, len(run.grids))
    chosen = sorted({round(index * last / max(1, count - 1)) for index in range(count)})
    pictures = [
        f'<figure><img alt="Samples of {escape(run.name)} at step {step}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"><figcaption>step {step:,}</figcaption></figure>'
        for step, png in (run.grids[index] for index in chosen)
    ]
    return f'<h3>{escape(run.name)}</h3><div class="grids">{"".join(pictures)}</div>'


def _protocol(run: Run) -> str:
    def folded(title: str, value: object) -> str:
        text = escape(json.dumps(value, indent=2, ensure_ascii=False))
        return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"

    parts = [folded(f"{run.name}: configuration", run.config)]
    for number, result in enumerate(run.results, 1):
        told = ", ".join(dict.fromkeys(name for row in result.get("results", ()) for name in row["metrics"]))
        parts.append(folded(f"{run.name}: evaluation {number} ({told})", result))
    return "".join(parts)
