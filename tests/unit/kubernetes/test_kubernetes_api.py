"""Objects over a real HTTP connection: versions, conflicts, watches, and what goes wrong."""

import socket
import threading
import time

import pytest

from arriero import errors
from arriero.kubernetes import Api, Informer
from arriero.kubernetes.api import DEPLOYMENTS, PODS, SCALED_OBJECTS, SERVICES


def service(name="a", **labels):
    return {"metadata": {"name": name, "labels": labels}, "spec": {"ports": []}}


def until(condition, what="it", seconds=300.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.01)
    return value


def test_objects_are_made_read_listed_and_deleted(api):
    made = api.create(SERVICES, service("a", herd="x"))
    api.create(SERVICES, service("b", herd="y"))
    assert made["metadata"]["uid"]
    assert api.get(SERVICES, "a")["metadata"]["labels"] == {"herd": "x"}
    items, version = api.list(SERVICES, labels="herd=y")
    assert [item["metadata"]["name"] for item in items] == ["b"]
    assert int(version) >= int(made["metadata"]["resourceVersion"])
    assert api.delete(SERVICES, "a")
    assert not api.delete(SERVICES, "a")
    assert api.find(SERVICES, "a") is None


def test_failures_are_our_own_errors(api, cluster):
    api.create(SERVICES, service())
    with pytest.raises(errors.AlreadyExists, match='"a" already exists'):
        api.create(SERVICES, service())
    with pytest.raises(errors.NotFound):
        api.get(SERVICES, "b")
    with pytest.raises(errors.InvalidArgument, match=r"metadata\.labels"):
        api.create(SERVICES, service("c", herd="not a label!"))
    said = 'pods "a" is forbidden: exceeded quota: gpus, requested: 4, used: 4, limited: 4'
    cluster.fail("create", "services", 403, "Forbidden", said)
    with pytest.raises(errors.ResourceExhausted, match="used: 4, limited: 4") as caught:
        api.create(SERVICES, service("d"))
    assert caught.value.reason == "QUOTA_EXCEEDED"
    cluster.fail("list", "services", 403, "Forbidden", "services is forbidden: cannot list")
    with pytest.raises(errors.PermissionDenied, match="the chart's Role has to allow it"):
        api.list(SERVICES)
    cluster.fail("list", "services", 503, "ServiceUnavailable", "etcd is away")
    with pytest.raises(errors.Unavailable, match="etcd is away"):
        api.list(SERVICES)


def test_kinds_that_nobody_installed_are_named(api, cluster):
    cluster.unserved.add("keda.sh")
    said = "serves no scaledobjects of keda.sh/v1alpha1; install what defines them"
    with pytest.raises(errors.NotFound, match=said) as caught:
        api.ensure(SCALED_OBJECTS, service(), lambda found, wanted: None)
    assert caught.value.reason == "NO_SUCH_API"
    assert not api.delete(SCALED_OBJECTS, "a")


def test_an_api_that_is_away_is_unavailable(tmp_path, cluster):
    config = cluster.kubeconfig(tmp_path / "config")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        port = taken.getsockname()[1]
        config.write_text(config.read_text().replace(cluster.url, f"http://127.0.0.1:{port}"))
        api = Api.connect("herd", {"KUBECONFIG": str(config)})
        with pytest.raises(errors.Unavailable, match="cannot be reached"):
            api.list(SERVICES)


def test_without_a_cluster_it_is_said_what_is_missing(tmp_path):
    with pytest.raises(errors.FailedPrecondition, match="set KUBECONFIG"):
        Api.connect("herd", {})
    with pytest.raises(errors.FailedPrecondition, match="no access to a cluster"):
        Api.connect("herd", {"KUBECONFIG": str(tmp_path / "none")})


def test_a_change_that_meets_another_is_made_again(api, cluster):
    api.create(SERVICES, service("a", herd="x"))
    tries = []

    def keep(found, wanted):
        tries.append(found["metadata"]["resourceVersion"])
        if len(tries) == 1:  # somebody else is faster, once
            with cluster.change("services", "a") as item:
                item["spec"]["theirs"] = True
        wanted["spec"]["theirs"] = found["spec"].get("theirs", False)

    api.ensure(SERVICES, service("a", herd="y"), keep)

    assert len(tries) == 2
    made = api.get(SERVICES, "a")
    assert made["metadata"]["labels"] == {"herd": "y"}
    assert made["spec"]["theirs"] is True


def test_conflicts_without_end_are_given_up(api, cluster):
    api.create(SERVICES, service())

    def interfere(found, wanted):
        with cluster.change("services", "a") as item:
            item["spec"]["count"] = item["spec"].get("count", 0) + 1

    with pytest.raises(errors.Aborted, match="has been modified"):
        api.ensure(SERVICES, service(), interfere)


def test_scale_changes_replicas_alone(api, cluster):
    labels = {"app": "a"}
    body = {
        "metadata": {"name": "a"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": []}},
        },
    }
    api.create(DEPLOYMENTS, body)
    api.patch(DEPLOYMENTS, "a", {"spec": {"replicas": 3}}, subresource="scale")
    assert cluster.get("deployments", "a")["spec"]["replicas"] == 3
    assert ("patch", "apps", "deployments/scale") in cluster.asked


@pytest.fixture
def followed(api, cluster):
    changes = []
    informer = Informer(api, PODS, "herd=x", changes.append)
    cluster.put("pods", service("old", herd="x"))
    informer.start()
    assert informer.synced(120)
    yield informer, changes
    informer.stop()


def names(informer):
    return [item["metadata"]["name"] for item in informer.all()]


def test_an_informer_follows_what_its_selector_takes(followed, cluster):
    informer, changes = followed
    cluster.put("pods", service("new", herd="x"))
    cluster.put("pods", service("other", herd="y"))
    until(lambda: names(informer) == ["new", "old"], "the new one is seen")
    with cluster.change("pods", "new") as item:
        item["status"] = {"phase": "Running"}
    until(lambda: informer.get("new").get("status"), "its change is seen")
    cluster.remove("pods", "old")
    until(lambda: names(informer) == ["new"], "the end of the old one is seen")
    assert {"new"} in changes
    assert informer.labelled("herd", "x") == informer.all()


def test_a_broken_watch_goes_on_without_a_gap(followed, cluster):
    informer, _ = followed
    for number in range(5):
        cluster.break_watches()
        cluster.put("pods", service(f"pod-{number}", herd="x"))
    until(lambda: len(names(informer)) == 6, "all are seen")


def test_a_version_that_is_forgotten_is_listed_again(followed, cluster):
    informer, _ = followed
    cluster.put("pods", service("before", herd="x"))
    cluster.remove("pods", "old")
    cluster.forget()
    cluster.break_watches()  # the next watch asks for a version that is gone: 410
    until(lambda: names(informer) == ["before"], "everything was listed again")
    cluster.put("pods", service("after", herd="x"))
    until(lambda: names(informer) == ["after", "before"], "it is followed again")


def test_a_cluster_that_comes_late_is_waited_for(api, cluster):
    for _ in range(3):
        cluster.fail("list", "pods", 503, "ServiceUnavailable", "starting")
    informer = Informer(api, PODS, "")
    informer.start()
    assert informer.synced(120)
    informer.stop()


def test_many_threads_may_share_a_client(api, cluster):
    threads = [
        threading.Thread(target=api.create, args=(SERVICES, service(f"s-{i}"))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cluster.all("services")) == 8
