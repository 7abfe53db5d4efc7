"""From YAML nodes to protobuf messages, by the message's own description.

Responsibility: one typed walk that refuses what does not fit, each with its
place. Does not know pipelines, files or what fields mean.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from arriero.errors import FieldViolation
from arriero.v1 import types_pb2

__all__ = ["FieldType", "Position", "Reader", "describe", "is_map", "nearest", "word_for"]

# protobuf has two implementations of its descriptors, and stubs for either alone.
FieldType = Any

# Past this many, more would hide the first.
_MOST_VIOLATIONS = 20

_INTEGER = re.compile(r"[-+]?[0-9](?:_?[0-9])*")
# YAML 1.2's core schema, and `3e-4`, which YAML 1.1 takes for text.
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_NUMBERS = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a source; lines and columns from 1, 0 where there is no such thing."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class _RefusedError(Exception):
    """A value that does not fit; caught where the walk goes on."""


@dataclass(slots=True)
class Reader:
    """Fills messages from composed YAML, and remembers where each field stood.

    Attributes:
        source: name of the text, for positions.
        has_lines: whether lines and columns of the nodes mean anything.
        positions: from field path (`stages[2].train.lora.r`) to its place.
        violations: what was refused, in reading order; descriptions start with
            the place.
    """

    source: str
    has_lines: bool = True
    positions: dict[str, Position] = field(default_factory=dict)
    violations: list[FieldViolation] = field(default_factory=list)

    def message(self, node: yaml.Node, target: Message, path: str) -> None:
        """Set the target's fields from a mapping; unknown and repeated keys are refused."""
        if not isinstance(node, yaml.MappingNode):
            names = ", ".join(target.DESCRIPTOR.fields_by_name)
            self.refuse(node, path, f"expected fields ({names}), found {describe(node)}")
            return
        target.SetInParent()
        for key, key_node, value in self._entries(node, path):
            child = f"{path}.{key}" if path else key
            known = target.DESCRIPTOR.fields_by_name.get(key)
            if known is None:
                self.refuse(key_node, child, _unknown(key, target.DESCRIPTOR))
                continue
            oneof = known.containing_oneof
            if oneof is not None and len(oneof.fields) > 1 and (other := _which(target, oneof)):
                self.refuse(
                    key_node, child, f"{key!r} beside {other!r}; expected one of the two, not both"
                )
                continue
            self.positions[child] = self.position(key_node if _is_deep(known) else value)
            self.value(value, target, known, child)

    def value(self, node: yaml.Node, target: Message, known: FieldType, path: str) -> None:
        """Set one field of the target from a node, replacing what it held."""
        target.ClearField(known.name)
        if is_map(known):
            self._map(node, target, known, path)
        elif known.is_repeated:
            self._list(node, target, known, path)
        elif known.message_type is not None:
            inner = getattr(target, known.name)
            if (word := word_for(known)) and isinstance(node, yaml.ScalarNode):
                # `rope: ntk` stands for `rope: {type: ntk}`.
                inner.SetInParent()
                self.positions[f"{path}.{word}"] = self.position(node)
                self.value(node, inner, inner.DESCRIPTOR.fields_by_name[word], f"{path}.{word}")
            else:
                self.message(node, inner, path)
        else:
            try:
                setattr(target, known.name, _scalar(node, known))
            except _RefusedError as error:
                self.refuse(node, path, str(error))

    def refuse(self, node: yaml.Node | None, path: str, what: str) -> None:
        """Record what is wrong at a node."""
        place = self.position(node)
        self.positions.setdefault(path, place)
        if len(self.violations) < _MOST_VIOLATIONS:
            self.violations.append(FieldViolation(path, f"{place}: {what}"))

    def position(self, node: yaml.Node | None) -> Position:
        """Where a node stands."""
        if node is None or not self.has_lines:
            return Position(self.source)
        mark = node.start_mark
        return Position(self.source, mark.line + 1, mark.column + 1)

    def _entries(
        self, node: yaml.MappingNode, path: str
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        first: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, path, f"expected a name, found {describe(key_node)}")
                continue
            key = key_node.value
            child = f"{path}.{key}" if path else key
            if key in first:
                line = first[key].start_mark.line + 1
                what = f"{key!r} is given twice" + (f", first in line {line}" * self.has_lines)
                self.refuse(key_node, child, what)
                continue
            first[key] = key_node
            yield key, key_node, value

    def _list(self, node: yaml.Node, target: Message, known: FieldType, path: str) -> None:
        items = node.value if isinstance(node, yaml.SequenceNode) else None
        if isinstance(node, yaml.ScalarNode) and _takes_all_outputs(known):
            items = [node]  # `models: quants`: one word stands for all outputs of a stage
        if items is None:
            hint = f"; write [{node.value}]" if isinstance(node, yaml.ScalarNode) else ""
            self.refuse(node, path, f"expected a list, found {describe(node)}{hint}")
            return
        values = getattr(target, known.name)
        for index, item in enumerate(items):
            child = f"{path}[{index}]"
            self.positions[child] = self.position(item)
            if known.message_type is not None:
                self.message(item, values.add(), child)
                continue
            try:
                values.append(_scalar(item, known))
            except _RefusedError as error:
                self.refuse(item, child, str(error))

    def _map(self, node: yaml.Node, target: Message, known: FieldType, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, path, f"expected names with values, found {describe(node)}")
            return
        values = getattr(target, known.name)
        of = known.message_type.fields_by_name["value"]
        for key, _, value in self._entries(node, path):
            child = f"{path}[{key!r}]"
            self.positions[child] = self.position(value)
            try:
                values[key] = _scalar(value, of)
            except _RefusedError as error:
                self.refuse(value, child, str(error))


