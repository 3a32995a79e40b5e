"""The packed format, version 2, as one declaration. FORMAT.md beside this file is its normative description."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.cli import typed
from shards.common.errors import DataError, UsageError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 2
MANIFEST, INDEX = "manifest.json", "index.parquet"
QUARANTINE, DUPLICATES = "quarantine.csv", "duplicates.csv"
ATTACHED = (QUARANTINE, DUPLICATES)
"""Files of a set that nothing is loaded from. The manifest has the SHA-256 of those that are there."""
CARDS = "README.md", "croissant.json"
"""What `shards/card.py` writes beside them: for people and for catalogues; no reader of the set needs it."""

AGAIN = "copy the set again from where it is whole, or pack it again"
"""What to do about a damaged set."""

MOST_CLASSES = 65_535


@dataclass(frozen=True)
class Classes:
    """The classes of a set; the label of a class is its position in `names`. None: the set has no labels.

    long_names: name → what it is called in words, for those that have such a name. sets: classes of interest, as in
    {"malignant": ("mel", "bcc")}: they are also measured together, against all others.
    """

    names: tuple[str, ...]
    long_names: dict[str, str] = field(default_factory=dict)
    sets: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names. Raises ValueError."""
        if self.names and not 2 <= len(self.names) <= MOST_CLASSES:
            raise ValueError(f"{len(self.names)} classes, and 2 to {MOST_CLASSES:,} are needed")
        named = (*self.names, *self.sets, *self.long_names, *self.long_names.values())
        if wrong := [name for name in named if type(name) is not str or not name.strip() or not name.isprintable()]:
            raise ValueError(f"class {one_line(str(wrong[0]), 60)!r} is not printable text")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"class '{one_line(twice, 60)}' is listed twice")
        for where, members in (("long_names", self.long_names), *((f"set '{s}'", m) for s, m in self.sets.items())):
            if unknown := [name for name in members if name not in self.names]:
                raise ValueError(f"{where} names '{one_line(str(unknown[0]), 60)}', which is none of the classes")
            if not members and where != "long_names":
                raise ValueError(f"{where} is empty")
        if "macro" in self.sets:
            raise ValueError("a set cannot be called 'macro': macro_auc is the mean over all classes")

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def described(self, name: str) -> str:
        """A class for people: its name and its words."""
        return f"{name}: {self.long_names[name]}" if name in self.long_names else name

    @property
    def measured(self) -> dict[str, tuple[str, ...]]:
        """The sets that are measured against all other classes: those of interest, or the last one of two classes."""
        last = next(name for name in reversed(self.names) if name != "macro")
        return self.sets or ({last: (last,)} if len(self) == 2 else {})

    def members(self, name: str) -> list[int]:
        """The labels of a measured set, ascending."""
        return sorted(self.names.index(member) for member in self.measured[name])


HAM10000 = Classes(
    ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    {
        "akiec": "actinic keratosis or intraepithelial carcinoma",
        "bcc": "basal cell carcinoma",
        "bkl": "benign keratosis",
        "df": "dermatofibroma",
        "mel": "melanoma",
        "nv": "melanocytic nevus",
        "vasc": "vascular lesion",
    },
    {"melanoma": ("mel",), "malignant": ("akiec", "bcc", "mel")},
)
"""The seven diagnoses of HAM10000 (Tschandl et al. 2018). Sets of version 1, and runs on them, have no others."""


def read_classes(raw: Any) -> Classes:
    """The classes in a manifest or a run. Raises ValueError.

    raw: an object with the fields of `Classes`, or the list of names of version 1, which are those of HAM10000.
    """
    if type(raw) is list:
        if raw != list(HAM10000.names):
            raise ValueError(f"classes is {one_line(json.dumps(raw), 60)}, expected {', '.join(HAM10000.names)}")
        return HAM10000
    _check({"classes": raw}, _CLASSES)
    _known(raw, {f.name for f in fields(Classes)}, "classes")
    return Classes(tuple(raw["names"]), raw["long_names"], {name: tuple(some) for name, some in raw["sets"].items()})


