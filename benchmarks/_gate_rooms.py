"""The rooms' work without their services, for the scoreboard.

Responsibility: check, resolve, run in this process, publish with verdicts; and the
models, rows and adapters that runs are made of. Does not know which run is healthy.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from arriero.dataset.job import prepare
from arriero.dataset.service import DATASET
from arriero.errors import ArrieroError
from arriero.gates import GateResult, Verdict
from arriero.merging.importing import import_source
from arriero.merging.merge import merge
from arriero.merging.service import KINDS as MERGING
from arriero.operations import intake
from arriero.operations.delivery import _translate
from arriero.operations.job import Handler, Job, Output
from arriero.operations.kinds import WorkKind
from arriero.quantization.evaluate import run_evaluate
from arriero.quantization.kinds import WORK_KINDS as QUANTIZATION
from arriero.quantization.quantize import run_quantize
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.adapters import tiny_adapter
from arriero.testing.jobs import run_job
from arriero.testing.models import tiny_llama
from arriero.training.job import train
from arriero.training.service import KINDS as TRAINING
from arriero.v1 import dataset_pb2, merging_pb2, quantization_pb2, training_pb2

FAMILIES = ("sentencepiece", "smollm", "llama-3")
DTYPES = ("float32", "bfloat16")

_HANDLERS: Mapping[str, tuple[WorkKind, Handler]] = {
    "dataset": (DATASET, prepare),
    "train": (TRAINING[0], train),
    **{
        kind.name: (kind, {"import": import_source, "merge": merge}[kind.name])
        for kind in MERGING
        if kind.name in ("import", "merge")
    },
    **{
        kind.name: (kind, {"quantize": run_quantize, "evaluate": run_evaluate}[kind.name])
        for kind in QUANTIZATION
    },
}


@dataclass
class Outcome:
    """What became of one piece of work.

    Attributes:
        artifacts: outputs by name, published with their verdicts.
        gates: all verdicts.
        error: why it was refused or failed, if it was.
        job: as the handler saw it; None when the spec was refused.
        lines: what the job logged.
    """

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    error: ArrieroError | None = None
    job: Job | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the gates that refuse the outputs."""
        return [gate.gate for gate in self.gates if gate.verdict is Verdict.FAILED]

    @property
    def warned(self) -> list[str]:
        """Names of the gates that only warn."""
        return [gate.gate for gate in self.gates if gate.verdict is Verdict.WARNED]

    @property
    def refused(self) -> bool:
        """Whether it was stopped with a reason, not by a defect."""
        return self.error is not None and self.error.code not in ("INTERNAL", "UNKNOWN")

    def first(self) -> Artifact:
        """The default output; raises what went wrong where there is none."""
        if self.error is not None:
            raise self.error
        return next(iter(self.artifacts.values()))