def describe(node: yaml.Node) -> str:
    """A node in words, for messages."""
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "fields"
    text = str(node.value)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and text in _NULL:
        return "nothing"
    shown = repr(text if len(text) <= 60 else text[:57] + "…")
    if not plain:
        return f"the text {shown}"
    if text in _BOOLEANS:
        return f"the truth value {text}"
    if _NUMBER.fullmatch(text):
        return f"the number {text}"
    return shown


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean …?` where one is close, else the list of what there is."""
    close = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    if close:
        found = next(k for k in known if k.lower() == close[0])
        return f"; did you mean {found!r}?"
    return f"; known: {', '.join(known)}"


def _unknown(key: str, descriptor: Any) -> str:
    if key == "matrix":
        return "'matrix' is reserved for sweeps, which this version does not have"
    if key == "<<":
        return "merge keys ('<<') are not read; write the fields out"
    return f"unknown field {key!r}{nearest(key, list(descriptor.fields_by_name))}"


def _which(message: Message, oneof: Any) -> str | None:
    name: str | None = message.WhichOneof(oneof.name)
    return name


def is_map(known: FieldType) -> bool:
    """Whether a field is a map."""
    kind = known.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def word_for(known: FieldType) -> str:
    """The field of a message that one word in the message's place sets; empty: none."""
    return str(known.GetOptions().Extensions[types_pb2.word_for])


def _is_deep(known: FieldType) -> bool:
    return known.is_repeated or known.message_type is not None


def _takes_all_outputs(known: FieldType) -> bool:
    return bool(known.GetOptions().Extensions[types_pb2.input].all_outputs)


def _scalar(node: yaml.Node, known: FieldType) -> Any:
    kind = known.cpp_type
    wanted = _wanted(known)
    if not isinstance(node, yaml.ScalarNode):
        raise _RefusedError(f"expected {wanted}, found {describe(node)}")
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise _RefusedError(f"expected {wanted}, found the YAML tag {node.tag!r}")
    text, plain = str(node.value), node.style is None
    wrong = _RefusedError(f"expected {wanted}, found {describe(node)}")
    if plain and text in _NULL:
        raise wrong
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if plain and (text in _BOOLEANS or _NUMBER.fullmatch(text)):
            raise _RefusedError(f"{wrong}; put it in quotes if it is meant")
        if "\0" in text:
            raise _RefusedError("a NUL character is no text")
        return text
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _enum(text, known)
    if not plain:
        raise _RefusedError(f"{wrong}; leave the quotes out")
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if text not in _BOOLEANS:
            raise wrong
        return _BOOLEANS[text]
    if kind in _NUMBERS:
        if not _NUMBER.fullmatch(text) or abs(float(text)) == float("inf"):
            raise wrong
        return float(text)
    low, high = _RANGES[kind]
    if not _INTEGER.fullmatch(text):
        raise wrong
    # int() of a very long text takes quadratic time, and Python refuses it.
    if len(text) > 40 or not low <= int(text) <= high:
        raise _RefusedError(f"expected {wanted} from {low} to {high}, found {text[:40]}")
    return int(text)


def _enum(text: str, known: FieldType) -> int:
    values = known.enum_type.values
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    short = {v.name.removeprefix(prefix).lower(): v.number for v in values[1:]}
    name = text.lower().removeprefix(prefix.lower())
    if name not in short:
        raise _RefusedError(f"unknown value {text!r}{nearest(text, list(short))}")
    return int(short[name])


def _wanted(known: FieldType) -> str:
    kind = known.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return "text"
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if kind in _NUMBERS:
        return "a number"
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        prefix = known.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return " or ".join(v.name.removeprefix(prefix).lower() for v in known.enum_type.values[1:])
    return "a whole number"
