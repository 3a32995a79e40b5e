"""A run's metrics against scikit-learn, on plain and weighted images; their intervals; what may not be measured."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from shards.common.errors import DataError, UsageError
from shards.format import HAM10000
from tests.support import simulate_coverage as simulate
from train.metrics.bootstrap import LesionBootstrap, exact_interval
from train.metrics.calibration import (
    BINS,
    ConfidenceBins,
    at_prior,
    class_prior,
    fit_temperature,
    prior_weights,
    softmax,
)
from train.metrics.run_metrics import SCALARS, evaluate, flatten
from train.metrics.scores import Ranking, Scores, balanced_accuracy, check_test

HAM_COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])
MEL, BCC, DF, NV = (HAM10000.names.index(name) for name in ("mel", "bcc", "df", "nv"))
MALIGNANT = sorted(HAM10000.names.index(name) for name in ("mel", "bcc", "akiec"))
PRIORS = {"classes": HAM10000, "prior": "balanced", "logits_prior": "balanced", "training_prior": HAM_COUNTS}


def draw(lesions=300, seed=0, *, prior=None, decimals=None):
    """Logits, labels and lesion ids of a made-up classifier; rounded logits make ties."""
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.repeat(np.arange(7), 4), rng.choice(7, lesions, p=prior)])
    views = rng.choice([1, 2, 3], label.size, p=[0.74, 0.2, 0.06])
    labels = np.repeat(label, views)
    ids = np.repeat([f"HAM_{i:07d}" for i in range(label.size)], views)
    logits = rng.normal(size=(labels.size, 7))
    logits[np.arange(labels.size), labels] += 1.3
    return (logits if decimals is None else logits.round(decimals)), labels, ids


def run(logits, labels, lesions, **changed):
    return evaluate(logits, labels, lesions, **({"split": ["test"] * len(labels), "resamples": 50} | PRIORS | changed))


def test_point_values_equal_scikit_learn():
    logits, labels, lesions = draw()
    result = run(logits, labels, lesions)
    called, probabilities = logits.argmax(axis=1), softmax(logits)
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "accuracy": sk.accuracy_score(labels, called),
        "macro_f1": sk.f1_score(labels, called, average="macro"),
        "macro_auc": sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
    }
    for name, value in expected.items():
        assert result[name]["value"] == pytest.approx(value, abs=1e-12), name
    report: dict = sk.classification_report(labels, called, target_names=HAM10000.names, output_dict=True)  # pyright: ignore
    for name, mine in result["per_class"].items():
        values = [mine["precision"]["value"], mine["recall"]["value"], mine["f1"]["value"], mine["images"]]
        np.testing.assert_allclose(values, [*report[name].values()])
    np.testing.assert_allclose(
        result["confusion_matrix"]["rates"], sk.confusion_matrix(labels, called, normalize="true")
    )
    assert balanced_accuracy(logits, labels) == pytest.approx(expected["balanced_accuracy"], abs=1e-12)
    with pytest.raises(DataError, match="empty"):
        balanced_accuracy(np.zeros((0, 7)), [])
    sick, danger = np.isin(labels, MALIGNANT), probabilities[:, MALIGNANT].sum(axis=1)
    assert result["malignant_auc"]["value"] == pytest.approx(sk.roc_auc_score(sick, danger))
    assert result["malignant_sensitivity"]["value"] == pytest.approx((danger[sick] >= 0.5).mean())
    assert result["malignant_specificity"]["value"] == pytest.approx((danger[~sick] < 0.5).mean())
    assert result["malignant_average_precision"]["value"] == pytest.approx(sk.average_precision_score(sick, danger))


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_the_partial_area_is_that_of_isic_2024(decimals):
    """The area above a sensitivity of 0.8, summed over the points of the curve where it is a straight line."""
    rng = np.random.default_rng(4)
    sick = rng.random(300) < 0.3
    score = 1 / (1 + np.exp(-rng.normal(size=300) - sick))
    score = score if decimals is None else score.round(decimals)
    alarms, caught, _ = sk.roc_curve(sick, score, drop_intermediate=False)
    above = np.linspace(0.8, 1, 2001)  # to the right of the curve lies what counts, at each sensitivity
    right = np.array([1 - _alarms_at(s, alarms, caught) for s in above])
    found = Ranking(score, sick).partial_area(np.ones((300, 1)))[0]
    assert found == pytest.approx(np.trapezoid(right, above), abs=2e-4)
    assert Ranking(sick.astype(float), sick).partial_area(np.ones((300, 1)))[0] == pytest.approx(0.2)
    assert Ranking(np.zeros(300), sick).partial_area(np.ones((300, 1)))[0] == pytest.approx(0.02)


def _alarms_at(sensitivity, alarms, caught):
    """The share of false alarms where the curve first reaches a sensitivity."""
    after = int(np.argmax(caught >= sensitivity))
    rise = caught[after] - caught[after - 1]
    return alarms[after - 1] + (sensitivity - caught[after - 1]) / rise * (alarms[after] - alarms[after - 1])


@pytest.mark.parametrize("absent", [[], [MEL, 6], [0, 1, 2, 3, 4, 6], [2, 3, 5, 6]], ids=str)
@pytest.mark.parametrize("decimals", [None, 0, 1])
def test_many_weightings_at_once_equal_scikit_learns_of_one_at_a_time(decimals, absent):
    """Resamples are weights, and scikit-learn takes the same weights. Rounded logits make ties."""
    logits, labels, lesions = draw(decimals=decimals, seed=3)
    keep = ~np.isin(labels, absent)
    scores = Scores(logits[keep], labels[keep], **PRIORS)
    (drawn,) = LesionBootstrap(labels[keep], lesions[keep], resamples=4, seed=1).weights()
    counts = np.random.default_rng(0).integers(1, 4, size=(keep.sum(), 3)).astype(float)
    weights = np.concatenate([drawn, counts], axis=1)
    assert (weights[:, 0] == 1).all()
    found = scores.measure(weights)
    for r, w in enumerate(weights.T):
        expected = scores.values(w)
        assert set(found) - set(expected) == {"expected_calibration_error", *(k for k in found if "reliab" in k)}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][r], value, rtol=0, atol=1e-9, err_msg=name)


def test_the_bins_of_confidence_equal_scikit_learns_on_repeated_images():
    logits, labels, _ = draw(seed=5)
    counts = np.random.default_rng(0).integers(0, 4, size=labels.size)
    probabilities = softmax(logits)
    found = ConfidenceBins(probabilities, labels).measure(counts[:, None].astype(float))
    confidence, right = (
        np.repeat(values, counts) for values in (probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    )
    mass = np.histogram(confidence, BINS, (0, 1))[0]
    np.testing.assert_allclose(found["reliability_mass"][0], mass)
    accuracy, said = calibration_curve(right, confidence, n_bins=BINS)
    np.testing.assert_allclose(found["reliability_accuracy"][0, mass > 0], accuracy)
    np.testing.assert_allclose(found["reliability_confidence"][0, mass > 0], said)
    expected = np.average(np.abs(accuracy - said), weights=mass[mass > 0])
    assert found["expected_calibration_error"][0] == pytest.approx(expected)


def test_calibration_is_measured_on_images_weighted_to_the_prior():
    labels = np.array([0, 0, 0, 1, 2, 2])
    weights = prior_weights(labels, np.random.default_rng(0).uniform(1, 2, (6, 5)), np.array([0.5, 0.2, 0.2, 0.1]))
    sums = [weights[labels == c].sum(axis=0) for c in range(3)]
    np.testing.assert_allclose(sums, np.repeat(np.array([[5], [2], [2]]) / 9, 5, axis=1))  # class 3 has no image


def test_the_balanced_and_the_training_posterior_follow_from_each_other_by_bayes():
    """Known truth: two Gaussians a class; the exact posteriors under both priors, computed from the densities."""
    rng = np.random.default_rng(0)
    x, centres = rng.normal(size=(50, 2)), rng.normal(size=(7, 2))
    log_density = -((x[:, None] - centres) ** 2).sum(axis=2) / 2
    prior = HAM_COUNTS / HAM_COUNTS.sum()
    for estimated, raw in (("balanced", log_density), ("training", log_density + np.log(prior))):
        for wanted, truth in (("balanced", np.ones(7) / 7), ("training", prior)):
            posterior = np.exp(log_density) * truth
            posterior /= posterior.sum(axis=1, keepdims=True)
            moved = at_prior(raw, estimated=estimated, wanted=wanted, training_prior=HAM_COUNTS)
            np.testing.assert_allclose(softmax(moved), posterior)


def test_a_model_that_knows_the_truth_is_calibrated_for_each_prior_and_only_for_the_named_one():
    rng = np.random.default_rng(1)
    prior = HAM_COUNTS / HAM_COUNTS.sum()
    labels = rng.choice(7, 20_000, p=prior)
    centres = rng.normal(size=(7, 3)) * 0.6
    x = centres[labels] + rng.normal(size=(labels.size, 3))
    balanced = -((x[:, None] - centres) ** 2).sum(axis=2) / 2  # the log posterior for equally likely classes
    errors = {
        (said, asked): run(balanced, labels, None, prior=asked, logits_prior=said, training_prior=prior, resamples=2)[
            "expected_calibration_error"
        ]["value"]
        for said in ("balanced", "training")
        for asked in ("balanced", "training")
    }
    assert errors["balanced", "training"] < 0.012 and errors["balanced", "balanced"] < 0.03
    assert errors["training", "training"] > 0.05 and errors["training", "balanced"] > 0.05


def test_temperature_undoes_a_known_scaling_and_leaves_the_calls():
    rng = np.random.default_rng(2)
    true = rng.normal(size=(6000, 7)) * 2
    labels = np.array([rng.choice(7, p=p) for p in softmax(true)])
    flat = np.ones(7) / 7
    fitted = fit_temperature(true * 3, labels, np.bincount(labels) / labels.size)
    assert fitted.temperature == pytest.approx(3, rel=0.05) and not fitted.at_limit
    assert fitted.loss_after < fitted.loss_before
    assert fit_temperature(true * 3, true.argmax(axis=1), flat).at_limit  # always right: no temperature is cold enough
    result = run(
        true * 3, labels, None, training_prior=np.ones(7), val_logits=true[:3000] * 3, val_labels=labels[:3000]
    )
    after = result["temperature_scaling"]["expected_calibration_error"]["value"]
    assert after < 0.03 < 0.1 < result["expected_calibration_error"]["value"]
    assert [b["images"] for b in result["reliability"]] != [
        b["images"] for b in result["temperature_scaling"]["reliability"]
    ]


def test_intervals_hold_their_value_and_the_json_has_no_nan():
    logits, labels, lesions = draw(seed=11)
    result = run(logits, labels, lesions, resamples=400, val_logits=logits, val_labels=labels)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    for name in {*SCALARS, "malignant_auc", "melanoma_sensitivity_at_90_specificity"} - {"expected_calibration_error"}:
        cell = result[name]
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1, name
        assert cell["low"] < cell["high"], name
    row = flatten(result)
    assert row["recall_mel"] == result["per_class"]["mel"]["recall"]["value"]
    assert row["balanced_accuracy_low"] == result["balanced_accuracy"]["low"]
    assert row["expected_calibration_error_scaled"] is not None
    assert 0 < result["calibration_error_of_chance"] < 0.2
    again = run(logits, labels, lesions, resamples=400, val_logits=logits, val_labels=labels)
    assert again == result and result["resampled"] == "lesion"
    alone = run(logits, labels, None)
    assert alone["resampled"] == "image" and alone["lesions"] is None


def test_absent_classes_are_named_and_left_out_of_the_means():
    logits, labels, lesions = draw(seed=13)
    keep = ~np.isin(labels, [MEL, 6])
    logits, labels = logits[keep], labels[keep]
    result = run(logits, labels, lesions[keep])
    assert result["absent_classes"] == ["mel", "vasc"]
    undefined = {"value": None, "low": None, "high": None}
    assert result["melanoma_sensitivity_at_90_specificity"] == undefined
    assert result["per_class"]["mel"]["recall"] == result["per_class"]["mel"]["auc"] == undefined
    assert result["confusion_matrix"]["rates"][MEL] is None
    json.dumps(result, allow_nan=False)


def test_one_class_alone_and_a_class_never_called_give_null_not_nan():
    logits, labels, lesions = draw(seed=17)
    one = labels == 5
    result = run(logits[one], labels[one], lesions[one])
    assert result["macro_auc"]["value"] is None and result["malignant_auc"]["value"] is None
    assert result["accuracy"]["value"] is not None
    logits[:, 3] = -50
    never = run(logits, labels, lesions)["per_class"]["df"]
    assert never["precision"]["value"] is None
    assert never["recall"]["value"] == never["f1"]["value"] == 0


def test_a_class_without_training_images_gets_probability_zero_under_both_priors():
    logits, labels, lesions = draw(seed=19)
    counts = HAM_COUNTS.copy()
    counts[3] = 0
    for prior in ("balanced", "training"):
        moved = at_prior(logits, estimated="training", wanted=prior, training_prior=counts)
        assert (softmax(moved)[:, 3] == 0).all()
        assert class_prior(prior, counts)[3] == 0
        json.dumps(run(logits, labels, lesions, prior=prior, training_prior=counts), allow_nan=False)


def calibrated(seed, images=400):
    """Logits and labels of a model that is right as often as it says: its calibration error is bias alone."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(images, 7))
    labels = np.array([rng.choice(7, p=p) for p in softmax(logits)])
    return logits, labels


