"""What was found and how sure it is, in plain words generated from the numbers. No number here is not computed."""

from collections.abc import Iterator
from typing import Any

from train.study.analysis import METRICS, Analysis, best_model
from train.study.numbers import between, p_value, percent, points, score
from train.study.report import findings_trust
from train.study.report.charts_compare import clear, share
from train.study.report.findings_trust import count, listed
from train.study.runs import Run

FEW = 3
"""Up to so many models are each described in words; of more, the best is, and the others in a table."""


def findings(found: Analysis) -> list[tuple[str, list[str]]]:
    """Questions, and the sentences that answer each, the most important first."""
    parts = [
        ("What was done", _done(found)),
        ("Which model is best", _best(found)),
        ("Does more data help", _data(found)),
        ("What matters more, model or data", _shares(found)),
        ("What is it worth", _cost(found)),
        ("Where it fails", findings_trust.classes(found)),
        ("Can the probabilities be trusted", findings_trust.calibration(found)),
        ("Was the machine kept busy", findings_trust.speed(found)),
        ("Does splitting by image flatter", findings_trust.leakage(found)),
        ("How sure is all this", findings_trust.caveats(found)),
    ]
    return [(question, sentences) for question, lines in parts if (sentences := list(lines))]


def _done(found: Analysis) -> Iterator[str]:
    study = found.study
    test = study.runs[0].result["test"]
    sizes = sorted({run.row["n_train"] for run in study.runs})
    span = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    lesions = f" of {test['lesions']:,} lesions" if test["lesions"] is not None else ""
    yield (
        f"{count(len(study.runs), 'run')} of {count(len(study.models), 'model')} ({listed(study.models)}) on {span} "
        f"training images, with {_seeds(study.runs)}, tested on {test['images']:,} images{lesions}."
    )
    budget = (study.settings or {}).get("budget")
    if budget == "epochs" and len(sizes) > 1:
        yield (
            "Every fraction was trained for the same number of epochs, so a larger one also took more optimizer steps: "
            "the gain of more data includes that of longer training."
        )
    if budget == "steps" and len(sizes) > 1:
        yield (
            "Every fraction was trained for the same number of optimizer steps, so a smaller one saw each image "
            "more often: what differs is the data, not the length of training."
        )
    if study.failed:
        yield f"{count(len(study.failed), 'cell')} failed and missing below, listed at the end."


def _seeds(runs: list[Run]) -> str:
    """`3 seeds`, or `3 seeds and 3 subset seeds` where one seed met several subsets."""
    keys = {run.key for run in runs}
    seeds, subsets = ({key[place] for key in keys} for place in (0, 1))
    told = count(len(seeds), "seed")
    return told if len(keys) == len(seeds) else f"{told} and {count(len(subsets), 'subset seed')}"


def _best(found: Analysis) -> Iterator[str]:
    metric, study = METRICS[0], found.study
    best = best_model(found)
    size = found.sizes[best][-1]
    if size.mean[metric] is None:
        return
    runs = study.of(best, size.fraction)
    cells = [run.result["test"][metric] for run in runs]
    if len(runs) == 1:
        told = between(metric, cells[0])
        yield f"{best} reaches a balanced accuracy of {told} with {size.n:,.0f} images."
        yield "The interval says where it would lie with other test lesions (95 %)."
    else:
        lows = [cell["low"] for cell in cells if cell["low"] is not None]
        highs = [cell["high"] for cell in cells if cell["high"] is not None]
        yield (
            f"{best} reaches a mean balanced accuracy of {score(metric, size.mean[metric])} with {size.n:,.0f} images "
            f"({_seeds(runs)}: {score(metric, size.low[metric])} to {score(metric, size.high[metric])})."
        )
        if lows:
            yield (
                f"With other test lesions a run would lie about between {score(metric, sum(lows) / len(lows))} and "
                f"{score(metric, sum(highs) / len(highs))} (95 %)."
            )
    classes = len(runs[0].result["training_images_per_class"])
    low = min((cell["low"] for cell in cells if cell["low"] is not None), default=None)
    if low is not None and low <= 1 / classes:
        yield f"That cannot be told from guessing, which has {percent(1 / classes)}: train longer or on more images."
    yield from _against_the_others(found, best)


def _against_the_others(found: Analysis, best: str) -> Iterator[str]:
    metric = METRICS[0]
    told: dict[str, list[tuple[float, str]]] = {"better": [], "same": [], "worse": []}
    seeds = True
    for pair in found.differences:
        cell = pair["metrics"][metric]
        if best not in (pair["first"], pair["second"]) or cell["difference"]["value"] is None:
            continue
        seeds = seeds and cell["includes_seeds"]
        other, sign = (pair["second"], 1) if pair["first"] == best else (pair["first"], -1)
        gap = sign * cell["difference"]["value"]
        ends = sorted(sign * v for v in (cell["difference"]["low"], cell["difference"]["high"]) if v is not None)
        words = f"{other} ({points(metric, gap)}"
        words += f", {points(metric, ends[0])} to {points(metric, ends[1])}" if len(ends) == 2 else ""
        words += f", p {p_value(cell.get('p_holm'))})"
        told["same" if not clear(cell) else "better" if gap > 0 else "worse"].append((abs(gap), words))
    lists = {key: [words for _, words in sorted(value)] for key, value in told.items()}
    if lists["better"]:
        yield f"On the same test lesions, corrected for all pairs, it is better than {_some(lists['better'])}."
    if lists["same"]:
        yield f"It cannot be told apart from {listed(lists['same'])}: more seeds or more test lesions would be needed."
    if lists["worse"]:
        yield f"On the fraction that all share, it is worse than {listed(lists['worse'])}."
    if any(lists.values()) and not seeds:
        yield "With one seed these differences are of these trained networks; other seeds may order them otherwise."


