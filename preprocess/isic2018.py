"""The official ISIC 2018 Task 3 test set → records, to be the test split of a HAM10000 shard set.

Labels come in two official forms, and both can be read: the challenge's one-hot CSV
(`image,MEL,NV,BCC,AKIEC,BKL,DF,VASC`), which has no lesions, and the table next to HAM10000 on Dataverse, which has
HAM10000's columns, lesions included.
"""

from pathlib import Path

from preprocess.ham10000 import read_metadata
from preprocess.records import Record, Records, Rejected, Source, list_images, sha256_of, stem_of
from preprocess.rows import Keyed
from preprocess.tables import Table, read_table
from shards.common.cli import typed
from shards.common.errors import DataError
from shards.writer import check_image_id

CITATION = (
    "Codella, N. et al. Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the International "
    "Skin Imaging Collaboration (ISIC). arXiv:1902.03368 (2019)"
)
LICENCE = "CC BY-NC 4.0"
NAME = "ISIC 2018 Task 3 test"
ONE_HOT = {"MEL": "mel", "NV": "nv", "BCC": "bcc", "AKIEC": "akiec", "BKL": "bkl", "DF": "df", "VASC": "vasc"}
NOT_IN_ARCHIVE = "ISIC_0035068"
"""Listed in the labels, absent from the image archive, and left out by the challenge's own scoring (its code names it,
github.com/ImageMarkup/isic-challenge-scoring). It is left out here too, even if the file is there."""
_DATASET, _REMEDY = "isic2018_task3_test", "the official labels"


def read_test_source(folder: Path) -> Source:
    """Read the test images and labels; single problems are in `rejected`. Raises DataError if either is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; get it with `{typed('preprocess.download')} --test-set`")
    inside = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith("ISIC2018_Task3_Test"))]
    table = _labels(folder, inside)
    source = Source(folder, CITATION, LICENCE)
    images = list_images(folder, inside, source.rejected)
    by_lesion = "lesion_id" in Table(table, _REMEDY).columns
    if by_lesion:
        read_metadata(source, table, images, (NOT_IN_ARCHIVE,), _DATASET)
    else:
        source.records = _read_one_hot(table, images, source.rejected)
    if not source.records:
        raise DataError(f"{table}: lists no image that can be packed from {folder}")
    if not by_lesion:
        source.warnings.append(
            f"the labels of the {NAME} set carry no lesion: intervals on this test split resample images, not lesions"
        )
    column = "image_id" if by_lesion else "image"
    known = [NOT_IN_ARCHIVE] if any(row.get(column) == NOT_IN_ARCHIVE for _, row in read_table(table, ())) else []
    source.about = {"dataset": NAME, "metadata_sha256": sha256_of(table), "known_missing": known}
    return source


def _labels(folder: Path, inside: list[Path]) -> Path:
    """The label table: the one with lesions if both forms are there."""
    names = ("*Test_GroundTruth*.tab", "*Test_GroundTruth*.csv")
    tables = sorted(path for place in inside for name in names for path in place.glob(name) if path.name[0] != ".")
    if not tables:
        raise DataError(
            f"{folder}: holds no ISIC2018_Task3_Test_GroundTruth.csv, here or in a folder ISIC2018_Task3_Test*; "
            f"get it with `{typed('preprocess.download')} --test-set`"
        )
    return next((table for table in tables if "lesion_id" in Table(table, _REMEDY).columns), tables[0])


def _read_one_hot(table: Path, images: Keyed, rejected: list[Rejected]) -> Records:
    """Match the rows of the one-hot CSV with the image files."""
    records: dict[str, Record] = {}
    listed = {NOT_IN_ARCHIVE}
    elsewhere = {r.image_id for r in rejected}
    for line, row in read_table(table, ("image", *ONE_HOT)):
        image_id = row.get("image", "")
        if image_id == NOT_IN_ARCHIVE:
            continue
        seen, reason = image_id in listed, ""
        listed.add(image_id)
        marked = [dx for column, dx in ONE_HOT.items() if row.get(column) in ("1", "1.0")]
        zeros = sum(row.get(column) in ("0", "0.0") for column in ONE_HOT)
        if seen:
            records.pop(image_id, None)
            reason = f"image {image_id} is listed twice"
        elif len(marked) != 1 or zeros != len(ONE_HOT) - 1:
            reason = "must have one class at 1.0 and the others at 0.0"
        else:
            try:
                check_image_id(image_id)
            except DataError as error:
                reason = str(error)
        if reason:
            rejected.append(Rejected(image_id, table.name, f"line {line}: {reason}"))
        elif file := next(iter(images.named(image_id)), ""):
            records[image_id] = Record(image_id, file, None, marked[0], dataset=_DATASET)
        elif image_id not in elsewhere:
            rejected.append(Rejected(image_id, f"{image_id}.jpg", f"is missing, and {table.name} lists it"))
    rejected += [
        Rejected(image_id, file, f"is not listed in {table.name}")
        for file in images
        if (image_id := stem_of(file)) not in listed
    ]
    return Records(records.values())
