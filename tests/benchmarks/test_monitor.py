"""Reading a GPU's driver, against a scripted stand-in for it: no figure here is a measurement of any GPU."""

import ctypes
import sys
import time
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from benchmarks.machine import environment
from benchmarks.measure import Row
from benchmarks.monitor import HZ, METRICS, CoreReader, GpuReader, Sampler
from benchmarks.tables import machine_text
from shards.common.errors import DataError
from train.device import gpu_uuid

STAND_IN = "scripted stand-in, no GPU"
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
GPM_REFRESH_S = 0.1
"""NVML API reference, GPM Functions: a metric's two samples should be further apart than this."""


CLOCKS = {pynvml.NVML_CLOCK_SM: 1400, pynvml.NVML_CLOCK_MEM: 2600}
ANSWERS = {
    "nvmlDeviceGetCount": ("count", lambda: 1),
    "nvmlDeviceGetHandleByIndex": ("by_index", lambda index: index),
    "nvmlDeviceGetName": ("name", lambda device: STAND_IN),
    "nvmlSystemGetDriverVersion": ("version", lambda: "0.0"),
    "nvmlDeviceGetMemoryInfo": ("memory", lambda device: SimpleNamespace(used=3 << 30, free=1 << 30, total=4 << 30)),
    "nvmlDeviceGetPowerUsage": ("power", lambda device: 123_000),
    "nvmlDeviceGetClockInfo": ("clock", lambda device, kind: CLOCKS[kind]),
}
"""NVML's function → its name in `refused`, and what it answers."""


class ScriptedDriver:
    """Answers as NVML would, from a script. `refused`: functions that the device does not support."""

    NVMLError = pynvml.NVMLError
    NVML_SUCCESS = pynvml.NVML_SUCCESS
    c_nvmlGpmMetricsGet_t = pynvml.c_nvmlGpmMetricsGet_t  # noqa: N815 (NVML's name)

    def __init__(self, gpm=True, refused=(), lost_after=None, unknown_metrics=()):
        self.gpm, self.refused, self.lost_after = gpm, set(refused), lost_after
        self.unknown = {getattr(pynvml, f"NVML_GPM_METRIC_{name}") for name in unknown_metrics}
        self.calls, self.samples, self.open = [], [], 0
        self.taken = 0
        self.windows_s = []

    def __getattr__(self, name):
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        if name not in ANSWERS:
            raise AttributeError(name)

        def answer(*what):
            self._call(ANSWERS[name][0])
            return ANSWERS[name][1](*what)

        return answer

    def _call(self, name):
        self.calls.append(name)
        if name in self.refused:
            raise pynvml.NVMLError(NOT_SUPPORTED)
        if self.lost_after is not None and len(self.calls) > self.lost_after:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def nvmlInit(self):  # noqa: N802
        self._call("init")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self._call("by_uuid")
        if uuid != "GPU-scripted":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 0

    def nvmlDeviceGetUtilizationRates(self, device):  # noqa: N802
        self._call("rates")
        return SimpleNamespace(gpu=50 + 10 * (self.calls.count("rates") % 2), memory=20)

    def nvmlGpmQueryDeviceSupport(self, device):  # noqa: N802
        self._call("gpm?")
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self):  # noqa: N802
        sample = ctypes.cast(len(self.samples) + 1, pynvml.c_nvmlGpmSample_t)
        self.samples.append(sample)
        return sample

    def nvmlGpmSampleGet(self, device, sample):  # noqa: N802
        self._call("gpm")
        self.taken += 1
        sample.taken, sample.at_s = self.taken, time.perf_counter()

    def nvmlGpmSampleFree(self, sample):  # noqa: N802
        self.samples.remove(sample)

    def nvmlGpmMetricsGet(self, asked):  # noqa: N802
        assert asked.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        at = [ctypes.cast(sample, ctypes.c_void_p).value for sample in (asked.sample1, asked.sample2)]
        first, second = (next(s for s in self.samples if address(s) == a) for a in at)
        assert first.taken == second.taken - 1, "GPM's metrics are of the time between two samples, the older first"
        self.windows_s.append(second.at_s - first.at_s)
        stale = self.windows_s[-1] <= GPM_REFRESH_S  # the counters were not renewed for sure
        for place in range(asked.numMetrics):
            metric = asked.metrics[place]
            refused = NOT_SUPPORTED if metric.metricId in self.unknown else pynvml.NVML_ERROR_NO_DATA if stale else None
            metric.nvmlReturn = refused or pynvml.NVML_SUCCESS
            metric.value = 0.0 if refused else float(metric.metricId)


