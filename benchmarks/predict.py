"""The `predict` benchmark: `train.predict` beside evaluation on the same images, and the start of both commands.

Evaluation is what a run does at its end: `train.evaluation` in float32 over a shard set, through the Loader. Prediction
is the command's own loop over JPEG files: read, decode, pack if necessary, cut, network, probabilities. It is timed on
the files of a shard set, which are not packed again, and on plain JPEG files of the same size, which the command first
packs, as it does with any other image.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.datasets import Format, Job, packed_files, prepared, samples, stats
from benchmarks.machine import Meter, tree_cpu_s
from benchmarks.measure import Measurement, Row, Sample, Series, interleave, ratio_row, series_row, series_rows
from benchmarks.options import DEVICE, Settings, benchmark
from benchmarks.pages import Page
from benchmarks.peers.ours import SHARDS_JPG, SHARDS_SPLIT
from benchmarks.tables import cell, pivot, ratios, table
from benchmarks.worker import Running, SystemFailedError, run_module, take_turns
from shards.common.errors import DataError
from shards.format import MANIFEST, Manifest

if TYPE_CHECKING:
    from shards import Selection

EVALUATION, PREDICT = "evaluation", "predict, files of a shard set"
PREDICT_PLAIN = "predict, plain JPEG files"
START_PREDICT, START_SERVE = "train.predict, one image", "train.serve, until it is ready"

_BATCH = 32
"""Images in a batch of `train.predict`, by default."""
_NOTES = {
    EVALUATION: "float32, the eager network of train.run, as in the evaluation at the end of a run; the last batch "
    "is filled up, with as little as can be",
    PREDICT: "float32; JPEG files as they lie in the shard set: decoded once, not packed again",
    PREDICT_PLAIN: "float32; the same images as JPEG files without restart table: decoded, encoded and decoded again, "
    "as every foreign image is",
    START_PREDICT: "wall time of the whole process, from its start to its end, page cache warm",
    START_SERVE: "from the start of the process to its ready line, page cache warm; the features of the training "
    "images, which a first start computes in the background, are not there yet",
}


@benchmark("predict", DEVICE, rounds=(9, 6), seconds=(4, 0.5))
def command(settings: Settings) -> None:
    """Prediction beside evaluation with a resnet18, and the start-up time of `train.predict` and `train.serve`."""
    images = settings.job(400, 624, quick=96)
    with settings.measurement(images, 1 + 3 * (2 + settings.rounds) + 2 * (1 + settings.rounds)) as measurement:
        rows = measure_predicting(images, "resnet18", settings.device, measurement)
    settings.publish(PAGE, rows)


@dataclass(frozen=True)
class PredictJob:
    """What is predicted. images.batch_size: the most in a batch of the evaluation. run: folder of the trained run."""

    images: Job
    run: Path
    device: str = "cpu"


def make_run(images: Job, model: str, device: str) -> Path:
    """A new run folder, trained by `train.run` for one epoch: its weights are bad, but as fast to use as good ones.

    Raises SystemFailedError with the last line of the command where it fails.
    """
    data = (prepared(SHARDS_SPLIT, images) / "set").resolve()
    out = data.parent.parent / f"run-{model}-{images.packed_px}-{images.resolution_px}"
    shutil.rmtree(out, ignore_errors=True)
    count = sum(Manifest.from_file(data / MANIFEST).counts["train"].values())
    options = {"--model": model, "--data": data, "--out": out, "--resolution": images.resolution_px, "--epochs": 1}
    options |= {"--batch-size": min(16, count), "--compile": "off", "--device": device}
    run_module("train.run", options)
    return out


# ------------------------------------------------------------------ throughput


def set_up(name: str, job: PredictJob) -> Running:
    """Load the run, and go through all images once, the way that `name` says."""
    from shards import ShardSet

    selection = ShardSet(prepared(SHARDS_JPG, job.images) / "set").select("train")
    if name == EVALUATION:
        once = evaluation(job, selection)
    else:
        once = prediction(job, files_of(name, job.images, selection))
    once()
    return Running(once)


def evaluation(job: PredictJob, selection: "Selection") -> Callable[[], int]:
    """A call that evaluates a selection, as a run does, and returns the number of its images."""
    from shards import Loader
    from train import device as devices
    from train import models
    from train.distributed import World
    from train.evaluation import logits_of
    from train.inference.predictor import read_about
    from train.record import WEIGHTS
    from train.weights import read_weights

    device = devices.choose(job.device)
    devices.prepare(device)
    about = read_about(job.run)
    net = models.build(about.model, about.resolution, len(about.classes), about.mean, about.std)
    net.body.load_state_dict(read_weights(job.run / WEIGHTS).state)
    net = net.to(device)
    models.lay_out(net, "auto", device)
    batch_size = full_batches(len(selection), job.images.batch_size)
    loader = Loader(selection, batch_size=batch_size, resolution=about.resolution, train=False, device=device)
    world = World(device=device)

    def once() -> int:
        found = logits_of(net, loader, "fp32", world, lambda done: None)
        assert found is not None  # a single process is the first rank
        return len(found)

    return once


def full_batches(count: int, most: int) -> int:
    """The smallest batch size that needs no more batches for `count` images than `most` does."""
    return math.ceil(count / math.ceil(count / most))


def prediction(job: PredictJob, files: Sequence[Path]) -> Callable[[], int]:
    """A call that makes the loop of `train.predict` over the files, and returns their number.

    It raises DataError where a file is refused.
    """
    from train.inference.output import Refused
    from train.inference.predictor import Ensemble, predict_files

    ensemble = Ensemble([job.run], job.device)

    def once() -> int:
        count = 0
        for batch in predict_files(ensemble, files, batch_size=_BATCH):
            for one in batch:
                if isinstance(one, Refused):
                    raise DataError(f"{one.file}: refused, it {one.reason}")
            count += len(batch)
        return count

    return once


def _write_files(images: Job, folder: Path) -> None:
    """The images of the shard set as files, byte for byte."""
    from shards import ShardSet

    with ShardSet(prepared(SHARDS_JPG, images) / "set") as data:
        for row, name in enumerate(data.column("image_id")):
            (folder / f"{name}.jpg").write_bytes(data.read(row))


FILES = Format("shards-jpg-files", _write_files)


def files_of(name: str, images: Job, selection: "Selection") -> list[Path]:
    """The JPEG files that a prediction reads, in the order of a selection: those of a shard set, or those that OpenCV
    wrote at the packed size."""
    if name == PREDICT:
        by_name = {path.stem: path for path in prepared(FILES, images).iterdir()}
    else:
        by_name = {path.stem: path for path, _ in packed_files(images)}
    return [by_name[image_id] for image_id in selection.data.column("image_id")[selection.samples]]


# ------------------------------------------------------------------ start-up

_START_LIMIT_S = 120.0
"""A start that takes longer counts as a hang."""


def start_predict(run: Path, image: Path, device: str) -> Sample:
    """`train.predict` on one image, from its start to its end. Raises SystemFailedError."""
    meter, cpu_s, begin = Meter(), tree_cpu_s(os.getpid()), time.perf_counter()
    run_module("train.predict", {"--run": run, "": image, "--device": device}, limit_s=_START_LIMIT_S)
    seconds, cpu_s = time.perf_counter() - begin, tree_cpu_s(os.getpid()) - cpu_s
    return Sample(1, seconds, cpu_s, meter.other_cpu(cpu_s))


def start_serve(run: Path, device: str) -> Sample:
    """`train.serve` from its start to its ready line; then it is ended. Raises SystemFailedError."""
    from train.inference.neighbours import FILE

    (run / FILE).unlink(missing_ok=True)  # every start is like the first one
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "train.serve", "--run", str(run), "--port", str(port), "--device", device]
    meter, begin = Meter(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        limit = threading.Timer(_START_LIMIT_S, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said = line.strip() or said
                if "is ready" in line:
                    seconds, cpu_s = time.perf_counter() - begin, tree_cpu_s(process.pid)
                    return Sample(1, seconds, cpu_s, meter.other_cpu(cpu_s))
            raise SystemFailedError(said or f"ended, or not ready after {_START_LIMIT_S:.0f} s")
        finally:
            process.send_signal(signal.SIGTERM)  # has no effect if it has ended
            process.communicate()
            limit.cancel()


# ------------------------------------------------------------------ rows


def measure_predicting(images: Job, model: str, device: str, measurement: Measurement) -> list[Row]:
    """Time evaluation and prediction in turn, then the starts of both commands in turn; warm page cache.

    Raises DataError where the images cannot be packed or the run cannot be trained.
    """
    measurement.announce("train a run")
    job = PredictJob(images, make_run(images, model, device), device)
    series, _ = take_turns(set_up, [EVALUATION, PREDICT, PREDICT_PLAIN], job, images.cache / "logs", measurement)
    image = packed_files(images)[0][0]
    starts: dict[str, Callable[[], Sample]] = {
        START_PREDICT: lambda: start_predict(job.run, image, device),
        START_SERVE: lambda: start_serve(job.run, device),
    }
    _, size = stats(images)
    columns = measurement.columns(
        "predict", images, model=model, precision="fp32", workers=None, batch_size=None, page_cache="warm"
    )
    return rows_of(series, interleave(starts, measurement), len(samples(images)), images.batch_size, size, columns)


def rows_of(
    series: dict[str, Series],
    started: dict[str, Series],
    count: int,
    most: int,
    size: str,
    columns: dict[str, Any],
) -> list[Row]:
    """The rows of what was timed. series: of each system. started: starts of each command. count: of the images.

    most: maximum images in a batch of the evaluation. size: `400x300`. columns: the other fields of Row.
    """
    rows: list[Row] = []
    for name, found in series.items():
        batch_size = full_batches(count, most) if name == EVALUATION else _BATCH
        own = columns | {"system": name, "packed": f"{size} jpg", "batch_size": batch_size}
        rows += series_rows(found, note=_NOTES[name], **own)
        if name != EVALUATION:
            rows.append(ratio_row(found, series[EVALUATION], beside=EVALUATION, **own))
    for name, found in started.items():
        own = columns | {"system": name, "note": _NOTES[name]}
        rows.append(series_row(found, lambda start: start.seconds, metric="start_s", unit="s", **own))
    return rows


def tables(rows: Sequence[Row]) -> list[str]:
    """Speeds, their ratios, and the starts."""
    starts = [[row.system, cell(row)] for row in rows if row.metric == "start_s"]
    about = dict.fromkeys(f"{row.model}, {row.resolution_px} px, packed at {row.packed}" for row in rows if row.packed)
    return [
        f"{'; '.join(about)}. Median [interval].\n",
        pivot(rows, {"img_per_s": "img/s", "cpu_s_per_1000": "CPU s / 1,000"}),
        ratios(rows, "img/s"),
        table(["start", "s"], starts),
    ]


PAGE = Page("predict", "Predicting", tables)
