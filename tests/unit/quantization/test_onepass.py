"""One pass against the chain that everyone uses: merge, convert, llama-quantize."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import torch as torch_file
from safetensors.numpy import load_file, save_file

from arriero.errors import DataLoss, DiskFull, FailedPrecondition, Preempted
from arriero.gates import Verdict
from arriero.llama import (
    Header,
    Importance,
    Model,
    Recipe,
    plan_types,
    quantize,
    read_header,
    resolve_type,
)
from arriero.llama.activations import Activations
from arriero.operations.job import Job, Output
from arriero.quantization import converter, imatrix, onepass
from arriero.quantization import quantize as quantize_module
from arriero.quantization.quantize import run_quantize
from arriero.store import Artifact, Store
from arriero.store.files import sha256_file
from arriero.testing.adapters import tiny_adapter
from arriero.testing.jobs import run_job
from arriero.testing.models import tiny_llama
from arriero.v1 import quantization_pb2 as pb
from arriero.v1 import types_pb2
from arriero.weights import MergedWeights, Weights, WeightsWriter

Publish = Callable[..., Artifact]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# 576 columns are no whole blocks of 256: K-quants fall back, as for SmolLM2.
WIDTH = 576


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide") / "m"
    return tiny_llama(directory, hidden=WIDTH, inner=768, dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "a", wide, targets=LINEAR)


@pytest.fixture(scope="module")
def official(wide: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged to disk, and converted by llama.cpp's own script as a person would run it."""
    directory = tmp_path_factory.mktemp("official")
    view = converter.prepare_view(wide, directory / "merged", None)
    (view / "model.safetensors").unlink()
    merged = MergedWeights.open(wide, [adapter], [1.0])
    with WeightsWriter(view, list(merged.values())) as writer:
        for name in merged:
            writer.write(name, merged.tensor(name))
    target = directory / "master.gguf"
    script = converter.locate() / "convert_hf_to_gguf.py"
    subprocess.run(
        [sys.executable, str(script), str(view), "--outfile", str(target), "--outtype", "bf16"],
        check=True,
        capture_output=True,
    )
    return target


