import json
from pathlib import Path

import pytest

from arriero.errors import FailedPrecondition
from arriero.gates import GateResult, Gates, Mode, Verdict
from arriero.llama import QUANT_TYPES, read_header
from arriero.quantization import limits
from arriero.quantization.evaluation import Measurement, choose_smallest, metrics, report, table


def measured(kind: str, size: int, kld: float) -> Measurement:
    return Measurement(
        name="tiny",
        digest=f"sha256:{kind}",
        quant_type=kind,
        size_bytes=size,
        bits_per_weight=size / 10,
        kl_divergence=kld,
        kl_max=kld * 10,
        top1_agreement=1 - kld,
        confident_disagreements=0,
        tokens=256,
        seconds=1.0,
    )


ALL = [
    measured("F16", 160, 0.0001),
    measured("Q8_0", 85, 0.002),
    measured("Q4_K_M", 49, 0.04),
    measured("Q2_K", 33, 0.4),
]


@pytest.mark.parametrize(
    ("max_kld", "name"), [(1.0, "Q2_K"), (0.05, "Q4_K_M"), (0.04, "Q4_K_M"), (0.01, "Q8_0")]
)
def test_the_smallest_within_the_limit_is_taken(max_kld: float, name: str) -> None:
    assert choose_smallest(ALL, max_kld).quant_type == name


def test_of_equal_sizes_the_better_one_is_taken() -> None:
    twins = [measured("Q4_0", 50, 0.03), measured("IQ4_NL", 50, 0.02)]
    assert choose_smallest(twins, 0.05).quant_type == "IQ4_NL"


def test_none_within_the_limit_lists_the_figures_best_first() -> None:
    with pytest.raises(
        FailedPrecondition, match=r"F16 0\.0001, Q8_0 0\.002, Q4_K_M 0\.04"
    ) as caught:
        choose_smallest(ALL, 0.00001)
    assert "max_kld" in caught.value.message


def test_not_a_number_is_never_chosen() -> None:
    broken = measured("Q4_0", 10, float("nan"))
    assert choose_smallest([broken, ALL[0]], 0.05).quant_type == "F16"
    with pytest.raises(FailedPrecondition):
        choose_smallest([broken], 0.05)


def test_the_report_is_json_and_the_table_marks_the_choice() -> None:
    chosen = ALL[2]
    data = json.loads(json.dumps(report(ALL, golden="sha256:g", max_kld=0.05, chosen=chosen)))
    assert data["chosen"] == "sha256:Q4_K_M"
    assert [m["quant_type"] for m in data["models"]] == ["F16", "Q8_0", "Q4_K_M", "Q2_K"]
    lines = table(ALL, chosen).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["Q2_K", "Q4_K_M", "Q8_0", "F16"]
    assert [line.endswith("chosen") for line in lines[1:]] == [False, True, False, False]
    assert "chosen" not in table(ALL, None)


def test_the_table_shows_only_what_was_measured() -> None:
    assert "perplexity" not in table(ALL, None)
    only = Measurement("tiny", "sha256:a", "Q8_0", 85, 8.5, perplexity=25.9, perplexity_error=2.5)
    f16 = Measurement("tiny", "sha256:b", "F16", 160, 16.0, perplexity=25.5, perplexity_error=2.4)
    head, first, last = table([only], None, f16).splitlines()
    assert "KL" not in head
    assert "25.900 ± 2.500" in first
    assert last.startswith("F16")
    assert last.endswith("(reference)")


def test_without_golden_logits_the_reference_decides() -> None:
    files = [
        Measurement("t", k, k, s, 8.0, reference_kl=v)
        for k, s, v in (("Q8_0", 9, 0.001), ("Q4_0", 5, 0.2))
    ]
    assert choose_smallest(files, 0.05).quant_type == "Q8_0"


def test_metrics_name_every_file_and_the_chosen_one() -> None:
    twice = [measured("Q8_0", 85, 0.002), measured("Q8_0", 90, 0.001)]
    found = metrics(twice, twice[1], None)
    assert found["Q8_0.kl_divergence"] == 0.002
    assert found["Q8_0-2.kl_divergence"] == found["kl_divergence"] == 0.001
    assert found["Q8_0-2.chosen"] == 1.0
    assert "Q8_0.chosen" not in found
    assert "perplexity" not in found


# -- quant.kld -----------------------------------------------------------------


def judged(*files: Measurement, mode: Mode = Mode.ENFORCE) -> GateResult:
    gates = Gates({"quant.kld": mode})
    limits.judge(gates, files)
    (result,) = gates.results
    return result


def test_each_type_has_its_own_limit() -> None:
    assert judged(*ALL).verdict is Verdict.PASSED
    result = judged(measured("Q8_0", 85, 0.2), measured("Q4_K_M", 49, 0.2))
    assert result.verdict is Verdict.FAILED
    assert (result.figure, result.threshold) == (0.2, limits.LIMITS["Q8_0"])
    assert "Q8_0 0.2 (limit 0.03)" in result.detail
    assert "Q4_K_M" not in result.detail


def test_the_file_furthest_over_its_limit_is_the_figure() -> None:
    result = judged(measured("F16", 160, 0.02), measured("Q8_0", 85, 0.3))
    assert result.figure == 0.3
    assert judged(measured("Q8_0", 1, 9.0), mode=Mode.WARN).verdict is Verdict.WARNED


def test_a_type_without_a_limit_is_not_judged() -> None:
    result = judged(measured("TQ1_0", 10, 9.0))
    assert result.verdict is Verdict.SKIPPED
    assert "TQ1_0" in result.detail


def test_every_type_of_more_than_two_bits_has_a_limit_that_grows_with_fewer_bits() -> None:
    known = {name: kind for name, kind in QUANT_TYPES.items() if name in limits.LIMITS}
    assert {k for k, v in QUANT_TYPES.items() if v.bits > 3} - known.keys() == set()
    ordered = sorted(known, key=lambda name: -known[name].bits)
    assert limits.LIMITS[ordered[0]] < limits.LIMITS[ordered[-1]]


def test_an_unnamed_file_is_of_the_type_that_its_metadata_say(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert limits.type_of(header, None) == "F16"
    assert limits.type_of(header, "Q8_0") == "Q8_0"
