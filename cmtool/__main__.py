"""The console script, and `python -m cmtool`."""

from __future__ import annotations

import atexit
import sys
import threading
from contextlib import suppress

from cmtool import processes


def run() -> None:
    """Run the command line of this process; Ctrl-C ends it quietly from the first import on."""
    try:
        from cmtool.cli.app import main

        code = main()
    except KeyboardInterrupt:
        code = 130
    if processes.current().many:  # an error: no farewell, for the others may wait for something else, or be gone
        processes.end(code)
    if any(thread.daemon for thread in threading.enumerate()):
        # As Python ends it stops threads where they are, and one that is inside torch takes the program down with it.
        with suppress(KeyboardInterrupt):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        processes.end(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
