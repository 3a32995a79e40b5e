"""What the machine offers: cores within a container's limit; freed memory that is kept costs no page faults."""

import platform
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest

from shards.common import machine

_FAULTS = """
import resource, sys
from shards.common import machine as memory

if sys.argv[1]:
    getattr(memory, sys.argv[1])()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * (int(sys.argv[2]) << 20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str, mib: int) -> int:
    """Page faults of the third time that a block is asked for, written and freed."""
    found = subprocess.run([sys.executable, "-c", _FAULTS, kept, str(mib)], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", None), ("150000 100000", 2), ("10000 100000", 1)])
def test_a_container_limits_the_cores(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64))
    assert machine.available_cores() == 64
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert machine.available_cores() == (cores or 64)


def test_the_limits_of_the_groups_above_count_too(tmp_path):
    of_process = tmp_path / "cgroup"
    of_process.write_text("4:memory:/x\n1:cpu,cpuacct:/jobs/mine\n0::/slice/job\n")

    def cores() -> int | None:
        found, _ = machine._container_cores(tmp_path, of_process)
        return None if found == sys.maxsize else found

    def limit(folder: str, quota: str, version: int = 2) -> None:
        place = tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        files = {"cpu.max": f"{quota} 100000"}
        if version == 1:
            files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
        for name, content in files.items():
            (place / name).write_text(f"{content}\n")

    assert cores() is None
    limit("slice/job", "max")
    limit("slice/other", "100000")
    limit("cpu/jobs/mine", "-1", version=1)
    assert cores() is None
    limit("slice", "700000")
    assert cores() == 7
    limit("slice/job", "550000")
    assert cores() == 6
    limit("cpu/jobs", "250000", version=1)
    assert cores() == 3


def test_the_load_is_what_others_use_on_the_cores_of_this_process(monkeypatch):
    core = namedtuple("core", "user nice system idle iowait")
    now = {"time": 0.0, "own": 0.0, "switches": 0, "cores": [core(0, 0, 0, 0, 0)] * 3}
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(machine.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(machine.time, "process_time", lambda: now["own"])
    monkeypatch.setattr(machine.resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=now["switches"]))
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: now["cores"])
    meter = machine.LoadMeter()
    now |= {"time": 10.0, "own": 8.0, "switches": 500}
    now["cores"] = [core(4, 1, 2, 3, 0), core(10, 0, 0, 0, 0), core(5, 0, 1, 0, 4)]
    assert meter.read() == machine.Load(2, others=0.5, interruptions=50.0)
    now |= {"time": 20.0, "own": 28.5}  # the clocks of cores and process are read one after the other
    now["cores"] = [core(14, 1, 2, 3, 0), core(10, 0, 0, 0, 0), core(15, 0, 1, 0, 4)]
    assert meter.read() == machine.Load(2, others=0.0, interruptions=0.0)


@pytest.mark.parametrize("version", [1, 2])
def test_the_load_in_a_group_with_a_limit_is_that_of_the_group(monkeypatch, tmp_path, version):
    now = {"time": 0.0, "own": 0.0}
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(machine.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(machine.time, "process_time", lambda: now["own"])

    def used(seconds: float) -> None:
        usage = {
            2: ("cpu.stat", f"usage_usec {seconds * 1e6:.0f}\nuser_usec 1"),
            1: ("cpuacct.usage", f"{seconds * 1e9:.0f}"),
        }
        name, content = usage[version]
        (tmp_path / name).write_text(content)

    (tmp_path / "cpu.max").write_text("400000 100000")
    used(100.0)
    meter = machine.LoadMeter()
    now |= {"time": 10.0, "own": 20.0}
    used(135.0)
    load = meter.read()
    assert (load.cores, load.others) == (4, pytest.approx(1.5))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("kept", "mib"), [("keep_freed_memory", 24), ("keep_all_freed_memory", 128)])
def test_a_block_is_had_again_without_page_faults(kept, mib):
    assert faults(kept, mib) < 100 < faults("", 128)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_training_keeps_what_is_freed():
    prepare = "devices.prepare(devices.choose('cpu'), keep_memory=True)"
    prepared = _FAULTS.replace("getattr(memory, sys.argv[1])()", prepare)
    prepared = prepared.replace("from shards.common import machine as memory", "from train import device as devices")
    found = subprocess.run([sys.executable, "-c", prepared, "x", "128"], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100


_GAPS = """
from pathlib import Path
from train import device as devices

device = devices.choose("cpu")
devices.prepare(device, keep_memory=True)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


before = resident()
blocks = [b"x" * (1 << 20) for _ in range(400)]
blocks[:-1] = [b"pins"] * 399  # what lies above keeps the C library from shrinking its heap
kept = resident() - before
devices.give_back(device)
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_gaps_between_blocks_are_given_back():
    found = subprocess.run([sys.executable, "-c", _GAPS], capture_output=True, text=True, check=True)
    kept, left = map(int, found.stdout.split())
    assert left < 50 << 20 < 300 << 20 < kept
