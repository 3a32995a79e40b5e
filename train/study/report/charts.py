"""The charts of a report, in its order: what each shows, as pictures, in words, and as a table of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from train.study.analysis import METRICS, Analysis, Score, Size, confusion, reliability, significant
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
    styled,
)

TOGETHER = 3
"""Up to so many models share one learning-curve picture with bands; of more, each gets a picture of its own."""

BINARY = ("average_precision", "partial_auc_above_80_sensitivity")
"""Of two classes, the table of results has these too."""
SMALL_PICTURE = (248.0, 186.0)
MOST_CLASSES = 20
"""Of more classes, those with the most test images are drawn, and confusions are tables of so many rows."""


class Table(NamedTuple):
    """The numbers behind a chart, for those who want them exactly or cannot see it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart of the report: one or several pictures beside each other, and their numbers.

    Without pictures the tables are shown at once. caption: what lines and markers mean. more: a second table, and what
    it is called.
    """

    name: str
    title: str
    pictures: Sequence[Picture]
    caption: str
    table: Table
    more: Table | None = None
    more_title: str = "The fitted curves"


def charts(found: Analysis) -> list[Chart]:
    """The charts of a report; those that the study has no numbers for are left out."""
    with styled():
        drawn: list[Chart | None] = [learning_curves(found, metric) for metric in METRICS if found.curves[metric]]
        drawn += [gaps(found), cost(found)]
        drawn += [differences(found, metric) for metric in METRICS]
        drawn += [variance(found), confusions(found), class_recalls(found), calibration(found), leakage(found)]
        drawn.append(speed(found))
    return [chart for chart in drawn if chart is not None]


def _label(metric: str) -> Callable[[float], str]:
    return plain if "auc" in metric else shares


def _images(n: float) -> str:
    return f"{n:,.0f}"


def _legend(one: Picture, found: Analysis, models: Sequence[str]) -> None:
    """The names of the models; nothing to tell apart with one."""
    if len(models) > 1:
        one.legend([(found.study.series(model), model) for model in models])


def _means(
    one: Picture, found: Analysis, model: str, column: str, x: Callable[[Size], float], *, bars: bool = True
) -> list[tuple[Size, Score]]:
    """Draw a model's means of a column over its sizes: a line, markers, and bars that span the seeds. Returns them."""
    series, known = found.study.series(model), found.scores(model, column)
    one.line([x(size) for size, _ in known], [of.value for _, of in known], series, linewidth=1.2)
    for size, of in known:
        if bars and of.high > of.low:
            one.interval(of.low, of.high, x(size), colour(series))
        one.point(x(size), of.value, series, f"{model}, {_images(size.n)} images: {score(column, of.value)}", size=4)
    return known


# ------------------------------------------------------------------ learning curves


