"""JSON schemas as grammars.

Responsibility: from a JSON schema to llama.cpp's GBNF, by the converter that the
binding brings. Does not know sampling.
"""

from __future__ import annotations

from arriero.errors import InvalidArgument

__all__ = ["from_json_schema"]

_MAX_BYTES = 64 * 1024


def from_json_schema(schema: str, *, field: str = "json_schema") -> str:
    """GBNF that describes the JSON texts of a schema; nothing is fetched for `$ref`.

    Raises:
        InvalidArgument: it is no JSON schema, too large, or says what GBNF cannot.
    """
    if len(schema.encode()) > _MAX_BYTES:
        raise InvalidArgument.field(field, f"longer than {_MAX_BYTES} bytes")
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return str(json_schema_to_gbnf(schema))
    except RecursionError:
        raise InvalidArgument.field(field, "is nested too deeply") from None
    except Exception as error:  # asserts, KeyErrors and more, by what is wrong
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidArgument.field(field, f"cannot be made a grammar ({why})") from error
