"""One context at work: its slots, the streams in them, and their decode steps.

Responsibility: admit waiting streams to slots, batch their tokens, decode, sample,
and say what came of it. Does not know commands, the pipe, or other contexts.

A step: for each adapter that is in use one decode, with one row for each slot that
generates, then as much of the prompts as `allot` grants. Of prompts that begin alike and
came together one is evaluated, and the others follow: they wait, and copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import ArrieroError
from arriero.inference.adapters import Loaded
from arriero.inference.pooling import Vectors
from arriero.inference.slots import MIN_COPY, Move, Slots, common
from arriero.inference.stream import Stream, refusal
from arriero.llama import Batch, Context, Model
from arriero.llama.adapter import set_adapters

# Prompt tokens of one stream in one step: what llama.cpp computes at once.
CHUNK = 512
# Prompt tokens of a step beside few streams that generate: fewer are hardly cheaper.
BESIDE = 8


class Lane:
    """The streams of one context.

    Args:
        model: that the context is over.
        context: its sequences are the slots.
        pieces: bytes of every token.
        emit: is given the events of streams.

    Attributes:
        waiting: streams without a slot, in the order in which they came.
        prompt_tokens, cached_tokens, made_tokens: since the start, of prompts, of those
            found in the cache, and made.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        pieces: list[bytes],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._model = model
        self._pieces = pieces
        self._emit = emit
        self._slots = Slots(context.n_seq, context.n_ctx)
        self._streams: list[Stream | None] = [None] * context.n_seq
        self._batch = Batch(context.n_batch)
        # What the context computes with now.
        self._adapter: Loaded | None = None
        self.context = context
        self.waiting: deque[Stream] = deque()
        self.prompt_tokens = self.cached_tokens = self.made_tokens = 0

    @property
    def busy(self) -> int:
        """Slots in use."""
        return self._slots.busy

    @property
    def free(self) -> int:
        """Slots that are not in use."""
        return len(self._slots) - self._slots.busy

    @property
    def size(self) -> int:
        """Tokens of the whole cache."""
        return len(self._slots) * self.context.n_ctx

    @property
    def filled(self) -> float:
        """Tokens of the cache that slots in use fill."""
        return self._slots.usage * self.size

    def adapters(self) -> set[int]:
        """Keys of the adapters that streams here need."""
        return {stream.key for stream in (*self._running(), *self.waiting)}

    def cancel(self, request: int) -> bool:
        """End a stream without a word; False when it is not here."""
        for waiting in self.waiting:
            if waiting.id == request:
                waiting.sampler.close()
                self.waiting.remove(waiting)
                return True
        for stream in self._running():
            if stream.id == request:
                self._free(stream)
                return True
        return False

    def admit(self) -> None:
        """Give free slots to those that wait, and keep the used ones together."""
        while self.waiting:
            first = self.waiting[0]
            placement = self._slots.place(first.prompt, first.key)
            if placement is None:
                break
            if placement.makes_room is not None:
                self._move(placement.makes_room)
            stream = self.waiting.popleft()
            stream.slot, stream.filled = placement.slot, placement.reused
            self._streams[stream.slot] = stream
            if placement.source != placement.slot:
                self._copy(placement.source, placement.slot)
            if not self.context.remove(stream.slot, stream.filled):
                # This model's cache cannot forget a part; so it is evaluated again.
                self.context.remove(stream.slot)
                self._slots.forget(stream.slot)
                stream.filled = 0
            stream.cached = stream.filled
            self.prompt_tokens += len(stream.prompt)
            self.cached_tokens += stream.cached
            self._choose_leader(stream)
        while (move := self._slots.compact()) is not None:
            self._move(move)

    def step(self) -> None:
        """One token for every stream that generates, and prompts as far as there is room."""
        running = self._running()
        for stream in running:
            if stream.leader is not None and not self._runs(stream.leader):
                self._choose_leader(stream)
        granted = allot(running, self._batch.capacity)
        groups: dict[int, list[Stream]] = {}
        for stream in running:
            if stream.next_token is not None or stream.id in granted:
                groups.setdefault(stream.key, []).append(stream)
        current = self._adapter.key if self._adapter else 0
        # The one that is set goes first: each change costs.
        for key in sorted(groups, key=lambda key: (key != current, key)):
            self._use(groups[key][0].adapter)
            self._decode(groups[key], granted)

    def logits(self, tokens: list[int], adapter: Loaded | None) -> npt.NDArray[np.float32] | None:
        """Logits after each token of a sequence, shape (tokens, vocabulary); None: no free slot.

        Raises:
            ArrieroError: ids of another vocabulary, or more than the context holds.
        """
        slot = self._slots.idle()
        if slot is None:
            return None
        self._slots.forget(slot)
        self._use(adapter)
        return self.context.sequence_logits(tokens, sequence=slot)

    def embed(self, texts: Sequence[list[int]], adapter: Loaded | None) -> list[Vectors]:
        """The last layer's output after each token, of the first texts that fit free slots.

        Args:
            texts: token ids, none longer than the context, none empty.
            adapter: to compute with.

        Returns:
            Float32 of shape (tokens, width) for each text; of no text when no slot is free.
        """
        slots = self._slots.unused()[: len(texts)]
        if not slots:
            return []
        self._use(adapter)
        if len(texts[0]) > CHUNK:
            return [self._embed_long(texts[0], slots[0])]
        self._batch.clear()
        made: list[list[int]] = []
        for slot, ids in zip(slots, texts, strict=False):
            # llama.cpp ends the process when a model that looks ahead gets more at once.
            if self._batch.size + len(ids) > CHUNK:
                break
            self._slots.forget(slot)
            self.context.remove(slot)
            self._batch.extend(ids, start=0, sequence=slot, outputs="all")
            made.append(ids)
        rows = self.context.embeddings(self._batch).copy()
        for slot in slots[: len(made)]:
            self.context.remove(slot)
        ends = np.cumsum([len(ids) for ids in made])
        return np.split(rows, ends[:-1])

    def _embed_long(self, ids: list[int], slot: int) -> Vectors:
        parts = []
        self._slots.forget(slot)
        self.context.remove(slot)
        for start in range(0, len(ids), CHUNK):
            self._batch.clear()
            chunk = ids[start : start + CHUNK]
            self._batch.extend(chunk, start=start, sequence=slot, outputs="all")
            parts.append(self.context.embeddings(self._batch).copy())
        self.context.remove(slot)
        return np.concatenate(parts)

    def let_go(self, keys: set[int]) -> None:
        """Stop computing with an adapter unless its key is among these."""
        if self._adapter is not None and self._adapter.key not in keys:
            self._use(None)

    def _running(self) -> list[Stream]:
        """In the order of their slots, which is the one that llama.cpp computes together."""
        return [stream for stream in self._streams if stream is not None]

    def _use(self, adapter: Loaded | None) -> None:
        if adapter is not self._adapter:
            set_adapters(self.context, [(adapter.adapter, adapter.file.scale)] if adapter else [])
            self._adapter = adapter

    def _copy(self, source: int, target: int) -> None:
        self.context.remove(target)
        self.context.copy(source, target)

    def _move(self, move: Move) -> None:
        moved = self._streams[move.source]
        assert moved is not None
        self._copy(move.source, move.target)
        moved.slot = move.target
        self._streams[move.target], self._streams[move.source] = moved, None

    def _runs(self, stream: Stream) -> bool:
        return self._streams[stream.slot] is stream

    def _choose_leader(self, stream: Stream) -> None:
        """Let it follow whoever came before and evaluates most of the same beginning."""
        stream.leader, stream.shared = None, stream.filled + MIN_COPY - 1
        wanted = np.asarray(stream.prompt[:-1], np.int32)
        for other in self._running():
            if other.key == stream.key and other.admitted < stream.admitted:
                shared = common(wanted, np.asarray(other.prompt, np.int32))
                if shared > stream.shared:
                    stream.leader, stream.shared = other, shared

    def _follow(self, stream: Stream) -> None:
        """Take over what the leader evaluated."""
        assert stream.leader is not None
        self._copy(stream.leader.slot, stream.slot)
        if self.context.remove(stream.slot, stream.shared):
            self._slots.share(stream.leader.slot, stream.slot, stream.shared)
            self.cached_tokens += stream.shared - stream.filled
            stream.cached = stream.filled = stream.shared
        else:
            # This model's cache cannot forget a part.
            self.context.remove(stream.slot)
            self._slots.forget(stream.slot)
            self.cached_tokens -= stream.cached
            stream.cached = stream.filled = 0
        stream.leader = None

    def _decode(self, streams: list[Stream], granted: dict[int, int]) -> None:
        """Decode once for these, and sample where a token is due."""
        self._batch.clear()
        for stream in streams:
            stream.row = -1
            if stream.next_token is not None:
                position = len(stream.prompt) + stream.made - 1
                stream.row = self._batch.add(stream.next_token, position, stream.slot)
                self._slots.append(stream.slot, [stream.next_token])
        for stream in streams:
            if stream.next_token is None:
                self._add_prompt(stream, granted[stream.id])
        self.context.decode(self._batch)
        # Before anybody's end frees a slot that is followed.
        for stream in self._running():
            if stream.leader is not None and stream.leader.filled >= stream.shared:
                self._follow(stream)
        for stream in streams:
            if stream.row < 0:
                continue
            try:
                self._advance(stream)
            except ArrieroError as error:
                # A grammar that allows nothing more, say: the others go on.
                self._emit(refusal(stream.id, error))
                self._free(stream)

    def _add_prompt(self, stream: Stream, count: int) -> None:
        chunk = stream.prompt[stream.filled : stream.filled + count]
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
        token = stream.sampler.sample(self.context, stream.row)
        if not stream.first:
            stream.first = time.monotonic()
        if token in stream.ends:
            self._finish(stream, "STOP")
            return
        stream.made += 1
        self.made_tokens += 1
        told = self._told(stream, token)
        delta = stream.text.push(self._pieces[token])
        if stream.text.stopped:
            self._finish(stream, "STOP", delta, told)
        elif stream.made >= stream.max_tokens:
            self._finish(stream, "LENGTH", delta, told)
        else:
            stream.next_token = token
            if delta or told:
                self._emit({"id": stream.id, "delta": delta, **told})

    def _told(self, stream: Stream, token: int) -> dict[str, Any]:
        """The token's log-probability, for those who asked."""
        found = stream.sampler.logprobs(self.context, stream.row, token)
        if found is None:
            return {}

        def entry(token: int, logprob: float) -> list[Any]:
            return [token, self._model.token_to_piece(token).decode("latin-1"), logprob]

        top = [entry(*item) for item in found.top]
        return {"logprobs": [[*entry(token, found.chosen), top]]}

    def _finish(
        self, stream: Stream, reason: str, delta: str = "", told: dict[str, Any] | None = None
    ) -> None:
        self._emit(stream.last_event(reason, delta, told))
        self._free(stream)

    def _free(self, stream: Stream) -> None:
        stream.sampler.close()
        # What it evaluated stays, for prompts that begin alike.
        self._slots.release(stream.slot)
        self._streams[stream.slot] = None


def allot(running: Sequence[Stream], most: int) -> dict[int, int]:
    """How many prompt tokens of which streams a step evaluates, by their ids.

    While nobody generates, nobody but the prompts waits: a step takes all it can, so that
    those who came together generate together. Where more wait for their first token than
    for their next one, a step takes a whole chunk. Otherwise it takes one prompt token for
    every three streams that generate: those keep about three quarters of their speed.

    Args:
        running: with slots.
        most: tokens of a step.
    """
    prompts = [stream for stream in running if stream.next_token is None]
    making = len(running) - len(prompts)
    if not making:
        room = most
    elif len(prompts) > making:
        room = CHUNK
    else:
        room = max(BESIDE, making // 3)
    room = min(room, most - making)
    granted = {}
    for stream in sorted(prompts, key=lambda stream: stream.admitted):
        if stream.leader is None and room:
            granted[stream.id] = min(len(stream.prompt) - stream.filled, CHUNK, room)
            room -= granted[stream.id]
    return granted