def own_prior(labels):
    return {
        "prior": "training", "logits_prior": "training", "training_prior": np.bincount(labels, minlength=7),
        "resamples": 200,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_calibration_error_holds_it_before_and_after_scaling(seed):
    """Resamples add the error's bias once more, and mirrored about the value they end below it."""
    logits, labels = calibrated(seed)
    result = run(logits, labels, None, **own_prior(labels), val_logits=logits, val_labels=labels)
    for part in (result, result["temperature_scaling"]):
        cell = part["expected_calibration_error"]
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1


def few_lesions(right, lesions=12, views=2):
    """A test set of two views of each of so many df lesions and 100 nv images; (N,) whether each df image is right."""
    labels = np.concatenate([np.full(lesions * views, DF), np.full(100, NV)])
    called = np.concatenate([np.where(right, DF, NV), np.full(100, NV)])
    names = [f"a{i // views}" for i in range(lesions * views)] + [f"b{i}" for i in range(100)]
    return run(6.0 * np.eye(7)[called], labels, names, training_prior=np.ones(7), resamples=200)


def test_none_of_twelve_lesions_right_does_not_mean_that_none_ever_is():
    result = few_lesions(np.zeros(24, dtype=bool))
    df = result["per_class"]["df"]
    assert df["recall"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 12))}
    assert df["recall"]["high"] == pytest.approx(0.265, abs=1e-3)
    assert df["precision"] == {"value": None, "low": None, "high": None}
    # A precision that is unknown may be 1: F1 = 2r / (1 + r).
    high = df["recall"]["high"]
    assert df["f1"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(2 * high / (1 + high))}
    matrix = result["confusion_matrix"]
    assert matrix["low"][DF][NV] == pytest.approx(1 - high) and matrix["high"][DF][NV] == 1.0
    assert matrix["high"][DF][DF] == pytest.approx(high) and matrix["low"][MEL] is None
    assert matrix["high"][NV][DF] == pytest.approx(1 - 0.025 ** (1 / 100))


