"""bitsandbytes checkpoints: written, loaded as they are, measured."""

from pathlib import Path

import numpy as np
import pytest

from arriero.errors import InvalidArgument
from arriero.gates import Verdict
from arriero.operations.job import Job
from arriero.operations.kinds import ResolveContext
from arriero.quantization import limits
from arriero.quantization.quantize import run_quantize
from arriero.quantization.quantize_spec import resolve_quantize
from arriero.settings import SourceSettings
from arriero.store import Artifact, Store
from arriero.testing.jobs import run_job
from arriero.v1 import quantization_pb2 as pb


def resolved(model: Artifact, store: Store, **fields: object) -> pb.QuantizeSpec:
    spec = pb.QuantizeSpec(model=model.digest, **fields)  # type: ignore[arg-type]
    context = ResolveContext(store, {"model": [model]}, SourceSettings())
    found: pb.QuantizeSpec = resolve_quantize(spec, context).spec
    return found


def test_transformers_loads_what_was_written_and_it_says_nearly_the_same(
    model: Artifact, store: Store, tmp_path: Path
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = resolved(model, store, types=["bnb_nf4", "Q8_0", "BNB_INT8"])
    jobs: list[Job] = []
    outputs = run_job(
        run_quantize, "quantize", spec, {"model": model}, store, tmp_path, prepare=jobs.append
    )
    assert [(o.name, o.kind) for o in outputs] == [
        ("BNB_NF4", "model"),
        ("Q8_0", "gguf"),
        ("BNB_INT8", "model"),
    ]
    nf4, _, int8 = outputs
    assert nf4.golden == model.manifest.golden
    assert (nf4.path / "arriero-template.json").is_file()
    assert int8.metrics["kl_divergence"] < nf4.metrics["kl_divergence"] < 1.0
    assert nf4.metrics["size_bytes"] < int8.metrics["size_bytes"]
    verdicts = [g.verdict for g in jobs[0].gates.results if g.gate == "quant.kld"]
    assert verdicts == [Verdict.PASSED, Verdict.PASSED]

    loaded = AutoModelForCausalLM.from_pretrained(nf4.path)
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, Linear4bit)
    ids = AutoTokenizer.from_pretrained(nf4.path)("Lima", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert bool(torch.isfinite(loaded(ids.to(loaded.device)).logits).all())


def test_each_output_is_judged_by_its_own_gates(
    model: Artifact, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LIMITS", {**limits.LIMITS, "BNB_NF4": 1e-9})
    spec = resolved(model, store, types=["Q8_0", "BNB_NF4", "BNB_INT8"])
    outputs = run_job(run_quantize, "quantize", spec, {"model": model}, store, tmp_path)
    verdicts = {
        output.name: {gate.gate: gate.verdict for gate in output.gates or ()} for output in outputs
    }
    assert verdicts["BNB_NF4"] == {"quant.kld": Verdict.FAILED}
    assert verdicts["BNB_INT8"] == {"quant.kld": Verdict.PASSED}
    assert set(verdicts["Q8_0"]) == {"gguf.tokens", "gguf.template", "gguf.rope"}
    assert Verdict.FAILED not in verdicts["Q8_0"].values()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"types": ["BNB_NF4", "bnb_nf4"]}, "types[1]"),
        ({"types": ["BNB_NF5"]}, "types[0]"),
        ({"types": ["BNB_NF4"], "method": "onepass"}, "method"),
        ({"types": ["BNB_NF4"], "adapters": ["sha256:ab"]}, "adapters"),
        ({"types": ["BNB_NF4"], "tensor_types": {"ffn": "Q6_K"}}, "tensor_types"),
    ],
)
def test_what_bitsandbytes_has_no_knob_for_is_refused(
    model: Artifact, store: Store, fields: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolved(model, store, **fields)
    assert caught.value.violations[0].field == field


def test_golden_logits_of_a_checkpoint_have_goldens_shape(
    model: Artifact, golden: Artifact, store: Store, tmp_path: Path
) -> None:
    from arriero.gates.golden import Golden
    from arriero.quantization import bnb

    (tmp_path / "made").mkdir()
    bnb.write(model.path, tmp_path / "made", "BNB_INT8")
    own = Golden.read(golden.path)
    found = bnb.golden_logits(tmp_path / "made", own)
    assert found.shape == own.logprobs.shape
    assert np.isfinite(found).all()
