"""Nothing grows over many epochs, loaders, starts and stops. Of two commands in one folder, one works."""

import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing

import psutil
import pytest

from shards import Loader, ShardSet
from tests.conftest import anonymous_bytes, write_set
from tests.support.rawdata import write_raw
from tests.support.train_runs import child_environment
from tests.torture.victims import shared_memory

pytestmark = pytest.mark.slow
FIRST = 10
"""After so many rounds, what is kept for later is there."""
NOISE_BYTES = 24 << 20
"""By which memory may differ between two moments, as C's allocator keeps and returns pages."""
RELEASED_S = 20.0
"""How long the thread of a loader that was dropped may take to end, beside other tests."""
ENGINES = ("native", "resident", "dali")


def counts() -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    process = psutil.Process()
    return {"threads": process.num_threads(), "files": process.num_fds(), "bytes": anonymous_bytes()}


def steady(rounds: int, one: Callable[[int], None]) -> dict[str, int]:
    """Do `one` so often, and check that nothing grows after the first ten."""
    memory, before = shared_memory(), counts()
    for number in range(rounds):
        one(number)
        if number == FIRST:
            before = counts()
    most, deadline = {**before, "bytes": before["bytes"] + NOISE_BYTES}, time.monotonic() + RELEASED_S
    while any((after := counts())[what] > most[what] for what in most):
        assert time.monotonic() < deadline, f"after ten rounds {before}, at the end {after}"
        time.sleep(0.05)
    assert shared_memory() <= memory
    return {"rounds": rounds, "grown_bytes": after["bytes"] - before["bytes"]}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def loader(data: ShardSet, engine: str, seed: int = 0) -> Loader:
    return Loader(data.select("train"), batch_size=16, resolution=32, seed=seed, engine=engine, threads=1)


def test_many_epochs(engine, tiny_shards, times, record):
    with ShardSet(tiny_shards) as data, closing(loader(data, engine)) as batches:

        def epoch(number: int) -> None:
            batches.set_epoch(number)
            assert sum(1 for _ in batches) == len(batches)

        record(engine=engine, **steady(times(40, 1000), epoch))


def test_eight_loaders(engine, tiny_shards, times, record):
    with ShardSet(tiny_shards) as data:
        eight = [loader(data, engine, seed) for seed in range(8)]

        def epoch(number: int) -> None:
            for one in eight:
                one.set_epoch(number)
            for batches in zip(*eight, strict=True):  # all are under way at the same time
                assert len(batches) == 8

        grown = steady(times(30, 1000), epoch)
        for one in eight:
            one.close()
        record(engine=engine, **grown)


@pytest.mark.parametrize("left", ["closed", "dropped"])
def test_starts_and_stops(engine, left, tiny_shards, times, record):
    """Each loader stops in the middle of an epoch; it is closed, or nothing refers to it any more."""

    def start(_: int) -> None:
        with ShardSet(tiny_shards) as data:
            batches = loader(data, engine)
            next(iter(batches))
            if left == "closed":
                batches.close()

    record(engine=engine, **steady(times(20, 200), start))


# ------------------------------------------------------------------ two of a kind


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


TRAINING = ("--epochs", 2, "--resolution", 32, "--batch-size", 16, "--device", "cpu", "--compile", "off")


@pytest.mark.parametrize("kind", ["pack", "run", "grid"])
def test_of_two_in_one_folder_one_works_and_the_other_says_so(kind, tiny_shards, tmp_path):
    """The first is stopped while it works, so that it still does when the second begins."""
    raw, out = write_raw(tmp_path / "raw", images=60), tmp_path / "out"
    command = {
        "pack": ("preprocess.shard", "--source", raw, "--out", out),
        "run": ("train.run", "--model", "test_resnet", "--data", tiny_shards, "--out", out, "--resume", *TRAINING),
        "grid": ("train.grid", "--models", "test_resnet", "--data", tiny_shards, "--out", out, *TRAINING),
    }[kind]
    command += () if kind != "grid" else ("--fractions", 1, "--seeds", 0, "--per-device", 1)
    first = start(*command)
    begun = {"pack": ".out.partial", "run": "out/config.json", "grid": "out/study.json"}[kind]
    while not (tmp_path / begun).exists() and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        second = start(*command)
        _, said = second.communicate(timeout=120)
    finally:
        first.send_signal(signal.SIGCONT)
        errors = first.communicate(timeout=240)[1]
    assert first.returncode == 0, errors
    line = said.strip().splitlines()[-1]
    assert second.returncode in (1, 2) and line.startswith("error: ") and str(out) in line and "another" in line, said


def test_sets_are_released(tmp_path, times, record):
    """Each set is opened, read and closed."""
    folder = write_set(tmp_path / "set", images=60)

    def opened(_: int) -> None:
        with ShardSet(folder) as data:
            data.pixels(0)

    record(**steady(times(30, 200), opened))
