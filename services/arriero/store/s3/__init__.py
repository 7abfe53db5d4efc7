"""A store in S3, or in whatever speaks its protocol.

Responsibility: the `Backend` over a bucket and a local cache. Does not know the
rules of the store. Imported only where a store is in S3, since boto3 is heavy.

    format.json                       the layout's version
    files/<publication>/<path>        bytes of an artifact, as they were uploaded once
    present/<hex>/<publication>.json  an artifact is there, complete: put last
    present/<hex>/<publication>.doomed-<round>, .decided-<round>   gc's marks
    manifests/ tags/ results/ roots/ leases/ waivers/ operations/  as on a filesystem
    locks/<name>/<n>.json             numbered leases of the one writer
    staging/<service>/<execution>/    what outlives a job's machine
"""

from arriero.store.s3.backend import S3Backend, open_backend

__all__ = ["S3Backend", "open_backend"]
