"""Tables with the quirks of published and home-made files, each read right or refused in one line."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.tables import SURPLUS, Table, image_key
from shards.common.errors import DataError

PLAIN = [{"image": "A_1", "dx": "mel"}, {"image": "A_2", "dx": "nv"}]


def rows(path, images=()):
    return [row for _, row in Table(path, "another", images)]


@pytest.mark.parametrize(
    "content",
    [
        "image,dx\nA_1,mel\nA_2,nv\n",
        "image,dx\r\nA_1,mel\r\nA_2,nv",
        "image,dx\r\r\nA_1,mel\r\r\nA_2,nv\r\r\n",
        "image,dx\rA_1,mel\rA_2,nv\r",
        "\ufeffimage,dx\nA_1,mel\nA_2,nv\n",
        "image;dx\nA_1;mel\nA_2;nv\n",
        "image\tdx\nA_1\tmel\nA_2\tnv\n",
        "image|dx\nA_1|mel\nA_2|nv\n",
        "image  dx\nA_1 mel\nA_2  nv\n",
        "image, dx\nA_1, mel\nA_2, nv\n",
        '"image","dx"\n"A_1",  "mel"\nA_2,nv\n',
        "\n image,dx\n\nA_1,mel\nimage,dx\nA_2,nv\n\n",
    ],
)
def test_separators_line_ends_blanks_and_repeated_headers_make_no_difference(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode())
    assert rows(path) == PLAIN
    path.write_bytes(content.removeprefix("\ufeff").encode("utf-16"))
    assert rows(path) == PLAIN


def test_quoted_separators_and_line_feeds_stay(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('image,dx\nA_1,"carcinoma, ""in situ""\nleft"\n', encoding="utf-8")
    assert rows(path) == [{"image": "A_1", "dx": 'carcinoma, "in situ"\nleft'}]


def test_a_first_line_that_names_an_image_is_no_header_and_nameless_columns_have_numbers(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("A_1,mel\nA_2,nv\n")
    assert rows(path, {"a_1"}) == [{"1": "A_1", "2": "mel"}, {"1": "A_2", "2": "nv"}]
    path.write_text("x/A_1.JPG mel\nx/A_2.JPG nv\n")
    assert rows(path)[1] == {"1": "x/A_2.JPG", "2": "nv"}
    path.write_text(",image,dx,dx\n0,A_1,mel,bkl\n")
    assert rows(path) == [{"1": "0", "image": "A_1", "dx": "mel", "4": "bkl"}]


def test_short_and_long_rows_are_seen_with_their_lines(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("image,dx\nA_1\nA_2,nv,,\nA_3,nv,left, arm\n")
    assert list(Table(path, "another")) == [
        (2, {"image": "A_1"}),
        (3, {"image": "A_2", "dx": "nv"}),
        (4, {"image": "A_3", "dx": "nv", SURPLUS: "left,arm"}),
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty; use another"),
        (b"\n \n", "is empty"),
        (b";\n ;", "is empty"),
        (b"image,dx\nA_1,na\xefve\n", "line 2 is not UTF-8 text; save it as UTF-8"),
        (b'image,dx\nA_1,nv\n"A_2,nv\nA_3,nv\n', "row that begins in line 3 cannot be read .*; check its quotes"),
        ("image,dx\nA_1,nv\n".encode("utf-16-le"), "line 1 holds a zero byte, so it is no text; save it as"),
        (b"PK\3\4\n\0\0\0", "line 2 holds a zero byte"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, content, text):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=text) as caught:
        list(Table(path, "another"))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cell", ["ISIC_1", "isic_1", "ISIC_1.jpg", "ISIC_1.PNG", "/data/x/ISIC_1.jpg", r"C:\Users\me\train\ISIC_1.JPEG"]
)
def test_a_cell_names_an_image_with_or_without_folder_and_ending(cell):
    assert image_key(cell) == "isic_1"
    assert image_key("nv (1).jpg") == "nv (1)" and image_key("ISIC_1.5") == "isic_1.5"


TEXT = st.text(st.characters(exclude_categories=["C", "Zs", "Zl", "Zp"]), min_size=1, max_size=8)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6), st.sampled_from(",;\t|"))
def test_any_table_equals_pandas(tmp_path_factory, values, separator):
    path = tmp_path_factory.mktemp("tables") / "table.csv"
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("one", "two", "three"), *values])
    path.write_bytes(text.getvalue().encode())
    expected = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, engine="python")
    header = ("one", "two", "three")
    assert [tuple(row.values()) for row in rows(path) if tuple(row.values()) != header] == [
        row for row in expected.itertuples(index=False, name=None) if row != header
    ]
