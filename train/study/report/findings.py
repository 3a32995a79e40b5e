"""What was found and how certain it is, in plain words generated from the numbers. No number here is not computed."""

from collections.abc import Iterator
from typing import Any

from shards.common.cli import typed
from train.study import elsewhere, leakage
from train.study.analysis import METRICS, Analysis, significant
from train.study.numbers import between, p_value, percent, points, score
from train.study.runs import Run, Study

FEW = 3
"""Up to so many models are each described in words; of more, the best is, and the others in a table."""

FEW_LESIONS = 20
"""A class with fewer test lesions than this is named as one whose numbers are rough."""

MOST_NAMED = 20
"""Classes in one sentence."""

STALL = 0.10
"""A cell that waits for data for more than this share of its training time is named."""


def findings(found: Analysis) -> list[tuple[str, list[str]]]:
    """Questions, and the sentences that answer each, the most important first."""
    parts = [
        ("What was done", _done(found)),
        ("Which model is best", _best(found)),
        ("Does more data help", _data(found)),
        ("From how many images a larger model pays", _larger(found)),
        ("What matters more, model or data", _shares(found)),
        ("What does accuracy cost", _cost(found)),
        ("Which classes are found and missed", _classes(found)),
        ("Can the probabilities be trusted", _calibration(found)),
        ("Did training wait for data", _waits(found)),
        (
            "Does a split by image raise the scores",
            leakage.sentences(found.leakage) if found.leakage is not None else [],
        ),
        ("How far does it carry", elsewhere.sentences(found.elsewhere)),
        ("How certain are these results", _caveats(found)),
    ]
    return [(question, sentences) for question, lines in parts if (sentences := list(lines))]


def warnings(study: Study) -> list[str]:
    """What a reader must know before anything else."""
    lines = []
    shard_set = study.runs[0].environment["shard_set"]
    if shard_set["split"].get("unit") == "image":
        lines.append("Split by image: training holds views of the test lesions, so every score here is too high.")
    if shard_set["source"].get("dataset") == "synthetic":
        lines.append("Synthetic images: these numbers test the software and say nothing about skin.")
    if study.failed:
        lines.append(
            f"{count(len(study.failed), 'cell')} failed: {', '.join(row['cell'] for row in study.failed[:5])}."
        )
    return lines


def missing(found: Analysis) -> list[str]:
    """What the report does not show, and why."""
    lines = [f"{row['cell']} failed: {row['error']}." for row in found.study.failed]
    if found.no_differences:
        lines.append(f"Differences between models: {found.no_differences}.")
    reasons = {reason for reason in found.variance.values() if isinstance(reason, str)}
    lines += [f"Variance shares: {reason}." for reason in sorted(reasons)]
    if not found.elsewhere:
        lines.append(f"How far it carries: not tested on other sets; see {typed('train.evaluate')} --help.")
    if found.leakage is None:
        lines.append(f"What a split by image gains falsely: not measured here; see {typed('train.leakage')} --help.")
    return lines


