"""Meta's original checkpoints as Hugging Face models.

Responsibility: find `consolidated.*.pth` and `params.json`, hold them against
each other, and write safetensors tensor by tensor from mapped files. Does not
know where the directory came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging import architecture, meta, pickles, tokenizer_model
from arriero.merging.files import write_json
from arriero.weights import TensorPlan, WeightsWriter, dtype_name
from arriero.weights.writer import DEFAULT_SHARD_SIZE

if TYPE_CHECKING:
    import torch

__all__ = ["checkpoint_files", "convert", "find_tokenizer", "is_meta"]

Tick = Callable[[int, int], None]
PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_ROWS = 1024
_LLAMA_3_VOCABULARY = 128256
_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def is_meta(directory: Path) -> bool:
    """Whether a directory looks like Meta's checkpoint, and not like Hugging Face's too."""
    return not (directory / "config.json").exists() and any(directory.glob("consolidated.*.pth"))


def checkpoint_files(directory: Path) -> list[Path]:
    """`consolidated.00.pth` and its siblings, in order.

    Raises:
        FailedPrecondition: `params.json` is missing.
        DataLoss: a number is left out.
    """
    if not (directory / PARAMS).is_file():
        raise FailedPrecondition(
            f"{directory.name} holds consolidated.*.pth, but no {PARAMS}; expected both, as Meta "
            "ships them"
        )
    numbered = {
        int(found[1]): path
        for path in directory.iterdir()
        if (found := _SHARD.fullmatch(path.name)) and path.is_file()
    }
    if missing := [number for number in range(max(numbered) + 1) if number not in numbered]:
        raise DataLoss(
            f"consolidated.{missing[0]:02d}.pth is missing ({len(numbered)} of at least "
            f"{max(numbered) + 1} are there); fetch it"
        )
    return [numbered[number] for number in sorted(numbered)]


def find_tokenizer(directory: Path) -> Path | None:
    """`tokenizer.model` beside the checkpoint or in the directory above, where Meta puts it."""
    for place in (directory, directory.parent):
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    return None


def convert(
    directory: Path,
    target: Path,
    *,
    tokenizer: Path | None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    tick: Tick,
) -> list[str]:
    """Write a Hugging Face model with its tokenizer into `target`.

    Memory holds a block of rows at a time; the checkpoint is mapped.

    Args:
        directory: holds `params.json` and `consolidated.*.pth`.
        target: directory.
        tokenizer: `tokenizer.model`; None: the model goes without one.
        max_shard_size: bytes.
        tick: called with tensors so far and in all.

    Returns:
        What was assumed or left out, for people.

    Raises:
        FailedPrecondition: a pickle with code, tensors of another architecture,
            files that do not belong together.
        DataLoss: a shard is missing or damaged.
    """
    try:
        data = json.loads((directory / PARAMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"{PARAMS} is not JSON: {error}") from error
    params = meta.Params.from_json(data)
    files = checkpoint_files(directory)
    shards = [_tensors(path) for path in files]
    parts = _parts(files, shards)
    notes: list[str] = []
    tied = _is_tied(parts, params.dim)
    if tied:
        parts.pop(_OUTPUT, None)
        notes.append("the output layer is the embeddings again: written once (tied)")
    places, shapes = _places(params, files, parts)
    vocabulary = shapes[_EMBEDDINGS][0]
    if params.vocab_size not in (-1, vocabulary):
        notes.append(
            f"{PARAMS} says vocab_size {params.vocab_size}, the embeddings have {vocabulary} "
            "rows, which count"
        )
    tiktoken = tokenizer is not None and tokenizer_model.is_ranks(tokenizer)
    config = params.config(
        vocabulary=vocabulary,
        tied=tied,
        dtype=str(parts[_EMBEDDINGS][0].dtype).removeprefix("torch."),
        tiktoken=tiktoken,
    )
    _check(architecture.expected_tensors(config), shapes, params, files, parts)
    if not params.max_seq_len:
        notes.append(
            f"{PARAMS} does not say the context length; {config['max_position_embeddings']} is "
            "what Meta's release of this kind has"
        )
    notes += _write_tokenizer(target, tokenizer, params, config, vocabulary)
    plans = [
        TensorPlan(name, dtype_name(str(parts[name][0].dtype)), shapes[name]) for name in shapes
    ]
    with WeightsWriter(target, plans, max_shard_size=max_shard_size) as writer:
        for done, plan in enumerate(plans, 1):
            blocks = meta.joined(parts[plan.name], places[plan.name], params.head_dim)
            writer.write_rows(plan.name, blocks)
            tick(done, len(plans))
    write_json(target / "config.json", config)
    return notes


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's names -> the rank's tensors, mapped."""
    return {
        meta.hugging_face_name(name): tensor
        for name, tensor in pickles.tensors(path)
        if not name.endswith(meta.IGNORED)
    }


def _parts(
    files: Sequence[Path], shards: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, list[torch.Tensor]]:
    names = shards[0].keys()
    for path, shard in zip(files, shards, strict=True):
        if other := names ^ shard.keys():
            raise DataLoss(
                f"{path.name} has other tensors than {files[0].name}, such as {min(other)}; the "
                "files belong to different checkpoints, or one is damaged"
            )
    if _EMBEDDINGS not in names:
        raise FailedPrecondition(f"{files[0].name} holds no tok_embeddings.weight")
    for name in names:
        dimensions = 1 if name.endswith("norm.weight") else 2
        if any(shard[name].dim() != dimensions for shard in shards):
            raise FailedPrecondition(
                f"{name} has {shards[0][name].dim()} dimensions, expected {dimensions}"
            )
    # Layer by layer, as transformers writes them.
    ordered = sorted(names, key=_order)
    return {name: [shard[name] for shard in shards] for name in ordered}


