"""More tokens for a model: old ids stay, new ones are reached, rows begin where they should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from arriero.dataset.extension import embeddings, growing, pieces
from arriero.dataset.extension.job import extend_tokenizer
from arriero.dataset.extension.spec import check, resolve
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import Verdict
from arriero.operations.job import Job, Output
from arriero.operations.kinds import ResolveContext
from arriero.store import Artifact
from arriero.testing.jobs import run_job
from arriero.testing.models import CORPUS, VOCABULARY
from arriero.v1 import dataset_pb2
from arriero.weights.reader import Weights
from arriero.weights.writer import WeightsWriter

GREEK = (
    "Ο αγωγιάτης οδηγεί ένα καραβάνι από λάμα πάνω από τις Άνδεις.",
    "Κάθε λάμα κουβαλάει μαλλί, αλάτι και καλαμπόκι στην αγορά.",
    "Ποια είναι η πρωτεύουσα του Περού; Η πρωτεύουσα του Περού είναι η Λίμα.",
    "Γράψε ένα μικρό ποίημα για τα βουνά και τη βροχή.",
    "Το καραβάνι περπατάει αργά, και ο αγωγιάτης περπατάει πίσω από το καραβάνι.",
)


class Extended:
    """The outputs of a job, and both tokenizers of the model."""

    def __init__(self, outputs: list[Output], job: Job, base: Path) -> None:
        self.model, self.report_dir = outputs[0].path, outputs[1].path
        self.metrics = outputs[0].metrics
        self.gate = job.gates.results[-1]
        self.report = json.loads((self.report_dir / "report.json").read_text())
        self.fast = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        self.config = json.loads((self.model / "config.json").read_text())
        self.weights, self.old = Weights.open(self.model), Weights.open(base)

    @property
    def sentencepiece(self) -> Any:
        return sentencepiece.SentencePieceProcessor(model_file=str(self.model / "tokenizer.model"))

    def ids(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False).ids)

    def rows(self, name: str) -> Any:
        return values(self.weights, name)


def values(weights: Weights, name: str) -> Any:
    info = weights[name]
    assert info.dtype == "F32"
    return np.frombuffer(weights.raw(name), dtype=np.float32).reshape(info.shape)


Run = Callable[..., Extended]


@pytest.fixture
def run(store, data: Path, allowed, tmp_path: Path, publish) -> Run:
    """Resolves and runs an extension of a model directory."""

    def run(base: Path, text: tuple[str, ...] | None = None, source: Artifact | None = None, **f):
        model = publish(base, "model", f"m{len(list(tmp_path.iterdir()))}")
        inputs: dict[str, list[Artifact]] = {"model": [model]}
        if text is not None:
            (data / "corpus.txt").write_text("\n".join(text) + "\n")
            f["corpus"] = [str(data / "corpus.txt")]
        if source is not None:
            f["pieces_from"] = source.digest
            inputs["pieces_from"] = [source]
        spec = dataset_pb2.ExtendTokenizerSpec(model=model.digest, **f)
        context = ResolveContext(store=store, inputs=inputs, sources=allowed)
        jobs: list[Job] = []
        outputs = run_job(
            extend_tokenizer,
            "extend_tokenizer",
            resolve(spec, context).spec,
            inputs,
            store,
            tmp_path,
            prepare=jobs.append,
        )
        return Extended(outputs, jobs[0], base)

    return run


@pytest.fixture
def changed(tmp_path: Path, tiny_llama_dir: Path) -> Callable[..., Path]:
    """A copy of the tiny model that a function changes."""

    def change(edit: Callable[[Path], None], base: Path = tiny_llama_dir) -> Path:
        place = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(base, place)
        edit(place)
        return place

    return change


@pytest.fixture
def byte_level(tiny_llama_dir: Path, bytes_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a byte-level BPE, as SmolLM2 and Llama 3 have it, and tied weights."""
    place = tmp_path / "byte-level"
    shutil.copytree(bytes_dir, place)
    old = Weights.open(tiny_llama_dir)
    kept = {name: info for name, info in old.items() if name != "lm_head.weight"}
    plan = [embeddings.TensorPlan(name, info.dtype, info.shape) for name, info in kept.items()]
    with WeightsWriter(place, plan) as writer:
        for name in kept:
            writer.write_raw(name, old.raw(name))
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return place


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(place: Path) -> None:
        path = place / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def test_pieces_learnt_from_a_corpus_come_after_the_old_ones(
    run: Run, tiny_llama_dir: Path
) -> None:
    done = run(tiny_llama_dir, GREEK * 20, vocab_size=VOCABULARY + 100)
    old = pieces.read(tiny_llama_dir / "tokenizer.model")
    new = pieces.read(done.model / "tokenizer.model")
    assert len(new.pieces) == VOCABULARY + 100 == done.config["vocab_size"]
    assert list(new.pieces)[:VOCABULARY] == list(old.pieces)
    assert (done.gate.gate, done.gate.verdict) == ("tokenizer.match", Verdict.PASSED)
    assert done.metrics["new_tokens"] == 100
    # What was learnt is used, and both files read alike and lose nothing.
    for text in (*GREEK, *CORPUS, " leading", "two  spaces", "new\nline 🦙 12"):
        ids = done.ids(text)
        assert ids == done.sentencepiece.encode(text), text
        assert done.sentencepiece.decode(ids) == text
    assert max(done.ids(GREEK[0])) >= VOCABULARY
    compression = done.report["compression"]
    assert compression["held_out"]
    assert compression["gain"] > 2
    assert done.metrics["compression_gain"] == compression["gain"]
    assert compression["tokens_before"] > compression["tokens_after"] > 0


