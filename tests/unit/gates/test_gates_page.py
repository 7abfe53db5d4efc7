"""docs/gates.md says what the code does."""

import re
from pathlib import Path

from arriero.gates import KNOWN_GATES
from arriero.gates.limits import LIMITS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gates.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_gate_has_a_row_with_its_default_mode() -> None:
    found = {row[0].strip("`"): row[2] for row in rows() if row[0].startswith("`")}
    assert found == {name: mode.value for name, mode in KNOWN_GATES.items()}


def test_every_limit_is_on_the_page() -> None:
    found = {
        name: float(row[1])
        for row in rows()
        if len(row) == 2 and re.fullmatch(r"[\d.]+", row[1])
        for name in row[0].split(", ")
    }
    assert found == dict(LIMITS)
