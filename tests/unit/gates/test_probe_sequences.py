import pytest

from arriero.gates.golden import probe_sequences


@pytest.mark.parametrize("lengths", [[128, 127, 50], [300] * 9, [85] * 9, [3] * 100, [2] * 200])
def test_the_probe_holds_exactly_what_is_asked(lengths: list[int]) -> None:
    sequences = probe_sequences([list(range(n)) for n in lengths])
    assert sum(len(ids) for ids in sequences) == 256
    assert all(2 <= len(ids) <= 128 for ids in sequences)


def test_fewer_when_the_rows_have_fewer() -> None:
    assert probe_sequences([[1], [1, 2, 3], []]) == [[1, 2, 3]]
