"""The `predict` benchmark: `train.predict` beside evaluation on the same images, and the start of both commands.

Evaluation is what a run does at its end: `train.evaluation` in float32 over a shard set, through the Loader. Prediction
is the command's own loop over JPEG files: read, decode, pack if necessary, cut, network, probabilities. It is timed on
the files of a shard set, which are not packed again, and on plain JPEG files of the same size, which the command first
packs, as it does with any other image.
"""

import math
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.datasets import Job, originals_in, packed_files, prepared, samples, sized, stats
from benchmarks.machine import Environment, Meter, tree_cpu_s
from benchmarks.measure import Row, Sample, Series, interleave, median_interval, ratio_row, series_rows, summary_row
from benchmarks.options import advance, common, measured_on, publish, rounds_option
from benchmarks.peers.ours import SHARDS_JPG, SHARDS_SPLIT
from benchmarks.tables import busy_text, cell, machine_text, notes, pivot, table
from benchmarks.targets import verdict
from benchmarks.worker import Announce, Running, take_turns
from shards.common.errors import DataError, last_line
from shards.format import MANIFEST, Manifest

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


@click.command("predict")
@common
@rounds_option(9, quick=6)
@click.option(
    "--packed",
    "packed_px",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Longer side of the packed images, px.",
)
@click.option("--resolution", type=int, default=224, show_default=True, help="Side of the images, px.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
def command(
    quick: bool, out: Path, cache: Path, source: Path, rounds: int, packed_px: int, resolution: int, device: str
) -> None:
    """Prediction beside evaluation with a resnet18, and the start-up time of `train.predict` and `train.serve`."""
    from shards.common.progress import Progress
    from train.models import check_resolution

    check_resolution("resnet18", resolution)
    images = sized(Job(originals_in(source), cache, packed_px, resolution, batch_size=64), 96 if quick else 624)
    machine = measured_on(images, device)
    with Progress("predict", 1 + 3 * (2 + rounds) + 2 * (1 + rounds), "runs") as bar:
        rows = measure_predicting(
            images, "resnet18", device, machine, rounds=rounds, seconds=0.5 if quick else 4.0, announce=advance(bar)
        )
    publish(out, "predict-quick" if quick else "predict", rows, predicting_text)


@dataclass(frozen=True)
class PredictJob:
    """What is predicted. images.batch_size: the most in a batch of the evaluation. run: folder of the trained run."""

    images: Job
    run: Path
    device: str = "cpu"


def make_run(images: Job, model: str, device: str) -> Path:
    """A new run folder, trained by `train.run` for one epoch: its weights are bad, but as fast to use as good ones.

    Raises DataError with the last line of the command where it fails.
    """
    data = (prepared(SHARDS_SPLIT, images) / "set").resolve()
    out = data.parent.parent / f"run-{model}-{images.packed_px}-{images.resolution_px}"
    shutil.rmtree(out, ignore_errors=True)
    count = sum(Manifest.from_file(data / MANIFEST).counts["train"].values())
    options = {"--model": model, "--data": data, "--out": out, "--resolution": images.resolution_px, "--epochs": 1}
    options |= {"--batch-size": min(16, count), "--compile": "off", "--device": device}
    command = [sys.executable, "-m", "train.run", *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"training a run to predict with failed: {last_line(done.stderr)}")
    return out


# ------------------------------------------------------------------ throughput


def set_up(name: str, job: PredictJob) -> Running:
    """Load the run, and go through all images once, the way that `name` says."""
    from shards import ShardSet

    selection = ShardSet(prepared(SHARDS_JPG, job.images) / "set").select("train")
    if name == EVALUATION:
        once = evaluation(job, selection)
    elif name == PREDICT:
        once = prediction(job, shard_files(job.images, selection))
    else:
        once = prediction(job, plain_files(job.images, selection))
    once()
    return Running(once)


def evaluation(job: PredictJob, selection: Any) -> Callable[[], int]:
    """A call that evaluates a `shards.Selection`, as a run does, and returns the number of its images."""
    from shards import Loader
    from train import device as devices
    from train import models
    from train.distributed import World
    from train.evaluation import answers
    from train.inference.predictor import read_about
    from train.record import WEIGHTS
    from train.weights import read_weights

    device = devices.choose(job.device)
    devices.prepare(device)
    about = read_about(job.run)
    net = models.build(about.model, about.resolution, len(about.classes), about.mean, about.std)
    net.body.load_state_dict(read_weights(job.run / WEIGHTS).state)
    net = net.to(device)
    batch_size = full_batches(len(selection), job.images.batch_size)
    loader = Loader(selection, batch_size=batch_size, resolution=about.resolution, train=False, device=device)
    world = World(device=device)

    def once() -> int:
        found = answers(net, loader, "fp32", world, lambda done: None)
        assert found is not None  # a single process is the first rank
        return len(found.samples)

    return once


def full_batches(count: int, most: int) -> int:
    """The smallest batch size that needs no more batches for `count` images than `most` does."""
    return math.ceil(count / math.ceil(count / most))


def prediction(job: PredictJob, files: Sequence[Path]) -> Callable[[], int]:
    """A call that makes the loop of `train.predict` over the files, and returns their number.

    It raises DataError where a file is refused.
    """
    from train.inference.output import Refused
    from train.inference.predictor import Predictor, predict_files

    predictor = Predictor(job.run, job.device)

    def once() -> int:
        count = 0
        for batch in predict_files(predictor, files, batch_size=_BATCH):
            for one in batch:
                if isinstance(one, Refused):
                    raise DataError(f"{one.file}: refused, it {one.reason}")
            count += len(batch)
        return count

    return once


def shard_files(images: Job, selection: Any) -> list[Path]:
    """The images of a selection as files, byte for byte as the shard set holds them, in its order."""
    folder = prepared(SHARDS_JPG, images) / "files"
    data = selection.data
    named = [(folder / f"{data.column('image_id')[sample]}.jpg", int(sample)) for sample in selection.samples]
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for path, sample in named:
            (partial / path.name).write_bytes(data.read(sample))
        partial.rename(folder)
    return [path for path, _ in named]


def plain_files(images: Job, selection: Any) -> list[Path]:
    """The images of a selection as JPEG files that OpenCV wrote at the packed size, in its order."""
    by_name = {path.stem: path for path, _ in packed_files(images)}
    return [by_name[str(name)] for name in selection.data.column("image_id")[selection.samples]]


# ------------------------------------------------------------------ start-up

_START_LIMIT_S = 120.0
"""A start that takes longer counts as a hang."""


class StartFailedError(Exception):
    """A command ended with an error, or was never ready; the text is its last line."""


def start_predict(run: Path, image: Path, device: str) -> Sample:
    """`train.predict` on one image, from its start to its end. Raises StartFailedError."""
    command = [sys.executable, "-m", "train.predict", "--run", str(run), str(image), "--device", device]
    meter, cpu_s, begin = Meter(), _children_cpu_s(), time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_START_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise StartFailedError(f"not done after {_START_LIMIT_S:.0f} s") from None
    seconds, cpu_s = time.perf_counter() - begin, _children_cpu_s() - cpu_s
    if done.returncode:
        raise StartFailedError(last_line(done.stderr))
    return Sample(1, seconds, cpu_s, meter.other_cpu(cpu_s))


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_serve(run: Path, device: str) -> Sample:
    """`train.serve` from its start to its ready line; then it is ended. Raises StartFailedError."""
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
            raise StartFailedError(said or f"ended, or not ready after {_START_LIMIT_S:.0f} s")
        finally:
            process.send_signal(signal.SIGTERM)  # has no effect if it has ended
            process.communicate()
            limit.cancel()


# ------------------------------------------------------------------ rows


def measure_predicting(
    images: Job, model: str, device: str, environment: Environment, *, rounds: int, seconds: float, announce: Announce
) -> list[Row]:
    """Time evaluation and prediction in turn, then the starts of both commands in turn; warm page cache.

    Raises DataError where the images cannot be packed or the run cannot be trained.
    """
    announce("train a run")
    job = PredictJob(images, make_run(images, model, device), device)
    systems = [EVALUATION, PREDICT, PREDICT_PLAIN]
    series, _ = take_turns(
        set_up, systems, job, images.cache / "logs", rounds=rounds, seconds=seconds, announce=announce
    )
    image = packed_files(images)[0][0]
    starts: dict[str, Callable[[], Sample]] = {
        START_PREDICT: lambda: start_predict(job.run, image, device),
        START_SERVE: lambda: start_serve(job.run, device),
    }
    started = interleave(starts, rounds, warmup=1, announce=lambda round_, name: announce(name))
    _, size = stats(images)
    return rows_of(series, started, images, model, size, environment)


def rows_of(
    series: dict[str, Series], started: dict[str, Series], images: Job, model: str, size: str, environment: Environment
) -> list[Row]:
    """The rows of what was timed. series: of each system; started: starts of each command. size: `400x300`."""
    columns: dict[str, Any] = {
        "benchmark": "predict",
        "model": model,
        "precision": "fp32",
        "resolution_px": images.resolution_px,
        "page_cache": "warm",
        "environment": environment,
    }
    rows: list[Row] = []
    for name, found in series.items():
        batch_size = full_batches(len(samples(images)), images.batch_size) if name == EVALUATION else _BATCH
        own = columns | {"system": name, "packed": f"{size} jpg", "batch_size": batch_size}
        rows += series_rows(found, note=_NOTES[name], **own)
        if name != EVALUATION:
            rows.append(ratio_row(found, series[EVALUATION], beside=EVALUATION, **own))
    for name, found in started.items():
        times = [sample.seconds for sample in found.samples]
        other = [sample.other_cpu for sample in found.samples]
        row = summary_row(times, found.failed, metric="start_s", unit="s", system=name, note=_NOTES[name], **columns)
        rows.append(replace(row, other_cpu=round(median_interval(other).median, 4) if other else None))
    return rows


def predicting_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    own = [row for row in rows if row.benchmark == "predict"]
    across = [("img/s", lambda row: row.metric == "img_per_s")]
    across.append(("CPU s / 1,000", lambda row: row.metric == "cpu_s_per_1000"))
    starts = [row for row in own if row.metric == "start_s"]
    about = dict.fromkeys(f"{row.model}, {row.resolution_px} px, packed at {row.packed}" for row in own if row.packed)
    parts = ["## Predicting\n", f"{'; '.join(about)}. Median [interval].\n"]
    parts.append(pivot([row for row in own if not row.beside and row.metric != "start_s"], across))
    parts.append("Ratios of images per second, taken within each round:\n")
    ratios = [[f"{row.system} / {row.beside}", cell(row), verdict(row)] for row in own if row.beside]
    parts.append(table(["ratio", "img/s", "target"], ratios))
    parts.append(table(["start", "s", "target"], [[row.system, cell(row), verdict(row)] for row in starts]))
    parts += [busy_text(own), notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)


def predicting_in_words(rows: Sequence[Row]) -> list[str]:
    """The findings as sentences: each ratio and each start, with its target."""
    said = []
    for row in rows:
        if row.value is None or not verdict(row):
            continue
        if row.beside:
            found = f"{row.system} is {cell(row)} times {row.beside} ({row.packed}, {row.resolution_px} px)"
        else:
            found = f"{row.system} takes {cell(row)} s"
        said.append(f"Predicting: {found}; {verdict(row)}.")
    failed = dict.fromkeys((row.system, row.failed) for row in rows if row.failed and not row.beside)
    return said + [f"Predicting: {system} failed: {reason}." for system, reason in failed]
