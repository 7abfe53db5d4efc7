"""Runs in a child process: llama.cpp's converter, with its last step replaced.

Responsibility: let the official script do everything up to writing the file,
then write the whole file, or its outline: the header alone, in a sparse file of
full length, and where each of its tensors comes from. Knows nothing of Arriero:
it runs without secrets, beside code that others wrote.

    python -m arriero.quantization.official REQUEST

REQUEST is a JSON file with `script` and `arguments` (the converter's own),
`metadata` (strings to add) and `outline` (a file to write where tensors come
from, or null to write the whole GGUF file).
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.quantization.pretokenizers import recognize

QUANTIZED_BY = "Arriero"


def main() -> None:
    """Run the converter as its own `__main__`.

    A third of what a process like this takes is looking for garbage among the many
    objects that imports make and keep, and freeing them one by one at the end.
    """
    gc.disable()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script = Path(request["script"])
    # What the interpreter does for a script that is called by its name.
    sys.path.insert(0, str(script.parent))
    _leave_torch_out_of_transformers()
    base = importlib.import_module("conversion.base")
    gc.freeze()
    gc.enable()

    def write(model: Any) -> None:
        _write(model, request)

    base.ModelBase.write = write
    _recognize_extended(base.TextModel)
    sys.argv = [str(script), *request["arguments"]]
    runpy.run_path(str(script), run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the files are closed


def _leave_torch_out_of_transformers() -> None:
    """Have transformers read configurations and tokenizers alone.

    Where it finds torch, reading a `config.json` imports all that models run on:
    half of the time that this process takes. The converter uses torch by itself.
    """
    find = importlib.util.find_spec

    def find_but_torch(name: str, package: str | None = None) -> Any:
        return None if name == "torch" else find(name, package)

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    importlib.util.find_spec = find_but_torch
    try:
        from transformers.utils import is_torch_available

        is_torch_available()  # remembered
    finally:
        importlib.util.find_spec = find


def _recognize_extended(text_model: Any) -> None:
    """Know a BPE tokenizer by its pre-tokenizer where its fingerprint is not listed.

    The converter's fingerprint is a hash of token ids, which tokens added to the
    vocabulary change; how text is split before BPE stays as the base had it.
    """
    listed = text_model.get_vocab_base_pre

    def get_vocab_base_pre(model: Any, tokenizer: Any) -> str:
        try:
            return str(listed(model, tokenizer))
        except NotImplementedError:
            found = recognize(json.loads(tokenizer.backend_tokenizer.to_str()))
            if found is None:
                raise
            print(f"WARNING: unlisted BPE vocabulary with the pre-tokenizer of {found}")
            return found

    text_model.get_vocab_base_pre = get_vocab_base_pre


def _write(model: Any, request: dict[str, Any]) -> None:
    origins = _Origins(model)
    rope = model.rope_parameters.get("full_attention", model.rope_parameters)
    if rope.get("rope_type") == "yarn":
        # transformers' default; the converter expects it to be written out.
        native = model.find_hparam(["max_position_embeddings"], optional=True)
        rope.setdefault("original_max_position_embeddings", native)
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    writer = model.gguf_writer
    for key, value in request["metadata"].items():
        writer.add_string(key, value)
    writer.add_string("general.quantized_by", QUANTIZED_BY)
    if rope.get("rope_type") == "dynamic":
        # llama.cpp has no such scaling: within the native context it changes nothing,
        # and beyond it whoever serves the file needs the factor.
        writer.add_string("arriero.rope.type", "dynamic")
        writer.add_float32("arriero.rope.factor", float(rope.get("factor", 1.0)))
    writer.write_header_to_file(path=model.fname_out)
    writer.write_kv_data_to_file()
    if request["outline"] is None:
        writer.write_tensors_to_file(progress=True)
    else:
        _write_outline(writer, origins)
        Path(request["outline"]).write_text(json.dumps(origins.described()), encoding="utf-8")
    writer.close()


def _write_outline(writer: Any, origins: _Origins) -> None:
    """The table of tensors, room for their data, and the data that no weight gives."""
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    offset = file.tell()
    for name, info in writer.tensors[0].items():
        if origins.source(name) is None:
            file.seek(offset)
            info.tensor.tofile(file)
        offset += writer.ggml_pad(info.nbytes, writer.data_alignment)
    file.truncate(offset)


class _Origins:
    """Watches a converter's model class turn tensors into tensors.

    Tensors are lazy there: nothing is read. What comes out as the very object
    that went in is unchanged; LLaMA's permutation of rows is watched by name;
    anything else is more than the one pass knows how to do.
    """

    def __init__(self, model: Any) -> None:
        self._known = set(model.model_tensors)
        self._found: dict[str, tuple[str, int]] = {}
        self._obstacle = ""
        # (out, in, heads); holds the objects, so that none gets another's identity
        self._permuted: list[tuple[Any, Any, int]] = []
        self._watch_permute()
        convert = model.modify_tensors

        def modify_tensors(data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            for new_name, made in convert(data, name, bid):
                self._note(new_name, name, data, made)
                yield new_name, made
            self._permuted.clear()

        model.modify_tensors = modify_tensors

    def _watch_permute(self) -> None:
        llama = importlib.import_module("conversion.llama").LlamaModel
        permute = llama.permute

        def watched(weights: Any, n_head: int, n_head_kv: int | None) -> Any:
            made = permute(weights, n_head, n_head_kv)
            self._permuted.append((made, weights, n_head_kv or n_head))
            return made

        llama.permute = staticmethod(watched)

    def _note(self, new_name: str, name: str, data: Any, made: Any) -> None:
        heads = 0
        if made is not data:
            heads = next((n for out, into, n in self._permuted if out is made and into is data), -1)
        if heads < 0 and name in self._known:
            self._obstacle = self._obstacle or f"{name} is rearranged into {new_name}"
        self._found[new_name] = (name, max(heads, 0))

    def source(self, new_name: str) -> str | None:
        """The model's tensor that gives a GGUF tensor; None for one made from the configuration."""
        name, _ = self._found.get(new_name, ("", 0))
        return name if name in self._known else None

    def described(self) -> dict[str, Any]:
        """As the outline has it: each tensor's source (or null) and heads to permute (or 0)."""
        return {
            "obstacle": self._obstacle,
            "tensors": {
                name: [self.source(name), heads] for name, (_, heads) in self._found.items()
            },
        }


if __name__ == "__main__":
    main()
