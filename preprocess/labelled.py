"""A folder of images and any table of their labels → records.

The table may have the quirks that `tables.py` reads. Columns are found by their names and contents; where that leaves a
choice, the error lists the columns and names the option.
"""

import filecmp
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol

import xxhash

from preprocess.archives import KEY, Archives
from preprocess.ham10000 import join_same_lesions
from preprocess.places import HDF5, TARS
from preprocess.records import (
    UNKNOWN,
    Record,
    Records,
    Source,
    SourceColumns,
    join_groups,
    one_row_each,
    sha256_of,
)
from preprocess.rows import Keyed, Texts
from preprocess.tables import PICTURES, SPLIT_NAMES, SURPLUS, Table, image_key
from shards.common.errors import DataError, UsageError, one_line
from shards.format import Classes
from shards.where import mask

NONE = "none"
"""The name of no column: given as the group, it makes each image a group of its own; as the label, the set has none."""
REST = "else="
"""What begins the name of the class of those rows that have no 1 in a one-hot table."""
_LABELS = (
    "dx", "diagnosis", "diagnostic", "label", "labels", "class", "classid", "classname", "target", "benignmalignant",
    "category", "lesiontype", "y",
)  # fmt: skip
_PATIENTS, _LESIONS = ("patientid", "patient", "subjectid", "pid"), ("lesionid", "lesion", "groupid", "group", "caseid")
_KNOWN = {
    "lesion_id": ("lesionid", "lesion"),
    "age": ("age", "ageapprox"),
    "sex": ("sex", "gender"),
    "localization": ("localization", "anatomsitegeneral", "anatomsitegeneralchallenge", "site", "region"),
    "dx_type": ("dxtype", "diagnosisconfirmtype"),
    "dataset": ("dataset", "attribution"),
}
"""Columns of the index and what tables call them, without case and punctuation."""
_SETS = {"melanoma": ("mel", "melanoma"), "malignant": ("malignant",)}
_LOOKED_AT = 500
_LONGEST_ID = 90


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a set is made from; None, or an empty tuple, where they are to be found.

    label: one, or one for each class with 1 where the image is of it, and perhaps REST with a name, or NONE. group: one
    or several that name a lesion or patient together, or NONE. split: train, val or test of each image. where: a
    condition on the columns of the table (`shards/where.py`), which the rows that are used meet.
    """

    image: str | None = None
    label: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    split: str | None = None
    where: str | None = None


class Rows(Protocol):
    """What is read: a `Table`, several joined, or the folders that images lie in."""

    path: Path
    columns: list[str]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Line number and values."""
        ...


