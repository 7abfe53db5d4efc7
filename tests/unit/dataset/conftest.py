import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def publish(store: Store) -> Callable[..., Artifact]:
    """Publishes a directory (copied) or a dict of file contents."""

    def publish(files: Path | dict[str, str], kind: str, name: str = "thing", **more) -> Artifact:
        place = store.staging("tests", f"{kind}-{name}") / "files"
        if isinstance(files, Path):
            shutil.copytree(files, place)
        else:
            place.mkdir()
            for path, text in files.items():
                (place / path).write_text(text)
        return store.publish(place, ManifestDraft(kind=kind, name=name, **more))

    return publish


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    return place


@pytest.fixture
def allowed(data: Path) -> SourceSettings:
    return SourceSettings((data,))


@pytest.fixture(scope="session")
def sentencepiece_dir(tiny_llama_dir: Path) -> Path:
    """LLaMA's kind: SentencePiece BPE, `<s>` before every text, no chat template."""
    return tiny_llama_dir


@pytest.fixture(scope="session")
def bytes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's kind: byte-level BPE, BOS `<|im_start|>` that nothing adds, chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from arriero.testing.models import CORPUS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory = tmp_path_factory.mktemp("tokenizers") / "bytes"
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|im_start|>",
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
                "pad_token": "<|im_end|>",
            }
        )
    )
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return directory