@pytest.fixture(scope="module")
def outline(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> converter.Outline:
    directory = tmp_path_factory.mktemp("outline")
    view = converter.prepare_view(wide, directory / "view" / "m", None)
    return converter.outline(
        converter.Conversion(view, "bf16", "m", {}),
        directory / "outline.gguf",
        log=directory / "log",
    )


@pytest.fixture
def outlined(outline: converter.Outline, monkeypatch: pytest.MonkeyPatch) -> converter.Outline:
    """Jobs get the wide model's outline without starting the converter again."""
    monkeypatch.setattr(converter, "outline", lambda *_, **__: outline)
    monkeypatch.setattr(quantize_module, "prove_tokens", lambda *_, **__: None)
    return outline


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    header, data = read_header(path), path.read_bytes()
    found = {}
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        found[tensor.name] = (tensor.type, data[start : start + tensor.size])
    return found


def run(
    store: Store,
    tmp_path: Path,
    inputs: Mapping[str, Artifact | list[Artifact]],
    *types: str,
    prepare: Callable[[Job], None] | None = None,
    **fields: object,
) -> dict[str, Output]:
    spec = pb.QuantizeSpec(types=types, **fields)  # type: ignore[arg-type]
    spec.gates["quant.kld"] = types_pb2.GATE_MODE_SKIP  # no golden logits where none came
    outputs = run_job(run_quantize, "quantize", spec, inputs, store, tmp_path, prepare=prepare)
    return {output.name: output for output in outputs}


def file_of(output: Output) -> Path:
    (path,) = output.path.glob("*.gguf")
    return path


def random_importance(header: Header) -> Importance:
    draw = np.random.default_rng(7)
    return Importance(
        {
            tensor.name: draw.gamma(2.0, size=tensor.shape[0]).astype(np.float32)
            for tensor in header.tensors
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        },
        "random",
        3,
    )


@pytest.fixture(scope="module")
def matrix(outline: converter.Outline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report as somebody with llama-imatrix would push it, by llama.cpp's own writer."""
    import gguf

    directory = tmp_path_factory.mktemp("matrix")
    writer = gguf.GGUFWriter(directory / "imatrix.gguf", arch="")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 3)
    for name, values in random_importance(read_header(outline.path)).values.items():
        writer.add_tensor(f"{name}.in_sum2", (values * 10).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[10]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory


PLAIN = ("F32", "F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_S", "Q2_K", "IQ4_XS", "TQ2_0")


def test_files_are_those_of_merging_converting_and_quantizing(
    wide: Path, adapter: Path, official: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    inputs = {
        "model": publish(wide, "model", name="wide"),
        "adapters": [publish(adapter, "adapter", name="tuned")],
    }
    jobs: list[Job] = []
    made = run(store, tmp_path, inputs, *PLAIN, prepare=jobs.append)
    assert list(made) == list(PLAIN)
    for name, output in made.items():
        path, expected = file_of(output), tmp_path / f"{name}.gguf"
        quantize(official, expected, resolve_type(name))
        assert tensors_of(path) == tensors_of(expected), name
        assert list(tensors_of(path)) == list(tensors_of(expected))
        assert output.labels["method"] == "onepass"
        assert path.name == f"tuned.{name}.gguf"
        written = output.digests[path.name]
        assert (written.size, written.sha256) == sha256_file(path)
        header = read_header(path)
        assert header.metadata["general.file_type"] == resolve_type(name).ftype
        assert header.metadata["arriero.adapters"] == inputs["adapters"][0].digest  # type: ignore[index]
    kinds = {t.type for t in read_header(file_of(made["Q4_K_M"])).tensors}
    assert {"Q4_K", "Q5_0"} <= kinds  # some fell back, some did not
    assert made["Q4_K_M"].metrics["fallback_tensors"] > 0
    assert made["Q8_0"].metrics["fallback_tensors"] == 0
    # Nothing of the size of a model was left, or lay between.
    assert not list(jobs[0].checkpoints.iterdir())


def test_both_methods_give_the_same_bytes(
    wide: Path, adapter: Path, matrix: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    inputs = {
        "model": publish(wide, "model", name="wide"),
        "adapters": [publish(adapter, "adapter", name="tuned")],
        "imatrix": publish(matrix, "report"),
    }
    fields = {
        "tensor_types": {"ffn_down": "Q6_K", r"blk\.0\.ffn_down": "Q5_0"},
        "output_tensor_type": "Q8_0",
        "token_embedding_type": "Q5_1",
    }
    types = ("Q4_K_M", "IQ2_XS", "IQ3_S", "Q2_K_S", "Q8_0")
    one = run(store, tmp_path / "one", inputs, *types, method="onepass", **fields)
    other = run(store, tmp_path / "other", inputs, *types, method="reference", **fields)
    for name in types:
        assert file_of(one[name]).read_bytes() == file_of(other[name]).read_bytes(), name
    header = read_header(file_of(one["Q4_K_M"]))
    kinds = {tensor.name: tensor.type for tensor in header.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q5_0"
    assert kinds["blk.1.ffn_down.weight"] == "Q6_K"
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == "Q5_1"
    assert header.metadata["quantize.imatrix.entries_count"] == 14


@pytest.mark.parametrize(
    ("fields", "embeddings"),
    [
        ({}, "Q6_K"),  # as an output layer, since it is one too
        ({"output_tensor_type": "Q5_0"}, "Q5_0"),
        ({"token_embedding_type": "Q4_1"}, "Q4_1"),
    ],
)
def test_tied_embeddings_are_quantized_as_llama_quantize_does(
    store: Store, publish: Publish, tmp_path: Path, fields: dict[str, str], embeddings: str
) -> None:
    tied = tiny_llama(tmp_path / "tied", hidden=256, inner=256, layers=1)
    weights = load_file(str(tied / "model.safetensors"))
    del weights["lm_head.weight"]
    save_file(weights, str(tied / "model.safetensors"))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    inputs = {"model": publish(tied, "model", name="tied")}
    made = [
        run(store, tmp_path / method, inputs, "Q4_K_M", method=method, **fields)["Q4_K_M"]
        for method in ("onepass", "reference")
    ]
    one, other = (file_of(output).read_bytes() for output in made)
    assert one == other
    kinds = {tensor.name: tensor.type for tensor in read_header(file_of(made[0])).tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == embeddings


@pytest.mark.parametrize("method", ["onepass", "reference"])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"output_tensor_type": "Q4_K"}, "output.weight"),
        ({"token_embedding_type": "IQ4_XS"}, "token_embd.weight"),
    ],
)
def test_a_type_that_does_not_fit_is_refused_in_words(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    method: str,
    fields: dict[str, object],
    name: str,
) -> None:
    # llama.cpp has no fallback for these two, and aborts the process.
    inputs = {"model": publish(wide, "model", name="wide")}
    with pytest.raises(FailedPrecondition, match=rf"{name} has rows of 576 numbers, .* of 256"):
        run(store, tmp_path, inputs, "Q8_0", method=method, **fields)


def test_an_override_that_changes_nothing_is_refused(
    wide: Path, outlined: converter.Outline, store: Store, publish: Publish, tmp_path: Path
) -> None:
    inputs = {"model": publish(wide, "model", name="wide")}
    overrides = {"ffn_dwon": "Q6_K", "ffn_down": "Q6_K"}
    with pytest.raises(FailedPrecondition, match=r"'ffn_dwon' is found in none.*token_embd"):
        run(store, tmp_path, inputs, "Q8_0", tensor_types=overrides)


def test_tokens_that_an_adapter_brings_are_in_the_file(
    tiny_llama_dir: Path,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    path, base = str(directory / "adapter_model.safetensors"), Weights.open(tiny_llama_dir)
    rows = {
        f"base_model.model.{name}": base.tensor(name)[[*range(384), 5, 6]].clone()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    torch_file.save_file({**torch_file.load_file(path), **rows}, path)
    data = json.loads((tiny_llama_dir / "tokenizer.json").read_text())
    more = [{**data["added_tokens"][0], "content": f"<n{i}>", "id": 384 + i} for i in range(2)]
    data["added_tokens"] += more
    (directory / "tokenizer.json").write_text(json.dumps(data))
    inputs = {
        "model": publish(tiny_llama_dir, "model", name="tiny"),
        "adapters": [publish(directory, "adapter", name="grown")],
    }
    jobs: list[Job] = []
    made = run(store, tmp_path, inputs, "Q8_0", prepare=jobs.append)["Q8_0"]
    verdicts = {result.gate: result.verdict for result in jobs[0].gates.results}
    assert verdicts["tokenizer.match"] is verdicts["gguf.tokens"] is Verdict.PASSED
    with Model(file_of(made), vocab_only=True) as file:
        assert file.tokenize("<n1>", parse_special=True)[-1] == 385
    # As the converter alone makes it of a SentencePiece model and tokenizer.json.
    with monkeypatch.context() as patch:
        patch.setattr(converter, "added_tokens", lambda _: {})
        run(store, tmp_path / "lost", inputs, "Q8_0", prepare=jobs.append)
    [lost] = [r for r in jobs[1].gates.results if r.gate == "gguf.tokens"]
    assert lost.verdict is Verdict.FAILED
    assert "2 added tokens are not in the file: '<n0>', id 384" in lost.detail
    # Without rows for them the base's tokenizer stays, and the gate says why.
    torch_file.save_file(
        {n: t for n, t in torch_file.load_file(path).items() if n not in rows}, path
    )
    inputs["adapters"] = [publish(directory, "adapter", name="bare")]
    run(store, tmp_path / "bare", inputs, "Q8_0", prepare=jobs.append)
    [refused] = [r for r in jobs[2].gates.results if r.gate == "tokenizer.match"]
    assert refused.verdict is Verdict.FAILED
    assert "2 tokens have none" in refused.detail


def test_a_matrix_changes_the_bytes(
    wide: Path,
    outlined: converter.Outline,
    matrix: Path,
    store: Store,
    publish: Publish,
    tmp_path: Path,
) -> None:
    inputs = {"model": publish(wide, "model", name="wide")}
    plain = run(store, tmp_path / "plain", inputs, "Q4_K_M", "Q8_0")
    inputs["imatrix"] = publish(matrix, "report")
    weighed = run(store, tmp_path / "weighed", inputs, "Q4_K_M", "Q8_0")
    one, other = (tensors_of(file_of(made["Q4_K_M"])) for made in (plain, weighed))
    assert {name for name in one if one[name] != other[name]} >= {
        "blk.0.ffn_down.weight", "blk.1.attn_q.weight"
    }  # fmt: skip
    one, other = (tensors_of(file_of(made["Q8_0"])) for made in (plain, weighed))
    assert one == other  # Q8_0 has no use for it


def test_four_types_read_the_model_once(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[str, int]] = []
    rows = onepass.Stored.rows

    def counted(self: onepass.Stored, name: str, start: int, stop: int) -> object:
        read.extend((name, row) for row in range(start, stop))
        return rows(self, name, start, stop)

    monkeypatch.setattr(onepass.Stored, "rows", counted)
    inputs = {"model": publish(wide, "model", name="wide")}
    made = run(store, tmp_path, inputs, "F16", "Q8_0", "Q4_0", "Q4_K_S")
    assert len(made) == 4
    assert len(read) == len(set(read))


def test_a_type_without_a_fallback_is_refused_before_anything_is_written(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    inputs = {"model": publish(tiny_llama_dir, "model", name="tiny")}
    jobs: list[Job] = []
    with pytest.raises(FailedPrecondition, match="no tensor type fallback"):
        run(store, tmp_path, inputs, "Q8_0", "Q1_0", prepare=jobs.append)
    assert not list(jobs[0].directory.rglob("*Q8_0*.gguf"))


def test_a_disk_that_is_too_small_is_refused_with_figures(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from arriero.store import disk

    monkeypatch.setattr(disk, "room", lambda root: (1000, "the file system"))
    jobs: list[Job] = []
    with pytest.raises(DiskFull, match="1000 bytes"):
        run(store, tmp_path, {"model": publish(wide, "model")}, "Q8_0", prepare=jobs.append)
    for path in jobs[0].directory.rglob("*.Q8_0.gguf"):
        assert path.stat().st_blocks * 512 < 100_000  # the header alone


def test_a_disk_that_fills_up_meanwhile_is_told_with_figures(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from arriero.weights import sink

    def put(stretch: sink._Stretch) -> None:
        if stretch.offset:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink, "_put", put)
    with pytest.raises(DiskFull, match=r"no space left for .*Q8_0.gguf: \d+ bytes needed"):
        run(store, tmp_path, {"model": publish(wide, "model")}, "Q8_0")


def test_being_told_to_leave_stops_between_blocks(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[Job] = []
    made = onepass._Filling.make

    def make(self: onepass._Filling, block: onepass._Block) -> object:
        jobs[0].preempted.set()
        return made(self, block)

    monkeypatch.setattr(onepass._Filling, "make", make)
    with pytest.raises(Preempted):
        run(store, tmp_path, {"model": publish(wide, "model")}, "Q8_0", prepare=jobs.append)


# ggml's K-quants take NaN and infinite numbers, and some types with a grid abort.
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "Q4_K_M", "IQ3_S"])
@pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\xff"], ids=["NaN", "-inf"])  # in bfloat16
def test_weights_that_are_not_finite_are_refused(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    kind: str,
    value: bytes,
) -> None:
    broken = not_finite(wide, tmp_path / "broken", value)
    with pytest.raises(DataLoss, match="holds NaN or infinite numbers"):
        run(store, tmp_path, {"model": publish(broken, "model")}, kind)


def test_the_plain_chain_refuses_weights_that_are_not_finite_too(
    wide: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    broken = not_finite(wide, tmp_path / "broken", b"\xc0\x7f")
    with pytest.raises(DataLoss, match="holds NaN or infinite numbers"):
        run(store, tmp_path, {"model": publish(broken, "model")}, "Q4_K_M", method="reference")


def not_finite(model: Path, copy: Path, value: bytes) -> Path:
    """The model with one weight of a linear layer that is no number."""
    shutil.copytree(model, copy)
    info = Weights.open(copy)["model.layers.1.mlp.down_proj.weight"]
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[info.start + 1000 : info.start + 1002] = value
    path.write_bytes(data)
    return copy


def test_a_matrix_of_another_model_is_refused(outline: converter.Outline) -> None:
    header = read_header(outline.path)
    mine = random_importance(header)
    imatrix.check(mine, header)
    for other in (
        {f"{name}.other": values for name, values in mine.values.items()},
        {name: values[:-32] for name, values in mine.values.items()},
    ):
        with pytest.raises(FailedPrecondition, match="belongs to another model: 14 of 14"):
            imatrix.check(Importance(other), header)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_matrix_of_no_mean_squares_is_refused(tmp_path: Path, value: float) -> None:
    sums = np.ones(64)
    imatrix.write(
        tmp_path / "imatrix.gguf",
        Activations({"blk.0.attn_q.weight": sums}, {"blk.0.attn_q.weight": 2}, 1),
        dataset="x",
        window=8,
    )
    assert imatrix.read(tmp_path).values["blk.0.attn_q.weight"][0] == 0.5
    sums[7] = value
    imatrix.write(
        tmp_path / "imatrix.gguf",
        Activations({"blk.0.attn_q.weight": sums}, {"blk.0.attn_q.weight": 2}, 1),
        dataset="x",
        window=8,
    )
    with pytest.raises(DataLoss, match="negative or not finite"):
        imatrix.read(tmp_path)


def test_an_architecture_with_more_than_permuted_rows_falls_back_and_says_so(
    wide: Path,
    outlined: converter.Outline,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strange = replace(outlined, obstacle="w is rearranged into v")
    monkeypatch.setattr(converter, "outline", lambda *_, **__: strange)
    inputs = {"model": publish(wide, "model", name="wide")}
    made = run(store, tmp_path / "auto", inputs, "Q8_0")
    assert made["Q8_0"].labels["method"] == "reference"
    assert "w is rearranged into v" in caplog.text
    with pytest.raises(FailedPrecondition, match="in one pass: w is rearranged"):
        run(store, tmp_path / "asked", inputs, "Q8_0", method="onepass")


def test_biases_are_permuted_as_the_converter_does(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "biased"
    shutil.copytree(tiny_llama_dir, model)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "self_attn" in name]:
        rows = tensors[name].shape[0]
        tensors[name.replace(".weight", ".bias")] = np.arange(rows, dtype=np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    inputs = {"model": publish(model, "model", name="tiny")}
    one = run(store, tmp_path / "one", inputs, "Q8_0", method="onepass")
    other = run(store, tmp_path / "other", inputs, "Q8_0", method="reference")
    found = tensors_of(file_of(one["Q8_0"]))
    assert found == tensors_of(file_of(other["Q8_0"]))
    kind, data = found["blk.0.attn_k.bias"]
    assert kind == "F32"
    assert np.frombuffer(data, np.float32)[:4].tolist() == [0, 8, 1, 9]  # heads of 16


def test_llama_3_rope_factors_are_made_from_the_configuration(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    model = tmp_path / "llama3"
    shutil.copytree(tiny_llama_dir, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    inputs = {"model": publish(model, "model", name="tiny")}
    one = run(store, tmp_path / "one", inputs, "Q8_0", method="onepass")
    kind, data = tensors_of(file_of(one["Q8_0"]))["rope_freqs.weight"]
    assert kind == "F32"
    assert np.frombuffer(data, np.float32).max() == 8.0


def test_a_plan_is_what_llama_cpp_would_do(official: Path, tmp_path: Path) -> None:
    kind = resolve_type("Q4_K_M")
    recipe = Recipe(importance=random_importance(read_header(official)))
    plan = plan_types(official, kind, recipe)
    made = quantize(official, tmp_path / "made.gguf", kind, recipe=recipe)
    assert list(plan.types.items()) == [(t.name, t.type) for t in made.tensors]
    assert plan.fallbacks
    assert imatrix.uncovered(plan.types, None) == []


def test_importance_from_rows_is_what_torch_sees(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    import pyarrow as pa
    import torch
    from transformers import AutoModelForCausalLM

    rows = [[1, *range(260, 300)], [1, 270, 280], [1, *range(300, 340)]]
    directory = tmp_path / "rows"
    directory.mkdir()
    # A packed row holds the first two.
    packed = [rows[0] + rows[1], rows[2]]
    table = pa.table(
        {
            "input_ids": pa.array(packed, pa.list_(pa.int32())),
            "labels": pa.array(packed, pa.list_(pa.int32())),
            "lengths": pa.array([[41, 3], [41]], pa.list_(pa.int32())),
        }
    )
    with pa.ipc.new_file(str(directory / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (directory / "dataset.json").write_text("{}")
    inputs = {
        "model": publish(tiny_llama_dir, "model", name="tiny"),
        "imatrix": publish(directory, "dataset", name="rows"),
    }
    limit = 80  # five tokens less than there are
    made = run(store, tmp_path / "job", inputs, "IQ4_NL", imatrix_tokens=limit)
    report = made["imatrix"]
    assert (report.kind, report.labels) == ("report", {"report": "imatrix"})
    importance = imatrix.read(report.path)
    assert importance.chunks == 3

    sums: dict[str, np.ndarray] = {}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()

    def watch(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
            squares = given[0].reshape(-1, given[0].shape[-1]).double().square().sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for ids in (rows[0], rows[1], rows[2][: limit - 44]):
            model(torch.tensor([ids]))
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    assert len(importance.values) == len(sums) == 14
    for layer in range(2):
        for ours, theirs in parts.items():
            found = importance.values[f"blk.{layer}.{ours}.weight"]
            expected = sums[f"model.layers.{layer}.{theirs}"] / limit
            # llama.cpp keeps keys and values in half precision.
            np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-4 * expected.max())
            assert np.median(np.abs(found / expected - 1)) < 2e-3
    # What was computed can be given: the same bytes come out.
    inputs["imatrix"] = publish(report.path, "report")
    again = run(store, tmp_path / "again", inputs, "IQ4_NL")
    assert list(again) == ["IQ4_NL"]
    assert tensors_of(file_of(again["IQ4_NL"])) == tensors_of(file_of(made["IQ4_NL"]))
