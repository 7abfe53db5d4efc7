"""Resource profiles, and the Jobs that are made of them.

Responsibility: read the administrator's `job.yaml` and `profiles.yaml`, and stamp
one attempt's `batch/v1` Job. Does not talk to a cluster.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.kubernetes.names import PREFIX, label, name
from arriero.operations.runner import Launch

Object = dict[str, Any]
DEFAULT = "default"
# Where the processes of a job on several machines meet.
RENDEZVOUS_PORT = 29500
INDEX = "batch.kubernetes.io/job-completion-index"
_KUEUE = "kueue.x-k8s.io/queue-name"
# How long a Job that ended can be looked at.
_KEEP_SECONDS = 3600


@dataclass(frozen=True)
class Profile:
    """With what a job runs; fields as in `profiles.yaml`, in Python's spelling.

    `nodes` are pods of one Job, each with `gpus_per_node`; `queue` is Kueue's local
    queue; `priority` orders jobs that wait for this service's own budget.
    """

    name: str
    resources: Object = field(default_factory=dict)
    node_selector: Object = field(default_factory=dict)
    tolerations: list[Object] = field(default_factory=list)
    nodes: int = 1
    gpus_per_node: int = 0
    runtime_class_name: str = ""
    priority_class_name: str = ""
    queue: str = ""
    env: Any = field(default_factory=list)
    priority: int = 0


_FIELDS = {
    "".join(w.title() if i else w for i, w in enumerate(item.name.split("_"))): item.name
    for item in fields(Profile)
    if item.name != "name"
}


@dataclass(frozen=True)
class Templates:
    """What an administrator gives a room for its Jobs.

    Attributes:
        job: a `batch/v1` Job: metadata, and `spec.template` with one container.
        profiles: by name; `default` is always there.
    """

    job: Object
    profiles: Mapping[str, Profile]

    @classmethod
    def read(cls, directory: Path) -> Templates:
        """Read `job.yaml` and `profiles.yaml`.

        Raises:
            FailedPrecondition: one is missing, or is not what it should be; it is named.
        """
        job = read_yaml(directory / "job.yaml")
        containers = _at(job, "spec", "template", "spec").get("containers")
        if job.get("kind") != "Job" or not isinstance(containers, list) or not containers:
            raise FailedPrecondition(
                f"{directory / 'job.yaml'} is no batch/v1 Job with a container in spec.template"
            )
        path = directory / "profiles.yaml"
        found = {
            str(key): _profile(path, str(key), value) for key, value in read_yaml(path).items()
        }
        found.setdefault(DEFAULT, Profile(DEFAULT))
        return cls(job, found)

    def profile(self, wanted: str, nodes: int) -> Profile:
        """A profile for work that asks for so many machines (0: it can only use one).

        Raises:
            InvalidArgument: no such profile, or other nodes than it has.
        """
        profile = self.profiles.get(wanted or DEFAULT)
        if profile is None:
            near = get_close_matches(wanted, self.profiles, 1)
            raise InvalidArgument.field(
                "resources",
                f"{wanted!r} is no resource profile{f' (did you mean {near[0]}?)' if near else ''};"
                f" there are: {', '.join(sorted(self.profiles))}",
            )
        if nodes == 0 and profile.nodes > 1:
            raise InvalidArgument.field(
                "resources",
                f"profile {profile.name!r} has {profile.nodes} nodes, and this work uses one",
            )
        if nodes > 1 and profile.nodes != nodes:
            raise InvalidArgument.field(
                "nodes",
                f"is {nodes}, and profile {profile.name!r} has {profile.nodes}; leave `nodes` out, "
                "or choose another profile",
            )
        return profile


def read_yaml(path: Path) -> Object:
    """A file that holds a mapping.

    Raises:
        FailedPrecondition: it is missing, or holds none; it is named.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise FailedPrecondition(f"{path} holds no mapping")
    return data


def _profile(path: Path, profile: str, data: Any) -> Profile:
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise FailedPrecondition(f"{path}: {profile} holds no mapping")
    for key in data:
        if key not in _FIELDS:
            raise FailedPrecondition(
                f"{path}: {profile}.{key} is not known; a profile has {', '.join(_FIELDS)}"
            )
    given = {_FIELDS[key]: value for key, value in data.items() if value is not None}
    for key in ("nodes", "gpus_per_node", "priority"):
        least = 1 if key == "nodes" else 0 if key == "gpus_per_node" else None
        value = given.get(key, 1)
        if not isinstance(value, int) or (least is not None and value < least):
            raise FailedPrecondition(f"{path}: {profile}.{key} is {value!r}; expected a number")
    return Profile(profile, **given)