def learning_curves(found: Analysis, metric: str) -> Chart:
    """Score against training images: every run a point, the fitted curve a line, its 95 % interval a band."""
    curves, name = found.curves[metric], NAMES[metric]
    models = [model for model in found.study.models if model in curves]
    single = all(len(size.runs) == 1 for model in models for size in found.sizes[model])
    alone = len(models) > TOGETHER
    drawn = []
    if alone:
        one = _curve_picture(found, metric, f"curve-{metric}", models, single=single, size=(330, 230), wide=True)
        one.axes.set_title("means of all models")
        for model in models:
            _means(one, found, model, metric, lambda size: size.n, bars=False)
        _legend(one, found, models)
        drawn.append(one)
    for group in [[model] for model in models] if alone else [models]:
        size = SMALL_PICTURE if alone else (330.0, 225.0)
        one = _curve_picture(found, metric, f"curve-{metric}-{group[0]}", group, single=single, size=size)
        if alone:
            one.axes.set_title(group[0])
        if any(curves[model]["band"] and not curves[model]["doubts"] for model in group):
            measured = max(curves[model]["curve"]["n_max"] for model in group)
            style = {"color": LIGHT["line"], "alpha": 0.4, "linewidth": 0, "clip_on": False}
            one.axes.axvspan(measured, one.axes.get_xlim()[1], gid=one.mark("beyond"), **style)
        for other in [model for model in models if model not in group]:
            known = found.scores(other, metric)
            style = {"color": LIGHT["muted"], "alpha": 0.35, "linewidth": 0.8, "linestyle": "-"}
            one.line([size.n for size, _ in known], [mean.value for _, mean in known], 0, **style)
        for model in group:
            _curve(one, found, metric, model, patients=len(group) == 1, bars=single)
        _legend(one, found, group)
        drawn.append(one)
    rows = [
        [
            *(model, _images(size.n), str(len(size.runs))),
            *(score(metric, v) for v in size.score(metric) or [None] * 3),
            _gain(found, size, metric),
        ]
        for model in models
        for size in found.sizes[model]
    ]
    table = Table(
        (
            *("model", "training images", "runs", "mean", "lowest", "highest"),
            "gain over the size before (95 %)",
        ),
        rows,
    )
    caption = _curve_caption([curves[model] for model in models], alone=alone, single=single)
    title = f"{name[0].upper()}{name[1:]} against training images"
    return Chart(f"curves-{metric}", title, drawn, caption, table, _curve_table(found, metric, models))


def _gain(found: Analysis, size: Size, metric: str) -> str:
    """What the images beyond the next smaller size brought, with its interval; a dash where there is none."""
    cells = found.gains.get(size.model, {}).get(size.fraction)
    return "–" if cells is None else between(metric, cells[metric]["difference"], write=points)


def gaps(found: Analysis, metric: str = METRICS[0]) -> Chart | None:
    """Each model's score minus that of the best one, by training images; None for one model or one size."""
    best = found.best.model
    lines = {
        model: [
            (size.n, cell)
            for size in found.sizes[model]
            if (cell := found.gaps.get(model, {}).get(size.fraction, {}).get(metric))
            and cell["difference"]["value"] is not None
        ]
        for model in found.study.models
    }
    lines = {model: points for model, points in lines.items() if points}
    sizes = [n for known in lines.values() for n, _ in known]
    if len(set(sizes)) < 2:
        return None
    one = Picture("gaps", f"{NAMES[metric]} minus that of {best}, by training images", size=(450.0, 260.0))
    values = [cell["difference"]["value"] for known in lines.values() for _, cell in known]
    one.linear("y", min([0.0, *values]), max([0.0, *values]), lambda v: plain(100 * v))
    one.logarithmic(min(sizes), max(sizes))
    one.axes.set(xlabel="training images", ylabel=f"{NAMES[metric]}, points")
    one.axes.axhline(0.0, color=LIGHT["muted"], linewidth=1.0, clip_on=False)
    rows = []
    for model, known in lines.items():
        series = found.study.series(model)
        one.line([n for n, _ in known], [cell["difference"]["value"] for _, cell in known], series, linewidth=1.2)
        for n, cell in known:
            words = between(metric, cell["difference"], write=points)
            clear = cell["p"] is not None and cell["p"] < 0.05
            hollow = {"markerfacecolor": LIGHT["page"], "markeredgecolor": colour(series), "markeredgewidth": 1.0}
            one.point(
                n,
                cell["difference"]["value"],
                series,
                f"{model}, {_images(n)} images: {words}",
                size=4.5,
                **({} if clear else hollow),
            )
            rows.append([model, _images(n), words, p_value(cell["p"]), str(cell["runs"])])
        one.said.append(
            f"{model}: {rows[-len(known)][2]} with {rows[-len(known)][1]} images, {words} with {_images(n)}."
        )
    _legend(one, found, list(lines))
    caption = (
        f"Mean {NAMES[metric]} of each model minus that of {best}, which is best on the most images. Both learned from "
        "the same images and were tested on the same lesions. Above the grey line a model is better. Filled markers: "
        "p under 0.05, not corrected for the number of comparisons. The table has the 95 % intervals."
    )
    table = Table(("model", "training images", f"difference from {best} (95 %)", "p", "pairs of runs"), rows)
    return Chart("gaps", "Which model on how many images", [one], caption, table)


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


