"""Raw folders: every fault is found and named, and what is left is right."""

import csv
import io
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from preprocess.ham10000 import SAME_LESION, read_source
from preprocess.records import quarantine_csv
from shards.common.errors import DataError
from tests.support.rawdata import jpeg, rows, write_raw, write_table

METADATA = "HAM10000_metadata.csv"
PART = "HAM10000_images_part_1"


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def reasons(source) -> dict[str, str]:
    return {r.image_id: r.reason for r in source.rejected}


def rewrite(raw, change):
    table = rows(60)
    change(table)
    write_table(raw / METADATA, table)
    return read_source(raw)


def test_a_good_folder(raw):
    source = read_source(raw)
    assert not source.rejected and not source.warnings
    assert len(source.records) == 60
    for record, row in zip(source.records, rows(60), strict=True):
        assert (raw / record.file).is_file() and record.image_id in record.file
        age = float(row["age"]) if row["age"] else None
        assert record.metadata() == row | {"age": age, "group": row["lesion_id"]}


def test_layouts_do_not_matter(raw, tmp_path):
    expected = list(read_source(raw).records)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in raw.glob("*/*.jpg"):
        (flat / file.name).write_bytes(file.read_bytes())
    without = [{k: v for k, v in row.items() if k != "dataset"} for row in rows(60)]
    write_table(flat / "HAM10000_metadata.tab", without, "\t")
    (flat / "LICENSE.txt").write_text("text is no picture")
    (flat / "._ISIC_0000001.jpg").write_bytes(b"left by an archive made on a Mac")
    found = read_source(flat)
    assert not found.rejected
    assert [(r.image_id, r.dx, r.lesion_id) for r in found.records] == [
        (r.image_id, r.dx, r.lesion_id) for r in expected
    ]
    assert {r.dataset for r in found.records} == {None}
    with_mark = tmp_path / "bom"
    raw.rename(with_mark)
    (with_mark / METADATA).write_bytes(b"\xef\xbb\xbf" + (with_mark / METADATA).read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_source(with_mark).records) == expected


