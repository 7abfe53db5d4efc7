"""The error tree survives the wire, and nothing else gets out."""

import errno
import logging

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from arriero import errors
from arriero.rpc.status import from_status, to_status


def _classes(cls=errors.ArrieroError):
    for sub in cls.__subclasses__():
        yield sub
        yield from _classes(sub)


def _detail(status, message):
    for detail in status.details:
        if detail.Is(message.DESCRIPTOR):
            detail.Unpack(message)
            return message
    return None


@pytest.mark.parametrize("cls", [c for c in _classes() if c is not errors.DiskFull])
def test_every_error_comes_back_as_its_own_class(cls):
    back = from_status(to_status(cls("found a, expected b, do c", metadata={"run": "r1"})))
    assert type(back) is cls
    assert (back.message, back.reason) == ("found a, expected b, do c", cls.default_reason)
    assert back.metadata["run"] == "r1"
    assert back.retryable is cls.retryable


def test_disk_full_keeps_its_figures():
    back = from_status(to_status(errors.DiskFull("too little", needed=10, free=3)))
    assert isinstance(back, errors.DiskFull)
    assert (back.needed, back.free) == (10, 3)


def test_field_violations_come_back_in_order():
    violations = [errors.FieldViolation("stages[1].train.lora.r", "0 is below 1")] * 2
    back = from_status(to_status(errors.InvalidArgument("two fields", violations=violations)))
    assert isinstance(back, errors.InvalidArgument)
    assert list(back.violations) == violations


def test_error_info_is_always_there():
    for cls in (errors.NotFound, errors.InvalidArgument, errors.Unavailable):
        info = _detail(to_status(cls("x")), error_details_pb2.ErrorInfo())
        assert (info.domain, info.reason) == ("arriero", cls.default_reason)


def test_only_what_may_pass_later_tells_when_to_retry():
    retry = error_details_pb2.RetryInfo()
    assert _detail(to_status(errors.Unavailable("x")), retry).retry_delay.seconds > 0
    assert _detail(to_status(errors.NotFound("x")), retry) is None


def test_preconditions_name_their_type():
    failure = error_details_pb2.PreconditionFailure()
    found = _detail(to_status(errors.GateFailed("merge.logits: 0.9 > 0.1")), failure)
    assert found.violations[0].type == "GATE_FAILED"
    assert "merge.logits" in found.violations[0].description


def test_a_defect_becomes_internal_with_an_incident_and_no_traceback(caplog):
    with caplog.at_level(logging.ERROR):
        try:
            raise KeyError("/etc/secret-path")
        except KeyError as error:
            status = to_status(error)
    assert status.code == code_pb2.INTERNAL
    incident = from_status(status).metadata["incident"]
    assert incident in status.message
    assert b"secret-path" not in status.SerializeToString()
    assert b"Traceback" not in status.SerializeToString()
    assert incident in caplog.text
    assert "secret-path" in caplog.text


def test_a_full_disk_is_no_defect():
    status = to_status(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert isinstance(from_status(status), errors.ResourceExhausted)


def test_a_long_status_stays_below_what_peers_take_as_trailers():
    violations = [errors.FieldViolation(f"stages[{i}].x", "说" * 300) for i in range(300)]
    error = errors.InvalidArgument("错" * 5000, violations=violations)
    status = to_status(error)
    base64_bytes = status.ByteSize() * 4 / 3
    percent_encoded = len(status.message.encode()) * 3
    assert base64_bytes + percent_encoded < 8192
    back = from_status(status)
    assert isinstance(back, errors.InvalidArgument)
    assert back.violations
    assert back.message.endswith("…")


def test_a_status_from_elsewhere_is_understood_by_its_code():
    assert isinstance(from_status(status_pb2.Status(code=5, message="gone")), errors.NotFound)
    assert isinstance(from_status(status_pb2.Status(code=2, message="?")), errors.Internal)
    assert isinstance(from_status(status_pb2.Status(code=9999)), errors.Internal)


def test_ok_is_no_error():
    with pytest.raises(ValueError, match="OK"):
        from_status(status_pb2.Status())
