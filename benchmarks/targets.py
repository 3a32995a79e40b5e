"""The targets of the project: the tables show each one beside what was measured.

A target is met, or not met, where the whole interval lies on one side of it. Where the interval contains it, that
is not clear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import Row
from benchmarks.monitor import MOST_CORE_SHARE
from benchmarks.tables import cell, table


@dataclass(frozen=True)
class Target:
    """A bound for the rows of a benchmark. fields: of Row → their values in these rows. packed: the beginning of that
    field. noted: a part of the note."""

    benchmark: str
    metric: str
    bound: float
    fields: Mapping[str, Any] = field(default_factory=dict)
    packed: str = ""
    noted: str = ""
    at_least: bool = True
    unit: str = ""

    def fits(self, row: Row) -> bool:
        """Whether this target is for the row."""
        wanted = {"benchmark": self.benchmark, "metric": self.metric, **self.fields}
        same = all(getattr(row, name) == value for name, value in wanted.items())
        return same and row.packed.startswith(self.packed) and self.noted in row.note

    @property
    def text(self) -> str:
        """`at least 2.5`, `under 5 s`."""
        return f"{'at least' if self.at_least else 'under'} {self.bound:g}{self.unit and ' ' + self.unit}"


def _loader(system: str, beside: str, bound: float, **more: Any) -> Target:
    fields = {"system": f"dermscale native {system}", "beside": beside, "resolution_px": 224, **more}
    return Target("loader", "img_per_s ratio", bound, fields, packed="341x256")


def _packer(beside: str, bound: float) -> Target:
    return Target("pack", "img_per_s ratio", bound, {"system": "dermscale jpg", "beside": beside})


_STEP = {"system": "compiled, cached batch", "beside": "eager NCHW in fp32, cached batch", "model": "resnet18"}

TARGETS = (
    _loader("jpg", "FFCV jpg", 3.5),
    _loader("raw", "FFCV raw", 6.0),
    _loader("jpg", "torchvision ImageFolder", 15.0),
    _loader("jpg", "ceiling: decode only", 1.25),
    _loader("jpg", "dermscale native jpg, 1 thread", 1.9, workers=2),
    _loader("raw", "dermscale native raw, 1 thread", 1.9, workers=2),
    _loader("jpg, 16 threads", "dermscale native jpg", 0.95, workers=2),
    _loader("raw, 16 threads", "dermscale native raw", 0.95, workers=2),
    *(
        Target("loader-beside-python", metric, bound, {"system": f"dermscale native {kind}"})
        for kind in ("jpg", "raw")
        for metric, bound in (("kept", 0.90), ("left_to_python", 0.95))
    ),
    Target("latency", "first_batch", 30, at_least=False, unit="ms"),
    Target("latency", "python", 0.5, at_least=False, unit="us"),
    Target("latency", "plan_memory_1000000", 200, at_least=False, unit="MB"),
    _packer("FFCV jpg", 1.5),
    _packer("ceiling: bare calls", 0.9),
    Target("training", "img_per_s ratio", 1.7, {**_STEP, "resolution_px": 224, "batch_size": 16}),
    Target("stalls", "accelerator_utilization", 0.90),  # MLPerf Storage's minimum for image classification
    Target("utilization", "sampler_core_share", MOST_CORE_SHARE, at_least=False),
    Target("together", "img_per_s ratio", 1.0, {"system": "two runs with the advised threads", "beside": "one run"}),
    Target("grid", "overhead_share", 0.15, {"system": "one grid, shared worker"}, noted="compile on", at_least=False),
    Target("grid", "later_cell_s", 2.0, at_least=False, unit="s"),
    Target("predict", "img_per_s ratio", 0.6),
    Target("predict", "start_s", 5.0, at_least=False, unit="s"),
    Target("store", "cold_img_per_s ratio", 1.2),
    Target("store", "warm_img_per_s ratio", 0.97),
    *(Target("store", "fetched", 1.02, {"system": f"dermscale, {ms} ms"}, at_least=False) for ms in (1, 8)),
)
"""Every target of this project, and its rows."""


def verdict(row: Row) -> str:
    """`at least 0.6: met` or `not met`, or that the interval contains the target; empty where the row has no target, or
    no interval."""
    target = next((target for target in TARGETS if target.fits(row)), None)
    if target is None or row.low is None or row.high is None:
        return ""
    above, below = row.low >= target.bound, row.high < target.bound
    met, failed = (above, below) if target.at_least else (below, above)
    said = "met" if met else "not met" if failed else "not clear, the interval contains it"
    return f"{target.text}: {said}"


def targets_text(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows that have a target; empty without any."""
    lines = []
    for row in rows:
        if said := verdict(row):
            place = (row.model, row.packed, f"{row.resolution_px} px" if row.resolution_px else "")
            what = f"{row.system} / {row.beside}" if row.beside else f"{row.system}, {row.metric}"
            lines.append([what, ", ".join(filter(None, place)), cell(row), *said.split(": ")])
    if not lines:
        return ""
    explained = "A target is met, or not met, where the whole interval lies on one side of it:\n\n"
    return explained + table(["what", "of", "measured", "target", "result"], lines)
