"""GGUF adapters as files: found in an artifact, and whether they fit a model's file.

Responsibility: say before anything is loaded why an adapter cannot be served, or
not on this model. Does not know what loads them, nor llama.cpp itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from arriero.errors import FailedPrecondition
from arriero.llama.header import Header

# What quantization writes into files: the model that an adapter was trained on or that
# a file was made from, and the adapters that are in it.
_SOURCE, _ADAPTERS = "arriero.source", "arriero.adapters"
_PEFT_CONFIG = "adapter_config.json"
_CONVERT = "make a GGUF adapter of it: quantize with adapter_only"
_MERGE = "merge it instead (a stage merge, or quantize without adapter_only)"
_SIDES = (".lora_a", ".lora_b")


def adapter_path(directory: Path, name: str) -> Path:
    """The GGUF file of an adapter artifact.

    Raises:
        FailedPrecondition: there is none, with what to do.
    """
    found = sorted(directory.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    what = f"adapter {name} has {len(found)} GGUF files, expected one; {_CONVERT}"
    config = directory / _PEFT_CONFIG
    if not found and config.is_file():
        what = f"adapter {name} is as PEFT saves it; {_CONVERT}"
        try:
            peft = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            peft = {}
        if peft.get("use_dora"):
            what = f"adapter {name} is DoRA, whose magnitudes GGUF adapters cannot carry; {_MERGE}"
        elif peft.get("modules_to_save"):
            names = ", ".join(peft["modules_to_save"])
            what = (
                f"adapter {name} brings whole tensors ({names}), which GGUF adapters cannot "
                f"carry; {_MERGE}"
            )
    raise FailedPrecondition(what, reason="NO_GGUF_ADAPTER")


def check_fit(name: str, adapter: Header, model: Header) -> None:
    """Refuse an adapter that was made for another model, as far as the headers say.

    Args:
        name: of the adapter, for the error.
        adapter: of its GGUF file.
        model: of the model's.

    Raises:
        FailedPrecondition: no LoRA adapter, of another model, or in the file already.
    """
    kind = adapter.metadata.get("adapter.type", adapter.metadata.get("general.type", "unknown"))
    if kind != "lora":
        raise FailedPrecondition(
            f"{name} is no LoRA adapter but a GGUF file of type {kind}; {_CONVERT}",
            reason="NO_GGUF_ADAPTER",
        )
    theirs, ours = adapter.metadata.get(_SOURCE), model.metadata.get(_SOURCE)
    if theirs and ours and theirs != ours:
        raise FailedPrecondition(
            f"adapter {name} belongs to {theirs}, and this file was made from {ours}; serve it "
            "on its own base, or merge it",
            reason="OTHER_BASE",
        )
    inside = set(filter(None, str(model.metadata.get(_ADAPTERS, "")).split(",")))
    if already := inside.intersection(str(adapter.metadata.get(_ADAPTERS, "")).split(",")):
        raise FailedPrecondition(
            f"adapter {name} ({', '.join(sorted(already))}) is merged into this file already; "
            "serve a file that was made without it",
            reason="MERGED_ALREADY",
        )
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    for tensor in adapter.tensors:
        base, side = tensor.name[: -len(_SIDES[0])], tensor.name[-len(_SIDES[0]) :]
        if side not in _SIDES:
            continue
        # A is (in, rank) and B (rank, out), the fastest dimension first.
        at = _SIDES.index(side)
        expected, found = shapes.get(base, ())[at : at + 1], tensor.shape[at : at + 1]
        if expected != found:
            there = f"{base} is {shapes[base]}" if base in shapes else f"there is no {base}"
            raise FailedPrecondition(
                f"adapter {name} does not fit this model: {tensor.name} is {tensor.shape}, and "
                f"{there}; serve it on its own base",
                reason="OTHER_BASE",
            )
