"""How things are timed: warm-up, interleaved rounds, medians with intervals, ratios within each round.

All systems run once per round, A B C A B C …, so that drift of the machine affects all alike; a ratio is taken within a
round and then summarised. The interval of a median is that of its order statistics, which assumes nothing about the
distribution (Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Environment, Meter
from shards.common.errors import one_line

if TYPE_CHECKING:
    from benchmarks.datasets import Job

Announce = Callable[[str], None]
"""Called with the name of each step when the step begins."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run of one system.

    count: images, or other units, that were done. seconds: wall clock. cpu_s: CPU seconds of the system and its worker
    processes. other_cpu: share of the machine's CPU time that other processes used, 0 to 1. data_wait_s: the part of
    `seconds` that was spent waiting for a batch. beside: what a thread or a server beside the system has counted. The
    last three are nan where unknown.
    """

    count: float
    seconds: float
    cpu_s: float
    other_cpu: float = math.nan
    data_wait_s: float = math.nan
    beside: float = math.nan

    @property
    def per_s(self) -> float:
        """Images per second."""
        return self.count / self.seconds

    @property
    def cpu_s_per_1000(self) -> float:
        """CPU seconds per 1,000 images."""
        return 1000 * self.cpu_s / self.count


@dataclass(slots=True)
class Series:
    """All timed runs of one system, in the order of the rounds; `failed`: why there are no more."""

    samples: list[Sample] = field(default_factory=list)
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with its interval. coverage: the probability that the interval holds the true median, 0 to 1."""

    median: float
    low: float
    high: float
    coverage: float


@dataclass(frozen=True)
class Measurement:
    """Where and how long systems are timed.

    environment: the machine, for the rows. rounds: timed runs of each system. seconds: minimum length of each.
    """

    environment: Environment
    rounds: int
    seconds: float = 0.0
    announce: Announce = lambda step: None

    def columns(self, benchmark: str, job: "Job", **more: Any) -> dict[str, Any]:
        """The fields of Row that the rows of a job share, and more of them."""
        own = {"resolution_px": job.resolution_px, "batch_size": job.batch_size, "workers": job.workers}
        return {"benchmark": benchmark, **own, "environment": self.environment} | more


@dataclass(frozen=True)
class Row:
    """One measured value: a line of the CSV."""

    benchmark: str
    """Which benchmark: `loader`, `pack`, `training`, …"""
    system: str
    """What was measured, by the name that every table uses."""
    metric: str
    """What the value is: `img_per_s`, `cpu_s_per_1000`, …, or `img_per_s ratio` beside the system of `beside`."""
    unit: str
    """Unit of value, low, high and values."""
    value: float | None
    """Median over the rounds; None where the system failed."""
    low: float | None = None
    """Lower end of the interval of the median; None where there was one run only."""
    high: float | None = None
    """Upper end of it."""
    coverage: float | None = None
    """Probability that the interval holds the true median; at least 0.95 from 6 repeats on, 0.9375 with 5."""
    values: tuple[float, ...] = ()
    """The value of each round, in order: value i of two systems is of the same round."""
    beside: str = ""
    """For ratios: the system in the denominator."""
    packed: str = ""
    """What is on disk: width×height and encoding of the packed images, or `originals`."""
    resolution_px: int | None = None
    """Side of the square images that come out."""
    batch_size: int | None = None
    """Images per batch."""
    workers: int | None = None
    """Threads or worker processes."""
    model: str = ""
    """Model, for training."""
    precision: str = ""
    """Arithmetic, for training."""
    other_cpu: float | None = None
    """Median share of the machine's CPU time that other processes used during the rounds."""
    page_cache: str = ""
    """`warm`: all files were read before; `cold`: the cache was dropped before every round; empty: it has no part."""
    note: str = ""
    """What this system does differently from the others."""
    failed: str = ""
    """Why there is no value."""
    environment: Environment | None = None
    """The machine and the software."""

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval; the value twice where it has none. Raises ValueError for a row without a value."""
        if self.value is None:
            raise ValueError(f"{self.system}, {self.metric}: no value")
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


def median_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The median, and the narrowest symmetric pair of order statistics that holds the true one with at least `level`.

    With fewer than 6 values no pair reaches 0.95. The interval is the whole range then; `coverage` is its actual
    probability. Raises ValueError when there are no values.
    """
    from scipy.stats import binom

    if not values:
        raise ValueError("the median of no values")
    ordered = sorted(values)
    below = binom(len(ordered), 0.5)  # how many of the values lie below the true median
    rank = max(int(below.ppf((1 - level) / 2)), 1)
    coverage = float(1 - 2 * below.cdf(rank - 1))
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[-rank], coverage)


