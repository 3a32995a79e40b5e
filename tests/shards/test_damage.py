"""A damaged or hostile shard set: it is named in one line, or the pixels and labels are right."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import Loader, Selection, ShardSet
from shards.__main__ import main
from shards.common.errors import DataError
from shards.format import HAM10000, INDEX, MANIFEST, QUARANTINE, EncodeSpec, Manifest
from shards.kernels.load import compiled
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, little_metadata, picture, write_sample, write_set
from tests.support.parity import change_manifest

# ------------------------------------------------------------------ the manifest


def without_checksum(folder: Path) -> None:
    """Make the manifest one of an older release."""
    change_manifest(folder, lambda manifest: [manifest.pop(name) for name in ("manifest_sha256", "attached")])


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "forty", "raw", 40, (24, 32))


@pytest.fixture
def folder(forty: Path, tmp_path: Path) -> Path:
    """A copy of a set of 40 images, to be damaged."""
    return Path(shutil.copytree(forty, tmp_path / "set"))


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of one value; the last key of the path may be a number."""

    def change(manifest: dict[str, Any]) -> None:
        *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
        inner: Any = manifest
        for key in above:
            inner = inner[key]
        inner[last] = value

    return change


SWAPPED = [*HAM10000.names[:4], "nv", "mel", "vasc"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format_version", True, "format version true, and this release reads versions 1 and 2"),
        ("format_version", 1.0, "format version 1.0"),
        ("classes", SWAPPED, "classes is"),
        ("classes", 7, "classes is 7"),
        ("classes.names", [*SWAPPED[:6], "mel"], "class 'mel' is listed twice"),
        ("classes.names", ["nv"], "1 classes, and 2 to 65,535 are needed"),
        ("classes.names", [*HAM10000.names[:6], "wart"], "long_names names 'vasc', which is none of the classes"),
        ("classes.sets.malignant", [], "set 'malignant' is empty"),
        ("classes.sets.macro", ["mel"], "a set cannot be called 'macro'"),
        ("classes.sets.malignant", ["mole"], "set 'malignant' names 'mole', which is none of the classes"),
        ("classes.long_names", {"mel": "a\nb"}, "classes.long_names is"),
        ("group", "lesion_id", 'group is "lesion_id", expected a list of names'),
        ("encode", [], "encode is [], expected an object"),
        ("encode.max_resolution", "400", 'encode.max_resolution is "400", expected a whole number'),
        ("encode.max_resolution", 4, "max resolution 4 px is outside 16 to 65535"),
        ("encode.jpeg_quality", True, "encode.jpeg_quality is true"),
        ("encode.restart", 1, "encode.restart is 1, expected true or false"),
        ("encode.write_mode", ["jpg"], "encode.write_mode is"),
        ("split", None, "split is null"),
        ("split.unit", "images", 'split.unit is "images", expected one of lesion, image'),
        ("split.ratio", [70, 30], "split.ratio is [70, 30], expected 3 values"),
        ("split.seed", -1, "split.seed is -1"),
        ("mean", [0.5, 0.5], "mean is [0.5, 0.5], expected 3 values"),
        ("mean", [0.5, 0.5, True], "mean is [0.5, 0.5, true]"),
        ("mean", "0.5", 'mean is "0.5"'),
        ("std", [0.2, 0.2, 0], "std is [0.2, 0.2, 0]"),
        ("std", [0.2, 0.2, -0.1], "std is"),
        ("std", [0.2, 0.2, 1e999], "damaged"),
        ("std", [0.2, 0.2, float("nan")], "NaN is not a number"),
        ("counts", {"train": 1}, "counts is"),
        ("counts.train.nv", 99, "samples of nv in train, and the manifest says 99"),
        ("counts.train.nv", -1, "counts is"),
        ("counts.holdout", {}, "counts is"),
        ("source", [], "source is []"),
        ("citation", "a\nb", r'citation is "a\nb", expected printable text'),
        ("versions.numpy", 2, "versions is"),
        ("shards", [], "shards is [], expected a list of at least one shard"),
        ("shards.0", 5, "shards[0] is not an object"),
        ("shards.1.file", "../set/shard-00001.tar", "shards[1].file is"),
        ("shards.1.file", "/etc/passwd", 'shards[1].file is "/etc/passwd", expected shard-00001.tar'),
        ("shards.1.split", "train", "its split is not that of its shard"),
        ("shards.0.samples", 23, "has 24 samples of shard-00000.tar, and the manifest says 23"),
        ("shards.0.bytes", 1.5, "shards[0].bytes is 1.5"),
        ("shards.0.bytes", 512, "bytes, and the manifest says 512"),
        ("shards.0.sha256", "A" * 64, "shards[0].sha256 is"),
        ("shards.0.owner", "me", 'shards[0] has the unknown key "owner"'),
        ("index_sha256", None, "index_sha256 is null"),
        ("attached", {"../x": "0" * 64}, "attached is"),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["checksum", "older"])
