"""The console script, and `python -m cmtool`."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line of this process; Ctrl-C ends it quietly from the first import on."""
    try:
        from cmtool.cli.app import main

        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
