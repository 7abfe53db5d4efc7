"""Hugging Face checkpoints served by transformers, with the API of all replicas."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from arriero.gates.golden import Golden, log_softmax, probe_sequences
from arriero.quantization import bnb
from arriero.replica import ReplicaSettings
from arriero.rpc import from_rpc_error
from arriero.rpc.channel import check_health
from arriero.store import ManifestDraft, Store
from arriero.testing.models import VOCABULARY, tiny_llama
from arriero.testing.serving import Running, start, wait_until
from arriero.v1 import inference_pb2 as pb


def serve(home: Path, checkpoint: Path, unused: Path, **env: str) -> Running:
    return start(home, unused, ARRIERO_MODEL=put(Store.open(home / "store"), checkpoint), **env)


def put(store: Store, checkpoint: Path) -> str:
    place = store.staging("test", "model") / "out"
    place.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return store.publish(place, ManifestDraft(kind="model", name="tiny")).digest


def engine(replica: Running) -> psutil.Process:
    children = psutil.Process(replica.process.pid).children()
    return next(c for c in children if "arriero.inference.checkpoint_engine" in c.cmdline())


@pytest.fixture(scope="module")
def replica(
    tiny_llama_dir: Path, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    running = serve(tmp_path_factory.mktemp("checkpoint"), tiny_llama_dir, tiny_gguf)
    yield running
    running.end()


@pytest.fixture(scope="module")
def peer(tiny_llama_dir: Path) -> tuple[Any, Any]:
    """The same checkpoint as transformers has it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_llama_dir)


def text_of(replica: Running, prompt: str, count: int = 12, **sampling: Any) -> str:
    params = pb.SamplingParams(**{"temperature": 0, "max_tokens": count, **sampling})
    stream = replica.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=params))
    return "".join(message.delta for message in stream)


def refused(replica: Running, **sampling: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        text_of(replica, "The", **sampling)
    return from_rpc_error(caught.value)


def test_greedy_tokens_are_what_transformers_generates(replica: Running, peer: Any) -> None:
    model, tokenizer = peer
    for prompt in ("The llama", "Number 12 of the herd walks"):
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        sampling = pb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
        stream = replica.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
        found = [entry.token for message in stream for entry in message.logprobs]
        assert found == made[0, ids["input_ids"].shape[1] :].tolist()


def test_a_stream_alone_and_among_others_says_the_same(replica: Running) -> None:
    asked = [(f"{'llama ' * (i % 4)}{i}", 2 + (5 * i) % 11) for i in range(12)]
    alone = [text_of(replica, *item) for item in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda item: text_of(replica, *item), asked))
    assert together == alone


def test_sampling_stops_and_what_ends_a_text(replica: Running) -> None:
    first = text_of(replica, "Once", temperature=1.5, seed=7)
    assert text_of(replica, "Once", temperature=1.5, seed=7) == first
    assert text_of(replica, "Once", temperature=1.5, seed=8) != first
    whole = text_of(replica, "Stop here", 24)
    cut = whole[len(whole) // 2 :][:2]
    assert text_of(replica, "Stop here", 24, stop=[cut]) == whole[: whole.index(cut)]
    assert text_of(replica, "The", 5, logit_bias={100: 1000.0}) != text_of(replica, "The", 5)
    request = pb.GenerateRequest(
        prompt="The", sampling=pb.SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    )
    messages = list(replica.stub.Generate(request))
    told = [entry for message in messages for entry in message.logprobs]
    assert len(told) == messages[-1].usage.completion_tokens
    assert all(e.top[0].token == e.token and e.logprob == e.top[0].logprob < 0 for e in told)
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"mirostat": 2}, "sampling.mirostat"),
        ({"grammar": 'root ::= "a"'}, "sampling.grammar"),
        ({"json_schema": "{}"}, "sampling.json_schema"),
        ({"logit_bias": {10**6: 1.0}}, "sampling.logit_bias[1000000]"),
        ({"top_p": float("nan")}, "sampling.top_p"),
    ],
)
def test_what_this_backend_has_not_is_refused_by_its_field(
    replica: Running, sampling: dict[str, Any], field: str
) -> None:
    assert [v.field for v in refused(replica, **sampling).violations] == [field]


