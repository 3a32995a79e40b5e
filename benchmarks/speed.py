"""The `training` benchmark: images per second of the models, each beside its ceiling and the usual way to train it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Environment
from benchmarks.measure import Row, Series, ratio_row, series_rows, summary_row
from benchmarks.tables import busy_text, cell, grid, machine_text, notes
from benchmarks.targets import targets_text
from benchmarks.training import (
    CACHED,
    COMPILED,
    EAGER,
    FOLDER,
    FP32,
    LAST,
    MATRIX,
    NATIVE,
    STYLES,
    TrainingJob,
    precision_of,
    set_up,
    system_name,
)
from benchmarks.worker import Told, take_turns
from train.config import FORWARD_AND_BACKWARD

if TYPE_CHECKING:
    import torch

BASELINE = system_name(EAGER + FP32, FOLDER)
SYSTEMS = (*(system_name(style, source) for style in STYLES for source in (CACHED, NATIVE)), BASELINE)
NOT_IN_QUICK = (system_name(EAGER, NATIVE),)
"""Left out of the short version: nobody trains like that, and the baseline has its own loader."""
IN_FP32 = tuple(system_name(style + FP32, CACHED) for style in (EAGER, COMPILED))

RATIOS = (
    (system_name(LAST, CACHED), system_name(EAGER, CACHED)),
    (system_name(COMPILED, CACHED), system_name(EAGER, CACHED)),
    (system_name(COMPILED, CACHED), system_name(EAGER + FP32, CACHED)),
    (system_name(COMPILED + FP32, CACHED), system_name(EAGER + FP32, CACHED)),
    (system_name(COMPILED, NATIVE), system_name(EAGER, NATIVE)),
    (system_name(COMPILED, NATIVE), BASELINE),
    (system_name(LAST, NATIVE), BASELINE),
    *((system_name(style, NATIVE), system_name(style, CACHED)) for style in STYLES),
)

_NOTES = {
    "eager NCHW": "contiguous; scaled and normalised one operation at a time, no colour map; PyTorch's own optimizer",
    "channels-last": "this project's input head with its colour map; fused optimizer; on a CPU freed memory is kept",
    "compiled": "the same under torch.compile, static shapes; steady state, compile time apart (cold compiler cache)",
}


def matrix_products(names: Sequence[str], device: "torch.device") -> dict[str, str]:
    """Precision → the system that measures the matrix peak in it, of each precision that one of `names` computes in."""
    peaks = {precision_of(MATRIX, device): MATRIX}
    if any(FP32 in name for name in names):
        peaks.setdefault("fp32", MATRIX + FP32)
    return peaks


def measure_training(
    job: TrainingJob, names: Sequence[str], environment: Environment, *, rounds: int, seconds: float, told: Told
) -> list[Row]:
    """Time the ways to train one model, and the matrix product, in turn; warm page cache."""
    from train import device as devices
    from train import models

    device = devices.choose(job.device)
    peaks = matrix_products(names, device)
    chosen = [*names, *peaks.values()]
    series, about = take_turns(
        set_up, chosen, job, job.work.cache / "logs", rounds=rounds, seconds=seconds, told=told, frozen=True
    )
    parameters, forward = models.cost(job.model, job.work.resolution_px, 7)
    rows: list[Row] = []
    for name in names:
        style = name.partition(", ")[0]
        columns = _columns(job, name, precision_of(name, device), environment)
        noted = columns | {"note": _NOTES.get(style, "") if CACHED in name else ""}
        rows += series_rows(series[name], **noted)
        rows.append(_share_of_peak(series[name], series[peaks[columns["precision"]]], forward, columns))
        if "compile_s" in about.get(name, {}):
            rows.append(Row(metric="compile_s", unit="s", value=about[name]["compile_s"], **columns))
    for above, below in RATIOS:
        if above in names and below in names:
            columns = _columns(job, above, precision_of(above, device), environment)
            rows.append(ratio_row(series[above], series[below], beside=below, **columns))
    for precision, name in peaks.items():
        whole = _columns(job, name, precision, environment)
        flops = [sample.per_s for sample in series[name].samples]
        rows.append(summary_row(flops, series[name].failed, metric="gflop_per_s", unit="GFLOP/s", **whole))
    model: dict[str, Any] = _columns(job, job.model, "", environment) | {"workers": None}
    rows.append(Row(metric="parameters", unit="1", value=float(parameters), **model))
    rows.append(Row(metric="forward_flop_per_image", unit="FLOP", value=float(forward), **model))
    return rows


def _share_of_peak(series: Series, peak: Series, forward: int, columns: dict[str, Any]) -> Row:
    """FLOP/s of training over those of the matrix product, round by round."""
    failed = series.failed or peak.failed
    shares = []
    if not failed:
        for own, best in zip(series.samples, peak.samples, strict=True):
            shares.append(own.per_s * forward * FORWARD_AND_BACKWARD / (best.per_s * 1e9))
    return summary_row(shares, failed, metric="share_of_peak", unit="1", **columns)


def _columns(job: TrainingJob, name: str, precision: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "training",
        "system": name,
        "model": job.model,
        "precision": precision,
        "packed": "" if MATRIX in name or name == job.model else "originals" if FOLDER in name else "400 px jpg",
        "resolution_px": job.work.resolution_px,
        "batch_size": job.work.batch_size,
        "workers": job.work.workers,
        "page_cache": "warm",
        "environment": environment,
    }


def training_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: a line per model and way to train it."""
    own = [row for row in rows if row.benchmark == "training"]
    parts = ["## Training\n", "Whole steps: forward, loss, backward, optimizer. Median [interval].\n"]
    lines = []
    for model in dict.fromkeys(row.model for row in own):
        part = [row for row in own if row.model == model]
        found = {(row.system, row.metric): row for row in part if not row.beside}
        for system in dict.fromkeys(row.system for row in part if row.metric == "img_per_s"):
            metrics = ("img_per_s", "share_of_peak", "compile_s")
            speed = found[system, "img_per_s"]
            line = [model, str(speed.batch_size or ""), system, speed.precision]
            lines.append([*line, *(cell(found.get((system, metric))) for metric in metrics)])
    header = ["model", "batch", "system", "precision", "img/s", "share of its matrix peak", "compile s"]
    parts.append(grid(header, lines))
    parts.append(busy_text(own))
    parts.append("Ratios of images per second, taken within each round:\n")
    ratios = [[row.model, f"{row.system} / {row.beside}", cell(row)] for row in own if row.beside]
    parts += [grid(["model", "ratio", "img/s"], ratios), targets_text(own)]
    lines = []
    for model in dict.fromkeys(row.model for row in own):
        facts = {row.metric: row for row in own if row.model == model}
        peaks = [row for row in own if row.model == model and row.metric == "gflop_per_s"]
        shown = (facts.get(name) for name in ("parameters", "forward_flop_per_image"))
        lines.append([model, *(cell(row) for row in shown), "; ".join(f"{cell(r)} {r.precision}" for r in peaks)])
    parts.append(grid(["model", "parameters", "FLOP / image, forward", "matrix peak, GFLOP/s"], lines))
    parts += [notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)
