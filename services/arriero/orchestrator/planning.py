"""Ask every room about its stages before anything starts.

Responsibility: what a run would do (keys, what the store has, estimates), and
refusals that only a room can know. Does not start anything, and does not know
how runs are recorded.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from arriero.errors import (
    ArrieroError,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    Unavailable,
)
from arriero.operations.inputs import NO_DIGEST
from arriero.orchestrator import graph as graphs
from arriero.orchestrator.clients import room_of
from arriero.orchestrator.deployments import check_spec
from arriero.orchestrator.graph import Graph, Node
from arriero.orchestrator.inputs import Published
from arriero.orchestrator.outputs import in_order
from arriero.orchestrator.stages import unpack
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2, types_pb2

_SECONDS = 10.0


class Asked(Protocol):
    """What is needed of `clients.Rooms`."""

    async def start(
        self, kind: str, spec: Message, context: types_pb2.StageContext, *, timeout: float
    ) -> operations_pb2.Operation:
        """Start, or with `validate_only` resolve, check and price."""
        ...


def published(outputs: Sequence[types_pb2.StageOutput]) -> list[Published]:
    """Outputs as the graph needs them."""
    return [Published(o.name, o.digest, o.kind) for o in outputs]


def check_deployments(graph: Graph) -> None:
    """Refuse deployments that are wrong whatever they deploy.

    Raises:
        InvalidArgument: with paths from the pipeline's root.
    """
    violations: list[FieldViolation] = []
    for node in graph.nodes.values():
        if node.kind == "deploy":
            try:
                check_spec(node.stage.deploy)
            except InvalidArgument as error:
                violations += graphs.prefixed(error, node.path)
    if violations:
        raise graphs.violations_error(violations)


class Planner:
    """Plans runs.

    Args:
        rooms: who is asked.
        check_deploy: refuses a deployment whose inputs are digests; reads the store.
    """

    def __init__(
        self, rooms: Asked, check_deploy: Callable[[pipeline_pb2.DeploySpec], None]
    ) -> None:
        self._rooms = rooms
        self._check_deploy = check_deploy

    async def plan(
        self,
        graph: Graph,
        references: Mapping[str, str],
        *,
        owner: str,
        strict: bool,
        only: Collection[str] | None = None,
    ) -> list[pb.StageStatus]:
        """One PENDING status per stage in file order, with what is known in `metadata`.

        Outputs that the store has already flow on, so that stages behind them
        are planned with their real inputs; the others are checked as far as
        their spec alone tells.

        Args:
            graph: the pipeline.
            references: digests of its references.
            owner: of the run.
            strict: raise Unavailable when a room is away; else leave it out.
            only: names of stages; the others are left out.

        Raises:
            InvalidArgument: with paths from the pipeline's root, all stages'.
            ArrieroError: what else a room refuses, its place in the message.
        """
        known: dict[str, list[Published]] = {}
        statuses: dict[str, pb.StageStatus] = {}
        violations: list[FieldViolation] = []
        away: set[str] = set()
        for name in graph.order:
            if only is not None and name not in only:
                continue
            node = graph.nodes[name]
            status = pb.StageStatus(
                name=name, kind=node.kind, state=pb.STAGE_STATE_PENDING, depends_on=node.depends_on
            )
            statuses[name] = status
            if room_of(node.kind) in away:
                continue
            try:
                metadata = await self._ask(node, references, known, owner)
            except InvalidArgument as error:
                violations += graphs.prefixed(error, node.path) or [
                    FieldViolation(node.path, error.message)
                ]
                continue
            except (Unavailable, DeadlineExceeded) as error:
                if strict:
                    raise error.at(node.path) from None
                away.add(room_of(node.kind))
                continue
            except ArrieroError as error:
                raise error.at(node.path) from None
            if metadata is not None:
                status.metadata.CopyFrom(metadata)
                status.outputs.extend(in_order(node.stage, metadata.outputs))
                if metadata.cached:
                    known[name] = published(status.outputs)
        if violations:
            raise graphs.violations_error(violations)
        return [statuses[name] for name in graph.nodes if name in statuses]

    async def _ask(
        self,
        node: Node,
        references: Mapping[str, str],
        known: Mapping[str, Sequence[Published]],
        owner: str,
    ) -> types_pb2.OperationMetadata | None:
        complete = all(dep in known for dep in node.depends_on)
        work = graphs.substitute(node, references, known) if complete else node.work
        if node.kind == "deploy":
            if complete:
                await asyncio.to_thread(self._check_deploy, work)  # type: ignore[arg-type]
            return None
        context = types_pb2.StageContext(
            request_id=f"plan/{uuid.uuid4()}",
            stage=node.name,
            owner=owner,
            force=node.stage.force,
            resources=node.stage.resources,
            validate_only=True,
        )
        try:
            operation = await self._rooms.start(node.kind, work, context, timeout=_SECONDS)
        except InvalidArgument as error:
            # Rooms look at the rest of a spec first, so nothing else is wrong with it.
            if complete or error.reason != NO_DIGEST:
                raise
            return None
        metadata: types_pb2.OperationMetadata = unpack(
            operation.metadata, types_pb2.OperationMetadata()
        )
        if operation.HasField("response") and not metadata.outputs:
            result = unpack(operation.response, types_pb2.OperationResult())
            metadata.outputs.extend(result.outputs)
        return metadata
