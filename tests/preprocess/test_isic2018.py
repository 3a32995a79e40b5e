"""The official test set: both forms of its labels, and the one image that is known to be missing."""

import csv

import pytest

from preprocess.isic2018 import NOT_IN_ARCHIVE, ONE_HOT, read_test_source
from preprocess.packing import Settings, pack
from shards.common.errors import DataError
from shards.format import Classes
from tests.support.rawdata import jpeg, rows, write_table


def test_official_test_set(official_test):
    source = read_test_source(official_test)
    assert not source.rejected and len(source.records) == 21
    assert {r.lesion_id for r in source.records} == {None}
    assert [r.dx for r in source.records][:7] == ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"]
    assert "resample images" in source.warnings[0]
    assert source.about["known_missing"] == [NOT_IN_ARCHIVE]


def test_it_is_refused_beside_a_source_with_other_classes(official_test, tmp_path):
    source, test = read_test_source(official_test), read_test_source(official_test)
    source.classes = Classes(("MEL", "NV"), {}, {})
    with pytest.raises(
        DataError, match=r"has images of akiec, .*, none of the classes of .* \(MEL, NV\); leave --test"
    ):
        pack(source, tmp_path / "set", Settings(), test)


@pytest.mark.parametrize("with_lesions", [False, True])
def test_the_known_image_is_recorded_only_where_the_labels_list_it(official_test, with_lesions):
    table = [{"image": f"ISIC_003{n:04d}"} | {name: str(float(name == "NV")) for name in ONE_HOT} for n in range(21)]
    path = next(official_test.glob("*/*.csv"))
    if with_lesions:
        path.unlink()
        path = path.with_suffix(".tab")
        table = [row | {"image_id": f"ISIC_003{n:04d}"} for n, row in enumerate(rows(21))]
    write_table(path, table, "\t" if with_lesions else ",")
    source = read_test_source(official_test)
    assert len(source.records) == 21 and source.about["known_missing"] == []


def test_only_the_known_image_may_be_missing(official_test):
    images = official_test / "ISIC2018_Task3_Test_Images"
    (images / f"{NOT_IN_ARCHIVE}.jpg").write_bytes(jpeg())  # somebody has it: left out all the same
    assert len(read_test_source(official_test).records) == 21
    (images / "ISIC_0030004.jpg").unlink()
    (images / "ISIC_9.jpg").write_bytes(jpeg())
    assert {r.image_id: r.reason.split(",")[0] for r in read_test_source(official_test).rejected} == {
        "ISIC_0030004": "is missing",
        "ISIC_9": "is not listed in ISIC2018_Task3_Test_GroundTruth.csv",
    }


@pytest.mark.parametrize(("nv", "mel"), [("1.0", "1.0"), ("0.0", "0.0"), ("0.5", "0.5"), ("", "1.0")])
def test_labels_that_are_not_one_hot(official_test, nv, mel):
    path = next(official_test.glob("*/*.csv"))
    table = list(csv.DictReader(path.open()))
    table[0] |= {"NV": nv, "MEL": mel}
    table[2] = table[1]
    write_table(path, table)
    found = {r.image_id: r.reason for r in read_test_source(official_test).rejected}
    assert "one class at 1.0" in found["ISIC_0030000"] and "listed twice" in found["ISIC_0030001"]


def test_the_table_with_lesions_is_preferred(official_test):
    table = [row | {"image_id": f"ISIC_003{n:04d}", "lesion_id": f"HAMTEST_{n // 2}"} for n, row in enumerate(rows(21))]
    for row in table:
        row["dx"] = "nv"
    table.append(dict.fromkeys(table[0], "") | {"image_id": NOT_IN_ARCHIVE, "dx": "nv"})
    write_table(official_test / "ISIC2018_Task3_Test_GroundTruth.tab", table, "\t")
    source = read_test_source(official_test)
    assert not source.rejected and len(source.records) == 21 and not source.warnings
    assert {r.lesion_id for r in source.records} == {f"HAMTEST_{n}" for n in range(11)}


def test_no_test_set(tmp_path):
    with pytest.raises(DataError, match=r"no such folder; .*preprocess\.download --test-set`"):
        read_test_source(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no ISIC2018_Task3_Test_GroundTruth"):
        read_test_source(tmp_path)
