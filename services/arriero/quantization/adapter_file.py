"""A LoRA adapter as a GGUF file, for swapping at run time.

Responsibility: say whether a file can carry an adapter, and have llama.cpp's
converter write it, with PEFT's scales. Does not know jobs or artifacts.

llama.cpp multiplies B·A by alpha / rank, with one alpha for the whole file and each
tensor's own rank, and its converter writes `lora_alpha` whatever the adapter's
scale is. So the alpha that is written is the one that gives PEFT's scale; where
modules have different ones (`rank_pattern`, `alpha_pattern`), the difference goes
into their B.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from arriero.errors import FailedPrecondition
from arriero.quantization import converter
from arriero.weights import LoraAdapter, LoraPair, TensorPlan, WeightsWriter
from arriero.weights.adapter_config import CONFIG_FILE
from arriero.weights.config import is_tied, read_config

SCRIPT = "convert_lora_to_gguf.py"
# What the converter writes adapters in.
TYPES = ("F32", "F16", "BF16", "Q8_0")
_MERGE = "merge it instead: quantize without adapter_only, or a stage merge"
_SHOWN = 3


def obstacle(adapter: LoraAdapter, base: Path) -> str:
    """Why a GGUF file cannot carry an adapter, and what to do; empty when it can."""
    if adapter.settings.dora:
        return f"it is DoRA, whose magnitudes GGUF adapters have no place for; {_MERGE}"
    if adapter.replaced:
        names = ", ".join(sorted(adapter.replaced)[:_SHOWN])
        return (
            f"it brings whole tensors (modules_to_save or resized embeddings: {names}), and "
            f"GGUF adapters hold LoRA matrices alone; {_MERGE}"
        )
    for pair in adapter.pairs.values():
        if pair.embedding:
            return f"it changes the embeddings {pair.module}; {_MERGE}"
        if pair.module == "lm_head" and is_tied(read_config(base)):
            return f"it changes lm_head, which the base ties to its embeddings; {_MERGE}"
        if pair.transposed:
            return f"{pair.module} lies as (in, out) in the base; {_MERGE}"
    return ""


def convert(
    adapter: LoraAdapter,
    base: Path,
    target: Path,
    kind: str,
    *,
    name: str,
    scratch: Path,
    log: logging.Logger,
    check: Callable[[], None] | None = None,
) -> None:
    """Write an adapter as a GGUF file.

    Args:
        adapter: without an `obstacle`.
        base: directory of the model that it belongs to.
        target: file to write.
        kind: one of `TYPES`.
        name: of the adapter, for the file's metadata.
        scratch: directory for what lies between.
        log: gets the converter's warnings.
        check: called a few times a second; when it raises, the converter is killed.

    Raises:
        FailedPrecondition: an obstacle, or the converter's refusal.
        ResourceExhausted: the converter was killed.
    """
    if why := obstacle(adapter, base):
        raise FailedPrecondition(
            f"the adapter cannot become a GGUF adapter: {why}", reason="NO_GGUF_ADAPTER"
        )
    source = scratch / "adapter" / name
    if not source.is_dir():
        _write_plain(adapter, source)
    view = scratch / "base"
    if not view.is_dir():
        converter.prepare_view(base, view, None)
    words = scratch / "converter.log"
    command = [str(source), "--base", str(view), "--outfile", str(target), "--outtype"]
    child = converter.spawn([str(converter.locate() / SCRIPT), *command, kind.lower()], words)
    try:
        converter.wait(child, target, words, check=check)
    except Exception:
        converter.tell(words, log, whole=True)
        raise
    converter.tell(words, log, whole=False)


def _write_plain(adapter: LoraAdapter, directory: Path) -> None:
    """The adapter as the converter understands it: one alpha, names as PEFT saves them."""
    directory.mkdir(parents=True)
    pairs = list(adapter.pairs.values())
    alpha = pairs[0].scale * pairs[0].rank
    # An alpha of zero would mean a scale of one.
    if alpha == 0 or any(pair.scale == 0 for pair in pairs):
        raise FailedPrecondition(
            "the adapter's lora_alpha is 0, so it changes nothing", reason="NO_GGUF_ADAPTER"
        )
    (directory / CONFIG_FILE).write_text(
        json.dumps(
            {"peft_type": "LORA", "r": pairs[0].rank, "lora_alpha": alpha, "bias": "none"}, indent=2
        ),
        encoding="utf-8",
    )
    apart = {pair.module: pair.scale * pair.rank / alpha for pair in pairs}
    plan = []
    for pair in pairs:
        # A factor is folded in without rounding to the adapter's own type.
        kind = pair.b.dtype if apart[pair.module] == 1.0 else "F32"
        plan.append(TensorPlan(_name(pair, "A"), pair.a.dtype, pair.a.shape))
        plan.append(TensorPlan(_name(pair, "B"), kind, pair.b.shape))
    with WeightsWriter(directory, plan, metadata={"format": "pt"}, stem="adapter_model") as out:
        for pair in pairs:
            b = adapter.tensor(pair.b)
            if apart[pair.module] != 1.0:
                b = b.float() * apart[pair.module]
            out.write(_name(pair, "A"), adapter.tensor(pair.a))
            out.write(_name(pair, "B"), b)


def _name(pair: LoraPair, side: str) -> str:
    return f"base_model.model.{pair.module}.lora_{side}.weight"
