"""Waivers: a person's word that a failed gate may be passed, and why.

Responsibility: the records in `waivers/<hex>/<gate>.json`. Does not know what
the gate measured, or who may waive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import GateResult, Verdict
from arriero.store.files import now, parse_json, safe_name, to_json
from arriero.store.manifest import FORMAT, Manifest, check_digest
from arriero.store.objects import Objects


@dataclass(frozen=True, slots=True)
class Waiver:
    """Who waived which gate, why and when (RFC 3339)."""

    gate: str
    reason: str
    who: str
    time: str


def applied(gates: Iterable[GateResult], waivers: Sequence[Waiver]) -> tuple[GateResult, ...]:
    """Gate results as they stand: a failed gate that was waived is WAIVED, by whom and why."""
    by_gate = {waiver.gate: waiver for waiver in waivers}
    results = []
    for result in gates:
        waiver = by_gate.get(result.gate)
        if result.verdict is Verdict.FAILED and waiver is not None:
            said = f"waived by {waiver.who}: {waiver.reason}"
            detail = f"{said} ({result.detail})" if result.detail else said
            result = replace(result, verdict=Verdict.WAIVED, detail=detail)
        results.append(result)
    return tuple(results)


class Waivers:
    """The waivers of one store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def add(self, manifest: Manifest, gate: str, reason: str, who: str) -> None:
        """Waive a failed gate of an artifact; the newest waiver of a gate is kept.

        Raises:
            InvalidArgument: no reason, or nobody named.
            FailedPrecondition: that gate did not fail.
        """
        if not reason.strip():
            raise InvalidArgument.field("reason", "empty; a waiver says why")
        if not who.strip():
            raise InvalidArgument.field("who", "empty; a waiver names a person")
        if gate not in manifest.failed_gates:
            failed = ", ".join(manifest.failed_gates) or "none"
            raise FailedPrecondition(
                f"gate {gate!r} did not fail for {manifest.digest}; failed gates: {failed}"
            )
        hexadecimal = check_digest(manifest.digest)
        record = {"format": FORMAT, **asdict(Waiver(gate, reason, who, now()))}
        name = safe_name(gate, field="gate")
        self._objects.write(f"waivers/{hexadecimal}/{name}.json", to_json(record))

    def of(self, digest: str) -> list[Waiver]:
        """The waivers of an artifact, oldest first.

        Raises:
            DataLoss: a damaged record.
        """
        found = []
        for record in self._objects.find(f"waivers/{check_digest(digest)}/"):
            what = f"the waiver {self._objects.shown(record.key)}"
            value = parse_json(self._objects.read(record.key), FORMAT, what)
            found.append(Waiver(value["gate"], value["reason"], value["who"], value["time"]))
        return sorted(found, key=lambda waiver: waiver.time)
