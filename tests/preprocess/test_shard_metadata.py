"""`python -m preprocess.shard` on wrong metadata: one line, nothing left, and what `--on-bad skip` makes of it."""

from pathlib import Path

import pytest

from tests.preprocess.test_shard import METADATA, run, spoilt  # noqa: F401 (a fixture)
from tests.support.rawdata import rows, write_table


def spoil_table(folder: Path, how: str) -> None:
    """Metadata with one fault."""
    table = rows(60)
    if how == "no column":
        table = [{name: value for name, value in row.items() if name != "dx"} for row in table]
    elif how == "unknown dx":
        table[5]["dx"] = "wart"
    elif how == "an image twice":
        table.append(table[5] | {"age": "80.0"})
    elif how == "a lesion with two dx":
        assert table[0]["lesion_id"] == table[1]["lesion_id"]
        table[0]["dx"] = "mel"
    elif how == "a long field in the first line":
        table = [{"x" * 200_000: "", **row} for row in table]
    write_table(folder / METADATA, table)


@pytest.mark.parametrize(
    ("how", "text", "kept"),
    [
        ("no column", "has no column dx", None),
        ("a long field in the first line", "line 1 cannot be read (field larger than field limit", None),
        ("unknown dx", "line 7: dx 'wart' is unknown", 59),
        ("an image twice", "line 62: image_id ISIC_0000005 is on line 7 too", 59),
        ("a lesion with two dx", "line 2: lesion HAM_0000000 has the dx akiec and mel", 58),
    ],
)
def test_a_fault_of_the_metadata_ends_in_one_line(spoilt, tmp_path, monkeypatch, capsys, how, text, kept):  # noqa: F811
    """kept: images that are packed with `--on-bad skip`; None: that does not help."""
    spoil_table(spoilt, how)
    code, out, err = run(monkeypatch, capsys, "--source", spoilt, "--out", tmp_path / "set")
    assert (code, out) == (1, "") and text in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    code, out, err = run(monkeypatch, capsys, "--source", spoilt, "--out", tmp_path / "set", "--on-bad", "skip")
    if kept is None:
        assert (code, out) == (1, "") and text in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    else:
        assert code == 0 and f"{kept} images packed" in out
        assert text in (tmp_path / "set" / "quarantine.csv").read_text()


def test_an_augmented_table_is_warned_of(spoilt, tmp_path, monkeypatch, capsys):  # noqa: F811
    table = rows(60)
    for row in table[:52]:
        row |= {"lesion_id": "HAM_0000000", "dx": "nv"}
    for row in table[52:]:
        row["lesion_id"] += "b"
    write_table(spoilt / METADATA, table)
    code, _, err = run(monkeypatch, capsys, "--source", spoilt, "--out", tmp_path / "set")
    assert code == 0
    assert "warning: lesion HAM_0000000 owns 52 images, and in HAM10000 none has more than 6" in err
