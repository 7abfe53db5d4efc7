"""What a pod's status says, in words that help."""

import pytest

from arriero.kubernetes import names, pods


def pod(phase="Pending", *, waiting=None, conditions=(), terminated=None, **metadata):
    state = {"name": "main", "image": "herd/worker:1", "state": {}}
    if waiting:
        state["state"]["waiting"] = waiting
    if terminated:
        state["state"]["terminated"] = terminated
    status = {"phase": phase, "conditions": list(conditions), "containerStatuses": [state]}
    return {"metadata": {"name": "p", **metadata}, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("found", "reason", "said", "heals"),
    [
        (
            pod(waiting={"reason": "ImagePullBackOff", "message": "not found"}),
            "IMAGE_PULL",
            "herd/worker:1 cannot be pulled",
            False,
        ),
        (
            pod(
                waiting={
                    "reason": "CreateContainerConfigError",
                    "message": 'secret "hub" not found',
                }
            ),
            "POD_CONFIG",
            'secret "hub" not found',
            False,
        ),
        (
            pod(
                conditions=[
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ]
            ),
            "UNSCHEDULABLE",
            "3 Insufficient nvidia.com/gpu",
            True,
        ),
        (
            pod(
                conditions=[
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": 'persistentvolumeclaim "models" not found',
                    }
                ]
            ),
            "UNSCHEDULABLE",
            'persistentvolumeclaim "models" not found',
            True,
        ),
    ],
)
def test_why_a_pod_does_not_start(found, reason, said, heals):
    trouble = pods.trouble(found)
    assert (trouble.reason, trouble.heals) == (reason, heals)
    assert said in trouble.message


def test_a_missing_volume_is_told_by_events_alone():
    assert pods.trouble(pod()) is None
    event = {
        "type": "Warning",
        "reason": "FailedMount",
        "message": 'MountVolume.SetUp failed for volume "tls": secret "tls" not found',
    }
    assert 'secret "tls" not found' in pods.trouble(pod(), [event]).message


def test_an_image_that_is_tried_again_later_says_why():
    found = pod(waiting={"reason": "ImagePullBackOff", "message": 'Back-off pulling image "a:1"'})
    found["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
    assert pods.making(found)
    said = 'Failed to pull image "a:1": failed to resolve reference: connection refused'
    events = [
        {"type": "Warning", "reason": "Failed", "message": said, "lastTimestamp": "2026-01-01T1"},
        {"type": "Warning", "reason": "Failed", "message": "Error: ImagePullBackOff"},
    ]
    assert said in pods.trouble(found, events).message
    assert "Back-off" in pods.trouble(found).message


def test_a_crash_loop_says_how_often_and_with_what():
    found = pod("Running", waiting={"reason": "CrashLoopBackOff"})
    found["status"]["containerStatuses"][0] |= {
        "restartCount": 4,
        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
    }
    assert "4 times" in pods.trouble(found).message
    assert "OOMKilled" in pods.trouble(found).message
    assert pods.restarts(found) == 4


def test_evictions_and_kills_for_memory_are_told_apart():
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "default-scheduler: preempting to accommodate a higher priority pod.",
    }
    assert pods.evicted(pod("Failed", conditions=[condition])).startswith("PreemptionByScheduler: ")
    killed = pod("Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
    assert pods.evicted(killed) == ""
    assert pods.oom_killed(killed)
    assert pods.exit_code(killed) == 137


def test_a_controller_that_may_make_no_pods_says_why():
    said = 'Error creating: pods "a-0" is forbidden: exceeded quota: gpus, used: 4, limited: 4'
    refused = pods.refused([{"reason": "FailedCreate", "message": said}])
    assert refused.reason == "QUOTA_EXCEEDED"
    assert "used: 4, limited: 4" in refused.message
    assert pods.refused([{"reason": "SuccessfulCreate", "type": "Normal"}]) is None


@pytest.mark.parametrize("text", ["zh", "a.b_c", "UPPER", "1st", "x" * 80, "-", "ünï"])
def test_names_are_labels_and_stay_apart(text):
    made = names.name("arriero", text)
    assert len(made) <= 52
    assert made == made.lower()
    assert made[0].isalpha()
    assert not made.endswith("-")
    assert names.name("arriero", text + "2") != made
    assert len(names.label(text)) <= 63