def interleave(
    systems: Mapping[str, Callable[[], Sample]], measurement: Measurement, warmup: int = 1
) -> dict[str, Series]:
    """Run every system once per round, in turn; `warmup` rounds before them do not count.

    A system that raises is not run again, and its series has the reason; the others go on.
    """
    series = {name: Series() for name in systems}
    for round_ in range(-warmup, measurement.rounds):
        step = "warm-up round" if round_ < 0 else f"round {round_ + 1} of {measurement.rounds}"
        for name, once in systems.items():
            if series[name].failed:
                continue
            measurement.announce(f"{step}, {name}")
            meter = Meter()
            try:
                sample = once()
            except Exception as error:  # noqa: BLE001 - any error of a peer is the reason in its row
                series[name].failed = reason(error)
                continue
            if round_ >= 0:
                other = meter.other_cpu(sample.cpu_s) if math.isnan(sample.other_cpu) else sample.other_cpu
                series[name].samples.append(replace(sample, other_cpu=other))
    return series


def reason(error: BaseException) -> str:
    """An exception as one line for a table: its type and text."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if str(error).strip() else text


def summary_row(values: Sequence[float], failed: str = "", **columns: object) -> Row:
    """A row of the median and interval of `values`, or a failed one. columns: the other fields of Row."""
    if failed:
        return Row(value=None, failed=failed, **columns)  # pyright: ignore[reportArgumentType] - names are Row's own
    found = median_interval(values)
    spread = len(values) > 1
    return Row(
        value=found.median,
        low=found.low if spread else None,
        high=found.high if spread else None,
        coverage=round(found.coverage, 4) if spread else None,
        values=tuple(values),
        **columns,  # pyright: ignore[reportArgumentType] - names are Row's own
    )


def series_row(series: Series, value: Callable[[Sample], float], **columns: object) -> Row:
    """A row of one value of each timed run, with the CPU time of other processes. columns: the other fields of Row."""
    other = [s.other_cpu for s in series.samples if not math.isnan(s.other_cpu)]
    columns |= {"other_cpu": round(statistics.median(other), 4) if other else None}
    return summary_row([value(sample) for sample in series.samples], series.failed, **columns)


def series_rows(series: Series, **columns: object) -> list[Row]:
    """The rows `img_per_s` and `cpu_s_per_1000` of one system; columns: the other fields of Row."""
    return [
        series_row(series, lambda sample: sample.per_s, metric="img_per_s", unit="img/s", **columns),
        series_row(series, lambda sample: sample.cpu_s_per_1000, metric="cpu_s_per_1000", unit="s", **columns),
    ]


def wait_row(series: Series, **columns: object) -> Row:
    """The row `data_wait`: the share of the time that was spent waiting for a batch, 0 to 1."""
    waits = [sample.data_wait_s / sample.seconds for sample in series.samples]
    return summary_row(waits, series.failed, metric="data_wait", unit="1", **columns)


def paired_row(one: Series, other: Series, value: Callable[[float, float], float], **columns: object) -> Row:
    """A row of one value of two systems in each round, from their images per second; failed if either of them is."""
    failed = one.failed or (f"the other system failed: {other.failed}" if other.failed else "")
    values = [] if failed else [value(a.per_s, b.per_s) for a, b in zip(one.samples, other.samples, strict=True)]
    return summary_row(values, failed, **columns)


def ratio_row(above: Series, below: Series, **columns: object) -> Row:
    """Images per second of one system divided by another's, round by round; failed if either of them is."""
    columns = {"metric": "img_per_s ratio", "unit": "×"} | columns
    return paired_row(above, below, lambda a, b: a / b, **columns)


def ratio_rows(
    pairs: Sequence[tuple[str, str]], series: Mapping[str, Series], columns: Callable[[str], dict[str, Any]]
) -> list[Row]:
    """The ratios of the pairs of which both systems were measured. columns: of a system by its name."""
    measured = [(above, below) for above, below in pairs if above in series and below in series]
    return [ratio_row(series[above], series[below], beside=below, **columns(above)) for above, below in measured]
