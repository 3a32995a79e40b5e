"""The pictures of a report that compare: differences between models, and what the spread of the results is due to."""

from typing import Any

from train.study.analysis import Analysis
from train.study.numbers import NAMES, p_value, percent, points
from train.study.report.charts import Figure, Table
from train.study.report.svg import Label, Plot, Scale, linear


def forest(found: Analysis, metric: str) -> Figure | None:
    """Differences between every two models with their intervals, a line each; None where there are none."""
    pairs = [p for p in found.differences if p["metrics"][metric]["difference"]["value"] is not None]
    if not pairs:
        return None
    cells = [pair["metrics"][metric] for pair in pairs]
    ends = [v for c in cells for v in c["difference"].values() if v is not None]
    x = linear(min([0.0, *ends]), max([0.0, *ends]), lambda v: f"{v:+.3g}" if "auc" in metric else f"{100 * v:+.3g}")
    height = 26 * len(pairs) + 64
    unit = "" if "auc" in metric else ", percentage points"
    told = []
    plot = Plot(
        f"forest-{metric}", f"Differences in {NAMES[metric]} between models", "", x, Scale(0, len(pairs), False, ()),
        f"difference in {NAMES[metric]}{unit}", "", height=height, left=170, top=10,
    )  # fmt: skip
    rows = []
    plot.rule(x=0.0)
    for line, (pair, cell) in enumerate(zip(pairs, cells, strict=True)):
        at, gap = len(pairs) - line - 0.5, cell["difference"]
        name = f"{pair['first']} − {pair['second']}"
        if gap["low"] is not None:
            plot.across(at, gap["low"], gap["high"], 0)
        plot.point(gap["value"], at, 1 if clear(cell) else 0, told=f"{name}: {points(metric, gap['value'])}")
        plot.text(plot.left - 8, plot.py(at) + 4, name, anchor="end")
        words = f"{points(metric, gap['value'])} ({points(metric, gap['low'])} to {points(metric, gap['high'])})"
        told.append(f"{name}: {words}, p {p_value(cell.get('p_holm'))}.")
        rows.append([name, words, p_value(cell["p"]), p_value(cell.get("p_holm")), str(cell["runs"])])
    plot.told = " ".join(told)
    seeds = all(cell["includes_seeds"] for cell in cells)
    caption = (
        f"First model minus second on the same test lesions, with {100 * (found.compared_at or 1.0):.3g} % of the "
        "training lesions; bars are 95 % intervals from a paired bootstrap over lesions"
        + (" and the spread of the seeds" if seeds else "; with one seed they speak of these trained networks only")
        + ". Squares: p under 0.05 after Holm's correction for all pairs; circles: not told apart."
        + "".join(f" Note: {note}." for note in dict.fromkeys(cell["note"] for cell in cells) if note)
    )
    table = Table(("models", "difference (95 %)", "p", "p, Holm", "pairs of runs"), rows)
    return Figure(
        f"forest-{metric}", f"Differences in {NAMES[metric]}", [plot.svg(y_ticks=False)], caption, table=table
    )


def clear(cell: dict[str, Any]) -> bool:
    """Whether a difference stands out among all that were tested."""
    p = cell.get("p_holm")
    return p is not None and p < 0.05


