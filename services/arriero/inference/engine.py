"""The engine process: one loaded model, many streams, one loop.

Responsibility: take commands, hand requests to the context that fits, and send
back what comes of them, one message per step. Does not know gRPC, templates or other
replicas, nor how a step is batched.

    python -m arriero.inference.engine FD OPTIONS_JSON

The loop: take commands; admit waiting requests to free slots; one step of every
context; send. A process of its own, since a llama.cpp abort ends the process it is in.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arriero.errors import ArrieroError, FailedPrecondition, InvalidArgument, ResourceExhausted
from arriero.gates.golden import Golden, compare
from arriero.inference import frames
from arriero.inference.adapters import AdapterFile, Adapters, Loaded
from arriero.inference.lane import Lane
from arriero.inference.loop import Loop
from arriero.inference.pooling import Vectors, check_pooling, pooled
from arriero.inference.rope import scaled
from arriero.inference.stream import Stream, check_fits, check_tokens
from arriero.inference.text import TextStream
from arriero.llama import Context, Model, Rope, finds_gpu
from arriero.llama.grammar import from_json_schema
from arriero.llama.sampler import Sampler, Sampling
from arriero.replica import ReplicaSettings

_log = logging.getLogger(__name__)

# Context per slot when the model's own is larger and none was asked for.
DEFAULT_CONTEXT = 4096
# Tokens of one step; a computation has half of them.
_BATCH = 1024


@dataclass
class Score:
    """A comparison with golden logits on its way."""

    id: int
    golden: Golden
    adapter: Loaded | None = None
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


@dataclass
class Embedding:
    """Texts on their way to vectors."""

    id: int
    texts: list[list[int]]
    pooling: str
    normalize: bool
    adapter: Loaded | None = None
    vectors: list[Vectors] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class Engine(Loop):
    """Serves one model until its front end closes the pipe.

    Args:
        connection: the pipe.
        model: loaded.
        contexts: over it, the shorter ones first; their sequences are the slots.
        queue_size: requests that may wait for a slot.
        adapters: to have from the start.

    Raises:
        ArrieroError: an adapter cannot be loaded.
    """

    def __init__(
        self,
        connection: socket.socket,
        model: Model,
        contexts: Sequence[Context],
        queue_size: int,
        adapters: Sequence[AdapterFile] = (),
    ) -> None:
        super().__init__(connection)
        self._queue_size = queue_size
        self._model = model
        pieces = model.pieces(special=False)
        self._lanes = [Lane(model, context, pieces, self.events.append) for context in contexts]
        self._longest_piece = max(map(len, model.pieces(special=True)))
        self._adapters = Adapters(model)
        self._scores: deque[Score] = deque()
        self._embeddings: deque[Embedding] = deque()
        self.loaded = [self._adapters.load(file).described() for file in adapters]

    def idle(self) -> bool:
        """See `Loop`."""
        lanes = any(lane.waiting or lane.busy for lane in self._lanes)
        return not (self._scores or self._embeddings or lanes)

    def work(self) -> None:
        """See `Loop`."""
        if self._scores:
            self._score(self._scores[0])
        if self._embeddings:
            self._embed(self._embeddings[0])
        for lane in self._lanes:
            lane.admit()
            if lane.busy:
                lane.step()
        if self._adapters.leaving:
            self._free_adapters()

    def obey(self, frame: frames.Frame) -> None:
        """See `Loop`."""
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
            self.answer(frame, tokens=tokens)
        elif op == "detokenize":
            check_tokens(frame["tokens"], self._model.n_vocab)
            text = self._model.detokenize(frame["tokens"], special=frame["special"])
            self.answer(frame, text=text)
        elif op == "score":
            golden = Golden.read(Path(frame["golden"]))
            self._scores.append(Score(frame["id"], golden, self._adapter(frame)))
        elif op == "embed":
            self._enqueue_texts(frame)
        elif op == "load_adapter":
            loaded = self._adapters.load(AdapterFile(**frame["adapter"]))
            self.answer(frame, adapter=loaded.described())
        elif op == "unload_adapter":
            self._adapters.unload(frame["name"])
            self.answer(frame)

    def _adapter(self, frame: frames.Frame) -> Loaded | None:
        """The adapter that a request chose."""
        name = frame.get("adapter")
        return self._adapters.get(name) if name else None

    def _free_adapters(self) -> None:
        """Free what was unloaded, as soon as nobody computes with it."""
        chosen = [job.adapter for job in self._scores] + [job.adapter for job in self._embeddings]
        running = {adapter.key for adapter in chosen if adapter}
        for lane in self._lanes:
            running |= lane.adapters()
        for lane in self._lanes:
            lane.let_go(running)
        self._adapters.free(running)

    def _cancel(self, request: int) -> None:
        for job in [job for job in self._embeddings if job.id == request]:
            self._embeddings.remove(job)
        any(lane.cancel(request) for lane in self._lanes)

    def _enqueue(self, frame: frames.Frame) -> None:
        # First of all: to refuse must cost nothing when everybody comes at once.
        self._check_queue()
        adapter = self._adapter(frame)
        options = dict(frame["sampling"])
        limit = options.pop("max_tokens", None)
        stop = options.pop("stop", [])
        ends = frozenset(options.pop("stop_token_ids", ()))
        schema = options.pop("json_schema", None)
        if schema is not None:
            options["grammar"] = from_json_schema(schema, field="sampling.json_schema")
        if "logit_bias" in options:
            options["logit_bias"] = {int(t): bias for t, bias in options["logit_bias"].items()}
        # Far too long is known without tokenizing, which would hold up all streams.
        least = len(frame["prompt"]) // self._longest_piece
        check_fits(max(1, least), self._lanes[-1].context.n_ctx, exact=False)
        prompt = self._model.tokenize(
            frame["prompt"], add_special=frame["add_special"], parse_special=True
        )
        lane = self._lane(len(prompt), limit)
        room = lane.context.n_ctx
        check_fits(len(prompt), room)
        left = room - len(prompt)
        sampling = Sampling(**options)
        stream = Stream(
            id=frame["id"],
            prompt=prompt,
            sampler=Sampler(sampling, self._model, prompt, window=room),
            text=TextStream(stop),
            max_tokens=left if limit is None else min(limit, left),
            ends=ends if sampling.ignore_eos else ends | self._model.eog,
            adapter=adapter,
        )
        if stream.max_tokens == 0:
            stream.sampler.close()
            self.events.append(stream.last_event("LENGTH"))
        else:
            lane.waiting.append(stream)

    def _check_queue(self) -> None:
        waiting = sum(len(lane.waiting) for lane in self._lanes) + len(self._embeddings)
        if waiting >= self._queue_size + sum(lane.free for lane in self._lanes):
            raise ResourceExhausted(
                f"{self._queue_size} requests wait for a slot already; try again later, or scale "
                "the endpoint",
                reason="QUEUE_FULL",
            )

    def _enqueue_texts(self, frame: frames.Frame) -> None:
        self._check_queue()
        pooling = check_pooling(self._model.pooling)
        room = self._lanes[-1].context.n_ctx
        texts = []
        for i, text in enumerate(frame["texts"]):
            ids = self._model.tokenize(text)
            if not 0 < len(ids) <= room:
                raise InvalidArgument.field(
                    f"texts[{i}]",
                    f"has {len(ids)} tokens; expected 1 to {room}, the context of this replica",
                )
            texts.append(ids)
        self._embeddings.append(
            Embedding(frame["id"], texts, pooling, frame["normalize"], self._adapter(frame))
        )

    def _embed(self, job: Embedding) -> None:
        """As many more of its texts as free slots take, between the streams' steps."""
        left = job.texts[len(job.vectors) :]
        # A text's context must not depend on the texts beside it, or its vector would.
        lane = self._lane(len(left[0]), 0)
        same = itertools.takewhile(lambda ids: self._lane(len(ids), 0) is lane, left)
        for rows in lane.embed(list(same), job.adapter):
            job.vectors.append(pooled(rows, job.pooling, normalize=job.normalize))
        if len(job.vectors) == len(job.texts):
            self._embeddings.popleft()
            self.answer(
                {"id": job.id},
                # JSON's floats would be four times as long.
                vectors=[base64.b64encode(vector.tobytes()).decode() for vector in job.vectors],
                pooling=job.pooling,
                tokens=sum(map(len, job.texts)),
                seconds=time.monotonic() - job.started,
            )

    def _lane(self, prompt: int, limit: int | None) -> Lane:
        """The shortest context that holds prompt and answer; without a limit, the longest."""
        if limit is not None:
            for lane in self._lanes:
                if prompt + limit <= lane.context.n_ctx:
                    return lane
        return self._lanes[-1]

    def _score(self, score: Score) -> None:
        """Evaluate one more of golden's sequences in a free slot, as streams run."""
        try:
            ids = score.golden.sequences[len(score.logits)]
            logits = self._lanes[0].logits(ids.tolist(), score.adapter)
            if logits is None:
                return
            score.logits.append(logits)
            if len(score.logits) < len(score.golden.lengths):
                return
            found = compare(score.golden, np.concatenate(score.logits))
        except ArrieroError as error:
            # Golden logits of another model, or longer than the context.
            self._scores.popleft()
            self.refuse(score.id, error)
            return
        self._scores.popleft()
        figures = {
            "kl_divergence": found.kl_divergence,
            "top1_agreement": found.top1_agreement,
            "confident_disagreements": found.confident_disagreements,
            "tokens": found.tokens,
            "contexts": found.contexts,
            "seconds": time.monotonic() - score.started,
        }
        self.events.append({"id": score.id, "done": True, "score": figures})

    def load(self) -> list[float]:
        """See `Loop`."""
        lanes = self._lanes
        return [
            sum(lane.busy for lane in lanes),
            sum(len(lane.waiting) for lane in lanes),
            round(sum(lane.filled for lane in lanes) / sum(lane.size for lane in lanes), 4),
            sum(lane.prompt_tokens for lane in lanes),
            sum(lane.cached_tokens for lane in lanes),
            sum(lane.made_tokens for lane in lanes),
        ]