class Joined:
    """A table with the columns of others beside it, each by the first column that it shares with those before it."""

    def __init__(self, first: Table, others: Iterable[Table]) -> None:
        """Read the others. Raises DataError if one shares no column, or has two rows for one value."""
        self.path, self.columns, self._first = first.path, list(first.columns), first
        self._found: list[tuple[str, Keyed]] = []
        for other in others:
            shared = next((name for name in self.columns if name in other.columns), None)
            if shared is None:
                raise DataError(
                    f"{other.path}: shares no column with {first.path.name} ({', '.join(other.columns)} and "
                    f"{', '.join(self.columns)}); rename the column that names the image or lesion"
                )
            texts = (json.dumps([image_key(row.pop(shared, "")), line, row]) for line, row in other)
            rows = Keyed(texts, lambda text: json.loads(text)[0])
            seen: dict[str, dict[str, str]] = {}
            for key, line, row in (json.loads(rows[number]) for number in rows.keys.repeated()):
                if seen.setdefault(key, row) != row:
                    raise DataError(f"{other.path}: line {line}: {shared} '{key}' has another row; remove one")
            self._found.append((shared, rows))
            self.columns += [name for name in other.columns if name not in self.columns]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The rows of the first table, with the values of the others."""
        for line, row in self._first:
            for shared, rows in self._found:
                beside = rows.named(image_key(row.get(shared, "")))
                row = (json.loads(beside[0])[2] if beside else {}) | row
            yield line, row


class Chosen:
    """The rows of a table that meet a condition on its columns."""

    def __init__(self, rows: Rows, where: str) -> None:
        """Read the rows once. Raises UsageError if the condition is wrong, or if no row meets it."""
        self.path, self.columns, self._rows = rows.path, rows.columns, rows
        cells = SourceColumns(rows.columns, ())
        for _, row in rows:
            cells.add(row)
        table: Any = cells.table()  # with the names of the index, where those of the source are meant
        self._met = mask(where, table.rename_columns(list(cells.names)))
        if not self._met.any():
            raise UsageError(f"{rows.path}: no row meets the condition {one_line(where, 160)}")

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """These rows."""
        yield from compress(self._rows, self._met)


class Folders:
    """Images in folders named after their classes, below folders train, val and test or not: a row for each image."""

    columns: list[str] = ["image", "label", "split"]  # noqa: RUF012

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """files: paths of images relative to the folder."""
        self.path, self._files = folder, files
        labels, splits = ({row[name] for _, row in self} for name in ("label", "split"))
        self.classes = labels - {""}
        self.all_split = "" not in splits and len(splits) > 1  # train alone leaves the division to --split

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The rows in the order of the paths."""
        for number, file in enumerate(self._files, 1):
            parts = PurePosixPath(file).parent.parts
            split = next((SPLIT_NAMES[part.lower()] for part in parts if part.lower() in SPLIT_NAMES), "")
            label = next((part for part in reversed(parts) if part.lower() not in SPLIT_NAMES), "")
            yield number, {"image": file, "label": label, "split": split}


class Images:
    """The picture files in a folder and below it, or in its archives, found by what a table calls them."""

    def __init__(self, source: Path) -> None:
        """List the files. Hidden ones, and those of `__MACOSX`, are left out.

        source: the folder, or one archive. Archives in a folder are looked into if it has no other images.
        """
        self.folder = source.parent if source.is_file() else source
        self.copies: set[str] = set()
        self.archives: Archives | None = None
        archives = [source.name] if source.is_file() else []
        if source.is_file() and not source.name.lower().endswith(TARS + HDF5):
            raise DataError(f"{source}: is a file; name a folder of images, or a {' or '.join(TARS + HDF5)} file")

        def paths() -> Iterator[str]:
            for place, inside, names in () if source.is_file() else os.walk(source):
                inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "__MACOSX")
                above = Path(place).relative_to(source)
                names.sort()
                for name in names:
                    if name.lower().endswith(PICTURES) and not name.startswith("."):
                        yield (above / name).as_posix()
                    elif name.lower().endswith(TARS + HDF5):
                        archives.append((above / name).as_posix())

        self.files = Keyed(paths(), image_key)
        if archives and not self.files:
            self.archives = Archives(self.folder, archives)
            self.files = Keyed(self.archives.files, image_key)
        self._own_ids, self._ids = _image_ids(self.files)

    def __contains__(self, key: str) -> bool:
        """Whether there is an image with a key (`image_key`)."""
        return key in self.files.keys

    def image_id(self, file: str) -> str:
        """The image_id of a file."""
        return self._own_ids.get(file) or _clean(_name(file))

    def find(self, cell: str) -> str:
        """The file that a cell names, with or without folders and ending. Raises ValueError with the reason."""
        found = everything = self.files.named(image_key(cell))
        if not found:
            raise ValueError(f"image '{cell}' has no file in the source")
        if len(found) > 1:
            parts = _parts(cell)
            alike = {file: _alike(parts, _parts(file)) for file in found}
            found = [file for file in found if alike[file] == max(alike.values())]
        if differing := [file for file in found[1:] if not self._same(found[0], file)]:
            raise ValueError(f"image '{cell}' may be {found[0]} or {differing[0]}, which differ")
        if len(found) > 1:
            self.copies.update(found[1:])
            plain = _clean(_name(found[0]))
            if found == everything and plain.casefold() not in self._ids:
                self._own_ids[found[0]] = plain[:_LONGEST_ID]
        return found[0]

    def _same(self, one: str, other: str) -> bool:
        if self.archives is not None:
            return self.archives.read(one) == self.archives.read(other)
        return filecmp.cmp(self.folder / one, self.folder / other, shallow=False)


