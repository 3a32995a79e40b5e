"""The charts of a report, in its order: what each shows, as pictures, in words, and as a table of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from train.study.analysis import METRICS, Analysis, Size, confusion, recalls, reliability
from train.study.numbers import NAMES, between, p_value, percent, points, score
from train.study.report.picture import (
    LETTER,
    LIGHT,
    SMALL,
    Picture,
    colour,
    plain,
    seconds,
    shares,
    short,
    signed,
    styled,
)
from train.study.runs import Run

TOGETHER = 3
"""Up to so many models share one learning-curve picture with bands; of more, each gets a picture of its own."""

SMALL_PICTURE = {"size": (248.0, 186.0), "margins": (46.0, 10.0, 22.0, 34.0)}


@dataclass(frozen=True)
class Table:
    """The numbers behind a chart, for those who want them exactly or cannot see it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart of the report. pictures: one or several beside each other. caption: what lines and markers mean.

    legend: series and name of each, where the pictures do not name them. more: a second table.
    """

    name: str
    title: str
    pictures: Sequence[Picture]
    caption: str
    table: Table
    legend: Sequence[tuple[int, str]] = ()
    more: Table | None = None


def charts(found: Analysis) -> list[Chart]:
    """The charts of a report; those that the study has no numbers for are left out."""
    with styled():
        drawn: list[Chart | None] = [learning_curves(found, metric) for metric in METRICS if found.curves[metric]]
        drawn.append(cost(found))
        drawn += [differences(found, metric) for metric in METRICS]
        drawn += [variance(found), confusions(found), class_recalls(found), calibration(found), leakage(found)]
        drawn.append(speed(found))
    return [chart for chart in drawn if chart is not None]


def _label(metric: str) -> Callable[[float], str]:
    return plain if "auc" in metric else shares


def _models(found: Analysis) -> list[tuple[int, str]]:
    """Series and name of each model; nothing to tell apart with one."""
    models = found.study.models
    return [(found.study.series(model), model) for model in models] if len(models) > 1 else []


def _images(n: float) -> str:
    return f"{n:,.0f}"


# ------------------------------------------------------------------ learning curves


def learning_curves(found: Analysis, metric: str) -> Chart:
    """Score against training images: every run a point, the fitted curve a line, its 95 % interval a band."""
    study, curves = found.study, found.curves[metric]
    models = [model for model in study.models if model in curves]
    single = all(size.runs == 1 for model in models for size in found.sizes[model])
    alone = len(models) > TOGETHER
    name = NAMES[metric]
    drawn = []
    if alone:
        room: dict[str, Any] = {"size": (320, 230), "margins": (46, _beside(models), 22, 34)}
        one = Picture(f"curve-{metric}", f"{name} of all models by training images", **room, wide=True)
        _curve_axes(one, found, metric, models, single=single, narrow=True)
        one.heading("means of all models")
        drawn.append(one)
        for model in models:
            _means(one, found, metric, model)
        _names_at_end(one, found, metric, models)
        one.alt = " ".join(_curve_words(found, metric, model) for model in models)
    for group in [[model] for model in models] if alone else [models]:
        more: dict[str, Any] = SMALL_PICTURE if alone else {}
        if len(group) > 1:
            more = {"size": (320, 220), "margins": (46, _beside(group), 12, 34)}
        one = Picture(f"curve-{metric}-{group[0]}", f"{name} of {', '.join(group)} by training images", **more)
        _curve_axes(one, found, metric, models, single=single, narrow=alone)
        if any(curves[model]["band"] and not curves[model]["doubts"] for model in group):
            measured = max(curves[model]["curve"]["n_max"] for model in group)
            style = {"color": LIGHT["line"], "alpha": 0.4, "linewidth": 0, "clip_on": False}
            one.axes.axvspan(measured, one.axes.get_xlim()[1], gid=one.mark("beyond"), **style)
        for other in models if alone else []:
            if other not in group:
                _means(one, found, metric, other, color=LIGHT["muted"], alpha=0.35, linewidth=0.8, linestyle="-")
        for model in group:
            _curve(one, found, metric, model, patients=len(group) == 1, bars=single)
        if len(group) > 1:
            _names_at_end(one, found, metric, group)
        elif alone:
            one.heading(group[0])
        one.alt = " ".join(_curve_words(found, metric, model) for model in group)
        drawn.append(one)
    rows = [
        [model, _images(size.n), str(size.runs), *(score(metric, v[metric]) for v in (size.mean, size.low, size.high))]
        for model in models
        for size in found.sizes[model]
    ]
    table = Table(("model", "training images", "runs", "mean", "lowest", "highest"), rows)
    return Chart(
        f"curves-{metric}",
        f"{name[0].upper()}{name[1:]} against training images",
        drawn,
        _curve_caption([curves[model] for model in models], alone=alone, single=single),
        table,
        more=_curve_table(found, metric, models),
    )


def _curve_caption(curves: Sequence[dict[str, Any]], *, alone: bool, single: bool) -> str:
    fitted = [curve for curve in curves if curve["band"]]
    lines = ["Every point is one run (one seed)."]
    if single:
        lines.append("Bars are 95 % intervals of single runs: how much other test lesions could change the score.")
    if fitted:
        lines.append("Lines are fitted curves a − b·n^(−c).")
        lines.append("The dark band is the 95 % interval over seeds and training subsets.")
        if alone or len(curves) == 1:
            lines.append("The pale band also includes the sampling of the test lesions.")
        lines.append("Curves end at twice the largest measured size. Nothing was measured in the shaded part.")
        if any(curve["doubts"] for curve in fitted):
            lines.append("A curve in doubt ends at the largest measured size.")
    if len(fitted) < len(curves):
        lines.append("Where no curve could be fitted, a line joins the means.")
    if alone:
        lines.append("Grey lines are the means of the other models.")
    return " ".join(lines)


def _curve_axes(
    one: Picture, found: Analysis, metric: str, models: Sequence[str], *, single: bool, narrow: bool = False
) -> None:
    """The axes of a learning curve, the same for all pictures of a metric."""
    curves = [found.curves[metric][model] for model in models]
    values = [p["value"] for curve in curves for p in curve["points"]]
    if single:
        rows = [row for row in found.study.table.to_dict("records") if row[metric] == row[metric]]
        values += [
            row[f"{metric}_{end}"] for row in rows for end in ("low", "high") if row[f"{metric}_{end}"] is not None
        ]
    bands = [b for curve in curves for b in curve["band"]]
    ends = [b[key] for b in bands for key in ("low", "high") if b["high"] - b["low"] < 0.5]
    # A band may be very wide where little is known; the points must stay readable.
    spread = max(max(values) - min(values), 0.02)
    low = max(min(values) - spread, min([*values, *ends]))
    high = min(max(values) + spread, max([*values, *ends]))
    one.linear("y", low, high, _label(metric), limits=(0.0, 1.0))
    sizes = sorted({size.n for model in models for size in found.sizes[model]})
    one.logarithmic(min(sizes), max([*sizes, *(b["n"] for b in bands)]), _images, at=_ticks(sizes, narrow))
    one.labels("training images", NAMES[metric])


def _ticks(sizes: Sequence[float], narrow: bool) -> list[float]:
    """One tick a size, sizes that nearly agree taken as one; every other one, or none, where there are too many."""
    found: list[float] = []
    for size in sizes:
        if not found or size > 1.3 * found[-1]:
            found.append(size)
    found = found[::-1][::2][::-1] if len(found) > (4 if narrow else 7) else found
    return found if len(found) <= 8 else []


def _known(found: Analysis, metric: str, model: str) -> list[Size]:
    return [size for size in found.sizes[model] if size.mean[metric] is not None]


def _means(one: Picture, found: Analysis, metric: str, model: str, **more: Any) -> None:
    known = _known(found, metric, model)
    means = [size.mean[metric] or 0.0 for size in known]
    series = found.study.series(model)
    one.line([size.n for size in known], means, series, **more)
    for size, mean in zip(known, means, strict=True) if not more else []:
        one.point(size.n, mean, series, f"{model}, {_images(size.n)} images: {score(metric, mean)}", size=4)


def _curve(one: Picture, found: Analysis, metric: str, model: str, *, patients: bool, bars: bool) -> None:
    curve, series = found.curves[metric][model], found.study.series(model)
    band = curve["band"]
    if band:
        n = [b["n"] for b in band]
        if patients and all(b["low_patients"] is not None for b in band):
            one.band(n, [b["low_patients"] for b in band], [b["high_patients"] for b in band], series, 0.12)
        one.band(n, [b["low"] for b in band], [b["high"] for b in band], series, 0.22)
        one.line(n, [b["value"] for b in band], series)
    else:
        known = _known(found, metric, model)
        one.line([size.n for size in known], [size.mean[metric] or 0.0 for size in known], series)
    for run in found.study.of(model) if bars else []:
        row = run.row
        if row[metric] is not None and row[f"{metric}_low"] is not None:
            one.interval(row[f"{metric}_low"], row[f"{metric}_high"], row["n_train"], colour(series))
    for p in curve["points"]:
        words = f"{model}, {_images(p['n'])} images, seed {p['seed']}: {score(metric, p['value'])}"
        one.point(p["n"], p["value"], series, words, size=4.5)


def _beside(names: Sequence[str]) -> float:
    """Room for names right of the axes, points."""
    return 14 + LETTER * max(map(len, names))


def _names_at_end(one: Picture, found: Analysis, metric: str, models: Sequence[str]) -> None:
    """The models' names beside the ends of their lines."""
    ends = []
    for model in models:
        curve, known = found.curves[metric][model], _known(found, metric, model)
        band = curve["band"] if len(models) <= TOGETHER else []
        ends.append((model, band[-1]["value"] if band else known[-1].mean[metric], found.study.series(model)))
    one.at_end(ends)


