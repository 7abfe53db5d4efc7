"""Frequencies against transformers' own functions, and through llama.cpp's converter."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.gates import GateResult, Gates, Verdict
from arriero.llama import read_header
from arriero.quantization import converter, rope
from arriero.quantization.template_proof import prove_rope

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    scaling = dict(SCALINGS[kind])  # transformers writes into it
    return {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "max_position_embeddings": 16384 if kind == "yarn" else 4096,
        "rope_theta": 500000.0,
        **({"rope_scaling": scaling} if scaling else {}),
        **more,
    }


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(kind)
    name = SCALINGS[kind].get("rope_type") or SCALINGS[kind].get("type") or "default"
    found = rope.of_config(config)
    if name == "default":
        expected = 500000.0 ** -(np.arange(0, 128, 2) / 128)
        attention = 1.0
    else:
        made, attention = ROPE_INIT_FUNCTIONS[name](LlamaConfig(**config), "cpu")
        expected = made.numpy()
    assert found.kind == name
    np.testing.assert_allclose(found.frequencies, expected, rtol=2e-6)
    assert found.attention == pytest.approx(attention)
    assert found.context == config["max_position_embeddings"]


@pytest.fixture(scope="module")
def converted(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Converts the tiny model with other rope settings; returns config.json and the file."""

    def convert(**changes: Any) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp("rope") / "model"
        shutil.copytree(tiny_llama_dir, directory)
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))
        target = directory.parent / "made.gguf"
        root = converter.locate()
        subprocess.run(
            [sys.executable, str(root / "convert_hf_to_gguf.py"), str(directory)]
            + ["--outfile", str(target), "--outtype", "f32"],
            check=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(root / "gguf-py")},
        )  # fmt: skip
        return directory / "config.json", target

    return convert


def judged(config: Path, gguf: Path) -> GateResult:
    gates = Gates()
    prove_rope(gates, config=config, gguf=gguf)
    (result,) = gates.results
    return result


def rewritten(config: Path, tmp_path: Path, **changes: Any) -> Path:
    target = tmp_path / "config.json"
    target.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return target


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_what_the_converter_makes_passes_and_what_it_lost_does_not(
    converted: Callable[..., tuple[Path, Path]], kind: str, tmp_path: Path
) -> None:
    scaling = SCALINGS[kind]
    changes = {"rope_scaling": scaling} if scaling else {}
    config, gguf = converted(**changes, rope_theta=20000.0)
    result = judged(config, gguf)
    assert result.verdict is Verdict.PASSED, result.detail
    assert result.figure is not None
    assert result.figure < 1e-5

    lost = [{"rope_theta": 10000.0}, {"max_position_embeddings": 8192}]
    if kind not in ("default", "dynamic"):
        lost.append({"rope_scaling": None})
        lost.append({"rope_scaling": scaling | {"factor": 2 * scaling["factor"]}})
    for change in lost:
        result = judged(rewritten(config, tmp_path, **change), gguf)
        assert result.verdict is Verdict.FAILED, change
        assert "config.json" in result.detail


def test_a_rope_that_nobody_here_knows_is_not_judged(
    converted: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    config, gguf = converted()
    odd = rewritten(config, tmp_path, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    assert judged(odd, gguf).verdict is Verdict.SKIPPED
    (tmp_path / "config.json").write_text("{}")
    assert judged(tmp_path / "config.json", gguf).verdict is Verdict.SKIPPED


def test_a_temperature_that_llama_cpp_does_not_take_is_a_loss(
    converted: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, gguf = converted(
        rope_scaling=SCALINGS["yarn"] | {"attention_factor": 2.0}, max_position_embeddings=16384
    )
    result = judged(config, gguf)
    assert result.verdict is Verdict.FAILED
    assert "attention factor 2 in config.json" in result.detail
    assert read_header(gguf).metadata["llama.rope.scaling.type"] == "yarn"
