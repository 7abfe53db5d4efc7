"""What `pull` gives is what others load as it is: transformers, PEFT, llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arriero.client import AsyncClient
from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument
from arriero.store import Artifact, ManifestDraft
from arriero.testing.adapters import tiny_adapter
from arriero.testing.orchestrator import LocalOrchestrator

IDS = [1, 17, 250, 8, 99]


class Platform:
    """A real orchestrator and its client."""

    def __init__(self, home: LocalOrchestrator, client: AsyncClient) -> None:
        self.home, self.client = home, client

    def publish(self, source: Path, kind: str) -> Artifact:
        place = self.home.store.staging("test", kind) / "out"
        shutil.copytree(source, place)
        return self.home.store.publish(place, ManifestDraft(kind=kind, name="thing"))


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with LocalOrchestrator(tmp_path / "home") as home, AsyncClient(home.address) as client:
        yield Platform(home, client)


async def test_a_model_and_its_adapter_are_loaded_by_transformers_and_peft(
    platform: Platform, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = platform.publish(tiny_llama_dir, "model")
    directory = tiny_adapter(tmp_path / "adapter", tiny_llama_dir)
    config = json.loads((directory / "adapter_config.json").read_text())
    # As training writes it: the base by digest.
    config["base_model_name_or_path"] = base.digest
    (directory / "adapter_config.json").write_text(json.dumps(config))
    adapter = platform.publish(directory, "adapter")

    await platform.client.artifacts.pull(base.digest, tmp_path / "base")
    pulled = await platform.client.artifacts.pull(adapter.digest, tmp_path / "lora")
    assert pulled.kind == "adapter"
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    assert tokenizer("llama").input_ids[0] == 1
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, str(tmp_path / "lora"))(ids).logits
    assert not torch.equal(before, after)


async def test_a_gguf_is_loaded_by_llama_cpp(
    platform: Platform, tiny_gguf: Path, tmp_path: Path
) -> None:
    from arriero.llama import Model

    (tmp_path / "gguf").mkdir()
    shutil.copy(tiny_gguf, tmp_path / "gguf")
    made = platform.publish(tmp_path / "gguf", "gguf")
    await platform.client.artifacts.pull(made.digest, tmp_path / "pulled")
    [path] = (tmp_path / "pulled").iterdir()
    model = Model(path)
    assert model.tokenize("llama")
    model.close()


async def test_what_was_pulled_can_be_pushed(
    platform: Platform, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base = platform.publish(tiny_llama_dir, "model")
    await platform.client.artifacts.pull(base.digest, tmp_path / "base")
    pushed = await platform.client.artifacts.push(tmp_path / "base", kind="model", name="again")
    assert [f.sha256 for f in pushed.files] == [f.sha256 for f in base.manifest.files]


async def test_a_damaged_or_untrained_thing_is_not_taken(
    platform: Platform, tiny_llama_dir: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    push = platform.client.artifacts.push
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(DataLoss, match=r"model.safetensors .*cut off"):
        await push(model, kind="model", name="m")
    weights.write_bytes(whole)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataLoss, match=r"names model-00002-of-00002.safetensors"):
        await push(model, kind="model", name="m")

    (model / "model.safetensors.index.json").unlink()
    (model / "config.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"config.json is not JSON"):
        await push(model, kind="model", name="m")
    gguf = tmp_path / "cut.gguf"
    gguf.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(DataLoss, match=r"cut.gguf is not a whole GGUF file"):
        await push(gguf, kind="gguf", name="g")

    adapter = tiny_adapter(tmp_path / "adapter", tiny_llama_dir)
    path = str(adapter / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)
    with pytest.raises(InvalidArgument, match=r"B matrices are zero.*arriero import"):
        await push(adapter, kind="adapter", name="a")
    # The adapter that was saved from a model whose state was taken already: 40 bytes of nothing.
    save_file({}, path)
    with pytest.raises(InvalidArgument, match="no LoRA tensors"):
        await push(adapter, kind="adapter", name="a")
    assert platform.home.store.list() == []
    assert list((platform.home.store.root / "staging" / "orchestrator").iterdir()) == []
