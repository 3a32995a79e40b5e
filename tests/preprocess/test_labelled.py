"""Sets other than HAM10000: any table, and the layouts that are found by themselves."""

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocess import shard
from preprocess.labelled import Columns, Images, read_classes_file
from preprocess.layouts import read_folder
from shards import ShardSet
from shards.__main__ import main
from shards.common.errors import DataError, UsageError
from shards.format import HAM10000, INDEX_TYPES, Classes
from tests.conftest import picture
from tests.support.rawdata import ONE_HOT_18, ONE_HOT_19, jpeg, read_columns, write_table
from train import grid, run


def write_image(path: Path, seed: int = 0) -> None:
    """One picture, in the format that its ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(np.random.default_rng(seed), seed % 5, 40, 50)).save(path)


def text_of(table: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 photos of 12 patients, in two folders and five formats, without a table."""
    for n in range(24):
        write_image(tmp_path / "photos" / "ab"[n % 2] / f"P{n:03d}.{('jpg', 'png', 'bmp', 'tif', 'webp')[n % 5]}", n)
    return tmp_path / "photos"


def some_rows(count: int = 24) -> list[dict[str, str]]:
    return [
        {"photo": f"P{n:03d}", "patient_id": f"PAT_{n // 2}", "dx": ("mole", "melanoma")[n % 3 == 0], "age": "unknown"}
        for n in range(count)
    ]


# ------------------------------------------------------------------ any table


def test_any_table_is_packed_from_any_format(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    write_table(table, some_rows(), ";")
    code, out, err = command(shard.main, "--source", photos, "--table", table, "--out", tmp_path / "set")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "layout: table labels.csv; 2 classes, groups by patient_id"
    data = ShardSet(tmp_path / "set")
    manifest = data.manifest
    assert manifest.classes.names == ("melanoma", "mole") and manifest.classes.sets == {"melanoma": ("melanoma",)}
    assert manifest.group == ("patient_id",) and len(data) == 24
    of_patient = set(zip(data.column("group"), data.column("split"), strict=True))
    assert len(of_patient) == 12  # patients have both classes, and no split divides one
    assert manifest.source["columns"] == {"image": "photo", "label": ["dx"], "split": None}
    for sample, name in enumerate(data.column("image_id")):
        (file,) = photos.glob(f"*/{name}.*")
        original = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB).astype(float)
        assert ((data.pixels(sample) - original) ** 2).mean() < 40, file


@pytest.mark.parametrize("cell", ["{}", "{}.jpg", "{}.PNG", r"C:\x\{}.jpeg", "/images/{}", "a/b/{}"])
@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_images_are_named_in_many_ways(photos, tmp_path, cell, case):
    table = tmp_path / "labels.csv"
    write_table(table, [row | {"photo": case(cell.format(row["photo"]))} for row in some_rows()])
    source, splits, _ = read_columns(photos, table)
    assert len(source.records) == 24 and not source.rejected and splits is None
    assert {r.image_id: r.dx for r in source.records} == {row["photo"]: row["dx"] for row in some_rows()}


@pytest.mark.parametrize("one", ["1", "1.0", "True", "TRUE"])
def test_one_hot_columns_are_the_classes_in_their_order(photos, tmp_path, one):
    zero = {"1": "0", "1.0": "0.0", "True": "False", "TRUE": "FALSE"}[one]
    table = tmp_path / "labels.csv"
    rows = [{"photo": row["photo"], "NV": zero, "MEL": zero, "UNK": zero} for row in some_rows()]
    for n, row in enumerate(rows):
        row["MEL" if n % 3 == 0 else "NV"] = one
    write_table(table, rows)
    source, _, _ = read_columns(photos, table)
    assert source.classes.names == ("NV", "MEL") and source.group == () and "no column names the" in source.warnings[0]
    assert [r.dx for r in source.records] == ["MEL" if n % 3 == 0 else "NV" for n in range(24)]
    rows[3]["MEL"] = zero
    rows[4]["MEL"] = rows[4]["NV"] = one
    rows[5]["MEL"] = "0.5"
    write_table(table, rows)
    with pytest.raises(UsageError, match="none is clearly the label; name it with --label, or one column a class"):
        read_columns(photos, table)
    reasons = [r.reason for r in read_columns(photos, table, label=("NV", "MEL"))[0].rejected]
    assert reasons == [
        "line 5: has no class at 1; say which class that is with --label NV,MEL,else=NAME",
        "line 6: has NV and MEL at 1, and one class is needed",
        "line 7: MEL is '0.5', and 0 or 1 is needed",
    ]
    source, _, _ = read_columns(photos, table, label=("NV", "MEL", "else=other"))
    assert [r.image_id for r in source.records if r.dx == "other"] == ["P003"]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["0", "10", "2"], ("0", "2", "10")),
        (["0.0", "1.0"], ("0", "1")),
        (["TRUE", "False", "true"], ("false", "true")),
        (["A::B, left", "Ä/b"], ("A::B, left", "Ä/b")),
    ],
)
def test_labels_are_numbers_words_and_hierarchies(photos, tmp_path, cells, names):
    table = tmp_path / "labels.csv"
    write_table(table, [row | {"dx": cells[n % len(cells)]} for n, row in enumerate(some_rows())])
    assert read_columns(photos, table, group=("none",))[0].classes.names == names