def test_every_field_is_read_by_type_and_range(folder, path, value, words, older):
    if older:
        without_checksum(folder)
    try:
        change_manifest(folder, put(path, value))
    except ValueError:  # not JSON's: no checksum can be made of it
        manifest = json.loads((folder / MANIFEST).read_text())
        put(path, value)(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError) as caught:
        ShardSet(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value
    assert str(folder) in str(caught.value)


def test_keys_that_are_missing_or_unknown_are_named(folder):
    whole = json.loads((folder / MANIFEST).read_text())
    names = [*(set(whole) - {"manifest_sha256", "attached"}), *(f"encode.{key}" for key in whole["encode"])]
    for name in [*names, "split.seed", "split.ratio", "split.unit"]:
        above, _, last = name.rpartition(".")
        manifest = json.loads(json.dumps(whole))
        del (manifest[above] if above else manifest)[last]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=rf"damaged \(no {name}\)"):
            ShardSet(folder)
    for key, words in (("colour", 'encode has the unknown key "colour"'), ("manifest_sha25", "unknown key")):
        manifest = json.loads(json.dumps(whole))
        del manifest["manifest_sha256"]
        (manifest["encode"] if key == "colour" else manifest)[key] = "no"
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=words):
            ShardSet(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 16 levels deep"),
        (b'{"format_version": 1, "source": ' + b'{"a": ' * 40 + b"1" + b"}" * 41, "nested more than 16 levels deep"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "damaged (a number has 5000 digits"),
        (b'{"format_version": "' + b"9" * 5000 + b'"}', "format version"),
        (b"{}", "no format_version"),
        (b"7", "not a JSON object"),
        (b"\xff\xfe{}", "can't decode byte 0xff"),
        (b'{"format_version": 1, "citation": "\\ud800"}', "surrogates not allowed"),
        (b"", "damaged"),
    ],
)
def test_hostile_json_is_one_line(folder, command, content, words):
    (folder / MANIFEST).write_bytes(content)
    for what in ("info", "verify"):
        code, out, err = command(main, what, folder)
        assert (code, out) == (1, "") and err.count("\n") == 1 and words in err and len(err) < 600, err


def test_a_folder_of_the_name_of_a_file_is_one_line(folder, command):
    for name in (MANIFEST, INDEX, "shard-00001.tar", "shard-00001.idx"):
        whole = (folder / name).rename(folder.parent / name)
        (folder / name).mkdir()
        code, out, err = command(main, "verify", folder)
        assert (code, out) == (1, "") and name in err and "Traceback" not in err
        (folder / name).rmdir()
        whole.rename(folder / name)
    assert command(main, "verify", folder)[0] == 0


def test_a_set_of_an_older_release_opens_and_verify_says_what_it_cannot_check(folder, command):
    without_checksum(folder)
    (folder / QUARANTINE).write_text("image_id,file,reason\n")
    code, out, err = command(main, "verify", folder)
    assert (code, err) == (0, "") and "40 samples are whole\nnote: " in out and "older release" in out
    assert "note" not in command(main, "info", folder)[1]


