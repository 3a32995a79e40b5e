"""The targets: which rows they judge, and when they are held."""

from dataclasses import replace

import pytest

from benchmarks.measure import Row
from benchmarks.targets import TARGETS, targets_text, verdict

FAST = Row(
    "loader",
    "dermscale native jpg",
    "img_per_s ratio",
    "1",
    3.5,
    3.0,
    4.0,
    beside="FFCV jpg",
    packed="341x256 jpg",
    resolution_px=224,
)
OVERHEAD = Row("grid", "one grid, shared worker", "overhead_share", "1", 0.12, 0.11, 0.14, note="torch.compile on")


@pytest.mark.parametrize(("low", "high", "said"), [(3, 4, "held"), (2, 4, "undecided"), (1, 2, "missed")])
def test_the_whole_interval_decides(low: float, high: float, said: str) -> None:
    assert verdict(replace(FAST, low=low, high=high)).startswith(f"at least 2.5: {said}")


@pytest.mark.parametrize(("low", "high", "said"), [(0.1, 0.14, "held"), (0.1, 0.2, "undecided"), (0.2, 0.3, "missed")])
def test_less_is_better_where_it_is(low: float, high: float, said: str) -> None:
    assert verdict(replace(OVERHEAD, low=low, high=high)).startswith(f"under 0.15: {said}")


def test_only_the_conditions_that_a_target_names_are_judged() -> None:
    others = [replace(FAST, resolution_px=128), replace(FAST, packed="400x300 jpg"), replace(FAST, beside="LitData")]
    others += [replace(OVERHEAD, note="torch.compile off"), replace(OVERHEAD, system="one process per cell")]
    assert not any(verdict(row) for row in others)
    assert not verdict(replace(FAST, value=None, low=None, high=None, failed="it broke"))


def test_the_table_holds_the_judged_rows_and_no_others() -> None:
    table = targets_text([FAST, OVERHEAD, replace(FAST, resolution_px=128)])
    assert table.count("held") == 2
    assert "| dermscale native jpg / FFCV jpg | 341x256 jpg, 224 px | 3.50 [3.00, 4.00] | at least 2.5: held |" in table
    assert targets_text([replace(FAST, resolution_px=128)]) == ""


def test_every_target_names_systems_that_are_measured() -> None:
    from benchmarks.grid import SHARED
    from benchmarks.loader import RATIOS as LOADERS
    from benchmarks.pack import RATIOS as PACKERS
    from benchmarks.training import RATIOS as TRAINING

    pairs = {"loader": LOADERS, "pack": PACKERS, "training": TRAINING}
    for target in TARGETS:
        if target.beside:
            assert (target.system, target.beside) in pairs[target.benchmark]
        else:
            assert target.system in ("", SHARED)
