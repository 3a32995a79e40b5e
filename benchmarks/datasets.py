"""The same images in every system's own format, made once with that system's own writer and kept.

Every form of one source, packed size and choice of samples holds the same pixels: the originals reduced by area
interpolation, JPEG quality 90 and 4:2:0 chroma where JPEG; `source` and `originals` are links to the source's files.
"""

# pyright: reportMissingImports=false
# The peers live in an environment of their own (benchmarks/install_peers.sh).

import csv
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.peers.system import QUALITY, Work
from preprocess.records import read_table, table_columns
from shards.common.errors import DataError, last_line
from shards.format import CLASSES

_PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")


def prepared(form: str, work: Work) -> Path:
    """The path of a form, made now if it is not there. Raises DataError where the source is not what it should be."""
    name = form if form in ("source", "originals") else f"{form}-{work.packed_px}"
    if form == "tars":
        name += f"-{work.batch_size}"
    folder = work.cache / _key(work) / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # systems that are set up beside each other may want the same one
        if not folder.exists():  # else it was made while this one waited
            partial = folder.with_name(f".{name}.partial-{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                FORMS[form](work, partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                fcntl.flock(lock, fcntl.LOCK_UN)  # also for what a peer's writer has forked and left behind
    return folder


def _key(work: Work) -> str:
    """Another source or number of samples is another data set."""
    import xxhash

    files = "\n".join(f"{path.name} {path.stat().st_size}" for path, _, _ in originals(work))
    return f"{xxhash.xxh3_64_hexdigest(files.encode())[:8]}-{len(names(work))}"


def sized(work: Work, samples: int, *, whole_batches: bool = False) -> Work:
    """The same job on about `samples` samples, whatever the source holds: copies of few originals, or a part of many.

    whole_batches: as many as fill equally many batches for every worker, one at least. Loaders drop an incomplete
    batch, some before and some after they have decoded it, some one for each worker; and some have no batch where a
    worker has none. Raises DataError where the source is not what it should be.
    """
    count = len(originals(replace(work, most=None)))
    copies, batches = max(1, samples // count), work.batch_size * work.workers
    if not whole_batches:
        return replace(work, copies=copies, most=samples, samples=None)
    once = min(count, samples)
    copies = max(copies, math.ceil(batches / once))
    return replace(work, copies=copies, most=samples, samples=once * copies // batches * batches)


def described(work: Work) -> str:
    """What a job reads, in words: `312 images of originals, 8 times each`, and how many of these samples it uses."""
    count, whole = len(originals(work)), len(names(work))
    times = f", {work.copies} times each" if work.copies > 1 else ""
    fewer = f", of which {whole:,} samples" if whole < count * work.copies else ""
    return f"{count:,} images of {work.source.resolve().name}{times}{fewer}"


@cache
def originals(work: Work) -> list[tuple[Path, int, dict[str, str]]]:
    """The original files of the source: path, label, and row of the metadata, sorted by name. Raises DataError.

    Read once a process: whoever packs knows its files, so that finding them is no part of what is timed.
    """
    table = work.source / "HAM10000_metadata.csv"
    if not table.is_file():
        raise DataError(f"{table}: missing; --source must be a HAM10000-shaped folder of original images")
    blank = dict.fromkeys(table_columns(table)[0], "")
    needed = ("image_id", "lesion_id", "dx")
    rows = {row["image_id"]: row for row in (blank | found for _, found in read_table(table, needed))}
    files = sorted(path for part in _PARTS for path in (work.source / part).glob("*.jpg"))
    found = [path for path in files if path.stem in rows][: work.most]
    if not found:
        raise DataError(f"{work.source}: holds no image that its HAM10000_metadata.csv lists")
    unknown = next((path.stem for path in found if rows[path.stem]["dx"] not in CLASSES), None)
    if unknown is not None:
        raise DataError(f"{table}: {unknown} has the unknown dx '{rows[unknown]['dx']}'")
    return [(path, CLASSES.index(rows[path.stem]["dx"]), rows[path.stem]) for path in found]


def samples(work: Work) -> list[tuple[str, Path, int, dict[str, str]]]:
    """Every sample: its name, the original that it is, its label and its row of the metadata."""
    of_all = originals(work)
    found = [(f"{path.stem}c{copy}", path, label, row) for copy in range(work.copies) for path, label, row in of_all]
    return found[: work.samples]


def names(work: Work) -> list[tuple[str, Path, int]]:
    """Every sample: its name, the original that it is, and its label."""
    return [(name, path, label) for name, path, label, _ in samples(work)]


def packed_pixels(path: Path, packed_px: int) -> np.ndarray:
    """An original reduced to the packed size: (H, W, 3) uint8 RGB. By area interpolation, as in FFCV's writer."""
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{path}: cannot be decoded")
    height, width = packed_size(image.shape[0], image.shape[1], packed_px)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def packed_size(height: int, width: int, packed_px: int) -> tuple[int, int]:
    """Height and width after reduction of the longer side to `packed_px`, the shorter one rounded."""
    longer = max(height, width)
    if longer <= packed_px:
        return height, width
    return round(height * packed_px / longer), round(width * packed_px / longer)


def _source(work: Work, folder: Path) -> None:
    """A HAM10000-shaped folder in which every original stands under several names, as links."""
    images = folder / _PARTS[0]
    images.mkdir()
    rows = []
    for name, path, _, row in samples(work):
        (images / f"{name}.jpg").symlink_to(path.resolve())
        rows.append({**row, "image_id": name, "lesion_id": f"{row['lesion_id']}c{name.rpartition('c')[2]}"})
    with (folder / "HAM10000_metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _originals(work: Work, folder: Path) -> None:
    """A folder per class with links to the originals, as torchvision's ImageFolder wants it."""
    for name, path, label in names(work):
        (folder / CLASSES[label]).mkdir(exist_ok=True)
        (folder / CLASSES[label] / f"{name}.jpg").symlink_to(path.resolve())


def _packed(work: Work, folder: Path) -> None:
    """A folder per class of packed JPEG files, and stats.json with their size and channel means (RGB, 0 to 255)."""
    import cv2

    totals, sizes = np.zeros(3), set()
    known: dict[tuple[Path, int], list[str]] = {}
    for name, path, label in names(work):
        known.setdefault((path, label), []).append(name)
    for (path, label), copies in known.items():
        pixels = packed_pixels(path, work.packed_px)
        totals += pixels.reshape(-1, 3).mean(axis=0)
        sizes.add(pixels.shape[1::-1])
        options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        if not done:
            raise DataError(f"{path}: cannot be encoded")
        home = folder / CLASSES[label]
        home.mkdir(exist_ok=True)
        for name in copies:
            (home / f"{name}.jpg").write_bytes(data.tobytes())
    stats = {"mean": (totals / len(known)).tolist(), "sizes": sorted(f"{w}x{h}" for w, h in sizes)}
    (folder / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


def packed_files(work: Work) -> list[tuple[Path, int]]:
    """The packed JPEG files with their labels, in the order of `names`."""
    folder = prepared("packed", work)
    return [(folder / CLASSES[label] / f"{name}.jpg", label) for name, _, label in names(work)]


def stats(work: Work) -> tuple[tuple[float, float, float], str]:
    """Channel means of the packed images (RGB, 0 to 255), and their size as text, `341x256`."""
    found = json.loads((prepared("packed", work) / "stats.json").read_text(encoding="utf-8"))
    return tuple(found["mean"]), ", ".join(found["sizes"])


def _shards(write_mode: str, split: str = "100/0/0") -> Callable[[Work, Path], None]:
    """This project's own format, by its own command."""

    def write(work: Work, folder: Path) -> None:
        command = [sys.executable, "-m", "preprocess.shard", "--source", str(prepared("source", work))]
        command += ["--out", str(folder / "set"), "--write-mode", write_mode, "--split", split]
        command += ["--max-resolution", str(work.packed_px), "--jpeg-quality", str(QUALITY)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = last_line(done.stderr)
            raise DataError(f"packing with `preprocess.shard --write-mode {write_mode}` failed: {last}")

    return write


def _tars(work: Work, folder: Path) -> None:
    """Tars of one batch of the packed JPEG files each, by webdataset's ShardWriter: as batches are dealt out evenly
    among any number of workers, so are these."""
    from webdataset.writer import ShardWriter

    with ShardWriter(f"file:{folder}/%05d.tar", maxcount=work.batch_size, verbose=0) as sink:
        for path, label in packed_files(work):
            sink.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": str(label)})


def _mds(work: Work, folder: Path) -> None:
    """MosaicML's MDS, the packed JPEG bytes as they are, by its MDSWriter."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "set"), columns={"image": "jpeg", "label": "int"}) as out:
        from PIL import Image

        for path, label in packed_files(work):
            with Image.open(path) as image:
                out.write({"image": image, "label": label})


def _litdata_sample(item: tuple[str, int]) -> dict:
    """One sample for LitData; its JPEG serializer keeps an opened file's bytes as they are."""
    from PIL import Image

    return {"image": Image.open(item[0]), "label": item[1]}


def _litdata(work: Work, folder: Path) -> None:
    """LitData's chunks of 64 MB, by its `optimize`."""
    import multiprocessing

    import litdata

    start_method = multiprocessing.get_start_method()
    items = [(str(path), label) for path, label in packed_files(work)]
    litdata.optimize(
        fn=_litdata_sample,
        inputs=items,
        output_dir=str(folder / "set"),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )
    multiprocessing.set_start_method(start_method, force=True)  # `optimize` changes it for the whole process


def _beton(write_mode: str) -> Callable[[Work, Path], None]:
    def write(work: Work, folder: Path) -> None:
        from benchmarks.peers.ffcv import write_beton

        write_beton(work, folder / "set.beton", write_mode)

    return write


FORMS: dict[str, Callable[[Work, Path], None]] = {
    "source": _source,
    "originals": _originals,
    "packed": _packed,
    "shards-jpg": _shards("jpg"),
    "shards-raw": _shards("raw"),
    "shards-proportion": _shards("proportion"),
    "shards-cold": _shards("jpg"),  # copies that no other process has mapped, so that the kernel can drop them
    "shards-cold-raw": _shards("raw"),
    "shards-cold-dali": _shards("jpg"),
    "shards-split": _shards("jpg", "70/10/20"),  # for whole runs, which evaluate too
    "tars": _tars,
    "mds": _mds,
    "litdata": _litdata,
    "beton-jpg": _beton("jpg"),
    "beton-raw": _beton("raw"),
    "beton-proportion": _beton("proportion"),
}
"""Name of each form → what writes it into a folder."""
