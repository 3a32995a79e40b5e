"""`python -m preprocess.shard`, end to end: one set of bytes, nothing half-written, every fault in one line."""

import csv
import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from preprocess import shard
from preprocess.ham10000 import read_source
from preprocess.packing import Settings, pack
from shards import Loader, ShardSet
from shards.common.errors import DataError
from shards.encode import decode_strictly, decode_upright, shrink
from shards.format import HAM10000, EncodeSpec
from tests.support.rawdata import jpeg, rows, write_raw, write_table

ROOT = Path(__file__).parents[2]
METADATA = "HAM10000_metadata.csv"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A whole raw folder of 150 small images. Read only."""
    return write_raw(tmp_path_factory.mktemp("source") / "raw", 150)


@pytest.fixture
def spoilt(tmp_path):
    """A raw folder of 60 images to be spoilt."""
    return write_raw(tmp_path / "raw")


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion", "smart"])
def test_runs_and_worker_counts_change_no_byte(raw, tmp_path, mode):
    spec = EncodeSpec(write_mode=mode, max_resolution=40, smart_threshold=100)
    sets = []
    for name, workers in (("a", 1), ("b", 2), ("c", 7)):
        pack(read_source(raw), tmp_path / name, Settings(encode=spec, workers=workers, shard_bytes=1 << 20))
        sets.append(digest(tmp_path / name))
    assert sets[0] == sets[1] == sets[2]


def test_order_of_the_rows_changes_no_shard(raw, tmp_path):
    shuffled = tmp_path / "raw"
    shuffled.mkdir()
    for part in raw.glob("HAM10000_images*"):
        (shuffled / part.name).symlink_to(part)
    write_table(shuffled / METADATA, rows(150)[::-1])
    pack(read_source(raw), tmp_path / "a", Settings())
    pack(read_source(shuffled), tmp_path / "b", Settings())
    a, b = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == {"manifest.json"}  # it holds the metadata's hash


def test_the_set_holds_the_source(raw, tmp_path):
    packed = pack(read_source(raw), tmp_path / "set", Settings(encode=EncodeSpec(write_mode="raw", max_resolution=40)))
    data = ShardSet(tmp_path / "set")
    table = {row["image_id"]: row for row in rows(150)}
    assert set(data.column("image_id")) == set(table)
    files = {file.stem: file for file in raw.glob("*/*.jpg")}
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for sample, image_id in enumerate(data.column("image_id")):
        pixels = shrink(decode_strictly(files[image_id].read_bytes()), 40)
        assert np.array_equal(data.pixels(sample), pixels) and pixels.shape == (30, 40, 3)
        assert data.column("dx")[sample] == table[image_id]["dx"]
        assert data.column("lesion_id")[sample] == table[image_id]["lesion_id"]
        if data.column("split")[sample] == "train":
            scaled = pixels.reshape(-1, 3) / 255
            total, squares, count = total + scaled.sum(0), squares + (scaled**2).sum(0), count + len(scaled)
    mean = total / count
    assert np.allclose(packed.manifest.mean, mean, atol=1e-9)
    assert np.allclose(packed.manifest.std, np.sqrt(squares / count - mean**2), atol=1e-9)
    assert packed.manifest.source["images"] == 150
    assert packed.manifest.source["lesions"] == len({row["lesion_id"] for row in table.values()})
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert str(raw) not in text and str(tmp_path) not in text
    assert set(packed.manifest.versions) >= {"numpy", "opencv", "simplejpeg", "pyarrow", "libjpeg-turbo", "dermscale"}


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_an_image_of_one_pixel_is_packed_and_loaded_in_its_colour(spoilt, tmp_path, mode):
    colours = {}
    for image_id, colour in (("ISIC_0000007", (200, 100, 50)), ("ISIC_0000020", (20, 40, 60))):
        pixel = np.full((1, 1, 3), colour, np.uint8)
        data = simplejpeg.encode_jpeg(pixel, quality=100, colorsubsampling="444")
        next(spoilt.rglob(f"{image_id}.jpg")).write_bytes(data)
        colours[image_id] = decode_strictly(data).reshape(3, 1).astype(int)
    pack(read_source(spoilt), tmp_path / "set", Settings(encode=EncodeSpec(write_mode=mode, max_resolution=40)))
    data = ShardSet(tmp_path / "set")
    seen = set()
    for split in ("train", "val", "test"):
        for train in (True, False):
            loader = Loader(data.select(split), batch_size=4, resolution=32, train=train, engine="native")
            for batch in loader:
                for image, sample in zip(batch.images[batch.mask], batch.samples[batch.mask], strict=True):
                    image_id = data.column("image_id")[int(sample)]
                    if image_id in colours:
                        far = np.abs(image.numpy().reshape(3, -1) - colours[image_id]).max()
                        assert far <= (0 if mode == "raw" else 6)
                        seen.add((image_id, train))
            loader.close()
    assert {image_id for image_id, train in seen if not train} == set(colours) and any(train for _, train in seen)


def test_lesions_stay_together_and_classes_mix(raw, tmp_path):
    pack(read_source(raw), tmp_path / "set", Settings(seed=3))
    data = ShardSet(tmp_path / "set")
    splits = list(data.column("split"))
    assert len(set(zip(data.column("lesion_id"), splits, strict=True))) == len(set(data.column("lesion_id")))
    assert splits == sorted(splits, key=["train", "val", "test"].index)
    train = [dx for dx, split in zip(data.column("dx"), splits, strict=True) if split == "train"]
    assert len(set(train[:30])) == 7
    pack(read_source(raw), tmp_path / "other", Settings(seed=4))
    assert list(ShardSet(tmp_path / "other").column("image_id")) != list(data.column("image_id"))


def test_the_table_and_the_summary(raw, tmp_path, command):
    code, out, err = command(shard.main, "--source", raw, "--out", tmp_path / "set", "--workers", 2)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first == "layout: HAM10000; 7 classes, groups by lesion_id"
    assert lines[0].split() == ["class", "train", "val", "test", "all"]
    table = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in lines[1:9]}
    assert list(table) == [*HAM10000.names, "all"]
    assert all(sum(row[:3]) == row[3] for row in table.values()) and table["all"][3] == 150
    assert table["all"] == np.sum([table[name] for name in HAM10000.names], axis=0).tolist()
    size = sum(file.stat().st_size for file in (tmp_path / "set").glob("*.tar"))
    assert re.fullmatch(rf"150 images packed in .*set, {size:,} bytes, [\d.]+ s, \d+ images/s", lines[9])


def test_an_old_set_is_kept_without_overwrite_and_until_the_new_one_is_whole(raw, tmp_path, command):
    out = tmp_path / "set"
    pack(read_source(raw), out, Settings(seed=1))
    before = digest(out)
    code, _, err = command(shard.main, "--source", raw, "--out", out)
    assert code == 1 and "already holds a shard set; add --overwrite" in err and err.count("\n") == 1
    broken = write_raw(tmp_path / "raw", 60)
    (broken / "HAM10000_images_part_1" / "ISIC_0000004.jpg").write_bytes(jpeg()[:-40])
    code, _, err = command(shard.main, "--source", broken, "--out", out, "--overwrite")
    assert code == 1 and digest(out) == before and [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []
    assert command(shard.main, "--source", raw, "--out", out, "--overwrite")[0] == 0
    assert digest(out) != before


def damage(folder: Path) -> dict[str, str]:
    """Spoil one image in each way; returns image_id → what the reason says."""
    images = folder / "HAM10000_images_part_1"
    good = jpeg(0, height=240, width=320)
    middle = len(good) // 2
    spoilt = {
        "ISIC_0000001": (good[: len(good) // 3], "is damaged"),
        "ISIC_0000002": (good[:-2], "is damaged"),
        "ISIC_0000003": (good[:-900] + bytes(900), "is damaged"),
        "ISIC_0000004": (good[:middle] + bytes(8192) + good[middle + 8192 :], "is damaged"),
        "ISIC_0000005": (b"", "is empty"),
        "ISIC_0000006": (b"<html>", "is not an image of a known format"),
    }
    for image_id, (data, _) in spoilt.items():
        (images / f"{image_id}.jpg").write_bytes(data)
    (images / "ISIC_0000007.jpg").unlink()
    (images / "extra.jpg").write_bytes(good)
    return {i: text for i, (_, text) in spoilt.items()} | {"ISIC_0000007": "is missing", "extra": "is not listed"}


def test_skip_packs_the_rest_and_lists_what_was_left_out(spoilt, tmp_path, command):
    expected = damage(spoilt)
    code, out, _ = command(
        shard.main, "--source", spoilt, "--out", tmp_path / "set", "--on-bad", "skip", "--workers", 3
    )
    assert code == 0 and "8 left out, listed with reasons in" in out and "53 images packed" in out
    listed = list(csv.DictReader((tmp_path / "set" / "quarantine.csv").open()))
    assert {row["image_id"] for row in listed} == set(expected)
    for row in listed:
        assert expected[row["image_id"]] in row["reason"] and row["file"].endswith(f"{row['image_id']}.jpg")
    data = ShardSet(tmp_path / "set")
    assert len(data) == 53 and not set(data.column("image_id")) & set(expected)
    assert data.manifest.source["quarantined"] == 8
    subprocess.run([sys.executable, "-m", "shards", "verify", str(tmp_path / "set")], check=True, cwd=ROOT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize(
    ("target", "reason"),
    [("ISIC_0000001.jpg", "Too many levels of symbolic links"), ("/proc/self/mem", "Input/output error")],
    ids=["a link to itself", "a damaged disk"],
)
def test_a_file_that_the_system_cannot_read_is_left_out(spoilt, tmp_path, command, target, reason):
    file = spoilt / "HAM10000_images_part_1" / "ISIC_0000001.jpg"
    file.unlink()
    file.symlink_to(target)  # the start of a process's memory answers as a damaged disk does
    arguments = ["--source", spoilt, "--out", tmp_path / "set"]
    code, _, err = command(shard.main, *arguments)
    assert code == 1 and f"ISIC_0000001.jpg: cannot be read ({reason})" in err and err.count("\n") == 1
    code, out, _ = command(shard.main, *arguments, "--on-bad", "skip")
    assert code == 0 and "59 images packed" in out
    listed = list(csv.DictReader((tmp_path / "set" / "quarantine.csv").open()))
    assert [(row["image_id"], row["reason"]) for row in listed] == [("ISIC_0000001", f"cannot be read ({reason})")]


@pytest.mark.parametrize("image_id", [f"ISIC_{n:07d}" for n in range(1, 8)] + ["extra"])
def test_stop_names_the_file_in_one_line_and_leaves_nothing(spoilt, tmp_path, command, image_id):
    good = {file.name: file.read_bytes() for file in spoilt.glob("*/*.jpg")}
    expected = damage(spoilt)
    for other in set(expected) - {image_id}:  # mend the others
        path = spoilt / "HAM10000_images_part_1" / f"{other}.jpg"
        path.unlink(missing_ok=True) if other == "extra" else path.write_bytes(good[path.name])
    code, out, err = command(shard.main, "--source", spoilt, "--out", tmp_path / "set")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert f"{image_id}.jpg: {expected[image_id]}" in err and "--on-bad skip" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--source", "absent"], 1, "no such folder; get HAM10000 with"),
        (["--split", "70/30"], 2, "give train/val/test as three whole numbers"),
        (["--split", "0/50/50"], 2, "train above 0"),
        (["--split", "-1/50/50"], 2, "train above 0"),
        (["--max-resolution", "8"], 2, "max resolution 8 px is outside 16 to 65535"),
        (["--shard-mb", "0"], 2, "--shard-mb 0: at least 1"),
        (["--workers", "0"], 2, "0 is not in the range x>=1"),
        (["--write-mode", "png"], 2, "'png' is not one of 'jpg', 'raw', 'proportion', 'smart'"),
        (["--test-source", "absent"], 1, "absent: no such folder"),
    ],
)
def test_wrong_usage_ends_in_one_line(raw, tmp_path, command, arguments, code, text):
    source = () if "--source" in arguments else ("--source", raw)
    got, out, err = command(shard.main, *source, "--out", tmp_path / "set", *arguments)
    assert (got, out) == (code, "") and text in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_copies_in_different_groups_are_listed_and_joined(tmp_path, command):
    """Images 0 and 2 are of different lesions and classes; 0 and 1 are views of one lesion."""
    folder = write_raw(tmp_path / "raw", size=(90, 120))
    parts = {path.stem: path for path in folder.rglob("*.jpg")}
    whole = decode_upright(parts["ISIC_0000000"].read_bytes())
    for number in (1, 2, 9):
        parts[f"ISIC_{number:07d}"].write_bytes(simplejpeg.encode_jpeg(whole, quality=60))
    code, _, errors = command(shard.main, "--source", folder, "--out", tmp_path / "listed", "--seed", 1)
    with ShardSet(tmp_path / "listed") as data:
        split = dict(zip(data.column("image_id").tolist(), data.column("split").tolist(), strict=True))
    table = (tmp_path / "listed" / "duplicates.csv").read_text().splitlines()
    pairs = [set(line.split(",")[:2]) for line in table[1:]]
    assert code == 0 and table[0] == "first,second,correlation" and len(pairs) == 2
    assert set.union(*pairs) >= {"ISIC_0000002", "ISIC_0000009"}
    divided = sum(len({split[one] for one in pair}) > 1 for pair in pairs)
    assert "2 pairs of images of different groups are copies" in errors
    assert f"{divided} of them in different splits and 2 with different labels" in errors
    assert list(ShardSet(tmp_path / "listed").verify()) and not any(
        p for _, p in ShardSet(tmp_path / "listed").verify()
    )

    code, _, errors = command(
        shard.main,
        "--source",
        folder,
        "--out",
        tmp_path / "joined",
        "--seed",
        1,
        "--join-duplicates",
        "--on-bad",
        "skip",
    )
    with ShardSet(tmp_path / "joined") as data:
        group = dict(zip(data.column("image_id").tolist(), data.column("group").tolist(), strict=True))
        split = dict(zip(data.column("image_id").tolist(), data.column("split").tolist(), strict=True))
        assert data.manifest.source["joined_duplicates"] == 2
    same = [f"ISIC_{number:07d}" for number in (0, 1, 2, 9)]
    assert code == 0 and errors.count("copies") == 1 and not (tmp_path / "joined" / "duplicates.csv").exists()
    assert "warning: 2 pairs of copies that were joined have different labels (first: " in errors
    assert len({group[one] for one in same}) == len({split[one] for one in same}) == 1


def test_an_image_with_a_second_copy_counts_as_packed(tmp_path):
    raw = write_raw(tmp_path / "raw")
    first = next(raw.rglob("ISIC_0000003.jpg"))
    (raw / "HAM10000_images_part_2" / first.name).write_bytes(first.read_bytes())
    packed = pack(read_source(raw), tmp_path / "set", Settings(skip_bad=True))
    source = packed.manifest.source
    assert (source["images"], source["quarantined"]) == (60, 1)
    assert source["lesions"] == len({row["lesion_id"] for row in rows(60)})


def test_splitting_by_image_is_warned_of_and_recorded(raw, tmp_path, command):
    code, _, err = command(shard.main, "--source", raw, "--out", tmp_path / "set", "--split-unit", "image")
    assert code == 0 and "SPLITTING BY IMAGE" in err
    data = ShardSet(tmp_path / "set")
    assert data.manifest.split["unit"] == "image"
    pairs = set(zip(data.column("lesion_id"), data.column("split"), strict=True))
    assert len(pairs) > len(set(data.column("lesion_id")))


def splits_of(folder: Path) -> dict[str, str]:
    with ShardSet(folder) as data:
        return dict(zip(data.column("image_id").tolist(), data.column("split").tolist(), strict=True))


def test_published_splits_are_taken_as_they_are(raw, tmp_path, command):
    ids = [row["image_id"] for row in rows(150)]
    wanted = {i: ("train", "val", "test")[n // 3 % 3] for n, i in enumerate(ids)}  # a lesion has two views in a row
    table = [{"split": s.upper(), "index": n, "image_id": f"{i}.jpg"} for n, (i, s) in enumerate(wanted.items())]
    write_table(tmp_path / "splits.csv", table)
    arguments = "--source", raw, "--out", tmp_path / "set", "--split-file", tmp_path / "splits.csv"
    code, _, err = command(shard.main, *arguments)
    assert code == 0 and splits_of(tmp_path / "set") == wanted
    with ShardSet(tmp_path / "set") as data:
        about = data.manifest.split
    assert about["ratio"] == [51, 51, 48] and about["file"] == "splits.csv" and len(about["file_sha256"]) == 64
    assert about["unit"] == "image" and "the given splits put views of" in err  # these splits divide lesions


def test_published_splits_that_keep_lesions_together_say_so(raw, tmp_path):
    by_lesion = {row["image_id"]: "test" if int(row["lesion_id"][4:]) % 5 == 0 else "train" for row in rows(150)}
    packed = pack(read_source(raw), tmp_path / "set", Settings(assigned=by_lesion))
    assert packed.manifest.split["unit"] == "lesion" and not any("split file" in line for line in packed.warnings)


def test_a_split_file_that_does_not_fit_is_one_line(raw, tmp_path, command):
    table = [{"image_id": row["image_id"], "split": "train"} for row in rows(150)]

    def packing(table, *options):
        write_table(tmp_path / "splits.csv", table)
        arguments = "--source", raw, "--out", tmp_path / "set", "--split-file", tmp_path / "splits.csv"
        return command(shard.main, *arguments, *options)

    for wrong, text in (
        ([*table, {"image_id": "ISIC_7", "split": "valley"}], "line 152: image 'ISIC_7', split 'valley'"),
        ([*table, {"image_id": "ISIC_0000001", "split": "test"}], "is in train and in test; choose one"),
        ([{"image": "ISIC_0000001", "split": "test"}], "has no column image_id"),
        ([row | {"split": "test"} for row in table], "nothing to train on"),
        (table[1:], "ISIC_0000000.jpg: is not in the split file; fix the source"),
        ([*table, {"image_id": "ISIC_7", "split": "val"}], "ISIC_7.jpg: is in the split file, and the source does not"),
    ):
        code, _, err = packing(wrong)
        assert code == 1 and text in err and err.count("\n") == 1, err
        assert not (tmp_path / "set").exists()
    code, _, err = packing(table, "--split", "80/10/10")
    assert code == 2 and "leave --split and --split-unit out" in err
    code, *_ = packing(table[1:], "--on-bad", "skip")
    assert code == 0 and len(splits_of(tmp_path / "set")) == 149


def test_the_official_test_set_becomes_the_test_split(raw, official_test, tmp_path, command):
    arguments = ["--source", raw, "--test-source", official_test, "--out", tmp_path / "set"]
    code, out, err = command(shard.main, *arguments)
    assert code == 0 and "resample images" in err and "ISIC_0035068: left out" in out
    data = ShardSet(tmp_path / "set")
    counts = Counter(data.column("split"))
    assert counts["test"] == 21 and counts["train"] + counts["val"] == 150
    assert abs(counts["val"] / 150 - 1 / 8) < 0.04
    for lesion, dataset, split in zip(*(data.column(n) for n in ("lesion_id", "dataset", "split")), strict=True):
        assert (lesion is None) == (dataset == "isic2018_task3_test") == (split == "test")
    assert data.manifest.split["test_source"] == "ISIC 2018 Task 3 test"
    assert data.manifest.split["ratio"] == [70, 10, 0]
    assert data.manifest.source["test"]["known_missing"] == ["ISIC_0035068"]
    assert "Codella" in data.manifest.citation and "Tschandl" in data.manifest.citation


def test_test_images_that_training_knows_are_refused(raw, official_test, tmp_path, command):
    images = official_test / "ISIC2018_Task3_Test_Images"
    (images / "ISIC_0030000.jpg").rename(images / "ISIC_0000000.jpg")
    table = next(official_test.glob("*/*.csv"))
    table.write_text(table.read_text().replace("ISIC_0030000", "ISIC_0000000"))
    arguments = ["--source", raw, "--test-source", official_test, "--out", tmp_path / "set"]
    code, _, err = command(shard.main, *arguments)
    assert code == 1 and "ISIC_0000000.jpg: is in the training source too" in err
    assert command(shard.main, *arguments, "--on-bad", "skip")[0] == 0
    assert Counter(ShardSet(tmp_path / "set").column("split"))["test"] == 20


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(raw, tmp_path, monkeypatch, command):
    real_open = Path.open

    def full(self, mode="r", *rest, **named):
        return real_open(Path("/dev/full") if self.suffix == ".tar" and "w" in mode else self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)
    code, out, err = command(shard.main, "--source", raw, "--out", tmp_path / "set")
    assert (code, out) == (1, "") and "the disk is full" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_limit_of_file_sizes_ends_in_one_line_and_leaves_nothing(raw, tmp_path, command):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code, out, err = command(shard.main, "--source", raw, "--out", tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out) == (1, "") and "a file became too large" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_real_originals(real_images, tmp_path):
    packed = pack(read_source(real_images / "originals"), tmp_path / "set", Settings(workers=2))
    data = ShardSet(tmp_path / "set")
    assert len(data) == 312 and not packed.rejected
    assert (
        packed.manifest.source["metadata_sha256"]
        == hashlib.sha256((real_images / "originals" / METADATA).read_bytes()).hexdigest()
    )
    files = {file.stem: file for file in (real_images / "originals").glob("*/*.jpg")}
    for sample in range(0, 312, 40):
        pixels = shrink(decode_strictly(files[data.column("image_id")[sample]].read_bytes()), 400)
        stored = simplejpeg.decode_jpeg(bytes(data.read(sample)), "RGB").astype(float)
        assert 10 * np.log10(255**2 / ((stored - pixels) ** 2).mean()) > 33
    again = pack(read_source(real_images / "originals"), tmp_path / "again", Settings(workers=5))
    assert again.manifest == packed.manifest
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["licence"] == "CC BY-NC 4.0"


def test_no_training_image_is_one_line(tmp_path):
    source = write_raw(tmp_path / "raw", 8)
    for file in source.glob("*/*.jpg"):
        file.write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match="no training image could be packed"):
        pack(read_source(source), tmp_path / "set", Settings(skip_bad=True))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("spoil", "text", "kept"),
    [
        (lambda table: [row.pop("dx") for row in table], "has no column dx", None),
        (lambda table: table[0].update(dx="mel"), "line 2: lesion HAM_0000000 has the dx akiec and mel", 58),
    ],
)
def test_a_fault_of_the_metadata_ends_in_one_line(spoilt, tmp_path, command, spoil, text, kept):
    """kept: images that are packed with `--on-bad skip`; None: that does not help."""
    table, arguments = rows(60), ("--source", spoilt, "--out", tmp_path / "set")
    spoil(table)
    write_table(spoilt / METADATA, table)
    for more in ((), ("--on-bad", "skip")) if kept is None else ((),):
        code, out, err = command(shard.main, *arguments, *more)
        assert (code, out) == (1, "") and text in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    if kept is not None:
        code, out, err = command(shard.main, *arguments, "--on-bad", "skip")
        assert code == 0 and f"{kept} images packed" in out
        assert text in (tmp_path / "set" / "quarantine.csv").read_text()


# ------------------------------------------------------------------ signals and memory


def many(folder: Path, images: int, size: tuple[int, int]) -> Path:
    """A raw folder of many images that are all the same file, one link each."""
    (folder / "HAM10000_images_part_1").mkdir(parents=True)
    seed = folder / "HAM10000_images_part_1" / "ISIC_0000000.jpg"
    seed.write_bytes(jpeg(0, 0, *size))
    table = rows(images)
    for row in table[1:]:
        seed.with_name(f"{row['image_id']}.jpg").hardlink_to(seed)
    write_table(folder / METADATA, table)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing(tmp_path, number, code, word):
    source = many(tmp_path / "raw", 2000, (450, 600))
    out = tmp_path / "out" / "set"
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess.shard", "--source", source, "--out", out, "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # a shell's background job ignores Ctrl-C, and hands that on to what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    partial = out.with_name(".set.partial")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (partial / "shard-00000.tar").exists():
        time.sleep(0.02)
    assert (partial / "shard-00000.tar").exists()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (code, "")
    assert stderr.strip().startswith("error: ") and word in stderr and "\n" not in stderr.strip()
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    """A larger source may cost what its records and its index do, 1,750 bytes an image; the images have 3,600 more.

    Not with `ru_maxrss`, which a process takes over from the one that started it.
    """
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from preprocess.ham10000 import read_source\n"
        "from preprocess.packing import Settings, pack\n"
        "from shards.format import EncodeSpec\n"
        "pack(read_source(Path(sys.argv[1])), Path(sys.argv[2]), Settings(EncodeSpec('raw'), workers=2))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    peaks = []
    for images in (1000, 20_000):
        source = many(tmp_path / f"raw{images}", images, (30, 40))
        command = [sys.executable, "-c", script, source, tmp_path / f"set{images}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(int(done.stdout) * 1024)
    grown = (peaks[1] - peaks[0]) / 19_000
    assert grown < 3500, f"{grown:.0f} bytes an image"
