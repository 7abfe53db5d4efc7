"""llama.cpp's own converter, run as a child process.

Responsibility: a model directory in, one lossless GGUF file out, with the prompt
template in its metadata. Does not know quantizing, artifacts or gRPC.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from arriero.errors import FailedPrecondition, ResourceExhausted

SETTING = "ARRIERO_LLAMA_CPP"
_SCRIPT = "convert_hf_to_gguf.py"
_POLL_SECONDS = 0.2

# Code and pickles stay behind: the converter loads tokenizers with
# trust_remote_code, and a model directory may come from anywhere.
_LINKED = {".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken"}
_TEMPLATES = {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}
_SECRETS = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|CREDENTIALS?|API_?KEY|ACCESS_?KEY)(_|$)", re.IGNORECASE
)


def locate(environment: Mapping[str, str] | None = None) -> Path:
    """The directory with llama.cpp's converter.

    `ARRIERO_LLAMA_CPP` names it; default: where `make setup` puts the sources of
    the very llama.cpp that is linked.

    Raises:
        FailedPrecondition: it is not there.
    """
    named = (os.environ if environment is None else environment).get(SETTING)
    root = Path(named) if named else Path(sys.prefix) / "share" / "arriero" / "llama.cpp"
    for needed in (_SCRIPT, "conversion", "gguf-py"):
        if not (root / needed).exists():
            raise FailedPrecondition(
                f"llama.cpp's converter is not complete: {root / needed} is missing; run "
                f"`make setup`, or set {SETTING} to llama.cpp's source directory"
            )
    return root


def prepare_view(model: Path, view: Path, chat_template: str | None) -> Path:
    """A directory that looks like the model, with another chat template.

    Weights and the rest are links; the model itself is not touched.

    Args:
        model: Hugging Face model directory, may be read-only.
        view: created; its name becomes part of the file's metadata.
        chat_template: Jinja source to store; None keeps the model's own.
    """
    view.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        replaced = chat_template is not None and path.name in _TEMPLATES
        if path.is_file() and path.suffix in _LINKED and not replaced:
            (view / path.name).symlink_to(path.resolve())
    if chat_template is not None:
        source = model / "tokenizer_config.json"
        config = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
        config["chat_template"] = chat_template
        (view / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
        )
    return view


def convert(
    root: Path,
    view: Path,
    target: Path,
    *,
    out_type: str,
    name: str,
    log: Path,
    threads: int = 1,
    on_progress: Callable[[int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Convert a model directory to GGUF.

    Args:
        root: as `locate` returns it.
        view: as `prepare_view` returns it.
        target: file to write.
        out_type: `f32`, `f16` or `bf16`.
        name: for `general.name`.
        log: file that the converter's output goes to.
        threads: of its tensor library.
        on_progress: called with the bytes written so far.
        check: called a few times a second; when it raises, the converter is killed.

    Raises:
        FailedPrecondition: the converter refuses the model, with its reason.
        ResourceExhausted: it was killed, probably for want of memory.
    """
    command = [
        sys.executable, str(root / _SCRIPT), str(view),
        "--outfile", str(target), "--outtype", out_type, "--model-name", name,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not _SECRETS.search(key)}
    environment |= {
        "PYTHONPATH": str(root / "gguf-py"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("wb") as output:
        # Same process group as the job: who kills the job kills this too.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while child.poll() is None:
                if check is not None:
                    check()
                if on_progress is not None and target.exists():
                    on_progress(target.stat().st_size)
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode != 0:
        raise _refusal(child.returncode, log.read_text(encoding="utf-8", errors="replace"))
    if not target.is_file():
        raise FailedPrecondition("llama.cpp's converter ended without writing a file")


def _refusal(code: int, output: str) -> FailedPrecondition | ResourceExhausted:
    """What the converter's last words mean to the person who owns the model."""
    if code < 0:
        return ResourceExhausted(
            f"llama.cpp's converter was killed by signal {-code}, probably out of memory"
        )
    if "pre-tokenizer was not recognized" in output:
        fingerprint = re.search(r"chkhsh:\s*([0-9a-f]{64})", output)
        return FailedPrecondition(
            "llama.cpp's converter does not know this BPE tokenizer"
            + (f" (fingerprint {fingerprint[1][:16]})" if fingerprint else "")
            + "; expected the unchanged tokenizer of a model family that llama.cpp supports "
            "(an extended BPE vocabulary is not), or a SentencePiece tokenizer.model",
            reason="UNKNOWN_PRE_TOKENIZER",
        )
    unsupported = re.search(r"Model (\S+) is not supported", output)
    if unsupported:
        return FailedPrecondition(
            f"llama.cpp's converter does not support the architecture {unsupported[1]}; expected "
            "a LLaMA-family model",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    last = lines[-1] if lines else "no output"
    if last.startswith("MemoryError"):
        return ResourceExhausted("llama.cpp's converter ran out of memory")
    return FailedPrecondition(
        f"llama.cpp's converter refuses the model: {last[:500]}; its whole output is in the log"
    )
