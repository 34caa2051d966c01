"""`python -m cmtool` is `cmtool`."""

from cmtool.cli.app import run

if __name__ == "__main__":
    run()