def _curve_picture(
    found: Analysis, metric: str, name: str, group: Sequence[str], *, single: bool, **more: Any
) -> Picture:
    """A picture of these models' scores, with words and axes; the axes are the same for all pictures of a metric."""
    one = Picture(name, f"{NAMES[metric]} of {', '.join(group)} by training images", **more)
    curves = found.curves[metric].values()
    values = [p["value"] for curve in curves for p in curve["points"]]
    if single:
        ends = [run.row[f"{metric}_{end}"] for run in found.study.runs for end in ("low", "high")]
        values += [end for end in ends if end is not None]
    bands = [b for curve in curves for b in curve["band"]]
    ends = [b[key] for b in bands for key in ("low", "high") if b["high"] - b["low"] < 0.5]
    # A band may be very wide where little is known; the points must stay readable.
    spread = max(max(values) - min(values), 0.02)
    low = max(min(values) - spread, min([*values, *ends]))
    high = min(max(values) + spread, max([*values, *ends]))
    one.linear("y", low, high, _label(metric), limits=(0.0, 1.0))
    sizes = [size.n for model in found.curves[metric] for size in found.sizes[model]]
    one.logarithmic(min(sizes), max([*sizes, *(b["n"] for b in bands)]))
    one.axes.set(xlabel="training images", ylabel=NAMES[metric])
    for model in group:
        known = [
            f"{score(metric, mean.value)} with {_images(size.n)} images" for size, mean in found.scores(model, metric)
        ]
        one.said.append(f"{model}: from {known[0]} to {known[-1]}." if len(known) > 1 else f"{model}: {known[0]}.")
    return one


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
        known = found.scores(model, metric)
        one.line([size.n for size, _ in known], [mean.value for _, mean in known], series)
    for run in found.study.runs if bars else []:
        row = run.row
        if row["model"] == model and row[metric] is not None and row[f"{metric}_low"] is not None:
            one.interval(row[f"{metric}_low"], row[f"{metric}_high"], row["n_train"], colour(series))
    for p in curve["points"]:
        words = f"{model}, {_images(p['n'])} images, seed {p['seed']}: {score(metric, p['value'])}"
        one.point(p["n"], p["value"], series, words, size=4.5)


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
    known = [scored for model in found.sizes for scored in found.scores(model, metric)]
    if not known:
        return None
    drawn = []
    for name, what, unit, write, of in (
        ("cost-time", "training time of one run", ", seconds", seconds, _train_s),
        ("cost-flops", "training FLOPs of one run", "", short, lambda size: size.training_flops),
    ):
        one = Picture(name, f"{NAMES[metric]} against {what}")
        one.linear("y", min(s.low for _, s in known), max(s.high for _, s in known), _label(metric), limits=(0.0, 1.0))
        one.logarithmic(min(of(size) for size, _ in known), max(of(size) for size, _ in known))
        one.axes.set(xlabel=what + unit, ylabel=NAMES[metric])
        for model in found.sizes:
            for size, mean in _means(one, found, model, metric, of)[-1:]:
                one.said.append(f"{model}: {score(metric, mean.value)} for {write(of(size))}.")
        _legend(one, found, found.study.models)
        drawn.append(one)
    caption = (
        "Each marker is the mean of one model's runs on one fraction. Bars span the seeds. Lines join the fractions of "
        "a model from small to large. Times are measured. FLOPs are three forward passes for each image seen, at the "
        "size it was seen at; they do not depend on the machine. Better is up and to the left."
    )
    rows = [
        [size.model, _images(size.n), score(metric, mean.value), seconds(_train_s(size)), short(size.training_flops)]
        for size, mean in known
    ]
    table = Table(("model", "training images", "mean", "training time", "training FLOPs"), rows)
    return Chart("cost", "Accuracy against cost", drawn, caption, table)