def test_a_key_of_a_later_release_is_ignored(folder, command):
    change_manifest(folder, put("colour_space", "sRGB"))
    assert command(main, "verify", folder)[0] == 0


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path):
    settings = {"split": {"ratio": [60, 20, 20], "seed": 0, "unit": "lesion"}, "source": {}, "versions": {}}
    texts = {"citation": "none", "licence": "none", "mean": (0.5, 0.5, 0.5)}
    with ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20) as writer:
        writer.add(PackedSample(b"x" * 100, "jpg", 4, 4, "train", little_metadata("A", "nv")))
        with pytest.raises(DataError, match=r"set: cannot be packed \(std is"):
            writer.finish(std=(0.2, 0.0, 0.2), **settings, **texts)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ the files


def test_files_that_are_missing_foreign_older_or_of_another_set_are_named(forty, tmp_path, command):
    other = write_set(tmp_path / "other", "raw", 35, (24, 32))
    swap = [f"shard-0000{n}.tar: its SHA-256 is not the manifest's" for n in (1, 2)]
    cases = [
        (lambda f: shutil.copy(other / MANIFEST, f), [INDEX, "is not the index that the manifest names"]),
        (lambda f: shutil.copy(other / INDEX, f), [INDEX, "is not the index that the manifest names"]),
        (lambda f: shutil.copy(other / "shard-00000.tar", f), ["shard-00000.tar", "bytes, and the manifest says"]),
        (lambda f: shutil.copy(other / "shard-00000.idx", f), ["shard-00000.idx is damaged"]),
        (lambda f: shutil.copy(f / "shard-00001.tar", f / "shard-00003.tar"), ["shard-00003.tar: is not part of"]),
        (lambda f: (f / "notes.txt").touch(), ["notes.txt: is not part of this set; move it away"]),
        (lambda f: (f / QUARANTINE).touch(), ["quarantine.csv: is not part of this set"]),
        (lambda f: exchange(f / "shard-00001.tar", f / "shard-00002.tar"), swap),
        (
            lambda f: exchange(f / "shard-00001.idx", f / "shard-00002.idx"),
            ["shard-00001.idx is", "shard-00002.idx is"],
        ),
        (lambda f: change_manifest(f, put("format_version", 0)), ["format version 0", "release that wrote it"]),
        (lambda f: change_manifest(f, put("format_version", 3)), ["format version 3", "release that wrote it"]),
        *((lambda f, name=file.name: (f / name).unlink(), [file.name]) for file in forty.iterdir()),
    ]
    for number, (damage, words) in enumerate(cases):
        folder = Path(shutil.copytree(forty, tmp_path / str(number)))
        damage(folder)
        code, out, err = command(main, "verify", folder)
        assert (code, out) == (1, "") and all(word in err for word in words), err
        if words is swap:
            with pytest.raises(DataError, match=r"IMG_00024: damaged in .*shard-00001\.tar"):
                load(all_samples(ShardSet(folder)))


def exchange(one: Path, other: Path) -> None:
    """Two files swap their names."""
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def all_samples(data: ShardSet) -> Loader:
    """All samples of a set in one batch of evaluation."""
    selection = Selection(data, np.arange(len(data)), "all")
    return Loader(selection, batch_size=len(data), resolution=16, train=False, threads=1)


