"""Generate `arriero/v1` from the protos: messages, services and type stubs.

    python protos/generate.py services

A test generates into a temporary directory and compares with what is committed.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write generated code below `target` (which becomes the import root)."""
    target.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(path.relative_to(HERE)) for path in HERE.glob("arriero/v1/*.proto"))
    scripts = Path(sys.executable).parent
    plugins = [
        f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "-I", "third_party"]
        + plugins
        + outputs
        + protos,
        cwd=HERE,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "services").resolve())
