"""Requests that came together, computed together by transformers.

Responsibility: one padded batch from its prompts to its last answer. Does not know
commands, or other cohorts.

Prompts are padded on the left; who is finished leaves the batch. Nobody joins one
under way: those who come later are a cohort of their own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arriero.inference.distribution import TokenSampler
from arriero.inference.stream import Request

# Tokens before the new ones that are decoded with them: a piece may look otherwise alone.
_BEFORE = 6


@dataclass(kw_only=True)
class Row(Request):
    """A request that transformers computes.

    Attributes:
        sampler: of its own.
        ids: of the end of the prompt, and of what was made.
        shown: of `ids`, how many are in the text already.
    """

    sampler: TokenSampler
    ids: list[int]
    shown: int = 0

    @classmethod
    def make(cls, **fields: Any) -> Row:
        """With the end of its prompt as what comes before the answer."""
        ids = list(fields["prompt"][-_BEFORE:])
        return cls(ids=ids, shown=len(ids), **fields)


class Cohort:
    """A batch of requests.

    Args:
        model: of transformers, in evaluation mode.
        tokenizer: its own.
        rows: the requests.
        emit: is given their events.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._tokenizer = tokenizer
        self._emit = emit
        self._cache: Any = None
        self._takes = set(inspect.signature(model.forward).parameters)
        self.rows = list(rows)
        # Those that are computed, finished ones among them where a cache cannot drop rows.
        self._batch: list[Row | None] = list(rows)
        longest = max(len(row.prompt) for row in rows)
        padded = [[0] * (longest - len(row.prompt)) + row.prompt for row in rows]
        mask = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        self._input = torch.tensor(padded, device=model.device)
        self._mask = torch.tensor(mask, device=model.device)

    def cancel(self, request: int) -> bool:
        """Leave a request out from now on; False when it is not here."""
        found = [row for row in self.rows if row.id == request]
        for row in found:
            self._drop([row])
        return bool(found)

    def step(self) -> int:
        """One token for every request; returns how many were made."""
        torch = self._torch
        more: dict[str, Any] = {}
        if "position_ids" in self._takes:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -self._input.shape[1] :]
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        with torch.inference_mode():
            out = self._model(
                input_ids=self._input,
                attention_mask=self._mask,
                past_key_values=self._cache,
                use_cache=True,
                **more,
            )
        self._cache = out.past_key_values
        logits = out.logits[:, -1].float().cpu().numpy()
        tokens = [0] * len(self._batch)
        ended: list[Row] = []
        made = 0
        for place, row in enumerate(self._batch):
            if row is None:
                continue
            tokens[place] = self._advance(row, logits[place], ended)
            made += 1
        self._input = torch.tensor(tokens, device=self._model.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._drop(ended)
        return made

    def _drop(self, ended: Sequence[Row]) -> None:
        """Take rows out of the batch."""
        if not ended:
            return
        gone = {id(row) for row in ended}
        self.rows = [row for row in self.rows if id(row) not in gone]
        kept = [i for i, row in enumerate(self._batch) if row is None or id(row) not in gone]
        kept = [i for i in kept if self._batch[i] is not None]
        if self._cache is not None and not hasattr(self._cache, "batch_select_indices"):
            self._batch = [row if i in kept else None for i, row in enumerate(self._batch)]
            return
        self._batch = [self._batch[i] for i in kept]
        if not kept:
            return
        index = self._torch.tensor(kept, device=self._model.device)
        self._input, self._mask = self._input[index], self._mask[index]
        if self._cache is not None:
            self._cache.batch_select_indices(index)

    def _advance(self, row: Row, logits: np.ndarray, ended: list[Row]) -> int:
        """Take the token that was sampled: show it, or end the request."""
        before = logits.copy() if row.sampler.tells else None
        token = row.sampler.sample(logits)
        row.first = row.first or time.monotonic()
        if token in row.ends:
            self._end(row, "STOP", self._rest(row), {}, ended)
            return token
        row.made += 1
        row.ids.append(token)
        told = {} if before is None else self._told(row, before, token)
        delta = row.text.push(self._piece(row).encode())
        if row.text.stopped:
            self._end(row, "STOP", delta, told, ended)
        elif row.made >= row.max_tokens:
            self._end(row, "LENGTH", delta + self._rest(row), told, ended)
        elif delta or told:
            self._emit({"id": row.id, "delta": delta, **told})
        return token

    def _end(
        self, row: Row, reason: str, delta: str, told: dict[str, Any], ended: list[Row]
    ) -> None:
        self._emit(row.last_event(reason, delta, told))
        ended.append(row)

    def _piece(self, row: Row, *, rest: bool = False) -> str:
        """The text of the tokens that are not shown yet, once it is whole characters."""
        start = max(0, row.shown - _BEFORE)
        before = self._text(row.ids[start : row.shown])
        text = self._text(row.ids[start:])
        if len(text) <= len(before) or (text.endswith("�") and not rest):
            return ""
        row.shown = len(row.ids)
        return text[len(before) :]

    def _rest(self, row: Row) -> str:
        """What was held back until more tokens came, when none come."""
        return row.text.push(self._piece(row, rest=True).encode())

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _told(self, row: Row, logits: np.ndarray, token: int) -> dict[str, Any]:
        found = row.sampler.logprobs(logits, token)
        if found is None:
            return {}

        def entry(token: int, logprob: float) -> list[Any]:
            return [token, self._text([token]).encode().decode("latin-1"), logprob]

        top = [entry(*item) for item in found.top]
        return {"logprobs": [[*entry(token, found.chosen), top]]}
