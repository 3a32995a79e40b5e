"""Records → a shard set: images are split, ordered, encoded on every core, and written in order.

The order of the samples, and so every byte of the set, depends only on records and settings. Workers are threads:
decoder, encoder and resize release the GIL. The number of images in progress is limited, and what is known of each
image lies in files, so memory grows by some hashes and numbers for each image.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, compress
from operator import ne
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from preprocess.archives import Member, read_member
from preprocess.places import read_file
from preprocess.records import (
    RECORD,
    Record,
    Records,
    Rejected,
    Source,
    group_of,
    join_groups,
    quarantine_csv,
    records_of,
)
from preprocess.rows import Spool, Texts, hashes_of, mixed, taken
from shards.common import kept
from shards.common.errors import DataError, one_line
from shards.common.files import full_disk_names
from shards.common.machine import keep_freed_memory, single_threaded_opencv
from shards.common.progress import Progress
from shards.common.readahead import read_ahead
from shards.duplicates import Copy, copies_csv, find_copies
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
from shards.tar import Shard
from shards.writer import OpenShard, PackedSample, ShardSetWriter, twice

_WINDOW = 16
"""Images in progress per worker: enough to keep every worker busy while a full shard is flushed to the disk."""
_AT_ONCE = 1 << 14
"""Rows of the plan that are made together."""
_PLAN = {"source": pa.int8(), "split": pa.int8(), "key": pa.uint64()}
"""What the plan has beside a record: the number of its source, that of its split, and a hash of its group."""


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
class Job:
    """An image to pack. source: 0, or 1 for the test source. folder: of that source.

    further: values of the index's further columns. member: where the image is, if it lies in an archive.
    """

    source: int
    folder: str
    record: Record
    split: str
    further: dict[str, Any] = field(default_factory=dict)
    member: Member | None = None

    @property
    def path(self) -> str:
        """Its file."""
        return f"{self.folder}/{self.record.file}"  # a Path takes ten times as long

    def read(self) -> bytes:
        """The bytes of its image. Raises as `read_file` does."""
        if self.member is not None:
            return read_member(self.folder, self.record.file, self.member)
        return read_file(self.folder, self.record.file)


@dataclass(slots=True)
class _Tally:
    """Sums over the pixels of the training split, or of all images of a set without labels."""

    sums: list[int] = field(default_factory=lambda: [0] * 6)
    pixels: int = 0

    def count(self, encoded: Encoded) -> None:
        self.sums = [a + b for a, b in zip(self.sums, encoded.sums, strict=True)]
        self.pixels += encoded.height * encoded.width

    def moments(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation per channel, 0 to 1, from integers: the order of summing cannot change them."""
        n = self.pixels
        mean = [s / n / 255 for s in self.sums[:3]]
        std = [(n * squares - s * s) ** 0.5 / n / 255 for s, squares in zip(self.sums[:3], self.sums[3:], strict=True)]
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


@dataclass(frozen=True)
class Crew:
    """Who does the work: threads of this process, or tasks of a cluster (`preprocess/cluster.py`). No byte differs.

    encode: reads and encodes some images; called in threads. together: images of one call. shard: opens a shard, as
    `tar.Shard` does. shards: those that are completed at the same time. cancel: ends what is under way, after an error.
    """

    encode: "Callable[[list[Job], EncodeSpec], Sequence[Encoded | Rejected]]"
    together: int = TOGETHER
    shard: Callable[[Path, int, str], OpenShard] = Shard
    shards: int = 1
    cancel: Callable[[], None] = lambda: None


