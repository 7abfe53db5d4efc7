"""Sources on S3 and on a hub, against small servers of our own."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.dataset import preparation, remote, rows, sources
from arriero.dataset.spec import resolve
from arriero.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from arriero.operations.kinds import ResolveContext
from arriero.testing.hub import COMMIT, TOKEN, serving_hub
from arriero.testing.s3 import KEY, serving_s3
from arriero.v1 import dataset_pb2

ROW = json.dumps({"instruction": "Name a river.", "output": "The Urubamba."}).encode() + b"\n"
OBJECTS = {
    "corpora": {"zh/a.jsonl": ROW * 3, "zh/more/b.jsonl": ROW, "zh/README.txt": b"x", "c.txt": b"y"}
}
# huggingface_hub reads its settings when it is imported, hence a process.
SCRIPT = """
import sys
from pathlib import Path
from arriero.dataset import sources
from arriero.errors import ArrieroError
from arriero.store import Store
token = sys.argv[3] if len(sys.argv) > 3 else None
try:
    located = sources.locate(sys.argv[1], store=None, allowed=None, field="sources[0]")
    for source in sources.fetch([located], Path(sys.argv[2]), token=token):
        print(source.text, *[f"{file.name}={file.path.read_text()}" for file in source.files])
except ArrieroError as error:
    print(error.code, error.message)
"""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serving_s3(OBJECTS) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield url


def fetch(text: str, directory: Path) -> sources.Source:
    parsed = sources.Source(text, (), remote=remote.parse(text, field="sources[0]"))
    return sources.fetch([parsed], directory, token=None)[0]


def test_the_rows_below_a_prefix_are_fetched(s3: str, tmp_path: Path) -> None:
    found = fetch("s3://corpora/zh/", tmp_path)
    assert [file.name for file in found.files] == [
        *("s3://corpora/zh/a.jsonl", "s3://corpora/zh/more/b.jsonl")
    ]
    assert [file.path.read_bytes() for file in found.files] == [ROW * 3, ROW]
    assert found.size == 4 * len(ROW)


def test_compressed_objects_are_fetched_as_they_are(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(ROW * 50)
    monkeypatch.setitem(OBJECTS["corpora"], "packed/a.jsonl.gz", packed)
    found = fetch("s3://corpora/packed", tmp_path).files[0]
    assert found.path.read_bytes() == packed
    assert len(list(rows.read(found.path))) == 50


def test_a_remote_source_that_was_not_fetched_is_not_taken_for_an_empty_one(s3: str) -> None:
    parsed = sources.Source("s3://corpora/zh", (), remote=remote.parse("s3://corpora/zh", field=""))
    with pytest.raises(InvalidArgument, match="is not fetched"):
        list(preparation.source_rows(parsed))


def test_one_object_is_a_source_whatever_its_name(s3: str, tmp_path: Path) -> None:
    assert fetch("s3://corpora/c.txt", tmp_path).files[0].path.read_bytes() == b"y"


def test_what_is_not_there_or_not_allowed_says_so(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("s3://corpora/none", "s3://elsewhere/zh"):
        with pytest.raises(NotFound, match=rf"{text} does not exist") as caught:
            fetch(text, tmp_path)
        assert caught.value.code == "NOT_FOUND"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDWRONG")
    with pytest.raises(PermissionDenied, match="AWS credentials to the dataset service"):
        fetch("s3://corpora/zh", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="cannot be reached"):
        fetch("s3://corpora/zh", tmp_path)


def test_the_key_changes_when_the_objects_do(
    s3: str, store, publish, allowed, bytes_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = publish(bytes_dir, "tokenizer", "bytes")

    def fingerprints() -> dict[str, str]:
        spec = dataset_pb2.DatasetSpec(tokenizer=tokenizer.digest, sources=["s3://corpora/zh"])
        context = ResolveContext(store, {"tokenizer": [tokenizer]}, allowed)
        found = resolve(spec, context)
        assert found.disk_bytes > 4 * len(ROW)
        return found.fingerprints

    before = fingerprints()
    assert before == fingerprints()
    assert list(before) == ["sources[0]"]
    monkeypatch.setitem(OBJECTS["corpora"], "zh/new.jsonl", ROW)
    assert fingerprints() != before


@pytest.mark.parametrize(
    "text", ["s3://", "s3://B/x", "gs://a/b", "hf://org/name", "hf://datasets/name", "s3://a/../b"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        remote.parse(text, field="sources[0]")
    assert caught.value.violations[0].field == "sources[0]"


@pytest.fixture
def hub() -> Iterator[str]:
    files = {
        "data/train.jsonl": ROW,
        "data/val.csv": b"a\n",
        "script.py": b"raise",
        "README.md": b"",
    }
    with serving_hub({"org/rows": files, "org/gated-rows": files}) as url:
        yield url


def ask(hub: str, tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path / "hf"),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hubs_files_of_rows_are_fetched_at_their_commit(hub: str, tmp_path: Path) -> None:
    target = str(tmp_path / "files")
    said = ask(hub, tmp_path, "hf://datasets/org/rows", target)
    assert said.startswith(
        f"hf://datasets/org/rows@{COMMIT} hf://datasets/org/rows@cccccccccccc/data"
    )
    assert "train.jsonl" in said
    assert "val.csv" in said
    assert "script.py" not in said
    one = ask(hub, tmp_path, f"hf://datasets/org/rows@{COMMIT}/data/train.jsonl", target)
    assert ROW.decode().strip() in one
    assert "val.csv" not in one


def test_a_hubs_refusals_have_their_codes(hub: str, tmp_path: Path) -> None:
    target = str(tmp_path / "files")
    none = ask(hub, tmp_path, "hf://datasets/org/none", target)
    assert none.startswith("NOT_FOUND sources[0]: hf://datasets/org/none does not exist")
    assert ask(hub, tmp_path, "hf://datasets/org/rows@v9", target).startswith("NOT_FOUND")
    assert ask(hub, tmp_path, "hf://datasets/org/rows/img", target).startswith("NOT_FOUND")
    gated = ask(hub, tmp_path, "hf://datasets/org/gated-rows", target)
    assert gated.startswith("PERMISSION_DENIED")
    assert "give token_secret" in gated
    opened = ask(hub, tmp_path, "hf://datasets/org/gated-rows/data/val.csv", target, TOKEN)
    assert "val.csv=a" in opened
    away = ask("http://127.0.0.1:9", tmp_path, "hf://datasets/org/rows", target)
    assert away.startswith("UNAVAILABLE")
