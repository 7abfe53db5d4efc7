"""What the code makes of the templates that the chart hands it: Jobs, Deployments, Services."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.operations import profiles
from arriero.operations.runner import Launch
from arriero.orchestrator import stamping
from arriero.orchestrator.platform import Desired


def stamped(directory: Path) -> Iterator[dict[str, Any]]:
    """What runner and platform make of the files that a pod of theirs sees."""
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": "1"}
    if (directory / "job.yaml").exists():
        jobs = profiles.Templates.read(directory)
        for profile in jobs.profiles.values():
            launch = Launch(
                module="arriero.training.job",
                assignment=Path("/store/staging/training/a/attempts/1/assignment.json"),
                execution="a",
                log=Path("/dev/null"),
                profile=profile.name,
                nodes=profile.nodes,
            )
            job = profiles.stamp(jobs, launch, room="training", owner=owner, image="")
            yield job
            job["metadata"]["uid"] = "1"
            if service := profiles.meeting_place(job):
                yield service
    elif (directory / "endpoint.yaml").exists():
        stamp = stamping.Stamp(stamping.Templates.read(directory), "arriero", owner)
        model = f"sha256:{'0' * 64}"
        wanted = Desired("chat", model, 2, 1, artifacts=(model,), size=1 << 32)
        yield stamp.deployment(wanted)
        yield from stamp.services("chat")
        if scaler := stamp.autoscaler(wanted):
            yield scaler