def test_no_folder_no_metadata_no_images(tmp_path, monkeypatch):
    """The advice works in each case: a synthetic set is only written to a new or an empty folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("raw")
    get = r"get HAM10000 with `python -m preprocess\.download --out raw`, or write a synthetic set into "
    there = f"{get}it with `python -m preprocess\\.synthetic --out raw`"
    elsewhere = f"{get}a new folder with `python -m preprocess\\.synthetic --out NEW`"
    with pytest.raises(DataError, match=f"raw: no such folder; {there}"):
        read_source(folder)
    with pytest.raises(DataError, match=r"no such folder; get HAM10000 with `python -m preprocess\.download`"):
        read_source(Path("data/ham10000"))
    folder.mkdir()
    with pytest.raises(DataError, match=rf"raw: holds no HAM10000_metadata\.csv; {there}"):
        read_source(folder)
    (folder / "notes.txt").touch()
    with pytest.raises(DataError, match=rf"raw: holds no HAM10000_metadata\.csv; {elsewhere}"):
        read_source(folder)
    write_table(folder / METADATA, rows(3))
    with pytest.raises(DataError, match=f"raw: no images in it .*; {elsewhere}"):
        read_source(folder)
    with pytest.raises(DataError, match=r"notes\.txt: is a file"):
        read_source(folder / "notes.txt")


@pytest.mark.parametrize("column", ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"])
def test_a_missing_column_is_named(raw, column):
    write_table(raw / METADATA, [{k: v for k, v in row.items() if k != column} for row in rows(60)])
    with pytest.raises(DataError, match=rf"has no column {column} \(it has "):
        read_source(raw)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'lesion_id,image_id\n"a', "has no column dx"),
        (b"x" * 200_000 + b",dx\n", "line 1 cannot be read .field larger than field limit"),
    ],
)
def test_a_file_that_is_no_table(raw, content, text):
    (raw / METADATA).write_bytes(content)
    with pytest.raises(DataError, match=text):
        read_source(raw)


def test_an_open_quote_is_named_with_its_line(raw):
    path = raw / METADATA
    path.write_text(path.read_text() + '"HAM_1,ISIC_9')
    with pytest.raises(DataError, match="line 62 cannot be read"):
        read_source(raw)


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("dx", "scc", r"line 7: dx 'scc' is unknown \(known: akiec, bcc, bkl, df, mel, nv, vasc\)"),
        ("dx", "", "dx '' is unknown"),
        ("lesion_id", "", "lesion_id is empty"),
        ("age", "old", "age 'old' is not a number"),
        ("age", "nan", "age 'nan' is not a number"),
        ("age", "-5", "age '-5' is not a number"),
        ("image_id", "ISIC.1", "image_id 'ISIC.1'.*first dot"),
        ("image_id", "../ISIC_1", "image_id"),
        ("image_id", "", "image_id ''"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(raw, column, value, text):
    source = rewrite(raw, lambda table: table[5].update({column: value}))
    found = [r for r in source.rejected if re.search(text, r.reason)]
    assert [r.file for r in found] == [METADATA] and "line 7" in found[0].reason
    assert "ISIC_0000005" not in {r.image_id for r in source.records}
    assert len(source.records) >= 58


def test_a_short_row(raw):
    path = raw / METADATA
    lines = path.read_text().splitlines()
    lines[3] = ",".join(lines[3].split(",")[:3])
    path.write_text("\n".join(lines))
    assert reasons(read_source(raw)) == {"ISIC_0000002": "line 4: the row ends before dx_type"}


def test_listed_but_missing(raw):
    (raw / PART / "ISIC_0000004.jpg").unlink()
    source = read_source(raw)
    assert reasons(source) == {"ISIC_0000004": f"is missing, and {METADATA} lists it"}
    assert len(source.records) == 59
    assert "ISIC_0000004.jpg: is missing" in str(source.error(source.rejected[0]))
    assert "--on-bad skip" in str(source.error(source.rejected[0]))


def test_a_table_and_a_folder_that_differ_in_case(raw):
    for number in (4, 5):
        (raw / PART / f"ISIC_000000{number}.jpg").rename(raw / PART / f"isic_000000{number}.JPG")
    (raw / PART / "Isic_0000005.jpg").write_bytes(jpeg())  # which of the two is meant?
    source = read_source(raw)
    assert next(r for r in source.records if r.image_id == "ISIC_0000004").file == f"{PART}/isic_0000004.JPG"
    assert reasons(source) == {
        "ISIC_0000005": f"is missing, and {METADATA} lists it",
        "isic_0000005": f"is not listed in {METADATA}",
        "Isic_0000005": f"is not listed in {METADATA}",
    }


@pytest.mark.parametrize("name", ["ISIC_9.jpg", "ISIC_9.JPG", "ISIC_9.png"])
def test_not_listed(raw, name):
    (raw / PART / name).write_bytes(jpeg())
    source = read_source(raw)
    assert [(r.file, r.reason) for r in source.rejected] == [(f"{PART}/{name}", f"is not listed in {METADATA}")]
    assert len(source.records) == 60


def test_a_row_that_stands_twice_is_packed_once_and_contradictions_not_at_all(raw):
    source = rewrite(raw, lambda table: table.append(dict(table[8])))
    assert reasons(source) == {"ISIC_0000008": "line 62: image_id ISIC_0000008 is on line 10 too"}
    assert Counter(r.image_id for r in source.records)["ISIC_0000008"] == 1
    source = rewrite(raw, lambda table: table.append(table[8] | {"sex": "male"}))
    assert len(source.rejected) == 2 and len(source.records) == 59


def test_a_lesion_with_two_diagnoses(raw):
    source = rewrite(raw, lambda table: table[1].update(dx="mel"))  # rows 0 and 1 show one lesion
    assert set(reasons(source)) == {"ISIC_0000000", "ISIC_0000001"}
    assert "lesion HAM_0000000 has the dx akiec and mel" in source.rejected[0].reason
    assert len(source.records) == 58


def test_an_image_in_both_folders(raw):
    other = raw / "HAM10000_images_part_2" / "ISIC_0000003.jpg"
    other.write_bytes((raw / PART / "ISIC_0000003.jpg").read_bytes())
    source = read_source(raw)
    assert len(source.records) == 60
    assert [r.reason for r in source.rejected] == [f"is a second copy; {PART}/ISIC_0000003.jpg is the same"]
    other.write_bytes(jpeg(99))
    source = read_source(raw)
    assert len(source.records) == 59 and {r.image_id for r in source.rejected} == {"ISIC_0000003"}
    assert not any("is missing" in r.reason for r in source.rejected)


def test_an_augmented_table_is_warned_of(raw):
    assert not rewrite(raw, lambda table: [row.update(lesion_id="HAM_A", dx="nv") for row in table[:50]]).warnings[1:]
    source = rewrite(raw, lambda table: [row.update(lesion_id="HAM_A", dx="nv") for row in table[:51]])
    assert "lesion HAM_A owns 51 images" in source.warnings[0] and "augmented" in source.warnings[0]


def test_absent_classes_are_warned_of(raw):
    source = rewrite(raw, lambda table: [row.update(dx="nv") for row in table])
    assert "no image of akiec, bcc, bkl, df, mel, vasc" in source.warnings[0]


def test_nothing_left(raw):
    with pytest.raises(DataError, match=r"lists no image that can be packed \(first: line 2: dx 'x' is unknown"):
        rewrite(raw, lambda table: [row.update(dx="x") for row in table])


def test_quarantine_lists_everything(raw):
    (raw / PART / "ISIC_0000004.jpg").unlink()
    source = rewrite(raw, lambda table: table[5].update(dx='a "quoted", one'))
    listed = list(csv.DictReader(io.StringIO(quarantine_csv(source.rejected).decode())))
    assert [(r["image_id"], r["file"], r["reason"]) for r in listed] == [
        (r.image_id, r.file, r.reason) for r in source.rejected
    ]
    assert len(listed) == 2


def test_quarantine_lists_a_file_whose_name_is_no_utf8(raw):
    (raw / PART / os.fsdecode(b"caf\xe9.jpg")).write_bytes(jpeg())
    (line,) = list(csv.DictReader(io.StringIO(quarantine_csv(read_source(raw).rejected).decode())))
    assert line["file"] == f"{PART}/caf\\udce9.jpg" and "is not listed" in line["reason"]


def test_images_of_one_lesion_under_two_names_are_joined(tmp_path):
    raw, table = tmp_path / "raw", rows(60)
    # 33421 and 32634 are views of the lesions of 33481 and 33556; the third lesion has a further view
    ids = ["ISIC_0033481", "ISIC_0033421", "ISIC_0033556", "ISIC_0032634", "ISIC_0000004"]
    write_raw(raw)
    for number, image_id in enumerate(ids):
        (raw / PART / f"{table[number]['image_id']}.jpg").rename(raw / PART / f"{image_id}.jpg")
        table[number] |= {"image_id": image_id, "lesion_id": f"HAM_{number}", "dx": "nv"}
    table[4]["lesion_id"] = "HAM_3"
    write_table(raw / METADATA, table)
    source = read_source(raw)
    found = {r.image_id: r.lesion_id for r in source.records}
    assert [found[i] for i in ids] == ["HAM_0", "HAM_0", "HAM_2", "HAM_2", "HAM_2"]
    assert source.about["joined_lesions"] == 2 and len(set(found.values())) == len({r["lesion_id"] for r in table}) - 2


def test_the_known_pairs_are_those_of_the_published_list(real_images):
    published = real_images.parent / "tables" / "dermamnist" / "newly_discovered_duplicates.csv"
    if not published.is_file():
        pytest.skip("the published list is not here")
    with published.open() as file:
        expected = [(row["from_img"], row["to_img"]) for row in csv.DictReader(file)]
    pairs = [pair.split("+") for pair in SAME_LESION.split()]
    assert [tuple(f"ISIC_{int(number):07d}.jpg" for number in pair) for pair in pairs] == expected


def test_the_official_metadata(real_images):
    source = read_source(real_images / "originals")
    assert not source.rejected and not source.warnings
    assert Counter(r.dx for r in source.records) == dict(akiec=67, df=62, vasc=62, nv=55, mel=33, bkl=18, bcc=15)
