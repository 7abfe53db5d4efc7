from arriero.quantization.tokens import Sample, built_in, compare


def characters(text: str, special: bool) -> list[int]:
    return [*([1] if special else []), *(ord(c) for c in text)]


def test_equal_tokenizers_differ_nowhere() -> None:
    found = compare(characters, characters, built_in())
    assert found.texts == len(built_in())
    assert not found.differences
    assert not found.exotic_differences


def test_a_difference_is_told_with_its_place_and_both_sides() -> None:
    def other(text: str, special: bool) -> list[int]:
        return [7 if i == ord("é") else i for i in characters(text, special)]

    found = compare(characters, other, [Sample("café au lait", "plain text")])
    assert found.differences == [
        "plain text 'café au lait': from token 4 on [7, 32, 97, 117, …] where the model's "
        "tokenizer has [233, 32, 97, 117, …] (13 and 13 tokens)"
    ]


def test_a_missing_bos_is_a_difference() -> None:
    found = compare(characters, lambda text, _: characters(text, False), [Sample("a", "plain")])
    assert "from token 0" in found.differences[0]
    only_template = [Sample("a", "template", add_special=False)]
    assert not compare(characters, characters, only_template).differences


def test_tokens_left_over_at_the_end_are_a_difference() -> None:
    found = compare(characters, lambda t, s: [*characters(t, s), 2], [Sample("ab", "plain")])
    assert "from token 3 on [2] where the model's tokenizer has []" in found.differences[0]


def test_an_exotic_difference_is_kept_apart() -> None:
    samples = [Sample(" x", "exotic text", exotic=True), Sample("x", "plain text")]
    found = compare(characters, lambda t, s: characters(t.lstrip(), s), samples)
    assert not found.differences
    assert len(found.exotic_differences) == 1
