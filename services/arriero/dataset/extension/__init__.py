"""Stage `extend_tokenizer`: more tokens for a model that exists.

Responsibility: new pieces, the tokenizer's files and the model's rows for them.
Does not know rows of datasets, nor how a model is trained afterwards.
"""
