"""The tokenizer that is made by hand is one that the libraries take."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from arriero.testing.models import CORPUS, VOCABULARY, tiny_llama


def test_the_library_reads_it_and_loses_no_text(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tokenizer="plain")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCABULARY
    for text in (*CORPUS, "  2024\n\tñandú 駱駝 🦙"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode())
    # Merges are used: words of the corpus are shorter than their bytes.
    text = " the driver walks behind the train"
    assert len(tokenizer.encode(text).ids) < len(text) / 2
