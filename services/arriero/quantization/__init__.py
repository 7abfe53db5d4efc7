"""Quantization: GGUF files from models, and what each of them costs in quality.

Responsibility: the stages `quantize` and `evaluate`. Does not know serving.
"""
