"""What a set has for each of its images, kept out of memory: tables in files without names, and hashes of texts."""

import mmap
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shards.common.files import full_disk_names

_ROWS = 1024
"""Rows that lie together in a file."""


class Spool:
    """Rows on their way into a table in a file without a name, of which the system holds in memory what there is room
    for. The file is in the folder for temporary files (`TMPDIR`) if none is named. A full disk is an OSError that names
    the folder."""

    def __init__(self, schema: pa.Schema, folder: Path | None = None) -> None:
        self.schema, self._rows = schema, list[Sequence[Any]]()
        self._folder = folder or Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        with full_disk_names(self._folder):
            self._writer = pa.ipc.new_file(self._file, schema)

    def add(self, row: Sequence[Any]) -> None:
        """Append a row: a value for each column."""
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(zip(*self._rows, strict=True), self.schema.types, strict=True)
        self.write([pa.array(values, kind) for values, kind in columns])
        self._rows = []

    def write(self, columns: list[pa.Array]) -> None:
        """Append columns of one length."""
        with full_disk_names(self._folder):
            self._writer.write_table(pa.table(columns, schema=self.schema), _ROWS)

    def table(self) -> pa.Table:
        """The whole table. Nothing can be added any more."""
        if self._rows:
            self._flush()
        with full_disk_names(self._folder), self._file:
            self._writer.close()
            self._file.flush()
            return pa.ipc.open_file(pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


def taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows of a table in any order. `Table.take` copies a table of several parts whole."""
    order = np.argsort(rows, kind="stable")
    ordered, back = rows[order], np.empty_like(order)
    back[order] = np.arange(len(order))
    batches = table.to_batches()
    starts = np.cumsum([0, *map(len, batches)])
    cuts = np.searchsorted(ordered, starts)
    parts = [
        batch.take(pa.array(ordered[first:end] - start))
        for batch, start, (first, end) in zip(batches, starts, pairwise(cuts), strict=False)
        if first < end
    ]
    return pa.Table.from_batches(parts, table.schema).combine_chunks().take(pa.array(back))


def hash_of(text: str) -> int:
    """XXH3 of a text, 64 bits. It may be the name of a file that is not UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogateescape"))


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """(N,) uint64: `hash_of` each text."""
    return np.fromiter(map(hash_of, texts), np.uint64)


class Texts:
    """The number of each of many texts, found by hashes: 12 bytes a text.

    Two of a million different texts have the same hash with a probability of 3e-8.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        hashes = hashes_of(texts)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]
        self._values: memoryview = self._hashes.data

    def __contains__(self, text: str) -> bool:
        """Whether it is one of them."""
        return bool(self.numbers(text))

    def numbers(self, text: str) -> list[int]:
        """The number, from 0, of each that equals the text."""
        value = hash_of(text)
        first = bisect_left(self._values, value)
        return self._order[first : bisect_right(self._values, value, first)].tolist()

    def repeated(self) -> list[int]:
        """The numbers, ascending, of all that there are several of."""
        same = self._hashes[1:] == self._hashes[:-1]
        several = np.zeros(len(self._order), bool)
        several[1:] |= same
        several[:-1] |= same
        return np.sort(self._order[several]).tolist()


class Keyed(Sequence[str]):
    """Many texts in a file without a name, found by a key of each: 12 bytes a text. Paths need not be UTF-8."""

    def __init__(self, texts: Iterable[str], key: Callable[[str], str]) -> None:
        spool = Spool(pa.schema({"text": pa.binary()}))
        for text in texts:
            spool.add((os.fsencode(text),))
        self._parts: list[pa.Array] = spool.table()["text"].chunks
        self._key = key
        self.keys = Texts(map(key, self))

    def __len__(self) -> int:
        """How many there are."""
        return sum(map(len, self._parts))

    def __getitem__(self, number: int) -> str:
        """The text with a number from 0, in the order in which they were given."""
        return os.fsdecode(self._parts[number // _ROWS][number % _ROWS].as_py())

    def __iter__(self) -> Iterator[str]:
        """All texts."""
        return (os.fsdecode(text) for part in self._parts for text in part.to_pylist())

    def named(self, key: str) -> list[str]:
        """The texts with a key."""
        texts = (self[number] for number in self.keys.numbers(key))
        return [text for text in texts if self._key(text) == key]


def mixed(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) bool: whether there are several values in the group of each. groups: (N,) uint64; values: (N,)."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    differs = (ordered[1:] == ordered[:-1]) & (np.diff(values[order]) != 0)
    return np.isin(groups, ordered[1:][differs])