def _parts(path: str) -> list[str]:
    return path.replace("\\", "/").split("/")[::-1]


def _alike(one: list[str], other: list[str]) -> tuple[int, bool]:
    """How many folders two paths share, from the image up, and whether the image's name is written alike."""
    same = 0
    for mine, theirs in zip(one[1:], other[1:], strict=False):
        if mine.casefold() != theirs.casefold():
            break
        same += 1
    return same, one[0] == other[0]


def _image_ids(files: Sequence[str]) -> tuple[dict[str, str], Texts]:
    """file → image_id, if that is not its name without ending; and all image_ids, without case.

    Where two images have one name it is that with its folders. Characters that a webdataset key cannot have become `_`.
    Where that leaves two equal names, or too long ones, a hash of the path is added.
    """
    own: dict[str, str] = {}

    def current() -> Iterator[str]:
        return (own.get(file) or _clean(_name(file)) for file in files)

    for shorten in (_clean, _hashed):
        ids = Texts(map(str.casefold, current()))
        wrong = {*ids.repeated(), *(number for number, name in enumerate(current()) if len(name) > _LONGEST_ID)}
        if not wrong:
            return own, ids
        own |= {files[number]: shorten(files[number]) for number in wrong}
    return own, Texts(map(str.casefold, current()))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _clean(path: str) -> str:
    return re.sub(r"[^!-~]|[./\\]", "_", path.rpartition(".")[0])


def _hashed(path: str) -> str:
    return f"{_clean(path)[: _LONGEST_ID - 17]}-{xxhash.xxh3_64_hexdigest(path.encode())}"


