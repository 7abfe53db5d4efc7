import hashlib
from pathlib import Path

import pytest

from arriero.dataset import sources
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import GateResult, Mode, Verdict
from arriero.settings import SourceSettings
from arriero.store import Store

ROW = '{"instruction": "a", "output": "b"}\n'


def locate(text: object, store: Store, allowed: SourceSettings) -> sources.Source:
    return sources.locate(str(text), store=store, allowed=allowed, field="sources[0]")


def test_a_file_is_a_source(data: Path, store: Store, allowed: SourceSettings) -> None:
    (data / "rows.txt").write_text(ROW)
    source = locate(data / "rows.txt", store, allowed)
    assert [file.path for file in source.files] == [data / "rows.txt"]
    assert sources.digest(source) == "sha256:" + hashlib.sha256(ROW.encode()).hexdigest()
    assert source.size == len(ROW)


def test_a_directory_is_its_files_of_rows_in_order(
    data: Path, store: Store, allowed: SourceSettings
) -> None:
    for name in ("b.jsonl", "a.json", "README.md", ".hidden.json"):
        (data / name).write_text(ROW)
    (data / "more").mkdir()
    (data / "more" / "c.ndjson").write_text(ROW + ROW)
    source = locate(data, store, allowed)
    assert [file.path.name for file in source.files] == ["a.json", "b.jsonl", "c.ndjson"]
    before = sources.digest(source)
    (data / "b.jsonl").write_text(ROW.upper())
    assert sources.digest(source) != before


@pytest.mark.parametrize("text", ["rows.jsonl", "../rows.jsonl", "", "./x", "dataset/../x:v1"])
def test_what_is_no_absolute_path_and_no_reference_is_refused(
    text: str, store: Store, allowed: SourceSettings
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        locate(text, store, allowed)
    assert caught.value.violations[0].field == "sources[0]"


def test_climbing_and_foreign_paths_are_refused(
    data: Path, store: Store, allowed: SourceSettings
) -> None:
    (data.parent / "secret.json").write_text(ROW)
    with pytest.raises(InvalidArgument, match=r"climbs with '\.\.'"):
        locate(f"{data}/../secret.json", store, allowed)
    with pytest.raises(InvalidArgument, match="outside of the paths"):
        locate(data.parent / "secret.json", store, allowed)
    with pytest.raises(NotFound):
        locate(data / "nothing.json", store, allowed)


def test_a_link_that_leads_out_is_refused(
    data: Path, store: Store, allowed: SourceSettings
) -> None:
    (data.parent / "secret.json").write_text(ROW)
    (data / "inside.json").symlink_to(data.parent / "secret.json")
    with pytest.raises(InvalidArgument, match="outside of the paths"):
        locate(data / "inside.json", store, allowed)
    with pytest.raises(InvalidArgument, match="outside of the paths"):
        locate(data, store, allowed)


def test_a_directory_without_rows_is_refused(
    data: Path, store: Store, allowed: SourceSettings
) -> None:
    with pytest.raises(InvalidArgument, match=r"no file of rows; expected \.json"):
        locate(data, store, allowed)


def test_a_pushed_dataset_is_a_source_by_tag_and_digest(
    publish, store: Store, allowed: SourceSettings
) -> None:
    artifact = publish({"rows.jsonl": ROW, "README.md": "x"}, "dataset", "faq")
    store.tag("dataset/faq:v1", artifact.digest)
    source = locate("dataset/faq:v1", store, allowed)
    assert [file.path.name for file in source.files] == ["rows.jsonl"]
    assert source.artifact == source.text == artifact.digest
    assert locate(artifact.digest, store, allowed).artifact == artifact.digest
    with pytest.raises(NotFound):
        locate("dataset/faq:v2", store, allowed)


def test_artifacts_that_hold_no_raw_rows_are_refused(
    publish, store: Store, allowed: SourceSettings
) -> None:
    prepared = publish({"data.arrow": "x", "dataset.json": "{}"}, "dataset")
    with pytest.raises(InvalidArgument, match="is prepared already"):
        locate(prepared.digest, store, allowed)
    model = publish({"config.json": "{}"}, "model")
    with pytest.raises(InvalidArgument, match="is a model; expected a dataset"):
        locate(model.digest, store, allowed)
    failed = GateResult("dataset.schema", Mode.ENFORCE, Verdict.FAILED)
    bad = publish({"rows.jsonl": ROW}, "dataset", "bad", gates=(failed,))
    with pytest.raises(FailedPrecondition, match="quarantined"):
        locate(bad.digest, store, allowed)


def test_text_beside_tables_is_notes_and_alone_is_rows(
    data: Path, store: Store, allowed: SourceSettings, publish
) -> None:
    for name in ("a.txt", "LICENSE.txt"):
        (data / name).write_text("words\n")
    assert len(locate(data, store, allowed).files) == 2
    (data / "rows.csv.gz").write_bytes(b"")
    assert [file.path.name for file in locate(data, store, allowed).files] == ["rows.csv.gz"]
    artifact = publish({"a.jsonl": ROW, "README.txt": "x"}, "dataset", "noted")
    assert len(locate(artifact.digest, store, allowed).files) == 1
