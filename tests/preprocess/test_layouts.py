"""Layouts of public sets: synthetic sets of each, archives of images, and HAM10000 as it is passed on."""

import csv
import gc
import io
import json
import pickle
import shutil
import sys
import tarfile
import tomllib
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from preprocess import labelled, shard, synthetic
from preprocess.archives import Archives
from preprocess.labelled import Columns, Images
from preprocess.layouts import layouts, read_folder
from preprocess.records import Record, Records, Source, join_groups
from shards import ShardSet
from shards.common.errors import DataError, UsageError
from shards.format import HAM10000
from tests.support.rawdata import jpeg, rows, write_raw, write_table
from tests.support.train_runs import small
from train.loop import train_once

GROUPS = {"isic2020": ("patient_id",), "isic2024": ("patient_id",), "pad-ufes-20": ("patient_id", "lesion_id")}
CLASSES = {
    "isic2019": ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"),
    "isic2020": ("benign", "malignant"),
    "isic2024": ("benign", "malignant"),
    "milk10k": ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC"),
    "bcn20000": ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"),
    "pad-ufes-20": ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK"),
    "isic-archive": ("Benign", "Malignant"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Makes and packs the synthetic set of a layout: its folder, the packed set, and what packing printed."""
    folder, done = tmp_path_factory.mktemp("layouts"), {}

    def make(layout: str) -> tuple[Path, ShardSet]:
        if layout not in done:
            raw = folder / layout
            synthetic.write_folder(raw, images=60, seed=1, difficulty=0.5, workers=2, layout=layout)
            out = folder / f"{layout}-set"
            options = ["--source", str(raw), "--out", str(out), "--max-resolution", "48"]
            shard.main.main(options, standalone_mode=False)
            done[layout] = raw, ShardSet(out)
        return done[layout]

    return make


@pytest.mark.parametrize("layout", synthetic.LAYOUTS)
def test_a_synthetic_set_of_each_layout_is_found_and_packed(made, layout):
    raw, data = made(layout)
    assert len(data) == 60 and len(list(raw.rglob("*.jpg")) + list(raw.rglob("*.png"))) == 60
    manifest = data.manifest
    assert manifest.classes.names == CLASSES.get(layout, HAM10000.names)
    assert manifest.group == GROUPS.get(layout, () if layout == "folders" else ("lesion_id",))
    assert "malignant" in manifest.classes.sets
    assert (manifest.licence == "Apache-2.0") == (layout != "folders")
    about = tomllib.loads((synthetic.SETS / f"{layout}.toml").read_text())["synthetic"]
    made_of = {row["image_id"]: row for row in synthetic.described(synthetic.unpainted_lesions(60, 1), about)}
    packed = data.table.to_pylist()
    if layout != "isic-archive":  # whose labels are those of the table
        spelled = {name.casefold(): name for name in manifest.classes.names}
        labels = {name: spelled[row["label"].casefold()] for name, row in made_of.items()}
        assert {row["image_id"]: row["dx"] for row in packed} == labels
    groups: dict[str, set[str]] = {}
    for row in packed:
        groups.setdefault(row["group"] or row["image_id"], set()).add(row["split"])
        said = made_of[row["image_id"]]
        if layout not in ("folders", "isic2024", "pad-ufes-20"):
            assert row["lesion_id"] == said["lesion_id"]
        if layout not in ("folders", "isic2018"):
            assert row["sex"] == (said["sex"] or None) and row["localization"] == said["localization"]
            assert row["age"] == (float(said["age"]) if said["age"] else None)
    assert all(len(splits) == 1 for splits in groups.values())
    tables = {column for table in about["tables"].values() for column in table["columns"]}
    names = set(data.table.column_names)
    assert {column for column in tables if column not in names and f"table_{column}" not in names} == set()


@pytest.mark.parametrize("layout", synthetic.LAYOUTS)
def test_a_run_trains_on_a_set_of_each_layout(made, tmp_path, layout):
    data = made(layout)[1]
    where = "image_type == 'dermoscopic'" if layout == "milk10k" else None
    train_once(small(data.path, epochs=1, batch_size=8, where=where), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    index = pd.read_parquet(data.path / "index.parquet")
    wanted = index[index["image_type"] == "dermoscopic"] if where else index
    assert result["images"] == wanted["split"].value_counts().to_dict()
    assert (len(wanted) < len(index)) == (where is not None)
    counts = wanted[wanted["split"] == "train"]["dx"].value_counts().to_dict()
    assert tuple(result["training_images_per_class"]) == data.manifest.classes.names
    assert {name: count for name, count in result["training_images_per_class"].items() if count} == counts


def test_milk10k_has_one_label_for_all_images_of_a_lesion(made):
    index = pd.read_parquet(made("milk10k")[1].path / "index.parquet")
    assert (index.groupby("lesion_id")["dx"].nunique() == 1).all()
    assert index["lesion_id"].nunique() < len(index)
    assert set(index["image_type"]) == {"dermoscopic", "clinical: close-up"}


def test_the_list_of_duplicates_of_isic_2020_joins_patients(made, tmp_path):
    raw = Path(shutil.copytree(made("isic2020")[0], tmp_path / "raw"))
    with (raw / "ISIC_2020_Training_GroundTruth_v2.csv").open() as file:
        patients = {row["image_name"]: row["patient_id"] for row in csv.DictReader(file)}
    images = {patient: name for name, patient in patients.items()}  # one image of each
    a, b, c, d, *_ = sorted(images)
    pairs = [(images[a], images[b]), (images[c], images[b]), (images[d], "ISIC_0000000")]
    table = [dict(zip(("image_name_1", "image_name_2"), pair, strict=True)) for pair in pairs]
    write_table(raw / "ISIC_2020_Training_Duplicates.csv", table)
    source, _, layout = read_folder(raw, (), Columns(), None)
    assert layout == "ISIC 2020" and source.about["joined_groups"] == 2
    groups = {record.image_id: record.group for record in source.records}
    assert len({groups[images[patient]] for patient in (a, b, c)}) == 1
    alone = {name: patient for name, patient in patients.items() if patient not in (a, b, c)}
    assert {name: groups[name] for name in alone} == alone
    assert all(record.lesion_id.startswith("SYN_L") for record in source.records)
    (raw / "ISIC_2020_Training_Duplicates.csv").write_text(f"image_name_1,image_name_2\n{images[a]}\n")
    with pytest.raises(DataError, match="line 2 names one image, and a pair is needed"):
        read_folder(raw, (), Columns(), None)


def test_joined_groups_do_not_depend_on_the_order_of_pairs_and_include_images_without_one():
    def joined(pairs):
        groups = dict(a="1", b="1", c="2", d=None, e=None, f="3")
        records = (Record(name, name, None, "nv", group=group) for name, group in groups.items())
        source = Source(Path(), "none", "none", Records(records))
        join_groups(source, pairs)
        parts: dict = {}
        for record in source.records:
            parts.setdefault(record.group or record.image_id, set()).add(record.image_id)
        return sorted(map(sorted, parts.values()))

    pairs = [("A", "c"), ("d", "C"), ("x", "f"), ("e", "e")]
    assert joined(pairs) == joined(pairs[::-1]) == [["a", "b", "c", "d"], ["e"], ["f"]]


# ------------------------------------------------------------------ HAM10000 as it is passed on


def tars(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("*.tar"))]


WORDS = {
    "akiec": "Actinic keratoses",
    "bcc": "Basal cell carcinoma",
    "bkl": "Benign keratosis-like lesions ",
    "df": "Dermatofibroma",
    "mel": "Melanoma",
    "nv": "Melanocytic nevi",
    "vasc": "Vascular lesions",
}


@pytest.mark.parametrize("form", ["nested", "lower", "by class", "words", "twice"])
def test_ham10000_is_packed_to_the_same_tars_however_it_is_passed_on(tmp_path, command, form):
    raw = write_raw(tmp_path / "raw", images=42)
    code, _, err = command(shard.main, "--source", raw, "--out", tmp_path / "set")
    assert code == 0, err
    table = rows(42)
    for number, part in enumerate(sorted(raw.glob("HAM10000_images*")), 1):
        match form:
            case "nested":
                part.rename(raw / "x")
                part.mkdir()
                (raw / "x").rename(part / part.name)
            case "lower":
                part.rename(raw / f"ham10000_images_part_{number}")
            case "twice":
                shutil.copytree(part, raw / "archive" / part.name)
                part.rename(raw / f"ham10000_images_part_{number}")
            case "by class":
                for row in table:
                    if (file := part / f"{row['image_id']}.jpg").exists():
                        (raw / row["dx"]).mkdir(exist_ok=True)
                        file.rename(raw / row["dx"] / file.name)
    if form == "words":
        write_table(raw / "HAM10000_metadata.csv", [row | {"dx": WORDS[row["dx"]]} for row in table])
    code, said, err = command(shard.main, "--source", raw, "--out", tmp_path / "other")
    assert (code, err) == (0, "") and said.startswith("layout: HAM10000; 7 classes, groups by lesion_id\n")
    assert tars(tmp_path / "other") == tars(tmp_path / "set")


# ------------------------------------------------------------------ archives


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members_of(numbers: range, described) -> list[tuple[str, bytes]]:
    return [(f"{n:04d}.{kind}", data) for n in numbers for kind, data in (("jpg", jpeg(n, n % 3)), *described(n))]


def test_webdataset_tars_are_packed_with_their_fields(tmp_path, command, monkeypatch):
    def described(n: int):
        fields = {"dx": "abc"[n % 3], "patient_id": n // 2, "age": 30 + n, "more": {"a": [n]}, "none": None}
        return [("cls", str(n % 3).encode()), ("json", json.dumps(fields).encode())]

    write_tar(tmp_path / "a.tar", members_of(range(24), described))
    write_tar(tmp_path / "raw" / "a.tar", members_of(range(12), described))
    write_tar(tmp_path / "raw" / "b" / "b.tar", members_of(range(12, 24), described))
    found = []
    for source in ("a.tar", "raw"):
        code, said, err = command(shard.main, "--source", tmp_path / source, "--out", tmp_path / f"{source}-set")
        assert (code, err) == (0, "")
        assert said.startswith("layout: webdataset tars; 3 classes, groups by patient_id\n")
        found.append(tars(tmp_path / f"{source}-set"))
    assert found[0] == found[1]
    made: list[weakref.ref] = []
    monkeypatch.setattr(labelled, "Archives", lambda *given: made.append(weakref.ref(one := Archives(*given))) or one)
    source = read_folder(tmp_path / "raw", (), Columns(), None)[0]
    gc.collect()
    assert made[0]() is None  # packing keeps where the images are, and no second copy of their fields
    assert len(source.records) == 24 and {record.file for record in source.records} == set(source.members or ())
    data = ShardSet(tmp_path / "raw-set")
    for row in data.table.to_pylist():
        n = int(row["image_id"])
        assert (row["dx"], row["group"], row["age"], row["patient_id"]) == ("abc"[n % 3], str(n // 2), 30 + n, n // 2)
        assert (row["cls"], row["more"], row["none"]) == (n % 3, json.dumps({"a": [n]}), None)


def test_tars_of_splits_and_labels_alone_keep_their_splits(tmp_path, command):
    for number, name in enumerate(("train-000.tar", "validation-000.tar", "test-000.tar")):
        numbers = range(number * 9, number * 9 + 9)
        write_tar(tmp_path / "raw" / name, members_of(numbers, lambda n: [("cls", str(n % 3).encode())]))
    code, said, err = command(shard.main, "--source", tmp_path / "raw", "--out", tmp_path / "set")
    assert code == 0 and said.startswith(
        "layout: webdataset tars, in train, val and test; 3 classes, groups by image"
    ), err
    data = ShardSet(tmp_path / "set")
    expected = [("train", "val", "test")[int(name) // 9] for name in data.column("image_id")]
    assert data.column("split").tolist() == expected and data.manifest.classes.names == ("0", "1", "2")
    for name in ("validation-000.tar", "test-000.tar"):
        (tmp_path / "raw" / name).unlink()
    code, said, err = command(shard.main, "--source", tmp_path / "raw", "--out", tmp_path / "train")
    assert code == 0 and said.startswith("layout: webdataset tars; 3 classes"), err
    assert set(ShardSet(tmp_path / "train").column("split")) == {"train", "val", "test"}


def test_a_packed_set_is_a_source_too(tiny_shards, tmp_path, command):
    code, said, err = command(shard.main, "--source", tiny_shards, "--out", tmp_path / "set", "--group", "lesion_id")
    assert code == 0 and said.startswith("layout: webdataset tars, in train, val and test; 7 classes"), err
    old, new = ShardSet(tiny_shards), ShardSet(tmp_path / "set")
    columns = ["image_id", "dx", "group", "split", "sex", "age"]
    assert new.table.select(columns).sort_by("image_id").equals(old.table.select(columns).sort_by("image_id"))


def test_archives_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"a\.tar: is no tar of images and labels"):
        Images(tmp_path / "raw")
    half = [("json", b'{"dx": "nv", "note": "\\ud83d"}')]
    write_tar(tmp_path / "raw" / "a.tar", members_of(range(2), lambda number: half))
    with pytest.raises(DataError, match=r"a\.tar: is no tar of images and labels \('utf-8' codec can't encode"):
        Images(tmp_path / "raw")
    (tmp_path / "raw" / "a.tar").rename(tmp_path / "raw" / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: is a file; name a folder of images"):
        Images(tmp_path / "raw" / "a.txt")
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar: holds no image"):
        read_folder(tmp_path / "empty.tar", (), Columns(), None)


def test_isic_2024_is_read_from_its_hdf5_file(made, tmp_path, command, monkeypatch):
    h5py = pytest.importorskip("h5py")
    raw, folder = made("isic2024")[0], tmp_path / "raw"
    folder.mkdir()
    shutil.copy(raw / "train-metadata.csv", folder)
    with h5py.File(folder / "train-image.hdf5", "w") as file:
        for image in raw.rglob("*.jpg"):
            file[image.stem] = np.void(image.read_bytes())
    options = ("--source", folder, "--out", tmp_path / "set", "--max-resolution", "48")
    code, said, err = command(shard.main, *options)
    assert code == 0 and said.startswith("layout: ISIC 2024; 2 classes, groups by patient_id\n"), err
    assert tars(tmp_path / "set") == tars(made("isic2024")[1].path)
    archives = pickle.loads(pickle.dumps(Images(folder).archives))
    name = archives.files[0]
    assert archives.read(name) == next(raw.rglob(Path(name).name)).read_bytes()
    from preprocess import archives as module

    module._hdf5.cache_clear()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"reading HDF5 needs h5py; install it with: pip install 'dermscale\[hdf5\]'"):
        Images(folder)


def test_isic_2024_has_two_classes_by_any_of_its_tables(made, tmp_path):
    raw = Path(shutil.copytree(made("isic2024")[0], tmp_path / "raw"))
    table = pd.read_csv(raw / "train-metadata.csv", dtype=str)
    first = read_folder(raw, (), Columns(), None)[0]
    (raw / "train-metadata.csv").unlink()
    words = table["target"].map({"0": "Benign", "1": "Malignant"})
    words[table.index[table["target"] == "0"][:3]] = "Indeterminate"
    table[["isic_id", "patient_id"]].assign(iddx_1=words).to_csv(raw / "ISIC_2024_Training_Supplement.csv", index=False)
    second = read_folder(raw, (), Columns(), None)[0]
    truth = table[["isic_id"]].assign(malignant=table["target"])
    truth.to_csv(raw / "ISIC_2024_Training_GroundTruth.csv", index=False)
    third, _, layout = read_folder(raw, (), Columns(), None)
    assert layout == "ISIC 2024" and "iddx_1" in third.columns.column_names
    labels = [{record.image_id: record.dx for record in one.records} for one in (first, second, third)]
    assert labels[0] == labels[1] == labels[2] and Counter(labels[0].values())["malignant"] > 5


def test_every_description_of_a_layout_can_be_read():
    files = {path.stem for path in synthetic.SETS.glob("*.toml")}
    assert files == set(synthetic.LAYOUTS) and len(layouts()) == len(files) - 1  # `folders` has no table
    for layout in layouts():
        assert (
            len(layout.citation) > 20
            and layout.licence
            and set(layout.spelled.values()) <= set(layout.classes.names if layout.classes else ())
        )
