"""JSON schemas as grammars.

Responsibility: from a JSON schema to llama.cpp's GBNF, by the converter that the
binding brings and what it lacks; what neither can say is refused, so that a text never
breaks its schema unseen. Does not know sampling.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from arriero.errors import InvalidArgument

__all__ = ["LARGEST", "from_json_schema", "nesting"]

_MAX_BYTES = 64 * 1024
# Bytes of GBNF; grammars beyond this are no grammars of people.
LARGEST = 256 * 1024
# Repetitions become as many rules one inside the other, of which llama.cpp takes no more.
_MAX_COUNT = 1000
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
# Say which values are wrong, and have no grammar here.
_REFUSED = frozenset(
    {"not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains"}
    | {"maxContains", "minProperties", "maxProperties", "patternProperties", "propertyNames"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems"}
    | {"unevaluatedProperties"}
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SPACE = r'| " " | "\n"{1,2} [ \t]{0,20}'
# As many digits as the converter's own integers have.
_DIGITS = 16
_QUANTIFIER = re.compile(r"(?<!\\)\{([^}]*)\}")
_GBNF_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|[()]')


def from_json_schema(schema: str, *, field: str = "json_schema") -> str:
    """GBNF that describes the JSON texts of a schema; nothing is fetched for `$ref`.

    Raises:
        InvalidArgument: it is no JSON schema, too large, or says what GBNF cannot.
    """
    if len(schema.encode()) > _MAX_BYTES:
        raise InvalidArgument.field(field, f"longer than {_MAX_BYTES} bytes")
    try:
        converter = _converter()()
        read = converter.resolve_refs(json.loads(schema), "schema")
        converter.visit(read, "")
        return str(converter.format_grammar())
    except _Refused as error:
        raise InvalidArgument.field(field, str(error)) from None
    except RecursionError:
        raise InvalidArgument.field(field, "is nested too deeply") from None
    except Exception as error:  # asserts, KeyErrors and more, by what is wrong
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidArgument.field(field, f"cannot be made a grammar ({why})") from error


def nesting(grammar: str) -> int:
    """How deep the parentheses of a GBNF text lie in each other."""
    depth = deepest = 0
    for found in _GBNF_TOKEN.finditer(grammar):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


class _Refused(Exception):
    """What a schema says and a grammar cannot."""


@functools.cache
def _converter() -> Any:
    """The binding's converter, which is imported late since the library comes with it."""
    from llama_cpp.llama_grammar import SchemaConverter

    class Converter(SchemaConverter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
            # As llama.cpp's own: a model that is kept from its line breaks says other things.
            self._rules["space"] = _SPACE
            self._size = 0

        def visit(self, schema: Any, name: str) -> Any:
            schema = _plain(schema)
            _check(schema)
            if _bounded(schema, "integer"):
                rule = f"({_integers(schema)}) space"
                return self._add_rule(f"{name}-range" if name else "root", rule)
            return super().visit(schema, name)

        def _add_rule(self, name: str, rule: str) -> Any:
            self._size += len(rule)
            if self._size > LARGEST:
                raise _Refused(f"makes a grammar of more than {LARGEST} bytes")
            return super()._add_rule(name, rule)

    return Converter


def _plain(schema: Any) -> Any:
    """The same schema in the words that the converter obeys."""
    if not isinstance(schema, dict):
        return schema
    if isinstance(alone := schema.get("allOf"), list) and len(alone) == 1:
        rest = {key: value for key, value in schema.items() if key != "allOf"}
        return _plain({**rest, **alone[0]})
    if isinstance(kinds := schema.get("type"), list):
        # What it says beside the types holds for those that it is about.
        rest = {key: value for key, value in schema.items() if key != "type"}
        if "enum" in rest or "const" in rest:
            return rest
        return {"anyOf": [{**rest, "type": kind} for kind in kinds]}
    return schema


def _bounded(schema: Mapping[str, Any], kind: str) -> bool:
    listed = "enum" in schema or "const" in schema
    return schema.get("type") == kind and not listed and any(b in schema for b in _BOUNDS)


def _check(schema: Mapping[str, Any]) -> None:
    for word in schema.keys() & _REFUSED:
        raise _Refused(f"{word!r} has no grammar here; leave it out, and check the answer")
    if _bounded(schema, "number"):
        raise _Refused("bounds of numbers have no grammar here, only those of integers")
    counts = [(word, schema[word]) for word in _COUNTS if word in schema]
    if isinstance(pattern := schema.get("pattern"), str):
        for found in _QUANTIFIER.findall(pattern):
            counts += [("pattern", int(n)) for n in found.split(",") if n.strip().isdecimal()]
    for word, count in counts:
        if not isinstance(count, int) or not 0 <= count <= _MAX_COUNT:
            raise _Refused(f"{word} of {count!r}; expected a whole number of 0 to {_MAX_COUNT}")


def _integers(schema: Mapping[str, Any]) -> str:
    """GBNF of the integers between a schema's bounds, both included."""
    bounds = {word: schema[word] for word in _BOUNDS if word in schema}
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in bounds.values()):
        raise _Refused("bounds of integers must be whole numbers")
    end = 10**_DIGITS - 1
    low = max(bounds.get("minimum", -end), bounds.get("exclusiveMinimum", -end - 1) + 1)
    high = min(bounds.get("maximum", end), bounds.get("exclusiveMaximum", end + 1) - 1)
    if not -end <= low <= high <= end:
        raise _Refused(f"no integer of {_DIGITS} digits lies between its bounds")
    parts = []
    if low < 0:
        parts += [f'"-" ({part})' for part in _between(max(1, -high), -low)]
    if high >= 0:
        parts += _between(max(0, low), high)
    return " | ".join(parts)


def _between(low: int, high: int) -> list[str]:
    """One part for each count of digits."""
    parts = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        parts.append(_digits(str(least), str(min(high, 10**digits - 1))))
    return parts


def _digits(low: str, high: str) -> str:
    """GBNF of the numbers between two of as many digits."""
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else "")
    if first == last:
        return f'"{first}" ({_digits(low[1:], high[1:])})'
    parts = []
    if set(low[1:]) != {"0"}:
        parts.append(f'"{first}" ({_digits(low[1:], "9" * rest)})')
        first += 1
    if set(high[1:]) != {"9"}:
        parts.append(f'"{last}" ({_digits("0" * rest, high[1:])})')
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    return " | ".join(parts)
