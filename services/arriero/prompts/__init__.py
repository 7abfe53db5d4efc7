"""Prompt templates and their sandboxed rendering.

Responsibility: one place that turns messages into the text that is trained on
and served. Does not know tokenizers, datasets or engines.
"""

from arriero.prompts.template import (
    EOS,
    FILE_NAME,
    MODEL,
    Message,
    Template,
    is_path,
    known,
    load,
)

__all__ = ["EOS", "FILE_NAME", "MODEL", "Message", "Template", "is_path", "known", "load"]
