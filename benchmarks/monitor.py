"""What a device does while something runs on it: readings, many times a second, on a thread of its own.

A GPU is read through NVML, on Hopper and newer also through GPM; a CPU through the kernel's counters of each core.
NVML's own "utilization" says only that some kernel ran, not that the GPU was full: the tables show it beside the data
wait and the cached-batch ceiling.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from benchmarks.machine import busy_and_all_s, gpu_handle
from shards.common.errors import DataError

if TYPE_CHECKING:
    import torch

CPU = "CPU"
"""Name of the device that `CoreReader` reads."""


class Metric(NamedTuple):
    """What a reading is, for people: its label, its unit, what the raw reading is divided by, and its meaning."""

    label: str
    unit: str
    divisor: float
    meaning: str


METRICS = {
    "sm_percent": Metric("SM busy", "%", 1, "GPM: share of the streaming multiprocessors that were busy"),
    "tensor_percent": Metric("tensor cores", "%", 1, "GPM: share of time in which tensor cores worked"),
    "occupancy_percent": Metric("SM occupancy", "%", 1, "GPM: active warps of those possible"),
    "dram_percent": Metric("DRAM bandwidth", "%", 1, "GPM: bandwidth of device memory used, of its maximum"),
    "nvjpg_percent": Metric("NVJPEG", "%", 1, "GPM: use of the hardware JPEG decoders, their mean"),
    "memory_used_bytes": Metric("memory used", "GiB", 2**30, "device memory in use, by all processes"),
    "power_w": Metric("power", "W", 1, "power draw"),
    "sm_mhz": Metric("SM clock", "MHz", 1, "clock of the streaming multiprocessors"),
    "memory_mhz": Metric("memory clock", "MHz", 1, "clock of the memory"),
    "memory_busy_percent": Metric("NVML memory busy", "%", 1, "share of time in which device memory was used"),
    "busy_percent": Metric("NVML busy", "%", 1, "share of time in which at least one kernel ran"),
}
"""Each reading of a GPU, in the order of tables: NVML's "utilization" is the last one."""


def metric(name: str) -> Metric:
    """What a reading is; those of a CPU are `core_0_percent`, `core_1_percent`, …"""
    label = f"CPU {name.removesuffix('_percent').replace('_', ' ')}"
    return METRICS.get(name) or Metric(label, "%", 1, "share of time in which it was not idle")


def reader_of(device: "torch.device") -> "CoreReader | GpuReader":
    """What reads the use of a device. Raises DataError where its driver does not answer."""
    from train.device import gpu_uuid

    return CoreReader() if device.type == "cpu" else GpuReader(gpu_uuid(device))


_GPM = {  # ours → GPM metrics of nvml.h, of which the mean is taken
    "sm_percent": ("NVML_GPM_METRIC_SM_UTIL",),
    "occupancy_percent": ("NVML_GPM_METRIC_SM_OCCUPANCY",),
    "tensor_percent": ("NVML_GPM_METRIC_ANY_TENSOR_UTIL",),
    "dram_percent": ("NVML_GPM_METRIC_DRAM_BW_UTIL",),
    "nvjpg_percent": tuple(f"NVML_GPM_METRIC_NVJPG_{i}_UTIL" for i in range(8)),
}

_GPM_WINDOW_S = 0.11
"""NVIDIA's NVML API Reference Guide, GPM Functions, nvmlGpmMetricsGet: the two samples of a metric should be more than
100 ms apart, since GPM updates its counters no more often. In a shorter window they may not have changed."""

HZ = 10.5
"""Readings per second. At least 10 are wanted, and sampling may take 1 % of a core. Beside an H100 a reading took 0.84
ms of a core (1.07 % at 12.8 per second), so 10.5 cost 0.88 %; a CPU's counters cost less.

NVML updates its utilization only every 1/6 to 1 s, power and clocks more often. GPM updates its counters every tenth of
a second, so they come with every second reading.
"""
MOST_CORE_SHARE = 0.01
"""What sampling may cost: 1 % of a core."""


