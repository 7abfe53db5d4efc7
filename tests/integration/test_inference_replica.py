"""A replica as it runs: a real process, a real model, over gRPC."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from arriero.gates.golden import Golden, log_softmax, probe_sequences
from arriero.rpc import from_rpc_error
from arriero.rpc.channel import check_health
from arriero.store import ManifestDraft, Store
from arriero.testing.serving import CONTEXT, Running, publish, start, wait_until
from arriero.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def replica(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("replica"), tiny_gguf)
    yield running
    running.process.kill()
    running.process.wait()


def greedy(max_tokens: int = 12, **more: object) -> pb.SamplingParams:
    return pb.SamplingParams(temperature=0, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def text_of(replica: Running, prompt: str, sampling: pb.SamplingParams) -> str:
    stream = replica.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
    return "".join(message.delta for message in stream)


def test_the_last_message_says_why_it_ended_and_what_was_used(replica: Running) -> None:
    request = pb.GenerateRequest(prompt="The llama", sampling=greedy(5))
    *_, last = replica.stub.Generate(request)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage.completion_tokens == 5
    assert last.usage.prompt_tokens > 1


def test_a_stream_alone_and_among_others_says_the_same(replica: Running) -> None:
    prompts = [f"Number {i} of the herd" for i in range(7)]
    alone = [text_of(replica, prompt, greedy()) for prompt in prompts]
    with ThreadPoolExecutor(7) as pool:
        together = list(pool.map(lambda prompt: text_of(replica, prompt, greedy()), prompts))
    assert together == alone


def test_a_seed_makes_sampling_repeatable(replica: Running) -> None:
    sampling = pb.SamplingParams(temperature=1.5, max_tokens=12, seed=7)
    first = text_of(replica, "Once", sampling)
    assert text_of(replica, "Once", sampling) == first
    other = pb.SamplingParams(temperature=1.5, max_tokens=12, seed=8)
    assert text_of(replica, "Once", other) != first


def test_a_stop_string_ends_the_text_before_it(replica: Running) -> None:
    whole = text_of(replica, "Stop here", greedy(24))
    cut = whole[len(whole) // 2 :][:2]
    stopped = text_of(replica, "Stop here", greedy(24, stop=[cut]))
    assert stopped == whole[: whole.index(cut)]


def test_no_tokens_asked_for_is_an_empty_answer(replica: Running) -> None:
    (only,) = replica.stub.Generate(pb.GenerateRequest(prompt="a", sampling=greedy(0)))
    assert (only.delta, only.finish_reason) == ("", pb.FINISH_REASON_LENGTH)


def test_more_tokens_than_fit_end_with_the_context(replica: Running) -> None:
    *_, last = replica.stub.Generate(pb.GenerateRequest(prompt="a b c", sampling=greedy(10**6)))
    assert last.finish_reason in (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP)
    assert last.usage.prompt_tokens + last.usage.completion_tokens <= CONTEXT


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(prompt="word " * 2000), "prompt"),
        (
            pb.GenerateRequest(prompt="a", sampling=pb.SamplingParams(top_p=float("nan"))),
            "sampling.top_p",
        ),
        (
            pb.GenerateRequest(prompt="a", sampling=pb.SamplingParams(temperature=-1)),
            "sampling.temperature",
        ),
        (
            pb.GenerateRequest(prompt="a", sampling=pb.SamplingParams(max_tokens=-1)),
            "sampling.max_tokens",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_field(
    replica: Running, request_: pb.GenerateRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(replica.stub.Generate(request_))
    error = from_rpc_error(caught.value)
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations[0].field == field  # type: ignore[attr-defined]


def test_a_prompt_that_is_too_long_is_told_both_figures(replica: Running) -> None:
    with pytest.raises(grpc.RpcError, match=f"holds {CONTEXT}") as caught:
        list(replica.stub.Generate(pb.GenerateRequest(prompt="word " * 2000)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_prompt_that_is_far_too_long_is_refused_without_being_read(replica: Running) -> None:
    for prompt, word in (("word " * 1_000_000, "at least"), ("\0" * 12_000_000, "too large")):
        with pytest.raises(grpc.RpcError, match=word) as caught:
            text_of(replica, prompt, greedy(3))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_chat_without_any_template_is_refused_with_advice(replica: Running) -> None:
    if replica.stub.GetModel(pb.GetModelRequest()).template:
        pytest.skip("the tiny model brings a template")
    request = pb.ChatRequest(messages=[pb.Message(role="user", content="hi")])
    with pytest.raises(grpc.RpcError, match="no prompt template"):
        list(replica.stub.Chat(request))


def test_an_unknown_role_is_refused(replica: Running) -> None:
    request = pb.ChatRequest(messages=[pb.Message(role="wizard", content="hi")])
    with pytest.raises(grpc.RpcError) as caught:
        list(replica.stub.Chat(request))
    assert caught.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def test_golden_logits_of_the_same_weights_agree_and_of_others_do_not(
    replica: Running, tiny_gguf: Path, tmp_path: Path
) -> None:
    from arriero.llama import Context, Model

    rows = [list(range(5 + i, 45 + i)) for i in range(4)]
    sequences = probe_sequences(rows, tokens=96)
    with Model(tiny_gguf) as model, Context(model, n_ctx=128, n_threads=1) as context:
        logits = np.concatenate([context.sequence_logits(ids) for ids in sequences])

    def score(values: np.ndarray) -> pb.ScoreResponse:
        place = replica.store.staging("test", f"golden-{values[0, 0]}") / "out"
        place.mkdir(parents=True)
        Golden(
            np.concatenate([np.array(s, dtype=np.int32) for s in sequences]),
            np.array([len(s) for s in sequences], dtype=np.int32),
            log_softmax(values).astype(np.float16),
        ).write(place)
        digest = replica.store.publish(place, ManifestDraft(kind="report", name="golden")).digest
        return replica.stub.Score(pb.ScoreRequest(golden=digest))

    same = score(logits)
    assert same.tokens == 96
    assert same.kl_divergence < 1e-4
    assert same.confident_disagreements == 0
    other = score(np.roll(logits, 1, axis=1))
    assert other.kl_divergence > 10 * max(same.kl_divergence, 1e-6)


@pytest.mark.parametrize(
    "tokens", [np.full(8, 10**6, dtype=np.int32), np.ones(CONTEXT * 2, dtype=np.int32)]
)
def test_golden_logits_of_another_model_are_refused_and_the_engine_lives(
    replica: Running, tokens: np.ndarray
) -> None:
    place = replica.store.staging("test", f"foreign-{len(tokens)}") / "out"
    place.mkdir(parents=True)
    lengths = np.array([len(tokens)], dtype=np.int32)
    Golden(tokens, lengths, np.zeros((len(tokens), 4), dtype=np.float16)).write(place)
    digest = replica.store.publish(place, ManifestDraft(kind="report", name="foreign")).digest
    engine = replica.engine()
    with pytest.raises(grpc.RpcError) as caught:
        replica.stub.Score(pb.ScoreRequest(golden=digest))
    assert caught.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
    )
    assert replica.engine().pid == engine.pid


def test_a_caller_that_leaves_frees_its_slot(replica: Running) -> None:
    for _ in range(12):  # three times as many as there are slots
        stream = replica.stub.Generate(pb.GenerateRequest(prompt="long", sampling=greedy(200)))
        next(stream)
        stream.cancel()
    assert text_of(replica, "next", greedy(3)) is not None


def test_an_engine_that_is_killed_is_told_apart_and_comes_back(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    replica = start(tmp_path, tiny_gguf, ARRIERO_CONTEXT="2048")
    try:
        failures: list[grpc.StatusCode] = []

        def ask() -> None:
            try:
                text_of(replica, "go on", greedy(2000))
            except grpc.RpcError as error:
                failures.append(error.code())

        callers = [threading.Thread(target=ask) for _ in range(3)]
        for caller in callers:
            caller.start()
        engine = replica.engine()
        wait_until(lambda: engine.cpu_times().user > 0)
        engine.send_signal(signal.SIGKILL)
        for caller in callers:
            caller.join(120)
        assert set(failures) <= {grpc.StatusCode.UNAVAILABLE}
        wait_until(lambda: not engine.is_running() and check_health(replica.address))
        assert replica.engine().pid != engine.pid
        *_, last = replica.stub.Generate(pb.GenerateRequest(prompt="again", sampling=greedy(3)))
        assert last.finish_reason
    finally:
        replica.process.terminate()
        replica.process.wait(120)


def test_sigterm_lets_running_streams_end_properly(tiny_gguf: Path, tmp_path: Path) -> None:
    replica = start(tmp_path, tiny_gguf)
    engine = replica.engine()
    stream = replica.stub.Generate(pb.GenerateRequest(prompt="to the end", sampling=greedy(60)))
    first = next(stream)
    replica.process.terminate()
    messages = [first, *stream]
    assert messages[-1].finish_reason in (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP)
    assert replica.process.wait(120) == 0
    assert not engine.is_running()


def test_a_file_that_is_no_model_ends_the_replica_with_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    store = Store.open(tmp_path / "store")
    digest = publish(store, broken)
    done = subprocess.run(
        [sys.executable, "-m", "arriero.inference"],
        env={**os.environ, "ARRIERO_STORE": str(tmp_path / "store"), "ARRIERO_MODEL": digest},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


LONG = "The herd went down the valley and then up again to the pass. " * 2


def test_a_prompt_that_begins_like_an_earlier_one_is_evaluated_from_there(
    replica: Running,
) -> None:
    def ask(prompt: str) -> tuple[str, pb.Usage]:
        *parts, last = replica.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=greedy(8)))
        return "".join(part.delta for part in [*parts, last]), last.usage

    first, new = ask(LONG + "Who leads?")
    again, old = ask(LONG + "Who leads?")
    assert again == first
    assert old.cached_tokens == old.prompt_tokens - 1
    assert new.cached_tokens < old.cached_tokens
    other, _ = ask(LONG + "Who follows?")
    fresh = start_other(replica, LONG + "Who follows?")
    assert other == fresh


def start_other(replica: Running, prompt: str) -> str:
    """What the model says of a prompt without any cache, by the library alone."""
    from arriero.llama import Batch, Context, Model

    path = replica.store.get(replica.digest).file("tiny.F16.gguf")
    with Model(path) as model, Context(model, n_ctx=CONTEXT, n_threads=1) as context:
        ids = model.tokenize(prompt)
        batch = Batch(512)
        row = batch.extend(ids, start=0, sequence=0)[-1]
        made: list[int] = []
        while len(made) < 8:
            context.decode(batch)
            made.append(int(context.logits(row).argmax()))
            batch.clear()
            row = batch.add(made[-1], len(ids) + len(made) - 1, 0)
        return model.detokenize(made)


def test_prompts_share_a_beginning_with_requests_that_still_run(replica: Running) -> None:
    alone = [text_of(replica, f"{LONG}{i}", greedy(20)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: text_of(replica, f"{LONG}{i}", greedy(20)), range(8)))
    assert together == alone


def test_streams_of_all_lengths_come_and_go_without_touching_each_other(replica: Running) -> None:
    asked = [(f"{'llama ' * (i % 9)}{i}", 1 + (7 * i) % 23) for i in range(40)]
    alone = [text_of(replica, prompt, greedy(count)) for prompt, count in asked]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda ask: text_of(replica, ask[0], greedy(ask[1])), asked))
    assert together == alone


def test_grammars_and_schemas_are_obeyed_over_the_wire(replica: Running) -> None:
    said = text_of(replica, "Say", greedy(40, grammar='root ::= "llama" | "alpaca"'))
    assert said in {"llama", "alpaca"}
    said = text_of(replica, "Say", greedy(40, json_schema='{"enum": [1, 2]}'))
    assert said in {"1", "2"}
    for wrong in ({"grammar": "root ::= ("}, {"json_schema": "{"}, {"logit_bias": {10**6: 1.0}}):
        with pytest.raises(grpc.RpcError) as caught:
            text_of(replica, "Say", greedy(40, **wrong))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert text_of(replica, "Say", greedy(3)) is not None


def test_log_probabilities_come_with_the_tokens(replica: Running) -> None:
    request = pb.GenerateRequest(prompt="The", sampling=greedy(5, logprobs=3, ignore_eos=True))
    messages = list(replica.stub.Generate(request))
    told = [entry for message in messages for entry in message.logprobs]
    assert len(told) == messages[-1].usage.completion_tokens == 5
    text = b"".join(entry.piece for entry in told).decode("utf-8", "replace")
    assert text == "".join(message.delta for message in messages)
    for entry in told:
        assert entry.top[0].token == entry.token  # greedy
        assert entry.logprob == entry.top[0].logprob < 0
        assert len(entry.top) == 3


def test_texts_become_tokens_and_tokens_texts(replica: Running) -> None:
    text = "Llamas 🦙 walk."
    tokens = replica.stub.Tokenize(pb.TokenizeRequest(text=text, add_special=True)).tokens
    back = replica.stub.Detokenize(pb.DetokenizeRequest(tokens=tokens))
    assert back.text.strip() == text
    assert replica.stub.Detokenize(pb.DetokenizeRequest(tokens=tokens, special=True)).text != text
    with pytest.raises(grpc.RpcError, match=r"tokens\[1\]") as caught:
        replica.stub.Detokenize(pb.DetokenizeRequest(tokens=[1, -1]))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_token_can_end_the_text(replica: Running) -> None:
    request = pb.GenerateRequest(prompt="The", sampling=greedy(5, logprobs=0, ignore_eos=True))
    told = [e.token for m in replica.stub.Generate(request) for e in m.logprobs]
    *_, last = replica.stub.Generate(
        pb.GenerateRequest(prompt="The", sampling=greedy(5, stop_token_ids=[told[2]]))
    )
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.completion_tokens == told.index(told[2])


def test_what_a_replica_does_is_on_its_own_prometheus_page(replica: Running) -> None:
    before = replica.metrics()
    stream = replica.stub.Generate(pb.GenerateRequest(prompt="count", sampling=greedy(200)))
    next(stream)
    during = replica.metrics()
    assert during["arriero_num_requests_running"] == 1
    assert 0 < during["arriero_kv_cache_usage_perc"] <= 1
    stream.cancel()
    wait_until(lambda: replica.metrics()["arriero_num_requests_running"] == 0)
    text_of(replica, "count", greedy(7, ignore_eos=True))
    with pytest.raises(grpc.RpcError):
        text_of(replica, "count", greedy(7, top_p=float("nan")))
    after = replica.metrics()

    def more(name: str) -> float:
        return after[f"arriero_{name}"] - before.get(f"arriero_{name}", 0)

    assert more("generation_tokens_total") >= 8  # those of the caller that left, too
    assert more("prefix_cache_hits_total") > 0
    assert more("prompt_tokens_total") == more("prefix_cache_queries_total")
    assert more("time_to_first_token_seconds_count") == 2
    assert more("inter_token_latency_seconds_count") >= 3
    assert more("e2e_request_latency_seconds_count") == 1
    assert more('request_success_total{finished_reason="length"}') == 1
    assert more('request_failure_total{code="cancelled"}') == 1
    assert more('request_failure_total{code="invalid_argument"}') == 1
    assert after["arriero_num_requests_waiting"] == 0


def embedded(replica: Running, *texts: str, **more: object) -> tuple[np.ndarray, pb.EmbedResponse]:
    answer = replica.stub.Embed(pb.EmbedRequest(texts=texts, **more))  # type: ignore[arg-type]
    return np.array([e.values for e in answer.embeddings], dtype=np.float32), answer


def test_texts_become_vectors_the_same_alone_and_in_a_batch(replica: Running) -> None:
    texts = [f"{'llama ' * (i % 7)}number {i}" for i in range(9)] + ["wool " * 60]
    vectors, answer = embedded(replica, *texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert answer.pooling == "mean"
    alone = [embedded(replica, text) for text in texts]
    np.testing.assert_allclose(vectors, np.concatenate([v for v, _ in alone]), atol=1e-4)
    assert answer.usage.prompt_tokens == sum(a.usage.prompt_tokens for _, a in alone)
    raw, _ = embedded(replica, texts[0], normalize=False)
    np.testing.assert_allclose(raw[0] / np.linalg.norm(raw[0]), vectors[0], atol=1e-5)
    assert abs(np.linalg.norm(raw[0]) - 1) > 0.01


def test_vectors_are_those_of_the_library(replica: Running, tiny_llama_dir: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModel.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.no_grad():
        ids = tokenizer("The llama walks", return_tensors="pt")
        hidden = model(**ids).last_hidden_state[0].mean(dim=0)
    expected = (hidden / hidden.norm()).numpy()
    (found,), _ = embedded(replica, "The llama walks")
    assert float(found @ expected) > 0.999


def test_texts_that_cannot_be_embedded_are_refused_and_streams_go_on(replica: Running) -> None:
    for texts, field in (([], "texts"), (["fine", "word " * 2000], "texts[1]")):
        with pytest.raises(grpc.RpcError) as caught:
            embedded(replica, *texts)
        error = from_rpc_error(caught.value)
        assert [v.field for v in error.violations] == [field]  # type: ignore[attr-defined]
    alone = text_of(replica, "Once upon", greedy(40))
    with ThreadPoolExecutor(8) as pool:
        vectors = [pool.submit(embedded, replica, *["wool " * 30] * 12) for _ in range(4)]
        texts = [pool.submit(text_of, replica, "Once upon", greedy(40)) for _ in range(4)]
        assert {text.result() for text in texts} == {alone}
        np.testing.assert_allclose(vectors[0].result()[0], vectors[3].result()[0], atol=1e-4)
