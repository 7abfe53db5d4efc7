"""How images are built, and what the whole system on one host is made of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
IMAGES = {"control", "worker", "llama"}


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def builders(tmp_path: Path) -> Path:
    """A PATH with the tools that the script needs, and no builder yet."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("bash", "env", "dirname", "sed", "git", "cat"):
        found = next(Path(p) / name for p in os.get_exec_path() if (Path(p) / name).exists())
        (place / name).symlink_to(found)
    return place


def builder(place: Path, name: str, works: bool = True) -> None:
    said = place / f"{name}.said"
    script = f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {said}\nexit {0 if works else 1}\n'
    (place / name).write_text(script)
    (place / name).chmod(0o755)


def test_without_a_builder_it_says_what_to_install(builders: Path) -> None:
    done = run("docker/images.sh", PATH=str(builders), HOME="/nowhere")
    assert done.returncode == 1
    assert "apt-get install buildah" in done.stderr
    builder(builders, "docker", works=False)  # the command alone, without its daemon
    done = run("docker/images.sh", PATH=str(builders), HOME="/nowhere", BUILDER="docker")
    assert done.returncode == 1
    assert "needs its daemon" in done.stderr


def test_whichever_builder_works_is_taken(builders: Path, tmp_path: Path) -> None:
    builder(builders, "docker", works=False)
    builder(builders, "buildah")
    done = run(
        "docker/images.sh",
        PATH=str(builders),
        HOME="/nowhere",
        IMAGE_REGISTRY="registry.example.org/team",
        IMAGE_TAG="v9",
        CA=str(tmp_path / "ca.pem"),
        LLAMA_CMAKE_ARGS="-DGGML_CUDA=ON",
        BUILD_ARGS="--build-arg BASE=debian:13-slim",
    )
    assert done.returncode == 0, done.stderr
    calls = (builders / "buildah.said").read_text().splitlines()
    assert [re.search(r"--target (\w+)", call)[1] for call in calls[:3]] == [
        *("control", "worker", "llama")
    ]
    assert "--tag registry.example.org/team/arriero-llama:v9 ." in calls[2]
    assert "--build-arg LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON" in calls[2]
    assert "--build-arg BASE=debian:13-slim" in calls[2]
    assert f"--secret id=ca,src={tmp_path / 'ca.pem'}" in calls[2]
    assert "--isolation chroot" in calls[2]


def test_the_images_pin_what_they_install() -> None:
    said = (ROOT / "docker/pip.sh").read_text()
    assert "--constraint constraints.txt" in said
    control = run(sys.executable, "docker/requirements.py", "orchestrator", "gateway")
    names = {re.split(r"[\[>=]", line)[0] for line in control.stdout.split()}
    assert {"dbos", "psycopg", "starlette", "typer"} <= names
    assert not {"torch", "transformers", "llama-cpp-python"} & names
    wrong = run(sys.executable, "docker/requirements.py", "orchestra")
    assert "no extra 'orchestra'; there are: orchestrator" in wrong.stderr


def test_no_final_stage_comes_from_one_that_builds() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    of = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)}
    for image in IMAGES:
        assert of[image] == f"{image}-base"
        assert of[f"{image}-base"].startswith("${")
        body = text[text.index(f"FROM {image}-base AS {image}\n") :].split("\nFROM ")[0]
        assert "USER 10001:10001" in body
        assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in body
        assert "org.opencontainers.image.version" in body


def test_the_system_on_one_host_is_whole_and_on_loopback_alone() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {
        *("orchestrator", "gateway", "dataset", "training", "merging", "quantization", "replicas")
    }
    orchestrator = services["orchestrator"]["environment"]
    for name, service in services.items():
        environment = service["environment"]
        assert environment.get("ARRIERO_LISTEN", "127.0.0.1:").startswith("127.0.0.1:")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        image = re.search(r"arriero-(\w+):", service["image"])
        assert image is not None
        assert image[1] in IMAGES
        if f"ARRIERO_{name.upper()}_ADDRESS" in orchestrator:
            address = orchestrator[f"ARRIERO_{name.upper()}_ADDRESS"]
            assert address == environment["ARRIERO_LISTEN"]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert all(s["image"].endswith(f"{{IMAGE_TAG:-{version[1]}}}") for s in services.values())