def pack(
    source: Source, out: str | Path, settings: Settings, test: Source | None = None, crew: Crew | None = None
) -> Packed:
    """Write the shard set `out` from `source`; with `test`, that source is the test split and `source` the other two.

    The records and columns of the sources are taken out of them: the plan that is made of them lies in a file, so that
    memory does not grow with them while images are packed.

    out: a folder, or an address in a store. crew: None: threads of this process. Raises DataError for the first image
    that cannot be packed, unless `settings.skip_bad`, and leaves no set behind.
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
    crew = crew or Crew(encode)
    contradicting = _join_duplicates(source, settings, crew) if settings.join_duplicates else []
    schema = _schema(sources)
    rejected = [r for each in sources for r in each.rejected]
    tally = _Tally()
    with (
        full_disk_names(kept.home() if is_address(out) else Path(out)),
        ShardSetWriter(
            out,
            settings.encode,
            settings.shard_bytes,
            settings.overwrite,
            source.classes,
            schema,
            crew.shard,
            crew.shards,
            unique=True,
        ) as writer,
        ExitStack() as stack,
    ):
        plan = _plan(sources, settings, schema, writer.folder)
        packed = np.zeros(len(plan), bool)
        hashes = np.zeros(len(plan), np.uint64)
        parts = (_jobs(batch, sources) for batch in plan.to_batches())
        encoded_jobs = stack.enter_context(_encoding("packing", parts, len(plan), settings, crew))
        for row, (job, encoded) in enumerate(encoded_jobs):
            if isinstance(encoded, Rejected):
                if not settings.skip_bad:
                    raise sources[job.source].error(encoded)
                rejected.append(encoded)
            else:
                writer.add(_sample(job, encoded))
                if job.split == "train" or not source.classes:
                    tally.count(encoded)
                packed[row], hashes[row] = True, encoded.hash
        if not tally.pixels:
            raise DataError(
                f"{source.folder}: no training image could be packed ({len(rejected):,} left out, and the split puts "
                "the others into val and test); choose another split or group"
            )
        if rejected:
            writer.attach(QUARANTINE, quarantine_csv(rejected))
        resolution = settings.encode.max_resolution
        copies = _copies(plan["key"].to_numpy(), hashes, lambda row: _jobs(plan.slice(row, 1), sources)[0], resolution)
        if copies:
            rows = [row for copy in copies for row in (copy.first, copy.second)]
            paired = taken(plan.select(["image_id", "split", "dx"]), np.array(rows))
            names = dict(zip(rows, paired["image_id"].to_pylist(), strict=True))
            writer.attach(DUPLICATES, copies_csv(copies, names, names))
        mean, std = tally.moments()
        ratio, unit = _ratio(settings, test), settings.unit
        divided = _divided(plan) if settings.assigned is not None else None
        if settings.assigned is not None:
            given = np.bincount(plan["split"], minlength=len(SPLITS)).tolist()
            ratio, unit = given, "image" if divided else "lesion"
        split = {"ratio": list(ratio), "seed": settings.seed, "unit": unit, **settings.assigned_from}
        if settings.fold is not None:
            split |= {"fold": settings.fold[0], "folds": settings.fold[1]}
        about = [each.about | _counts(plan, packed, number) for number, each in enumerate(sources)]
        manifest = writer.finish(
            mean=mean,
            std=std,
            split=split | {"test_source": test.about["dataset"] if test else None},
            source=about[0] | {"quarantined": len(rejected), "test": about[1] if test else None},
            citation="; ".join(dict.fromkeys(each.citation for each in sources)),
            licence="; ".join(dict.fromkeys(each.licence for each in sources)),
            versions=library_versions(),
            group=source.group,
        )
    warnings = contradicting + _doubtful_classes(manifest) + ([divided] if divided else [])
    if copies:
        warnings.append(_said(paired))
    return Packed(manifest, rejected, warnings, time.monotonic() - started)


@contextmanager
def _encoding(
    doing: str, parts: Iterable[list[Job]], total: int, settings: Settings, crew: Crew
) -> Iterator[Iterator[tuple[Job, Encoded | Rejected]]]:
    """Every job with its payload, in order, shown as progress. An error in the context ends what is under way."""
    keep_freed_memory()
    with (
        single_threaded_opencv(),
        Progress(doing, total, "images") as bar,
        ThreadPoolExecutor(settings.workers, thread_name_prefix="pack") as pool,
        closing(_encoded(pool, parts, settings, crew, bar)) as encoded_jobs,
    ):
        try:
            yield encoded_jobs
        except BaseException:
            crew.cancel()
            raise


def _encoded(
    pool: ThreadPoolExecutor, parts: Iterable[list[Job]], settings: Settings, crew: Crew, bar: Progress
) -> Generator[tuple[Job, Encoded | Rejected], None, None]:
    def submit(group: list[Job]) -> list[Future[Sequence[Encoded | Rejected]]]:
        for job in group if crew.encode is encode else ():
            read_ahead_of_use(job.path)
        return [pool.submit(crew.encode, group, settings.encode)]

    groups = (part[start : start + crew.together] for part in parts for start in range(0, len(part), crew.together))
    for group, (encoded,) in read_ahead(submit, groups, max(1, _WINDOW // TOGETHER) * settings.workers):
        for pair in zip(group, encoded, strict=True):
            bar.advance(1)
            yield pair


def read_ahead_of_use(file: str) -> None:
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
    if unknown := sorted(set(map(str, test.records.column("dx"))) - set(source.classes.names)):
        raise DataError(
            f"{test.folder}: has images of {', '.join(unknown)}, none of the classes of {source.folder} "
            f"({one_line(', '.join(source.classes.names), 160)}); leave --test-source out"
        )
    images = Texts(source.records.column("image_id"))
    lesions = Texts(group for group in source.records.column("group") if group is not None)

    def unseen(record: Record) -> bool:
        if record.image_id in images:
            test.rejected.append(Rejected(record.image_id, record.file, "is in the training source too"))
        elif record.group is not None and record.group in lesions:
            reason = f"shows lesion {record.group}, which is in the training source too"
            test.rejected.append(Rejected(record.image_id, record.file, reason))
        else:
            return True
        return False

    test.records = Records(filter(unseen, test.records))


def _drop_unassigned(sources: list[Source], assigned: dict[str, str]) -> None:
    """Reject images that no split is given for, and names in the list of splits that no image has."""
    known = Texts(_column(sources, "image_id"))
    for source in sources:
        without = [
            Rejected(record.image_id, record.file, "is not in the split file")
            for record in source.records
            if record.image_id not in assigned
        ]
        if without:
            source.records = Records(record for record in source.records if record.image_id in assigned)
            source.rejected += without
    rejected = {rejected.image_id for source in sources for rejected in source.rejected}
    sources[0].rejected += [
        Rejected(image_id, f"{image_id}.jpg", "is in the split file, and the source does not have it")
        for image_id in assigned
        if image_id not in known and image_id not in rejected
    ]


def _divided(plan: pa.Table) -> str:
    """A warning if given splits divide the images of a lesion; otherwise nothing."""
    several = np.flatnonzero(mixed(plan["key"].to_numpy(), plan["split"].to_numpy()))
    divided = set(taken(plan.select(["group"]), several)["group"].to_pylist())
    if not divided:
        return ""
    return (
        f"the given splits put views of {len(divided):,} lesions into several splits (first: {min(divided)}): "
        "results look better than they are"
    )


def _counts(plan: pa.Table, packed: np.ndarray, source: int) -> dict[str, int | None]:
    """How many images and lesions of a source were packed; no lesions if it names none."""
    own = packed & (plan["source"].to_numpy() == source)
    lesions = np.unique(plan["key"].to_numpy()[own & plan["group"].is_valid().to_numpy()])
    return {"images": int(own.sum()), "lesions": len(lesions) or None}


def _ratio(settings: Settings, test: object) -> tuple[int, int, int]:
    """The ratio that `source` is split by. If `test` is the test split, no image of `source` goes there.

    All folds but one are divided into train and val 7 to 1, as in 70/10/20.
    """
    if settings.fold is not None:
        others = settings.fold[1] - 1
        return 7 * others, others, 8
    return (*settings.ratio[:2], 0) if test else settings.ratio


def _schema(sources: list[Source]) -> pa.Schema:
    """The further columns of all sources. Raises DataError if a column has two types."""
    tables = [source.columns for source in sources if source.columns is not None]
    try:
        return pa.unify_schemas([table.schema for table in tables] or [pa.schema([])])
    except pa.ArrowException as error:
        raise DataError(f"{sources[-1].folder}: its table differs from the first ({one_line(error)})") from None


def _plan(sources: list[Source], settings: Settings, schema: pa.Schema, folder: Path) -> pa.Table:
    """Every image with its split, in packed order: train, val, test, each ordered by a keyed hash of the image_id.

    The hash mixes the classes, so that a reader that goes through the tars in order sees all classes early. Columns:
    those of _PLAN and of a record, and `further`, those of the sources' tables. They are in a file in `folder`. Raises
    DataError for an image_id that comes twice.
    """
    splits = _splits(sources, settings)
    digests = hashes_of(f"order/{settings.seed}/{image_id}" for image_id in _column(sources, "image_id"))
    order = np.lexsort((digests, splits))
    _refuse_twice(sources, digests)
    del digests
    spool = Spool(pa.schema([*_PLAN.items(), *RECORD, ("further", pa.struct(schema))]), folder)
    for start in range(0, len(order), _AT_ONCE):
        rows = order[start : start + _AT_ONCE]
        spool.write(_part(sources, schema, rows, splits[rows]))
        pa.default_memory_pool().release_unused()
    for source in sources:
        source.records, source.columns = Records(), None
    return spool.table()


def _column(sources: list[Source], name: str) -> Iterator[Any]:
    """One value of each record of the sources, one source after the other."""
    return chain.from_iterable(source.records.column(name) for source in sources)


def _refuse_twice(sources: list[Source], digests: np.ndarray) -> None:
    """Raise DataError for an image_id that comes twice; digests: a hash of each."""
    ordered = np.sort(digests)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        found = Counter(compress(_column(sources, "image_id"), np.isin(digests, again)))
        if names := [name for name, count in found.items() if count > 1]:
            raise twice(min(names))


def _part(sources: list[Source], schema: pa.Schema, rows: np.ndarray, splits: np.ndarray) -> list[pa.Array]:
    """Some rows of the plan, as columns. rows: numbers of records, counted through all sources; splits: of each."""
    starts = np.cumsum([0, *(len(source.records) for source in sources)])
    numbers = np.searchsorted(starts, rows, "right") - 1
    parts = []
    for number, source in enumerate(sources):
        records = taken(source.records.table, rows[numbers == number] - starts[number])
        parts.append(records.append_column("further", _further(source, records["row"], schema)))
    back = np.argsort(np.argsort(numbers, kind="stable"))
    table = pa.concat_tables(parts).combine_chunks().take(pa.array(back))
    keys = hashes_of(map(group_of, table["image_id"].to_pylist(), table["group"].to_pylist()))
    return [pa.array(numbers, pa.int8()), pa.array(splits), pa.array(keys), *table.columns]


def _further(source: Source, rows: pa.ChunkedArray, schema: pa.Schema) -> pa.Array:
    """Some rows of the source's table, each as one value; what is not there is null."""
    if not schema.names:
        return pa.nulls(len(rows), pa.struct([]))
    there = pa.table([]) if source.columns is None else taken(source.columns, rows.to_numpy())
    return pa.StructArray.from_arrays(
        [
            there[one.name].cast(one.type).combine_chunks()
            if one.name in there.column_names
            else pa.nulls(len(rows), one.type)
            for one in schema
        ],
        fields=list(schema),
    )


