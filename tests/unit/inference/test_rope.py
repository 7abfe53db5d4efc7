"""Positions beyond the trained context, as figures for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.errors import FailedPrecondition
from arriero.inference.rope import ntk_base, scaled
from arriero.llama import Context, Model, insert_metadata
from arriero.replica import RopeSettings

TRAINED, HEAD = 2048, 16


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf, vocab_only=True) as found:
        yield found


def test_nothing_said_is_what_the_model_says(model):
    assert scaled(RopeSettings(), model, TRAINED) is None
    assert scaled(RopeSettings(), model, 4 * TRAINED) is None


def test_linear_and_yarn_take_their_factor_from_the_context(model):
    linear = scaled(RopeSettings("linear"), model, 4 * TRAINED)
    assert (linear.scaling, linear.freq_scale) == ("linear", 0.25)
    yarn = scaled(RopeSettings("yarn", factor=8), model, 4 * TRAINED)
    assert (yarn.scaling, yarn.freq_scale, yarn.original_context) == ("yarn", 0.125, TRAINED)
    # Not 0, which would switch its extrapolation off: None is the model's.
    assert yarn.ext_factor is None


def test_ntk_computes_alpha_from_the_context(model):
    found = scaled(RopeSettings("ntk"), model, 2 * TRAINED)
    assert found.freq_base == pytest.approx(10000 * 3 ** (HEAD / (HEAD - 2)))
    plain = scaled(RopeSettings("ntk"), model, TRAINED)
    assert plain.freq_base == pytest.approx(10000)
    given = scaled(RopeSettings("ntk", alpha=5), model, 2 * TRAINED)
    assert given.freq_base == pytest.approx(ntk_base(10000, HEAD, 5))


def test_dynamic_ntk_of_the_training_is_kept_beyond_the_trained_context(tiny_gguf, tmp_path):
    path = tmp_path / "dynamic.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    insert_metadata(path, {"arriero.rope.type": "dynamic", "arriero.rope.factor": "4.0"})
    with Model(path, vocab_only=True) as model:
        assert scaled(RopeSettings(), model, TRAINED) is None
        found = scaled(RopeSettings(), model, 3 * TRAINED)
        assert found.freq_base == pytest.approx(ntk_base(10000, HEAD, 4 * 3 - 3))


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk", "none"])
def test_llama_takes_every_scaling_and_answers_differ(tiny_gguf, kind):
    ids = [1, *range(40, 90)]
    with Model(tiny_gguf) as model:
        rope = scaled(RopeSettings(kind), model, 2 * TRAINED)
        with (
            Context(model, n_ctx=256, n_threads=1) as plain,
            Context(model, n_ctx=256, n_threads=1, rope=rope) as context,
        ):
            apart = abs(plain.sequence_logits(ids) - context.sequence_logits(ids)).max()
    assert (apart == 0) == (kind == "none")


def test_the_cache_holds_what_type_it_is_told(tiny_gguf):
    ids = [1, *range(40, 90)]
    with Model(tiny_gguf) as model:
        with Context(model, n_ctx=256, n_threads=1) as plain:
            expected = plain.sequence_logits(ids)
        with Context(model, n_ctx=256, n_threads=1, cache_types=("BF16", "BF16")) as context:
            apart = abs(expected - context.sequence_logits(ids)).max()
        assert 0 < apart < 0.5
        # Its heads are 16 wide, and a block of Q8_0 holds 32.
        with pytest.raises(FailedPrecondition, match="does not divide n_embd_head_k=16"):
            Context(model, n_ctx=256, n_threads=1, cache_types=("Q8_0", "F16"))
