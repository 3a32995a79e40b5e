"""The `predict` benchmark: `train.predict` beside evaluation on the same images, and how long both commands start.

Evaluation is what a run does at its end: `train.evaluation` in float32 over a shard set, through the Loader. Prediction
is the command's own loop over JPEG files: read, decode, pack where need be, cut, network, probabilities. It is timed
on the files that a shard set holds, which are taken as they are, and on plain JPEG files of the same size, which the
command first packs as it packs any foreign image.
"""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.datasets import names, packed_files, prepared, stats
from benchmarks.machine import Environment
from benchmarks.measure import Row, Sample, Series, interleave, median_interval, ratio_row, series_rows, summary_row
from benchmarks.peers.system import Work
from benchmarks.starts import start_predict, start_serve
from benchmarks.tables import busy_text, cell, grid, machine_text, notes, pivot
from benchmarks.targets import verdict
from benchmarks.worker import Running, Told, take_turns
from shards.common.errors import DataError, last_line
from shards.format import MANIFEST, Manifest

EVALUATION, PREDICT = "evaluation", "predict, files of a shard set"
PREDICT_PLAIN = "predict, plain JPEG files"
START_PREDICT, START_SERVE = "train.predict, one image", "train.serve, until it is ready"

_BATCH = 32
"""Images that `train.predict` judges at a time, by default."""
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


@dataclass(frozen=True)
class PredictJob:
    """What is predicted. work.batch_size: the most in a batch of the evaluation. run: the folder of the trained run."""

    work: Work
    run: Path
    device: str = "cpu"


def make_run(work: Work, model: str, device: str) -> Path:
    """A run folder, made anew by `train.run` in one epoch: its weights are worth nothing, and take as long to use.

    Raises DataError with the last line of the command where it fails.
    """
    data = (prepared("shards-split", work) / "set").resolve()
    out = data.parent.parent / f"run-{model}-{work.packed_px}-{work.resolution_px}"
    shutil.rmtree(out, ignore_errors=True)
    images = sum(Manifest.from_file(data / MANIFEST).counts["train"].values())
    options = {"--model": model, "--data": data, "--out": out, "--resolution": work.resolution_px, "--epochs": 1}
    options |= {"--batch-size": min(16, images), "--compile": "off", "--device": device}
    command = [sys.executable, "-m", "train.run", *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"training a run to predict with failed: {last_line(done.stderr)}")
    return out


# ------------------------------------------------------------------ throughput


def set_up(name: str, job: PredictJob) -> Running:
    """Load the run, and go through all images once, the way that `name` says."""
    from shards import ShardSet

    selection = ShardSet(prepared("shards-jpg", job.work) / "set").select("train")
    if name == EVALUATION:
        once = evaluation(job, selection)
    elif name == PREDICT:
        once = prediction(job, shard_files(job.work, selection))
    else:
        once = prediction(job, plain_files(job.work, selection))
    once()
    return Running(once)


def evaluation(job: PredictJob, selection: Any) -> Callable[[], int]:
    """One evaluation of a `shards.Selection`, as a run does it; returns the number of its images."""
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
    batch_size = full_batches(len(selection), job.work.batch_size)
    loader = Loader(selection, batch_size=batch_size, resolution=about.resolution, train=False, device=device)
    world = World(device=device)

    def once() -> int:
        found = answers(net, loader, "fp32", world, lambda done: None)
        assert found is not None  # one process alone is the first rank
        return len(found.samples)

    return once


def full_batches(count: int, most: int) -> int:
    """The batch size of at most `most` that needs no more batches for `count` images, and pads the last one least."""
    return math.ceil(count / math.ceil(count / most))


def prediction(job: PredictJob, files: Sequence[Path]) -> Callable[[], int]:
    """The loop of `train.predict` over the files; returns their number. Raises DataError where one is refused."""
    from train.inference.output import Refused
    from train.inference.predictor import Predictor
    from train.predict import judge

    predictor = Predictor(job.run, job.device)

    def once() -> int:
        count = 0
        for batch in judge(predictor, files, batch_size=_BATCH):
            for one in batch:
                if isinstance(one, Refused):
                    raise DataError(f"{one.file}: refused, it {one.reason}")
            count += len(batch)
        return count

    return once


def shard_files(work: Work, selection: Any) -> list[Path]:
    """The images of a selection as files, byte for byte as the shard set holds them, in its order."""
    folder = prepared("shards-jpg", work) / "files"
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


def plain_files(work: Work, selection: Any) -> list[Path]:
    """The images of a selection as JPEG files that OpenCV wrote at the packed size, in its order."""
    by_name = {path.stem: path for path, _ in packed_files(work)}
    return [by_name[str(name)] for name in selection.data.column("image_id")[selection.samples]]


# ------------------------------------------------------------------ rows


def measure_predicting(
    work: Work, model: str, device: str, environment: Environment, *, rounds: int, seconds: float, told: Told
) -> list[Row]:
    """Time evaluation and prediction in turn, then the starts of both commands in turn; warm page cache.

    Raises DataError where the images cannot be packed or the run cannot be trained.
    """
    told("train a run")
    job = PredictJob(work, make_run(work, model, device), device)
    systems = [EVALUATION, PREDICT, PREDICT_PLAIN]
    series, _ = take_turns(set_up, systems, job, work.cache / "logs", rounds=rounds, seconds=seconds, told=told)
    image = packed_files(work)[0][0]
    starts: dict[str, Callable[[], Sample]] = {
        START_PREDICT: lambda: start_predict(job.run, image, device),
        START_SERVE: lambda: start_serve(job.run, device),
    }
    started = interleave(starts, rounds, warmup=1, told=lambda round_, name: told(name))
    _, size = stats(work)
    return rows_of(series, started, work, model, size, environment)


def rows_of(
    series: dict[str, Series], started: dict[str, Series], work: Work, model: str, size: str, environment: Environment
) -> list[Row]:
    """The rows of what was timed. series: images of each system; started: starts of each command. size: `400x300`."""
    columns: dict[str, Any] = {
        "benchmark": "predict",
        "model": model,
        "precision": "fp32",
        "resolution_px": work.resolution_px,
        "page_cache": "warm",
        "environment": environment,
    }
    rows: list[Row] = []
    for name, found in series.items():
        batch_size = full_batches(len(names(work)), work.batch_size) if name == EVALUATION else _BATCH
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
    parts.append(grid(["ratio", "img/s", "meant to be"], ratios))
    parts.append(grid(["start", "s", "meant to be"], [[row.system, cell(row), verdict(row)] for row in starts]))
    parts += [busy_text(own), notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)


def predicting_in_words(rows: Sequence[Row]) -> list[str]:
    """What was found as sentences: each ratio and each start, with what it is meant to be."""
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
