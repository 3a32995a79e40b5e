"""Tables in files without names, and texts found by hashes, against Python's own containers."""

import errno
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from preprocess import rows
from preprocess.rows import Keyed, Spool, Texts, mixed, taken
from shards.common.cli import system_error

SOME = np.random.default_rng(0)


@pytest.mark.parametrize("size", [0, 1, 2_048, 5_000])
def test_a_table_comes_back_as_it_was_and_in_any_order(size):
    spool = Spool(pa.schema({"name": pa.string(), "number": pa.int64()}))
    for number in range(size):
        spool.add((f"row {number}" if number % 3 else None, number))
    table = spool.table()
    assert table["number"].to_pylist() == list(range(size))
    assert table["name"].null_count == len(range(0, size, 3))
    order = SOME.integers(0, max(size, 1), 500 if size else 0)
    assert taken(table, order).to_pylist() == table.take(pa.array(order)).to_pylist()


@pytest.mark.parametrize("texts", [[], ["a"], [f"text {number}" for number in SOME.integers(0, 300, 500)]])
def test_texts_are_found_and_counted_as_a_list_does(texts):
    found, counts = Texts(texts), Counter(texts)
    assert found.repeated() == [number for number, text in enumerate(texts) if counts[text] > 1]
    for text in {*texts[:50], "not there"}:
        assert found.numbers(text) == [number for number, other in enumerate(texts) if other == text]
        assert (text in found) == (text in texts)


def test_paths_are_found_by_their_key_even_if_hashes_collide(monkeypatch):
    paths = [f"folder {number}/{number % 7}.jpg" for number in range(50)] + ["not utf-8 \udcff/8.jpg"]
    by_name = {name: [path for path in paths if path.endswith(f"/{name}")] for name in ("3.jpg", "8.jpg", "9.jpg")}
    for collide in (False, True):
        if collide:
            monkeypatch.setattr(rows, "hash_of", lambda text: 5)
        found = Keyed(paths, lambda path: path.rpartition("/")[2])
        assert list(found) == paths and found[-1 % len(found)] == paths[-1]
        assert {name: found.named(name) for name in by_name} == by_name


def test_groups_of_several_values_are_those_that_sets_have():
    groups, values = SOME.integers(0, 200, 400).astype(np.uint64), SOME.integers(0, 2, 400)
    of: dict[int, set[int]] = {}
    for group, value in zip(groups.tolist(), values.tolist(), strict=True):
        of.setdefault(group, set()).add(value)
    assert mixed(groups, values).tolist() == [len(of[group]) > 1 for group in groups.tolist()]


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda dir: Path("/dev/full").open("w+b", buffering=0))  # noqa: SIM115
    with pytest.raises(OSError, match=str(errno.ENOSPC)) as caught:
        Spool(pa.schema({"name": pa.string()}), tmp_path).table()
    assert system_error(caught.value) == f"the disk is full while writing {tmp_path}: free some space and start again"
