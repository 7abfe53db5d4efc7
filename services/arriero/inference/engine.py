"""The engine process: one loaded model, many streams, one loop.

Responsibility: batch the streams' tokens into decodes and send back what comes
of them, one message per step. Does not know gRPC, templates or other replicas.

    python -m arriero.inference.engine FD OPTIONS_JSON

The loop: take commands; admit waiting requests to free slots; one row for each
slot that generates, then prompt chunks up to the batch's room; decode; sample;
send. A process of its own, since a llama.cpp abort ends the process it is in.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import ArrieroError, InvalidArgument, ResourceExhausted
from arriero.gates.golden import Golden, compare
from arriero.inference import frames
from arriero.inference.rope import scaled
from arriero.inference.slots import Slots
from arriero.inference.text import TextStream
from arriero.llama import Batch, Context, Model
from arriero.llama.grammar import from_json_schema
from arriero.llama.sampler import Sampler, Sampling
from arriero.replica import ReplicaSettings

# Context per slot when the model's own is larger and none was asked for.
DEFAULT_CONTEXT = 4096
_BATCH = 512


@dataclass
class Stream:
    """One request on its way."""

    id: int
    prompt: list[int]
    sampler: Sampler
    text: TextStream
    max_tokens: int
    # Tokens that end it, beside stop strings.
    ends: frozenset[int] = frozenset()
    slot: int = -1
    # Prompt tokens that are in the KV cache, and how many of them were before.
    filled: int = 0
    cached: int = 0
    # The token that the next decode takes, once the prompt is done.
    next_token: int | None = None
    made: int = 0
    row: int = -1
    admitted: float = field(default_factory=time.monotonic)
    first: float = 0.0


@dataclass
class Score:
    """A comparison with golden logits on its way."""

    id: int
    golden: Golden
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class Engine:
    """Serves one model until its front end closes the pipe.

    Args:
        connection: the pipe.
        model: loaded.
        context: its sequences are the slots.
        queue_size: requests that may wait for a slot.
    """

    def __init__(
        self, connection: socket.socket, model: Model, context: Context, queue_size: int
    ) -> None:
        self._connection = connection
        self._queue_size = queue_size
        self._model = model
        self._context = context
        self._pieces = model.pieces(special=False)
        self._commands: queue.SimpleQueue[frames.Frame | None] = queue.SimpleQueue()
        self._waiting: deque[Stream] = deque()
        self._scores: deque[Score] = deque()
        self._slots = Slots(context.n_seq, context.n_ctx)
        self._streams: list[Stream | None] = [None] * context.n_seq
        self._batch = Batch(context.n_batch)
        self._events: list[dict[str, Any]] = []
        self._told_load: list[float] = []
        # Tokens since the start: of prompts, of those found in the cache, made.
        self._prompt_tokens = self._cached_tokens = self._made_tokens = 0
        self._open = True

    def run(self) -> None:
        """Work until the pipe closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        while self._open:
            self._take_commands()
            self._admit()
            if self._slots.busy:
                self._step()
            self._flush()

    def _listen(self) -> None:
        while True:
            try:
                frame = frames.receive(self._connection)
            except OSError:
                frame = None
            self._commands.put(frame)
            if frame is None:
                return

    def _take_commands(self) -> None:
        idle = not (self._waiting or self._scores or self._slots.busy)
        while True:
            try:
                # An idle engine sleeps here and uses no CPU.
                frame = self._commands.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if frame is None:
                self._open = False
                return
            try:
                self._obey(frame)
            except ArrieroError as error:
                self._refuse(frame["id"], error)

    def _obey(self, frame: frames.Frame) -> None:
        op = frame["op"]
        if op == "generate":
            self._enqueue(frame)
        elif op == "cancel":
            self._cancel(frame["id"])
        elif op == "tokenize":
            tokens = self._model.tokenize(
                frame["text"],
                add_special=frame["add_special"],
                parse_special=frame["parse_special"],
            )
            self._events.append({"id": frame["id"], "tokens": tokens, "done": True})
        elif op == "score":
            self._scores.append(Score(frame["id"], Golden.read(Path(frame["golden"]))))

    def _enqueue(self, frame: frames.Frame) -> None:
        # First of all: to refuse must cost nothing when everybody comes at once.
        if len(self._waiting) >= self._queue_size + self._free_slots():
            raise ResourceExhausted(
                f"{self._queue_size} requests wait for a slot already; try again later, or scale "
                "the endpoint",
                reason="QUEUE_FULL",
            )
        options = dict(frame["sampling"])
        limit = options.pop("max_tokens", None)
        stop = options.pop("stop", [])
        ends = frozenset(options.pop("stop_token_ids", ()))
        schema = options.pop("json_schema", None)
        if schema is not None:
            options["grammar"] = from_json_schema(schema, field="sampling.json_schema")
        if "logit_bias" in options:
            options["logit_bias"] = {int(t): bias for t, bias in options["logit_bias"].items()}
        prompt = self._model.tokenize(
            frame["prompt"], add_special=frame["add_special"], parse_special=True
        )
        room = self._context.n_ctx
        if not prompt:
            raise InvalidArgument.field("prompt", "is empty; expected at least one token")
        if len(prompt) >= room:
            raise InvalidArgument.field(
                "prompt",
                f"has {len(prompt)} tokens, and the context of this replica holds {room} "
                "with the answer; shorten the prompt or deploy with a larger context",
            )
        left = room - len(prompt)
        sampling = Sampling(**options)
        stream = Stream(
            id=frame["id"],
            prompt=prompt,
            sampler=Sampler(sampling, self._model, prompt, window=room),
            text=TextStream(stop),
            max_tokens=left if limit is None else min(limit, left),
            ends=ends if sampling.ignore_eos else ends | self._model.eog,
        )
        if stream.max_tokens == 0:
            self._finish(stream, "LENGTH")
        else:
            self._waiting.append(stream)

    def _free_slots(self) -> int:
        """Slots that requests which came since the last step will get."""
        return len(self._slots) - self._slots.busy

    def _cancel(self, request: int) -> None:
        for waiting in self._waiting:
            if waiting.id == request:
                waiting.sampler.close()
                self._waiting.remove(waiting)
                return
        for stream in self._running():
            if stream.id == request:
                self._free(stream)
                return

    def _admit(self) -> None:
        if self._scores and (slot := self._slots.idle()) is not None:
            self._score(self._scores[0], slot)
        while self._waiting and (placement := self._slots.place(self._waiting[0].prompt)):
            stream = self._waiting.popleft()
            stream.slot, stream.filled = placement.slot, placement.reused
            self._streams[stream.slot] = stream
            if placement.source != placement.slot:
                self._copy(placement.source, placement.slot)
            if not self._context.remove(stream.slot, stream.filled):
                # This model's cache cannot forget a part; so it is evaluated again.
                self._context.remove(stream.slot)
                self._slots.forget(stream.slot)
                stream.filled = 0
            stream.cached = stream.filled
            self._prompt_tokens += len(stream.prompt)
            self._cached_tokens += stream.cached
        while (move := self._slots.compact()) is not None:
            moved = self._streams[move.source]
            assert moved is not None
            self._copy(move.source, move.target)
            moved.slot = move.target
            self._streams[move.target], self._streams[move.source] = moved, None

    def _copy(self, source: int, target: int) -> None:
        self._context.remove(target)
        self._context.copy(source, target)

    def _score(self, score: Score, slot: int) -> None:
        """Evaluate one more of golden's sequences in a free slot, as streams run."""
        self._slots.forget(slot)
        try:
            ids = score.golden.sequences[len(score.logits)]
            score.logits.append(self._context.sequence_logits(ids.tolist(), sequence=slot))
            if len(score.logits) < len(score.golden.lengths):
                return
            found = compare(score.golden, np.concatenate(score.logits))
        except ArrieroError as error:
            # Golden logits of another model, or longer than the context.
            self._scores.popleft()
            self._refuse(score.id, error)
            return
        self._scores.popleft()
        figures = {
            "kl_divergence": found.kl_divergence,
            "top1_agreement": found.top1_agreement,
            "confident_disagreements": found.confident_disagreements,
            "tokens": found.tokens,
            "seconds": time.monotonic() - score.started,
        }
        self._events.append({"id": score.id, "done": True, "score": figures})

    def _step(self) -> None:
        """Decode once for all slots, and sample where a token is due."""
        self._batch.clear()
        for stream in self._running():
            if stream.next_token is not None:
                position = len(stream.prompt) + stream.made - 1
                stream.row = self._batch.add(stream.next_token, position, stream.slot)
                self._slots.append(stream.slot, [stream.next_token])
        for stream in self._running():
            if stream.next_token is None:
                self._add_prompt(stream)
        self._context.decode(self._batch)
        for stream in self._running():
            if stream.row >= 0:
                self._advance(stream)

    def _running(self) -> list[Stream]:
        """In the order of their slots, which is the one that llama.cpp computes together."""
        return [stream for stream in self._streams if stream is not None]

    def _add_prompt(self, stream: Stream) -> None:
        chunk = stream.prompt[stream.filled : stream.filled + self._batch.room]
        stream.row = -1
        if not chunk:
            return
        whole = stream.filled + len(chunk) == len(stream.prompt)
        rows = self._batch.extend(
            chunk,
            start=stream.filled,
            sequence=stream.slot,
            outputs="last" if whole else "none",
        )
        stream.filled += len(chunk)
        self._slots.append(stream.slot, chunk)
        if whole:
            stream.row = rows[-1]

    def _advance(self, stream: Stream) -> None:
        """Take the token that was sampled: show it, or end the stream."""
        token = stream.sampler.sample(self._context, stream.row)
        if not stream.first:
            stream.first = time.monotonic()
        if token in stream.ends:
            self._finish(stream, "STOP")
            return
        stream.made += 1
        self._made_tokens += 1
        told = self._told(stream, token)
        delta = stream.text.push(self._pieces[token])
        if stream.text.stopped:
            self._finish(stream, "STOP", delta, told)
        elif stream.made >= stream.max_tokens:
            self._finish(stream, "LENGTH", delta, told)
        else:
            stream.next_token = token
            if delta or told:
                self._events.append({"id": stream.id, "delta": delta, **told})

    def _told(self, stream: Stream, token: int) -> dict[str, Any]:
        """The token's log-probability, for those who asked."""
        found = stream.sampler.logprobs(self._context, stream.row, token)
        if found is None:
            return {}

        def entry(token: int, logprob: float) -> list[Any]:
            return [token, self._model.token_to_piece(token).decode("latin-1"), logprob]

        top = [entry(*item) for item in found.top]
        return {"logprobs": [[*entry(token, found.chosen), top]]}

    def _finish(
        self, stream: Stream, reason: str, delta: str = "", told: dict[str, Any] | None = None
    ) -> None:
        now = time.monotonic()
        first = stream.first or now
        self._events.append(
            {
                "id": stream.id,
                "delta": delta + stream.text.finish(),
                **(told or {}),
                "done": True,
                "finish_reason": reason,
                "usage": {
                    "prompt_tokens": len(stream.prompt),
                    "completion_tokens": stream.made,
                    "prompt_seconds": first - stream.admitted,
                    "completion_seconds": now - first,
                    "cached_tokens": stream.cached,
                },
            }
        )
        self._free(stream)

    def _free(self, stream: Stream) -> None:
        stream.sampler.close()
        if stream.slot >= 0:
            # What it evaluated stays, for prompts that begin alike.
            self._slots.release(stream.slot)
            self._streams[stream.slot] = None

    def _refuse(self, request: int, error: ArrieroError) -> None:
        event: dict[str, Any] = {
            "code": error.code,
            "message": error.message,
            "reason": error.reason,
        }
        if isinstance(error, InvalidArgument):
            event["violations"] = [[v.field, v.description] for v in error.violations]
        self._events.append({"id": request, "done": True, "error": event})

    def _load(self) -> list[float]:
        """In the order of `arriero.metrics.EngineLoad`."""
        return [
            self._slots.busy,
            len(self._waiting),
            round(self._slots.usage, 4),
            self._prompt_tokens,
            self._cached_tokens,
            self._made_tokens,
        ]

    def _flush(self) -> None:
        load = self._load()
        if self._events or load != self._told_load:
            try:
                frames.send(self._connection, {"events": self._events, "load": load})
            except OSError:
                self._open = False
            self._events, self._told_load = [], load