def job_name(room: str, launch: Launch) -> str:
    """The same for the same attempt, so that it is never started twice."""
    return name("arriero", room, launch.execution, str(launch.attempt))


def stamp(
    templates: Templates, launch: Launch, *, room: str, owner: Object | None, image: str
) -> Object:
    """The Job of one attempt.

    Args:
        templates: the administrator's.
        launch: the attempt.
        room: that starts it.
        owner: `ownerReference` of whatever should take the Job along when it goes.
        image: where the template names none.
    """
    profile = templates.profile(launch.profile, 0 if launch.nodes == 0 else launch.nodes)
    job = copy.deepcopy(templates.job)
    called = job_name(room, launch)
    labels = {
        f"{PREFIX}room": room,
        f"{PREFIX}execution": launch.execution,
        f"{PREFIX}attempt": str(launch.attempt),
        **{f"{PREFIX}{key}": label(value) for key, value in launch.facts.items() if value},
    }
    metadata = job.setdefault("metadata", {})
    metadata.pop("namespace", None)
    metadata["name"] = called
    metadata.setdefault("labels", {}).update(labels)
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    spec = job["spec"]
    spec.update(
        completionMode="Indexed",
        completions=profile.nodes,
        parallelism=profile.nodes,
        backoffLimit=0,
    )
    spec.setdefault("ttlSecondsAfterFinished", _KEEP_SECONDS)
    if profile.queue:
        metadata["labels"][_KUEUE] = profile.queue
        spec["suspend"] = True
    template = spec["template"]
    template.setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    _stamp_pod(template["spec"], profile, launch, called, image)
    return job


def _stamp_pod(pod: Object, profile: Profile, launch: Launch, called: str, image: str) -> None:
    pod["restartPolicy"] = "Never"
    pod.setdefault("automountServiceAccountToken", False)
    if profile.node_selector:
        pod.setdefault("nodeSelector", {}).update(profile.node_selector)
    if profile.tolerations:
        pod["tolerations"] = [*(pod.get("tolerations") or ()), *profile.tolerations]
    if profile.runtime_class_name:
        pod["runtimeClassName"] = profile.runtime_class_name
    if profile.priority_class_name:
        pod["priorityClassName"] = profile.priority_class_name
    main = pod["containers"][0]
    if image:
        main.setdefault("image", image)
    main["args"] = [
        *("python", "-m", "arriero.operations.pod"),
        *(launch.module, str(launch.assignment)),
    ]
    if profile.resources:
        main["resources"] = copy.deepcopy(profile.resources)
    ours: list[Object] = [{"name": k, "value": v} for k, v in launch.environment.items()]
    if profile.nodes > 1:
        pod["subdomain"] = called
        ours += [
            {"name": "PET_NNODES", "value": str(profile.nodes)},
            {
                "name": "PET_NODE_RANK",
                "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}},
            },
            {"name": "PET_MASTER_ADDR", "value": f"{called}-0.{called}"},
            {"name": "PET_MASTER_PORT", "value": str(RENDEZVOUS_PORT)},
        ]
    if profile.nodes > 1 or profile.gpus_per_node > 1:
        count = str(max(1, profile.gpus_per_node))
        ours.append({"name": "PET_NPROC_PER_NODE", "value": count})
    main["env"] = merged_env(main.get("env"), profile.env, ours)


def merged_env(*lists: Any) -> list[Object]:
    """Environments one over the other, by name; a mapping serves as well as a list."""
    found: dict[str, Object] = {}
    for items in lists:
        if isinstance(items, Mapping):
            items = [{"name": key, "value": str(value)} for key, value in items.items()]
        for item in items or ():
            found[str(item["name"])] = dict(item)
    return list(found.values())


def meeting_place(job: Object) -> Object | None:
    """The headless Service by which the pods of a Job on several machines find each other."""
    called = job["metadata"]["name"]
    if job["spec"]["completions"] == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": called,
            "labels": dict(job["metadata"]["labels"]),
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": called,
                    "uid": job["metadata"]["uid"],
                }
            ],
        },
        "spec": {
            "clusterIP": "None",
            # They look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": called},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def _at(data: Object, *path: str) -> Object:
    for key in path:
        found = data.get(key)
        data = found if isinstance(found, dict) else {}
    return data
