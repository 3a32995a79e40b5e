"""A source at an address is packed to the set of the same source in a folder; what is wrong with it is one line."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from preprocess import places
from preprocess.shard import main
from tests.preprocess.test_layouts import members_of, write_tar
from tests.preprocess.test_shard import digest
from tests.support.rawdata import write_raw
from tests.support.stores import S3, s3_server

pytest.importorskip("s3fs")
pytest.importorskip("moto")
PLACE = "s3://bucket/lab/raw"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with s3_server(monkeypatch) as running:
        yield running


def put(s3: S3, folder: Path, below: str = "lab") -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            s3.put(f"{below}/{folder.name}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def test_a_source_in_a_store_gives_the_set_of_the_folder_and_leaves_nothing(s3, tmp_path, command, monkeypatch):
    raw = write_raw(tmp_path / "raw", 60)
    (raw / ".hidden").mkdir()
    (raw / ".hidden" / "other.jpg").write_bytes(b"no image")
    put(s3, raw)
    s3.put("lab/raw/HAM10000_images_part_1/", b"")  # as S3's console makes a folder
    s3.put("lab/raw/IM0001", b"of another kind")
    s3.put("lab/raw/../../escaped.csv", b"of a folder above")
    s3.put("lab/raw-2/HAM10000_metadata.csv", b"of another folder whose name begins alike")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path / "tmp"))
    for fault in ("GET .*ISIC_.*7.jpg", "GET .*metadata"):
        s3.proxy.plan(fault, "status:503:SlowDown")
    s3.proxy.plan("GET .*ISIC_.*8.jpg", "cut:100")
    assert command(main, "--source", raw, "--out", tmp_path / "local")[0] == 0
    code, _, errors = command(main, "--source", PLACE, "--out", tmp_path / "there")
    assert code == 0, errors
    assert digest(tmp_path / "there") == digest(tmp_path / "local")
    assert not list((tmp_path / "tmp").iterdir())
    assert not s3.proxy.asked("GET", "IM0001") and not list(tmp_path.rglob("escaped.csv"))
    assert sum(one.path.endswith(".jpg") for one in s3.proxy.seen if one.method == "HEAD") == 0


def test_tables_folders_of_classes_and_copies_in_a_store(s3, tmp_path, command):
    """Copies of one name are told apart by what the store says of them."""
    raw = write_raw(tmp_path / "raw", 24)
    images = sorted(raw.rglob("*.jpg"))
    photos = tmp_path / "photos"
    for number, image in enumerate(images):
        for folder in ("a", "b") if number == 3 else ("ab"[number % 2],):
            (photos / folder).mkdir(parents=True, exist_ok=True)
            (photos / folder / image.name).write_bytes(image.read_bytes())
    rows = "".join(f"{image.name},{'xyz'[number % 3]}\n" for number, image in enumerate(images)) + "missing.jpg,x\n"
    (tmp_path / "labels.dat").write_text("image,label\n" + rows)
    put(s3, photos)
    s3.put("lab/labels.dat", (tmp_path / "labels.dat").read_bytes())
    for name, source, table in (
        ("local", photos, tmp_path / "labels.dat"),
        ("there", "s3://bucket/lab/photos/", "s3://bucket/lab/labels.dat"),
    ):
        options = ("--source", source, "--table", table, "--out", tmp_path / name)
        code, _, errors = command(main, *options)
        assert code == 1 and f"error: {table}: line 26: " in errors
        code, _, errors = command(main, *options, "--on-bad", "skip")
        assert code == 0, errors
    assert digest(tmp_path / "there") == digest(tmp_path / "local")
    s3.put(f"lab/photos/a/{images[3].name}", images[4].read_bytes())
    code, _, errors = command(
        main, "--source", "s3://bucket/lab/photos", "--table", tmp_path / "labels.dat", "--out", tmp_path / "no"
    )
    assert code == 1 and f"a/{images[3].name}" in errors and "differ" in errors


@pytest.mark.parametrize("address", [PLACE, f"{PLACE}/a.tar", "web"])
def test_tars_in_a_store_and_on_a_web_server(s3, tmp_path, command, address):
    def described(number: int) -> list[tuple[str, bytes]]:
        return [("json", json.dumps({"dx": "abc"[number % 3], "score": number / 7}).encode())]

    write_tar(tmp_path / "raw" / "a.tar", members_of(range(40), described))
    put(s3, tmp_path / "raw")
    address = f"{s3.url}/lab/raw/a.tar" if address == "web" else address
    local = tmp_path / "raw" / ("a.tar" if address.endswith(".tar") else "")
    for name, source in (("local", local), ("there", address)):
        code, _, errors = command(main, "--source", source, "--out", tmp_path / name)
        assert code == 0, errors
    assert digest(tmp_path / "there") == digest(tmp_path / "local")


def test_hdf5_in_a_store(s3, tmp_path, command):
    h5py = pytest.importorskip("h5py")
    raw = write_raw(tmp_path / "raw", 12)
    folder = tmp_path / "isic"
    folder.mkdir()
    rows = ["isic_id,patient_id,target,age_approx"]
    with h5py.File(folder / "train-image.hdf5", "w") as file:
        for number, image in enumerate(sorted(raw.rglob("*.jpg"))):
            file[f"ISIC_{number:07d}"] = np.void(image.read_bytes())
            rows.append(f"ISIC_{number:07d},P{number // 2},{number % 2},50")
    (folder / "train-metadata.csv").write_text("\n".join(rows) + "\n")
    put(s3, folder)
    s3.proxy.plan("GET .*image.hdf5", "status:503:SlowDown", times=2)
    for name, source in (("local", folder), ("there", "s3://bucket/lab/isic")):
        code, _, errors = command(main, "--source", source, "--out", tmp_path / name)
        assert code == 0, errors
    assert digest(tmp_path / "there") == digest(tmp_path / "local")
    other = tmp_path / "other" / "isic"
    other.mkdir(parents=True)
    (other / "train-metadata.csv").write_bytes((folder / "train-metadata.csv").read_bytes())
    with h5py.File(folder / "train-image.hdf5") as file, h5py.File(other / "train-image.hdf5", "w") as arrays:
        for name, image in file.items():
            arrays[name] = np.frombuffer(bytes(image[()]), np.uint8)
    put(s3, other)
    assert command(main, "--source", other, "--out", tmp_path / "arrays")[0] == 0
    assert digest(tmp_path / "arrays") == digest(tmp_path / "local")
    code, _, errors = command(main, "--source", "s3://bucket/lab/isic", "--out", tmp_path / "no")
    assert code == 1 and errors.splitlines()[-1].startswith("error: s3://bucket/lab/isic/train-image.hdf5: its images")


def test_what_is_wrong_at_an_address_is_one_line_that_names_it(s3, tmp_path, command):
    def said(source: str, *more: object) -> str:
        code, _, errors = command(main, "--source", source, "--out", tmp_path / "out", *more)
        assert code in (1, 2) and not (tmp_path / "out").exists(), errors
        assert "Traceback" not in errors and "dermscale-" not in errors
        *warnings, last = errors.splitlines()
        assert all(line.startswith("warning: ") for line in warnings)
        return last

    assert said("s3://bucket/nothing") == "error: s3://bucket/nothing: is not there; check the address"
    assert "is not there" in said(f"{s3.url}/nothing.tar")
    raw = write_raw(tmp_path / "raw", 12)
    put(s3, raw)
    s3.put("lab/raw/HAM10000_metadata.csv", b"nothing,useful\n1,2\n")
    assert said(PLACE).startswith(f"error: {PLACE}/HAM10000_metadata.csv: ")
    table = (raw / "HAM10000_metadata.csv").read_bytes()
    s3.put("lab/raw/HAM10000_metadata.csv", table)
    image = next(path.relative_to(raw).as_posix() for path in sorted(raw.rglob("*.jpg")))
    s3.put(f"lab/raw/{image}", b"no image")
    assert said(PLACE).startswith(f"error: {PLACE}/{image}: ")
    s3.put(f"lab/raw/{image}", (raw / image).read_bytes())
    s3.proxy.plan(f"GET .*{image}", "status:404:NoSuchKey", times=9)
    assert f"{PLACE}/{image}: is not there" in said(PLACE)
    for file, fault in (("a.jpg", "is a file and a folder at once"), ("/tmp/x.csv", "has a folder without a name")):
        s3.put("lab/odd/a.jpg/b.jpg", b"1")
        s3.put(f"lab/odd/{file}", b"1")
        assert said("s3://bucket/lab/odd") == f"error: s3://bucket/lab/odd/{file}: {fault}; rename it"
        s3.ask("DELETE", f"bucket/lab/odd/{file}")
    assert "an address with ? cannot be a source" in said(f"{s3.url}/a.tar?key=1")
