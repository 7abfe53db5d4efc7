"""Checkpoints on disk: whole or not there.

Responsibility: write a directory aside, fsync it, list its files with sizes and
digests, rename it; find the newest that is whole; keep a few. Does not know what
is in the files.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from arriero.errors import DiskFull
from arriero.store.files import fsync_directory, fsync_tree, sha256_file

__all__ = ["Checkpoints", "checkpoint_bytes"]

FORMAT = 1
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{10})")
_ASIDE = ".aside-"
# A float32 weight and two moments of AdamW, of each trained parameter.
_BYTES_PER_SAVED = 12

_log = logging.getLogger("arriero.job.train")


class Checkpoints:
    """The checkpoints of one training, in one directory that outlives attempts.

    Args:
        directory: theirs alone.
        keep: complete ones that are kept, at least 1.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = max(1, keep)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(_ASIDE + "*"):  # an attempt died while it wrote
            shutil.rmtree(left, ignore_errors=True)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        needed: int = 0,
        best: int | None = None,
    ) -> Path:
        """Write a checkpoint of a step; older ones than `keep` go afterwards.

        Args:
            step: optimizer steps done.
            write: fills an empty directory with plain files.
            needed: bytes that it will write at most, for the message of a full disk.
            best: a step whose checkpoint stays, however old it is.

        Raises:
            DiskFull: there was no room; nothing half-written stays.
        """
        target = self.directory / f"step-{step:010d}"
        aside = self.directory / f"{_ASIDE}{step}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            write(aside)
            files = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
            manifest = {
                "format": FORMAT,
                "step": step,
                "files": {n: {"size": s, "sha256": d} for n, (s, d) in files.items()},
            }
            (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            fsync_tree(aside)
            if target.exists():  # of this step, by an attempt that went further back
                shutil.rmtree(target)
            aside.rename(target)
            fsync_directory(self.directory)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if _is_full(error):
                free = shutil.disk_usage(self.directory).free
                raise DiskFull(
                    f"no room for the checkpoint of step {step}: {needed} bytes needed, {free} "
                    f"bytes free in {self.directory}; free some (`arriero artifacts gc`) and "
                    "retry, it goes on from the newest complete checkpoint",
                    needed=needed,
                    free=free,
                ) from error
            raise
        self._prune(best)
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; torn ones are passed over and logged."""
        for path in reversed(self._complete()):
            problem = _problem(path)
            if problem is None:
                return path
            _log.warning("checkpoint %s is passed over: %s", path.name, problem)
        return None

    def whole(self, step: int) -> Path | None:
        """The checkpoint of a step, if it is there and whole."""
        path = self.directory / f"step-{step:010d}"
        problem = _problem(path)
        if problem is not None:
            _log.warning("checkpoint %s is passed over: %s", path.name, problem)
        return path if problem is None else None

    def _complete(self) -> list[Path]:
        """By step, oldest first. Directories of other names are none of ours."""
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def _prune(self, best: int | None) -> None:
        for path in self._complete()[: -self.keep]:
            if best is not None and path.name == f"step-{best:010d}":
                continue
            # Out of sight first: a kill in between leaves nothing that looks complete.
            aside = self.directory / f"{_ASIDE}old-{path.name}"
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint of so many trained parameters at most, states and manifest too."""
    return parameters * _BYTES_PER_SAVED + (1 << 20)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this build reads {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, expected {entry['size']}"
            if sha256_file(file)[1] != entry["sha256"]:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    return None


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk is the reason; safetensors and torch wrap the error in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
