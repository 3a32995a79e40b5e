"""The official HAM10000 files: fetched, checked and unpacked.

    python -m preprocess.download                  # 10,015 images and their metadata, 2.8 GB
    python -m preprocess.download --test-set       # and the 1,511 images of the ISIC 2018 Task 3 test set, 0.4 GB

Leaves `HAM10000_images_part_1/`, `HAM10000_images_part_2/` and `HAM10000_metadata.csv` in --out, where
`python -m preprocess.shard` finds them. Start it again after any interruption: what has arrived is kept, and finished
files are not fetched again.

The archives of images are known by their MD5, so their contents are trusted. Nobody has published a hash of the test
labels: of that archive one table is read, and its rows are checked.
"""

import csv
import io
import os
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click

from preprocess.ham10000 import CITATION, HOME, LICENCE, read_source
from preprocess.isic2018 import CITATION as TEST_CITATION
from preprocess.isic2018 import NOT_IN_ARCHIVE, ONE_HOT
from preprocess.records import list_images
from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.common.fetch import RemoteFile, fetch, open_session, part_of, size_of
from shards.common.files import exclusive, full_disk_names, write_durably
from shards.common.progress import Progress

TEST_FOLDER = "ISIC2018_Task3_Test"
_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile"
_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2018"


@dataclass(frozen=True, slots=True)
class Item(RemoteFile):
    """One official file and where it goes.

    target: the folder or file, within --out. images: number in the archive; 0 for a table. rows: images per class in
    the test labels, which are checked instead of a hash.
    """

    target: str = ""
    images: int = 0
    rows: dict[str, int] | None = None
    test: bool = False


OFFICIAL = (
    Item(
        "HAM10000_metadata.csv",
        f"{_DATAVERSE}/4338392?format=original",
        690_218,
        "8f85fb1aa29d80a2797247e434deb79d",
        target="HAM10000_metadata.csv",
    ),
    Item(
        "HAM10000_images_part_1.zip",
        f"{_DATAVERSE}/3172585",
        1_366_522_108,
        "4639bfa73ab251610530a97c898e6e46",
        target="HAM10000_images_part_1",
        images=5_000,
    ),
    Item(
        "HAM10000_images_part_2.zip",
        f"{_DATAVERSE}/3172584",
        1_403_566_547,
        "da43d6cc50f6613013be07e8986b384b",
        target="HAM10000_images_part_2",
        images=5_015,
    ),
    Item(
        "ISIC2018_Task3_Test_Images.zip",
        f"{_DATAVERSE}/3855824",
        401_500_000,
        "0488b6f65849e310857d9207daa55a21",
        exact=False,
        target=f"{TEST_FOLDER}/ISIC2018_Task3_Test_Images",
        images=1_511,
        test=True,
    ),
    Item(
        "ISIC2018_Task3_Test_GroundTruth.zip",
        f"{_ISIC}/ISIC2018_Task3_Test_GroundTruth.zip",
        50_000,
        None,
        exact=False,
        target=f"{TEST_FOLDER}/ISIC2018_Task3_Test_GroundTruth.csv",
        rows={"MEL": 171, "NV": 909, "BCC": 93, "AKIEC": 43, "BKL": 217, "DF": 44, "VASC": 35},
        test=True,
    ),
)
"""Addresses, sizes and MD5 sums: Harvard Dataverse, doi:10.7910/DVN/DBW86T; test labels: the ISIC challenge archive."""

