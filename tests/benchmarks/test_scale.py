"""The benchmark of many images: it packs with the real process, and packing takes less memory than the records."""

import click
import pytest

from benchmarks.scale import command, measure


def test_packing_takes_less_memory_than_the_records_did() -> None:
    few, many = measure(2_000), measure(30_000)
    assert all(size > 0 for size in few[1:]) and many[0] > few[0]
    assert many[3] - many[2] < 60e6 and many[4] > 0


def test_the_benchmark_prints_a_row_for_each_number(capsys) -> None:
    with pytest.raises(click.BadParameter, match="not a valid integer"):
        command.main(["--images", "many"], standalone_mode=False)
    command.main(["--images", "1000", "--images", "2000"], standalone_mode=False)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| 1,000", "| 2,000"]
    assert {line.count("|") for line in shown} == {7}
