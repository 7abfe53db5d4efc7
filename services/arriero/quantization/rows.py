"""Token ids and labels of a prepared dataset.

Responsibility: read them sample by sample. Does not know models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition

DATA_FILE = "data.arrow"


def sequences(directory: Path, limit: int) -> Iterator[list[int]]:
    """Samples from the first on, the last one cut where the limit is reached.

    Args:
        directory: of a dataset artifact.
        limit: tokens in all, at most.

    Raises:
        FailedPrecondition: the dataset is not prepared, or holds no tokens.
        DataLoss: a damaged file.
    """
    left = limit
    for ids, _ in samples(directory):
        if left <= 0:
            return
        if ids:
            yield ids[:left]
            left -= len(ids)
    if left == limit:
        raise FailedPrecondition(
            f"dataset {directory.name[:12]} holds no tokens, expected at least one row"
        )


def samples(directory: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each sample; a packed row holds several, whose lengths lie beside it.

    Args:
        directory: of a dataset artifact.

    Raises:
        FailedPrecondition: the dataset is not prepared.
        DataLoss: a damaged file.
    """
    import pyarrow as pa

    path = directory / DATA_FILE
    if not path.is_file():
        raise FailedPrecondition(
            f"dataset {directory.name[:12]} is not prepared ({DATA_FILE} is missing); expected "
            "an output of a stage `dataset`"
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            packed = "lengths" in batch.schema.names
            for row, (ids, labels) in enumerate(
                zip(batch["input_ids"], batch["labels"], strict=True)
            ):
                tokens, wanted = ids.as_py(), labels.as_py()
                lengths = batch["lengths"][row].as_py() if packed else [len(tokens)]
                start = 0
                for length in lengths:
                    end = start + length
                    yield tokens[start:end], wanted[start:end]
                    start = end
    except (pa.ArrowInvalid, OSError, KeyError, AttributeError, TypeError) as error:
        raise DataLoss(
            f"{DATA_FILE} of dataset {directory.name[:12]} cannot be read ({error}); prepare it "
            "again"
        ) from error
