"""Commands in the documentation are commands that there are, with arguments that they take."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from arriero.cli.app import app

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    ROOT / "deploy/helm/arriero/templates/NOTES.txt",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
# A line of a console, an indented line of the notes, or code within a line.
COMMAND = re.compile(r"(?:^\$ |^  |`)(?:[A-Z_]+=\S+ )*arriero ([a-z][^`\n]*)", re.MULTILINE)
ENDS = {"|", ">", ">>", "&&", "&", "\\", ";"}


def wrong(text: str) -> str:
    """What the command does not know of what follows `arriero`; empty when all is known."""
    words = shlex.split(text, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ENDS), None)]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        found = command.commands.get(words[0])
        if found is None:
            return f"no command {words[0]}"
        command, words = found, words[1:]
    if hasattr(command, "commands"):
        return ""  # a group, spoken of
    try:
        _, left, _ = command.make_parser(typer.Context(command)).parse_args(words)
    except Exception as error:  # the parser's own kinds
        return str(error)
    return f"unexpected {' '.join(left)}" if left else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_there(page):
    found = COMMAND.findall(page.read_text(encoding="utf-8"))
    assert [(text, said) for text in found if (said := wrong(text))] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoints scale faq 3", "unexpected 3"),
        ("endpoints update faq", "no command update"),
        ("runs list --everything", "No such option: --everything"),
    ],
)
def test_what_is_no_command_is_found(text, said):
    assert wrong(text).startswith(said)
