"""What the machine offers: cores within a container's limit; freed memory that is kept costs no page faults."""

import platform
import subprocess
import sys

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
