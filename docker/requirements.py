"""What some extras of the project need, a requirement a line: images install it before the code.

python docker/requirements.py orchestrator gateway > requirements.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """The project's own dependencies and those of the extras, sorted.

    Raises:
        SystemExit: there is no such extra.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    found = set(project["dependencies"])
    waiting = list(extras)
    while waiting:
        name = waiting.pop()
        if name not in known:
            sys.exit(f"no extra {name!r}; there are: {', '.join(known)}")
        for line in known[name]:
            own = re.fullmatch(r"arriero\[(.*)\]", line)
            if own:
                waiting += [part.strip() for part in own[1].split(",")]
            else:
                found.add(line)
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