@contextlib.contextmanager
def open_contexts(model: Model, settings: ReplicaSettings) -> Iterator[list[Context]]:
    """The contexts that a replica's settings ask for, the shorter one first.

    NTK's base frequency is one for a whole context, and what lies in a cache was turned
    with it: so requests that fit into the trained context have one of their own.

    Raises:
        ArrieroError: impossible for this model, or no memory.
    """
    n_ctx = settings.context or min(model.n_ctx_train, DEFAULT_CONTEXT)
    trained = model.n_ctx_train
    if settings.rope.native_slots and n_ctx <= trained:
        raise FailedPrecondition(
            f"rope.native_slots is {settings.rope.native_slots}, and a context of {n_ctx} tokens "
            f"is within the {trained} that the model was trained with; ask for more context, or "
            "leave rope out"
        )

    def make(n_ctx: int, n_seq: int, rope: Rope | None, share: Context | None) -> Context:
        return Context(
            model,
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_batch=_BATCH,
            n_threads=settings.threads,
            rope=rope,
            cache_types=(settings.cache_type_k, settings.cache_type_v),
            flash_attention={"on": True, "off": False}.get(settings.flash_attention),
            share=share,
        )

    with contextlib.ExitStack() as stack:
        opened: list[Context] = []
        if settings.rope.native_slots:
            native = make(trained, settings.rope.native_slots, None, None)
            opened.append(stack.enter_context(native))
        rope = scaled(settings.rope, model, n_ctx)
        share = opened[0] if opened else None
        opened.append(stack.enter_context(make(n_ctx, settings.slots, rope, share)))
        yield opened