class Rooms:
    """A store, and every room over it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store.open(home / "store")
        self.sources = SourceSettings((home,))
        self._count = 0

    @property
    def used(self) -> int:
        """Bytes that the store holds."""
        return sum(p.stat().st_size for p in (self.home / "store").rglob("*") if p.is_file())

    def place(self, name: str) -> Path:
        """A new directory."""
        self._count += 1
        path = self.home / "work" / f"{self._count:04d}-{name}"
        path.mkdir(parents=True)
        return path

    def publish(self, source: Path, kind: str, **draft: Any) -> Artifact:
        """Put a copy of a directory into the store."""
        self._count += 1
        staged = self.store.staging("bench", f"p{self._count}") / "files"
        shutil.copytree(source, staged)
        return self.store.publish(staged, ManifestDraft(kind=kind, **{"name": "thing", **draft}))

    def run(
        self,
        kind: str,
        spec: Message,
        *,
        prepare: Callable[[Job], None] | None = None,
        place: Path | None = None,
        attempt: int = 1,
    ) -> Outcome:
        """Do a stage's work as its service and its job would.

        Args:
            kind: of the stage.
            spec: as a pipeline has it, with digests.
            prepare: gets the job before its handler does.
            place: of an earlier attempt, to go on from.
            attempt: counts from 1.
        """
        outcome = Outcome()
        room, handler = _HANDLERS[kind]
        kept: list[Job] = []

        def keep(job: Job) -> None:
            kept.append(job)
            if prepare is not None:
                prepare(job)

        listener = _Listener(outcome.lines)
        logging.getLogger("arriero").setLevel(logging.INFO)
        logging.getLogger("arriero").addHandler(listener)
        try:
            work = intake.resolve(room, spec, self.store, self.sources)
            where = place or self.place(kind)
            outputs = run_job(
                handler, kind, work.resolved.spec, work.inputs, self.store, where,
                attempt=attempt, prepare=keep,
            )  # fmt: skip
            outcome.job = kept[0]
            self._publish(outcome, outputs, kept[0])
        except ArrieroError as error:
            outcome.error = error
        except (MemoryError, OSError, RuntimeError) as error:
            outcome.error = _translate(error)  # as a job process does
        finally:
            logging.getLogger("arriero").removeHandler(listener)
        if kept:
            outcome.job = kept[0]
            outcome.gates = list(kept[0].gates.results)
        return outcome

    def _publish(self, outcome: Outcome, outputs: Sequence[Output], job: Job) -> None:
        from arriero.operations.handoff import to_json

        inputs = tuple(a.digest for artifacts in job.inputs.values() for a in artifacts)
        # Reports first: the others name them as their golden logits.
        for output in sorted(outputs, key=lambda output: output.kind != "report"):
            if output.existing is not None:
                outcome.artifacts[output.name] = self.store.get(output.existing)
                continue
            golden = output.golden
            if golden is not None and golden.startswith("output:"):
                golden = outcome.artifacts[golden.removeprefix("output:")].digest
            parents = [p for p in output.parents if not p.startswith("output:")] or inputs
            outcome.artifacts[output.name] = self.store.publish(
                output.path,
                ManifestDraft(
                    kind=output.kind,
                    name="thing",
                    parents=tuple(dict.fromkeys(parents)),
                    golden=golden,
                    spec=to_json(job.spec),
                    gates=tuple(job.gates.results if output.gates is None else output.gates),
                    metrics=dict(output.metrics),
                    labels=dict(output.labels),
                ),
            )
        order = [output.name for output in outputs]
        outcome.artifacts = {name: outcome.artifacts[name] for name in order}

    # -- what runs are made of -------------------------------------------------

    def model(
        self,
        family: str,
        dtype: str,
        *,
        seed: int = 0,
        change: Callable[[Path], None] | None = None,
        **shape: Any,
    ) -> Artifact:
        """A tiny model of a tokenizer family; `change` may alter its files."""
        directory = self.place("model")
        tiny_llama(directory, seed=seed, dtype=dtype, tokenizer=family, **shape)  # type: ignore[arg-type]
        if change is not None:
            change(directory)
        return self.publish(directory, "model")

    def rows(
        self, model: Artifact, rows: Sequence[Mapping[str, Any]] | None = None, **fields: Any
    ) -> Outcome:
        """Stage `dataset`."""
        path = self.place("rows") / "rows.jsonl"
        found = alpaca_rows() if rows is None else rows
        path.write_text("\n".join(json.dumps(row) for row in found) + "\n", encoding="utf-8")
        fields = {"template": "alpaca", "cutoff_len": 512, "num_proc": 1} | fields
        spec = dataset_pb2.DatasetSpec(sources=[str(path)], tokenizer=model.digest, **fields)
        return self.run("dataset", spec)

    def train(
        self,
        model: Artifact,
        dataset: Artifact,
        lora: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Outcome:
        """Stage `train`."""
        options = {key: fields.pop(key) for key in ("prepare", "place", "attempt") if key in fields}
        fields = {
            "max_steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2,
            "dtype": "float32",
        } | fields  # fmt: skip
        spec = training_pb2.TrainSpec(
            model=model.digest,
            dataset=dataset.digest,
            lora={"r": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]} | dict(lora or {}),
            **fields,
        )
        return self.run("train", spec, **options)

    def adapter(
        self, model: Artifact, change: Callable[[Path], None] | None = None, **options: Any
    ) -> Outcome:
        """Stage `import` of a random adapter of a model."""
        directory = self.place("adapter")
        tiny_adapter(directory, model.path, base_model_name_or_path=model.digest, **options)
        if change is not None:
            change(directory)
        spec = merging_pb2.ImportSpec(source=str(directory))
        return self.run("import", spec)

    def merge(
        self, model: Artifact, *adapters: Artifact, prepare: Any = None, **fields: Any
    ) -> Outcome:
        """Stage `merge`."""
        spec = merging_pb2.MergeSpec(
            model=model.digest, adapters=[a.digest for a in adapters], **fields
        )
        return self.run("merge", spec, prepare=prepare)

    def quantize(self, model: Artifact, *types: str, prepare: Any = None, **fields: Any) -> Outcome:
        """Stage `quantize`."""
        spec = quantization_pb2.QuantizeSpec(model=model.digest, types=types, **fields)
        return self.run("quantize", spec, prepare=prepare)

    def evaluate(self, *files: Artifact, **fields: Any) -> Outcome:
        """Stage `evaluate`."""
        spec = quantization_pb2.EvaluateSpec(models=[f.digest for f in files], **fields)
        return self.run("evaluate", spec)


class _Listener(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def alpaca_rows(count: int = 16, seed: int = 0) -> list[dict[str, str]]:
    """Rows that fit into 512 tokens of a vocabulary of bytes and little more."""
    return [
        {
            "instruction": f"Name llama {seed + i}.",
            "input": f"herd {i % 3}" if i % 4 == 0 else "",
            "output": f"llama {i % 5} of the herd",
        }
        for i in range(count)
    ]
