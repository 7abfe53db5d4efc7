"""The files that a replica serves, out of the store.

Responsibility: from artifacts to paths, refusing those that hold something else.
Does not know what reads them.
"""

from __future__ import annotations

from pathlib import Path

from arriero.errors import InvalidArgument
from arriero.inference.adapters import AdapterFile
from arriero.llama.adapter_files import adapter_path
from arriero.store import Artifact, Store


def gguf_file(artifact: Artifact) -> Path:
    """The GGUF file of an artifact.

    Raises:
        InvalidArgument: the artifact holds no such file.
    """
    files = [f.path for f in artifact.manifest.files if f.path.endswith(".gguf")]
    if artifact.manifest.kind != "gguf" or len(files) != 1:
        raise InvalidArgument.field(
            "ARRIERO_MODEL",
            f"{artifact.digest} is a {artifact.manifest.kind} with {len(files)} .gguf files; "
            "expected a gguf artifact with one",
        )
    return artifact.file(files[0])


def adapter_file(
    store: Store, ref: str, name: str, scale: float = 1.0, *, wait: float = 0
) -> AdapterFile:
    """The GGUF file of an adapter artifact, under the name that requests will use.

    Args:
        store: where it is.
        ref: digest of the artifact.
        name: empty for the artifact's own.
        scale: of its change.
        wait: seconds to look again for a digest that is not there yet.

    Raises:
        InvalidArgument: an artifact of another kind.
        NotFound: no such artifact.
        FailedPrecondition: it is no GGUF adapter.
    """
    artifact = store.get(ref, wait=wait)
    if artifact.manifest.kind != "adapter":
        raise InvalidArgument.field(
            "adapter", f"{ref} is of kind {artifact.manifest.kind}; expected adapter"
        )
    name = name or artifact.manifest.name
    return AdapterFile(name, artifact.digest, str(adapter_path(artifact.path, name)), scale)
