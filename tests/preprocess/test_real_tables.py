"""The real tables of other sets: classes and groups are those that pandas and people count."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse.csgraph

from preprocess import shard
from shards import ShardSet
from shards.format import HAM10000
from tests.support.rawdata import ONE_HOT_18, ONE_HOT_19, read_columns


@pytest.fixture
def tables(real_images: Path) -> Path:
    folder = real_images.parent / "tables"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


def one_of(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """The name of the column that is 1."""
    return table[columns].astype(float).idxmax(axis=1)


def published(folder: Path) -> dict[str, tuple]:
    """By name: tables, what the user names, images, labels and groups (None: unknown), as plain pandas reads them."""

    def csv_of(name: str, **options) -> pd.DataFrame:
        return pd.read_csv(folder / name, dtype=str, **options)

    t18, l18 = (
        "isic2018/ISIC2018_Task3_Training_GroundTruth.csv",
        "isic2018/ISIC2018_Task3_Training_LesionGroupings.csv",
    )
    t19, m19 = "isic2019/ISIC_2019_Training_GroundTruth.csv", "isic2019/ISIC_2019_Training_Metadata.csv"
    t20, milk = "isic2020/ISIC_2020_Training_GroundTruth_v2.csv", "milk10k/MILK10k_Training_{}.csv"
    in_18, in_19 = (csv_of(a).merge(csv_of(b), on="image") for a, b in ((t18, l18), (t19, m19)))
    in_20, pad, s24 = (
        csv_of(t20),
        csv_of("pad_ufes_20/metadata.csv"),
        csv_of("isic2024/ISIC_2024_Training_Supplement_head20000_plus_malignant.csv"),
    )
    in_milk = csv_of(milk.format("Metadata")).merge(csv_of(milk.format("GroundTruth")), on="lesion_id")
    folds, haneen = csv_of("ham10000/bavishm/train_folds.csv"), csv_of("ham10000/Haneen-97/HAM10000_metadata.csv")
    bias, gem = (
        csv_of("homemade/isic_bias.csv", sep=";"),
        csv_of("homemade/gem_isic2018_train0.txt", sep=" ", header=None),
    )
    wild = csv_of("ham10000/doem97/HAM10000_metadata.csv", header=None)
    classes_milk = [c for c in in_milk.columns if c.isupper() and c not in ("MONET",)]
    return {
        "2018": ((t18, l18), {}, in_18["image"], one_of(in_18, ONE_HOT_18), in_18["lesion_id"]),
        "2019": ((t19, m19), {}, in_19["image"], one_of(in_19, ONE_HOT_19), in_19["lesion_id"]),
        "2020": ((t20,), {"label": ("target",)}, in_20["image_name"], in_20["target"], in_20["patient_id"]),
        "2024": (
            ("isic2024/ISIC_2024_Training_Supplement_head20000_plus_malignant.csv",),
            {"label": ("iddx_1",)},
            s24["isic_id"],
            s24["iddx_1"],
            s24["lesion_id"],
        ),
        "milk10k": (
            (milk.format("Metadata"), milk.format("GroundTruth")),
            {},
            in_milk["isic_id"],
            one_of(in_milk, classes_milk),
            in_milk["lesion_id"],
        ),
        "pad": (
            ("pad_ufes_20/metadata.csv",),
            {"group": ("patient_id", "lesion_id")},
            pad["img_id"],
            pad["diagnostic"],
            pad["patient_id"] + "/" + pad["lesion_id"],
        ),
        "folds": (("ham10000/bavishm/train_folds.csv",), {}, folds["image_id"], folds["dx"], folds["lesion_id"]),
        "haneen": (
            ("ham10000/Haneen-97/HAM10000_metadata.csv",),
            {"group": ("none",)},
            haneen[" ImagePath"],
            haneen["ClassId"],
            None,
        ),
        "wild": (("ham10000/doem97/HAM10000_metadata.csv",), {"label": ("2",)}, wild[0], wild[1], None),
        "bias": (("homemade/isic_bias.csv",), {}, bias["image"], bias["label"], None),
        "gem": (("homemade/gem_isic2018_train0.txt",), {"label": ("2",)}, gem[0], gem[1], None),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["2018", "2019", "2020", "2024", "milk10k", "pad", "folds", "haneen", "wild", "bias", "gem"]
)
def test_real_tables_have_the_classes_and_groups_that_pandas_counts(tables, tmp_path, name):
    files, given, images, labels, groups = published(tables)[name]
    touch_images(tmp_path, images)
    source, _, _ = read_columns(tmp_path, *(tables / file for file in files), **given)
    assert not source.rejected
    assert Counter(r.dx for r in source.records) == Counter(labels)
    found = [r.group for r in source.records]
    if groups is None:
        assert set(found) == {None}
        return
    assert sum(group is None for group in found) == groups.isna().sum()
    pairs = pd.read_csv(tables / "dermamnist" / "newly_discovered_duplicates.csv")  # lesions of two names in HAM10000
    group_of = dict(zip(images + ".jpg", groups, strict=True))
    twice = {frozenset(map(group_of.get, pair)) for pair in zip(pairs["from_img"], pairs["to_img"], strict=True)}
    twice = {pair for pair in twice if len(pair - {None}) == 2}
    assert len(set(found) - {None}) == groups.nunique() - len(twice)
    assert len(twice) == {"2018": 18, "2019": 18, "folds": 15}.get(name, 0)


NONE = {"label": ("none",)}
EVERY_TABLE = {  # file: column of the images for pandas, what the user names, rows, largest classes, classes, groups
    "dermamnist/combined_extended.EXCERPT_last_rows_no_header.csv": (
        *(0, {"label": ("9",), "split": "11"}, 11),
        *({"nv": 5, "mel": 2, "bkl": 2}, 5, 0),
    ),
    "dermamnist/combined_metadata_corrected.EXCERPT.csv": (
        *("image_id", {"classes": HAM10000, "split": "split"}, 4),
        *({"akiec": 4}, 1, 4),
    ),
    "dermamnist/dermamnist_split_info.EXCERPT.csv": ("image_id", NONE | {"split": "split"}, 45, {}, 0, 0),
    "dermamnist/near_duplicates_different_times.csv": ("from_img", NONE, 2, {}, 0, 0),
    "dermamnist/newly_discovered_duplicates.csv": ("from_img", NONE, 18, {}, 0, 0),
    "ham10000/AlessanderLCarazas/HAM10000_metadata.csv": ("image_id", {}, 10015, {"mel": 1526, "bkl": 1464}, 7, 0),
    "ham10000/Haneen-97/HAM10000_metadata.csv": (" ImagePath", {"group": ("none",)}, 10015, {"0": 6705}, 2, 0),
    "ham10000/bavishm/HAM10000_metadata.csv": ("image_id", {}, 10015, {"Melanomaanocytic Nevi (moles)": 6705}, 7, 7452),
    "ham10000/bavishm/train_folds.csv": ("image_id", {}, 8525, {"Melanomaanocytic Nevi (moles)": 5704}, 7, 6334),
    "ham10000/doem97/HAM10000_metadata.csv": (0, {"label": ("2",)}, 10015, {"nv": 6705, "mel": 1113}, 8, 0),
    "homemade/features_train_split.csv": ("img_id", {}, 1109, {"BCC": 403, "ACK": 357}, 6, 0),
    "homemade/gem_isic2018_train0.txt": (0, {"label": ("2",)}, 350, dict.fromkeys("0123456", 50), 7, 0),
    "homemade/isic_bias.csv": ("image", {}, 2594, {"0": 2075, "1": 519}, 2, 0),
    "homemade/split_task3_train_only_1.txt": (0, NONE, 8989, {}, 0, 0),
    "isic2018/ISIC2018_Task3_Test_GroundTruth.csv": ("image", {}, 1512, {"NV": 909, "BKL": 217, "MEL": 171}, 7, 0),
    "isic2018/ISIC2018_Task3_Training_GroundTruth.csv": ("image", {}, 10015, {"NV": 6705, "MEL": 1113}, 7, 0),
    "isic2018/ISIC2018_Task3_Training_LesionGroupings.csv": (
        *("image", {"label": ("diagnosis_confirm_type",)}, 10015),
        *({"histopathology": 5340, "serial imaging showing no change": 3704}, 4, 7452),
    ),
    "isic2018/ISIC2018_Task3_Validation_GroundTruth.csv": ("image", {}, 193, {"NV": 123, "BKL": 22}, 7, 0),
    "isic2018/dataverse/ISIC2018_Task3_Test_GroundTruth.csv": ("image_id", {}, 1512, {"nv": 909, "bkl": 217}, 7, 1223),
    "isic2019/ISIC_2019_Test_GroundTruth.csv": ("image", {}, 8238, {"NV": 2495, "UNK": 2047, "MEL": 1327}, 9, 0),
    "isic2019/ISIC_2019_Test_Metadata.csv": ("image", NONE, 8238, {}, 0, 0),
    "isic2019/ISIC_2019_Training_GroundTruth.csv": ("image", {}, 25331, {"NV": 12875, "MEL": 4522, "BCC": 3323}, 8, 0),
    "isic2019/ISIC_2019_Training_Metadata.csv": ("image", NONE, 25331, {}, 0, 11847 - 18),
    "isic2020/ISIC_2020_Training_Duplicates.csv": ("image_name_1", NONE, 425, {}, 0, 0),
    "isic2020/ISIC_2020_Training_GroundTruth_v2.csv": (
        *("image_name", {"label": ("target",)}, 33126),
        *({"0": 32542, "1": 584}, 2, 2056),
    ),
    "isic2020/train.csv": (
        *("image_name", {"label": ("benign_malignant",)}, 33126),
        *({"benign": 32542, "malignant": 584}, 2, 2056),
    ),
    "isic2024/ISIC_2024_Training_Supplement_head20000_plus_malignant.csv": (
        *("isic_id", {"label": ("iddx_1",)}, 20366),
        *({"Benign": 19966, "Malignant": 393, "Indeterminate": 7}, 3, 1507),
    ),
    "isic2024/test-metadata.csv": ("isic_id", NONE, 3, {}, 0, 3),
    "milk10k/MILK10k_Training_GroundTruth.csv": ("lesion_id", {}, 5240, {"BCC": 2522, "NV": 746, "BKL": 544}, 11, 5240),
    "milk10k/MILK10k_Training_Metadata.csv": ("isic_id", NONE, 10480, {}, 0, 5240),
    "milk10k/MILK10k_Training_Supplement.csv": (
        *("isic_id", {"label": ("diagnosis_confirm_type",)}, 10480),
        *({"histopathology": 10032, "single contributor clinical assessment": 448}, 2, 0),
    ),
    "pad_ufes_20/metadata.csv": (
        *("img_id", {"group": ("patient_id", "lesion_id")}, 2298),
        *({"BCC": 845, "ACK": 730, "NEV": 244, "SEK": 235, "SCC": 192, "MEL": 52}, 6, 1891),
    ),
}


def touch_images(folder: Path, images: pd.Series) -> None:
    """An empty file for each image, named as the table names it; .jpg where it names no ending."""
    for image in images:
        path = folder / (image if "." in image else f"{image}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.slow
def test_every_real_table_is_in_the_list(tables):
    found = {
        path.relative_to(tables).as_posix() for path in tables.rglob("*") if path.suffix in (".csv", ".txt", ".tab")
    }
    assert {name for name in found if "LICENSE" not in name and "ATTRIBUTION" not in name} == set(EVERY_TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_TABLE)
def test_every_real_table_is_read(tables, tmp_path, name):
    column, given, count, largest, classes, groups = EVERY_TABLE[name]
    separator = {"homemade/isic_bias.csv": ";", "homemade/gem_isic2018_train0.txt": " "}.get(name, ",")
    plain = pd.read_csv(tables / name, dtype=str, sep=separator, header=0 if isinstance(column, str) else None)
    touch_images(tmp_path, plain[column])
    source, splits, _ = read_columns(tmp_path, tables / name, **given)
    assert not source.rejected and len(source.records) == len(plain) == count
    labels = Counter(record.dx for record in source.records if record.dx is not None)
    assert len(labels) == classes and dict(labels.most_common(len(largest))) == largest
    assert len({record.group for record in source.records} - {None}) == groups
    assert (splits is None) == ("split" not in given)
    kept = plain.columns.size if isinstance(column, str) else plain.shape[1]
    own = set(source.records[0].metadata()) | {"split"}
    assert source.columns is None or kept - len(own) <= source.columns.num_columns <= kept


REAL_LAYOUTS = {  # tables, image column, name, classes, groups before pairs are joined
    "isic2018": (
        ("ISIC2018_Task3_Training_GroundTruth.csv", "ISIC2018_Task3_Training_LesionGroupings.csv"),
        *("image", "ISIC 2018 Task 3"),
        {"nv": 6705, "mel": 1113, "bkl": 1099, "bcc": 514, "akiec": 327, "vasc": 142, "df": 115},
        7470 - 18,
    ),
    "isic2019": (
        ("ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"),
        *("image", "ISIC 2019"),
        {"NV": 12875, "MEL": 4522, "BCC": 3323, "BKL": 2624, "AK": 867, "SCC": 628, "VASC": 253, "DF": 239},
        11847 - 18,
    ),
    "isic2020": (
        ("ISIC_2020_Training_GroundTruth_v2.csv", "ISIC_2020_Training_Duplicates.csv"),
        *("image_name", "ISIC 2020"),
        {"benign": 32542, "malignant": 584},
        2056,
    ),
    "isic2024": (
        ("ISIC_2024_Training_Supplement_head20000_plus_malignant.csv",),
        *("isic_id", "ISIC 2024"),
        {"benign": 19973, "malignant": 393},
        1507,
    ),
    "milk10k": (
        ("MILK10k_Training_Metadata.csv", "MILK10k_Training_GroundTruth.csv", "MILK10k_Training_Supplement.csv"),
        *("isic_id", "MILK10k"),
        {"BCC": 5044, "NV": 1492, "BKL": 1088, "SCCKA": 946, "MEL": 900, "AKIEC": 606},
        5240,
    ),
    "pad_ufes_20": (
        ("metadata.csv",),
        *("img_id", "PAD-UFES-20"),
        {"BCC": 845, "ACK": 730, "NEV": 244, "SEK": 235, "SCC": 192, "MEL": 52},
        1891,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_LAYOUTS)
def test_layouts_are_found_by_their_real_tables(tables, tmp_path, name):
    files, column, layout, classes, groups = REAL_LAYOUTS[name]
    for file in files:
        (tmp_path / file).symlink_to(tables / name / file)
    touch_images(tmp_path / "images", pd.read_csv(tables / name / files[0], dtype=str)[column])
    source, _, found = read_columns(tmp_path)
    assert found == layout and not source.rejected
    labels = Counter(record.dx for record in source.records)
    assert dict(labels.most_common(len(classes))) == classes
    if name == "isic2020":
        patients = pd.read_csv(tables / name / files[0]).set_index("image_name")["patient_id"]
        codes = patients.astype("category").cat.codes
        pairs = pd.read_csv(tables / name / files[1])
        ends = codes[pairs["image_name_1"]].to_numpy(), codes[pairs["image_name_2"]].to_numpy()
        graph = scipy.sparse.coo_array((np.ones(len(pairs)), ends), shape=(groups, groups))
        groups = scipy.sparse.csgraph.connected_components(graph, directed=False)[0]
        of = {record.image_id: record.group for record in source.records}
        assert all(of[one] == of[other] for one, other in pairs.to_numpy())
    assert len({record.group for record in source.records} - {None}) == groups
    missing = {"isic2019": 2084, "isic2024": 18859}.get(name, 0)
    assert sum(record.group is None for record in source.records) == missing


def test_real_images_of_three_sets_are_packed(tables, tmp_path, command):
    for name, count, options in (
        ("pad_ufes_20", 12, ("--on-bad", "skip")),
        ("milk10k", 60, ("--on-bad", "skip", "--table", tables / "milk10k" / "MILK10k_Training_Metadata.csv")),
        ("isic2019/images", 60, ()),
    ):
        more = ("--table", tables / "milk10k" / "MILK10k_Training_GroundTruth.csv") if name == "milk10k" else ()
        arguments = ("--source", tables / name, "--out", tmp_path / name.replace("/", "_"), *options, *more)
        code, _, err = command(shard.main, *arguments)
        assert code == 0, err
        assert len(ShardSet(tmp_path / name.replace("/", "_"))) == count