def _curve_words(found: Analysis, metric: str, model: str) -> str:
    known = _known(found, metric, model)
    if not known:
        return f"{model}: undefined."
    first, last = known[0], known[-1]
    if len(known) == 1:
        return f"{model}: {score(metric, last.mean[metric])} with {_images(last.n)} images."
    return (
        f"{model}: from {score(metric, first.mean[metric])} with {_images(first.n)} images "
        f"to {score(metric, last.mean[metric])} with {_images(last.n)}."
    )


def _curve_table(found: Analysis, metric: str, models: Sequence[str]) -> Table:
    """The fitted parameters, and the check on the largest size."""
    head = (
        "model", "a: limit with unlimited data", "c: exponent", "with twice the images",
        "predicted for the largest size", "measured there", "notes",
    )  # fmt: skip
    rows = []
    for model in models:
        fitted = found.curves[metric][model]
        curve, check = fitted["curve"], fitted["hold_out"]
        c = curve["c"]
        ends = ("open" if c[end] is None else f"{c[end]:.2f}" for end in ("low", "high"))
        rate = "–" if c["value"] is None else f"{c['value']:.2f} ({' to '.join(ends)})"
        beyond = fitted["band"] and not fitted["doubts"]
        ahead = between(metric, fitted["band"][-1]) if beyond else "–"
        predicted = "–" if check["predicted"] is None else between(metric, {**check, "value": check["predicted"]})
        notes = [*(f"in doubt: {doubt}" for doubt in fitted["doubts"]), *fitted["notes"]]
        notes += [check["reason"]] if check["reason"] else []
        a = between(metric, curve["a"]) if beyond else "–"
        rows.append([model, a, rate, ahead, predicted, score(metric, check["observed"]), "; ".join(notes)])
    return Table(head, rows)


