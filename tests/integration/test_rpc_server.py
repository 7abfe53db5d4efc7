"""A real server and real channels over loopback: errors, auth, TLS, health, drain."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from arriero import errors, rpc
from arriero.rpc import channel as rpc_channel
from arriero.rpc import trace
from arriero.settings import ClientSettings, ServerSettings
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as pb_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Runs(pb_grpc.RunServiceServicer):
    """Answers by the id it is asked for."""

    def __init__(self):
        self.calls = 0
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cleaned_up = asyncio.Event()

    async def GetRun(self, request, context):
        self.calls += 1
        if request.id == "wrong":
            raise errors.InvalidArgument.field("id", "'wrong' is no run id")
        if request.id == "defect":
            raise KeyError("/secret/place")
        if request.id == "away" and self.calls < 3:
            raise errors.Unavailable("restarting")
        if request.id == "upstream":
            raise _UpstreamError()
        if request.id == "slow":
            self.entered.set()
            await self.go_on.wait()
        if request.id == "big":
            return pb.GetRunResponse(run=pb.Run(id="x" * (8 << 20)))
        return pb.GetRunResponse(
            run=pb.Run(id=request.id, owner=rpc.caller(), etag=trace.current_id())
        )

    async def CreateRun(self, request, context):
        return pb.CreateRunResponse()

    async def CancelRun(self, request, context):
        self.calls += 1
        return pb.CancelRunResponse()

    async def WatchRun(self, request, context):
        try:
            yield pb.WatchRunResponse(run=pb.Run(id=request.id))
            if request.id == "wrong":
                raise errors.NotFound("no such run")
            await asyncio.sleep(60)
        finally:
            self.cleaned_up.set()


class _UpstreamError(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAUTHENTICATED

    def details(self):
        return "another service did not like our token"

    def trailing_metadata(self):
        return ()


@contextlib.asynccontextmanager
async def serving(settings=ServerSettings(), *, ready=True):  # noqa: B008
    server = rpc.Server(settings, name="test")
    server.runs = Runs()
    server.add(server.runs, pb_grpc.add_RunServiceServicer_to_server, "arriero.v1.RunService")
    await server.start()
    if ready:
        await server.set_ready(True)
    try:
        yield server
    finally:
        server.runs.go_on.set()
        await server.stop(0)


@contextlib.asynccontextmanager
async def calling(server, settings=None):
    async with rpc.connect(server.address, settings) as opened:
        yield pb_grpc.RunServiceStub(opened)


async def _get(stub, run_id, **kwargs):
    with rpc.translated():
        return (await stub.GetRun(pb.GetRunRequest(id=run_id), **kwargs)).run


async def _health(address, service):
    async with grpc.aio.insecure_channel(address) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def _reflected(opened):
    stub = reflection_pb2_grpc.ServerReflectionStub(opened)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        return {service.name for service in answer.list_services_response.service}


# errors


async def test_errors_reach_the_caller_as_they_were_raised():
    async with serving() as server, calling(server) as stub:
        with pytest.raises(errors.InvalidArgument) as caught:
            await _get(stub, "wrong")
        assert caught.value.violations == (errors.FieldViolation("id", "'wrong' is no run id"),)


async def test_the_sync_channel_translates_alike():
    async with serving() as server:

        def call():
            with rpc.connect_sync(server.address) as opened, rpc.translated():
                pb_grpc.RunServiceStub(opened).GetRun(pb.GetRunRequest(id="wrong"))

        with pytest.raises(errors.InvalidArgument, match="no run id"):
            await asyncio.to_thread(call)


async def test_a_defect_shows_an_incident_and_no_traceback(caplog):
    async with serving() as server, calling(server) as stub:
        with pytest.raises(errors.Internal) as caught:
            await _get(stub, "defect")
    assert caught.value.metadata["incident"] in caught.value.message
    assert "secret" not in caught.value.message
    assert caught.value.metadata["incident"] in caplog.text


async def test_our_own_bad_credentials_elsewhere_are_not_the_callers_fault():
    async with serving() as server, calling(server) as stub:
        with pytest.raises(errors.Internal, match="incident"):
            await _get(stub, "upstream")


async def test_a_stream_breaks_off_with_its_error_after_what_it_sent():
    async with serving() as server, calling(server) as stub:
        call = stub.WatchRun(pb.WatchRunRequest(id="wrong"))
        assert (await call.read()).run.id == "wrong"
        with pytest.raises(errors.NotFound), rpc.translated():
            await call.read()


async def test_what_a_service_does_not_do_is_unimplemented():
    async with serving() as server, calling(server) as stub:
        with pytest.raises(errors.Unimplemented), rpc.translated():
            await stub.RetryRun(pb.RetryRunRequest(id="x"))


async def test_a_cancelled_stream_lets_its_handler_clean_up():
    async with serving() as server, calling(server) as stub:
        call = stub.WatchRun(pb.WatchRunRequest(id="r"))
        await call.read()
        call.cancel()
        await asyncio.wait_for(server.runs.cleaned_up.wait(), 120)


# retries, deadlines, sizes


async def test_idempotent_calls_are_sent_again_after_unavailable():
    async with serving() as server, calling(server) as stub:
        assert (await _get(stub, "away")).id == "away"
        assert server.runs.calls == 3


async def test_unary_calls_have_a_deadline_by_default():
    settings = ClientSettings(timeout_seconds=0.2)
    async with serving() as server, calling(server, settings) as stub:
        with pytest.raises(errors.DeadlineExceeded):
            await _get(stub, "slow")


async def test_messages_of_some_megabytes_pass():
    async with serving() as server, calling(server) as stub:
        assert len((await _get(stub, "big")).id) == 8 << 20


# trace and audit


async def test_the_trace_of_the_caller_is_the_trace_of_the_handler():
    async with serving() as server, calling(server) as stub:
        trace_id = trace.adopt(None)
        assert (await _get(stub, "r")).etag == trace_id


async def test_each_change_leaves_one_audit_line(caplog):
    with caplog.at_level(logging.INFO, logger="arriero.audit"):
        async with serving() as server, calling(server) as stub:
            await _get(stub, "r")
            await stub.CancelRun(pb.CancelRunRequest(id="run-1"))
    lines = [record for record in caplog.records if record.name == "arriero.audit"]
    assert len(lines) == 1
    assert lines[0].method == "/arriero.v1.RunService/CancelRun"
    assert (lines[0].subject, lines[0].code) == ("local", "OK")
    assert lines[0].request == {"id": "run-1"}


async def test_what_only_asks_what_would_change_leaves_no_audit_line(caplog):
    with caplog.at_level(logging.INFO, logger="arriero.audit"):
        async with serving() as server, calling(server) as stub:
            await stub.CreateRun(pb.CreateRunRequest(validate_only=True))
            await stub.CreateRun(pb.CreateRunRequest(request_id="once"))
    lines = [record for record in caplog.records if record.name == "arriero.audit"]
    assert [line.request for line in lines] == [{"request_id": "once"}]


# tokens


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 ana\n")
    return ServerSettings(token_file=file)


async def test_a_token_names_the_caller(tokens):
    settings = ClientSettings(token="aaaa1111")
    async with serving(tokens) as server, calling(server, settings) as stub:
        assert (await _get(stub, "r")).owner == "ana"


async def test_a_role_that_is_too_low_may_read_and_no_more(tmp_path, caplog):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 vi viewer\nbbbb2222 ru runner\n")
    async with serving(ServerSettings(token_file=file)) as server:
        async with calling(server, ClientSettings(token="aaaa1111")) as stub:
            assert (await _get(stub, "r1")).id == "r1"
            caplog.set_level(logging.INFO, "arriero.audit")
            refused = pytest.raises(errors.PermissionDenied, match="runner, vi is a viewer")
            with refused, rpc.translated():
                await stub.CancelRun(pb.CancelRunRequest(id="r1"))
            assert server.runs.calls == 1  # the reading one
        async with calling(server, ClientSettings(token="bbbb2222")) as stub:
            await stub.CancelRun(pb.CancelRunRequest(id="r1"))
    line = next(r for r in caplog.records if r.name == "arriero.audit")
    assert (line.subject, line.code) == ("vi", "PERMISSION_DENIED")


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_a_missing_or_wrong_token_is_unauthenticated(tokens, token):
    async with serving(tokens) as server, calling(server, ClientSettings(token=token)) as stub:
        with pytest.raises(errors.Unauthenticated, match="ARRIERO_TOKEN"):
            await _get(stub, "r")
        with pytest.raises(errors.Unauthenticated), rpc.translated():
            async for _ in stub.WatchRun(pb.WatchRunRequest(id="r")):
                pass
        assert server.runs.calls == 0


async def test_health_needs_no_token_and_reflection_does(tokens):
    async with serving(tokens) as server:
        assert await _health(server.address, "ready") == SERVING
        async with rpc.connect(server.address) as opened:
            with pytest.raises(errors.Unauthenticated), rpc.translated():
                await _reflected(opened)
        async with rpc.connect(server.address, ClientSettings(token="aaaa1111")) as opened:
            assert "arriero.v1.RunService" in await _reflected(opened)


# health


async def test_live_comes_with_the_server_and_ready_when_told():
    settings = ServerSettings(health_listen="127.0.0.1:0")
    async with serving(settings, ready=False) as server:
        for address in (server.address, server.health_address):
            assert await _health(address, "live") == SERVING
            assert await _health(address, "ready") == NOT_SERVING
        await server.set_ready(True)
        for name in ("ready", "", "arriero.v1.RunService"):
            assert await _health(server.health_address, name) == SERVING
        assert await asyncio.to_thread(rpc_channel.check_health, server.address)
        await server.set_ready(False)
        assert not await asyncio.to_thread(rpc_channel.check_health, server.address)
    assert not await asyncio.to_thread(rpc_channel.check_health, server.address)


async def test_the_plain_port_serves_health_alone():
    settings = ServerSettings(health_listen="127.0.0.1:0")
    async with serving(settings) as server, rpc.connect(server.health_address) as opened:
        with pytest.raises(errors.Unimplemented):
            await _get(pb_grpc.RunServiceStub(opened), "r")


# drain


async def test_a_draining_server_says_so_and_finishes_what_runs():
    async with serving() as server, calling(server) as stub:
        slow = asyncio.create_task(_get(stub, "slow"))
        await server.runs.entered.wait()
        health = health_pb2_grpc.HealthStub(rpc.connect(server.address))
        news = health.Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert (await news.read()).status == SERVING
        watch = stub.WatchRun(pb.WatchRunRequest(id="r"))
        await watch.read()

        stopping = asyncio.create_task(server.stop(10))
        assert (await news.read()).status == NOT_SERVING
        with pytest.raises(errors.Unavailable, match="stopping"), rpc.translated():
            await watch.read()
        assert not slow.done()
        server.runs.go_on.set()
        assert (await slow).id == "slow"
        await asyncio.wait_for(stopping, 120)


async def test_calls_that_outlast_the_drain_are_cut():
    async with serving() as server, calling(server) as stub:
        slow = asyncio.create_task(_get(stub, "slow", timeout=120))
        await server.runs.entered.wait()
        await asyncio.wait_for(server.stop(0.3), 120)
        with pytest.raises(errors.ArrieroError):
            await slow


# where it listens


async def test_plain_text_beyond_loopback_does_not_start():
    with pytest.raises(errors.FailedPrecondition, match="TLS"):
        await rpc.Server(ServerSettings(listen="0.0.0.0:0"), name="test").start()
    async with serving(ServerSettings(listen="0.0.0.0:0", insecure=True)) as server:
        assert server.port > 0


async def test_a_taken_port_is_refused():
    async with serving() as server:
        second = rpc.Server(ServerSettings(listen=server.address), name="second")
        with pytest.raises(errors.FailedPrecondition, match="taken"):
            await second.start()


async def test_where_nobody_listens_the_address_is_told_and_why():
    with socket.create_server(("127.0.0.1", 0)) as once:
        address = "{}:{}".format(*once.getsockname())
    async with rpc.connect(address) as opened:
        nobody = pytest.raises(errors.Unavailable, match=f"^nobody answers at {address}: \\w")
        with nobody, rpc.translated():
            await pb_grpc.RunServiceStub(opened).CancelRun(pb.CancelRunRequest(id="r"), timeout=20)


async def test_a_unix_socket_serves(tmp_path):
    async with serving(ServerSettings(listen=f"unix:{tmp_path}/s")) as server:
        assert server.port == 0
        async with calling(server) as stub:
            assert (await _get(stub, "r")).id == "r"


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, a server certificate for localhost, and a client certificate for `trainer`."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    directory = tmp_path_factory.mktemp("tls")

    def run(*args):
        subprocess.run([openssl, *args], cwd=directory, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for ca in ("ca", "other-ca"):
        run("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}")
    for name, alt in (("server", "DNS:localhost,IP:127.0.0.1"), ("trainer", "DNS:trainer")):
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (directory / "ext").write_text(f"subjectAltName={alt}\n")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-extfile", "ext")  # fmt: skip
    return directory


def _tls(certificates, **more):
    return ServerSettings(
        tls_cert=certificates / "server.pem", tls_key=certificates / "server.key", **more
    )


async def test_tls_serves_those_who_believe_the_ca(certificates, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 ana\n")
    async with serving(_tls(certificates, token_file=file, listen="0.0.0.0:0")) as server:
        address = f"localhost:{server.port}"
        settings = ClientSettings(token="aaaa1111", tls_ca=certificates / "ca.pem")
        async with rpc.connect(address, settings) as opened:
            assert (await _get(pb_grpc.RunServiceStub(opened), "r")).owner == "ana"

        def sync():
            with rpc.connect_sync(address, settings) as opened:
                return pb_grpc.RunServiceStub(opened).GetRun(pb.GetRunRequest(id="r")).run.owner

        assert await asyncio.to_thread(sync) == "ana"
        for wrong in (ClientSettings(), ClientSettings(tls_ca=certificates / "other-ca.pem")):
            async with rpc.connect(address, wrong) as opened:
                with pytest.raises(errors.ArrieroError):
                    await _get(pb_grpc.RunServiceStub(opened), "r", timeout=1)


async def test_mtls_names_the_caller_and_refuses_strangers(certificates):
    settings = _tls(certificates, tls_client_ca=certificates / "ca.pem")
    async with serving(settings) as server:
        address = f"localhost:{server.port}"
        ca = certificates / "ca.pem"
        mine = ClientSettings(
            tls_ca=ca,
            tls_cert=certificates / "trainer.pem",
            tls_key=certificates / "trainer.key",
        )
        async with rpc.connect(address, mine) as opened:
            assert (await _get(pb_grpc.RunServiceStub(opened), "r")).owner == "trainer"
        async with rpc.connect(address, ClientSettings(tls_ca=ca)) as opened:
            with pytest.raises(errors.Unavailable):
                await _get(pb_grpc.RunServiceStub(opened), "r", timeout=120)


async def test_a_renewed_certificate_is_shown_without_a_restart(certificates, tmp_path):
    def install(ca):
        """A certificate of that CA, as the kubelet puts it there: key first, then the other."""
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        for command in (
            ["req", *key, "-keyout", "new.key", "-out", "new.csr", "-subj", "/CN=localhost"],
            ["x509", "-req", "-in", "new.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key",
             "-CAcreateserial", "-out", "new.pem", "-extfile", "names"],
        ):  # fmt: skip
            subprocess.run(["openssl", *command], cwd=certificates, check=True, capture_output=True)
        shutil.copy(certificates / "new.key", tmp_path / "tls.key")
        yield
        shutil.copy(certificates / "new.pem", tmp_path / "tls.crt")

    (certificates / "names").write_text("subjectAltName=DNS:localhost\n")
    for _ in install("ca"):
        pass
    settings = ServerSettings(tls_cert=tmp_path / "tls.crt", tls_key=tmp_path / "tls.key")
    async with serving(settings) as server:

        async def believed(ca):
            told = ClientSettings(tls_ca=certificates / f"{ca}.pem")
            async with rpc.connect(f"localhost:{server.port}", told) as opened:
                try:
                    await _get(pb_grpc.RunServiceStub(opened), "r", timeout=120)
                except errors.Unavailable:
                    return False
            return True

        assert await believed("ca")
        halves = install("other-ca")
        next(halves)
        assert await believed("ca")  # half of it is no certificate: the old one holds
        next(halves, None)
        assert await believed("other-ca")
        assert not await believed("ca")


async def test_a_certificate_of_another_key_is_refused(certificates):
    settings = ServerSettings(
        tls_cert=certificates / "server.pem", tls_key=certificates / "trainer.key"
    )
    with pytest.raises(errors.InvalidArgument, match="do not belong together"):
        await rpc.Server(settings, name="test").start()


async def test_half_a_tls_setting_is_refused(certificates):
    for settings, field in [
        (ServerSettings(tls_cert=certificates / "server.pem"), "tls_key"),
        (ServerSettings(tls_client_ca=certificates / "ca.pem"), "tls_client_ca"),
        (ServerSettings(tls_cert=certificates / "ext", tls_key=certificates / "ext"), "tls_key"),
    ]:
        with pytest.raises(errors.InvalidArgument) as caught:
            await rpc.Server(settings, name="test").start()
        assert caught.value.violations[0].field == field


# processes

SERVICE = textwrap.dedent(
    """
    import asyncio
    from arriero import rpc
    from arriero.settings import ServerSettings

    async def main():
        rpc.logs.configure("test")
        server = rpc.Server(ServerSettings.from_env(), name="test")
        await server.start()
        server.set_ready(True)
        await server.run_until_signal()

    asyncio.run(main())
    """
)


def _start(tmp_path, **env):
    address_file = tmp_path / "address"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        env={**os.environ, "ARRIERO_ADDRESS_FILE": str(address_file), **env},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not address_file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, address_file.read_text().strip()


def _wait_ready(address):
    deadline = time.monotonic() + 300
    while not rpc_channel.check_health(address):
        assert time.monotonic() < deadline


def test_sigterm_ends_a_service_with_success_and_json_lines(tmp_path):
    process, address = _start(tmp_path)
    try:
        _wait_ready(address)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    messages = [json.loads(line)["message"] for line in stderr.splitlines()]
    assert f"test listens on {address}" in messages
    assert messages[-1] == "test stopped"


def test_a_service_leaves_when_its_supervisor_is_gone(tmp_path):
    supervisor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        known = rpc.parent.ProcessId.of(supervisor.pid)
        process, address = _start(
            tmp_path,
            ARRIERO_PARENT_PID=str(known.pid),
            ARRIERO_PARENT_START=known.start,
        )
        try:
            _wait_ready(address)
            supervisor.kill()
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    finally:
        supervisor.kill()
        supervisor.communicate()
    assert process.returncode == 0
    assert "is gone" in stderr


async def test_a_connection_whose_first_packet_is_lost_is_waited_for():
    """It is sent again after a second: here the server is out of reach for as long."""
    async with serving() as server:
        host, port = server.address.split(":")
        open_tasks = []

        async def late(reader, writer):
            open_tasks.append(asyncio.current_task())
            await asyncio.sleep(1.2)
            inward, outward = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_copy(reader, outward), _copy(inward, writer))

        relay = await asyncio.start_server(late, "127.0.0.1", 0)
        address = f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        async with rpc.connect(address, retries=False) as opened:
            assert (await _get(pb_grpc.RunServiceStub(opened), "r-1")).id == "r-1"
        relay.close()
        for task in open_tasks:
            task.cancel()
    assert len(open_tasks) == 1


async def _copy(source, target):
    while data := await source.read(1 << 16):
        target.write(data)
        await target.drain()