def _train_s(size: Size) -> float:
    """Mean training time; above 0, for a logarithmic axis."""
    spent = size.score("train_s")
    return max(spent.value if spent else 0.0, 1e-9)


# ------------------------------------------------------------------ rows: differences, shares, leakage, speed


def row_picture(name: str, title: str, labels: Sequence[str], what: str, *, step: float = 24.0) -> Picture:
    """A picture of one row a label, with a grid along x alone. The axis of x is set by the caller."""
    size = (max(330, 227 + LETTER * max(len(label) for label in labels)), step * len(labels) + 46)
    one = Picture(name, title, size=size)
    one.rows(labels)
    one.axes.set_xlabel(what)
    return one


OPEN = {
    "marker": "o", "markerfacecolor": LIGHT["page"], "markeredgecolor": LIGHT["muted"], "markeredgewidth": 1.2,
}  # fmt: skip
"""The marker of a difference that is not clear."""


def _gaps(
    name: str, title: str, what: str, metric: str, rows: Sequence[tuple[str, dict[str, Any], str, dict[str, Any]]]
) -> Picture:
    """Differences with their intervals, a row each: (name, difference, p in words or nothing, style of the marker)."""
    one = row_picture(name, title, [row[0] for row in rows], what if "auc" in metric else f"{what}, points", step=18)
    ends = [0.0, *(v for _, gap, *_ in rows for v in gap.values() if v is not None)]
    one.linear("x", min(ends), max(ends), plain if "auc" in metric else lambda v: plain(100 * v))
    one.axes.axvline(0.0, color=LIGHT["muted"], linewidth=1.0, clip_on=False)
    for at, (label, gap, p, style) in enumerate(rows):
        words = f"{label}: {between(metric, gap, write=points)}"
        if gap["low"] is not None and gap["high"] is not None:
            one.interval(gap["low"], gap["high"], at, style.get("markeredgecolor", colour(0)), across=True)
        one.point(gap["value"], at, 0, words, **style)
        one.said.append(f"{words}{p}.")
    return one