def test_all_of_twelve_lesions_right_does_not_mean_that_all_ever_are():
    result = few_lesions(np.ones(24, dtype=bool))
    df, nv = result["per_class"]["df"], result["per_class"]["nv"]
    low = 0.025 ** (1 / 12)
    for name in ("recall", "precision", "f1"):  # twelve lesions are of the class, and twelve are called so
        assert df[name] == {"value": 1.0, "low": pytest.approx(low), "high": 1.0}, name
    assert nv["recall"]["low"] == pytest.approx(0.025 ** (1 / 100))
    assert result["malignant_specificity"] == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 112)), "high": 1.0}


def test_the_sensitivity_of_a_model_that_misses_every_melanoma_has_an_upper_end():
    labels = np.concatenate([np.full(15, MEL), np.full(5, BCC), np.full(60, NV)])
    logits = 6.0 * np.eye(7)[np.full(labels.size, NV)]
    logits[labels == NV, MEL] = 1.0  # nevi look more like melanoma than melanoma does
    result = run(logits, labels, None, **own_prior(labels))
    for name, lesions in (
        ("melanoma_sensitivity_at_90_specificity", 15),
        ("malignant_sensitivity_at_90_specificity", 20),
        ("malignant_sensitivity", 20),
    ):
        assert result[name] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / lesions))}, name


