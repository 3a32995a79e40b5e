"""The writers that the `pack` benchmark compares, each behind the same small protocol, and their readers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.datasets import names, packed_size, prepared
from benchmarks.peers.ffcv import beton_payload_bytes, read_beton, write_beton
from benchmarks.peers.system import QUALITY, Work
from shards.common.errors import DataError

if TYPE_CHECKING:
    from preprocess.records import Source


@dataclass(frozen=True)
class Packer:
    """One way to pack.

    write: packs everything into a new folder. read: (work, folder) → name of the original and packed pixels (H, W, 3)
    uint8, one image after the other. payload_bytes: of all encoded images of a folder. Both None for a ceiling, which
    writes nothing.
    """

    name: str
    write: Callable[[Work, Path], None]
    read: Callable[[Work, Path], Iterator[tuple[str, np.ndarray]]] | None = None
    payload_bytes: Callable[[Path], int] | None = None
    encoding: str = "jpg"
    packages: tuple[str, ...] = ()
    note: str = ""


@cache
def _source(work: Work) -> "Source":
    """The samples as our packer takes them, read once a process: FFCV's list of files is made before its clock too."""
    from preprocess.ham10000 import read_source

    return read_source(prepared("source", work))


def _ours(write_mode: str, **encode: Any) -> Callable[[Work, Path], None]:
    def write(work: Work, folder: Path) -> None:
        from preprocess.packing import Settings, pack
        from shards.format import EncodeSpec

        spec = EncodeSpec(write_mode=write_mode, max_resolution=work.packed_px, jpeg_quality=QUALITY, **encode)
        settings = Settings(encode=spec, ratio=(100, 0, 0), workers=work.workers)
        pack(_source(work), folder / "set", settings)

    return write


def _read_ours(work: Work, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    from shards import ShardSet

    data = ShardSet(folder / "set")
    for row, image_id in enumerate(data.column("image_id")):
        yield image_id.rpartition("c")[0], data.pixels(row)


def _bytes_ours(folder: Path) -> int:
    from shards import ShardSet

    return int(ShardSet(folder / "set").column("length").sum())


def _ffcv(write_mode: str) -> Callable[[Work, Path], None]:
    def write(work: Work, folder: Path) -> None:
        write_beton(work, folder / "set.beton", write_mode)

    return write


def _bytes_ffcv(folder: Path) -> int:
    return beton_payload_bytes(folder / "set.beton")


def _read_ffcv(work: Work, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for (_, path, _), pixels in zip(names(work), read_beton(folder / "set.beton"), strict=False):
        yield path.stem, pixels


def _write_tars(work: Work, folder: Path) -> None:
    """The loop that webdataset's users write: Pillow decodes, reduces and encodes, ShardWriter stores; one process."""
    import io

    from PIL import Image
    from webdataset.writer import ShardWriter

    with ShardWriter(f"file:{folder}/%05d.tar", maxsize=64 << 20, verbose=0) as sink:
        for name, path, label in names(work):
            with Image.open(path) as image:
                height, width = packed_size(image.height, image.width, work.packed_px)
                small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
            out = io.BytesIO()
            small.save(out, "JPEG", quality=QUALITY)
            sink.write({"__key__": name, "jpg": out.getvalue(), "cls": str(label)})


def _jpegs(folder: Path) -> Iterator[tuple[str, bytes]]:
    import tarfile

    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".jpg") else None
                if content is not None:
                    yield Path(member.name).stem.rpartition("c")[0], content.read()


def _bytes_tars(folder: Path) -> int:
    return sum(len(content) for _, content in _jpegs(folder))


def _read_tars(work: Work, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    import cv2

    for name, content in _jpegs(folder):
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:
            raise DataError(f"{name}: the packed image does not decode")
        yield name, pixels


@cache
def _contents(work: Work) -> list[bytes]:
    """The files of all originals, in memory."""
    return [path.read_bytes() for _, path, _ in names(work)]


def _on_threads(work: Work, encode: Callable[[bytes], int]) -> None:
    """Encode all originals, on one thread per worker, out of memory and into it."""
    import cv2

    cv2.setNumThreads(0)
    with ThreadPoolExecutor(work.workers) as pool:
        for size in pool.map(encode, _contents(work)):
            assert size > 0  # an encoder that gave nothing would be a fast one


def _bare_ours(work: Work, folder: Path) -> None:
    import simplejpeg

    from shards.encode import shrink

    def encode(data: bytes) -> int:
        small = shrink(simplejpeg.decode_jpeg(data, "RGB"), work.packed_px)
        return len(simplejpeg.encode_jpeg(small, QUALITY, "RGB", "420"))

    _on_threads(work, encode)


def _bare_opencv(work: Work, folder: Path) -> None:
    import cv2

    def encode(data: bytes) -> int:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None  # an original, which the forms read before
        height, width = packed_size(image.shape[0], image.shape[1], work.packed_px)
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].nbytes

    _on_threads(work, encode)


_OURS_NOTE = (
    "metadata read before the clock starts; decodes strictly, checks, indexes and hashes; files are flushed to the "
    "disk before it ends"
)
_FFCV_NOTE = "one process per worker; not flushed to the disk; looks every 0.1 s whether it is done"
_SMART_NOTE = "JPEG where the raw image is larger than 500,000 bytes: none of this size is"
_FFCV_FILES = "its file has pages of 8 MiB for every worker, not all full in a set this small"

PACKERS = {
    packer.name: packer
    for packer in (
        Packer("dermscale jpg", _ours("jpg"), _read_ours, _bytes_ours, note=_OURS_NOTE),
        Packer("dermscale jpg, no restart table", _ours("jpg", restart=False), _read_ours, _bytes_ours),
        Packer("dermscale raw", _ours("raw"), _read_ours, _bytes_ours, "raw"),
        Packer("dermscale proportion", _ours("proportion"), _read_ours, _bytes_ours, "proportion"),
        Packer("dermscale smart", _ours("smart"), _read_ours, _bytes_ours, "smart", note=_SMART_NOTE),
        Packer("FFCV jpg", _ffcv("jpg"), _read_ffcv, _bytes_ffcv, "jpg", ("ffcv",), f"{_FFCV_NOTE}; {_FFCV_FILES}"),
        Packer("FFCV raw", _ffcv("raw"), _read_ffcv, _bytes_ffcv, "raw", ("ffcv",)),
        Packer("FFCV proportion", _ffcv("proportion"), _read_ffcv, _bytes_ffcv, "proportion", ("ffcv",)),
        Packer("FFCV smart", _ffcv("smart"), _read_ffcv, _bytes_ffcv, "smart", ("ffcv",)),
        Packer(
            "webdataset",
            _write_tars,
            _read_tars,
            _bytes_tars,
            packages=("webdataset",),
            note="its writer only stores: Pillow decodes, reduces (box filter) and encodes, all in one process",
        ),
        Packer(
            "ceiling: bare calls",
            _bare_ours,
            note="simplejpeg's decode and encode calls and this project's reduction on threads, from memory: the "
            "fastest known; nothing is checked or written",
        ),
        Packer(
            "ceiling: bare OpenCV calls",
            _bare_opencv,
            note="imdecode (not strict), resize by area, imencode on threads, from memory; nothing is written",
        ),
    )
}
"""Every packer by its name, in the order of the table."""

NOT_IN_QUICK = (
    "dermscale jpg, no restart table",
    "dermscale proportion",
    "dermscale smart",
    "FFCV proportion",
    "FFCV smart",
)
"""Left out of the short version: mixed write modes, and the packer without a restart table."""
