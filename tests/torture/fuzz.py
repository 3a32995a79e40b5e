"""Not a test: gives damaged input to one of the readers that are written in Python.

    python -m tests.torture.fuzz TARGET SEED COUNT FOLDER

Prints how often the input was read, how often it was refused, the longest time, and the peak of memory. Anything but a
result or an error that is meant for the user ends it with a traceback and leaves the input in FOLDER. So does an input
that takes longer than LONGEST_S or asks for more memory than MOST_BYTES.
"""

import faulthandler
import hashlib
import io
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

LONGEST_S = 1.0
"""Of the processor, as other programs use it too; ten times as long by the clock ends the program."""
MEGAPIXEL_S = 0.02
"""And so much more for each megapixel of a picture that is read: damage can leave a whole one of 100 megapixels."""
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


_VALUES = (
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "1e308",
    str(2**64),
    '""',
    '"\\n"',
    '"../x"',
    "[]",
    "{}",
    "[[]]",
    '{"a": 1}',
)
"""As JSON: each time a list or dictionary of its own."""


def values_changed(content: bytes, draw: random.Random) -> bytes:
    """A manifest with one to three values that are others, lost or renamed, and with the checksum of that."""
    from shards.format import content_sha256

    found = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(found))
        inside, key = draw.choice(places)
        value = inside[key]
        match draw.randrange(4):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[str(key)[::-1]] = inside.pop(key)
            case 2 if isinstance(value, str):
                inside[key] = mutated(value.encode(), draw).decode("utf-8", "replace")
            case 2 if isinstance(value, (int, float)):
                inside[key] = max(-1e300, min(value * draw.choice((-1, 2, 0.5, 1000)) + draw.choice((0, 1, -1)), 1e300))
            case _:
                inside[key] = json.loads(draw.choice(_VALUES))
    return json.dumps(found | {"manifest_sha256": content_sha256(found)}).encode()


