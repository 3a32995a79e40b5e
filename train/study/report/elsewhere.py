"""The charts of tests on other sets: beside the networks' own test images, and by subgroup."""

from collections.abc import Sequence
from typing import Any

from shards.format import read_classes
from train.metrics.subgroups import FEWEST, compared
from train.study.analysis import Analysis
from train.study.elsewhere import named, tested
from train.study.numbers import NAMES, between, p_value, points
from train.study.report.charts import OPEN, Chart, Table, row_picture
from train.study.report.picture import LIGHT, Picture, colour, plain, shares, styled

PLACES = {"there": "on the other set", "home": "on the networks' own test images of these classes"}


def carried(found: Analysis) -> list[Chart]:
    """How far the networks carry: a chart of all sets, and one for each set that was divided into subgroups."""
    if not found.elsewhere:
        return []
    with styled():
        by_set = [_subgroups(number, result) for number, result in enumerate(found.elsewhere) if result["subgroups"]]
        return [_sets(found.elsewhere), *by_set]


def _called(result: dict[str, Any]) -> str:
    """The name of a result's row: its folder, and the network."""
    return f"{result['folder']}: {tested(result)}"


def _words(key: str) -> str:
    return NAMES.get(key, f"{key.removesuffix('_auc')} AUC")


def _axis(one: Picture, metric: str, cells: list[dict[str, Any]]) -> None:
    ends = [end for cell in cells for end in cell.values() if isinstance(end, float)]
    one.linear("x", min(ends), max(ends), plain if "auc" in metric else shares, limits=(0.0, 1.0))


def _interval(one: Picture, cell: dict[str, Any], at: float, ink: str) -> None:
    if cell["low"] is not None and cell["high"] is not None:
        one.interval(cell["low"], cell["high"], at, ink, across=True)


def _sets(results: list[dict[str, Any]]) -> Chart:
    """A row a set: the scores there, and on the networks' own test images."""
    drawn = []
    for metric in ("balanced_accuracy", "macro_auc"):
        known = [one for one in results if one["there"][metric]["value"] is not None]
        if not known:
            continue
        name = NAMES[metric]
        one = row_picture(f"elsewhere-{metric}", f"{name} on other sets", [_called(r) for r in known], name, step=30)
        _axis(one, metric, [result[place][metric] for result in known for place in PLACES if result[place]])
        for row, result in enumerate(known):
            for series, place in enumerate(PLACES):
                cell = result[place] and result[place][metric]
                if cell and cell["value"] is not None:
                    at, words = (
                        row + (series - 0.5) * 0.36,
                        f"{_called(result)}, {PLACES[place]}: {between(metric, cell)}",
                    )
                    _interval(one, cell, at, colour(series))
                    one.point(cell["value"], at, series, words)
                    one.said.append(f"{words}.")
        one.legend(list(enumerate(PLACES.values())))
        drawn.append(one)
    rows = []
    for result in results:
        left = result["left_out"]
        out = [f"{name} ({count:,} images)" for name, count in left["of_the_set"].items()]
        out += [f"{left['seen_in_training']:,} images seen in training"] if left["seen_in_training"] else []
        out += [f"no image of {named(left['of_the_run'])}"] if left["of_the_run"] else []
        for metric in compared(read_classes(result["classes"])):
            sides = [between(metric, result[place][metric]) if result[place] else "–" for place in PLACES]
            there = result["there"]
            size = [f"{there['images']:,}", "–" if there["lesions"] is None else f"{there['lesions']:,}"]
            count = str(len(result["classes"]["names"]))
            rows.append([_called(result), *size, count, _words(metric), *sides, "; ".join(out)])
    caption = (
        "Bars are 95 % intervals; images of one lesion or patient are resampled together. Both rows of a set are "
        "measured over the classes that the set and the network have. Probabilities are divided by their sum over "
        "these classes, so the network is told that an image is of one of them. A difference between the rows has many "
        "possible reasons: other patients, cameras, ways of choosing the images, and ways of making the diagnosis."
    )
    head = (
        "set and network",
        "images",
        "groups",
        "classes",
        "score",
        "there (95 %)",
        "own test images (95 %)",
        "left out",
    )
    return Chart("elsewhere", "How far it carries", drawn, caption, Table(head, rows))


def _subgroups(number: int, result: dict[str, Any]) -> Chart:
    """A picture a column: the balanced accuracy of each of its groups."""
    metric, drawn, rows, few = "balanced_accuracy", [], [], []
    scores = compared(read_classes(result["classes"]))
    for column in result["subgroups"]:
        groups = [group for group in column["groups"] if group[metric]["value"] is not None]
        name = column["column"]
        of_groups = {group["value"]: _group_rows(name, group, scores) for group in column["groups"]}
        rows += [row for found in of_groups.values() for row in found]
        few += [f"{name} {value}" for value, found in of_groups.items() if not found]
        if not groups:
            continue
        title = f"{NAMES[metric]} on {result['folder']} by {name}"
        labels = [f"{group['value']} ({group['images']:,})" for group in groups]
        one = row_picture(f"elsewhere-{number}-{name}", title, labels, NAMES[metric], step=18)
        one.axes.set_title(name)
        _axis(one, metric, [group[metric] for group in groups])
        for at, group in enumerate(groups):
            cell, gap = group[metric], group["against_others"].get(metric, {})
            words = f"{group['value']}: {between(metric, cell)}"
            clear = gap.get("p_holm") is not None and gap["p_holm"] < 0.05
            _interval(one, cell, at, colour(0) if clear else LIGHT["muted"])
            style: dict[str, Any] = {"marker": "s"} if clear else OPEN
            one.point(cell["value"], at, 0, words, **style)
            one.said.append(f"{words}.")
        drawn.append(one)
    unknown = [
        f"{column['column']} of {column['unknown']:,} images" for column in result["subgroups"] if column["unknown"]
    ]
    caption = (
        "Numbers of images in parentheses. Bars are 95 % intervals. A class counts in a group if the group has at "
        f"least {FEWEST} lesions of it, so groups can have different classes: the table says how many. Each group is "
        f"tested against all other images, over the classes of which both have {FEWEST} lesions. Filled squares: p "
        "under 0.05 after Holm's correction for all tests of this score."
    )
    if few:
        caption += f" Too few lesions for any score: {named(few)}."
    if unknown:
        caption += f" Left out, because the value is unknown: {', '.join(unknown)}."
    head = (
        "column",
        "group",
        "images",
        "lesions or patients",
        "classes",
        "score",
        "value (95 %)",
        "minus the others (95 %)",
        "p, Holm",
    )
    title = f"Subgroups on {result['folder']}, {tested(result)}"
    return Chart(f"elsewhere-{number}", title, drawn, caption, Table(head, rows))


def _group_rows(column: str, group: dict[str, Any], metrics: Sequence[str]) -> list[list[str]]:
    """The rows of a group's scores; a score that is not defined has none."""
    size = [f"{group['images']:,}", f"{group['lesions']:,}", str(len(group["classes"]))]
    rows = []
    for metric in metrics:
        if group[metric]["value"] is None:
            continue
        gap = group["against_others"].get(metric, {})
        told = between(metric, gap, write=points) if "value" in gap else gap.get("reason", "no other group")
        p = p_value(gap.get("p_holm")) if "value" in gap else "–"
        rows.append([column, group["value"], *size, _words(metric), between(metric, group[metric]), told, p])
    return rows
