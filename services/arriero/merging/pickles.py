"""PyTorch checkpoints (`.bin`) to safetensors, without running what is in them.

Responsibility: load with `weights_only=True` alone, and write safetensors. A
pickle that wants to run code is refused before anything of it runs. Does not
know which tensors a model needs.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import DataLoss, FailedPrecondition, NotFound
from arriero.weights import TensorPlan, WeightsWriter, dtype_name

if TYPE_CHECKING:
    import torch

__all__ = ["checkpoint_files", "convert", "tensors"]

Tick = Callable[[int, int], None]
_LFS = b"version https://git-lfs"
# Buffers that old conversions stored and every loader makes anew.
_DERIVED = (".rotary_emb.inv_freq",)


def checkpoint_files(directory: Path, stem: str) -> list[Path]:
    """The files of `<stem>.bin`, or those that `<stem>.bin.index.json` names.

    Without either all shards by their numbers; empty when there are none.

    Raises:
        DataLoss: the index is damaged, or a shard is missing.
    """
    index = directory / f"{stem}.bin.index.json"
    if not index.is_file():
        path = directory / f"{stem}.bin"
        return [path] if path.is_file() else _numbered(directory, stem)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{index.name} is not a checkpoint index: {error}") from error
    for name in names:
        if name != Path(name).name or name in {"", ".", ".."}:
            raise DataLoss(f"{index.name} names the file {name!r}; expected a plain file name")
        if not (directory / name).is_file():
            raise DataLoss(f"{index.name} names {name}, but it is missing; fetch that shard")
    return [directory / name for name in names]


def _numbered(directory: Path, stem: str) -> list[Path]:
    shard = re.compile(re.escape(stem) + r"-(\d+)-of-(\d+)\.bin")
    numbered = {
        int(found[1]): (path, int(found[2]))
        for path in sorted(directory.iterdir())
        if (found := shard.fullmatch(path.name)) and path.is_file()
    }
    count = max((count for _, count in numbered.values()), default=0)
    if missing := [number for number in range(1, count + 1) if number not in numbered]:
        raise DataLoss(
            f"{len(missing)} of {count} shards {stem}-*.bin are missing, the first is number "
            f"{missing[0]}; fetch them"
        )
    return [path for _, (path, _) in sorted(numbered.items())]


def convert(
    files: list[Path],
    target: Path,
    *,
    stem: str,
    tied: bool = False,
    max_shard_size: int = 5_000_000_000,
    tick: Tick,
) -> list[Path]:
    """Write the tensors of PyTorch files as safetensors into `target`.

    Each file is opened twice and mapped, so that memory holds one tensor at a
    time (old files without zip structure are loaded whole).

    Args:
        files: of one checkpoint.
        target: directory.
        stem: `model` or `adapter_model`.
        tied: leave out `lm_head.weight` where it is the embeddings again.
        max_shard_size: bytes.
        tick: called with tensors so far and in all.

    Raises:
        FailedPrecondition: a pickle with code, or something that is not a tensor.
        DataLoss: a damaged file, or a tensor in two files.
    """
    plan: dict[str, TensorPlan] = {}
    for path in files:
        for name, tensor in _tensors(path, tied):
            if name in plan:
                raise DataLoss(f"{name} is in {path.name} and in a file before it; keep one")
            plan[name] = TensorPlan(name, dtype_name(str(tensor.dtype)), tuple(tensor.shape))
    if not plan:
        raise FailedPrecondition(f"{files[0].name} holds no tensors; expected a state dict")
    done = 0
    with WeightsWriter(
        target, list(plan.values()), max_shard_size=max_shard_size, stem=stem
    ) as writer:
        for path in files:
            for name, tensor in _tensors(path, tied):
                writer.write(name, tensor)
                done += 1
                tick(done, len(plan))
    return writer.files


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one PyTorch file, mapped where its format lets them be.

    Raises:
        FailedPrecondition: a pickle with code, or something that is not a tensor.
        DataLoss: a damaged file. NotFound: none.
    """
    import torch

    for name, tensor in _load(path).items():
        if not isinstance(tensor, torch.Tensor):
            raise FailedPrecondition(
                f"{name} in {path.name} is {type(tensor).__name__}; expected a flat state dict "
                "of tensors"
            )
        yield name, tensor.detach()


def _tensors(path: Path, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    state = dict(tensors(path))
    embeddings = state.get("model.embed_tokens.weight")
    for name, tensor in state.items():
        same = (
            isinstance(embeddings, torch.Tensor)
            and embeddings.data_ptr() == tensor.data_ptr()
            and embeddings.shape == tensor.shape
        )
        if name.endswith(_DERIVED) or (tied and name == "lm_head.weight" and same):
            continue
        yield name, tensor


def _load(path: Path) -> Mapping[str, object]:
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # the format before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise NotFound(f"{path.name} does not exist") from error
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if blamed := _blamed(str(error)):
            raise FailedPrecondition(
                f"{path.name} wants to run code when it is opened, and was not opened: {blamed}; "
                "expected tensors alone. Save it as safetensors where you trust it"
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:  # bytes from outside: the unpickler stumbles in many ways
        raise _damaged(path, error) from error
    if not isinstance(state, Mapping):
        raise FailedPrecondition(
            f"{path.name} holds {type(state).__name__}; expected a state dict of tensors"
        )
    return state


def _blamed(text: str) -> str:
    """What torch's restricted unpickler refused to call, if that is what it says."""
    for line in text.splitlines():
        if "GLOBAL" in line or "class" in line.lower().split():
            said = line.strip().removeprefix("WeightsUnpickler error:").strip()
            # The rest of torch's line is advice to let the code run.
            return said.partition(" was not an allowed")[0][:200]
    return ""


def _damaged(path: Path, error: Exception) -> DataLoss:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return DataLoss(
                f"{path.name} is a Git LFS pointer, not weights; run `git lfs pull` where it "
                "comes from"
            )
    # Around what its unpickler stumbled over, torch advises to let the code run.
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
        return DataLoss(
            f"{path.name} is damaged, or no PyTorch checkpoint that opens without running code "
            f"({found[1].strip()[:200]}); fetch it again, or save it as safetensors where you "
            "trust it"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return DataLoss(f"{path.name} is damaged, or no PyTorch checkpoint ({said}); fetch it again")
