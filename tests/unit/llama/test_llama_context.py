from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import InvalidArgument, OutOfRange, ResourceExhausted
from arriero.gates.golden import Golden, compare, log_softmax
from arriero.llama import Batch, Context, Model, Rope, golden_logits

IDS = [1, *range(260, 300), 5, 44, 300, 301, 7]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf) as loaded:
        yield loaded


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_ctx=256, n_seq=3, n_threads=1) as made:
        yield made


def test_logits_do_not_depend_on_how_tokens_are_batched(context: Context) -> None:
    alone = context.sequence_logits(IDS)
    assert alone.shape == (len(IDS), context.n_vocab)
    batch = Batch(1)
    for position, token in enumerate(IDS):
        batch.clear()
        row = batch.add(token, position, 0)
        context.decode(batch)
        assert np.allclose(context.logits(row), alone[position], atol=0.05)


def test_a_sequence_longer_than_a_chunk_is_evaluated_whole(context: Context) -> None:
    long = (IDS * 5)[:200]
    first = context.sequence_logits(long)
    assert np.allclose(first[: len(IDS)], context.sequence_logits(IDS), atol=0.05)
    assert np.array_equal(first, context.sequence_logits(long))


def test_sequences_of_one_batch_do_not_see_each_other(context: Context) -> None:
    alone = context.sequence_logits(IDS)[-1]
    batch = Batch(256)
    rows = [batch.extend(IDS, start=0, sequence=0), batch.extend(IDS[::-1], start=0, sequence=2)]
    context.decode(batch)
    assert np.allclose(context.logits(rows[0][-1]), alone, atol=0.05)
    assert not np.allclose(context.logits(rows[1][-1]), alone, atol=0.5)
    assert context.all_logits(2).shape == (2, context.n_vocab)


def test_a_copied_prefix_goes_on_as_the_original(context: Context) -> None:
    whole = context.sequence_logits(IDS)[-1]
    batch = Batch(64)
    batch.extend(IDS, start=0, sequence=0, outputs="none")
    batch.outputs[len(IDS) - 1] = 1
    context.decode(batch)
    context.copy(0, 1)
    assert context.remove(1, len(IDS) - 1)
    assert context.last_position(1) == len(IDS) - 2
    batch.clear()
    row = batch.add(IDS[-1], len(IDS) - 1, 1)
    context.decode(batch)
    assert np.allclose(context.logits(row), whole, atol=0.05)
    context.clear()
    assert context.last_position(0) == context.last_position(1) == -1


def test_figures_that_cannot_be_are_refused(model: Model, context: Context) -> None:
    with pytest.raises(InvalidArgument, match="n_seq"):
        Context(model, n_ctx=64, n_seq=0)
    with pytest.raises(InvalidArgument, match="rope scaling"):
        Context(model, n_ctx=64, rope=Rope(scaling="cubic"))
    with pytest.raises(InvalidArgument, match="expected 1 to"):
        context.decode(Batch(4))
    with pytest.raises(InvalidArgument, match="cannot hold"):
        Batch(0)


def test_ids_outside_of_the_vocabulary_and_too_many_are_refused(context: Context) -> None:
    with pytest.raises(InvalidArgument, match="token 99999"):
        context.sequence_logits([1, 99999])
    with pytest.raises(InvalidArgument, match="token -1"):
        context.sequence_logits([-1])
    with pytest.raises(OutOfRange, match="257 tokens"):
        context.sequence_logits([1] * 257)


def test_a_full_cache_is_refused_and_changes_nothing(context: Context) -> None:
    batch = Batch(256)
    batch.extend([1] * 256, start=0, sequence=1)
    context.decode(batch)
    batch.clear()
    batch.add(1, 256, 1)
    with pytest.raises(ResourceExhausted, match="256 tokens"):
        context.decode(batch)
    assert context.last_position(1) == 255


def test_logits_that_were_not_asked_for_are_refused(context: Context) -> None:
    batch = Batch(8)
    batch.extend(IDS[:4], start=0, sequence=0)
    context.decode(batch)
    assert context.logits(3).shape == (context.n_vocab,)
    with pytest.raises(InvalidArgument, match="row 1"):
        context.logits(1)


def test_a_batch_does_not_take_more_than_it_holds() -> None:
    batch = Batch(2)
    with pytest.raises(OutOfRange):
        batch.extend([1, 2, 3], start=0, sequence=0)
    assert (len(batch), batch.room) == (0, 2)
    batch.add(1, 0, 0)
    batch.add(1, 1, 0)
    with pytest.raises(OutOfRange):
        batch.add(1, 2, 0)


def test_another_rope_base_gives_other_logits(model: Model, context: Context) -> None:
    with Context(model, n_ctx=256, n_threads=1, rope=Rope(freq_base=80000.0)) as scaled:
        other = scaled.sequence_logits(IDS)
    same = context.sequence_logits(IDS)
    assert np.allclose(other[0], same[0], atol=0.05)  # position 0 is not rotated
    assert not np.allclose(other[-1], same[-1], atol=0.2)


def test_threads_are_kept_over_decodes(model: Model) -> None:
    with Context(model, n_ctx=64, n_threads=2) as context:
        assert context._pool is not None
        assert context._pool.attached
        context.sequence_logits(IDS)
    context.close()


def test_golden_logits_come_in_goldens_order(tiny_gguf: Path, model: Model) -> None:
    sequences = [IDS, IDS[:3], IDS[::-1]]
    with Context(model, n_ctx=256) as context:
        rows = np.concatenate([context.sequence_logits(ids) for ids in sequences])
    golden = Golden(
        tokens=np.concatenate([np.array(ids, dtype=np.int32) for ids in sequences]),
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logprobs=log_softmax(rows).astype(np.float16),
    )
    result = compare(golden, golden_logits(tiny_gguf, golden))
    assert result.kl_divergence < 1e-4
    assert result.top1_agreement == 1.0
