import re
from pathlib import Path

import pytest

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument
from arriero.llama import (
    QUANT_TYPES,
    Context,
    Model,
    quantize,
    read_header,
    resolve_tensor_type,
    resolve_type,
)
from arriero.llama.library import binding


@pytest.mark.parametrize("text", ["q4_k_m", "Q4_K_M", " q4_K_m ", "q4_k"])
def test_types_are_accepted_in_any_case(text: str) -> None:
    assert resolve_type(text).name == "Q4_K_M"


@pytest.mark.parametrize("text", ["Q9_9", "", "Q4-K-M", "15"])
def test_an_unknown_type_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(InvalidArgument, match="Q4_K_M, Q4_K_S") as caught:
        resolve_type(text, field="types[1]")
    assert caught.value.violations[0].field == "types[1]"
    assert "IQ2_XS" in caught.value.message


def test_a_type_that_needs_an_importance_matrix_is_refused_without_one() -> None:
    with pytest.raises(InvalidArgument, match="field imatrix") as caught:
        resolve_type("iq2_xxs", imatrix=False)
    assert "IQ2_XS" not in caught.value.message
    assert resolve_type("iq2_xxs").needs_imatrix


def test_a_tensor_has_one_type_not_a_mixture() -> None:
    assert resolve_tensor_type(" q6_k ") == "Q6_K"
    for text in ("Q4_K_M", "Q8_K", "I32", ""):
        with pytest.raises(InvalidArgument, match="known types: F32, F16, Q4_0"):
            resolve_tensor_type(text)


def test_numbers_are_those_of_the_linked_library() -> None:
    c = binding()
    theirs = {
        re.sub(r"^LLAMA_FTYPE_(MOSTLY|ALL)_", "", name): getattr(c, name)
        for name in dir(c)
        if re.match(r"LLAMA_FTYPE_(MOSTLY|ALL)_", name)
    }
    ours = {kind.name: kind.ftype for kind in QUANT_TYPES.values()}
    assert ours.items() <= theirs.items()
    # The quantizer has no way to make the one that is left.
    assert set(theirs) - set(ours) == {"NVFP4"}


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "TQ2_0"])
def test_a_quantized_file_says_its_type_and_runs(
    tiny_gguf: Path, tmp_path: Path, name: str
) -> None:
    kind = QUANT_TYPES[name]
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out.gguf"
    header = quantize(
        tiny_gguf, target, kind, on_progress=lambda done, total: seen.append((done, total))
    )
    assert header.metadata["general.file_type"] == kind.ftype
    assert header.metadata["general.name"] == read_header(tiny_gguf).metadata["general.name"]
    total = len(header.tensors)
    assert seen == [(i, total) for i in range(total)]
    with Model(target) as model, Context(model, n_ctx=64, n_threads=1) as context:
        assert context.sequence_logits([1, 300, 7]).std() > 0.1


def test_the_number_of_threads_does_not_change_a_byte(tiny_gguf: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for workers, path in enumerate(files, start=1):
        quantize(tiny_gguf, path, QUANT_TYPES["Q4_K_M"], n_threads=workers)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_refusal_leaves_no_file_and_says_why(tiny_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    # 64 columns are no whole Q1_0 block, and that type has no fallback.
    with pytest.raises(FailedPrecondition, match="no tensor type fallback"):
        quantize(tiny_gguf, target, QUANT_TYPES["Q1_0"])
    assert not target.exists()


def test_a_cut_off_source_is_data_loss(tiny_gguf: Path, tmp_path: Path) -> None:
    source = tmp_path / "cut.gguf"
    source.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(DataLoss):
        quantize(source, tmp_path / "out.gguf", QUANT_TYPES["Q8_0"])
