"""The chart's values.schema.json and the table in its README.md, from values.yaml.

    python deploy/helm/generate.py            write them
    python deploy/helm/generate.py --check    exit 1 when they are not as they would be written

A value with a `# --` comment is documented: a map is then taken as a whole. A map
without one is a section, whose values are documented one by one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "arriero"
BEGIN, END = "<!-- values: generated -->", "<!-- values: end -->"

_KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):")
_QUANTITY = {
    "type": ["string", "integer"],
    "pattern": "^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)?$",
}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_OBJECT = {"type": "object"}
_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
_AMOUNTS = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
_PROFILES = {"type": "object", "additionalProperties": {"$ref": "#/$defs/profile"}}
# What the default of a value does not show, by its name.
_BY_NAME: dict[str, dict[str, Any]] = {
    "affinity": _OBJECT,
    "alertLabels": _WORDS,
    "allowedHosts": _STRINGS,
    "allowedPaths": {"type": "array", "items": {"type": "string", "pattern": "^/"}},
    "annotations": _WORDS,
    "cidrs": _STRINGS,
    "clients": _OBJECTS,
    "commonAnnotations": _WORDS,
    "commonLabels": _WORDS,
    "dnsNames": _STRINGS,
    "env": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "value": {"type": "string"},
                "valueFrom": _OBJECT,
            },
            "additionalProperties": False,
        },
    },
    "envFrom": _OBJECTS,
    "extraEgress": _OBJECTS,
    "imagePullSecrets": _STRINGS,
    "labels": _WORDS,
    "metrics": _OBJECTS,
    "nodeSelector": _WORDS,
    "podAnnotations": _WORDS,
    "podLabels": _WORDS,
    "podSecurityContext": _OBJECT,
    "ports": {"type": "array", "items": {"type": "integer"}},
    "profiles": _PROFILES,
    "resources": {"$ref": "#/$defs/resources"},
    "fetchResources": {"$ref": "#/$defs/resources"},
    "securityContext": _OBJECT,
    "tolerations": _OBJECTS,
    "topologySpreadConstraints": _OBJECTS,
    "volumeMounts": _OBJECTS,
    "volumes": _OBJECTS,
}
_DEFINITIONS: dict[str, Any] = {
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"requests": _AMOUNTS, "limits": _AMOUNTS, "claims": _OBJECTS},
    },
    "profile": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "resources": {"$ref": "#/$defs/resources"},
            "nodeSelector": _WORDS,
            "tolerations": _OBJECTS,
            "nodes": {"type": "integer", "minimum": 1},
            "gpusPerNode": {"type": "integer", "minimum": 0},
            "runtimeClassName": {"type": "string"},
            "priorityClassName": {"type": "string"},
            "queue": {"type": "string"},
            "priority": {"type": "integer"},
            "env": {
                "anyOf": [_BY_NAME["env"], _WORDS],
            },
        },
    },
}


@dataclass
class Value:
    """One key of values.yaml: where it is, what its comments say, what it is by default."""

    path: tuple[str, ...]
    text: str
    hint: dict[str, Any]
    default: Any
    children: list[Value] = field(default_factory=list)

    @property
    def documented(self) -> bool:
        """Whether it is taken as a whole."""
        return bool(self.text)

    def leaves(self) -> Iterator[Value]:
        """All documented values, in the file's order."""
        if self.documented:
            yield self
        for child in self.children:
            yield from child.leaves()


def read(path: Path) -> Value:
    """The tree of a values file.

    Raises:
        ValueError: a value without a comment.
    """
    text = path.read_text(encoding="utf-8")
    root = Value((), "", {}, yaml.safe_load(text))
    stack: list[tuple[int, Value]] = [(-2, root)]
    comment, hint = "", {}
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = stripped[5:]
        elif stripped.startswith("# @schema "):
            hint = json.loads(stripped[10:])
        elif match := _KEY.match(line):
            indent = len(match[1])
            while stack[-1][0] >= indent:
                stack.pop()
            parent = stack[-1][1]
            if parent.documented:
                continue
            default = parent.default[match[2]]
            value = Value((*parent.path, match[2]), comment, hint, default)
            if not comment and not isinstance(default, dict):
                raise ValueError(f"{'.'.join(value.path)} has no comment; expected `# -- ...`")
            parent.children.append(value)
            stack.append((indent, value))
            comment, hint = "", {}
    return root


def schema(value: Value) -> dict[str, Any]:
    """JSON Schema of a value."""
    if value.documented:
        return {"description": value.text, **_type(value)}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {child.path[-1]: schema(child) for child in value.children},
    }


def _type(value: Value) -> dict[str, Any]:
    name, default = value.path[-1], value.default
    if "enum" in value.hint or "type" in value.hint:
        return value.hint
    if isinstance(default, (dict, list)):
        return _BY_NAME[name]
    if isinstance(default, bool):
        return {"type": "boolean"}
    if isinstance(default, int):
        return {"type": "integer", "minimum": 0, **value.hint}
    if name == "size" or name.endswith(("Size", "Margin")):
        return _QUANTITY
    return {"type": "string", **value.hint}


def table(root: Value) -> str:
    """The values as a table in Markdown."""
    lines = ["| value | means | default |", "|---|---|---|"]
    for value in root.leaves():
        default = json.dumps(value.default, ensure_ascii=False)
        text = value.text.replace("|", "\\|")
        lines.append(f"| `{'.'.join(value.path)}` | {text} | `{default}` |")
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """What the files should hold."""
    root = read(CHART / "values.yaml")
    made = schema(root)
    # Parents of a subchart hand this down.
    made["properties"]["global"] = {"type": "object"}
    whole = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of Arriero's chart",
        **made,
        "$defs": _DEFINITIONS,
    }
    readme = CHART / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        CHART / "values.schema.json": json.dumps(whole, indent=2, ensure_ascii=False) + "\n",
        readme: f"{before}{BEGIN}\n{table(root)}\n{END}{after}",
    }


def stale() -> list[str]:
    """Names of files that are not what values.yaml makes them."""
    return [
        path.name
        for path, text in generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write or check."""
    if sys.argv[1:] == ["--check"]:
        if names := stale():
            print(f"{', '.join(names)}: not as values.yaml says; run {Path(__file__).name}")
            return 1
        return 0
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
