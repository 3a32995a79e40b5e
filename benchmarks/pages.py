"""The page of a benchmark: its rows as tables in Markdown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.tables import busy_text, machine_text, notes, read_csv
from benchmarks.targets import targets_text
from shards.common.files import write_durably

_SIZE = re.compile(r"\d+x\d+")


@dataclass(frozen=True)
class Page:
    """How the rows of a benchmark are shown.

    name: of the benchmark, and of its CSV. tables: rows → parts in Markdown. chart: the metric that its chart shows,
    and its title.
    """

    name: str
    title: str
    tables: Callable[[Sequence[Row]], list[str]]
    chart: tuple[str, str] = ("img_per_s", "images per second")

    def text(self, rows: Sequence[Row]) -> str:
        """The rows as Markdown: the tables, the targets, the notes, and the machine."""
        own = [row for row in rows if row.benchmark == self.name]
        parts = [f"## {self.title}\n", *self.tables(own)]
        parts += [about(own) for about in (targets_text, busy_text, notes, machine_text)]
        return "\n".join(part for part in parts if part)

    def write(self, path: Path) -> str:
        """Write the page of a CSV beside it, and return it. Raises DataError for a CSV that cannot be read."""
        text = self.text(read_csv(path))
        write_durably(path.with_suffix(".md"), text.encode())
        return text


def place(rows: Sequence[Row]) -> str:
    """The sizes of the images of a job: `packed at 341x256, 224 px`."""
    sizes = [f"packed at {found.group()}" for row in rows if (found := _SIZE.match(row.packed))]
    return ", ".join(dict.fromkeys(sizes + [f"{row.resolution_px} px" for row in rows if row.resolution_px]))
