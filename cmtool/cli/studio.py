"""`cmtool studio`: a page for the hand."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from cmtool.cli import console, images, options


def studio(
    *,
    model: options.Model = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Of this machine; 0 takes any that is free.")
    ] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Edit by hand: a page on this machine to drop an image on, paint, and see answers.

    It shows the shell command that does the same. Nobody else can reach it, and nothing leaves this machine. From
    another machine: ssh -L PORT:127.0.0.1:PORT. Ctrl-C ends it.
    """
    from cmtool.studio.server import Studio

    model = images.chosen(model)
    flow = images.ready(images.read_model(model, role="consistency"), device=device, precision=precision)
    with Studio(flow, model, port) as server:
        console.emit_line(server.address, at_once=True)
        if browser:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        console.note("Ctrl-C ends it")
        server.serve_forever()
