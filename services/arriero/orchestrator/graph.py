"""The pipeline as a graph: edges, what is wrong with it, and inputs by digest.

Responsibility: from a `Pipeline` message alone, find every artifact input (the
fields marked `(arriero.v1.input)`), what it depends on, and every error that can
be known before anything runs. Does not know the store, the rooms or DBOS.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from google.protobuf.message import Message

from arriero import refs
from arriero.errors import ArrieroError, FieldViolation, InvalidArgument
from arriero.orchestrator import inputs as _inputs
from arriero.orchestrator.inputs import (
    EXPECTED,
    Published,
    Slot,
    Source,
    one_of,
    parse_input,
    slots,
)
from arriero.orchestrator.outputs import STAGE_KINDS, Output, kind_of, outputs_of
from arriero.v1 import pipeline_pb2

_PIPELINE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_STAGES = 500


@dataclass(frozen=True, slots=True)
class Input:
    """One value of an input field; `path` such as `stages[2].train.dataset`."""

    path: str
    source: Source
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A stage with its edges; `depends_on` in the order of its inputs."""

    index: int
    name: str
    kind: str
    stage: pipeline_pb2.Stage
    inputs: tuple[Input, ...]
    depends_on: tuple[str, ...]

    @property
    def path(self) -> str:
        """Where its work is in the pipeline: `stages[2].train`."""
        return f"stages[{self.index}].{self.kind}"

    @property
    def work(self) -> Message:
        """The stage's spec as written."""
        return cast(Message, getattr(self.stage, self.kind))


@dataclass(frozen=True, slots=True)
class Graph:
    """A checked pipeline; `nodes` in file order, `order` so that inputs come first."""

    nodes: Mapping[str, Node]
    order: tuple[str, ...]

    def references(self) -> list[Input]:
        """Every input that is a store reference."""
        return [i for n in self.nodes.values() for i in n.inputs if i.source.ref is not None]


def build(pipeline: pipeline_pb2.Pipeline) -> Graph:
    """Check a pipeline and find its edges.

    Raises:
        InvalidArgument: with one violation for everything that is wrong.
    """
    return _Builder(pipeline).build()