def load(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of the loader's only batch."""
    (batch,) = loader
    return batch.images.clone(), batch.labels


@contextmanager
def changed(file: Path, at: int, change: int) -> Iterator[None]:
    """The byte of `file` at `at` is XORed with `change`, in place, so that mapped files see it too."""
    with file.open("r+b", buffering=0) as handle:
        before = os.pread(handle.fileno(), 1, at)
        os.pwrite(handle.fileno(), bytes([before[0] ^ change]), at)
        try:
            yield
        finally:
            os.pwrite(handle.fileno(), before, at)


def said_of(data: ShardSet) -> list[str]:
    """What `verify` says about an open set: nothing if it passes."""
    return [f"{name}: {problem}" for name, problems in data.verify() for problem in problems]


def shown(folder: Path) -> list[str]:
    """What `verify` says about the set in a folder."""
    try:
        with ShardSet(folder) as data:
            return said_of(data)
    except DataError as error:
        return [str(error)]


def small_mixed(out: Path) -> Path:
    """A set of ten little images, JPEG and raw, with a list of what was left out."""
    rng = np.random.default_rng(0)
    with ShardSetWriter(out, EncodeSpec(write_mode="proportion"), 1 << 20) as writer:
        for number, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 2):
            image = picture(rng, number % 7, 16, 20)
            write_sample(writer, number, f"LES_{number}", number % 7, split, image, ("jpg", "raw")[number % 2])
        writer.attach(QUARANTINE, b"image_id,file,reason\nIMG_00010,a.jpg,is not an image\n")
        finish_set(writer)
    return out


def assert_right_or_refused(folder: Path, right: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The set cannot be opened or read, or gives the right pixels and labels."""
    try:
        with ShardSet(folder) as data, closing(all_samples(data)) as loader:
            found = load(loader)
    except DataError:
        return
    assert all(map(torch.equal, found, right))


@pytest.mark.skipif(compiled() is None, reason="a changed file that is mapped needs the compiled library")
@pytest.mark.parametrize("share", [0.01, pytest.param(1.0, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_changed_byte_is_named_or_harmless(tmp_path, share, record_property):
    folder = small_mixed(tmp_path / "set")
    rng = np.random.default_rng(0)
    data = ShardSet(folder)
    loader, manifest = all_samples(data), data.manifest
    right = load(loader)
    ids, offsets, lengths, shards = (data.column(name) for name in ("image_id", "offset", "length", "shard"))
    counts: Counter[str] = Counter()
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        places = np.sort(rng.permutation(size)[: int(np.ceil(size * share))])
        for at, change in zip(places.tolist(), rng.integers(1, 256, len(places)).tolist(), strict=True):
            with changed(file, at, change):
                said = (
                    said_of(data) if file.suffix in (".tar", ".idx") else shown(folder)
                )  # of those, only sizes are read
                where = f"{file.name}, byte {at} ^ {change}: {said}"
                if file.suffix != ".tar":
                    assert_right_or_refused(folder, right)
                if file.name == MANIFEST and not said:  # one blank became another
                    assert Manifest.from_file(file) == manifest, where
                    counts["harmless"] += 1
                    continue
                assert said and all(file.name in line and "\n" not in line and len(line) < 600 for line in said), where
                counts[file.suffix] += 1
                if file.suffix != ".tar":
                    continue
                mine = (shards == int(file.stem[6:])) & (offsets <= at) & (at < offsets + lengths)
                counts["payload"] += int(mine.sum())
                if mine.any():
                    damaged = f"{ids[mine][0]}: damaged in {file} at byte"
                    assert len(said) == 2 and damaged in said[1], where
                    with pytest.raises(DataError, match=damaged):
                        load(loader)
                else:
                    assert all(map(torch.equal, load(loader), right)), where
    record_property("changed bytes", dict(counts))
    loader.close()
    assert not shown(folder)
    assert set(counts) >= {".json", ".parquet", ".idx", ".csv", ".tar", "payload"}
    assert share < 1 or counts.total() - counts["payload"] == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("step", [7 * 512, pytest.param(512, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_truncated_file_is_named(tmp_path, step):
    folder = small_mixed(tmp_path / "set")
    with ShardSet(folder) as data, closing(all_samples(data)) as loader:
        right = load(loader)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for size in range(0, len(whole), step):
            os.truncate(file, size)
            said = shown(folder)
            assert len(said) == 1 and file.name in said[0] and "\n" not in said[0], (file.name, size, said)
            assert_right_or_refused(folder, right)
        file.write_bytes(whole)
    assert not shown(folder)
