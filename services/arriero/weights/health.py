"""Is this LoRA adapter whole? Judged from its files alone.

Responsibility: read safetensors headers, and list what is wrong with a PEFT
LoRA directory. numpy only; does not know how an adapter is trained or merged,
nor what becomes of one that is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT puts before the base model's own module names.
PREFIX = "base_model.model."
# The format caps its header (safetensors' MAX_HEADER_SIZE).
_MAX_HEADER = 100_000_000
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a safetensors header has it; `start` and `end` are file offsets."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types, shapes and places of the tensors of one safetensors file.

    Raises:
        DataLoss: not a safetensors file, or cut off.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes does not fit {size} bytes")
            header = json.loads(file.read(length))
        tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            info = TensorInfo(
                entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end
            )
            if not 8 + length <= info.start <= info.end <= size:
                raise ValueError(f"{name} ends at byte {info.end} of {size}")
            tensors[name] = info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(
            f"{path.name} is not a whole safetensors file ({error}); fetch or make it again"
        ) from error
    return tensors


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model directory (`*.safetensors`), by name.

    Raises:
        DataLoss: no safetensors file, or a damaged one.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise DataLoss(f"{directory.name} holds no *.safetensors file; expected a model's weights")
    return {name: info.shape for path in paths for name, info in read_header(path).items()}


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Names of what LoRA can be put on: linear layers but the output layer.

    Returns:
        Module name -> (out_features, in_features). Told from the weights alone:
        two-dimensional `*.weight`, but the token embeddings, the output layer
        (what `all-linear` leaves out too) and routers of experts.
    """
    left_out = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "embeddings")
    found: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2 or module.rsplit(".", 1)[-1] in left_out:
            continue
        found[module] = (shape[0], shape[1])
    return found


def matches(module: str, target: str | list[str] | None) -> bool:
    """Whether PEFT's `target_modules` means this (linear) module.

    A list holds names or dotted endings; a string is `all-linear` or a regular
    expression that must match the whole name (PEFT's rule).
    """
    if target is None:
        return False
    if isinstance(target, str):
        return target == "all-linear" or re.fullmatch(target, module) is not None
    return any(module == t or module.endswith("." + t) for t in target)


