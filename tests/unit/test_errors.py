"""Errors say which field they are about, however deep it was found."""

from __future__ import annotations

from arriero.errors import FailedPrecondition, NotFound


def test_an_error_is_said_of_a_field() -> None:
    error = NotFound("'/d' does not exist").at("source")
    assert error.message == str(error) == "source: '/d' does not exist"
    assert error.metadata == {"field": "source"}


def test_a_field_inside_of_a_field_is_named_once() -> None:
    error = FailedPrecondition("is quarantined", metadata={"subject": "sha256:0"})
    error.at("adapters[1]").at("stages[3].merge")
    assert error.message == "stages[3].merge.adapters[1]: is quarantined"
    assert error.metadata == {"subject": "sha256:0", "field": "stages[3].merge.adapters[1]"}