# ------------------------------------------------------------------ cost


def cost(found: Analysis, metric: str = METRICS[0]) -> Chart | None:
    """Score against training time and against the arithmetic of training, one marker a model and fraction."""
    if not any(_known(found, metric, model) for model in found.sizes):
        return None
    drawn = [
        _cost(found, metric, "cost-time", "training time of one run", seconds, lambda size: size.train_s),
        _cost(found, metric, "cost-flops", "training FLOPs of one run", short, lambda size: size.training_flops),
    ]
    caption = (
        "Each marker is the mean of one model's runs on one fraction. Bars span the seeds. Lines join the fractions of "
        "a model from small to large. Times are measured. FLOPs are three forward passes for each image seen, at the "
        "size it was seen at; they do not depend on the machine. Better is up and to the left."
    )
    rows = [
        [s.model, _images(s.n), score(metric, s.mean[metric]), seconds(s.train_s), short(s.training_flops)]
        for model in found.sizes
        for s in _known(found, metric, model)
    ]
    table = Table(("model", "training images", "mean", "training time", "training FLOPs"), rows)
    return Chart("cost", "Accuracy against cost", drawn, caption, table, _models(found))


TIMES = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000)
"""Round durations for an axis, seconds."""


def _cost(
    found: Analysis, metric: str, name: str, what: str, label: Callable[[float], str], of: Callable[[Size], float]
) -> Picture:
    sizes = [size for model in found.sizes for size in _known(found, metric, model)]
    costs = [max(of(size), 1e-9) for size in sizes]
    one = Picture(name, f"{NAMES[metric]} against {what}")
    low, high = min(size.low[metric] or 0.0 for size in sizes), max(size.high[metric] or 0.0 for size in sizes)
    one.linear("y", low, high, _label(metric), limits=(0.0, 1.0))
    round_times = [t for t in TIMES if min(costs) <= t <= max(costs)] if label is seconds else []
    one.logarithmic(min(costs), max(costs), label, at=round_times if len(round_times) > 1 else [])
    one.labels(what, NAMES[metric])
    words = []
    for model in found.sizes:
        series, known = found.study.series(model), _known(found, metric, model)
        if not known:
            continue
        at = [max(of(size), 1e-9) for size in known]
        one.line(at, [size.mean[metric] or 0.0 for size in known], series, linewidth=1.2)
        for x, size in zip(at, known, strict=True):
            mean = size.mean[metric] or 0.0
            if size.runs > 1:
                one.interval(size.low[metric] or 0.0, size.high[metric] or 0.0, x, colour(series))
            one.point(x, mean, series, f"{model}, {_images(size.n)} images: {score(metric, mean)}")
        words.append(f"{model}: {score(metric, known[-1].mean[metric])} for {label(of(known[-1]))}.")
    one.alt = " ".join(words)
    return one


