"""Packing with `--map`: labels become classes of another set."""

from pathlib import Path

import pytest

from preprocess import shard
from shards import ShardSet
from shards.format import HAM10000
from tests.preprocess.test_labelled import write_image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 images of 12 lesions in the layout of ISIC 2019: melanomas, nevi and carcinomas."""
    names = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
    folder = tmp_path / "source"
    for number in range(24):
        write_image(folder / f"ISIC_{number:07d}.jpg", number)
    labels, lesions = [["image", *names]], [["image", "lesion_id"]]
    for number in range(24):
        image, label = f"ISIC_{number:07d}", ("MEL", "NV", "SCC")[number // 2 % 3]
        labels.append([image, *(str(float(name == label)) for name in names)])
        lesions.append([image, f"L{number // 2}"])
    for file, rows in (("GroundTruth", labels), ("Metadata", lesions)):
        (folder / f"ISIC_2019_Training_{file}.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))
    return folder


def test_labels_are_mapped_and_what_has_no_counterpart_is_named(source, tmp_path, command):
    out = tmp_path / "set"
    code, _, err = command(shard.main, "--source", source, "--out", out, "--map", "isic2019-ham10000")
    assert code == 0
    assert "warning: left out, without a counterpart in the map isic2019-ham10000: SCC (8 images)" in err
    data = ShardSet(out)
    assert data.manifest.classes == HAM10000 and sorted(data.column("dx")) == ["mel"] * 8 + ["nv"] * 8
    assert data.manifest.source["map"] == {
        "name": "isic2019-ham10000",
        "labels": {"MEL": "mel", "NV": "nv"},
        "left_out": {"SCC": 8},
    }
    code, _, err = command(shard.main, "--source", source, "--out", tmp_path / "two", "--map", "isic2019-malignant")
    two = ShardSet(tmp_path / "two")
    assert code == 0 and two.manifest.classes.names == ("benign", "malignant")
    assert sorted(two.column("label")) == [0] * 8 + [1] * 16


@pytest.mark.parametrize("option", ["column", "file"])
def test_splits_may_name_images_that_a_map_or_a_condition_leaves_out(source, tmp_path, command, option):
    splits = {f"ISIC_{number:07d}": ("train", "val", "test")[number // 2 % 4 % 3] for number in range(24)}
    listed = {"image_id": "split", **splits}.items()
    (tmp_path / "splits.csv").write_text("".join(f"{image},{part}\n" for image, part in listed))
    table = source / "ISIC_2019_Training_Metadata.csv"
    head, *rows = table.read_text().splitlines()
    rows = [f"{row},{splits[row.partition(',')[0]]},{number}" for number, row in enumerate(rows)]
    table.write_text("\n".join([f"{head},part,number", *rows]))
    given = ("--split-column", "part") if option == "column" else ("--split-file", tmp_path / "splits.csv")
    used = ("--map", "isic2019-ham10000", "--where", "number >= 4")
    code, _, err = command(shard.main, "--source", source, "--out", tmp_path / "set", *given, *used)
    assert code == 0, err
    data = ShardSet(tmp_path / "set")
    left = {image: part for n, (image, part) in enumerate(splits.items()) if n >= 4 and n // 2 % 3 != 2}
    assert dict(zip(data.column("image_id"), data.column("split"), strict=True)) == left and len(left) == 12


def test_a_map_of_the_user_and_classes_for_it(source, tmp_path, command):
    table, classes = tmp_path / "map.csv", tmp_path / "classes.csv"
    table.write_text("from,to\nMEL,bad\nNV,good\nSCC,bad\n")
    classes.write_text("name,long_name,sets\ngood,,\nbad,to be removed,urgent\n")
    asked = ("--source", source, "--map", table)
    assert command(shard.main, *asked, "--out", tmp_path / "a")[0] == 0
    assert ShardSet(tmp_path / "a").manifest.classes.names == ("bad", "good")
    assert command(shard.main, *asked, "--out", tmp_path / "b", "--classes", classes)[0] == 0
    found = ShardSet(tmp_path / "b").manifest.classes
    assert found.names == ("good", "bad") and found.sets == {"urgent": ("bad",)}
    table.write_text("from,to\nMEL,worse\nNV,good\nSCC,\n")
    code, _, err = command(shard.main, *asked, "--out", tmp_path / "c", "--classes", classes)
    assert code == 2 and "maps to 'worse', which is none of good, bad" in err
    table.write_text("from,to\nMEL,worse\nNV,good\n")
    code, _, err = command(shard.main, *asked, "--out", tmp_path / "c")
    assert code == 2 and "says nothing about the label 'SCC'" in err and not (tmp_path / "c").exists()
