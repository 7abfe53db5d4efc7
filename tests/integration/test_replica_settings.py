"""Replicas that are set otherwise than by default: long contexts, caches, memory."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from arriero.inference.engine import tell_device
from arriero.replica import ReplicaSettings, RopeSettings
from arriero.store import Store
from arriero.testing.serving import Running, publish, start
from arriero.v1 import inference_pb2 as pb

TRAINED = 2048
# Of what is evaluated in other batches.
ROUNDING = 3e-3
NTK = ReplicaSettings(context=2 * TRAINED, slots=1, threads=1, rope=RopeSettings("ntk"))
BOTH = ReplicaSettings(
    context=2 * TRAINED, slots=1, threads=1, rope=RopeSettings("ntk", native_slots=1)
)
NATIVE = ReplicaSettings(context=TRAINED, slots=1, threads=1)


@pytest.fixture(scope="module")
def replicas(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Running]]:
    running = {
        name: start(tmp_path_factory.mktemp(name), tiny_gguf, **settings.environment())
        for name, settings in (("native", NATIVE), ("ntk", NTK), ("both", BOTH))
    }
    yield running
    for replica in running.values():
        replica.end()


def logprobs(replica: Running, prompt: str, limit: int | None, count: int = 10) -> list[float]:
    """Of the first tokens of an answer; a caller that has them leaves."""
    sampling = pb.SamplingParams(temperature=0, ignore_eos=True, logprobs=0)
    if limit is not None:
        sampling.max_tokens = limit
    stream = replica.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
    told = (entry.logprob for message in stream for entry in message.logprobs)
    found = list(itertools.islice(told, count))
    stream.cancel()
    return found


def test_what_fits_the_trained_context_runs_unscaled_and_the_rest_scaled(
    replicas: dict[str, Running],
) -> None:
    prompt = "The herd goes over the pass and down again. " * 3
    native, scaled = (logprobs(replicas[name], prompt, 10) for name in ("native", "ntk"))
    assert np.abs(np.subtract(native, scaled)).max() > 10 * ROUNDING
    both = replicas["both"]
    np.testing.assert_allclose(logprobs(both, prompt, 10), native, atol=ROUNDING)
    # An answer that might not fit, and one without a limit, are long.
    for limit in (TRAINED, None):
        np.testing.assert_allclose(logprobs(both, prompt, limit), scaled, atol=ROUNDING)
    long = "the llama " * 1200
    asked = pb.GenerateRequest(prompt=long, sampling=pb.SamplingParams(temperature=0, max_tokens=4))
    *_, last = both.stub.Generate(asked)
    assert last.usage.prompt_tokens > TRAINED
    with ThreadPoolExecutor(4) as pool:
        limits = [10, TRAINED, 10, TRAINED]
        found = list(pool.map(lambda limit: logprobs(both, prompt, limit), limits))
    for limit, figures in zip(limits, found, strict=True):
        np.testing.assert_allclose(figures, native if limit == 10 else scaled, atol=ROUNDING)
    model = both.stub.GetModel(pb.GetModelRequest())
    assert model.context_length == 2 * TRAINED


def test_a_long_text_is_embedded_in_parts_as_in_one(replicas: dict[str, Running]) -> None:
    text = "wool and salt " * 200  # more tokens than one batch takes
    found = [
        replicas[name].stub.Embed(pb.EmbedRequest(texts=[text])) for name in ("native", "both")
    ]
    assert found[0].usage.prompt_tokens > 512
    vectors = [np.array(answer.embeddings[0].values) for answer in found]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    # Beside one that only the long context holds, too.
    request = pb.EmbedRequest(texts=["wool " * 600, text, "wool"])
    answer = replicas["both"].stub.Embed(request)
    np.testing.assert_allclose(np.array(answer.embeddings[1].values), vectors[0], atol=1e-5)
    scaled = replicas["ntk"].stub.Embed(pb.EmbedRequest(texts=[text]))
    assert np.abs(vectors[0] - np.array(scaled.embeddings[0].values)).max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        ReplicaSettings(context=256, threads=1, mmap=False, flash_attention="off"),
        ReplicaSettings(context=256, threads=1, mlock=True, gpu_layers=-1, flash_attention="on"),
        ReplicaSettings(context=256, threads=1, cache_type_k="BF16", cache_type_v="BF16"),
    ],
    ids=["copied", "locked", "bf16-cache"],
)
def test_every_setting_serves(settings: ReplicaSettings, tiny_gguf: Path, tmp_path: Path) -> None:
    replica = start(tmp_path, tiny_gguf, **settings.environment())
    try:
        maps = Path(f"/proc/{replica.engine().pid}/maps").read_text()
        assert (".gguf" in maps) == settings.mmap
        assert len(logprobs(replica, "The llama", 5, 5)) == 5
    finally:
        replica.end()


@pytest.mark.parametrize(
    ("layers", "gpu", "said"),
    [
        (-1, False, "finds no GPU: the model runs on the CPU"),
        (0, True, "gpu_layers: -1 puts all"),
        (0, False, ""),
        (20, True, ""),
    ],
)
def test_a_model_on_another_device_than_expected_is_told(
    caplog: pytest.LogCaptureFixture, layers: int, gpu: bool, said: str
) -> None:
    tell_device(layers, gpu=gpu)
    assert (said in caplog.text) if said else not caplog.text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (ReplicaSettings(cache_type_k="Q8_0"), "does not divide n_embd_head_k=16"),
        (
            ReplicaSettings(context=1024, rope=RopeSettings("ntk", native_slots=1)),
            "within the 2048 that the model was trained with",
        ),
    ],
)
def test_what_this_model_cannot_have_ends_the_replica_with_the_reason(
    settings: ReplicaSettings, why: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store.open(tmp_path / "store")
    done = subprocess.run(
        [sys.executable, "-m", "arriero.inference"],
        env={
            **os.environ,
            **settings.environment(),
            "ARRIERO_STORE": str(tmp_path / "store"),
            "ARRIERO_MODEL": publish(store, tiny_gguf),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr
