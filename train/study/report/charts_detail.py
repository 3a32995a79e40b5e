"""The pictures of a report that look into models: classes confused and recalled, calibration, speed."""

from html import escape

from train.study.analysis import METRICS, Analysis, confusion, recalls, reliability
from train.study.numbers import NAMES, percent
from train.study.report.charts import Figure, Table, model_legend
from train.study.report.svg import Label, Plot, Scale, linear, logarithmic, wrap

CELL_PX = 40


def confusions(found: Analysis) -> Figure:
    """One matrix a model at its largest fraction, rows true classes, shares of the row written in the cells."""
    charts, rows = [], []
    for model in found.study.models:
        fraction = found.study.largest(model)
        runs = found.study.of(model, fraction)
        classes, counts = confusion(runs)
        size = 62 + CELL_PX * len(classes)
        parts = [f'<text class="strong" x="62" y="14">{escape(model)}</text>']
        told = []
        for i, true in enumerate(classes):
            total = counts[i].sum()
            y = 42 + CELL_PX * i
            parts.append(f'<text class="ink" x="56" y="{y + 24}" text-anchor="end">{escape(true)}</text>')
            parts.append(
                f'<text class="ink" x="{62 + CELL_PX * (i + 0.5)}" y="34" text-anchor="middle">{escape(true)}</text>'
            )
            for j, called in enumerate(classes):
                share = counts[i, j] / total if total else 0.0
                x = 62 + CELL_PX * j
                words = f"{true} called {called}: {counts[i, j]} of {total}"
                parts.append(
                    f'<rect class="heat" x="{x}" y="{y}" width="{CELL_PX - 1}" height="{CELL_PX - 1}" '
                    f'fill-opacity="{share:.3f}"><title>{escape(words)}</title></rect>'
                )
                kind = "onheat" if share > 0.5 else "ink" if i == j else "tick"
                text = "" if not counts[i, j] else f"{100 * share:.0f}"
                parts.append(f'<text class="{kind}" x="{x + 19.5}" y="{y + 24}" text-anchor="middle">{text}</text>')
                rows.append([model, true, called, str(counts[i, j]), percent(share)])
            if total:
                told.append(f"{true} {100 * counts[i, i] / total:.0f} % right")
        title = f"{model}: classes confused, {100 * fraction:.3g} % of the training lesions"
        charts.append(wrap(f"confusion-{model}", title, ", ".join(told) + ".", size, size - 16, parts))
    caption = (
        "Rows are the true classes, columns what the model called them; numbers are percent of the row, summed "
        "over the seeds, at each model's largest fraction."
    )
    table = Table(("model", "true", "called", "images", "share of true"), rows)
    return Figure("confusion", "Which classes are confused", charts, caption, table=table)


def class_recalls(found: Analysis) -> Figure:
    """One small chart a class: recall against training images, a line a model."""
    study = found.study
    first = study.runs[0].result["test"]
    sizes = [size.n for by_model in found.sizes.values() for size in by_model]
    charts, rows = [], []
    x = logarithmic(min(sizes), max(sizes), Label("counts"))
    y = linear(0.0, 1.0, Label("percent"), wanted=4)
    for name, cell in first["per_class"].items():
        if not cell["images"]:
            continue
        title = f"Recall of {name} by training images"
        plot = Plot(
            f"recall-{name}", title, "", x, y, "training images", f"recall of {name}", width=320, height=224, top=26
        )
        told = []
        for model in study.models:
            series, known = study.series(model), recalls(study, model, name)
            if known:
                plot.line([(n, mean) for n, mean, _, _ in known], series)
                told.append(f"{model}: {percent(known[-1][1])} with {known[-1][0]:,.0f} images.")
            for n, mean, low, high in known:
                if high > low:
                    plot.interval(n, low, high, series)
                plot.point(n, mean, series, told=f"{model}, {n:,.0f} images: {percent(mean)}", size=3.2)
                rows.append([name, model, f"{n:,.0f}", percent(mean), percent(low), percent(high)])
        lesions = "" if cell["lesions"] is None else f" of {cell['lesions']} lesions"
        plot.text(plot.left, 13, f"{name} · {cell['images']} test images{lesions}", kind="strong")
        plot.told = " ".join(told)
        charts.append(plot.svg())
    caption = (
        "Means over the seeds; bars span the seeds. A class with few test lesions moves in large steps: its intervals "
        "are in results.csv."
    )
    table = Table(("class", "model", "training images", "mean recall", "lowest", "highest"), rows)
    return Figure("recall", "Recall of each class by fraction", charts, caption, model_legend(found), table)


