"""The official HAM10000 files, fetched, checked and unpacked.

    python -m preprocess.download                  # 10,015 images and their metadata, 2.8 GB
    python -m preprocess.download --test-set       # and the 1,511 images of the ISIC 2018 Task 3 test set, 0.4 GB

Leaves `HAM10000_images_part_1/`, `HAM10000_images_part_2/` and `HAM10000_metadata.csv` in --out, where
`python -m preprocess.shard` finds them. Start it again after any interruption: what has come is kept, and what is
finished is not fetched again.
"""

import csv
import io
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from preprocess.fetch import RemoteFile, fetch, open_session, part_of
from preprocess.ham10000 import CITATION, HOME, LICENCE, read_source
from preprocess.isic2018 import CITATION as TEST_CITATION
from preprocess.isic2018 import NOT_IN_ARCHIVE, ONE_HOT
from preprocess.records import list_images
from preprocess.unpack import read_only_member, unpack_images
from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.common.files import exclusive, write_durably

TEST_FOLDER = "ISIC2018_Task3_Test"
_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile"
_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2018"


@dataclass(frozen=True, slots=True)
class Item:
    """One official file and what becomes of it.

    target: the folder or file, within --out. images: that the archive holds; 0 where the item is a table. rows: images
    per class in the test labels, by which they are known, as nobody has published their hash.
    """

    remote: RemoteFile
    target: str
    images: int = 0
    rows: dict[str, int] | None = None
    test: bool = False


OFFICIAL = (
    Item(
        RemoteFile(
            "HAM10000_metadata.csv",
            f"{_DATAVERSE}/4338392?format=original",
            690_218,
            "8f85fb1aa29d80a2797247e434deb79d",
        ),
        "HAM10000_metadata.csv",
    ),
    Item(
        RemoteFile(
            "HAM10000_images_part_1.zip", f"{_DATAVERSE}/3172585", 1_366_522_108, "4639bfa73ab251610530a97c898e6e46"
        ),
        "HAM10000_images_part_1",
        images=5_000,
    ),
    Item(
        RemoteFile(
            "HAM10000_images_part_2.zip", f"{_DATAVERSE}/3172584", 1_403_566_547, "da43d6cc50f6613013be07e8986b384b"
        ),
        "HAM10000_images_part_2",
        images=5_015,
    ),
    Item(
        RemoteFile(
            "ISIC2018_Task3_Test_Images.zip",
            f"{_DATAVERSE}/3855824",
            401_500_000,
            "0488b6f65849e310857d9207daa55a21",
            exact=False,
        ),
        f"{TEST_FOLDER}/ISIC2018_Task3_Test_Images",
        images=1_511,
        test=True,
    ),
    Item(
        RemoteFile(
            "ISIC2018_Task3_Test_GroundTruth.zip",
            f"{_ISIC}/ISIC2018_Task3_Test_GroundTruth.zip",
            50_000,
            None,
            exact=False,
        ),
        f"{TEST_FOLDER}/ISIC2018_Task3_Test_GroundTruth.csv",
        rows={"MEL": 171, "NV": 909, "BCC": 93, "AKIEC": 43, "BKL": 217, "DF": 44, "VASC": 35},
        test=True,
    ),
)
"""Addresses, sizes and MD5 sums: Harvard Dataverse, doi:10.7910/DVN/DBW86T; test labels: the ISIC challenge archive."""


def is_done(item: Item, out: Path) -> bool:
    """Whether an item is there already. Raises DataError where something else stands in its place."""
    target = out / item.target
    if item.images and target.exists():
        images = len(list_images(out, [target], [])) if target.is_dir() else 0
        if images != item.images:
            raise DataError(
                f"{target}: holds {images:,} images, and the official one {item.images:,}; move it away and start "
                "again to get the official one"
            )
        return True
    if item.rows is not None and target.exists():
        try:
            check_labels(target.read_bytes(), item.rows, str(target))
        except DataError as error:
            raise DataError(f"{error}; move it away and start again to get the official one") from None
        return True
    return False