def check_adapter(
    directory: Path,
    *,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[str]:
    """List what is wrong with a PEFT LoRA directory; empty when healthy.

    Checks: both files are there and readable; it holds LoRA tensors at all (an
    adapter saved wrongly is a 443-byte file without any); every A has its B and
    the reverse; ranks are the configuration's; every value is finite; B is not
    all zero (an untrained adapter changes nothing); and with `base_shapes`, that
    every module which the configuration targets has its pair, in its shape.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        base_shapes: the base model's tensors (`tensor_shapes`), to check the
            targets and shapes against.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        return [f"{' and '.join(missing)} missing; expected a PEFT directory with both"]
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        rank = int(config["r"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{CONFIG_FILE} is not a LoRA configuration: {type(error).__name__}: {error}"]
    path = directory / WEIGHTS_FILE
    try:
        tensors = read_header(path)
    except DataLoss as error:
        return [error.message]
    pairs, unknown = _pair_up(tensors, config)
    if not pairs:
        return [
            f"{WEIGHTS_FILE} ({path.stat().st_size} bytes) holds no LoRA tensors: it was saved "
            "from a model whose state was already taken; save it again from the trained model"
        ]
    problems = list(_several("tensors that no LoRA layer explains", unknown))
    problems += _check_pairs(pairs, tensors, config, rank)
    problems += _check_values(path, tensors)
    if base_shapes is not None:
        problems += _check_targets(pairs, tensors, config, base_shapes)
    return problems


def _pair_up(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> {"A": tensor name, "B": tensor name}, and names that fit nothing."""
    pairs: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    saved = tuple(config.get("modules_to_save") or ())
    for name in tensors:
        module_name = name.removeprefix(PREFIX)
        if found := _PAIR.fullmatch(module_name):
            pairs.setdefault(found["module"], {})[found["side"]] = name
            continue
        parts = module_name.split(".")
        allowed = (
            any(part in saved for part in parts)
            or (config.get("use_dora") and "lora_magnitude_vector" in parts)
            or (parts[-1] == "bias" and config.get("bias", "none") != "none")
            # PEFT saves embeddings that were resized beside the adapter.
            or (parts[-1] == "weight" and len(parts) > 1 and parts[-2] in _EMBEDDINGS)
        )
        if not allowed:
            unknown.append(name)
    return pairs, unknown


_EMBEDDINGS = ("embed_tokens", "lm_head")


def _rank_of(module: str, config: Mapping[str, Any], rank: int) -> int:
    """PEFT's rule: a key of `rank_pattern` matches the end of the module's name."""
    for pattern, value in (config.get("rank_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return int(value)
    return rank


def _check_pairs(
    pairs: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    rank: int,
) -> list[str]:
    lonely: list[str] = []
    wrong: list[str] = []
    for module, sides in pairs.items():
        if len(sides) != 2:
            lonely.append(f"{module} has only {next(iter(sides))}")
            continue
        a, b = tensors[sides["A"]].shape, tensors[sides["B"]].shape
        want = _rank_of(module, config, rank)
        if len(a) != 2 or len(b) != 2 or a[0] != want or b[1] != want:
            wrong.append(f"{module}: A {a}, B {b}, expected rank {want}")
    return [*_several("half a pair", lonely), *_several("wrong rank", wrong)]


def _check_values(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    infinite: list[str] = []
    strange: list[str] = []
    b_seen = b_zero = 0
    data = np.memmap(path, mode="r", dtype=np.uint8)
    for name, info in tensors.items():
        if info.dtype not in _DTYPES:
            strange.append(f"{name} is {info.dtype}")
            continue
        values = _values(data, info)
        if not np.isfinite(values).all():
            infinite.append(name)
        if name.endswith((".lora_B.weight", ".lora_embedding_B")):
            b_seen += 1
            b_zero += not values.any()
    problems = [
        *_several("types other than F64, F32, F16 and BF16", strange),
        *_several("values that are NaN or infinite", infinite),
    ]
    if b_seen and b_zero == b_seen:
        problems.append(
            f"all {b_seen} B matrices are zero: the adapter changes nothing; it was not trained, "
            "or other weights than the trained ones were saved"
        )
    return problems


def _values(data: npt.NDArray[np.uint8], info: TensorInfo) -> npt.NDArray[Any]:
    raw = data[info.start : info.end].view(_DTYPES[info.dtype])
    if info.dtype == "BF16":  # numpy has no such type: its bits are a float32's upper half
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw


def _check_targets(
    pairs: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base_shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    linear = linear_modules(base_shapes)
    missing = [
        module
        for module in linear
        if matches(module, config.get("target_modules"))
        and not _excluded(module, config)
        and module not in pairs
    ]
    absent: list[str] = []
    misshapen: list[str] = []
    for module, sides in pairs.items():
        shape = base_shapes.get(module + ".weight")
        if shape is None:
            absent.append(module)
        elif len(sides) == 2 and len(shape) == 2 and "embedding" not in sides["A"]:
            a, b = tensors[sides["A"]].shape, tensors[sides["B"]].shape
            if not config.get("fan_in_fan_out") and (b[0], a[-1]) != shape:
                misshapen.append(f"{module}: B·A is {(b[0], a[-1])}, the base's weight {shape}")
    return [
        *_several("target modules of the base without LoRA tensors", missing),
        *_several("LoRA tensors for modules that the base does not have", absent),
        *_several("shapes that do not fit the base", misshapen),
    ]


def _excluded(module: str, config: Mapping[str, Any]) -> bool:
    if config.get("exclude_modules") and matches(module, config["exclude_modules"]):
        return True
    layers = config.get("layers_to_transform")
    if layers is None:
        return False
    wanted = [layers] if isinstance(layers, int) else list(layers)
    index = next((int(part) for part in module.split(".") if part.isdigit()), None)
    return index not in wanted


def _several(what: str, items: list[str]) -> Iterator[str]:
    """One problem for many of a kind, with the first few named."""
    if items:
        more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        yield f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}"
