"""A tiny model the whole way through a platform: what `helm test` runs.

Responsibility: make a random model, push it, run a pipeline on it, ask the
endpoint, and leave nothing but artifacts that gc collects. Needs a platform
(`ARRIERO_ADDRESS`) and nothing else: no hub, no torch, no tokenizer library.
Does not know what the platform runs on.

    python -m arriero.testing.whole_way --timeout 1500 --gateway http://host:8000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from arriero.client import Client
from arriero.client.pipeline import parse_pipeline
from arriero.errors import ArrieroError, DeadlineExceeded, Internal
from arriero.settings import ClientSettings
from arriero.testing.models import CORPUS, tiny_llama
from arriero.v1 import orchestrator_pb2 as pb

_PIPELINE = """
name: whole-way
stages:
- name: rows
  dataset: {{sources: ["{rows}"], tokenizer: "{model}", template: alpaca-no-input, cutoff_len: 128, val_set_size: 0}}
- name: sft
  train:
    model: "{model}"
    dataset: rows
    lora: {{r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: [all-linear]}}
    num_epochs: 1
    batch_size: 8
    micro_batch_size: 8
    learning_rate: 1.0e-3
- name: tuned
  merge: {{model: "{model}", adapters: [sft]}}
- name: quants
  quantize: {{model: tuned, types: [Q8_0]}}
- name: live
  deploy: {{model: quants, endpoint: "{endpoint}"}}
"""  # noqa: E501
_POLL_SECONDS = 2.0
_REACH_SECONDS = 60.0


def main() -> int:
    """0 when the answer came; 1 with one line of why it did not."""
    parser = argparse.ArgumentParser(description="A tiny model the whole way.")
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds for the run")
    parser.add_argument("--gateway", default="", help="URL of the gateway, to be asked as well")
    arguments = parser.parse_args()
    try:
        whole_way(timeout=arguments.timeout, gateway=arguments.gateway)
    except ArrieroError as error:
        print(f"FAILED: {error.message}", file=sys.stderr, flush=True)
        return 1
    return 0


def whole_way(*, timeout: float, gateway: str = "") -> None:
    """Run it and say what happens.

    Args:
        timeout: seconds for the run.
        gateway: URL of the gateway; empty: it is not asked.

    Raises:
        ArrieroError: something did not do what it should.
    """
    # Other weights each time: otherwise the store would have every result already.
    seed = time.time_ns() % 2**31
    endpoint = f"whole-way-{seed:x}"
    with Client() as client, tempfile.TemporaryDirectory() as directory:
        say(f"platform at {client.address}")
        _reach(client, min(timeout, _REACH_SECONDS))
        model, rows = _push(client, Path(directory), seed)
        text = _PIPELINE.format(model=model, rows=rows, endpoint=endpoint)
        run = client.create_run(parse_pipeline(text))
        say(f"run {run.id}")
        try:
            _follow(client, run.id, timeout)
            answer = client.endpoint(endpoint).generate("The driver", max_tokens=8).text()
            say(f"endpoint {endpoint} answers {answer!r}")
            if gateway:
                say(f"gateway answers {_ask_gateway(gateway, endpoint)!r}")
        finally:
            with contextlib.suppress(ArrieroError):
                client.cancel_run(run.id)
            client.endpoints.delete(endpoint, allow_missing=True)
    say("whole way: passed")


def say(text: str) -> None:
    """A line at once: somebody follows the log."""
    print(text, flush=True)


def _reach(client: Client, seconds: float) -> None:
    """Until the platform answers: network policies let a new pod in after a moment."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            client.list_runs(1)
            return
        except ArrieroError as error:
            if not error.retryable or time.monotonic() > deadline:
                raise
            say(f"it does not answer yet: {error.message}")
        time.sleep(_POLL_SECONDS)


def _push(client: Client, directory: Path, seed: int) -> tuple[str, str]:
    made = tiny_llama(directory / "model", seed=seed, tokenizer="plain")
    model = client.artifacts.push(made, kind="model", name="whole-way")
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in _rows()), encoding="utf-8")
    rows = client.artifacts.push(path, kind="dataset", name="whole-way")
    say(f"pushed model {model.digest} and rows {rows.digest}")
    return f"model/whole-way@{model.digest}", f"dataset/whole-way@{rows.digest}"


def _rows() -> Iterator[str]:
    for i in range(32):
        question, answer = CORPUS[i % len(CORPUS)], CORPUS[(i + 1) % len(CORPUS)]
        yield json.dumps({"instruction": f"{i}. {question}", "output": answer})


def _follow(client: Client, run: str, timeout: float) -> None:
    """Until the run ends; polled, since a watch breaks when the orchestrator restarts."""
    deadline = time.monotonic() + timeout
    told: dict[str, str] = {}
    while True:
        with contextlib.suppress(_Away):
            found = _get(client, run)
            for stage in found.stages:
                state = pb.StageState.Name(stage.state).removeprefix("STAGE_STATE_")
                line = f"{state} {stage.metadata.progress.phase}".strip()
                if told.get(stage.name) != line:
                    told[stage.name] = line
                    say(f"{stage.name}: {line}")
            if found.state == pb.RUN_STATE_SUCCEEDED:
                return
            if found.state in (pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED):
                raise Internal(f"the run did not succeed: {_why(found)}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the run is not done after {timeout:g} s; it is at {told}")
        time.sleep(_POLL_SECONDS)


class _Away(Exception):
    """The orchestrator does not answer now."""


def _get(client: Client, run: str) -> pb.Run:
    try:
        return client.get_run(run)
    except ArrieroError as error:
        if error.retryable:
            raise _Away from error
        raise


def _why(run: pb.Run) -> str:
    failed = [f"{stage.name}: {stage.error.message}" for stage in run.stages if stage.error.message]
    return "; ".join(failed) or run.error.message or pb.RunState.Name(run.state)


def _ask_gateway(url: str, endpoint: str) -> str:
    settings = ClientSettings.from_env()
    body = {"model": endpoint, "prompt": "The driver", "max_tokens": 8}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    if settings.token:
        request.add_header("authorization", f"Bearer {settings.token}")
    context = None
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=os.fspath(settings.tls_ca or "") or None)
        # The certificate's name is the one that gRPC is told, not the URL's.
        context.check_hostname = settings.tls_server_name is None
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            return str(json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        raise Internal(f"gateway: {error.code} {error.read().decode(errors='replace')}") from error
    except (OSError, ValueError, LookupError) as error:
        raise Internal(f"gateway at {url}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
