"""Logits from transformers and PEFT: the second opinion about a merge.

Responsibility: run a model in float32 over fixed tokens, and make golden logits
of base and adapters by PEFT's own merge. Shares no arithmetic with `fold`; does
not know how a verdict follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.gates.golden import TOKENS, Golden, log_softmax, probe_sequences

if TYPE_CHECKING:
    import torch

__all__ = ["PROBE_TEXT", "golden_of_peft", "logits_of", "probe_ids"]

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


def logits_of(
    model: Path, sequences: Sequence[npt.NDArray[np.int32] | list[int]]
) -> npt.NDArray[np.float32]:
    """A saved model's logits, computed in float32 whatever type it is saved in.

    Args:
        model: a Hugging Face directory.
        sequences: token ids; each is run alone, from position 0.

    Returns:
        float32, shape (ids of all sequences, vocabulary).
    """
    return _run(_load(model), sequences)


def golden_of_peft(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    sequences: Sequence[list[int]],
    dtypes: dict[str, torch.dtype],
) -> Golden:
    """Golden logits of base and adapters, merged by PEFT in float32.

    The merged weights are rounded to the type that the merged checkpoint keeps,
    so that rounding is on both sides of the comparison.

    Args:
        base: the base model's directory.
        adapters: PEFT directories.
        weights: one for each adapter.
        sequences: token ids.
        dtypes: type of each merged tensor by its name in the checkpoint.
    """
    import torch

    model = _merged_by_peft(base, adapters, weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.copy_(parameter.to(dtypes[name]).to(parameter.dtype))
    logits = _run(model, sequences)
    rows = [log_softmax(row[None])[0].astype(np.float16) for row in logits]
    return Golden(
        tokens=np.array([i for ids in sequences for i in ids], dtype=np.int32),
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logprobs=np.stack(rows),
    )


def _merged_by_peft(base: Path, adapters: Sequence[Path], weights: Sequence[float]) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"adapter_{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(_load(base), str(adapters[0]), adapter_name=names[0])
    for name, directory in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(directory), adapter_name=name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return model.merge_and_unload(adapter_names=names)


def _load(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, KeyError) as error:
        raise FailedPrecondition(
            f"transformers cannot load the model: {str(error).strip().splitlines()[0]}"
        ) from error
    return loaded.eval()


def _run(
    model: Any, sequences: Sequence[npt.NDArray[np.int32] | list[int]]
) -> npt.NDArray[np.float32]:
    import torch

    rows = []
    with torch.inference_mode():
        for ids in sequences:
            batch = torch.tensor([[int(i) for i in ids]], dtype=torch.long)
            rows.append(model(input_ids=batch, use_cache=False).logits[0].float().numpy())
    result: npt.NDArray[np.float32] = np.concatenate(rows)
    return result
