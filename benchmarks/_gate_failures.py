"""Fifteen failures that pipelines like these are known for, seeded into real work.

Responsibility: one function per failure, which breaks something and says what
noticed. Does not know how runs are counted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _gate_rooms import DTYPES, FAMILIES, Outcome, Rooms, alpaca_rows

from arriero.store import Artifact


@dataclass(frozen=True)
class Case:
    """Where a failure is seeded."""

    rooms: Rooms
    family: str
    dtype: str

    def model(self, **options: Any) -> Artifact:
        """A model of the case's kind."""
        return self.rooms.model(self.family, self.dtype, **options)

    @property
    def template(self) -> str:
        """A template that the tokenizer has the end of turn of."""
        return "alpaca" if self.family == "sentencepiece" else "chatml"


@dataclass(frozen=True)
class Failure:
    """One row of the scoreboard."""

    name: str
    seed: Callable[[Case], list[str]]
    families: tuple[str, ...] = FAMILIES
    dtypes: tuple[str, ...] = DTYPES


def noticed(outcome: Outcome, *gates: str, codes: tuple[str, ...] = (), warn: bool = False) -> str:
    """What noticed: one of the gates, or a refusal with one of the codes; else empty."""
    judged = [*outcome.failed, *(outcome.warned if warn else ())]
    found = [gate for gate in judged if gate in gates]
    if found:
        return found[0]
    if outcome.refused and outcome.error is not None and outcome.error.code in codes:
        return f"refused ({outcome.error.code})"
    return ""


# -- the adapter -------------------------------------------------------------------


