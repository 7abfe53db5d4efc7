"""Checkpoints that bitsandbytes quantized: int8 and nf4, for transformers.

Responsibility: make one of a model directory, and say what it costs against golden
logits. Does not know jobs or artifacts. torch and transformers are imported when
work starts.

Sources: LLM.int8() (Dettmers et al. 2022), QLoRA's NormalFloat (Dettmers et al. 2023).
"""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.gates.golden import Golden

# Type -> the settings of transformers' BitsAndBytesConfig.
TYPES: Mapping[str, Mapping[str, Any]] = {
    "BNB_INT8": {"load_in_8bit": True},
    "BNB_NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
# Written by the model itself; the rest of its directory is copied.
_OWN = {".safetensors", ".bin", ".pth"}
_INDEX = ".index.json"


def available() -> None:
    """Refuse where it cannot work.

    Raises:
        FailedPrecondition: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FailedPrecondition(
            "bitsandbytes is not installed, which the types BNB_NF4 and BNB_INT8 need; install "
            "it where the quantization service runs"
        )


def write(model: Path, directory: Path, kind: str) -> None:
    """Quantize a model's linear layers and write it as transformers does.

    Args:
        model: a Hugging Face model directory.
        directory: empty; tokenizer, template and the like are copied into it.
        kind: one of `TYPES`.

    Raises:
        FailedPrecondition: transformers or bitsandbytes refuses the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = dict(TYPES[kind])
    if kind == "BNB_NF4":
        settings["bnb_4bit_compute_dtype"] = torch.bfloat16
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix not in _OWN and not path.name.endswith(_INDEX):
            shutil.copyfile(path, directory / path.name)
    device = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = AutoModelForCausalLM.from_pretrained(
                str(model),
                quantization_config=BitsAndBytesConfig(**settings),
                device_map=device,
                local_files_only=True,
                trust_remote_code=False,
            )
            # Before anything is computed: on CPUs bitsandbytes 0.50 then lays its 4-bit
            # weights out anew, and saving those gives a checkpoint of noise.
            loaded.save_pretrained(str(directory))
    except (ValueError, RuntimeError, NotImplementedError, ImportError, KeyError) as error:
        raise FailedPrecondition(
            f"bitsandbytes cannot quantize this model to {kind}: {error}"
        ) from error


def golden_logits(directory: Path, golden: Golden) -> npt.NDArray[np.float32]:
    """Logits of a written checkpoint, loaded as anybody would, on golden's sequences.

    Returns:
        float32, shape (tokens of golden, vocabulary).
    """
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        ).eval()
        rows = []
        for ids in golden.sequences:
            batch = torch.tensor(ids[None].astype(np.int64), device=model.device)
            rows.append(model(input_ids=batch, use_cache=False).logits[0].float().cpu().numpy())
    return np.concatenate(rows)