def variance(found: Analysis) -> Figure | None:
    """Shares of the variance by source, a bar each with its interval; None where they cannot be computed."""
    known = {metric: share for metric, share in found.variance.items() if not isinstance(share, str)}
    if not known:
        return None
    charts, rows, notes = [], [], []
    for metric, told in known.items():
        shares = [(source, cell) for source, cell in told["shares"].items() if cell["value"] is not None]
        words = "; ".join(f"{source} {share(cell)}" for source, cell in shares)
        plot = Plot(
            f"variance-{metric}", f"What moves {NAMES[metric]}", words, linear(0.0, 1.0, Label("percent")),
            Scale(0, len(shares), False, ()), f"share of the variance of {NAMES[metric]}", "",
            height=34 * len(shares) + 64, left=90, top=10,
        )  # fmt: skip
        for line, (source, cell) in enumerate(shares):
            at = len(shares) - line - 0.5
            plot.box((0.0, cell["value"]), (at - 0.3, at + 0.3), 0, told=f"{source}: {share(cell)}")
            if cell["low"] is not None:
                plot.across(at, cell["low"], cell["high"], 0)
            plot.text(plot.left - 8, plot.py(at) + 4, source, anchor="end")
            rows.append([NAMES[metric], source, share(cell)])
        notes += [f"{NAMES[metric]}: {note}" for note in told["notes"]]
        charts.append(plot.svg(y_ticks=False))
    caption = (
        "How much of the spread of all results is due to the model, to the number of training images, to models "
        "gaining differently from more images (interaction), and to the seed, which draws the training subset too. "
        "Bars: 95 % intervals. " + " ".join(f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(notes))
    )
    table = Table(("metric", "source", "share (95 %)"), rows)
    return Figure("variance", "What moves the results", charts, caption.strip(), table=table)


def share(cell: dict[str, Any]) -> str:
    """A share of the variance with its interval."""
    if cell["low"] is None or cell["high"] is None:
        return percent(cell["value"])
    return f"{percent(cell['value'])} ({percent(cell['low'])} to {percent(cell['high'])})"


def leakage(found: Analysis) -> Figure | None:
    """What training on views of the test lesions gains, with and without the images that have such views."""
    told = found.leakage
    if told is None:
        return None
    groups = {"all": "all test images", "seen": "lesion also in training", "unseen": "lesion not in training"}
    known = {name: words for name, words in groups.items() if told[name] is not None}
    charts, rows = [], []
    for metric in ("balanced_accuracy", "accuracy"):
        cells = {name: told[name][metric] for name in known}
        ends = [v for cell in cells.values() for v in cell["difference"].values() if v is not None]
        x = linear(min([0.0, *ends]), max([0.0, *ends]), lambda v: f"{100 * v:+.3g}")
        what = f"gain in {NAMES.get(metric, metric)}, percentage points"
        height = 34 * len(known) + 64
        plot = Plot(
            f"leakage-{metric}", f"False gain in {NAMES.get(metric, metric)} of a split by image", "", x,
            Scale(0, len(known), False, ()), what, "", height=height, left=160, top=10,
        )  # fmt: skip
        plot.rule(x=0.0)
        words = []
        for line, (name, cell) in enumerate(cells.items()):
            at, gap = len(known) - line - 0.5, cell["difference"]
            plot.text(plot.left - 8, plot.py(at) + 4, known[name], anchor="end")
            if gap["value"] is None:
                continue
            if gap["low"] is not None:
                plot.across(at, gap["low"], gap["high"], line)
            numbers = f"{points(metric, gap['value'])} ({points(metric, gap['low'])} to {points(metric, gap['high'])})"
            plot.point(gap["value"], at, line, told=f"{known[name]}: {numbers}")
            words.append(f"{known[name]}: {numbers}.")
            sides = [percent(cell["first"]), percent(cell["second"])]
            rows.append([known[name], NAMES.get(metric, metric), str(told["test_images"][name]), *sides, numbers])
        plot.told = " ".join(words)
        charts.append(plot.svg(y_ticks=False))
    lesions = told["training_lesions"]
    caption = (
        f"{told['model']}, {len(told['seeds'])} × trained on each of two sets of {told['training_images']:,} images "
        "with the same count of every class: one with the views of test lesions that a split by image leaves there "
        f"({lesions['leaky']:,} lesions), one without any ({lesions['apart']:,} lesions). Same test images, paired by "
        "lesion; bars are 95 % intervals. A gain is false, for new patients have no such views; where the lesion is "
        "not in training nothing can leak, and a difference is of the networks."
    )
    head = ("test images", "metric", "images", "with views", "without", "gain (95 %)")
    return Figure("leakage", "What a split by image gains falsely", charts, caption, table=Table(head, rows))