def empty_adapter(case: Case) -> list[str]:
    """An adapter file without tensors, and one of zeros."""
    from safetensors.numpy import load_file, save_file

    model = case.model()

    def no_tensors(directory: Path) -> None:
        save_file({}, str(directory / "adapter_model.safetensors"))

    def no_training(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, str(path))

    def no_number(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = np.nan
        save_file(tensors, str(path))

    return [
        noticed(case.rooms.adapter(model, change), "adapter.health")
        for change in (no_tensors, no_training, no_number)
    ]


@contextmanager
def environment(**values: str) -> Any:
    """Variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def out_of_room_at_save(case: Case) -> list[str]:
    """The first checkpoint does not fit: noticed at step 1, not at the end."""
    model = case.model()
    rows = case.rooms.rows(model, template=case.template).first()
    with environment(ARRIERO_STORE_QUOTA_BYTES=str(case.rooms.used + 4096)):
        outcome = case.rooms.train(model, rows, max_steps=50)
    word = noticed(outcome, codes=("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"))
    step = outcome.job.meter.read().step if outcome.job is not None else 0
    return [word if step <= 1 else ""]


_LIMITED = """
import resource, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
from _gate_rooms import Rooms
from arriero.store import Store
import torch, transformers, peft  # before the limit: only what the merge itself takes counts
rooms = Rooms(Path(sys.argv[3]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[6]), resource.RLIM_INFINITY))
outcome = rooms.merge(
    rooms.store.get(sys.argv[4]), rooms.store.get(sys.argv[5]), gates={"merge.logits": 3}
)
error = outcome.error
print("RESULT", error.code if error else "DONE", error.reason if error else "", outcome.failed)
"""


def merge_out_of_memory(case: Case) -> list[str]:
    """A limit of memory that the merge does not fit in: named, and nothing published."""
    model = case.model(hidden=512, layers=4)
    adapter = case.rooms.adapter(model).first()
    here = Path(__file__).resolve().parent
    services = Path(sys.modules["arriero"].__file__ or "").resolve().parents[1]
    before = len(case.rooms.store.list("model"))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(here), str(services), str(case.rooms.home)]
        + [model.digest, adapter.digest, str(256 << 10)],
        check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if len(case.rooms.store.list("model")) != before:
        return [""]
    if not said:  # killed: the engine names that, and nothing was published
        return ["process ended, nothing published" if done.returncode else ""]
    return ["named (RESOURCE_EXHAUSTED)" if "RESOURCE_EXHAUSTED" in said[0] else ""]


# -- the merge ---------------------------------------------------------------------


def _trained(case: Case, **fields: Any) -> tuple[Artifact, Artifact, Artifact]:
    """Model, adapter of a training on it, golden logits."""
    model = case.model()
    rows = case.rooms.rows(model, template=case.template).first()
    outcome = case.rooms.train(model, rows, **fields)
    adapter = outcome.first()
    return model, adapter, outcome.artifacts["golden"]


def merged_is_not_the_sum(case: Case) -> list[str]:
    """What was written is the base, or noise, although the merge did its work."""
    from arriero.merging import merge as merging

    model, adapter, _ = _trained(case)
    honest = merging.write_merged
    words = []

    def base_again(merged: Any, base: Path, target: Path, **options: Any) -> Any:
        made = honest(merged, base, target, **options)
        shutil.copyfile(base / "model.safetensors", target / "model.safetensors")
        return made

    def garbage(merged: Any, base: Path, target: Path, **options: Any) -> Any:
        made = honest(merged, base, target, **options)
        path = target / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4096:] = np.random.default_rng(0).bytes(4096)
        path.write_bytes(data)
        return made

    for broken in (base_again, garbage):
        merging.write_merged = broken  # type: ignore[attr-defined]
        try:
            outcome = case.rooms.merge(model, adapter)
        finally:
            merging.write_merged = honest  # type: ignore[attr-defined]
        words.append(noticed(outcome, "merge.delta", "merge.logits"))
    return words


def wrong_base(case: Case) -> list[str]:
    """An adapter that was trained on a 4-bit base, merged into another base."""
    _, adapter, _ = _trained(case, load_in_4bit=True)
    other = case.model(seed=5)
    return [
        noticed(case.rooms.merge(other, adapter), "merge.logits", codes=("FAILED_PRECONDITION",))
    ]


def vocabulary_mismatch(case: Case) -> list[str]:
    """Rows of a larger vocabulary, a tokenizer larger than the model, an adapter of another."""
    model = case.model()
    words = []

    def fewer_rows(directory: Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = directory / "model.safetensors"
        tensors = load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:300]
        save_file(tensors, str(path), metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))

    if case.dtype == "float32":  # numpy has no bfloat16 to cut with
        small = case.model(change=fewer_rows)
        words.append(noticed(case.rooms.rows(small, template=case.template), "tokenizer.match"))
        rows = case.rooms.rows(model, template=case.template).first()
        words.append(noticed(case.rooms.train(small, rows), codes=("FAILED_PRECONDITION",)))
    wide = case.rooms.adapter(case.model(hidden=96)).first()
    words.append(noticed(case.rooms.merge(model, wide), codes=("FAILED_PRECONDITION",)))
    return words


def added_rows_lost(case: Case) -> list[str]:
    """A tuned output layer that is thrown away, and one that is tied to the embeddings again."""
    from arriero.merging import merge as merging

    model, adapter, _ = _trained(
        case, lora={"modules_to_save": ["embed_tokens", "lm_head"]}, max_steps=8
    )
    honest = merging.write_merged
    words = []

    def lost(merged: Any, base: Path, target: Path, **options: Any) -> Any:
        made = honest(merged, base, target, **options)
        _overwrite(target / "model.safetensors", base / "model.safetensors", "lm_head.weight")
        return made

    def tied(merged: Any, base: Path, target: Path, **options: Any) -> Any:
        made = honest(merged, base, target, **options)
        path = target / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
        return made

    for broken in (lost, tied):
        merging.write_merged = broken  # type: ignore[attr-defined]
        try:
            outcome = case.rooms.merge(model, adapter)
        finally:
            merging.write_merged = honest  # type: ignore[attr-defined]
        words.append(noticed(outcome, "merge.vocab", "merge.delta", "merge.logits"))
    return words


def _overwrite(target: Path, source: Path, name: str) -> None:
    """Put one tensor's bytes of a safetensors file into another's place for it."""
    from arriero.weights.layout import read_header

    mine, theirs = read_header(target)[name], read_header(source)[name]
    data = bytearray(target.read_bytes())
    data[mine.start : mine.start + mine.nbytes] = source.read_bytes()[
        theirs.start : theirs.start + theirs.nbytes
    ]
    target.write_bytes(data)


# -- rows and prompts --------------------------------------------------------------


def other_template(case: Case) -> list[str]:
    """The model is quantized with another template than its rows were rendered with."""
    from arriero.prompts import load

    model, adapter, _ = _trained(case)
    merged = case.rooms.merge(model, adapter).first()
    other = "vicuna"

    directory = case.rooms.place("changed") / "model"
    shutil.copytree(merged.path, directory, copy_function=shutil.copyfile)
    load(other).write(directory)
    changed = case.rooms.publish(directory, "model", golden=merged.manifest.golden)
    return [noticed(case.rooms.quantize(changed, "Q8_0"), "gguf.template")]


def double_bos(case: Case) -> list[str]:
    """Rows that bring the BOS that tokenizer or template writes too."""
    model = case.model()
    bos = {"sentencepiece": "<s>", "smollm": "<|im_start|>", "llama-3": "<|begin_of_text|>"}
    own = bos[case.family]
    template = case.rooms.home / "work" / "bos.json"
    template.parent.mkdir(exist_ok=True)
    template.write_text(
        json.dumps(
            {
                "name": "doubled",
                "chat_template": "{{ bos_token + bos_token }}{% for m in messages %}"
                "{{ m.role + ': ' + m.content }}"
                "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            }
        )
    )
    words = [noticed(case.rooms.rows(model, template=str(template)), "dataset.bos")]
    if case.family == "sentencepiece":
        # BOS as text at the beginning of what a template renders bare.
        rows = [row | {"instruction": own + row["instruction"]} for row in alpaca_rows()]
        bare = case.rooms.home / "work" / "bare.json"
        bare.write_text(
            json.dumps(
                {
                    "name": "bare",
                    "chat_template": "{% for m in messages %}{{ m.content }}"
                    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
                    "{% endfor %}",
                }
            )
        )
        words.append(noticed(case.rooms.rows(model, rows, template=str(bare)), "dataset.bos"))
    return words


def eos_never_learnt(case: Case) -> list[str]:
    """A template whose end of turn is not one token here, so that answers never end."""
    model = case.model()
    template = case.rooms.home / "work" / "endless.json"
    template.parent.mkdir(exist_ok=True)
    template.write_text(
        json.dumps(
            {
                "name": "endless",
                "chat_template": "{% for m in messages %}{{ m.role + ': ' + m.content }}"
                "{% if m.role == 'assistant' %}{{ '<|the_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
                "end_of_turn": "<|the_end|>",
            }
        )
    )
    return [noticed(case.rooms.rows(model, template=str(template)), "dataset.labels")]


def labels_masked_or_cut(case: Case) -> list[str]:
    """Prompts that fill the cutoff, and answers that most rows lose the end of."""
    model = case.model()
    long = [row | {"instruction": row["instruction"] * 60} for row in alpaca_rows()]
    some = [*long[:3], *alpaca_rows(13)]
    cut = [row | {"output": row["output"] * 60} for row in alpaca_rows()]
    knobs = {"template": case.template, "cutoff_len": 400}
    return [
        noticed(
            case.rooms.rows(model, long, **knobs),
            "dataset.labels",
            codes=("FAILED_PRECONDITION", "INVALID_ARGUMENT"),
        ),
        noticed(case.rooms.rows(model, some, **knobs), "dataset.labels"),
        noticed(case.rooms.rows(model, cut, **knobs), "dataset.truncation", warn=True),
    ]


def tokenizing_while_training(case: Case) -> list[str]:
    """Raw rows handed to a training, which would tokenize them while it holds the GPUs."""
    model = case.model()
    directory = case.rooms.place("raw")
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in alpaca_rows()) + "\n")
    raw = case.rooms.publish(directory, "dataset")
    outcome = case.rooms.train(model, raw)
    started = outcome.job is not None and outcome.job.meter.read().step > 0
    word = noticed(outcome, codes=("FAILED_PRECONDITION", "INVALID_ARGUMENT", "DATA_LOSS"))
    return ["" if started else word]


# -- checkpoints -------------------------------------------------------------------


def _interrupted(case: Case) -> tuple[Artifact, Artifact, Path, Outcome]:
    """A training that was told to leave after some steps, and where it lies."""
    model = case.model()
    rows = case.rooms.rows(model, template=case.template).first()
    place = case.rooms.place("train")

    def soon(job: Any) -> None:
        update = job.meter.update

        def watched(**figures: Any) -> None:
            update(**figures)
            if figures.get("step", 0) >= 5 and figures.get("phase") == "training":
                job.preempted.set()

        job.meter.update = watched

    stopped = case.rooms.train(model, rows, max_steps=8, save_steps=2, place=place, prepare=soon)
    return model, rows, place, stopped


def lost_state(case: Case) -> list[str]:
    """A checkpoint whose weights are not those of its step: the resume is another training."""
    import torch

    model, rows, place, stopped = _interrupted(case)
    if stopped.error is None or stopped.error.code != "UNAVAILABLE":
        return [""]
    newest = max((place / "staging" / "checkpoints").glob("step-*"))
    path = newest / "tensors.pt"
    tensors = torch.load(path, weights_only=True)
    first = True
    for name, weight in tensors["weights"].items():
        if first or "lora_B" in name:
            weight.zero_()
            first = False
    torch.save(tensors, path)
    _sign(newest)
    again = case.rooms.train(model, rows, max_steps=8, save_steps=2, place=place, attempt=2)
    return [noticed(again, "train.resume", codes=("FAILED_PRECONDITION",))]


def _sign(checkpoint: Path) -> None:
    """Let a checkpoint's list of files agree with them again."""
    from arriero.store.files import sha256_file

    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        size, digest = sha256_file(checkpoint / name)
        manifest["files"][name] = {"size": size, "sha256": digest}
    path.write_text(json.dumps(manifest))


