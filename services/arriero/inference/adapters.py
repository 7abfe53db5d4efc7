"""LoRA adapters beside a loaded model, by the names that requests choose them by.

Responsibility: load and unload them while streams run, and refuse those that do
not belong to the model. Does not know slots or requests.

An adapter is freed when nobody computes with it any more. Its key is never given
to another one, so what lies in a KV cache is never taken for another adapter's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import AlreadyExists, NotFound
from arriero.llama import Model, read_header
from arriero.llama.adapter import Adapter
from arriero.llama.adapter_files import check_fit

__all__ = ["AdapterFile", "Adapters", "Loaded"]

# Quantization writes it: what the rows of the adapter's training were rendered with.
_TEMPLATE = "arriero.template"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it is asked for.

    Attributes:
        name: that requests choose it by.
        digest: of its artifact.
        path: of the GGUF file.
        scale: its deltas are multiplied by.
    """

    name: str
    digest: str
    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter that streams can be computed with."""

    file: AdapterFile
    key: int
    adapter: Adapter
    template: str

    def described(self) -> dict[str, Any]:
        """What the front end needs to know."""
        return {"name": self.file.name, "template": self.template}


class Adapters:
    """The adapters of one loaded model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._keys = itertools.count(1)
        self._named: dict[str, Loaded] = {}
        # Unloaded, but perhaps still computed with.
        self._leaving: list[Loaded] = []

    def load(self, file: AdapterFile) -> Loaded:
        """Load one; fine when it is loaded already.

        Raises:
            AlreadyExists: the name is another adapter's.
            FailedPrecondition: it is no LoRA adapter of this model.
            DataLoss: the file is damaged.
        """
        old = self._named.get(file.name)
        if old is not None:
            if (old.file.digest, old.file.scale) == (file.digest, file.scale):
                return old
            raise AlreadyExists(
                f"adapter {file.name} is {old.file.digest} here, with a scale of "
                f"{old.file.scale:g}; unload it first, or take another name"
            )
        header = read_header(Path(file.path))
        check_fit(file.name, header, self._model.header)
        adapter = Adapter(self._model, Path(file.path))
        template = str(header.metadata.get(_TEMPLATE, ""))
        loaded = Loaded(file, next(self._keys), adapter, template)
        self._named[file.name] = loaded
        return loaded

    def unload(self, name: str) -> None:
        """Take one away; streams that run with it end as they began.

        Raises:
            NotFound: no such adapter.
        """
        self._leaving.append(self.get(name))
        del self._named[name]

    def get(self, name: str) -> Loaded:
        """The adapter of that name.

        Raises:
            NotFound: there is none.
        """
        found = self._named.get(name)
        if found is None:
            known = ", ".join(sorted(self._named)) or "none"
            raise NotFound(f"no adapter named {name!r} is loaded; adapters: {known}")
        return found

    @property
    def leaving(self) -> bool:
        """Whether some wait to be freed."""
        return bool(self._leaving)

    def free(self, used: Iterable[int]) -> None:
        """Free those that were unloaded and whose keys are not in use."""
        if self._leaving:
            keys = set(used)
            for loaded in [item for item in self._leaving if item.key not in keys]:
                loaded.adapter.close()
                self._leaving.remove(loaded)
