"""The packed format, version 1, as one declaration. FORMAT.md beside this file is its normative description."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.cli import typed
from shards.common.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.parquet"

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
"""The seven diagnoses in alphabetical order: the label of a class is its position."""

SPLITS = ("train", "val", "test")
MOST_PIXELS = 100_000_000
"""Of one image: a damaged header can claim 65,535 × 65,535 px, 12.9 GB once decoded."""
WRITE_MODES = ("jpg", "raw", "proportion", "smart")
ENCODINGS = ("jpg", "raw")
"""The kinds of payload; the file name ends in `.jpg` or `.npy`."""

INDEX_TYPES: dict[str, str] = {
    "image_id": "string",
    "lesion_id": "string",
    "dx": "string",
    "label": "uint8",
    "dx_type": "string",
    "age": "float32",
    "sex": "string",
    "localization": "string",
    "dataset": "string",
    "split": "string",
    "shard": "uint32",
    "offset": "uint64",
    "length": "uint32",
    "encoding": "string",
    "height": "uint16",
    "width": "uint16",
    "xxh3": "uint64",
}
"""The columns of index.parquet and their Arrow types, in order. `age` may be null; a null `lesion_id` (the official
ISIC 2018 test labels carry none) makes every image a lesion of its own."""


def index_schema() -> "pa.Schema":
    """The Arrow schema of index.parquet."""
    import pyarrow as pa

    nullable = {"age", "lesion_id", "dx_type", "sex", "localization", "dataset"}
    return pa.schema(
        [pa.field(name, pa.type_for_alias(kind), nullable=name in nullable) for name, kind in INDEX_TYPES.items()]
    )


@dataclass(frozen=True)
class EncodeSpec:
    """How images are stored, in FFCV's terms (ffcv `fields/rgb_image.py`).

    write_mode: `jpg`, `raw` (uint8 rows), `proportion` (jpg with probability `compress_probability`, else raw) or
        `smart` (jpg where the raw image would be larger than `smart_threshold` bytes).
    max_resolution: a longer side is reduced to this many pixels (area interpolation, aspect ratio kept).
    jpeg_quality: 1 to 100, libjpeg's scale. subsampling: of chroma: `420`, `422` or `444`.
    restart: True writes a JPEG restart marker every few blocks, and the lengths between them in an APP15 segment. A
        reader can then decode a region alone (FORMAT.md, "Restart table").
    """

    write_mode: str = "jpg"
    max_resolution: int = 400
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    smart_threshold: int = 500_000
    subsampling: str = "420"
    restart: bool = True

    def __post_init__(self) -> None:
        """Check the values. Raises UsageError."""
        if self.write_mode not in WRITE_MODES:
            raise UsageError(f"write mode '{self.write_mode}' is unknown: use one of {', '.join(WRITE_MODES)}")
        if not 16 <= self.max_resolution <= 65_535:
            raise UsageError(f"max resolution {self.max_resolution} px is outside 16 to 65535")
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"jpeg quality {self.jpeg_quality} is outside 1 to 100")
        if not 0.0 <= self.compress_probability <= 1.0:
            raise UsageError(f"compress probability {self.compress_probability} is outside 0 to 1")
        if self.smart_threshold < 0:
            raise UsageError(f"smart threshold {self.smart_threshold} bytes is negative")
        if self.subsampling not in ("420", "422", "444"):
            raise UsageError(f"subsampling '{self.subsampling}' is unknown: use 420, 422 or 444")


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the set: file name, the split that all its samples belong to, how many they are, size and SHA-256."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json. Written last: a folder without one is not a shard set."""

    format_version: int
    classes: tuple[str, ...]
    encode: EncodeSpec
    split: dict[str, Any]  # {"ratio": [70, 10, 20], "seed": 0, "unit": "lesion", "test_source": None}
    mean: tuple[float, float, float]  # RGB, of the training split's packed pixels, 0 to 1
    std: tuple[float, float, float]
    counts: dict[str, dict[str, int]]  # counts[split][dx] → samples
    source: dict[str, Any]  # what was packed: names and counts, no paths of the machine
    citation: str
    licence: str
    versions: dict[str, str]  # of the libraries that decide the bytes
    shards: tuple[ShardInfo, ...]
    index_sha256: str  # also the set's identity: run folders and loader states name it

    def to_json(self) -> str:
        """The text of manifest.json: sorted keys, two spaces, one final newline."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "Manifest":
        """Read and check a manifest. Raises DataError naming the file and what is wrong with it."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path.parent}: not a shard set (no {MANIFEST}); pack one with `{typed('preprocess.shard')}`, "
                "and if packing was cut short, run it again"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged ({error}); pack the set again") from None
        if not isinstance(raw, dict):
            raise DataError(f"{path}: damaged (not a JSON object); pack the set again")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}, and this release reads version {FORMAT_VERSION}; "
                "pack the set again or use the release that wrote it"
            )
        missing = [f.name for f in fields(cls) if f.name not in raw]
        if missing:
            raise DataError(f"{path}: damaged (no {', '.join(missing)}); pack the set again")
        known = {f.name: raw[f.name] for f in fields(cls)}
        try:
            known["encode"] = EncodeSpec(**raw["encode"])
            known["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
            known["classes"] = tuple(raw["classes"])
            known["mean"], known["std"] = tuple(raw["mean"]), tuple(raw["std"])
        except (TypeError, UsageError) as error:
            raise DataError(f"{path}: damaged ({error}); pack the set again") from None
        return cls(**known)