class _Builder:
    def __init__(self, pipeline: pipeline_pb2.Pipeline) -> None:
        self.pipeline = pipeline
        self.violations: list[FieldViolation] = []
        self.stages: dict[str, pipeline_pb2.Stage] = {}
        self.outputs: dict[str, tuple[Output, ...]] = {}

    def wrong(self, path: str, description: str) -> None:
        self.violations.append(FieldViolation(path, description))

    def build(self) -> Graph:
        self._names()
        nodes = {}
        for index, stage in enumerate(self.pipeline.stages):
            kind = kind_of(stage)
            if kind is not None and self.stages.get(stage.name) is stage:
                nodes[stage.name] = self._node(index, stage, kind)
        self._endpoints(nodes)
        order = self._order(nodes)
        for tag, target in self.pipeline.tags.items():
            self._tag(tag, target)
        if self.violations:
            raise violations_error(self.violations)
        return Graph(nodes, order)

    def _names(self) -> None:
        if not _PIPELINE_NAME.fullmatch(self.pipeline.name):
            self.wrong(
                "name",
                f"{self.pipeline.name!r} is not a pipeline name; expected lower case letters, "
                "digits and dashes, at most 63",
            )
        if not self.pipeline.stages:
            self.wrong("stages", "a pipeline needs at least one stage")
        if len(self.pipeline.stages) > MAX_STAGES:
            self.wrong("stages", f"{len(self.pipeline.stages)} stages; at most {MAX_STAGES}")
        for index, stage in enumerate(self.pipeline.stages):
            path = f"stages[{index}]"
            if not _STAGE_NAME.fullmatch(stage.name):
                self.wrong(
                    f"{path}.name",
                    f"{stage.name!r} is not a stage name; expected lower case letters, digits, "
                    "dashes and underscores, at most 63",
                )
            if stage.name in self.stages:
                self.wrong(f"{path}.name", f"a second stage named {stage.name!r}; names are unique")
                continue
            self.stages[stage.name] = stage
            kind = kind_of(stage)
            if kind is None:
                self.wrong(path, f"no work; expected one of {', '.join(STAGE_KINDS)}")
                continue
            try:
                self.outputs[stage.name] = outputs_of(stage)
            except InvalidArgument as error:
                self.violations += prefixed(error, f"{path}.{kind}")

    def _node(self, index: int, stage: pipeline_pb2.Stage, kind: str) -> Node:
        work = cast(Message, getattr(stage, kind))
        inputs: list[Input] = []
        for slot in slots(work, f"stages[{index}].{kind}"):
            if slot.required and not slot.values:
                self.wrong(slot.path, f"is missing; {EXPECTED}")
            for path, source in self._sources(slot):
                kinds = tuple(slot.rule.kinds)
                self._check_kind(path, source, kinds)
                inputs.append(Input(path, source, kinds))
        depends = dict.fromkeys(i.source.stage for i in inputs if i.source.stage is not None)
        return Node(index, stage.name, kind, stage, tuple(inputs), tuple(depends))

    def _sources(self, slot: Slot) -> Iterator[tuple[str, Source]]:
        for path, text in slot.entries():
            try:
                source = parse_input(text, every=slot.every, field=path)
            except InvalidArgument as error:
                self.violations += error.violations
                continue
            if source.stage is not None and not self._known_output(path, source):
                continue
            yield path, source
        default = slot.default()
        if default is not None and default.stage in self.outputs:
            names = {o.name for o in self.outputs[default.stage]}
            if default.output in names:
                yield slot.path, default

    def _known_output(self, path: str, source: Source) -> bool:
        name = cast(str, source.stage)
        if name not in self.stages:
            close = difflib.get_close_matches(name, self.stages, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self.stages) or "none"
            self.wrong(path, f"no stage is named {name!r} (stages: {known}){hint}")
            return False
        if name not in self.outputs:
            return False  # its own violation says why
        outputs = self.outputs[name]
        kind = kind_of(self.stages[name])
        if not outputs:
            why = "names no types" if kind == "quantize" else "publishes nothing"
            self.wrong(path, f"stage {name!r} ({kind}) {why}, so it cannot be an input")
            return False
        if source.output is not None and _find(outputs, source.output) is None:
            names = ", ".join(o.name for o in outputs)
            why = ""
            if kind == "dataset" and source.output == "val":
                why = " since its val_set_size is 0"
            self.wrong(
                path,
                f"stage {name!r} ({kind}) has no output {source.output!r}{why}; it has: {names}",
            )
            return False
        return True

    def _check_kind(self, path: str, source: Source, kinds: Sequence[str]) -> None:
        if not kinds:
            return
        if source.ref is not None:
            kind = refs.parse(source.ref).kind
            if kind is not None and kind not in kinds:
                self.wrong(path, f"{source.ref!r} is of kind {kind}; expected {one_of(kinds)}")
            return
        possible = self._possible(source)
        if possible and not {o.kind for o in possible}.intersection(kinds):
            what = source.stage if source.output is None else f"{source.stage}.{source.output}"
            got = one_of(sorted({o.kind for o in possible}))
            self.wrong(path, f"{what!r} is of kind {got}; expected {one_of(kinds)}")

    def _possible(self, source: Source) -> list[Output]:
        """The outputs that a stage source may turn out to be."""
        outputs = self.outputs[cast(str, source.stage)]
        if source.output is not None:
            found = _find(outputs, source.output)
            return [found] if found else []
        if source.every or not outputs[0].certain:
            return list(outputs)
        return [outputs[0]]

    def _endpoints(self, nodes: Mapping[str, Node]) -> None:
        seen: dict[str, str] = {}
        for node in nodes.values():
            if node.kind != "deploy":
                continue
            endpoint = node.stage.deploy.endpoint
            if endpoint in seen:
                self.wrong(
                    f"{node.path}.endpoint",
                    f"stage {seen[endpoint]!r} deploys to {endpoint!r} already; "
                    "one pipeline deploys to an endpoint once",
                )
            seen[endpoint] = node.name

    def _order(self, nodes: Mapping[str, Node]) -> tuple[str, ...]:
        """Depth first with an explicit stack, so that a long chain cannot overflow."""
        done: dict[str, None] = {}
        for root in nodes:
            path: list[str] = []
            stack: list[tuple[str, bool]] = [(root, False)]
            while stack:
                name, leaving = stack.pop()
                if leaving:
                    path.pop()
                    done[name] = None
                    continue
                if name in done or name not in nodes:
                    continue
                path.append(name)
                stack.append((name, True))
                for dep in reversed(nodes[name].depends_on):
                    if dep in path:
                        self._cycle(nodes, path[path.index(dep) :])
                        return ()
                    stack.append((dep, False))
        return tuple(done)

    def _cycle(self, nodes: Mapping[str, Node], members: Sequence[str]) -> None:
        first = nodes[members[-1]]
        edge = next(i for i in first.inputs if i.source.stage == members[0])
        # Told in the direction in which artifacts would flow.
        flow = [members[0], *reversed(members)]
        self.wrong(edge.path, f"the stages form a cycle: {' -> '.join(flow)}")

    def _tag(self, tag: str, target: str) -> None:
        path = f"tags[{tag!r}]"
        try:
            ref = refs.parse(tag, field=path)
            source = parse_input(target, every=False, field=path)
        except InvalidArgument as error:
            self.violations += error.violations
            return
        if ref.tag is None or ref.kind is None:
            self.wrong(path, f"{tag!r} is not a tag; expected kind/name:tag")
        elif source.ref is not None:
            self.wrong(path, f"{target!r} is a reference; expected a stage or stage.output")
        elif self._known_output(path, source):
            self._check_kind(path, source, (ref.kind,))


