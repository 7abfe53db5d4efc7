from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.quantization.evaluate_spec import resolve_evaluate
from arriero.quantization.kinds import WORK_KINDS
from arriero.quantization.quantize_spec import resolve_quantize
from arriero.settings import SourceSettings
from arriero.store import Artifact, Store
from arriero.v1 import quantization_pb2 as pb

Publish = Callable[..., Artifact]
Resolve = Callable[..., Resolved]


@pytest.fixture
def quantized(store: Store, model: Artifact) -> Resolve:
    def resolve(**fields: object) -> Resolved:
        spec = pb.QuantizeSpec(model=model.digest, **fields)  # type: ignore[arg-type]
        context = ResolveContext(store, {"model": [model]}, SourceSettings())
        return resolve_quantize(spec, context)

    return resolve


@pytest.fixture
def files(publish: Publish, golden: Artifact, tmp_path: Path) -> list[Artifact]:
    found = []
    for kind in ("Q4_0", "Q8_0"):
        source = tmp_path / kind
        source.mkdir()
        (source / f"tiny.{kind}.gguf").write_bytes(b"GGUF" + kind.encode())
        found.append(publish(source, "gguf", name="tiny", golden=golden.digest))
    return found


@pytest.fixture
def evaluated(store: Store, files: list[Artifact]) -> Resolve:
    def resolve(models: list[Artifact] | None = None, **fields: object) -> Resolved:
        chosen = files if models is None else models
        spec = pb.EvaluateSpec(models=[a.digest for a in chosen], **fields)  # type: ignore[arg-type]
        return resolve_evaluate(spec, ResolveContext(store, {"models": chosen}, SourceSettings()))

    return resolve


def violation(caught: pytest.ExceptionInfo[InvalidArgument]) -> str:
    return caught.value.violations[0].field


def test_types_come_out_as_llama_cpp_writes_them(quantized: Resolve, golden: Artifact) -> None:
    resolved = quantized(types=["q4_k_m", "f16"])
    assert list(resolved.spec.types) == ["Q4_K_M", "F16"]
    assert resolved.spec.golden == golden.digest
    assert resolved.spec.threads == 0
    assert "threads" in resolved.unkeyed


def test_disk_is_priced_as_the_lossless_file_and_every_output(quantized: Resolve) -> None:
    one, two = quantized(types=["Q8_0"]), quantized(types=["Q8_0", "F32"])
    assert one.disk_bytes > 123_200 * 4
    assert two.disk_bytes - one.disk_bytes > 123_200 * 4


@pytest.mark.parametrize(
    ("types", "field"),
    [
        ([], "types"),
        (["Q8_0", "Q9_X"], "types[1]"),
        (["Q4_K_M", "Q8_0", "q4_k"], "types[2]"),
        (["IQ1_S"], "types[0]"),
    ],
)
def test_wrong_types_are_refused_with_their_place(
    quantized: Resolve, types: list[str], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        quantized(types=types)
    assert violation(caught) == field


def test_negative_threads_are_refused(quantized: Resolve) -> None:
    with pytest.raises(InvalidArgument) as caught:
        quantized(types=["Q8_0"], threads=-1)
    assert violation(caught) == "threads"


def test_a_missing_converter_is_told_before_work_starts(
    quantized: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARRIERO_LLAMA_CPP", str(tmp_path / "nowhere"))
    with pytest.raises(FailedPrecondition, match="make setup"):
        quantized(types=["Q8_0"])


def test_the_limit_and_the_golden_report_are_filled_in(
    evaluated: Resolve, golden: Artifact
) -> None:
    spec = evaluated(choose=pb.Choose(smallest=pb.Smallest())).spec
    assert spec.choose.smallest.max_kld == 0.05
    assert spec.golden == golden.digest


def test_without_a_choice_nothing_is_chosen(evaluated: Resolve) -> None:
    assert not evaluated().spec.HasField("choose")


@pytest.mark.parametrize("max_kld", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(evaluated: Resolve, max_kld: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        evaluated(choose=pb.Choose(smallest=pb.Smallest(max_kld=max_kld)))
    assert violation(caught) == "choose.smallest.max_kld"


def test_a_choice_without_a_rule_is_refused(evaluated: Resolve) -> None:
    with pytest.raises(InvalidArgument) as caught:
        evaluated(choose=pb.Choose())
    assert violation(caught) == "choose"


def test_no_files_and_the_same_file_twice_are_refused(
    evaluated: Resolve, files: list[Artifact]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        evaluated([])
    assert violation(caught) == "models"
    with pytest.raises(InvalidArgument) as caught:
        evaluated([files[0], files[1], files[0]])
    assert violation(caught) == "models[2]"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"context": 256}, "context"),
        ({"chunks": 3}, "chunks"),
        ({"sha256": "sha256:ab"}, "sha256"),
        ({"text": "TEXT", "context": 4}, "context"),
        ({"text": "TEXT", "chunks": -1}, "chunks"),
        ({"text": "TEXT", "dataset": "sha256:ab"}, "text"),
        ({"text": "TEXT", "sha256": "sha256:" + "0" * 64}, "sha256"),
        ({"text": "/etc/passwd"}, "text"),
        ({"text": "wiki.txt"}, "text"),
        ({"text": "EMPTY"}, "text"),
        ({"text": "DIRECTORY"}, "text"),
    ],
)
def test_wrong_windows_are_refused_by_field(
    store: Store, files: list[Artifact], tmp_path: Path, fields: dict[str, object], field: str
) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "empty.txt").touch()
    paths = {
        "TEXT": str(tmp_path / "text.txt"),
        "EMPTY": str(tmp_path / "empty.txt"),
        "DIRECTORY": str(tmp_path),
    }
    filled = {key: paths.get(str(value), value) for key, value in fields.items()}
    spec = pb.EvaluateSpec(models=[a.digest for a in files], **filled)  # type: ignore[arg-type]
    context = ResolveContext(store, {"models": files}, SourceSettings((tmp_path,)))
    with pytest.raises(InvalidArgument) as caught:
        resolve_evaluate(spec, context)
    assert violation(caught) == field


