"""A checkpoint is whole or it is not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arriero.errors import DiskFull
from arriero.training.checkpoints import Checkpoints


def fill(text: str):
    def write(place: Path) -> None:
        (place / "state").write_text(text)
        (place / "tensors").write_bytes(b"x" * 1000)

    return write


def test_the_newest_is_found_and_older_ones_go(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (1, 9, 10, 11):
        checkpoints.save(step, fill(str(step)))
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest / "state").read_text() == "11"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000000010",
        "step-0000000011",
    ]


@pytest.mark.parametrize(
    "tear", ["shorter", "changed", "missing", "no manifest", "not JSON", "newer"]
)
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, tear: str):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, fill("one"))
    last = checkpoints.save(2, fill("two"))
    manifest = last / "checkpoint.json"
    if tear == "shorter":
        (last / "tensors").write_bytes(b"x" * 999)
    elif tear == "changed":
        (last / "tensors").write_bytes(b"x" * 999 + b"y")
    elif tear == "missing":
        (last / "tensors").unlink()
    elif tear == "no manifest":
        manifest.unlink()
    elif tear == "not JSON":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest / "state").read_text() == "one"


def test_a_full_disk_is_reported_with_figures_and_leaves_nothing_half_written(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, fill("one"))

    def write(place: Path) -> None:
        (place / "state").write_text("two")
        raise RuntimeError("writing failed") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="5000 bytes needed") as caught:
        checkpoints.save(2, write, needed=5000)
    assert caught.value.needed == 5000
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]


def test_another_failure_comes_through_and_leaves_nothing(tmp_path: Path):
    def write(place: Path) -> None:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        Checkpoints(tmp_path).save(2, write)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path):
    program = (
        "import sys, pathlib\n"
        "from arriero.training.checkpoints import Checkpoints\n"
        "c = Checkpoints(pathlib.Path(sys.argv[1]))\n"
        "n = c.newest()\n"
        "step = int((n / 'state').read_text()) if n else 0\n"
        "def write(p):\n"
        "    (p / 'state').write_text(str(step)); (p / 'big').write_bytes(b'x' * 300_000)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1; c.save(step, write)\n"
    )
    reached = 0
    # Longer and longer where a save takes so long.
    for delay in (0.02, 0.05, 0.033, 0.07, *(0.2 * 2**n for n in range(8))):
        if reached and delay > 0.1:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = Checkpoints(tmp_path).newest()
        if newest is not None:
            step = int((newest / "state").read_text())
            assert step >= reached
            assert newest.name == f"step-{step:010d}"
            reached = step
    assert reached > 0
    assert not list(tmp_path.glob(".aside*"))
