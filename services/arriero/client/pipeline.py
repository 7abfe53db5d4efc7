"""Pipeline files: YAML to `arriero.v1.Pipeline`, and back to line and column.

Responsibility: reading a file, applying overrides, and telling where in the
file a field stands that somebody objects to. Does not know which pipelines make
sense: the orchestrator checks names, references and the graph.

A file has every field as in the proto, enum values by their short names, a list
where the proto has a list:

    name: faq
    stages:
    - {name: base, import: {source: "./model"}}
    - {name: rows, dataset: {sources: [./rows.jsonl], tokenizer: base}}
    - {name: sft, train: {model: base, dataset: rows, learning_rate: 3e-4}}
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from arriero.client.reading import FieldType, Position, Reader, is_map, nearest
from arriero.errors import ArrieroError, FieldViolation, InvalidArgument, NotFound
from arriero.v1 import pipeline_pb2

__all__ = ["PipelineFile", "Position", "absolute_source", "load_pipeline", "parse_pipeline"]

_LARGEST = 1024 * 1024
_Error = TypeVar("_Error", bound=ArrieroError)


@dataclass(frozen=True, slots=True)
class PipelineFile:
    """A pipeline, and where its fields stand.

    Attributes:
        pipeline: ready for `create_run`.
        source: the file's name as it was given.
        positions: from field path (`stages[2].train.lora.r`) to its place.
    """

    pipeline: pipeline_pb2.Pipeline
    source: str
    positions: dict[str, Position] = field(default_factory=dict)

    def locate(self, path: str) -> Position | None:
        """Where a field stands; where what contains it stands when it was not written."""
        while path:
            if path in self.positions:
                return self.positions[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return None

    def explain(self, error: _Error) -> _Error:
        """The same error with places: what is wrong comes after `file:line:column`.

        So in each violation, or for the one field that the error's metadata name.
        """
        if not self.positions:
            return error
        if isinstance(error, InvalidArgument):
            error.violations = tuple(
                FieldViolation(v.field, f"{self.locate(v.field) or v.field}: {v.description}")
                for v in error.violations
            )
            if error.violations:
                error.message = _summary(error.violations)
        else:
            path = error.metadata.get("field", "")
            place = self.locate(path)
            if place is not None:
                error.message = f"{path}: {place}: {error.message.removeprefix(f'{path}: ')}"
        error.args = (error.message,)
        return error


def load_pipeline(path: str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> PipelineFile:
    """Read a pipeline file.

    Relative paths in it start from the file's directory; relative paths in
    overrides start from the working directory.

    Args:
        path: the file, UTF-8, at most 1 MiB.
        overrides: `key=value` each, such as `name=second`,
            `stages.sft.lora.r=16` (the stage by its name, its work kind left
            out), `labels.team=faq`; values are YAML, text as it is.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is no pipeline; each violation has line and column.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise InvalidArgument(f"{path} is larger than {_LARGEST} bytes; no pipeline is")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFound(f"pipeline file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text: byte {error.start}") from None
    except OSError as error:
        raise InvalidArgument(f"pipeline file {path} cannot be read: {error.strerror}") from None
    return parse_pipeline(
        text, source=str(path), directory=path.resolve().parent, overrides=overrides
    )


def parse_pipeline(
    text: str,
    *,
    source: str = "pipeline",
    directory: Path | None = None,
    overrides: Sequence[str] = (),
) -> PipelineFile:
    """Read a pipeline from text; otherwise as `load_pipeline`.

    Args:
        text: YAML.
        source: what positions call the text.
        directory: where relative paths start; default: the working directory.
        overrides: see `load_pipeline`.
    """
    base = (directory or Path.cwd()).absolute()
    reader = Reader(source)
    pipeline = pipeline_pb2.Pipeline()
    root = _compose(text, source)
    if root is None:
        raise InvalidArgument(f"{source} is empty; expected 'name' and 'stages'")
    reader.message(root, pipeline, "")
    _check_stages(reader, pipeline)
    _raise(reader.violations)
    _make_paths_absolute(pipeline, base)
    for override in overrides:
        _override(pipeline, override, reader.positions)
    return PipelineFile(pipeline, source, reader.positions)


