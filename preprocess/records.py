"""Raw data as records: one for each usable image, and the reason for each image that is not usable."""

import csv
import filecmp
import hashlib
import io
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from preprocess.archives import Member
from preprocess.rows import Keyed, Spool, Texts, hash_of, mixed, taken
from preprocess.tables import PICTURES, SPLIT_NAMES, read_table
from shards.common.errors import DataError
from shards.common.files import encoded
from shards.format import HAM10000, INDEX_TYPES, Classes
from shards.store import is_address
from shards.writer import check_image_id

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
"""The columns that HAM10000's metadata must have; `dataset` is optional (older copies lack it)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable image. file: relative to the source folder. None: the source says nothing, or the set has no labels.

    group: what no split divides. row: in the source's `columns`, of which each record may have one.
    """

    image_id: str
    file: str
    lesion_id: str | None
    dx: str | None
    dx_type: str | None = None
    age: float | None = None
    sex: str | None = None
    localization: str | None = None
    dataset: str | None = None
    group: str | None = None
    row: int | None = field(default=None, compare=False)

    def metadata(self) -> dict[str, Any]:
        """The index's own columns that come from the source."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in ("file", "row")}


_TYPES = {"age": pa.float64(), "file": pa.binary(), "row": pa.int64()}
RECORD = pa.schema({name: _TYPES.get(name, pa.string()) for name in Record.__slots__})
"""A record as a row. The name of a file need not be UTF-8, so it is bytes."""


class Records:
    """Records in a file without a name (`Spool`). They are read from it in order, and new ones are made of them."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        spool, fields = Spool(RECORD), attrgetter(*RECORD.names)
        file = RECORD.names.index("file")
        for record in records:
            row = list(fields(record))
            row[file] = os.fsencode(record.file)
            spool.add(row)
        self.table = spool.table()

    def __len__(self) -> int:
        """How many there are."""
        return len(self.table)

    def __iter__(self) -> Iterator[Record]:
        """All of them."""
        return chain.from_iterable(map(records_of, self.table.to_batches()))

    def __getitem__(self, number: int) -> Record:
        """The record with a number from 0."""
        return next(records_of(self.table.slice(number, 1)))

    def at(self, numbers: Iterable[int]) -> Iterator[tuple[int, Record]]:
        """Some records with their numbers, which come sorted."""
        rows = np.unique(np.fromiter(numbers, np.int64))
        return zip(rows.tolist(), records_of(taken(self.table, rows)), strict=True)

    def column(self, name: str) -> Iterator[Any]:
        """One value of each record."""
        values = (value for part in self.table[name].chunks for value in part.to_pylist())
        return map(os.fsdecode, values) if name == "file" else values


def records_of(rows: pa.Table | pa.RecordBatch) -> Iterator[Record]:
    """Rows that have the columns of RECORD, as records."""
    values: dict[str, Any] = {name: rows[name].to_pylist() for name in RECORD.names}
    values["file"] = map(os.fsdecode, values["file"])
    return map(Record, *values.values())


UNKNOWN = {"", "unknown", "nan", "none", "null", "na", "n/a", "-"}
"""What a cell of a table says, in any case, if there is no value."""


class SourceColumns:
    """The columns of a table on their way into the index: collected row by row as text, then typed."""

    def __init__(self, columns: Iterable[str], made: Iterable[str]) -> None:
        """columns: of the table. made: those from which the index's own columns of the same name were made.

        These are left out. Another column with the name of one of the index's own is called `table_<name>`, with
        `table_` once more if the table has that name too.
        """
        left = [name for name in columns if name not in made]
        self.names: dict[str, str] = {}
        for name in left:
            free = name
            while free in INDEX_TYPES or (free != name and free in left):
                free = f"table_{free}"
            self.names[name] = free
        self._spool = Spool(pa.schema({free: pa.string() for free in self.names.values()}))
        self._rows = 0

    def add(self, row: dict[str, str]) -> int:
        """Append the cells of a row; returns its number."""
        cells = (row.get(name, "") for name in self.names)
        self._spool.add([None if cell.lower() in UNKNOWN else cell for cell in cells])
        self._rows += 1
        return self._rows - 1

    def table(self) -> pa.Table | None:
        """The typed columns: whole numbers, numbers, true or false, or text, whichever is the first that every cell is.

        None if there are no columns.
        """
        if not self.names:
            return None
        text = self._spool.table()
        typed = Spool(pa.schema({name: _type(text[name]) for name in text.column_names}))
        for batch in text.to_batches():
            typed.write([column.cast(kind) for column, kind in zip(batch.columns, typed.schema.types, strict=True)])
        return typed.table()


def _type(text: pa.ChunkedArray) -> pa.DataType:
    if text.null_count < len(text):
        for kind in (pa.int64(), pa.float64(), pa.bool_()):
            if all(_is(part, kind) for part in text.chunks):
                return kind
    return pa.string()


