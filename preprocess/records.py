"""Raw data as records: one for each usable image, and the reason for each image that is not usable."""

import csv
import filecmp
import hashlib
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

from preprocess.archives import Member
from preprocess.tables import PICTURES, SPLIT_NAMES, read_table
from shards.common.errors import DataError
from shards.common.files import encoded
from shards.format import HAM10000, INDEX_TYPES, Classes
from shards.writer import check_image_id

if TYPE_CHECKING:
    import pyarrow as pa

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


UNKNOWN = {"", "unknown", "nan", "none", "null", "na", "n/a", "-"}
"""What a cell of a table says, in any case, if there is no value."""
_AT_ONCE = 16_384


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
        self._cells: dict[str, list[str | None]] = {name: [] for name in left}
        self._chunks: dict[str, list[Any]] = {name: [] for name in left}
        self._rows = 0

    def add(self, row: dict[str, str]) -> int:
        """Append the cells of a row; returns its number."""
        for name, cells in self._cells.items():
            cell = row.get(name, "")
            cells.append(None if cell.lower() in UNKNOWN else cell)
        self._rows += 1
        if self._rows % _AT_ONCE == 0:
            self._flush()
        return self._rows - 1

    def _flush(self) -> None:
        import pyarrow as pa

        for name, cells in self._cells.items():
            self._chunks[name].append(pa.array(cells, pa.string()))
            cells.clear()

    def table(self) -> "pa.Table | None":
        """The typed columns: whole numbers, numbers, true or false, or text, whichever is the first that every cell is.

        None if there are no columns.
        """
        import pyarrow as pa

        self._flush()
        typed = {self.names[name]: _typed(pa.chunked_array(chunks)) for name, chunks in self._chunks.items()}
        return pa.table(typed) if typed else None


def _typed(text: "pa.ChunkedArray") -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # it makes its functions at run time
    if text.null_count == len(text):
        return text
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            found = text.cast(kind)
        except pa.ArrowInvalid:
            continue
        if kind != pa.float64() or pc.all(pc.is_finite(found)).as_py():  # JSON has no other numbers
            return found
    return text


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
    members: where each file is, if the images lie in archives.
    """

    folder: Path
    citation: str
    licence: str
    records: list[Record] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    classes: Classes = HAM10000
    group: tuple[str, ...] = ("lesion_id",)
    columns: "pa.Table | None" = None
    members: dict[str, Member] | None = None

    def error(self, rejected: Rejected) -> DataError:
        """The error that stops packing at an image that cannot be packed."""
        found = len(self.rejected)
        more = f" (the first of {found} problems)" if found > 1 else ""
        return DataError(
            f"{os.path.normpath(self.folder / rejected.file)}: {rejected.reason}{more}; fix the source, "
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


def list_images(root: Path, folders: Iterable[Path], rejected: list[Rejected]) -> dict[str, str]:
    """Picture files in `folders` (not below them): name without suffix → path relative to `root`.

    Hidden files are ignored (archives made on a Mac have `._ISIC_….jpg`). An image in two places is added to
    `rejected`; if the two files differ, neither is returned.
    """
    found: dict[str, str] = {}
    differing = set()
    for folder in folders:
        inside = "" if folder == root else f"{folder.relative_to(root)}/"
        with os.scandir(folder) as entries:
            files = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        for file in files:
            stem = file.rpartition(".")[0]
            if not file.lower().endswith(PICTURES):
                continue
            name = inside + file
            first = found.setdefault(stem, name)
            if first == name:
                continue
            same = _same_content(root / first, root / name)
            if not same:
                differing.add(stem)
            rejected.append(Rejected(stem, name, f"is a second copy; {first} {'is the same' if same else 'differs'}"))
    rejected += [Rejected(i, found.pop(i), "another file of this name differs") for i in sorted(differing)]
    return found


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
    values = (intern(row.get(name, "")) or None for name in ("dx_type", "sex", "localization", "dataset"))
    dx_type, sex, localization, named = values
    return Record(
        row["image_id"],
        file,
        row["lesion_id"],
        intern(row["dx"]),
        dx_type,
        age,
        sex,
        localization,
        named or dataset,
        row["lesion_id"],
    )


def join_groups(records: list[Record], pairs: Iterable[tuple[str, str]]) -> int:
    """Give the groups of each pair of images one name, so that no split divides them; returns how many were renamed.

    pairs: image_ids, in any case; those that no record has are ignored. A lesion_id that names a group is renamed too.
    """
    groups = {record.image_id.casefold(): record.group or f"image:{record.image_id}" for record in records}
    joined: dict[str, str] = {}

    def name_of(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for pair in pairs:
        one, other = (groups.get(image_id.casefold()) for image_id in pair)
        if one and other and (first := name_of(one)) != (second := name_of(other)):
            joined[second] = first
    renamed = {*joined, *map(name_of, joined)}
    for place, record in enumerate(records):
        if (group := groups[record.image_id.casefold()]) in renamed:
            lesion = record.lesion_id
            name = name_of(group)
            records[place] = replace(
                record, group=name, lesion_id=name if lesion and lesion == record.group else lesion
            )
    return len(joined)


def one_row_each(
    rows: Iterable[tuple[int, str, Record | str]], table: str, rejected: list[Rejected], one_label: bool = True
) -> tuple[dict[str, Record], dict[str, int]]:
    """The records of a table by image_id, and the line of each image_id, also of those that have no record.

    rows: line, image_id, and the record, or the reason why there is none. An image_id on two lines has one record, or
    none if the lines differ. one_label: all images of a lesion whose lines have two dx are left out. Reasons go to
    `rejected`, with the name of the table.
    """
    records: dict[str, Record] = {}
    lines: dict[str, int] = {}
    contradicted = set()
    for line, image_id, record in rows:
        if isinstance(record, str):
            rejected.append(Rejected(image_id, table, f"line {line}: {record}"))
            lines.setdefault(image_id, line)
            continue
        if image_id in lines:
            reason = f"line {line}: image_id {image_id} is on line {lines[image_id]} too"
            rejected.append(Rejected(image_id, table, reason))
            if records.get(image_id) != record:
                contradicted.add(image_id)
            continue
        records[image_id], lines[image_id] = record, line
    for image_id in sorted(contradicted & records.keys()):
        del records[image_id]
        reason = f"line {lines[image_id]}: another line has other values for image_id {image_id}"
        rejected.append(Rejected(image_id, table, reason))
    diagnoses: dict[str, set[str]] = {}
    for record in records.values() if one_label else ():
        if record.group is not None and record.dx is not None:
            diagnoses.setdefault(record.group, set()).add(record.dx)
    for image_id, record in list(records.items()):
        found = diagnoses.get(record.group or "", set())
        if len(found) > 1:
            del records[image_id]
            reason = f"line {lines[image_id]}: lesion {record.group} has the dx {' and '.join(sorted(found))}"
            rejected.append(Rejected(image_id, table, reason))
    return records, lines