def differences(found: Analysis, metric: str) -> Chart | None:
    """Differences between every two models with their intervals, a row each; None where there are none."""
    known = [
        (f"{pair['first']} − {pair['second']}", pair["metrics"][metric])
        for pair in found.differences
        if pair["metrics"][metric]["difference"]["value"] is not None
    ]
    if not known:
        return None
    cells = [cell for _, cell in known]
    title = f"Differences in {NAMES[metric]}"
    gaps, rows = [], []
    for name, cell in known:
        p, gap = p_value(cell.get("p_holm")), cell["difference"]
        gaps.append((name, gap, f", p {p}", {"marker": "s"} if significant(cell) else OPEN))
        rows.append([name, between(metric, gap, write=points), p_value(cell["p"]), p, str(cell["runs"])])
    one = _gaps(f"forest-{metric}", f"{title} between models", f"difference in {NAMES[metric]}", metric, gaps)
    seeds = all(cell["includes_seeds"] for cell in cells)
    lines = [
        f"First model minus second on the same test lesions, with {100 * (found.compared_at or 1.0):.3g} % of the "
        f"training lesions. Bars are 95 % intervals from a paired bootstrap over lesions"
        f"{', with the spread of the seeds' if seeds else ''}.",
        "Filled squares: p under 0.05 after Holm's correction for all pairs. Open circles: no clear difference.",
    ]
    if not seeds:
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
        what = f"share of the variance of {NAMES[metric]}"
        one = row_picture(f"variance-{metric}", f"What {NAMES[metric]} depends on", list(cells), what)
        one.linear("x", 0.0, 1.0, shares, limits=(0.0, 1.0))
        for row, (source, cell) in enumerate(cells.items()):
            words = between("share", cell)
            style = {"color": colour(0), "alpha": 0.5, "clip_on": False}
            one.axes.barh(row, cell["value"], 0.62, gid=one.mark("box", f"{source}: {words}"), **style)
            if cell["low"] is not None:
                one.interval(cell["low"], cell["high"], row, LIGHT["ink"], across=True)
            end = max(cell["value"], cell["high"] or 0.0)
            one.axes.annotate(
                percent(cell["value"], 0), (end, row), (5, 0), textcoords="offset points", va="center", fontsize=SMALL
            )
            rows.append([NAMES[metric], source, words])
            one.said.append(f"{source}: {words}.")
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
    drawn, rows = [], []
    for metric in ("balanced_accuracy", "accuracy"):
        what = NAMES.get(metric, metric)
        cells = {group: result[group][metric] for group in GROUPS if result[group] is not None}
        cells = {group: cell for group, cell in cells.items() if cell["difference"]["value"] is not None}
        if not cells:
            continue
        gaps = [(GROUPS[group], cell["difference"], "", {}) for group, cell in cells.items()]
        title = f"Gain in {what} from a split by image"
        drawn.append(_gaps(f"leakage-{metric}", title, f"gain in {what}", metric, gaps))
        for group, cell in cells.items():
            sides = [percent(cell["first"]), percent(cell["second"])]
            gap = between(metric, cell["difference"], write=points)
            rows.append([GROUPS[group], what, str(result["test_images"][group]), *sides, gap])
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
    return Chart("leakage", "What a split by image gains falsely", drawn, caption, Table(head, rows)) if drawn else None


def speed(found: Analysis) -> Chart:
    """Images per second and the share of time spent waiting for data, one marker a cell, a row a model."""
    models, rows = found.study.models, [run.row for run in found.study.runs]
    waiting = "training time spent waiting for data"
    rate = row_picture("speed-rate", "Training speed of each cell", models, "images per second in training")
    rate.logarithmic(*(max(end(row["img_per_s"] for row in rows), 1e-9) for end in (min, max)))
    wait = row_picture("speed-wait", f"Share of {waiting}", models, waiting)
    wait.linear("x", 0.0, max(0.02, *(row["data_wait_fraction"] for row in rows)), shares, limits=(0.0, 1.0))
    for one, key, write in (
        (rate, "img_per_s", lambda value: f"{value:.1f} img/s"),
        (wait, "data_wait_fraction", percent),
    ):
        for line, model in enumerate(models):
            mine = [row for row in rows if row["model"] == model]
            for i, row in enumerate(mine):
                at = line + (((i * 0.618) % 1.0) - 0.5) * 0.5  # spread, so that equal values stay apart
                words = f"{model}, {row['n_train']:,} images, seed {row['seed']}: {write(row[key])}"
                one.point(max(row[key], 1e-9), at, found.study.series(model), words, size=4, alpha=0.8)
            values = [row[key] for row in mine]
            one.said.append(f"{model}: {write(min(values))} to {write(max(values))}.")
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
    """One matrix a model at its largest fraction, rows true classes, shares of the row written in the cells.

    Of more than MOST_CLASSES classes, tables of what is confused most take its place.
    """
    if len(found.study.runs[0].classes) > MOST_CLASSES:
        return _most_confused(found)
    drawn, rows = [], []
    for model, sizes in found.sizes.items():
        classes, counts = confusion(sizes[-1].runs)
        side = 25.0 * len(classes)
        title = f"{model}: true and predicted classes, {100 * sizes[-1].fraction:.3g} % of the training lesions"
        one = Picture(f"confusion-{model}", title, size=(side + 53, side + 46))
        one.axes.set(xlim=(-0.5, len(classes) - 0.5), title=model)
        one.rows(classes)
        one.axes.set_xticks(range(len(classes)), classes, color=LIGHT["ink"])
        one.axes.xaxis.tick_top()
        one.axes.spines["bottom"].set_visible(False)
        for i, true in enumerate(classes):
            total = counts[i].sum()
            for j, predicted in enumerate(classes):
                share = counts[i, j] / total if total else 0.0
                rows.append([model, true, predicted, str(counts[i, j]), percent(share)])
                if counts[i, j]:
                    _confusion_cell(one, i, j, share, f"{true} classified as {predicted}: {counts[i, j]} of {total}")
            if total:
                one.said.append(f"{true}: {100 * counts[i, i] / total:.0f} % right.")
        drawn.append(one)
    caption = (
        "Rows are the true classes, columns the predicted ones. Numbers are percent of the row, summed over the seeds, "
        "at the largest fraction of each model."
    )
    table = Table(("model", "true", "predicted", "images", "share of true"), rows)
    return Chart("confusion", "Which classes are confused", drawn, caption, table)


