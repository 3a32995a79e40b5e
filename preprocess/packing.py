"""Records → a shard set: images are split, ordered, encoded on every core, and written in order.

The order of the samples, and so every byte of the set, depends only on records and settings. Workers are threads:
decoder, encoder and resize release the GIL. The number of images in progress is limited, so memory grows with the
records and the index, and not with the images.
"""

import os
import re
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import xxhash

from preprocess.records import Record, Rejected, Source, join_groups, quarantine_csv
from shards.common import kept
from shards.common.errors import DataError, one_line
from shards.common.files import full_disk_names
from shards.common.machine import keep_freed_memory, single_threaded_opencv
from shards.common.progress import Progress
from shards.common.readahead import read_ahead
from shards.duplicates import Copy, copies_csv, find_copies, image_hash
from shards.encode import (
    JPEG,
    TOGETHER,
    BadImageError,
    Encoded,
    decode_upright,
    encode_images,
    encode_pixels,
    shrink,
)
from shards.format import DUPLICATES, QUARANTINE, SPLITS, EncodeSpec, Manifest
from shards.pictures import decode_picture
from shards.store import is_address
from shards.subsets import fold_of, split_lesions
from shards.writer import PackedSample, ShardSetWriter

_WINDOW = 16
"""Images in progress per worker: enough to keep every worker busy while a full shard is flushed to the disk."""


@dataclass(frozen=True)
class Settings:
    """The settings of a shard set; `workers`, `overwrite` and `skip_bad` change no byte of a set without bad images.

    ratio: of images in train, val and test. unit: `lesion`, or `image`, which puts views of one lesion into several
    splits. fold: number from 1 of the fold that is the test split, and how many folds there are, instead of the ratio.
    assigned: image_id → split, instead of the two; what it does not list cannot be packed. assigned_from: what
    the manifest says of it.
    """

    encode: EncodeSpec = field(default_factory=EncodeSpec)
    ratio: tuple[int, int, int] = (70, 10, 20)
    seed: int = 0
    unit: str = "lesion"
    fold: tuple[int, int] | None = None
    assigned: dict[str, str] | None = None
    assigned_from: dict[str, str] = field(default_factory=dict)
    shard_bytes: int = 64 << 20
    workers: int = 1
    skip_bad: bool = False
    overwrite: bool = False
    join_duplicates: bool = False


@dataclass(frozen=True)
class Packed:
    """The result: the manifest, everything that was left out, warnings, and the seconds that packing took."""

    manifest: Manifest
    rejected: list[Rejected]
    warnings: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    source: Source
    record: Record
    split: str

    @property
    def path(self) -> str:
        return f"{self.source.folder}/{self.record.file}"  # a Path takes ten times as long


