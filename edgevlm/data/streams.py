"""Parquet files and tar archives as streams of rows, through Hugging Face `datasets`; nothing is cached or unpacked."""

import atexit
import glob
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

from edgevlm.data.shards import WHOLE, Shard
from edgevlm.errors import DataError

_half_read: weakref.WeakSet[Any] = weakref.WeakSet()
"""Open streams. pyarrow aborts the process if one is still open when the interpreter ends, so they are closed before."""


@atexit.register
def _close_half_read() -> None:
    for rows in list(_half_read):
        rows.close()


def stream(
    kind: Literal["parquet", "webdataset"], files: Sequence[str], shard: Shard = WHOLE
) -> Iterator[dict[str, Any]]:
    """The rows of the files in order; images stay bytes (`{"bytes": ..., "path": ...}` in tar archives).

    Args:
        kind: the format of the files.
        files: local paths or fsspec URLs.
        shard: if the number of files divides evenly among the parts, each part reads its own files and no others;
            else all read everything and each keeps its rows.

    Raises:
        DataError: a file cannot be read.
    """
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    fix = "Copy or download it again"
    try:
        rows = load_dataset(
            kind, data_files=[glob.escape(file) for file in files], split="train", streaming=True
        ).decode(False)
        rows = iter(split_dataset_by_node(rows, shard.rank, shard.world) if shard.world > 1 else rows)
    except (OSError, ValueError) as problem:
        raise DataError(f"{', '.join(files)} cannot be read ({problem})", fix) from problem
    _half_read.add(rows)
    with closing(rows):  # pyright: ignore[reportArgumentType]
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except (OSError, ValueError) as problem:
                raise DataError(f"{', '.join(files)} cannot be read ({problem})", fix) from problem