def open_context(model: Model, settings: ReplicaSettings) -> Context:
    """The context that a replica's settings ask for.

    Raises:
        ArrieroError: impossible for this model, or no memory.
    """
    n_ctx = settings.context or min(model.n_ctx_train, DEFAULT_CONTEXT)
    return Context(
        model,
        n_ctx=n_ctx,
        n_seq=settings.slots,
        n_batch=_BATCH,
        n_threads=settings.threads,
        rope=scaled(settings.rope, model, n_ctx),
        cache_types=(settings.cache_type_k, settings.cache_type_v),
        flash_attention={"on": True, "off": False}.get(settings.flash_attention),
    )


def describe(model: Model, context: Context) -> frames.Frame:
    """What the front end needs to know of the model."""

    def piece(token: int | None) -> str:
        return "" if token is None else model.token_to_piece(token).decode("utf-8", "replace")

    return {
        "context_length": context.n_ctx,
        "slots": context.n_seq,
        "vocab_size": model.n_vocab,
        "bos": piece(model.bos),
        "eos": piece(model.eos),
        "adds_bos": model.adds_bos,
        "metadata": model.metadata,
        "chat_template": model.chat_template,
    }


def main() -> None:
    """Load the model, say that it is ready, serve; exit 3 with the reason when it can't."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    try:
        settings = ReplicaSettings.from_env(options["settings"])
        with (
            Model(
                Path(options["path"]),
                n_gpu_layers=settings.gpu_layers,
                use_mmap=settings.mmap,
                use_mlock=settings.mlock,
            ) as model,
            open_context(model, settings) as context,
        ):
            # Page the weights in before the first request pays for it.
            warm_up = [model.bos if model.bos is not None else 0]
            context.sequence_logits(warm_up)
            frames.send(connection, {"ready": describe(model, context)})
            Engine(connection, model, context, settings.queue).run()
    except ArrieroError as error:
        frames.send(connection, {"failed": {"code": error.code, "message": error.message}})
        sys.exit(3)


if __name__ == "__main__":
    main()
