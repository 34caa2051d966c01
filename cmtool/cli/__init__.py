"""The command line: one file a command; the only part that imports typer or rich."""
