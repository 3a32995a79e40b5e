"""The machine under the measurements: what it is, its software, its load from other work, and its page cache."""

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from shards.common.errors import DataError
from shards.common.machine import available_cores

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
"""Distributions whose versions affect the results."""


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
    """Versions of the packages that affect the results, `name version` separated by `; `."""


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
        ram_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpu=gpu,
        gpu_driver=driver,
        gpu_mhz=clocks,
        kernel=f"Linux {platform.release()}, {' '.join(platform.libc_ver())}",
        python=platform.python_version(),
        versions="; ".join(f"{name} {version}" for name, version in installed(PACKAGES).items()),
    )


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The distributions of `packages` that are installed → their versions."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cpuinfo(key: str) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]


def _cpu_model() -> str:
    """Name, and family, model and stepping, since a virtual machine's name often says little."""
    parts = [(_cpuinfo(key) or ["?"])[0] for key in ("model name", "cpu family", "model", "stepping")]
    return "{} (family {}, model {}, stepping {})".format(*parts)


def _cpu_mhz() -> str:
    clocks = [core.current for core in psutil.cpu_freq(percpu=True) or ()]
    return f"{min(clocks):.0f}–{max(clocks):.0f}" if clocks else ""


def gpu_handle(nvml: Any, uuid: str | None) -> Any:
    """NVML's handle of a GPU, `GPU-…`; None for the first one. Raises DataError where the driver knows no such GPU."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError as error:
        raise DataError(f"the driver knows no GPU {uuid or '0'} ({error})") from None


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
        device = gpu_handle(pynvml, uuid)
        name = pynvml.nvmlDeviceGetName(device) + (f" (1 of {count})" if count > 1 else "")
        try:
            sm = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
            memory = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_MEM)
            clocks = f"SM {sm}, memory {memory}"
        except pynvml.NVMLError:
            clocks = ""  # not every device reports them
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
    process = psutil.Process(root)
    total_s = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            total_s += sum(one.cpu_times()[:4])  # user, system, and both of dead children
        except psutil.NoSuchProcess:
            continue  # it has ended: its parent has waited for it and counts it
    return total_s


class Meter:
    """The CPU time of the whole machine since this was made."""

    def __init__(self) -> None:
        self._busy_s, self._start_s = self._now(), time.perf_counter()

    @staticmethod
    def _now() -> float:
        """Busy CPU seconds of all cores since boot: all but idle and waiting for disks, stolen time included."""
        return busy_and_all_s(psutil.cpu_times())[0]

    def other_cpu(self, own_cpu_s: float) -> float:
        """Share of the machine's CPU time that was used by anything but the `own_cpu_s` seconds, 0 to 1."""
        available_s = (time.perf_counter() - self._start_s) * (os.cpu_count() or 1)
        return min(max((self._now() - self._busy_s - own_cpu_s) / available_s, 0.0), 1.0)


def busy_and_all_s(times: Any) -> tuple[float, float]:
    """Busy and all CPU seconds of `psutil.cpu_times`; waiting for disks is idle, and guests are counted in user."""
    all_s = sum(times[:8])
    return all_s - times.idle - times.iowait, all_s


# ------------------------------------------------------------------ page cache


class StillCachedError(Exception):
    """Files could not be dropped from the page cache, so nothing cold can be measured."""


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache, 0 to 1 (`mincore`, which reads nothing)."""
    size = path.stat().st_size
    if not size:
        return 0.0
    found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    view = np.memmap(path, np.uint8, "r")  # maps the file, and reads nothing
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return float((found & 1).mean())


def drop_from_cache(folder: Path, most: float = 0.02) -> None:
    """Drop all files of a folder from the page cache (`posix_fadvise`, no privileges needed).

    Raises StillCachedError where more than the share `most` of a file of at least 1 MiB is still there: while a process
    has it mapped, and on file systems that are in memory.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if path.stat().st_size >= 1 << 20 and (left := cached_share(path)) > most:
            raise StillCachedError(f"{path.name}: {100 * left:.0f} % of it stayed in the page cache")


def read_into_cache(folder: Path) -> None:
    """Read every file of a folder once, through links too, so that the page cache holds them."""
    with Path(os.devnull).open("wb") as nowhere:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    shutil.copyfileobj(file, nowhere, 1 << 20)
