"""What the project aims at: the tables show each target beside what was measured.

A target is held or missed where the whole interval lies on one side of it, and undecided otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Row
from benchmarks.tables import cell, table


@dataclass(frozen=True)
class Target:
    """A bound for the rows of a benchmark whose fields equal those given here; an empty field fits every row.

    packed: the beginning of that field. noted: a part of the note.
    """

    benchmark: str
    metric: str
    bound: float
    system: str = ""
    beside: str = ""
    model: str = ""
    packed: str = ""
    resolution_px: int | None = None
    batch_size: int | None = None
    noted: str = ""
    at_least: bool = True
    unit: str = ""

    def fits(self, row: Row) -> bool:
        """Whether this target is for the row."""
        return (
            (row.benchmark, row.metric) == (self.benchmark, self.metric)
            and self.system in ("", row.system)
            and self.beside in ("", row.beside)
            and self.model in ("", row.model)
            and row.packed.startswith(self.packed)
            and self.noted in row.note
            and self.resolution_px in (None, row.resolution_px)
            and self.batch_size in (None, row.batch_size)
        )

    @property
    def text(self) -> str:
        """`at least 2.5`, `under 5 s`."""
        return f"{'at least' if self.at_least else 'under'} {self.bound:g}{self.unit and ' ' + self.unit}"


def _loader(system: str, beside: str, bound: float) -> Target:
    return Target("loader", "img_per_s ratio", bound, f"dermscale native {system}", beside, "", "341x256", 224)


TARGETS = (
    _loader("jpg", "FFCV jpg", 2.5),
    _loader("raw", "FFCV raw", 5.0),
    _loader("jpg", "torchvision ImageFolder", 15.0),
    _loader("jpg", "ceiling: bare loop jpg", 0.95),
    _loader("jpg", "ceiling: decode only", 0.75),
    Target("pack", "img_per_s ratio", 1.5, "dermscale jpg", "FFCV jpg"),
    Target("pack", "img_per_s ratio", 0.9, "dermscale jpg", "ceiling: bare calls"),
    Target(
        "training",
        "img_per_s ratio",
        1.7,
        "compiled, cached batch",
        "eager NCHW in fp32, cached batch",
        "resnet18",
        resolution_px=224,
        batch_size=16,
    ),
    Target("grid", "overhead_share", 0.15, "one grid, shared worker", noted="compile on", at_least=False),
    Target("grid", "later_cell_s", 2.0, at_least=False, unit="s"),
    Target("predict", "img_per_s ratio", 0.6),
    Target("predict", "start_s", 5.0, at_least=False, unit="s"),
)
"""Every target of this project, and its rows."""


def verdict(row: Row) -> str:
    """`at least 0.6: held`, `missed` or `undecided`; empty where the row has no target, or no interval."""
    target = next((target for target in TARGETS if target.fits(row)), None)
    if target is None or row.low is None or row.high is None:
        return ""
    above, below = row.low >= target.bound, row.high < target.bound
    held, missed = (above, below) if target.at_least else (below, above)
    said = "held" if held else "missed" if missed else "undecided, the interval lies across it"
    return f"{target.text}: {said}"


def targets_text(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows that have a target; empty without any."""
    lines = []
    for row in rows:
        if said := verdict(row):
            place = (row.model, row.packed, f"{row.resolution_px} px" if row.resolution_px else "")
            what = f"{row.system} / {row.beside}" if row.beside else f"{row.system}, {row.metric}"
            lines.append([what, ", ".join(filter(None, place)), cell(row), said])
    return "Targets:\n\n" + table(["what", "of", "measured", "target"], lines) if lines else ""
