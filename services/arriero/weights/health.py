"""Is this LoRA adapter, or this trained model, whole? Judged from its files alone.

Responsibility: list what is wrong with a PEFT LoRA directory or a model that was
trained from a base, and say which layers of a base a `target_modules` means. numpy
only; does not know how they are trained or merged, nor what becomes of one that is
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, FailedPrecondition
from arriero.weights.adapter_config import CONFIG_FILE, LoraSettings, read_settings
from arriero.weights.layout import TensorInfo, read_header
from arriero.weights.lora import EMBEDDING_LAYERS, PREFIX, WEIGHTS_FILE, base_name, is_saved
from arriero.weights.reader import Weights

__all__ = ["ALL_LINEAR", "check_adapter", "check_model", "linear_modules", "matches"]

# PEFT's word for every linear layer but the output.
ALL_LINEAR = "all-linear"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# The adapter's name (`default`) is in the middle only where PEFT did not save it itself.
_PAIR = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_NOT_LINEAR = (*EMBEDDING_LAYERS, "wte", "wpe", "embed_in", "embed_out", "embeddings")
_SHOWN = 4
# Numbers that are looked at together.
_PIECE = 1 << 20


def linear_modules(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Names of what LoRA can be put on: linear layers but the output layer.

    Returns:
        Module name -> (out_features, in_features). Told from the weights alone:
        two-dimensional `*.weight`, without the token embeddings and the output
        layer (which `all-linear` leaves out too).
    """
    found: dict[str, tuple[int, int]] = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(info.shape) != 2 or module.rsplit(".", 1)[-1] in _NOT_LINEAR:
            continue
        found[module] = (info.shape[0], info.shape[1])
    return found


def matches(module: str, target: str | list[str] | None) -> bool:
    """Whether PEFT's `target_modules` means this (linear) module.

    A list holds names or dotted endings; a string is `all-linear` or a regular
    expression that must match the whole name (PEFT's rule).
    """
    if target is None:
        return False
    if isinstance(target, str):
        return target == ALL_LINEAR or re.fullmatch(target, module) is not None
    return any(module == t or module.endswith("." + t) for t in target)


def check_adapter(
    directory: Path,
    *,
    base: Mapping[str, TensorInfo] | None = None,
) -> list[str]:
    """List what is wrong with a PEFT LoRA directory; empty when healthy.

    Checks: both files are there and readable; it holds LoRA tensors at all (an
    adapter saved wrongly is a file of 443 bytes without any); every A has its B and
    the reverse; ranks are the configuration's; every value is finite; B is not
    all zero (an untrained adapter changes nothing); with `use_dora` every pair has
    its magnitudes, all above zero; every name in `modules_to_save` has a tensor; and
    with `base`, that every module which the configuration targets has its pair, and
    whole modules theirs, in its shape (embeddings may have another number of rows).

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model's tensors (a `Weights`), to check targets and shapes
            against.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        return [f"{' and '.join(missing)} missing; expected a PEFT directory with both"]
    try:
        config = read_settings(directory)
        settings = LoraSettings.of(config)
    except FailedPrecondition as error:
        return [error.message]
    path = directory / WEIGHTS_FILE
    try:
        tensors = read_header(path)
    except (DataLoss, FailedPrecondition) as error:
        return [error.message]
    pairs, unknown = _pair_up(tensors, config)
    if not pairs:
        return [
            f"{WEIGHTS_FILE} ({path.stat().st_size} bytes) holds no LoRA tensors: it was saved "
            "from a model whose state was already taken; save it again from the trained model"
        ]
    problems = list(_several("tensors that no LoRA layer explains", unknown))
    problems += _check_pairs(pairs, tensors, settings)
    problems += _check_values(path, tensors)
    if config.get("use_dora"):
        problems += _check_magnitudes(path, pairs, tensors)
    problems += _check_whole(tensors, config, base)
    if base is not None:
        problems += _check_targets(pairs, tensors, config, base)
    return problems


def _pair_up(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> {"A": tensor name, "B": tensor name}, and names that fit nothing."""
    pairs: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    saved = tuple(config.get("modules_to_save") or ())
    for name in tensors:
        if found := _PAIR.fullmatch(name.removeprefix(PREFIX)):
            pairs.setdefault(found["module"], {})[found["side"]] = name
        elif not _explained(name, saved, config):
            unknown.append(name)
    return pairs, unknown