def _order(name: str) -> tuple[int, int, str]:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found:
        return (1, int(found[1]), name)
    return (0 if name == _EMBEDDINGS else 2, 0, name)


def _is_tied(parts: Mapping[str, Sequence[torch.Tensor]], dim: int) -> bool:
    """Whether the output layer, shared by rows, holds the embeddings' very bits."""
    if _OUTPUT not in parts:
        return True
    embeddings, output = parts[_EMBEDDINGS], parts[_OUTPUT]
    if embeddings[0].dtype != output[0].dtype:
        return False
    if embeddings[0].shape[1] == dim:  # by rows too
        return all(_equal(a, b) for a, b in zip(embeddings, output, strict=True))
    width, row = embeddings[0].shape[1], 0
    for part in output:
        rows = slice(row, row + part.shape[0])
        for rank, columns in enumerate(embeddings):
            if not _equal(columns[rows], part[:, rank * width : (rank + 1) * width]):
                return False
        row += part.shape[0]
    return True


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, a few rows at a time: most models differ in the first."""
    import torch

    if one.shape != other.shape:
        return False
    return all(
        torch.equal(one[start : start + _ROWS], other[start : start + _ROWS])
        for start in range(0, one.shape[0], _ROWS)
    )


def _places(
    params: meta.Params, files: Sequence[Path], parts: Mapping[str, Sequence[torch.Tensor]]
) -> tuple[dict[str, meta.Place], dict[str, tuple[int, ...]]]:
    """Where each tensor is split, and its whole shape."""
    import torch

    # By columns the ranks' widths add up to dim, by rows each has all of it.
    vocabulary_rows = parts[_EMBEDDINGS][0].shape[1] == params.dim
    places: dict[str, meta.Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensors in parts.items():
        place = places[name] = meta.place_of(name, vocabulary_rows=vocabulary_rows)
        first = tensors[0]
        if place.axis is None:
            if any(not torch.equal(first, other) for other in tensors[1:]):
                raise DataLoss(
                    f"{name} differs between {files[0].name} and its siblings, which hold it "
                    "whole; they belong to different checkpoints"
                )
            shapes[name] = tuple(first.shape)
            continue
        if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
            raise DataLoss(
                f"the parts of {name} differ in shape or type: "
                f"{', '.join(str(tuple(t.shape)) for t in tensors)}; the files belong to "
                "different checkpoints"
            )
        shape = list(first.shape)
        shape[place.axis] *= len(tensors)
        shapes[name] = tuple(shape)
    return places, shapes


def _check(
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    params: meta.Params,
    files: Sequence[Path],
    parts: Mapping[str, Sequence[torch.Tensor]],
) -> None:
    """Hold the tensors against `params.json`; say so when a shard is missing."""
    first = next((name for name in shapes if name.endswith("o_proj.weight")), None)
    if first is not None:
        width = parts[first][0].shape[1]
        ranks = params.dim // width if width and params.dim % width == 0 else len(files)
        if ranks != len(files):
            raise DataLoss(
                f"each file holds {width} of {params.dim} columns, so there must be {ranks} files "
                f"consolidated.*.pth, but {len(files)} are there; fetch the others"
            )
    missing = [name for name in expected if name not in shapes]
    strange = [name for name in shapes if name not in expected]
    if missing or strange:
        names = ", ".join((missing or strange)[:3])
        what = "missing" if missing else "more than it asks for"
        raise FailedPrecondition(
            f"tensors do not fit {PARAMS}: {len(missing or strange)} {what}, such as {names}"
        )
    wrong = [
        f"{n} is {shapes[n]}, expected {expected[n]}" for n in expected if shapes[n] != expected[n]
    ]
    if wrong:
        raise FailedPrecondition(
            f"{len(wrong)} tensors have other shapes than {PARAMS} says: {'; '.join(wrong[:3])}"
        )


def _write_tokenizer(
    target: Path,
    tokenizer: Path | None,
    params: meta.Params,
    config: dict[str, Any],
    vocabulary: int,
) -> list[str]:
    if tokenizer is None:
        bos = 128000 if vocabulary == _LLAMA_3_VOCABULARY else 1
        config.update(bos_token_id=bos, eos_token_id=bos + 1)
        return [
            f"there is no {TOKENIZER} here or in the directory above: the model has no tokenizer; "
            "give its path as tokenizer"
        ]
    found = tokenizer_model.read_tokenizer(
        tokenizer,
        target,
        named_reserved=params.scaled_rope,
        context=config["max_position_embeddings"],
    )
    if found.size > vocabulary:
        raise FailedPrecondition(
            f"{tokenizer.name} has {found.size} ids, the embeddings have {vocabulary} rows; "
            "they do not belong together"
        )
    config.update(bos_token_id=found.bos, eos_token_id=found.eos)
    generation = {"bos_token_id": found.bos, "eos_token_id": found.stops or found.eos}
    write_json(target / "generation_config.json", generation)
    return found.warnings
