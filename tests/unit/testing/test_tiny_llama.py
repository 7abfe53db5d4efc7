import json
import struct
from pathlib import Path
from typing import Literal

import pytest

from arriero.testing.models import CORPUS, VOCABULARY, tiny_llama


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = contents(tiny_llama(tmp_path / "a", seed=3, dtype="bfloat16"))
    assert first == contents(tiny_llama(tmp_path / "b", seed=3, dtype="bfloat16"))
    other = contents(tiny_llama(tmp_path / "c", seed=4, dtype="bfloat16"))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_both_tokenizers_give_the_same_ids(tmp_path: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    directory = tiny_llama(tmp_path / "model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert pieces.get_piece_size() == fast.get_vocab_size() == VOCABULARY
    texts = (*CORPUS, "", " ", "  two", "\n\t x", "naïve", "今天", "🦙", "10 200", "a" * 50)
    for text in texts:
        ids = fast.encode(text).ids
        assert ids == [1, *pieces.encode(text)], text
        assert fast.decode(ids) == text


def test_bfloat16_weights_are_the_rounded_float32_ones(tmp_path: Path) -> None:
    import numpy as np
    from safetensors import safe_open

    exact = tiny_llama(tmp_path / "exact") / "model.safetensors"
    rounded = tiny_llama(tmp_path / "rounded", dtype="bfloat16") / "model.safetensors"
    with safe_open(str(exact), "np") as a:
        name = "model.layers.1.mlp.up_proj.weight"
        wanted = a.get_tensor(name)
    raw = rounded.read_bytes()
    assert raw.count(b'"BF16"') == 21
    length = struct.unpack("<Q", raw[:8])[0]
    start, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    bits = np.frombuffer(raw[8 + length + start : 8 + length + end], dtype="<u2")
    found = (bits.astype(np.uint32) << 16).view(np.float32).reshape(wanted.shape)
    assert np.all(np.abs(found - wanted) <= np.abs(wanted) * 2.0**-8)


@pytest.mark.parametrize("hidden", [0, 48, -32])
def test_a_width_that_no_quant_type_takes_is_refused(tmp_path: Path, hidden: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        tiny_llama(tmp_path / "model", hidden=hidden)


@pytest.mark.parametrize("family", ["smollm", "llama-3"])
def test_byte_level_families_are_known_to_the_converter_by_their_rules(
    tmp_path: Path, family: Literal["smollm", "llama-3"]
) -> None:
    from transformers import AutoTokenizer

    from arriero.quantization.pretokenizers import recognize

    directory = tiny_llama(tmp_path, tokenizer=family)
    rules = json.loads((directory / "tokenizer.json").read_text())
    assert recognize(rules) == {"smollm": "smollm", "llama-3": "llama-bpe"}[family]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer("Lima").input_ids[0] == 1) == (family == "llama-3")
    assert len(tokenizer) == 384
