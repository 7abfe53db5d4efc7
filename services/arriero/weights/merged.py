"""Base plus adapters, as if the merged checkpoint already lay on disk.

Responsibility: say from headers alone which tensors the merged model has, and
compute each of them, whole or in blocks of rows. Does not write anything, nor
judge what comes out. torch is imported only where a value is asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition
from arriero.weights.config import CONV1D_TYPES, is_tied, read_config
from arriero.weights.layout import DTYPES, TORCH_NAMES, TensorInfo, TensorPlan, dtype_name
from arriero.weights.lora import LoraAdapter
from arriero.weights.reader import Weights
from arriero.weights.roundtrip import Packing, RoundTrip
from arriero.weights.terms import BLOCK, Room, Term, cut, sum_rows

if TYPE_CHECKING:
    import torch

__all__ = ["HEAD", "Blend", "MergedWeights", "Part", "embeddings_of"]

# The output layer, by the name that all supported architectures give it.
HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens", "wte")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Blend:
    """An adapter and its weight in the merge."""

    adapter: LoraAdapter
    weight: float


def embeddings_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name of the token embeddings among a base's tensors."""
    endings = tuple(f"{part}.weight" for part in _EMBEDDINGS)
    return next((name for name in tensors if name.endswith(endings)), None)


