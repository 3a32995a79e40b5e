"""What a GPU does while something runs on it, as its driver tells (NVML; on Hopper and newer also GPM).

NVML's own "utilization" says only that some kernel ran, not that the GPU was full: show it beside the data wait and
the cached-batch ceiling. `benchmarks/monitor.py` reads this many times a second.
"""

from collections.abc import Callable
from statistics import fmean
from time import perf_counter
from typing import Any

from shards.common.errors import DataError

UNITS = {
    "busy_percent": "share of time in which at least one kernel ran",
    "memory_busy_percent": "share of time in which device memory was read or written",
    "memory_used_bytes": "device memory in use, by all processes",
    "power_w": "power draw",
    "sm_mhz": "clock of the streaming multiprocessors",
    "memory_mhz": "clock of the memory",
    "pcie_rx_mib_per_s": "from the host over PCIe",
    "pcie_tx_mib_per_s": "to the host over PCIe",
    "sm_percent": "GPM: share of the streaming multiprocessors that were busy",
    "occupancy_percent": "GPM: active warps of those possible",
    "tensor_percent": "GPM: share of time in which tensor cores worked",
    "dram_percent": "GPM: bandwidth of device memory used, of its maximum",
    "nvjpg_percent": "GPM: use of the hardware JPEG decoders, their mean",
}
"""What each reading of a GPU means. A CPU's are `core_0_percent`, `core_1_percent`, …"""

_GPM = {  # ours → GPM metrics of nvml.h, of which the mean is taken
    "sm_percent": ("NVML_GPM_METRIC_SM_UTIL",),
    "occupancy_percent": ("NVML_GPM_METRIC_SM_OCCUPANCY",),
    "tensor_percent": ("NVML_GPM_METRIC_ANY_TENSOR_UTIL",),
    "dram_percent": ("NVML_GPM_METRIC_DRAM_BW_UTIL",),
    "pcie_tx_mib_per_s": ("NVML_GPM_METRIC_PCIE_TX_PER_SEC",),
    "pcie_rx_mib_per_s": ("NVML_GPM_METRIC_PCIE_RX_PER_SEC",),
    "nvjpg_percent": tuple(f"NVML_GPM_METRIC_NVJPG_{i}_UTIL" for i in range(8)),
}

# NVIDIA's NVML API Reference Guide, GPM Functions, nvmlGpmMetricsGet: the two samples of a metric should be taken more
# than 100 ms apart, since GPM renews its counters no more often. A shorter window may hold no renewal, and say nothing.
_GPM_WINDOW_S = 0.11


class GpuSource:
    """Reads one GPU through NVML. `about`: name, driver, what the device cannot tell and why."""

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
            self._device = nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
            self.about: dict[str, Any] = {
                "device": nvml.nvmlDeviceGetName(self._device),
                "driver": nvml.nvmlSystemGetDriverVersion(),
                "missing": {},
            }
        except nvml.NVMLError as error:
            nvml.nvmlShutdown()
            raise DataError(f"the driver knows no GPU {uuid or '0'} ({error})") from None
        self._turn = 0
        self._gpm = self._open_gpm()
        self._queries = self._usable()

    def _open_gpm(self) -> "_Gpm | None":
        nvml = self._nvml
        try:
            if not nvml.nvmlGpmQueryDeviceSupport(self._device).isSupportedDevice:
                reason = "this GPU has no GPM (it came with Hopper)"
            else:
                return _Gpm(nvml, self._device)
        except nvml.NVMLError as error:
            reason = str(error)
        self.about["missing"] |= {name: reason for name in _GPM if not name.startswith("pcie")}
        return None

    def _usable(self) -> list[Callable[[], dict[str, float]]]:
        """The queries that this device answers; the others are noted with the driver's reason."""
        nvml, device = self._nvml, self._device

        def busy() -> dict[str, float]:
            rates = nvml.nvmlDeviceGetUtilizationRates(device)
            return {"busy_percent": rates.gpu, "memory_busy_percent": rates.memory}

        def pcie() -> dict[str, float]:
            """One direction a turn: the driver measures each call for 20 ms."""
            self._turn += 1
            name = ("pcie_rx_mib_per_s", "pcie_tx_mib_per_s")[self._turn % 2]
            counter = (nvml.NVML_PCIE_UTIL_RX_BYTES, nvml.NVML_PCIE_UTIL_TX_BYTES)[self._turn % 2]
            return {name: nvml.nvmlDeviceGetPcieThroughput(device, counter) / 1024}  # "KB/s", taken as 1,024 bytes

        def clock(name: str, kind: int) -> Callable[[], dict[str, float]]:
            return lambda: {name: nvml.nvmlDeviceGetClockInfo(device, kind)}

        queries: dict[tuple[str, ...], Callable[[], dict[str, float]]] = {
            ("busy_percent", "memory_busy_percent"): busy,
            ("memory_used_bytes",): lambda: {"memory_used_bytes": nvml.nvmlDeviceGetMemoryInfo(device).used},
            ("power_w",): lambda: {"power_w": nvml.nvmlDeviceGetPowerUsage(device) / 1000},
            ("sm_mhz",): clock("sm_mhz", nvml.NVML_CLOCK_SM),
            ("memory_mhz",): clock("memory_mhz", nvml.NVML_CLOCK_MEM),
        }
        if self._gpm is None:
            queries[("pcie_rx_mib_per_s", "pcie_tx_mib_per_s")] = pcie
        usable = []
        for names, query in queries.items():
            try:
                query()
                usable.append(query)
            except nvml.NVMLError as error:
                self.about["missing"] |= dict.fromkeys(names, str(error))
        return usable

    def read(self) -> dict[str, float]:
        """See `Source.read`. Raises DataError where the driver stops answering."""
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
        """Give back the driver's samples and the connection."""
        if self._gpm is not None:
            self._gpm.close()
        self._nvml.nvmlShutdown()


class _Gpm:
    """GPM's metrics are of the time between two samples of its counters: the last one is kept."""

    def __init__(self, nvml: Any, device: Any) -> None:
        self._nvml, self._device = nvml, device
        self._old, self._new = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self._ids = [getattr(nvml, name) for names in _GPM.values() for name in names]
        nvml.nvmlGpmSampleGet(device, self._old)
        self._taken_s = perf_counter()

    def read(self) -> dict[str, float]:
        """Means since the last sample, none until it is old enough; what this GPU does not count is left out."""
        if perf_counter() - self._taken_s < _GPM_WINDOW_S:
            return {}
        nvml = self._nvml
        nvml.nvmlGpmSampleGet(self._device, self._new)
        self._taken_s = perf_counter()
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(self._ids)
        asked.sample1, asked.sample2 = self._old, self._new
        for place, metric in enumerate(self._ids):
            asked.metrics[place].metricId = metric
        nvml.nvmlGpmMetricsGet(asked)
        self._old, self._new = self._new, self._old
        answers = [asked.metrics[place] for place in range(len(self._ids))]
        known = {a.metricId: a.value for a in answers if a.nvmlReturn == nvml.NVML_SUCCESS}
        found = {}
        for ours, names in _GPM.items():
            values = [known[i] for i in (getattr(nvml, name) for name in names) if i in known]
            if values:
                found[ours] = fmean(values)
        return found

    def close(self) -> None:
        for sample in (self._old, self._new):
            self._nvml.nvmlGpmSampleFree(sample)
