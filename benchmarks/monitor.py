"""Readings of a device, many times a second, on a thread of its own; and the cores of the CPU as such a device."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any, Protocol

HZ = 10.5
"""Readings a second: 10 are the least that is wanted, and sampling may take a hundredth of a core. Beside an H100 a
reading took 0.84 ms of a core (1.07 % at 12.8 a second), so that 10.5 cost 0.88 %; with a CPU's counters less.

NVML renews its utilization only every 1/6 to 1 s, power and clocks more often; GPM's counters, which it renews every
tenth of a second, come with every second reading (`benchmarks/gpu.py`).
"""
MOST_CORE_SHARE = 0.01
"""What sampling may cost: a hundredth of a core."""


class Source(Protocol):
    """Where readings come from. `about` goes into every summary."""

    about: dict[str, Any]

    def read(self) -> dict[str, float]:
        """The readings of this moment, by name; what the device cannot tell is not there."""
        ...

    def close(self) -> None:
        """Give back what the source holds."""
        ...


class CoreSource:
    """Use of each CPU core since the last reading, 0 to 100 percent, from the kernel's counters (10 ms steps)."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self.about: dict[str, Any] = {"device": "CPU", "driver": "", "missing": {}}
        self._stat = stat
        self._before = self._now()

    def _now(self) -> dict[str, tuple[int, int]]:
        """Core → busy and all ticks since boot."""
        found = {}
        for line in self._stat.read_text(encoding="utf-8").splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu":
                ticks = [int(value) for value in values[:8]]  # guests are counted in user already
                found[name.removeprefix("cpu")] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
        return found

    def read(self) -> dict[str, float]:
        """See `Source.read`. A core whose counters have not moved since is left out."""
        before, self._before = self._before, self._now()
        found = {}
        for core, (busy, ticks) in self._before.items():
            old_busy, old_ticks = before.get(core, (busy, ticks))
            if ticks > old_ticks:
                found[f"core_{core}_percent"] = min(max(100.0 * (busy - old_busy) / (ticks - old_ticks), 0.0), 100.0)
        return found

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at one moment. at_s: seconds since the start. values: by name (`benchmarks.gpu.UNITS`)."""

    at_s: float
    values: Mapping[str, float]


class Sampler:
    """A context manager that reads a source `hz` times a second until it is left. What fails in it ends it alone."""

    def __init__(self, source: Source, hz: float = HZ) -> None:
        """The sampler owns `source` and closes it. Raises ValueError where `hz` is not positive."""
        if hz <= 0:
            raise ValueError(f"{hz} readings a second")
        self.source, self.hz = source, hz
        self.readings: list[Reading] = []
        self.error = ""
        self.cpu_s = self.seconds = self.started = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        """Start reading."""
        self.started = time.perf_counter()  # readings count from here
        self._thread.start()
        return self

    def _run(self) -> None:
        due = self.started
        while not self._stop.is_set():
            try:
                self.readings.append(Reading(time.perf_counter() - self.started, self.source.read()))
            except Exception as error:  # noqa: BLE001 - the summary tells it; what is being watched goes on
                self.error = f"{type(error).__name__}: {error}"
                break
            due = max(due + 1 / self.hz, time.perf_counter())  # a late reading is not made up for
            self._stop.wait(due - time.perf_counter())
        self.cpu_s = time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading and close the source."""
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self.started
        self.source.close()

    def timeline(self) -> dict[str, tuple[list[float], list[float]]]:
        """Each metric as seconds since the start and values, for pictures."""
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for reading in self.readings:
            for name, value in reading.values.items():
                times, values = lines.setdefault(name, ([], []))
                times.append(reading.at_s)
                values.append(float(value))
        return lines

    def summary(self, start_s: float = 0.0, end_s: float = float("inf")) -> dict[str, Any]:
        """Each metric's mean, median, least, largest and count in a span of the run, and what sampling cost.

        reached_hz: readings in the span over its seconds; None where it has none. sampler_core_share: CPU time of the
        sampler's thread over the wall clock, 0 to 1 of one core, of the whole run.
        """
        metrics = {}
        until_now_s = self.seconds or time.perf_counter() - self.started  # it may be running still
        span_s = min(end_s, until_now_s) - max(start_s, 0.0)
        made = sum(start_s <= reading.at_s <= end_s for reading in self.readings)
        for name, (times, values) in self.timeline().items():
            within = [value for at_s, value in zip(times, values, strict=True) if start_s <= at_s <= end_s]
            if within:
                metrics[name] = {
                    "mean": fmean(within),
                    "median": median(within),
                    "min": min(within),
                    "max": max(within),
                    "readings": len(within),
                }
        return {
            **self.source.about,
            "asked_hz": self.hz,
            "reached_hz": made / span_s if span_s > 0 else None,
            "sampler_core_share": self.cpu_s / self.seconds if self.seconds else None,
            "error": self.error,
            "metrics": metrics,
        }
