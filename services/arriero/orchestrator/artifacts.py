"""Artifacts as the API shows them, and files on their way in and out.

Responsibility: manifests to messages; uploads with their limits, checked before
anything is published; downloads in chunks. Does not know gRPC calls.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from arriero import refs
from arriero.errors import DataLoss, InvalidArgument, NotFound
from arriero.operations.views import gate_message
from arriero.store import Artifact, Manifest, ManifestDraft, Store, safe_relative
from arriero.v1 import orchestrator_pb2 as pb

CHUNK_BYTES = 1024 * 1024
MAX_FILES = 10_000
# 70 billion weights in 16 bits, and some room.
MAX_UPLOAD_BYTES = 200 * 10**9
PUSHED_KINDS = ("dataset", "model", "adapter", "gguf", "tokenizer", "report")
_SERVICE = "orchestrator"
# Formats that run code when they are read.
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def describe(store: Store, manifest: Manifest, tags: dict[str, list[str]]) -> pb.Artifact:
    """The message of a manifest; `tags` are the tags by digest."""
    artifact: Artifact | None
    try:
        artifact = store.get(manifest.digest)
    except NotFound:
        artifact = None
    message = pb.Artifact(
        digest=manifest.digest,
        kind=manifest.kind,
        name=manifest.name,
        files=[
            pb.ArtifactFile(path=f.path, size_bytes=f.size, sha256=f.sha256) for f in manifest.files
        ],
        size_bytes=manifest.size,
        parents=manifest.parents,
        gates=[gate_message(g) for g in store.gates(manifest)],
        metrics=manifest.metrics,
        labels=manifest.labels,
        owner=manifest.owner,
        spec_json=json.dumps(manifest.spec, sort_keys=True),
        creator=manifest.creator,
        quarantined=artifact.quarantined if artifact else manifest.quarantined,
        tags=tags.get(manifest.digest, []),
        present=artifact is not None,
        path=artifact.location if artifact else "",
        golden=manifest.golden or "",
    )
    message.create_time.FromJsonString(manifest.created)
    return message


def tags_by_digest(store: Store) -> dict[str, list[str]]:
    """Every tag, by what it points at."""
    found: dict[str, list[str]] = {}
    for entry in store.tags():
        found.setdefault(entry.digest, []).append(entry.tag)
    return found


def chunks(store: Store, ref: str) -> Iterator[pb.PullArtifactResponse]:
    """An artifact's files in order, in chunks of 1 MiB; a lease keeps them from gc.

    Raises:
        NotFound: no such artifact, or its files were collected.
    """
    digest = store.resolve(ref)
    with store.lease("pull", [digest]) as lease:
        artifact = store.get(digest)
        yield pb.PullArtifactResponse(
            artifact=describe(store, artifact.manifest, tags_by_digest(store))
        )
        for entry in artifact.manifest.files:
            path = entry.path
            with artifact.file(path).open("rb") as file:
                # An empty file has one empty chunk, which names it.
                while (chunk := file.read(CHUNK_BYTES)) or path:
                    yield pb.PullArtifactResponse(path=path, chunk=chunk)
                    path = ""
            lease.renew()


class Upload:
    """Files of one push, collected aside until the stream ends well.

    Args:
        store: where they are published.
        header: what the pusher says.
        owner: recorded in the artifact.

    Raises:
        InvalidArgument: an unknown kind, a bad name or tag, too many bytes.
        DiskFull: no room for the announced bytes.
    """

    def __init__(self, store: Store, header: pb.PushHeader, *, owner: str) -> None:
        _check_header(header)
        store.preflight(header.size_bytes)
        self._store = store
        self._header = header
        self._owner = owner
        self._directory = store.staging(_SERVICE, f"push-{uuid.uuid4()}")
        self._lease = store.lease("push", [self._directory])
        self._files: set[str] = set()
        self._bytes = 0
        self._file: BinaryIO | None = None

    def write(self, path: str, chunk: bytes) -> None:
        """The next chunk; `path` begins a file, empty goes on with the last one.

        Raises:
            InvalidArgument: a path that climbs out, repeats, or is missing; more
                bytes or files than announced or allowed; a format that runs code.
        """
        if path:
            self._begin(path)
        if self._file is None:
            raise InvalidArgument.field("path", "the first chunk of a file must name its path")
        if len(chunk) > 4 * CHUNK_BYTES:
            raise InvalidArgument.field(
                "chunk", f"has {len(chunk)} bytes; send at most {CHUNK_BYTES}"
            )
        self._bytes += len(chunk)
        if self._bytes > self._header.size_bytes:
            raise InvalidArgument.field(
                "header.size_bytes",
                f"announced {self._header.size_bytes} bytes, but more arrived",
            )
        self._file.write(chunk)

    def _begin(self, path: str) -> None:
        relative = str(safe_relative(path))
        if relative.endswith(_UNSAFE_SUFFIXES):
            raise InvalidArgument.field(
                "path",
                f"{relative}: pickled weights are not taken, they could run code; push "
                "safetensors, or use an import stage, which converts them safely",
            )
        if relative in self._files:
            raise InvalidArgument.field("path", f"{relative!r} came twice")
        if len(self._files) >= MAX_FILES:
            raise InvalidArgument.field("path", f"more than {MAX_FILES} files")
        self._close_file()
        self._files.add(relative)
        target = self._directory / relative
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = target.open("xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise InvalidArgument.field(
                "path", f"{relative!r} is a file and a directory at once"
            ) from None
        self._lease.renew()

    def publish(self) -> Artifact:
        """Publish what arrived, and tag it when the header says so.

        Raises:
            InvalidArgument: bytes are missing, or the files are not of that kind.
            DataLoss: weights are cut off, or a shard is missing.
        """
        self._close_file()
        header = self._header
        if self._bytes != header.size_bytes:
            raise InvalidArgument.field(
                "header.size_bytes",
                f"announced {header.size_bytes} bytes, but {self._bytes} arrived",
            )
        check_files(header.kind, self._directory, self._files)
        check_weights(header.kind, self._directory)
        artifact = self._store.publish(
            self._directory,
            ManifestDraft(
                kind=header.kind,
                name=header.name,
                labels=dict(header.labels),
                owner=self._owner,
                creator="push",
            ),
        )
        if header.tag:
            self._store.tag(header.tag, artifact.digest)
        return artifact

    def close(self) -> None:
        """Remove what was not published."""
        self._close_file()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._lease.release()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _check_header(header: pb.PushHeader) -> None:
    if header.kind not in PUSHED_KINDS:
        raise InvalidArgument.field(
            "header.kind", f"{header.kind!r} is not one of {', '.join(PUSHED_KINDS)}"
        )
    if not refs.is_name(header.name):
        raise InvalidArgument.field(
            "header.name",
            f"{header.name!r} is not a name; expected lower case letters, digits, '.', '_', '-'",
        )
    if header.tag:
        ref = refs.parse(header.tag, field="header.tag")
        if ref.tag is None or ref.kind != header.kind:
            raise InvalidArgument.field(
                "header.tag", f"{header.tag!r} is not a tag of a {header.kind}"
            )
    if not 0 < header.size_bytes <= MAX_UPLOAD_BYTES:
        raise InvalidArgument.field(
            "header.size_bytes",
            f"{header.size_bytes} is not between 1 and {MAX_UPLOAD_BYTES}; it is the sum of the "
            "files' sizes",
        )


def check_files(kind: str, directory: Path, files: set[str]) -> None:
    """Whether files can be an artifact of that kind at all.

    Raises:
        InvalidArgument: what is missing.
    """

    def need(condition: bool, what: str) -> None:
        if not condition:
            found = ", ".join(sorted(files)[:10]) or "nothing"
            raise InvalidArgument.field(
                "header.kind", f"not a {kind}: expected {what}; found {found}"
            )

    weights = any(f.endswith(".safetensors") for f in files)
    match kind:
        case "model":
            need("config.json" in files and weights, "config.json and *.safetensors")
        case "adapter":
            names = {"adapter_config.json", "adapter_model.safetensors"}
            need(names <= files, " and ".join(sorted(names)))
        case "tokenizer":
            need(
                bool({"tokenizer.json", "tokenizer.model"} & files),
                "tokenizer.json or tokenizer.model",
            )
        case "gguf" | "report":
            ggufs = [f for f in files if f.endswith(".gguf")]
            # Of reports only importance matrices come from elsewhere.
            matrix = " with an importance matrix (`llama-imatrix -o imatrix.gguf`; older .dat "
            matrix += "files become one with --in-file)"
            need(len(ggufs) == 1, "exactly one .gguf file" + (matrix if kind == "report" else ""))
        case _:
            need(bool(files), "at least one file")


def check_weights(kind: str, directory: Path) -> None:
    """Whether weights are whole, and an adapter is one that was trained.

    Raises:
        DataLoss: a file is cut off, or a shard that the index names is missing.
        FailedPrecondition: tensors of an unknown type; a configuration that is none.
        InvalidArgument: an adapter that changes nothing, or half of one.
    """
    # Here, since only whoever takes weights in needs numpy.
    from arriero.llama import read_header
    from arriero.weights import Weights
    from arriero.weights.config import read_config
    from arriero.weights.health import check_adapter

    if kind == "model":
        read_config(directory)
        Weights.open(directory)
    elif kind in ("gguf", "report"):
        [path] = directory.rglob("*.gguf")
        header = read_header(path)
        if not header.tensors:
            raise DataLoss(f"{path.name} holds no tensors")
        if kind == "report" and header.metadata.get("general.type") != "imatrix":
            raise InvalidArgument.field(
                "header.kind",
                f"{path.name} is no importance matrix, the one kind of report that can be pushed: "
                f"its general.type is {header.metadata.get('general.type')!r}, expected 'imatrix'",
            )
    elif kind == "adapter" and (problems := check_adapter(directory)):
        raise InvalidArgument.field(
            "header.kind",
            f"not a healthy adapter: {'; '.join(problems)}. Push it whole, or bring it in with "
            "`arriero import`, where its gate can be set to warn",
        )
