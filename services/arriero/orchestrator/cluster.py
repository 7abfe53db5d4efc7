"""Replicas on Kubernetes: a Deployment and its Services for each endpoint.

Responsibility: bring the cluster to what is desired without fighting whoever
scales, and say what its pods say. Does not know artifacts, gates, or why
something is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace

from arriero.errors import ArrieroError, FailedPrecondition, PermissionDenied, Unavailable
from arriero.kubernetes import pods as status
from arriero.kubernetes.api import (
    AUTOSCALERS,
    DEPLOYMENTS,
    EVENTS,
    PODS,
    SCALED_OBJECTS,
    SERVICES,
    Api,
    Object,
)
from arriero.kubernetes.informer import Informer
from arriero.kubernetes.names import PREFIX, label
from arriero.orchestrator.platform import Desired, Observed, ObservedReplica, until_observed
from arriero.orchestrator.stamping import DELIVERY, ENDPOINT, HASH, MODEL, Stamp

_log = logging.getLogger(__name__)
_SYNC_SECONDS = 30.0
# Without news everything is compared again this often.
_COMPARE_SECONDS = 60.0
_AGAIN_SECONDS = 2.0
# As often a container may end before its replica counts as given up.
_RESTARTS = 3
# A first failure to pull is tried again at once by the kubelet; then it backs off.
_FIRST_PULL = "ErrImagePull"


class KubernetesPlatform:
    """Endpoints in the namespace of the orchestrator itself; see `Platform`.

    Args:
        api: the cluster's.
        stamp: makes an endpoint's objects.
    """

    def __init__(self, api: Api, stamp: Stamp) -> None:
        self._api = api
        self._stamp = stamp
        self._wanted: dict[str, Desired] = {}
        # Generations that the cluster has heard of, and what kept it from hearing.
        self._applied: dict[str, int] = {}
        self._problems: dict[str, ArrieroError] = {}
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._tails: dict[str, tuple[int, str]] = {}
        # Of pods whose containers are not made: what alone says why.
        self._events: dict[str, list[Object]] = {}
        selector = f"{PREFIX}release={label(stamp.release)}"
        self._deployments = Informer(api, DEPLOYMENTS, selector, self._on_deployments)
        self._pods = Informer(api, PODS, f"{PREFIX}deployment", self._on_pods)
        self._autoscalers = Informer(api, AUTOSCALERS, "")

    async def start(self) -> None:
        """Begin, after all that an earlier orchestrator wanted was applied.

        Endpoints that are not wanted any more are removed.

        Raises:
            Unavailable, PermissionDenied: the cluster does not answer as it should.
        """
        self._loop = asyncio.get_running_loop()
        for informer in (self._deployments, self._pods, self._autoscalers):
            informer.start()
        for informer in (self._deployments, self._pods, self._autoscalers):
            if not await asyncio.to_thread(informer.synced, _SYNC_SECONDS):
                raise informer.problem or Unavailable("the cluster's API does not answer")
        self._dirty |= {o["metadata"]["annotations"][ENDPOINT] for o in self._deployments.all()}
        self._dirty |= set(self._wanted)
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Stop; what runs goes on."""
        for informer in (self._deployments, self._pods, self._autoscalers):
            informer.stop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # What the orchestrator asks

    @property
    def delivers(self) -> bool:
        """See `Platform`."""
        return self._stamp.templates.delivers

    def check(self, name: str, replicas: int) -> None:
        """Refuse a number that whoever scales the endpoint would not allow.

        Raises:
            FailedPrecondition: above the autoscaler's maximum, or 0 with an HPA.
        """
        found = self._autoscaler(name)
        scaling = self._stamp.templates.scaling
        if found is not None:
            most, who = int(found["spec"]["maxReplicas"]), status.name_of(found)
        elif scaling.mode != "none":
            most, who = scaling.max, "the endpoint's autoscaler"
        else:
            return
        if replicas > most:
            raise FailedPrecondition(
                f"endpoint {name} is scaled by {who}, up to {most} replicas; {replicas} were asked "
                "for; raise its maximum first",
                reason="ABOVE_AUTOSCALER",
            )
        if replicas == 0 and scaling.mode != "keda":
            raise FailedPrecondition(
                f"endpoint {name} is scaled by {who}, which never goes below 1; delete the "
                "endpoint instead",
                reason="BELOW_AUTOSCALER",
            )

    def apply(self, desired: Desired) -> None:
        """See `Platform`."""
        self._wanted[desired.name] = desired
        self._touch(desired.name)

    def remove(self, name: str) -> None:
        """See `Platform`."""
        self._wanted.pop(name, None)
        self._touch(name)

    def observe(self, name: str) -> Observed:
        """See `Platform`; what pods say is told as they say it."""
        deployment = self._deployments.get(self._stamp.name(name))
        current = _annotation(deployment, HASH) if deployment else ""
        pods = self._pods.labelled(f"{PREFIX}deployment", self._stamp.name(name))
        replicas = [
            self._replica(pod, current)
            for pod in pods
            if status.phase(pod) in ("Pending", "Running")
        ]
        evicted = [p for p in pods if _annotation(p, HASH) == current and status.evicted(p)]
        if not any(r.current and r.state == "READY" for r in replicas):
            replicas = [_after(evicted, replica) for replica in replicas]
        problem = self._problem(name, deployment)
        if problem:
            desired = self._wanted.get(name)
            digest = desired.digest if desired else ""
            replicas.append(ObservedReplica(name, "", "FAILED", digest, problem, final=False))
        generation = self._applied.get(name, 0)
        if deployment is not None and not _noticed(deployment):
            generation -= 1  # the cluster itself has not read it yet
        count = int((deployment or {}).get("spec", {}).get("replicas") or 0)
        elastic = self._autoscaler(name) is not None
        return Observed(name, tuple(replicas), generation, elastic=elastic, scaled_to=count)

    async def wait(
        self, name: str, until: Callable[[Observed], bool], *, timeout: float
    ) -> Observed:
        """See `Platform`."""
        return await until_observed(self, name, until, timeout=timeout)

    # What pods say

    def _replica(self, pod: Object, current: str) -> ObservedReplica:
        name = status.name_of(pod)
        address = str(pod.get("status", {}).get("podIP") or "")
        templates = self._stamp.templates
        state, detail, final = self._state(pod)
        metrics = templates.port("metrics", 0)
        return ObservedReplica(
            name,
            f"{_host(address)}:{templates.port('grpc', 50051)}" if address else "",
            state,
            _annotation(pod, MODEL),
            detail,
            f"{_host(address)}:{metrics}" if address and metrics else "",
            final=final,
            current=not current or _annotation(pod, HASH) == current,
        )

    def _state(self, pod: Object) -> tuple[str, str, bool]:
        """State, detail, and whether waiting is in vain."""
        if status.leaving(pod):
            return "DRAINING", "", True
        if status.ready(pod):
            return "READY", "", True
        trouble = status.trouble(pod, self._events.get(status.name_of(pod), ()))
        if trouble is None:
            return "STARTING", self._fetching(pod), True
        if trouble.heals:
            return "FAILED", trouble.message, False
        if trouble.reason == "CRASH_LOOP_BACK_OFF":
            _, tail = self._tails.get(status.name_of(pod), (0, ""))
            said = f"{trouble.message}; its log ends with: {tail}" if tail else trouble.message
            given_up = status.restarts(pod) >= _RESTARTS
            return ("FAILED" if given_up else "STARTING"), said, True
        # What is mounted may come yet; the roll-out's deadline tells.
        if _FIRST_PULL in trouble.message or trouble.mounts:
            return "STARTING", trouble.message, True
        return "FAILED", trouble.message, True

    def _fetching(self, pod: Object) -> str:
        """What there is to say while its model comes, perhaps once more."""
        if status.initializing(pod) != DELIVERY:
            return ""
        _, tail = self._tails.get(status.name_of(pod), (0, ""))
        said = "its model is being fetched"
        return f"{said} again; the log of the last time ends with: {tail}" if tail else said

    def _problem(self, name: str, deployment: Object | None) -> str:
        """What keeps pods from being made at all."""
        if name in self._problems:
            return self._problems[name].message
        for condition in (deployment or {}).get("status", {}).get("conditions") or ():
            if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
                return str(condition.get("message") or condition.get("reason"))
        return ""

    # Bringing it about

    def _touch(self, name: str) -> None:
        self._dirty.add(name)
        self._wake.set()

    def _on_deployments(self, names: set[str]) -> None:
        del names
        self._soon(self._look)

    def _on_pods(self, names: set[str]) -> None:
        del names
        self._soon(self._wake.set)

    def _soon(self, call: Callable[[], None]) -> None:
        """From an informer's thread to the event loop."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
                self._loop.call_soon_threadsafe(call)

    def _look(self) -> None:
        """Something changed: put right what somebody else changed or deleted."""
        for name, desired in self._wanted.items():
            deployment = self._deployments.get(self._stamp.name(name))
            wanted = self._stamp.deployment(desired)
            if name in self._applied and (
                deployment is None or _annotation(deployment, HASH) != _annotation(wanted, HASH)
            ):
                self._dirty.add(name)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            dirty, self._dirty = self._dirty, set()
            for name in sorted(dirty):
                await self._bring(name)
            await self._read_tails()
            await self._read_events()
            soon = self._dirty or any(map(status.making, self._pods.all()))
            seconds = _AGAIN_SECONDS if soon else _COMPARE_SECONDS
            # Not wait_for: in Python 3.11 it may take a cancellation for news.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    async def _bring(self, name: str) -> None:
        desired = self._wanted.get(name)
        try:
            if desired is None:
                await asyncio.to_thread(self._remove, name)
                self._applied.pop(name, None)
            else:
                await asyncio.to_thread(self._apply, desired)
                self._applied[name] = desired.generation
            self._problems.pop(name, None)
        except ArrieroError as error:
            self._problems[name] = error
            self._dirty.add(name)
            level = logging.ERROR if isinstance(error, PermissionDenied) else logging.WARNING
            _log.log(level, "endpoint %s: %s", name, error.message)
        except Exception as error:
            _log.exception("endpoint %s could not be brought about", name)
            self._problems[name] = Unavailable(f"a defect: {type(error).__name__}: {error}")

    def _apply(self, desired: Desired) -> None:
        """Blocks."""
        body = self._stamp.deployment(desired)
        called = body["metadata"]["name"]
        found = self._api.find(DEPLOYMENTS, called)
        if found is None or _annotation(found, HASH) != _annotation(body, HASH):
            self._api.ensure(DEPLOYMENTS, body, _keep_replicas)
        for service in self._stamp.services(desired.name):
            if self._api.find(SERVICES, service["metadata"]["name"]) is None:
                self._api.ensure(SERVICES, service, _keep_address)
        self._scale(desired, called)

    def _scale(self, desired: Desired, called: str) -> None:
        """The number of replicas, by whoever it belongs to."""
        found = self._autoscaler(desired.name)
        made = self._stamp.autoscaler(desired)
        if found is None and made is not None:
            keda = made["kind"] == "ScaledObject"
            self._api.ensure(SCALED_OBJECTS if keda else AUTOSCALERS, made, _keep_maximum)
        elif found is not None:
            least = {"spec": {"minReplicas": max(1, desired.replicas)}}
            owner = _scaled_object(found)
            if owner:
                least = {"spec": {"minReplicaCount": desired.replicas}}
                self._api.patch(SCALED_OBJECTS, owner, least)
            elif found["spec"].get("minReplicas", 1) != least["spec"]["minReplicas"]:
                self._api.patch(AUTOSCALERS, status.name_of(found), least)
        else:
            live = self._api.get(DEPLOYMENTS, called)
            if live["spec"].get("replicas") != desired.replicas:
                body = {"spec": {"replicas": desired.replicas}}
                self._api.patch(DEPLOYMENTS, called, body, subresource="scale")

    def _remove(self, name: str) -> None:
        """Blocks. The autoscaler first: it would look for what is gone."""
        called = self._stamp.name(name)
        mode = self._stamp.templates.scaling.mode
        if mode != "none":
            self._api.delete(SCALED_OBJECTS if mode == "keda" else AUTOSCALERS, called)
        self._api.delete(DEPLOYMENTS, called)
        for service in (called, self._stamp.headless(name)):
            self._api.delete(SERVICES, service)

    def _autoscaler(self, name: str) -> Object | None:
        """The HPA of an endpoint's Deployment, whoever made it."""
        called = self._stamp.name(name)
        for item in self._autoscalers.all():
            target = item["spec"].get("scaleTargetRef") or {}
            if target.get("kind", "Deployment") == "Deployment" and target.get("name") == called:
                return item
        return None

    async def _read_events(self) -> None:
        """A Secret or claim that is missing is told nowhere else."""
        found = {}
        for pod in self._pods.all():
            name = status.name_of(pod)
            if status.making(pod):
                fields = f"involvedObject.name={name}"
                with contextlib.suppress(ArrieroError):
                    found[name], _ = await asyncio.to_thread(self._api.list, EVENTS, fields=fields)
        self._events = found

    async def _read_tails(self) -> None:
        """The last words of containers that end again and again."""
        for pod in self._pods.all():
            name, count = status.name_of(pod), status.restarts(pod)
            trouble = status.trouble(pod)
            if trouble is None or trouble.reason != "CRASH_LOOP_BACK_OFF":
                continue
            if self._tails.get(name, (-1, ""))[0] == count:
                continue
            text = ""
            with contextlib.suppress(ArrieroError):
                text = await asyncio.to_thread(
                    self._api.log, name, container=trouble.container, previous=True, lines=3
                )
            self._tails[name] = (count, " | ".join(text.strip().splitlines())[:1000])
        gone = set(self._tails) - {status.name_of(pod) for pod in self._pods.all()}
        for name in gone:
            del self._tails[name]


