"""GGUF adapters: loaded beside a model, put on contexts with a scale.

Responsibility: load a LoRA adapter that lies in a GGUF file, and set adapters on a
context. Does not know where adapters come from, nor requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arriero.errors import DataLoss, Internal
from arriero.llama import library
from arriero.llama.context import Context
from arriero.llama.header import read_header
from arriero.llama.model import Model


class Adapter:
    """A LoRA adapter of a model; `with` frees it, and so does closing the model.

    Args:
        model: that it belongs to; stays open as long.
        path: of the GGUF file.

    Raises:
        DataLoss: llama.cpp or the header check refuses the file, or it is an
            adapter of another model.
    """

    def __init__(self, model: Model, path: Path) -> None:
        self._adapter: Any = None
        read_header(path)
        self._c = library.initialize()
        library.take_errors()
        self._adapter = self._c.llama_adapter_lora_init(model.handle, str(path).encode())
        if not self._adapter:
            raise DataLoss(
                f"llama.cpp cannot load the adapter {path.name}: "
                f"{library.take_errors() or 'no reason given'}; expected one of this model"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The `llama_adapter_lora` pointer."""
        return self._adapter

    def close(self) -> None:
        """Free it; no context may use it any more. Safe to call twice."""
        if self._adapter:
            self._c.llama_adapter_lora_free(self._adapter)
            self._adapter = None


def set_adapters(context: Context, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Compute with these adapters and scales from the next decode on; none takes all off.

    What is in the KV cache was computed with those before: clear it.

    Raises:
        Internal: llama.cpp refuses.
    """
    c = library.initialize()
    count = len(adapters)
    pointers = (c.llama_adapter_lora_p_ctypes * max(count, 1))()
    scales = (ctypes.c_float * max(count, 1))()
    for i, (adapter, scale) in enumerate(adapters):
        pointers[i] = ctypes.cast(adapter.handle, c.llama_adapter_lora_p_ctypes)
        scales[i] = scale
    if c.llama_set_adapters_lora(context.handle, pointers, count, scales) != 0:
        raise Internal(f"llama.cpp refuses {count} adapters: {library.take_errors()}")
