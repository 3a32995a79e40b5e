"""No data races: the loader's own tests, in a Python whose compiled library is built for ThreadSanitizer.

Python, NumPy and PyTorch are not built for it. It still sees their locks and conditions, and what they allocate, free,
copy or fill, as with memcpy. `make fuzz` does the same without Python, with more batches.
"""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from shards.kernels.load import compiled
from tests.torture.conftest import FULL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FULL not in os.environ, reason="`make torture` runs it")]
ROOT = Path(__file__).parents[2]
SUITE = ("tests/shards/engines", *(f"tests/shards/test_{name}.py" for name in ("loader", "passes", "processes")))
LEFT_OUT = (
    "test_more_threads_than_the_system_has",  # takes the memory that the sanitizer needs itself
    "test_dali",  # tests of DALI alone, which is not built for the sanitizer: it prints, and its children time out
    "test_selfcheck",
    "test_a_dataloader_with_workers_is_refused",  # starts threads after a fork, which the sanitizer cannot follow
)
OPTIONS = "die_after_fork=0 handle_segv=0 handle_sigfpe=0 exitcode=0"
"""Tests fork, and expect that a signal ends a child as it does without a sanitizer. Reports are in files."""
OURS = "(_kernels."
"""Names our library in a report. Those without it are of libraries that are not built for the sanitizer, such as DALI
and Arrow: it does not see that they count references with atomic instructions, so what one thread frees, another seems
to be using."""
LATE = """
import sys, time
import numpy as np
from shards import ShardSet
from shards.kernels.workers import IMAGES, Loading, Workers

with ShardSet(sys.argv[1]) as data, Workers(data, 2, False) as workers:
    samples, size = np.arange(20), 72 * 96 * 3
    out = np.zeros((20, size), np.uint8)
    batch = Loading(workers, samples, out, IMAGES, places=samples * size)
    time.sleep(1)
    batch.result()
"""
"""Asks for a batch after the threads have loaded it: only the lock orders what they wrote and what this reads."""


class Sanitized:
    """A copy of this project whose compiled library is built for ThreadSanitizer."""

    def __init__(self, folder: Path, old: str = "", new: str = "") -> None:
        """Copy and build it, with `new` in place of `old` in workers.c."""
        self.folder, self.reports = folder / "project", folder / "reports"
        for name in ("shards", "preprocess", "train", "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", self.folder)
        kernels = self.folder / "shards/kernels"
        right = (kernels / "workers.c").read_text()
        assert not old or right.count(old) == 1
        (kernels / "workers.c").write_text(right.replace(old, new) if old else right)
        found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
        self.preloaded = found.stdout.strip()
        if not Path(self.preloaded).is_file():
            pytest.skip("gcc has no ThreadSanitizer here")
        out = kernels / f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        options = ["-g", "-O2", "-ffp-contract=off", "-fsanitize=thread", "-shared", "-fPIC", "-pthread"]
        sources = sorted(kernels.glob("*.c"))
        subprocess.run(["gcc", *options, f"-I{sysconfig.get_path('include')}", "-o", out, *sources, "-lm"], check=True)

    def run(self, *arguments: object) -> tuple[str, list[str]]:
        """Run Python, which must end well: its output, and the sanitizer's reports of our library."""
        shutil.rmtree(self.reports, ignore_errors=True)
        self.reports.mkdir()
        log = f"log_path={self.reports}/report"
        own = {"LD_PRELOAD": self.preloaded, "TSAN_OPTIONS": f"{OPTIONS} {log}", "PYTHONPATH": str(self.folder)}
        if codec := find_spec("nvidia.nvimgcodec"):  # DALI looks for it beside itself, but not under this sanitizer
            own["LD_LIBRARY_PATH"] = os.pathsep.join(codec.submodule_search_locations or ())
        environment = {name: value for name, value in os.environ.items() if name != FULL} | own
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        reports = "".join(file.read_text() for file in self.reports.iterdir())
        found = re.findall(r"WARNING: ThreadSanitizer.*?\nSUMMARY[^\n]*", reports, re.DOTALL)
        return done.stdout, [report for report in found if OURS in report]


@pytest.mark.skipif(compiled() is None or shutil.which("gcc") is None, reason="needs gcc and the compiled library")
def test_the_loaders_tests_have_no_race_and_a_missing_lock_is_found(
    tmp_path: Path, tiny_shards: Path, record: Callable[..., None]
) -> None:
    """Asking without the lock whether a batch is done is a race, which shows that one would be reported."""
    right = Sanitized(tmp_path / "right")
    left_out = " and ".join(f"not {name}" for name in LEFT_OUT)
    said, races = right.run("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "not gpu", "-k", left_out, *SUITE)
    races += right.run("-c", LATE, tiny_shards)[1]
    assert not races, "\n".join(races)
    passed = re.search(r"(\d+) passed", said)
    assert passed, said
    record(tests=int(passed[1]), races=len(races))

    asked = "    const int32_t done = batch->done == batch->count;\n"
    locked = f"    pthread_mutex_lock(&engine->lock);\n{asked}    pthread_mutex_unlock(&engine->lock);\n"
    races = Sanitized(tmp_path / "wrong", locked, asked).run("-c", LATE, tiny_shards)[1]
    assert any("data race" in race and "dermscale_batch_done" in race for race in races), races
