"""The command line of the benchmarks that train: what is refused, and tables that grow model by model."""

import pytest
from click.testing import CliRunner

from benchmarks import commands
from benchmarks.measure import Row
from benchmarks.run import main
from benchmarks.speed import training_text
from benchmarks.tables import read_csv
from shards.common.errors import UsageError
from tests.support.benchdata import write_source


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("training", ["--model", "resnet19"], "resnet19"),
        ("training", ["--only", "nothing"], "eager"),
        ("grid", ["--model", "resnet19"], "resnet19"),
        ("grid", ["--fractions", "abc"], "'abc' is not a number"),
        ("grid", ["--fractions", "1/0"], "'1/0' is not a number"),
        ("stalls", ["--only", "cached"], "belong together"),
    ],
)
def test_wrong_choices_are_named(command, options, said, tmp_path):
    found = CliRunner().invoke(main, [command, *options, "--source", str(tmp_path), "--cache", str(tmp_path)])
    assert isinstance(found.exception, UsageError)
    assert said in str(found.exception)


@pytest.mark.parametrize("command", ["training", "stalls", "utilization", "grid"])
@pytest.mark.parametrize(("option", "value"), [("--batch-size", "0"), ("--rounds", "4")])
def test_values_out_of_range_are_refused_before_a_table_is_touched(command, option, value, tmp_path):
    found = CliRunner().invoke(
        main, [command, option, value, "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert found.exit_code == 2 and option in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["training", "stalls", "utilization"])
def test_a_batch_that_the_images_do_not_fill_is_refused_at_once(command, tmp_path):
    (tmp_path / "ham").mkdir()
    source = write_source(tmp_path / "ham")
    options = ["--source", str(source), "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, [command, "--quick", "--batch-size", "601", *options])
    assert isinstance(found.exception, UsageError)
    assert "--batch-size 601: more than the 600 samples" in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_models_are_added_to_the_table_that_is_there(tmp_path):
    (tmp_path / "ham").mkdir()
    source = write_source(tmp_path / "ham")

    def run(model: str, value: float, add: bool, px: int = 64, batch_size: int = 2) -> None:
        def measure(one, machine, *_):
            size = {"resolution_px": one.work.resolution_px, "batch_size": one.work.batch_size}
            return [Row("training", "x", "img_per_s", "img/s", value, model=one.model, environment=machine, **size)]

        commands._train(
            "training",
            measure,
            1,
            training_text,
            False,
            5,
            models=(model,),
            source=source,
            cache=tmp_path,
            out=tmp_path,
            workers=1,
            resolution=px,
            batch_size=batch_size,
            device="cpu",
            add=add,
            seconds=1.0,
        )

    def found() -> dict:
        return {row.model: row.value for row in read_csv(tmp_path / "training.csv")}

    run("alexnet", 1.0, add=True)  # there is no table yet
    run("resnet18", 2.0, add=True)
    assert found() == {"alexnet": 1.0, "resnet18": 2.0}
    run("alexnet", 3.0, add=True)  # measured again: its old rows go
    assert found() == {"resnet18": 2.0, "alexnet": 3.0}
    run("alexnet", 3.0, add=True, batch_size=1)  # each model's own batch size stands beside it
    text = (tmp_path / "training.md").read_text()
    assert "| resnet18 | 2 | x |" in text and "| alexnet | 1 | x |" in text
    with pytest.raises(UsageError, match=r"training\.csv has resnet18 at --resolution 64, not 96"):
        run("alexnet", 3.0, add=True, px=96)
    run("resnet34", 4.0, add=False)
    assert found() == {"resnet34": 4.0}
