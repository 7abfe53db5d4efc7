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
    assert "25.900" in lines[0]
    assert "perplexity" in head
    assert "tok/s" not in head


def test_a_runs_evaluations_are_named_by_their_stage() -> None:
    stage = pb.StageStatus(name="best", kind="evaluate")
    stage.outputs.append(types_pb2.StageOutput(name="report", metrics=METRICS))
    run = pb.Run(stages=[pb.StageStatus(name="rows", kind="dataset"), stage])
    assert shown(evaluation.of_run(run))[0].strip() == "best"
    assert evaluation.of_run(pb.Run(stages=[pb.StageStatus(kind="evaluate")])) is None
