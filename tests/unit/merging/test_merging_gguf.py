"""GGUF files as models: everything that makes the model comes along, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import FailedPrecondition
from arriero.llama import Model, read_header
from arriero.merging.gguf_rope import rope_scaling

if TYPE_CHECKING:
    from conftest import Room

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(3, 300).view(1, -1)).logits
    return found


@pytest.mark.parametrize("scaling", [LLAMA_3, YARN], ids=["llama3", "yarn"])
def test_a_model_that_went_to_gguf_comes_back_as_it_was(
    room: Room,
    tiny_llama_dir: Path,
    tmp_path: Path,
    convert_to_gguf: Callable[..., None],
    scaling: dict[str, Any],
) -> None:
    source = shutil.copytree(tiny_llama_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"rope_theta": 500000.0, "rope_scaling": scaling, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert_to_gguf(source, tmp_path / "x.gguf", "f32")

    output = room.bring(tmp_path / "x.gguf", kind="model", dtype="float32")
    assert torch.equal(logits(output.path), logits(source))
    assert load_file(output.path / "model.safetensors").keys() == tensors.keys()


def test_its_tokenizer_gives_llama_cpps_ids(room: Room, tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copy(tiny_gguf, tmp_path / "x.gguf")
    output = room.bring(tmp_path / "x.gguf", kind="model")
    tokenizer = AutoTokenizer.from_pretrained(str(output.path))
    model = Model(tiny_gguf)
    for text in ("Hello, llama.", " begins with a space", "  \n x", "¿Qué? 世界"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == model.tokenize(text, add_special=False), text
        assert tokenizer.decode(ids) == text
    model.close()


def test_tensors_that_are_missing_are_not_made_up(
    room: Room, tiny_gguf: Path, tmp_path: Path
) -> None:
    # Qwen 2 has biases, of which this file has none.
    odd = tmp_path / "odd.gguf"
    data = tiny_gguf.read_bytes().replace(b"llama", b"qwen2", 1)  # general.architecture
    odd.write_bytes(data.replace(b"llama.", b"qwen2."))
    with pytest.raises(FailedPrecondition, match=r"odd.gguf lacks 6 tensors, such as .*bias"):
        room.bring(odd, kind="model")


def test_scaling_is_said_in_hugging_faces_words_or_refused(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)

    def words(**fields: Any) -> dict[str, Any]:
        named = {f"llama.rope.{key}": value for key, value in fields.items()}
        changed = replace(header, metadata={**header.metadata, **named})
        return rope_scaling(tiny_gguf, changed)

    assert words() == {}
    linear = {"rope_type": "linear", "factor": 2.0}
    assert words(**{"scaling.type": "linear", "scaling.factor": 2.0}) == linear
    assert words(scale_linear=2.0) == linear
    with pytest.raises(FailedPrecondition, match="of type 'longrope'"):
        words(**{"scaling.type": "longrope", "scaling.factor": 2.0})
