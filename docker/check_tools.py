"""Fail early and plainly when this machine lacks what set-up needs."""

import os
import shutil
import sys

NEEDED = {
    "a C compiler": ("cc", "gcc", "clang"),
    "a C++ compiler": ("c++", "g++", "clang++"),
    "cmake": ("cmake",),
    "make": ("make", "gmake"),
}


def main() -> None:
    """Exit with a message that lists everything that is missing at once."""
    missing = []
    if sys.version_info < (3, 11):  # noqa: UP036 - this file must say so on older Pythons
        found = ".".join(map(str, sys.version_info[:3]))
        missing.append(f"Python 3.11 or newer (found {found}; choose one: make PYTHON=python3.12)")
    for what, names in NEEDED.items():
        chosen = os.environ.get({"a C compiler": "CC", "a C++ compiler": "CXX"}.get(what, ""), "")
        if not any(shutil.which(name) for name in (chosen, *names) if name):
            missing.append(f"{what} (looked for {', '.join(names)})")
    if sys.version_info >= (3, 11):  # noqa: UP036
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            missing.append("Python's venv module (Debian: apt-get install python3-venv)")
    if missing:
        lines = "\n".join(f"  - {item}" for item in missing)
        sys.exit(
            f"Set-up needs what this machine does not have:\n{lines}\n"
            "Debian, Ubuntu: apt-get install build-essential cmake python3-venv\n"
            "macOS: xcode-select --install && brew install cmake"
        )


if __name__ == "__main__":
    main()