# ------------------------------------------------------------------ rows: differences, shares, leakage, speed


def _rows(
    name: str, title: str, labels: Sequence[str], what: str, *, step: float = 17.0, right: float = 16.0
) -> Picture:
    """A picture of one row a label, with a grid along x alone. The axis of x is set by the caller."""
    left = 12 + LETTER * max(len(label) for label in labels)
    size = (left + max(330 - left, 215), step * len(labels) + 46)
    one = Picture(name, title, size=size, margins=(left, right, 8, 38))
    one.rows(labels)
    one.labels(what)
    return one


def _gap(one: Picture, metric: str, row: int, name: str, gap: dict[str, Any], **more: Any) -> str:
    """Draw a difference with its interval in a row; the difference in words."""
    words = points(metric, gap["value"])
    if gap["low"] is not None and gap["high"] is not None:
        words += f" ({points(metric, gap['low'])} to {points(metric, gap['high'])})"
        one.interval(gap["low"], gap["high"], row, more.get("markeredgecolor", colour(0)), across=True)
    one.point(gap["value"], row, 0, f"{name}: {words}", **more)
    return words


def _gap_axis(one: Picture, metric: str, gaps: Sequence[dict[str, Any]]) -> None:
    ends = [0.0, *(v for gap in gaps for v in gap.values() if v is not None)]
    one.linear("x", min(ends), max(ends), lambda v: signed(v if "auc" in metric else 100 * v))
    one.axes.axvline(0.0, color=LIGHT["muted"], linewidth=1.0, clip_on=False)


OPEN = {
    "marker": "o", "markerfacecolor": LIGHT["page"], "markeredgecolor": LIGHT["muted"], "markeredgewidth": 1.2,
}  # fmt: skip
"""The marker of a difference that is not clear."""


def significant(cell: dict[str, Any]) -> bool:
    """Whether a difference is clear among all that were tested: p under 0.05 after Holm's correction."""
    p = cell.get("p_holm")
    return p is not None and p < 0.05