def _places(inside: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in lists and dictionaries."""
    keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
    return [(inside, key) for key in keys] + [place for key in keys for place in _places(inside[key])]


def sealed(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint that is changed before its digest, and has the right digest."""
    changed = mutated(content[:-21], draw)
    return changed + b"xxh3:" + xxhash.xxh3_64_hexdigest(changed).encode()


# ------------------------------------------------------------------ targets: files and what reads them


@dataclass(frozen=True)
class Case:
    """A good file, the function that reads it, and what damages it."""

    good: bytes
    read: Callable[[bytes], object]
    damaged: Callable[[bytes, random.Random], bytes] = mutated


def manifest(folder: Path) -> list[Case]:
    """The manifest of a set; half of the inputs have other values and the right checksum."""
    from shards.format import MANIFEST, Manifest
    from tests.conftest import write_set

    good = (write_set(folder / "set", images=20) / MANIFEST).read_bytes()

    def read(data: bytes) -> object:
        return Manifest.from_bytes(data, "manifest.json")

    return [Case(good, read), Case(good, read, values_changed)]


def index(folder: Path) -> list[Case]:
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

    return [Case(good, read)]


def tar(folder: Path) -> list[Case]:
    """A shard, as `verify` reads it, and a tar that is packed from."""
    import tarfile

    from preprocess.archives import Archives
    from shards.common.errors import DataError
    from shards.tar import index_of
    from tests.conftest import write_set

    goods = [file.read_bytes() for file in sorted(write_set(folder / "set", images=6).glob("*.tar"))]
    (folder / "source").mkdir()
    path = folder / "source" / "a.tar"

    def verified(data: bytes) -> object:
        path.write_bytes(data)
        try:
            return index_of(path)
        except (tarfile.TarError, ValueError) as error:  # what its docstring names
            raise DataError("is not a tar") from error

    def packed_from(data: bytes) -> object:
        path.write_bytes(data)
        return Archives(folder / "source", ["a.tar"])

    return [Case(good, read) for good in goods for read in (verified, packed_from)]


def table(folder: Path) -> list[Case]:
    """Tables of labels, lists of splits, files of classes and maps."""
    from preprocess.labelled import read_classes_file
    from preprocess.records import read_splits
    from preprocess.tables import Table
    from shards.labelmap import read_map

    path = folder / "table.csv"

    def case(good: bytes, reader: Callable[[Path], object]) -> Case:
        def read(data: bytes) -> object:
            path.write_bytes(data)
            return reader(path)

        return Case(good, read)

    def labels(file: Path) -> object:
        return list(Table(file, "another file"))

    return [
        case(b'image,diagnosis,age\nA.jpg,melanoma,45\nB.jpg,"nevus, blue",80.0\nC.jpg,nevus,\n', labels),
        case(b"image;MEL;NV\r\nA;1.0;0.0\r\nB;0.0;1.0\r\n", labels),
        case("image,dx\nA,mel\n".encode("utf-16"), labels),
        case(b"image_id,split\nA,train\nB.jpg,val\nC,test\nD,train\n", read_splits),
        case("\ufeffname\tlong_name\tsets\nmel\tm\u00e9lanome\tmalignant\nnv\tnevus\t\n".encode(), read_classes_file),
        case(b"from,to\nMEL,mel\nSCC,\n# a comment\nNV,nv\n", lambda file: read_map(str(file))),
    ]


def condition(folder: Path) -> list[Case]:
    """Conditions of --where."""
    import pyarrow as pa

    from shards.where import mask

    rows = pa.table({"sex": ["male", None], "age": [40.0, 70.0], "site id": [1, 2], "melanoma": [True, False]})
    goods = [
        b"sex == 'female' and age >= 60",
        b"not (`site id` in (1, 2) or melanoma) and age is not null",
        b"age < -1e3",
    ]
    return [Case(good, lambda data: mask(data.decode("utf-8", "replace"), rows)) for good in goods]


def picture(folder: Path) -> list[Case]:
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
    return [Case(good, decode_picture) for good in goods]


def weights(folder: Path) -> list[Case]:
    """Files of weights, of safetensors and of PyTorch, and checkpoints, also with the right digest."""
    import torch
    from safetensors.torch import save_file

    from shards.loader import ADDED
    from train import checkpoint
    from train.weights import read_weights

    state = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.randn(3)}
    optimizer = torch.optim.SGD([torch.zeros(3, 4), torch.zeros(3)], lr=0.1, momentum=0.9)
    own = {"model": state, "metrics_bytes": 3, "progress": asdict(checkpoint.Progress()), "scaler": {}}
    own |= {"loader": ADDED | {"epoch": 0, "batch": 0}, "random": [{"torch": {"cpu": torch.get_rng_state()}}]}
    own |= {"optimizer": optimizer.state_dict()}
    save_file(state, folder / "good.safetensors")
    torch.save({"state_dict": state}, folder / "good.pt")
    checkpoint.save(folder, own)

    def given(name: str) -> Case:
        def read(data: bytes) -> object:
            (folder / f"given{name}").write_bytes(data)
            return read_weights(folder / f"given{name}")

        return Case((folder / f"good{name}").read_bytes(), read)

    def resumed(data: bytes) -> object:
        (folder / checkpoint.FILE).write_bytes(data)
        found = checkpoint.load(folder)
        assert found is not None
        return checkpoint.check(folder, found, own, [torch.Size((3, 4)), torch.Size((3,))], 4, 8)

    saved = (folder / checkpoint.FILE).read_bytes()
    return [given(".safetensors"), given(".pt"), Case(saved, resumed), Case(saved, resumed, sealed)]


TARGETS = {one.__name__: one for one in (manifest, index, tar, table, condition, picture, weights)}


def main(name: str, seed: int, count: int, folder: Path) -> dict[str, object]:
    """Give `count` inputs, each of which differs from a good one, to the readers of a target; how it went."""
    from shards.common.errors import DermscaleError
    from shards.encode import BadImageError

    cases = TARGETS[name](folder)
    for case in cases:
        case.read(case.good)
    # also for a reader that asks for memory and fails in another way; libraries and threads map more than they use
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, mapped + MOST_BYTES))
    draw, ended, longest = random.Random(seed), [Counter[str]() for _ in cases], 0.0
    for _ in range(count):
        number = draw.randrange(len(cases))
        case = cases[number]
        while (data := case.damaged(case.good, draw)) == case.good:
            pass
        (folder / "input").write_bytes(data)
        faulthandler.dump_traceback_later(10 * LONGEST_S, exit=True)
        started, most = time.process_time(), LONGEST_S
        try:
            found = case.read(data)
            if isinstance(found, np.ndarray) and found.ndim == 3:
                most += MEGAPIXEL_S * found.shape[0] * found.shape[1] / 1e6
            ended[number]["read"] += 1
        except (DermscaleError, BadImageError) as error:
            assert str(error) and "\n" not in str(error), error
            ended[number]["refused"] += 1
        took = time.process_time() - started
        assert took < most, f"took {took:.1f} s"
        longest = max(longest, took)
    faulthandler.cancel_dump_traceback_later()
    # ru_maxrss would be that of the process which started this one, if that is larger
    held = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert held is not None
    peak = int(held[1]) * 1024
    assert peak < MOST_BYTES, f"{peak:,} bytes"
    return {"cases": ended, "longest_s": round(longest, 3), "peak_bytes": peak}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
