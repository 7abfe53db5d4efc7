"""GGUF adapters by llama.cpp's converter, loaded by llama.cpp beside the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates.golden import log_softmax
from arriero.llama import Context, Model, read_header
from arriero.llama.adapter import Adapter, set_adapters
from arriero.operations.job import Output
from arriero.operations.kinds import ResolveContext
from arriero.quantization.quantize import run_quantize
from arriero.quantization.quantize_spec import resolve_quantize
from arriero.settings import SourceSettings
from arriero.store import Artifact, Store
from arriero.testing.adapters import tiny_adapter
from arriero.testing.jobs import run_job
from arriero.v1 import quantization_pb2 as pb

Publish = Callable[..., Artifact]
IDS = [1, *range(260, 300)]


@pytest.fixture
def adapter(publish: Publish, tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., Artifact]:
    """Publishes an adapter of the tiny model."""

    def make(change: dict[str, Any] | None = None, **options: Any) -> Artifact:
        options = {"targets": ("q_proj", "k_proj", "v_proj", "down_proj"), "scale": 0.3} | options
        directory = tiny_adapter(tmp_path / "adapter", tiny_llama_dir, **options)
        if change:
            path = directory / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        made = publish(directory, "adapter", name="tuned")
        shutil.rmtree(directory)
        return made

    return make


def converted(
    model: Artifact, adapter: Artifact, store: Store, tmp_path: Path, *types: str, **fields: Any
) -> list[Output]:
    spec = pb.QuantizeSpec(
        model=model.digest, adapters=[adapter.digest], types=types, adapter_only=True, **fields
    )
    context = ResolveContext(store, {"model": [model], "adapters": [adapter]}, SourceSettings())
    resolved = resolve_quantize(spec, context).spec
    inputs = {"model": model, "adapters": [adapter]}
    return run_job(run_quantize, "quantize", resolved, inputs, store, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "dtype": "float16"},
    ],
    ids=["lora", "rslora", "patterns", "rslora-patterns"],
)
def test_base_and_adapter_say_what_the_merged_model_says(
    model: Artifact,
    adapter: Callable[..., Artifact],
    store: Store,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    tuned = adapter(**options)
    (made,) = converted(model, tuned, store, tmp_path / "adapter", "f32")
    assert (made.name, made.kind) == ("F32", "adapter")
    assert made.labels == {"quant_type": "F32", "format": "gguf"}
    (path,) = made.path.iterdir()
    assert path.name == "tuned.F32.gguf"
    assert read_header(path).metadata["arriero.adapters"] == tuned.digest
    merged, base = (
        run_job(
            run_quantize,
            "quantize",
            pb.QuantizeSpec(model=model.digest, types=["F32"], weights=[1.0] * len(adapters)),
            {"model": model, "adapters": adapters},
            store,
            tmp_path / f"merged{len(adapters)}",
        )[0]
        for adapters in ([tuned], [])
    )
    expected = logprobs(next(merged.path.iterdir()))
    plain = logprobs(next(base.path.iterdir()))
    found = logprobs(next(base.path.iterdir()), path)
    assert np.abs(plain - expected).max() > 0.5, "the adapter changes too little to tell"
    np.testing.assert_allclose(found, expected, atol=2e-3)
    half = logprobs(next(base.path.iterdir()), path, scale=0.0)
    np.testing.assert_allclose(half, plain, atol=1e-4)


def logprobs(model: Path, adapter: Path | None = None, scale: float = 1.0) -> Any:
    with Model(model) as loaded, Context(loaded, n_ctx=64, n_threads=1) as context:
        if adapter is None:
            return log_softmax(context.sequence_logits(IDS))
        with Adapter(loaded, adapter) as lora:
            set_adapters(context, [(lora, scale)])
            found = log_softmax(context.sequence_logits(IDS))
            set_adapters(context, [])
        return found


def test_several_types_are_written_in_one_stage(
    model: Artifact, adapter: Callable[..., Artifact], store: Store, tmp_path: Path
) -> None:
    outputs = converted(model, adapter(), store, tmp_path, "F16", "F32")
    assert [o.name for o in outputs] == ["F16", "F32"]
    sizes = [next(o.path.iterdir()).stat().st_size for o in outputs]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_a_gguf_adapter_cannot_carry_is_refused(
    model: Artifact,
    adapter: Callable[..., Artifact],
    store: Store,
    tmp_path: Path,
    change: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(FailedPrecondition, match=words):
        converted(model, adapter(change), store, tmp_path, "F16")


def test_dora_and_saved_modules_are_refused_with_what_to_do(
    model: Artifact, publish: Publish, store: Store, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    for change, name, words in (
        ({"use_dora": True}, "", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", "whole tensors .*lm_head"),
    ):
        directory = tiny_adapter(tmp_path / words, tiny_llama_dir)
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        if name:
            tensors[f"base_model.model.{name}"] = np.ones((384, 64), dtype=np.float32)
        else:
            for key in [k for k in tensors if "lora_B" in k]:
                magnitude = key.replace("lora_B.weight", "lora_magnitude_vector")
                tensors[magnitude] = np.ones(len(tensors[key]), dtype=np.float32)
        save_file(tensors, path)
        config = directory / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(FailedPrecondition, match=f"{words}.*merge it instead"):
            converted(model, publish(directory, "adapter"), store, tmp_path, "F16")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"types": ["Q4_K_M"]}, "types[0]"),
        ({"weights": [0.5]}, "weights"),
        ({"method": "onepass"}, "method"),
        ({"tensor_types": {"ffn": "Q6_K"}}, "tensor_types"),
    ],
)
def test_knobs_without_a_meaning_for_adapters_are_refused(
    model: Artifact,
    adapter: Callable[..., Artifact],
    store: Store,
    fields: dict[str, Any],
    field: str,
) -> None:
    tuned = adapter()
    spec = pb.QuantizeSpec(
        model=model.digest,
        adapters=[tuned.digest],
        adapter_only=True,
        **({"types": ["F16"]} | fields),
    )
    context = ResolveContext(store, {"model": [model], "adapters": [tuned]}, SourceSettings())
    with pytest.raises(InvalidArgument) as caught:
        resolve_quantize(spec, context)
    assert caught.value.violations[0].field == field
    spec.ClearField("adapters")
    spec.types[:] = ["F16"]
    with pytest.raises(InvalidArgument):
        resolve_quantize(spec, context)


def test_an_adapter_of_another_model_is_not_loaded(
    model: Artifact,
    adapter: Callable[..., Artifact],
    store: Store,
    tiny_gguf: Path,
    tmp_path: Path,
) -> None:
    from arriero.errors import DataLoss

    with Model(tiny_gguf) as loaded, pytest.raises(DataLoss, match="cannot load the adapter"):
        Adapter(loaded, tiny_gguf)
