"""Scores by subgroup, as by sex or age, and tests of their differences from all other images.

A class counts in a group if the group has at least FEWEST lesions of it, and in a difference if both sides have, so
that both are measured on the same classes. Lesions are resampled within their class and subgroup; a lesion with images
on both sides is drawn once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from shards.format import Classes
from train.metrics.bootstrap import Floats, Ints, LesionBootstrap, estimate, number, pooled_freedom
from train.metrics.differences import student
from train.metrics.scores import Scores

FEWEST = 5
"""Lesions of a class that are needed: the bootstrap of fewer says too little about chance."""
MOST_VALUES = 20
"""Of a column with more values, the others are one group."""
AGE_EDGES = (30.0, 50.0, 70.0)
_CATEGORIES = 10
"""A column of numbers with up to so many values is not divided into bins."""
_UNKNOWN = {"", "unknown", "nan", "none", "null", "na", "n/a"}
_CALLED = {
    "site": ("localization", "anatomsitegeneral", "anatomsitegeneralchallenge", "site", "region"),
    "sex": ("sex", "gender"),
    "age": ("age", "ageapprox"),
    "attribution": ("attribution", "dataset"),
    "skintone": ("skintoneclass", "skintone", "fitspatrick", "fitzpatrick", "fitzpatrickskintype"),
}
"""Columns by the words that people use for them, without case and punctuation."""


def find_column(word: str, columns: Sequence[str]) -> str | None:
    """The column that a word means: by its name, then without case and punctuation, then by what tables call it."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    if word in columns:
        return word
    for name in (plain(word), *_CALLED.get(plain(word), ())):
        if found := [column for column in columns if plain(column) == name]:
            return found[0]
    return None


@dataclass(frozen=True)
class Groups:
    """A column as groups. names: of the groups; codes: (N,) int64, the group of each image, −1 where it is unknown."""

    column: str
    names: tuple[str, ...]
    codes: Ints


def groups_of(column: str, values: Sequence[Any], edges: Sequence[float] = ()) -> Groups:
    """The groups of a column's values: text, numbers or None.

    edges: of bins, ascending. Without any, ages are divided at AGE_EDGES, and other numbers with more than ten values
    at their quartiles. More than MOST_VALUES values: the rarer ones are one group.
    """
    numbers = [_number(value) for value in values]
    known = np.array([value for value in numbers if value is not None], np.float64)
    text_only = any(
        one is None and str(value).strip().lower() not in _UNKNOWN for one, value in zip(numbers, values, strict=True)
    )
    if edges or (not text_only and np.unique(known).size > _CATEGORIES):
        ends = list(edges) or list(AGE_EDGES if find_column("age", [column]) else _quartiles(known))
        names = [
            f"under {ends[0]:g}",
            *(f"{a:g} to under {b:g}" for a, b in pairwise(ends)),
            f"{ends[-1]:g} and more",
        ]
        codes = np.array([-1 if one is None else int(np.searchsorted(ends, one, "right")) for one in numbers], np.int64)
        there = [code for code in range(len(names)) if (codes == code).any()]
    else:
        texts = [_text(value, one) for value, one in zip(values, numbers, strict=True)]
        found, counts = np.unique([text for text in texts if text], return_counts=True)
        names = found[np.sort(np.argsort(-counts, kind="stable")[:MOST_VALUES])].tolist()
        place = {name: code for code, name in enumerate(names)}
        codes = np.array([place.get(text, len(names)) if text else -1 for text in texts], np.int64)
        names.append(f"{found.size - len(names)} others")
        there = [code for code in range(len(names)) if (codes == code).any()]
    return Groups(
        column,
        tuple(names[code] for code in there),
        np.array([there.index(c) if c >= 0 else -1 for c in codes.tolist()], np.int64),
    )


