"""What an artifact is: its files, where it came from, what was proved about it.

Responsibility: the manifest, its canonical JSON, and the digest that names it.
Does not know where manifests or files are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from arriero import refs
from arriero.errors import DataLoss, InvalidArgument
from arriero.gates import GateResult, Verdict
from arriero.store import files
from arriero.store.files import refuse_newer, safe_relative, to_json

# Version of the manifest's shape and of the store's layout; raised by hand.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: relative posix path, size in bytes, hexadecimal sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ManifestDraft:
    """What a publisher says about an artifact before its files are looked at.

    Attributes:
        kind: one of `refs.KINDS`.
        name: as `refs.is_name`, or empty.
        files: what the source must hold, to the byte; None hashes what is there.
        parents: digests that it was made from; their licences are inherited.
        golden: digest of the golden-logits report that belongs to it, if any.
        spec: the resolved spec, as JSON values.
        created: RFC 3339 in UTC; None means now. Give it (and `files`) where a
            publication may be repeated after a crash: equal drafts have equal
            digests, and the repetition finds the artifact instead of a second one.
    """

    kind: str
    name: str = ""
    files: Sequence[FileEntry] | None = None
    parents: Sequence[str] = ()
    golden: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    gates: Sequence[GateResult] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    licenses: Sequence[str] = ()
    owner: str = ""
    creator: str = ""
    created: str | None = None


@dataclass(frozen=True)
class Manifest:
    """An artifact's description; immutable, named by the digest of its canonical JSON.

    Attributes as in `ManifestDraft`, all resolved; `files` are sorted by path.
    """

    kind: str
    name: str
    files: tuple[FileEntry, ...]
    parents: tuple[str, ...] = ()
    golden: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    licenses: tuple[str, ...] = ()
    owner: str = ""
    creator: str = ""
    created: str = ""
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        """`sha256:` and the sha256 of `to_bytes`."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def quarantined(self) -> bool:
        """Whether any gate failed (waivers are not part of a manifest)."""
        return bool(self.failed_gates)

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """Names of the gates that failed."""
        return tuple(r.gate for r in self.gates if r.verdict is Verdict.FAILED)

    def to_bytes(self) -> bytes:
        """Canonical JSON.

        Raises:
            InvalidArgument: a spec that JSON can't carry.
        """
        return to_json(
            {
                "format": self.format,
                "kind": self.kind,
                "name": self.name,
                "files": [{"path": e.path, "size": e.size, "sha256": e.sha256} for e in self.files],
                "parents": list(self.parents),
                "golden": self.golden,
                "spec": self.spec,
                "gates": gates_to_json(self.gates),
                "metrics": {name: _number(value) for name, value in self.metrics.items()},
                "labels": dict(self.labels),
                "licenses": list(self.licenses),
                "owner": self.owner,
                "creator": self.creator,
                "created": self.created,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, digest: str) -> Manifest:
        """Read canonical JSON that must have this digest.

        Raises:
            DataLoss: torn or changed bytes, or fields that do not belong.
            FailedPrecondition: a newer format.
            InvalidArgument: a file path that climbs out.
        """
        found = "sha256:" + hashlib.sha256(data).hexdigest()
        if found != digest:
            raise DataLoss(
                f"the manifest of {digest} is damaged: its {len(data)} bytes have digest {found}; "
                "restore it from a backup, or make the artifact again"
            )
        try:
            value = json.loads(data)
            refuse_newer(int(value["format"]), FORMAT, f"the manifest of {digest}")
            return cls(
                kind=value["kind"],
                name=value["name"],
                files=tuple(
                    FileEntry(str(safe_relative(e["path"])), int(e["size"]), e["sha256"])
                    for e in value["files"]
                ),
                parents=tuple(value["parents"]),
                golden=value["golden"],
                spec=value["spec"],
                gates=gates_from_json(value["gates"]),
                metrics={name: float(number) for name, number in value["metrics"].items()},
                labels=value["labels"],
                licenses=tuple(value["licenses"]),
                owner=value["owner"],
                creator=value["creator"],
                created=value["created"],
                format=int(value["format"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataLoss(
                f"the manifest of {digest} is not one: {type(error).__name__} {error}"
            ) from error


def gates_to_json(results: Sequence[GateResult]) -> list[dict[str, Any]]:
    """Gate results as JSON values; NaN and infinities, which a failed gate finds, as text."""
    values = []
    for result in results:
        value = result.to_dict()
        for key in ("figure", "threshold", "seconds"):
            value[key] = None if value[key] is None else _number(value[key])
        values.append(value)
    return values


def gates_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[GateResult, ...]:
    """The inverse of `gates_to_json`."""
    results = []
    for value in values:
        fields = dict(value)
        for key in ("figure", "threshold", "seconds"):
            if fields.get(key) is not None:
                fields[key] = float(fields[key])
        results.append(GateResult.from_dict(fields))
    return tuple(results)


def _number(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def check_draft(draft: ManifestDraft) -> None:
    """Refuse a draft that could not become a manifest, before anything is written.

    Raises:
        InvalidArgument: naming the field.
    """
    if draft.kind not in refs.KINDS:
        raise InvalidArgument.field(
            "kind", f"unknown kind {draft.kind!r}; known kinds: {', '.join(refs.KINDS)}"
        )
    if draft.name and not refs.is_name(draft.name):
        raise InvalidArgument.field(
            "name", f"{draft.name!r} is not a name (lower case letters, digits, '.', '_', '-')"
        )
    for parent in draft.parents:
        check_digest(parent, field="parents")
    if draft.golden is not None:
        check_digest(draft.golden, field="golden")
    if draft.created is not None:
        _utc(draft.created)


def resolve_draft(
    draft: ManifestDraft, entries: Sequence[FileEntry], inherited: Sequence[str]
) -> Manifest:
    """The manifest of a draft with these files and the parents' licences."""
    return Manifest(
        kind=draft.kind,
        name=draft.name,
        files=tuple(sorted(entries, key=lambda entry: entry.path)),
        parents=tuple(dict.fromkeys(draft.parents)),
        golden=draft.golden,
        spec=dict(draft.spec),
        gates=tuple(draft.gates),
        metrics=dict(draft.metrics),
        labels=dict(draft.labels),
        licenses=tuple(sorted({*draft.licenses, *inherited})),
        owner=draft.owner,
        creator=draft.creator,
        created=_utc(draft.created) if draft.created else files.now(),
    )


def _utc(text: str) -> str:
    """RFC 3339 as `files.now` writes it, so that times sort as text."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InvalidArgument.field(
            "created", f"{text!r} is not RFC 3339, such as 2026-01-31T12:00:00Z"
        )
    return files.rfc3339(moment)


def check_digest(digest: str, *, field: str = "digest") -> str:
    """The 64 hexadecimal digits of a digest.

    Raises:
        InvalidArgument: not `sha256:` and 64 hexadecimal digits.
    """
    if not refs.is_digest(digest):
        raise InvalidArgument.field(
            field, f"{digest!r} is not a digest; expected sha256: and 64 hexadecimal digits"
        )
    return digest.removeprefix("sha256:")
