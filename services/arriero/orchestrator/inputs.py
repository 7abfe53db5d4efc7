"""A spec's inputs: where they come from, and what takes their place.

Responsibility: the fields marked `(arriero.v1.input)`, nested and repeated ones
included: read what they say, and put digests there. Does not know the graph that
they make together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from arriero import refs
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.v1 import types_pb2

EXPECTED = "expected a stage, stage.output, or a store reference such as model/name:tag"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one input comes from: a stage (with the output that is meant) or a reference.

    `output` None means the stage's default output; `every` all outputs that the
    field accepts; `optional` that it is fine when the stage did not publish it.
    """

    stage: str | None = None
    output: str | None = None
    ref: str | None = None
    every: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """An artifact that a stage handed on."""

    name: str
    digest: str
    kind: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One input field of one message, wherever it is nested."""

    message: Message
    field: FieldDescriptor
    path: str
    rule: types_pb2.InputRule

    @property
    def repeated(self) -> bool:
        """Whether the field is a list."""
        return self.field.is_repeated

    @property
    def every(self) -> bool:
        """Whether a bare stage means all of its outputs here."""
        return self.repeated and self.rule.all_outputs

    @property
    def required(self) -> bool:
        """Whether it must not be left out."""
        return not self.repeated and not self.field.has_presence

    @property
    def values(self) -> list[str]:
        """What the field says; empty when unset."""
        value = getattr(self.message, self.field.name)
        if self.repeated:
            return list(value)
        return [value] if value else []

    def entries(self) -> Iterator[tuple[str, str]]:
        """Each value with its path."""
        for i, text in enumerate(self.values):
            yield (f"{self.path}[{i}]" if self.repeated else self.path), text

    def default(self) -> Source | None:
        """What `default_from` means here: the named output of the sibling's stage."""
        if self.values or not self.rule.default_from:
            return None
        sibling, _, output = self.rule.default_from.partition(".")
        text = getattr(self.message, sibling)
        if not text or refs.looks_like_ref(text):
            return None
        return Source(stage=text.partition(".")[0], output=output, optional=True)

    def set(self, digests: Sequence[str]) -> None:
        """Put digests in place of what the field said."""
        self.message.ClearField(self.field.name)
        if self.repeated:
            getattr(self.message, self.field.name).extend(digests)
        elif digests:
            setattr(self.message, self.field.name, digests[0])


def slots(message: Message, path: str) -> Iterator[Slot]:
    """Every input field of a spec, nested and repeated messages included."""
    for field in message.DESCRIPTOR.fields:
        options: Any = field.GetOptions()
        where = f"{path}.{field.name}"
        if options.HasExtension(types_pb2.input):
            yield Slot(
                message, cast(FieldDescriptor, field), where, options.Extensions[types_pb2.input]
            )
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            if field.is_repeated:
                for i, item in enumerate(getattr(message, field.name)):
                    yield from slots(item, f"{where}[{i}]")
            elif message.HasField(field.name):
                yield from slots(getattr(message, field.name), where)


def parse_input(text: str, *, every: bool, field: str) -> Source:
    """Read what an input field says.

    Raises:
        InvalidArgument: neither a stage, nor stage.output, nor a reference.
    """
    if not text:
        raise InvalidArgument.field(field, f"is empty; {EXPECTED}")
    if refs.looks_like_ref(text):
        refs.parse(text, field=field)
        return Source(ref=text)
    stage, dot, output = text.partition(".")
    if not stage or (dot and not output) or "." in output:
        raise InvalidArgument.field(field, f"{text!r} is not an input; {EXPECTED}")
    return Source(stage=stage, output=output or None, every=every and not dot)


def substitute(
    written: Message,
    path: str,
    references: Mapping[str, str],
    published: Mapping[str, Sequence[Published]],
) -> Message:
    """A copy of the stage's spec with every input as a digest.

    Args:
        written: the stage's spec as the pipeline has it.
        path: where that is, for errors.
        references: digest of every reference in the pipeline, by its text.
        published: what the stages that it depends on handed on, the default first.

    Raises:
        FailedPrecondition: a stage did not publish the output that is named.
        InvalidArgument: what it published is of another kind than the field accepts.
    """
    work = type(written)()
    work.CopyFrom(written)
    # Sources first: `default_from` reads its sibling before that becomes a digest.
    found = [(slot, list(_slot_sources(slot))) for slot in slots(work, path)]
    for slot, sources in found:
        digests: list[str] = []
        for where, source in sources:
            digests += _digests(where, source, slot.rule.kinds, references, published)
        slot.set(digests)
    return work


def _slot_sources(slot: Slot) -> Iterator[tuple[str, Source]]:
    for path, text in slot.entries():
        yield path, parse_input(text, every=slot.every, field=path)
    default = slot.default()
    if default is not None:
        yield slot.path, default


def _digests(
    path: str,
    source: Source,
    kinds: Sequence[str],
    references: Mapping[str, str],
    published: Mapping[str, Sequence[Published]],
) -> list[str]:
    if source.ref is not None:
        return [references[source.ref]]
    outputs = published.get(cast(str, source.stage), ())
    if source.every:
        found = [o for o in outputs if o.kind in kinds]
        if not found:
            raise FailedPrecondition(
                f"{path}: stage {source.stage!r} published no {one_of(kinds)}; "
                f"it published: {_listed(outputs)}"
            )
        return [o.digest for o in found]
    chosen = pick(outputs, source.output)
    if chosen is None:
        if source.optional:
            return []
        wanted = repr(source.output) if source.output else "nothing"
        raise FailedPrecondition(
            f"{path}: stage {source.stage!r} did not publish {wanted}; "
            f"it published: {_listed(outputs)}"
            if source.output
            else f"{path}: stage {source.stage!r} published nothing"
        )
    if kinds and chosen.kind not in kinds:
        raise InvalidArgument.field(
            path,
            f"what stage {source.stage!r} published is of kind {chosen.kind}; "
            f"expected {one_of(kinds)}",
        )
    return [chosen.digest]


def pick(outputs: Sequence[Published], name: str | None) -> Published | None:
    """The output of that name (in any case), or the default one."""
    if name is None:
        return outputs[0] if outputs else None
    return next((o for o in outputs if o.name.casefold() == name.casefold()), None)


def one_of(kinds: Sequence[str]) -> str:
    """Kinds as people read them."""
    return " or ".join(kinds)


def _listed(outputs: Sequence[Published]) -> str:
    return ", ".join(o.name for o in outputs) or "nothing"