def calibration(found: Analysis) -> Figure | None:
    """Accuracy against confidence for each model's largest fraction, before and after temperature scaling."""
    charts, rows = [], []
    axis = linear(0.0, 1.0, Label("percent"))
    for model in found.study.models:
        runs = found.study.of(model, found.study.largest(model))
        plain, scaled = reliability(runs, scaled=False), reliability(runs, scaled=True)
        if not plain:
            continue
        errors = [run.row["expected_calibration_error"] for run in runs]
        after = [run.row.get("expected_calibration_error_scaled") for run in runs]
        words = f"Calibration error {_mean(errors)}, after temperature scaling {_mean(after)}."
        plot = Plot(
            f"reliability-{model}", f"Reliability of {model}", words, axis, axis, "confidence", "accuracy", width=320,
            height=290,
        )  # fmt: skip
        plot.parts.append(
            f'<path class="rule" d="M{plot.px(0):.1f} {plot.py(0):.1f}L{plot.px(1):.1f} {plot.py(1):.1f}"/>'
        )
        for series, bins in ((0, plain), (1, scaled)):
            if not bins:
                continue
            plot.line([(b["confidence"], b["accuracy"]) for b in bins], series)
            for b in bins:
                if series == 0:
                    plot.interval(b["confidence"], b["low"], b["high"], series)
                numbers = [percent(b[key]) for key in ("confidence", "accuracy", "share")]
                told = "confidence {}, accuracy {}, {} of images".format(*numbers)
                plot.point(b["confidence"], b["accuracy"], series, told=told, size=2.5 + 4 * b["share"] ** 0.5)
                rows.append(
                    [
                        model,
                        ("as trained", "scaled")[series],
                        *(percent(b[k]) for k in ("confidence", "accuracy", "share")),
                    ]
                )
        plot.text(plot.left + 6, plot.top + 12, model, kind="strong")
        charts.append(plot.svg())
    if not charts:
        return None
    prior = found.study.runs[0].result["test"]["prior"]
    caption = (
        f"Probabilities for the {prior} prior, at each model's largest fraction, averaged over the seeds. On the "
        "diagonal, 80 % sure means right 80 % of the time; below it a model is too sure of itself. Larger markers hold "
        "more images. Bars: 95 % intervals before scaling. The temperature is fitted on the validation split."
    )
    names = [(0, "as trained"), (1, "after temperature scaling")]
    table = Table(("model", "probabilities", "confidence", "accuracy", "share of images"), rows)
    return Figure("reliability", "How far probabilities can be trusted", charts, caption, names, table)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return percent(sum(known) / len(known)) if known else "–"


