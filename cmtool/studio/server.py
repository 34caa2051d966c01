"""The server behind the page: Python's own, on this machine's loopback only.

Whoever wants to use it has to know a token that is part of every address; a page of another origin does not get past
the checks of Host and Origin, and uploads have a limit. One edit is computed at a time.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import shlex
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from cmtool import generate, starts
from cmtool.errors import DataError, UsageError, UserError
from cmtool.flow.flow_map import FlowMap
from cmtool.io.images import MASK_THRESHOLD, from_uint8, png_bytes, read_encoded, to_uint8
from cmtool.io.kernels import read_kernel

HOST = "127.0.0.1"
MOST_BYTES = 32 * 2**20  # of an upload
MOST_PIXELS = 2048 * 2048
MOST_ANSWERS = 16
TASKS = ("inpaint", "colorize", "superres", "deblur", "stroke", "denoise")


class Studio(ThreadingHTTPServer):
    """The server of one model.

    Args:
        model: a consistency model.
        name: what the user called it; it stands in the shell commands.
        port: 0 takes any that is free.
    Raises:
        UsageError: if nothing can be served at the port.
    """

    daemon_threads = True

    def __init__(self, model: FlowMap, name: str, port: int = 0) -> None:
        self.model, self.name = model, name
        self.token = secrets.token_urlsafe(16)
        self.lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror or error}", "leave it out, or name another") from error

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    @cached_property
    def page(self) -> bytes:
        """The page itself."""
        return files("cmtool.studio").joinpath("page.html").read_bytes()

    @property
    def about(self) -> dict[str, Any]:
        """What the page has to know of the model."""
        card = self.model.card
        names = card.class_names or tuple(map(str, range(card.num_classes)))
        tasks = [task for task in TASKS if task != "colorize" or card.channels == 3]
        return {
            **{"name": self.name, "resolution": card.resolution, "classes": list(names), "tasks": tasks},
            "most_pixels": MOST_PIXELS,
        }

    def edit(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Compute what was asked for.

        Args:
            asked: task; image and mask as data: addresses; seed, count, steps, factor, blur, sigma, label; see `Asked`.
        Returns:
            images (seed, and the picture as a data: address), the same as a shell command, and the seconds it took.
        Raises:
            UserError: for anything that cannot be done.
        """
        began = time.monotonic()
        request = Asked(asked, self.model)
        with self.lock:
            made = to_uint8(request.run(self.model))
        images = [
            {"seed": seed, "image": "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()}
            for seed, image in zip(request.seeds, made, strict=True)
        ]
        return {"images": images, "command": request.command(self.name), "seconds": time.monotonic() - began}


class Asked:
    """One request of the page, checked."""

    def __init__(self, asked: Mapping[str, Any], model: FlowMap) -> None:
        self.task = asked.get("task")
        if self.task not in TASKS:
            raise UsageError(f"there is no task {self.task!r}", f"one of {', '.join(TASKS)}")
        seed = _whole(asked, "seed", 0, 2**62, 0)
        count = 1 if self.task == "denoise" else _whole(asked, "count", 1, MOST_ANSWERS, 1)
        self.seeds = list(range(seed, seed + count))
        self.steps = _whole(asked, "steps", 1, 1000, None)
        self.factor = _whole(asked, "factor", 2, 64, 2)
        self.label = _whole(asked, "label", 0, max(0, model.card.num_classes - 1), None)
        if self.label is not None and not model.card.num_classes:
            raise UsageError("this model knows no classes", "leave out the class")
        self.sigma = asked.get("sigma")
        if self.sigma is not None and (type(self.sigma) not in (int, float) or not 0 <= self.sigma < 1e6):
            raise UsageError("the noise is a number from 0 on, in 255ths", "25, for example")
        blur = asked.get("blur") or 1.5
        if type(blur) not in (int, float) or not 0 < blur <= 20:
            raise UsageError("the blur is a number of pixels up to 20", "1.5, for example")
        self.kernel = f"gaussian:{blur:g}"
        self.image = from_uint8(_picture(asked.get("image"), "image", model.card.channels))[None]
        self.mask = None
        if self.task == "inpaint":
            mask = _picture(asked.get("mask"), "mask", 1)
            if mask.shape[1:] != self.image.shape[2:]:
                raise DataError("the mask has another size than the image", "paint on the image")
            self.mask = mask >= MASK_THRESHOLD

    def run(self, model: FlowMap) -> Tensor:
        """The answers, float32 [len(seeds), C, H, W]."""
        common: dict[str, Any] = {"seeds": self.seeds, "labels": self.label}
        if self.task == "stroke":
            return starts.stroke(model, self.image, **common)
        if self.task == "denoise":
            sigma = None if self.sigma is None else self.sigma / 127.5
            return starts.denoise(model, self.image, sigma=sigma, labels=self.label)
        if self.task == "superres":
            return generate.superres(model, self.image, self.factor, steps=self.steps, **common)
        if self.task == "deblur":
            return generate.deblur(model, self.image, read_kernel(self.kernel), steps=self.steps, **common)
        if self.task == "colorize":
            return generate.colorize(model, self.image, steps=self.steps, **common)
        assert self.mask is not None
        return generate.inpaint(model, self.image, self.mask, steps=self.steps, **common)

    def command(self, name: str) -> str:
        """What does the same in a shell, with the files that the page offers beside it."""
        words = ["cmtool", str(self.task), "--model", name, "--image", "image.png"]
        if self.mask is not None:
            words += ["--mask", "mask.png"]
        if self.task == "superres":
            words += ["--factor", str(self.factor)]
        if self.task == "deblur":
            words += ["--kernel", self.kernel]
        if self.task == "denoise":
            words += [] if self.sigma is None else ["--sigma", f"{self.sigma:g}"]
        else:
            words += ["--seeds", f"{self.seeds[0]}-{self.seeds[-1]}" if len(self.seeds) > 1 else str(self.seeds[0])]
        if self.steps is not None and self.task not in ("stroke", "denoise"):
            words += ["--steps", str(self.steps)]
        if self.label is not None:
            words += ["--labels", str(self.label)]
        return shlex.join([*words, "--out", "made/" if len(self.seeds) > 1 else "made.png"])


def _whole(asked: Mapping[str, Any], name: str, least: int, most: int, default: Any) -> Any:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name} is a whole number from {least} to {most}", "type another")
    return value


