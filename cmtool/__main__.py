"""The console script, and `python -m cmtool`."""

from __future__ import annotations

import os
import sys

from cmtool import processes


def run() -> None:
    """Run the command line of this process; Ctrl-C ends it quietly from the first import on."""
    try:
        from cmtool.cli.app import main

        code = main()
    except KeyboardInterrupt:
        code = 130
    if processes.current().many:  # an error: no farewell, for the others may wait for something else, or be gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