def _jobs(rows: pa.Table | pa.RecordBatch, sources: list[Source]) -> list[Job]:
    """Rows of the plan as jobs."""
    own = (rows[name].to_pylist() for name in ("source", "split", "further"))
    return [
        _job(sources, number, record, SPLITS[split], further or {})
        for record, number, split, further in zip(records_of(rows), *own, strict=True)
    ]


def _job(sources: list[Source], number: int, record: Record, split: str, further: dict[str, Any]) -> Job:
    source = sources[number]
    member = None if source.members is None else source.members[record.file]
    return Job(number, str(source.folder), record, split, further, member)


def _splits(sources: list[Source], settings: Settings) -> np.ndarray:
    """(N,) int8: the number of the split of each record of the sources: what was assigned, or what a seed decides."""
    if (assigned := settings.assigned) is not None:
        given = (SPLITS.index(assigned[image_id]) for image_id in _column(sources, "image_id"))
        return np.fromiter(given, np.int8)
    source, *test = sources
    found = np.full(sum(len(each.records) for each in sources), SPLITS.index("test"), np.int8)
    if not source.classes:
        return found
    label = {name: number for number, name in enumerate(source.classes.names)}
    labels = np.fromiter((label[str(dx)] for dx in source.records.column("dx")), np.int32)

    def lesions() -> Iterator[str]:
        for image_id, group in zip(*map(source.records.column, ("image_id", "group")), strict=True):
            yield f"image {image_id}" if settings.unit == "image" or group is None else group

    splits = split_lesions(labels, lesions(), _ratio(settings, test), settings.seed)
    if settings.fold is not None:
        number, folds = settings.fold
        rest = fold_of(labels, lesions(), folds, settings.seed) != number - 1
        splits[~rest] = "test"
        splits[rest] = split_lesions(labels[rest], compress(lesions(), rest), (7, 1, 0), settings.seed)
    for number, name in enumerate(SPLITS):
        found[: len(splits)][splits == name] = number
    return found


