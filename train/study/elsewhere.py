"""What `train.evaluate` found on other sets: its folders, and what they say in words."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shards.common.errors import DataError
from train.record import RESULT
from train.study.folder import read_json
from train.study.numbers import NAMES, between, p_value, percent, points

KIND = "test on another set"
FOLDER = "elsewhere"
"""Subfolder of a study or a run in which the folders of `train.evaluate` lie."""
_MOST_NAMED = 20


def read_elsewhere(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in the subfolder FOLDER of each folder, by the set's name. Raises DataError for a damaged one."""
    found = []
    for folder in dict.fromkeys(folders):
        for path in sorted((folder / FOLDER).glob(f"*/{RESULT}")):
            result = read_json(path, f"delete {path.parent} and test again")
            if result.get("kind") != KIND:
                raise DataError(f"{path}: is no result of a test on another set; move it away")
            found.append(result | {"folder": path.parent.name})
    return found


def tested(result: dict[str, Any]) -> str:
    """The networks that were tested together: `resnet18`, or `2 × resnet18 + vit_b16`."""
    counts = Counter(run["model"] for run in result["runs"])
    return " + ".join(f"{count} × {model}" if count > 1 else model for model, count in counts.items())


def named(names: list[str]) -> str:
    """Names with commas, the first ones of many."""
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def summary(result: dict[str, Any]) -> tuple[str, list[str]]:
    """The main score in a line, and lines about what was left out and how probabilities are treated."""
    there, home, left = result["there"], result["home"], result["left_out"]
    metric, names = "balanced_accuracy", result["classes"]["names"]
    lesions = f" of {there['lesions']:,} groups" if there["lesions"] is not None else ""
    lines = [f"{there['images']:,} images{lesions}, split {result['data']['split']}; classes: {named(names)}"]
    if left["of_the_set"]:
        words = [f"{name} ({count:,} images)" for name, count in left["of_the_set"].items()]
        hint = "" if result["map"] else "; --map says what they are"
        lines.append(f"left out, the network has no such class: {named(words)}{hint}")
    if left["seen_in_training"]:
        lines.append(f"left out, the run was trained or tuned on them: {left['seen_in_training']:,} images")
    if left["of_the_run"]:
        lines.append(
            f"left out, the set has no image of them: {named(left['of_the_run'])}; probabilities are divided by their "
            f"sum over the other classes ({percent(result['called_left_out'])} of the images were called one that is "
            "left out before)"
        )
    at_home = f", {between(metric, home[metric])} on its own test images" if home else ""
    line = f"{result['data']['name']}: balanced accuracy {between(metric, there[metric])}{at_home}"
    return line, lines


def sentences(results: list[dict[str, Any]]) -> list[str]:
    """How far the networks carry, for the findings of a report."""
    lines = []
    for result in results:
        metric, there, home = "balanced_accuracy", result["there"], result["home"]
        reached = between(metric, there[metric])
        mean = "the mean of " if len(result["runs"]) > 1 else ""
        line = f"On {result['folder']}, {mean}{tested(result)} reaches a balanced accuracy of {reached}"
        line += f" over {len(result['classes']['names']):,} classes"
        if home:
            line += f", and {between(metric, home[metric])} on its own test images of these classes"
        lines.append(line + ".")
        clear = [
            f"{column['column']} {group['value']} {points(metric, cell['value'])} (p {p_value(cell['p_holm'])})"
            for column in result["subgroups"]
            for group in column["groups"]
            if (cell := group["against_others"].get(metric, {})).get("p_holm") is not None and cell["p_holm"] < 0.05
        ]
        if clear:
            lines.append(f"There, {NAMES[metric]} differs clearly from that of the other images: {'; '.join(clear)}.")
    return lines