def substitute(
    node: Node,
    references: Mapping[str, str],
    published: Mapping[str, Sequence[Published]],
) -> Message:
    """A copy of a stage's spec with every input as a digest; see `inputs.substitute`."""
    return _inputs.substitute(node.work, node.path, references, published)


def resolve(graph: Graph, look_up: Callable[[str], tuple[str, str]]) -> dict[str, str]:
    """Digest of every reference in the pipeline, by its text.

    Args:
        graph: the pipeline.
        look_up: reference -> (digest, kind); raises NotFound, FailedPrecondition.

    Raises:
        InvalidArgument: an artifact of another kind than its field accepts.
    """
    digests: dict[str, str] = {}
    for item in graph.references():
        ref = cast(str, item.source.ref)
        try:
            digest, kind = look_up(ref)
        except InvalidArgument as error:
            raise InvalidArgument.field(item.path, error.message) from None
        except ArrieroError as error:
            raise error.at(item.path) from None
        if item.kinds and kind not in item.kinds:
            raise InvalidArgument.field(
                item.path, f"{ref!r} is of kind {kind}; expected {one_of(item.kinds)}"
            )
        digests[ref] = digest
    return digests


def prefixed(error: InvalidArgument, prefix: str) -> list[FieldViolation]:
    """The error's violations with their paths under `prefix`."""
    return [
        FieldViolation(f"{prefix}.{v.field}" if v.field else prefix, v.description)
        for v in error.violations
    ]


def violations_error(violations: Sequence[FieldViolation]) -> InvalidArgument:
    """One error that names everything that is wrong."""
    return InvalidArgument(
        "; ".join(f"{v.field}: {v.description}" for v in violations), violations=violations
    )


def _find(outputs: Sequence[Output], name: str) -> Output | None:
    return next((o for o in outputs if o.name.casefold() == name.casefold()), None)
