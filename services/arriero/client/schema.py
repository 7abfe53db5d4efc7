"""The JSON Schema of pipeline files, for editors that complete and check while one writes.

Responsibility: say in JSON Schema what `reading` accepts: fields, types, short
enum names, defaults, and the protos' comments. Does not know what makes sense
together: names, references and the graph are the orchestrator's to check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from arriero.client.reading import FieldType, is_map, word_for
from arriero.gates import KNOWN_GATES
from arriero.v1 import pipeline_pb2, types_pb2

__all__ = ["pipeline_schema"]

Schema = dict[str, Any]

# What the YAML language servers of editors understand best.
_DIALECT = "http://json-schema.org/draft-07/schema#"
_STAGE_NAME = "a stage, stage.output, or a store reference such as {kind}/name:tag"
_INTEGERS: Mapping[int, tuple[int, int]] = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_NUMBERS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)


def pipeline_schema() -> Schema:
    """The schema of a pipeline file, draft 7.

    Examples:
        >>> from arriero.client import pipeline_schema
        >>> schema = pipeline_schema()
        >>> schema["definitions"]["TrainSpec"]["properties"]["lora"]["allOf"]
        [{'$ref': '#/definitions/LoraConfig'}]
    """
    writer = _Writer(
        json.loads((resources.files("arriero.v1") / "comments.json").read_text(encoding="utf-8"))
    )
    root = writer.message(pipeline_pb2.Pipeline.DESCRIPTOR)
    return {
        "$schema": _DIALECT,
        "title": "Arriero pipeline",
        **root,
        "required": ["name", "stages"],
        "definitions": dict(sorted(writer.definitions.items())),
    }


class _Writer:
    """Writes one definition per message."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        self.definitions: dict[str, Schema] = {}
        self._comments = comments

    def message(self, descriptor: Any) -> Schema:
        """An object with the message's fields, and no others."""
        properties = {field.name: self._field(field) for field in descriptor.fields}
        schema: Schema = {
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
        }
        if comment := self._comments.get(descriptor.full_name):
            schema["description"] = comment
        required = [field.name for field in descriptor.fields if _is_required(field)]
        if descriptor is pipeline_pb2.Stage.DESCRIPTOR:
            required.insert(0, "name")
        if required:
            schema["required"] = required
        for oneof in descriptor.oneofs:
            if len(oneof.fields) > 1:  # a field with presence is a oneof of its own
                schema["oneOf"] = [{"required": [field.name]} for field in oneof.fields]
        return schema

    def _field(self, field: FieldType) -> Schema:
        if is_map(field):
            schema = self._map(field)
        elif field.is_repeated:
            schema = {"type": "array", "items": self._value(field)}
            if _input(field).all_outputs:
                # One word stands for all outputs of a stage.
                schema = {"anyOf": [schema, {"type": "string"}]}
        else:
            schema = self._value(field)
            if word := word_for(field):
                alone = self._value(field.message_type.fields_by_name[word])
                schema = {"anyOf": [schema, alone]}
        if "$ref" in schema:
            schema = {"allOf": [schema]}  # what stands beside a $ref is not read
        if description := self._description(field):
            schema["description"] = description
        default = field.GetOptions().Extensions[types_pb2.default_value]
        if default:
            words = (
                [word.strip() for word in default.split(",")] if field.is_repeated else [default]
            )
            values = [_parse(field, word) for word in words]
            schema["default"] = values if field.is_repeated else values[0]
        return schema

    def _description(self, field: FieldType) -> str:
        parts = [self._comments.get(field.full_name, "")]
        kinds = _input(field).kinds
        if kinds:
            expected = _STAGE_NAME.format(kind=kinds[0])
            parts.append(f"Takes a {' or '.join(kinds)}: {expected}.")
        return " ".join(part for part in parts if part)

    def _map(self, field: FieldType) -> Schema:
        schema: Schema = {
            "type": "object",
            "additionalProperties": self._value(field.message_type.fields_by_name["value"]),
        }
        if field.name == "gates":
            schema["propertyNames"] = {"enum": list(KNOWN_GATES)}
        return schema

    def _value(self, field: FieldType) -> Schema:
        """One value of a field's type."""
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_MESSAGE:
            name = field.message_type.name
            if name not in self.definitions:
                self.definitions[name] = {}  # so that a message inside of itself ends
                self.definitions[name] = self.message(field.message_type)
            return {"$ref": f"#/definitions/{name}"}
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            values = field.enum_type.values
            prefix = values[0].name.removesuffix("UNSPECIFIED")
            return {"enum": [value.name.removeprefix(prefix).lower() for value in values[1:]]}
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return {"type": "boolean"}
        if kind in _NUMBERS:
            return {"type": "number"}
        if kind in _INTEGERS:
            low, high = _INTEGERS[kind]
            return {"type": "integer", "minimum": low, "maximum": high}
        return {"type": "string"}


def _input(field: FieldType) -> types_pb2.InputRule:
    rule: types_pb2.InputRule = field.GetOptions().Extensions[types_pb2.input]
    return rule


def _is_required(field: FieldType) -> bool:
    """Whether leaving it out is refused: inputs that have no presence."""
    return (
        bool(field.GetOptions().HasExtension(types_pb2.input))
        and not field.is_repeated
        and not field.has_presence
    )


def _parse(field: FieldType, text: str) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return text == "true"
    if field.cpp_type in _NUMBERS:
        return float(text)
    return int(text) if field.cpp_type in _INTEGERS else text