def differences(found: Analysis, metric: str) -> Chart | None:
    """Differences between every two models with their intervals, a row each; None where there are none."""
    pairs = [p for p in found.differences if p["metrics"][metric]["difference"]["value"] is not None]
    if not pairs:
        return None
    cells = [pair["metrics"][metric] for pair in pairs]
    names = [f"{pair['first']} − {pair['second']}" for pair in pairs]
    unit = "" if "auc" in metric else ", points"
    title = f"Differences in {NAMES[metric]}"
    one = _rows(f"forest-{metric}", f"{title} between models", names, f"difference in {NAMES[metric]}{unit}")
    _gap_axis(one, metric, [cell["difference"] for cell in cells])
    words, rows = [], []
    for row, (name, cell) in enumerate(zip(names, cells, strict=True)):
        clear = significant(cell)
        gap = _gap(one, metric, row, name, cell["difference"], **({"marker": "s"} if clear else OPEN))
        words.append(f"{name}: {gap}, p {p_value(cell.get('p_holm'))}.")
        rows.append([name, gap, p_value(cell["p"]), p_value(cell.get("p_holm")), str(cell["runs"])])
    one.alt = " ".join(words)
    lines = [
        f"First model minus second on the same test lesions, with {100 * (found.compared_at or 1.0):.3g} % of the "
        "training lesions. Bars are 95 % intervals from a paired bootstrap over lesions"
        + (", with the spread of the seeds." if all(cell["includes_seeds"] for cell in cells) else "."),
        "Filled squares: p under 0.05 after Holm's correction for all pairs. Open circles: no clear difference.",
    ]
    if not all(cell["includes_seeds"] for cell in cells):
        lines.append("With one seed the intervals are for these trained networks only.")
    lines += [f"Note: {note}." for note in dict.fromkeys(cell["note"] for cell in cells) if note]
    table = Table(("models", "difference (95 %)", "p", "p, Holm", "pairs of runs"), rows)
    return Chart(f"forest-{metric}", title, [one], " ".join(lines), table)


def variance(found: Analysis) -> Chart | None:
    """Shares of the variance by source, a bar each with its interval; None where they cannot be computed."""
    known = {metric: parts for metric, parts in found.variance.items() if not isinstance(parts, str)}
    if not known:
        return None
    drawn, rows, notes = [], [], []
    for metric, parts in known.items():
        cells = {source: cell for source, cell in parts["shares"].items() if cell["value"] is not None}
        one = _rows(
            f"variance-{metric}", f"What {NAMES[metric]} depends on", list(cells),
            f"share of the variance of {NAMES[metric]}", step=24, right=40,
        )  # fmt: skip
        one.linear("x", 0.0, 1.0, shares, limits=(0.0, 1.0))
        for row, (source, cell) in enumerate(cells.items()):
            style = {"color": colour(0), "alpha": 0.5, "clip_on": False}
            one.axes.barh(row, cell["value"], 0.62, gid=one.mark("box", f"{source}: {between('share', cell)}"), **style)
            if cell["low"] is not None:
                one.interval(cell["low"], cell["high"], row, LIGHT["ink"], across=True)
            end = max(cell["value"], cell["high"] or 0.0)
            one.axes.annotate(
                percent(cell["value"], 0), (end, row), (5, 0), textcoords="offset points", va="center", fontsize=SMALL
            )
            rows.append([NAMES[metric], source, between("share", cell)])
        one.alt = "; ".join(f"{source} {between('share', cell)}" for source, cell in cells.items()) + "."
        notes += [f"{NAMES[metric]}: {note}" for note in parts["notes"]]
        drawn.append(one)
    caption = (
        "How much of the spread of all results comes from the model, from the number of training images (size), from "
        "models that gain differently from more images (interaction), and from the seed, which also draws the training "
        "subset. Thin bars are 95 % intervals. "
        + " ".join(f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(notes))
    )
    table = Table(("metric", "source", "share (95 %)"), rows)
    return Chart("variance", "What the results depend on", drawn, caption.strip(), table)


GROUPS = {"all": "all test images", "seen": "lesion also in training", "unseen": "lesion not in training"}


