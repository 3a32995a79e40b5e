"""Maps of labels: those of the package, and files of users."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from shards.common.errors import DataError, UsageError
from shards.format import HAM10000, Classes
from shards.labelmap import _shipped, read_map

MALIGNANT = Classes(("benign", "malignant"), {}, {"malignant": ("malignant",)})


@pytest.fixture(scope="module")
def tables(real_images: Path) -> Path:
    """Real tables of other sets, beside the real images."""
    folder = real_images.parent / "tables"
    if not folder.is_dir():
        pytest.skip("there are no tables of other sets beside HAM10000_SAMPLE")
    return folder


@pytest.mark.parametrize("name", _shipped())
def test_every_map_of_the_package_leads_to_one_of_two_vocabularies(name):
    labels = read_map(name)
    assert labels.classes == {"ham10000": HAM10000, "malignant": MALIGNANT}[name.rpartition("-")[2]]
    assert {to for to in labels.rows.values() if to} <= set(labels.classes.names)
    text = _shipped()[name]
    assert text.startswith("# ") and "from,to,reason" in text
    if name.endswith("-ham10000"):
        other = read_map(name.replace("-ham10000", "-malignant"))
        both = [label for label, to in labels.rows.items() if to and label in other.rows]
        kinds = {(labels.rows[label], other.rows[label]) for label in both}
        firm = {
            "bcc": "malignant",
            "mel": "malignant",
            "bkl": "benign",
            "df": "benign",
            "nv": "benign",
            "vasc": "benign",
        }
        assert all(firm.get(one, two) == two for one, two in kinds)  # akiec is one or the other by the set


def test_the_maps_know_every_label_of_the_real_tables(tables):
    def column(file: str, name: str) -> Counter[str]:
        with (tables / file).open(encoding="utf-8-sig") as text:
            return Counter(row[name] for row in csv.DictReader(text))

    def one_hot(file: str) -> set[str]:
        with (tables / file).open(encoding="utf-8-sig") as text:
            return set(next(csv.reader(text))[1:])

    found = {
        "isic2019": [one_hot("isic2019/ISIC_2019_Training_GroundTruth.csv")],
        "milk10k": [one_hot("milk10k/MILK10k_Training_GroundTruth.csv")],
        "pad-ufes-20": [column("pad_ufes_20/metadata.csv", "diagnostic")],
        "isic2020": [column("isic2020/ISIC_2020_Training_GroundTruth_v2.csv", "diagnosis")],
        "isic2024": [
            column("isic2024/ISIC_2024_Training_Supplement_head20000_plus_malignant.csv", "iddx_full"),
            column("isic2024/ISIC_2024_Training_Supplement_head20000_plus_malignant.csv", "iddx_1"),
        ],
    }
    for name, all_labels in found.items():
        for labels in all_labels:
            for kind in ("ham10000", "malignant"):
                mapped, without = read_map(f"{name}-{kind}").split(labels)
                assert (set(mapped) | set(without) == set(labels) and mapped) or kind == "ham10000"
    mapped, _ = read_map("isic2020-malignant").split(found["isic2020"][0])
    assert sum(n for label, n in found["isic2020"][0].items() if mapped[label] == "malignant") == 584
    mapped, _ = read_map("isic2024-malignant").split(found["isic2024"][0])
    assert sum(n for label, n in found["isic2024"][0].items() if mapped[label] == "malignant") == 393
    mapped, _ = read_map("isic2024-ham10000").split(found["isic2024"][0])
    assert mapped["Malignant::Malignant epidermal proliferations::Squamous cell carcinoma in situ"] == "akiec"


def test_a_file_of_the_user_may_have_other_columns_and_comments(tmp_path):
    file = tmp_path / "map.csv"
    file.write_text('\ufeff# ours\nwhy,from,to\n"old, scanned",A,one\n,B::C, two\n,D,\n')
    labels = read_map(str(file))
    assert labels.rows == {"A": "one", "B::C": "two", "D": ""}
    assert labels.classes.names == ("one", "two")
    assert labels.split(["a", "B::C", "X::d"]) == ({"a": "one", "B::C": "two"}, ["X::d"])
    file.write_text("# ours, not theirs\r\nfrom;to;why\r\nA;one;\r\nB::C;two;so, so\r\nD;;\r\n")
    assert read_map(str(file)).rows == labels.rows
    with pytest.raises(UsageError, match=r"says nothing about the label 'E' \(it names A, B::C, D\); add a row"):
        labels.target("E")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("from\nA\n", DataError, "has the columns from; from and to are needed"),
        ("from,to\nA,x\nA,y\n", DataError, "line 3: 'A' is mapped twice"),
        ("from,to\n,y\n", DataError, "line 2: from is empty"),
        ("to,from\nx\n", DataError, "line 2: from is empty"),
        ("from,to\n", DataError, "holds no row"),
        ("", DataError, "holds no row"),
        ('from,to\n"A,x\n', DataError, "cannot be read"),
        ("from,to\nA,x\n", DataError, "1 classes, and 2 to"),
        (None, UsageError, "neither a file nor one of the maps that are here: bcn20000-ham10000, "),
    ],
)
def test_a_map_that_is_none_is_refused_in_one_line(text, error, message, tmp_path):
    file = tmp_path / "map.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=message):
        read_map(str(file))