def _number(value: Any) -> float | None:
    """A finite number, also if it is written as text; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None


def _text(value: Any, as_number: float | None) -> str:
    """A value as the name of a group, `3` for 3.0; empty where it is unknown."""
    text = str(value).strip() if as_number is None else f"{as_number:g}"
    return "" if value is None or text.lower() in _UNKNOWN else text


def _quartiles(values: Floats) -> list[float]:
    ends = np.unique([float(f"{end:.3g}") for end in np.quantile(values, [0.25, 0.5, 0.75])])
    return ends.tolist()


# ------------------------------------------------------------------ scores and differences


@dataclass(frozen=True)
class Side:
    """What was measured of some images: replicates as of `scores.replicate`, and lesions by class, (C,)."""

    found: dict[str, Floats]
    lesions: Ints
    inside: dict[str, tuple[int, int]]
    """Of each measured set, the lesions that are of it and those that are not."""


def compared(classes: Classes) -> tuple[str, ...]:
    """The scores that are measured by subgroup and compared."""
    return ("balanced_accuracy", "macro_auc", *(f"{name}_auc" for name in classes.measured))


def side_of(scores: Scores, codes: Ints, found: dict[str, Floats]) -> Side:
    """codes: (N,) lesions of the images that `scores` holds."""
    pairs = np.unique(np.stack([codes, scores.labels]), axis=1)
    inside = {
        name: (int(np.unique(codes[truth]).size), int(np.unique(codes[~truth]).size))
        for name, (truth, _) in scores.sets.items()
    }
    return Side(found, np.bincount(pairs[1], minlength=scores.classes), inside)


def measure_groups(
    logits: Floats,
    labels: Ints,
    lesions: Sequence[Any] | np.ndarray | None,
    groups: Groups,
    *,
    classes: Classes,
    resamples: int = 1000,
    seed: int = 0,
    **priors: Any,
) -> dict[str, Any]:
    """The scores of each group with intervals, and how they differ from those of all other known images, for JSON.

    logits (N, C), labels (N,), lesions (N,) or None: as for `run_metrics.evaluate`; priors: `prior`, `logits_prior` and
    `training_prior`. {"column", "unknown", "groups": [{"value", "images", "lesions", "classes", the scores of
    `compared` over these classes, "against_others": {score: `difference`}}]}. Each p is of one test: `holm` corrects
    them for their number. Of two groups one is tested, and the other has its mirror image.
    """
    known = np.flatnonzero(groups.codes >= 0)
    result = {"column": groups.column, "unknown": int(labels.size - known.size), "groups": []}
    if not known.size:
        return result
    codes, labels, logits = groups.codes[known], labels[known], logits[known]
    ids = None if lesions is None else np.asarray(lesions, dtype=object)[known]
    bootstrap = LesionBootstrap(labels, ids, resamples=resamples, seed=seed, within=codes)
    rows = [np.flatnonzero(codes == code) for code in range(len(groups.names))]
    others = [np.flatnonzero(codes != code) for code in range(len(groups.names) if len(rows) > 2 else 0)]
    parts = rows + others
    scores = [Scores(logits[part], labels[part], classes=classes, **priors) for part in parts]
    pieces: list[list[dict[str, Floats]]] = [[] for _ in parts]
    keys = ("recall", "auc", *compared(classes))
    for weights in bootstrap.weights():
        for part, one, mine in zip(parts, scores, pieces, strict=True):
            measured = one.measure(weights[part])
            mine.append({key: measured[key] for key in keys})
    sides = [
        side_of(one, bootstrap.codes[part], {key: np.concatenate([piece[key] for piece in mine]) for key in keys})
        for part, one, mine in zip(parts, scores, pieces, strict=True)
    ]
    if len(rows) == 2:
        sides += [sides[1], sides[0]]
    for code, (name, part) in enumerate(zip(groups.names, rows, strict=True)):
        mine, rest = sides[code], sides[len(rows) + code] if len(rows) > 1 else None
        counted = _counted(mine)
        cells = {key: _cell(mine, key, counted) for key in compared(classes)}
        result["groups"].append(
            {
                "value": name,
                "images": int(part.size),
                "lesions": int(np.unique(bootstrap.codes[part]).size),
                "classes": [classes.names[c] for c in counted],
                **cells,
                "against_others": {} if rest is None else {key: difference(mine, rest, key, classes) for key in cells},
            }
        )
    if len(rows) == 2:
        result["groups"][1]["against_others"] = {
            key: _mirrored(cell) for key, cell in result["groups"][0]["against_others"].items()
        }
    return result


def _mirrored(cell: dict[str, Any]) -> dict[str, Any]:
    if "value" not in cell:
        return cell
    turned = {"value": cell["value"], "low": cell["high"], "high": cell["low"]}
    return cell | {key: None if end is None else -end for key, end in turned.items()} | {"mirror": True}


def _counted(*sides: Side) -> Ints:
    """The classes of which each side has FEWEST lesions."""
    return np.flatnonzero(np.all([side.lesions >= FEWEST for side in sides], axis=0))


def _measured(side: Side, key: str, counted: Ints) -> tuple[Floats, float]:
    """(R + 1,) replicates of a score over the counted classes, and the degrees of freedom of its variance.

    Those of an area are the lesions of the smallest class that it depends on, less one. All NaN where too few classes
    or lesions are there.
    """
    unknown = np.full(len(side.found["recall"]), np.nan)
    if key not in _OF_CLASSES:
        fewest = min(side.inside[key.removesuffix("_auc")])
        return (side.found[key] if fewest >= FEWEST else unknown), fewest - 1.0
    if counted.size < 2:
        return unknown, 0.0
    values = side.found[_OF_CLASSES[key]][:, counted]
    freedom = float(side.lesions[counted].min()) - 1
    if key == "balanced_accuracy":
        variances = np.asarray(np.nanvar(values[1:], axis=0, ddof=1), np.float64)
        freedom = pooled_freedom(variances, np.asarray(side.lesions[counted] - 1.0, np.float64))
    return values.mean(axis=1), freedom


_OF_CLASSES = {"balanced_accuracy": "recall", "macro_auc": "auc"}
"""Scores that are means over classes, and of what."""


def _cell(side: Side, key: str, counted: Ints) -> dict[str, Any]:
    values, freedom = _measured(side, key, counted)
    return estimate(values, freedom=max(freedom, 1.0))


def difference(one: Side, other: Side, key: str, classes: Classes) -> dict[str, Any]:
    """A score of one side minus that of the other: {"value", "low", "high", "p", "classes"}, or {"reason"}.

    The interval and p are Student's t with the variance of the difference over resamples. classes: those that count;
    in `classes` of the result, or None where all images do.
    """
    counted = _counted(one, other)
    values, freedoms = zip(*(_measured(side, key, counted) for side in (one, other)), strict=True)
    if not all(np.isfinite(part[0]) for part in values):
        what = "two classes" if key in _OF_CLASSES else f"{key.removesuffix('_auc')} and of the others"
        return {"reason": f"not {FEWEST} lesions of {what} on both sides"}
    gaps = values[0] - values[1]
    value, variances = float(gaps[0]), [float(np.nanvar(part[1:], ddof=1)) for part in (gaps, *values)]
    low, high, p = student(value, variances[0], pooled_freedom(np.array(variances[1:]), np.array(freedoms)))
    return {
        "value": number(value),
        "low": number(max(low, -1.0)),
        "high": number(min(high, 1.0)),
        "p": p,
        "classes": [classes.names[c] for c in counted] if key in _OF_CLASSES else None,
    }


def holm(columns: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Add `p_holm` to the tested differences of `measure_groups`: p corrected for the number of tests of all columns.

    For each score on its own (Holm 1979, Scand. J. Stat. 6:65). A mirror image is the same test and counts once.
    """
    from statsmodels.stats.multitest import multipletests

    for key in keys:
        cells = [group["against_others"].get(key, {}) for column in columns for group in column["groups"]]
        tested = [cell for cell in cells if cell.get("p") is not None and "mirror" not in cell]
        if not tested:
            continue
        adjusted: Any = multipletests([cell["p"] for cell in tested], method="holm")[1]
        for cell, p in zip(tested, adjusted.tolist(), strict=True):
            cell["p_holm"] = p
        for cell, mirror in pairwise(cells):
            if "mirror" in mirror and "p_holm" in cell:
                mirror["p_holm"] = cell["p_holm"]
