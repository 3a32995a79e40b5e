"""What loading an image costs on this machine's CPU, taken apart; measured through the loader's own interface.

An image is loaded whole, and once more to a side of 8 px, where resizing costs next to nothing: the difference is the
resize. A raw set loaded to 8 px needs neither decoding nor resizing: what is left, its checksum apart, is Python. So no
figure depends on how an engine is written inside. CPU seconds of the whole process are counted, not the clock's.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Environment
from shards.errors import DataError, UsageError

if TYPE_CHECKING:
    from shards.shardset import Selection

DEFAULT = Path(__file__).parent / "results" / "plan-costs.json"
"""The committed costs."""

IMAGES = 256
"""Images that are measured at most: their raw twin takes 92 MB at 400×300 px."""
_TINY_PX = 8
_BATCH = 64
_EPOCH = 1024  # the images stand in it again and again: what is done once an epoch counts as it does in a real one
_TURN_S = 0.08
_IDLE_S = 0.01


@dataclass(frozen=True)
class Cost:
    """CPU seconds per image: the median over the rounds, and a 95 % interval of it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Costs:
    """What an image costs a core of one CPU, and how large it is.

    packed_px: (height, width), median. crop_px: pixels of the mean crop. jpg_bytes, raw_bytes: mean payload. seconds:
    see `PARTS`.
    """

    images: int
    rounds: int
    resolution_px: int
    packed_px: tuple[int, int]
    crop_px: float
    jpg_bytes: float
    raw_bytes: float
    seconds: dict[str, Cost]
    environment: Environment

    def s(self, part: str) -> float:
        """Median CPU seconds of a part."""
        return self.seconds[part].median


PARTS = {
    "jpg": "all of it, from a JPEG",
    "raw": "all of it, from raw pixels",
    "decode": "decoding the crop of a JPEG",
    "resize": "resizing, turning and writing, after decoding",
    "resize raw": "the same out of raw pixels, reading them included",
    "cut": "cutting the crop's blocks out of the JPEG",
    "python": "Python, checksum apart: order, plan, hand-over; an upper bound (it holds an 8 px resize)",
    "checksum jpg": "checksum of a JPEG",
    "checksum raw": "checksum of raw pixels",
    "copy": "copying a finished image in memory",
    "decode whole": "decoding a whole JPEG, as the resident engine does once",
    "feed": "reading and checking a JPEG for the dali engine, DALI itself apart",
}
"""What is measured, in words."""


def measure(folder: Path, *, resolution_px: int, rounds: int, command: str, told: Callable[[], None]) -> Costs:
    """Measure with the training JPEGs of a packed set, and with a raw twin of them made in a temporary folder.

    `told` is called `rounds` + 1 times. Raises UsageError where the set holds too few JPEGs.
    """
    from benchmarks.machine import environment
    from benchmarks.measure import median_interval
    from shards.shardset import ShardSet

    with TemporaryDirectory(prefix="plan-costs-") as scratch, ShardSet(folder) as data:
        jpegs = _jpegs(data.select("train"), folder)
        twin = _raw_twin(jpegs, Path(scratch) / "raw")
        with ShardSet(twin) as raw:
            parts, facts = _parts(jpegs, raw.select("train"), resolution_px)
            values: dict[str, list[float]] = {}
            for number in range(rounds + 1):  # the first is for warming up
                told()
                turn = _apart({name: _cpu_s(part) for name, part in parts.items()})
                for name, seconds in turn.items():
                    values.setdefault(name, []).extend([seconds] if number else [])
    intervals = {name: median_interval(found) for name, found in values.items()}
    seconds = {name: Cost(i.median, i.low, i.high) for name, i in intervals.items()}
    return Costs(rounds=rounds, resolution_px=resolution_px, seconds=seconds, environment=environment(command), **facts)


def _jpegs(train: "Selection", folder: Path) -> "Selection":
    """The first JPEGs of a training split."""
    rows = train.samples[train.data.column("encoding")[train.samples] == "jpg"][:IMAGES]
    if len(rows) < _BATCH:
        raise UsageError(
            f"--data {folder}: its training split holds {len(rows)} JPEGs and {_BATCH} are needed: pack more images, "
            "with --write-mode jpg"
        )
    return dataclasses.replace(train, samples=rows)


def _raw_twin(jpegs: "Selection", out: Path) -> Path:
    """The same images as a raw set."""
    from shards.encode import encode_pixels
    from shards.format import CLASSES, EncodeSpec
    from shards.writer import PackedSample, ShardSetWriter

    data, spec = jpegs.data, EncodeSpec(write_mode="raw", max_resolution=65_535)
    with ShardSetWriter(out, spec, 64 << 20) as writer:
        for sample in jpegs.samples.tolist():
            image_id, label = str(data.column("image_id")[sample]), int(data.column("label")[sample])
            found = encode_pixels(data.pixels(sample), image_id, spec)
            metadata: dict[str, Any] = dict.fromkeys(("dx_type", "age", "sex", "localization", "dataset"))
            metadata |= {"image_id": image_id, "lesion_id": image_id, "dx": CLASSES[label]}
            writer.add(PackedSample(found.payload, found.encoding, found.height, found.width, "train", metadata))
        nothing = (0.0, 0.0, 0.0)
        writer.finish(mean=nothing, std=nothing, split={}, source={}, citation="", licence="", versions={})
    return out


