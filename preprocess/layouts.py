"""The layouts in which public sets come, each described by a file in `sets/`, and what finds which one a folder has."""

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from preprocess.archives import KEY
from preprocess.ham10000 import METADATA, SYNTHETIC, read_source
from preprocess.labelled import NONE, Columns, Folders, Images, Joined, classes_of, read_labelled
from preprocess.places import HDF5, TARS
from preprocess.records import Source
from preprocess.tables import PICTURES, Table
from shards.common.errors import DataError, UsageError
from shards.format import HAM10000, Classes

_ORDER = (
    "ham10000",
    "isic2018",
    "isic2019",
    "isic2020",
    "isic2024",
    "milk10k",
    "bcn20000",
    "pad-ufes-20",
    "isic-archive",
)
"""The first that fits is taken; an export of the archive has fewer columns that tell it apart."""


@dataclass(frozen=True)
class Layout:
    """One layout. tables: patterns of file names, in any case; the first has a row for each image, and the others are
    joined to it.

    `a|b`: the first that is there. A `?` at the end: left out where there is none. needed: columns of the first table
    without which it is of another layout. labels: the label column is the first of these that the tables have. classes:
    None: all labels of the table. spelled: other spellings of classes, in lower case. same: pattern of a table of pairs
    of images that no split divides.
    """

    name: str
    tables: tuple[str, ...]
    needed: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    image: str
    citation: str
    licence: str
    group: tuple[str, ...] = ()
    classes: Classes | None = None
    spelled: Mapping[str, str] = field(default_factory=dict)
    same: str | None = None


@functools.cache
def layouts() -> tuple[Layout, ...]:
    """All known layouts, in the order in which they are looked for."""
    here = Path(__file__).parent / "sets"
    return tuple(_layout(tomllib.loads((here / f"{name}.toml").read_text(encoding="utf-8"))) for name in _ORDER)


def _layout(raw: dict[str, Any]) -> Layout:
    """A description, checked by the types that it is made from. Long names are spellings of the classes too."""
    del raw["synthetic"]  # of preprocess.synthetic
    listed = raw.pop("classes", None)
    classes = HAM10000 if listed == "HAM10000" else None if listed is None else classes_of(listed)
    words = {} if classes is None else {words.lower(): name for name, words in classes.long_names.items()}
    raw |= {name: tuple(raw[name]) for name in ("tables", "needed", "group") if name in raw}
    labels = tuple(map(tuple, raw["labels"]))
    return Layout(**raw | {"labels": labels, "classes": classes, "spelled": words | raw.get("spelled", {})})


def read_folder(
    folder: Path, tables: tuple[Path, ...], given: Columns, classes: Classes | None
) -> tuple[Source, dict[str, str] | None, str]:
    """The records in a folder or archive, the split of each image where the source names it, and what was found.

    tables: those that the user named; without any, the layout is found. given, classes: what the user named, which
    replaces what a layout says. Raises DataError or UsageError if nothing fits.
    """
    images = Images(folder)
    plain = given == Columns() and classes is None
    if not tables and ((plain and _is_official(images)) or not (images.files or folder.is_file())):
        del images  # which `read_source` lists in its own way
        return read_source(folder), None, "HAM10000"
    if not images.files:
        raise DataError(f"{folder}: holds no image ({', '.join(PICTURES)}), here or below; name another --source")
    if tables:
        rows = _joined(tables, images)
        source, splits = read_labelled(images, rows, given, classes)
        return source, splits, f"table {rows.path.name}"
    beside = _files(images.folder)
    for layout in layouts():
        if (rows := _rows(layout, beside, images)) is not None:
            label = next((one for one in layout.labels if set(one) <= set(rows.columns)), ())
            group = layout.group if set(layout.group) <= set(rows.columns) else ()
            columns = replace(
                given,
                image=given.image or layout.image,
                label=given.label or label,
                group=given.group or group,
            )
            own = layout.classes if not given.label else None
            same = _pairs(layout, beside)
            source, splits = read_labelled(images, rows, columns, classes or own, layout.name, layout.spelled, same)
            source.citation, source.licence = layout.citation, layout.licence
            if all(re.fullmatch("SYN_[0-9]{7}", image_id) for image_id in source.records.column("image_id")):
                source.citation, source.licence, source.about["dataset"] = *SYNTHETIC, "synthetic"
            return source, splits, layout.name
    if (tars := images.archives) is not None and tars.columns != [KEY]:
        label = given.label or tuple(name for name in _TAR_LABELS if name in tars.columns)[:1]
        columns = replace(given, image=given.image or KEY, label=label, split=given.split or tars.split)
        source, splits = read_labelled(images, tars, columns, classes, folder.resolve().stem)
        return source, splits, "webdataset tars" + (", in train, val and test" if splits else "")
    folders = Folders(images.folder, images.files)
    if given == Columns(label=(NONE,)):
        columns = Columns("image", (NONE,), (NONE,))
        source, _ = read_labelled(images, folders, columns, None, folder.resolve().name)
        return source, None, "images without labels"
    if len(folders.classes) > 1:
        if given != Columns():
            raise UsageError(
                f"{folder}: has a folder for each class and no table of a known layout, so it has no columns to name; "
                "name the table with --table, or leave --image, --label, --group, --split-column and --where out"
            )
        columns = Columns("image", ("label",), (NONE,), "split" if folders.all_split else None)
        known = None if classes else _of_folders(folders.classes)
        own, spelled = (classes, {}) if known is None else (known.classes, known.spelled)
        source, splits = read_labelled(images, folders, columns, own, folder.resolve().name, spelled)
        which = "a folder for each class" + (f", which are those of {known.name}" if known else "")
        return source, splits, which + (", in train, val and test" if splits else "")
    raise DataError(
        f"{folder}: holds images and no table of a known layout "
        f"({', '.join(layout.name for layout in layouts())}), nor a folder for each class; name a table with --table"
        f"{_tables_below(images.folder)}, or pack for prediction alone with --label {NONE}"
    )


