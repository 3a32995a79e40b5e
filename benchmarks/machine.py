"""On what the figures were measured: the machine, the software, and how busy the machine was with other things."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shards.common.errors import DataError
from shards.common.machine import available_cores

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "nvidia-dali-cuda120",
    "ffcv",
    "numba",
    "webdataset",
    "mosaicml-streaming",
    "litdata",
    "spdl",
)
"""Distributions whose versions decide the figures."""


@dataclass(frozen=True)
class Environment:
    """The machine and the software of one run, the same in each of its rows."""

    date: str
    """UTC, ISO 8601, of the start of the run."""
    commit: str
    """Commit of this repository; `+changes` when tracked files differed from it; empty outside a checkout."""
    command: str
    """The command line that made the row."""
    cpu: str
    """CPU model as the kernel names it."""
    cores: int
    """Cores that the process may use."""
    cpu_mhz: str
    """CPU clocks at the start as the kernel reports them, lowest to highest core; a virtual machine's are nominal."""
    ram_gib: float
    """Memory of the machine."""
    gpu: str
    """GPU model, or `none`."""
    gpu_driver: str
    """Driver of the GPU, or empty."""
    gpu_mhz: str
    """Streaming multiprocessor and memory clocks of the GPU at the start, or empty."""
    kernel: str
    """Kernel and C library."""
    python: str
    """Python's version."""
    versions: str
    """Versions of the packages that decide the figures, `name version` separated by `; `."""


def environment(command: str, gpu_uuid: str | None = None) -> Environment:
    """Describe this machine and its software.

    command: the command line to record. gpu_uuid: of the GPU that is used, `GPU-…`; None for the first one, if any.
    Raises DataError where the driver knows no such GPU.
    """
    gpu, driver, clocks = _gpu(gpu_uuid)
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        command=command,
        cpu=_cpu_model(),
        cores=available_cores(),
        cpu_mhz=_cpu_mhz(),
        ram_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=gpu,
        gpu_driver=driver,
        gpu_mhz=clocks,
        kernel=f"Linux {platform.release()}, {' '.join(platform.libc_ver())}",
        python=platform.python_version(),
        versions="; ".join(f"{name} {version}" for name, version in _versions(PACKAGES)),
    )


def _versions(names: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue  # a peer that is not installed: its rows say so
    return found


def _cpuinfo(key: str) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]


def _cpu_model() -> str:
    """Name, and family, model and stepping, since a virtual machine's name often says little."""
    parts = [(_cpuinfo(key) or ["?"])[0] for key in ("model name", "cpu family", "model", "stepping")]
    return "{} (family {}, model {}, stepping {})".format(*parts)


def _cpu_mhz() -> str:
    clocks = [float(value) for value in _cpuinfo("cpu MHz")]
    return f"{min(clocks):.0f}–{max(clocks):.0f}" if clocks else ""


def _gpu(uuid: str | None) -> tuple[str, str, str]:
    """Model, driver and clocks of a GPU, by NVML; ("none", "", "") without a driver or a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none", "", ""
    try:
        count = pynvml.nvmlDeviceGetCount()
        if not count:
            return "none", "", ""
        try:
            device = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            raise DataError(f"the driver knows no GPU {uuid or '0'} ({error})") from None
        name = pynvml.nvmlDeviceGetName(device) + (f" (1 of {count})" if count > 1 else "")
        try:
            sm = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
            memory = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_MEM)
            clocks = f"SM {sm}, memory {memory}"
        except pynvml.NVMLError:
            clocks = ""  # not every device tells them
        return name, pynvml.nvmlSystemGetDriverVersion(), clocks
    finally:
        pynvml.nvmlShutdown()


def _commit() -> str:
    """The commit of the checkout that this file lies in."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return ""
    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process, its living descendants, and the dead ones that they waited for (10 ms steps)."""
    parents: dict[int, int] = {}
    used_s: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            after_name = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile: its parent has waited for it and counts it
        process = int(folder.name)
        parents[process] = int(after_name[1])
        used_s[process] = sum(map(int, after_name[11:15])) * _TICK_S  # utime, stime, cutime, cstime

    def below_root(process: int) -> bool:
        while process in parents and process != root:
            process = parents[process]
        return process == root

    return sum(seconds for process, seconds in used_s.items() if below_root(process))


class Meter:
    """The CPU time of the whole machine since this was made."""

    def __init__(self) -> None:
        self._busy_s, self._start_s = self._now(), time.perf_counter()

    @staticmethod
    def _now() -> float:
        """Busy CPU seconds of all cores since boot: all but idle and waiting for disks, stolen time included."""
        user, nice, system, _idle, _wait, irq, soft, steal = map(
            int, Path("/proc/stat").read_text(encoding="utf-8").split(maxsplit=9)[1:9]
        )
        return (user + nice + system + irq + soft + steal) * _TICK_S

    def other_cpu(self, own_cpu_s: float) -> float:
        """Share of the machine's CPU time that was used by anything but the `own_cpu_s` seconds, 0 to 1."""
        available_s = (time.perf_counter() - self._start_s) * (os.cpu_count() or 1)
        return min(max((self._now() - self._busy_s - own_cpu_s) / available_s, 0.0), 1.0)
