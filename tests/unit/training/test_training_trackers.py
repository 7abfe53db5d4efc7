"""Curves go to the trackers that `report_to` names, and a tracker ends no training."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("torch")

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.testing.jobs import run_job
from arriero.training.job import train
from arriero.training.spec import resolve
from arriero.training.state import Report, State
from arriero.training.trackers import Trackers
from arriero.v1 import training_pb2

SPEC = {
    "max_steps": 4,
    "batch_size": 4,
    "dtype": "float32",
    "eval_steps": 2,
    "report_to": ["tensorboard"],
}


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: by tag, (step, value)."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.rglob("events.*")):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = proto.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture
def room(kit, model, dataset, val_dataset, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    inputs = {"model": model, "dataset": dataset, "val_dataset": val_dataset}

    def run():
        resolved = resolve(training_pb2.TrainSpec(**SPEC), kit.context(**inputs)).spec
        return run_job(train, "train", resolved, inputs, kit.store, tmp_path)

    return run


def test_tensorboards_files_come_with_the_report(room):
    _, golden = room()
    found = scalars(golden.path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["eval/loss"]] == [2, 4]
    assert {"train/learning_rate", "train/grad_norm", "train/smoothed_loss"} <= set(found)


def test_or_go_where_the_service_is_told(room, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    _, golden = room()
    assert not (golden.path / "tensorboard").exists()
    assert len(scalars(tmp_path / "boards/run/stage")["train/loss"]) == 4


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(context, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(InvalidArgument, match=f"{name} needs the package {name}"):
        resolve(training_pb2.TrainSpec(report_to=[name]), context)


class Broken:
    """A tracker whose server went away."""

    calls = 0

    def on_train_begin(self, *_: object) -> None:
        pass

    def on_log(self, *_: object, **__: object) -> None:
        Broken.calls += 1
        raise ConnectionError("no route")

    on_train_end = on_train_begin


def trackers(monkeypatch, kind: type, tmp_path: Path) -> Trackers:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.setattr(
        "transformers.integrations.get_reporting_integration_callbacks", lambda names: [kind]
    )
    return Trackers(["wandb"], {}, run="r", stage="s", directory=tmp_path)


def test_a_tracker_that_fails_is_left_behind(monkeypatch, tmp_path, caplog):
    now = Report("training", 1, 4, 2.0, 1e-3, None, 10, None, raw_loss=2.0)
    with caplog.at_level(logging.WARNING), trackers(monkeypatch, Broken, tmp_path) as some:
        some.log(now, State())
        some.log(now, State())
    assert Broken.calls == 1
    assert "Broken failed (ConnectionError: no route)" in caplog.text


def test_a_tracker_that_can_not_start_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    class Closed(Broken):
        def on_train_begin(self, *_: object) -> None:
            raise PermissionError("not logged in")

    with pytest.raises(FailedPrecondition, match="report_to wandb: PermissionError: not logged in"):
        trackers(monkeypatch, Closed, tmp_path)