def _most_confused(found: Analysis) -> Chart:
    """Which classes are taken for which most often, and which are found least often, for each model."""
    pairs, worst = [], []
    for model, sizes in found.sizes.items():
        classes, counts = confusion(sizes[-1].runs)
        images, wrong = counts.sum(axis=1), counts - np.diag(np.diag(counts))
        there = np.flatnonzero(images)
        recalls = np.diag(counts)[there] / images[there]
        for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES]:
            true, called = np.unravel_index(place, wrong.shape)
            if wrong[true, called]:
                share = percent(wrong[true, called] / images[true])
                pairs.append([model, classes[true], classes[called], f"{wrong[true, called]:,}", share])
        for c in there[np.lexsort((-images[there], recalls))[:MOST_CLASSES]]:
            called = int(wrong[c].argmax())
            most = f"{classes[called]} ({percent(wrong[c, called] / images[c])})" if wrong[c].any() else "–"
            worst.append([model, classes[c], f"{images[c]:,}", percent(counts[c, c] / images[c]), most])
    caption = (
        f"The {MOST_CLASSES} pairs of classes that are confused most often, and the {MOST_CLASSES} classes that are "
        "found least often, summed over the seeds, at the largest fraction of each model. Every image and its "
        "probabilities are in predictions.parquet."
    )
    table = Table(("model", "true", "predicted", "images", "share of true"), pairs)
    more = Table(("model", "class", "test images", "recall", "most often called"), worst)
    return Chart("confusion", "Which classes are confused", [], caption, table, more, "The classes found least often")


def _confusion_cell(one: Picture, i: int, j: int, share: float, words: str) -> None:
    style: dict[str, Any] = {"color": colour(0), "alpha": round(share, 3), "linewidth": 0, "clip_on": False}
    one.axes.barh(i, 0.96, 0.96, left=j - 0.48, gid=one.mark("heat", words), **style)
    ink = LIGHT["page"] if share > 0.5 else LIGHT["ink"] if i == j or share > 0.2 else LIGHT["muted"]
    one.axes.text(j, i, f"{100 * share:.0f}", color=ink, ha="center", va="center", fontsize=SMALL)


