"""Text that a template may only pass on, and that says so when it does more.

Responsibility: find out whether a template treats what messages say as opaque:
prints, joins and trims it, and asks no more than whether it is there. What it
renders is then known for all messages of a shape from one rendering. Does not
know templates.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Around the number of a text; private-use characters, refused in literals.
_OPEN, _CLOSE = "\ue000", "\ue001"
MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# Filters that pass text on, or that a text refuses by itself.
_FILTERS = frozenset(
    [
        "_bounded",
        "_sized",
        "trim",
        "default",
        "d",
        "string",
        "first",
        "last",
        "list",
        "selectattr",
        "rejectattr",
    ]
)


class NotOpaque(Exception):
    """The template looked into a text."""


class Opaque(str):
    """A stand-in for a non-empty text that nobody knows."""

    def strip(self, chars: str | None = None, /) -> Opaque:
        """Another stand-in: for the same text without the space around it."""
        return _trimmed(self, "strip", chars)

    def lstrip(self, chars: str | None = None, /) -> Opaque:
        """As `strip`, at the beginning."""
        return _trimmed(self, "lstrip", chars)

    def rstrip(self, chars: str | None = None, /) -> Opaque:
        """As `strip`, at the end."""
        return _trimmed(self, "rstrip", chars)

    def __add__(self, other: Any) -> Opaque:
        return Opaque(str.__add__(self, other))

    def __radd__(self, other: Any) -> Opaque:
        return Opaque(str.__add__(other, self))

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, str) and other:
            raise NotOpaque
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise NotOpaque


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotOpaque


for _name, _value in vars(str).items():
    # What is left passes text on or only measures it; `len` is no filter of `_FILTERS`.
    if callable(_value) and _name not in {
        *vars(Opaque),
        *vars(object),
        *("__len__", "__getnewargs__", "__new__"),
    }:
        setattr(Opaque, _name, _refuse)
for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__format__"):
    setattr(Opaque, _name, _refuse)


class _Registry:
    def __init__(self) -> None:
        self.texts: list[tuple[Any, str]] = []

    def add(self, source: Any, trim: str) -> Opaque:
        key = (source, trim)
        if key not in self.texts:
            self.texts.append(key)
        return Opaque(f"{_OPEN}{self.texts.index(key)}{_CLOSE}")


_registry: ContextVar[_Registry | None] = ContextVar("arriero_opaque", default=None)


def _trimmed(text: Opaque, how: str, chars: str | None) -> Opaque:
    registry = _registry.get()
    found = MARK.fullmatch(str.__str__(text))
    if chars is not None or registry is None or found is None:
        raise NotOpaque
    source, trim = registry.texts[int(found[1])]
    if trim:
        if trim == how:
            return text
        raise NotOpaque
    return registry.add(source, how)


@contextmanager
def probing() -> Iterator[_Registry]:
    """Within, templates that do more than pass opaque text on raise `NotOpaque`."""
    registry = _Registry()
    token = _registry.set(registry)
    try:
        yield registry
    finally:
        _registry.reset(token)


def kept(value: Any) -> Any:
    """A value that the sandbox hands on: text with stand-ins in it stays one."""
    if type(value) is str and _registry.get() is not None and MARK.search(value):
        return Opaque(value)
    return value


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses while probing, unless it is one of those that pass text on."""
    if name in _FILTERS:
        return function

    @functools.wraps(function)  # with Jinja's own marks of what a filter is given besides
    def call(*args: Any, **kwargs: Any) -> Any:
        # Counting messages is harmless, counting letters is not.
        fine = name in ("length", "count") and not any(isinstance(a, str) for a in args)
        if _registry.get() is not None and not fine:
            raise NotOpaque
        return function(*args, **kwargs)

    return call
