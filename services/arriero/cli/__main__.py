"""The `arriero` command as a process.

Responsibility: Ctrl-C while what the commands need is still imported. Does not know them.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command that the arguments name."""
    try:
        from arriero.cli.app import app
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    app()


if __name__ == "__main__":
    main()