def address(sample):
    return ctypes.cast(sample, ctypes.c_void_p).value


def read_with_gpm(reader):
    """A reading that GPM has had the time for."""
    time.sleep(1.2 * GPM_REFRESH_S)
    return reader.read()


def test_a_hopper_has_every_reading_and_all_is_freed():
    driver = ScriptedDriver()
    reader = GpuReader("GPU-scripted", nvml=driver)
    for _ in range(3):
        found = read_with_gpm(reader)
        assert set(found) == set(METRICS)
    assert found["memory_used_bytes"] == 3 << 30 and found["power_w"] == 123
    assert (found["sm_mhz"], found["memory_mhz"]) == (1400, 2600)
    assert found["sm_percent"] == pynvml.NVML_GPM_METRIC_SM_UTIL
    assert found["tensor_percent"] == pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL
    assert found["nvjpg_percent"] == pytest.approx(43.5)  # the mean of metrics 40 … 47
    assert reader.about == {"device": STAND_IN, "driver": "0.0", "missing": {}}
    reader.close()
    assert driver.open == 0 and not driver.samples


def test_gpm_is_read_no_faster_than_it_updates_its_counters():
    driver = ScriptedDriver()
    reader = GpuReader(nvml=driver)
    gpm = {name for name in METRICS if METRICS[name].meaning.startswith("GPM")}
    with_gpm = []
    for _ in range(7):
        time.sleep(1 / HZ)
        found = reader.read()
        assert set(found) in (set(METRICS), set(METRICS) - gpm)
        with_gpm.append(gpm <= set(found))
    assert sum(with_gpm) == len(driver.windows_s) >= 3 and min(driver.windows_s) > GPM_REFRESH_S


@pytest.mark.parametrize("driver", [ScriptedDriver(gpm=False), ScriptedDriver(refused={"gpm?"})])
def test_an_older_gpu_has_no_gpm(driver):
    reader = GpuReader(nvml=driver)
    assert set(reader.read()) == {name for name in METRICS if not METRICS[name].meaning.startswith("GPM")}
    assert set(reader.about["missing"]) == {name for name in METRICS if METRICS[name].meaning.startswith("GPM")}
    assert not driver.samples


def test_what_a_device_does_not_have_is_missing_with_the_reason():
    driver = ScriptedDriver(refused={"power", "rates"}, unknown_metrics=["ANY_TENSOR_UTIL", "NVJPG_7_UTIL"])
    reader = GpuReader(nvml=driver)
    found = read_with_gpm(reader)
    assert not {"power_w", "busy_percent", "memory_busy_percent", "tensor_percent"} & set(found)
    assert set(reader.about["missing"]) == {"power_w", "busy_percent", "memory_busy_percent"}
    assert "Not Supported" in reader.about["missing"]["power_w"]
    assert found["nvjpg_percent"] == pytest.approx(43.0)


@pytest.mark.parametrize(("refused", "clocks"), [((), "SM 1400, memory 2600"), (("clock",), "")])
def test_a_gpu_that_does_not_report_its_clocks_is_described_without(monkeypatch, refused, clocks):
    driver = ScriptedDriver(refused=refused)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    machine = environment("x")
    assert (machine.gpu, machine.gpu_driver, machine.gpu_mhz) == (STAND_IN, "0.0", clocks)
    assert driver.open == 0
    shown = f"GPU: {STAND_IN}, driver 0.0" + (f", {clocks} MHz" if clocks else "") + "\n"
    assert shown in machine_text([Row("x", "y", "z", "1", 1.0, environment=machine)])