def _is(text: pa.Array, kind: pa.DataType) -> bool:
    import pyarrow.compute

    pc: Any = pyarrow.compute  # it makes its functions at run time
    try:
        found = text.cast(kind)
    except pa.ArrowInvalid:
        return False
    return kind != pa.float64() or pc.all(pc.is_finite(found)).as_py() is not False  # JSON has no other numbers


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of quarantine.csv: an image or row that cannot be packed, the file with the problem, and the reason."""

    image_id: str
    file: str
    reason: str


@dataclass(slots=True)
class Source:
    """The contents of a raw folder: what can be packed, what cannot, and what the user should know.

    citation, licence, about (names and hashes; no path of the machine), classes, group (the columns that the groups
    were made from): for the manifest. columns: further columns of the index, with the rows that the records name.
    members: where each file is, if the images lie in archives. folder: or an address in a store. tables: where a table
    is that lies outside of it.
    """

    folder: str | Path
    citation: str
    licence: str
    records: Records = field(default_factory=Records)
    rejected: list[Rejected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    classes: Classes = HAM10000
    group: tuple[str, ...] = ("lesion_id",)
    columns: pa.Table | None = None
    members: dict[str, Member] | None = None
    tables: dict[str, str | Path] = field(default_factory=dict)

    def error(self, rejected: Rejected) -> DataError:
        """The error that stops packing at an image that cannot be packed."""
        found = len(self.rejected)
        more = f" (the first of {found} problems)" if found > 1 else ""
        where = str(self.tables.get(rejected.file, f"{self.folder}/{rejected.file}"))
        return DataError(
            f"{where if is_address(where) else os.path.normpath(where)}: {rejected.reason}{more}; fix the source, "
            "or add --on-bad skip to pack the rest and list what was left out in quarantine.csv"
        )


def quarantine_csv(rejected: Iterable[Rejected]) -> bytes:
    """quarantine.csv: `image_id,file,reason`, one line for everything that was left out.

    UTF-8. A byte of a file name that is not UTF-8 is written as `\\udcXX`, so that such a name does not stop packing.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image_id", "file", "reason"])
    rows.writerows([r.image_id, r.file, r.reason] for r in rejected)
    return encoded(text.getvalue())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_splits(path: Path) -> dict[str, str]:
    """image_id → train, val or test, from a table with the columns `image_id` and `split`, as splits are published.

    Image names may have an extension. Raises DataError naming the line for another split, and for an image that is
    listed in two splits.
    """
    found: dict[str, str] = {}
    for line, row in read_table(path, ("image_id", "split"), "a table with the columns image_id and split"):
        image_id, split = Path(row.get("image_id", "")).stem, SPLIT_NAMES.get(row.get("split", "").lower())
        if not image_id or split is None:
            raise DataError(
                f"{path}: line {line}: image '{image_id}', split '{row.get('split', '')}': an image and one of train, "
                "val and test are needed"
            )
        if found.setdefault(image_id, split) != split:
            raise DataError(f"{path}: line {line}: {image_id} is in {found[image_id]} and in {split}; choose one")
    if "train" not in found.values():
        raise DataError(f"{path}: puts no image into train, so there is nothing to train on")
    return found


def list_images(root: Path, folders: Iterable[Path], rejected: list[Rejected]) -> Keyed:
    """Picture files in `folders` (not below them): paths relative to `root`, found by their names without suffix.

    Hidden files are ignored (archives made on a Mac have `._ISIC_….jpg`). An image in two places is added to
    `rejected`; if the two files differ, neither is returned.
    """

    def paths() -> Iterator[str]:
        for folder in folders:
            inside = "" if folder == root else f"{folder.relative_to(root)}/"
            with os.scandir(folder) as entries:
                files = sorted(entry.name for entry in entries if not entry.name.startswith("."))
            yield from (inside + file for file in files if file.lower().endswith(PICTURES))

    found = Keyed(paths(), stem_of)
    first: dict[str, str] = {}
    differing, left_out = set(), set()
    for name in (found[number] for number in found.keys.repeated()):
        stem = stem_of(name)
        if first.setdefault(stem, name) == name:
            continue
        same = _same_content(root / first[stem], root / name)
        if not same:
            differing.add(stem)
        left_out.add(name)
        rejected.append(Rejected(stem, name, f"is a second copy; {first[stem]} {'is the same' if same else 'differs'}"))
    rejected += [Rejected(i, first[i], "another file of this name differs") for i in sorted(differing)]
    left_out |= {first[i] for i in differing}
    return Keyed((name for name in found if name not in left_out), stem_of) if left_out else found


