"""llama.cpp's own converter, run as a child process.

Responsibility: a model directory in, one lossless GGUF file out, or the outline
of one. Does not know quantizing, artifacts or gRPC.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition, ResourceExhausted
from arriero.weights import MergedWeights
from arriero.weights.layout import build_header
from arriero.weights.tokenizers import FILES as TOKENIZER
from arriero.weights.tokenizers import added_tokens

SETTING = "ARRIERO_LLAMA_CPP"
_SCRIPT = "convert_hf_to_gguf.py"
_POLL_SECONDS = 0.05
# The directory that the package `arriero` lies in.
_SERVICES = Path(__file__).resolve().parents[2]

# Code and pickles stay behind: the converter loads tokenizers with
# trust_remote_code, and a model directory may come from anywhere.
_LINKED = {".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken"}
_TEMPLATES = {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}
_CONFIG = "config.json"
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


def prepare_view(
    model: Path,
    view: Path,
    chat_template: str | None,
    *,
    merged: MergedWeights | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """A directory that looks like the model, with another chat template.

    Weights and the rest are links; the model itself is not touched.

    Args:
        model: Hugging Face model directory, may be read-only.
        view: created; its name becomes part of the file's metadata.
        chat_template: Jinja source to store; None keeps the model's own.
        merged: stands for the model's weights; of them the view holds only the
            header, in a sparse file, and the configuration is theirs.
        tokenizer: a directory whose tokenizer takes the place of the model's.
    """
    view.mkdir(parents=True)
    files = {path.name: path for path in sorted(model.iterdir())}
    if tokenizer is not None:
        files |= {name: tokenizer / name for name in TOKENIZER if (tokenizer / name).is_file()}
    for path in files.values():
        replaced = chat_template is not None and path.name in _TEMPLATES
        if merged is not None and (path.name == _CONFIG or ".safetensors" in path.name):
            replaced = True
        if path.is_file() and path.suffix in _LINKED and not replaced:
            (view / path.name).symlink_to(path.resolve())
    if merged is not None:
        (view / _CONFIG).write_text(json.dumps(merged.config, indent=2), encoding="utf-8")
        header, _ = build_header(list(merged.values()), {"format": "pt"})
        with (view / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + merged.nbytes)
    settings: dict[str, Any] = {}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    if (view / "tokenizer.model").is_file() and (added := added_tokens(view)):
        # Beside a SentencePiece model the converter does not look into tokenizer.json,
        # where transformers 5 keeps them alone.
        settings["added_tokens_decoder"] = added
    if settings:
        _add_settings(view / "tokenizer_config.json", files.get("tokenizer_config.json"), settings)
    return view


def _add_settings(target: Path, source: Path | None, settings: Mapping[str, Any]) -> None:
    config = json.loads(source.read_text(encoding="utf-8")) if source else {}
    for name, value in settings.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    target.unlink(missing_ok=True)
    target.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a GGUF tensor comes from.

    Attributes:
        source: the model's tensor; None where the converter makes it from the
            configuration, in which case the outline holds its data.
        heads: attention heads whose rows are permuted, as llama.cpp's rope wants
            them; 0 for none.
    """

    source: str | None
    heads: int


@dataclass(frozen=True, slots=True)
class Outline:
    """A GGUF file that holds no weights yet.

    Attributes:
        path: the file: header, and data that no weight of the model gives; sparse.
        origins: by GGUF tensor name.
        obstacle: why the tensors cannot be made from the model's one by one;
            empty when they can.
    """

    path: Path
    origins: Mapping[str, Origin]
    obstacle: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert.

    Attributes:
        view: as `prepare_view` returns it.
        out_type: `f32`, `f16` or `bf16`.
        name: for `general.name`.
        metadata: strings to add.
    """

    view: Path
    out_type: str
    name: str
    metadata: Mapping[str, str]


def convert(
    conversion: Conversion,
    target: Path,
    *,
    log: Path,
    threads: int = 1,
    on_progress: Callable[[int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Convert a model directory to GGUF.

    Args:
        conversion: what to convert.
        target: file to write.
        log: file that the converter's output goes to.
        threads: of its tensor library.
        on_progress: called with the bytes written so far.
        check: called a few times a second; when it raises, the converter is killed.

    Raises:
        FailedPrecondition: the converter refuses the model, with its reason.
        ResourceExhausted: it was killed, probably for want of memory.
    """
    child = _start(conversion, target, None, log, threads)
    wait(child, target, log, on_progress, check)


def outline(
    conversion: Conversion,
    target: Path,
    *,
    log: Path,
    check: Callable[[], None] | None = None,
) -> Outline:
    """What `convert` would write, without reading a weight.

    Args and errors are those of `convert`.
    """
    described = target.with_suffix(".json")
    child = _start(conversion, target, described, log, 1)
    wait(child, target, log, None, check)
    data = json.loads(described.read_text(encoding="utf-8"))
    origins = {name: Origin(source, heads) for name, (source, heads) in data["tensors"].items()}
    return Outline(target, origins, data["obstacle"])


def _start(
    conversion: Conversion, target: Path, described: Path | None, log: Path, threads: int
) -> subprocess.Popen[bytes]:
    root = locate()
    request = target.with_suffix(".request.json")
    request.write_text(
        json.dumps(
            {
                "script": str(root / _SCRIPT),
                "arguments": [
                    str(conversion.view), "--outfile", str(target),
                    "--outtype", conversion.out_type, "--model-name", conversion.name,
                ],
                "metadata": dict(conversion.metadata),
                "outline": None if described is None else str(described),
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    return spawn(["-P", "-m", "arriero.quantization.official", str(request)], log, threads)


def spawn(arguments: Sequence[str], log: Path, threads: int = 1) -> subprocess.Popen[bytes]:
    """Start a script of llama.cpp's, without secrets and without a network; see `wait`.

    Args:
        arguments: of the Python interpreter.
        log: file that its output goes to.
        threads: of its tensor library.
    """
    root = locate()
    environment = {key: value for key, value in os.environ.items() if not _SECRETS.search(key)}
    environment |= {
        "PYTHONPATH": os.pathsep.join((str(root / "gguf-py"), str(_SERVICES))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("wb") as output:
        # Same process group as the job: who kills the job kills this too.
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )


def wait(
    child: subprocess.Popen[bytes],
    target: Path,
    log: Path,
    on_progress: Callable[[int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Wait for a started script to have written a file; see `convert` for the rest.

    Raises:
        FailedPrecondition: it refuses, with its reason.
        ResourceExhausted: it was killed, probably for want of memory.
    """
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


def tell(log: Path, to: logging.Logger, *, whole: bool) -> None:
    """Hand the converter's words on: all of them, or the warnings."""
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for line in output.replace("\r", "\n").splitlines():
        if line.startswith("Writing:") or not line.strip():
            continue  # a progress bar
        if whole or line.startswith(("WARNING", "ERROR")):
            to.info("converter: %s", line.rstrip())


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
            + ", nor are its pre-tokenizer's rules those of gpt-2, smollm, llama-bpe or qwen2; "
            "expected the tokenizer of a model family that llama.cpp supports, its vocabulary "
            "extended or not, or a SentencePiece tokenizer.model",
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
