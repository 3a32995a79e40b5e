"""Not a test: gives damaged input to one of the readers that are written in Python.

    python -m tests.torture.fuzz TARGET SEED COUNT FOLDER

Prints how often the input was read, how often it was refused, the longest time, and the peak of memory. Anything but a
result or an error that is meant for the user ends it with a traceback and leaves the input in FOLDER.
"""

import hashlib
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

LONGEST_S = 1.0
MOST_BYTES = 1 << 30
_NUMBERS = (b"0", b"-1", b"1e999", b"nan", b"9223372036854775807", b"18446744073709551616", b"4294967295", b"null")
_BYTES = (
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\n",
    b"\r",
    b'"',
    b"'",
    b",",
    b";",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """`content` with a few changes: bits, bytes, numbers, parts that are lost, doubled or swapped."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        place, other = draw.randrange(len(found) + 1), draw.randrange(len(found) + 1)
        length = draw.choice((1, 2, 4, 8, 64, 1024))
        match draw.randrange(8):
            case 0 if place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(found):
                found[place] = draw.randrange(256)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[other : other + length]
            case 4:
                found[place : place + length] = found[other : other + length]
            case 5:
                found[place : place + length] = draw.choice(_BYTES)
            case 6:
                end = place
                while end < len(found) and chr(found[end]) in "-+.0123456789eE":
                    end += 1
                found[place:end] = draw.choice(_NUMBERS)
            case 7 if draw.random() < 0.2:
                del found[place:]
    return bytes(found)


# ------------------------------------------------------------------ targets: (inputs to begin with, what reads one)

Target = tuple[list[bytes], Callable[[bytes], object]]


def manifest(folder: Path) -> Target:
    """The manifest of a set; half of the inputs have a right checksum."""
    from shards.format import MANIFEST, Manifest, content_sha256
    from tests.conftest import write_set

    good = (write_set(folder / "set", images=20) / MANIFEST).read_bytes()
    flip = iter(range(1 << 62))

    def read(data: bytes) -> object:
        if next(flip) % 2:
            with suppress(ValueError, TypeError, AttributeError, RecursionError):
                content = json.loads(data)
                content["manifest_sha256"] = content_sha256(content)
                data = json.dumps(content).encode()
        return Manifest.from_bytes(data, "manifest.json")

    return [good], read


def index(folder: Path) -> Target:
    """The index of a set whose manifest names the changed bytes: only what the rows say can show the damage."""
    from shards import ShardSet
    from shards.format import INDEX
    from tests.conftest import write_set
    from tests.support.parity import change_manifest

    path = write_set(folder / "set", images=20)
    good = (path / INDEX).read_bytes()

    def read(data: bytes) -> object:
        (path / INDEX).write_bytes(data)
        change_manifest(path, lambda content: content.update(index_sha256=hashlib.sha256(data).hexdigest()))
        with ShardSet(path) as opened:
            return [opened.pixels(row) for row in range(0, len(opened), 7)]

    return [good], read


def tar(folder: Path) -> Target:
    """A shard, as `verify` reads it, and a tar that is packed from."""
    import tarfile

    from preprocess.archives import Archives
    from shards.tar import index_of
    from tests.conftest import write_set

    goods = [file.read_bytes() for file in sorted(write_set(folder / "set", images=6).glob("*.tar"))]
    (folder / "source").mkdir()
    path = folder / "source" / "a.tar"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        with suppress(tarfile.TarError, ValueError):  # what its docstring names
            index_of(path)
        return Archives(folder / "source", ["a.tar"])

    return goods, read


def table(folder: Path) -> Target:
    """Tables of labels, lists of splits, files of classes and maps."""
    from preprocess.tables import Table
    from shards.labelmap import read_map

    goods = [
        b'image,diagnosis,age,patient\nA.jpg,melanoma,45,P1\nB.jpg,"nevus, blue",80.0,P2\nC.jpg,nevus,,unknown\n',
        b"image;MEL;NV\r\nA;1.0;0.0\r\nB;0.0;1.0\r\n",
        "\ufeffname\tlong_name\tsets\nmel\tmélanome\tmalignant\n".encode(),
        "image,dx\nA,mel\n".encode("utf-16"),
        b"from,to\nMEL,mel\nSCC,\n# a comment\nNV,nv\n",
    ]
    path = folder / "table.csv"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        rows = list(Table(path, "another file"))
        return rows, read_map(str(path))

    return goods, read


def condition(folder: Path) -> Target:
    """Conditions of --where."""
    import pyarrow as pa

    from shards.where import mask

    rows = pa.table({"sex": ["male", None], "age": [40.0, 70.0], "site id": [1, 2], "melanoma": [True, False]})
    goods = [
        b"sex == 'female' and age >= 60",
        b"not (`site id` in (1, 2) or melanoma) and age is not null",
        b"age < -1e3",
    ]
    return goods, lambda data: mask(data.decode("utf-8", "replace"), rows)


def picture(folder: Path) -> Target:
    """Pictures of predict, serve and packing."""
    from shards.pictures import decode_picture

    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    goods = []
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "P"), ("TIFF", "RGB"),
                       ("TIFF", "CMYK"), ("BMP", "RGB"), ("WEBP", "RGB"), ("AVIF", "RGB")):  # fmt: skip
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        image = Image.fromarray(pixels).convert(mode)
        try:
            image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "AVIF") else {}))
        except (OSError, KeyError, ValueError):
            continue  # this Pillow cannot write it
        goods.append(file.getvalue())
    return goods, decode_picture


def weights(folder: Path) -> Target:
    """Files of weights, of safetensors and of PyTorch, and checkpoints."""
    import torch
    from safetensors.torch import save_file

    from shards.common.errors import DermscaleError
    from train import checkpoint
    from train.weights import read_weights

    state = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.randn(3)}
    save_file(state, folder / "good.safetensors")
    torch.save({"state_dict": state}, folder / "good.pt")
    checkpoint.save(folder, {"model": state, "metrics_bytes": 3})
    goods = [(folder / name).read_bytes() for name in ("good.safetensors", "good.pt", checkpoint.FILE)]

    def read(data: bytes) -> object:
        for name in ("given.safetensors", "given.pt", checkpoint.FILE):
            (folder / name).write_bytes(data)
        for one in (lambda: read_weights(folder / "given.pt"), lambda: checkpoint.load(folder)):
            with suppress(DermscaleError):
                one()
        return read_weights(folder / "given.safetensors")

    return goods, read


TARGETS = {one.__name__: one for one in (manifest, index, tar, table, condition, picture, weights)}


def main(name: str, seed: int, count: int, folder: Path) -> dict[str, object]:
    """Give `count` inputs to a target; how it went."""
    from shards.common.errors import DermscaleError
    from shards.encode import BadImageError

    goods, read = TARGETS[name](folder)
    for good in goods:
        try:
            read(good)
        except (DermscaleError, BadImageError):
            assert name in ("table", "weights", "tar"), name  # readers of which each takes some of the inputs
    draw, ended, longest = random.Random(seed), Counter[str](), 0.0
    for _ in range(count):
        data = mutated(draw.choice(goods), draw)
        (folder / "input").write_bytes(data)
        started = time.perf_counter()
        try:
            read(data)
            ended["read"] += 1
        except (DermscaleError, BadImageError) as error:
            assert str(error) and "\n" not in str(error), error
            ended["refused"] += 1
        longest = max(longest, time.perf_counter() - started)
        assert longest < LONGEST_S, f"took {longest:.1f} s"
    # ru_maxrss would be that of the process which started this one, if that is larger
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    assert peak < MOST_BYTES, f"{peak:,} bytes"
    return {**ended, "longest_s": round(longest, 3), "peak_bytes": peak}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
