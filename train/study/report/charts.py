"""The first pictures of a report: learning curves and costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.study.analysis import METRICS, Analysis, Size
from train.study.numbers import NAMES, between, score
from train.study.report.svg import Label, Plot, Scale, linear, logarithmic, short

TOGETHER = 3
"""Up to so many models share one learning-curve chart with bands; more get a chart each."""


@dataclass(frozen=True)
class Table:
    """The numbers behind a picture, for those who want them exactly or cannot see it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture of the report. charts: `<svg>` elements. legend: series and name of each. caption: what marks mean."""

    name: str
    title: str
    charts: Sequence[str]
    caption: str
    legend: Sequence[tuple[int, str]] = ()
    table: Table | None = None
    more: Table | None = None


def _axis(metric: str) -> Label:
    return Label("plain" if "auc" in metric else "percent")


def model_legend(found: Analysis) -> list[tuple[int, str]]:
    """The series of each model, which tells its marker, dashes and colour."""
    return [(found.study.series(model), model) for model in found.study.models]


# ------------------------------------------------------------------ learning curves


def learning_curves(found: Analysis, metric: str) -> Figure:
    """Score against training images: every run a point, the fitted curve a line, its 95 % interval a band."""
    study, curves = found.study, found.curves[metric]
    models = [model for model in study.models if model in curves]
    alone = len(models) > TOGETHER
    values = [p["value"] for c in curves.values() for p in c["points"]]
    if all(size.runs == 1 for model in models for size in found.sizes[model]):
        rows = [row for row in study.table.to_dict("records") if row[metric] == row[metric]]
        values += [
            row[f"{metric}_{end}"] for row in rows for end in ("low", "high") if row[f"{metric}_{end}"] is not None
        ]
    ends = [b[key] for c in curves.values() for b in c["band"] for key in ("low", "high") if _reasonable(b)]
    # a band may be very wide where little is known; the points must stay readable
    spread = max(max(values) - min(values), 0.02)
    low = max(min(values) - spread, min([*values, *ends]))
    high = min(max(values) + spread, max([*values, *ends]))
    y = linear(low, high, _axis(metric), limits=(0.0, 1.0))
    sizes = sorted({size.n for model in curves for size in found.sizes[model]})
    reach = [b["n"] for c in curves.values() for b in c["band"]]
    x = logarithmic(min(sizes), max([*sizes, *reach]), lambda n: f"{n:,.0f}", at=_ticks(sizes, alone))
    charts = []
    for group in [[model] for model in models] if alone else [models]:
        title = f"{NAMES[metric]} of {', '.join(group)} by training images"
        told = " ".join(_told(found, metric, model) for model in group)
        name = f"curve-{metric}-{group[0]}"
        plot = Plot(name, title, told, x, y, "training images", NAMES[metric], width=350 if alone else 440)
        measured = max(curves[model]["curve"]["n_max"] for model in group)
        if any(curves[model]["band"] and not curves[model]["doubts"] for model in group):
            plot.rule(x=measured)
            plot.text(plot.px(measured) + 4, plot.height - plot.bottom - 6, "foretold", kind="note")
        for model in models if alone else []:
            if model not in group:
                plot.line([(s.n, s.mean[metric] or 0.0) for s in found.sizes[model]], study.series(model), kind="faint")
        for model in group:
            _curve(plot, found, metric, model, patients=len(group) == 1)
        if alone:
            plot.text(plot.left + 8, plot.top + 12, group[0], kind="strong")
        charts.append(plot.svg())
    fitted = [model for model in models if curves[model]["band"]]
    caption = "Every point is one run (seed). "
    if all(size.runs == 1 for model in models for size in found.sizes[model]):
        caption += "Bars are the runs' own 95 % intervals, for other test lesions. "
    if fitted:
        caption += (
            "Lines are fitted curves a − b·n^−c; the dark band is their 95 % interval over seeds and training subsets"
            + (", the pale one holds the sampling of the test lesions too" if alone or len(models) == 1 else "")
            + ", drawn to twice the largest measured size and no further: right of the dots nothing was measured. "
            + ("A curve in doubt ends where the data do. " if any(curves[m]["doubts"] for m in fitted) else "")
        )
    if len(fitted) < len(models):
        caption += "Where no curve could be fitted, a line joins the means. "
    rows = [
        [
            model,
            f"{size.n:,.0f}",
            str(size.runs),
            *(score(metric, v[metric]) for v in (size.mean, size.low, size.high)),
        ]
        for model in models
        for size in found.sizes[model]
    ]
    table = Table(("model", "training images", "runs", "mean", "lowest", "highest"), rows)
    heading = f"{NAMES[metric][0].upper()}{NAMES[metric][1:]} against training images"
    names = model_legend(found)
    return Figure(
        f"curves-{metric}", heading, charts, caption.strip(), names, table, _curve_table(found, metric, models)
    )


def _curve_table(found: Analysis, metric: str, models: Sequence[str]) -> Table:
    """The fitted parameters, and what came of the check on the largest size."""
    head = (
        "model",
        "a: with endless data",
        "c: how fast",
        "with twice the images",
        "largest size foretold",
        "came",
        "notes",
    )
    rows = []
    for model in models:
        told = found.curves[metric][model]
        curve, check = told["curve"], told["hold_out"]
        c = curve["c"]
        rate = "–" if c["value"] is None else f"{c['value']:.2f} ({_end(c['low'])} to {_end(c['high'])})"
        beyond = told["band"] and not told["doubts"]
        ahead = between(metric, told["band"][-1]) if beyond else "–"
        foretold = "–" if check["predicted"] is None else between(metric, {**check, "value": check["predicted"]})
        notes = [*(f"in doubt: {doubt}" for doubt in told["doubts"]), *told["notes"]]
        notes += [check["reason"]] if check["reason"] else []
        a = between(metric, curve["a"]) if beyond else "–"
        rows.append([model, a, rate, ahead, foretold, score(metric, check["observed"]), "; ".join(notes)])
    return Table(head, rows)


def _end(value: float | None) -> str:
    return "open" if value is None else f"{value:.2f}"


def _reasonable(band: dict[str, float]) -> bool:
    return band["high"] - band["low"] < 0.5


def _ticks(sizes: Sequence[float], narrow: bool) -> list[float]:
    """One tick a size, sizes that nearly agree taken as one; every other one, or none, where there are too many."""
    found: list[float] = []
    for size in sizes:
        if not found or size > 1.3 * found[-1]:
            found.append(size)
    found = found[::-1][::2][::-1] if len(found) > 5 and narrow else found
    return found if len(found) <= 8 else []


def _curve(plot: Plot, found: Analysis, metric: str, model: str, *, patients: bool) -> None:
    curve, series = found.curves[metric][model], found.study.series(model)
    band = curve["band"]
    if band:
        if patients and all(b["low_patients"] is not None for b in band):
            plot.band([(b["n"], b["low_patients"], b["high_patients"]) for b in band], series, kind="outer")
        plot.band([(b["n"], b["low"], b["high"]) for b in band], series)
        plot.line([(b["n"], b["value"]) for b in band], series)
    else:
        means = [(s.n, s.mean[metric]) for s in found.sizes[model]]
        plot.line([(n, mean) for n, mean in means if mean is not None], series)
    for run in found.study.of(model) if all(size.runs == 1 for size in found.sizes[model]) else []:
        row = run.row
        if row[metric] is not None and row[f"{metric}_low"] is not None:
            plot.interval(row["n_train"], row[f"{metric}_low"], row[f"{metric}_high"], series)
    for p in curve["points"]:
        plot.point(
            p["n"],
            p["value"],
            series,
            told=f"{model}, {p['n']:,.0f} images, seed {p['seed']}: {score(metric, p['value'])}",
        )


def _told(found: Analysis, metric: str, model: str) -> str:
    known = [s for s in found.sizes[model] if s.mean[metric] is not None]
    if not known:
        return f"{model}: undefined."
    first, last = known[0], known[-1]
    if len(known) == 1:
        return f"{model}: {score(metric, last.mean[metric])} with {last.n:,.0f} images."
    return (
        f"{model}: from {score(metric, first.mean[metric])} with {first.n:,.0f} images "
        f"to {score(metric, last.mean[metric])} with {last.n:,.0f}."
    )


# ------------------------------------------------------------------ cost


def cost(found: Analysis, metric: str = METRICS[0]) -> Figure:
    """Score against training time and against the arithmetic of training, one marker a model and fraction."""
    sizes = [size for by_model in found.sizes.values() for size in by_model if size.mean[metric] is not None]
    y = linear(
        min(size.low[metric] or 0.0 for size in sizes),
        max(size.high[metric] or 0.0 for size in sizes),
        _axis(metric),
        limits=(0.0, 1.0),
    )
    charts = [
        _cost_chart(found, metric, y, "cost-time", "training time of one run", Label("seconds"), lambda s: s.train_s),
        _cost_chart(
            found, metric, y, "cost-flops", "floating point operations of training", Label("counts"),
            lambda s: s.training_flops,
        ),
    ]  # fmt: skip
    caption = (
        "Each marker is the mean of one model's runs on one fraction, bars span the seeds, lines join its "
        "fractions from small to large. Left: seconds of training as measured. Right: three forward "
        "passes for each image seen, at the size it was seen at, which does not depend on the machine. Up and to the "
        "left is better."
    )
    head = ("model", "training images", "mean", "training time", "training FLOPs")
    rows = [
        [s.model, f"{s.n:,.0f}", score(metric, s.mean[metric]), Label("seconds")(s.train_s), short(s.training_flops)]
        for s in sizes
    ]
    return Figure("cost", "Accuracy against cost", charts, caption, model_legend(found), Table(head, rows))


def _cost_chart(found: Analysis, metric: str, y: Scale, name: str, what: str, label: Label, of: Any) -> str:
    costs = [max(of(size), 1e-9) for by_model in found.sizes.values() for size in by_model]
    x = logarithmic(min(costs), max(costs), label)
    told = []
    plot = Plot(name, f"{NAMES[metric]} against {what}", "", x, y, what, NAMES[metric])
    for model, sizes in found.sizes.items():
        series = found.study.series(model)
        known: list[Size] = [size for size in sizes if size.mean[metric] is not None]
        if not known:
            continue
        plot.line([(of(s), s.mean[metric] or 0.0) for s in known], series)
        for s in known:
            if s.runs > 1:
                plot.interval(of(s), s.low[metric] or 0.0, s.high[metric] or 0.0, series)
            plot.point(
                of(s),
                s.mean[metric] or 0.0,
                series,
                told=f"{model}, {s.n:,.0f} images: {score(metric, s.mean[metric])}",
            )
        told.append(f"{model}: {score(metric, known[-1].mean[metric])} for {label(of(known[-1]))}.")
    plot.told = " ".join(told)
    return plot.svg()
