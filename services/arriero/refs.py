"""Artifact references: parse and format.

Responsibility: the three spellings `kind/name:tag`, `kind/name@sha256:<hex>`
and `sha256:<hex>`. Does not know whether anything exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from arriero.errors import InvalidArgument

KINDS = ("model", "dataset", "tokenizer", "adapter", "checkpoint", "gguf", "report")

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed reference; `digest` alone, or `kind` and `name` with `tag` or `digest`."""

    kind: str | None = None
    name: str | None = None
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.kind is None:
            return self.digest or ""
        suffix = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.kind}/{self.name}{suffix}"


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` may name an artifact, an endpoint or a pipeline."""
    return _NAME.fullmatch(text) is not None


def looks_like_ref(text: str) -> bool:
    """Whether `text` is meant as a reference (right or wrong), not as a stage name."""
    return text.startswith("sha256:") or "/" in text or ":" in text or "@" in text


def parse(text: str, *, field: str = "ref") -> Ref:
    """Parse a reference; a missing tag means `latest`.

    Raises:
        InvalidArgument: not a reference, an unknown kind, or a name that climbs out.
    """
    if is_digest(text):
        return Ref(digest=text)
    expected = "expected kind/name:tag, kind/name@sha256:<64 hex digits> or sha256:<64 hex digits>"
    if text.startswith("sha256:"):
        raise InvalidArgument.field(field, f"{text!r} is not a whole digest; {expected}")
    kind, slash, rest = text.partition("/")
    if not slash:
        raise InvalidArgument.field(field, f"{text!r} is not a reference; {expected}")
    if kind not in KINDS:
        raise InvalidArgument.field(
            field, f"unknown kind {kind!r} in {text!r}; known kinds: {', '.join(KINDS)}"
        )
    name, at, digest = rest.partition("@")
    tag: str | None = None
    if at:
        if not is_digest(digest):
            raise InvalidArgument.field(field, f"{text!r} has no whole digest; {expected}")
    else:
        name, _, tag_text = rest.partition(":")
        tag = tag_text or "latest"
        if not _TAG.fullmatch(tag):
            raise InvalidArgument.field(field, f"{tag!r} is not a tag; {expected}")
    if not is_name(name):
        raise InvalidArgument.field(
            field, f"{name!r} is not a name (lower case letters, digits, '.', '_', '-'); {expected}"
        )
    return Ref(kind=kind, name=name, tag=tag, digest=digest or None)
