"""The hub's client against a small hub of our own, by HF_ENDPOINT, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.testing.hub import COMMIT, TOKEN, FakeHub, Repository

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 10_000,
    "modeling_evil.py": b"raise SystemExit",
    "LICENSE": b"free",
}
SIZES = {1: 1_000_000, 2: 3_000_000}
# huggingface_hub reads its settings when it is imported, hence the process.
SCRIPT = """
import os, sys
from pathlib import Path
from arriero.errors import ArrieroError, DiskFull
from arriero.merging import hub
what, *rest = sys.argv[1:]
def room(needed):
    if needed > int(os.environ.get("ROOM", 10**12)):
        raise DiskFull(f"{needed} bytes needed", needed=needed, free=0)
try:
    if what == "fetch":
        secret = rest[3] if len(rest) > 3 else None
        commit, path = hub.download_repository(
            rest[0], rest[1], Path(rest[2]), secret=secret, room=room
        )
        assert path == Path(rest[2]) / commit
        print(commit)
    else:
        root = Path(rest[2])
        sent = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        print(hub.upload(
            rest[0], rest[1], sent, secret=rest[3], private=rest[4] == "private", message="made"
        ))
except ArrieroError as error:
    print(error.code, error.message)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.repositories["org/name"] = Repository(dict(FILES))
        made.repositories["org/gated"] = Repository(dict(FILES), gated=True)
        yield made


def call(url: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    child = start(url, tmp_path, *arguments, **environment)
    said, wrong = child.communicate(timeout=120)
    assert child.returncode == 0, wrong
    return said.strip()


def start(url: str, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
    )


def fetch(hub: FakeHub, tmp_path: Path, *arguments: str, **environment: str) -> str:
    return call(hub.url, tmp_path, "fetch", *arguments, **environment)


def test_a_revision_is_fetched_without_code(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "repository"
    assert fetch(hub, tmp_path, "org/name", "main", str(target)) == COMMIT
    target /= COMMIT
    found = {path.name for path in target.iterdir() if path.is_file()}
    assert found == {"config.json", "model.safetensors", "LICENSE"}
    for name in found:
        assert (target / name).read_bytes() == FILES[name]


def test_refusals_have_their_codes(hub: FakeHub, tmp_path: Path) -> None:
    target = str(tmp_path / "repository")
    assert fetch(hub, tmp_path, "org/none", "main", target).startswith("NOT_FOUND hf://org/none")
    assert fetch(hub, tmp_path, "org/gated", "main", target).startswith("PERMISSION_DENIED")
    away = call("http://127.0.0.1:9", tmp_path, "fetch", "org/name", "main", target)
    assert away.startswith("UNAVAILABLE")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "PERMISSION_DENIED the hub refuses hf://org/name@main: "),
        (403, "PERMISSION_DENIED the hub refuses hf://org/name@main: "),
        (410, "FAILED_PRECONDITION the hub refuses hf://org/name@main: "),
        (429, "UNAVAILABLE the hub failed for hf://org/name@main: "),
        (500, "UNAVAILABLE the hub failed for hf://org/name@main: "),
    ],
)
def test_a_hub_that_refuses_to_answer_is_told_by_its_status(
    hub: FakeHub, tmp_path: Path, status: int, code: str
) -> None:
    hub.refuse_reads = status
    said = fetch(hub, tmp_path, "org/name", "main", str(tmp_path / "repository"))
    assert said.startswith(code)
    assert str(status) in said


def test_a_secret_opens_a_gated_repository(hub: FakeHub, tmp_path: Path) -> None:
    arguments = ("org/gated", "main", str(tmp_path / "repository"), "ARRIERO_SECRET_HUB")
    assert fetch(hub, tmp_path, *arguments, ARRIERO_SECRET_HUB=TOKEN) == COMMIT


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    # The library keeps what came in pieces of 10 MB.
    weights = os.urandom(1 << 20) * 22
    hub.repositories["org/name"].files["model.safetensors"] = weights
    hub.break_after = 15_000_000
    target = tmp_path / "repository"
    assert fetch(hub, tmp_path, "org/name", "main", str(target)) == COMMIT
    assert hub.break_after is None, "nothing broke"
    assert [text for text in hub.ranges if text] == ["bytes=10485760-"]
    assert (target / COMMIT / "model.safetensors").read_bytes() == weights


def test_a_fetch_that_was_killed_keeps_the_files_that_came(hub: FakeHub, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(size) for i, size in SIZES.items()}
    hub.repositories["org/name"] = Repository({"config.json": b"{}", **shards})
    hub.hold_after = 2_000_000
    target = tmp_path / "repository"
    (target / ("d" * 40)).mkdir(parents=True)
    (target / ("d" * 40) / "of-another-commit").touch()
    child = start(hub.url, tmp_path, "fetch", "org/name", "main", str(target))
    assert hub.held.wait(60)
    while len(list(target.rglob("*.metadata"))) < 2:  # of the files that are whole
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.communicate()
    hub.ranges.clear()
    # Room for what is left is enough.
    assert fetch(hub, tmp_path, "org/name", "main", str(target), ROOM="3000100") == COMMIT
    assert len(hub.ranges) == 1
    assert [path.name for path in target.iterdir()] == [COMMIT]
    assert not list(target.rglob("*.incomplete"))
    assert all((target / COMMIT / name).read_bytes() == shards[name] for name in shards)


