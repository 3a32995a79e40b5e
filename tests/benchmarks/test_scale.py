"""The benchmark of many images: it packs with the real process, whose memory grows by little for each image."""

import click
import pytest

from benchmarks.scale import command, measure, write_source


def test_memory_grows_by_little_for_each_image(tmp_path) -> None:
    write_source(tmp_path / "source", images := 30_000)
    first, *most, least, seconds = measure(tmp_path / "source", tmp_path / "set")
    assert 0 < first < least and seconds > 0
    assert max(most) - first < 60e6 + 200 * images


def test_the_benchmark_prints_a_row_for_each_number(capsys) -> None:
    with pytest.raises(click.BadParameter, match="not a valid integer"):
        command.main(["--images", "many"], standalone_mode=False)
    command.main(["--images", "1000", "--images", "2000"], standalone_mode=False)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| 1,000", "| 2,000"]
    assert {line.count("|") for line in shown} == {8}
