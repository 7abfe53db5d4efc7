"""A Hugging Face checkpoint in memory: its weights, its tokenizer, what they say.

Responsibility: load with transformers (bitsandbytes' types included), tokenize, and
evaluate sequences. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.cores import threads
from arriero.errors import FailedPrecondition, InvalidArgument, OutOfRange, ResourceExhausted
from arriero.prompts import Template
from arriero.replica import ReplicaSettings

# Context when the model's own is larger and none was asked for.
DEFAULT_CONTEXT = 4096
# What transformers raises for checkpoints that it cannot load.
_REFUSALS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError)
Values = npt.NDArray[np.float32]


class Checkpoint:
    """A causal language model of transformers, for evaluation.

    Code that lies in a checkpoint is never run, and weights are read from safetensors alone.

    Args:
        directory: as `save_pretrained` writes it.
        settings: of the replica; `gpu_layers` other than 0 puts it on a GPU where there is one.

    Raises:
        FailedPrecondition: transformers is not installed, or cannot load it.
        ResourceExhausted: no memory.
    """

    def __init__(self, directory: Path, settings: ReplicaSettings) -> None:
        try:
            import torch
            import transformers
            from safetensors import SafetensorError
        except ImportError as error:
            raise FailedPrecondition(
                f"the transformers backend needs torch and transformers ({error}); install "
                "arriero[transformers], or serve a gguf file"
            ) from error
        self._torch = torch
        torch.set_num_threads(threads(settings.threads, spare=1))
        gpu = settings.gpu_layers != 0 and torch.cuda.is_available()
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                device_map="cuda:0" if gpu else None,
            ).eval()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceExhausted(f"no memory for {directory.name}: {error}") from error
        except (SafetensorError, *_REFUSALS) as error:
            why = " ".join(str(error).split())[:500]
            raise FailedPrecondition(
                f"transformers cannot load this checkpoint: {why}; expected a causal language "
                "model in safetensors"
            ) from error
        config = self.model.config
        self.n_vocab = int(self.model.get_output_embeddings().weight.shape[0])
        trained = int(getattr(config, "max_position_embeddings", 0) or DEFAULT_CONTEXT)
        self.n_ctx = settings.context or min(trained, DEFAULT_CONTEXT)
        if self.n_ctx > trained:
            raise FailedPrecondition(
                f"a context of {self.n_ctx} tokens, and this checkpoint is for {trained}; ask for "
                "less, or convert it and serve it with rope scaling"
            )
        self.eog = self._ends()
        template = Template.read(directory)
        self.described = {
            "context_length": self.n_ctx,
            "slots": settings.slots,
            "vocab_size": self.n_vocab,
            "bos": self.tokenizer.bos_token or "",
            "eos": self.tokenizer.eos_token or "",
            "adds_bos": bool(getattr(self.tokenizer, "add_bos_token", False)),
            "metadata": {
                "general.architecture": str(config.model_type),
                **({"arriero.template": template.to_json()} if template else {}),
            },
            "chat_template": self.tokenizer.chat_template,
            "adapters": [],
        }

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of a text; see `arriero.llama.Model.tokenize`."""
        found = self.tokenizer(
            text, add_special_tokens=add_special, split_special_tokens=not parse_special
        )
        return [int(i) for i in found["input_ids"]]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; see `arriero.llama.Model.detokenize`."""
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def logits(self, ids: Sequence[int]) -> Values:
        """Logits after each token of a sequence, shape (tokens, vocabulary).

        Raises:
            InvalidArgument: ids outside of the vocabulary.
            OutOfRange: more tokens than the context holds.
        """
        self._check(ids)
        with self._torch.inference_mode():
            out = self.model(input_ids=self._tensor(ids), use_cache=False)
        found: Values = out.logits[0].float().cpu().numpy()
        return found

    def hidden(self, ids: Sequence[int]) -> Values:
        """The last layer's output after each token, shape (tokens, width); errors as `logits`."""
        self._check(ids)
        with self._torch.inference_mode():
            out = self.model(
                input_ids=self._tensor(ids), use_cache=False, output_hidden_states=True
            )
        found: Values = out.hidden_states[-1][0].float().cpu().numpy()
        return found

    def _tensor(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)], device=self.model.device)

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.n_ctx:
            raise OutOfRange(f"{len(ids)} tokens do not fit into a context of {self.n_ctx}")
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            raise InvalidArgument(
                f"token {max(ids)} is outside of the vocabulary (0 to {self.n_vocab - 1}): another "
                "tokenizer"
            )

    def _ends(self) -> frozenset[int]:
        found: set[int] = set()
        for source in (self.model.generation_config, self.tokenizer):
            ends = getattr(source, "eos_token_id", None)
            found.update([ends] if isinstance(ends, int) else ends or [])
        return frozenset(found)
