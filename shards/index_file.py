"""index.parquet while it is being written: rows go to the file in groups, so that memory holds one group."""

import hashlib
import os
from pathlib import Path
from typing import Any

from shards.format import INDEX_TYPES, index_schema

_GROUP_ROWS = 16_384
"""Rows per Parquet row group: all of HAM10000 is one."""


class IndexFile:
    """A new index; `add` each row, then `finish`."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        self._file = path.open("wb")  # Python's own file, so that a full disk is the OSError that users are told of
        self._writer: Any = pq.ParquetWriter(self._file, index_schema(), compression="zstd", write_statistics=False)
        self._columns: dict[str, list[Any]] = {name: [] for name in INDEX_TYPES}
        self._waiting = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append one row: a value for each column of the index."""
        for name, column in self._columns.items():
            column.append(row[name])
        self._waiting += 1
        if self._waiting == _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.table(self._columns, schema=index_schema()))
        self._columns = {name: [] for name in INDEX_TYPES}
        self._waiting = 0

    def finish(self) -> str:
        """Write what is waiting and the footer, flush to the disk; returns the file's SHA-256."""
        if self._waiting:
            self._write_group()
        self._writer.close()
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file; without `finish` it is no whole index."""
        try:
            self._writer.close()
        finally:
            self._file.close()
