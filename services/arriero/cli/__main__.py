"""The `arriero` command as a process.

Responsibility: Ctrl-C while what the commands need is still imported, and terminals
that cannot show every character. Does not know any command.
"""

from __future__ import annotations

import io
import signal
import sys


def main() -> None:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Latin-1 has no check marks
    try:
        from arriero.cli.app import app
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    app()


if __name__ == "__main__":
    main()
