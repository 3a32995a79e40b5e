"""Damaged input never ends a reader in a traceback, a hang or a flood of memory. `make fuzz` does so for the C code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.train_runs import child_environment
from tests.torture.fuzz import TARGETS

pytestmark = pytest.mark.slow
SHARES = {"manifest": 300_000, "table": 250_000, "picture": 150_000, "condition": 100_000, "weights": 50_000}
OTHERS = 75_000
"""Inputs of a full run: a million in all."""
PIECE = 25_000
"""Inputs of one process."""


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name: str, tmp_path: Path, times: Callable, record: Callable) -> None:
    left, seed, counts = times(300, SHARES.get(name, OTHERS)), 0, {"read": 0, "refused": 0}
    longest = peak = 0.0
    while left:
        count, folder = min(left, PIECE), tmp_path / str(seed)
        folder.mkdir()
        command = [sys.executable, "-m", "tests.torture.fuzz", name, str(seed), str(count), str(folder)]
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}\n{(folder / 'input').read_bytes()[:2000]!r}"
        found = json.loads(done.stdout)
        counts = {kind: counts[kind] + found.get(kind, 0) for kind in counts}
        longest, peak = max(longest, found["longest_s"]), max(peak, found["peak_bytes"])
        left, seed = left - count, seed + 1
    assert counts["refused"]
    record(target=name, **counts, longest_s=longest, peak_bytes=peak)