def leakage(found: Analysis) -> Chart | None:
    """What training on views of the test lesions gains, with and without the images that have such views."""
    result = found.leakage
    if result is None:
        return None
    groups = {name: words for name, words in GROUPS.items() if result[name] is not None}
    drawn, rows = [], []
    for metric in ("balanced_accuracy", "accuracy"):
        cells = [result[name][metric] for name in groups]
        what = NAMES.get(metric, metric)
        one = _rows(
            f"leakage-{metric}", f"Gain in {what} from a split by image", list(groups.values()),
            f"gain in {what}, points", step=24,
        )  # fmt: skip
        _gap_axis(one, metric, [cell["difference"] for cell in cells])
        words = []
        for row, ((group, name), cell) in enumerate(zip(groups.items(), cells, strict=True)):
            if cell["difference"]["value"] is None:
                continue
            gap = _gap(one, metric, row, name, cell["difference"])
            words.append(f"{name}: {gap}.")
            sides = [percent(cell["first"]), percent(cell["second"])]
            rows.append([name, what, str(result["test_images"][group]), *sides, gap])
        one.alt = " ".join(words) or "Undefined."
        drawn.append(one)
    lesions = result["training_lesions"]
    caption = (
        f"{result['model']} was trained {len(result['seeds'])} × on each of two sets of {result['training_images']:,} "
        "images with the same number of images of every class. One set holds the views of test lesions that a split by "
        f"image leaves in training ({lesions['leaky']:,} lesions), the other holds none ({lesions['apart']:,} "
        "lesions). Both are tested on the same images, paired by lesion. Bars are 95 % intervals. Such a gain is "
        "false: new patients have no views in training. Where the lesion is not in training nothing can leak; a "
        "difference there comes from the networks."
    )
    head = ("test images", "metric", "images", "with views", "without", "gain (95 %)")
    return Chart("leakage", "What a split by image gains falsely", drawn, caption, Table(head, rows))


def speed(found: Analysis) -> Chart:
    """Images per second and the share of time spent waiting for data, one marker a cell, a row a model."""
    study = found.study
    rows = [run.row for run in study.runs]
    rates = [max(row["img_per_s"], 1e-9) for row in rows]
    rate = _rows("speed-rate", "Training speed of each cell", study.models, "images per second in training", step=24)
    rate.logarithmic(min(rates), max(rates), short)
    what = "training time spent waiting for data"
    wait = _rows("speed-wait", "Share of training time spent waiting for data", study.models, what, step=24)
    wait.linear("x", 0.0, max(0.02, *(row["data_wait_fraction"] for row in rows)), shares, limits=(0.0, 1.0))
    words: dict[str, list[str]] = {"rate": [], "wait": []}
    for line, model in enumerate(study.models):
        mine = [row for row in rows if row["model"] == model]
        for i, row in enumerate(mine):
            at = line + (((i * 0.618) % 1.0) - 0.5) * 0.5  # spread, so that equal values stay apart
            name = f"{model}, {row['n_train']:,} images, seed {row['seed']}"
            for one, value, text in (
                (rate, max(row["img_per_s"], 1e-9), f"{row['img_per_s']:.1f} img/s"),
                (wait, row["data_wait_fraction"], percent(row["data_wait_fraction"])),
            ):
                one.point(value, at, study.series(model), f"{name}: {text}", size=4, alpha=0.8)
        speeds, waits = [row["img_per_s"] for row in mine], [row["data_wait_fraction"] for row in mine]
        words["rate"].append(f"{model}: {min(speeds):.0f} to {max(speeds):.0f} images per second.")
        words["wait"].append(f"{model}: {percent(min(waits))} to {percent(max(waits))}.")
    rate.alt, wait.alt = " ".join(words["rate"]), " ".join(words["wait"])
    caption = (
        "One marker is one cell. Speed is that of training alone, without compiling and evaluation. Waiting is time in "
        "which the training loop had no batch to work on."
    )
    head = (
        "cell", "img/s", "data wait", "start s", "compile s", "train s", "evaluate s", "save s", "write s",
        "peak memory MB",
    )  # fmt: skip
    phases = ("start_s", "compile_s", "train_s", "eval_s", "save_s", "write_s")
    cells = [
        [
            row["cell"],
            f"{row['img_per_s']:.1f}",
            percent(row["data_wait_fraction"]),
            *(f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in phases),
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        ]
        for row in rows
    ]
    return Chart("speed", "Speed and waiting for data", [rate, wait], caption, Table(head, cells))


