"""Readings over time: kept raw in a CSV, and drawn from it, one lane a metric, the systems side by side."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from benchmarks.tables import figure
from shards.common.errors import DataError
from shards.common.files import write_durably

START_UP, TRAINING = "start-up", "training"
"""The phases: what comes before the clock, and what is counted."""

_KEYS = ("model", "system", "round", "phase", "device", "at_s")

READINGS = {  # metric → its name for people, its unit there, and what the reading is divided by
    "sm_percent": ("SM busy", "%", 1),
    "tensor_percent": ("tensor cores", "%", 1),
    "occupancy_percent": ("SM occupancy", "%", 1),
    "dram_percent": ("DRAM bandwidth", "%", 1),
    "nvjpg_percent": ("NVJPEG", "%", 1),
    "memory_used_bytes": ("memory used", "GiB", 2**30),
    "power_w": ("power", "W", 1),
    "sm_mhz": ("SM clock", "MHz", 1),
    "memory_mhz": ("memory clock", "MHz", 1),
    "pcie_rx_mib_per_s": ("PCIe in", "MiB/s", 1),
    "pcie_tx_mib_per_s": ("PCIe out", "MiB/s", 1),
    "memory_busy_percent": ("NVML memory busy", "%", 1),
    "busy_percent": ("NVML busy", "%", 1),
}
"""In the order of tables and pictures: what says how full the GPU was comes first, NVML's "utilization" last."""


def reading(metric: str) -> tuple[str, str, float]:
    """Name, unit and divisor of a metric, for people; a CPU's are `core_N_percent`."""
    if metric in READINGS:
        return READINGS[metric]
    return f"CPU {metric.removesuffix('_percent').replace('_', ' ')}", "%", 1


def in_order(metrics: Iterable[str]) -> list[str]:
    """Each metric once, in the order of `READINGS`; then the cores as they came."""
    found = dict.fromkeys(metrics)
    return [*(name for name in READINGS if name in found), *(name for name in found if name not in READINGS)]


@dataclass(frozen=True, slots=True)
class Moment:
    """What was read at one moment. at_s: seconds since training's clock started, under 0 before. device: what was read.

    values: by metric (`benchmarks.gpu.UNITS`, or `core_N_percent`).
    """

    model: str
    system: str
    round: int
    phase: str
    device: str
    at_s: float
    values: Mapping[str, float]


def write_timeline(path: Path, moments: Iterable[Moment]) -> None:
    """Write a line for each moment, whole or not at all; what was not read is empty."""
    moments = list(moments)
    metrics = list(dict.fromkeys(name for moment in moments for name in moment.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_KEYS, *metrics])
    for m in moments:
        read = (f"{m.values[name]:.10g}" if name in m.values else "" for name in metrics)
        writer.writerow([m.model, m.system, m.round, m.phase, m.device, f"{m.at_s:.4f}", *read])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, out.getvalue().encode())


