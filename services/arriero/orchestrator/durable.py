"""Durable workflows by ID, on DBOS.

Responsibility: start a workflow once per ID, run it again after a crash, record
its steps and results as JSON. Does not know runs or stages.

DBOS numbers the steps of a workflow in call order, so a workflow must make its
durable calls (`step`, `start`, `result`) strictly one after the other, in an
order that follows from its argument and from recorded results alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from dbos import DBOS, DBOSPortableJSONSerializer, SetWorkflowID
from dbos import error as dbos_error
from sqlalchemy.exc import SQLAlchemyError

from arriero.errors import Cancelled, FailedPrecondition
from arriero.orchestrator.database import explained, shown

# Kept even where code changes: workflows of an older process must be recovered.
APPLICATION_VERSION = "arriero-1"
EXECUTOR_ID = "orchestrator"
# Callers wait in memory first; this only bridges the moment until the row is written.
_POLL_SECONDS = 0.02

Body = Callable[[dict[str, Any]], Awaitable[Any]]


class Workflows:
    """One process' workflows. DBOS allows one instance per process at a time.

    Args:
        database_url: `sqlite:///path` or a PostgreSQL URL.
        bodies: what runs, by workflow name; takes and returns JSON values.
    """

    def __init__(self, database_url: str, bodies: Mapping[str, Body]) -> None:
        self._url = database_url
        self._bodies = dict(bodies)
        self._functions: dict[str, Any] = {}
        self._launched = False
        self._running: set[asyncio.Task[Any]] = set()

    async def launch(self) -> None:
        """Open the database and recover what an earlier process left behind.

        Must be called in the event loop that workflows are to run in.

        Raises:
            Unavailable: the database is away, or refuses.
            FailedPrecondition: it cannot be opened, or is of a newer version.
        """
        _quiet()
        config: Any = {
            "name": "arriero",
            "system_database_url": self._url,
            "application_version": APPLICATION_VERSION,
            "executor_id": EXECUTOR_ID,
            # JSON, never pickle: the database must not be able to run code.
            "serializer": DBOSPortableJSONSerializer(),
            "enable_otlp": False,
            "log_level": "ERROR",
            # LISTEN/NOTIFY exists on PostgreSQL alone; nothing here waits for it.
            "use_listen_notify": False,
            # Bounds how long `close` takes; the thread has nothing else to do.
            "notification_listener_polling_interval_sec": 0.1,
        }
        try:
            DBOS(config=config)
            for name, body in self._bodies.items():
                self._functions[name] = self._register(name, body)
            DBOS.launch()
        except SQLAlchemyError as error:
            DBOS.destroy(destroy_registry=True)
            raise explained(error, shown(self._url)) from error
        except Exception as error:
            DBOS.destroy(destroy_registry=True)
            raise FailedPrecondition(
                f"the run database at {shown(self._url)} cannot be opened: {error}; "
                "check ARRIERO_DATABASE_URL, and that no newer version has written it"
            ) from error
        self._launched = True

    async def close(self) -> None:
        """Stop; workflows that run are recovered by the next `launch`."""
        if self._launched:
            self._launched = False
            # DBOS records nothing for a task that is cancelled like this.
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            await asyncio.to_thread(DBOS.destroy, destroy_registry=True)

    async def start(self, name: str, workflow_id: str, argument: dict[str, Any]) -> None:
        """Start a workflow, unless one with this ID exists."""
        with SetWorkflowID(workflow_id):
            await DBOS.start_workflow_async(self._functions[name], argument)

    async def result(self, workflow_id: str) -> Any:
        """Result of a workflow by ID; recorded when asked inside a workflow.

        Raises:
            Cancelled: that workflow was cancelled.
        """
        handle: Any = await DBOS.retrieve_workflow_async(workflow_id, existing_workflow=False)
        try:
            return await handle.get_result(polling_interval_sec=_POLL_SECONDS)
        except dbos_error.DBOSAwaitedWorkflowCancelledError as error:
            raise Cancelled(f"workflow {workflow_id} was cancelled") from error

    async def step(self, name: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Inside a workflow: run once and record the result; run again after a crash."""
        return await DBOS.run_step_async({"name": name}, function, *args)

    async def cancel(self, workflow_ids: Iterable[str]) -> None:
        """Make workflows end at their next durable call; a running step goes on."""
        ids = list(workflow_ids)
        if ids:
            await DBOS.cancel_workflows_async(ids)

    def _register(self, name: str, body: Body) -> Any:
        async def workflow(argument: dict[str, Any]) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            try:
                return await body(argument)
            finally:
                self._running.discard(task)

        workflow.__qualname__ = workflow.__name__ = name
        # None: however often the orchestrator dies, its runs go on.
        return DBOS.workflow(name=name, max_recovery_attempts=None)(workflow)


def _quiet() -> None:
    """A cancelled workflow is no error of ours, and no traceback in the log."""

    def wanted(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(
            error,
            dbos_error.DBOSWorkflowCancelledError
            | dbos_error.DBOSAwaitedWorkflowCancelledError
            | dbos_error.DBOSWorkflowConflictIDError,
        )

    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else DBOS writes lines of its own to stderr
    if not any(getattr(f, "__name__", "") == "wanted" for f in logger.filters):
        logger.addFilter(wanted)