def test_a_text_is_named_by_what_it_holds(
    store: Store, files: list[Artifact], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    spec = pb.EvaluateSpec(models=[a.digest for a in files], text=str(text))
    context = ResolveContext(store, {"models": files}, SourceSettings((tmp_path,)))
    resolved = resolve_evaluate(spec, context)
    assert resolved.spec.sha256.startswith("sha256:")
    assert resolved.spec.context == 512
    assert resolved.unkeyed == ("text",)


def test_what_is_not_used_is_not_part_of_the_result(evaluated: Resolve) -> None:
    spec = evaluated().spec
    assert not spec.HasField("context")
    assert not spec.HasField("chunks")


def test_files_of_different_models_are_not_compared_with_one_golden(
    evaluated: Resolve, files: list[Artifact], publish: Publish, golden_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "other"
    source.mkdir()
    (source / "x.gguf").write_bytes(b"GGUF other")
    golden = publish(golden_dir, "report", name="other")
    other = publish(source, "gguf", name="other", golden=golden.digest)
    with pytest.raises(FailedPrecondition, match=r"models\[1\] carries other golden logits"):
        evaluated([files[0], other])
    assert evaluated([files[0], other], golden=golden.digest).spec.golden == golden.digest


def test_a_choice_needs_something_to_go_by(publish: Publish, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "imported"
    source.mkdir()
    (source / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.txt").write_text("Some text.")
    gguf = publish(source, "gguf", name="imported")
    context = ResolveContext(store, {"models": [gguf]}, SourceSettings((tmp_path,)))
    spec = pb.EvaluateSpec(models=[gguf.digest], text=str(tmp_path / "text.txt"))
    assert not resolve_evaluate(spec, context).spec.golden
    spec.choose.smallest.SetInParent()
    with pytest.raises(FailedPrecondition, match="neither golden logits nor a reference"):
        resolve_evaluate(spec, context)


def test_files_without_golden_logits_say_how_to_get_them(
    evaluated: Resolve, publish: Publish, tmp_path: Path
) -> None:
    source = tmp_path / "imported"
    source.mkdir()
    (source / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FailedPrecondition, match=r"golden: train\.golden"):
        evaluated([publish(source, "gguf", name="imported")])


def test_every_kind_names_its_input_fields_and_job() -> None:
    assert [kind.name for kind in WORK_KINDS] == ["quantize", "evaluate"]
    assert {kind.job_module for kind in WORK_KINDS} == {"arriero.quantization.job"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "magic"}, "method"),
        ({"imatrix_tokens": 0}, "imatrix_tokens"),
        ({"imatrix_tokens": 5}, "imatrix_tokens"),
        ({"tensor_types": {"ffn_(down": "Q6_K"}}, "tensor_types[ffn_(down]"),
        ({"tensor_types": {"(?<=_)down": "Q6_K"}}, "tensor_types[(?<=_)down]"),
        ({"tensor_types": {"(?P<a>down)": "Q6_K"}}, "tensor_types[(?P<a>down)]"),
        ({"tensor_types": {"(?i)down": "Q6_K"}}, "tensor_types[(?i)down]"),
        ({"tensor_types": {r"\Ablk": "Q6_K"}}, r"tensor_types[\Ablk]"),
        ({"tensor_types": {"ffn_down": "Q4_K_M"}}, "tensor_types[ffn_down]"),
        ({"output_tensor_type": "Q9"}, "output_tensor_type"),
        ({"token_embedding_type": "I32"}, "token_embedding_type"),
        ({"weights": [1.0]}, "weights"),
        ({"adapters": ["sha256:1", "sha256:1"]}, "adapters[1]"),
        ({"adapters": ["sha256:1"], "weights": [float("nan")]}, "weights[0]"),
        ({"adapters": ["sha256:1"], "weights": [0.0]}, "weights[0]"),
    ],
)
def test_wrong_knobs_are_refused_with_their_place(
    quantized: Resolve, fields: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        quantized(types=["Q8_0"], **fields)
    assert violation(caught) == field


def test_overrides_come_out_as_ggml_writes_them(quantized: Resolve) -> None:
    spec = quantized(
        types=["Q4_K_M"], tensor_types={"ffn_down": "q6_k"}, output_tensor_type="f16"
    ).spec
    assert dict(spec.tensor_types) == {"ffn_down": "Q6_K"}
    assert spec.output_tensor_type == "F16"
    assert (spec.method, spec.imatrix_tokens) == ("auto", 65536)
    groups = {r"blk\.\d+\.ffn_(?:up|down)(?!_exps)": "Q5_K", "(attn)_(?=v)": "Q8_0", r"\(": "F16"}
    assert dict(quantized(types=["Q4_0"], tensor_types=groups).spec.tensor_types) == groups


def test_the_reference_chain_is_priced_with_what_lies_between(quantized: Resolve) -> None:
    one, chain = quantized(types=["Q8_0"]), quantized(types=["Q8_0"], method="reference")
    assert chain.disk_bytes - one.disk_bytes == 123_200 * 4
