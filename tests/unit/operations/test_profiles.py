"""Jobs stamped from an administrator's template and profiles."""

from pathlib import Path

import pytest
import yaml

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.operations.profiles import Templates, meeting_place, stamp
from arriero.operations.runner import Launch

JOB = {
    "kind": "Job",
    "metadata": {"labels": {"app": "arriero"}, "namespace": "elsewhere"},
    "spec": {
        "ttlSecondsAfterFinished": 60,
        "template": {
            "metadata": {"labels": {"app": "arriero"}},
            "spec": {
                "tolerations": [{"key": "a"}],
                "containers": [
                    {
                        "name": "main",
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}],
                    }
                ],
            },
        },
    },
}
PROFILES = {
    "gpu-8x2": {"nodes": 2, "gpusPerNode": 8, "env": {"B": 2}, "tolerations": [{"key": "b"}]},
    "gpu-4": {"gpusPerNode": 4, "runtimeClassName": "nvidia"},
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    (tmp_path / "profiles.yaml").write_text(yaml.safe_dump(PROFILES))
    return tmp_path


def launch(**fields):
    path = Path("/store/staging/training/0a1b/attempts/2/assignment.json")
    return Launch("arriero.training.job", path, "0a1b", path, attempt=2, **fields)


def env_of(job):
    return {e["name"]: e for e in job["spec"]["template"]["spec"]["containers"][0]["env"]}


def test_a_job_on_two_nodes_meets_by_a_static_rendezvous(directory):
    job = stamp(
        Templates.read(directory),
        launch(profile="gpu-8x2", nodes=2, facts={"run": "r", "owner": "Ann"}),
        room="training",
        owner={"uid": "1"},
        image="herd/worker:2",
    )
    name = job["metadata"]["name"]
    assert name == "arriero-training-0a1b-2"
    assert "namespace" not in job["metadata"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == name
    assert pod["tolerations"] == [{"key": "a"}, {"key": "b"}]
    main = pod["containers"][0]
    assert main["image"] == "herd/worker:2"
    assert main["args"][:4] == ["python", "-m", "arriero.operations.pod", "arriero.training.job"]
    env = env_of(job)
    assert env["A"]["value"] == "1"
    assert env["B"]["value"] == "2"
    assert env["PET_NNODES"]["value"] == "2"
    assert env["PET_NPROC_PER_NODE"]["value"] == "8"
    assert env["PET_MASTER_ADDR"]["value"] == f"{name}-0.{name}"
    assert "job-completion-index" in env["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    service = meeting_place({**job, "metadata": {**job["metadata"], "uid": "u"}})
    assert service["metadata"]["name"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["metadata"]["ownerReferences"][0]["uid"] == "u"


def test_a_job_on_one_node_needs_no_rendezvous(directory):
    templates = Templates.read(directory)
    one = stamp(templates, launch(), room="merging", owner=None, image="")
    assert meeting_place(one) is None
    assert not [name for name in env_of(one) if name.startswith("PET_")]
    four = stamp(templates, launch(profile="gpu-4"), room="training", owner=None, image="")
    assert env_of(four)["PET_NPROC_PER_NODE"]["value"] == "4"
    assert "PET_NNODES" not in env_of(four)
    assert four["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"


def test_nodes_that_a_profile_does_not_have_are_refused(directory):
    templates = Templates.read(directory)
    assert templates.profile("gpu-8x2", 1).nodes == 2  # `nodes` was left out
    with pytest.raises(InvalidArgument, match="nodes: is 4, and profile 'gpu-8x2' has 2"):
        templates.profile("gpu-8x2", 4)
    with pytest.raises(InvalidArgument, match="profile 'default' has 1"):
        templates.profile("", 2)
    with pytest.raises(InvalidArgument, match="there are: default, gpu-4, gpu-8x2"):
        templates.profile("tpu", 1)


def test_what_is_wrong_in_a_template_is_named(directory):
    (directory / "profiles.yaml").write_text("a: {nodesselector: {}}")
    with pytest.raises(FailedPrecondition, match=r"profiles\.yaml: a\.nodesselector is not known"):
        Templates.read(directory)
    (directory / "profiles.yaml").write_text("a: {nodes: 0}")
    with pytest.raises(FailedPrecondition, match=r"a\.nodes is 0"):
        Templates.read(directory)
    (directory / "profiles.yaml").unlink()
    with pytest.raises(FailedPrecondition, match=r"profiles\.yaml cannot be read"):
        Templates.read(directory)
    (directory / "job.yaml").write_text("kind: Pod")
    with pytest.raises(FailedPrecondition, match=r"job\.yaml is no batch/v1 Job"):
        Templates.read(directory)