# ------------------------------------------------------------------ inside the models


def confusions(found: Analysis) -> Chart:
    """One matrix a model at its largest fraction, rows true classes, shares of the row written in the cells."""
    drawn, rows = [], []
    for model in found.study.models:
        fraction = found.study.largest(model)
        classes, counts = confusion(found.study.of(model, fraction))
        side = 25.0 * len(classes)
        left = 18 + LETTER * max(map(len, classes))
        title = f"{model}: true and predicted classes, {100 * fraction:.3g} % of the training lesions"
        one = Picture(f"confusion-{model}", title, size=(left + side + 8, side + 46), margins=(left, 8, 40, 6))
        ticks = [i + 0.5 for i in range(len(classes))]
        one.axes.set(xlim=(0, len(classes)), ylim=(len(classes), 0))
        one.axes.set_xticks(ticks, classes, color=LIGHT["ink"])
        one.axes.set_yticks(ticks, classes, color=LIGHT["ink"])
        one.axes.xaxis.tick_top()
        one.axes.spines["bottom"].set_visible(False)
        one.heading(model, pad=18)
        words = []
        for i, true in enumerate(classes):
            total = counts[i].sum()
            for j, predicted in enumerate(classes):
                share = counts[i, j] / total if total else 0.0
                rows.append([model, true, predicted, str(counts[i, j]), percent(share)])
                if counts[i, j]:
                    _confusion_cell(one, i, j, share, f"{true} classified as {predicted}: {counts[i, j]} of {total}")
            if total:
                words.append(f"{true} {100 * counts[i, i] / total:.0f} % right")
        one.alt = ", ".join(words) + "."
        drawn.append(one)
    caption = (
        "Rows are the true classes, columns the predicted ones. Numbers are percent of the row, summed over the seeds, "
        "at the largest fraction of each model."
    )
    table = Table(("model", "true", "predicted", "images", "share of true"), rows)
    return Chart("confusion", "Which classes are confused", drawn, caption, table)


def _confusion_cell(one: Picture, i: int, j: int, share: float, words: str) -> None:
    gid = one.mark("heat", words)
    one.axes.barh(
        i + 0.5, 0.96, 0.96, left=j + 0.02, color=colour(0), alpha=round(share, 3), linewidth=0, gid=gid, clip_on=False
    )
    ink = LIGHT["page"] if share > 0.5 else LIGHT["ink"] if i == j or share > 0.2 else LIGHT["muted"]
    one.axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", color=ink, ha="center", va="center", fontsize=SMALL)


def class_recalls(found: Analysis) -> Chart:
    """One small picture a class: recall against training images, a line a model."""
    study = found.study
    sizes = [size.n for by_model in found.sizes.values() for size in by_model]
    drawn, rows = [], []
    for name, cell in study.runs[0].result["test"]["per_class"].items():
        if not cell["images"]:
            continue
        one = Picture(f"recall-{name}", f"Recall of {name} by training images", **SMALL_PICTURE)
        one.linear("y", 0.0, 1.0, shares, limits=(0.0, 1.0), ticks=4)
        one.logarithmic(min(sizes), max(sizes), short)
        one.labels("training images", f"recall of {name}")
        lesions = "" if cell["lesions"] is None else f", {cell['lesions']} lesions"
        one.heading(f"{name}: {cell['images']} test images{lesions}")
        words = []
        for model in study.models:
            series, known = study.series(model), recalls(study, model, name)
            if known:
                one.line([n for n, *_ in known], [mean for _, mean, *_ in known], series, linewidth=1.2)
                words.append(f"{model}: {percent(known[-1][1])} with {_images(known[-1][0])} images.")
            for n, mean, low, high in known:
                if high > low:
                    one.interval(low, high, n, colour(series))
                one.point(n, mean, series, f"{model}, {_images(n)} images: {percent(mean)}", size=4)
                rows.append([name, model, _images(n), percent(mean), percent(low), percent(high)])
        one.alt = " ".join(words) or "Undefined."
        drawn.append(one)
    caption = (
        "Means over the seeds; bars span the seeds. The recall of a class with few test lesions moves in large steps. "
        "Its intervals are in results.csv."
    )
    table = Table(("class", "model", "training images", "mean recall", "lowest", "highest"), rows)
    return Chart("recall", "Recall of each class by fraction", drawn, caption, table, _models(found))


