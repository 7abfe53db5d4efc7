"""An extended model in transformers and in llama.cpp: it loads, and both give the same ids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.dataset.extension.job import extend_tokenizer
from arriero.dataset.extension.spec import resolve
from arriero.llama import Model
from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.store import ManifestDraft, Store
from arriero.testing.jobs import run_job
from arriero.testing.models import CORPUS, VOCABULARY
from arriero.v1 import dataset_pb2

GREEK = (
    "Ο αγωγιάτης οδηγεί ένα καραβάνι από λάμα πάνω από τις Άνδεις.",
    "Κάθε λάμα κουβαλάει μαλλί, αλάτι και καλαμπόκι στην αγορά.",
    "Γράψε ένα μικρό ποίημα για τα βουνά και τη βροχή.",
)


@pytest.fixture(scope="module")
def extended(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with Greek and two tokens of its own."""
    place = tmp_path_factory.mktemp("extended")
    store = Store.open(place / "store")
    files = store.staging("tests", "base") / "files"
    shutil.copytree(tiny_llama_dir, files)
    base = store.publish(files, ManifestDraft(kind="model", name="base"))
    (place / "corpus.txt").write_text("\n".join(GREEK * 20))
    spec = dataset_pb2.ExtendTokenizerSpec(
        model=base.digest,
        corpus=[str(place / "corpus.txt")],
        vocab_size=VOCABULARY + 90,
        tokens=["<|tool|>", "αγορά"],
        pad_to_multiple_of=32,
    )
    context = ResolveContext(store, {"model": [base]}, SourceSettings((place,)))
    resolved = resolve(spec, context).spec
    outputs = run_job(extend_tokenizer, "extend_tokenizer", resolved, {"model": base}, store, place)
    return outputs[0].path


@pytest.fixture(scope="module")
def gguf(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(
        os.environ.get("ARRIERO_LLAMA_CPP") or Path(sys.prefix) / "share/arriero/llama.cpp"
    )
    target = tmp_path_factory.mktemp("extended-gguf") / "extended.gguf"
    subprocess.run(
        [sys.executable, str(source / "convert_hf_to_gguf.py"), str(extended)]
        + ["--outfile", str(target), "--outtype", "f16"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(source / "gguf-py")},
    )
    return target


def test_both_give_the_same_ids(extended: Path, gguf: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(extended)
    texts = [
        *GREEK,
        *CORPUS,
        "call <|tool|> with λάμα and <|tool|>",
        "  two spaces, and\nλίνες\n\n 12",
        "στην αγορά. 今天 🦙",
    ]
    used: set[int] = set()
    with Model(gguf) as model:
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert model.tokenize(text, add_special=False, parse_special=True) == ids, text
            used.update(ids)
        bos = tokenizer("λάμα").input_ids
        assert model.tokenize("λάμα", add_special=True, parse_special=True) == bos
        assert bos[0] == 1
    assert sum(number >= VOCABULARY for number in used) > 30


def test_transformers_loads_the_model_and_old_tokens_mean_what_they_meant(
    extended: Path, tiny_llama_dir: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    after = AutoModelForCausalLM.from_pretrained(extended)
    assert after.get_input_embeddings().num_embeddings == 480
    ids = torch.tensor([[1, 300, 301, 302, 20]])
    with torch.no_grad():
        old, new = before(ids).logits, after(ids).logits
    assert new.shape[-1] == 480
    assert torch.equal(new[..., :VOCABULARY], old)
