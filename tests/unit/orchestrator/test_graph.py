"""What the pipeline graph finds, and what it refuses."""

from __future__ import annotations

import pytest
from google.protobuf import json_format

from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.orchestrator import graph
from arriero.orchestrator.inputs import Published
from arriero.v1 import pipeline_pb2

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
C = "sha256:" + "c" * 64


def pipeline(*stages: dict, name: str = "p", **more: object) -> pipeline_pb2.Pipeline:
    data = {"name": name, "stages": list(stages), **more}
    return json_format.ParseDict(data, pipeline_pb2.Pipeline())


BASE = {"name": "base", "import": {"source": "/m", "as": "model"}}
ROWS = {
    "name": "rows",
    "dataset": {"sources": ["x"], "tokenizer": "base", "val_set_size": 10},
}
SFT = {"name": "sft", "train": {"model": "base", "dataset": "rows"}}
MERGED = {"name": "merged", "merge": {"model": "base", "adapters": ["sft"]}}
QUANTS = {"name": "quants", "quantize": {"model": "merged", "types": ["Q8_0", "q4_k_m"]}}
BEST = {"name": "best", "evaluate": {"models": ["quants"]}}
LIVE = {"name": "live", "deploy": {"model": "best", "endpoint": "e"}}
WHOLE = (BASE, ROWS, SFT, MERGED, QUANTS, BEST, LIVE)


def refusal(*stages: dict, **more: object) -> dict[str, str]:
    """The violations of a pipeline, by field path."""
    with pytest.raises(InvalidArgument) as caught:
        graph.build(pipeline(*stages, **more))
    return {v.field: v.description for v in caught.value.violations}


def test_edges_come_from_the_fields_that_are_marked_as_inputs():
    built = graph.build(pipeline(*WHOLE, tags={"gguf/x:prod": "best"}))
    assert {n: node.depends_on for n, node in built.nodes.items()} == {
        "base": (),
        "rows": ("base",),
        "sft": ("base", "rows"),
        "merged": ("base", "sft"),
        "quants": ("merged",),
        "best": ("quants",),
        "live": ("best",),
    }


def test_stages_may_be_written_in_any_order():
    built = graph.build(pipeline(*reversed(WHOLE)))
    position = {name: i for i, name in enumerate(built.order)}
    for node in built.nodes.values():
        assert all(position[dep] < position[node.name] for dep in node.depends_on)
    assert list(built.nodes) == [s["name"] for s in reversed(WHOLE)]


def test_a_cycle_is_named():
    found = refusal(
        BASE,
        {"name": "a", "merge": {"model": "c", "adapters": []}},
        {"name": "b", "merge": {"model": "a", "adapters": []}},
        {"name": "c", "merge": {"model": "b", "adapters": []}},
    )
    (text,) = found.values()
    assert "cycle" in text
    assert "a -> b -> c -> a" in text


def test_a_stage_that_names_itself_is_a_cycle():
    found = refusal({"name": "a", "merge": {"model": "a"}})
    assert found["stages[0].merge.model"].endswith("a -> a")


def test_a_long_chain_needs_no_recursion():
    chain = [{"name": "s0", "import": {"source": "/m", "as": "model"}}]
    chain += [{"name": f"s{i}", "merge": {"model": f"s{i - 1}"}} for i in range(1, 500)]
    assert graph.build(pipeline(*reversed(chain))).order[0] == "s0"


def test_an_unknown_stage_is_refused_with_the_nearest_name():
    found = refusal(BASE, {"name": "m", "merge": {"model": "bsae"}})
    assert "did you mean 'base'?" in found["stages[1].merge.model"]


def test_duplicate_names_are_refused():
    assert "second stage named 'base'" in refusal(BASE, BASE)["stages[1].name"]


@pytest.mark.parametrize("name", ["", "Base", "a b", "../x", "-a", "x" * 64])
def test_bad_stage_names_are_refused(name):
    assert "stages[0].name" in refusal({**BASE, "name": name})


@pytest.mark.parametrize("name", ["", "My", "a_b", "../x", "a/"])
def test_bad_pipeline_names_are_refused(name):
    assert "name" in refusal(BASE, name=name)


def test_an_empty_pipeline_and_a_stage_without_work_are_refused():
    assert "stages" in refusal()
    assert "expected one of import, dataset" in refusal({"name": "a"})["stages[0]"]


def test_an_output_that_the_kind_does_not_have_is_refused():
    found = refusal(*WHOLE[:3], {"name": "m", "merge": {"model": "sft.model", "adapters": []}})
    assert "has no output 'model'; it has: adapter, golden" in found["stages[3].merge.model"]


def test_val_of_a_dataset_without_held_out_rows_is_refused_with_the_reason():
    rows = {"name": "rows", "dataset": {"sources": ["x"], "tokenizer": "base"}}
    train = {"name": "t", "train": {"model": "base", "dataset": "rows", "val_dataset": "rows.val"}}
    assert "val_set_size is 0" in refusal(BASE, rows, train)["stages[2].train.val_dataset"]


def test_a_deployment_cannot_be_an_input():
    found = refusal(*WHOLE, {"name": "m", "merge": {"model": "live"}})
    assert "publishes nothing" in found["stages[7].merge.model"]


def test_wrong_kinds_are_refused_statically():
    found = refusal(
        *WHOLE,
        {"name": "t2", "train": {"model": "best", "dataset": "base"}},
        {"name": "m2", "merge": {"model": "gguf/x:prod", "adapters": ["rows.report"]}},
    )
    assert "is of kind gguf; expected model" in found["stages[7].train.model"]
    assert "is of kind model; expected dataset" in found["stages[7].train.dataset"]
    assert "is of kind gguf; expected model" in found["stages[8].merge.model"]
    assert "is of kind report; expected adapter" in found["stages[8].merge.adapters[0]"]