def class_recalls(found: Analysis) -> Chart:
    """One small picture a class: recall against training images, a line a model."""
    study = found.study
    sizes = [size.n for by_model in found.sizes.values() for size in by_model]
    drawn, rows = [], []
    per_class = {name: cell for name, cell in study.runs[0].result["test"]["per_class"].items() if cell["images"]}
    most = sorted(per_class, key=lambda name: -per_class[name]["images"])[:MOST_CLASSES]
    for name, cell in per_class.items():
        if name not in most:
            continue
        one = Picture(f"recall-{name}", f"Recall of {name} by training images", size=SMALL_PICTURE)
        one.linear("y", 0.0, 1.0, shares, limits=(0.0, 1.0))
        one.logarithmic(min(sizes), max(sizes))
        lesions = "" if cell["lesions"] is None else f", {cell['lesions']} lesions"
        title = f"{name}: {cell['images']} test images{lesions}"
        one.axes.set(xlabel="training images", ylabel=f"recall of {name}", title=title)
        for model in study.models:
            known = _means(one, found, model, f"recall_{name}", lambda size: size.n)
            rows += [[name, model, _images(size.n), *map(percent, recall)] for size, recall in known]
            for size, recall in known[-1:]:
                one.said.append(f"{model}: {percent(recall.value)} with {_images(size.n)} images.")
        _legend(one, found, study.models)
        drawn.append(one)
    caption = (
        "Means over the seeds; bars span the seeds. The recall of a class with few test lesions moves in large steps. "
        "Its intervals are in results.csv."
    )
    if len(per_class) > len(most):
        caption += f" Shown are the {MOST_CLASSES} classes with the most test images, of {len(per_class):,}."
    table = Table(("class", "model", "training images", "mean recall", "lowest", "highest"), rows)
    return Chart("recall", "Recall of each class by fraction", drawn, caption, table)


SCALED = ("as trained", "after temperature scaling")


def calibration(found: Analysis) -> Chart | None:
    """Accuracy against confidence for each model's largest fraction, before and after temperature scaling."""
    drawn, rows = [], []
    for model, sizes in found.sizes.items():
        tables = [reliability(sizes[-1].runs, scaled=scaled) for scaled in (False, True)]
        if not tables[0]:
            continue
        one = Picture(f"reliability-{model}", f"Reliability of {model}", size=(252, 236))
        errors = [sizes[-1].score(f"expected_calibration_error{end}") for end in ("", "_scaled")]
        before, after = (percent(error.value if error else None) for error in errors)
        one.said.append(f"Calibration error {before}, after temperature scaling {after}.")
        for axis in "xy":
            one.linear(axis, 0.0, 1.0, shares, limits=(0.0, 1.0))
        one.axes.set(xlabel="confidence", ylabel="accuracy", title=model)
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
        one.legend(list(enumerate(SCALED)))
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
    return Chart("reliability", "How far probabilities can be trusted", drawn, caption, table)


# ------------------------------------------------------------------ the table above all charts


def results_table(found: Analysis) -> Table:
    """Each model at its largest fraction: the metrics of the study, averaged over the seeds."""
    classes = found.study.runs[0].classes
    sets = classes.measured
    keys = {
        **{metric: NAMES[metric] for metric in METRICS},
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        **{f"{name}_sensitivity_at_90_specificity": f"{name} sensitivity at 90 % specificity" for name in sets},
        **{f"{name}_auc": f"{name} AUC" for name in sets},
        **{f"{name}_{key}": f"{name} {NAMES[key]}" for name in sets if len(classes) == 2 for key in BINARY},
        "expected_calibration_error": "calibration error",
    }
    prior = found.study.runs[0].result["test"]["prior"]
    head = (f"model (predictions for the {prior} prior)", "parameters", "training images", "runs", *keys.values())
    rows = []
    for model, sizes in found.sizes.items():
        largest = sizes[-1]
        cells = [_result(largest, key) for key in keys]
        parameters = f"{largest.runs[0].row['parameters']:,}"
        rows.append([model, parameters, _images(largest.n), str(len(largest.runs)), *cells])
    return Table(head, rows)


def _result(size: Size, key: str) -> str:
    """A metric averaged over runs; of a single run with its interval."""
    metric = "auc" if "auc" in key or key == "macro_f1" else key  # areas and F1 are written as 0.912
    mean, row = size.score(key), size.runs[0].row
    ends = {end: row[f"{key}_{end}"] if mean and len(size.runs) == 1 else None for end in ("low", "high")}
    return between(metric, {"value": mean.value if mean else None, **ends})