_MOST_LABEL_BYTES = 1 << 24
"""An unpacked table of test labels may not be larger; the official one has 0.1 MB."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError)
"""What zipfile and zlib raise for damaged archives; UnicodeDecodeError: for a name marked as UTF-8 that is not."""


def is_done(item: Item, out: Path) -> bool:
    """Whether an item is complete already. Raises DataError if something else is in its place."""
    target, wrong = out / item.target, None
    if not target.exists() or not (item.images or item.rows):
        return False
    if item.images:
        images = len(list_images(out, [target], [])) if target.is_dir() else 0
        if images != item.images:
            wrong = f"{target}: holds {images:,} images, and the official one {item.images:,}"
    elif item.rows:
        try:
            check_labels(target.read_bytes(), item.rows, str(target))
        except DataError as error:
            wrong = str(error)
    if wrong:
        raise DataError(f"{wrong}; move it away and start again to get the official one")
    return True


def check_labels(content: bytes, rows: dict[str, int], name: str) -> list[str]:
    """Check the one-hot table of the test labels; returns its image_ids. Raises DataError for another table."""
    try:
        table = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}: is not a CSV file ({error})") from None
    header = ["image", *ONE_HOT]
    if not table or table[0] != header:
        raise DataError(f"{name}: its first line is not {','.join(header)}")
    found: Counter[str] = Counter()
    for line, row in enumerate(table[1:], start=2):
        try:
            marks = [float(value) for value in row[1:]]
        except ValueError:
            marks = []
        if sorted(marks) != [0.0] * (len(ONE_HOT) - 1) + [1.0]:
            raise DataError(f"{name}: line {line} must have one class at 1.0 and the others at 0.0")
        found[header[1 + marks.index(1.0)]] += 1
    if found != Counter(rows):
        wrong = next(dx for dx in rows if found[dx] != rows[dx])
        raise DataError(f"{name}: {found[wrong]:,} images of {wrong}, and the official table has {rows[wrong]:,}")
    images = [row[0] for row in table[1:]]
    if len(set(images)) != len(images):
        raise DataError(f"{name}: lists an image twice")
    return images


def check_space(items: Sequence[Item], out: Path) -> None:
    """Raise DataError if the disk is too small for what is missing: all unpacked files and the largest archive.

    An archive hardly compresses JPEGs: unpacked they take its size, and up to a disk block of 4 KiB more each.
    """
    unpacked = sum(item.bytes + item.images * 4096 for item in items if not (out / item.target).exists())
    to_fetch = [
        item.bytes - size_of(part_of(out / item.name)) - size_of(out / item.name) for item in items if item.images
    ]
    needed, free = unpacked + max([0, *to_fetch]), shutil.disk_usage(out).free
    if free < needed:
        raise DataError(
            f"{out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; free some space, or choose "
            "another --out"
        )


def download(items: Sequence[Item], out: Path, base_url: str | None = None, pause_s: float = 1.0) -> None:
    """Fetch every item into `out`, in order, each complete and checked or not at all.

    base_url: a mirror that serves the files under their names. pause_s: before a retry. Raises DataError.
    """
    with full_disk_names(out), exclusive(out, "downloading to it"):
        missing = [item for item in items if not is_done(item, out)]
        check_space(missing, out)
        with open_session(pause_s) as session:
            for item in items:
                if item not in missing:
                    click.echo(f"{item.target}: already there")
                    continue
                url = item.url if base_url is None else f"{base_url.rstrip('/')}/{item.name}"
                path = fetch(session, replace(item, url=url), out, pause_s)
                if path != out / item.target:
                    _put_in_place(path, item, out)
                click.echo(f"{item.target}: {f'{item.images:,} images' if item.images else 'checked'}")
        _check_whole(items, out)


def _put_in_place(archive: Path, item: Item, out: Path) -> None:
    """Unpack an archive to its target and remove the archive, also if it is wrong."""
    target = out / item.target
    target.parent.mkdir(exist_ok=True)
    try:
        if item.images:
            _unpack_images(archive, target, item.images)
        else:
            content = read_labels(archive)
            if item.rows is not None:
                check_labels(content, item.rows, archive.name)
            write_durably(target, content)
    except DataError as error:
        archive.unlink()
        raise DataError(
            f"{error}; nothing was unpacked and the archive was removed: start again to get a new one"
        ) from None
    archive.unlink()


@contextmanager
def _opened(archive_path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive to read from; what zipfile and zlib raise for a damaged one becomes a DataError."""
    try:
        with zipfile.ZipFile(archive_path) as archive:
            yield archive
    except _DAMAGED as error:
        reason = "it ends too early" if isinstance(error, EOFError) else error  # an EOFError has no text
        raise DataError(f"{archive_path.name}: is damaged or not a zip archive ({reason})") from None


def _members(archive: zipfile.ZipFile, suffix: str) -> dict[str, zipfile.ZipInfo]:
    """File name → member, of those with `suffix` that are not hidden (`._…`, as archives made on a Mac have)."""
    members = (info for info in archive.infolist() if info.filename)  # `is_dir` looks at the last letter
    files = {Path(info.filename).name: info for info in members if not info.is_dir()}
    return {n: info for n, info in files.items() if n.lower().endswith(suffix) and not n.startswith(".")}


