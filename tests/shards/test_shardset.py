"""The format on disk: deterministic, atomic, read by other people's tools, and every damage is one clear line."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.__main__ import main
from shards.common.errors import DataError, UsageError
from shards.format import AGAIN, HAM10000, INDEX_TYPES, EncodeSpec, Manifest
from shards.shardset import ShardSet
from shards.writer import PackedSample, ShardSetWriter, check_image_id
from tests.conftest import little_metadata, write_set


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
def test_plain_tar_reads_every_sample(shard_sets, kind):
    data = shard_sets[kind]
    members = {}
    for info in data.manifest.shards:
        with tarfile.open(data.path / info.file) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                members[member.name] = tar.extractfile(member).read()
    assert len(members) == 3 * len(data)
    for sample, image_id in enumerate(data.column("image_id")):
        raw = data.column("encoding")[sample] == "raw"
        payload = members[f"{image_id}.{'npy' if raw else 'jpg'}"]
        assert payload == bytes(data.read(sample))
        assert int(members[f"{image_id}.cls"]) == data.column("label")[sample]
        record = json.loads(members[f"{image_id}.json"])
        assert record["image_id"] == image_id and record["dx"] == HAM10000.names[record["label"]]
        if raw:
            assert np.array_equal(np.load(io.BytesIO(payload)), data.pixels(sample))


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
def test_samples_are_read_by_number_in_any_order(shard_sets, kind):
    data = shard_sets[kind]
    in_order = [bytes(data.read(sample)) for sample in range(len(data))]
    for sample in np.random.default_rng(0).permutation(len(data)).tolist():
        assert bytes(data.read(sample)) == in_order[sample]
    assert len(set(in_order)) == len(data)


def test_webdataset_reads_our_tars(shard_sets):
    import webdataset as wds

    for kind in ("jpg", "mixed"):
        data = shard_sets[kind]
        names = [str(data.path / info.file) for info in data.manifest.shards]
        found = {}
        for sample in wds.WebDataset(names, shardshuffle=False):
            payload = sample.get("jpg") or sample["npy"]
            found[sample["__key__"]] = (payload, int(sample["cls"]))
        assert found == {
            image_id: (bytes(data.read(i)), data.column("label")[i])
            for i, image_id in enumerate(data.column("image_id"))
        }


def test_dalis_own_reader_reads_our_tars_by_our_index(shard_sets):
    dali = pytest.importorskip("nvidia.dali")
    data = shard_sets["jpg"]
    names = [data.path / info.file for info in data.manifest.shards]

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        jpg, label = dali.fn.readers.webdataset(
            paths=[str(n) for n in names], index_paths=[str(n.with_suffix(".idx")) for n in names], ext=["jpg", "cls"]
        )
        return jpg, label

    pipeline = graph()
    pipeline.build()
    for sample in range(len(data)):
        payload, label = pipeline.run()
        assert bytes(payload.at(0)) == bytes(data.read(sample))
        assert int(bytes(label.at(0))) == data.column("label")[sample]


def test_the_index_has_the_columns_of_the_format(tiny_shards):
    data = ShardSet(tiny_shards)
    found = [(field.name, str(field.type).replace("float", "float32")) for field in data.table.schema]
    assert np.array_equal(data.column("group"), data.column("lesion_id"))
    assert found == list(INDEX_TYPES.items())
    assert np.isnan(data.column("age")[0]) and data.column("age")[1] == 21


def test_an_unfinished_packing_leaves_nothing_and_an_old_set_stays(tiny_shards, tmp_path):
    out = tmp_path / "set"
    sample = PackedSample(b"x" * 100, "jpg", 4, 4, "train", little_metadata("A", "nv"))
    with pytest.raises(RuntimeError), ShardSetWriter(out, EncodeSpec(), 1 << 20) as writer:
        writer.add(sample)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write_set(out)
    before = digest(out)
    with pytest.raises(RuntimeError), ShardSetWriter(out, EncodeSpec(), 1 << 20, overwrite=True) as writer:
        writer.add(sample)
        assert digest(out) == before
        raise RuntimeError
    assert digest(out) == before and [f.name for f in tmp_path.iterdir()] == ["set"]


def test_a_killed_packing_leaves_no_set_and_the_next_one_works(tmp_path):
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom shards.writer import *\nfrom shards.format import EncodeSpec\n"
        "writer = ShardSetWriter(Path(sys.argv[1]), EncodeSpec(), 1 << 20)\n"
        "print(sorted(p.name for p in Path(sys.argv[1]).parent.iterdir()))\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "set")], capture_output=True, text=True)
    assert done.returncode == -9
    with pytest.raises(DataError, match="no such folder"):
        ShardSet(tmp_path / "set")
    write_set(tmp_path / "set")
    assert [f.name for f in tmp_path.iterdir()] == ["set"]


def test_a_second_packer_is_refused(tmp_path):
    with (
        ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20),
        pytest.raises(DataError, match="another process"),
    ):
        ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20)


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "a b", "ä", "a\n", "x" * 91])
def test_unusable_image_ids_are_refused(name):
    with pytest.raises(DataError, match="image_id"):
        check_image_id(name)


def test_shards_hold_one_split_and_respect_their_size(shard_sets):
    data = shard_sets["raw"]
    assert len(data.manifest.shards) > 3
    for number, info in enumerate(data.manifest.shards):
        rows = data.column("shard") == number
        assert set(data.column("split")[rows]) == {info.split} and rows.sum() == info.samples
        assert info.bytes <= (1 << 20) + 2048 == (1 << 20) + 4 * 512
        assert (data.path / info.file).stat().st_size == info.bytes


def damaged_manifest(change):
    def damage(folder: Path) -> None:
        file = folder / "manifest.json"
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "not a shard set"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged"),
        (lambda f: (f / "index.parquet").unlink(), "index.parquet: missing"),
        (lambda f: (f / "index.parquet").write_bytes(b"PAR1"), "not the index that the manifest names"),
        (lambda f: (f / "shard-00001.tar").unlink(), "shard-00001.tar: missing"),
        (lambda f: os.truncate(f / "shard-00000.tar", 1024), "1024 bytes, and the manifest says"),
        (
            damaged_manifest(lambda m: m.update(format_version=3)),
            "format version 3, and this release reads versions 1",
        ),
        (damaged_manifest(lambda m: m.pop("mean")), "no mean"),
        (damaged_manifest(lambda m: m["encode"].update(colour="no")), "damaged"),
    ],
)
def test_damaged_sets_are_refused_by_name(tmp_path, damage, words):
    folder = write_set(tmp_path / "set", images=40)
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value)


def test_a_wrong_idx_is_found(tmp_path):
    folder = write_set(tmp_path / "set", images=40)
    idx = folder / "shard-00000.idx"
    whole = idx.read_bytes()
    damaged = [f"{idx.name} is damaged: it is not the index of this tar; {AGAIN}"]
    with ShardSet(folder) as data:
        for byte in {*range(0, len(whole), 37), *range(12), len(whole) - 1}:  # the header, every kind of field, the end
            idx.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
            assert next(data.verify()) == ("shard-00000.tar", damaged), byte
        for wrong in (b"", b"v1.2 0\n", whole[:-1], whole + b"\n"):
            idx.write_bytes(wrong)
            assert next(data.verify()) == ("shard-00000.tar", damaged), wrong
        idx.unlink()
        assert next(data.verify()) == ("shard-00000.tar", [f"{idx.name} is missing; {AGAIN}"])
        idx.write_bytes(whole)
        assert not any(problems for _, problems in data.verify())


def test_selections(tiny_shards):
    data = ShardSet(tiny_shards)
    assert sum(len(data.select(split)) for split in ("train", "val", "test")) == len(data)
    half = data.select("train", fraction=0.5, subset_seed=1)
    assert set(half.samples) < set(data.select("train").samples)
    assert (np.diff(half.samples) > 0).all() and half.labels.dtype == np.int64
    assert set(half.image_ids) == set(data.column("image_id")[half.samples])
    for wrong, words in (
        ({"split": "dev"}, "train, val, test"),
        ({"fraction": 0}, "outside"),
        ({"split": "val", "fraction": 0.5}, "only the training split"),
    ):
        with pytest.raises(UsageError, match=words):
            data.select(**wrong)


def test_the_manifest_survives_a_round_trip(tiny_shards):
    file = tiny_shards / "manifest.json"
    assert Manifest.from_file(file).to_json() == file.read_text()


def test_the_format_page_lists_the_real_columns():
    text = (Path(__file__).parents[2] / "shards" / "FORMAT.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (\w+)", text.split("## index.parquet")[1], re.M)
    assert dict(listed[: len(INDEX_TYPES)]) == INDEX_TYPES


def test_encode_settings_outside_their_range_are_refused():
    wrong = {"write_mode": "png", "jpeg_quality": 0, "max_resolution": 4, "compress_probability": 2}
    for name, value in (wrong | {"smart_threshold": -1, "subsampling": "411"}).items():
        with pytest.raises(UsageError, match=f"^{name.replace('_', ' ')} "):
            EncodeSpec(**{name: value})


def test_info_and_verify_answer(tmp_path, command):
    folder = write_set(tmp_path / "set", images=40)
    code, out, _ = command(main, "info", folder)
    assert code == 0 and "40 samples" in out and "licence" in out
    assert command(main, "verify", folder)[1] == f"{folder}: 3 shards and 40 samples are whole\n"
    for name, byte, bit, words in (
        ("shard-00000.idx", 20, 128, "shard-00000.idx is damaged: it is not the index of this tar"),
        ("shard-00000.tar", 900, 1, "its SHA-256 is not the manifest's"),
    ):
        content = bytearray((folder / name).read_bytes())
        content[byte] ^= bit
        (folder / name).write_bytes(content)
        code, _, err = command(main, "verify", folder)
        assert code == 1 and f"shard-00000.tar: {words}; {AGAIN}\n" in err
    code, _, err = command(main, "info", tmp_path / "none")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert command(main, "inform")[0] == 2


def test_show_draws_a_batch(tiny_shards, tmp_path, command):
    import cv2

    show = ("show", tiny_shards, "--out", tmp_path / "b.png", "--images")
    assert command(main, *show, 10, "--resolution", 48)[::2] == (0, "")
    sheet = cv2.imread(str(tmp_path / "b.png"))
    assert sheet is not None and sheet.shape == (96, 8 * 48, 3)
    assert sheet[:48].std() > 10 and not sheet[48:, 2 * 48 :].any()
    code, _, err = command(main, *show, 1000)
    assert code == 2 and "larger than the training set" in err
