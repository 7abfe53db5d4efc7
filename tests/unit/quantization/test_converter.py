import json
import os
import shutil
from pathlib import Path

import pytest

from arriero.errors import FailedPrecondition, Preempted, ResourceExhausted
from arriero.quantization import converter


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A llama.cpp source directory; tests write its converter."""
    root = tmp_path / "llama.cpp"
    for name in ("conversion", "gguf-py"):
        (root / name).mkdir(parents=True)
    (root / "convert_hf_to_gguf.py").write_text("")
    (root / "conversion" / "__init__.py").write_text("")
    (root / "conversion" / "base.py").write_text(
        "class ModelBase:\n    pass\n"
        "class TextModel(ModelBase):\n    def get_vocab_base_pre(self, tokenizer): pass\n"
    )
    return root


def run(root: Path, tmp_path: Path, script: str, **options: object) -> Path:
    (root / "convert_hf_to_gguf.py").write_text(script)
    target = tmp_path / "out.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARRIERO_LLAMA_CPP", str(root))
        converter.convert(
            converter.Conversion(tmp_path, "f16", "tiny", {}),
            target,
            log=tmp_path / "converter.log",
            **options,  # type: ignore[arg-type]
        )
    return target


def test_the_setting_names_the_sources(sources: Path) -> None:
    assert converter.locate({"ARRIERO_LLAMA_CPP": str(sources)}) == sources


@pytest.mark.parametrize("missing", ["convert_hf_to_gguf.py", "conversion", "gguf-py"])
def test_missing_sources_point_to_make_setup(sources: Path, missing: str) -> None:
    path = sources / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FailedPrecondition, match="make setup"):
        converter.locate({"ARRIERO_LLAMA_CPP": str(sources)})


def test_a_view_carries_the_template_and_leaves_code_behind(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_llama_dir.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for name in ("tokenization_evil.py", "pytorch_model.bin", "chat_template.jinja"):
        (model / name).write_text("old")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    view = converter.prepare_view(model, tmp_path / "view" / "tiny", "{{ new }}")
    names = {path.name for path in view.iterdir()}
    assert names == {path.name for path in tiny_llama_dir.iterdir()}
    config = json.loads((view / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ new }}"
    assert config["bos_token"] == "<s>"
    assert (view / "model.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_without_a_template_the_models_own_stays(tiny_llama_dir: Path, tmp_path: Path) -> None:
    view = converter.prepare_view(tiny_llama_dir, tmp_path / "view", None)
    assert (view / "tokenizer_config.json").resolve() == tiny_llama_dir / "tokenizer_config.json"


def test_the_converter_gets_no_secrets_and_no_network(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_xyzzy")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "xyzzy")
    script = (
        "import json, os, sys\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w')"
        ".write(json.dumps([dict(os.environ), sys.argv]))\n"
    )
    environment, arguments = json.loads(run(sources, tmp_path, script).read_text())
    assert "xyzzy" not in json.dumps(environment)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(sources / "gguf-py")
    assert arguments[1:] == [
        str(tmp_path), "--outfile", str(tmp_path / "out.gguf"), "--outtype", "f16",
        "--model-name", "tiny",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (
            "print('WARNING:hf-to-gguf:** chkhsh:  ' + 'ab' * 32)\n"
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update it')",
            FailedPrecondition,
            "fingerprint abababababababab",
        ),
        (
            "import sys\nprint('ERROR:hf-to-gguf:Model OddForCausalLM is not supported')\n"
            "sys.exit(1)",
            FailedPrecondition,
            "architecture OddForCausalLM",
        ),
        ("raise ValueError('no tensor blk.7')", FailedPrecondition, "ValueError: no tensor blk.7"),
        ("raise MemoryError", ResourceExhausted, "out of memory"),
        ("import os\nos.kill(os.getpid(), 9)", ResourceExhausted, "signal 9"),
        ("pass", FailedPrecondition, "without writing"),
    ],
)
def test_a_refusal_is_explained_without_a_traceback(
    sources: Path, tmp_path: Path, script: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        run(sources, tmp_path, script)
    assert "Traceback" not in str(caught.value)


def test_a_check_that_raises_kills_the_converter(sources: Path, tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )

    def check() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Preempted("told to leave")

    with pytest.raises(Preempted):
        run(sources, tmp_path, script, check=check)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_progress_is_what_was_written(sources: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "file = open(sys.argv[sys.argv.index('--outfile') + 1], 'wb')\n"
        "file.write(bytes(1000)); file.flush()\n"
        "import pathlib\n"
        f"while not pathlib.Path({str(tmp_path / 'seen')!r}).exists(): time.sleep(0.01)\n"
    )
    sizes: list[int] = []

    def seen(size: int) -> None:
        sizes.append(size)
        (tmp_path / "seen").touch()

    run(sources, tmp_path, script, on_progress=seen)
    assert set(sizes) <= {0, 1000}
    assert sizes
