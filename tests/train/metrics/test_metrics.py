"""Metrics against scikit-learn, on plain and weighted images, and what may not be measured."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from shards.common.errors import DataError, UsageError
from shards.format import CLASSES
from train.metrics.bootstrap import LesionBootstrap, lesion_codes, refuse_unfit
from train.metrics.calibration import at_prior, class_prior, fit_temperature, softmax
from train.metrics.summary import SCALARS, balanced_accuracy, evaluate, flatten, prepare, replicate

HAM_COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])
MEL = CLASSES.index("mel")
MALIGNANT = sorted(CLASSES.index(name) for name in ("mel", "bcc", "akiec"))


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
    options = {"prior": "balanced", "logits_prior": "balanced", "training_prior": HAM_COUNTS, "resamples": 50}
    return evaluate(logits, labels, lesions, **({"split": ["test"] * len(labels)} | options | changed))


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
    precision, recall, f1, images = sk.precision_recall_fscore_support(labels, called)
    for c, name in enumerate(CLASSES):
        mine = result["per_class"][name]
        values = [mine[key]["value"] for key in ("precision", "recall", "f1")]
        np.testing.assert_allclose(values, [precision[c], recall[c], f1[c]])
        assert mine["images"] == images[c]
        assert mine["auc"]["value"] == pytest.approx(sk.roc_auc_score(labels == c, probabilities[:, c]))
    assert result["confusion_matrix"]["counts"] == sk.confusion_matrix(labels, called).tolist()
    np.testing.assert_allclose(
        result["confusion_matrix"]["rates"], sk.confusion_matrix(labels, called, normalize="true")
    )
    sick, danger = np.isin(labels, MALIGNANT), probabilities[:, MALIGNANT].sum(axis=1)
    assert result["malignant_auc"]["value"] == pytest.approx(sk.roc_auc_score(sick, danger))
    assert result["malignant_sensitivity"]["value"] == pytest.approx((danger[sick] >= 0.5).mean())
    assert result["malignant_specificity"]["value"] == pytest.approx((danger[~sick] < 0.5).mean())


@pytest.mark.parametrize("decimals", [None, 0, 1])
def test_every_weighting_equals_scikit_learn(decimals):
    """Resamples are weights; scikit-learn takes the same weights. Rounded logits make ties."""
    logits, labels, lesions = draw(decimals=decimals, seed=3)
    scores = prepare(logits, labels, prior="balanced", logits_prior="balanced", training_prior=HAM_COUNTS)
    bootstrap = LesionBootstrap(labels, lesions, resamples=6, seed=1)
    (found,) = replicate([scores], bootstrap)
    weights = np.concatenate(list(bootstrap.weights()), axis=1)
    assert weights.shape == (labels.size, 7) and (weights[:, 0] == 1).all()
    probabilities, called = softmax(logits), logits.argmax(axis=1)
    sick = np.isin(labels, MALIGNANT)
    for r in range(weights.shape[1]):
        w = weights[:, r]
        matrix = sk.confusion_matrix(labels, called, sample_weight=w)
        np.testing.assert_allclose(found["confusion"][r], matrix)
        pairs = {
            "accuracy": sk.accuracy_score(labels, called, sample_weight=w),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, called, sample_weight=w),
            "macro_f1": sk.f1_score(labels, called, average="macro", sample_weight=w),
            "macro_auc": np.mean(
                [sk.roc_auc_score(labels == c, probabilities[:, c], sample_weight=w) for c in range(7)]
            ),
            "malignant_auc": sk.roc_auc_score(sick, probabilities[:, MALIGNANT].sum(axis=1), sample_weight=w),
        }
        for name, truth, score in (
            ("melanoma", labels == MEL, probabilities[:, MEL]),
            ("malignant", sick, probabilities[:, MALIGNANT].sum(axis=1)),
        ):
            fpr, tpr, _ = sk.roc_curve(truth, score, sample_weight=w, drop_intermediate=False)
            pairs[f"{name}_sensitivity_at_90_specificity"] = tpr[fpr <= 0.1 + 1e-9].max()
        for name, value in pairs.items():
            assert found[name][r] == pytest.approx(value, abs=1e-9), (name, r)


def test_calibration_error_equals_a_plain_loop_over_repeated_images():
    logits, labels, lesions = draw(seed=5)
    result = run(logits, labels, lesions, prior="training", logits_prior="training")
    probabilities, prior = softmax(logits), HAM_COUNTS / HAM_COUNTS.sum()
    weight = prior[labels] / np.bincount(labels)[labels]
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            share = weight[inside].sum()
            gap = np.average(correct[inside], weights=weight[inside]) - np.average(
                confidence[inside], weights=weight[inside]
            )
            error += share * abs(gap)
            assert result["reliability"][b]["share"] == pytest.approx(share)
        assert result["reliability"][b]["images"] == inside.sum()
    assert result["expected_calibration_error"]["value"] == pytest.approx(error)


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


def test_the_quick_balanced_accuracy_is_the_same_number():
    logits, labels, lesions = draw(seed=7)
    quick = balanced_accuracy(logits, labels)
    assert quick == pytest.approx(run(logits, labels, lesions)["balanced_accuracy"]["value"])
    with pytest.raises(DataError, match="empty"):
        balanced_accuracy(np.zeros((0, 7)), [])


def test_intervals_hold_their_value_and_the_json_has_no_nan():
    logits, labels, lesions = draw(seed=11)
    result = run(logits, labels, lesions, resamples=400, val_logits=logits, val_labels=labels)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    for name in set(SCALARS) - {"expected_calibration_error"}:
        cell = result[name]
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1, name
        assert cell["low"] < cell["high"], name
    row = flatten(result)
    assert row["recall_mel"] == result["per_class"]["mel"]["recall"]["value"]
    assert row["balanced_accuracy_low"] == result["balanced_accuracy"]["low"]
    assert row["expected_calibration_error_scaled"] is not None
    assert 0 < result["calibration_error_of_chance"] < 0.2
    assert run(logits, labels, lesions, resamples=400, val_logits=logits, val_labels=labels) == result


def test_absent_classes_are_named_and_left_out_of_the_means():
    logits, labels, lesions = draw(seed=13)
    keep = ~np.isin(labels, [MEL, 6])
    logits, labels, lesions = logits[keep], labels[keep], lesions[keep]
    result = run(logits, labels, lesions)
    assert result["absent_classes"] == ["mel", "vasc"]
    called = logits.argmax(axis=1)
    present = sorted(set(labels.tolist()))
    assert result["balanced_accuracy"]["value"] == pytest.approx(
        np.mean(sk.recall_score(labels, called, labels=present, average=None))
    )
    assert result["macro_f1"]["value"] == pytest.approx(sk.f1_score(labels, called, labels=present, average="macro"))
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


def test_without_lesions_images_are_resampled_and_the_result_says_so():
    logits, labels, lesions = draw(seed=23)
    result = run(logits, labels, None)
    assert result["resampled"] == "image" and result["lesions"] is None
    assert run(logits, labels, lesions)["resampled"] == "lesion"


def test_resamples_draw_one_lesion_less_than_there_are_of_each_class_and_keep_views_together():
    _, labels, lesions = draw(seed=29)
    codes = lesion_codes(lesions, labels)
    bootstrap = LesionBootstrap(labels, lesions, resamples=300, seed=0)
    weights = np.concatenate(list(bootstrap.weights()), axis=1)[:, 1:]
    assert weights.shape[1] == 300
    first = np.unique(codes, return_index=True)[1]
    np.testing.assert_array_equal(weights, weights[first][codes])
    for c in range(7):
        rows = first[labels[first] == c]
        n = rows.size
        draws = weights[rows] * (n - 1) / n
        np.testing.assert_allclose(draws, draws.round(), atol=1e-9)
        np.testing.assert_allclose(draws.sum(axis=0), n - 1)
        np.testing.assert_allclose(weights[rows].mean(), 1)


def test_a_class_of_one_lesion_is_named_and_not_resampled():
    labels = np.array([0, 0, 0, 1, 1])
    bootstrap = LesionBootstrap(labels, ["a", "b", "c", "d", "d"], resamples=20, seed=0)
    weights = np.concatenate(list(bootstrap.weights()), axis=1)
    assert bootstrap.single == [1] and (weights[3:] == 1).all() and not (weights[:3] == 1).all()


def test_null_lesion_ids_are_lesions_of_their_own():
    labels = np.array([0, 0, 0, 0, 1])
    assert len(set(lesion_codes([None, float("nan"), "x", "x", ""], labels).tolist())) == 4
    with pytest.raises(DataError, match="lesion x has images of two classes"):
        lesion_codes(["a", "b", "c", "x", "x"], labels)


def test_padded_train_and_double_samples_are_refused():
    logits, labels, lesions = draw(seed=31)
    n = labels.size
    split = np.array(["test"] * n, dtype=object)
    mixed = split.copy()
    mixed[5] = "train"
    with pytest.raises(DataError, match="not of the 'test' split"):
        run(logits, labels, lesions, split=mixed)
    with pytest.raises(DataError, match="not of the 'test' split"):
        run(logits, labels, lesions, split=["val"] * n)
    mask = np.ones(n, dtype=bool)
    mask[-3:] = False
    with pytest.raises(DataError, match=f"3 of {n} samples are padding"):
        run(logits, labels, lesions, mask=mask)
    ids = [f"ISIC_{i}" for i in range(n - 1)] + ["ISIC_0"]
    with pytest.raises(DataError, match="first ISIC_0: each may be counted only once"):
        run(logits, labels, lesions, image_id=ids)
    with pytest.raises(DataError, match="is empty"):
        refuse_unfit([])
    refuse_unfit(split, mask=np.ones(n, dtype=bool), image_id=[str(i) for i in range(n)])
    assert run(logits, labels, lesions, split=["val"] * n, wanted_split="val")["split"] == "val"


def test_wrong_arrays_are_refused_with_what_is_wrong():
    logits, labels, lesions = draw(seed=37)
    broken = logits.copy()
    broken[4, 2] = np.nan
    for changed, text in (
        ({"logits": broken}, "first row 4"),
        ({"logits": logits[:, :5]}, "shape"),
        ({"labels": np.where(labels == 6, 7, labels)}, "0 to 7"),
        ({"lesions": lesions[:-1]}, "lesion ids have shape"),
        ({"training_prior": np.zeros(7)}, "no distribution"),
    ):
        arguments = {"logits": logits, "labels": labels, "lesions": lesions} | changed
        with pytest.raises(DataError, match=text):
            run(**arguments)
    with pytest.raises(UsageError, match="'flat' is unknown: use one of balanced, training"):
        run(logits, labels, lesions, prior="flat")


def test_a_thousand_resamples_of_all_metrics_are_quick():
    """Required: under 2 s for the 2,000 images of a test split; processor time, the shortest of three."""
    logits, labels, lesions = draw(1500, seed=41, prior=HAM_COUNTS / HAM_COUNTS.sum())
    assert labels.size > 1900
    seconds = []
    for _ in range(3):
        start = time.process_time()
        run(logits, labels, lesions, resamples=1000, val_logits=logits[:1000], val_labels=labels[:1000])
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2, seconds