def _tables_below(folder: Path) -> str:
    """The first files in a folder, at any depth, that may be tables, in parentheses; nothing if there are none."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _may_be_table(path))
    return f" (there is {', '.join(found[:3])}{' …' if len(found) > 3 else ''})" if found else ""


_TAR_LABELS = ("dx", "diagnosis", "label", "cls")
"""What webdatasets call the label, the plainest words first."""


def _is_official(images: Images) -> bool:
    """Whether HAM10000's table is in its place, with diagnoses as published, and images are in theirs."""
    table = next((images.folder / name for name in METADATA if (images.folder / name).is_file()), None)
    if table is None or not any(re.fullmatch("(HAM10000_images[^/]*/)?[^/]+", file) for file in images.files):
        return False
    first = next((row for _, row in Table(table, "the official metadata")), {})
    return first.get("dx", "").lower() not in layouts()[0].spelled


def _of_folders(names: set[str]) -> Layout | None:
    """The layout that has the classes which folders are named after. Two classes are too few to tell."""
    for layout in layouts():
        if layout.classes is not None and len(layout.classes) == len(names) > 2:
            spelled = {**layout.spelled} | {name.casefold(): name for name in layout.classes.names}
            if {spelled.get(name.casefold()) for name in names} == set(layout.classes.names):
                return layout
    return None


def _joined(tables: tuple[Path, ...], images: Images) -> Joined:
    first, *others = (Table(path, "a table of images and labels", images) for path in tables)
    return Joined(first, others)


def _files(folder: Path) -> list[Path]:
    """The tables in a folder and in those directly in it, sorted: those in the folder itself come first."""
    return [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if _may_be_table(path)]


def _may_be_table(path: Path) -> bool:
    other = path.name[0] == "." or path.name.lower().endswith((*PICTURES, *TARS, *HDF5))
    return not other and path.is_file()


def _matching(pattern: str, files: list[Path]) -> Path | None:
    """The first file for the first of the patterns between `|` that there is one for."""
    patterns = pattern.lower().split("|")
    return next((path for one in patterns for path in files if fnmatch(path.name.lower(), one)), None)


def _rows(layout: Layout, files: list[Path], images: Images) -> Joined | None:
    """The tables of a layout, joined; None if one that it needs is missing, or if the first lacks its columns."""
    found: list[Path] = []
    for pattern in layout.tables:
        path = _matching(pattern.removesuffix("?"), files)
        if path is None and not pattern.endswith("?"):
            return None
        found += [path] if path is not None and path not in found else []
    columns = Table(found[0], "the official table", images).columns
    return _joined(tuple(found), images) if set(layout.needed) <= set(columns) else None


def _pairs(layout: Layout, files: list[Path]) -> list[tuple[str, str]]:
    """The pairs of images that a layout lists as the same."""
    path = _matching(layout.same, files) if layout.same else None
    table = [] if path is None else Table(path, "the official list")
    pairs = []
    for line, row in table:
        if len(row) < 2:
            raise DataError(f"{path}: line {line} names one image, and a pair is needed; use the official list")
        pairs.append(tuple(row.values())[:2])
    return pairs