@dataclass(slots=True)
class _Tally:
    """Counts made while packing: per source, and over the pixels of the training split."""

    images: dict[str, int] = field(default_factory=dict)
    lesions: dict[str, set[str]] = field(default_factory=dict)
    sums: list[int] = field(default_factory=lambda: [0] * 6)
    pixels: int = 0

    def count(self, job: _Job, encoded: Encoded) -> None:
        name = job.source.about["dataset"]
        self.images[name] = self.images.get(name, 0) + 1
        if job.record.group is not None:
            self.lesions.setdefault(name, set()).add(job.record.group)
        if job.split == "train" or not job.source.classes:
            self.sums = [a + b for a, b in zip(self.sums, encoded.sums, strict=True)]
            self.pixels += encoded.height * encoded.width

    def moments(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per channel, 0 to 1, from integers: the order of summing cannot change them."""
        n = self.pixels
        mean = [s / n / 255 for s in self.sums[:3]]
        std = [(n * squares - s * s) ** 0.5 / n / 255 for s, squares in zip(self.sums[:3], self.sums[3:], strict=True)]
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

    def about(self, source: Source) -> dict[str, Any]:
        name = source.about["dataset"]
        lesions = len(self.lesions[name]) if name in self.lesions else None
        return source.about | {"images": self.images.get(name, 0), "lesions": lesions}


def pack(source: Source, out: str | Path, settings: Settings, test: Source | None = None) -> Packed:
    """Write the shard set `out` from `source`; with `test`, that source is the test split and `source` the other two.

    out: a folder, or an address in a store. Raises DataError for the first image that cannot be packed, unless
    `settings.skip_bad`, and leaves no set behind.
    """
    started = time.monotonic()
    sources = [source] if test is None else [source, test]
    if test is not None:
        _drop_seen(source, test)
    if settings.assigned is not None:
        _drop_unassigned(sources, settings.assigned)
    if not settings.skip_bad:
        for each in sources:
            if each.rejected:
                raise each.error(each.rejected[0])
    keep_freed_memory()
    if settings.join_duplicates:
        _join_duplicates(source, settings)
    jobs = _jobs(source, test, settings)
    rejected = [r for each in sources for r in each.rejected]
    tally, columns = _Tally(), _Columns(sources)
    packed: list[_Job] = []
    hashes: list[int] = []
    with (
        full_disk_names(kept.home() if is_address(out) else Path(out)),
        single_threaded_opencv(),
        ShardSetWriter(
            out, settings.encode, settings.shard_bytes, settings.overwrite, source.classes, columns.schema
        ) as writer,
        Progress("packing", len(jobs), "images") as bar,
        ThreadPoolExecutor(settings.workers, thread_name_prefix="pack") as pool,
        closing(_encoded(pool, jobs, settings)) as encoded_jobs,
    ):
        for job, encoded in encoded_jobs:
            bar.advance(1)
            if isinstance(encoded, Rejected):
                if not settings.skip_bad:
                    raise job.source.error(encoded)
                rejected.append(encoded)
            else:
                writer.add(_sample(job, encoded, columns.of(job)))
                tally.count(job, encoded)
                packed.append(job)
                hashes.append(encoded.hash)
        if not tally.pixels:
            raise DataError(f"{source.folder}: no training image could be packed ({len(rejected)} were left out)")
        if rejected:
            writer.attach(QUARANTINE, quarantine_csv(rejected))
        copies = _copies(packed, hashes, settings.encode.max_resolution)
        if copies:
            names = [job.record.image_id for job in packed]
            writer.attach(DUPLICATES, copies_csv(copies, names, names))
        mean, std = tally.moments()
        ratio, unit = _ratio(settings, test), settings.unit
        if settings.assigned is not None:
            given = [job.split for job in jobs]
            ratio, unit = (given.count("train"), given.count("val"), given.count("test")), _divided_unit(jobs)[0]
        split = {"ratio": list(ratio), "seed": settings.seed, "unit": unit, **settings.assigned_from}
        if settings.fold is not None:
            split |= {"fold": settings.fold[0], "folds": settings.fold[1]}
        about = tally.about(source) | {"quarantined": len(rejected)}
        manifest = writer.finish(
            mean=mean,
            std=std,
            split=split | {"test_source": test.about["dataset"] if test else None},
            source=about | {"test": tally.about(test) if test else None},
            citation="; ".join(dict.fromkeys(each.citation for each in sources)),
            licence="; ".join(dict.fromkeys(each.licence for each in sources)),
            versions=library_versions(),
            group=source.group,
        )
    warnings = _missing_classes(manifest) + (_divided_unit(jobs)[1] if settings.assigned is not None else [])
    if copies:
        warnings.append(_said(copies, packed))
    return Packed(manifest, rejected, warnings, time.monotonic() - started)


def _encoded(
    pool: ThreadPoolExecutor, jobs: list[_Job], settings: Settings
) -> Generator[tuple[_Job, Encoded | Rejected], None, None]:
    """Every job with its payload, in order."""

    def submit(group: list[_Job]) -> list[Future[list[Encoded | Rejected]]]:
        for job in group:
            _read_ahead_of_use(job.path)
        return [pool.submit(_encode, group, settings.encode)]

    groups = (jobs[start : start + TOGETHER] for start in range(0, len(jobs), TOGETHER))
    for group, (encoded,) in read_ahead(submit, groups, _WINDOW * settings.workers // TOGETHER):
        yield from zip(group, encoded, strict=True)


def _read_ahead_of_use(file: str) -> None:
    """Tell the system that a file is needed soon: it reads the file while others are in progress."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:  # the worker that opens the file reports the error
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _drop_seen(source: Source, test: Source) -> None:
    """Reject test images that are in the training source, or whose lesion is: a test image must be unseen.

    Raises DataError if a class of the test source is none of the training source's.
    """
    if unknown := sorted({str(record.dx) for record in test.records} - set(source.classes.names)):
        raise DataError(
            f"{test.folder}: has images of {', '.join(unknown)}, none of the classes of {source.folder} "
            f"({one_line(', '.join(source.classes.names), 160)}); leave --test-source out"
        )
    images = {record.image_id for record in source.records}
    lesions = {record.group for record in source.records}
    kept = []
    for record in test.records:
        if record.image_id in images:
            test.rejected.append(Rejected(record.image_id, record.file, "is in the training source too"))
        elif record.group is not None and record.group in lesions:
            reason = f"shows lesion {record.group}, which is in the training source too"
            test.rejected.append(Rejected(record.image_id, record.file, reason))
        else:
            kept.append(record)
    test.records = kept


def _drop_unassigned(sources: list[Source], assigned: dict[str, str]) -> None:
    """Reject images that no split is given for, and names in the list of splits that no image has."""
    there = {record.image_id for source in sources for record in source.records}
    for source in sources:
        kept = [record for record in source.records if record.image_id in assigned]
        source.rejected += [
            Rejected(record.image_id, record.file, "is not in the split file")
            for record in source.records
            if record.image_id not in assigned
        ]
        source.records = kept
    known = there | {rejected.image_id for source in sources for rejected in source.rejected}
    sources[0].rejected += [
        Rejected(image_id, f"{image_id}.jpg", "is in the split file, and the source does not have it")
        for image_id in assigned
        if image_id not in known
    ]


def _divided_unit(jobs: list[_Job]) -> tuple[str, list[str]]:
    """What given splits do not divide, `lesion` or `image`, and a warning if it is images alone."""
    splits: dict[str, set[str]] = {}
    for job in jobs:
        if job.record.group is not None:
            splits.setdefault(job.record.group, set()).add(job.split)
    divided = sorted(lesion for lesion, found in splits.items() if len(found) > 1)
    if not divided:
        return "lesion", []
    return "image", [
        f"the given splits put views of {len(divided):,} lesions into several splits (first: {divided[0]}): "
        "results look better than they are"
    ]


def _ratio(settings: Settings, test: Source | None) -> tuple[int, int, int]:
    """The ratio that `source` is split by. If `test` is the test split, no image of `source` goes there.

    All folds but one are divided into train and val 7 to 1, as in 70/10/20.
    """
    if settings.fold is not None:
        others = settings.fold[1] - 1
        return 7 * others, others, 8
    return settings.ratio if test is None else (*settings.ratio[:2], 0)


def _jobs(source: Source, test: Source | None, settings: Settings) -> list[_Job]:
    """Every image with its split, in packed order: train, val, test, each ordered by a keyed hash of the image_id.

    The hash mixes the classes, so that a reader that goes through the tars in order sees all classes early.
    """
    if settings.assigned is not None:
        records = [(each, record) for each in (source, test) if each is not None for record in each.records]
        jobs = [_Job(each, record, settings.assigned[record.image_id]) for each, record in records]
    else:
        jobs = _split_jobs(source, test, settings)

    def place(job: _Job) -> tuple[int, int, str]:
        image_id = job.record.image_id
        return SPLITS.index(job.split), xxhash.xxh3_64_intdigest(f"order/{settings.seed}/{image_id}".encode()), image_id

    return sorted(jobs, key=place)


def _split_jobs(source: Source, test: Source | None, settings: Settings) -> list[_Job]:
    """Every image with its split, which a seed decides."""
    if not source.classes:
        return [_Job(source, record, "test") for record in source.records]
    label = {name: number for number, name in enumerate(source.classes.names)}
    labels = [label[str(record.dx)] for record in source.records]
    by_image = settings.unit == "image"
    lesions = [
        f"image {record.image_id}" if by_image or record.group is None else record.group for record in source.records
    ]
    splits = split_lesions(np.array(labels), lesions, _ratio(settings, test), settings.seed)
    if settings.fold is not None:
        number, folds = settings.fold
        in_test = fold_of(np.array(labels), lesions, folds, settings.seed) == number - 1
        splits[in_test] = "test"
        rest = np.flatnonzero(~in_test)
        splits[rest] = split_lesions(np.array(labels)[rest], [lesions[i] for i in rest], (7, 1, 0), settings.seed)
    jobs = [_Job(source, record, split) for record, split in zip(source.records, splits.tolist(), strict=True)]
    if test is not None:
        jobs += [_Job(test, record, "test") for record in test.records]
    return jobs


def _encode(jobs: list[_Job], spec: EncodeSpec) -> list[Encoded | Rejected]:
    """Read and encode some images, in a worker thread."""
    read = [_read(job) for job in jobs]
    jpegs = [
        (data, job.record.image_id)
        for data, job in zip(read, jobs, strict=True)
        if isinstance(data, bytes) and data[:2] == JPEG
    ]
    encoded = iter(encode_images([data for data, _ in jpegs], [image_id for _, image_id in jpegs], spec))
    results: list[Encoded | Rejected] = []
    for data, job in zip(read, jobs, strict=True):
        image_id, file = job.record.image_id, job.record.file
        try:
            if isinstance(data, Rejected):
                result = data
            elif data[:2] == JPEG:
                result = next(encoded)
            else:
                result = encode_pixels(decode_picture(data), image_id, spec)
        except BadImageError as error:
            result = error
        results.append(Rejected(image_id, file, str(result)) if isinstance(result, BadImageError) else result)
    return results


def _copies(jobs: list[_Job], hashes: list[int], max_resolution: int) -> list[Copy]:
    """The copies among images of different groups."""
    groups = [job.record.group or f"image:{job.record.image_id}" for job in jobs]
    numbers = np.unique(np.array(groups, dtype=object), return_inverse=True)[1]

    def pixels(number: int) -> np.ndarray:
        return shrink(_upright(jobs[number]), max_resolution)

    return find_copies(np.array(hashes, np.uint64), pixels, groups=numbers)


def _join_duplicates(source: Source, settings: Settings) -> None:
    """Give copies of one group. All images are decoded for it, once more than packing needs."""
    jobs = [_Job(source, record, "") for record in source.records]

    def hash_of(job: _Job) -> int:
        try:
            return image_hash(shrink(_upright(job), settings.encode.max_resolution))
        except BadImageError:  # packing will name it
            return 0

    with (
        single_threaded_opencv(),
        Progress("comparing", len(jobs), "images") as bar,
        ThreadPoolExecutor(settings.workers, thread_name_prefix="hash") as pool,
        closing(read_ahead(lambda job: [pool.submit(hash_of, job)], jobs, _WINDOW * settings.workers)) as read,
    ):
        hashes = []
        for _, (found,) in read:
            hashes.append(found)
            bar.advance(1)
        copies = _copies(jobs, hashes, settings.encode.max_resolution)
    names = [record.image_id for record in source.records]
    joined = join_groups(source.records, [(names[copy.first], names[copy.second]) for copy in copies])
    source.about["joined_duplicates"] = joined


def _said(copies: list[Copy], jobs: list[_Job]) -> str:
    """What the user should know of copies in different groups."""
    pairs = [(jobs[copy.first], jobs[copy.second]) for copy in copies]
    divided = sum(one.split != other.split for one, other in pairs)
    labels = sum(one.record.dx != other.record.dx for one, other in pairs)
    first = " and ".join(job.record.image_id for job in pairs[0])
    return (
        f"{len(pairs):,} pairs of images of different groups are copies (first: {first}), {divided:,} of them in "
        f"different splits and {labels:,} with different labels; they are listed in {DUPLICATES}, and "
        "--join-duplicates makes one group of each"
    )


def _upright(job: _Job) -> np.ndarray:
    """The pixels of an image as packing decodes them. Raises BadImageError."""
    data = _read(job)
    if isinstance(data, Rejected):
        raise BadImageError(data.reason)
    return decode_upright(data) if data[:2] == JPEG else decode_picture(data)


def _read(job: _Job) -> bytes | Rejected:
    try:
        return job.source.read(job.record.file)
    except OSError as error:
        return Rejected(job.record.image_id, job.record.file, f"cannot be read ({error.strerror})")


def _sample(job: _Job, encoded: Encoded, further: dict[str, Any]) -> PackedSample:
    metadata = job.record.metadata() | further
    return PackedSample(encoded.payload, encoded.encoding, encoded.height, encoded.width, job.split, metadata)


class _Columns:
    """The further columns of all sources, by the names and types of the index."""

    def __init__(self, sources: list[Source]) -> None:
        """Raises DataError if a column has one type in one source and another in the next."""
        import pyarrow as pa

        tables = [(source, source.columns) for source in sources if source.columns is not None]
        self._tables = [(source, dict(zip(table.column_names, table.columns, strict=True))) for source, table in tables]
        try:
            self.schema = pa.unify_schemas([table.schema for _, table in tables] or [pa.schema([])])
        except pa.ArrowException as error:
            raise DataError(f"{sources[-1].folder}: its table differs from the first ({one_line(error)})") from None

    def of(self, job: _Job) -> dict[str, Any]:
        """The values of an image."""
        values: dict[str, Any] = dict.fromkeys(self.schema.names)
        for source, columns in self._tables:
            if source is job.source and job.record.row is not None:
                values |= {name: column[job.record.row].as_py() for name, column in columns.items()}
        return values


def _missing_classes(manifest: Manifest) -> list[str]:
    """A warning for each split that lacks a class of the set."""
    present = {dx for counts in manifest.counts.values() for dx, count in counts.items() if count}
    warnings = []
    for split, counts in manifest.counts.items():
        missing = sorted(dx for dx in present if not counts[dx])
        if missing:
            warnings.append(f"the {split} split has no image of {', '.join(missing)}: too few lesions for all splits")
    return warnings


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the bytes depend on, and of this project."""
    versions = {}
    own = ("simplejpeg", "numpy", "pillow", "pyarrow", "dermscale")
    names = {"opencv": "opencv-python-headless"} | {name: name for name in own}
    for name, package in names.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            versions[name] = "unknown"
    versions["opencv"] = cv2.__version__
    turbo = re.search(r"libjpeg-turbo \(ver ([\d.]+)", cv2.getBuildInformation())
    versions["libjpeg-turbo"] = turbo[1] if turbo else "unknown"
    return versions
