"""Logits of a model that is never in memory as a whole: the second opinion about a merge.

Responsibility: run a causal language model over fixed tokens in float32, one
layer's rows at a time from mapped files, and make golden logits of base and
adapters by adding the adapters' activations. Shares no arithmetic with `fold`;
does not know how a verdict follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.gates.golden import TOKENS, Golden, compare, log_softmax, probe_sequences
from arriero.weights.arithmetic import delta
from arriero.weights.config import read_config
from arriero.weights.expected import expected_rows
from arriero.weights.merged import MergedWeights
from arriero.weights.reader import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["PROBE_TEXT", "foreign_base", "golden_of", "logits_of", "logits_of_merge", "probe_ids"]

Sequences = Sequence[npt.NDArray[np.int32] | list[int]]

# Plain prose in two languages, digits and code: several kinds of tokens. Part of
# every golden report that a merge makes, so a change raises the room's semantics.
PROBE_TEXT: tuple[str, ...] = (
    "A driver leads a train of pack llamas over the pass before the first snow. Each animal "
    "carries about twenty-five kilograms of wool, salt and maize, and rests when it is tired. "
    "At noon they stop beside the river, where the water is cold and clear, and count the loads.",
    "Question: How many loads reach the market if 12 llamas carry 3 loads each and 2 loads are "
    "sold on the way? Answer: 12 * 3 - 2 = 34, so thirty-four loads reach the market.",
    "def total(loads):\n    return sum(load.weight for load in loads if not load.sold)\n",
    "山路很长，赶驼人走在最后。他每天写下天气、货物和走过的路。",
    "The model answers the question, then it stops. Nothing else is written after the last line "
    "of the report, because every figure in it was measured before the work was handed on.",
)
# Mean KL divergence in nats per token: what rounding to 16 bits costs, at most.
MAX_FOREIGN_KL = 5e-3
# float32 bytes of a layer's rows that are in memory at once.
_BLOCK = 1 << 25


def probe_ids(model: Path) -> list[list[int]]:
    """The built-in text in a model's own tokens: 256 ids in all.

    A model without a tokenizer gets ids drawn with a fixed seed instead.
    """
    from transformers import AutoConfig, AutoTokenizer

    if (model / "tokenizer.json").is_file() or (model / "tokenizer.model").is_file():
        tokenizer = AutoTokenizer.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=False
        )
        rows = [tokenizer(text)["input_ids"] for text in PROBE_TEXT]
        while sum(map(len, rows)) < TOKENS:  # a tokenizer of whole words
            rows += rows
        return probe_sequences(rows)
    size = AutoConfig.from_pretrained(str(model), local_files_only=True).vocab_size
    drawn = np.random.default_rng(0).integers(0, size, (2, TOKENS // 2))
    return [[int(i) for i in row] for row in drawn]


def logits_of(model: Path, sequences: Sequences) -> npt.NDArray[np.float32]:
    """A saved model's logits, computed in float32 whatever type it is saved in.

    Args:
        model: a Hugging Face directory.
        sequences: token ids; each is run alone, from position 0.

    Returns:
        float32, shape (ids of all sequences, vocabulary).

    Raises:
        FailedPrecondition: transformers does not know the architecture.
    """
    return _run(read_config(model), _Stored(Weights.open(model)), sequences)


def logits_of_merge(merged: MergedWeights, sequences: Sequences) -> npt.NDArray[np.float32]:
    """The logits that a merge will have, before it is written; as `logits_of`."""
    return _run(merged.config, _Planned(merged), sequences)


def golden_of(merged: MergedWeights, sequences: Sequences) -> Golden:
    """Golden logits of base and adapters as they are before a merge, in float32.

    Nothing is rounded to the type of the merged weights: what that costs is part of
    what a merge is judged by.
    """
    logits = _run(merged.config, _Adapted(merged), sequences)
    return Golden(
        tokens=np.array([i for ids in sequences for i in ids], dtype=np.int32),
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logprobs=np.stack([log_softmax(row[None])[0].astype(np.float16) for row in logits]),
    )


def foreign_base(merged: MergedWeights, golden: Golden) -> str:
    """Why an adapter was not trained on this base; empty when it was, or on its equal.

    Args:
        merged: the base and the one adapter, with weight 1; nothing is merged for this.
        golden: that came with the adapter.
    """
    try:
        logits = _run(merged.config, _Adapted(merged), golden.sequences)
        found = compare(golden, logits)
    except FailedPrecondition as error:
        return f"{error.message}; merge it into the model that it was trained on"
    if found.kl_divergence <= MAX_FOREIGN_KL:  # NaN is not
        return ""
    return (
        f"on this base it is {found.kl_divergence:.2e} nats per token away from the golden logits "
        f"that came with it, expected at most {MAX_FOREIGN_KL:g}: it was trained on another model; "
        "merge it into that one"
    )


class _Values(Protocol):
    """Where a model's values come from, by the tensor's name in the checkpoint."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x times the transpose of a weight of shape (out, in)."""
        ...

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table, float32."""
        ...

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor, float32."""
        ...