def test_unknown_groups_are_groups_of_their_own_and_several_columns_name_one_together(photos, tmp_path):
    table = tmp_path / "labels.csv"
    rows = [row | {"lesion": str(n % 6), "dx": "mole"} for n, row in enumerate(some_rows())]
    for n, unknown in enumerate(["", "unknown", "NaN", "None"]):
        rows[n]["patient_id"] = unknown
        rows[n]["dx"] = "melanoma"
    write_table(table, rows)
    source, _, _ = read_columns(photos, table, group=("patient_id",))
    assert [r.group for r in source.records][:6] == [None] * 4 + ["PAT_2", "PAT_2"]
    source, _, _ = read_columns(photos, table, group=("patient_id", "lesion"))
    assert [r.group for r in source.records][2:6] == ["/2", "/3", "PAT_2/4", "PAT_2/5"]


def test_the_lesion_is_the_group_where_a_found_patient_is_empty(photos, tmp_path):
    table = tmp_path / "labels.csv"
    rows = [row | {"lesion_id": f"L{n // 2}" if n < 12 else ""} for n, row in enumerate(some_rows())]
    rows = [row | {"patient_id": ("", "PAT")[n % 12 >= 8]} for n, row in enumerate(rows)]
    write_table(table, rows)
    source, _, _ = read_columns(photos, table)
    expected = ["PAT" if n % 12 >= 8 else f"L{n // 2}" if n < 12 else None for n in range(24)]
    assert [record.group for record in source.records] == expected and source.group == ("patient_id",)
    assert source.about["columns"]["group_where_empty"] == "lesion_id"
    given = read_columns(photos, table, group=("patient_id",))[0]
    assert [record.group for record in given.records] == [group if group == "PAT" else None for group in expected]


def test_a_lesion_has_one_label_and_a_patient_may_have_several(photos, tmp_path):
    table = tmp_path / "labels.csv"
    write_table(table, some_rows())
    assert not read_columns(photos, table)[0].rejected
    write_table(table, [{("lesion_id" if k == "patient_id" else k): v for k, v in row.items()} for row in some_rows()])
    reasons = [r.reason for r in read_columns(photos, table, classes=Classes(("mole", "melanoma")))[0].rejected]
    assert "line 2: lesion PAT_0 has the dx melanoma and mole" in reasons


