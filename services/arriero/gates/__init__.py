"""What a gate is: modes, verdicts, results, and the collector that jobs judge with.

Responsibility: the words and the rule that turns a proof's outcome and a mode
into a verdict. Does not know what any particular gate measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from arriero.errors import InvalidArgument
from arriero.gates.cost import Cost, Meter

__all__ = ["KNOWN_GATES", "GateResult", "Gates", "Mode", "Verdict", "check_modes", "remedy"]


class Mode(StrEnum):
    """How seriously a gate is taken."""

    ENFORCE = "enforce"
    WARN = "warn"
    SKIP = "skip"


class Verdict(StrEnum):
    """The outcome of a gate."""

    PASSED = "passed"
    WARNED = "warned"
    FAILED = "failed"
    SKIPPED = "skipped"
    WAIVED = "waived"


# Every gate of this build, with its default mode.
KNOWN_GATES: Mapping[str, Mode] = {
    "dataset.schema": Mode.ENFORCE,
    "dataset.truncation": Mode.WARN,
    "dataset.labels": Mode.ENFORCE,
    "dataset.bos": Mode.ENFORCE,
    "tokenizer.match": Mode.ENFORCE,
    "train.finite": Mode.ENFORCE,
    "train.resume": Mode.ENFORCE,
    "train.improves": Mode.WARN,
    "adapter.health": Mode.ENFORCE,
    "merge.delta": Mode.ENFORCE,
    "merge.logits": Mode.ENFORCE,
    "merge.vocab": Mode.ENFORCE,
    "gguf.tokens": Mode.ENFORCE,
    "gguf.template": Mode.ENFORCE,
    "gguf.rope": Mode.ENFORCE,
    "quant.kld": Mode.ENFORCE,
    "serve.smoke": Mode.ENFORCE,
}


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's verdict about one artifact.

    `figure` is what was judged and `threshold` what it was judged by, both in
    `unit`; `detail` says what was found, what was expected and what to do;
    `seconds` is what the proof took, `memory_bytes` the job's private memory at its
    peak meanwhile (mapped files apart).
    """

    gate: str
    mode: Mode
    verdict: Verdict
    figure: float | None = None
    threshold: float | None = None
    unit: str = ""
    detail: str = ""
    seconds: float = 0.0
    memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateResult:
        """The inverse of `to_dict`."""
        fields = dict(data)
        fields["mode"] = Mode(fields["mode"])
        fields["verdict"] = Verdict(fields["verdict"])
        return cls(**fields)


def check_modes(names: Iterable[str], *, field_path: str = "gates") -> None:
    """Refuse gates that this build does not have.

    Raises:
        InvalidArgument: an unknown gate name.
    """
    for name in names:
        if name not in KNOWN_GATES:
            raise InvalidArgument.field(
                f"{field_path}[{name!r}]", f"unknown gate; known gates: {', '.join(KNOWN_GATES)}"
            )


def remedy(names: Iterable[str]) -> str:
    """What may be done about an artifact that gates refused, to follow `;` in a message."""
    names = list(names)
    accepted = ", ".join(f"{name}: {Mode.WARN.value}" for name in names)
    waived = " ".join(f"--waive {name}" for name in names)
    return (
        f"make it again, accept it with gates: {{{accepted}}} in the stage that makes it, or let "
        f"it pass: arriero runs retry RUN {waived} --reason TEXT"
    )


@dataclass(slots=True)
class Gates:
    """Collects the results of one job.

    Args:
        modes: what the spec asks for; the rest takes `KNOWN_GATES`' default.
        meter: what proofs cost is read from; made where none is given.
    """

    modes: Mapping[str, Mode] = field(default_factory=dict)
    results: list[GateResult] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    _cost: Cost = field(default_factory=Cost)

    def mode(self, gate: str) -> Mode:
        """The mode that is in force for a gate."""
        return self.modes.get(gate, KNOWN_GATES[gate])

    def wanted(self, gate: str) -> bool:
        """Whether the gate's proof is to be made at all; records SKIPPED if not."""
        if self.mode(gate) is Mode.SKIP:
            self.results.append(GateResult(gate, Mode.SKIP, Verdict.SKIPPED))
            return False
        return True

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Everything inside is charged to the next `judge`."""
        with self.meter.charged(self._cost):
            yield

    def judge(
        self,
        gate: str,
        passed: bool,
        *,
        figure: float | None = None,
        threshold: float | None = None,
        unit: str = "",
        detail: str = "",
    ) -> GateResult:
        """Record the verdict that follows from the proof's outcome and the mode."""
        mode = self.mode(gate)
        if mode is Mode.SKIP:
            verdict = Verdict.SKIPPED
        elif passed:
            verdict = Verdict.PASSED
        else:
            verdict = Verdict.FAILED if mode is Mode.ENFORCE else Verdict.WARNED
        cost, self._cost = self._cost, Cost()
        result = GateResult(
            gate, mode, verdict, figure, threshold, unit, detail, cost.seconds, cost.memory_bytes
        )
        self.results.append(result)
        return result

    def skip(self, gate: str, detail: str) -> None:
        """Record that there was nothing to compare with, and why."""
        self.results.append(GateResult(gate, self.mode(gate), Verdict.SKIPPED, detail=detail))

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """What refuses the artifact."""
        return tuple(r for r in self.results if r.verdict is Verdict.FAILED)