def _after(evicted: list[Object], replica: ObservedReplica) -> ObservedReplica:
    """A replica that starts, and what became of those before it."""
    if not evicted or not replica.current or replica.state != "STARTING":
        return replica
    newest = max(evicted, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
    said = f"the pod before it was taken away ({status.evicted(newest)})"
    given_up = sum(map(status.outgrown, evicted)) >= _RESTARTS
    return replace(replica, detail=said, state="FAILED" if given_up else "STARTING")


def _annotation(item: Object, key: str) -> str:
    return str((item["metadata"].get("annotations") or {}).get(key) or "")


def _noticed(deployment: Object) -> bool:
    """Whether the Deployment controller has seen the newest version."""
    seen = int(deployment.get("status", {}).get("observedGeneration") or 0)
    return seen >= int(deployment["metadata"].get("generation") or 0)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _scaled_object(autoscaler: Object) -> str:
    """Name of the ScaledObject that KEDA made an HPA for; empty for others."""
    for owner in autoscaler["metadata"].get("ownerReferences") or ():
        if owner.get("kind") == "ScaledObject":
            return str(owner["name"])
    return ""


def _keep_replicas(found: Object, wanted: Object) -> None:
    """Their number is somebody else's: an autoscaler's, or a scale of its own."""
    wanted["spec"]["replicas"] = found["spec"].get("replicas", 1)


def _keep_address(found: Object, wanted: Object) -> None:
    for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
        if key in found["spec"]:
            wanted["spec"][key] = found["spec"][key]


def _keep_maximum(found: Object, wanted: Object) -> None:
    for key in ("maxReplicas", "maxReplicaCount"):
        if key in found["spec"]:
            wanted["spec"][key] = found["spec"][key]