def test_the_gpu_of_a_row_is_the_one_that_is_used(monkeypatch):
    driver = ScriptedDriver(refused=("by_index",))
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert environment("x", "GPU-scripted").gpu == STAND_IN
    with pytest.raises(DataError, match="the driver knows no GPU GPU-other"):
        environment("x", "GPU-other")
    assert driver.open == 0


@pytest.mark.parametrize(("reported", "uuid"), [("scripted", "GPU-scripted"), ("MIG-scripted", "MIG-scripted")])
def test_a_gpu_has_the_name_that_its_driver_knows(monkeypatch, reported, uuid):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=reported))
    assert gpu_uuid(torch.device("cuda", 1)) == uuid
    assert gpu_uuid(torch.device("cpu")) is None


def test_no_driver_and_no_such_gpu_are_refused_in_a_line():
    with pytest.raises(DataError, match="no NVIDIA driver"):
        GpuReader(nvml=ScriptedDriver(refused={"init"}))
    driver = ScriptedDriver()
    with pytest.raises(DataError, match="knows no GPU GPU-other"):
        GpuReader("GPU-other", nvml=driver)
    assert driver.open == 0


def test_a_running_sampler_knows_its_pace_so_far():
    with Sampler(GpuReader(nvml=ScriptedDriver()), hz=100) as sampler:
        while len(sampler.readings) < 10:
            time.sleep(0.01)
        assert 0 < sampler.summary(0.0, sampler.readings[-1].at_s)["reached_hz"] <= 200


def test_summaries_are_of_the_span_that_is_asked_for():
    with Sampler(GpuReader(nvml=ScriptedDriver()), hz=100) as sampler:
        time.sleep(0.4)
    whole = sampler.summary()
    assert whole["device"] == STAND_IN and whole["error"] == "" and whole["asked_hz"] == 100
    busy = whole["metrics"]["busy_percent"]
    assert (busy["min"], busy["max"]) == (50, 60) and 50 < busy["mean"] < 60
    half = sampler.summary(end_s=0.2)["metrics"]["busy_percent"]["readings"]
    rest = sampler.summary(start_s=0.2)["metrics"]["busy_percent"]["readings"]
    assert busy["readings"] == len(sampler.readings) == half + rest
    assert whole["reached_hz"] == pytest.approx(busy["readings"] / sampler.seconds)
    assert sampler.summary(end_s=0.2)["reached_hz"] == pytest.approx(half / 0.2)
    assert sampler.summary(start_s=0.2)["reached_hz"] == pytest.approx(rest / (sampler.seconds - 0.2))
    late = sampler.summary(start_s=1e6)
    assert late["metrics"] == {} and late["reached_hz"] is None
    times = [reading.at_s for reading in sampler.readings]
    assert times == sorted(times)


def test_cores_are_read_from_the_kernels_counters(monkeypatch):
    def counters(*cores: tuple[float, ...]) -> None:
        monkeypatch.setattr("psutil.cpu_times", lambda percpu: [scputimes(*seconds) for seconds in cores])

    scputimes = type(psutil.cpu_times())
    rest = (0,) * (len(scputimes._fields) - 10)
    counters((100, 0, 0, 100, 0, 0, 0, 0, 0, 0, *rest), (0, 0, 0, 50, 0, 0, 0, 0, 0, 0, *rest))
    reader = CoreReader()
    assert reader.read() == {}  # nothing has changed
    counters((110, 5, 5, 110, 10, 5, 0, 5, 9, 9, *rest), (0, 0, 0, 150, 0, 0, 0, 0, 0, 0, *rest))
    assert reader.read() == {"core_0_percent": 60.0, "core_1_percent": 0.0}
