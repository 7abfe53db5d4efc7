"""What the runtime needs, in the file: tokenizers that grew, rope scaling, names."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from arriero.llama import Header, Model, read_header
from arriero.quantization import converter, pretokenizers
from arriero.testing.models import CORPUS

LLAMA_3 = pretokenizers._WORDS % "{1,3}"
QWEN_2 = pretokenizers._WORDS % ""


def bpe(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
    }


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (bpe(split(LLAMA_3), BYTES, ignore_merges=True), "llama-bpe"),
        (bpe(split(QWEN_2), BYTES), "qwen2"),
        (bpe(DIGITS, WORDS), "smollm"),
        (bpe(WORDS), "gpt-2"),
        # Splitting otherwise, or not at all, is none of them.
        (bpe(split(r"\w+"), BYTES), None),
        (bpe(split(LLAMA_3), BYTES), None),
        (bpe(WORDS, ignore_merges=True), None),
        (bpe({**WORDS, "add_prefix_space": True}), None),
        (bpe({**DIGITS, "individual_digits": False}, WORDS), None),
        ({**bpe(WORDS), "normalizer": {"type": "Lowercase"}}, None),
        ({"model": {"type": "Unigram"}, "pre_tokenizer": WORDS}, None),
    ],
)
def test_a_pre_tokenizer_is_known_by_its_rules(tokenizer: dict[str, Any], name: str | None) -> None:
    assert pretokenizers.recognize(tokenizer) == name


def outlined(model: Path, tmp_path: Path) -> Path:
    view = converter.prepare_view(model, tmp_path / "view" / "tiny", None)
    conversion = converter.Conversion(view, "f32", "tiny", {"arriero.source": "sha256:1"})
    made = converter.outline(conversion, tmp_path / "o.gguf", log=tmp_path / "log")
    assert made.obstacle == ""
    return made.path


@pytest.fixture
def copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, target)
    return target


def set_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same_ids(model: Path, gguf: Path, *texts: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with Model(gguf, vocab_only=True) as loaded:
        for text in (*CORPUS, *texts):
            expected = tokenizer(text)["input_ids"]
            assert loaded.tokenize(text, add_special=True) == expected, text


def test_an_unlisted_bpe_vocabulary_gives_the_tokenizers_ids(copy: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("高原", normalized=False), AddedToken("vicuña")])
    (copy / "tokenizer.model").unlink()
    tokenizer.save(str(copy / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "special_tokens_map.json").unlink()
    path = outlined(copy, tmp_path)
    assert (
        "unlisted BPE vocabulary with the pre-tokenizer of smollm" in (tmp_path / "log").read_text()
    )
    assert read_header(path).metadata["tokenizer.ggml.pre"] == "smollm"
    assert_same_ids(copy, path, "高原 and vicuña 2025", "<|im_start|>user\n1234 Größe<|im_end|>")


def test_a_sentencepiece_vocabulary_that_grew_gives_the_tokenizers_ids(
    copy: Path, tmp_path: Path
) -> None:
    from sentencepiece import sentencepiece_model_pb2 as sp

    model = sp.ModelProto()
    model.ParseFromString((copy / "tokenizer.model").read_bytes())
    fast = json.loads((copy / "tokenizer.json").read_text())
    lowest = min(piece.score for piece in model.pieces)
    # New pieces at the end, built from old ones: 羊 is bytes before, a piece after.
    for i, text in enumerate(("羊", "驼", "羊驼")):
        model.pieces.add(piece=text, score=lowest - 1 - i)
        fast["model"]["vocab"][text] = len(fast["model"]["vocab"])
    fast["model"]["merges"].append(["羊", "驼"])
    (copy / "tokenizer.model").write_bytes(model.SerializeToString())
    (copy / "tokenizer.json").write_text(json.dumps(fast))
    path = outlined(copy, tmp_path)
    assert read_header(path).arrays["tokenizer.ggml.tokens"] == 384
    # The model's embedding has 384 rows: the vocabulary is cut there, as the weights are.
    set_config(copy, vocab_size=387)
    shutil.rmtree(tmp_path / "view")
    path = outlined(copy, tmp_path)
    assert read_header(path).arrays["tokenizer.ggml.tokens"] == 387
    assert_same_ids(copy, path, "羊驼 walks", "a 羊, a 驼", "羊驼羊驼")


def scaled(copy: Path, tmp_path: Path, **rope: object) -> Header:
    set_config(copy, rope_scaling=rope)
    return read_header(outlined(copy, tmp_path))


def test_linear_scaling_is_in_the_file(copy: Path, tmp_path: Path) -> None:
    found = scaled(copy, tmp_path, type="linear", factor=2.0).metadata
    assert found["llama.rope.scaling.type"] == "linear"
    assert found["llama.rope.scaling.factor"] == 2.0
    assert found["llama.context_length"] == 2048
    assert found["llama.rope.freq_base"] == 10000.0


def test_yarn_is_in_the_file_with_transformers_default(copy: Path, tmp_path: Path) -> None:
    found = scaled(copy, tmp_path, rope_type="yarn", factor=4.0).metadata
    assert found["llama.rope.scaling.type"] == "yarn"
    assert found["llama.rope.scaling.factor"] == 4.0
    assert found["llama.rope.scaling.original_context_length"] == 2048


def test_dynamic_ntk_keeps_the_native_base_and_tells_the_factor(copy: Path, tmp_path: Path) -> None:
    found = scaled(copy, tmp_path, rope_type="dynamic", factor=2.5).metadata
    # Within the native context dynamic scaling changes nothing.
    assert found["llama.context_length"] == 2048
    assert found["llama.rope.freq_base"] == 10000.0
    assert "llama.rope.scaling.type" not in found
    assert found["arriero.rope.type"] == "dynamic"
    assert found["arriero.rope.factor"] == 2.5
    assert found["general.quantized_by"] == "Arriero"
    assert found["general.name"] == "tiny"
    assert found["arriero.source"] == "sha256:1"
