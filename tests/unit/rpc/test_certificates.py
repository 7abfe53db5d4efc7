"""When a certificate ends."""

import shutil
import subprocess
from pathlib import Path

import pytest

from arriero.rpc.certificates import not_after


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize("days", [3, 365 * 60])  # the later one is written otherwise
def test_the_end_of_a_certificate_is_the_one_that_openssl_tells(tmp_path: Path, days: int) -> None:
    path = tmp_path / "tls.crt"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    where = ["-keyout", str(tmp_path / "tls.key"), "-out", str(path), "-subj", "/CN=llama"]
    command = ["openssl", "req", "-x509", "-days", str(days), *kind, *where]
    subprocess.run(command, check=True, capture_output=True)
    ended = not_after(path)
    assert ended is not None
    for seconds, holds in ((-60, True), (60, False)):
        left = int(ended + seconds - path.stat().st_mtime)
        command = ["openssl", "x509", "-checkend", str(left), "-noout", "-in", str(path)]
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.returncode == 0) is holds


def test_what_is_no_certificate_has_no_end(tmp_path: Path) -> None:
    assert not_after(tmp_path / "missing") is None
    (tmp_path / "other").write_text("llama")
    assert not_after(tmp_path / "other") is None
