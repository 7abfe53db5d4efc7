"""What each kind of stage publishes, as far as the pipeline alone tells.

Responsibility: the table of output names and artifact kinds. Does not know
which of the uncertain ones a run will really have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arriero.errors import InvalidArgument
from arriero.v1 import pipeline_pb2, types_pb2

STAGE_KINDS = tuple(
    field.name for field in pipeline_pb2.Stage.DESCRIPTOR.oneofs_by_name["work"].fields
)

# What `import.as` may say; `auto` looks at the source.
_IMPORT_KINDS = ("model", "adapter", "gguf")
# Types of `quantize` that are Hugging Face checkpoints, not GGUF files.
_BNB_TYPES = ("BNB_NF4", "BNB_INT8")


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a stage: its name, the kind of artifact, and whether it is sure to come."""

    name: str
    kind: str
    certain: bool = True


def kind_of(stage: pipeline_pb2.Stage) -> str | None:
    """The stage's kind (`train`), or None when the stage has no work."""
    return stage.WhichOneof("work")


def outputs_of(stage: pipeline_pb2.Stage) -> tuple[Output, ...]:
    """The outputs of a stage, the default one first.

    Raises:
        InvalidArgument: a field that decides about outputs has a value that does
            not exist; the field's path is relative to the stage's work.
    """
    match kind_of(stage):
        case "import":
            return _import_outputs(stage)
        case "dataset":
            has_val = stage.dataset.val_set_size > 0
            val = (Output("val", "dataset"),) if has_val else ()
            return (Output("train", "dataset"), *val, Output("report", "report"))
        case "extend_tokenizer":
            return (Output("model", "model"), Output("report", "report"))
        case "transform":
            return (Output("rows", "dataset"), Output("report", "report"))
        case "train":
            tuned = "model" if stage.train.method == "full" else "adapter"
            return (Output(tuned, tuned), Output("golden", "report"))
        case "merge":
            return (Output("model", "model"), Output("golden", "report", certain=False))
        case "quantize":
            alone = "adapter" if stage.quantize.adapter_only else "gguf"
            files = (
                Output(name.upper(), "model" if name.upper() in _BNB_TYPES else alone)
                for name in stage.quantize.types
            )
            # Computed from rows; a report that was given is not published again.
            computed = (Output("imatrix", "report", certain=False),)
            made = (Output("golden", "report", certain=False),)
            return (*files, *(computed if stage.quantize.HasField("imatrix") else ()), *made)
        case "export":
            # One of them: what was given.
            return tuple(Output(kind, kind, certain=False) for kind in _IMPORT_KINDS)
        case "evaluate":
            return (Output("chosen", "gguf"), Output("report", "report"))
        case _:
            return ()


def _import_outputs(stage: pipeline_pb2.Stage) -> tuple[Output, ...]:
    # `as` is a Python keyword, so the generated attribute needs getattr.
    wanted = str(getattr(getattr(stage, "import"), "as")) or "auto"
    if wanted == "auto":
        return tuple(Output(kind, kind, certain=False) for kind in _IMPORT_KINDS)
    if wanted not in _IMPORT_KINDS:
        raise InvalidArgument.field(
            "as", f"{wanted!r} is not known; expected auto, {', '.join(_IMPORT_KINDS)}"
        )
    return (Output(wanted, wanted),)


def in_order(
    stage: pipeline_pb2.Stage, outputs: Iterable[types_pb2.StageOutput]
) -> list[types_pb2.StageOutput]:
    """What a stage published, the default output first, as the table has it."""
    places = {output.name.casefold(): i for i, output in enumerate(outputs_of(stage))}
    return sorted(outputs, key=lambda o: places.get(o.name.casefold(), len(places)))
