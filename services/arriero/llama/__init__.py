"""llama.cpp, typed: models, contexts, batches, quantizing, GGUF headers.

Responsibility: the one place that touches llama.cpp (through llama-cpp-python's
low-level binding). Does not know requests, artifacts or gRPC.

A model is loaded once, and contexts are made over it:

    with Model(path) as model, Context(model, n_ctx=4096, n_seq=8) as context:
        batch = Batch(512)
        batch.extend(model.tokenize("Hello"), start=0, sequence=0)
        context.decode(batch)
        next_token = int(context.logits(batch.size - 1).argmax())

Nothing here starts a thread of Python's own; a llama.cpp abort ends the process,
so a process that must live does not load models itself. `read_header` and
`resolve_type` are safe anywhere.
"""

from arriero.llama.blocks import needs_importance, quantize_rows, row_bytes, write_header
from arriero.llama.context import Batch, Context, Rope, golden_logits
from arriero.llama.header import Header, TensorInfo, insert_metadata, read_header
from arriero.llama.library import available, finds_gpu, initialize
from arriero.llama.model import Model
from arriero.llama.quantizer import (
    QUANT_TYPES,
    Importance,
    QuantType,
    Recipe,
    TypePlan,
    expected_size,
    plan_types,
    quantize,
    resolve_tensor_type,
    resolve_type,
)

__all__ = [
    "QUANT_TYPES",
    "Batch",
    "Context",
    "Header",
    "Importance",
    "Model",
    "QuantType",
    "Recipe",
    "Rope",
    "TensorInfo",
    "TypePlan",
    "available",
    "expected_size",
    "finds_gpu",
    "golden_logits",
    "initialize",
    "insert_metadata",
    "needs_importance",
    "plan_types",
    "quantize",
    "quantize_rows",
    "read_header",
    "resolve_tensor_type",
    "resolve_type",
    "row_bytes",
    "write_header",
]