# ------------------------------------------------------------------ which columns


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns with one of the names, without case and punctuation."""
    return [column for name in names for column in columns if _plain(column) == name]


def find_columns(rows: Rows, given: Columns, images: Images) -> Columns:
    """The columns of a set, found where they are not given. Raises DataError or UsageError that lists the choices."""
    there = f"{rows.path} has the columns {', '.join(rows.columns)}"
    if given.label and all(name.startswith(REST) for name in given.label):
        raise UsageError(f"--label {','.join(given.label)}: name the columns of the other classes before it")
    asked = [given.image, *given.label, *given.group, given.split]
    if missing := [n for n in asked if n and n not in rows.columns and not n.startswith(REST) and n != NONE]:
        raise UsageError(f"{missing[0]}: no such column; {there}")
    image = given.image or _image_column(rows, images)
    label = given.label
    for option, names in (("--label", label), ("--group", given.group)):
        if NONE in names and len(names) > 1:
            raise UsageError(f"{option} {','.join(names)}: {NONE} stands alone")
    if not label:
        named = _named(rows.columns, _LABELS)
        label = (named[0],) if len(named) == 1 else ()
        if len(named) > 1:
            raise UsageError(f"{rows.path}: the label may be {' or '.join(named)}; name one with --label")
        label = label or _one_hot_columns(rows)
        if not label:
            raise UsageError(
                f"{there}, and none is clearly the label; name it with --label, or one column a class, or pack for "
                f"prediction alone with --label {NONE}"
            )
    group = given.group or tuple(_named(rows.columns, _PATIENTS)[:1] or _named(rows.columns, _LESIONS)[:1]) or (NONE,)
    return Columns(image, label, group, given.split)


def _image_column(rows: Rows, images: Images) -> str:
    """The column that names the most images in the first rows. Others may name the same ones, as a path does."""
    found: dict[str, list[str | None]] = {name: [] for name in rows.columns}
    shown: dict[str, str] = {}
    for _, row in islice(rows, _LOOKED_AT):
        for name, keys in found.items():
            keys.append(key if (key := image_key(row.get(name, ""))) in images else None)
        shown = shown or row
    hits = {name: sum(key is not None for key in keys) for name, keys in found.items()}
    best = max(hits, key=lambda name: hits[name])
    if not shown:
        raise DataError(f"{rows.path}: has no row below its header; name a table with a row for each image")
    if not hits[best]:
        first = ", ".join(f"{name} '{shown[name]}'" for name in list(shown)[:4])
        raise DataError(
            f"{rows.path}: no column names the images in {images.folder} (first row: {first}; first of "
            f"{len(images.files):,} images: {images.files[0]}); give their folder with --source, or --image"
        )
    rivals = [name for name in hits if hits[name] > hits[best] // 2]
    if any(len({found[name][n] for name in rivals} - {None}) > 1 for n in range(len(found[best]))):
        raise UsageError(f"{rows.path}: {' and '.join(rivals)} name different images; name one with --image")
    return best


def _one_hot_columns(rows: Rows) -> tuple[str, ...]:
    """The columns of which exactly one is 1 in every row; empty if there are none."""
    columns, marked = list(rows.columns), Counter[str]()
    for _, row in rows:
        columns = [name for name in columns if label_text(row.get(name, "")) in _FLAGS]
        marked.update(name for name in columns if _FLAGS[label_text(row[name])])
        if len(columns) < 2:
            return ()
    columns = [name for name in columns if marked[name]]
    one_each = all(sum(_FLAGS[label_text(row[name])] for name in columns) == 1 for _, row in rows)
    return tuple(columns) if one_each and len(columns) > 1 else ()


_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}
_NO_LABEL = UNKNOWN - {"unknown", "none", "-"}
"""What is no label, in any case. In some sets unknown and none are classes."""


def label_text(cell: str) -> str:
    """A label as text: `1.0` is `1`, and `TRUE` is `true`."""
    if re.fullmatch(r"[+-]?\d+\.0*", cell):
        cell = cell.partition(".")[0]
    return cell.lower() if cell.lower() in ("true", "false") else cell


def _label_of(columns: Columns) -> Callable[[dict[str, str]], str]:
    """What reads the label of a row. It raises ValueError with the reason if the row has none.

    In a set without labels it is empty.
    """
    if columns.label == (NONE,):
        return lambda row: ""
    one_hot = [name for name in columns.label if not name.startswith(REST)]
    rest = next((name.removeprefix(REST) for name in columns.label if name.startswith(REST)), None)
    if len(columns.label) == 1:
        (name,) = one_hot or ("",)

        def of_column(row: dict[str, str]) -> str:
            label = label_text(row.get(name, ""))
            if label.lower() in _NO_LABEL:
                raise ValueError(f"{name} is {repr(label) if label else 'empty'}, so there is no label")
            return label

        return of_column

    def of_marks(row: dict[str, str]) -> str:
        flags = {name: _FLAGS.get(label_text(row.get(name, ""))) for name in one_hot}
        if wrong := [name for name, flag in flags.items() if flag is None]:
            raise ValueError(f"{wrong[0]} is '{row.get(wrong[0], '')}', and 0 or 1 is needed")
        marked = [name for name, flag in flags.items() if flag]
        if len(marked) > 1:
            raise ValueError(f"has {' and '.join(marked)} at 1, and one class is needed")
        if not marked and rest is None:
            raise ValueError(f"has no class at 1; say which class that is with --label {','.join(one_hot)},{REST}NAME")
        return marked[0] if marked else str(rest)

    return of_marks


# ------------------------------------------------------------------ the records


def read_labelled(
    images: Images,
    rows: Rows,
    given: Columns,
    classes: Classes | None = None,
    dataset: str | None = None,
    spelled: Mapping[str, str] = MappingProxyType({}),
    same: Iterable[tuple[str, str]] = (),
) -> tuple[Source, dict[str, str] | None]:
    """The records of a table's rows, and the split of each image_id if a column names it.

    classes: those of the set, which labels name in any case; None: all labels of the table. dataset: its name in the
    manifest. spelled: other spellings of classes, in lower case. same: pairs of image_ids that no split divides, nor
    their groups. Problems of single rows are in `rejected`. Raises DataError or UsageError if the columns or classes
    cannot be found, or if no image can be packed.
    """
    if given.where is not None:
        rows = Chosen(rows, given.where)
    columns = find_columns(rows, given, images)
    source = Source(
        images.folder,
        "not named",
        "not named",
        group=() if NONE in columns.group else columns.group,
        members=None if images.archives is None else images.archives.members,
    )
    labelled = columns.label != (NONE,)
    one_label = not source.group or any("lesion" in name.lower() for name in source.group)
    or_lesion = not given.group and bool(_named(source.group, _PATIENTS))  # some images have a lesion and no patient
    read_label = _label_of(columns)
    known = {name: (_named(rows.columns, names) or [""])[0] for name, names in _KNOWN.items()}
    names = () if classes is None else classes.names
    spelling = {written: name for written, name in spelled.items() if name in names}
    spelling |= {name.casefold(): name for name in names} | {name: name for name in names}
    made = {own for own, column in known.items() if own == column}
    made |= {own for own, column in (("image_id", columns.image), ("split", columns.split)) if own == column}
    made |= {own for own, of in (("dx", columns.label), ("group", columns.group)) if of == (own,)}
    further = SourceColumns(() if isinstance(rows, Folders) else rows.columns, {KEY, *made})
    splits: dict[str, str] = {}

    def read(row: dict[str, str]) -> Record:
        if SURPLUS in row:
            raise ValueError(f"has more fields than columns ('{row[SURPLUS][:40]}'): quote a field with a separator")
        file = images.find(row.get(str(columns.image), ""))
        label = read_label(row)
        if classes is not None and labelled:
            written, label = label, spelling.get(label, spelling.get(label.casefold(), ""))
            if not label:
                raise ValueError(f"label '{written}' is none of the classes ({', '.join(names)})")
        if columns.split is not None:
            split = SPLIT_NAMES.get(row.get(columns.split, "").lower())
            if split is None:
                raise ValueError(f"{columns.split} is '{row.get(columns.split, '')}', and train, val or test is needed")
            splits[images.image_id(file)] = split
        values: dict[str, Any] = {name: row.get(column) or None for name, column in known.items()}
        values["age"] = _age(values["age"])
        parts = [row.get(name, "") for name in source.group]
        parts = ["" if part.lower() in UNKNOWN else part for part in parts]
        lesion = str(values["lesion_id"] or "")
        values["lesion_id"] = None if lesion.lower() in UNKNOWN else lesion
        group = "/".join(parts) if any(parts) else values["lesion_id"] if or_lesion else None
        dx = label if labelled else None
        return Record(images.image_id(file), file, dx=dx, group=group, row=further.add(row), **values)

    def read_all() -> Iterator[tuple[int, str, Record | str]]:
        for line, row in rows:
            cell = PurePosixPath(row.get(str(columns.image), "").replace("\\", "/")).name
            try:
                record = read(row)
                yield line, record.image_id, record
            except ValueError as error:
                yield line, cell, str(error)

    if rows.path.is_relative_to(images.folder):
        table = rows.path.relative_to(images.folder).as_posix()
    else:  # a set names no path of the machine
        table = rows.path.name
        source.tables[table] = rows.path
    source.records = one_row_each(read_all(), table, source.rejected, one_label)
    if not source.records:
        first = f" (first: {source.rejected[0].reason})" if source.rejected else ""
        raise DataError(f"{rows.path}: lists no image that can be packed{first}")
    source.columns = further.table()
    if not labelled:
        source.classes = Classes(())
    else:
        source.classes = _found_classes(source.records, columns, rows.path) if classes is None else classes
    if one_label and source.group:
        join_same_lesions(source)
    joined = join_groups(source, same)
    source.warnings = _warnings(source, images, rows, given.where)
    unused = [] if columns.split or isinstance(rows, Folders) else _named(rows.columns, ("split",))
    source.warnings += [f"the column {one} is not used: take the splits from it with --split-column" for one in unused]
    about = {"image": columns.image, "label": list(columns.label), "split": columns.split}
    if or_lesion and known["lesion_id"]:
        about["group_where_empty"] = known["lesion_id"]
    if given.where is not None:
        about["where"] = given.where
    source.about = {"dataset": dataset or rows.path.stem, "columns": about}
    if joined:
        source.about["joined_groups"] = joined
    if rows.path.is_file():
        source.about["metadata_sha256"] = sha256_of(rows.path)
    return source, splits if columns.split is not None else None


def _age(text: str | None) -> float | None:
    """Years; None for what is no age."""
    try:
        age = float(text or "nan")
    except ValueError:
        return None
    return age if 0 <= age <= 130 else None


def _found_classes(records: Records, columns: Columns, path: Path) -> Classes:
    """The labels as classes: in the order of one-hot columns, of their numbers, or of the alphabet."""
    found = set(map(str, records.column("dx")))
    if len(found) > max(2, len(records) // 2):
        raise UsageError(
            f"{path}: {columns.label[0]} has {len(found):,} values in {len(records):,} rows, so it is no class; name "
            "the label with --label"
        )
    names = [name.removeprefix(REST) for name in columns.label] if len(columns.label) > 1 else sorted(found)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        names.sort(key=int)
    names = [name for name in names if name in found]
    members = {kind: tuple(n for n in names if n.lower() in words) for kind, words in _SETS.items()}
    try:
        return Classes(tuple(names), {}, {kind: some for kind, some in members.items() if some})
    except ValueError as error:
        raise DataError(f"{path}: {error}; name another --label, or the classes with --classes") from None


def _warnings(source: Source, images: Images, rows: Rows, where: str | None) -> list[str]:
    """What is allowed, and may be a mistake."""
    warnings = []
    if not source.group and source.classes:
        warnings.append(
            "no column names the lesion or patient, so each image is split on its own: views of one lesion may be in "
            "training and test; name the column with --group if there is one"
        )
    elif source.classes and all(group is None for group in source.records.column("group")):
        warnings.append(f"{' and '.join(source.group)} is empty in all rows, so each image is split on its own")
    used = Texts(source.records.column("file"))
    left_out = {image_key(rejected.image_id) for rejected in source.rejected}
    unlisted = [
        number
        for number, file in enumerate(images.files)
        if file not in used
        and file not in images.copies
        and not {image_key(file), images.image_id(file).casefold()} & left_out
    ]
    if unlisted:
        why = "are not in" if where is None else "have no row that meets the condition in"
        first = f"(first: {images.files[unlisted[0]]})"
        warnings.append(f"{len(unlisted):,} images {why} {rows.path.name} and are left out {first}")
    there = set(source.records.column("dx"))
    if absent := [name for name in source.classes.names if name not in there]:
        warnings.append(f"the source has no image of {', '.join(absent[:20])}: a model cannot learn these classes")
    return warnings


def read_classes_file(path: Path) -> Classes:
    """The classes in a table with the columns `name` and, if wanted, `long_name` and `sets`, in the order of its rows.

    `sets` holds names of sets of interest with blanks between them, such as `malignant`. Raises DataError.
    """
    table = Table(path, "a table with the columns name, long_name and sets")
    table.require(["name"])
    rows = [(label_text(row.get("name", "")), row.get("long_name", ""), row.get("sets", "")) for _, row in table]
    try:
        return classes_of(rows)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def classes_of(rows: Iterable[tuple[str, str, str]]) -> Classes:
    """Classes from the name, long name and sets of interest of each. Raises ValueError."""
    names: list[str] = []
    long_names: dict[str, str] = {}
    sets: dict[str, tuple[str, ...]] = {}
    for name, words, kinds in rows:
        names.append(name)
        if words:
            long_names[name] = words
        for kind in kinds.split():
            sets[kind] = (*sets.get(kind, ()), name)
    return Classes(tuple(names), long_names, sets)
