"""From an outcome to artifacts: the service's part of a job's work.

Responsibility: publish the outputs that an outcome describes, each once however
often it is tried. Does not know how the outcome came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from arriero import refs
from arriero.errors import GateFailed, Internal
from arriero.gates import GateResult, Verdict, remedy
from arriero.gates.cost import Cost
from arriero.operations.handoff import Outcome, OutputFiles
from arriero.operations.records import ExecutionRecord, Result
from arriero.operations.views import result_of
from arriero.store import Artifact, FileEntry, ManifestDraft, Store

# In `Output.golden` and `Output.parents`: another output of the same job.
_SIBLING = "output:"
# Outputs that are published at the same time.
_THREADS = 4


@dataclass(frozen=True)
class Published:
    """What became of an outcome's outputs, by name in the job's order."""

    artifacts: Mapping[str, Artifact]
    gates: Sequence[GateResult]
    work: Cost | None = None

    @property
    def failed(self) -> list[GateResult]:
        """The gates that refuse the work."""
        return [gate for gate in self.gates if gate.verdict is Verdict.FAILED]

    @property
    def reusable(self) -> bool:
        """Whether the outputs may answer the same work again.

        Quarantined ones may: the store withholds them until their gates are
        waived. A failed gate that no output carries would be forgotten.
        """
        carried = {
            name for artifact in self.artifacts.values() for name in artifact.manifest.failed_gates
        }
        return all(gate.gate in carried for gate in self.failed)

    def result(self) -> Result:
        """As records have it; without an error."""
        return result_of(self.artifacts, self.gates, self.work)

    def error(self) -> GateFailed | None:
        """Why the work is refused although it was done."""
        failed = self.failed
        if not failed:
            return None
        said = "; ".join(f"{gate.gate}: {gate.detail or 'failed'}" for gate in failed)
        kept = ", ".join(f"{n} {a.digest}" for n, a in self.artifacts.items() if a.quarantined)
        names = [gate.gate for gate in failed]
        return GateFailed(
            f"{said} (kept in quarantine: {kept or 'nothing'}; {remedy(names)})",
            metadata={"gates": ",".join(names)},
        )


def publish(
    store: Store, service: str, record: ExecutionRecord, outcome: Outcome, attempt_dir: Path
) -> Published:
    """Publish every output; those that others refer to come first.

    May be repeated after a crash: drafts are made from the outcome alone, so an
    output that was published is found again.

    Raises:
        Internal: an output refers to one that does not exist, or in a circle.
        DataLoss: files changed since the job hashed them.
        DiskFull: over the store's quota.
    """
    artifacts: dict[str, Artifact] = {}
    left = list(outcome.outputs)
    while left:
        ready = [output for output in left if _siblings(output) <= artifacts.keys()]
        if not ready:
            names = ", ".join(f"{output.name} -> {_siblings(output)}" for output in left)
            raise Internal(f"outputs refer to each other or to nothing: {names}")
        with ThreadPoolExecutor(_THREADS) as pool:  # the time goes to hashing, without the GIL
            made = pool.map(
                lambda output: _publish_one(
                    store, service, record, outcome, output, attempt_dir, artifacts
                ),
                ready,
            )
            artifacts.update(zip((output.name for output in ready), list(made), strict=True))
        left = [output for output in left if output.name not in artifacts]
    ordered = {output.name: artifacts[output.name] for output in outcome.outputs}
    return Published(ordered, _all_gates(outcome), outcome.work)


def _siblings(output: OutputFiles) -> set[str]:
    references = [*output.parents, *([output.golden] if output.golden else [])]
    return {ref.removeprefix(_SIBLING) for ref in references if ref.startswith(_SIBLING)}


def _publish_one(
    store: Store,
    service: str,
    record: ExecutionRecord,
    outcome: Outcome,
    output: OutputFiles,
    attempt_dir: Path,
    artifacts: Mapping[str, Artifact],
) -> Artifact:
    if output.existing is not None:
        return store.get(output.existing)

    def digest(reference: str) -> str:
        if reference.startswith(_SIBLING):
            return artifacts[reference.removeprefix(_SIBLING)].digest
        return reference

    name = output.artifact_name or output.name.lower()
    draft = ManifestDraft(
        kind=output.kind,
        name=name if output.artifact_name or refs.is_name(name) else "",
        files=[FileEntry(path, size, sha256) for path, size, sha256 in output.files],
        parents=[digest(parent) for parent in output.parents],
        golden=digest(output.golden) if output.golden else None,
        spec=record.spec,
        gates=output.gates,
        metrics=output.metrics,
        # What the job says of its work wins over what the run is called.
        labels={**record.labels, **output.labels},
        licenses=output.licenses,
        owner=record.owner,
        creator=f"arriero/{version()} {service}",
        created=outcome.created,
    )
    return store.publish(attempt_dir / output.path, draft)


def _all_gates(outcome: Outcome) -> list[GateResult]:
    """The job's gates, and those that only an output carries."""
    gates = list(outcome.gates)
    for output in outcome.outputs:
        gates += [gate for gate in output.gates if gate not in gates]
    return gates


@cache
def version() -> str:
    """The installed package's version; `0` when it runs from its sources."""
    try:
        return metadata.version("arriero")
    except metadata.PackageNotFoundError:
        return "0"