def encode(jobs: list[Job], spec: EncodeSpec) -> list[Encoded | Rejected]:
    """Read and encode some images, in a worker thread."""
    if is_address(jobs[0].folder):  # a store answers several at a time as fast as one
        with ThreadPoolExecutor(len(jobs)) as pool:
            read = list(pool.map(_read, jobs))
    else:
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


def _copies(groups: np.ndarray, hashes: np.ndarray, job: Callable[[int], Job], max_resolution: int) -> list[Copy]:
    """The copies among images of different groups.

    groups: (N,), a number of each image's group. hashes: (N,) uint64, 0 of an image that is left out. job: of a number.
    """

    def pixels(number: int) -> np.ndarray:
        return shrink(_upright(job(number)), max_resolution)

    return find_copies(hashes, pixels, groups=groups)


def _join_duplicates(source: Source, settings: Settings, crew: Crew) -> list[str]:
    """Give copies of one group; returns a warning of those with different labels.

    All images are encoded for it, once more than packing needs.
    """
    records = source.records

    def job(record: Record) -> Job:
        return _job([source], 0, record, "", {})

    parts = ([job(record) for record in records_of(batch)] for batch in records.table.to_batches())
    hashes = np.zeros(len(records), np.uint64)
    with _encoding("comparing", parts, len(records), settings, crew) as encoded_jobs:
        for number, (_, encoded) in enumerate(encoded_jobs):
            if isinstance(encoded, Encoded):  # packing will name the others
                hashes[number] = encoded.hash
        groups = hashes_of(map(group_of, records.column("image_id"), records.column("group")))
        resolution = settings.encode.max_resolution
        copies = _copies(groups, hashes, lambda number: job(records[number]), resolution)
    pairs = [(records[copy.first], records[copy.second]) for copy in copies]
    joined = join_groups(source, [(one.image_id, other.image_id) for one, other in pairs])
    source.about["joined_duplicates"] = joined
    differing = [f"{one.image_id} and {other.image_id}" for one, other in pairs if one.dx != other.dx]
    what = "pairs of copies that were joined have different labels"
    return [f"{len(differing):,} {what} (first: {differing[0]})"] if differing else []