def _unpack_images(archive_path: Path, target: Path, images: int) -> None:
    """Unpack the `.jpg` members of an archive into `.NAME.partial`, renamed to the new folder `target` at the end.

    Raises DataError for a damaged archive, or if it does not hold `images` images.
    """
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # left by a killed run
        shutil.rmtree(partial)
    try:
        with _opened(archive_path) as archive:
            found = _members(archive, ".jpg")
            if len(found) != images:
                raise DataError(f"{archive_path.name}: holds {len(found):,} images, and the official one {images:,}")
            partial.mkdir()
            with Progress(f"unpacking {archive_path.name}", images, "images") as bar:
                for name, info in found.items():
                    with archive.open(info) as source, (partial / name).open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    bar.advance(1)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.sync()  # one flush for thousands of files
    partial.rename(target)


def read_labels(archive_path: Path) -> bytes:
    """The one `.csv` member of an archive that is not trusted: it is read into memory and unpacked nowhere.

    Raises DataError for a damaged archive and for one that is packed in another way than the official one.
    """
    with _opened(archive_path) as archive:
        found = _members(archive, ".csv")
        if len(found) != 1:
            raise DataError(f"{archive_path.name}: holds {len(found)} .csv files, and one is expected")
        (info,) = found.values()
        reason = None
        if info.file_size > _MOST_LABEL_BYTES:
            reason = f"it would unpack to {info.file_size:,} bytes"
        elif info.flag_bits & 1:
            reason = "it is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "it is neither stored nor deflated"
        elif not 0 <= info.header_offset < archive.start_dir:  # zipfile would seek there all the same
            reason = "it begins outside the archive"
        if reason:
            raise DataError(f"{archive_path.name}: its .csv file cannot be read, because {reason}")
        return archive.read(info)


def _check_whole(items: Sequence[Item], out: Path) -> None:
    """Raise DataError unless images and tables match: a file can be lost after its hash was checked."""
    source = read_source(out)
    if source.rejected:
        first = source.rejected[0]
        raise DataError(
            f"{out / first.file}: {first.reason} ({len(source.rejected)} in all); remove that folder and start again"
        )
    labels = next((item for item in items if item.rows is not None), None)
    if labels is not None and labels.rows is not None:
        table = out / labels.target
        listed = set(check_labels(table.read_bytes(), labels.rows, str(table)))
        there = {path.stem for item in items if item.test and item.images for path in (out / item.target).iterdir()}
        odd = sorted((listed ^ there) - {NOT_IN_ARCHIVE})
        if odd:
            raise DataError(
                f"{out / TEST_FOLDER}: {odd[0]} has {'no image' if odd[0] in listed else 'no label'}, and "
                f"{len(odd)} such names differ: images and labels do not belong together; remove that folder and start "
                "again"
            )


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=HOME,
    help="Folder for the files, about 2.8 GB; archives are removed once unpacked.",
)
@click.option("--test-set", is_flag=True, help="Fetch the official test set of ISIC 2018 Task 3 too: 0.4 GB more.")
@click.option(
    "--base-url",
    metavar="URL",
    help="A mirror that serves the files under their names; sizes and hashes are still checked.",
)
def main(out: Path, test_set: bool, base_url: str | None) -> None:
    """Fetch the official HAM10000 files, check and unpack them."""
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise UsageError(f"--base-url '{base_url}': must start with http:// or https://")
    click.echo(f"HAM10000 is licensed {LICENCE}: non-commercial use, with attribution. Cite:\n  {CITATION}")
    if test_set:
        click.echo(f"  {TEST_CITATION}")
    items = [item for item in OFFICIAL if test_set or not item.test]
    download(items, out, base_url)
    click.echo(f"{sum(item.images for item in items):,} images in {out}, complete and checked")
    where = "" if out == HOME else f" --source {out}"
    click.echo(
        f"Pack them: {cli.typed('preprocess.shard')}{where}{f' --test-source {out / TEST_FOLDER}' if test_set else ''}"
    )


if __name__ == "__main__":
    cli.run(main)