def test_rows_that_contradict_each_other_and_images_without_a_file_are_named(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    rows = some_rows()
    rows += [rows[0] | {"dx": "mole"}, rows[1], rows[2] | {"photo": "P999"}]
    write_table(table, rows)
    write_image(photos / "extra.jpg")
    source, _, _ = read_columns(photos, table)
    assert [r.reason.split(":", 1)[1].strip() for r in source.rejected] == [
        "image_id P000 is on line 2 too",
        "image_id P001 is on line 3 too",
        "image 'P999' has no file in the source",
        "another line has other values for image_id P000",
    ]
    assert source.warnings == ["1 images are not in labels.csv and are left out (first: extra.jpg)"]
    code, _, err = command(shard.main, "--source", photos, "--table", table, "--out", tmp_path / "set")
    assert code == 1 and str(table.name) in err and "line 26" in err and err.count("\n") == 2


def test_two_files_of_one_name_are_told_apart_by_their_folders_or_refused(tmp_path):
    for n, name in enumerate(("nv/1.jpg", "mel/1.jpg", "nv/2.jpg", "mel/3.jpg")):
        write_image(tmp_path / "source" / name, n)
    table = tmp_path / "labels.csv"
    write_table(table, [{"path": rf"D:\train\{k}\{n}.jpg", "dx": k} for k, n in (("nv", 1), ("mel", 1), ("nv", 2))])
    source, _, _ = read_columns(tmp_path / "source", table)
    assert {(r.file, r.dx) for r in source.records} == {("nv/1.jpg", "nv"), ("mel/1.jpg", "mel"), ("nv/2.jpg", "nv")}
    assert {r.image_id for r in source.records} == {"nv_1", "mel_1", "2"}
    write_table(table, [{"path": n, "dx": k} for k, n in (("nv", "1.jpg"), ("nv", "2.jpg"), ("mel", "3.jpg"))])
    (rejected,) = read_columns(tmp_path / "source", table)[0].rejected
    assert rejected.reason == "line 2: image '1.jpg' may be mel/1.jpg or nv/1.jpg, which differ"


def test_image_ids_are_keys_that_webdataset_can_read_and_unique(tmp_path):
    names = [
        "a b.jpg",
        "a.b.jpg",
        "x/a.jpg",
        "y/a.png",
        "ü.jpg",
        f"{'l' * 120}.jpg",
        f"{'l' * 121}.jpg",
    ]
    for name in [*names, "__MACOSX/a.jpg", "._a.jpg", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = Images(tmp_path)
    assert set(images.files) == set(names)
    ids = {name: images.image_id(name) for name in names}
    assert ids["x/a.jpg"] == "x_a" and ids["ü.jpg"] == "_"
    assert len(set(ids.values())) == 7
    assert all(len(name) <= 90 and not set(name) & set("./\\ ") and name.isascii() for name in ids.values())


def test_published_splits_in_a_column(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    parts = ["Training", "train", "val", "test"]
    write_table(table, [row | {"part": parts[n % 4], "patient_id": str(n)} for n, row in enumerate(some_rows())])
    options = ("--source", photos, "--table", table, "--out", tmp_path / "set", "--split-column", "part")
    code, _, err = command(shard.main, *options)
    assert code == 0, err
    data = ShardSet(tmp_path / "set")
    assert Counter(data.column("split")) == {"train": 12, "val": 6, "test": 6}
    assert data.manifest.split["column"] == "part"
    code, _, err = command(shard.main, *options, "--split", "80/10/10")
    assert code == 2 and "--split-column names the split of each image" in err
    write_table(table, [row | {"Split": "test"} for row in some_rows()])
    hint = "the column Split is not used: take the splits from it with --split-column"
    assert hint in read_columns(photos, table)[0].warnings
    assert hint not in read_columns(photos, table, split="Split")[0].warnings
    write_table(table, [row | {"part": "fold 3"} for row in some_rows()])
    with pytest.raises(DataError, match=r"part is 'fold 3', and train, val or test is needed"):
        read_columns(photos, table, split="part")


def test_classes_come_from_a_file(photos, tmp_path, command):
    table, file = tmp_path / "labels.csv", tmp_path / "classes.csv"
    write_table(table, [row | {"dx": row["dx"].upper()} for row in some_rows()])
    file.write_text("name,long_name,sets\nmole,melanocytic nevus,\nmelanoma,,melanoma malignant\nwart,,\n")
    classes = read_classes_file(file)
    source, _, _ = read_columns(photos, table, classes=classes)
    assert source.classes == classes and classes.sets == {"melanoma": ("melanoma",), "malignant": ("melanoma",)}
    assert {r.dx for r in source.records} == {"mole", "melanoma"}
    assert source.warnings == ["the source has no image of wart: a model cannot learn these classes"]
    write_table(table, [*some_rows(23), some_rows()[23] | {"dx": "cyst"}])
    (rejected,) = read_columns(photos, table, classes=classes)[0].rejected
    assert rejected.reason == "line 25: label 'cyst' is none of the classes (mole, melanoma, wart)"
    file.write_text("name\nMole\nmole\nmelanoma\n")  # which differ in case alone: each row's own spelling decides
    write_table(table, [row | {"dx": row["dx"].title() if n % 2 else row["dx"]} for n, row in enumerate(some_rows())])
    found = {r.dx for r in read_columns(photos, table, classes=read_classes_file(file))[0].records}
    assert found == {"Mole", "mole", "melanoma"}
    file.write_text("name\nmole\nmole\n")
    with pytest.raises(DataError, match=r"classes\.csv: class 'mole' is listed twice"):
        read_classes_file(file)
    file.write_text("long_name,name\nnevus,mole\nshort\n")  # found by fuzzing: a row without the column `name`
    with pytest.raises(DataError, match=r"classes\.csv: class '' is not printable text"):
        read_classes_file(file)


def test_only_rows_that_meet_a_condition_are_packed(photos, tmp_path, command):
    """Also rows without a file may be left out so, and a column that the index calls otherwise has its own name."""
    table, out = tmp_path / "labels.csv", tmp_path / "set"
    kinds = [{"shard": ("dermoscopic", "clinical")[n % 4 == 1], "size": str(n)} for n in range(30)]
    write_table(table, [row | kind for row, kind in zip(some_rows(30), kinds, strict=True)])
    where = ["--where", "shard == 'dermoscopic' and size < 20"]
    code, _, errors = command(shard.main, "--source", photos, "--table", table, "--out", out, *where)
    assert code == 0 and "9 images have no row that meets the condition in labels.csv and are left out" in errors
    with ShardSet(out) as data:
        kept = sorted(data.column("image_id").tolist())
        assert data.manifest.source["columns"]["where"] == where[1] and "table_shard" in data.table.column_names
    assert kept == [f"P{n:03d}" for n in range(20) if n % 4 != 1]
    for condition, words in (("size > 100", "no row meets the condition"), ("weight > 1", "no column weight")):
        code, _, errors = command(
            shard.main, "--source", photos, "--table", table, "--out", tmp_path / "none", "--where", condition
        )
        assert code == 2 and words in errors and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "given", "text"),
    [
        ({"dx": None, "a": "x"}, {}, "none is clearly the label; name it with --label"),
        ({"target": "1"}, {}, "the label may be dx or target; name one with --label"),
        ({"other": "P000"}, {}, "labels.csv: photo and other name different images; name one with --image"),
        ({"photo": "Q"}, {}, r"no column names the images in .* \(first row: photo 'Q'.*first of 24 images: a/P000"),
        ({}, {"label": ("dx", "d")}, "d: no such column; .* has the columns photo, patient_id, dx, age"),
        ({}, {"group": ("lesion",)}, "lesion: no such column"),
        ({}, {"label": ("dx", "none")}, "--label dx,none: none stands alone"),
        ({}, {"group": ("patient_id", "none")}, "--group patient_id,none: none stands alone"),
        ({}, {"label": ("photo",)}, "photo has 24 values in 24 rows, so it is no class"),
        ({"dx": "NaN"}, {}, "lists no image that can be packed .first: line 2: dx is 'NaN', so there is no label"),
        ({"dx": "nv"}, {}, "1 classes, and 2 to 65,535 are needed; name another --label"),
    ],
)
def test_what_cannot_be_found_is_asked_for(photos, tmp_path, change, given, text):
    table = tmp_path / "labels.csv"
    write_table(table, [{k: v for k, v in (row | change).items() if v is not None} for row in some_rows()])
    with pytest.raises((DataError, UsageError), match=text) as caught:
        read_columns(photos, table, **given)
    assert "\n" not in str(caught.value)


def test_a_column_keeps_its_values_if_another_has_the_name_that_it_gets(photos):
    table = [row | {"label": str(n), "table_label": f"t{n}"} for n, row in enumerate(some_rows(12))]
    write_table(photos.parent / "table.csv", table)
    given = Columns(label=("dx",), where="label >= 3 and table_label != 't5'")
    source, _ = read_folder(photos, (photos.parent / "table.csv",), given, None)[:2]
    assert source.columns is not None
    index = source.columns.to_pydict()
    assert index["table_table_label"] == [3, 4, *range(6, 12)]
    assert index["table_label"] == [f"t{n}" for n in index["table_table_label"]]


def test_labels_that_differ_only_in_case_are_named(photos, tmp_path, command):
    table, classes = tmp_path / "labels.csv", tmp_path / "classes.csv"
    write_table(table, [row | {"dx": ("Mole", "mole", "melanoma")[n % 3]} for n, row in enumerate(some_rows())])
    arguments = ("--source", photos, "--table", table, "--out")
    code, _, err = command(shard.main, *arguments, tmp_path / "three")
    assert code == 0 and "warning: Mole, mole differ only in case and are classes of their own: " in err
    classes.write_text("name\nmole\nmelanoma\n")
    code, out, err = command(shard.main, *arguments, tmp_path / "two", "--classes", classes)
    assert code == 0 and "differ only in case" not in err and "2 classes" in out


def test_a_warning_of_missing_classes_names_twenty(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    names = [f"c{n:02d}" for n in range(23)]
    rows = [{"photo": f"P{n:03d}", "kind": names[min(n, 22)], "part": "train"} for n in range(24)]
    write_table(table, [*rows[:23], rows[23] | {"part": "test"}])
    classes = tmp_path / "classes.csv"
    classes.write_text("name\n" + "\n".join(names))
    arguments = ("--source", photos, "--table", table, "--label", "kind", "--classes", classes)
    code, _, err = command(shard.main, *arguments, "--split-column", "part", "--out", tmp_path / "set")
    assert code == 0 and f"the test split has no image of {', '.join(names[:20])} and 2 more: " in err


def test_groups_that_are_empty_and_one_that_holds_all_images(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    write_table(table, [row | {"patient_id": ("", "unknown")[n % 2]} for n, row in enumerate(some_rows())])
    empty = ["patient_id is empty in all rows, so each image is split on its own"]
    assert read_columns(photos, table)[0].warnings == empty
    write_table(table, [row | {"patient_id": "one"} for row in some_rows()])
    arguments = ("--source", photos, "--table", table, "--split", "5fold", "--out", tmp_path / "set")
    code, _, err = command(shard.main, *arguments)
    assert code == 1 and "(0 left out, and the split puts the others into val and test); choose" in err


def test_columns_that_name_the_same_images_are_one(photos, tmp_path):
    table = tmp_path / "labels.csv"
    write_table(table, [row | {"file": f"/data/{row['photo']}.PNG"} for row in some_rows()])
    source, _, _ = read_columns(photos, table)
    assert len(source.records) == 24 and source.about["columns"]["image"] == "photo"


def test_a_table_without_rows_is_refused(photos, tmp_path):
    (tmp_path / "labels.csv").write_text("photo,dx\n")
    with pytest.raises(DataError, match=r"labels\.csv: has no row below its header"):
        read_columns(photos, tmp_path / "labels.csv")


def test_all_columns_of_a_table_are_in_the_index_typed_and_with_their_names(photos, tmp_path, command):
    rows = some_rows()
    for n, row in enumerate(rows):
        row |= {"size mm": str(n), "thickness": "0.5" if n else "unknown", "biopsed": ("TRUE", "False", "")[n % 3]}
        row |= {"code": f"{n}a", "empty": "", "width": "wide", "label": str(n), "huge": "inf", "image_id": "other"}
    table = tmp_path / "labels.csv"
    write_table(table, rows)
    options = ("--source", photos, "--table", table, "--label", "dx", "--image", "photo", "--out", tmp_path / "set")
    code, _, err = command(shard.main, *options)
    assert code == 0, err
    data = ShardSet(tmp_path / "set")
    kinds = {field.name: str(field.type) for field in data.table.schema if field.name not in INDEX_TYPES}
    assert kinds == {
        "photo": "string",
        "patient_id": "string",
        "size mm": "int64",
        "thickness": "double",
        "biopsed": "bool",
        "code": "string",
        "empty": "string",
        "table_width": "string",
        "table_label": "int64",
        "huge": "string",
        "table_image_id": "string",
    }
    expected = {row["photo"]: row for row in rows}
    for row in data.table.to_pylist():
        said = expected[row["image_id"]]
        n = int(said["size mm"])
        assert (row["size mm"], row["thickness"], row["code"]) == (n, 0.5 if n else None, f"{n}a")
        assert (row["biopsed"], row["empty"]) == ((True, False, None)[n % 3], None)
        assert (row["table_label"], row["table_width"], row["photo"], row["age"]) == (n, "wide", said["photo"], None)
    selected = data.select("train", where="`size mm` < 12 and biopsed is not null and table_width == 'wide'")
    assert (
        0
        < len(selected)
        == sum(
            int(expected[name]["size mm"]) < 12 and expected[name]["biopsed"] != ""
            for name in data.column("image_id")[data.column("split") == "train"]
        )
    )
    with tarfile.open(tmp_path / "set" / "shard-00000.tar") as tar:
        (first, *_) = (json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json"))
    assert first["biopsed"] in (True, False, None) and first["group"].startswith("PAT_") and first["lesion_id"] is None


def test_images_without_labels_are_packed_for_prediction_alone(photos, tmp_path, command):
    out = tmp_path / "set"
    code, said, err = command(shard.main, "--source", photos, "--label", "none", "--out", out)
    assert (code, err) == (0, "") and said.startswith("layout: images without labels; no labels, for prediction alone")
    data = ShardSet(out)
    assert len(data) == 24 and set(data.column("split")) == {"test"} and set(data.column("dx")) == {None}
    assert data.manifest.classes == Classes(()) and 0 < data.manifest.mean[0] < 1
    assert not [problem for _, problems in data.verify() for problem in problems]
    with tarfile.open(out / "shard-00000.tar") as tar:
        names = [member.name.partition(".")[2] for member in tar][:2]
        fields = json.load(tar.extractfile(tar.getmembers()[1]))
    assert names == ["jpg", "json"] and "label" not in fields and fields["dx"] is None
    code, said, _ = command(main, "info", out)
    assert code == 0 and "no labels: the set is for prediction alone" in said and "all         24       24" in said
    code, _, err = command(run.main, "--model", "resnet18", "--data", out)
    assert (code, err.count("\n")) == (2, 1) and "has no labels to train or test on" in err
    code, _, err = command(grid.main, "--data", out, "--out", tmp_path / "study", "--models", "resnet18")
    assert (code, err.count("\n")) == (2, 1) and "has no labels" in err
    for idle in (("--classes", photos / "x.csv"), ("--split", "5fold"), ("--test-source", photos)):
        code, _, err = command(shard.main, "--source", photos, "--label", "none", "--out", out, "--overwrite", *idle)
        assert (code, err.count("\n")) == (2, 1) and f"is not split; leave {idle[0]} out" in err
    table = tmp_path / "labels.csv"
    write_table(table, some_rows())
    code, _, err = command(
        shard.main, "--source", photos, "--table", table, "--label", "none", "--out", out, "--overwrite"
    )
    data = ShardSet(out)
    assert code == 0 and len(data.select("test", where="patient_id == 'PAT_3'")) == 2 and not data.manifest.classes


def test_folds_are_stratified_and_no_group_is_in_two(photos, tmp_path, command):
    table = tmp_path / "labels.csv"
    rows = [row | {"dx": ("mole", "melanoma")[n // 2 % 4 == 0]} for n, row in enumerate(some_rows())]
    write_table(table, rows)
    options = ("--source", photos, "--table", table, "--max-resolution", "32")
    tested: Counter[str] = Counter()
    for number in (1, 2, 3):
        out = tmp_path / f"set{number}"
        code, _, err = command(shard.main, *options, "--split", f"3fold:{number}", "--out", out)
        assert code == 0, err
        data = ShardSet(out)
        in_test = data.column("split") == "test"
        assert Counter(data.column("dx")[in_test]) == {"mole": 6, "melanoma": 2}
        assert not set(data.column("group")[in_test]) & set(data.column("group")[~in_test])
        assert "train" in data.column("split")
        assert data.manifest.split["fold"] == number and data.manifest.split["folds"] == 3
        tested.update(data.column("image_id")[in_test])
    assert tested == Counter(row["photo"] for row in rows)
    code, said, _ = command(main, "info", out, "--json")
    about = json.loads(said)
    assert code == 0 and about["samples"] == 24 and about["columns"]["patient_id"] == "string"
    assert about["classes"]["names"] == ["melanoma", "mole"] and about["split"]["folds"] == 3


@pytest.mark.parametrize("split", ["1fold", "5fold:6", "5fold:0", "fold", "5folds"])
def test_folds_that_there_cannot_be_are_refused(photos, tmp_path, command, split):
    code, _, err = command(shard.main, "--source", photos, "--split", split, "--out", tmp_path / "set")
    assert code == 2 and "5fold:2" in err


# ------------------------------------------------------------------ layouts


def one_hot(names: list[str], classes: int) -> str:
    return text_of(
        [
            {"image": f"ISIC_{n:07d}", **{name: str(float(c == n % classes)) for c, name in enumerate(names)}}
            for n in range(24)
        ]
    )


def of_images(**columns) -> str:
    return text_of([{name: make(n) for name, make in columns.items()} for n in range(24)])


LAYOUTS = {
    "ISIC 2018 Task 3": (
        {
            "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv": one_hot(ONE_HOT_18, 7),
            "ISIC2018_Task3_Training_LesionGroupings.csv": of_images(
                image=lambda n: f"ISIC_{n:07d}", lesion_id=lambda n: f"HAM_{n}", diagnosis_confirm_type=lambda n: "x"
            ),
        },
        ("lesion_id",),
        HAM10000.names,
    ),
    "ISIC 2019": (
        {
            "ISIC_2019_Training_GroundTruth.csv": one_hot(ONE_HOT_19, 8),
            "ISIC_2019_Training_Metadata.csv": of_images(
                image=lambda n: f"ISIC_{n:07d}", age_approx=lambda n: "55", lesion_id=lambda n: "" if n % 2 else f"L{n}"
            ),
        },
        ("lesion_id",),
        tuple(ONE_HOT_19[:8]),
    ),
    "PAD-UFES-20": (
        {
            "metadata.csv": of_images(
                patient_id=lambda n: f"PAT_{n}",
                lesion_id=lambda n: str(n % 6),
                img_id=lambda n: f"ISIC_{n:07d}.png",
                diagnostic=lambda n: ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")[n % 6],
            )
        },
        ("patient_id", "lesion_id"),
        ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK"),
    ),
    "ISIC archive export": (
        {
            "metadata.csv": of_images(
                isic_id=lambda n: f"ISIC_{n:07d}",
                attribution=lambda n: "Hospital Clínic, Barcelona",
                diagnosis_1=lambda n: ("Benign", "Malignant")[n % 2],
                diagnosis_2=lambda n: str(n % 3),
                lesion_id=lambda n: f"IL_{n}",
            )
        },
        ("lesion_id",),
        ("Benign", "Malignant"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_found_and_packed(name, tmp_path, command):
    tables, group, classes = LAYOUTS[name]
    for n in range(24):
        write_image(tmp_path / "source" / "images" / f"ISIC_{n:07d}.jpg", n)
    for path, text in tables.items():
        (tmp_path / "source" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / path).write_text(text, encoding="utf-8")
    code, out, err = command(shard.main, "--source", tmp_path / "source", "--out", tmp_path / "set")
    assert code == 0, err
    assert out.startswith(f"layout: {name}; {len(classes)} classes, groups by {' and '.join(group)}\n")
    data = ShardSet(tmp_path / "set")
    assert data.manifest.classes.names == classes and data.manifest.group == group and len(data) == 24
    assert data.manifest.source["dataset"] == name and len(data.manifest.citation) > 20
    assert "malignant" in data.manifest.classes.sets
    found = dict(zip(data.column("image_id"), data.column("group"), strict=True))
    expected = {"PAD-UFES-20": "PAT_3/3", "ISIC 2019": None, "ISIC 2018 Task 3": "HAM_3"}
    assert found["ISIC_0000003"] == expected.get(name, "IL_3")


@pytest.mark.parametrize("parts", [("",), ("train/", "val/", "test/"), ("Train/", "Test/"), ("train/",)])
def test_a_folder_for_each_class_with_and_without_splits(tmp_path, command, parts):
    for n in range(36):
        place = parts[n % len(parts)] + ("actinic keratosis", "nevus")[n // 18]
        write_image(tmp_path / "source" / place / f"{n}.png", n)
    code, out, err = command(shard.main, "--source", tmp_path / "source", "--out", tmp_path / "set")
    assert code == 0 and out.startswith("layout: a folder for each class"), err
    data = ShardSet(tmp_path / "set")
    assert data.manifest.classes.names == ("actinic keratosis", "nevus") and data.manifest.group == ()
    assert {"train", "test"} <= set(data.column("split"))
    if len(parts) > 1:
        files = {p.stem: p.parent.parent.name.lower() for p in (tmp_path / "source").glob("*/*/*.png")}
        assert dict(zip(data.column("image_id"), data.column("split"), strict=True)) == files


def test_options_are_heard_in_ham10000s_own_layout_and_refused_where_there_is_no_table(tmp_path, command):
    for n in range(24):
        write_image(tmp_path / "source" / f"HAM10000_images_part_{n % 2 + 1}" / f"ISIC_{n:07d}.png", n)
    arguments = ("--source", tmp_path / "source", "--out", tmp_path / "set", "--overwrite", "--group", "none")
    code, _, err = command(shard.main, *arguments)
    assert code == 2 and "no columns to name; name the table with --table" in err
    rows = [
        {"lesion_id": f"L{n // 2}", "image_id": f"ISIC_{n:07d}", "dx": HAM10000.names[n // 2 % 7], "sex": "male"}
        for n in range(24)
    ]
    (tmp_path / "source" / "HAM10000_metadata.csv").write_text(text_of(rows))
    code, out, err = command(shard.main, *arguments)
    assert code == 0 and out.startswith("layout: HAM10000; 7 classes, groups by image\n"), err
    data = ShardSet(tmp_path / "set")
    assert data.manifest.classes == HAM10000 and data.manifest.group == () and "Tschandl" in data.manifest.citation
    (tmp_path / "two.csv").write_text("name\n" + "\n".join(HAM10000.names[::-1]))
    code, out, err = command(shard.main, *arguments[:-2], "--classes", tmp_path / "two.csv")
    assert code == 0 and "groups by lesion_id" in out, err
    assert ShardSet(tmp_path / "set").manifest.classes.names == HAM10000.names[::-1]


def test_a_list_without_names_is_refused(photos, tmp_path, command):
    for option in ("--label", "--group"):
        code, _, err = command(shard.main, "--source", photos, "--out", tmp_path / "set", option, " , ")
        assert (code, err) == (2, f"error: {option} ' , ': names no column; leave it out, and it is found\n")


def test_a_folder_that_nothing_is_known_of(tmp_path, command):
    (tmp_path / "empty").mkdir()
    code, _, err = command(shard.main, "--source", tmp_path / "empty", "--out", tmp_path / "set")
    assert code == 1 and "holds no HAM10000_metadata.csv" in err
    write_image(tmp_path / "flat" / "a.jpg")
    code, _, err = command(shard.main, "--source", tmp_path / "flat", "--out", tmp_path / "set")
    assert code == 1 and "PAD-UFES-20" in err and "name a table with --table, or" in err and err.count("\n") == 1
    (tmp_path / "flat" / "far" / "away").mkdir(parents=True)
    (tmp_path / "flat" / "far" / "away" / "labels.csv").write_text("image,dx\na,nv\n")
    code, _, err = command(shard.main, "--source", tmp_path / "flat", "--out", tmp_path / "set")
    assert code == 1 and "name a table with --table (there is far/away/labels.csv), or pack" in err
    for name in ("images.zip", "a.dcm", "b.DCM", "readme.txt"):
        (tmp_path / "empty" / name).write_text("x")
    code, _, err = command(shard.main, "--source", tmp_path / "empty", "--out", tmp_path / "set")
    assert code == 1 and "it holds 2 .dcm, 1 .zip files: unpack archives and convert images" in err


def test_jpegs_of_a_table_are_the_bytes_of_ham10000s_own_layout(tmp_path):
    """One way of reading gives what another gives: the layout decides about records, and not about pixels."""
    from preprocess.packing import Settings, pack

    for n in range(12):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"I{n}.jpg").write_bytes(jpeg(n))
    rows = [
        {"lesion_id": f"L{n}", "image_id": f"I{n}", "dx": HAM10000.names[n % 2], "dx_type": "histo", "age": "40"}
        | {"sex": "male", "localization": "back", "dataset": "x"}
        for n in range(12)
    ]
    write_table(tmp_path / "source" / "HAM10000_metadata.csv", rows)
    own, _, layout = read_columns(tmp_path / "source")
    other, _, _ = read_columns(tmp_path / "source", tmp_path / "source" / "HAM10000_metadata.csv", classes=HAM10000)
    assert layout == "HAM10000"
    sets = [pack(source, tmp_path / str(n), Settings()).manifest for n, source in enumerate((own, other))]
    assert sets[0].shards == sets[1].shards and sets[0].index_sha256 == sets[1].index_sha256
