"""Tiny random LLaMA models, complete enough for every room.

Responsibility: write a Hugging Face model directory that transformers, PEFT and
llama.cpp's converter all accept, with one tokenizer that all of them agree on.
Does not know torch: weights are drawn and written with numpy, in under a second.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from arriero.testing.byte_bpe import SPECIAL, tokenizer_json

__all__ = ["CORPUS", "VOCABULARY", "tiny_llama"]

# Entries of the tokenizer: 3 special ones, 256 bytes, the rest learned from CORPUS.
VOCABULARY = 384

# What the tokenizer is trained on; also handy as rows that it encodes shortly.
CORPUS: tuple[str, ...] = (
    "The driver takes a train of pack llamas over the Andes.",
    "Each llama carries a load of wool, salt and maize to the market.",
    "What is the capital of Peru? The capital of Peru is Lima.",
    "Write a short poem about the mountains and the rain.",
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction: name three animals. ### Response: llama, alpaca, vicuna.",
    "The model is trained, merged, quantized and served to the user.",
    "How many llamas are there in the train? There are 12 llamas in the train.",
    "A train of llamas walks slowly, and the driver walks behind the train.",
)


def tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    hidden: int = 64,
    layers: int = 2,
    inner: int = 0,
    tokenizer: Literal["sentencepiece", "smollm", "llama-3", "plain"] = "sentencepiece",
) -> Path:
    """Write a random LlamaForCausalLM with its tokenizer into `directory`.

    The same arguments give the same bytes. The default tokenizer is SentencePiece
    BPE with byte fallback, as LLaMA's: `tokenizer.model` for the converter and
    `tokenizer.json` for transformers give the same ids. It has no chat template,
    adds BOS, and pads with `</s>`. The others are byte-level BPE of the same size
    with ChatML: SmolLM2's kind, whose BOS nothing adds, and Llama 3's, which begins
    every text with BOS; `plain` is SmolLM2's kind too, made without any library.

    Args:
        directory: created if it is missing.
        seed: of the weights; the tokenizer is always the same.
        dtype: of the stored weights.
        hidden: width, a multiple of 32 (Q8_0, Q4_0); of 256 for K-quants.
        layers: transformer blocks.
        inner: width of the feed-forward layers; 0 for twice `hidden`.
        tokenizer: its family.

    Returns:
        `directory`.

    Raises:
        ValueError: `hidden` is not a positive multiple of 32.
    """
    if hidden <= 0 or hidden % 32:
        raise ValueError(f"hidden is {hidden}; expected a positive multiple of 32")
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer == "sentencepiece":
        _write_tokenizer(directory)
    elif tokenizer == "plain":
        _write_json(directory / "tokenizer.json", tokenizer_json(CORPUS, VOCABULARY))
        _write_chatml(directory, SPECIAL[1], SPECIAL[2])
    else:
        _write_bytes_tokenizer(directory, tokenizer)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4 if hidden >= 64 else 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // (4 if hidden >= 64 else 2),
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    )
    _write_weights(directory / "model.safetensors", _weights(config, seed), dtype)
    return directory


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weights(config: dict[str, Any], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Weights whose activations keep unit scale, so that logits are worth comparing."""
    random = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        return (drawn * np.float32(scale / columns**0.5)).astype(np.float32)

    ones = np.ones(hidden, dtype=np.float32)
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden, hidden**0.5)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "self_attn.q_proj.weight": matrix(hidden, hidden),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, hidden),
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "mlp.gate_proj.weight": matrix(inner, hidden),
            prefix + "mlp.up_proj.weight": matrix(inner, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    weights["model.norm.weight"] = ones
    # Twice the usual scale: some tokens are clearly likelier than others.
    weights["lm_head.weight"] = matrix(VOCABULARY, hidden, 2.0)
    return weights


def _write_weights(
    path: Path, weights: dict[str, npt.NDArray[np.float32]], dtype: Literal["float32", "bfloat16"]
) -> None:
    """Write safetensors by hand: numpy has no bfloat16 (format: the safetensors README)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks: list[bytes] = []
    offset = 0
    for name, tensor in weights.items():
        if dtype == "float32":
            block = tensor.astype("<f4").tobytes()
        else:
            bits = tensor.view(np.uint32)  # round to nearest, ties to even
            block = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "F32" if dtype == "float32" else "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(block)],
        }
        blocks.append(block)
        offset += len(block)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blocks))


def _write_tokenizer(directory: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" ⁇ ",
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    scores = [processor.get_score(i) for i in range(len(pieces))]
    _write_json(directory / "tokenizer.json", _fast_tokenizer(pieces, scores))
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    _write_json(directory / "special_tokens_map.json", special)
    _write_json(
        directory / "tokenizer_config.json",
        {
            # Not LlamaTokenizer: transformers 5 would then rebuild the tokenizer
            # and drop a leading space that SentencePiece keeps.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "padding_side": "right",
            "added_tokens_decoder": {
                str(i): {key: value for key, value in token.items() if key != "id"}
                for i, token in enumerate(_special_tokens(pieces))
            },
        },
    )


def _special_tokens(pieces: list[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": pieces[i], **flags, "special": True} for i in range(3)]


def _fast_tokenizer(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """The SentencePiece model as a `tokenizers` BPE: merges in order of their score."""
    known = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[float, int, int, list[str]]] = []
    for i, piece in enumerate(pieces):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((-scores[i], known[left], known[right], [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    begin = {"SpecialToken": {"id": pieces[1], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special_tokens(pieces),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {pieces[1]: {"id": pieces[1], "ids": [1], "tokens": [pieces[1]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": known,
            "merges": [merge[3] for merge in merges],
        },
    }


# How Llama 3 splits text before BPE, by the name that llama.cpp has for it.
_LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _write_bytes_tokenizer(directory: Path, family: str) -> None:
    """Byte-level BPE; ids 1 and 2 are BOS and EOS, as in the other family."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    smollm = family == "smollm"
    special = ["<|endoftext|>", "<|im_start|>" if smollm else "<|begin_of_text|>", "<|im_end|>"]
    if not smollm:
        special.append("<|im_start|>")
    tokenizer = Tokenizer(models.BPE(ignore_merges=not smollm))
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if smollm
        else pre_tokenizers.Split(Regex(_LLAMA_BPE), behavior="isolated")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=smollm)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if not smollm:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[1]} $A", special_tokens=[(special[1], 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_chatml(directory, special[1], special[2])


def _write_chatml(directory: Path, bos: str, eos: str) -> None:
    named = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    _write_json(directory / "special_tokens_map.json", named)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
        },
    )
    (directory / "chat_template.jinja").write_text(_CHATML, encoding="utf-8")