def _some(others: list[str]) -> str:
    """All of them where they are few, else the closest and how many more."""
    return listed(others) if len(others) <= FEW else f"{others[0]} and {len(others) - 1} others by more"


def _data(found: Analysis) -> Iterator[str]:
    metric = METRICS[0]
    curves = found.curves.get(metric, {})
    gains: dict[str, float] = {}
    for model in curves:
        sizes = [size.mean[metric] or 0.0 for size in found.sizes[model] if size.mean[metric] is not None]
        if len(sizes) >= 2:
            gains[model] = sizes[-1] - sizes[0]
    if not gains:
        return
    best = best_model(found)
    if len(gains) > FEW:
        low, high = min(gains, key=lambda m: gains[m]), max(gains, key=lambda m: gains[m])
        yield (
            f"From the smallest to the largest fraction, {low} gains least ({points(metric, gains[low])}) and {high} "
            f"most ({points(metric, gains[high])})."
        )
    for model in [best] if len(gains) > FEW and best in gains else list(gains):
        sizes = [size for size in found.sizes[model] if size.mean[metric] is not None]
        first, last = sizes[0], sizes[-1]
        gained = f"{last.n / first.n:.0f} times the images ({first.n:,.0f} to {last.n:,.0f}) brought"
        sentences = [f"{model}: {gained} {points(metric, gains[model])}.", *curve(curves[model], metric)]
        yield " ".join(sentences)
    checks = [told["hold_out"]["inside"] for told in curves.values() if told["hold_out"]["inside"] is not None]
    if len(gains) > FEW and checks:
        yield (
            f"Fitted without the largest size, the curves foretell it for {sum(checks)} of {len(checks)} models within "
            "their 95 % intervals; the numbers are below the learning curves."
        )


def curve(told: dict[str, Any], metric: str) -> Iterator[str]:
    """What a learning curve (`study.learning_curve`) foretells, or why it does not."""
    fitted, band, check = told["curve"], told["band"], told["hold_out"]
    if not band:
        yield f"No curve was fitted: {'; '.join(fitted['reasons'])}."
        return
    if check["inside"] is not None:
        yield (
            f"A check: fitted without the largest size, the curve foretells {score(metric, check['predicted'])} "
            f"({score(metric, check['low'])} to {score(metric, check['high'])}) there, and "
            f"{score(metric, check['observed'])} came, {'as' if check['inside'] else 'NOT as'} predicted."
        )
    if told["doubts"]:
        yield f"No figure beyond the data is told, for the fitted curve is in doubt: {'; '.join(told['doubts'])}."
    else:
        # No gain over the present: the curve's own value there is not what was measured.
        yield f"Twice as many as now would give {between(metric, band[-1])} on these test lesions by the fitted curve."
        if fitted["identifiable"]:
            yield f"With endless data the curve ends at {between(metric, fitted['a'])}."
        else:
            yield f"Where the curve ends cannot be said: {'; '.join(fitted['reasons'])}."
    others = [note for note in told["notes"] if note not in fitted["reasons"]]
    yield from (f"Note: {note}." for note in others)


def _shares(found: Analysis) -> Iterator[str]:
    told = found.variance.get(METRICS[0])
    if told is None or isinstance(told, str):
        return
    shares = {name: cell for name, cell in told["shares"].items() if cell["value"] is not None}
    order = sorted(shares, key=lambda name: -shares[name]["value"])
    names = {
        "size": "the number of images",
        "model": "the model",
        "interaction": "models gaining differently from data",
        "seed": "the seed",
    }
    words = [f"{names[name]} {share(shares[name])}" for name in order]
    yield f"Of the spread of balanced accuracy in this grid, {listed(words)}."
    first, second = order[0], order[1]
    apart = shares[first]["low"] is not None and shares[second]["high"] is not None
    if apart and shares[first]["low"] > shares[second]["high"]:
        yield f"So within this grid {names[first]} matters most; with other models or sizes the shares would differ."
    else:
        yield "The intervals overlap, so which of the first two matters more is open."


def _cost(found: Analysis) -> Iterator[str]:
    metric = METRICS[0]
    sizes = [s for by_model in found.sizes.values() for s in by_model if s.mean[metric] is not None]
    if len(sizes) < 2:
        return
    top = max(s.mean[metric] or 0.0 for s in sizes)
    best = max(sizes, key=lambda s: s.mean[metric] or 0.0)
    near = min((s for s in sizes if top - (s.mean[metric] or 0.0) <= 0.01), key=lambda s: s.training_flops)
    if near is not best and near.training_flops < best.training_flops:
        yield (
            f"Within one point of the best mean ({score(metric, top)}), {near.model} on {near.n:,.0f} images takes the "
            f"least arithmetic: {best.training_flops / near.training_flops:.1f} times less than {best.model} on "
            f"{best.n:,.0f}."
        )
    else:
        yield (
            f"Nothing cheaper comes within one point of the best mean ({score(metric, top)}, {best.model} on "
            f"{best.n:,.0f} images)."
        )
