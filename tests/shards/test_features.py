"""The feature table: every test it names exists; and the features that no other test shows by themselves."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from shards.loader import Loader
from shards.shardset import ShardSet

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features.md"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))
    if page == PAGE:
        assert len(named) >= 10
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{page.name} names {file}::{name}"


def test_the_table_is_whole_and_every_link_has_its_address():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, body = rows[0], rows[1:]
    assert [row[0] for row in body] == [
        "random access",
        "mid-epoch resume in O(1)",
        "world size may change",
        "deterministic augmentation",
        "checksums",
        "decode at crop",
        "mixed raw/JPEG",
        "readable with plain tar",
        "metadata index",
        "fractions without repacking",
    ]
    assert all(len(row) == len(header) + 1 for row in body)  # the header's first cell is empty and was stripped
    for row in body:
        assert "tests/" in row[1]
        assert all("][" in cell or cell.startswith("not documented") for cell in row[2:])
    used = set(re.findall(r"\]\[([\w-]+)\]", text))
    given = re.findall(r"^\[([\w-]+)\]: https://\S+$", text, flags=re.M)
    assert used == set(given) and len(given) == len(set(given))


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
def test_samples_are_read_by_number_in_any_order(shard_sets, kind):
    data = shard_sets[kind]
    in_order = [bytes(data.read(sample)) for sample in range(len(data))]
    for sample in np.random.default_rng(0).permutation(len(data)).tolist():
        assert bytes(data.read(sample)) == in_order[sample]
    assert len(set(in_order)) == len(data)


def test_resuming_reads_nothing_of_what_was_seen(tiny_shards):
    """The engine is asked for the remaining batches alone, whatever the position; the state's size does not grow."""
    selection = ShardSet(tiny_shards).select("train")
    whole = [b.samples.tolist() for b in Loader(selection, batch_size=8, resolution=32, seed=3)]
    sizes = set()
    for stop in range(1, len(whole)):
        loader = Loader(selection, batch_size=8, resolution=32, seed=3)
        running = iter(loader)
        for _ in range(stop):
            next(running)
        state = loader.state_dict()
        running.close()
        sizes.add(len(state))
        resumed, asked = Loader(selection, batch_size=8, resolution=32, seed=3), []
        run = resumed._engine.run

        def recorded(work, resolution, run=run, asked=asked):
            return run((asked.append(item.samples.tolist()) or item for item in work), resolution)

        resumed._engine.run = recorded
        resumed.load_state_dict(state)
        assert [b.samples.tolist() for b in resumed] == whole[stop:]
        ahead = len(asked) - len(whole[stop:])  # of the next epoch, under way already
        assert asked[: len(whole[stop:])] == whole[stop:] and 0 <= ahead <= 3
    assert len(sizes) == 1
