"""The linked llama.cpp: loading it once, its log, and what its binding leaves out.

Responsibility: initialize the backend, route llama.cpp's log into `logging`, and
bind the thread pool functions. Does not know models.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from arriero.errors import FailedPrecondition

_logger = logging.getLogger("arriero.llama")
_MEMORY = re.compile("alloc|out of memory", re.IGNORECASE)

# ggml_log_level (ggml.h); llama.cpp's INFO is hundreds of lines for each model.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
_INFO = 2
_CONTINUATION = 5
_ERROR = 4

# GGML_MAX_N_THREADS (ggml.h).
_MAX_THREADS = 512


class _ThreadpoolParams(ctypes.Structure):
    """ggml_threadpool_params (ggml.h)."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class _Log:
    """Joins llama.cpp's pieces to lines, and remembers the last errors of each thread."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[str], None]] = []
        self._errors: deque[str] = deque(maxlen=4)

    def write(self, level: int, text: bytes | None, _data: object) -> None:
        pieces: list[str] = self._local.__dict__.setdefault("pieces", [])
        before: int = self._local.__dict__.get("level", _INFO)
        if level == _CONTINUATION:
            level = before
        elif level != before:
            self._flush(pieces, before)
        self._local.level = level
        pieces.append((text or b"").decode("utf-8", "replace"))
        if pieces[-1].endswith("\n"):
            self._flush(pieces, level)
        else:
            # A line that is still being written may already tell a listener of progress.
            self._tell("".join(pieces))

    def _flush(self, pieces: list[str], level: int) -> None:
        line = "".join(pieces).strip(" \r\n=")  # and the rulers around some errors
        pieces.clear()
        if not line:
            return
        if level == _ERROR:
            with self._lock:
                self._errors.append(" ".join(line.split()))
        self._tell(line)
        _logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)

    def abort(self, message: bytes | None) -> None:
        _logger.critical("llama.cpp aborts: %s", (message or b"").decode("utf-8", "replace"))
        logging.shutdown()

    def _tell(self, line: str) -> None:
        for listener in tuple(self._listeners):
            listener(line)

    @contextmanager
    def listening(self, listener: Callable[[str], None]) -> Iterator[None]:
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def take_errors(self) -> str:
        with self._lock:
            errors = "; ".join(self._errors)
            self._errors.clear()
        return errors


_log = _Log()
# ctypes frees a callback that nobody holds.
_callbacks: list[Any] = []
_lock = threading.Lock()


@functools.cache
def binding() -> Any:
    """The module `llama_cpp.llama_cpp`: llama.h as ctypes functions.

    Raises:
        FailedPrecondition: llama-cpp-python is not installed or cannot be loaded.
    """
    try:
        from llama_cpp import llama_cpp as module
    except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
        raise FailedPrecondition(
            f"llama.cpp cannot be loaded ({error}); expected the package llama-cpp-python, "
            "built by `make setup`"
        ) from error
    return module


def ran_out(why: str) -> bool:
    """Whether llama.cpp's errors tell of memory that it did not get."""
    return bool(_MEMORY.search(why))


def finds_gpu() -> bool:
    """Whether this llama.cpp was built for GPUs, and there is one."""
    return bool(initialize().llama_supports_gpu_offload())


def available() -> bool:
    """Whether llama.cpp can be loaded here."""
    try:
        binding()
    except FailedPrecondition:
        return False
    return True


def initialize() -> Any:
    """Initialize llama.cpp's backend once, with its log in `logging`; returns the binding.

    Raises:
        FailedPrecondition: llama.cpp cannot be loaded.
    """
    module = binding()
    with _lock:
        if not _callbacks:
            # An abort would otherwise start a debugger on this process to print a trace.
            os.environ.setdefault("GGML_NO_BACKTRACE", "1")
            log = module.llama_log_callback(_log.write)
            _callbacks.append(log)
            module.llama_log_set(log, ctypes.c_void_p(0))
            _say_why_on_abort(module._lib)
            module.llama_backend_init()
    return module


def _say_why_on_abort(loaded: ctypes.CDLL) -> None:
    """Log a failed assertion of ggml before it ends the process."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    try:
        function = loaded["ggml_set_abort_callback"]
    except AttributeError:  # an older ggml prints it to stderr
        return
    function.restype, function.argtypes = ctypes.c_void_p, [kind]
    callback = kind(_log.abort)
    _callbacks.append(callback)
    function(callback)


def listening(listener: Callable[[str], None]) -> AbstractContextManager[None]:
    """Context manager: `listener` gets every log line, also the beginning of unfinished ones."""
    return _log.listening(listener)


def take_errors() -> str:
    """What llama.cpp logged as errors since the last call, joined by `; `."""
    return _log.take_errors()


def functions(signatures: Mapping[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    """C functions that the binding leaves out, by name: result and argument types.

    Raises:
        FailedPrecondition: the linked llama.cpp does not export one.
    """
    loaded = binding()._lib
    found: dict[str, Any] = {}
    for name, (result, arguments) in signatures.items():
        try:
            # A private handle of each function: the binding may set its own types.
            function = loaded[name]
        except AttributeError as error:
            raise FailedPrecondition(
                f"the linked llama.cpp does not export {name}; expected the one that `make setup` "
                "builds"
            ) from error
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


@functools.cache
def _functions() -> dict[str, Any] | None:
    """Thread pool functions, or None where they live in a backend loaded at run time."""
    pointer = ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_threadpool_params_init": (None, [ctypes.POINTER(_ThreadpoolParams), ctypes.c_int]),
        "ggml_threadpool_new": (pointer, [ctypes.POINTER(_ThreadpoolParams)]),
        "ggml_threadpool_free": (None, [pointer]),
        "llama_attach_threadpool": (None, [pointer, pointer, pointer]),
        "llama_detach_threadpool": (None, [pointer]),
    }
    try:
        return functions(signatures)
    except FailedPrecondition as error:
        _logger.info("%s: contexts make a thread pool per decode", error.message)
        return None


class Threadpool:
    """A persistent pool that a context computes with.

    Without one llama.cpp starts and joins its threads at every decode.

    Args:
        n_threads: workers, the calling thread included.
        poll: 0 sleeps at once while waiting, 100 spins; llama.cpp's default is 50.
    """

    def __init__(self, n_threads: int, *, poll: int = 50) -> None:
        self._functions = _functions()
        self._pool: int | None = None
        if self._functions is not None and 1 <= n_threads <= _MAX_THREADS:
            params = _ThreadpoolParams()
            self._functions["ggml_threadpool_params_init"](ctypes.byref(params), n_threads)
            params.poll = poll
            self._pool = self._functions["ggml_threadpool_new"](ctypes.byref(params))

    @property
    def attached(self) -> bool:
        """Whether there is a pool at all in this build."""
        return self._pool is not None

    def attach(self, context: Any) -> None:
        """Let a context (a `llama_context` pointer) use the pool for prompts and tokens."""
        if self._functions is not None and self._pool is not None:
            self._functions["llama_attach_threadpool"](context, self._pool, self._pool)

    def detach(self, context: Any) -> None:
        """Take the pool away from a context."""
        if self._functions is not None and self._pool is not None:
            self._functions["llama_detach_threadpool"](context)

    def close(self) -> None:
        """Join the workers; no context may hold the pool any more."""
        if self._functions is not None and self._pool is not None:
            self._functions["ggml_threadpool_free"](self._pool)
            self._pool = None
