"""The training room: fine-tunes a model on prepared rows.

Responsibility: LoRA training with checkpoints and exact resume. Does not know
rows or templates beyond token ids and labels, nor what becomes of the adapter.
"""