SCALED = ("as trained", "after temperature scaling")


def calibration(found: Analysis) -> Chart | None:
    """Accuracy against confidence for each model's largest fraction, before and after temperature scaling."""
    drawn, rows = [], []
    for model in found.study.models:
        runs = found.study.of(model, found.study.largest(model))
        tables = [reliability(runs, scaled=False), reliability(runs, scaled=True)]
        if not tables[0]:
            continue
        before = [run.row["expected_calibration_error"] for run in runs]
        after = [run.row.get("expected_calibration_error_scaled") for run in runs]
        one = Picture(f"reliability-{model}", f"Reliability of {model}", size=(252, 230), margins=(46, 18, 22, 34))
        one.alt = f"Calibration error {_mean(before)}, after temperature scaling {_mean(after)}."
        for axis in "xy":
            one.linear(axis, 0.0, 1.0, shares, limits=(0.0, 1.0))
        one.labels("confidence", "accuracy")
        one.heading(model)
        one.axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (2, 3)), clip_on=False)
        for series, bins in enumerate(tables):
            one.line([b["confidence"] for b in bins], [b["accuracy"] for b in bins], series)
            for b in bins:
                if series == 0:
                    one.interval(b["low"], b["high"], b["confidence"], colour(series))
                numbers = [percent(b[key]) for key in ("confidence", "accuracy", "share")]
                words = "confidence {}, accuracy {}, {} of images".format(*numbers)
                one.point(b["confidence"], b["accuracy"], series, words, size=3.2 + 7 * b["share"] ** 0.5)
                rows.append([model, SCALED[series], *numbers])
        drawn.append(one)
    if not drawn:
        return None
    prior = found.study.runs[0].result["test"]["prior"]
    caption = (
        f"Probabilities for the {prior} prior, at the largest fraction of each model, averaged over the seeds. On the "
        "diagonal, predictions with 80 % confidence are right 80 % of the time. Below the diagonal a model is "
        "overconfident. Larger markers hold more images. Bars are 95 % intervals before scaling. The temperature is "
        "fitted on the validation split."
    )
    table = Table(("model", "probabilities", "confidence", "accuracy", "share of images"), rows)
    return Chart("reliability", "How far probabilities can be trusted", drawn, caption, table, list(enumerate(SCALED)))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return percent(sum(known) / len(known)) if known else "–"


# ------------------------------------------------------------------ the table above all charts


def results_table(found: Analysis) -> Table:
    """Each model at its largest fraction: the metrics of the study, averaged over the seeds."""
    keys = {
        **{metric: NAMES[metric] for metric in METRICS},
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        "melanoma_sensitivity_at_90_specificity": "melanoma sensitivity at 90 % specificity",
        "malignant_auc": "malignant AUC",
        "expected_calibration_error": "calibration error",
    }
    prior = found.study.runs[0].result["test"]["prior"]
    head = (f"model (predictions for the {prior} prior)", "parameters", "training images", "runs", *keys.values())
    rows = []
    for model in found.study.models:
        runs = found.study.of(model, found.study.largest(model))
        cells = [_result(runs, key) for key in keys]
        rows.append([model, f"{runs[0].row['parameters']:,}", _images(runs[0].row["n_train"]), str(len(runs)), *cells])
    return Table(head, rows)


def _result(runs: Sequence[Run], key: str) -> str:
    """A metric averaged over runs; of a single run with its interval."""
    metric = "auc" if "auc" in key or key == "macro_f1" else key  # areas and F1 are written as 0.912
    known = [run.row[key] for run in runs if run.row[key] is not None]
    cell = {"value": sum(known) / len(known) if known else None, "low": None, "high": None}
    if len(runs) == 1 and known:
        cell |= {end: runs[0].row[f"{key}_{end}"] for end in ("low", "high")}
    return between(metric, cell)