def test_where_resamples_differ_the_interval_is_theirs():
    right = np.repeat(np.arange(12) < 5, 2)
    cell = few_lesions(right)["per_class"]["df"]["recall"]
    low, high = exact_interval(5 / 12, 12)
    assert cell["value"] == pytest.approx(5 / 12) and cell["low"] != pytest.approx(float(low))
    assert 0 < cell["low"] < 5 / 12 < cell["high"] < 1 and cell["high"] != pytest.approx(float(high))


@pytest.mark.parametrize("recall", [0.02, 0.1, 0.5, 0.9])
def test_the_recall_of_a_rare_class_holds_the_truth(recall):
    """Intervals of no width where none or all are right would hold it in 21 to 90 %."""
    assert simulate.recall_of_few(recall, 12, 200, resamples=100) >= 0.93


def test_train_val_and_double_samples_are_refused():
    logits, labels, lesions = draw(seed=31)
    n = labels.size
    mixed = np.array(["test"] * n, dtype=object)
    mixed[5] = "train"
    for split in (mixed, ["val"] * n):
        with pytest.raises(DataError, match="not of the 'test' split"):
            run(logits, labels, lesions, split=split)
    with pytest.raises(DataError, match="first ISIC_0: each may be counted only once"):
        run(logits, labels, lesions, image_id=[f"ISIC_{i}" for i in range(n - 1)] + ["ISIC_0"])
    with pytest.raises(DataError, match="is empty"):
        check_test([])


