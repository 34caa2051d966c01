"""`cmtool pairs`: noise and the images it leads to, to train on."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmtool.cli import console, images, options
from cmtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.generate import Generated
    from cmtool.processes import Processes
    from cmtool.sampler import Landing

SOLVERS = tuple(name for name in options.SOLVERS if name != "ancestral")
SEEDS = "0-9999"
_TOLD = 2**24  # numbers that a process sends to the first at a time: 32 MiB


def pairs(
    model: options.OwnModel,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="The file of pairs, an .npz.")],
    count: Annotated[
        int | None, typer.Option("--count", "-n", metavar="N", min=1, help="How many: the seeds 0 to N-1.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="LIST",
            help=f"Or these seeds. [default: {SEEDS}]",
            **options.parsed(options.parse_seeds),
        ),
    ] = None,
    labels: options.Labels = None,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            help="How to solve the ODE. [default: heun for a diffusion model]",
            **options.one_of("--solver", SOLVERS, "ancestral"),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Steps of the solver [default: 18]; without one, jumps [default: 1]."
        ),
    ] = None,
    guidance: options.Guidance = 1.0,
    batch: options.Batch = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
) -> None:
    """Solve a model's ODE, once a seed, into a file of (image, noise) pairs for ReFlow.

    Training on the file (--data pairs.npz) straightens the paths from noise to images. The images are those that
    cmtool sample makes of the same seeds, kept finer than in 8 bits and clamped to the image range; the noise is kept
    as its seed. A consistency model solves it in one jump, a two-time model in as many as --steps says.
    """
    if count is not None and seeds is not None:
        raise UsageError("--count and --seeds say the same thing twice", "give one of the two")
    wanted = options.parse_seeds(f"0-{count - 1}" if count is not None else seeds or SEEDS)
    _check_out(out)
    if solver == "ancestral":
        raise UsageError(
            "ancestral sampling adds noise on the way, and the image would not belong to its start alone",
            "take --solver heun, or another for the ODE",
        )

    from cmtool import processes
    from cmtool.generate import generate
    from cmtool.io.pairs import About, write_pairs

    team = processes.join()
    imported = images.read_model(model, assume="denoiser")
    flow = images.ready(imported, device=device, precision=precision)
    card = flow.card
    if card.role == "denoiser":
        solver = solver or "heun"
    steps = steps or (18 if solver else 1)
    if card.role == "consistency" and (solver is not None or steps > 1):
        raise UsageError(
            "a consistency model solves the ODE in its one jump: more steps of it follow another path",
            "leave out --steps and --solver, or take a diffusion model",
        )
    # A two-time model jumps on from where it landed.
    landing: Landing | None = "next" if solver is None and steps > 1 else None
    make = partial(
        generate,
        flow,
        steps=steps,
        labels=images.labels(flow, labels),
        solver=solver,
        landing=landing,
        guidance=guidance,
        batch=batch,
    )
    made = _together(team, wanted, make, math.prod(card.image_shape))
    classes = card.class_names or tuple(str(label) for label in range(card.num_classes))
    about = About(model, solver or "jump", steps, guidance, classes, card.licence)
    if not team.first:
        deque(made, maxlen=0)
        return
    with _terminable(), console.progress("pairs", len(wanted)) as update:
        write_pairs(out, len(wanted), _shown(made, update), about)
    console.note(f"{len(wanted):,} pairs {about.summary()}")
    if as_json:
        told = {"pairs": out, "count": len(wanted), "shape": list(card.image_shape)}
        console.emit_json(told | dataclasses.asdict(about))
    else:
        console.emit_line(out)


def _check_out(out: str) -> None:
    """Refuse a place that could not be written, before any work is done."""
    if out == "-":
        raise UsageError("--out -: pairs do not go through a pipe", "name a file, such as pairs.npz")
    if Path(out).suffix.lower() != ".npz":
        raise UsageError(f"--out {out}: pairs are an .npz", "end the name in .npz")
    if os.path.isdir(out):
        raise UsageError(f"--out {out} is a folder", "name a file, such as pairs.npz")


def _together(
    team: Processes, seeds: Sequence[int], make: Callable[[Sequence[int]], Iterable[Generated]], values: int
) -> Iterator[Generated]:
    """What `make` makes of the seeds, in their order: all of it on the first process, which each sends its part.

    Args:
        values: numbers in an image.
    """
    if not team.many:
        yield from make(seeds)
        return
    size = max(1, _TOLD // values) * team.count
    for first in range(0, len(seeds), size):
        some = seeds[first : first + size]
        mine = [part._replace(images=part.images.half()) for part in make(some[team.share(len(some))])]
        for parts in team.gathered(mine):
            yield from parts


def _shown(made: Iterable[Generated], update: console.Update) -> Iterator[tuple[Sequence[int], Tensor | None, Tensor]]:
    """The batches as they come, telling `update` what is written."""
    done = 0
    for part in made:
        yield part.seeds, part.labels, part.images
        done += len(part.seeds)
        update(done)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that no half-written file stays behind."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # outside the main thread there are no handlers to set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