def _said(paired: pa.Table) -> str:
    """What the user should know of copies in different groups; paired: two rows of the plan for each pair."""
    names, splits, labels = (paired[name].to_pylist() for name in ("image_id", "split", "dx"))
    pairs = list(zip(names[::2], names[1::2], strict=True))
    divided, differing = (sum(map(ne, each[::2], each[1::2])) for each in (splits, labels))
    first = " and ".join(pairs[0])
    return (
        f"{len(pairs):,} pairs of images of different groups are copies (first: {first}), {divided:,} of them in "
        f"different splits and {differing:,} with different labels; they are listed in {DUPLICATES}, and "
        "--join-duplicates makes one group of each"
    )


def _upright(job: Job) -> np.ndarray:
    """The pixels of an image as packing decodes them. Raises BadImageError."""
    data = _read(job)
    if isinstance(data, Rejected):
        raise BadImageError(data.reason)
    return decode_upright(data) if data[:2] == JPEG else decode_picture(data)


def _read(job: Job) -> bytes | Rejected:
    try:
        return job.read()
    except OSError as error:
        return Rejected(job.record.image_id, job.record.file, f"cannot be read ({error.strerror})")


def _sample(job: Job, encoded: Encoded) -> PackedSample:
    metadata = job.record.metadata() | job.further
    return PackedSample(encoded.payload, encoded.encoding, encoded.height, encoded.width, job.split, metadata)


def _doubtful_classes(manifest: Manifest) -> list[str]:
    """A warning for each split that lacks a class of the set, and one for classes that differ only in case."""
    present = {dx for counts in manifest.counts.values() for dx, count in counts.items() if count}
    warnings = []
    for split, counts in manifest.counts.items():
        missing = sorted(dx for dx in present if not counts[dx])
        if missing:
            named = ", ".join(missing[:20]) + (f" and {len(missing) - 20:,} more" if len(missing) > 20 else "")
            warnings.append(f"the {split} split has no image of {named}: too few lesions for all splits")
    folded = Counter(name.casefold() for name in present)
    if alike := sorted(name for name in present if folded[name.casefold()] > 1):
        warnings.append(
            f"{', '.join(alike[:20])} differ only in case and are classes of their own: to make them one, name the "
            "classes with --classes, which labels match in any case"
        )
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
