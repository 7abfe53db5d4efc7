"""Repositories of a Hugging Face hub.

Responsibility: let huggingface_hub fetch one revision into a directory, or send
files as one commit. Does not know what is in them. `HF_ENDPOINT` (a mirror) is
honoured by the library.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from arriero.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable
from arriero.store.files import tree_size

__all__ = ["download_repository", "upload"]

# Weights, configuration, tokenizer, licence; never code.
_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "consolidated.*.pth",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
_CONVERTED = (".bin", ".pth")
_WEIGHTS = (".safetensors", *_CONVERTED)
# Timeouts and rate limits: of the 4xx those that pass.
_LATER = (408, 425, 429)
# The library's HTTP client has changed its package twice (requests, httpx, httpx2).
_NETWORK = {"HTTPError", "TransportError", "RequestException"}


def download_repository(
    repository: str,
    revision: str,
    directory: Path,
    *,
    secret: str | None,
    room: Callable[[int], None] = lambda needed: None,
) -> tuple[str, Path]:
    """Fetch a revision's files below `directory`; gives the commit, and where they are.

    A connection that breaks is taken up where it broke; after a kill, the same
    directory keeps the files that came whole. Of weights that are there in several
    formats one is fetched.

    Args:
        repository: `org/name`.
        revision: commit, branch or tag.
        directory: is created; other commits in it are removed.
        secret: environment variable with the token; None for anonymous.
        room: called with the bytes to come, before the first; may refuse.

    Raises:
        NotFound: no such repository or revision (or not visible without a token).
        PermissionDenied: the token may not read it.
        FailedPrecondition: the secret is not set.
        Unavailable: the hub cannot be reached.
        DiskFull: `room` refuses.
    """
    token = _token(secret) if secret is not None else False
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(f"hf://{repository}@{revision}"):
        info = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
        names = _needed(list(sizes))
        if not any(name.endswith(_WEIGHTS) for name in names):
            raise FailedPrecondition(_without_weights(repository, list(sizes)))
        commit: str = info.sha or revision
        place = directory / commit.replace("/", "-")
        for other in directory.iterdir() if directory.is_dir() else ():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        for half in place.rglob("*.incomplete"):  # the library begins a file anew
            half.unlink()
        # What is not safetensors yet is written once more.
        needed = sum(sizes[name] * (2 if name.endswith(_CONVERTED) else 1) for name in names)
        room(max(0, needed - tree_size(place)))
        api.snapshot_download(repository, revision=commit, local_dir=place, allow_patterns=names)
    return commit, place


def _needed(names: Sequence[str]) -> list[str]:
    """The files to fetch: those that are known, and the weights once."""
    # Nothing below the top is a part of the model: other runtimes' weights, checkpoints.
    found = [
        name
        for name in names
        if "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in _PATTERNS)
    ]
    top = set(found)

    def without(*patterns: str) -> None:
        found[:] = [n for n in found if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]

    if "config.json" in top:
        without("consolidated.*.pth")
        if "model.safetensors" in top or "model.safetensors.index.json" in top:
            without("pytorch_model*", "consolidated*.safetensors")
    if "adapter_config.json" in top and "adapter_model.safetensors" in top:
        without("adapter_model.bin")
    return found


def _without_weights(repository: str, names: Sequence[str]) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    hint = f"; fetch one of its {len(ggufs)} .gguf files and import its path" if ggufs else ""
    return (
        f"hf://{repository} holds {', '.join(sorted(ggufs or names)[:5]) or 'no files'}; expected "
        f"*.safetensors, pytorch_model*.bin or consolidated.*.pth at its top{hint}"
    )


def upload(
    repository: str,
    revision: str,
    sent: Mapping[str, Path],
    *,
    secret: str,
    private: bool,
    message: str,
) -> str:
    """Send files as one commit, making the repository where there is none.

    Files that the repository has already are not sent again; others in it stay.

    Args:
        repository: `org/name`.
        revision: branch.
        sent: local path by path in the repository.
        secret: environment variable with the token.
        private: of a repository that is made.
        message: of the commit.

    Returns:
        The commit.

    Raises:
        PermissionDenied: the token may not write there.
        FailedPrecondition: the secret is not set.
        NotFound: no such branch. Unavailable: the hub cannot be reached.
    """
    token = _token(secret)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _explained(f"hf://{repository}@{revision}"):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations=[
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                for name, path in sorted(sent.items())
            ],
            commit_message=message,
            revision=revision,
        )
    return str(commit.oid)


def _token(secret: str) -> str:
    token = os.environ.get(secret, "")
    if not token:
        raise FailedPrecondition(
            f"the secret {secret} is not set in this service's environment; set it there"
        )
    return token


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """The library's errors as Arriero's."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise PermissionDenied(
            f"{name} is gated; accept its terms on the hub and give token_secret"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFound(
            f"{name} does not exist, or is private; check the name or give token_secret"
        ) from error
    except LocalEntryNotFoundError as error:
        raise Unavailable(f"the hub cannot be reached for {name}: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = str(error).splitlines()[0]
        if status in (401, 403):
            raise PermissionDenied(f"the hub refuses {name}: {said}") from error
        if 400 <= status < 500 and status not in _LATER:
            raise FailedPrecondition(f"the hub refuses {name}: {said}") from error
        raise Unavailable(f"the hub failed for {name}: {said}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, OSError) or _NETWORK & {cls.__name__ for cls in type(error).__mro__}:
            raise Unavailable(f"the hub cannot be reached for {name}: {error}") from error
        raise