def read_timeline(path: Path) -> list[Moment]:
    """Read what `write_timeline` wrote. Raises DataError naming the file and what is wrong with it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = tuple(reader.fieldnames or ())
            if columns[: len(_KEYS)] != _KEYS:
                raise DataError(f"{path}: its columns are not those of a timeline of this release")
            metrics = columns[len(_KEYS) :]
            return [
                Moment(
                    line["model"],
                    line["system"],
                    int(line["round"]),
                    line["phase"],
                    line["device"],
                    float(line["at_s"]),
                    {name: float(line[name]) for name in metrics if line[name]},
                )
                for line in reader
            ]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable timeline ({error})") from None


# ------------------------------------------------------------------ the picture

_LEFT, _COLUMN, _GAP, _TOP, _BOTTOM = 150, 190, 14, 50, 40
_STRIP = 18
"""Room over a lane for its mean, px."""


def timeline_svg(name: str, moments: Sequence[Moment]) -> str:
    """One round of one model as an `<svg>` element; moments: of that round alone. Raises ValueError without any.

    A lane has the same scale for all systems: percent from 0 to 100, anything else from 0 to its largest reading.
    Start-up is grey, and shown for as long as a third of the training that follows.
    """
    from train.study.report.svg import wrap

    if not moments:
        raise ValueError("a timeline of no readings")
    systems = list(dict.fromkeys(m.system for m in moments))
    metrics = in_order(metric for m in moments for metric in m.values)
    end_s = max(max(m.at_s for m in moments), 0.1)
    shown = [m for m in moments if m.at_s >= -end_s / 3]
    start_s = min(min(m.at_s for m in shown), 0.0)
    lane = 40 if len(metrics) <= 14 else 18
    base = _TOP + len(metrics) * (lane + _STRIP)
    parts, told = [], []

    def px(system: int, at_s: float) -> float:
        return _LEFT + system * (_COLUMN + _GAP) + _COLUMN * (at_s - start_s) / (end_s - start_s)

    for i, system in enumerate(systems):
        parts += _column(system, px(i, start_s), px(i, 0.0), px(i, end_s), base)
        parts += _seconds(px(i, 0.0), px(i, end_s), end_s, base)
    for row, metric in enumerate(metrics):
        label, unit, divisor = reading(metric)
        floor = _TOP + (row + 1) * (lane + _STRIP)
        top = 100.0 if unit == "%" else max(m.values.get(metric, 0.0) for m in shown) / divisor or 1.0
        parts.append(f'<text class="ink" x="0" y="{floor - lane / 2 + 4}">{escape(label)}</text>')
        parts.append(
            f'<text class="note" x="{_LEFT - 6}" y="{floor - lane + 8}" text-anchor="end">{figure(top)} {unit}</text>'
            f'<text class="note" x="{_LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        )
        for i, system in enumerate(systems):
            own = [m for m in shown if m.system == system and metric in m.values]
            parts.append(f'<path class="axis" d="M{px(i, start_s):.1f} {floor}H{px(i, end_s):.1f}"/>')
            for phase, kind in ((START_UP, "c7"), (TRAINING, "c0")):
                line = [(m.at_s, m.values[metric] / divisor) for m in own if m.phase == phase]
                points = " ".join(f"{px(i, at_s):.1f},{floor - lane * min(v / top, 1.0):.1f}" for at_s, v in line)
                if points:
                    parts.append(f'<polyline class="bar {kind}" points="{points}"/>')
            counted = [m.values[metric] / divisor for m in own if m.phase == TRAINING]
            if counted:
                mean = f"mean {figure(fmean(counted))} {unit}"
                parts.append(
                    f'<text class="note" x="{px(i, end_s):.1f}" y="{floor - lane - 4}" text-anchor="end">{mean}</text>'
                )
                told.append(f"{system}: {label}, {mean}")
    width = _LEFT + len(systems) * (_COLUMN + _GAP)
    middle = (_LEFT + width) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{base + 34}" text-anchor="middle">seconds of training</text>')
    title = f"Readings of {moments[0].device} while {moments[0].model} trained, round {moments[0].round}"
    return wrap(name, title, "; ".join(told), width, base + _BOTTOM, parts)


def _column(system: str, left: float, zero: float, right: float, base: float) -> list[str]:
    """The head of a system's column: its name in two lines, its phases, and the ground that they stand on."""
    style, _, source = system.partition(", ")
    parts = [
        f'<text class="strong" x="{left:.1f}" y="12">{escape(style)}</text>',
        f'<text class="ink" x="{left:.1f}" y="27">{escape(source)}</text>',
        f'<text class="note" x="{zero + 3:.1f}" y="43">{TRAINING}, counted</text>',
        f'<path class="rule" d="M{zero:.1f} 34V{base}"/>',
    ]
    if zero > left:
        parts.append(f'<rect class="outer c7" x="{left:.1f}" y="34" width="{zero - left:.1f}" height="{base - 34}"/>')
        parts.append(f'<text class="note" x="{zero - 3:.1f}" y="43" text-anchor="end">{START_UP}</text>')
    return parts


def _seconds(zero: float, right: float, end_s: float, base: float) -> list[str]:
    """The ends of the time axis."""
    return [
        f'<text class="tick" x="{zero:.1f}" y="{base + 16}" text-anchor="middle">0</text>',
        f'<text class="tick" x="{right:.1f}" y="{base + 16}" text-anchor="end">{figure(end_s)}</text>',
    ]


def timelines_html(moments: Sequence[Moment]) -> str:
    """The first round of every model as a picture, the others folded away below it. HTML."""
    parts = []
    for i, model in enumerate(dict.fromkeys(m.model for m in moments)):
        own = [m for m in moments if m.model == model]
        rounds = sorted({m.round for m in own})
        kernels = " NVML busy says only that some kernel ran." if any("busy_percent" in m.values for m in own) else ""
        drawn = [timeline_svg(f"timeline-{i}-{r}", [m for m in own if m.round == r]) for r in rounds]
        parts.append(
            f"<h3>{escape(model)}: timeline of round {rounds[0]}</h3><div class='charts one'>{drawn[0]}</div>"
            f"<p class='caption'>Read from {escape(own[0].device)}, drawn from the timeline's CSV. Grey: the end of "
            f"start-up, which is not counted. A lane has one scale for all systems.{kernels}</p>"
        )
        if drawn[1:]:
            others = "".join(f"<h4>Round {r}</h4>{svg}" for r, svg in zip(rounds[1:], drawn[1:], strict=True))
            parts.append(
                f"<details><summary>The other rounds</summary><div class='charts one'>{others}</div></details>"
            )
    return "".join(parts)