SPLITS = ("train", "val", "test")
MOST_PIXELS = 100_000_000
"""Of one image: a damaged header can claim 65,535 × 65,535 px, 12.9 GB once decoded."""
WRITE_MODES = ("jpg", "raw", "proportion", "smart")
ENCODINGS = ("jpg", "raw")
"""The kinds of payload; the file name ends in `.jpg` or `.npy`."""

INDEX_TYPES: dict[str, str] = {
    "image_id": "string",
    "lesion_id": "string",
    "group": "string",
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
"""The format's own columns of index.parquet and their Arrow types, in order; columns of the source follow. A null
`group` (the official ISIC 2018 test labels name no lesion) makes an image a group of its own."""


def index_schema(classes: Classes, source: "pa.Schema | None" = None) -> "pa.Schema":
    """The Arrow schema of index.parquet. Labels are uint8 for up to 256 classes, and uint16 for more.

    source: further columns, which the source has.
    """
    import pyarrow as pa

    nullable = {"age", "lesion_id", "group", "dx_type", "sex", "localization", "dataset"}
    nullable |= set() if classes else {"dx"}
    types = INDEX_TYPES | ({"label": "uint16"} if len(classes) > 256 else {})
    own = [pa.field(name, pa.type_for_alias(kind), nullable=name in nullable) for name, kind in types.items()]
    return pa.schema([*own, *(source or [])])


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


def shard_name(number: int) -> str:
    """The file name of a tar."""
    return f"shard-{number:05d}.tar"


# ------------------------------------------------------------------ the manifest's fields

_Rule = tuple[str, Callable[[Any], bool]]
"""What is expected of a value, in words and as a check."""


def _number(low: float, high: float, *, whole: bool = False) -> _Rule:
    kinds = (int,) if whole else (int, float)  # compared by identity, because True is an int too
    words = f"a {'whole ' if whole else ''}number from {low} to {high}"
    return words, lambda value: type(value) in kinds and low <= value <= high


def _list(length: int, rule: _Rule) -> _Rule:
    words, right = rule
    return (
        f"{length} values, each {words}",
        lambda value: type(value) is list and len(value) == length and all(map(right, value)),
    )


def _object(names: "tuple[str, ...] | None", rule: _Rule, words: str) -> _Rule:
    """An object whose keys are among `names` (None: any) and whose values follow the rule."""
    return (
        words,
        lambda value: (
            type(value) is dict and (names is None or set(value) <= set(names)) and all(map(rule[1], value.values()))
        ),
    )


def _one_of(*values: str) -> _Rule:
    return f"one of {', '.join(values)}", lambda value: type(value) is str and value in values


_COUNT = _number(0, 2**63 - 1, whole=True)
_TEXT: _Rule = ("printable text", lambda value: type(value) is str and value.isprintable())
_SHA256: _Rule = (
    "64 hexadecimal digits",
    lambda value: type(value) is str and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
_ANY: _Rule = ("anything", lambda value: True)
_NAMES: _Rule = ("a list of names", lambda value: type(value) is list and all(type(one) is str for one in value))
_CLASSES: dict[str, _Rule] = {
    "classes": ("an object", lambda value: type(value) is dict),
    "classes.names": _NAMES,
    "classes.long_names": _object(None, _TEXT, "an object of texts"),
    "classes.sets": _object(None, _NAMES, "an object of lists of names"),
}

_FIELDS: dict[str, _Rule] = {
    "encode": ("an object", lambda value: type(value) is dict),
    "encode.write_mode": _one_of(*WRITE_MODES),
    "encode.max_resolution": _COUNT,  # EncodeSpec knows the ranges
    "encode.jpeg_quality": _COUNT,
    "encode.compress_probability": _number(0, 1),
    "encode.smart_threshold": _COUNT,
    "encode.subsampling": _TEXT,
    "encode.restart": ("true or false", lambda value: type(value) is bool),
    "split": ("an object", lambda value: type(value) is dict),
    "split.ratio": _list(3, _COUNT),
    "split.seed": _COUNT,
    "split.unit": _one_of("lesion", "image"),
    "mean": _list(3, _number(0, 1)),
    "std": _list(3, _number(1e-6, 1)),
    "counts": _object(SPLITS, _object(None, _COUNT, "numbers"), "samples of each class, by split"),
    "source": _object(None, _ANY, "an object"),
    "citation": _TEXT,
    "licence": _TEXT,
    "versions": _object(None, _TEXT, "an object of texts"),
    "shards": ("a list of at least one shard", lambda value: type(value) is list and len(value) > 0),
    "index_sha256": _SHA256,
}
"""Every manifest has these, and `classes`; `split` and `source` may hold more."""
_VERSION_2: dict[str, _Rule] = {"group": _NAMES}
_SHARD: dict[str, _Rule] = {
    "split": _one_of(*SPLITS),
    "samples": _number(1, 2**32, whole=True),
    "bytes": _number(1, 2**63 - 1, whole=True),
    "sha256": _SHA256,
}
_ADDED: dict[str, _Rule] = {
    "attached": _object(ATTACHED, _SHA256, f"the SHA-256 of {' and '.join(ATTACHED)}, or nothing"),
    "manifest_sha256": _SHA256,
}
"""Manifests of older releases lack these, and older releases ignore them."""
_MOST_LEVELS, _MOST_DIGITS = 16, 1000
_MOST_ROWS = 40
"""Of a table for people."""


def _check(content: dict[str, Any], rules: dict[str, _Rule], prefix: str = "") -> None:
    """Check an object's values; a rule's name may be a path. Raises ValueError naming the first that is wrong."""
    for name, (expected, right) in rules.items():
        value: Any = content
        for key in name.split("."):
            if key not in value:
                raise ValueError(f"no {prefix}{name}")
            value = value[key]
        if not right(value):
            shown = one_line(json.dumps(value), 60)
            raise ValueError(f"{prefix}{name} is {shown}, expected {expected}")


def _known(content: dict[str, Any], names: "set[str]", where: str) -> None:
    """Raise ValueError if an object has a key that is none of `names`."""
    if unknown := sorted(set(content) - names):
        raise ValueError(f"{where} has the unknown key {one_line(json.dumps(unknown[0]), 60)}")


def _levels(value: Any) -> int:
    """How deep lists and objects are nested."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inner), default=0)


def read_encode(raw: Any) -> EncodeSpec:
    """The settings in a manifest's `encode`. Raises ValueError naming what is wrong with them."""
    _check({"encode": raw}, {name: rule for name, rule in _FIELDS.items() if name.partition(".")[0] == "encode"})
    _known(raw, {f.name for f in fields(EncodeSpec)}, "encode")
    try:
        return EncodeSpec(**raw)
    except UsageError as error:
        raise ValueError(f"encode: {error}") from None


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content without `manifest_sha256`: as JSON with sorted keys and no spaces, in UTF-8."""
    rest = {name: value for name, value in content.items() if name != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """manifest.json. Written last: a folder without one is not a shard set."""

    format_version: int
    classes: Classes
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
    index_sha256: str  # run folders and loader states name the set by it
    group: tuple[str, ...] = ("lesion_id",)  # the columns of the source that `group` in the index was made from
    attached: dict[str, str] = field(default_factory=dict)  # SHA-256 of those of ATTACHED that the set has
    manifest_sha256: str | None = None  # of the content; None if an older release packed the set

    @property
    def identity(self) -> dict[str, str]:
        """What the result of a run depends on: images and labels (by the index), normalisation, encode settings."""
        encode = {f"encode_{name}": str(value) for name, value in asdict(self.encode).items()}
        return {"shard_set": self.index_sha256, "mean": str(list(self.mean)), "std": str(list(self.std)), **encode}

    def to_json(self) -> str:
        """The text of manifest.json: sorted keys, two spaces, one final newline; with the checksum of its content."""
        content = asdict(self)
        content["manifest_sha256"] = content_sha256(content)
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """The manifest that `to_json` wrote. Raises ValueError naming what is wrong with it."""

        def constant(name: str) -> None:
            raise ValueError(f"{name} is not a number")

        def whole(digits: str) -> int:
            if len(digits) > _MOST_DIGITS:  # Python's own message advises a change of its settings
                raise ValueError(f"a number has {len(digits)} digits, expected at most {_MOST_DIGITS}")
            return int(digits)

        try:
            content = text if isinstance(text, str) else text.decode()
            raw = json.loads(content, parse_constant=constant, parse_int=whole)
            if not isinstance(raw, dict):
                raise ValueError("not a JSON object")
            _check(raw, {"format_version": _ANY})
            version = raw["format_version"]
            if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
                raise _OtherVersionError(one_line(json.dumps(version), 60))
            if _levels(raw) > _MOST_LEVELS:
                raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
        except RecursionError:
            raise ValueError(f"nested more than {_MOST_LEVELS} levels deep") from None
        digest = content_sha256(raw)
        _check(raw, {"classes": _ANY} | _FIELDS | (_VERSION_2 if version > 1 else {}))
        _check(raw, {name: rule for name, rule in _ADDED.items() if name in raw})
        encode, classes = read_encode(raw["encode"]), read_classes(raw["classes"])
        if (type(raw["classes"]) is list) != (version == 1):
            raise ValueError(f"classes is not written as in version {version}")
        for split, counts in raw["counts"].items():
            if set(counts) != set(classes.names):
                raise ValueError(f"counts.{split} has not a number for each class")
        for number, shard in enumerate(raw["shards"]):
            where, name = f"shards[{number}]", shard_name(number)
            if type(shard) is not dict:
                raise ValueError(f"{where} is not an object")
            _check(shard, {"file": (name, lambda value, name=name: value == name), **_SHARD}, f"{where}.")
            _known(shard, {f.name for f in fields(ShardInfo)}, where)
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        if "manifest_sha256" not in raw:
            _known(raw, {*known}, "it")  # only a later release adds keys, and then there is a checksum
        elif raw["manifest_sha256"] != digest:
            raise ValueError("its content is not what its manifest_sha256 says: a value was changed after packing")
        known |= {"encode": encode, "classes": classes}
        known["counts"] = {split: raw["counts"][split] for split in SPLITS if split in raw["counts"]}
        known["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
        for name in ("group", "mean", "std"):
            if name in known:
                known[name] = tuple(raw[name])
        return cls(**known)

    def table(self) -> str:
        """Samples of each class and split, as text: a line a class, and the sums."""
        head = ["class", *self.counts, "all"]
        rows = [[name, *(counts[name] for counts in self.counts.values())] for name in self.classes.names]
        rows.append(["all", *(sum(s.samples for s in self.shards if s.split == split) for split in self.counts)])
        rows = [[name, *(f"{n:,}" for n in (*counts, sum(counts)))] for name, *counts in rows]
        if len(rows) > _MOST_ROWS:
            rows[_MOST_ROWS - 1 : -1] = [[f"… {len(rows) - _MOST_ROWS} more classes", *[""] * (len(head) - 1)]]
        widest = max(len(row[0]) for row in (head, *rows))
        return "\n".join(row[0].ljust(widest) + "".join(cell.rjust(9) for cell in row[1:]) for row in (head, *rows))

    @classmethod
    def from_file(cls, path: Path) -> "Manifest":
        """Read and check a manifest. Raises DataError naming the file and what is wrong with it."""
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{path.parent}: not a shard set (no {MANIFEST}); pack one with `{typed('preprocess.shard')}`, "
                "and if packing was cut short, run it again"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Manifest":
        """Read and check a manifest that lies at `where`. Raises DataError that names it and what is wrong."""
        try:
            return cls.from_json(content)
        except _OtherVersionError as error:
            raise DataError(
                f"{where}: format version {error}, and this release reads versions 1 and {FORMAT_VERSION}; "
                "pack the set again or use the release that wrote it"
            ) from None
        except ValueError as error:
            raise DataError(f"{where}: damaged ({one_line(error, 200)}); {AGAIN}") from None


class _OtherVersionError(ValueError):
    """The manifest is of another version of the format, which its text names."""
