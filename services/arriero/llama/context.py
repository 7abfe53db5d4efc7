"""Contexts: evaluating tokens over a model, and the batches that carry them.

Responsibility: decode batches, hand out logits as numpy views, manage sequences
of the KV cache. Does not know sampling, requests or stop conditions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from arriero.cores import threads
from arriero.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
)
from arriero.gates.golden import Golden
from arriero.llama import library
from arriero.llama.header import TYPE_NUMBERS
from arriero.llama.model import Model

# Tokens evaluated at once by `sequence_logits`: 128 rows of a vocabulary of 150k are 77 MB.
_CHUNK = 128


class Batch:
    """Tokens to evaluate in one `decode`, each of one sequence.

    The arrays are this object's own; numpy views of length `capacity` that may
    be written in place: `tokens` (int32), `positions` (int32), `sequences`
    (int32), `outputs` (int8, non-zero where logits are wanted).
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidArgument(f"a batch of {capacity} tokens cannot hold anything")
        self._c = library.binding()
        self.capacity = capacity
        self.size = 0
        self.tokens = np.zeros(capacity, dtype=np.int32)
        self.positions = np.zeros(capacity, dtype=np.int32)
        self.sequences = np.zeros(capacity, dtype=np.int32)
        self.outputs = np.zeros(capacity, dtype=np.int8)
        self._counts = np.ones(capacity, dtype=np.int32)
        first = self.sequences.ctypes.data
        # Pointers to the cells of `sequences`: llama.cpp wants a list of sequences per token.
        self._pointers = np.array([first + 4 * i for i in range(capacity)], dtype=np.uintp)
        self._struct = self._c.llama_batch()
        fields: dict[str, npt.NDArray[Any]] = {
            "token": self.tokens,
            "pos": self.positions,
            "n_seq_id": self._counts,
            "seq_id": self._pointers,
            "logits": self.outputs,
        }
        kinds = dict(self._c.llama_batch._fields_)
        for name, array in fields.items():
            setattr(self._struct, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def __len__(self) -> int:
        return self.size

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.size

    def clear(self) -> None:
        """Start again with nothing."""
        self.size = 0

    def add(self, token: int, position: int, sequence: int, output: bool = True) -> int:
        """Append one token; returns its row.

        Raises:
            OutOfRange: the batch is full.
        """
        row = self.size
        if row >= self.capacity:
            raise OutOfRange(f"the batch is full with {self.capacity} tokens")
        self.tokens[row] = token
        self.positions[row] = position
        self.sequences[row] = sequence
        self.outputs[row] = output
        self.size += 1
        return row

    def extend(
        self, tokens: Sequence[int], *, start: int, sequence: int, outputs: str = "last"
    ) -> range:
        """Append consecutive tokens of one sequence; returns their rows.

        Args:
            tokens: their ids.
            start: position of the first.
            sequence: id of the sequence.
            outputs: where logits are wanted: `last`, `all` or `none`.

        Raises:
            OutOfRange: they do not fit.
        """
        count = len(tokens)
        if count > self.room:
            raise OutOfRange(f"{count} tokens do not fit into the {self.room} left of the batch")
        rows = slice(self.size, self.size + count)
        self.tokens[rows] = tokens
        self.positions[rows] = np.arange(start, start + count, dtype=np.int32)
        self.sequences[rows] = sequence
        self.outputs[rows] = outputs == "all"
        if outputs == "last" and count:
            self.outputs[rows.stop - 1] = 1
        self.size += count
        return range(rows.start, rows.stop)

    def _prepared(self) -> Any:
        self._struct.n_tokens = self.size
        return self._struct


@dataclass(frozen=True, slots=True)
class Rope:
    """Rope scaling of a context; what is None comes from the model.

    Attributes:
        scaling: `none`, `linear` or `yarn`.
        freq_base: base frequency (NTK-aware scaling raises it).
        freq_scale: 1 / factor of linear and YaRN scaling.
        original_context: tokens of the unscaled model, for YaRN.
        ext_factor, attn_factor, beta_fast, beta_slow: llama.cpp's `yarn_*`.
    """

    scaling: str | None = None
    freq_base: float | None = None
    freq_scale: float | None = None
    original_context: int | None = None
    ext_factor: float | None = None
    attn_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None


_ROPE_SCALING = {None: -1, "none": 0, "linear": 1, "yarn": 2}  # llama_rope_scaling_type


class Context:
    """An evaluation context over a model; `with` frees it.

    Every sequence has a KV cache of its own (not a unified one).

    Args:
        model: stays open as long as the context.
        n_ctx: tokens per sequence; 0 for what the model was trained with.
            llama.cpp rounds it up to a multiple of 256.
        n_seq: sequences, with ids 0 to n_seq - 1.
        n_batch: most tokens of one `decode`.
        n_ubatch: most tokens of one computation; default: n_batch, at most 512.
        n_threads: 0 for what the machine grants, less one CPU for everything else.
        rope: rope scaling.
        cache_types: ggml types of the cached keys and values, such as `Q8_0`.
        flash_attention: True, False, or None: where the device has it.
        share: another context whose threads this one computes with too, and that is
            closed after it; both are used from one thread.
        poll: see `Threadpool`.
        on_eval: llama.cpp's `cb_eval`, a C callback; must outlive the context.

    Raises:
        InvalidArgument: impossible figures.
        FailedPrecondition: settings that this model cannot have.
        ResourceExhausted: no memory for the caches.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_seq: int = 1,
        n_batch: int = 512,
        n_ubatch: int = 0,
        n_threads: int = 0,
        rope: Rope | None = None,
        cache_types: tuple[str, str] = ("F16", "F16"),
        flash_attention: bool | None = None,
        share: Context | None = None,
        poll: int = 50,
        on_eval: Any = None,
    ) -> None:
        self._context: Any = None
        self._pool: library.Threadpool | None = None
        self._shares = False
        self._c = library.initialize()
        self.model = model
        most = int(self._c.llama_max_parallel_sequences())
        if not 1 <= n_seq <= most:
            raise InvalidArgument(f"n_seq is {n_seq}; expected 1 to {most} sequences")
        if n_ctx < 0 or n_batch < 1:
            raise InvalidArgument(f"n_ctx {n_ctx} and n_batch {n_batch} must be positive")
        if rope is not None and rope.scaling not in _ROPE_SCALING:
            raise InvalidArgument(f"rope scaling {rope.scaling!r}; expected none, linear or yarn")
        # ggml's threads spin at a barrier after every operation: with one that is
        # descheduled the others wait, and a token takes twenty times as long.
        self.n_threads = threads(n_threads, spare=1)
        params = self._c.llama_context_default_params()
        params.n_ctx = (n_ctx or model.n_ctx_train) * n_seq
        params.n_seq_max = n_seq
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch or min(n_batch, 512)
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = False
        # Embeddings are asked for token by token, whatever the model pools.
        params.pooling_type = self._c.LLAMA_POOLING_TYPE_NONE
        params.no_perf = True
        if on_eval is not None:
            params.cb_eval = on_eval
        if rope is not None:
            params.rope_scaling_type = _ROPE_SCALING[rope.scaling]
            params.rope_freq_base = rope.freq_base or 0.0
            params.rope_freq_scale = rope.freq_scale or 0.0
            params.yarn_orig_ctx = rope.original_context or 0
            # -1 means "from the model"; 0 would switch the extrapolation off.
            for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow"):
                given = getattr(rope, name)
                setattr(params, f"yarn_{name}", -1.0 if given is None else given)
        params.type_k, params.type_v = (TYPE_NUMBERS[kind] for kind in cache_types)
        params.flash_attn_type = {None: -1, False: 0, True: 1}[flash_attention]
        library.take_errors()
        self._context = self._c.llama_init_from_model(model.handle, params)
        if not self._context:
            why = library.take_errors()
            what = f"llama.cpp makes no context of {n_seq} x {n_ctx or model.n_ctx_train} tokens"
            if why and not library.ran_out(why):
                raise FailedPrecondition(f"{what} for {model.path.name}: {why}")
            raise ResourceExhausted(f"{what}: {why or 'no reason given'}; ask for less context")
        self._shares = share is not None
        self._pool = share._pool if share else library.Threadpool(self.n_threads, poll=poll)
        if self._pool is not None:
            self._pool.attach(self._context)
        self._memory = self._c.llama_get_memory(self._context)
        self.n_vocab = model.n_vocab
        self.n_seq = n_seq
        self.n_batch = int(self._c.llama_n_batch(self._context))
        # Tokens that each sequence holds.
        self.n_ctx = int(self._c.llama_n_ctx_seq(self._context))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and join its threads; safe to call twice."""
        if self._context:
            if self._pool is not None:
                self._pool.detach(self._context)
            self._c.llama_free(self._context)
            self._context = None
        if self._pool is not None and not self._shares:
            self._pool.close()
        self._pool = None

    def __del__(self) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The `llama_context` pointer, for samplers and the binding."""
        return self._context

    # -- evaluating ----------------------------------------------------------

    def decode(self, batch: Batch) -> None:
        """Evaluate a batch; its logits stay readable until the next `decode`.

        Raises:
            InvalidArgument: more tokens than n_batch, or none.
            ResourceExhausted: no room in the KV cache; nothing was changed.
            Cancelled: aborted by a callback.
            Internal: llama.cpp failed.
        """
        if not 1 <= batch.size <= self.n_batch:
            raise InvalidArgument(f"a batch of {batch.size} tokens; expected 1 to {self.n_batch}")
        result = self._c.llama_decode(self._context, batch._prepared())
        if result == 0:
            return
        if result == 1:
            raise ResourceExhausted(
                f"no room for {batch.size} tokens in a context of {self.n_ctx} tokens"
            )
        if result == 2:  # llama.h: aborted; what was evaluated stays
            raise Cancelled("llama.cpp's decode was aborted")
        why = library.take_errors() or "no reason given"
        if result == -1:
            raise InvalidArgument(f"llama.cpp refuses the batch: {why}")
        raise Internal(f"llama.cpp's decode failed with code {result}: {why}")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Logits after one token of the last batch.

        Args:
            row: as `Batch.add` returned it; it must have been an output.

        Returns:
            A view, shape (n_vocab,), float32, valid until the next `decode`.

        Raises:
            InvalidArgument: no logits were asked for in that row.
        """
        pointer = self._c.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise InvalidArgument(f"row {row} of the last batch has no logits")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def all_logits(self, count: int) -> npt.NDArray[np.float32]:
        """Logits of all outputs of the last batch.

        Args:
            count: how many tokens of the batch were outputs.

        Returns:
            A view, shape (count, n_vocab), float32, in the batch's order, valid
            until the next `decode`.
        """
        pointer = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count, self.n_vocab))

    def embeddings(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Evaluate a batch for the last layer's output instead of logits.

        Args:
            batch: as `decode` takes it; embeddings are made where it wants outputs.

        Returns:
            A view, shape (outputs, width), float32, valid until the next `decode`.

        Raises:
            ArrieroError: as `decode`.
        """
        self._c.llama_set_embeddings(self._context, True)
        try:
            self.decode(batch)
        finally:
            self._c.llama_set_embeddings(self._context, False)
        width = int(self._c.llama_model_n_embd_out(self.model.handle))
        count = int(np.count_nonzero(batch.outputs[: batch.size]))
        pointer = self._c.llama_get_embeddings(self._context)
        return np.ctypeslib.as_array(pointer, shape=(count, width))

    def sequence_logits(
        self, tokens: Sequence[int], *, sequence: int = 0
    ) -> npt.NDArray[np.float32]:
        """Logits after each token of a sequence evaluated alone, from position 0.

        Args:
            tokens: ids as they are: no BOS is added.
            sequence: id of the sequence whose KV cache is used, and emptied
                before and after; the others keep theirs.

        Returns:
            float32, shape (len(tokens), n_vocab).

        Raises:
            InvalidArgument: ids outside of the vocabulary.
            OutOfRange: more tokens than the context holds.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if len(ids) > self.n_ctx:
            raise OutOfRange(f"{len(ids)} tokens do not fit into a context of {self.n_ctx}")
        self.check_ids(tokens)
        result = np.empty((len(ids), self.n_vocab), dtype=np.float32)
        step = min(_CHUNK, self.n_batch)
        batch = Batch(step)
        self.remove(sequence)
        for start in range(0, len(ids), step):
            chunk = ids[start : start + step]
            batch.clear()
            batch.extend(chunk.tolist(), start=start, sequence=sequence, outputs="all")
            self.decode(batch)
            result[start : start + len(chunk)] = self.all_logits(len(chunk))
        self.remove(sequence)
        return result

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Refuse ids outside of the vocabulary: llama.cpp would abort or read elsewhere.

        Raises:
            InvalidArgument: with the id and the vocabulary's size.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.n_vocab):
            raise InvalidArgument(
                f"token {int(ids.min() if ids.min() < 0 else ids.max())} is outside of the "
                f"vocabulary (0 to {self.n_vocab - 1}): another tokenizer"
            )

    # -- sequences of the KV cache -------------------------------------------

    def clear(self) -> None:
        """Forget every sequence."""
        self._c.llama_memory_clear(self._memory, False)

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool:
        """Forget positions start to end - 1 of a sequence; -1: to its end.

        Returns:
            False where the model's cache cannot forget a part.
        """
        return bool(self._c.llama_memory_seq_rm(self._memory, sequence, start, end))

    def copy(self, source: int, target: int) -> None:
        """Let a sequence start with the whole of another; cut its tail with `remove`."""
        self._c.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def last_position(self, sequence: int) -> int:
        """The largest position in a sequence's cache; -1 if it is empty."""
        return int(self._c.llama_memory_seq_pos_max(self._memory, sequence))


def golden_logits(
    path: Path, golden: Golden, *, n_threads: int = 0, n_gpu_layers: int = 0
) -> npt.NDArray[np.float32]:
    """A GGUF model's logits on golden's sequences, for `gates.golden.compare`.

    Returns:
        float32, shape (tokens of golden, vocabulary), in golden's order.

    Raises:
        DataLoss: the file is damaged.
        InvalidArgument: golden's ids are outside of the model's vocabulary.
    """
    longest = int(golden.lengths.max())
    with (
        Model(path, n_gpu_layers=n_gpu_layers) as model,
        Context(model, n_ctx=longest, n_batch=_CHUNK, n_threads=n_threads) as context,
    ):
        return np.concatenate([context.sequence_logits(ids.tolist()) for ids in golden.sequences])
