"""What a pod's status says: how it ended, why it does not start, whether it was evicted.

Responsibility: from a pod (and its events) to words and verdicts. Does not know
what runs in the pod, nor what is done about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arriero.kubernetes.api import Object

# Reasons of a waiting container that do not go away by waiting, as the kubelet has them.
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
IMAGE_PULL = "IMAGE_PULL"
_UNMADE = ("ContainerCreating", "PodInitializing", "ImagePullBackOff")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_CRASH = "CrashLoopBackOff"
# Warnings that say why a pod that has a node does not start.
_STARTING = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not run.

    `reason` is an UPPER_SNAKE_CASE word; `heals` says whether waiting may help
    (another node, another pod's end), as opposed to somebody's putting it right;
    `container` is the one that it is about, where it is about one.
    """

    reason: str
    message: str
    heals: bool = False
    container: str = ""

    @property
    def mounts(self) -> bool:
        """Whether a volume or a network is what lacks."""
        return self.reason in map(_word, _STARTING)


def name_of(item: Object) -> str:
    """An object's name."""
    return str(item["metadata"]["name"])


def phase(pod: Object) -> str:
    """`Pending`, `Running`, `Succeeded`, `Failed`."""
    return str(pod.get("status", {}).get("phase") or "Pending")


def ready(pod: Object) -> bool:
    """Whether it answers that it is ready, and is to stay."""
    return not leaving(pod) and (_condition(pod, "Ready") or {}).get("status") == "True"


def leaving(pod: Object) -> bool:
    """Whether it is being deleted."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def evicted(pod: Object) -> str:
    """Why the cluster took the pod away (a drain, preemption, a lost node); else empty."""
    condition = _condition(pod, "DisruptionTarget")
    if condition is not None and condition.get("status") == "True":
        reason = str(condition.get("reason") or "DisruptionTarget")
        message = str(condition.get("message") or "").rstrip(".")
        return f"{reason}: {message}" if message else reason
    status = pod.get("status", {})
    if status.get("reason") in ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated"):
        return f"{status['reason']}: {str(status.get('message') or '').rstrip('.')}"
    return ""


def outgrown(pod: Object) -> bool:
    """Whether it was evicted for taking more disk than it may: another one fares no better."""
    return "exceed" in evicted(pod)


def exit_code(pod: Object) -> int | None:
    """Of the first container, once it ended; -n for signal n is not known here."""
    ended = _terminated(pod)
    return int(ended["exitCode"]) if ended is not None else None


def oom_killed(pod: Object) -> bool:
    """Whether the kernel killed a container for memory; the kubelet says so."""
    return any(
        (state.get(key) or {}).get("terminated", {}).get("reason") == "OOMKilled"
        for state in _containers(pod)
        for key in ("state", "lastState")
    )


def making(pod: Object) -> bool:
    """Whether it has a node, and no container yet, and only its events may say why."""
    scheduled = (_condition(pod, "PodScheduled") or {}).get("status") == "True"
    waits = [(state.get("state") or {}).get("waiting") for state in _containers(pod)]
    unmade = all(w and w.get("reason") in _UNMADE for w in waits)
    return phase(pod) == "Pending" and scheduled and unmade and not leaving(pod)


def initializing(pod: Object) -> str:
    """The init container that runs now; empty without one."""
    for state in pod.get("status", {}).get("initContainerStatuses") or ():
        if (state.get("state") or {}).get("running") is not None:
            return str(state["name"])
    return ""


def restarts(pod: Object) -> int:
    """How often its containers were started again, together."""
    return sum(int(state.get("restartCount") or 0) for state in _containers(pod))


def trouble(pod: Object, events: Iterable[Object] = ()) -> Trouble | None:
    """Why it does not run; None where nothing is known to be wrong.

    `events` are the pod's own: some reasons (a Secret that is missing in a
    volume) are told there alone.
    """
    for state in _containers(pod):
        waiting = (state.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        said = str(waiting.get("message") or "").strip()
        if reason in _IMAGE:
            image = state.get("image") or "its image"
            said = _pull_failure(events) or said
            return Trouble(
                IMAGE_PULL,
                f"{image} cannot be pulled ({reason}): {said or 'no message'}; check the name, "
                "the tag, the registry and imagePullSecrets",
            )
        if reason in _CONFIG:
            return Trouble("POD_CONFIG", f"its container cannot be made ({reason}): {said}")
        if reason == _CRASH:
            last = (state.get("lastState") or {}).get("terminated") or {}
            how = "OOMKilled" if last.get("reason") == "OOMKilled" else f"exit code {_code(last)}"
            count, called = state.get("restartCount"), str(state.get("name") or "")
            what = f"its init container {called}" if _initial(pod, state) else "it"
            said = f"{what} ended {count} times ({_CRASH}), last with {how}"
            return Trouble(_word(_CRASH), said, container=called)
    scheduled = _condition(pod, "PodScheduled") or {}
    if scheduled.get("status") == "False":
        said = str(scheduled.get("message") or scheduled.get("reason") or "no node fits")
        if scheduled.get("reason") == "SchedulingGated":
            return Trouble("SCHEDULING_GATED", f"it is held back: {said}", heals=True)
        return Trouble("UNSCHEDULABLE", f"no node takes it: {said}", heals=True)
    if phase(pod) == "Pending":
        for event in _newest(events):
            if event.get("reason") in _STARTING:
                return Trouble(_word(str(event["reason"])), str(event.get("message") or ""))
    return None


def refused(events: Iterable[Object]) -> Trouble | None:
    """Why a controller cannot make pods, from its object's events (a quota, a policy)."""
    for event in _newest(events):
        if event.get("reason") == "FailedCreate":
            said = str(event.get("message") or "")
            if "exceeded quota" in said:
                return Trouble("QUOTA_EXCEEDED", f"the namespace's quota is used up: {said}", True)
            return Trouble("POD_REFUSED", f"the cluster refuses its pods: {said}")
    return None


def _pull_failure(events: Iterable[Object]) -> str:
    """Why an image could not be pulled; while it backs off its container says only that."""
    for event in _newest(events):
        message = str(event.get("message") or "")
        if event.get("reason") == "Failed" and message.startswith("Failed to pull"):
            return message
    return ""


def _newest(events: Iterable[Object]) -> list[Object]:
    def time(event: Object) -> str:
        return str(event.get("lastTimestamp") or event.get("eventTime") or "")

    return sorted(
        (e for e in events if e.get("type", "Warning") == "Warning"), key=time, reverse=True
    )


def _containers(pod: Object) -> list[Object]:
    status = pod.get("status", {})
    return [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]


def _initial(pod: Object, state: Object) -> bool:
    return state in (pod.get("status", {}).get("initContainerStatuses") or ())


def _terminated(pod: Object) -> Object | None:
    for state in pod.get("status", {}).get("containerStatuses") or ():
        ended = (state.get("state") or {}).get("terminated")
        return ended if isinstance(ended, dict) else None
    return None


def _condition(pod: Object, kind: str) -> Object | None:
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition.get("type") == kind:
            return dict(condition)
    return None


def _code(ended: Object) -> str:
    return str(ended.get("exitCode", "unknown"))


def _word(reason: str) -> str:
    """`CrashLoopBackOff` as `CRASH_LOOP_BACK_OFF`."""
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(reason)).upper()
