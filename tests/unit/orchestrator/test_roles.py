"""What the orchestrator refuses for what a request holds, beyond its method's role."""

import pytest

from arriero.errors import PermissionDenied
from arriero.orchestrator.service import RunServicer
from arriero.rpc import auth
from arriero.rpc.roles import Role
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2


class _Runs:
    async def create(self, pipeline, *, request_id, owner):
        return pb.Run(id="made", owner=owner)

    def get(self, run_id):
        return pb.Run(id=run_id)


@pytest.fixture
def runner(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 ru runner\n")
    return auth.authenticate([("authorization", "Bearer aaaa1111")], None, auth.TokenFile(file))


async def test_a_runner_starts_pipelines_but_deploys_none(runner):
    assert runner.role is Role.RUNNER
    servicer = RunServicer(_Runs())
    pipeline = pipeline_pb2.Pipeline(name="p", stages=[pipeline_pb2.Stage(name="a")])
    done = await servicer.CreateRun(pb.CreateRunRequest(pipeline=pipeline), None)
    assert done.run.owner == "ru"
    pipeline.stages.add(name="live").deploy.endpoint = "live"
    with pytest.raises(PermissionDenied, match="a pipeline with a deploy stage needs the role dep"):
        await servicer.CreateRun(pb.CreateRunRequest(pipeline=pipeline), None)


async def test_a_runner_waives_no_gate(runner):
    request = pb.RetryRunRequest(id="r", waivers=[pb.GateWaiver(gate="merge.logits", reason="x")])
    with pytest.raises(PermissionDenied, match="waiving a gate"):
        await RunServicer(_Runs()).RetryRun(request, None)
