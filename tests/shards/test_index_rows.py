"""A set whose hashes are right and whose index lies: every lie is found when the set is opened, and named."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.common.errors import DataError
from shards.format import INDEX
from shards.shardset import ShardSet
from tests.conftest import write_set
from tests.support.parity import with_cells, write_index


def rewritten(source: Path, out: Path, index: pa.Table | bytes) -> Path:
    """A copy of a set with another index."""
    shutil.copytree(source, out)
    write_index(out, index)
    return out


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "raw", "raw", images=30)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("shard", 99, "its shard is none of"),
        ("offset", 2**63, "ends behind its shard"),
        ("offset", 2**64 - 1, "ends behind its shard"),
        ("length", 2**32 - 1, "ends behind its shard"),
        ("length", 0, "its payload is empty"),
        ("height", 0, "height or width is 0"),
        ("height", 65_535, "is shorter than its image"),
        ("label", 6, "its label is not"),
        ("xxh3", None, "column 'xxh3' has 1 empty cells"),
        ("image_id", None, "column 'image_id' has 1 empty cells"),
        ("encoding", "png", "says 'png', which is none of jpg, raw"),
        ("split", "holdout", "says 'holdout'"),
        ("dx", "wart", "says 'wart'"),
    ],
)
def test_a_row_that_lies_is_named_when_the_set_is_opened(raw_set, tmp_path, name, value, what):
    with pytest.raises(DataError, match=what) as error:
        ShardSet(rewritten(raw_set, tmp_path / "set", with_cells(pq.read_table(raw_set / INDEX), name, value)))
    assert "index.parquet" in str(error.value) and "pack it again" in str(error.value)
    if "its " in what or "ends" in what or "height or" in what:
        assert "IMG_00003" in str(error.value)


def test_an_image_of_more_than_100_megapixels_is_refused(tiny_shards, tmp_path):
    table = with_cells(with_cells(pq.read_table(tiny_shards / INDEX), "height", 65_500), "width", 65_500)
    with pytest.raises(DataError, match="IMG_00003: its image has more than 100 megapixels"):
        ShardSet(rewritten(tiny_shards, tmp_path / "set", table))


def test_a_missing_column_and_a_column_of_another_type_are_named(raw_set, tmp_path):
    table = pq.read_table(raw_set / INDEX)
    with pytest.raises(DataError, match="has no column 'offset'"):
        ShardSet(rewritten(raw_set, tmp_path / "a", table.drop_columns(["offset"])))
    place = table.column_names.index("width")
    wide = table.set_column(place, "width", table["width"].cast(pa.int64()))
    with pytest.raises(DataError, match="its column 'width' is int64, and not uint16"):
        ShardSet(rewritten(raw_set, tmp_path / "b", wide))
    with pytest.raises(DataError, match=r"index\.parquet: damaged"):
        ShardSet(rewritten(raw_set, tmp_path / "c", b"PAR1 and no more"))