class CoreReader:
    """Use of each CPU core since the last reading, 0 to 100 percent, from the kernel's counters (10 ms steps).

    `about` goes into every summary.
    """

    def __init__(self) -> None:
        self.about: dict[str, Any] = {"device": CPU, "driver": "", "missing": {}}
        self._before = self._now()

    @staticmethod
    def _now() -> list[tuple[float, float]]:
        """Busy and all seconds of each core since boot."""
        return [busy_and_all_s(times) for times in psutil.cpu_times(percpu=True)]

    def read(self) -> dict[str, float]:
        """The present readings by name. A core whose counters have not changed is left out."""
        before, self._before = self._before, self._now()
        found = {}
        for core, ((busy, all_s), (old_busy, old_all_s)) in enumerate(zip(self._before, before, strict=True)):
            if all_s > old_all_s:
                percent = 100.0 * (busy - old_busy) / (all_s - old_all_s)
                found[f"core_{core}_percent"] = min(max(percent, 0.0), 100.0)
        return found

    def close(self) -> None:
        """Do nothing: no resource is held."""


class GpuReader:
    """Reads one GPU through NVML. `about`: name, driver, which readings the device does not have and why."""

    def __init__(self, uuid: str | None = None, nvml: Any = None) -> None:
        """uuid: of the GPU, `GPU-…` (NVML and CUDA may number GPUs differently); None for the first one.

        nvml: the binding, `pynvml` by default. Raises DataError where there is no driver or no such GPU.
        """
        if nvml is None:
            import pynvml as nvml
        self._nvml: Any = nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise DataError(f"no NVIDIA driver answers ({error}): GPU readings need one") from None
        try:
            self._device = gpu_handle(nvml, uuid)
        except DataError:
            nvml.nvmlShutdown()
            raise
        driver = nvml.nvmlSystemGetDriverVersion()
        self.about: dict[str, Any] = {"device": nvml.nvmlDeviceGetName(self._device), "driver": driver, "missing": {}}
        self._gpm = self._open_gpm()
        self._queries = self._usable()

    def _open_gpm(self) -> "_Gpm | None":
        nvml = self._nvml
        reason = "this GPU has no GPM (it came with Hopper)"
        try:
            if nvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice:
                return _Gpm(nvml, self._device)
        except nvml.NVMLError as error:
            reason = str(error)
        self.about["missing"] |= dict.fromkeys(_GPM, reason)
        return None

    def _usable(self) -> list[Callable[[], dict[str, float]]]:
        """The queries that this device answers; `about` has the others with the driver's reason."""
        nvml, device = self._nvml, self._device

        def busy() -> dict[str, float]:
            rates = nvml.nvmlDeviceGetUtilizationRates(device)
            return {"busy_percent": rates.gpu, "memory_busy_percent": rates.memory}

        queries: dict[tuple[str, ...], Callable[[], dict[str, float]]] = {
            ("busy_percent", "memory_busy_percent"): busy,
            ("memory_used_bytes",): lambda: {"memory_used_bytes": nvml.nvmlDeviceGetMemoryInfo(device).used},
            ("power_w",): lambda: {"power_w": nvml.nvmlDeviceGetPowerUsage(device) / 1000},
            ("sm_mhz",): lambda: {"sm_mhz": nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)},
            ("memory_mhz",): lambda: {"memory_mhz": nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM)},
        }
        usable = []
        for names, query in queries.items():
            try:
                query()
                usable.append(query)
            except nvml.NVMLError as error:
                self.about["missing"] |= dict.fromkeys(names, str(error))
        return usable

    def read(self) -> dict[str, float]:
        """The present readings by name, without those that the device does not have.

        Raises DataError where the driver stops answering.
        """
        try:
            found: dict[str, float] = {}
            for query in self._queries:
                found |= query()
            if self._gpm is not None:
                found |= self._gpm.read()
            return found
        except self._nvml.NVMLError as error:
            raise DataError(f"the driver stopped answering ({error})") from None

    def close(self) -> None:
        """Free the driver's samples and close the connection."""
        if self._gpm is not None:
            self._gpm.close()
        self._nvml.nvmlShutdown()


