"""Arriero: from raw data to a served, fine-tuned, quantized model, as one verified run."""
