"""Build llama-cpp-python from its sdist, once, portably, and take the converter from it.

Used by `make setup` and by the images. The wheel is cached by version, flags,
Python and machine (pip's own cache does not look at flags). The converter and
the library therefore are the same llama.cpp, always.

    python docker/build_llama.py --python .venv/bin/python --version 0.3.36

`LLAMA_CMAKE_ARGS` adds CMake flags (`-DGGML_CUDA=ON`, `-DGGML_METAL=ON`,
`-DGGML_VULKAN=ON`, `-DGGML_AVX512=ON`); later ones win.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

# GGML_NATIVE stays off: GCC 12 miscompiles ggml's AMX code, and a wheel that
# was built here must run on other machines too.
PORTABLE = {
    "x86_64": (
        "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON "
        "-DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
    ),
}
# OpenMP spins at barriers when cores are shared; the engine brings a threadpool.
COMMON = (
    "-DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
)
# What of llama.cpp's sources is needed at run time.
CONVERTER = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
_STEP = re.compile(r"\[(\d+)/(\d+)\]")


def cmake_args() -> str:
    """The flags of this build."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    portable = PORTABLE.get(machine, "-DGGML_NATIVE=OFF")
    return " ".join(f"{portable} {COMMON} {os.environ.get('LLAMA_CMAKE_ARGS', '')}".split())


def cache_dir() -> Path:
    """Where wheels are kept between set-ups."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arriero" / "llama"


def bar(done: int, total: int, started: float) -> None:
    """One line that overwrites itself on a terminal; every tenth part elsewhere."""
    elapsed = int(time.monotonic() - started)
    filled = 30 * done // max(total, 1)
    text = f"  building llama.cpp [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}  {elapsed}s"
    if sys.stdout.isatty():
        print(f"\r{text}", end="\n" if done == total else "", flush=True)
    elif done == total or done % max(total // 10, 1) == 0:
        print(text, flush=True)


def download(python: str, version: str, into: Path) -> Path:
    """The sdist, from the package index."""
    found = list(into.glob(f"llama_cpp_python-{version}.tar.gz"))
    if found:
        return found[0]
    print(f"  fetching the source of llama-cpp-python {version}", flush=True)
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        subprocess.run(
            [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            + ["--dest", temporary, f"llama-cpp-python=={version}"],
            check=True,
        )
        made = next(Path(temporary).glob("*.tar.gz"))
        target = into / f"llama_cpp_python-{version}.tar.gz"
        made.replace(target)
    return target


def build(python: str, sdist: Path, args: str, into: Path) -> Path:
    """The wheel, built unless it is cached."""
    tag = subprocess.run(
        [python, "-c", "import sys; print(f'{sys.version_info[0]}{sys.version_info[1]}')"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    key = hashlib.sha256(
        f"{sdist.name} {args} {tag} {platform.system()} {platform.machine()}".encode()
    ).hexdigest()[:16]
    home = into / key
    found = list(home.glob("*.whl"))
    if found:
        print(f"  llama-cpp-python: using the wheel built before ({home.name})", flush=True)
        return found[0]
    print("  llama-cpp-python: compiling, once; three to ten minutes on two cores", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    log = home / "build.log"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=into) as temporary, log.open("w") as sink:
        process = subprocess.Popen(
            [python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
            + ["--wheel-dir", temporary, str(sdist)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "CMAKE_ARGS": args},
        )
        assert process.stdout is not None
        for line in process.stdout:
            sink.write(line)
            step = _STEP.search(line)
            if step and int(step[2]) > 20:
                bar(int(step[1]), int(step[2]), started)
        if process.wait() != 0:
            sink.flush()
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            sys.exit(f"\nThe build failed; its log is {log}. It ends with:\n{tail}")
        made = next(Path(temporary).glob("*.whl"))
        target = home / made.name
        made.replace(target)
    return target


def install_converter(python: str, sdist: Path) -> Path:
    """Put llama.cpp's converter where the quantization service looks for it."""
    prefix = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    target = Path(prefix) / "share" / "arriero" / "llama.cpp"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        with tarfile.open(sdist) as archive:
            root = archive.getnames()[0].split("/")[0] + "/vendor/llama.cpp/"
            wanted = [
                member
                for member in archive.getmembers()
                if member.name.startswith(root)
                and member.name[len(root) :].split("/")[0] in CONVERTER
            ]
            # Pythons before 3.11.4 know no filters; the archive is the index's own.
            safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(temporary, members=wanted, **safe)
        shutil.rmtree(target, ignore_errors=True)
        (Path(temporary) / root).rename(target)
    return target


def main() -> None:
    """Build or reuse, install, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter to install into")
    parser.add_argument("--version", required=True, help="of llama-cpp-python")
    parser.add_argument("--keep", type=Path, help="directory that gets a copy of the wheel")
    options = parser.parse_args()
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    args = cmake_args()
    sdist = download(options.python, options.version, cache)
    wheel = build(options.python, sdist, args, cache)
    subprocess.run(
        [options.python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
        + [str(wheel)],
        check=True,
    )
    install_converter(options.python, sdist)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        shutil.copy2(wheel, options.keep)
    print("  llama.cpp: library and converter installed", flush=True)


if __name__ == "__main__":
    main()