def test_tokens_vectors_and_golden_logits_are_the_models(replica: Running, peer: Any) -> None:
    import torch

    model, tokenizer = peer
    ids = tokenizer("The llama walks")["input_ids"]
    request = pb.TokenizeRequest(text="The llama walks", add_special=True)
    assert list(replica.stub.Tokenize(request).tokens) == ids
    back = replica.stub.Detokenize(pb.DetokenizeRequest(tokens=ids))
    assert back.text == tokenizer.decode(ids, skip_special_tokens=True)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    hidden = out.hidden_states[-1][0].mean(dim=0)
    answer = replica.stub.Embed(pb.EmbedRequest(texts=["The llama walks", "wool"]))
    found = np.array(answer.embeddings[0].values)
    np.testing.assert_allclose(found, (hidden / hidden.norm()).numpy(), atol=1e-5)
    sequences = probe_sequences([range(5 + i, 45 + i) for i in range(4)], tokens=96)
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([s])).logits[0].numpy() for s in sequences]
    place = replica.store.staging("test", "golden") / "out"
    place.mkdir(parents=True)
    Golden(
        np.concatenate([np.array(s, dtype=np.int32) for s in sequences]),
        np.array([len(s) for s in sequences], dtype=np.int32),
        log_softmax(np.concatenate(logits)).astype(np.float16),
    ).write(place)
    golden = replica.store.publish(place, ManifestDraft(kind="report", name="golden")).digest
    score = replica.stub.Score(pb.ScoreRequest(golden=golden))
    assert score.kl_divergence < 1e-4
    assert score.top1_agreement == 1
    assert replica.stub.GetModel(pb.GetModelRequest()).vocab_size == 384


def test_callers_that_leave_and_engines_that_die(replica: Running) -> None:
    for _ in range(9):
        sampling = pb.SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        stream = replica.stub.Generate(pb.GenerateRequest(prompt="long", sampling=sampling))
        assert len(list(itertools.islice(stream, 2))) == 2
        stream.cancel()
    said = text_of(replica, "next", 5)
    old = engine(replica)
    old.suspend()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(refused, replica)
        old.send_signal(signal.SIGKILL)
        assert asked.result(120).code == "UNAVAILABLE"
    wait_until(lambda: not old.is_running() and check_health(replica.address))
    assert text_of(replica, "next", 5) == said
    spec = pb.AdapterSpec(name="a", adapter=replica.digest)
    with pytest.raises(grpc.RpcError) as caught:
        replica.stub.LoadAdapter(pb.LoadAdapterRequest(adapter=spec))
    assert from_rpc_error(caught.value).code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")


def test_a_model_that_llama_cpp_does_not_know(
    tiny_llama_dir: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=384,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        init_std=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    directory = tmp_path / "opt"
    OPTForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(directory)
    replica = serve(tmp_path, directory, tiny_gguf)
    try:
        asked = [(f"{'llama ' * i}walks", 6 + i) for i in range(4)]
        alone = [text_of(replica, *item, ignore_eos=True) for item in asked]
        with ThreadPoolExecutor(4) as pool:
            together = pool.map(lambda item: text_of(replica, *item, ignore_eos=True), asked)
            assert list(together) == alone
        assert all(alone)
    finally:
        replica.end()


# Chats

# ChatML that takes tools, and what they answered.
TOOLED = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}

CALL = 'So: <tool_call>{"name": "weather", "arguments": {"city": "Lima"}}</tool_call>'
# The token that is spelled so: this backend has no grammar to make it say that.
SPELLED = VOCABULARY - 1