def test_text_that_needs_no_new_piece_is_cut_as_before(run: Run, tiny_llama_dir: Path) -> None:
    done = run(tiny_llama_dir, GREEK * 20, vocab_size=VOCABULARY + 100)
    before = Tokenizer.from_file(str(tiny_llama_dir / "tokenizer.json"))
    for text in CORPUS:
        assert done.ids(text) == before.encode(text, add_special_tokens=False).ids


def test_every_new_piece_comes_out_whole(run: Run, tiny_llama_dir: Path) -> None:
    done = run(tiny_llama_dir, GREEK * 20, vocab_size=VOCABULARY + 60, model_type="unigram")
    proto = pieces.read(done.model / "tokenizer.model")
    growth = pieces.growth(proto)
    for number in range(VOCABULARY, len(proto.pieces)):
        text = proto.pieces[number].piece
        assert growth.cut(text) == [text]


def test_rows_of_new_pieces_are_the_mean_of_what_they_were_cut_into(
    run: Run, tiny_llama_dir: Path
) -> None:
    done = run(tiny_llama_dir, GREEK * 20, vocab_size=VOCABULARY + 50)
    old = sentencepiece.SentencePieceProcessor(model_file=str(tiny_llama_dir / "tokenizer.model"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = values(done.old, name), done.rows(name)
        assert after.shape == (VOCABULARY + 50, before.shape[1])
        assert np.array_equal(after[:VOCABULARY], before)
        for number in (VOCABULARY, VOCABULARY + 10, VOCABULARY + 49):
            piece = done.sentencepiece.id_to_piece(number)
            # Encoded alone it gets a space before it, which the piece does not have.
            ids = old.encode(piece.removeprefix("▁"))
            ids = ids if piece.startswith("▁") else ids[1:]
            assert np.allclose(after[number], before[ids].mean(0), atol=1e-6), piece
    others = set(done.weights) - {"model.embed_tokens.weight", "lm_head.weight"}
    assert others
    assert all(done.weights.raw(name) == done.old.raw(name) for name in others)


def test_rows_may_begin_at_the_mean_of_all_and_be_padded(run: Run, tiny_llama_dir: Path) -> None:
    done = run(
        tiny_llama_dir,
        GREEK * 20,
        vocab_size=VOCABULARY + 10,
        embedding_init="mean_all",
        pad_to_multiple_of=64,
    )
    rows = done.rows("lm_head.weight")
    assert len(rows) == 448 == done.config["vocab_size"]
    assert done.fast.get_vocab_size() == VOCABULARY + 10
    mean = values(done.old, "lm_head.weight").mean(0)
    assert np.allclose(rows[VOCABULARY:], mean, atol=1e-6)


def test_bfloat16_rows_are_rounded_to_nearest(run: Run, tmp_path: Path) -> None:
    from arriero.testing.models import tiny_llama

    base = tiny_llama(tmp_path / "bf16", dtype="bfloat16")
    done = run(base, tokens=["<|tool|>"])
    name = "lm_head.weight"

    def floats(weights: Weights) -> Any:
        raw = np.frombuffer(weights.raw(name), dtype=np.uint16).reshape(weights[name].shape)
        return (raw.astype(np.uint32) << 16).view(np.float32)

    before, after = floats(done.old), floats(done.weights)
    old = Tokenizer.from_file(str(base / "tokenizer.json"))
    mean = before[old.encode("<|tool|>", add_special_tokens=False).ids].mean(0)
    assert np.array_equal(after[:VOCABULARY], before)
    # Half a unit in the last of eight bits.
    assert np.all(np.abs(after[VOCABULARY] - mean) <= np.abs(mean) * 2**-8)


def test_tokens_are_added_as_they_are(run: Run, tiny_llama_dir: Path) -> None:
    done = run(tiny_llama_dir, tokens=["<|tool|>", "▁llama", "<|tool|>", "ΛΑΜΑ"])
    assert [done.fast.token_to_id(t) for t in ("<|tool|>", "ΛΑΜΑ")] == [
        VOCABULARY,
        done.fast.get_vocab_size() - 1,
    ]
    assert VOCABULARY in done.ids("call <|tool|> now")
    assert done.fast.decode(done.ids("a <|tool|> b"), skip_special_tokens=False).count("<|tool|>")
    assert done.report["compression"] is None
    assert done.gate.verdict is Verdict.PASSED


def test_a_token_that_tears_words_apart_fails_the_gate(run: Run, tiny_llama_dir: Path) -> None:
    done = run(tiny_llama_dir, tokens=["kes"])
    assert done.gate.verdict is Verdict.FAILED
    assert "comes back as" in done.gate.detail


def test_special_ids_and_tokens_that_were_added_late_keep_their_ids(
    run: Run, changed: Callable[..., Path]
) -> None:
    def pad(place: Path) -> None:
        path = place / "tokenizer.json"
        data = json.loads(path.read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        late = {"id": VOCABULARY, "content": "[PAD]", **flags, "special": True}
        data["added_tokens"].append(late)
        path.write_text(json.dumps(data))
        (place / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCABULARY}))
        old = Weights.open(place)
        plan, kept = [], {}
        for name, info in old.items():
            grown = name in ("model.embed_tokens.weight", "lm_head.weight")
            shape = (VOCABULARY + 1, info.shape[1]) if grown else info.shape
            plan.append(embeddings.TensorPlan(name, info.dtype, shape))
            kept[name] = bytes(old.raw(name)) + bytes(4 * info.shape[-1] if grown else 0)
        with WeightsWriter(place, plan) as writer:
            for name, raw in kept.items():
                writer.write_raw(name, memoryview(raw))

    done = run(changed(pad), GREEK * 20, vocab_size=VOCABULARY + 20, tokens=["<|tool|>"])
    assert done.fast.token_to_id("[PAD]") == VOCABULARY
    assert done.fast.token_to_id("<|tool|>") == VOCABULARY + 1
    proto = pieces.read(done.model / "tokenizer.model")
    assert [proto.pieces[VOCABULARY + i].piece for i in (0, 1)] == ["[PAD]", "<|tool|>"]
    assert proto.pieces[VOCABULARY].type == pieces.CONTROL
    assert len(proto.pieces) == VOCABULARY + 20
    assert json.loads((done.model / "added_tokens.json").read_text())["<|tool|>"] == VOCABULARY + 1
    assert [done.fast.token_to_id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    for text in (*GREEK, *CORPUS):
        assert done.ids(text) == done.sentencepiece.encode(text)


def test_pieces_of_another_tokenizer_are_taken(
    run: Run, tiny_llama_dir: Path, tmp_path: Path, publish
) -> None:
    source = tmp_path / "greek"
    source.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(GREEK * 20),
        model_prefix=str(source / "greek"),
        model_type="bpe",
        vocab_size=200,
        minloglevel=2,
    )
    (source / "greek.vocab").unlink()
    # As the merged models of others: every new piece has the score 0.
    proto = pieces.read(source / "greek.model")
    for piece in proto.pieces:
        piece.score = 0
    proto.pieces.add(piece="<pad>", score=0)
    (source / "greek.model").write_bytes(proto.SerializeToString())
    done = run(tiny_llama_dir, GREEK, publish(source, "tokenizer", "greek"))
    new = {piece.piece for piece in pieces.read(done.model / "tokenizer.model").pieces}
    ordinary = {piece.piece for piece in proto.pieces if piece.type == pieces.NORMAL} - {"<pad>"}
    assert ordinary <= new
    assert "<pad>" not in new
    for text in (*GREEK, *CORPUS):
        assert done.ids(text) == done.sentencepiece.encode(text)
    assert done.report["compression"]["gain"] > 2


def test_a_model_with_sentencepiece_alone_gets_both_files(
    run: Run, changed: Callable[..., Path]
) -> None:
    def bare(place: Path) -> None:
        for name in ("tokenizer.json", "special_tokens_map.json"):
            (place / name).unlink()
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')

    done = run(changed(bare), GREEK * 20, vocab_size=VOCABULARY + 60)
    for text in (*GREEK, *CORPUS, "  two spaces before", "a\n\n b"):
        assert done.ids(text) == done.sentencepiece.encode(text)
    assert done.fast.encode("a").ids[0] == 1
    config = json.loads((done.model / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_byte_level_bpe_learns_merges_behind_its_own(run: Run, byte_level: Path) -> None:
    before = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    size = before.get_vocab_size()
    done = run(byte_level, GREEK * 20, vocab_size=size + 80, tokens=["<|tool|>"])
    after = done.fast.get_vocab()
    assert before.get_vocab().items() <= after.items()
    assert len(after) == size + 80
    assert after["<|tool|>"] == size
    for text in CORPUS:
        assert done.ids(text) == before.encode(text, add_special_tokens=False).ids
    for text in GREEK:
        assert len(done.ids(text)) < len(before.encode(text, add_special_tokens=False).ids)
        assert done.fast.decode(done.ids(text)) == text
    assert any("ο" in piece for piece in done.report["tokens"]["pieces"])
    name = "model.embed_tokens.weight"
    assert set(done.weights) == set(done.old), "tied weights stay tied"
    rows, old = done.rows(name), values(done.old, name)
    assert rows.shape == (size + 80, old.shape[1]) if size + 80 > len(old) else old.shape
    merged = next(text for text, number in after.items() if number == size + 1)
    ids = [before.token_to_id(symbol) for symbol in merged]
    assert np.allclose(rows[size + 1], old[ids].mean(0), atol=1e-6)


def test_the_same_corpus_gives_the_same_model(run: Run, tiny_llama_dir: Path) -> None:
    def files() -> dict[str, bytes]:
        done = run(tiny_llama_dir, GREEK * 20, vocab_size=VOCABULARY + 40)
        return {path.name: path.read_bytes() for path in sorted(done.model.iterdir())}

    assert files() == files()


def test_a_corpus_of_rows_is_read_for_its_texts(run: Run, tiny_llama_dir: Path, data: Path) -> None:
    rows = [{"instruction": text, "n": 3, "history": [[text, text]]} for text in GREEK]
    (data / "rows.json").write_text(json.dumps(rows))
    done = run(tiny_llama_dir, vocab_size=400, corpus=[str(data / "rows.json")])
    assert done.metrics["tokens"] == 400


def test_a_corpus_too_small_says_how_far_it_goes(run: Run, tiny_llama_dir: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"only \d+ new tokens.*vocab_size to \d+ or less"):
        run(tiny_llama_dir, GREEK, vocab_size=5000)


def test_nothing_new_is_refused(run: Run, tiny_llama_dir: Path) -> None:
    with pytest.raises(FailedPrecondition, match="nothing is new"):
        run(tiny_llama_dir, tokens=["<s>"])


def test_fewer_rows_than_tokens_are_refused_before_any_work(
    run: Run, changed: Callable[..., Path]
) -> None:
    def lose(place: Path) -> None:
        old = Weights.open(place)
        plan, kept = [], {}
        for name, info in old.items():
            shape = (300, info.shape[1]) if name == "lm_head.weight" else info.shape
            plan.append(embeddings.TensorPlan(name, info.dtype, shape))
            kept[name] = bytes(old.raw(name))[: plan[-1].nbytes]
        with WeightsWriter(place, plan) as writer:
            for name, raw in kept.items():
                writer.write_raw(name, memoryview(raw))

    with pytest.raises(FailedPrecondition, match=r"384 tokens, its lm_head.weight 300 rows") as got:
        run(changed(lose), tokens=["<|tool|>"])
    assert got.value.reason == "TOKENIZER_MATCH"


def test_a_changed_id_fails_the_gate(
    run: Run, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arriero.dataset.extension import fast

    original = fast.Fast.write

    def swap(self: fast.Fast, path: Path) -> None:
        first, second = "▁llama", "▁the"
        self.vocab[first], self.vocab[second] = self.vocab[second], self.vocab[first]
        original(self, path)

    monkeypatch.setattr(fast.Fast, "write", swap)
    done = run(tiny_llama_dir, tokens=["<|tool|>"])
    assert done.gate.verdict is Verdict.FAILED
    assert "had id" in done.gate.detail


def test_files_of_two_tokenizers_are_refused(run: Run, changed: Callable[..., Path]) -> None:
    def mix(place: Path) -> None:
        proto = pieces.read(place / "tokenizer.model")
        for a, b in ((300, 301), (310, 311)):
            texts = proto.pieces[a].piece, proto.pieces[b].piece
            proto.pieces[b].piece, proto.pieces[a].piece = texts
        (place / "tokenizer.model").write_bytes(proto.SerializeToString())

    with pytest.raises(FailedPrecondition, match=r"not the same tokenizer.*4 such pieces"):
        run(changed(mix), tokens=["<|tool|>"])


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({}, "corpus", "empty"),
        ({"corpus": ["c.txt"]}, "vocab_size", "is not set"),
        ({"tokens": ["a b"]}, "tokens[0]", "without spaces"),
        ({"tokens": [""]}, "tokens[0]", "without spaces"),
        ({"tokens": ["a"], "held_out": 0.9}, "held_out", "expected 0 to 0.5"),
        ({"tokens": ["a"], "model_type": "word"}, "model_type", "bpe or unigram"),
        ({"tokens": ["a"], "embedding_init": "zero"}, "embedding_init", "mean or mean_all"),
        ({"tokens": ["a"], "pad_to_multiple_of": 0}, "pad_to_multiple_of", "expected 1"),
        ({"tokens": ["a"], "gates": {"nonsense": 1}}, "gates['nonsense']", "unknown gate"),
    ],
)
def test_what_is_wrong_is_refused_whatever_the_model_is(
    store, data: Path, allowed, fields: dict[str, Any], field: str, said: str
) -> None:
    (data / "c.txt").write_text("text\n")
    fields = fields | {"corpus": [str(data / name) for name in fields.get("corpus", ())]}
    with pytest.raises(InvalidArgument) as caught:
        check(dataset_pb2.ExtendTokenizerSpec(**fields), ResolveContext(store, {}, allowed))
    assert caught.value.violations[0].field == field
    assert said in caught.value.violations[0].description


def test_a_vocabulary_that_would_shrink_or_has_no_room_is_refused(
    run: Run, tiny_llama_dir: Path
) -> None:
    with pytest.raises(InvalidArgument, match=r"384 tokens; expected more than that"):
        run(tiny_llama_dir, GREEK, vocab_size=384)
    with pytest.raises(InvalidArgument, match=r"leaves no room for 3 tokens.*at least 387"):
        run(tiny_llama_dir, vocab_size=385, tokens=["<a>", "<b>", "<c>"])


def test_unigram_needs_sentencepiece(run: Run, byte_level: Path) -> None:
    with pytest.raises(InvalidArgument, match="needs a SentencePiece tokenizer"):
        run(byte_level, GREEK, vocab_size=500, model_type="unigram")


def test_helpers_are_added_where_two_symbols_do_not_suffice() -> None:
    growth = growing.Growth({"a", "b", "c"}, {}, growing.by_piece, True)
    growth.grow(["abc", "xy"], room=5)
    assert growth.pieces == ["ab", "abc", "x", "y", "xy"]
    assert growth.cut("abcxy") == ["abc", "xy"]


def test_what_does_not_fit_leaves_no_helpers_behind() -> None:
    growth = growing.Growth({"a", "b", "c", "d"}, {}, growing.by_pair, False)
    growth.grow(["abcd", "cd", "xy"], room=1)
    assert growth.pieces == ["cd"]
    assert growth.merges == [("c", "d")]
    assert growth.cut("abcd") == ["a", "b", "cd"]