def describe(model: Model, contexts: Sequence[Context], engine: Engine) -> frames.Frame:
    """What the front end needs to know of the model."""

    def piece(token: int | None) -> str:
        return "" if token is None else model.token_to_piece(token).decode("utf-8", "replace")

    return {
        "context_length": contexts[-1].n_ctx,
        "slots": sum(context.n_seq for context in contexts),
        "vocab_size": model.n_vocab,
        "bos": piece(model.bos),
        "eos": piece(model.eos),
        "adds_bos": model.adds_bos,
        "metadata": model.metadata,
        "chat_template": model.chat_template,
        "adapters": engine.loaded,
    }


def tell_device(gpu_layers: int, *, gpu: bool) -> None:
    """Warn where a model runs on the CPU although it should not, or need not."""
    if gpu_layers and not gpu:
        _log.warning(
            "gpu_layers is %d, and this llama.cpp finds no GPU: the model runs on the CPU; build "
            "it with `make setup LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON`, or leave gpu_layers out",
            gpu_layers,
        )
    elif gpu and not gpu_layers:
        _log.warning(
            "this llama.cpp finds a GPU, and gpu_layers is 0: the model runs on the CPU; "
            "gpu_layers: -1 puts all of its layers on the GPU"
        )


def main() -> None:
    """Load the model, say that it is ready, serve; exit 3 with the reason when it can't."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    try:
        settings = ReplicaSettings.from_env(options["settings"])
        adapters = [AdapterFile(**file) for file in options["adapters"]]
        tell_device(settings.gpu_layers, gpu=finds_gpu())
        with (
            Model(
                Path(options["path"]),
                n_gpu_layers=settings.gpu_layers,
                use_mmap=settings.mmap,
                use_mlock=settings.mlock,
                use_extra_bufts=settings.repack,
            ) as model,
            open_contexts(model, settings) as contexts,
        ):
            # Page the weights in before the first request pays for it.
            warm_up = [model.bos if model.bos is not None else 0]
            for context in contexts:
                context.sequence_logits(warm_up)
            engine = Engine(connection, model, contexts, settings.queue, adapters)
            frames.send(connection, {"ready": describe(model, contexts, engine)})
            engine.run()
    except ArrieroError as error:
        frames.send(connection, {"failed": {"code": error.code, "message": error.message}})
        sys.exit(3)


if __name__ == "__main__":
    main()
