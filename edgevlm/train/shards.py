"""Tables of tensors as Parquet files: one for the images of a shard, one for the questions about them.

A row of a column is a piece of a tensor, as fixed-size bytes, required, uncompressed and PLAIN: by the Parquet format a
page of such a column is its values and nothing else behind the page's header. So any Parquet reader opens the files, and
here a column can be mapped into memory and indexed without decoding. Each file carries a key; a file with another key,
or none, counts as missing.
"""

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from edgevlm.errors import CheckpointError

ROW_GROUP = 256
"""Rows per row group, each one page per column; a page must stay below 2 GB."""
LARGEST_HEADER = 256
"""Bytes of a page's header at most; more means that a row group has several pages."""

Table = dict[str, Tensor | list[str]]
"""Column name -> (R, ...) tensor, or R words."""


def write_table(path: Path, columns: Table, key: str) -> None:
    """Write columns of equal length; the file appears under its name when it is whole."""
    arrays, shapes = {}, {}
    for name, column in columns.items():
        if isinstance(column, list):
            arrays[name] = pa.array(column, pa.string()).dictionary_encode()
            continue
        values = column.contiguous().numpy()
        shapes[name] = {"dtype": str(values.dtype), "shape": list(values.shape[1:])}
        width = values.dtype.itemsize * math.prod(values.shape[1:])
        # Plain bytes: as lists of numbers they would be decoded value by value.
        arrays[name] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(values), [None, pa.py_buffer(values.reshape(-1).view(np.uint8))]
        )
    metadata = {"edgevlm": json.dumps({"key": key, "columns": shapes})}
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()], metadata)
    temporary = path.with_name(f".{path.name}.writing")
    pq.write_table(
        pa.table(list(arrays.values()), schema=schema),
        temporary,
        row_group_size=ROW_GROUP,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_size=2**31 - 1,  # one page per row group
    )
    temporary.replace(path)


class TableFile:
    """A table on disk, mapped into memory: the system keeps what is used, for all processes together."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            CheckpointError: not a file of `write_table`.
        """
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            facts = json.loads((self._file.schema_arrow.metadata or {})[b"edgevlm"])
        except (OSError, pa.ArrowException, KeyError, ValueError) as problem:
            reason = str(problem).splitlines()[0]
            raise CheckpointError(f"{path} is not a table of this cache ({reason})", "Cache them again") from problem
        self.path, self.key, self._facts = path, facts["key"], facts["columns"]
        self.num_rows: int = self._file.metadata.num_rows
        self._lock = threading.Lock()  # one reader at a time: loader threads share the file
        self._maps: dict[str, list[np.ndarray]] = {}

    def shape(self, column: str) -> tuple[int, ...]:
        """Shape of a tensor column with its first dimension."""
        return (self.num_rows, *self._facts[column]["shape"])

    def has(self, column: str) -> bool:
        """Whether there is such a tensor column."""
        return column in self._facts

    def read(self, columns: list[str] | None = None) -> Table:
        """The whole table, or some of its columns."""
        with self._lock:
            table = self._file.read(columns=columns)
        return {name: self._decoded(name, table.column(name)) for name in table.column_names}

    def rows(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of a tensor column, (len(rows), ...), copied from the mapped file; `rows` are sorted."""
        with self._lock:
            groups = self._maps.get(column) or self._maps.setdefault(column, self._mapped(column))
        owner = rows // ROW_GROUP
        return np.concatenate([groups[g][rows[owner == g] - g * ROW_GROUP] for g in np.unique(owner)])

    def _mapped(self, column: str) -> list[np.ndarray]:
        """The column of each row group as an array over the file.

        Raises:
            CheckpointError: the file was not written by `write_table`.
        """
        facts, metadata = self._facts[column], self._file.metadata
        place = self._file.schema_arrow.get_field_index(column)
        width = np.dtype(facts["dtype"]).itemsize * math.prod(facts["shape"])
        groups = []
        for number in range(metadata.num_row_groups):
            chunk = metadata.row_group(number).column(place)
            header = chunk.total_compressed_size - chunk.num_values * width
            plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            if not (plain and 0 < header < LARGEST_HEADER):
                raise CheckpointError(f"{self.path} is not laid out to be mapped", "Cache the regions again")
            shape = (chunk.num_values, *facts["shape"])
            groups.append(np.memmap(self.path, facts["dtype"], "r", chunk.data_page_offset + header, shape))
        return groups

    def _decoded(self, name: str, column: pa.ChunkedArray) -> Tensor | list[str]:
        if name not in self._facts:
            return column.to_pylist()
        return torch.from_numpy(_numbers(column, self._facts[name]))


def _numbers(column: pa.ChunkedArray, facts: dict[str, Any]) -> np.ndarray:
    width = np.dtype(facts["dtype"]).itemsize * math.prod(facts["shape"])
    parts = []
    for chunk in column.chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        parts.append(data.view(facts["dtype"]).reshape(len(chunk), *facts["shape"]))
    if not parts:
        return np.empty((0, *facts["shape"]), facts["dtype"])
    return np.concatenate(parts)  # a copy: what Arrow hands out is read-only


class MappedColumn:
    """A tensor column over several files, read where it is indexed; float32 comes out.

    Indexed as a tensor would be: `column[rows]` or `column[rows, :count]`.
    """

    def __init__(self, files: list[TableFile], column: str) -> None:
        self._files, self._column = files, column
        self._ends = np.cumsum([file.num_rows for file in files])
        self.shape = (int(self._ends[-1]), *files[0].shape(column)[1:])

    def __getitem__(self, index: Tensor | tuple[Tensor, slice]) -> Tensor:
        rows, cut = index if isinstance(index, tuple) else (index, slice(None))
        unique, back = np.unique(rows.numpy(), return_inverse=True)
        owner = np.searchsorted(self._ends, unique, side="right")
        parts = []
        for number in np.unique(owner):
            file = self._files[number]
            first = self._ends[number] - file.num_rows
            parts.append(file.rows(self._column, unique[owner == number] - first)[:, cut])
        return torch.from_numpy(np.concatenate(parts))[torch.from_numpy(back)].float()
