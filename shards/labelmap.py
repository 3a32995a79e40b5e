"""Maps from the labels of one set to the classes of another: `shards/maps/` holds those of public sets."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from shards.common.errors import DataError, UsageError, one_line
from shards.format import HAM10000, Classes

_MALIGNANT = Classes(("benign", "malignant"), {}, {"malignant": ("malignant",)})
_KNOWN = (HAM10000, _MALIGNANT)


@dataclass(frozen=True)
class LabelMap:
    """Labels and what they become; an empty text if there is no counterpart. name: that of the map or of its file."""

    name: str
    rows: dict[str, str]

    @cached_property
    def _folded(self) -> dict[str, str]:
        return {name.casefold(): to for name, to in self.rows.items()}

    def target(self, label: str) -> str:
        """The class of a label, empty without a counterpart. Raises UsageError for a label that the map does not name.

        Names are compared as they are written, then in any case. Of a name with levels, `A::B::C`, the whole is looked
        for, then its last level, and so on to the first.
        """
        for name in (label, *reversed(label.split("::"))):
            if name in self.rows:
                return self.rows[name]
            if name.casefold() in self._folded:
                return self._folded[name.casefold()]
        raise UsageError(
            f"--map {self.name}: says nothing about the label '{one_line(label, 60)}' (it names "
            f"{one_line(', '.join(self.rows), 160)}); add a row, with an empty `to` if it has no counterpart"
        )

    def split(self, labels: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """The labels that have a counterpart, with it, and those that have none. Raises UsageError as `target`."""
        found = {label: self.target(label) for label in labels}
        return {label: to for label, to in found.items() if to}, [label for label, to in found.items() if not to]

    @property
    def classes(self) -> Classes:
        """The classes that labels become.

        HAM10000's seven, or benign and malignant, if all are among these; otherwise those of the map, in the order of
        the alphabet.
        """
        names = sorted({to for to in self.rows.values() if to})
        known = next((one for one in _KNOWN if set(names) <= set(one.names)), None)
        return known or Classes(tuple(names))


def _shipped() -> dict[str, str]:
    """The maps that come with the package: name → text."""
    return {
        one.name.removesuffix(".csv"): one.read_text(encoding="utf-8")
        for one in sorted(files("shards").joinpath("maps").iterdir(), key=lambda one: one.name)
    }


def read_map(name: str) -> LabelMap:
    """A map of the package by its name, or one in a file: CSV with the columns `from` and `to`, `#` begins a comment.

    Fields are separated by commas, semicolons or tabs. More columns, such as a reason, are for people. Raises
    UsageError if there is no such map, DataError if the file is not a map.
    """
    shipped = _shipped()
    if name in shipped:
        text = shipped[name]
    else:
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, IsADirectoryError):
            raise UsageError(
                f"--map {name}: neither a file nor one of the maps that are here: {', '.join(shipped)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--map {name}: cannot be read as UTF-8 text ({one_line(error, 100)})") from None
    # comments become empty lines, so that the numbers of the others stay
    lines = ["" if line.startswith("#") else line for line in text.splitlines()]
    separator = max(",;\t", key=next(filter(None, lines), "").count)
    table = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, skipinitialspace=True, strict=True)
    columns: list[str] = []
    rows: dict[str, str] = {}
    try:
        for cells in filter(None, table):
            values = [cell.strip() for cell in cells]
            if not columns:
                columns = values
                if not {"from", "to"} <= set(columns):
                    raise DataError(f"--map {name}: has the columns {', '.join(columns)}; from and to are needed")
                continue
            row = dict(zip(columns, values, strict=False))
            label, to = row.get("from", ""), row.get("to", "")
            if not label or rows.setdefault(label, to) != to:
                what = f"'{label}' is mapped twice" if label else "from is empty"
                raise DataError(f"--map {name}: line {table.line_num}: {what}")
    except csv.Error as error:
        raise DataError(f"--map {name}: line {table.line_num} cannot be read ({error})") from None
    if not rows:
        raise DataError(f"--map {name}: holds no row; the columns from and to are needed")
    found = LabelMap(name, rows)
    try:
        found.classes  # noqa: B018 (it is checked where the file is named)
    except ValueError as error:
        raise DataError(f"--map {name}: {error}") from None
    return found
