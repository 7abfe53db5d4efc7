"""An API server, and a client of it."""

import pytest

from arriero.kubernetes import Api
from arriero.testing.cluster import NAMESPACE, FakeCluster


@pytest.fixture
def cluster():
    with FakeCluster() as made:
        yield made


@pytest.fixture
def api(cluster, tmp_path):
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    return Api.connect(NAMESPACE, {"KUBECONFIG": str(config)})
