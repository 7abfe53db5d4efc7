import io

from rich.console import Console

from arriero.cli import evaluation
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2

METRICS = {
    "Q8_0.size_bytes": 144.8e6,
    "Q8_0.kl_divergence": 0.003,
    "Q4_K_M.size_bytes": 105.5e6,
    "Q4_K_M.kl_divergence": 0.034,
    "Q4_K_M.perplexity": 25.9,
    "Q4_K_M.chosen": 1.0,
    "reference.size_bytes": 270.9e6,
    "reference.perplexity": 25.5,
    "kl_divergence": 0.034,
}


def shown(renderable: object) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


def test_files_come_smallest_first_and_the_reference_last() -> None:
    head, *lines = shown(evaluation.view(METRICS))
    assert [line.split()[0] for line in lines] == ["Q4_K_M", "Q8_0", "reference"]
    assert "chosen" in lines[0]
    assert "25.9" in lines[0]
    assert "ppl" in head
    assert "gen/s" not in head


def test_a_runs_evaluations_are_named_by_their_stage() -> None:
    stage = pb.StageStatus(name="best", kind="evaluate")
    stage.outputs.append(types_pb2.StageOutput(name="report", metrics=METRICS))
    run = pb.Run(stages=[pb.StageStatus(name="rows", kind="dataset"), stage])
    assert shown(evaluation.of_run(run))[0].strip() == "best"
    assert evaluation.of_run(pb.Run(stages=[pb.StageStatus(kind="evaluate")])) is None


def test_everything_measured_fits_into_eighty_columns() -> None:
    figures = {
        "size_bytes": 4.9e9, "bits_per_weight": 4.85, "kl_divergence": 0.03414,
        "top1_agreement": 0.895, "reference_kl": 0.05035, "perplexity": 27.549,
        "prompt_tokens_per_second": 312.4, "generation_tokens_per_second": 41.2, "chosen": 1.0,
    }  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation.view({f"Q4_K_M.{key}": value for key, value in figures.items()}))
    head, line = console.export_text().splitlines()
    assert "…" not in head + line
    for text in ("Q4_K_M", "4.9 GB", "0.03414", "89.5%", "27.549", "312.4", "41.2", "chosen"):
        assert text in line