class MergedWeights(Mapping[str, TensorPlan]):
    """Name -> `TensorPlan` of the merged checkpoint, in the base's order, and its values.

    The value of a tensor is, in float32 and rounded once to the output type, what
    PEFT's `merge_and_unload` makes: base + sum of weight · scale · B·A, scaled
    to DoRA's magnitude where there is one. A tensor that adapters bring whole is
    base + sum of weight · (theirs - base), so theirs where its weight is 1. A
    weight scales DoRA's B·A, not its magnitude, as PEFT's own scaling does.

    Attributes:
        base: the base's tensors.
        blends: adapters with their weights, in order.
        config: `config.json` of the merged model.
        untied: the base's output layer was tied to its embeddings and is no more.
    """

    def __init__(
        self, base: Weights, blends: Sequence[Blend], config: Mapping[str, Any], dtype: str = "auto"
    ) -> None:
        """Plan; see `open` for what is refused."""
        self.base = base
        self.blends = tuple(blends)
        self._embeddings = embeddings_of(base)
        tied = self._embeddings is not None and (is_tied(config) or HEAD not in base)
        parts = [_part(blend, self._embeddings if tied else None) for blend in self.blends]
        self.untied = tied and any(_unties(part, base, str(self._embeddings)) for part in parts)
        self._sources = {name: name for name in base}
        if tied:
            # A stored output layer that is tied is not the one that is used.
            self._sources.pop(HEAD, None)
        if self.untied:
            self._sources[HEAD] = str(self._embeddings)
        self._parts: dict[str, list[Part]] = {}
        for part in parts:
            for name in part.touched:
                if name != HEAD or not tied or self.untied:
                    self._parts.setdefault(name, []).append(part)
        self._check()
        target = None if dtype == "auto" else dtype_name(dtype)
        self._plans = {name: self._planned(name, target) for name in self._sources}
        self._check_shapes()
        self.config = self._configured(config)
        # What is worked on and its memory, of each thread.
        self._local = threading.local()

    @classmethod
    def open(
        cls,
        base: Path,
        adapters: Sequence[Path],
        weights: Sequence[float],
        dtype: str = "auto",
        packing: Packing | None = None,
    ) -> MergedWeights:
        """Open everything and see from the headers that it fits together.

        Args:
            base: a model's directory.
            adapters: PEFT directories.
            weights: one for each adapter.
            dtype: `auto`, or torch's word for the type of all floating point weights.
            packing: fold into what this quantization leaves of the base's weights.

        Raises:
            FailedPrecondition: a quantized base, an unsupported adapter, or one that
                does not fit the base; with figures.
            DataLoss: damaged files.
        """
        config = read_config(base)
        if config.get("quantization_config"):
            raise FailedPrecondition(
                "the base is quantized; merge into the model that it was made from"
            )
        transposed = config.get("model_type") in CONV1D_TYPES
        blends = [
            Blend(LoraAdapter.open(directory, transposed=transposed), weight)
            for directory, weight in zip(adapters, weights, strict=True)
        ]
        tensors = Weights.open(base) if packing is None else RoundTrip.of(base, packing)
        return cls(tensors, blends, config, dtype)

    def __getitem__(self, name: str) -> TensorPlan:
        """Type and shape of a merged tensor."""
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the base's order; an output layer that was untied comes last."""
        return iter(self._plans)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._plans)

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights."""
        return sum(plan.nbytes for plan in self._plans.values())

    @property
    def elements(self) -> int:
        """Numbers in all merged tensors together."""
        return sum(math.prod(plan.shape) for plan in self._plans.values())

    @property
    def touched(self) -> list[str]:
        """Names of the tensors that an adapter changes, in order."""
        return [name for name in self._plans if name in self._parts]

    def source(self, name: str) -> str:
        """The base's tensor that a merged one is made of (its own, but where untied)."""
        return self._sources[name]

    def parts(self, name: str) -> Sequence[Part]:
        """The adapters that change a merged tensor, in order."""
        return self._parts.get(name, ())

    def raw(self, name: str) -> memoryview | None:
        """The bytes of a tensor that is the base's as it is; None where it is computed."""
        info = self.base[self._sources[name]]
        plan = self._plans[name]
        if name in self._parts or info.dtype != plan.dtype or info.name in self.base.altered:
            return None
        return self.base.raw(info.name)

    def dtype(self, name: str) -> torch.dtype:
        """torch's word for the type that a merged tensor has."""
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self._plans[name].dtype])
        return dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A merged tensor as a whole, in its output type."""
        return (
            self.rows(name, 0, self._plans[name].shape[0])
            if self._plans[name].shape
            else (self.base.tensor(self._sources[name]).to(self.dtype(name)))
        )

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a merged tensor, in its output type."""
        import torch

        shape = (stop - start, *self._plans[name].shape[1:])
        rows = torch.empty(shape, dtype=self.dtype(name))
        self.fill(name, start, rows)
        return rows

    def blocks(self, name: str, nbytes: int) -> Iterator[tuple[int, int]]:
        """Cut a merged tensor into blocks of rows: [first, last).

        Args:
            name: of the tensor.
            nbytes: of the output type per block, at most; one row at least.
        """
        plan = self._plans[name]
        return cut(plan.shape[0], nbytes * plan.shape[0] // max(1, 2 * plan.nbytes))

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Compute as many rows as `out` has, from `start` on, rounded to its type.

        Threads may do so side by side.
        """
        local = self._local
        if getattr(local, "name", None) != name:
            local.name = None
            local.base = self.base.tensor(self._sources[name])
            local.terms = self._terms(name, local.base)
            local.room = getattr(local, "room", None) or Room()
            local.name = name
        base, terms = local.base, local.terms
        rows = out.shape[0]
        if not terms:
            out.copy_(base[start : start + rows])
            return
        for first, last in cut(rows, BLOCK * rows // (4 * out.numel() or 1)):
            sum_rows(base, terms, start + first, out[first:last], local.room)

    def _terms(self, name: str, base: torch.Tensor) -> list[Term]:
        """What is summed up for a tensor, with the adapters' values at hand."""
        terms = []
        for part in self._parts.get(name, ()):
            whole, pair = part.replaced.get(name), part.adapter.pairs.get(name)
            term = Term(part.weight, base if whole is None else part.adapter.tensor(whole))
            if pair is not None:
                magnitude = part.adapter.tensor(pair.magnitude) if pair.magnitude else None
                rounded = DTYPES[self._plans[name].dtype] < DTYPES["F32"]
                term.add_pair(pair, part.adapter.factors(pair), magnitude, rounded=rounded)
            terms.append(term)
        return terms

    def _planned(self, name: str, dtype: str | None) -> TensorPlan:
        info = self.base[self._sources[name]]
        plan = TensorPlan(name, info.dtype, info.shape)
        for part in self._parts.get(name, ()):
            if (whole := part.replaced.get(name)) and whole.shape != info.shape:
                plan = replace(plan, shape=whole.shape)
        return replace(plan, dtype=dtype) if dtype and info.dtype in _FLOATS else plan

    def _configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        merged = dict(config)
        if self.untied:
            merged["tie_word_embeddings"] = False
        if self._embeddings:
            rows = self._plans[self._embeddings].shape[0]
            if rows != self.base[self._embeddings].shape[0]:
                merged["vocab_size"] = rows
        changed = {
            TORCH_NAMES[plan.dtype]
            for name, plan in self._plans.items()
            if plan.dtype != self.base[self._sources[name]].dtype
        }
        if changed:
            # `torch_dtype` until transformers 4, `dtype` since; loaders of both read the file.
            for key in [key for key in ("dtype", "torch_dtype") if key in merged] or [
                "torch_dtype"
            ]:
                merged[key] = next(iter(changed))
        return merged

    # --- what does not fit ------------------------------------------------------------

    def _check(self) -> None:
        """Every tensor that an adapter changes is there, and has a type that can be summed."""
        for blend in self.blends:
            adapter = blend.adapter
            absent = [
                name
                for name in sorted(adapter.touched)
                if name not in self._sources and not (name == HEAD and self._embeddings)
            ]
            if absent:
                raise FailedPrecondition(
                    f"the adapter changes {len(absent)} of {len(adapter.touched)} modules that "
                    f"the base does not have, such as {_some(absent)}; merge it into the model "
                    "that it was trained on"
                )
        packed = [
            f"{name} ({self.base[self._sources[name]].dtype})"
            for name in self._parts
            if self.base[self._sources[name]].dtype not in _FLOATS
        ]
        if packed:
            raise FailedPrecondition(
                f"{len(packed)} weights of the base are not {', '.join(_FLOATS)}, such as "
                f"{_some(packed)}; merge into the model that is not quantized"
            )

    def _check_shapes(self) -> None:
        for part in {id(p): p for parts in self._parts.values() for p in parts}.values():
            wrong = []
            for name in part.touched & self._plans.keys():
                base = self.base[self._sources[name]].shape
                whole, pair = part.replaced.get(name), part.adapter.pairs.get(name)
                if whole is not None and not self._may_replace(name, whole.shape, base):
                    wrong.append(f"{name}: base {base}, adapter {whole.shape}")
                elif pair is not None and pair.shape != self._plans[name].shape:
                    wrong.append(
                        f"{pair.module}: base {self._plans[name].shape}, adapter {pair.shape}"
                    )
            if wrong:
                raise FailedPrecondition(
                    f"{len(wrong)} of {len(part.touched)} modules have other shapes than the "
                    f"base, such as {_some(sorted(wrong))}; merge it into the model that it was "
                    "trained on"
                )
        for name, parts in self._parts.items():
            rows = self._plans[name].shape
            if rows == self.base[self._sources[name]].shape:
                continue
            if any(name not in p.replaced or p.weight != 1.0 for p in parts) or len(parts) > 1:
                raise FailedPrecondition(
                    f"{name} is resized to {rows[0]} rows by one adapter and changed by "
                    f"{len(parts)}; a vocabulary can be resized by one adapter of weight 1 "
                    "alone: merge that one first, and the others into its model"
                )
        if self._embeddings and HEAD in self._plans:
            above, below = self._plans[self._embeddings].shape[0], self._plans[HEAD].shape[0]
            if above != below:
                raise FailedPrecondition(
                    f"the merged model would have {above} rows of embeddings and {below} of the "
                    "output layer; the adapter resized the vocabulary and did not save both: "
                    "save it with save_embedding_layers=True, or with both in modules_to_save"
                )

    def _may_replace(self, name: str, ours: tuple[int, ...], base: tuple[int, ...]) -> bool:
        if name in (HEAD, self._embeddings):
            return len(ours) == len(base) and ours[1:] == base[1:]
        return ours == base


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter in the merge.

    Attributes:
        adapter: its LoRA and its values.
        weight: its factor.
        replaced: what it brings whole, by the base tensor's name.
    """

    adapter: LoraAdapter
    weight: float
    replaced: Mapping[str, TensorInfo]

    @property
    def touched(self) -> set[str]:
        """Names of the base's tensors that it changes."""
        return {*self.adapter.pairs, *self.replaced}


def _part(blend: Blend, embeddings: str | None) -> Part:
    """With what was saved of tied embeddings standing for the output layer too."""
    adapter = blend.adapter
    replaced = {name: whole.info for name, whole in adapter.replaced.items()}
    if embeddings is not None:
        for name, other in ((embeddings, HEAD), (HEAD, embeddings)):
            whole = adapter.replaced.get(name)
            if whole is not None and not whole.trained and other not in replaced:
                replaced[other] = whole.info
    return Part(adapter, blend.weight, replaced)


def _unties(part: Part, base: Weights, embeddings: str) -> bool:
    """Whether an adapter tells apart embeddings and output layer that were one."""
    adapter = part.adapter
    if adapter.settings.keeps_tied:
        return False
    if any(name in adapter.pairs for name in (embeddings, HEAD)):
        return True
    if any(w.trained for n, w in adapter.replaced.items() if n in (embeddings, HEAD)):
        return True
    ours, theirs = part.replaced.get(embeddings), part.replaced.get(HEAD)
    return ours is not None and theirs is not None and not adapter.same(ours, theirs)


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:_SHOWN])
