"""The model card: true, whole markdown whatever is in the manifests, and nothing private."""

from __future__ import annotations

from typing import Any

import yaml

from arriero.gates import GateResult, Mode, Verdict
from arriero.merging import card
from arriero.store import Manifest

TOKEN = "hf_" + "a" * 30


def manifest(kind: str, name: str, **more: Any) -> Manifest:
    return Manifest(
        kind=kind, name=name, files=(), creator="arriero", created="2026-01-01T00:00:00Z", **more
    )


def test_hostile_words_stay_words() -> None:
    base = manifest(
        "model",
        "base",
        labels={"source": "hf://org/base@main", "revision": "c`c\n# Heading"},
        licenses=("apache-2.0",),
    )
    data = manifest(
        "dataset",
        "rows",
        metrics={"rows": 5.0},
        spec={
            "sources": [
                "/home/me/`rows`|x\n## Heading.jsonl",
                "https://me:secret@host/rows.jsonl?Signature=secret",
            ],
            "system_prompt": "say `hi`\n\n## Heading, from /home/me/private/prompt.txt",
        },
    )
    tuned = manifest(
        "model",
        "tuned",
        parents=(base.digest, data.digest),
        licenses=('A "free"\n---\nevil: true', "ü"),
        spec={"token": TOKEN, "max_shard_size": 5},
    )
    waived = GateResult(
        gate="merge.logits",
        mode=Mode.ENFORCE,
        verdict=Verdict.WAIVED,
        figure=0.5,
        threshold=0.1,
        unit="nats",
        detail=f"waived by me: drift|of\nthe base, see /home/me/notes.txt {TOKEN}",
    )
    text = card.write(
        [tuned, data, base], {tuned.digest: [waived]}, repository="me/tuned", layout="hf"
    )
    _, front, body = text.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts.keys() == {
        *("library_name", "base_model", "license", "license_name", "pipeline_tag", "tags")
    }
    assert facts["base_model"] == "org/base"
    assert facts["license_name"] == 'A "free"\n---\nevil: true, ü'
    lines = body.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# tuned",
        *(f"## {title}" for title in ("Base", "Data", "Knobs", "Gates", "Lineage", "Use")),
    ]
    assert "- `rows`, 5 rows: `` `rows`|x ## Heading.jsonl ``, `https://host/rows.jsonl`" in lines
    assert '- model `tuned`: `{"max_shard_size": 5, "token": "[redacted]"}`' in lines
    [row] = [line for line in lines if line.startswith("| merge.logits")]
    assert row == (
        "| merge.logits | model `tuned` | waived | 0.5 nats | 0.1 "
        "| waived by me: drift\\|of the base, see notes.txt [redacted] |"
    )
    for secret in ("/home", "secret", TOKEN):
        assert secret not in text


def test_only_a_repository_is_a_base() -> None:
    for source in ("hf://org/name\nevil: true", "hf://name", "/models/hf://org/name"):
        assert card.base_of([manifest("model", "m", labels={"source": source})]) is None
    farthest = manifest("model", "b", labels={"source": "hf://org/far"})
    near = manifest("model", "m", labels={"source": "hf://org/near@main"})
    assert card.base_of([near, farthest]) == "org/far"
