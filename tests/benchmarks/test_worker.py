"""The process that each system of a benchmark lives in: rounds, failures, and turns."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import benchmarks.worker
from benchmarks.measure import Series
from benchmarks.worker import Running, SystemFailedError, Worker, start_server, take_turns
from tests.support.benchdata import measurement


def well(name: str, job: object) -> Running:
    def once() -> int:
        time.sleep(0.02)
        return 10

    return Running(once, about={"size": 3.0})


def sick(name: str, job: object) -> Running:
    if name == "cannot start":
        raise OSError("no such\nformat")

    def once() -> int:
        match name:
            case "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hangs":
                subprocess.Popen(["sleep", "600"])
                time.sleep(600)
            case "breaks":
                raise RuntimeError("broken in the middle")
            case "ends early":
                raise EOFError
        return 0 if name == "gives nothing" else 10

    return Running(once)


def living() -> list[tuple[int, int]]:
    """Processes that are not zombies, each with its group."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append((process.pid, os.getpgid(process.pid)))
    return found


@pytest.fixture(scope="module")
def context():
    return start_server(preload=("numpy",))


@pytest.fixture
def start(context, tmp_path):
    """A call that starts a worker."""
    return lambda set_up, name, **more: Worker(context, set_up, name, None, logs=tmp_path, limit_s=60, **more)


def test_a_worker_runs_whole_passes_for_at_least_the_time_asked(start):
    with start(well, "fine") as worker:
        assert worker.ready() == {"size": 3.0}
        sample, one_pass = worker.run(0.1), worker.run(0.0)  # a study is a round, however long it takes
    assert sample.cpu_s < sample.seconds and sample.seconds >= 0.1
    assert sample.count >= 10 and sample.count % 10 == 0 and one_pass.count == 10


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dies", "died with exit code -11"),
        ("hangs", "no answer"),
        ("breaks", "broken in the middle"),
        ("ends early", "EOFError"),
        ("gives nothing", "no image"),
    ],
)
def test_a_system_that_goes_wrong_gives_its_reason_and_leaves_nobody_behind(start, name, said):
    with start(sick, name) as worker:
        worker.ready()
        worker.limit_s = 2 if name == "hangs" else 60
        with pytest.raises(SystemFailedError, match=said):
            worker.run(0.1)
        group = worker._process.pid
    end = time.monotonic() + 30
    while any(group in process for process in living()):
        assert time.monotonic() < end
        time.sleep(0.01)


def ticking(name: str, job: object) -> Running:
    """A thread counts on in the background, as a loader reads ahead; a pass gives what was counted since the last."""
    count, seen = 0, 0

    def tick() -> None:
        nonlocal count
        while True:
            count += 1
            time.sleep(0.001)

    threading.Thread(target=tick, daemon=True).start()

    def once() -> int:
        nonlocal seen
        since, seen = count - seen, count
        return since

    return Running(once)


def test_a_frozen_system_reads_nothing_ahead_between_its_rounds(start):
    def counted_in_a_pause(frozen: bool) -> int:
        with start(ticking, "ticks", frozen=frozen) as worker:
            worker.ready()
            time.sleep(0.05)
            worker.run(1e-9)
            time.sleep(3.0)
            found = worker.run(1e-9).count
            closing.append(time.monotonic())
        closing.append(time.monotonic())
        return found

    closing: list[float] = []
    assert counted_in_a_pause(frozen=True) < counted_in_a_pause(frozen=False) / 3
    assert closing[1] - closing[0] < 4  # it was asked to end, and heard it


def test_a_frozen_system_does_not_outlive_who_asks(tmp_path):
    """Killed from outside, the parent cannot wake it."""
    asks = f"""
import time
from pathlib import Path
from benchmarks.worker import Worker, start_server
from tests.benchmarks.test_worker import well
worker = Worker(start_server(("numpy",)), well, "still", None, logs=Path({str(tmp_path)!r}), limit_s=60, frozen=True)
worker.ready()
print(worker._process.pid, flush=True)
time.sleep(600)
"""
    end = time.monotonic() + 60
    with subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < end
                time.sleep(0.01)
        finally:
            parent.kill()
    while any(pid in process for process in living()):  # nor does anyone of its group
        assert time.monotonic() < end
        time.sleep(0.01)


def scarce(name: str, job: object) -> Running:
    left = [10, 10]
    return Running(lambda: left.pop() if left else 0, lambda: left.extend([10] * (2 - len(left))))


def test_a_round_ends_where_a_system_has_no_more(start):
    with start(scarce, "few") as worker:
        worker.ready()
        found = [worker.run(60.0) for _ in range(2)]  # it would take so long if it went on
    assert [sample.count for sample in found] == [20, 20]
    assert max(sample.seconds for sample in found) < 30


def preparing(name: str, job: object) -> Running:
    prepared = []

    class AfterPreparing:
        def __init__(self) -> None:
            self.share = 0.25 if len(prepared) == 2 else 0.75  # after the preparation of the round that counts

        def other_cpu(self, own_cpu_s: float) -> float:
            return self.share

    benchmarks.worker.Meter = AfterPreparing  # in the process of this system alone
    return Running(lambda: 10, lambda: prepared.append(name))


def test_what_others_use_is_counted_from_where_the_round_begins(tmp_path):
    series, _ = take_turns(preparing, ["one"], None, tmp_path, measurement(1, 1e-9))
    assert series["one"].samples[0].other_cpu == 0.25


def test_turns_go_on_without_the_one_that_cannot_start(tmp_path):
    series, about = take_turns(sick, ["cannot start", "fine"], None, tmp_path, measurement(3, 0.01))
    assert series["cannot start"] == Series(failed="OSError: no such format")
    assert len(series["fine"].samples) == 3
    assert "fine" in about
