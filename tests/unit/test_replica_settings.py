"""A replica's settings: one form on the way, and refusals with the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.errors import InvalidArgument
from arriero.operations.defaults import with_defaults
from arriero.replica import ReplicaSettings, RopeSettings
from arriero.v1 import pipeline_pb2

EVERYTHING = ReplicaSettings(
    context=8192,
    slots=7,
    queue=9,
    threads=3,
    gpu_layers=-1,
    mmap=False,
    mlock=True,
    repack=False,
    cache_type_k="Q8_0",
    cache_type_v="Q4_0",
    flash_attention="on",
    rope=RopeSettings("yarn", 4.0, None, 0.5, -1.0, 16.0, 2.5, 2048, 2),
)


@pytest.mark.parametrize("settings", [ReplicaSettings(), EVERYTHING])
def test_what_is_written_is_what_is_read(settings):
    assert ReplicaSettings.from_env(settings.environment()) == settings


def test_the_defaults_are_those_of_the_deploy_stage():
    spec = with_defaults(pipeline_pb2.DeploySpec(model="m", endpoint="e"))
    assert ReplicaSettings.of_spec(spec) == ReplicaSettings()


def test_a_spec_says_all_of_it():
    spec = pipeline_pb2.DeploySpec(
        context=8192,
        slots=7,
        queue=9,
        threads=3,
        gpu_layers=-1,
        mmap=False,
        mlock=True,
        repack=False,
        cache_type_k="q8_0",
        cache_type_v="q4_0",
        flash_attention="on",
        rope=pipeline_pb2.RopeSpec(
            type="yarn",
            factor=4,
            yarn_ext_factor=0.5,
            yarn_beta_fast=16,
            yarn_beta_slow=2.5,
            yarn_original_context=2048,
            native_slots=2,
        ),
    )
    assert ReplicaSettings.of_spec(with_defaults(spec)) == EVERYTHING


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"slots": 0}, "slots", "not between 1 and 256"),
        ({"context": -1}, "context", "not between"),
        ({"gpu_layers": -2}, "gpu_layers", "not between -1"),
        ({"cache_type_k": "Q3_K"}, "cache_type_k", "expected F16"),
        ({"flash_attention": "yes"}, "flash_attention", "expected auto"),
        ({"cache_type_v": "q8_0", "flash_attention": "off"}, "cache_type_v", "needs flash"),
        ({"rope": {"type": "dynamic"}}, "rope.type", "expected none, linear"),
        ({"rope": {"factor": 2}}, "rope.factor", "rope.type is not set"),
        ({"rope": {"type": "none", "factor": 2}}, "rope.factor", "rope.type is none"),
        ({"rope": {"type": "linear", "alpha": 2}}, "rope.alpha", "belongs to rope.type ntk"),
        ({"rope": {"type": "linear", "factor": 0.5}}, "rope.factor", "1 or more"),
        ({"rope": {"type": "linear", "factor": float("nan")}}, "rope.factor", "finite"),
        ({"rope": {"type": "ntk", "alpha": 2, "factor": 2}}, "rope.alpha", "exclude"),
        ({"rope": {"type": "none", "native_slots": 1}}, "rope.native_slots", "rope.type is none"),
        ({"rope": {"type": "ntk", "native_slots": 999}}, "rope.native_slots", "between 0"),
        ({"rope": {"type": "yarn", "yarn_attn_factor": 1}}, "rope.yarn_attn_factor", "computed"),
    ],
)
def test_nonsense_is_refused_by_its_field(fields: dict[str, Any], field: str, why: str):
    spec = with_defaults(pipeline_pb2.DeploySpec(**fields))
    with pytest.raises(InvalidArgument, match=why) as caught:
        ReplicaSettings.of_spec(spec)
    assert [v.field for v in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ARRIERO_SLOTS", "many"), ("ARRIERO_MMAP", "maybe"), ("ARRIERO_ROPE_FACTOR", "x")],
)
def test_a_variable_that_is_none_of_its_kind_is_named(name, value):
    with pytest.raises(InvalidArgument) as caught:
        ReplicaSettings.from_env({name: value})
    assert [v.field for v in caught.value.violations] == [name]
