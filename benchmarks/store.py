"""The `store` benchmark: first and later epochs of a set on an S3 server, beside MosaicML Streaming and LitData.

All read the same JPEG files, with as many workers, and shuffle, decode, crop and mirror as in the `loader` benchmark.
Each has a fresh process and an empty cache in every round. The clock of the first epoch starts when everything is
imported and nothing is opened.

The peers have the settings of their documentation (docs.mosaicml.com/projects/streaming, the README of LitData).
Streaming has its defaults: shards of 64 MiB, as ours, the order py1e, and 8 batches fetched ahead for each worker, in
PyTorch's DataLoader. LitData has its StreamingDataLoader, obstore, and a cache that holds everything. Its chunks have
at most 64 MB, and each worker has as many whole ones: LitData 0.2.76 was ten times slower with chunks that two workers
share (`litdata_chunks`). They decode with Pillow and with torchvision's `decode_jpeg`, as their JPEG columns do.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import bucket
from benchmarks.datasets import Format, Job, prepared, samples, stats
from benchmarks.measure import (
    Measurement,
    Row,
    Sample,
    Series,
    interleave,
    ratio_row,
    ratio_rows,
    series_row,
    summary_row,
)
from benchmarks.options import ONLY, WORKERS, Settings, benchmark
from benchmarks.pages import Page, place
from benchmarks.peers.ours import PAYLOADS, SHARDS_JPG, Epochs, loader_of
from benchmarks.peers.pytorch import litdata, litdata_chunks, mds, streaming
from benchmarks.peers.system import Batch, Epoch, check_batch, need
from benchmarks.tables import pivot, ratios
from benchmarks.worker import Running, SystemFailedError, Worker, start_server

LATENCIES_MS = (1, 8)
"""Added to each request."""
BYTES_PER_S = 100e6
"""The most that the server sends, to all connections together."""
_LIMIT_S = 300.0
"""For a set-up, which may write a set, and for a round."""
_TURNS = 2
"""A second epoch from the store and one from a folder are timed in the order A B B A, so many times."""


@dataclass(frozen=True)
class Reader:
    """One way to read a set from a store.

    format: of the set. open: (job, address or folder of the set, folder for the cache) → its epochs. packages: that it
    needs. modules: imported outside the clock. beside_folder: is also timed with the set in a folder.
    """

    format: Format
    open: Callable[[Job, str, Path], Epoch]
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    note: str = ""
    beside_folder: bool = False


def _ours(job: Job, where: str, cache: Path, window: int | None = None) -> Epochs:
    from shards import ShardSet

    return Epochs(loader_of(ShardSet(where, cache=cache), job, "native", "cpu", window=window))


def _streaming(job: Job, where: str, cache: Path) -> Epoch:
    return streaming(job, remote=where, local=str(cache))


def _litdata(job: Job, where: str, cache: Path) -> Epoch:
    from litdata.streaming import downloader  # pyright: ignore[reportMissingImports] - in .venv-peers

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # LitData has no option for servers without TLS
    names = ("aws_access_key_id", "aws_secret_access_key")
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} | {name: os.environ[name.upper()] for name in names}
    cached = {"cache_dir": str(cache), "max_cache_size": "100GB"}
    return litdata(job, input_dir=where, storage_options=options, **cached)


OURS = "dermscale"
_TAR = "shuffles over the whole set; of each image it also fetches the tar's three headers and two small files"
_NEEDS: dict[str, Any] = {"packages": ("s3fs",), "modules": ("s3fs", "pyarrow.parquet", "shards.loader")}
READERS = {
    OURS: Reader(SHARDS_JPG, _ours, **_NEEDS, note=_TAR, beside_folder=True),
    "dermscale, window 1": Reader(
        SHARDS_JPG, partial(_ours, window=1), **_NEEDS, note="shuffles within about one shard, `Loader(window=1)`"
    ),
    "MosaicML Streaming": Reader(
        mds("mds-payloads", PAYLOADS),
        _streaming,
        ("mosaicml-streaming",),
        ("streaming", "boto3"),
        "shuffles over the whole set: its blocks are larger",
    ),
    "LitData": Reader(
        litdata_chunks("litdata-even", PAYLOADS, even=True),
        _litdata,
        ("litdata",),
        ("litdata", "obstore"),
        "shuffles the shards, and within each shard in blocks of 256",
    ),
}
"""Every reader by its name."""
SYSTEMS = {f"{name}, {ms} ms": (name, ms) for ms in LATENCIES_MS for name in READERS}
"""What is measured, in the order of the table: each reader at each latency."""


@dataclass(frozen=True)
class Reading:
    """The work of a process. reader: its name. endpoint: of the server; none if the set is read from its folder."""

    images: Job
    reader: str
    endpoint: str
    cache: Path


def set_up(name: str, job: Reading) -> Running:
    """Write the set if it is not there, and import what reads it. The first pass opens it."""
    reader, images = READERS[job.reader], job.images
    need(reader.packages)
    for module in reader.modules:
        import_module(module)
    folder = prepared(reader.format, images) / "set"
    where = str(folder)
    if job.endpoint:
        os.environ |= bucket.environment(job.endpoint)
        where = f"s3://{bucket.NAME}/{folder.parent.name}/set"
    mean, _ = stats(images)
    opened: list[Epoch] = []
    firsts: list[Batch] = []

    def once() -> int:
        if not opened:
            opened.append(reader.open(images, where, job.cache))
        count = 0
        for batch in opened[0]():
            if not count:
                firsts.append(batch)
            count += len(batch[0])
        return count

    def before() -> None:
        while firsts:
            check_batch(firsts.pop(), images, mean)
        for epoch in opened:
            if isinstance(epoch, Epochs):
                epoch.skip()

    sent = (lambda: float(bucket.sent_bytes(job.endpoint))) if job.endpoint else (lambda: 0.0)
    return Running(once, before, beside=sent)


class Contest:
    """A reader and a server, round by round: `cold`, then `warm`, then `folder` if it is also read from a folder."""

    def __init__(self, name: str, job: Reading, context: ForkServerContext, seconds: float) -> None:
        self._name, self._job, self._context, self._seconds = name, job, context, seconds
        self._held = ExitStack()
        self._stored: Worker | None = None
        self._folder: Sample | None = None

    def close(self) -> None:
        """End its process and remove its cache."""
        self._held.close()

    def _worker(self, job: Reading, held: ExitStack) -> Worker:
        logs = job.images.cache / "logs"
        worker = Worker(self._context, set_up, self._name, job, logs=logs, limit_s=_LIMIT_S)
        held.enter_context(worker).ready()
        return worker

    def cold(self) -> Sample:
        """The first epoch of a fresh process with an empty cache."""
        cache, self._stored, self._folder = self._job.cache, None, None
        shutil.rmtree(cache, ignore_errors=True)
        with ExitStack() as held:
            held.callback(shutil.rmtree, cache, ignore_errors=True)
            cache.mkdir(parents=True)
            stored = self._worker(self._job, held)
            sample = stored.run(0)
            self._stored, self._held = stored, held.pop_all()
        return sample

    def warm(self) -> Sample:
        """Later epochs of the same process; in turn with epochs from a folder if these are timed too."""
        if self._stored is None:
            raise SystemFailedError("its first epoch failed")
        with self._held as held:
            if not READERS[self._job.reader].beside_folder:
                return self._stored.run(self._seconds)
            local = self._worker(replace(self._job, endpoint=""), held)
            for worker in (local, self._stored):
                worker.run(0)
            found: dict[Worker, list[Sample]] = {self._stored: [], local: []}
            for worker in (self._stored, local, local, self._stored) * _TURNS:
                found[worker].append(worker.run(self._seconds / (2 * _TURNS)))
        sample, self._folder = (_whole(parts) for parts in found.values())
        return sample

    def folder(self) -> Sample:
        """The epochs from a folder that were timed with `warm`."""
        if self._folder is None:
            raise SystemFailedError("its later epochs failed")
        return self._folder


def _whole(parts: Sequence[Sample]) -> Sample:
    """Some runs as one."""
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("count", "seconds", "cpu_s", "beside")}
    return Sample(**sums, other_cpu=fmean(part.other_cpu for part in parts))


@benchmark("store", ONLY, WORKERS, rounds=(6, 5), seconds=(4, 1))
def command(settings: Settings) -> None:
    """First and second epoch of a set on an S3 server with latency and limited speed, and bytes fetched.

    The server runs on this machine. It answers 1 or 8 ms late and sends at most 100 MB/s.
    """
    chosen = settings.chosen(SYSTEMS)
    job = settings.job(341, 9984, quick=1248, whole_batches=True)
    home = prepared(SHARDS_JPG, job).parent
    steps = sum(2 + READERS[name].beside_folder for name, _ in chosen) * (1 + settings.rounds)
    with ExitStack() as stack, settings.measurement(job, steps) as measurement:
        served = [ms for ms in LATENCIES_MS if any(ms == of for _, of in chosen)]
        endpoints = {ms: stack.enter_context(bucket.serving(home, ms / 1e3, BYTES_PER_S)) for ms in served}
        readings = {f"{name}, {ms} ms": Reading(job, name, endpoints[ms], job.cache / "store") for name, ms in chosen}
        settings.publish(PAGE, measure(readings, measurement))


def measure(readings: dict[str, Reading], measurement: Measurement) -> list[Row]:
    """Time all readings in turn; one of them runs at a time. Their names end in the latency."""
    context = start_server()
    steps: dict[str, Callable[[], Sample]] = {}
    with ExitStack() as stack:
        for name, reading in readings.items():
            contest = Contest(name, reading, context, measurement.seconds)
            stack.callback(contest.close)
            steps |= {f"{name}: first epoch": contest.cold, f"{name}: later epochs": contest.warm}
            if READERS[reading.reader].beside_folder:
                steps[f"{name}: from a folder"] = contest.folder
        timed = interleave(steps, measurement)
    return rows_of(readings, timed, measurement)


def rows_of(readings: dict[str, Reading], timed: dict[str, Series], measurement: Measurement) -> list[Row]:
    """The rows of all readings, and the ratios."""

    def columns(name: str, **more: Any) -> dict[str, Any]:
        reading = readings[name]
        packed = f"{stats(reading.images)[1]} jpg"
        return measurement.columns("store", reading.images, system=name, packed=packed, page_cache="warm") | more

    def speed(series: Series, metric: str, name: str) -> Row:
        own = columns(name, note=READERS[readings[name].reader].note)
        return series_row(series, lambda sample: sample.per_s, metric=metric, unit="img/s", **own)

    rows, ratio, firsts = [], [], {}
    for name, reading in readings.items():
        cold, warm = timed[f"{name}: first epoch"], timed[f"{name}: later epochs"]
        if failed := cold.failed or warm.failed:  # a wrong batch is found after the first epoch
            cold = warm = Series(failed=failed)
        firsts[name] = cold
        rows += [speed(cold, "cold_img_per_s", name), speed(warm, "warm_img_per_s", name)]
        if (folder := timed.get(f"{name}: from a folder")) is not None:
            rows.append(speed(folder, "folder_img_per_s", name))
            beside = {"beside": "from a folder", "metric": "warm_img_per_s ratio"}
            ratio.append(ratio_row(warm, folder, **columns(name), **beside))
        size = 0 if failed else _size(prepared(READERS[reading.reader].format, reading.images) / "set")
        fetched = [a.beside + b.beside for a, b in zip(cold.samples, warm.samples, strict=True)]
        for metric, unit, whole in (("fetched", "1", size), ("fetched_kb", "kB", 1e3 * len(samples(reading.images)))):
            values = [count / whole for count in fetched]
            rows.append(summary_row(values, failed, metric=metric, unit=unit, **columns(name)))
    peers = [name for name in READERS if not name.startswith(OURS)]
    pairs = [(f"{OURS}, {ms} ms", f"{peer}, {ms} ms") for ms in LATENCIES_MS for peer in peers]
    return [*rows, *ratio_rows(pairs, firsts, partial(columns, metric="cold_img_per_s ratio")), *ratio]


def _size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tables(rows: Sequence[Row]) -> list[str]:
    """The speeds, what was fetched, and the ratios."""
    titles = {
        "cold_img_per_s": "first epoch, img/s",
        "warm_img_per_s": "later epochs, img/s",
        "folder_img_per_s": "the same from a folder, img/s",
        "fetched": "bytes fetched, of the set",
        "fetched_kb": "kB fetched per image",
    }
    return [
        f"A set on an S3 server of this machine that answers 1 or 8 ms late and sends at most {BYTES_PER_S / 1e6:g} "
        f"MB/s, {place(rows)}: median [interval]. Each first epoch has a fresh process and an empty cache.\n",
        pivot(rows, titles),
        *(
            ratios([row for row in rows if row.metric == f"{metric} ratio"], titles[metric])
            for metric in ("cold_img_per_s", "warm_img_per_s")
        ),
    ]


PAGE = Page("store", "Sets in a store", tables, chart=("cold_img_per_s", "images per second in the first epoch"))
