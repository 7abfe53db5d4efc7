"""Sources: spelling, what lies there, what is refused."""

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from arriero.errors import InvalidArgument, NotFound
from arriero.merging import sources
from arriero.merging.sources import HubSource, PathSource, PypiSource
from arriero.merging.specs import resolve_import
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.settings import SourceSettings
from arriero.store import Store
from arriero.v1 import merging_pb2


def resolve(tmp_path: Path, source: Path | str, **fields: Any) -> Resolved:
    wanted = fields.pop("kind", None)
    spec = merging_pb2.ImportSpec(source=str(source), **fields)
    if wanted:
        setattr(spec, "as", wanted)
    store = Store.open(tmp_path / "store")
    return resolve_import(spec, ResolveContext(store, {}, SourceSettings((tmp_path,))))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "My Model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_the_three_spellings_are_read() -> None:
    assert sources.parse("/a/b") == PathSource(Path("/a/b"))
    assert sources.parse("pypi://some-pkg==1.2.3/pkg/x.gguf") == PypiSource(
        "some-pkg", "1.2.3", PurePosixPath("pkg/x.gguf")
    )
    assert sources.parse("hf://org/na.me@v1") == HubSource("org/na.me", "v1")
    assert sources.parse("hf://org/name") == HubSource("org/name", "main")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3://bucket/x",
        "http://169.254.169.254/latest",
        "pypi://pkg/x.gguf",
        "pypi://pkg>=1/x.gguf",
        "pypi://pkg==1.*/x.gguf",
        "pypi://pkg==1.0/",
        "pypi://pkg==1.0/../x.gguf",
        "pypi://pkg==1.0//etc/x.gguf",
        "pypi://pkg==1.0/pkg/code.py",
        "pypi://--index-url==1.0/x.gguf",
        "pypi://pkg==--index-url/x.gguf",
        "hf://name",
        "hf://org/name@../x",
        "hf://org/na..me@x",
        "hf://org/name/extra@x",
    ],
)
def test_other_spellings_are_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        sources.parse(text)
    assert caught.value.violations[0].field == "source"


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@hf_AbCdEfGhIjKlMnOpQrStUv",
        "hf://user:secret@org/name",
        "/models/hf_AbCdEfGhIjKlMnOpQrStUv",
    ],
)
def test_tokens_in_a_source_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidArgument, match="holds a token") as caught:
        sources.parse(text)
    assert "AbCd" not in caught.value.message
    assert "secret@" not in caught.value.message


def test_secrets_are_names_of_environment_variables() -> None:
    assert sources.secret_variable("my-hub") == "ARRIERO_SECRET_MY_HUB"
    for text in ("hf_AbCdEfGhIjKlMnOpQrStUv", "a b", "", "$HOME"):
        with pytest.raises(InvalidArgument, match="token_secret"):
            sources.secret_variable(text)


def test_what_a_path_holds_is_told_by_its_files(tmp_path: Path, model: Path) -> None:
    assert sources.classify(model) == "model"
    (model / "adapter_config.json").write_text("{}")
    assert sources.classify(model) == "adapter"
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert sources.classify(gguf) == "gguf"
    other = tmp_path / "other"
    other.mkdir()
    (other / "q4.gguf").touch()
    with pytest.raises(InvalidArgument, match=r"holds q4.gguf.*import the file itself"):
        sources.classify(other)
    with pytest.raises(InvalidArgument, match=r"not .gguf"):
        sources.classify(model / "config.json")
    with pytest.raises(NotFound):
        sources.classify(tmp_path / "nothing")


def test_names_come_from_the_source() -> None:
    for text, kind, name in [
        ("/m/Llama-2-7b hf", "model", "llama-2-7b-hf"),
        ("/m/SmolLM2.Q4_1.gguf", "gguf", "smollm2.q4_1"),
        ("/m/SmolLM2.Q4_1.gguf", "model", "smollm2"),
        ("/m/x-IQ4_XS.gguf", "model", "x"),
        ("/m/模型", "model", "model"),
        ("hf://Org/Big_Model@main", "model", "big_model"),
        ("pypi://p==1/a/B.F16.gguf", "model", "b"),
    ]:
        assert sources.artifact_name(sources.parse(text), kind) == name


def test_defaults_are_filled_in(tmp_path: Path, model: Path) -> None:
    resolved = resolve(tmp_path, model)
    spec = resolved.spec
    assert (getattr(spec, "as"), spec.name) == ("model", "my-model")
    assert not spec.HasField("dtype"), "weights are taken as they are"
    assert spec.source == str(model)
    assert resolved.disk_bytes == 2
    assert resolved.cacheable
    assert resolved.unkeyed == ("token_secret",)


def test_a_changed_directory_has_another_fingerprint(tmp_path: Path, model: Path) -> None:
    first = resolve(tmp_path, model).fingerprints
    assert first == resolve(tmp_path, model).fingerprints
    (model / "more.json").write_text("{}")
    assert first != resolve(tmp_path, model).fingerprints


def test_a_branch_of_a_hub_is_never_answered_from_the_store(tmp_path: Path) -> None:
    assert not resolve(tmp_path, "hf://org/name@main").cacheable
    assert resolve(tmp_path, "hf://org/name@" + "a" * 40).cacheable


@pytest.mark.parametrize("field", ["dtype", "tokenizer", "sha256"])
def test_what_a_hub_has_no_use_for_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(tmp_path, "hf://org/name", **{field: "float16" if field == "dtype" else "/x"})
    assert caught.value.violations[0].field == field


def test_what_a_gguf_needs_is_counted_from_its_header(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    shutil.copy(tiny_gguf, path)
    weights = 123_200
    asked = resolve(tmp_path, path, kind="model", dtype="float32")
    assert (asked.disk_bytes, asked.memory_bytes - 4 * weights) == (4 * weights, 1_200_000_000)
    kept = resolve(tmp_path, path)
    assert (kept.disk_bytes, kept.memory_bytes) == (path.stat().st_size, 1_200_000_000)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "checkpoint"}, "as"),
        ({"kind": "adapter"}, "as"),
        ({"kind": "gguf"}, "as"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"tokenizer": "/x/tokenizer.model"}, "tokenizer"),
        ({"name": "../x"}, "name"),
        ({"sha256": "ab"}, "sha256"),
        ({"token_secret": "hub"}, "token_secret"),
        ({"gates": {"merge.nothing": 1}}, "gates['merge.nothing']"),
    ],
)
def test_wrong_fields_are_named(
    tmp_path: Path, model: Path, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(tmp_path, model, **fields)
    assert caught.value.violations[0].field == field


def test_paths_that_climb_or_lie_outside_are_refused(tmp_path: Path, model: Path) -> None:
    for text in ("relative/model", f"{tmp_path}/a/../My Model", "/etc", "~/model"):
        with pytest.raises(InvalidArgument) as caught:
            resolve(tmp_path, text)
        assert caught.value.violations[0].field == "source"
    with pytest.raises(NotFound):
        resolve(tmp_path, tmp_path / "nothing")


def test_links_that_lead_outside_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "etc").symlink_to("/etc")
    with pytest.raises(InvalidArgument):
        resolve(tmp_path, tmp_path / "etc")
    (model / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument):
        resolve(tmp_path, model)


def test_links_within_the_allowed_paths_are_followed(tmp_path: Path, model: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (model / "generation_config.json").symlink_to(tmp_path / "blob")
    assert resolve(tmp_path, model).disk_bytes == 4
