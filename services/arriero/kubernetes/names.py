"""Names and label values that the API takes.

Responsibility: from any text to one that is allowed, and stays apart from others.
Does not know what is named.
"""

from __future__ import annotations

import hashlib
import re

PREFIX = "arriero.dev/"
_LONGEST = 63


def label(text: str) -> str:
    """A label's value: letters, digits, `-_.`, at most 63 of them."""
    value = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_LONGEST]
    return value.strip("-_.")


def name(*parts: str, longest: int = 52) -> str:
    """A DNS label made of parts; a digest takes the place of what could not stay."""
    text = "-".join(parts)
    clean = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if clean == text and len(clean) <= longest and clean[:1].isalpha():
        return clean
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    if not clean[:1].isalpha():
        clean = f"a-{clean}"
    return f"{clean[: longest - 9].strip('-')}-{digest}"


def selector(labels: dict[str, str]) -> str:
    """`a=b,c=d`."""
    return ",".join(f"{key}={value}" for key, value in labels.items())
