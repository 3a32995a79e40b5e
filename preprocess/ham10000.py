"""HAM10000's official folder → records, with all checks of the raw data that need no decoding.

Layout: `HAM10000_metadata.csv`, and the images as `<image_id>.jpg` in one or more `HAM10000_images*` folders or next to
the metadata (Tschandl, Rosendahl & Kittler, Sci. Data 5:180161, 2018; data set doi:10.7910/DVN/DBW86T).
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from preprocess.records import (
    COLUMNS,
    Record,
    Records,
    Rejected,
    Source,
    SourceColumns,
    join_groups,
    list_images,
    one_row_each,
    record_from,
    sha256_of,
    stem_of,
)
from preprocess.rows import Keyed, Texts, hash_of, hashes_of
from preprocess.tables import PICTURES, Table
from shards.common.cli import typed
from shards.common.errors import DataError
from shards.format import HAM10000

_TEXTS = ("", ".csv", ".md", ".pdf", ".tab", ".tsv", ".txt")
METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
CITATION = (
    "Tschandl, P., Rosendahl, C. & Kittler, H. The HAM10000 dataset, a large collection of multi-source dermatoscopic "
    "images of common pigmented skin lesions. Sci. Data 5, 180161 (2018). doi:10.1038/sdata.2018.161; "
    "data: doi:10.7910/DVN/DBW86T"
)
LICENCE = "CC BY-NC 4.0"
SYNTHETIC = ("computed images (preprocess.synthetic), no patients", "Apache-2.0")
"""What computed images cite, and their licence."""
HOME = Path("data/ham10000")
"""Default raw folder of the commands."""
SAME_LESION = """
    33481+33421 33556+32634 29152+33173 29036+27027 27820+28209 27689+32647
    30906+24879 33391+34186 25226+30074 26087+25664 24736+29748 24770+27811
    27162+29061 24602+32283 29625+24629 30000+31392 24437+31299 33374+33417
"""
"""Pairs of images, by their number in `ISIC_00…`, that show one lesion and have two lesion_ids: Abhishek, Jain &
Hamarneh, Investigating the quality of DermaMNIST and Fitzpatrick17k, Sci. Data 12:196 (2025), arXiv:2401.14497."""
_MANY_VIEWS = 50
"""A CSV with more images than this of one lesion looks augmented: in HAM10000 no lesion has more than 6."""


def read_source(folder: Path) -> Source:
    """Read a raw folder.

    Problems of single images or rows are in `rejected` of the result. Raises DataError if there is no folder, no
    metadata or no image that can be packed, or if a needed column is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name the folder that holds {METADATA[0]}")
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; {_how_to_get(folder)}")
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if table is None:
        raise DataError(f"{folder}: holds no {METADATA[0]}; {_how_to_get(folder)}")
    source = Source(folder, CITATION, LICENCE)
    folders = [folder, *sorted(p for p in folder.glob("HAM10000_images*") if p.is_dir())]
    images = list_images(folder, folders, source.rejected)
    if not images and not source.rejected:
        raise DataError(f"{folder}: no images in it or in its HAM10000_images* folders; {_how_to_get(folder)}")
    read_metadata(source, table, images, known=())
    if not source.records:
        first = f" (first: {source.rejected[0].reason})" if source.rejected else ""
        raise DataError(f"{table}: lists no image that can be packed{first}")
    joined = join_same_lesions(source)
    source.warnings = _warnings(source.records)
    synthetic = set(source.records.column("dataset")) == {"synthetic"}
    if synthetic:
        source.citation, source.licence = SYNTHETIC
    source.about = {"dataset": "synthetic" if synthetic else "HAM10000", "metadata_sha256": sha256_of(table)}
    if joined:
        source.about["joined_lesions"] = joined
    return source


