"""Tensors on disk, and the arithmetic of LoRA adapters.

Responsibility: read and write safetensors one tensor at a time, and fold
adapters into weights; `oracle` runs them. Does not know jobs or artifacts;
torch is imported only where a tensor is asked for.
"""

from arriero.weights.adapter_config import LoraSettings
from arriero.weights.arithmetic import delta, spacing
from arriero.weights.layout import TensorInfo, TensorPlan, dtype_name, read_header
from arriero.weights.lora import LoraAdapter, LoraPair, Replacement
from arriero.weights.merged import Blend, MergedWeights
from arriero.weights.reader import Weights
from arriero.weights.writer import WeightsWriter, tensor_bytes

__all__ = [
    "Blend",
    "LoraAdapter",
    "LoraPair",
    "LoraSettings",
    "MergedWeights",
    "Replacement",
    "TensorInfo",
    "TensorPlan",
    "Weights",
    "WeightsWriter",
    "delta",
    "dtype_name",
    "read_header",
    "spacing",
    "tensor_bytes",
]