def count(number: int, what: str) -> str:
    """`1 cell`, `3 cells`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------ what was done, and what came out


def _done(found: Analysis) -> Iterator[str]:
    study = found.study
    test = study.runs[0].result["test"]
    sizes = sorted({run.row["n_train"] for run in study.runs})
    span = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    lesions = f" of {test['lesions']:,} lesions" if test["lesions"] is not None else ""
    yield (
        f"{count(len(study.runs), 'run')} of {count(len(study.models), 'model')} ({_listed(study.models)}) on {span} "
        f"training images, with {_seeds(study.runs)}, tested on {test['images']:,} images{lesions}."
    )
    budget = (study.settings or {}).get("budget")
    if budget == "epochs" and len(sizes) > 1:
        yield (
            "Every fraction was trained for the same number of epochs, so a larger one also took more optimizer steps: "
            "the gain from more data includes the gain from longer training."
        )
    if budget == "steps" and len(sizes) > 1:
        yield (
            "Every fraction was trained for the same number of optimizer steps, so a smaller one saw each image more "
            "often: the difference between fractions comes from the data, not from the length of training."
        )


def _seeds(runs: list[Run]) -> str:
    """`3 seeds`, or `3 seeds and 3 subset seeds` where one seed met several subsets."""
    keys = {run.key for run in runs}
    seeds, subsets = ({key[place] for key in keys} for place in (0, 1))
    text = count(len(seeds), "seed")
    return text if len(keys) == len(seeds) else f"{text} and {count(len(subsets), 'subset seed')}"


def _best(found: Analysis) -> Iterator[str]:
    metric, best = METRICS[0], found.best
    reached = best.score(metric)
    if reached is None:
        return
    cells = [run.result["test"][metric] for run in best.runs]
    if len(cells) == 1:
        yield f"{best.model} reaches a balanced accuracy of {between(metric, cells[0])} with {best.n:,.0f} images."
        yield "The 95 % interval shows how much other test lesions could change this score."
    else:
        yield (
            f"{best.model} reaches a mean balanced accuracy of {score(metric, reached.value)} with {best.n:,.0f} "
            f"images ({_seeds(best.runs)}: {score(metric, reached.low)} to {score(metric, reached.high)})."
        )
        low, high = (best.score(f"{metric}_{end}") for end in ("low", "high"))
        if low and high:
            span = f"{score(metric, low.value)} to {score(metric, high.value)}"
            yield f"With other test lesions a run would reach about {span} (95 %)."
    guessing = 1 / len(best.runs[0].result["training_images_per_class"])
    if any(cell["low"] is not None and cell["low"] <= guessing for cell in cells):
        yield f"This is not clearly better than guessing ({percent(guessing)}): train longer or on more images."
    yield from _against_the_others(found, best.model)


def _against_the_others(found: Analysis, best: str) -> Iterator[str]:
    metric = METRICS[0]
    others: dict[str, list[tuple[float, str]]] = {"better": [], "same": [], "worse": []}
    seeds = True
    for pair in found.differences:
        cell = pair["metrics"][metric]
        gap = cell["difference"]
        if best not in (pair["first"], pair["second"]) or gap["value"] is None:
            continue
        seeds = seeds and cell["includes_seeds"]
        value, low, high, other = gap["value"], gap["low"], gap["high"], pair["second"]
        if other == best:
            value, low, high, other = (
                -value,
                None if high is None else -high,
                None if low is None else -low,
                pair["first"],
            )
        p = p_value(cell.get("p_holm"))
        words = f"{other}: {between(metric, {'value': value, 'low': low, 'high': high}, f'p {p}', write=points)}"
        kind = "same" if not significant(cell) else "better" if value > 0 else "worse"
        others[kind].append((abs(value), words))
    better, same, worse = ([words for _, words in sorted(others[key])] for key in ("better", "same", "worse"))
    if better:
        closest = better if len(better) <= FEW else [better[0], f"and by more than {len(better) - 1} others"]
        yield f"On the same test lesions, corrected for all pairs, it is better than {'; '.join(closest)}."
    if same:
        yield f"There is no clear difference from {'; '.join(same)}. This needs more seeds or more test lesions."
    if worse:
        yield f"On the fraction that all models share, it is worse than {'; '.join(worse)}."
    if (better or same or worse) and not seeds:
        yield "With one seed these are differences between these trained networks; other seeds may change the order."


def _data(found: Analysis) -> Iterator[str]:
    metric, curves = METRICS[0], found.curves[METRICS[0]]
    known = {model: found.scores(model, metric) for model in curves}
    known = {model: scores for model, scores in known.items() if len(scores) >= 2}
    gains = {model: scores[-1][1].value - scores[0][1].value for model, scores in known.items()}
    if not gains:
        return
    if len(gains) > FEW:
        low, high = min(gains, key=lambda m: gains[m]), max(gains, key=lambda m: gains[m])
        yield (
            f"From the smallest to the largest fraction, {low} gains least ({points(metric, gains[low])}) and {high} "
            f"gains most ({points(metric, gains[high])})."
        )
    best = found.best.model
    for model in [best] if len(gains) > FEW and best in gains else list(gains):
        first, last = known[model][0][0].n, known[model][-1][0].n
        gained = (
            f"{model}: {last / first:.0f} times the images ({first:,.0f} to {last:,.0f}) changed balanced "
            f"accuracy by {points(metric, gains[model])}."
        )
        yield " ".join([gained, *curve(curves[model], metric)])
    last = [(model, max(kept), kept[max(kept)][metric]["difference"]) for model, kept in found.gains.items()]
    last = [(model, fraction, gain) for model, fraction, gain in last if gain["value"] is not None]
    if last:
        words = [f"{model} {between(metric, gain, write=points)}" for model, _, gain in last]
        still = sum(gain["low"] is not None and gain["low"] > 0 for *_, gain in last)
        yield (
            f"From the second largest fraction to the largest, balanced accuracy changed by: {_listed(words)}. "
            f"This is clearly above zero for {still} of {len(last)}."
        )
    checks = [fitted["hold_out"]["inside"] for fitted in curves.values() if fitted["hold_out"]["inside"] is not None]
    if len(gains) > FEW and checks:
        yield (
            f"A check: the curves were also fitted without the largest size. For {sum(checks)} of {len(checks)} models "
            "the 95 % interval of the prediction holds its measured mean; see the table of the fitted curves."
        )


def curve(fitted: dict[str, Any], metric: str) -> Iterator[str]:
    """What a learning curve (`curves.learning_curve`) predicts, or why it predicts nothing."""
    parameters, band, check = fitted["curve"], fitted["band"], fitted["hold_out"]
    if not band:
        yield f"No curve was fitted: {'; '.join(parameters['reasons'])}."
        return
    if check["inside"] is not None:
        predicted = between(metric, {**check, "value": check["predicted"]})
        yield (
            f"A check: fitted without the largest size, the curve predicts {predicted} there. The measured mean is "
            f"{score(metric, check['observed'])}, {'inside' if check['inside'] else 'OUTSIDE'} the interval."
        )
    if fitted["doubts"]:
        yield f"The fitted curve is in doubt, so nothing is predicted beyond the data: {'; '.join(fitted['doubts'])}."
    else:
        # No gain over the present: the curve's own value there is not what was measured.
        yield f"With twice as many images the fitted curve predicts {between(metric, band[-1])} on these test lesions."
        if parameters["identifiable"]:
            yield f"With unlimited data the curve ends at {between(metric, parameters['a'])}."
        else:
            yield f"The data do not show where the curve ends: {'; '.join(parameters['reasons'])}."
    others = [note for note in fitted["notes"] if note not in parameters["reasons"]]
    yield from (f"Note: {note}." for note in others)


def _larger(found: Analysis) -> Iterator[str]:
    """The best model against each other one, the cheapest first: at which sizes the costlier of the two is better."""
    metric, best = METRICS[0], found.best.model
    flops = {model: sizes[-1].runs[0].row["flops_per_image"] for model, sizes in found.sizes.items()}
    for model in sorted(found.gaps, key=lambda model: flops[model]):
        n = {size.fraction: size.n for size in found.sizes[model]}
        known = [
            (n[of], cells[metric]["difference"])
            for of, cells in sorted(found.gaps[model].items())
            if cells[metric]["difference"]["value"] is not None
        ]
        if len(known) < 2 or flops[model] == flops[best]:  # the same network from another start is no larger one
            continue
        large, small = (model, best) if flops[model] > flops[best] else (best, model)
        # A gap is the model minus the best.
        known = [(at, gap if large == model else _reversed(gap)) for at, gap in known]
        (fewest, first), (most, last) = known[0], known[-1]
        ahead = [gap["value"] > 0 for _, gap in known]
        since = next((at for at in range(len(known)) if all(ahead[at:])), None)
        if since is None:
            verdict = f"is not better with {most:,.0f} images"
        else:
            numbers = "every number of" if since == 0 else f"{known[since][0]:,.0f} or more"
            clear = last["low"] is not None and last["low"] > 0
            verdict = f"is better with {numbers} images" + ("" if clear else f", but not clearly with {most:,.0f}")
        yield (
            f"{large} needs {flops[large] / flops[small]:.1f} times the computation of {small}. {large} minus {small}: "
            f"{between(metric, first, write=points)} with {fewest:,.0f} images, {between(metric, last, write=points)} "
            f"with {most:,.0f}. {large} {verdict}."
        )


def _reversed(gap: dict[str, Any]) -> dict[str, Any]:
    """The difference the other way round."""
    low, high = (None if gap[end] is None else -gap[end] for end in ("high", "low"))
    return {**gap, "value": -gap["value"], "low": low, "high": high}


SOURCES = {
    "size": "the number of images",
    "model": "the model",
    "interaction": "different gains of the models from more data",
    "seed": "the seed",
}


def _shares(found: Analysis) -> Iterator[str]:
    parts = found.variance.get(METRICS[0])
    if parts is None or isinstance(parts, str):
        return
    shares = {name: cell for name, cell in parts["shares"].items() if cell["value"] is not None}
    order = sorted(shares, key=lambda name: -shares[name]["value"])
    named = dict(SOURCES)
    if "interaction" not in shares:  # its share is in that of the seed
        named["seed"] = f"{SOURCES['seed']} and {SOURCES['interaction']} together"
    words = [f"{named[name]} {between('share', shares[name])}" for name in order]
    yield f"Shares of the spread of balanced accuracy in this grid: {_listed(words)}."
    first, second = shares[order[0]], shares[order[1]]
    if first["low"] is not None and second["high"] is not None and first["low"] > second["high"]:
        yield f"Within this grid {named[order[0]]} matters most; other models or sizes would give other shares."
    else:
        yield "The intervals overlap, so it is open which of the first two matters more."


def _cost(found: Analysis) -> Iterator[str]:
    metric = METRICS[0]
    scores = [(size, mean.value) for model in found.sizes for size, mean in found.scores(model, metric)]
    if len(scores) < 2:
        return
    best, top = max(scores, key=lambda scored: scored[1])
    near = min((size for size, value in scores if top - value <= 0.01), key=lambda size: size.training_flops)
    if near.training_flops < best.training_flops:
        yield (
            f"Within one point of the best mean ({score(metric, top)}), {near.model} on {near.n:,.0f} images needs the "
            f"least computation: {best.training_flops / near.training_flops:.1f} times less than {best.model} on "
            f"{best.n:,.0f}."
        )
    else:
        yield (
            f"Nothing cheaper comes within one point of the best mean ({score(metric, top)}, {best.model} on "
            f"{best.n:,.0f} images)."
        )


# ------------------------------------------------------------------ where a study is weak


def _classes(found: Analysis) -> Iterator[str]:
    best = found.best
    per_class = best.runs[0].result["test"]["per_class"]
    recalls = {name: recall.value for name in per_class if (recall := best.score(f"recall_{name}"))}
    if len(recalls) < 2:
        return
    worst, good = min(recalls, key=lambda n: recalls[n]), max(recalls, key=lambda n: recalls[n])
    most, least = percent(recalls[good], 0), percent(recalls[worst], 0)
    every = f"{most} of every class" if most == least else f"{most} of {good} and only {least} of {worst}"
    yield f"{best.model} finds {every}."
    for name in best.runs[0].classes.measured:
        found_at_90 = best.score(f"{name}_sensitivity_at_90_specificity")
        if found_at_90 is not None:
            yield f"At a specificity of 90 % it finds {percent(found_at_90.value, 0)} of the {name} images."
    lesions = {name: cell["lesions"] for name, cell in per_class.items() if cell["lesions"]}
    rough = [f"{name} ({number})" for name, number in lesions.items() if number < FEW_LESIONS]
    if rough:
        more = [f"{len(rough) - MOST_NAMED:,} more classes"] if len(rough) > MOST_NAMED else []
        yield f"Few test lesions: {_listed(rough[:MOST_NAMED] + more)}. The numbers of these classes are rough."


def _calibration(found: Analysis) -> Iterator[str]:
    run = found.best.runs[0]
    test = run.result["test"]
    key = "expected_calibration_error"
    if test[key]["value"] is None:
        return
    yield (
        f"The confidence and the accuracy of {found.best.model} differ by {between(key, test[key])} on average (its "
        f"run with seed {run.row['seed']})."
    )
    chance = test.get("calibration_error_of_chance")
    if chance is not None:
        yield f"Chance alone would give {percent(chance)} on a test set of this size."
    scaled = test["temperature_scaling"]
    if scaled is not None and scaled[key]["value"] is not None:
        limit = "; the validation split could not determine this temperature" if scaled["at_limit"] else ""
        yield f"Dividing its logits by {scaled['temperature']:.2f} changes that to {between(key, scaled[key])}{limit}."
    yield f"The probabilities are for the {test['prior']} prior of the classes."


def _waits(found: Analysis) -> Iterator[str]:
    waits = {run.row["cell"]: run.row["data_wait_fraction"] for run in found.study.runs}
    slow = [name for name, wait in waits.items() if wait > STALL]
    worst = max(waits, key=lambda name: waits[name])
    if slow:
        yield (
            f"{len(slow)} of {count(len(waits), 'cell')} waited for data more than {percent(STALL, 0)} of their "
            f"training time. {worst} waited most ({percent(waits[worst])})."
        )
    else:
        yield f"No: no cell waited for data more than {percent(waits[worst])} of its training time."


def _caveats(found: Analysis) -> Iterator[str]:
    study = found.study
    runs = min(len(size.runs) for sizes in found.sizes.values() for size in sizes)
    test = study.runs[0].result["test"]
    if runs < 3:
        yield f"Some cells have {count(runs, 'run')}: how much seeds change a result is hardly known."
    yield f"Intervals of single runs come from {test['resamples']:,} resamples of the {test['resampled']}s tested."
    if single := test["classes_of_one_lesion"]:
        yield (
            f"Classes with one test lesion: {len(single):,}. They cannot be resampled, so intervals of means over "
            "classes are too narrow."
        )
    if test["resampled"] == "image":
        yield "The test set names no lesions: views of one lesion count as independent, so intervals are too narrow."
    notes = [run.row["note"] for run in study.runs if run.row["note"]]
    if notes:
        yield f"{count(len(notes), 'cell')} used a smaller batch, because the fraction is smaller than the batch."
    devices = {run.row["device"] for run in study.runs}
    if len(devices) > 1:
        yield f"Cells ran on {len(devices)} kinds of devices, so their times cannot be compared."
