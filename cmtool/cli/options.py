"""The options that several commands share, and how their text becomes values.

A parser raises `UsageError` and needs no torch: a wrong command line is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from cmtool.errors import UsageError, nearest
from cmtool.io.box import DEFAULT

TRACKERS = ("tensorboard", "wandb")
SOLVERS = ("euler", "heun", "dpm2", "ddim", "ancestral")
LANDINGS = ("t_min", "next")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
ROLES = ("denoiser", "consistency", "flow_map")
CROPS = ("center", "none")
RESIZES = ("box", "bilinear", "bicubic", "lanczos", "none")
MAX_SEEDS = 1_000_000
MAX_SEED = 2**63 - 1


def parse_seeds(text: str) -> list[int]:
    """`0-63,100` as a list of seeds: inclusive ranges and single numbers, in the order given, each once.

    Raises:
        UsageError: nothing, no whole numbers, an empty range, numbers from 2^63 on, more than a million seeds.
    """
    hint = "write whole numbers and ranges, for example --seeds 0-63,100"
    spans = _spans(text, "--seeds", hint)
    for _, high in spans:
        if high > MAX_SEED:
            raise UsageError(f"--seeds {text}: {high} is too large, the largest seed is 2^63 - 1", hint)
    count = sum(high - low + 1 for low, high in spans)
    if count > MAX_SEEDS:
        raise UsageError(f"--seeds {text}: {count} seeds are more than the {MAX_SEEDS} of one call", "split the call")
    return list(dict.fromkeys(seed for low, high in spans for seed in range(low, high + 1)))


def parse_labels(text: str, num_classes: int, class_names: Sequence[str] = ()) -> list[int]:
    """`0-9`, `3,5` or class names as a list of class indices.

    Args:
        num_classes: how many classes the model knows.
        class_names: their names, if they have any; a name wins over a number.
    Raises:
        UsageError: the model has no classes, or one of the labels is not among them.
    """
    if not num_classes:
        raise UsageError("--labels: this model knows no classes", "leave --labels out")
    known = f"0-{num_classes - 1}" + (" or " + ", ".join(class_names[:12]) if class_names else "")
    hint = f"this model knows the classes {known}" + (", ..." if len(class_names) > 12 else "")
    labels: list[int] = []
    for part in _parts(text, "--labels", hint):
        if part in class_names:
            labels.append(class_names.index(part))
        elif re.fullmatch(r"[\d\s-]+", part):
            for low, high in _spans(part, "--labels", hint):
                if high >= num_classes:
                    raise UsageError(f"--labels {text}: there is no class {high}", hint)
                labels.extend(range(low, high + 1))
        else:
            close = nearest(part, class_names) if class_names else hint
            raise UsageError(f"--labels {text}: there is no class {part!r}", close)
    return labels


def parse_times(text: str, option: str = "--times") -> list[float]:
    """`80,0.8` as a falling list of positive times.

    Raises:
        UsageError: nothing, no numbers, not positive, or not falling.
    """
    hint = f"write falling positive numbers, for example {option} 80,0.8"
    times: list[float] = []
    for part in _parts(text, option, hint):
        try:
            value = float(part)
        except ValueError:
            raise UsageError(f"{option} {text}: {part!r} is not a number", hint) from None
        if not 0 < value < float("inf"):
            raise UsageError(f"{option} {text}: {part} is not a positive number", hint)
        if times and value >= times[-1]:
            raise UsageError(f"{option} {text}: {part} does not fall below {times[-1]:g}", hint)
        times.append(value)
    return times


def parse_churn(text: str) -> tuple[float, ...]:
    """`40` or `40,0.05,50,1.003`: S_churn, and S_min, S_max, S_noise if they are given.

    Raises:
        UsageError: no numbers, more than four, negative ones, or an empty range of noise levels.
    """
    hint = "write the amount, and if you like lowest level, highest level, noise: --churn 40,0.05,50,1.003"
    values: list[float] = []
    for part in _parts(text, "--churn", hint):
        try:
            values.append(float(part))
        except ValueError:
            raise UsageError(f"--churn {text}: {part!r} is not a number", hint) from None
    if len(values) > 4:
        raise UsageError(f"--churn {text}: expected 1 to 4 numbers, found {len(values)}", hint)
    for index, value in enumerate(values):
        if not 0 <= value < float("inf") and (index, value) != (2, float("inf")):
            raise UsageError(f"--churn {text}: {value:g} is not a number from 0 on", hint)
    if len(values) > 2 and values[1] > values[2]:
        raise UsageError(f"--churn {text}: the levels from {values[1]:g} to {values[2]:g} are none", hint)
    return tuple(values)


def _finite(value: float) -> float:
    if not -float("inf") < value < float("inf"):
        raise UsageError(f"--guidance {value:g} is not a finite number", "1 is no guidance; for example --guidance 2")
    return value


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]{1,2})?)\s*([A-Za-z]*)")


def parse_count(text: str, option: str = "count") -> int:
    """`400`, `12k`, `1.5M` (thousands, millions) or `2Ki`, `2Mi` (powers of 1024) as a positive whole number."""
    hint = "write a whole number, with k, M, G or Ki, Mi, Gi if you like: 400, 12k, 1.5M, 2Ki"
    match = _COUNT.fullmatch(text.strip())
    unit = match and {name.lower(): factor for name, factor in _UNITS.items()}.get(match[2].lower())
    if not match or unit is None:
        raise UsageError(f"{option} {text}: not a count", hint)
    value = Fraction(match[1]) * unit
    if value.denominator != 1 or not 0 < value < 2**63:
        raise UsageError(f"{option} {text}: not a positive whole number below 2^63", hint)
    return int(value)


def parse_micro_batch(text: str) -> int | None:
    """`auto` as None, or a positive whole number.

    Raises:
        UsageError: neither.
    """
    if text.strip().lower() == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or int(text) < 1:
        raise UsageError(f"--micro-batch {text}: expected a positive whole number or auto", "for example 16, or auto")
    return int(text)


def parse_names(text: str, option: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(_parts(text, option, "separate the names by commas")))


def parse_steps(text: str) -> list[int]:
    """Comma-separated numbers of steps, each at least 1.

    Raises:
        UsageError: anything else.
    """
    found = []
    for part in _parts(text, "--steps", "for example --steps 1,2,4"):
        if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) < 1:
            raise UsageError(f"--steps {text}: {part!r} is no number of steps", "for example --steps 1,2,4")
        found.append(int(part))
    return list(dict.fromkeys(found))


def parse_trackers(text: str) -> tuple[str, ...]:
    """Comma-separated names of trackers.

    Raises:
        UsageError: another name.
    """
    hint = f"for example --track {TRACKERS[0]}, or both: --track {','.join(TRACKERS)}"
    names = tuple(dict.fromkeys(_parts(text, "--track", hint)))
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--track: there is no tracker {name!r}", hint)
    return names


def _parts(text: str, option: str, hint: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{option} {text!r}: an entry is empty", hint)
    return parts


def _spans(text: str, option: str, hint: str) -> list[tuple[int, int]]:
    """Comma-separated numbers and `low-high` ranges, both ends included."""
    spans = []
    for part in _parts(text, option, hint):
        match = re.fullmatch(r"([0-9]{1,30})(?:\s*-\s*([0-9]{1,30}))?", part)
        if not match:
            raise UsageError(f"{option} {text}: {part!r} is neither a whole number nor a range", hint)
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise UsageError(f"{option} {text}: the range {part} is empty", f"did you mean {high}-{low}?")
        spans.append((low, high))
    return spans


def one_of(option: str, choices: Iterable[str], also: str = r"(?!)") -> Any:
    """Keyword arguments of an option that takes one of some words (or what the pattern `also` matches)."""
    choices = tuple(choices)

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices and not re.fullmatch(also, value):
            raise UsageError(f"{option}: there is no {value!r}", nearest(value, choices))
        return value

    return {"callback": check, "autocompletion": lambda: list(choices), "metavar": "|".join(choices)}


def parsed(parser: Callable[[str], Any]) -> Any:
    """Keyword arguments of an option whose text must satisfy a parser; the command still gets the text."""

    def check(value: str | None) -> str | None:
        if value is not None:
            parser(value)
        return value

    return {"callback": check}


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SOURCE",
        help="A run, a file, hf:owner/name, https://, or a name of models ls. "
        f"[default: {DEFAULT}, which comes with cmtool]",
    ),
]
OwnModel = Annotated[
    str,
    typer.Option("--model", metavar="SOURCE", help="A run, a file, hf:owner/name, https://, or a name of models ls."),
]
Role = Annotated[
    str | None,
    typer.Option("--role", help="What a file is that does not tell.", **one_of("--role", ROLES)),
]
Data = Annotated[str, typer.Option("--data", metavar="SOURCE", help="digits, or a folder, .zip or .npz of images.")]
Device = Annotated[
    str,
    typer.Option("--device", help="Where to compute; cuda:1 works too.", **one_of("--device", DEVICES, r"cuda:\d+")),
]
Precision = Annotated[
    str,
    typer.Option("--precision", help="Of the network; auto: bf16 where fast.", **one_of("--precision", PRECISIONS)),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seeds = Annotated[
    str, typer.Option("--seeds", metavar="LIST", help="One image a seed: 0-63,100.", **parsed(parse_seeds))
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", metavar="LIST", help="Classes, 0-9 or names, dealt along the seeds; else by chance."),
]
Solver = Annotated[
    str | None,
    typer.Option("--solver", help="How to solve the ODE; a diffusion model needs one.", **one_of("--solver", SOLVERS)),
]
Churn = Annotated[
    str | None,
    typer.Option(
        "--churn",
        metavar="S[,MIN,MAX,NOISE]",
        help="Noise added on the way of a --solver, at noise levels from MIN to MAX.",
        **parsed(parse_churn),
    ),
]
Landing = Annotated[
    str | None,
    typer.Option(
        "--landing",
        help="Where a jump lands: on clean images, to be renoised, or on the next time. "
        "[default: next for a two-time model, else t_min]",
        **one_of("--landing", LANDINGS),
    ),
]
Guidance = Annotated[
    float,
    typer.Option("--guidance", metavar="W", help="Scale of classifier-free guidance; 1 is none.", callback=_finite),
]
Times = Annotated[
    str | None,
    typer.Option("--times", metavar="LIST", help="Times of the network calls: 80,0.8.", **parsed(parse_times)),
]
Batch = Annotated[
    int | None, typer.Option("--batch", metavar="N", min=1, help="Images computed at once. [default: by their size]")
]
Image = Annotated[
    str, typer.Option("--image", metavar="FILE", help="The image to edit, or a folder of them; - reads a pipe.")
]
Out = Annotated[
    str, typer.Option("--out", metavar="PATH", help="A file, a folder, a name with {seed} in it; - writes a pipe.")
]
LpipsBackbone = Annotated[
    Path | None,
    typer.Option("--lpips-backbone", metavar="FILE", help="Torchvision's VGG-16 or AlexNet weights: tell LPIPS, too."),
]
Compare = Annotated[
    str | None, typer.Option("--compare", metavar="FILE", help="A picture of what is given and all answers.")
]
EditSteps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", min=1, help="Network calls. [default: the model's whole grid]"),
]


def preset_names() -> list[str]:
    """The presets, for completion."""
    from cmtool.training.presets import PRESETS

    return list(PRESETS)


def settings(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of everything in a component's plain form (`spec.to_dict`), as `--set` names and takes it.

    A component is named by its kind, and its fields follow.
    """
    if isinstance(value, dict):
        if "kind" in value and name:
            yield name, value["kind"]
        for key, item in value.items():
            if key != "kind":
                yield from settings(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from settings(item, f"{name}.{index}")
    else:
        yield name, _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