def _picture(value: Any, name: str, channels: int) -> Tensor:
    """The image in a data: address, uint8 [C, H, W]."""
    if not isinstance(value, str) or not value.startswith("data:image/") or "," not in value:
        raise DataError(f"there is no {name}", "drop one on the page")
    try:
        data = base64.b64decode(value.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the {name} is damaged", "send it again") from error
    return read_encoded(data, f"the {name}", channels, MOST_PIXELS)


class _Handler(BaseHTTPRequestHandler):
    server: Studio
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """The page, and what it has to know."""
        if not self._is_ours():
            return
        page = self.path.removeprefix(f"/{self.server.token}/")
        if page == "":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif page == "model":
            self._tell(HTTPStatus.OK, self.server.about)
        else:
            self._tell(HTTPStatus.NOT_FOUND, {"error": "there is nothing here", "hint": "use the printed address"})

    def do_POST(self) -> None:
        """An edit."""
        if not self._is_ours():
            return
        if self.path != f"/{self.server.token}/edit":
            self._tell(HTTPStatus.NOT_FOUND, {"error": "there is nothing here", "hint": "use the printed address"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the size of the upload is missing")
        elif int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an upload has at most {MOST_BYTES // 2**20} MiB")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an edit is asked for in JSON")
        else:
            self._edit(self.rfile.read(int(length)))

    def _edit(self, body: bytes) -> None:
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise ValueError
        except (ValueError, RecursionError):
            self._tell(HTTPStatus.BAD_REQUEST, {"error": "this is no JSON object", "hint": "use the page"})
            return
        try:
            self._tell(HTTPStatus.OK, self.server.edit(asked))
        except UserError as error:
            self._tell(HTTPStatus.BAD_REQUEST, {"error": error.message, "hint": error.hint or "try something else"})
        except torch.OutOfMemoryError:
            self._tell(HTTPStatus.BAD_REQUEST, {"error": "there is not enough memory", "hint": "ask for fewer answers"})

    def _is_ours(self) -> bool:
        """Whether the request comes from the page itself, by its token, host and origin; if not, it is refused."""
        places = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        parts = self.path.split("/", 2)
        known = len(parts) > 1 and secrets.compare_digest(parts[1].encode(), self.server.token.encode())
        if known and self.headers.get("Host") in places and origin in (None, *(f"http://{p}" for p in places)):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "this address is not the studio's own")
        return False

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # what it still sends is not read
        self._tell(status, {"error": reason, "hint": "use the printed address"})

    def _tell(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
            "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the address has the token in it."""
