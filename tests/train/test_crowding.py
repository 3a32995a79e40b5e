"""Other programs on the cores of a run: when they are noticed, and what is said."""

import pytest

from shards.common.machine import Load
from train import crowding
from train.crowding import Crowding, warning


@pytest.mark.parametrize(
    ("others", "interruptions", "threads", "cores", "fit"),
    [
        (0.0, 5.0, 2, 2, None),  # alone
        (0.4, 300.0, 2, 2, None),  # little beside it
        (1.0, 200.0, 2, 2, 1),  # an equal program: each has half of the time
        (1.0, 3.0, 2, 2, None),  # nobody was interrupted: the threads waited for something else
        (2.0, 500.0, 1, 2, None),  # a single thread waits for no other
        (32.0, 500.0, 64, 64, 32),
        (0.0, 500.0, 16, 2, 2),  # more threads than cores
    ],
)
def test_threads_without_a_core_of_their_own_are_noticed(others, interruptions, threads, cores, fit):
    said = warning(Load(cores, others, interruptions), threads, 1.0)
    assert (said is None) == (fit is None)
    if said is not None:
        assert f"{others:.1f} of {cores} cores" in said and f"{threads} threads" in said
        assert f"--threads {fit}," in said
        assert "times as long" not in said
        assert said.startswith("this program has more threads than cores" if threads > cores else "other programs")


def test_it_is_said_once_with_how_much_slower_the_steps_are(monkeypatch):
    clock, load = [0.0], [Load(2, 0.0, 1.0)]
    monkeypatch.setattr(crowding, "LOOK_S", 10.0)
    monkeypatch.setattr(crowding.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(crowding.LoadMeter, "_now", lambda self: (0.0, 0.0, 0.0, 0))
    monkeypatch.setattr(crowding.LoadMeter, "read", lambda self: load[0])
    watching = Crowding(threads=2)

    def steps(seconds: float, count: int, px: int) -> list[str]:
        said = []
        for _ in range(count):
            clock[0] += seconds
            said.append(watching.after_step(px))
        return list(filter(None, said))

    assert steps(1.0, 30, 32) == []
    clock[0] += 600.0  # an evaluation
    watching.pause()
    assert steps(4.0, 10, 64) == []  # larger images: as slow as it should be
    load[0] = Load(2, 1.0, 250.0)
    (said,) = steps(12.0, 20, 64)
    assert "steps take 3.0 times as long as the first ones" in said and "interrupted 250 times a second" in said
    assert steps(12.0, 20, 32) == []
