"""The models in the box: small ones that come with the package, to try every command with, offline, from the start.

`examples/box.py` trains them again. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "box"


@dataclass(frozen=True)
class Boxed:
    """One of them.

    Args:
        name: what users write.
        title: what it is, in a few words.
        data: what it was trained on.
    """

    name: str
    title: str
    data: str

    @property
    def file(self) -> Path:
        """Where it lies."""
        return _FOLDER / f"{self.name}.safetensors"


BOXED = {
    boxed.name: boxed
    for boxed in (
        Boxed("cifar10-small", "easy consistency tuning, with classes", "cifar10"),
        Boxed("digits-small", "consistency distillation, with classes", "digits"),
    )
}
DEFAULT = "cifar10-small"
LICENCE = "Apache-2.0"
