"""stub"""


def train() -> None:
    """Stub."""


def distill() -> None:
    """Stub."""
