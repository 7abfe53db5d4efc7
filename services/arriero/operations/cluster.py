"""Jobs on Kubernetes: an Indexed Job per attempt.

Responsibility: make a Job, follow it and its pods to the end, say what it waits
for, hold it, delete it, and find it again after a restart of the service. Does
not know attempts before or after, nor what a job does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from arriero.errors import (
    AlreadyExists,
    ArrieroError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from arriero.kubernetes import pods as status
from arriero.kubernetes.api import EVENTS, JOBS, PODS, QUOTA, SERVICES, Api, Object
from arriero.kubernetes.informer import Informer
from arriero.kubernetes.names import PREFIX
from arriero.kubernetes.pods import Trouble
from arriero.operations.profiles import Templates, job_name, meeting_place, stamp
from arriero.operations.queue import Demand
from arriero.operations.runner import Exit, Launch
from arriero.rpc.parent import ProcessId

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_SYNC_SECONDS = 30.0
# Without news a Job is looked at this often; events, which are not watched, less often.
_LOOK_SECONDS = 1.0
_EVENTS_SECONDS = 5.0
# What could not be made (a quota, an API that is away) is tried again after this.
_CREATE_SECONDS = 3.0
# A pod that somebody has to put right (an image, a Secret) is given this long.
START_SECONDS = 300.0
_GONE_SECONDS = 600.0


class KubernetesJobs:
    """Jobs in the namespace of the service itself.

    Args:
        api: the cluster's.
        templates: the administrator's.
        room: whose Jobs these are.
        owner: `ownerReference` of what takes all Jobs along when it goes; or None.
        image: for templates that name none.
        start_seconds: that a pod which cannot start by itself is waited for.
    """

    detached = True

    def __init__(
        self,
        api: Api,
        templates: Templates,
        *,
        room: str,
        owner: Object | None = None,
        image: str = "",
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.api = api
        self.room = room
        self.start_seconds = start_seconds
        self._templates = templates
        self._owner = owner
        self._image = image
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, Callable[[], None]] = {}
        selector = f"{PREFIX}room={room},{PREFIX}execution"
        self.jobs = Informer(api, JOBS, selector, self._changed)
        self.pods = Informer(api, PODS, selector, self._changed)

    def demand(self, profile: str, nodes: int) -> Demand:
        """See `Runner`."""
        found = self._templates.profile(profile, nodes)
        return Demand(gpus=found.nodes * found.gpus_per_node, priority=found.priority)

    async def start(self, launch: Launch) -> _Job:
        """See `Runner`; the cluster is asked by whoever waits for the job."""
        await self._ready()
        job = stamp(self._templates, launch, room=self.room, owner=self._owner, image=self._image)
        return _Job(self, launch, job)

    async def adopt(self, launch: Launch, process: ProcessId | None, grace: float) -> _Job | None:
        """The attempt's Job, if the cluster has it; see `Runner`.

        A cluster that is away is waited for: the Job may run all the while.
        """
        job = _Job(self, launch, None)

        async def look() -> Object | None:
            await self._ready()
            return await asyncio.to_thread(self.api.find, JOBS, job.name)

        found = await job.surely(look)
        if found is None or found["metadata"].get("deletionTimestamp"):
            await job.kill()
            return None
        return job

    async def close(self) -> None:
        """Stop watching."""
        self.jobs.stop()
        self.pods.stop()

    async def _ready(self) -> None:
        """Begin to watch; wait until everything was listed once.

        Raises:
            Unavailable: the cluster does not answer.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.jobs.start()
            self.pods.start()
        for informer in (self.jobs, self.pods):
            if not await asyncio.to_thread(informer.synced, _SYNC_SECONDS):
                raise informer.problem or Unavailable("the cluster's API does not answer")

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Be called after changes, in the event loop; returns how to end it."""
        key = str(id(listener))
        self._listeners[key] = listener

        def end() -> None:
            self._listeners.pop(key, None)

        return end

    def _changed(self, names: set[str]) -> None:
        del names
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        for listener in list(self._listeners.values()):
            listener()


class _Job:
    """One attempt's Job; `body` is what it is to be made of, None for one that exists."""

    process: ProcessId | None = None

    def __init__(self, place: KubernetesJobs, launch: Launch, body: Object | None) -> None:
        self._place = place
        self._launch = launch
        self._body = body
        self.name = job_name(place.room, launch)
        self._news = asyncio.Event()
        self._made = body is None
        self._ended = False
        self._pods_seen = False
        self._events_at = 0.0
        self._events: list[Object] = []
        self._broken_since: float | None = None

    # What a runner is asked

    async def wait(self) -> Exit:
        """See `Handle`; what the Job waits for is told meanwhile."""
        end = self._place.listen(self._news.set)
        try:
            while not self._made:
                self._made = await self._make()
                if self._ended:
                    await self.kill()  # the deletion may have come before the Job
                    return Exit(None)
                if not self._made:
                    await self._next_news(_CREATE_SECONDS)
            made_at = time.monotonic()
            while True:
                self._news.clear()
                job = self._place.jobs.get(self.name)
                if job is not None and status.leaving(job) and _finished(job) is None:
                    await self._pods_gone()
                    return self._after_deletion()
                if job is not None:
                    try:
                        left = await self._look(job)
                    except Unavailable as error:  # it runs on, unseen for a while
                        self._tell(error.message, "CLUSTER_UNAVAILABLE")
                        left = None
                    if left is not None:
                        return left
                elif time.monotonic() - made_at > _LOOK_SECONDS and await self._is_gone():
                    await self._pods_gone()
                    return self._after_deletion()
                await self._next_news(_LOOK_SECONDS)
        finally:
            end()

    async def terminate(self) -> None:
        """Delete the Job: its pods get SIGTERM, and their grace period to save."""
        self._ended = True
        self._news.set()
        # The Job goes last: a pod that its controller is about to make is waited for, too.
        delete = functools.partial(self._place.api.delete, JOBS, self.name, dependents_first=True)
        await self.surely(lambda: asyncio.to_thread(delete))

    async def kill(self) -> None:
        """Delete the Job, and wait until no pod of it is left."""
        await self.terminate()
        await self._pods_gone()

    async def suspend(self) -> bool:
        """Let the cluster hold it; False for Kueue's, which would let it go on at once."""
        if self._queued_by_kueue(self._place.jobs.get(self.name) or self._body):
            return False
        await self._patch_suspend(True)
        return True

    async def resume(self) -> None:
        """Let it go on, unless it does."""
        api = self._place.api
        job = await self.surely(lambda: asyncio.to_thread(api.find, JOBS, self.name))
        if job is not None and job["spec"].get("suspend") and not self._queued_by_kueue(job):
            await self._patch_suspend(False)

    # Making it

    async def _make(self) -> bool:
        """Create the Job; False where that has to be tried again."""
        assert self._body is not None
        api = self._place.api
        try:
            try:
                job = await asyncio.to_thread(api.create, JOBS, self._body)
            except AlreadyExists:  # an answer that got lost
                job = await asyncio.to_thread(api.get, JOBS, self.name)
            service = meeting_place(job)
            if service is not None:
                with contextlib.suppress(AlreadyExists):
                    await asyncio.to_thread(api.create, SERVICES, service)
        except ArrieroError as error:
            if isinstance(error, NotFound):
                return False  # deleted between two calls
            if error.reason == QUOTA:
                self._tell(f"the namespace's quota is used up: {error.message}", QUOTA)
            elif error.retryable:
                self._tell(error.message, "CLUSTER_UNAVAILABLE")
            else:
                raise
            return False
        return True

    # Following it

    async def _look(self, job: Object) -> Exit | None:
        """How it ended; None while it has not, having told what it waits for."""
        spec, found = job["spec"], self._pods()
        self._pods_seen = self._pods_seen or bool(found)
        condition = _finished(job)
        if condition is not None:
            # The two watches are not in step: a Job's end may be seen before its pods'.
            found = await self._pods_now() or found
            if any(status.phase(pod) in ("Pending", "Running") for pod in found):
                return None  # being ended
            return await self._conclude(condition, found)
        if spec.get("suspend"):
            if self._queued_by_kueue(job):
                queue = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
                self._tell(f"the job waits for its turn in the queue {queue!r}", "QUEUED")
            else:
                self._launch.tell(None)
            return None
        trouble = await self._trouble(job, found)
        if trouble is None:
            self._broken_since = None
            self._launch.tell(None)
            return None
        self._tell(f"the job cannot start yet: {trouble.message}", trouble.reason)
        if trouble.heals:
            self._broken_since = None
            return None
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        if now - self._broken_since < self._place.start_seconds:
            return None
        await self.kill()
        return Exit(
            None,
            problem=FailedPrecondition(
                f"the job could not start for {self._place.start_seconds:g} s: {trouble.message}",
                reason=trouble.reason,
            ),
        )

    async def _trouble(self, job: Object, found: list[Object]) -> Trouble | None:
        """What keeps it from running, if anything is known to."""
        started = [pod for pod in found if status.phase(pod) != "Pending"]
        if len(started) >= int(job["spec"].get("parallelism") or 1):
            return None
        for pod in found:
            trouble = status.trouble(pod)
            if trouble is not None and trouble.reason == status.IMAGE_PULL:
                events = await self._recent_events([status.name_of(pod)])
                return status.trouble(pod, events)
            if trouble is not None:
                return trouble
        pending = [pod for pod in found if status.phase(pod) == "Pending"]
        events = await self._recent_events([self.name, *(status.name_of(pod) for pod in pending)])
        for pod in pending:
            own = [e for e in events if e["involvedObject"].get("name") == status.name_of(pod)]
            if trouble := status.trouble(pod, own):
                return trouble
        if len(found) < int(job["spec"].get("parallelism") or 1):
            return status.refused(e for e in events if e["involvedObject"]["name"] == self.name)
        return None

    async def _recent_events(self, names: list[str]) -> list[Object]:
        """Warnings about the Job or its pods; asked now and then, since nobody watches them."""
        now = time.monotonic()
        if now - self._events_at >= _EVENTS_SECONDS or not self._events_at:
            self._events_at = now
            events: list[Object] = []
            for name in names:
                fields = f"involvedObject.name={name}"
                items, _ = await asyncio.to_thread(self._place.api.list, EVENTS, fields=fields)
                events += items
            self._events = events
        return self._events

    async def _conclude(self, condition: Object, found: list[Object]) -> Exit:
        if condition["type"] == "Complete":
            return Exit(0)
        ended = [pod for pod in found if status.exit_code(pod) not in (None, 0)]
        lines = await self._last_lines(ended)
        codes = [status.exit_code(pod) for pod in ended]
        code = _signal(codes[0]) if codes else None
        for pod in found:
            if reason := status.evicted(pod):
                return Exit(code, evicted=reason, lines=lines)
        for pod in ended:
            if status.oom_killed(pod):
                return Exit(-9, oom_killed=True, lines=lines)
        if code is not None:
            return Exit(code, lines=lines)
        said = condition.get("message") or condition.get("reason") or "no reason given"
        problem = Unavailable(
            f"the job's pod is lost ({said}); it goes on from its checkpoint", reason="POD_LOST"
        )
        return Exit(None, problem=problem)

    async def _last_lines(self, ended: list[Object]) -> list[str]:
        """What the first pod that failed wrote; the pod may be gone already."""
        for pod in ended[:1]:
            with contextlib.suppress(ArrieroError):
                text = await asyncio.to_thread(self._place.api.log, status.name_of(pod))
                return text.splitlines()
        return []

    def _after_deletion(self) -> Exit:
        if self._ended:
            return Exit(None)
        return Exit(None, evicted="its Job was deleted by somebody")

    # Pieces

    def _pods(self) -> list[Object]:
        """The Job's pods; those of another attempt have another label."""
        own = self._place.pods.labelled(f"{PREFIX}execution", self._launch.execution)
        number = str(self._launch.attempt)
        return [pod for pod in own if pod["metadata"]["labels"].get(f"{PREFIX}attempt") == number]

    async def _pods_now(self) -> list[Object]:
        """The Job's pods, asked for; none when the API is away."""
        own = {"execution": self._launch.execution, "attempt": str(self._launch.attempt)}
        selector = ",".join(f"{PREFIX}{key}={value}" for key, value in own.items())
        with contextlib.suppress(ArrieroError):
            return (await asyncio.to_thread(self._place.api.list, PODS, labels=selector))[0]
        return []

    async def _is_gone(self) -> bool:
        """Whether the cluster has no such Job, asked for itself: a watch may be late."""
        try:
            return await asyncio.to_thread(self._place.api.find, JOBS, self.name) is None
        except Unavailable:
            return False

    async def _pods_gone(self) -> None:
        """Wait until no pod of it is left that could still write."""
        end = self._place.listen(self._news.set)
        deadline = time.monotonic() + _GONE_SECONDS
        try:
            while True:
                self._news.clear()
                left = [p for p in self._pods() if status.phase(p) in ("Pending", "Running")]
                # Asked for: a watch may not have heard of the Job at all yet.
                if not left and await self._is_gone():
                    return
                if time.monotonic() > deadline:
                    raise Unavailable(f"pods of {self.name} do not end; look at them with kubectl")
                await self._next_news(_LOOK_SECONDS)
        finally:
            end()

    async def _patch_suspend(self, suspend: bool) -> None:
        body = {"spec": {"suspend": suspend}}
        api = self._place.api
        with contextlib.suppress(NotFound):
            await self.surely(lambda: asyncio.to_thread(api.patch, JOBS, self.name, body))

    async def surely(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """The answer of a call, however long the cluster is away."""
        pause = 0.2
        while True:
            try:
                return await call()
            except Unavailable as error:
                self._tell(error.message, "CLUSTER_UNAVAILABLE")
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)

    @staticmethod
    def _queued_by_kueue(job: Object | None) -> bool:
        labels = (job or {}).get("metadata", {}).get("labels") or {}
        return "kueue.x-k8s.io/queue-name" in labels

    def _tell(self, message: str, reason: str) -> None:
        self._launch.tell(ResourceExhausted(message, reason=reason))

    async def _next_news(self, seconds: float) -> None:
        # Not wait_for: in Python 3.11 it may take a cancellation for news.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()


def _finished(job: Object) -> Object | None:
    """The condition by which a Job ended."""
    for condition in job.get("status", {}).get("conditions") or ():
        if condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True":
            return dict(condition)
    return None


def _signal(code: int | None) -> int | None:
    """137, as shells and containers say it, is signal 9: -9."""
    return 128 - code if code is not None and 128 < code < 160 else code