def _explained(name: str, saved: Sequence[str], config: Mapping[str, Any]) -> bool:
    """Whether PEFT saves such a tensor beside LoRA's matrices."""
    parts = base_name(name).split(".")
    if "lora_magnitude_vector" in parts:
        return bool(config.get("use_dora"))
    if parts[-2:] == ["lora_B", "bias"]:
        return bool(config.get("lora_bias"))
    return (
        "original_module" in parts
        or is_saved(".".join(parts[:-1]), saved)
        or (parts[-1] == "bias" and config.get("bias", "none") != "none")
        or ("token_adapter" in parts and bool(config.get("trainable_token_indices")))
        # Embeddings, where they were resized or have LoRA.
        or (parts[-1] == "weight" and len(parts) > 1 and parts[-2] in EMBEDDING_LAYERS)
    )


def _check_pairs(
    pairs: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    settings: LoraSettings,
) -> list[str]:
    lonely: list[str] = []
    wrong: list[str] = []
    for module, sides in pairs.items():
        if len(sides) != 2:
            lonely.append(f"{module} has only {next(iter(sides))}")
            continue
        a, b = tensors[sides["A"]].shape, tensors[sides["B"]].shape
        want = settings.rank_of(module)
        if len(a) != 2 or len(b) != 2 or a[0] != want or b[1] != want:
            wrong.append(f"{module}: A {a}, B {b}, expected rank {want}")
    problems = [
        *_several("modules with half a pair", lonely),
        *_several("pairs of another rank than the configuration's", wrong),
    ]
    if not any(map(settings.scale_of, pairs)):
        problems.append(
            "lora_alpha is 0 for every pair: the adapter changes nothing; give it the alpha that "
            "it was trained with"
        )
    return problems