def _parts(
    jpegs: "Selection", raws: "Selection", resolution_px: int
) -> tuple[dict[str, Callable[[], int]], dict[str, Any]]:
    """What is timed, each a call that returns how many images it did; and sizes of the images."""
    import cv2
    import numpy as np
    import xxhash

    from shards.engines import Work
    from shards.engines.dali_feed import Reader
    from shards.engines.native import decode_whole
    from shards.jpeg import RegionCutter
    from shards.loader import Loader

    cv2.setNumThreads(0)

    def epoch(selection: "Selection", side: int) -> Callable[[], int]:
        again = dataclasses.replace(selection, samples=np.resize(selection.samples, _EPOCH))
        loader = Loader(again, batch_size=_BATCH, resolution=side, engine="native", threads=1)
        return lambda: sum(len(batch.images) for batch in loader)

    def checksums(selection: "Selection") -> Callable[[], int]:
        payloads = [_payload(selection, sample) for sample in selection.samples.tolist()]
        return lambda: sum(xxhash.xxh3_64_intdigest(payload) >= 0 for payload in payloads)

    data, rows = jpegs.data, jpegs.samples
    order, plan = Loader(jpegs, batch_size=_BATCH, engine="native", threads=1).plan()
    heights, widths = (data.column(name)[rows].tolist() for name in ("height", "width"))
    files = [_payload(jpegs, sample) for sample in rows.tolist()]
    boxes = plan.boxes.tolist()
    cutter = RegionCutter()

    def cut() -> int:
        for file, height, width, box in zip(files, heights, widths, boxes, strict=True):
            cutter(file, height, width, *box)
        return len(files)

    def whole() -> int:
        for file, height, width in zip(files, heights, widths, strict=True):
            decode_whole(file, "jpg", height, width)
        return len(files)

    reader = Reader(data, "jpg", 2, cutting=False)
    work = [
        Work(rows[part], plan.boxes[part], plan.symmetry[part])
        for part in (order[start : start + _BATCH] for start in range(0, len(order), _BATCH))
    ]
    source = np.random.default_rng(0).integers(0, 256, (1024, resolution_px, resolution_px, 3), np.uint8)
    target = np.empty((_BATCH, *source.shape[1:]), np.uint8)

    def copy() -> int:
        for i in range(len(source)):
            np.copyto(target[i % _BATCH], source[i])
        return len(source)

    parts = {
        "jpg": epoch(jpegs, resolution_px),
        "jpg tiny": epoch(jpegs, _TINY_PX),
        "raw": epoch(raws, resolution_px),
        "raw tiny": epoch(raws, _TINY_PX),
        "cut": cut,
        "checksum jpg": checksums(jpegs),
        "checksum raw": checksums(raws),
        "copy": copy,
        "decode whole": whole,
        "feed": lambda: sum(len(fed.samples) for fed in reader.batches(work, resolution_px)),
    }
    facts = {
        "images": len(rows),
        "packed_px": (int(np.median(heights)), int(np.median(widths))),
        "crop_px": float((plan.boxes[:, 2] * plan.boxes[:, 3]).mean()),
        "jpg_bytes": float(data.column("length")[rows].mean()),
        "raw_bytes": float(raws.data.column("length")[raws.samples].mean()),
    }
    return parts, facts


def _payload(selection: "Selection", sample: int) -> memoryview:
    """A sample's bytes, read and checked once."""
    return selection.data.read(sample)


def _cpu_s(part: Callable[[], int]) -> float:
    """CPU seconds of the process per image, over calls that take `_TURN_S` together.

    A loader works ahead, so both ends of the turn wait until its threads have nothing left to do.
    """
    done, start, began = 0, _settled_s(), time.perf_counter()
    while time.perf_counter() - began < _TURN_S:
        done += part()
    return (_settled_s() - start) / done


def _settled_s() -> float:
    """CPU seconds of the process, once its threads are idle; after 5 s as they are, since those are no loader's."""
    before, end = time.process_time(), time.monotonic() + 5
    while True:
        time.sleep(_IDLE_S)
        now = time.process_time()
        if now - before < 0.02 * _IDLE_S or time.monotonic() > end:
            return now
        before = now


def _apart(turn: dict[str, float]) -> dict[str, float]:
    """One round's timings as the costs of `PARTS`: differences are taken within the round."""
    python = turn["raw tiny"] - turn["checksum raw"]
    found = {
        "decode": turn["jpg tiny"] - turn["checksum jpg"] - turn["cut"] - python,
        "resize": turn["jpg"] - turn["jpg tiny"],
        "resize raw": turn["raw"] - turn["raw tiny"],
        "python": python,
    }
    whole = turn | found
    return {name: whole[name] for name in PARTS}


def write(path: Path, costs: Costs) -> None:
    """Write the costs as JSON, whole or not at all."""
    from shards.durable import write_durably

    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(_rounded(dataclasses.asdict(costs)), indent=2, ensure_ascii=False) + "\n").encode())


def _rounded(value: Any) -> Any:
    """The same with four digits of every fraction."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(path: Path) -> Costs:
    """Read what `write` wrote. Raises DataError naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["seconds"] = {name: Cost(**found["seconds"][name]) for name in PARTS}
        found["packed_px"] = tuple(found["packed_px"])
        found["environment"] = Environment(**found["environment"])
        return Costs(**found)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; write one with `plan --measure --data SET`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged, or of another release ({error}); measure again") from None