def absolute_source(text: str, directory: Path) -> str:
    """A source as services take it: relative paths joined to a directory, the rest as it is.

    `..` stays, since services refuse it with a better word than silence. What
    has a scheme (`hf://…`) or is a reference (`dataset/…`, `sha256:…`) is no
    path; a directory that is called `dataset` is written `./dataset`.
    """
    if not text or "://" in text or text.startswith(("dataset/", "sha256:")):
        return text
    return os.path.join(directory, os.path.expanduser(text.removeprefix("./")))


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Position(source, mark.line + 1, mark.column + 1) if mark else Position(source)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise InvalidArgument(f"{place}: not YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        place = Position(source, line, column)
        raise InvalidArgument(f"{place}: not YAML: {error.reason}") from None
    except RecursionError:
        raise InvalidArgument(f"{source}: nested too deeply; no pipeline is") from None


def _check_stages(reader: Reader, pipeline: pipeline_pb2.Pipeline) -> None:
    """A stage without work names no field, so the walk cannot find it."""
    kinds = [f.name for f in pipeline_pb2.Stage.DESCRIPTOR.oneofs_by_name["work"].fields]
    wrong = {v.field.split(".")[0] for v in reader.violations}
    for index, stage in enumerate(pipeline.stages):
        path = f"stages[{index}]"
        if stage.WhichOneof("work") is None and path not in wrong:
            what = f"a stage without work; expected one of {', '.join(kinds)}"
            reader.violations.append(FieldViolation(path, f"{reader.positions[path]}: {what}"))


def _make_paths_absolute(pipeline: pipeline_pb2.Pipeline, directory: Path) -> None:
    for stage in pipeline.stages:
        _spec_paths_absolute(stage, directory)


def _spec_paths_absolute(stage: pipeline_pb2.Stage, directory: Path) -> None:
    work = stage.WhichOneof("work")
    if work in ("dataset", "transform"):
        sources = getattr(stage, work).sources
        sources[:] = [absolute_source(s, directory) for s in sources]
        template = stage.dataset.template
        if work == "dataset" and ("/" in template or template.endswith((".json", ".jinja"))):
            stage.dataset.template = absolute_source(template, directory)
    elif work == "extend_tokenizer":
        corpus = stage.extend_tokenizer.corpus
        corpus[:] = [absolute_source(s, directory) for s in corpus]
    elif work == "import":
        spec = getattr(stage, "import")  # a keyword of Python's
        spec.source = absolute_source(spec.source, directory)
        if spec.tokenizer:
            spec.tokenizer = absolute_source(spec.tokenizer, directory)
    elif work == "evaluate" and stage.evaluate.text:
        stage.evaluate.text = absolute_source(stage.evaluate.text, directory)


def _override(
    pipeline: pipeline_pb2.Pipeline, override: str, positions: dict[str, Position]
) -> None:
    """Set one field from `key=value`."""
    key, equals, value = override.partition("=")
    reader = Reader(f"--set {override}", has_lines=False)
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InvalidArgument.field(
            "overrides", f"{reader.source}: expected key=value, such as stages.sft.lora.r=16"
        )
    message: Message = pipeline
    path = ""
    if parts[0] == "stages":
        message, path, parts = _stage(pipeline, reader, parts)
    while True:
        name, rest = parts[0], parts[1:]
        known = message.DESCRIPTOR.fields_by_name.get(name)
        child = f"{path}.{name}" if path else name
        if known is None:
            names = list(message.DESCRIPTOR.fields_by_name)
            reader.refuse(None, child, f"unknown field {name!r}{nearest(name, names)}")
            break
        if not rest:
            _set(reader, message, known, child, value)
            break
        if known.message_type is None or (known.is_repeated and not is_map(known)):
            reader.refuse(None, child, f"{name!r} has no fields, so {rest[0]!r} is none")
            break
        if is_map(known):
            # The rest is one key: gates are called `dataset.schema`.
            _set_in_map(reader, message, known, child, ".".join(rest), value)
            break
        message, path, parts = getattr(message, name), child, rest
    _raise(reader.violations)
    for stage in pipeline.stages:
        _spec_paths_absolute(stage, Path.cwd())
    positions.update(reader.positions)


def _stage(
    pipeline: pipeline_pb2.Pipeline, reader: Reader, parts: list[str]
) -> tuple[Message, str, list[str]]:
    """The message that `stages.<name>.<field>` means, its path, and what is left of the key."""
    names = [stage.name for stage in pipeline.stages]
    if len(parts) < 3 or parts[1] not in names:
        what = (
            f"no stage {parts[1]!r}{nearest(parts[1], names)}"
            if len(parts) > 1 and parts[1] not in names
            else "expected stages.<name>.<field>=<value>"
        )
        reader.refuse(None, "stages", what)
        _raise(reader.violations)
    index = names.index(parts[1])
    stage, path, rest = pipeline.stages[index], f"stages[{index}]", parts[2:]
    if rest[0] in ("name", "force", "resources"):
        return stage, path, rest
    kind = stage.WhichOneof("work")
    assert kind is not None, "the file was checked"
    if rest[0] == kind and len(rest) > 1:
        rest = rest[1:]
    return getattr(stage, kind), f"{path}.{kind}", rest


def _set(reader: Reader, message: Message, known: FieldType, path: str, value: str) -> None:
    reader.positions[path] = Position(reader.source)
    if known.cpp_type == FieldDescriptor.CPPTYPE_STRING and not known.is_repeated:
        setattr(message, known.name, value)  # the shell has quoted it once already
        return
    node = _compose(value, reader.source)
    if node is None:
        reader.refuse(None, path, "no value; leave the field out of the file to unset it")
        return
    reader.value(node, message, known, path)


def _set_in_map(
    reader: Reader, message: Message, known: FieldType, path: str, key: str, value: str
) -> None:
    of = known.message_type.fields_by_name["value"]
    values: Any = getattr(message, known.name)
    reader.positions[f"{path}[{key!r}]"] = Position(reader.source)
    if of.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        values[key] = value
        return
    # One entry, read as the whole field is: it says what is wrong alike.
    before = dict(values)
    entry = yaml.MappingNode(
        "tag:yaml.org,2002:map",
        [(yaml.ScalarNode("tag:yaml.org,2002:str", key), _compose(value, reader.source))],
    )
    reader.value(entry, message, known, path)
    values = getattr(message, known.name)  # clearing a field cuts its old container off
    for name, old in before.items():
        if name != key:
            values[name] = old


def _raise(violations: Sequence[FieldViolation]) -> None:
    if violations:
        raise InvalidArgument(_summary(violations), violations=violations)


def _summary(violations: Sequence[FieldViolation]) -> str:
    first, more = violations[0].description, len(violations) - 1
    return first + (f" (and {more} more)" if more else "")