def respell(path: Path, token: int, text: str) -> None:
    """Another text for a token, which no text is tokenized to from then on."""
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    old = next(piece for piece, i in vocab.items() if i == token)
    data["model"]["merges"] = [
        pair for pair in data["model"]["merges"] if old not in (*pair, "".join(pair))
    ]
    del vocab[old]
    vocab[text.replace(" ", "Ġ")] = token  # as byte-level BPE writes a space
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Any, Any]]:
    """A replica of a checkpoint with a template of its own, and both as transformers has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = tmp_path_factory.mktemp("chatting")
    directory = tiny_llama(home / "model", tokenizer="smollm", seed=3)
    respell(directory / "tokenizer.json", SPELLED, CALL)
    (directory / "chat_template.jinja").write_text(TOOLED, encoding="utf-8")
    running = serve(home, directory, directory / "config.json")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    yield running, model, AutoTokenizer.from_pretrained(directory)
    running.end()


def asked(text: str = "Who walks?", **more: Any) -> pb.ChatRequest:
    params = {"temperature": 0, "max_tokens": 16, **more.pop("sampling", {})}
    return pb.ChatRequest(
        messages=[
            pb.Message(role="system", content="Be brief."),
            pb.Message(role="user", content=text),
        ],
        sampling=pb.SamplingParams(**params),
        **more,
    )


def test_a_chat_says_what_transformers_makes_of_the_rendered_template(
    chatting: tuple[Running, Any, Any],
) -> None:
    replica, model, tokenizer = chatting
    request = asked(sampling={"ignore_eos": True, "logprobs": 0})
    messages = list(replica.stub.Chat(request))
    ids = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in request.messages],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    prompt = ids["input_ids"].shape[1]
    assert [e.token for m in messages for e in m.logprobs] == made[0, prompt:].tolist()
    # It came in parts, and its end tells what it took.
    assert sum(bool(message.delta) for message in messages) > 1
    last = messages[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, 16)
    assert last.usage.prompt_seconds > 0
    assert not any(message.HasField("usage") for message in messages[:-1])


def test_a_chat_ends_at_the_templates_end_of_turn_and_at_stop_strings(
    chatting: tuple[Running, Any, Any],
) -> None:
    replica, _, tokenizer = chatting
    whole = "".join(m.delta for m in replica.stub.Chat(asked(sampling={"ignore_eos": True})))
    cut = whole[len(whole) // 2 :][:2]
    *said, last = replica.stub.Chat(asked(sampling={"ignore_eos": True, "stop": [cut]}))
    assert "".join(m.delta for m in (*said, last)) == whole[: whole.index(cut)]
    assert last.finish_reason == pb.FINISH_REASON_STOP
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    *said, last = replica.stub.Chat(asked(sampling={"logit_bias": {end: 1e6}}))
    assert "".join(m.delta for m in (*said, last)) == ""
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.completion_tokens <= 1


def test_tools_reach_the_template_and_calls_come_back_apart_from_the_text(
    chatting: tuple[Running, Any, Any],
) -> None:
    replica, _, tokenizer = chatting
    tools = json.dumps([WEATHER])
    *_, plain = replica.stub.Chat(asked())
    *_, tooled = replica.stub.Chat(asked(tools=tools))
    more = "<|im_start|>system\n" + json.dumps(WEATHER) + "\n<|im_end|>\n"
    added = len(tokenizer(more, add_special_tokens=False)["input_ids"])
    assert tooled.usage.prompt_tokens == plain.usage.prompt_tokens + added
    biased = {"logit_bias": {SPELLED: 1e6}, "max_tokens": 1}
    said = list(replica.stub.Chat(asked(tools=tools, sampling=biased)))
    assert "".join(message.delta for message in said) == "So: "
    assert said[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    (found,) = said[-1].tool_calls
    assert (found.name, json.loads(found.arguments)) == ("weather", {"city": "Lima"})
    # Without tools it is text like any other.
    said = list(replica.stub.Chat(asked(sampling=biased)))
    assert "".join(message.delta for message in said) == CALL
    assert said[-1].finish_reason == pb.FINISH_REASON_LENGTH
    # What was called and answered goes into the next prompt.
    request = asked(tools=tools)
    calls = json.dumps([{"id": "1", "type": "function", "function": found_call(found)}])
    request.messages.extend(
        [
            pb.Message(role="assistant", tool_calls=calls),
            pb.Message(role="tool", content="It rains.", tool_call_id="1"),
        ]
    )
    *_, answered = replica.stub.Chat(request)
    assert answered.usage.prompt_tokens > tooled.usage.prompt_tokens + 20


def found_call(call: pb.ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def test_who_cannot_chat_or_takes_no_tools_says_so(
    replica: Running, chatting: tuple[Running, Any, Any]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(replica.stub.Chat(asked()))  # this model has no template
    assert from_rpc_error(caught.value).code == "FAILED_PRECONDITION"
    request = asked()
    request.messages[0].role = "oracle"
    with pytest.raises(grpc.RpcError) as caught:
        list(chatting[0].stub.Chat(request))
    assert from_rpc_error(caught.value).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("kind", ["BNB_INT8", "BNB_NF4"])
def test_checkpoints_of_bitsandbytes(
    kind: str, tiny_llama_dir: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    bnb.write(tiny_llama_dir, tmp_path / "small", kind)
    replica = serve(tmp_path, tmp_path / "small", tiny_gguf)
    try:
        assert len(text_of(replica, "The llama", 6, ignore_eos=True)) > 0
    finally:
        replica.end()


def test_settings_that_are_llama_cpps_and_files_that_are_none_end_the_replica(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store = Store.open(tmp_path / "store")
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in tiny_llama_dir.iterdir():
        data = path.read_bytes()
        (torn / path.name).write_bytes(data[:2000] if path.suffix == ".safetensors" else data)

    def ends(checkpoint: Path, **settings: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "arriero.inference"],
            env={
                **os.environ,
                **ReplicaSettings(**settings).environment(),
                "ARRIERO_STORE": str(tmp_path / "store"),
                "ARRIERO_MODEL": put(store, checkpoint),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "cache_type_k" in ends(tiny_llama_dir, cache_type_k="BF16")
    assert "llama.cpp does not serve artifacts of kind model" in ends(
        tiny_llama_dir, backend="llama.cpp"
    )
    assert "transformers cannot load this checkpoint" in ends(torn)
