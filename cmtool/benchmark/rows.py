"""The rows of the benchmark, and the settings that both sides share. Nothing here imports torch.

A row is one thing people do: a training step of a method, or a batch of images. Its work is counted in network calls,
the same on both sides; see `Calls`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cmtool.errors import UsageError, nearest

LEARNING_RATE = 1e-4
AVERAGE = 0.9999  # decay of the average of the weights
TARGET = 0.95  # decay of the target network of consistency distillation
GRID = 18  # noise levels of consistency distillation
SAMPLING_GRID = 40  # noise levels of the models that are sampled, as published
SECOND = 17  # the second time point of two steps: this index of that grid
SOLVER_STEPS = 18
EDIT_STEPS = 10


@dataclass(frozen=True)
class Calls:
    """Network calls an image.

    The convention of FLOPs: a backward pass counts as two forward passes, one for the gradient of the activations and
    one for that of the weights, and the tangent of a forward-mode derivative as one, since weights have no tangent
    (torch's own formula does a second one with their zeros: no useful work). Work that is done over, as in gradient
    checkpointing, does not count.

    Args:
        trained: calls with a backward pass.
        forward: calls without.
        derived: calls without, but with a forward-mode derivative.
    """

    trained: int = 0
    forward: int = 0
    derived: int = 0

    @property
    def total(self) -> int:
        """How often the network is called."""
        return self.trained + self.forward + self.derived

    @property
    def passes(self) -> int:
        """The work, in forward passes."""
        return 3 * self.trained + self.forward + 2 * self.derived


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    calls: Calls

    @property
    def trains(self) -> bool:
        """Whether a round is a training step; else it is a batch of images."""
        return self.calls.trained > 0


ROWS = {
    row.name: row
    for row in (
        Row("edm", "denoising", Calls(trained=1)),
        Row("cd-euler", "consistency distillation, Euler teacher", Calls(trained=1, forward=2)),
        Row("cd-heun", "consistency distillation, Heun teacher", Calls(trained=1, forward=3)),
        Row("ect", "easy consistency tuning", Calls(trained=1, forward=1)),
        Row("scd", "simplified continuous-time distillation", Calls(trained=1, forward=1, derived=1)),
        Row("sample-1", "sampling in one step", Calls(forward=1)),
        Row("sample-2", "sampling in two steps", Calls(forward=2)),
        Row("heun-18", "sampling a teacher, Heun, 18 steps", Calls(forward=2 * SOLVER_STEPS - 1)),
        Row("inpaint-10", "inpainting in ten steps", Calls(forward=EDIT_STEPS)),
    )
}
QUICK = ("cd-heun", "sample-1")


def parse(text: str) -> list[Row]:
    """Comma-separated names as rows, in the order given, each once.

    Raises:
        UsageError: unknown names, with the nearest.
    """
    names = dict.fromkeys(part.strip() for part in text.split(","))
    for name in names:
        if name not in ROWS:
            raise UsageError(f"--rows: there is no row {name!r}", nearest(name, ROWS))
    return [ROWS[name] for name in names]
