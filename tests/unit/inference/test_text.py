"""Text streams hold back what may still change."""

from pathlib import Path

import pytest

from arriero.inference.text import TextStream


def test_a_character_split_over_tokens_is_shown_once_it_is_whole() -> None:
    stream = TextStream()
    emoji = "🦙".encode()
    assert [stream.push(bytes([b])) for b in emoji] == ["", "", "", "🦙"]


def test_bytes_that_never_become_a_character_are_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.push("ä".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_over_three_tokens_is_not_shown() -> None:
    stream = TextStream(["</answer>"])
    shown = [stream.push(piece) for piece in (b"42 </", b"ans", b"wer> more")]
    assert "".join(shown) == "42 "
    assert stream.stopped
    assert stream.finish() == ""


def test_what_only_looks_like_a_stop_string_is_shown_late() -> None:
    stream = TextStream(["###"])
    assert stream.push(b"a ##") == "a "
    assert stream.push(b" b") == "## b"


def test_the_earliest_of_several_stop_strings_ends_the_text() -> None:
    stream = TextStream(["later", "now"])
    assert stream.push(b"x now and later") == "x "


@pytest.mark.parametrize("cut", range(1, 12))
def test_any_split_gives_the_same_text(cut: int) -> None:
    data = "né 你好 🦙 end STOP tail".encode()
    stream = TextStream(["STOP"])
    text = "".join(stream.push(data[i : i + cut]) for i in range(0, len(data), cut))
    assert text + stream.finish() == "né 你好 🦙 end "


def test_characters_of_several_tokens_are_shown_whole(tiny_llama_dir: Path) -> None:
    from transformers import AutoTokenizer

    from arriero.inference.cohort import Cohort, Row

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    cohort = Cohort.__new__(Cohort)
    cohort._tokenizer = tokenizer
    for text in (" the llama 🦙 says 你好, naïve", "🦙🦙", "plain"):
        prompt = tokenizer("Say")["input_ids"]
        row = Row.make(id=1, prompt=prompt, sampler=None, text=TextStream(), max_tokens=99)
        parts = []
        for token in tokenizer("Say" + text)["input_ids"][len(prompt) :]:
            row.ids.append(token)
            parts.append(cohort._piece(row))
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
