"""What every test may use: small real models, and homes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

if TYPE_CHECKING:
    from arriero.client import Client
    from arriero.settings import ClientSettings
    from arriero.testing.cluster import FakeCluster
    from arriero.testing.control_plane import ControlPlane
    from arriero.testing.postgres import Postgres
    from arriero.testing.real_cluster import RealCluster

# Two cores: a process that takes both slows every other test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random LLaMA in an HF directory, read-only by agreement."""
    from arriero.testing.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real Kubernetes control plane, of the programs that the environment names."""
    from arriero.testing.control_plane import MISSING, ControlPlane, binaries

    programs = binaries()
    if programs is None:
        pytest.skip(MISSING)
    with ControlPlane(programs, tmp_path_factory.mktemp("control-plane")) as made:
        yield made


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[FakeCluster | RealCluster]:
    """A namespace of a cluster: a real one where there is one, a fake elsewhere."""
    from arriero.testing.cluster import FakeCluster
    from arriero.testing.control_plane import binaries
    from arriero.testing.real_cluster import RealCluster

    fake = request.node.get_closest_marker("fake")
    if binaries() is None:
        with FakeCluster() as made:
            yield made
    elif fake is not None:
        pytest.skip(f"only a fake API server does it: {fake.args[0]}")
    else:
        plane = request.getfixturevalue("control_plane")
        needs = request.node.get_closest_marker("kubernetes")
        if needs is not None and plane.version < needs.args:
            pytest.skip("Kubernetes {}.{} is too old for it".format(*plane.version))
        with RealCluster(plane) as real:
            yield real


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `ARRIERO_HOME` of this test's own."""
    place = tmp_path / "home"
    monkeypatch.setenv("ARRIERO_HOME", str(place))
    monkeypatch.delenv("ARRIERO_ADDRESS", raising=False)
    monkeypatch.delenv("ARRIERO_STORE", raising=False)
    return place


@pytest.fixture(scope="session")
def convert_to_gguf() -> Callable[..., None]:
    """llama.cpp's own converter: `(model, target, outtype)`."""
    source = Path(
        os.environ.get("ARRIERO_LLAMA_CPP") or Path(sys.prefix) / "share/arriero/llama.cpp"
    )

    def convert(model: Path, target: Path, outtype: str) -> None:
        subprocess.run(
            [sys.executable, str(source / "convert_hf_to_gguf.py"), str(model)]
            + ["--outfile", str(target), "--outtype", outtype],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(source / "gguf-py")},
        )

    return convert


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_llama_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    convert_to_gguf: Callable[..., None],
) -> Path:
    """The same model as an F16 GGUF file."""
    target = tmp_path_factory.mktemp("gguf") / "tiny.F16.gguf"
    convert_to_gguf(tiny_llama_dir, target, "f16")
    return target


