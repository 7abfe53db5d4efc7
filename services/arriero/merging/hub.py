"""A repository of a Hugging Face hub.

Responsibility: let huggingface_hub fetch one revision into a directory. Does
not know what is in it. `HF_ENDPOINT` (a mirror) is honoured by the library.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from arriero.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable

__all__ = ["download_repository"]

# Weights, configuration, tokenizer, licence; never code.
_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
# The library's HTTP client has changed its package twice (requests, httpx, httpx2).
_NETWORK = {"HTTPError", "TransportError", "RequestException"}


def download_repository(
    repository: str, revision: str, directory: Path, *, secret: str | None
) -> str:
    """Fetch a revision's files into `directory`; returns the commit where the hub says it.

    Args:
        repository: `org/name`.
        revision: commit, branch or tag.
        directory: is created.
        secret: environment variable with the token; None for anonymous.

    Raises:
        NotFound: no such repository or revision (or not visible without a token).
        PermissionDenied: the token may not read it.
        FailedPrecondition: the secret is not set.
        Unavailable: the hub cannot be reached.
    """
    token: str | bool = False
    if secret is not None:
        token = os.environ.get(secret, "")
        if not token:
            raise FailedPrecondition(
                f"the secret {secret} is not set in this service's environment; set it there"
            )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(token=token)
    name = f"hf://{repository}@{revision}"
    try:
        commit = api.model_info(repository, revision=revision).sha or revision
        api.snapshot_download(
            repository,
            revision=commit,
            local_dir=directory,
            allow_patterns=list(_PATTERNS),
        )
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
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionDenied(f"the hub refuses {name}: {error}") from error
        raise Unavailable(f"the hub failed for {name}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, OSError) or _NETWORK & {cls.__name__ for cls in type(error).__mro__}:
            raise Unavailable(f"the hub cannot be reached for {name}: {error}") from error
        raise
    return commit
