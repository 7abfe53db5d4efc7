"""What every command shares: the output format, the client, and how errors end it.

Responsibility: options, one place where errors become messages and exit codes.
Does not know any command.
"""

from __future__ import annotations

import functools
import signal
import traceback
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from arriero.cli import render
from arriero.client import Client
from arriero.errors import ArrieroError, Internal
from arriero.settings import home

P = ParamSpec("P")
R = TypeVar("R")


class Format(StrEnum):
    """How a command answers."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[
    Format, typer.Option("--output", "-o", help="How to answer: table, or json for programs.")
]
# One command runs per process.
_chosen = Format.TABLE


def client() -> Client:
    """A client of `ARRIERO_ADDRESS`, else of what `arriero up` runs here."""
    return Client()


def as_json() -> bool:
    """Whether the running command answers as JSON."""
    return _chosen is Format.JSON


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Errors of the project become one message and an exit code; Ctrl-C becomes 130."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        global _chosen
        _chosen = Format(str(kwargs.get("output", Format.TABLE)))
        try:
            return function(*args, **kwargs)
        except ArrieroError as error:
            render.fail(error, as_json=as_json())
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            # `arriero ... | head` is no error.
            import os
            import sys

            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, SystemExit, typer.Abort):
            raise
        except Exception as error:
            # A defect: the traceback is for whoever mends it, one line for whoever typed.
            text = f"{type(error).__name__}: {error}; a defect of Arriero, {_noted()}"
            render.fail(Internal(text), as_json=as_json())

    return wrapped


def _noted() -> str:
    """Where the traceback of the error that is handled now can be read."""
    log = home() / "logs" / "cli.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as sink:
            traceback.print_exc(file=sink)
    except OSError as error:
        traceback.print_exc()
        return f"the details are above ({log} cannot be written: {error.strerror})"
    return f"the details are in {log}"


def show(value: Any, view: Callable[[], Any]) -> None:
    """Print a message (or several) as JSON, or what `view` makes of it."""
    if as_json():
        render.print_json(value)
    else:
        render.console.print(view())
