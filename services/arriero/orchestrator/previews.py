"""What one dataset stage of a pipeline would make of its rows.

Responsibility: find the stage, and its inputs among what the store has. Does not
know how rows are read.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Protocol

from arriero.errors import ArrieroError, FailedPrecondition, InvalidArgument
from arriero.orchestrator import graph as graphs
from arriero.orchestrator.graph import Graph, Node
from arriero.orchestrator.planning import Planner, published
from arriero.v1 import dataset_pb2
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["preview"]


class Asked(Protocol):
    """What is needed of `clients.Rooms`."""

    async def preview(
        self, request: dataset_pb2.PreviewDatasetRequest
    ) -> dataset_pb2.PreviewDatasetResponse:
        """Render and count the first rows."""
        ...


async def preview(
    request: pb.PreviewStageRequest,
    graph: Graph,
    references: Mapping[str, str],
    planner: Planner,
    rooms: Asked,
    *,
    owner: str,
) -> pb.PreviewStageResponse:
    """Preview a stage with the results that the store has of the stages before it.

    Args:
        request: which stage, and how much of it.
        graph: the request's pipeline.
        references: digests of its references.
        planner: tells what the store has.
        rooms: who is asked.
        owner: of the request.

    Raises:
        InvalidArgument: no such stage, or its spec is wrong; paths from the root.
        FailedPrecondition: a stage before it has no result yet.
        Unavailable: a service is away.
    """
    node = _chosen(graph, request.stage)
    stages = await planner.plan(
        graph, references, owner=owner, strict=True, only=_before(graph, node)
    )
    known = {s.name: published(s.outputs) for s in stages if s.metadata.cached}
    for name in node.depends_on:
        if name not in known:
            raise _not_yet(graph, node, name, set(known))
    try:
        answer = await rooms.preview(
            dataset_pb2.PreviewDatasetRequest(
                spec=graphs.substitute(node, references, known),  # type: ignore[arg-type]
                samples=request.samples,
                rows=request.rows,
            )
        )
    except InvalidArgument as error:
        if any(violation.field in ("samples", "rows") for violation in error.violations):
            raise
        raise graphs.violations_error(graphs.prefixed(error, node.path)) from None
    except ArrieroError as error:
        raise error.at(node.path) from None
    return pb.PreviewStageResponse(stage=node.name, dataset=answer)


def _chosen(graph: Graph, name: str) -> Node:
    found = [node.name for node in graph.nodes.values() if node.kind == "dataset"]
    expected = f"expected one of the dataset stages: {', '.join(found) or 'there is none'}"
    if not name:
        if len(found) != 1:
            raise InvalidArgument.field("stage", f"is not set; {expected}")
        name = found[0]
    if name not in found:
        raise InvalidArgument.field("stage", f"{name!r} is no dataset stage; {expected}")
    return graph.nodes[name]


def _before(graph: Graph, node: Node) -> set[str]:
    """Every stage that a stage depends on, at any remove."""
    found: set[str] = set()
    waiting = list(node.depends_on)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph.nodes[name].depends_on
    return found


def _not_yet(graph: Graph, node: Node, name: str, known: set[str]) -> FailedPrecondition:
    """The error that says what to run first."""
    missing = [name, *(stage for stage in _before(graph, graph.nodes[name]) if stage not in known)]
    commands = [_import_command(graph.nodes[stage]) for stage in missing]
    advice = "run the pipeline once: arriero run PIPELINE.yaml"
    if all(commands):
        advice = f"run {' and '.join(filter(None, commands))} first, which keeps its result"
    kind = graph.nodes[name].kind
    return FailedPrecondition(
        f"{node.path}: stage {node.name!r} needs stage {name!r} ({kind}), of which the store has "
        f"no result yet; {advice}",
        reason="STAGE_NOT_RUN",
        metadata={"field": node.path, "stage": name},
    )


def _import_command(node: Node) -> str:
    """The command that does an import stage alone; empty for what has none."""
    spec: Any = node.work
    said = {field.name for field, _ in spec.ListFields()}
    if node.kind != "import" or not said <= {"source", "as", "name"}:
        return ""
    words = ["arriero", "import", spec.source]
    if getattr(spec, "as", ""):
        words += ["--as", getattr(spec, "as")]
    if spec.name:
        words += ["--name", spec.name]
    return shlex.join(words)
