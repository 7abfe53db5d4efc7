"""What a handler made, put into words and digests for the service.

Responsibility: an `Outcome` from outputs, or from the error that there was
instead. Does not know how the work was done, nor publishes it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import ArrieroError, DiskFull, Internal, Preempted, ResourceExhausted
from arriero.gates import GateResult
from arriero.operations.handoff import Outcome, OutputFiles, to_json
from arriero.store.files import sha256_file, tree_files
from arriero.weights.sink import Written

if TYPE_CHECKING:
    from arriero.operations.job import Job


@dataclass
class Output:
    """What a handler hands on.

    Attributes:
        name: output name, such as `adapter` or `Q4_K_M`.
        kind: artifact kind.
        path: directory with the files, usually from `Job.output_dir`.
        artifact_name: name in the store; default: the output's name.
        parents: digests, or `output:<name>` for one of this job; default: all inputs.
        golden: digest of the golden-logits report that belongs to it, or `output:<name>`.
        gates: verdicts about this output; default: all that the job judged.
        existing: digest of an artifact that already is in the store; `path` is
            unused then, and nothing is published.
        digests: of files below `path` that were hashed while they were written; taken
            for a file that is still what it was then. The service hashes again.
    """

    name: str
    kind: str
    path: Path = Path()
    artifact_name: str = ""
    parents: Sequence[str] = ()
    golden: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    gates: Sequence[GateResult] | None = None
    licenses: Sequence[str] = ()
    existing: str | None = None
    digests: Mapping[str, Written] = field(default_factory=dict)


def describe(outputs: Sequence[Output], job: Job) -> Outcome:
    """The outcome of work that was done; every file is hashed here that was not before.

    Raises:
        Internal: an output without files, outside of the attempt's directory,
            or named twice.
        InvalidArgument: an output that holds links or special files.
    """
    names = [output.name for output in outputs]
    if len(set(names)) != len(names):
        raise Internal(f"two outputs share a name: {', '.join(names)}")
    inputs = [artifact.digest for artifacts in job.inputs.values() for artifact in artifacts]
    described = []
    # Two threads: hashing is quick, and the machine has other work.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for output in outputs:
            made = output.existing is None
            described.append(
                OutputFiles(
                    name=output.name,
                    kind=output.kind,
                    path=_relative(output, job.directory) if made else "",
                    files=_files(output, pool) if made else (),
                    artifact_name=output.artifact_name,
                    parents=tuple(output.parents) or tuple(dict.fromkeys(inputs)),
                    golden=output.golden,
                    metrics={key: float(value) for key, value in output.metrics.items()},
                    labels=dict(output.labels),
                    gates=tuple(job.gates.results if output.gates is None else output.gates),
                    licenses=tuple(output.licenses),
                    existing=output.existing,
                )
            )
    return Outcome(
        attempt=job.attempt,
        status={},
        created=_now(),
        outputs=tuple(described),
        gates=tuple(job.gates.results),
        work=job.gates.meter.read(),
    )


def _files(output: Output, pool: ThreadPoolExecutor) -> tuple[tuple[str, int, str], ...]:
    names = list(tree_files(output.path))
    if not names:
        raise Internal(f"output {output.name!r} has no files in {output.path.name}")
    hashed = pool.map(lambda name: _durable(output.path / name, output.digests.get(name)), names)
    return tuple((name, size, digest) for name, (size, digest) in zip(names, hashed, strict=True))


def _durable(path: Path, known: Written | None) -> tuple[int, str]:
    """Size and sha256 of a file that a loss of power does not take back any more.

    The outcome promises these bytes, and the service's own fsync then costs nothing.
    """
    status = path.stat()
    if known is not None and (status.st_size, status.st_mtime_ns) == (known.size, known.mtime_ns):
        found = known.size, known.sha256
    else:
        found = sha256_file(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return found


def _relative(output: Output, directory: Path) -> str:
    try:
        return output.path.resolve().relative_to(directory.resolve()).as_posix()
    except ValueError as error:
        raise Internal(
            f"output {output.name!r} lies outside of the attempt's directory: {output.path}; "
            "expected a directory from Job.output_dir"
        ) from error


def failure(attempt: int, error: BaseException, log: logging.Logger) -> Outcome:
    """The outcome of work that ended in an error; the traceback goes to the log alone."""
    from arriero.rpc.status import to_status

    if isinstance(error, ArrieroError):
        known = error
        level = logging.INFO if isinstance(error, Preempted) else logging.ERROR
        log.log(level, "%s", error.message)
    else:
        log.error("the job failed: %s", type(error).__name__, exc_info=error)
        known = _translate(error)
    return Outcome(
        attempt=attempt,
        status=to_json(to_status(known)),
        created=_now(),
        # A full disk stays full while one waits.
        retryable=known.retryable and known.reason != DiskFull.default_reason,
        preempted=isinstance(known, Preempted),
    )


def _translate(error: BaseException) -> ArrieroError:
    if _memory_ran_out(error):
        return ResourceExhausted(
            f"out of memory: {error or 'an allocation failed'}; "
            "use smaller batches or shorter rows, or a machine with more memory",
            reason="OUT_OF_MEMORY",
        )
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            f"no space left while the job wrote its files: {text}; free some space",
            reason=DiskFull.default_reason,
        )
    return Internal(
        f"{type(error).__name__}: {text} (a defect; the operation's log has the details)"
    )


def _memory_ran_out(error: BaseException) -> bool:
    # torch's own class, without importing torch; its CPU allocator has only words.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