def _how_to_get(folder: Path) -> str:
    """How to get the data that a folder lacks, and what it holds instead of images and texts.

    A synthetic set is only written to a new or an empty folder.
    """
    where = "" if folder == HOME else f" --out {folder}"
    filled = folder.exists() and any(folder.iterdir())
    place, name = ("a new folder", "NEW") if filled else ("it", folder)
    endings = Counter(path.suffix.lower() for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    others = [f"{count:,} {ending}" for ending, count in endings.most_common() if ending not in (*_TEXTS, *PICTURES)]
    other = f"it holds {', '.join(others[:3])} files: unpack archives and convert images to JPEG or PNG, or "
    return (
        f"{other if others else ''}get HAM10000 with `{typed('preprocess.download')}{where}`, or write a synthetic set "
        f"into {place} with `{typed('preprocess.synthetic')} --out {name}`"
    )


def read_metadata(
    source: Source, table: Path, images: Keyed, known: Collection[str], dataset: str | None = None
) -> None:
    """Match the rows of a table in HAM10000's format with the image files: the records of a source, in the order of the
    table, and its further columns. Mismatches are rejected.

    images: found by image_id. known: image_ids that are skipped silently. dataset: the default of that column.
    """
    whole = Table(table, "the official metadata")
    whole.require(COLUMNS)
    columns = SourceColumns(whole.columns, (*COLUMNS, "dataset"))

    def rows() -> Iterator[tuple[int, str, Record | str]]:
        for line, row in whole:
            image_id = row.get("image_id", "")
            if image_id not in known:
                try:
                    record = record_from(row, next(iter(images.named(image_id)), ""), dataset)
                    yield line, image_id, replace(record, row=columns.add(row))
                except ValueError as error:
                    yield line, image_id, str(error)

    rejected, before = source.rejected, len(source.rejected)
    records = one_row_each(rows(), table.name, rejected)
    elsewhere = {r.image_id for r in rejected}
    listed, others = Texts(records.column("image_id")), {*known, *(r.image_id for r in rejected[before:])}
    unlisted = {i: file for file in images if (i := stem_of(file)) not in others and i not in listed}
    without = {i: "" for i, file in zip(*map(records.column, ("image_id", "file")), strict=True) if not file}
    if without:
        _in_another_case(without, unlisted)
        found = (replace(record, file=without.get(record.image_id, record.file)) for record in records)
        records = Records(record for record in found if record.file)
    rejected += [
        Rejected(image_id, f"{image_id}.jpg", f"is missing, and {table.name} lists it")
        for image_id, file in without.items()
        if not file and image_id not in elsewhere
    ]
    rejected += [Rejected(image_id, file, f"is not listed in {table.name}") for image_id, file in unlisted.items()]
    source.records, source.columns = records, columns.table()


def _in_another_case(without: dict[str, str], unlisted: dict[str, str]) -> None:
    """Give image_ids without a file the unlisted one whose name differs in upper and lower case alone, if there is one
    such image_id and one such file, which is no longer unlisted then."""
    wanted: dict[str, list[str]] = {}
    for image_id in without:
        wanted.setdefault(image_id.casefold(), []).append(image_id)
    names = Counter(map(str.casefold, unlisted))
    for name in list(unlisted):
        ids = wanted.get(name.casefold(), [])
        if len(ids) == names[name.casefold()] == 1:
            without[ids[0]] = unlisted.pop(name)


def join_same_lesions(source: Source) -> int:
    """Give the lesions of each pair in SAME_LESION one name; returns how many were renamed."""
    pairs = (pair.split("+") for pair in SAME_LESION.split())
    return join_groups(source, [(f"ISIC_{int(a):07d}", f"ISIC_{int(b):07d}") for a, b in pairs])


def _warnings(records: Records) -> list[str]:
    """Warnings about what is allowed but probably a mistake."""
    keys, counts = np.unique(hashes_of(records.column("lesion_id")), return_counts=True)
    views, warnings = counts.max(), []
    if views > _MANY_VIEWS:
        most = keys[counts == views]
        lesion = next(lesion for lesion in records.column("lesion_id") if hash_of(lesion) in most)
        warnings.append(
            f"lesion {lesion} owns {views:,} images, and in HAM10000 none has more than 6: this looks like an "
            "augmented CSV, whose copies make all results look too good; use the official metadata"
        )
    absent = sorted(set(HAM10000.names) - set(records.column("dx")))
    if absent:
        warnings.append(
            f"the source has no image of {', '.join(absent)}: a model trained on it cannot know these classes"
        )
    return warnings
