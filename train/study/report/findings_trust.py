"""The part of the findings that says where a study is weak: classes, calibration, stalls, leakage, few runs."""

from collections.abc import Iterator

from train.study.analysis import Analysis, best_model
from train.study.leakage import sentences
from train.study.numbers import between, percent

FEW_LESIONS = 20
"""A class with fewer test lesions than this is named as one whose numbers are rough."""

STALL = 0.10


def count(number: int, what: str) -> str:
    """`1 cell`, `3 cells`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def classes(found: Analysis) -> Iterator[str]:
    """Which classes the best model finds, and which it misses."""
    best = best_model(found)
    runs = found.study.of(best, found.study.largest(best))
    per_class = runs[0].result["test"]["per_class"]
    means = {}
    for name in per_class:
        values = [run.result["test"]["per_class"][name]["recall"]["value"] for run in runs]
        known = [value for value in values if value is not None]
        if known:
            means[name] = sum(known) / len(known)
    if len(means) < 2:
        return
    worst, good = min(means, key=lambda n: means[n]), max(means, key=lambda n: means[n])
    yield f"{best} finds {percent(means[good], 0)} of {good} and only {percent(means[worst], 0)} of {worst}."
    found_at = [run.row["melanoma_sensitivity_at_90_specificity"] for run in runs]
    known = [value for value in found_at if value is not None]
    if known:
        share_found = percent(sum(known) / len(known), 0)
        yield f"With nine of ten other images rightly cleared, it finds {share_found} of the melanoma images."
    rough = [
        f"{name} ({per_class[name]['lesions']})"
        for name in per_class
        if per_class[name]["lesions"] is not None and 0 < per_class[name]["lesions"] < FEW_LESIONS
    ]
    if rough:
        yield f"Few lesions are tested of {listed(rough)}: numbers of these classes are rough."


def calibration(found: Analysis) -> Iterator[str]:
    """How far the probabilities of the best model are right."""
    best = best_model(found)
    runs = found.study.of(best, found.study.largest(best))
    test = runs[0].result["test"]
    cell = test["expected_calibration_error"]
    if cell["value"] is None:
        return
    key = "expected_calibration_error"
    off, seed = between(key, cell), runs[0].row["seed"]
    yield f"How sure {best} is and how often it is right differ by {off} on average (its run of seed {seed})."
    chance = test.get("calibration_error_of_chance")
    if chance is not None:
        yield f"Chance alone would show {percent(chance)} on a test set of this size."
    scaled = test["temperature_scaling"]
    if scaled is not None and scaled[key]["value"] is not None:
        limit = ", though validation could not settle it" if scaled["at_limit"] else ""
        yield f"Dividing its logits by {scaled['temperature']:.2f} makes that {between(key, scaled[key])}{limit}."
    yield f"The probabilities are for the {test['prior']} prior of the classes."


def speed(found: Analysis) -> Iterator[str]:
    """Whether training waited for data."""
    waits = {run.row["cell"]: run.row["data_wait_fraction"] for run in found.study.runs}
    slow = [name for name, wait in waits.items() if wait > STALL]
    if slow:
        worst = max(waits, key=lambda name: waits[name])
        yield (
            f"{len(slow)} of {count(len(waits), 'cell')} waited for data more than {percent(STALL, 0)} of their "
            f"training time, {worst} most ({percent(waits[worst])})."
        )
    else:
        yield f"Yes: no cell waited for data more than {percent(max(waits.values()))} of its training time."


def leakage(found: Analysis) -> Iterator[str]:
    """What an image-level split would have gained falsely."""
    if found.leakage is not None:
        yield from sentences(found.leakage)


def caveats(found: Analysis) -> Iterator[str]:
    """What limits all of the above."""
    study = found.study
    runs = min(size.runs for by_model in found.sizes.values() for size in by_model)
    test = study.runs[0].result["test"]
    if runs < 3:
        yield f"Some cells have {count(runs, 'run')}: how far seeds move a result is hardly known."
    yield f"Intervals of single runs come from {test['resamples']:,} resamples of {test['resampled']}s of one test set."
    if test["resampled"] == "image":
        yield "The test set names no lesions, so views of one lesion count as independent and intervals are too narrow."
    unit = study.runs[0].environment.get("shard_set", {}).get("split", {}).get("unit")
    if unit == "image":
        yield "THE SHARD SET IS SPLIT BY IMAGE: training holds views of the test lesions, and every score is too good."
    notes = [run.row["note"] for run in study.runs if run.row["note"]]
    if notes:
        yield f"{count(len(notes), 'cell')} had to take a smaller batch: the fraction is smaller than the batch."
    unlike = {run.row["device"] for run in study.runs}
    if len(unlike) > 1:
        yield f"Cells ran on {len(unlike)} kinds of devices, so their times cannot be compared."
