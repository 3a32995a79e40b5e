"""Raw data as records: one for each usable image, and the reason for each image that is not usable."""

import csv
import filecmp
import hashlib
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from preprocess.tables import PICTURES, read_table
from shards.common.errors import DataError
from shards.common.files import encoded
from shards.format import HAM10000, Classes
from shards.writer import check_image_id

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
"""The columns that HAM10000's metadata must have; `dataset` is optional (older copies lack it)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable image. file: relative to the source folder. None: the source says nothing."""

    image_id: str
    file: str
    lesion_id: str | None
    dx: str
    dx_type: str | None = None
    age: float | None = None
    sex: str | None = None
    localization: str | None = None
    dataset: str | None = None

    def metadata(self) -> dict[str, Any]:
        """The index's columns that come from the source."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "file"}


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of quarantine.csv: an image or row that cannot be packed, the file with the problem, and the reason."""

    image_id: str
    file: str
    reason: str


@dataclass(slots=True)
class Source:
    """The contents of a raw folder: what can be packed, what cannot, and what the user should know.

    citation, licence, about (names and hashes; no path of the machine), classes, group (the columns that lesion_id was
    made from): for the manifest.
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

    def error(self, rejected: Rejected) -> DataError:
        """The error that stops packing at an image that cannot be packed."""
        found = len(self.rejected)
        more = f" (the first of {found} problems)" if found > 1 else ""
        return DataError(
            f"{self.folder / rejected.file}: {rejected.reason}{more}; fix the source, "
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


SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_NAMES |= {"test": "test", "testing": "test"}


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
        row["image_id"], file, row["lesion_id"], intern(row["dx"]), dx_type, age, sex, localization, named or dataset
    )


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
        if record.lesion_id is not None:
            diagnoses.setdefault(record.lesion_id, set()).add(record.dx)
    for image_id, record in list(records.items()):
        found = diagnoses.get(record.lesion_id or "", set())
        if len(found) > 1:
            del records[image_id]
            reason = f"line {lines[image_id]}: lesion {record.lesion_id} has the dx {' and '.join(sorted(found))}"
            rejected.append(Rejected(image_id, table, reason))
    return records, lines