@contextlib.contextmanager
def _s3_at(directory: Path, address: str = "127.0.0.1") -> Iterator[str]:
    file = directory / "port"
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("s3server.py")), str(file), address],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(file.exists, what="the start of the S3 server")
        yield f"http://127.0.0.1:{file.read_text()}"
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="session")
def s3_at() -> Callable[..., AbstractContextManager[str]]:
    """Runs a server of S3 in a process of its own for a `with` block: its URL on this machine.

    Takes an empty directory, and the address that it listens at (0.0.0.0 for others).
    """
    return _s3_at


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of S3, shared by a session's tests: its URL."""
    with _s3_at(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3_env(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of whoever uses that server, with a cache of this test's own; set here."""
    env = {
        "ARRIERO_STORE_ENDPOINT_URL": s3_server,
        "ARRIERO_STORE_CACHE": str(tmp_path / "cache"),
        "AWS_ACCESS_KEY_ID": "AKIDLLAMA",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-herd",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


@pytest.fixture
def s3_url(s3_env: dict[str, str], tmp_path: Path) -> str:
    """A store that is not there yet, in a bucket of this test's own."""
    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3", endpoint_url=s3_env["ARRIERO_STORE_ENDPOINT_URL"], region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    return f"s3://{name}/models"


class Platform:
    """Arriero as `arriero up` runs it, in a home of its own.

    Args:
        home: `ARRIERO_HOME`.
        allowed: what the services may read.
        extra: more of the environment of services and commands.
    """

    def __init__(self, home: Path, allowed: list[Path], extra: Mapping[str, str] = {}) -> None:
        from arriero.cli.supervisor import Home

        self.home = Home(home)
        self.env = {
            **{k: v for k, v in os.environ.items() if k != "ARRIERO_ADDRESS"},
            "ARRIERO_HOME": str(home),
            "ARRIERO_ALLOWED_PATHS": ":".join(str(path) for path in allowed),
            "OMP_NUM_THREADS": "1",
            **extra,
        }

    def cli(
        self, *arguments: str, check: bool = True, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one `arriero` command as a person would; `extra` goes to its environment."""
        done = subprocess.run(
            [sys.executable, "-m", "arriero.cli", *arguments],
            env={**self.env, "COLUMNS": "160", **extra},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        if check:
            assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, check: bool = True) -> Any:
        """Run one command with `--output json`."""
        return json.loads(self.cli(*arguments, "--output", "json", check=check).stdout)

    def up(self) -> dict[str, Any]:
        """Start all services."""
        state: dict[str, Any] = self.json("up", "--detach")
        return state

    def down(self) -> None:
        """Stop them."""
        self.cli("down")

    def client(self, settings: ClientSettings | None = None) -> Client:
        """A client of this platform."""
        from arriero.client import Client

        state = self.home.running()
        assert state is not None
        return Client(state["address"], settings)

    def service(self, name: str) -> psutil.Process:
        """The process of a service."""
        state = self.home.running()
        assert state is not None
        return psutil.Process(state["services"][name]["pid"])

    def processes(self, module: str = "") -> list[psutil.Process]:
        """Every process that runs with this home in its environment: those of a module alone.

        Args:
            module: the end of its name is enough.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and (
                    process.environ().get("ARRIERO_HOME") == str(self.home.root)
                    and process.status() != psutil.STATUS_ZOMBIE
                    and any(word.endswith(module) for word in process.cmdline())
                ):
                    found.append(process)
        return found


def wait_until(condition: Callable[[], Any], seconds: float = 300, what: str = "it") -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.03)
    return value


@pytest.fixture(scope="session")
def platform_at(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., AbstractContextManager[Platform]]:
    """Runs all services for a `with` block; arguments are more of their environment."""

    @contextlib.contextmanager
    def run(**extra: str) -> Iterator[Platform]:
        base = tmp_path_factory.getbasetemp()
        made = Platform(tmp_path_factory.mktemp("platform") / "home", [base, base.parent], extra)
        made.up()
        try:
            yield made
        finally:
            if made.home.running() is not None:
                made.down()
        assert made.processes() == [], "something outlived `arriero down`"

    return run


@pytest.fixture(scope="module")
def platform(platform_at: Callable[..., AbstractContextManager[Platform]]) -> Iterator[Platform]:
    """All services, shared by a module's tests."""
    with platform_at() as made:
        yield made


@pytest.fixture
def own_platform(
    platform_at: Callable[..., AbstractContextManager[Platform]],
) -> Iterator[Platform]:
    """All services, of one test that breaks them."""
    with platform_at() as made:
        yield made


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server, shared by a session's tests: each makes its own database."""
    from arriero.testing.postgres import MISSING, Postgres, binaries

    if binaries() is None:
        # What a person may leave out, CI may not.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    with Postgres() as made:
        yield made


@pytest.fixture(name="wait_until", scope="session")
def wait_until_fixture() -> Callable[..., Any]:
    """`wait_until`, for test modules."""
    return wait_until


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., Path]:
    """Writes Alpaca rows that a tiny model can chew on to a path."""
    return _write_rows


def _write_rows(path: Path, count: int = 24) -> Path:
    """Alpaca rows that a tiny model can chew on."""
    lines = [
        json.dumps(
            {"instruction": f"Name llama {i}", "input": "", "output": f"llama {i % 5} of the herd"}
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_pipeline(
    tiny_llama_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_rows: Callable[..., Path],
) -> Callable[..., Path]:
    """Writes a pipeline file over the tiny model; stages can be replaced by name."""

    def write(directory: Path, *, name: str = "tiny", **replaced: dict[str, Any] | None) -> Path:
        rows = write_rows(directory / "rows.jsonl")
        stages: dict[str, dict[str, Any] | None] = {
            "base": {"import": {"source": str(tiny_llama_dir), "name": "tiny"}},
            "rows": {
                "dataset": {
                    "sources": [str(rows)],
                    "tokenizer": "base",
                    "template": "alpaca",
                    "cutoff_len": 256,
                    "val_set_size": 4,
                }
            },
            "sft": {
                "train": {
                    "model": "base",
                    "dataset": "rows",
                    "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]},
                    "max_steps": 4,
                    "batch_size": 4,
                    "micro_batch_size": 4,
                    "learning_rate": 0.01,
                    "dtype": "float32",
                }
            },
            "tuned": {"merge": {"model": "base", "adapters": ["sft"]}},
            "quants": {"quantize": {"model": "tuned", "types": ["F16", "Q8_0"]}},
            "best": {"evaluate": {"models": ["quants"], "choose": {"smallest": {"max_kld": 0.5}}}},
            "live": {"deploy": {"model": "best", "endpoint": name, "context": 512}},
        }
        stages.update(replaced)
        body = {
            "name": name,
            "labels": {"team": "herd"},
            "stages": [{"name": key, **work} for key, work in stages.items() if work is not None],
        }
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(body, sort_keys=False))
        return path

    return write
