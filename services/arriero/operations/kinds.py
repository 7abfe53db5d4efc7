"""What a room tells the engine about a kind of work.

Responsibility: the three dataclasses between a room and the engine. Does not
know any room, nor how work is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from arriero.settings import SourceSettings
from arriero.store import Artifact, Store


@dataclass(frozen=True)
class ResolveContext:
    """What a room may look at while it resolves a spec.

    `inputs` are the artifacts that the spec's input fields name, by field;
    present, of an accepted kind, and not quarantined.
    """

    store: Store
    inputs: Mapping[str, list[Artifact]]
    sources: SourceSettings


@dataclass
class Resolved:
    """A spec with nothing left open, and what the work is expected to need.

    Attributes:
        spec: defaults filled in; inputs that are chosen by default too.
        fingerprints: digests of sources outside of the store; part of the key.
        disk_bytes: that the work writes at most, outputs and checkpoints.
        memory_bytes: of the host, at most.
        cacheable: whether equal work may be answered from the store, and shared.
        unkeyed: top-level fields of the spec that do not change the result.
    """

    spec: Message
    fingerprints: dict[str, str] = field(default_factory=dict)
    disk_bytes: int = 0
    memory_bytes: int = 0
    cacheable: bool = True
    unkeyed: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkKind:
    """A kind of work that a service does.

    Attributes:
        name: stage kind, such as `train`.
        job_module: run as `python -m <job_module> ASSIGNMENT`.
        spec_type: the spec's message type.
        semantics: raised by hand when the same spec would give another result.
        resolve: fills in defaults and validates. Quick, without torch; runs in a
            thread. Raises `InvalidArgument` with field paths relative to the spec.
        max_attempts: jobs at most; preemptions and deaths of the service don't count.
        check: refuses what is wrong whatever the input artifacts are, so that a
            run is refused before its first stage starts; as `resolve`, but with
            a context without inputs.
    """

    name: str
    job_module: str
    spec_type: type[Message]
    semantics: int
    resolve: Callable[[Any, ResolveContext], Resolved]
    max_attempts: int = 3
    check: Callable[[Any, ResolveContext], None] | None = None
