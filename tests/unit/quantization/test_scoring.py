"""Perplexity and KL divergence against the formulas, over logits of other makers."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import FailedPrecondition
from arriero.llama import Context, Model, quantize, resolve_type
from arriero.quantization import scoring, windows
from arriero.quantization.windows import Window
from arriero.testing.models import CORPUS


@pytest.fixture(scope="module")
def cut(tiny_gguf: Path) -> list[Window]:
    with Model(tiny_gguf, vocab_only=True) as model:
        ids = model.tokenize(" ".join(CORPUS))
        return windows.of_text(ids, 40, bos=model.bos, limit=4)


@pytest.fixture(scope="module")
def worse(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("worse") / "tiny.Q4_0.gguf"
    quantize(tiny_gguf, target, resolve_type("Q4_0"), n_threads=1)
    return target


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_perplexity_is_what_transformers_makes_of_the_same_windows(
    tiny_llama_dir: Path, tiny_gguf: Path, cut: list[Window]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    nll = []
    with torch.inference_mode():
        for window in cut:
            ids = torch.tensor(window.tokens[None].astype(np.int64))
            rows = log_softmax(model(ids).logits[0].numpy())
            nll += [-rows[i, t] for i, t in enumerate(window.targets) if t >= 0]
    found = scoring.score(tiny_gguf, cut)
    assert found.tokens == len(nll) == 4 * 19
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=0.01)
    spread = np.std(nll) / math.sqrt(len(nll) - 1)
    assert found.perplexity_error == pytest.approx(found.perplexity * spread, rel=0.02)


def test_kl_divergence_is_the_sum_over_the_whole_vocabulary(
    tiny_gguf: Path, worse: Path, cut: list[Window]
) -> None:
    kept = np.empty((sum(w.scored for w in cut), 384), dtype=np.float32)
    same = scoring.score(tiny_gguf, cut, keep=kept)
    found = scoring.score(worse, cut, against=kept)
    kl, top = [], []
    with Model(tiny_gguf) as a, Model(worse) as b, Context(a, n_ctx=64) as one, Context(b) as two:
        for window in cut:
            ids = window.tokens.tolist()
            at = window.targets >= 0
            p = log_softmax(one.sequence_logits(ids)[at])
            q = log_softmax(two.sequence_logits(ids)[at])
            kl += (np.exp(p) * (p - q)).sum(-1).tolist()
            top += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.kl_divergence == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl_max == pytest.approx(np.max(kl), rel=1e-2)
    assert found.top1_agreement == pytest.approx(np.mean(top))
    assert found.kl_divergence > 1e-3
    assert math.isnan(same.kl_divergence)
    assert scoring.score(tiny_gguf, cut, against=kept).kl_divergence < 1e-6


def test_scores_of_parts_add_up(tiny_gguf: Path, cut: list[Window]) -> None:
    whole = scoring.score(tiny_gguf, cut)
    parts = scoring.Score()
    for part in (cut[:1], cut[1:]):
        parts += scoring.score(tiny_gguf, part)
    assert parts.tokens == whole.tokens
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_ids_of_another_tokenizer_are_refused_with_the_figures(tiny_gguf: Path) -> None:
    window = Window(np.array([1, 5000], dtype=np.int32), np.array([5000, -1], dtype=np.int32))
    with pytest.raises(FailedPrecondition, match=r"token 5000 .* has 384 tokens"):
        scoring.score(tiny_gguf, [window])


def test_a_reference_of_another_vocabulary_is_refused(tiny_gguf: Path, cut: list[Window]) -> None:
    kept = np.zeros((sum(w.scored for w in cut), 400), dtype=np.float32)
    with pytest.raises(FailedPrecondition, match="384 tokens and the reference 400"):
        scoring.score(tiny_gguf, cut, against=kept)


def test_long_windows_are_evaluated_in_chunks(tiny_gguf: Path) -> None:
    ids = (np.arange(300) * 7 % 380).astype(np.int32)
    long = Window(ids, np.append(ids[1:], np.int32(-1)))
    with Model(tiny_gguf) as model, Context(model, n_ctx=300) as context:
        rows = log_softmax(context.sequence_logits(ids.tolist()))
    expected = -rows[np.arange(299), ids[1:]].mean()
    assert scoring.score(tiny_gguf, [long]).perplexity == pytest.approx(
        math.exp(expected), rel=1e-4
    )


def test_a_cancelled_evaluation_stops_at_the_next_window(
    tiny_gguf: Path, cut: list[Window], tmp_path: Path
) -> None:
    seen: list[int] = []

    def tick(tokens: int) -> None:
        seen.append(tokens)
        raise KeyboardInterrupt

    copy = tmp_path / "tiny.gguf"
    shutil.copy(tiny_gguf, copy)
    with pytest.raises(KeyboardInterrupt):
        scoring.score(copy, cut, tick=tick)
    assert seen == [40]
