"""What the merging tests share: a store, published inputs, quick jobs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from arriero.merging.export import export
from arriero.merging.export_spec import resolve_export
from arriero.merging.importing import import_source
from arriero.merging.merge import merge
from arriero.merging.specs import resolve_import, resolve_merge
from arriero.operations.job import Job, Output
from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.jobs import run_job
from arriero.v1 import merging_pb2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


class Room:
    """The merging room without its service: resolve, then run the job here."""

    def __init__(self, store: Store, tmp_path: Path) -> None:
        self.store = store
        self.tmp_path = tmp_path
        self.jobs: list[Job] = []
        self.prepare: Callable[[Job], None] = lambda job: None

    def publish(self, source: Path, kind: str, **draft: Any) -> Artifact:
        """Put a copy of a directory into the store."""
        import shutil

        place = self.store.staging("test", f"e{len(self.store.list())}") / "out"
        shutil.copytree(source, place)
        return self.store.publish(place, ManifestDraft(kind=kind, name="thing", **draft))

    def _run(self, handler: Any, kind: str, spec: Any, inputs: Any) -> list[Output]:
        place = self.tmp_path / f"{kind}-{len(self.jobs)}"

        def remember(job: Job) -> None:
            self.jobs.append(job)
            self.prepare(job)

        return run_job(handler, kind, spec, inputs, self.store, place, prepare=remember)

    def bring(self, source: Path | str, **fields: Any) -> Output:
        """Stage `import`."""
        wanted = fields.pop("kind", None)
        spec = merging_pb2.ImportSpec(source=str(source), **fields)
        if wanted:
            setattr(spec, "as", wanted)
        allowed = SourceSettings((self.tmp_path,))
        resolved = resolve_import(spec, ResolveContext(self.store, {}, allowed))
        [output] = self._run(import_source, "import", resolved.spec, {})
        return output

    def export(self, given: Artifact, **fields: Any) -> Output:
        """Stage `export`."""
        inputs = {"model": [given]}
        spec = merging_pb2.ExportSpec(model=given.digest, **fields)
        resolved = resolve_export(spec, ResolveContext(self.store, inputs, SourceSettings()))
        [output] = self._run(export, "export", resolved.spec, inputs)
        return output

    def merge(
        self,
        model: Artifact,
        adapters: Sequence[Artifact],
        golden: Artifact | None = None,
        **fields: Any,
    ) -> list[Output]:
        """Stage `merge`."""
        inputs = {"model": [model], "adapters": list(adapters)}
        spec = merging_pb2.MergeSpec(
            model=model.digest, adapters=[a.digest for a in adapters], **fields
        )
        if golden is not None:
            spec.golden = golden.digest
            inputs["golden"] = [golden]
        context = ResolveContext(self.store, inputs, SourceSettings())
        return self._run(merge, "merge", resolve_merge(spec, context).spec, inputs)

    def verdicts(self) -> dict[str, str]:
        """Of the last job."""
        return {r.gate: r.verdict.value for r in self.jobs[-1].gates.results}


@pytest.fixture
def room(store: Store, tmp_path: Path) -> Room:
    return Room(store, tmp_path)
