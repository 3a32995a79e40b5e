"""Freed memory that is kept costs no page faults the next time."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from shards import memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("kept", "mib"), [("keep_freed_memory", 24), ("keep_all_freed_memory", 128)])
def test_a_block_is_had_again_without_page_faults(kept, mib):
    assert faults(kept, mib) < 100 < faults("", 128)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_training_keeps_what_is_freed():
    prepared = _FAULTS.replace("getattr(memory, sys.argv[1])()", "devices.prepare(devices.choose('cpu'))")
    prepared = prepared.replace("from shards import memory", "from train import device as devices")
    found = subprocess.run([sys.executable, "-c", prepared, "x", "128"], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100
