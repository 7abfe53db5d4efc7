"""The gate `gguf.tokens`: a file's tokenizer against the model's.

Responsibility: load both tokenizers, gather the texts, judge. Does not know
conversion or quantizing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, FailedPrecondition
from arriero.gates import Gates
from arriero.gates.golden import Golden
from arriero.llama import Model
from arriero.prompts import MODEL, Template, load
from arriero.quantization import tokens
from arriero.quantization.tokens import Sample

GATE = "gguf.tokens"

_SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer briefly."}
_USER = {"role": "user", "content": "What is the capital of Peru?"}
_ANSWER = {"role": "assistant", "content": "The capital of Peru is Lima."}
_INPUT = {"role": "user", "content": "Translate into French.", "input": "Good morning!"}
_CHINESE = {"role": "user", "content": "请介绍一下你自己。\n用三句话。"}
_CONVERSATIONS: tuple[Sequence[dict[str, str]], ...] = (
    (_USER,),
    (_INPUT,),
    (_CHINESE,),
    (_USER, _ANSWER),
    (_SYSTEM, _USER, _ANSWER, _CHINESE),
)


_LEGACY = (
    ". Its LlamaTokenizer has legacy: false, which puts no space after a special token; llama.cpp "
    "always does, and no key of the file says otherwise: set legacy: true in "
    "tokenizer_config.json, make tokenizer.json anew, prepare the rows and train again, or "
    "accept that one space with gates: {gguf.tokens: warn}"
)


def prove_tokens(
    gates: Gates, *, model: Path, gguf: Path, golden: Golden | None, log: logging.Logger
) -> None:
    """Judge `gguf.tokens` of a file made from a model directory.

    Args:
        gates: where the verdict goes.
        model: the Hugging Face model directory.
        gguf: any file made from it: they share one vocabulary.
        golden: its tokens become text and are compared too.
        log: exotic differences are told here.
    """
    if not gates.wanted(GATE):
        return
    with gates.timed(), Model(gguf, vocab_only=True) as file:
        tokenizer = _load(model)
        samples = [
            *tokens.built_in(),
            *_rendered(template_of(model, tokenizer), tokenizer),
            *_golden_texts(tokenizer, golden),
            *_after_special(tokenizer),
        ]
        found = tokens.compare(
            lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"],
            lambda text, special: file.tokenize(text, add_special=special, parse_special=True),
            samples,
        )
        differences = [
            *_special_differences(tokenizer, file),
            *_added_differences(tokenizer, file),
            *found.differences,
        ]
    for words in found.exotic_differences:
        log.warning("%s: %s", GATE, words)
    detail = f"{found.texts} texts compared, {len(found.exotic_differences)} exotic ones differ"
    if differences:
        detail = (
            f"{len(differences)} of {found.texts} texts (or tokens) get other ids from llama.cpp "
            f"than from the model's tokenizer, expected none; first: {differences[0]}; check the "
            "tokenizer's files, or quantize with this gate on warn"
        )
        if _drops_spaces(model):
            detail += _LEGACY
    gates.judge(
        GATE,
        not differences,
        figure=float(len(differences)),
        threshold=0.0,
        unit="texts",
        detail=detail,
    )


def template_of(model: Path, tokenizer: Any = None) -> Template | None:
    """The prompt template of a model directory: its own file, else the tokenizer's."""
    template = Template.read(model)
    if template is not None:
        return template
    source = getattr(tokenizer, "chat_template", None)
    return load(MODEL, source) if isinstance(source, str) and source else None


def _load(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(model), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise plain exceptions of any kind
        raise FailedPrecondition(
            f"transformers cannot load the model's tokenizer: {error}; expected tokenizer.json "
            "or tokenizer.model in the model"
        ) from error


def _rendered(template: Template | None, tokenizer: Any) -> list[Sample]:
    if template is None:
        return []
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    samples = []
    try:
        bound = template.bind(**special)
    except ArrieroError:  # a template that only serves prompts of another shape
        bound = template
    for conversation in _CONVERSATIONS:
        asks = conversation[-1]["role"] == "user"
        try:
            text = bound.render(conversation, **special, add_generation_prompt=asks)
        except ArrieroError:  # no system message, or no second turn, in this template
            continue
        samples.append(Sample(text, f"template {bound.name}", add_special=not bound.writes_bos))
    return samples


def _golden_texts(tokenizer: Any, golden: Golden | None) -> list[Sample]:
    """Validation rows as plain text, without what their cut ends left over."""
    if golden is None:
        return []
    texts = (
        tokenizer.decode(
            ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip(" \ufffd")
        for ids in golden.sequences
    )
    return [Sample(text, "validation row") for text in texts if text]


def _after_special(tokenizer: Any) -> list[Sample]:
    """Text that follows a special token; what a template writes so is compared as well."""
    token = tokenizer.eos_token
    return [Sample(f"one{token}two", "text after a special token", exotic=True)] if token else []


def _drops_spaces(model: Path) -> bool:
    """Whether a SentencePiece tokenizer leaves out the space after a special token."""
    try:
        config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("legacy") is False and (model / "tokenizer.model").is_file()


def _special_differences(tokenizer: Any, file: Model) -> list[str]:
    pairs = (("BOS", tokenizer.bos_token_id, file.bos), ("EOS", tokenizer.eos_token_id, file.eos))
    return [
        f"{name} is token {found} where the model's tokenizer has {want}"
        for name, want, found in pairs
        if want is not None and want != found
    ]


def _added_differences(tokenizer: Any, file: Model) -> list[str]:
    """Added tokens that the file does not hold as such, in words."""
    lost = [
        (token, number)
        for token, number in tokenizer.get_added_vocab().items()
        # Runs of spaces and the like are joined with what stands beside them.
        if token.strip() == token
        and number not in file.tokenize(token, add_special=False, parse_special=True)
    ]
    if not lost:
        return []
    token, number = lost[0]
    have = file.tokenize(token, add_special=False, parse_special=True)
    return [f"{len(lost)} added tokens are not in the file: {token!r}, id {number}, becomes {have}"]
