"""The tables of the `utilization` benchmark, made from its rows alone."""

from collections.abc import Sequence

from benchmarks.gpu import UNITS
from benchmarks.measure import Row
from benchmarks.monitor import MOST_CORE_SHARE
from benchmarks.tables import busy_text, cell, figure, grid, machine_text, notes
from benchmarks.timeline import in_order, reading
from benchmarks.utilization import NO_GPU, NOT_READ, STATISTICS, core_means

_SUMMARY = (
    "sm_percent",
    "tensor_percent",
    "occupancy_percent",
    "dram_percent",
    "memory_used_bytes",
    "power_w",
    "sm_mhz",
    "pcie_rx_mib_per_s",
    "pcie_tx_mib_per_s",
    "busy_percent",
)
"""A GPU's columns of the summary; NVML's "utilization" is the last."""


def utilization_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: the summary of each run, every reading, and what sampling cost."""
    own = [row for row in rows if row.benchmark == "utilization"]
    gpu = any(row.value is not None and _metric(row) in UNITS for row in own)
    parts = [
        "## Utilization\n",
        "What the device did while a model trained. Speed, its share of the cached-batch ceiling and the share of time "
        "spent waiting for data come first; readings are means over the counted span, median [interval] over the "
        "rounds.\n",
        _start_up(own),
    ]
    if gpu:
        parts.append(
            "NVML busy says only that some kernel ran, not that the GPU was full: read it beside the first columns. "
            "Memory used is that of all processes on the GPU.\n"
        )
    else:
        reason = NOT_READ if any(row.failed == NOT_READ for row in own) else NO_GPU
        parts.append(
            f"The GPU columns are empty: {reason}. What was read are the CPU's cores, from the kernel's counters "
            "(10 ms steps, all processes on the machine); there the loader and the model share the cores, so cores "
            "that are busy are no sign that the model has them.\n"
        )
    parts.append(_summary(own))
    parts.append("Every reading; mean and median are medians over the rounds, min and max of all rounds:\n")
    parts.append(_readings(own))
    parts += [_missing(own), _cost(own), busy_text(own)]
    parts.append(notes([row for row in own if row.metric == "img_per_s" or (row.failed and _is_samplers(row))]))
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)


def _is_samplers(row: Row) -> bool:
    return row.metric in ("sampler_core_share", "reached_hz")


def _metric(row: Row) -> str:
    return row.metric.rpartition(" ")[0]


def _runs(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(model, system) → its rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.system), []).append(row)
    return found


def _start_up(rows: Sequence[Row]) -> str:
    took = [row.value for row in rows if row.metric == "set_up_s" and row.value is not None]
    if not took:
        return ""
    return (
        "In every round each system started in a process of its own, and ended before the next. Starting, compiling "
        f"where it compiles, and three warm-up passes ({figure(min(took))} to {figure(max(took))} s, median of each "
        "system) come before the clock: they are in no figure here.\n"
    )


def _summary(rows: Sequence[Row]) -> str:
    cores = any(core_means(run) for run in _runs(rows).values())
    header = ["model", "system", "img/s", "share of the cached-batch ceiling", "data wait"]
    header += ["CPU cores, mean %, one by one"] if cores else []
    header += [f"{reading(metric)[0]}, {reading(metric)[1]}" for metric in _SUMMARY]
    lines = []
    for (model, system), run in _runs(rows).items():
        found = {row.metric: row for row in run}
        line = [model, system, *(cell(found.get(name)) for name in ("img_per_s", "img_per_s ratio", "data_wait"))]
        line += [" / ".join(f"{mean:.0f}" for mean in core_means(run))] if cores else []
        lines.append([*line, *(_shown(found.get(f"{metric} mean"), metric) for metric in _SUMMARY)])
    return grid(header, lines)


def _shown(row: Row | None, metric: str) -> str:
    """A reading for people; empty where there is none: the reason stands below the tables."""
    return "" if row is None or row.value is None else figure(row.value / reading(metric)[2])


def _readings(rows: Sequence[Row]) -> str:
    lines = []
    for (model, system), run in _runs(rows).items():
        found = {row.metric: row for row in run}
        for metric in in_order(_metric(row) for row in run if row.metric.endswith(" mean")):
            if found[f"{metric} mean"].value is None:
                continue
            name, unit, _ = reading(metric)
            shown = (_shown(found.get(f"{metric} {statistic}"), metric) for statistic in STATISTICS)
            lines.append([model, system, name, unit, *shown, UNITS.get(metric, "share of time that it was not idle")])
    return grid(["model", "system", "reading", "unit", *STATISTICS, "what it is"], lines)


def _missing(rows: Sequence[Row]) -> str:
    """What was not read, by reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.metric.endswith(" mean") and row.value is None:
            reasons.setdefault(row.failed, {})[reading(_metric(row))[0]] = None
    return "\n".join(f"- Not read: {', '.join(names)} ({reason})." for reason, names in reasons.items()) + "\n"


def _cost(rows: Sequence[Row]) -> str:
    """What the sampler itself took, and from what it read."""
    shares = [share for row in rows if row.metric == "sampler_core_share" for share in row.values]
    paces = [pace for row in rows if row.metric == "reached_hz" for pace in row.values]
    if not shares or not paces:
        return ""
    sources = dict.fromkeys(row.note for row in rows if row.metric == "reached_hz" and row.note)
    kept = "under" if max(shares) < MOST_CORE_SHARE else "NOT under"
    return (
        f"The sampler ({'; '.join(sources)}) made {min(paces):.1f} to {max(paces):.1f} readings a second beside "
        f"training, and took {100 * min(shares):.2f} to {100 * max(shares):.2f} % of a core from start to end: {kept} "
        "the 1 % it may take.\n"
    )
