"""Gateway: endpoints behind an HTTP API that OpenAI's clients speak.

Responsibility: the room `gateway`. Does not know how text is made, nor which
replica makes it.
"""
