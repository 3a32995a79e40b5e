"""Tables as people have them: CSV with any usual separator, quotes, line ends and header, read row by row."""

import codecs
import csv
import io
from collections.abc import Container, Iterable, Iterator
from itertools import dropwhile, islice
from pathlib import Path, PurePosixPath

from shards.common.errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of image files, in lower case."""
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_NAMES |= {"test": "test", "testing": "test"}
"""What tables, folders and tars call the splits, in lower case."""
SURPLUS = ""
"""The key in a row for the text behind its last column."""
_SEPARATORS = ",;\t|"
_LOOKED_AT = 20


def image_key(text: str) -> str:
    """What names an image in a cell or path: the last part, without the ending of an image file, in lower case.

    Paths may be those of Windows.
    """
    name = PurePosixPath(text.replace("\\", "/")).name
    stem, _, suffix = name.rpartition(".")
    return (stem if f".{suffix}".lower() in PICTURES else name).casefold()


class Table:
    """The rows of a text file with a line number each. It can be read many times; values have no blanks around them.

    UTF-8, with or without a byte order mark, and UTF-16 with one. The separator is that of `, ; tab |` which the first
    line has most of, or blanks. Columns without a name, and those of a file without a header, are named by their number
    from 1. A header that comes again is left out.
    """

    def __init__(self, path: Path, remedy: str, images: Container[str] = ()) -> None:
        """Read the file. Raises DataError if it is not a table; remedy: what the message tells the user to use.

        images: keys of the images (`image_key`). A first line that names one of them is no header.
        """
        self.path, self._remedy = path, remedy
        self._separator = self._find_separator()
        _, first = next(self._rows(), (0, None))
        if first is None:
            raise DataError(f"{path}: is empty; use {remedy}")
        self.header = not any(image_key(cell) in images or cell.lower().endswith(PICTURES) for cell in first)
        names = first if self.header else [""] * len(first)
        self.columns: list[str] = []
        for number, name in enumerate(names, 1):
            self.columns.append(name if name and name not in self.columns else str(number))

    def _find_separator(self) -> str:
        lines = [line[:-1] for line in islice(dropwhile("\n".__eq__, self._lines()), _LOOKED_AT)] or [""]
        best = max(_SEPARATORS, key=lambda one: _fields(lines[0], one))
        if _fields(lines[0], best) > 1:
            return best
        widths = {len(line.split()) for line in lines if line.strip()}
        return " " if len(widths) == 1 and widths != {1} else ","

    def _lines(self) -> Iterator[str]:
        """The lines of the file, each with a line feed. Raises DataError if it cannot be read, or is no text."""
        number = 1
        try:
            with self.path.open("rb") as file:
                wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                file.seek(0)
                for line in io.BytesIO(file.read().decode("utf-16").encode()) if wide else file:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if "\0" in text:
                        raise DataError(
                            f"{self.path}: line {number} holds a zero byte, so it is no text; save it as CSV in UTF-8"
                        )
                    yield from (f"{one}\n" for one in text.rstrip("\n").rstrip("\r").split("\r"))
                    number += 1
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from None
        except UnicodeDecodeError as error:
            number += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{self.path}: line {number} is not UTF-8 text; save it as UTF-8, or use {self._remedy}"
            ) from None

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Every line that is not empty. Raises DataError naming the line that cannot be read."""
        rows = csv.reader(self._lines(), delimiter=self._separator, skipinitialspace=True, strict=True)
        read = 0
        try:
            for row in rows:
                read = rows.line_num
                if any(values := [value.strip() for value in row]):
                    yield read, values
        except csv.Error as error:  # the line where it ends may be far behind the one where a quote was opened
            raise DataError(
                f"{self.path}: the row that begins in line {read + 1} cannot be read ({error}); check its quotes, or "
                f"use {self._remedy}"
            ) from None

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The rows below the header: line number, and the value of each column. A short row lacks the last ones."""
        head = None
        for line, values in self._rows():
            if self.header and values == (head := head or values):
                continue
            row = dict(zip(self.columns, values, strict=False))
            if surplus := self._separator.join(values[len(self.columns) :]).strip(self._separator):
                row[SURPLUS] = surplus
            yield line, row

    def require(self, names: Iterable[str]) -> None:
        """Raise DataError if a column is missing."""
        if missing := [name for name in names if name not in self.columns]:
            there = ", ".join(self.columns)
            raise DataError(f"{self.path}: has no column {', '.join(missing)} (it has {there}); use {self._remedy}")


def read_table(
    path: Path, needed: Iterable[str], official: str = "the official metadata"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a table that has the needed columns. Raises DataError as `Table`; official: its remedy."""
    table = Table(path, official)
    table.require(needed)
    yield from table


def _fields(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator, skipinitialspace=True)))
    except csv.Error:
        return 1
