"""stub"""

import typer

app = typer.Typer(no_args_is_help=True, help="x")


@app.command("ls")
def ls() -> None:
    """x"""


@app.command("show")
def show(name: str) -> None:
    """x"""
