"""The engine process for Hugging Face checkpoints, computed by transformers.

Responsibility: the same commands and events as `arriero.inference.engine`, for models
that llama.cpp does not know. Does not know gRPC or templates.

    python -m arriero.inference.checkpoint_engine FD OPTIONS_JSON

Batching is simple: requests that came together are one batch until the last of them is
answered, batches take turns, and nothing is reused of earlier prompts.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arriero.errors import (
    ArrieroError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from arriero.gates.golden import Golden, compare
from arriero.inference import frames
from arriero.inference.checkpoint import Checkpoint, Values
from arriero.inference.cohort import Cohort, Row
from arriero.inference.distribution import TokenSampler
from arriero.inference.loop import Loop
from arriero.inference.pooling import DEFAULT, Vectors, pooled
from arriero.inference.stream import check_fits, check_tokens
from arriero.inference.text import TextStream
from arriero.llama.sampler import Sampling
from arriero.replica import ReplicaSettings


@dataclass
class Score:
    """A comparison with golden logits on its way."""

    id: int
    golden: Golden
    logits: list[Values] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


@dataclass
class Embedding:
    """Texts on their way to vectors."""

    id: int
    texts: list[list[int]]
    normalize: bool
    vectors: list[Vectors] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class CheckpointEngine(Loop):
    """Serves one checkpoint until its front end closes the pipe.

    Args:
        connection: the pipe.
        checkpoint: loaded.
        settings: of the replica.
    """

    def __init__(
        self, connection: socket.socket, checkpoint: Checkpoint, settings: ReplicaSettings
    ) -> None:
        super().__init__(connection)
        self._checkpoint = checkpoint
        self._settings = settings
        self._waiting: deque[Row] = deque()
        self._cohorts: list[Cohort] = []
        self._scores: deque[Score] = deque()
        self._embeddings: deque[Embedding] = deque()
        self._prompt_tokens = self._made_tokens = 0

    def idle(self) -> bool:
        """See `Loop`."""
        return not (self._waiting or self._cohorts or self._scores or self._embeddings)

    def obey(self, frame: frames.Frame) -> None:
        """See `Loop`."""
        op = frame["op"]
        if frame.get("adapter") and op in ("generate", "score", "embed"):
            raise NotFound(f"no adapter named {frame['adapter']!r} is loaded; adapters: none")
        if op == "generate":
            self._enqueue(frame)
        elif op == "cancel":
            self._cancel(frame["id"])
        elif op == "tokenize":
            tokens = self._checkpoint.tokenize(
                frame["text"],
                add_special=frame["add_special"],
                parse_special=frame["parse_special"],
            )
            self.answer(frame, tokens=tokens)
        elif op == "detokenize":
            check_tokens(frame["tokens"], self._checkpoint.n_vocab)
            text = self._checkpoint.detokenize(frame["tokens"], special=frame["special"])
            self.answer(frame, text=text)
        elif op == "score":
            self._scores.append(Score(frame["id"], Golden.read(Path(frame["golden"]))))
        elif op == "embed":
            self._enqueue_texts(frame)
        elif op == "load_adapter":
            raise FailedPrecondition(
                "the transformers backend loads no adapters at run time; merge it into the model, "
                "or serve a gguf file",
                reason="NO_ADAPTERS",
            )
        elif op == "unload_adapter":
            raise NotFound(f"no adapter named {frame['name']!r} is loaded; adapters: none")

    def work(self) -> None:
        """See `Loop`."""
        if self._scores:
            self._score(self._scores[0])
        if self._embeddings:
            self._embed(self._embeddings[0])
        room = self._settings.slots - self._busy
        if self._waiting and room > 0:
            rows = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._prompt_tokens += sum(len(row.prompt) for row in rows)
            checkpoint = self._checkpoint
            cohort = Cohort(checkpoint.model, checkpoint.tokenizer, rows, self.events.append)
            self._cohorts.append(cohort)
        for cohort in self._cohorts:
            if cohort.rows:
                self._made_tokens += cohort.step()
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]

    def load(self) -> list[float]:
        """See `Loop`."""
        rows = [row for cohort in self._cohorts for row in cohort.rows]
        used = sum(len(row.prompt) + row.made for row in rows)
        capacity = self._settings.slots * self._checkpoint.n_ctx
        return [
            len(rows),
            len(self._waiting),
            round(used / capacity, 4),
            self._prompt_tokens,
            0,
            self._made_tokens,
        ]

    @property
    def _busy(self) -> int:
        return sum(len(cohort.rows) for cohort in self._cohorts)

    def _cancel(self, request: int) -> None:
        self._waiting = deque(row for row in self._waiting if row.id != request)
        self._embeddings = deque(job for job in self._embeddings if job.id != request)
        for cohort in self._cohorts:
            cohort.cancel(request)

    def _check_queue(self) -> None:
        waiting = len(self._waiting) + len(self._embeddings)
        if waiting >= self._settings.queue + self._settings.slots - self._busy:
            raise ResourceExhausted(
                f"{self._settings.queue} requests wait already; try again later, or scale the "
                "endpoint",
                reason="QUEUE_FULL",
            )

    def _enqueue(self, frame: frames.Frame) -> None:
        self._check_queue()
        options = dict(frame["sampling"])
        limit = options.pop("max_tokens", None)
        stop = options.pop("stop", [])
        ends = frozenset(options.pop("stop_token_ids", ()))
        if options.pop("json_schema", None) is not None:
            raise InvalidArgument.field(
                "sampling.json_schema",
                "is not available with the transformers backend; serve a gguf file, or leave it "
                "out",
            )
        if "logit_bias" in options:
            options["logit_bias"] = {int(t): bias for t, bias in options["logit_bias"].items()}
        checkpoint = self._checkpoint
        prompt = checkpoint.tokenize(frame["prompt"], add_special=frame["add_special"])
        check_fits(len(prompt), checkpoint.n_ctx)
        left = checkpoint.n_ctx - len(prompt)
        sampling = Sampling(**options)
        row = Row.make(
            id=frame["id"],
            prompt=prompt,
            sampler=TokenSampler(
                sampling,
                prompt,
                eog=checkpoint.eog,
                size=checkpoint.n_vocab,
                window=checkpoint.n_ctx,
            ),
            text=TextStream(stop),
            max_tokens=left if limit is None else min(limit, left),
            ends=ends if sampling.ignore_eos else ends | checkpoint.eog,
        )
        if row.max_tokens == 0:
            self.events.append(row.last_event("LENGTH"))
        else:
            self._waiting.append(row)

    def _enqueue_texts(self, frame: frames.Frame) -> None:
        self._check_queue()
        room = self._checkpoint.n_ctx
        texts = [self._checkpoint.tokenize(text) for text in frame["texts"]]
        for i, ids in enumerate(texts):
            if not 0 < len(ids) <= room:
                raise InvalidArgument.field(
                    f"texts[{i}]",
                    f"has {len(ids)} tokens; expected 1 to {room}, the context of this replica",
                )
        self._embeddings.append(Embedding(frame["id"], texts, frame["normalize"]))

    def _embed(self, job: Embedding) -> None:
        """One more of its texts, between the batches' steps."""
        rows = self._checkpoint.hidden(job.texts[len(job.vectors)])
        job.vectors.append(pooled(rows, DEFAULT, normalize=job.normalize))
        if len(job.vectors) == len(job.texts):
            self._embeddings.popleft()
            self.answer(
                {"id": job.id},
                vectors=[base64.b64encode(vector.tobytes()).decode() for vector in job.vectors],
                pooling=DEFAULT,
                tokens=sum(map(len, job.texts)),
                seconds=time.monotonic() - job.started,
            )

    def _score(self, score: Score) -> None:
        """Evaluate one more of golden's sequences, between the batches' steps."""
        try:
            ids = score.golden.sequences[len(score.logits)]
            score.logits.append(self._checkpoint.logits(ids.tolist()))
            if len(score.logits) < len(score.golden.lengths):
                return
            found = compare(score.golden, np.concatenate(score.logits))
        except ArrieroError as error:
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
        self.answer({"id": score.id}, score=figures)


def main() -> None:
    """Load the checkpoint, say that it is ready, serve; exit 3 with the reason when it can't."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    try:
        settings = ReplicaSettings.from_env(options["settings"])
        settings.check_backend("transformers")
        checkpoint = Checkpoint(Path(options["path"]), settings)
        # The first forward pass is slower than all others.
        checkpoint.logits([0])
        frames.send(connection, {"ready": checkpoint.described})
        CheckpointEngine(connection, checkpoint, settings).run()
    except ArrieroError as error:
        frames.send(connection, {"failed": {"code": error.code, "message": error.message}})
        sys.exit(3)


if __name__ == "__main__":
    main()
