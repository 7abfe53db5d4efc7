"""Stage `transform`: rows rewritten by prompting a model behind an HTTP endpoint.

Responsibility: everything between raw rows and answered rows. Does not know
tokenizers, nor which model answers.
"""