def stem_of(path: str) -> str:
    """The name of a file without its suffix."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _same_content(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def record_from(row: dict[str, str], file: str, dataset: str | None) -> Record:
    """A record from a row of HAM10000's metadata. Raises ValueError with the reason for a row that is wrong."""
    short = [name for name in COLUMNS if name not in row]
    if short:
        raise ValueError(f"the row ends before {short[0]}")
    try:
        check_image_id(row["image_id"])
    except DataError as error:
        raise ValueError(str(error)) from None
    if not row["lesion_id"]:
        raise ValueError("lesion_id is empty, and splits are made by lesion")
    if row["dx"] not in HAM10000.names:
        raise ValueError(f"dx '{row['dx']}' is unknown (known: {', '.join(HAM10000.names)})")
    try:
        age = float(row["age"]) if row["age"] else None
    except ValueError:
        age = math.nan
    if age is not None and not 0 <= age <= 130:
        raise ValueError(f"age '{row['age']}' is not a number from 0 to 130 (empty means unknown)")
    values = (row.get(name) or None for name in ("dx_type", "sex", "localization", "dataset"))
    dx_type, sex, localization, named = values
    return Record(
        row["image_id"],
        file,
        row["lesion_id"],
        row["dx"],
        dx_type,
        age,
        sex,
        localization,
        named or dataset,
        row["lesion_id"],
    )


def group_of(image_id: str, group: str | None) -> str:
    """The name of an image's group; if it is a group of its own, one that no other has."""
    return group or f"image:{image_id}"


def join_groups(source: Source, pairs: Iterable[tuple[str, str]]) -> int:
    """Give the groups of each pair of images one name, so that no split divides them; returns how many were renamed.

    pairs: image_ids, in any case; those that no record has are ignored. A lesion_id that names a group is renamed too.
    """
    pairs = [(one.casefold(), other.casefold()) for one, other in pairs]
    named = {image_id for pair in pairs for image_id in pair}
    groups: dict[str, str] = {}
    for record in source.records if named else ():
        if (image_id := record.image_id.casefold()) in named:
            groups[image_id] = group_of(record.image_id, record.group)
    joined: dict[str, str] = {}

    def name_of(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for pair in pairs:
        one, other = map(groups.get, pair)
        if one and other and (first := name_of(one)) != (second := name_of(other)):
            joined[second] = first
    renamed = {*joined, *map(name_of, joined)}

    def renaming(record: Record) -> Record:
        if (group := group_of(record.image_id, record.group)) not in renamed:
            return record
        lesion, name = record.lesion_id, name_of(group)
        return replace(record, group=name, lesion_id=name if lesion and lesion == record.group else lesion)

    if joined:
        source.records = Records(map(renaming, source.records))
    return len(joined)


def one_row_each(
    rows: Iterable[tuple[int, str, Record | str]], table: str, rejected: list[Rejected], one_label: bool = True
) -> Records:
    """The records of a table, one for each image_id.

    rows: line, image_id, and the record, or the reason why there is none. An image_id on two lines has one record, or
    none if the lines differ. one_label: all images of a lesion whose lines have two dx are left out. Reasons go to
    `rejected`, with the name of the table.
    """
    lines, groups, labels = array("q"), array("Q"), array("i")
    numbers: dict[str | None, int] = {}
    without: list[tuple[int, str, Record | str]] = []

    def usable() -> Iterator[Record]:
        for line, image_id, record in rows:
            if isinstance(record, str):
                without.append((line, image_id, record))
                continue
            lines.append(line)
            groups.append(hash_of(group_of(record.image_id, record.group)))
            labels.append(numbers.setdefault(record.dx, len(numbers)))
            yield record

    records = Records(usable())
    kept = np.ones(len(records), bool)
    ids = Texts(records.column("image_id"))
    doubtful = {*ids.repeated(), *(number for _, image_id, _ in without for number in ids.numbers(image_id))}
    del ids
    again = [(lines[number], record.image_id, record, number) for number, record in records.at(doubtful)]
    first: dict[str, tuple[int, Record | None, int]] = {}
    contradicted = set()
    for line, image_id, record, number in sorted([*again, *((*row, -1) for row in without)], key=itemgetter(0)):
        if isinstance(record, str):
            rejected.append(Rejected(image_id, table, f"line {line}: {record}"))
            first.setdefault(image_id, (line, None, number))
        elif image_id in first:
            reason = f"line {line}: image_id {image_id} is on line {first[image_id][0]} too"
            rejected.append(Rejected(image_id, table, reason))
            kept[number] = False
            if first[image_id][1] not in (record, None):
                contradicted.add(image_id)
        else:
            first[image_id] = line, record, number
    for image_id in sorted(contradicted):
        line, _, number = first[image_id]
        kept[number] = False
        reason = f"line {line}: another line has other values for image_id {image_id}"
        rejected.append(Rejected(image_id, table, reason))
    divided = mixed(np.frombuffer(groups, np.uint64), np.frombuffer(labels, np.int32)) if one_label else ~kept
    some = dict(records.at(np.flatnonzero(kept & divided)))
    diagnoses: dict[str, set[str]] = {}
    for record in some.values():
        if record.group is not None and record.dx is not None:
            diagnoses.setdefault(record.group, set()).add(record.dx)
    for number, record in some.items():
        found = diagnoses.get(record.group or "", set())
        if len(found) > 1:
            kept[number] = False
            reason = f"line {lines[number]}: lesion {record.group} has the dx {' and '.join(sorted(found))}"
            rejected.append(Rejected(record.image_id, table, reason))
    return records if kept.all() else Records(compress(records, kept))
