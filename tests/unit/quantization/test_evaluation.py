import json

import pytest

from arriero.errors import FailedPrecondition
from arriero.quantization.evaluation import Measurement, choose_smallest, report, table


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
