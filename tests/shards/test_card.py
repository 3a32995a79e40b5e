"""The card and the Croissant metadata of a set, read by the libraries that they are for."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from shards.__main__ import main
from shards.card import cards
from shards.format import Classes, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.shardset import ShardSet
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, picture, write_set


@pytest.fixture(scope="module", params=["jpg", "raw", "mixed"])
def described(request, tmp_path_factory) -> Path:
    """A set with both files."""
    folder = write_set(tmp_path_factory.mktemp("described") / "set", request.param)
    with ShardSet(folder) as data:
        for name, content in cards(data).items():
            (folder / name).write_bytes(content)
    return folder


def test_croissant_is_valid_and_its_records_are_those_of_the_index(described, caplog, tmp_path, monkeypatch):
    mlc = pytest.importorskip("mlcroissant")
    from mlcroissant._src.operation_graph.operations import extract

    monkeypatch.setattr(extract, "EXTRACT_PATH", extract.epath.Path(tmp_path))  # it knows tars by their name alone
    with caplog.at_level(logging.WARNING):
        dataset = mlc.Dataset(jsonld=described / "croissant.json")
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert all("datePublished" in warning for warning in issues.warnings)  # a set does not know the day
    assert dataset.metadata.ctx.is_v1_1() and dataset.metadata.cite_as == "none"
    with ShardSet(described) as data:
        records = list(dataset.records("samples"))
        for name in ("image_id", "dx", "split"):
            assert [record[f"samples/{name}"].decode() for record in records] == data.column(name).tolist()
        for name in ("label", "offset", "xxh3"):
            assert [record[f"samples/{name}"] for record in records] == data.column(name).tolist()
        assert [one["classes/name"] for one in dataset.records("classes")] == list(data.manifest.classes.names)
        assert [one["splits/name"] for one in dataset.records("splits")] == ["train", "val", "test"]
        rows = {name: row for row, name in enumerate(data.column("image_id").tolist())}
        jpegs = [row for row in range(len(data)) if data.column("encoding")[row] == "jpg"]
        images = list(dataset.records("images-jpg")) if jpegs else []
        assert sorted(rows[one["images-jpg/image_id"].decode()] for one in images) == jpegs
        for one in images[:5]:
            row = rows[one["images-jpg/image_id"].decode()]
            assert one["images-jpg/image"].size == (data.column("width")[row], data.column("height")[row])


def test_the_front_matter_of_the_card_names_licence_and_files(described):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.DatasetCard.load(described / "README.md")
    with ShardSet(described) as data:
        assert card.data.license == "other" and card.data.license_name == "none"
        assert all(f"| {name} |" in card.text for name in (*data.table.column_names, *data.manifest.classes.names))
        if len(set(data.column("encoding"))) > 1:  # `datasets` does not read them
            assert "configs" not in card.data.to_dict() and "load_dataset" not in card.text
            return
        listed = {one["split"]: one["path"] for one in card.data.configs[0]["data_files"]}
        for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
            assert listed[name] == [shard.file for shard in data.manifest.shards if shard.split == split]


@pytest.mark.parametrize("labels", [True, False])
def test_the_code_of_the_card_loads_the_set(labels, tmp_path):
    if labels:
        write_set(tmp_path / "set", images=60)
    else:
        with ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20, classes=Classes(())) as writer:
            empty = dict.fromkeys(("lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset"))
            for number in range(9):
                image = encode_jpeg(picture(np.random.default_rng(number), 0, 50, 60))
                writer.add(PackedSample(image, "jpg", 50, 60, "test", {"image_id": f"A{number}", **empty}))
            finish_set(writer)
    with ShardSet(tmp_path / "set") as data:
        text = cards(data)["README.md"].decode()
    code = text.partition("```python\n")[2].partition("```")[0].partition("from shards")
    found: dict = {}
    exec("".join(code[1:]).replace("folder or address", str(tmp_path / "set")).replace("256", "8"), found)
    assert len(next(iter(found["loader"])).labels) == 8 and found["loader"].train == labels
    found["loader"].close()


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("Apache-2.0", "apache-2.0"),
        ("CC0 1.0", "cc0-1.0"),
    ],
)
def test_licences_have_the_names_of_the_hub(text, hub):
    from shards.card import _licence

    assert _licence(text)[0] == hub and _licence(text)[1].startswith("https://")


def test_the_tars_load_as_webdataset_with_the_splits_of_the_card(described, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with ShardSet(described) as data:
        if len(set(data.column("encoding"))) > 1:
            pytest.skip("`datasets` wants the same members in each sample")
        files = {
            split: [str(described / shard.file) for shard in data.manifest.shards if shard.split == split]
            for split in ("train", "test")
        }
        loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path), streaming=True)
        for split in files:
            selection, samples = data.select(split), list(loaded[split])
            assert [one["__key__"] for one in samples] == selection.image_ids.tolist()
            assert [one["json"]["label"] for one in samples] == selection.labels.tolist()
            assert [int(one["cls"]) for one in samples] == selection.labels.tolist()


def test_the_command_writes_both_and_replaces_only_if_asked(tmp_path, command):
    folder = write_set(tmp_path / "set", images=60)
    code, out, _ = command(main, "card", folder)
    assert code == 0 and out == f"{folder}: README.md and croissant.json written\n"
    assert command(main, "card", folder)[0] == 0
    assert command(main, "verify", folder)[0] == 0
    (folder / "README.md").write_text("mine")
    code, _, errors = command(main, "card", folder)
    assert code == 1 and "README.md: says something else; add --overwrite" in errors
    assert command(main, "card", folder, "--overwrite")[0] == 0
    assert json.loads((folder / "croissant.json").read_text())["conformsTo"].endswith("croissant/1.1")