def speed(found: Analysis) -> Figure:
    """Images per second and the share of time spent waiting for data, one marker a cell, a row a model."""
    study = found.study
    rows = [run.row for run in study.runs]
    models = study.models
    rates = [max(row["img_per_s"], 1e-9) for row in rows]
    top = max(0.02, *(row["data_wait_fraction"] for row in rows))
    height = 34 * len(models) + 60
    lines = Scale(0, len(models), False, ())
    rate = Plot(
        "speed-rate", "Training speed of each cell", "", logarithmic(min(rates), max(rates), Label("counts")), lines,
        "images per second in training", "", height=height, left=90, top=8,
    )  # fmt: skip
    wait = Plot(
        "speed-wait", "Share of training time spent waiting for data", "",
        linear(0.0, top, Label("percent"), limits=(0.0, 1.0)), lines, "training time spent waiting for data", "",
        height=height, left=90, top=8,
    )  # fmt: skip
    told: dict[str, list[str]] = {"rate": [], "wait": []}
    for line, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        series, middle = study.series(model), len(models) - line - 0.5
        for plot in (rate, wait):
            plot.text(plot.left - 8, plot.py(middle) + 4, model, anchor="end")
        for i, row in enumerate(mine):
            at = middle + (((i * 0.618) % 1.0) - 0.5) * 0.5  # spread, so that equal values stay apart
            name = f"{model}, {row['n_train']:,} images, seed {row['seed']}"
            rate.point(max(row["img_per_s"], 1e-9), at, series, told=f"{name}: {row['img_per_s']:.1f} img/s", size=3.2)
            wait.point(
                row["data_wait_fraction"], at, series, told=f"{name}: {percent(row['data_wait_fraction'])}", size=3.2
            )
        speeds, waits = [row["img_per_s"] for row in mine], [row["data_wait_fraction"] for row in mine]
        told["rate"].append(f"{model}: {min(speeds):.0f} to {max(speeds):.0f} images per second.")
        told["wait"].append(f"{model}: {percent(min(waits))} to {percent(max(waits))}.")
    rate.told, wait.told = " ".join(told["rate"]), " ".join(told["wait"])
    caption = (
        "One marker a cell. Speed counts training alone, compiling and evaluation apart. Waiting is time in which the "
        "training loop had no batch to work on."
    )
    head = (
        "cell",
        "img/s",
        "data wait",
        "start s",
        "compile s",
        "train s",
        "evaluate s",
        "save s",
        "write s",
        "peak memory MB",
    )
    seconds = ("start_s", "compile_s", "train_s", "eval_s", "save_s", "write_s")
    cells = [
        [
            row["cell"],
            f"{row['img_per_s']:.1f}",
            percent(row["data_wait_fraction"]),
            *(f"{row[key]:.1f}" if row.get(key) is not None else "–" for key in seconds),
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        ]
        for row in rows
    ]
    charts = [rate.svg(y_ticks=False), wait.svg(y_ticks=False)]
    return Figure("speed", "Speed and waiting for data", charts, caption, table=Table(head, cells))


def results_table(found: Analysis) -> Table:
    """Each model at its largest fraction: the metrics of the study, averaged over the seeds."""
    keys = (
        *METRICS,
        "accuracy",
        "macro_f1",
        "melanoma_sensitivity_at_90_specificity",
        "malignant_auc",
        "expected_calibration_error",
    )
    prior = found.study.runs[0].result["test"]["prior"]
    head = (
        f"model (calls and probabilities for the {prior} prior)",
        "parameters", "training images", "runs", *(NAMES[m] for m in METRICS), "accuracy", "macro F1",
        "melanoma found at 90 % specificity", "malignant AUC", "calibration error",
    )  # fmt: skip
    rows = []
    for model in found.study.models:
        runs = found.study.of(model, found.study.largest(model))
        cells = []
        for key in keys:
            known = [run.row[key] for run in runs if run.row[key] is not None]
            mean = sum(known) / len(known) if known else None
            text = "–" if mean is None else f"{mean:.3f}" if "auc" in key or key == "macro_f1" else percent(mean)
            low, high = runs[0].row[f"{key}_low"], runs[0].row[f"{key}_high"]
            if len(runs) == 1 and mean is not None and low is not None and high is not None:
                many = "auc" in key or key == "macro_f1"
                text += f" ({low:.3f} to {high:.3f})" if many else f" ({percent(low)} to {percent(high)})"
            cells.append(text)
        rows.append([model, f"{runs[0].row['parameters']:,}", f"{runs[0].row['n_train']:,}", str(len(runs)), *cells])
    return Table(head, rows)
