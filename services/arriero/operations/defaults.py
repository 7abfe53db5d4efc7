"""Defaults of specs, as the protos document them.

Responsibility: one reading of the `(arriero.v1.default_value)` option for all
rooms. Does not know any spec.
"""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from arriero.v1 import types_pb2

M = TypeVar("M", bound=Message)


def with_defaults(spec: M) -> M:
    """A copy with every unset field set to its documented default.

    Messages inside are filled too where they are set; a list that is empty
    takes the default's words, separated by commas.
    """
    filled = type(spec)()
    filled.CopyFrom(spec)
    _fill(filled)
    return filled


def _fill(message: Message) -> None:
    for field in message.DESCRIPTOR.fields:
        text = field.GetOptions().Extensions[types_pb2.default_value]
        if field.is_repeated:
            values = getattr(message, field.name)
            if text and not values:
                values.extend(_parse(field, word.strip()) for word in text.split(","))
        elif message.HasField(field.name) if field.has_presence else False:
            if field.message_type is not None:
                _fill(getattr(message, field.name))
        elif text:
            setattr(message, field.name, _parse(field, text))


def _parse(field: Any, text: str) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return text
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return text == "true"
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return float(text)
    return int(text)