def _check_values(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    infinite: list[str] = []
    strange: list[str] = []
    zero: dict[str, list[bool]] = {"A": [], "B": []}
    data = np.memmap(path, mode="r", dtype=np.uint8)
    for name, info in tensors.items():
        if info.dtype not in _DTYPES:
            strange.append(f"{name} is {info.dtype}")
            continue
        raw = data[info.start : info.start + info.nbytes].view(_DTYPES[info.dtype])
        # In pieces: a whole module that was saved may be as large as the embeddings.
        pieces = (raw[i : i + _PIECE] for i in range(0, raw.size, _PIECE))
        if not all(
            np.isfinite(_widened(piece) if info.dtype == "BF16" else piece).all()
            for piece in pieces
        ):
            infinite.append(name)
        if found := _PAIR.fullmatch(name):
            zero[found["side"]].append(not _values(data, info).any())
    problems = [
        *_several("tensors of types other than F64, F32, F16 and BF16", strange),
        *_several("tensors with values that are NaN or infinite", infinite),
    ]
    problems += [
        f"all {len(found)} {side} matrices are zero: the adapter changes nothing; it was not "
        "trained, or other weights than the trained ones were saved"
        for side, found in zero.items()
        if found and all(found)
    ]
    return problems


def _values(data: npt.NDArray[np.uint8], info: TensorInfo) -> npt.NDArray[Any]:
    raw = data[info.start : info.start + info.nbytes].view(_DTYPES[info.dtype])
    return _widened(raw) if info.dtype == "BF16" else raw


def _widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16, which numpy does not have: its bits are a float32's upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_model(directory: Path, base: Weights) -> list[str]:
    """List what is wrong with a model that was trained from a base; empty when healthy.

    Checks: the same tensors in the same shapes; every value is finite; something
    was trained (not every tensor still has the base's bytes).

    Raises:
        DataLoss: its files are damaged.
    """
    model = Weights.open(directory)
    missing = sorted(set(base) - set(model))
    shapes = [
        f"{name}: {model[name].shape}, the base's is {info.shape}"
        for name, info in base.items()
        if name in model and model[name].shape != info.shape
    ]
    infinite = [name for name in model if not np.isfinite(_floats(model, name)).all()]
    problems = [
        *_several("tensors of the base that are missing", missing),
        *_several("tensors that the base does not have", sorted(set(model) - set(base))),
        *_several("shapes that are not the base's", shapes),
        *_several("tensors with values that are NaN or infinite", infinite),
    ]
    if set(model) == set(base) and all(model.raw(name) == base.raw(name) for name in model):
        problems.append(
            f"all {len(model)} tensors are the base's: the model was not trained, or its "
            "changes are too small for the type that it is stored in"
        )
    return problems


def _floats(weights: Weights, name: str) -> npt.NDArray[Any]:
    """A tensor's values, flat; of types that are no floats (and thus finite) none."""
    info = weights[name]
    if info.dtype not in _DTYPES:
        return np.empty(0)
    raw = np.frombuffer(weights.raw(name), dtype=_DTYPES[info.dtype])
    return _widened(raw) if info.dtype == "BF16" else raw


def _check_magnitudes(
    path: Path, pairs: Mapping[str, Mapping[str, str]], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): one norm for each row of the weight."""
    names = {
        found["module"]: name
        for name in tensors
        if (found := _MAGNITUDE.fullmatch(name.removeprefix(PREFIX)))
    }
    data = np.memmap(path, mode="r", dtype=np.uint8)
    misshapen: list[str] = []
    low: list[str] = []
    for module, name in names.items():
        info = tensors[name]
        if module in pairs and "B" in pairs[module]:
            rows = tensors[pairs[module]["B"]].shape[0]
            if math.prod(info.shape) != rows:
                misshapen.append(f"{module}: {info.shape} for {rows} rows")
        if info.dtype in _DTYPES and not (_values(data, info) > 0).all():
            low.append(module)
    return [
        *_several("DoRA pairs without magnitudes", sorted(set(pairs) - set(names))),
        *_several("magnitudes of another shape than the weight's rows", misshapen),
        *_several("modules with magnitudes that are not above 0", low),
    ]


def _check_whole(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base: Mapping[str, TensorInfo] | None,
) -> list[str]:
    """Modules that the adapter replaces."""
    names = list(config.get("modules_to_save") or ())
    found = {
        base_name(name): info
        for name, info in tensors.items()
        if ".lora_" not in name and ".original_module." not in name
    }
    missing = [
        name for name in names if not any(is_saved(key.rpartition(".")[0], [name]) for key in found)
    ]
    absent: list[str] = []
    misshapen: list[str] = []
    for name, info in found.items():
        module = name.rpartition(".")[0]
        if base is None or not is_saved(module, [*names, *EMBEDDING_LAYERS]):
            continue
        own = _own(base, name)
        if own is None:
            absent.append(name)
        # An embedding may have got more rows.
        elif info.shape != own.shape and not (
            name.endswith(tuple(f"{part}.weight" for part in EMBEDDING_LAYERS))
            and info.shape[1:] == own.shape[1:]
        ):
            misshapen.append(f"{name}: {info.shape}, the base's is {own.shape}")
    return [
        *_several("modules_to_save without tensors", missing),
        *_several("whole modules that the base does not have", absent),
        *_several("whole modules of other shapes than the base's", misshapen),
    ]


def _own(base: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """The base's tensor; the embeddings stand for an output layer that is tied to them."""
    own = base.get(name)
    if own is None and name.endswith("lm_head.weight"):
        own = next((i for n, i in base.items() if n.endswith("embed_tokens.weight")), None)
    return own


def _check_targets(
    pairs: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base: Mapping[str, TensorInfo],
) -> list[str]:
    linear = linear_modules(base)
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
        weight = _own(base, f"{module}.weight")
        if weight is None:
            absent.append(module)
            continue
        shape = weight.shape
        if len(sides) == 2 and len(shape) == 2 and "embedding" not in sides["A"]:
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