class _Stored:
    """A checkpoint as it lies on disk."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def has(self, name: str) -> bool:
        return name in self.weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights.tensor(name)
        y = x.new_empty((x.shape[0], weight.shape[0]))
        for rows in _slices(weight):
            y[:, rows] = x @ weight[rows].float().T
        return y

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.weights.tensor(name)[ids].float()

    def whole(self, name: str) -> torch.Tensor:
        return self.weights.tensor(name).float()


class _Planned:
    """A merged checkpoint that is not written yet, rounded as it will be."""

    def __init__(self, merged: MergedWeights) -> None:
        self.merged = merged

    def has(self, name: str) -> bool:
        return name in self.merged

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        plan = self.merged[name]
        y = x.new_empty((x.shape[0], plan.shape[0]))
        for start, stop in self.merged.blocks(name, _BLOCK):
            y[:, start:stop] = x @ self.merged.rows(name, start, stop).float().T
        return y

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.merged.tensor(name)[ids].float()

    def whole(self, name: str) -> torch.Tensor:
        return self.merged.tensor(name).float()


class _Adapted:
    """A base with adapters beside it, as they are while they are trained."""

    def __init__(self, merged: MergedWeights) -> None:
        self.merged = merged

    def has(self, name: str) -> bool:
        return name in self.merged

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        base = self.merged.base.tensor(self.merged.source(name))
        parts = self.merged.parts(name)
        y = x.new_empty((x.shape[0], self.merged[name].shape[0]))
        low = {}  # x A^T: what the adapter's first matrix makes of the input
        for number, part in enumerate(parts):
            if (pair := part.adapter.pairs.get(name)) is not None:
                low[number] = x @ part.adapter.tensor(pair.a).float().T
        for rows in _slices(y.T):
            some = x @ base[rows].float().T if base.shape[0] == y.shape[1] else None
            for number, part in enumerate(parts):
                whole, pair = part.replaced.get(name), part.adapter.pairs.get(name)
                own = base if whole is None else part.adapter.tensor(whole)
                if whole is not None:
                    theirs = x @ own[rows].float().T
                    if some is None:
                        some = theirs
                    else:  # of what the base alone makes, as much as the weight leaves
                        some += part.weight * (theirs - x @ base[rows].float().T)
                if pair is None:
                    continue
                b = part.adapter.tensor(pair.b)[rows].float()
                scale = pair.scale * part.weight
                assert some is not None
                some += scale * (low[number] @ b.T)
                if pair.magnitude is not None:
                    direction = own[rows].float() + delta(b, part.adapter.tensor(pair.a), scale)
                    magnitude = part.adapter.tensor(pair.magnitude)[rows].float()
                    some *= magnitude / torch.linalg.vector_norm(direction, dim=1)
            assert some is not None
            y[:, rows] = some
        return y

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        base = self.merged.base.tensor(self.merged.source(name))
        if not self.merged.parts(name):
            return base[ids].float()
        return expected_rows(self.merged, name, base, ids)[0].float()

    def whole(self, name: str) -> torch.Tensor:
        return self.merged.tensor(name).float()


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of a matrix, as many at once as `_BLOCK` holds in float32."""
    step = max(1, _BLOCK // (4 * weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _run(config: dict[str, Any], values: _Values, sequences: Sequences) -> npt.NDArray[np.float32]:
    import torch

    model = _hollow(config, values)
    rows: list[npt.NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(sequences)
    # Not inference_mode: what computes merged rows keeps its memory for later.
    with torch.no_grad():
        for group in _groups([len(ids) for ids in sequences]):
            longest = max(len(sequences[i]) for i in group)
            batch = torch.zeros((len(group), longest), dtype=torch.long)
            for row, i in enumerate(group):
                batch[row, : len(sequences[i])] = torch.tensor([int(t) for t in sequences[i]])
            # What pads comes last, and no token looks at those after it.
            logits = model(input_ids=batch, use_cache=False).logits
            for row, i in enumerate(group):
                rows[i] = logits[row, : len(sequences[i])].float().numpy()
    result: npt.NDArray[np.float32] = np.concatenate(rows)
    return result


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences that are run at once: all weights are read for each group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 2 * lengths[i] >= lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _hollow(config: dict[str, Any], values: _Values) -> Any:
    """A model whose large weights stay on disk and are read as they are used.

    Raises:
        FailedPrecondition: transformers does not know the architecture, or it has
            weights that the checkpoint lacks.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        what = f"it does not know {error}" if isinstance(error, KeyError) else str(error).strip()
        raise FailedPrecondition(
            "transformers cannot make the model that config.json describes: "
            f"{what.splitlines()[0]}; mend config.json, or skip the gates that run the model: "
            "gates: {merge.logits: skip}"
        ) from error
    output = model.get_output_embeddings()
    embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    for path, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{leaf}"
            if module is output and leaf == "weight" and not values.has(name):
                name = f"{embeddings}.{leaf}"  # tied
            if not values.has(name):
                raise FailedPrecondition(f"the checkpoint lacks {name}, which its model needs")
            if parameter.dim() < 2:
                setattr(module, leaf, torch.nn.Parameter(values.whole(name), requires_grad=False))
            else:
                _stream(module, leaf, name, values)
    return model.eval()


def _stream(module: Any, leaf: str, name: str, values: _Values) -> None:
    """Have a module read its weight when it runs."""
    import torch

    if isinstance(module, torch.nn.Linear):

        def linear(x: torch.Tensor) -> torch.Tensor:
            y = values.linear(name, x.reshape(-1, x.shape[-1]))
            if module.bias is not None:
                y += module.bias
            return y.view(*x.shape[:-1], -1)

        module.forward = linear
    elif isinstance(module, torch.nn.Embedding):
        module.forward = lambda ids: values.embed(name, ids.reshape(-1)).view(*ids.shape, -1)
    else:
        hollow = module._parameters[leaf]

        def fill(*_: object) -> None:
            module._parameters[leaf] = torch.nn.Parameter(values.whole(name), requires_grad=False)

        def empty(*_: object) -> None:
            module._parameters[leaf] = hollow

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
