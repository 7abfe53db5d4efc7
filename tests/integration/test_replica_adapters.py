"""LoRA adapters beside a model that serves: chosen by request, never mixed up."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arriero.gates.golden import Golden, log_softmax, probe_sequences
from arriero.llama import Batch, Context, Model, insert_metadata
from arriero.quantization import adapter_file
from arriero.replica import AdapterSettings, ReplicaSettings
from arriero.rpc import from_rpc_error
from arriero.rpc.channel import check_health
from arriero.store import ManifestDraft, Store
from arriero.testing.adapters import tiny_adapter
from arriero.testing.serving import CONTEXT, Running, publish, start, wait_until
from arriero.v1 import inference_pb2 as pb
from arriero.weights import LoraAdapter

LONG = "The herd went down the valley and then up again to the pass. " * 2
TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")


@dataclasses.dataclass
class Herd:
    """A base, two adapters of it as PEFT and GGUF have them, and the base with the first."""

    base: Path
    peft: Path
    adapters: dict[str, Path]
    merged: Path


@pytest.fixture(scope="module")
def herd(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Herd:
    place = tmp_path_factory.mktemp("herd")
    adapters = {}
    for name, seed in (("poems", 1), ("laws", 2)):
        peft = tiny_adapter(
            place / name, tiny_llama_dir, targets=TARGETS, scale=0.3, alpha=8, r=4, seed=seed
        )
        adapters[name] = place / f"{name}.gguf"
        adapter_file.convert(
            LoraAdapter.open(peft),
            tiny_llama_dir,
            adapters[name],
            "F32",
            name=name,
            scratch=place / f"{name}-scratch",
            log=logging.getLogger(),
        )
    merged = place / "merged"
    shutil.copytree(tiny_llama_dir, merged)
    weights = load_file(merged / "model.safetensors")
    lora = load_file(place / "poems" / "adapter_model.safetensors")
    for key, b in lora.items():
        if key.endswith("lora_B.weight"):
            a = lora[key.replace("lora_B", "lora_A")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + 2.0 * (b @ a)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return Herd(
        converted(tiny_llama_dir, place / "base.gguf"),
        place / "poems",
        adapters,
        converted(merged, place / "merged.gguf"),
    )


def converted(source: Path, target: Path) -> Path:
    tools = Path(
        os.environ.get("ARRIERO_LLAMA_CPP") or Path(sys.prefix) / "share/arriero/llama.cpp"
    )
    subprocess.run(
        [sys.executable, str(tools / "convert_hf_to_gguf.py"), str(source)]
        + ["--outfile", str(target), "--outtype", "f32"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tools / "gguf-py")},
    )
    return target


@pytest.fixture(scope="module")
def replica(herd: Herd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(tmp_path_factory.mktemp("replica"), herd.base)
    for name, path in herd.adapters.items():
        load(running, name, put(running.store, path))
    yield running
    running.end()


def put(store: Store, *files: Path, kind: str = "adapter") -> str:
    """Publish files as an artifact."""
    place = store.staging("test", os.urandom(4).hex()) / "out"
    place.mkdir(parents=True)
    for path in files:
        (place / path.name).write_bytes(path.read_bytes())
    return store.publish(place, ManifestDraft(kind=kind, name=files[0].stem)).digest


def load(replica: Running, name: str, digest: str, **more: Any) -> None:
    spec = pb.AdapterSpec(name=name, adapter=digest, **more)
    replica.stub.LoadAdapter(pb.LoadAdapterRequest(adapter=spec))


def names(replica: Running) -> list[str]:
    return [a.name for a in replica.stub.ListAdapters(pb.ListAdaptersRequest()).adapters]


def ask(replica: Running, prompt: str, adapter: str = "", count: int = 16) -> tuple[str, pb.Usage]:
    sampling = pb.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    request = pb.GenerateRequest(prompt=prompt, sampling=sampling, adapter=adapter)
    *parts, last = replica.stub.Generate(request)
    return "".join(part.delta for part in [*parts, last]), last.usage


def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def by_the_library(path: Path, prompt: str, count: int = 16) -> str:
    """What a file says greedily, without any of this engine."""
    with Model(path) as model, Context(model, n_ctx=CONTEXT, n_threads=1) as context:
        batch = Batch(512)
        ids = model.tokenize(prompt)
        row = batch.extend(ids, start=0, sequence=0)[-1]
        made: list[int] = []
        while len(made) < count:
            context.decode(batch)
            logits = context.logits(row).copy()
            logits[list(model.eog)] = -np.inf
            made.append(int(logits.argmax()))
            batch.clear()
            row = batch.add(made[-1], len(ids) + len(made) - 1, 0)
        return model.detokenize(made)


def test_base_and_adapter_say_what_the_merged_model_says(replica: Running, herd: Herd) -> None:
    for prompt in ("The llama", "Who leads the herd?", LONG):
        merged, plain = by_the_library(herd.merged, prompt), by_the_library(herd.base, prompt)
        assert merged != plain
        assert ask(replica, prompt, "poems")[0] == merged
        assert ask(replica, prompt)[0] == plain


def test_the_merged_models_golden_logits_are_the_adapters(replica: Running, herd: Herd) -> None:
    sequences = probe_sequences([range(5 + i, 45 + i) for i in range(4)], tokens=96)
    with Model(herd.merged) as model, Context(model, n_ctx=128, n_threads=1) as context:
        logits = np.concatenate([context.sequence_logits(ids) for ids in sequences])
    place = replica.store.staging("test", "golden") / "out"
    place.mkdir(parents=True)
    Golden(
        np.concatenate([np.array(s, dtype=np.int32) for s in sequences]),
        np.array([len(s) for s in sequences], dtype=np.int32),
        log_softmax(logits).astype(np.float16),
    ).write(place)
    golden = replica.store.publish(place, ManifestDraft(kind="report", name="golden")).digest
    with_it = replica.stub.Score(pb.ScoreRequest(golden=golden, adapter="poems"))
    without = replica.stub.Score(pb.ScoreRequest(golden=golden))
    assert with_it.kl_divergence < 1e-3
    assert with_it.top1_agreement == 1
    assert without.kl_divergence > 0.1


def test_streams_of_all_adapters_run_together_and_say_what_they_say_alone(
    replica: Running,
) -> None:
    asked = [
        (f"{'llama ' * (i % 5)}{i}", ("", "poems", "laws")[i % 3], 3 + (5 * i) % 17)
        for i in range(24)
    ]
    alone = [ask(replica, *item)[0] for item in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda item: ask(replica, *item)[0], asked))
    assert together == alone


def test_what_one_adapter_computed_is_never_used_for_another(replica: Running, herd: Herd) -> None:
    prompt = "Whose cache is this? " + LONG
    for adapter in ("", "poems", "laws"):
        first, new = ask(replica, prompt, adapter)
        again, old = ask(replica, prompt, adapter)
        assert new.cached_tokens < 64  # another prompt's beginning, with this adapter
        assert old.cached_tokens == old.prompt_tokens - 1
        assert again == first
    # The same name is another adapter when it comes again.
    replica.stub.UnloadAdapter(pb.UnloadAdapterRequest(name="laws"))
    load(replica, "laws", put(replica.store, herd.adapters["laws"]), scale=0.5)
    weaker, usage = ask(replica, prompt, "laws")
    assert usage.cached_tokens == 0
    assert weaker != first
    replica.stub.UnloadAdapter(pb.UnloadAdapterRequest(name="laws"))
    load(replica, "laws", put(replica.store, herd.adapters["laws"]))


def test_an_adapter_may_go_while_somebody_is_answered_with_it(replica: Running, herd: Herd) -> None:
    load(replica, "leaving", put(replica.store, herd.adapters["poems"]))
    whole, _ = ask(replica, "A long story", "leaving", 150)
    sampling = pb.SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    request = pb.GenerateRequest(prompt="A long story", sampling=sampling, adapter="leaving")
    stream = replica.stub.Generate(request)
    parts = [next(stream).delta]
    replica.stub.UnloadAdapter(pb.UnloadAdapterRequest(name="leaving"))
    error = refused(lambda: ask(replica, "too late", "leaving"))
    assert error.code == "NOT_FOUND"
    assert "adapters: laws, poems" in error.message
    parts += [message.delta for message in stream]
    assert "".join(parts) == whole
    assert ask(replica, "still there?")[0]
    gone = pb.UnloadAdapterRequest(name="leaving")
    assert refused(lambda: replica.stub.UnloadAdapter(gone)).code == "NOT_FOUND"
    replica.stub.UnloadAdapter(pb.UnloadAdapterRequest(name="leaving", allow_missing=True))


def test_what_does_not_belong_is_refused_with_the_reason(
    replica: Running, herd: Herd, tmp_path: Path
) -> None:
    def why(digest: str, name: str = "odd") -> tuple[str, str]:
        error = refused(lambda: load(replica, name, digest))
        return error.code, error.message

    wide = tiny_adapter(tmp_path / "wide", {"model.layers.0.self_attn.q_proj.weight": Info(96)})
    assert "as PEFT saves it" in why(put(replica.store, *sorted(wide.iterdir())))[1]
    config = wide / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora"', '"use_dora": true, "use_rslora"'))
    assert "DoRA" in why(put(replica.store, *sorted(wide.iterdir())))[1]
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(herd.adapters["poems"].read_bytes().replace(b"blk.1.", b"blk.7."))
    code, message = why(put(replica.store, foreign))
    assert code == "FAILED_PRECONDITION"
    assert "does not fit this model" in message
    assert "there is no blk.7." in message
    model = tmp_path / "model.gguf"
    model.write_bytes(herd.base.read_bytes())
    assert "no LoRA adapter" in why(put(replica.store, model))[1]
    assert why(put(replica.store, model, kind="gguf"))[0] == "INVALID_ARGUMENT"
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(herd.adapters["poems"].read_bytes()[:-400])
    assert why(put(replica.store, cut))[0] == "DATA_LOSS"
    other = tmp_path / "other.gguf"
    other.write_bytes(herd.adapters["poems"].read_bytes())
    assert why(put(replica.store, other), "laws")[0] == "ALREADY_EXISTS"
    assert why("sha256:" + "0" * 64)[0] == "NOT_FOUND"
    assert why(put(replica.store, other), "No Name")[0] == "INVALID_ARGUMENT"
    assert names(replica) == ["laws", "poems"]
    assert ask(replica, "still there?", "poems")[0]


@dataclasses.dataclass
class Info:
    """As `TensorInfo`, as far as `tiny_adapter` looks."""

    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size


def test_an_adapter_of_another_base_is_known_by_what_conversion_wrote(
    replica: Running, herd: Herd, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    shutil.copy(herd.base, base)
    shutil.copy(herd.adapters["poems"], adapter)
    insert_metadata(base, {"arriero.source": "sha256:aa", "arriero.adapters": "sha256:cc"})
    insert_metadata(adapter, {"arriero.source": "sha256:bb", "arriero.adapters": "sha256:dd"})
    running = start(tmp_path / "home", base)
    try:
        error = refused(lambda: load(running, "poems", put(running.store, adapter)))
        assert "belongs to sha256:bb, and this file was made from sha256:aa" in error.message
        shutil.copy(herd.adapters["poems"], adapter)
        insert_metadata(adapter, {"arriero.source": "sha256:aa", "arriero.adapters": "sha256:cc"})
        error = refused(lambda: load(running, "poems", put(running.store, adapter)))
        assert "merged into this file already" in error.message
    finally:
        running.end()


def test_a_replica_is_ready_with_its_adapters_and_keeps_them_when_its_engine_dies(
    herd: Herd, tmp_path: Path
) -> None:
    digest = put(Store.open(tmp_path / "store"), herd.adapters["poems"])
    settings = ReplicaSettings(context=CONTEXT, adapters=(AdapterSettings("poems", digest),))
    env = {"ARRIERO_ADAPTERS": settings.environment()["ARRIERO_ADAPTERS"]}
    replica = start(tmp_path, herd.base, **env)
    try:
        said, _ = ask(replica, "The llama", "poems")
        assert said == by_the_library(herd.merged, "The llama")
        load(replica, "laws", put(replica.store, herd.adapters["laws"]))
        law, _ = ask(replica, "The llama", "laws")
        failures: list[str] = []
        caller = threading.Thread(
            target=lambda: failures.append(refused(lambda: ask(replica, "go on", "laws", 200)).code)
        )
        engine = replica.engine()
        engine.suspend()  # so that it is asked before it dies
        caller.start()
        engine.kill()
        caller.join(120)
        assert failures == ["UNAVAILABLE"]
        wait_until(lambda: not engine.is_running() and check_health(replica.address))
        assert names(replica) == ["laws", "poems"]
        assert ask(replica, "The llama", "poems")[0] == said
        assert ask(replica, "The llama", "laws")[0] == law
    finally:
        replica.end()


def test_a_replica_that_cannot_have_its_adapters_does_not_serve(herd: Herd, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    digest = put(store, *sorted(herd.peft.iterdir()))
    settings = ReplicaSettings(adapters=(AdapterSettings("poems", digest),))
    done = subprocess.run(
        [sys.executable, "-m", "arriero.inference"],
        env={
            **os.environ,
            **settings.environment(),
            "ARRIERO_STORE": str(tmp_path / "store"),
            "ARRIERO_MODEL": publish(store, herd.base),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "quantize with adapter_only" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chat_uses_the_template_that_the_adapter_was_trained_with(
    replica: Running, herd: Herd, tmp_path: Path
) -> None:
    from arriero import prompts

    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content="Who leads?")],
        sampling=pb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        adapter="templated",
    )
    template = prompts.load("alpaca")
    path = tmp_path / "templated.gguf"
    shutil.copy(herd.adapters["poems"], path)
    insert_metadata(path, {"arriero.template": template.to_json()})
    load(replica, "templated", put(replica.store, path))
    try:
        said = "".join(message.delta for message in replica.stub.Chat(request))
        prompt = template.render(
            [{"role": "user", "content": "Who leads?"}],
            bos_token="<s>",
            eos_token="</s>",
            add_generation_prompt=True,
        )
        assert said == ask(replica, prompt, "poems", 8)[0]
    finally:
        replica.stub.UnloadAdapter(pb.UnloadAdapterRequest(name="templated"))
    request.adapter = "poems"
    # The base has no template of its own here.
    assert refused(lambda: list(replica.stub.Chat(request))).code == "FAILED_PRECONDITION"
