"""The targets: which rows they judge, and when they are held."""

from dataclasses import fields, replace

import pytest

from benchmarks import beside, loader, pack, store, together, training
from benchmarks.grid import SHARED
from benchmarks.measure import Row
from benchmarks.targets import TARGETS, targets_text, verdict

FAST = Row(
    "loader",
    "dermscale native jpg",
    "img_per_s ratio",
    "1",
    3.7,
    3.6,
    4.0,
    beside="FFCV jpg",
    packed="341x256 jpg",
    resolution_px=224,
)
OVERHEAD = Row("grid", "one grid, shared worker", "overhead_share", "1", 0.12, 0.11, 0.14, note="torch.compile on")


@pytest.mark.parametrize(
    ("row", "low", "high", "said"),
    [
        (FAST, 3.5, 4, "at least 3.5: met"),
        (FAST, 2, 4, "at least 3.5: not clear"),
        (FAST, 1, 3.4, "at least 3.5: not met"),
        (OVERHEAD, 0.1, 0.14, "under 0.15: met"),
        (OVERHEAD, 0.1, 0.2, "under 0.15: not clear"),
        (OVERHEAD, 0.2, 0.3, "under 0.15: not met"),
    ],
)
def test_the_whole_interval_decides(row: Row, low: float, high: float, said: str) -> None:
    assert verdict(replace(row, low=low, high=high)).startswith(said)


def test_only_the_conditions_that_a_target_names_are_judged() -> None:
    others = [replace(FAST, resolution_px=128), replace(FAST, packed="400x300 jpg"), replace(FAST, beside="LitData")]
    others += [replace(OVERHEAD, note="torch.compile off"), replace(OVERHEAD, system="one process per cell")]
    assert not any(verdict(row) for row in others)
    assert not verdict(replace(FAST, value=None, low=None, high=None, failed="it broke"))


def test_threads_are_judged_where_there_are_two() -> None:
    one = replace(FAST, beside="dermscale native jpg, 1 thread", low=1.9, high=2.0)
    assert verdict(replace(one, workers=2)) == "at least 1.9: met" and not verdict(replace(one, workers=4))


def test_the_table_holds_the_judged_rows_and_no_others() -> None:
    other = replace(FAST, resolution_px=128)
    table = targets_text([FAST, OVERHEAD, other])
    assert table.count("met |") == 2 and "| 3.70 [3.60, 4.00] | at least 3.5 | met |" in table
    assert targets_text([other]) == ""


def test_every_target_names_systems_that_are_measured() -> None:
    pairs = {"loader": loader.RATIOS, "pack": pack.RATIOS, "training": training.RATIOS, "together": together.RATIOS}
    for target in TARGETS:
        if "beside" in target.fields:
            assert (target.fields["system"], target.fields["beside"]) in pairs[target.benchmark]
        else:
            assert target.fields.get("system", SHARED) in (SHARED, *beside.SYSTEMS, *store.SYSTEMS)
        assert set(target.fields) <= {field.name for field in fields(Row)}
