from pathlib import Path

import pytest

from arriero.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from arriero.llama import Model, library
from arriero.testing.models import CORPUS, VOCABULARY

TEXTS = (
    *CORPUS,
    "",
    " ",
    "two  spaces and\ta tab\n\nand lines",
    "naïve café, 今天天气, 🦙",
    "<s>special</s> tokens",
    "a" * 500,
)


@pytest.fixture(scope="module")
def vocabulary(tiny_gguf: Path) -> Model:
    return Model(tiny_gguf, vocab_only=True)


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_the_model_directory(
    vocabulary: Model, tiny_llama_dir: Path, special: bool
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    for text in TEXTS:
        expected = tokenizer.encode(text, add_special_tokens=special).ids
        assert vocabulary.tokenize(text, add_special=special) == expected, text


def test_special_tokens_are_plain_text_when_not_parsed(vocabulary: Model) -> None:
    assert 2 in vocabulary.tokenize("</s>")
    assert 2 not in vocabulary.tokenize("</s>", parse_special=False)


def test_pieces_join_to_the_text_again(vocabulary: Model) -> None:
    for text in TEXTS:
        ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
        # SentencePiece puts a space before every text.
        assert vocabulary.detokenize(ids) == (" " + text if text else "")
    pieces = vocabulary.pieces()
    assert len(pieces) == vocabulary.n_vocab == VOCABULARY
    assert pieces[1] == b""
    assert vocabulary.token_to_piece(1) == b"<s>"


def test_lone_surrogates_do_not_raise(vocabulary: Model) -> None:
    assert vocabulary.tokenize("broken \ud83e emoji")


@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 40])
def test_a_token_outside_of_the_vocabulary_is_refused(vocabulary: Model, token: int) -> None:
    with pytest.raises(InvalidArgument, match="outside of the vocabulary"):
        vocabulary.token_to_piece(token)


def test_facts_come_from_the_file(vocabulary: Model) -> None:
    assert (vocabulary.bos, vocabulary.eos, vocabulary.eog) == (1, 2, {2})
    assert vocabulary.adds_bos
    assert vocabulary.n_ctx_train == 2048
    assert vocabulary.rope_freq_base == 10000.0
    assert vocabulary.chat_template is None
    assert vocabulary.metadata["llama.block_count"] == "2"


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.gguf"):
        Model(tmp_path / "absent.gguf")


def test_a_cut_off_file_is_data_loss(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(DataLoss, match="cut off"):
        Model(path)


def test_a_whole_file_that_is_no_model_is_data_loss_with_llama_cpps_reason(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(DataLoss, match=r"attn_q\.weight"):
        Model(path)


def test_a_closed_model_may_be_closed_again(tiny_gguf: Path) -> None:
    model = Model(tiny_gguf, use_mmap=False)
    model.close()
    model.close()


@pytest.mark.parametrize(
    "why",
    [
        "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 143025408; "
        "llama_model_load: error loading model: unable to allocate CPU buffer",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 1146.88 MiB on device 0: "
        "cudaMalloc failed: out of memory",
    ],
)
def test_memory_that_is_not_there_is_no_damage(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """In llama.cpp's own words."""
    monkeypatch.setattr(library.initialize(), "llama_model_load_from_file", lambda *_: None)
    monkeypatch.setattr(library, "take_errors", lambda: why)
    with pytest.raises(ResourceExhausted, match="fewer gpu_layers"):
        Model(tiny_gguf)
