"""The model store: content-addressed artifacts with lineage, tags, gates and gc.

Responsibility: everything that outlives a process. Does not know gRPC, torch,
or what a model is.
"""

from arriero.store.artifacts import Artifact
from arriero.store.disk import QUOTA_VARIABLE
from arriero.store.files import safe_relative, write_atomic
from arriero.store.gc import Removal
from arriero.store.manifest import FORMAT, FileEntry, Manifest, ManifestDraft
from arriero.store.results import Result
from arriero.store.roots import Lease, Pin
from arriero.store.store import Store
from arriero.store.tags import TagEntry
from arriero.store.waivers import Waiver

__all__ = [
    "FORMAT",
    "QUOTA_VARIABLE",
    "Artifact",
    "FileEntry",
    "Lease",
    "Manifest",
    "ManifestDraft",
    "Pin",
    "Removal",
    "Result",
    "Store",
    "TagEntry",
    "Waiver",
    "safe_relative",
    "write_atomic",
]