class _Gpm:
    """GPM's metrics describe the time between two samples of its counters: the last sample is kept."""

    def __init__(self, nvml: Any, device: Any) -> None:
        self._nvml, self._device = nvml, device
        self._old, self._new = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self._ids = [self._id(name) for names in _GPM.values() for name in names]
        nvml.nvmlGpmSampleGet(device, self._old)
        self._taken_s = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Means since the last sample, none until it is old enough, without those that this GPU does not count."""
        if time.perf_counter() - self._taken_s < _GPM_WINDOW_S:
            return {}
        nvml = self._nvml
        nvml.nvmlGpmSampleGet(self._device, self._new)
        self._taken_s = time.perf_counter()
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(self._ids)
        asked.sample1, asked.sample2 = self._old, self._new
        for place, metric in enumerate(self._ids):
            asked.metrics[place].metricId = metric
        nvml.nvmlGpmMetricsGet(asked)
        self._old, self._new = self._new, self._old
        answers = list(asked.metrics[: len(self._ids)])
        known = {a.metricId: a.value for a in answers if a.nvmlReturn == nvml.NVML_SUCCESS}
        values = {ours: [known[i] for i in map(self._id, names) if i in known] for ours, names in _GPM.items()}
        return {ours: fmean(found) for ours, found in values.items() if found}

    def _id(self, name: str) -> int:
        return getattr(self._nvml, name)

    def close(self) -> None:
        for sample in (self._old, self._new):
            self._nvml.nvmlGpmSampleFree(sample)


Reader = CoreReader | GpuReader
"""What reads a device."""

# ------------------------------------------------------------------ sampling


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at one moment. at_s: seconds since the start. values: by name."""

    at_s: float
    values: Mapping[str, float]


class Sampler:
    """A context manager that reads a device `hz` times a second until it is left. An error in it ends it alone."""

    def __init__(self, reader: Reader, hz: float = HZ) -> None:
        """The sampler owns `reader` and closes it. Raises ValueError where `hz` is not positive."""
        if hz <= 0:
            raise ValueError(f"{hz} readings a second")
        self.reader, self.hz = reader, hz
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
                self.readings.append(Reading(time.perf_counter() - self.started, self.reader.read()))
            except Exception as error:  # noqa: BLE001 - it is in the summary; what is being watched goes on
                self.error = f"{type(error).__name__}: {error}"
                break
            due = max(due + 1 / self.hz, time.perf_counter())  # a late reading is not repeated
            self._stop.wait(due - time.perf_counter())
        self.cpu_s = time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading and close the reader."""
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self.started
        self.reader.close()

    def summary(self, start_s: float = 0.0, end_s: float = float("inf")) -> dict[str, Any]:
        """Each metric's mean, median, minimum, maximum and count in a span of the run, and the cost of sampling.

        reached_hz: readings in the span over its seconds; None where it has none. sampler_core_share: CPU time of the
        sampler's thread over the wall clock, 0 to 1 of one core, of the whole run.
        """
        within = [reading for reading in self.readings if start_s <= reading.at_s <= end_s]
        until_now_s = self.seconds or time.perf_counter() - self.started  # it may still be running
        span_s = min(end_s, until_now_s) - max(start_s, 0.0)
        values: dict[str, list[float]] = {}
        for reading in within:
            for name, value in reading.values.items():
                values.setdefault(name, []).append(float(value))
        return {
            **self.reader.about,
            "asked_hz": self.hz,
            "reached_hz": len(within) / span_s if span_s > 0 else None,
            "sampler_core_share": self.cpu_s / self.seconds if self.seconds else None,
            "error": self.error,
            "metrics": {
                name: {"mean": fmean(v), "median": median(v), "min": min(v), "max": max(v), "readings": len(v)}
                for name, v in values.items()
            },
        }
