"""Run command lines in this process, and check what every error must look like."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cmtool.cli.app import main


class Result(NamedTuple):
    code: int
    stdout: bytes
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stdout.decode().splitlines()

    def error(self, code: int, *words: str) -> str:
        """Assert a proper error: the exit code, nothing on stdout, two lines, all the words; returns them."""
        lines = self.stderr.splitlines()
        assert self.code == code, (self.code, self.stderr)
        assert self.stdout == b""
        assert len(lines) == 2, self.stderr
        assert lines[0].startswith("error: "), self.stderr
        assert lines[1].startswith("hint: "), self.stderr
        assert len(lines[1]) > len("hint: ")
        assert "Traceback" not in self.stderr
        for word in words:
            assert word in self.stderr, self.stderr
        return self.stderr


@pytest.fixture
def cli(monkeypatch) -> Callable[..., Result]:
    """`cli("sample", "--steps", 1, stdin=b"...")` -> Result(code, stdout, stderr)."""

    def call(*argv: object, stdin: bytes = b"") -> Result:
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
            patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8", write_through=True))
            code = main([str(arg) for arg in argv])
            sys.stdout.flush()
            sys.stderr.flush()
            return Result(code, out.getvalue(), err.getvalue().decode())

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Tiny models with random weights: student.safetensors (three classes), plain.safetensors and teacher.safetensors.

    Images are 8x8.
    """
    from cmtool.io import checkpoint
    from tests.models import micro, model

    folder = tmp_path_factory.mktemp("models")
    classes = {"config": micro(num_classes=3), "class_names": ("ant", "bee", "cow"), "grid_points": 4}
    checkpoint.save(model(**classes), folder / "student.safetensors")
    checkpoint.save(model("denoiser", **classes), folder / "teacher.safetensors")
    checkpoint.save(model(grid_points=4), folder / "plain.safetensors")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of 8x8 and 3 classes, as an .npz."""
    import numpy as np

    from tests.models import Pictures

    made = Pictures(classes=3)
    file = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(file, images=made.images.permute(0, 2, 3, 1).numpy(), labels=made.labels.numpy())
    return file


@pytest.fixture
def student(folder) -> Path:
    return folder / "student.safetensors"


@pytest.fixture
def teacher(folder) -> Path:
    return folder / "teacher.safetensors"


@pytest.fixture
def plain(folder) -> Path:
    return folder / "plain.safetensors"