def test_a_missing_input_is_refused():
    found = refusal(BASE, {"name": "t", "train": {}})
    assert "is missing" in found["stages[1].train.model"]
    assert "is missing" in found["stages[1].train.dataset"]


@pytest.mark.parametrize("text", ["a.b.c", ".x", "base.", "model/../x", "sha256:12", "what/x:y"])
def test_malformed_inputs_are_refused(text):
    assert "stages[1].merge.model" in refusal(BASE, {"name": "m", "merge": {"model": text}})


def test_an_import_without_a_kind_may_be_any_and_its_outputs_may_be_named():
    auto = {"name": "x", "import": {"source": "/m"}}
    graph.build(pipeline(auto, {"name": "m", "merge": {"model": "x", "adapters": ["x.adapter"]}}))
    found = refusal(auto, {"name": "t", "train": {"model": "x", "dataset": "x"}})
    assert "expected dataset" in found["stages[1].train.dataset"]


def test_an_unknown_import_kind_is_refused():
    found = refusal({"name": "x", "import": {"source": "/m", "as": "pickle"}})
    assert "expected auto" in found["stages[0].import.as"]


def test_quant_types_are_outputs_in_any_case():
    live = {"name": "live", "deploy": {"model": "quants.Q4_k_M", "endpoint": "e"}}
    graph.build(pipeline(*WHOLE[:5], live))
    live = {"name": "live", "deploy": {"model": "quants.Q5_0", "endpoint": "e"}}
    assert "it has: Q8_0, Q4_K_M" in refusal(*WHOLE[:5], live)["stages[5].deploy.model"]


def test_tags_are_checked_like_inputs():
    found = refusal(
        *WHOLE,
        tags={
            "gguf/a:prod": "nothing",
            "model/a:prod": "best",
            "gguf/a": "best.report",
            "b@d": "best",
            "gguf/c:prod": "sha256:" + "a" * 64,
        },
    )
    assert "no stage is named 'nothing'" in found["tags['gguf/a:prod']"]
    assert "expected model" in found["tags['model/a:prod']"]
    assert "expected gguf" in found["tags['gguf/a']"]
    assert "tags['b@d']" in found
    assert "expected a stage" in found["tags['gguf/c:prod']"]


def test_two_deployments_to_one_endpoint_are_refused():
    found = refusal(*WHOLE, {"name": "live2", "deploy": {"model": "best", "endpoint": "e"}})
    assert "'live' deploys to 'e' already" in found["stages[7].deploy.endpoint"]


def test_references_are_resolved_and_their_kind_is_checked():
    built = graph.build(
        pipeline({"name": "m", "merge": {"model": "model/x:prod", "adapters": [A]}})
    )
    found = graph.resolve(built, {"model/x:prod": (B, "model"), A: (A, "adapter")}.__getitem__)
    assert found == {"model/x:prod": B, A: A}
    with pytest.raises(InvalidArgument, match=r"stages\[0\].merge.adapters\[0\]"):
        graph.resolve(built, {"model/x:prod": (B, "model"), A: (A, "model")}.__getitem__)

    def missing(ref: str) -> tuple[str, str]:
        raise NotFound(f"no artifact {ref}")

    with pytest.raises(NotFound):
        graph.resolve(built, missing)


def test_inputs_become_digests():
    built = graph.build(pipeline(*WHOLE))
    work = graph.substitute(
        built.nodes["sft"],
        {},
        {
            "base": [Published("model", A, "model")],
            "rows": [Published("train", B, "dataset"), Published("val", C, "dataset")],
        },
    )
    assert (work.model, work.dataset, work.val_dataset) == (A, B, C)
    assert built.nodes["sft"].work.model == "base"


def test_a_default_input_is_left_out_when_it_was_not_published():
    built = graph.build(pipeline(*WHOLE))
    work = graph.substitute(
        built.nodes["sft"],
        {},
        {"base": [Published("model", A, "model")], "rows": [Published("train", B, "dataset")]},
    )
    assert not work.HasField("val_dataset")


def test_a_bare_stage_in_a_list_means_all_of_its_outputs():
    built = graph.build(pipeline(*WHOLE))
    outputs = [Published("Q8_0", A, "gguf"), Published("Q4_K_M", B, "gguf")]
    work = graph.substitute(built.nodes["best"], {}, {"quants": [*outputs]})
    assert list(work.models) == [A, B]
    one = {"name": "best", "evaluate": {"models": ["quants.q4_k_m"]}}
    built = graph.build(pipeline(*WHOLE[:5], one))
    work = graph.substitute(built.nodes["best"], {}, {"quants": outputs})
    assert list(work.models) == [B]


def test_what_an_import_turned_out_to_be_is_checked_when_it_is_used():
    auto = {"name": "x", "import": {"source": "/m"}}
    built = graph.build(pipeline(auto, {"name": "m", "merge": {"model": "x"}}))
    with pytest.raises(InvalidArgument, match="published is of kind gguf; expected model"):
        graph.substitute(built.nodes["m"], {}, {"x": [Published("gguf", A, "gguf")]})
    built = graph.build(pipeline(auto, {"name": "m", "merge": {"model": "x.model"}}))
    with pytest.raises(FailedPrecondition, match="did not publish 'model'; it published: gguf"):
        graph.substitute(built.nodes["m"], {}, {"x": [Published("gguf", A, "gguf")]})