def test_a_repository_without_weights_is_refused_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.repositories["org/quants"] = Repository({"config.json": b"{}", "x.Q8_0.gguf": b"GGUF"})
    said = fetch(hub, tmp_path, "org/quants", "main", str(tmp_path / "repository"))
    assert said.startswith("FAILED_PRECONDITION hf://org/quants holds x.Q8_0.gguf; expected")
    assert "import its path" in said
    assert hub.ranges == []


def test_weights_are_fetched_once_and_in_one_format(hub: FakeHub, tmp_path: Path) -> None:
    more = {
        "pytorch_model.bin": b"x",
        "consolidated.00.pth": b"x",
        "consolidated.safetensors": b"x",
        "original/params.json": b"{}",
        "sub/model.safetensors": b"x",
    }
    hub.repositories["org/both"] = Repository({**FILES, **more})
    hub.repositories["org/meta"] = Repository(
        {"consolidated.00.pth": b"x", "params.json": b"{}", "tokenizer.model": b"t"}
    )

    def names(target: Path) -> set[str]:
        target /= COMMIT
        everything = (path.relative_to(target) for path in target.rglob("*") if path.is_file())
        return {path.as_posix() for path in everything if path.parts[0] != ".cache"}

    fetch(hub, tmp_path, "org/both", "main", str(tmp_path / "both"))
    assert names(tmp_path / "both") == {"config.json", "model.safetensors", "LICENSE"}
    fetch(hub, tmp_path, "org/meta", "main", str(tmp_path / "meta"))
    assert names(tmp_path / "meta") == {"consolidated.00.pth", "params.json", "tokenizer.model"}


def test_too_small_a_disk_is_told_before_the_first_byte(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/large"] = Repository({**FILES, "model.safetensors": b"w" * 2_000_000})
    target = str(tmp_path / "repository")
    said = fetch(hub, tmp_path, "org/large", "main", target, ROOM="1000000")
    assert said.startswith("RESOURCE_EXHAUSTED 2000027 bytes needed")
    assert hub.ranges == []


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "sent"
    (root / "deep").mkdir(parents=True)
    (root / "model.safetensors").write_bytes(os.urandom(50_000))
    (root / "config.json").write_text("{}")
    (root / "deep" / "README.md").write_text("card")
    return root


def push(hub: FakeHub, tmp_path: Path, name: str, files: Path, token: str = TOKEN) -> str:
    arguments = ("push", name, "main", str(files), "ARRIERO_SECRET_HUB", "private")
    return call(hub.url, tmp_path, *arguments, ARRIERO_SECRET_HUB=token)


def test_files_are_pushed_as_one_commit_into_a_new_repository(
    hub: FakeHub, tmp_path: Path, files: Path
) -> None:
    commit = push(hub, tmp_path, "org/new", files)
    made = hub.repositories["org/new"]
    assert (made.private, made.commit, made.message) == (True, commit, "made")
    assert made.files == {
        "model.safetensors": (files / "model.safetensors").read_bytes(),
        "config.json": b"{}",
        "deep/README.md": b"card",
    }
    assert len(hub.uploads) == 1, "the large file goes by LFS, the small ones in the commit"


def test_what_the_hub_has_is_not_sent_again_and_strangers_stay(
    hub: FakeHub, tmp_path: Path, files: Path
) -> None:
    push(hub, tmp_path, "org/name", files)
    assert hub.repositories["org/name"].files["LICENSE"] == b"free"
    (files / "config.json").write_text('{"a": 1}')
    push(hub, tmp_path, "org/name", files)
    assert len(hub.uploads) == 1
    assert hub.repositories["org/name"].files["config.json"] == b'{"a": 1}'


def test_a_token_that_may_not_write_is_refused(hub: FakeHub, tmp_path: Path, files: Path) -> None:
    said = push(hub, tmp_path, "org/new", files, token="wrong")
    assert said.startswith("PERMISSION_DENIED the hub refuses hf://org/new")
    assert "wrong" not in said
    assert "org/new" not in hub.repositories
    away = call(
        "http://127.0.0.1:9",
        tmp_path,
        *("push", "org/new", "main", str(files), "ARRIERO_SECRET_HUB", "private"),
        ARRIERO_SECRET_HUB=TOKEN,
    )
    assert away.startswith("UNAVAILABLE")
    unset = call(
        hub.url, tmp_path, *("push", "org/new", "main", str(files), "ARRIERO_SECRET_X", "private")
    )
    assert unset.startswith("FAILED_PRECONDITION the secret ARRIERO_SECRET_X is not set")