def test_wrong_arrays_are_refused_with_what_is_wrong():
    logits, labels, lesions = draw(seed=37)
    broken = logits.copy()
    broken[4, 2] = np.nan
    for changed, text in (
        ({"logits": broken}, "first row 4"),
        ({"logits": logits[:, :5]}, "shape"),
        ({"labels": np.where(labels == 6, 7, labels)}, "0 to 7"),
        ({"lesions": lesions[:-1]}, "lesion ids have shape"),
        ({"training_prior": np.zeros(7)}, "not a distribution"),
    ):
        arguments = {"logits": logits, "labels": labels, "lesions": lesions} | changed
        with pytest.raises(DataError, match=text):
            run(**arguments)
    with pytest.raises(UsageError, match="'flat' is unknown: use one of balanced, training"):
        run(logits, labels, lesions, prior="flat")


def test_a_thousand_resamples_of_all_metrics_are_quick():
    """Required: under 2 s for the 2,000 images of a test split, and far quicker than scikit-learn one by one.

    Processor time, the shortest of three.
    """
    logits, labels, lesions = draw(1500, seed=41, prior=HAM_COUNTS / HAM_COUNTS.sum())
    assert labels.size > 1900
    scores = Scores(logits, labels, **PRIORS)
    weights = next(LesionBootstrap(labels, lesions, resamples=100, seed=0).weights())

    def shortest(work):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return min(seconds)

    whole = {"resamples": 1000, "val_logits": logits[:1000], "val_labels": labels[:1000]}
    assert shortest(lambda: run(logits, labels, lesions, **whole)) < 2
    one_by_one = shortest(lambda: [scores.values(w) for w in weights.T[:10]])
    assert shortest(lambda: scores.measure(weights)) < one_by_one, "ten times as many resamples in less time"
