import signal
import subprocess
import sys
from pathlib import Path

CHILD = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
from arriero.llama import Model
Model(sys.argv[1])
"""


def test_an_abort_of_llama_cpp_ends_only_its_process_and_says_why(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    # A token twice in the vocabulary: an assertion of llama.cpp, not an error.
    broken.write_bytes(tiny_gguf.read_bytes().replace(b"<0x41>", b"<0x42>"))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(broken)], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == -signal.SIGABRT
    assert "CRITICAL llama.cpp aborts:" in child.stderr
    assert "id_to_token" in child.stderr
    assert "#0" not in child.stderr + child.stdout  # no debugger was started for a trace
