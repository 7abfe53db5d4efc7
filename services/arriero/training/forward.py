"""From a micro batch to its loss.

Responsibility: run a causal language model over samples that lie one after the
other, and take the loss where tokens are trained on. Does not know optimizers,
nor how many micro batches make a step.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from arriero.training import attention, blocks, fused
from arriero.training.adapter import core
from arriero.training.loss import token_loss
from arriero.training.neftune import with_noise
from arriero.training.numerics import Numerics
from arriero.training.rows import MicroBatch

__all__ = ["Forward"]

_log = logging.getLogger("arriero.job.train")


class Forward(nn.Module):  # type: ignore[misc]
    """A model with its loss; called with a micro batch.

    Samples see nothing of each other, no token is padding, and logits are made
    only where a label is. A model whose attention cannot be told about samples
    runs them one by one, with the same result.

    Args:
        model: causal language model, with or without PEFT around it.
        numerics: where it is, and in what it computes.
        noise: NEFTune's alpha; 0 means none.
    """

    def __init__(self, model: Any, numerics: Numerics, noise: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self._numerics, self._noise = numerics, noise
        base = core(model)
        # Whether one call takes all samples.
        self.packs = _takes_samples(base)
        if self.packs:
            base.set_attn_implementation(attention.register())
        else:
            _log.warning(
                "%s cannot be told where samples end: they run one by one, which is slower",
                type(base).__name__,
            )
        # What of the model runs through functions of this project.
        self.path = "samples one after the other" if self.packs else "sample by sample"
        layers = fused.install(model)
        halves = blocks.install(model) if self.packs else 0
        self.path += f", {layers} norms and LoRA layers and {halves} halves of blocks fused"
        # Whether several threads may call it at once.
        self.concurrent = (
            numerics.device == "cpu" and self.packs and not noise and _keeps_no_state(model)
        )
        self._chooses_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._plain_head = _has_plain_head(base, numerics)

    def layers(self) -> list[nn.Module]:
        """The blocks that transformers says stay in one piece when a model is spread."""
        base = core(self.model)
        names = set(getattr(base, "_no_split_modules", None) or ())
        return [module for module in base.modules() if type(module).__name__ in names]

    def forward(self, micro: MicroBatch) -> torch.Tensor:
        """Sum of -log p over the trained tokens, float32, nats."""
        ids, places, wanted, labels = (
            _sent(item, self._numerics.device)
            for item in (micro.input_ids, micro.position_ids, micro.positions, micro.labels)
        )
        if self.packs:
            return self._loss(ids, places, wanted, labels, micro.lengths)
        parts, begin = [], 0
        for length in micro.lengths:
            end = begin + length
            inside = (wanted >= begin) & (wanted < end)
            span = (ids[:, begin:end], places[:, begin:end], wanted[inside] - begin)
            parts.append(self._loss(*span, labels[inside], (length,)))
            begin = end
        return torch.stack(parts).sum()

    def _loss(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        wanted: torch.Tensor,
        labels: torch.Tensor,
        lengths: tuple[int, ...],
    ) -> torch.Tensor:
        base = core(self.model)
        given: dict[str, Any] = {"input_ids": ids, "position_ids": places, "use_cache": False}
        if self.packs:
            given["sample_lengths"] = lengths
        if self._noise and self.training:
            embedded = base.get_input_embeddings()(given.pop("input_ids"))
            given["inputs_embeds"] = with_noise(embedded, lengths, self._noise)
        if self._plain_head:
            with self._numerics.autocast():
                hidden = base.base_model(**given).last_hidden_state[0, wanted]
            head = base.get_output_embeddings().weight
            return token_loss(hidden, head, labels, self._numerics.dtype)
        if self._chooses_logits:
            given["logits_to_keep"] = wanted
        with self._numerics.autocast():
            logits = base(**given).logits[0]
        if not self._chooses_logits:
            logits = logits[wanted]
        return functional.cross_entropy(logits.float(), labels, reduction="sum")


def _sent(item: torch.Tensor, device: str) -> torch.Tensor:
    """An item on the device; a GPU still has the micro batch before it to do."""
    return item if device == "cpu" else item.pin_memory().to(device, non_blocking=True)


def _takes_samples(base: Any) -> bool:
    """Whether the model calls attention by name, and asks nothing of it that ours has not."""
    capped = getattr(base.config, "attn_logit_softcapping", None) is not None
    return bool(getattr(base, "_supports_attention_backend", False)) and not capped


def _keeps_no_state(model: Any) -> bool:
    """Whether a forward pass changes and draws nothing that other threads would see.

    Dropout and adapters do unless they are this project's; so do angles that follow
    from the longest sample, and weights that are gathered or computed again.
    """
    base = core(model)
    rope = getattr(base.config, "rope_parameters", None) or {}
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return False
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return False
    if any(getattr(base.config, name, 0.0) for name in ("attention_dropout", "resid_pdrop")):
        return False
    ours = [m for m in model.modules() if isinstance(m, LoraLayer) and fused.is_fused(m)]
    inside = {id(part) for module in ours for part in module.modules()}
    others = (module for module in model.modules() if id(module) not in inside)
    return not any(isinstance(module, nn.Dropout | LoraLayer) for module in others)


def _has_plain_head(base: Any, numerics: Numerics) -> bool:
    """Whether logits are a product of hidden states and the head's weight, and nothing else.

    Some models scale or cap their logits, or have an adapter on the head: tried
    with a few tokens instead of listing which.
    """
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    ids = torch.arange(min(4, head.weight.shape[0]), device=head.weight.device)[None]
    states: list[torch.Tensor] = []
    hook = base.base_model.register_forward_hook(
        lambda _module, _inputs, output: states.append(output.last_hidden_state)
    )
    training = base.training
    base.train()  # bitsandbytes packs weights for good when it is asked without
    # A model that is going to be spread is not on its device yet.
    here = Numerics(head.weight.device.type, numerics.dtype)
    with torch.no_grad(), here.autocast():
        expected = base(input_ids=ids, use_cache=False).logits.float()
        found = functional.linear(states[0], head.weight).float()
    base.train(training)
    hook.remove()
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3))
