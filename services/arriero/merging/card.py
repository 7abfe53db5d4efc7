"""The model card of what is pushed: base, data, knobs, gates, lineage.

Responsibility: from manifests to a README with front matter. Tells names, not
places: a path on some machine is reduced to its last part. Does not know hubs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from arriero.gates import GateResult, Verdict
from arriero.store import Manifest

__all__ = ["base_of", "write"]

_LIBRARY = {"model": "transformers", "adapter": "peft", "gguf": "llama.cpp"}
# Fields of specs that tell how something was made, not where it lay.
_PLACES = ("source", "sources", "tokenizer", "target", "corpus")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HUB = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?", re.ASCII)
# An absolute path that begins a word; its last part is kept.
_PATH = re.compile(r"(?<![\w/:.~-])(?:/[^\s/\"'`]+)+/([^\s/\"'`]+)")
_TOKEN = re.compile(r"(hf_|api_org_|ghp_|github_pat_|glpat-|pypi-|sk-)[A-Za-z0-9_-]{16,}")
_SHORT = 12


def base_of(lineage: Sequence[Manifest]) -> str | None:
    """The hub repository (`org/name`) that the farthest base came from, if any."""
    for manifest in reversed(lineage):
        found = _HUB.fullmatch(manifest.labels.get("source", ""))
        if manifest.kind == "model" and found:
            return found[1]
    return None


def write(
    lineage: Sequence[Manifest],
    gates: Mapping[str, Sequence[GateResult]],
    *,
    repository: str,
    layout: str,
) -> str:
    """The card.

    Args:
        lineage: what is pushed, then its ancestors, nearest first.
        gates: results by digest, waivers applied.
        repository: `org/name`.
        layout: `hf` or `meta`.
    """
    subject = lineage[0]
    sections = [
        _front(subject, base_of(lineage)),
        f"# {repository.partition('/')[2]}",
        _opening(subject, layout),
        _section("Base", _bases(lineage)),
        _section("Data", _data(lineage)),
        _section("Knobs", _knobs(lineage)),
        _section("Gates", _gates(lineage, gates)),
        _section("Lineage", _lineage(lineage)),
        _usage(subject, repository, base_of(lineage), layout),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(subject: Manifest, base: str | None) -> str:
    lines = ["---", f"library_name: {_LIBRARY.get(subject.kind, 'transformers')}"]
    if base:
        lines.append(f"base_model: {base}")
    if subject.licenses:
        lines.append("license: other")
        lines.append(f"license_name: {json.dumps(', '.join(subject.licenses))}")
    lines += ["pipeline_tag: text-generation", "tags:", "- arriero", "---"]
    return "\n".join(lines)


def _opening(subject: Manifest, layout: str) -> str:
    what = f"{subject.kind} `{subject.name}`" if subject.name else subject.kind
    in_layout = " in Meta's layout" if layout == "meta" and subject.kind == "model" else ""
    return (
        f"The {what}{in_layout}, made with Arriero. Its digest is `{subject.digest}`; every "
        "figure below is from the manifests of what it was made from."
    )


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _bases(lineage: Sequence[Manifest]) -> list[str]:
    return [
        f"- {m.kind} `{m.name}` ({_place(m.labels['source'])}"
        + (f", revision {_code(m.labels['revision'])}" if "revision" in m.labels else "")
        + ")"
        for m in lineage
        if m.kind in ("model", "gguf", "adapter") and "source" in m.labels
    ]


def _data(lineage: Sequence[Manifest]) -> list[str]:
    lines = []
    for manifest in lineage:
        if manifest.kind != "dataset":
            continue
        sources = manifest.spec.get("sources", [])
        said = ", ".join(_place(str(source)) for source in sources)
        rows = manifest.metrics.get("rows")
        figures = f", {rows:.0f} rows" if rows is not None else ""
        lines.append(f"- `{manifest.name or _short(manifest.digest)}`{figures}: {said or 'pushed'}")
    return lines


def _knobs(lineage: Sequence[Manifest]) -> list[str]:
    """The resolved spec of each step, without places and inputs."""
    lines: list[str] = []
    seen: set[str] = set()
    for manifest in lineage:
        spec = {
            key: value
            for key, value in manifest.spec.items()
            if key not in _PLACES and not _mentions_digest(value) and "secret" not in key
        }
        text = _redacted(json.dumps(spec, sort_keys=True))
        if spec and text not in seen:
            seen.add(text)
            lines.append(f"- {manifest.kind} `{manifest.name}`: {_code(text)}")
    return lines


def _gates(lineage: Sequence[Manifest], gates: Mapping[str, Sequence[GateResult]]) -> list[str]:
    rows: list[str] = []
    for manifest in lineage:
        for result in gates.get(manifest.digest, ()):
            figure = "" if result.figure is None else f"{result.figure:.3g} {result.unit}".strip()
            limit = "" if result.threshold is None else f"{result.threshold:.3g}"
            note = _cell(result.detail) if result.verdict is Verdict.WAIVED else ""
            row = (
                f"| {result.gate} | {manifest.kind} `{manifest.name}` | {result.verdict.value} "
                f"| {figure} | {limit} | {note} |"
            )
            if row not in rows:
                rows.append(row)
    if not rows:
        return []
    head = ["| gate | about | verdict | figure | limit | note |", "|---|---|---|---|---|---|"]
    return [*head, *rows]


def _lineage(lineage: Sequence[Manifest]) -> list[str]:
    head = ["| kind | name | digest | made from | made by |", "|---|---|---|---|---|"]
    return head + [
        f"| {m.kind} | {m.name} | `{m.digest}` | "
        f"{', '.join(f'`{_short(parent)}`' for parent in m.parents)} | {m.creator} |"
        for m in lineage
    ]


def _usage(subject: Manifest, repository: str, base: str | None, layout: str) -> str:
    if subject.kind == "adapter":
        model = base or "PATH_OF_THE_BASE"
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{model}")\n'
            f'model = PeftModel.from_pretrained(base, "{repository}")'
        )
        return f"## Use\n\n```python\n{code}\n```"
    if subject.kind == "model" and layout == "hf":
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repository}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")'
        )
        return f"## Use\n\n```python\n{code}\n```"
    return ""


def _place(source: str) -> str:
    """A source as strangers may read it: addresses without what opens them, names of files."""
    if "://" not in source:
        return _code(_redacted(PurePosixPath(source).name or source))
    scheme, _, rest = source.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return _code(_redacted(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"))


def _code(text: str) -> str:
    """A code span on one line, whatever is in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _mentions_digest(value: Any) -> bool:
    return _DIGEST.search(json.dumps(value)) is not None


def _redacted(text: str) -> str:
    """Without tokens, and without the places of this machine."""
    return _PATH.sub(r"\1", _TOKEN.sub("[redacted]", text))


def _cell(text: str) -> str:
    return " ".join(_redacted(text).split()).replace("|", "\\|")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHORT]