def check_labels(content: bytes, rows: dict[str, int], name: str) -> list[str]:
    """Check the one-hot table of the test labels; returns its image_ids. Raises DataError for any other table."""
    try:
        table = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}: is no CSV ({error})") from None
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
    """Raise DataError where the disk cannot hold what is still to come: all that is unpacked, and the largest archive.

    JPEGs hardly get smaller in an archive, so unpacked they need what it needs, and up to a block of 4 KiB more each.
    """
    unpacked = sum(item.remote.bytes + item.images * 4096 for item in items if not (out / item.target).exists())
    to_fetch = [
        item.remote.bytes - _size(part_of(out / item.remote.name)) - _size(out / item.remote.name)
        for item in items
        if item.images
    ]
    needed, free = unpacked + max([0, *to_fetch]), shutil.disk_usage(out).free
    if free < needed:
        raise DataError(
            f"{out}: {needed / 1e9:.1f} GB are needed there and {free / 1e9:.1f} GB are free; free some space, or "
            "choose another --out"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def download(items: Sequence[Item], out: Path, base_url: str | None = None, pause_s: float = 1.0) -> None:
    """Bring every item to `out`, in order, each whole and checked or not at all.

    base_url: a mirror that serves the files under their names. pause_s: of the retries. Raises DataError.
    """
    with exclusive(out, "downloading to it"):
        to_come = [item for item in items if not is_done(item, out)]
        check_space(to_come, out)
        with open_session(pause_s) as session:
            for item in items:
                if item not in to_come:
                    click.echo(f"{item.target}: there already")
                    continue
                remote = item.remote
                if base_url is not None:
                    remote = RemoteFile(
                        remote.name, f"{base_url.rstrip('/')}/{remote.name}", remote.bytes, remote.md5, remote.exact
                    )
                path = fetch(session, remote, out, pause_s)
                if path != out / item.target:
                    _put_in_place(path, item, out)
                click.echo(f"{item.target}: {f'{item.images:,} images' if item.images else 'checked'}")
        _check_whole(items, out)


def _put_in_place(archive: Path, item: Item, out: Path) -> None:
    """Unpack an archive to its target and remove it; a wrong one is removed too."""
    target = out / item.target
    target.parent.mkdir(exist_ok=True)
    try:
        if item.images:
            unpack_images(archive, target, item.images)
        else:
            content = read_only_member(archive, ".csv")
            if item.rows is not None:
                check_labels(content, item.rows, archive.name)
            write_durably(target, content)
    except DataError as error:
        archive.unlink()
        raise DataError(
            f"{error}; nothing was unpacked and the archive was removed: start again to get it anew"
        ) from None
    archive.unlink()


def _check_whole(items: Sequence[Item], out: Path) -> None:
    """Raise DataError unless images and tables name each other: every hash can fit and a file be lost afterwards."""
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
                f"{out / TEST_FOLDER}: {odd[0]} is {'listed' if odd[0] in listed else 'an image'} only, and so are "
                f"{len(odd) - 1} others: images and labels do not belong together; remove that folder and start again"
            )


@click.command(context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=HOME,
    help="Where the files go; archives are removed once unpacked.",
)
@click.option("--test-set", is_flag=True, help="Also the official test set of ISIC 2018 Task 3.")
@click.option(
    "--base-url",
    metavar="URL",
    help="A mirror that serves the files under their names; sizes and hashes are checked all the same.",
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
    click.echo(f"{sum(item.images for item in items):,} images in {out}, whole and checked")
    where = "" if out == HOME else f" --source {out}"
    click.echo(
        f"Pack them: python -m preprocess.shard{where}{f' --test-source {out / TEST_FOLDER}' if test_set else ''}"
    )


if __name__ == "__main__":
    cli.run(main)