def torn_checkpoint(case: Case) -> list[str]:
    """The newest checkpoint is cut off: it is passed over, and the one before is used."""
    model, rows, place, stopped = _interrupted(case)
    if stopped.error is None or stopped.error.code != "UNAVAILABLE":
        return [""]
    newest = max((place / "staging" / "checkpoints").glob("step-*"))
    path = newest / "tensors.pt"
    path.write_bytes(path.read_bytes()[:-200])
    again = case.rooms.train(model, rows, max_steps=8, save_steps=2, place=place, attempt=2)
    passed_over = any(newest.name in line and "passed over" in line for line in again.lines)
    went_on = any(line.startswith("resumed from step") for line in again.lines)
    whole = again.error is None and not again.failed
    return ["passed over, resumed from the one before" if passed_over and went_on and whole else ""]


# -- the file ----------------------------------------------------------------------


def broken_export(case: Case) -> list[str]:
    """A converter that is not whole, a disk that is too small, a file that was cut off."""
    model = case.model()
    nowhere = case.rooms.place("llama.cpp")
    words = []
    with environment(ARRIERO_LLAMA_CPP=str(nowhere)):
        words.append(noticed(case.rooms.quantize(model, "Q8_0"), codes=("FAILED_PRECONDITION",)))
    with environment(ARRIERO_STORE_QUOTA_BYTES=str(case.rooms.used + 4096)):
        words.append(noticed(case.rooms.quantize(model, "Q8_0"), codes=("RESOURCE_EXHAUSTED",)))
    made = case.rooms.quantize(model, "Q8_0").first()
    directory = case.rooms.place("cut")
    whole = next(made.path.iterdir())
    (directory / whole.name).write_bytes(whole.read_bytes()[:-4096])
    cut = case.rooms.publish(directory, "gguf")
    text = directory.parent / "text.txt"
    text.write_text("The driver takes a train of pack llamas over the Andes. " * 20)
    words.append(
        noticed(case.rooms.evaluate(cut, text=str(text), context=64), codes=("DATA_LOSS",))
    )
    return words


FAILURES: tuple[Failure, ...] = (
    Failure("empty adapter", empty_adapter),
    Failure("out of memory or disk at save", out_of_room_at_save),
    Failure("merge out of memory", merge_out_of_memory, families=FAMILIES[:1]),
    Failure("merged equal to base, or garbage", merged_is_not_the_sum),
    Failure("QLoRA merged on the wrong base", wrong_base),
    Failure("vocabulary mismatch", vocabulary_mismatch),
    Failure("added rows lost, or tied wrongly", added_rows_lost),
    Failure("another template in serving", other_template),
    Failure("double BOS", double_bos),
    Failure("EOS never learnt", eos_never_learnt),
    Failure("labels all masked, or silently cut", labels_masked_or_cut),
    Failure("resume that lost state", lost_state),
    Failure("torn checkpoint", torn_checkpoint),
    Failure("tokenizing while GPUs wait", tokenizing_while_training),
    Failure("GGUF export broken by toolchain or disk", broken_export),
)
