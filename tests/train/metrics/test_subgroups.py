"""Scores by subgroup: which images are in which, scores against scikit-learn, and how often a difference is found."""

import numpy as np
import pytest
from sklearn import metrics as sk
from statsmodels.stats.multitest import multipletests

from shards.format import HAM10000, Classes
from train.metrics.bootstrap import LesionBootstrap
from train.metrics.subgroups import FEWEST, compared, find_column, groups_of, holm, measure_groups

THREE = Classes(("a", "b", "c"), {}, {"bad": ("c",)})
PRIORS = {"prior": "balanced", "logits_prior": "balanced", "training_prior": np.ones(3)}


def made(lesions=120, seed=0, gap=0.0):
    """Logits, labels, lesions and sexes; the logits of women have a higher signal by `gap`."""
    rng = np.random.default_rng(seed)
    of_lesion, woman = rng.integers(3, size=lesions), rng.random(lesions) < 0.5
    views = rng.integers(1, 3, lesions)
    labels, ids, women = (np.repeat(one, views) for one in (of_lesion, np.arange(lesions), woman))
    logits = rng.normal(size=(labels.size, 3))
    logits[np.arange(labels.size), labels] += 1 + gap * women
    return logits, labels, ids.astype(str), np.where(women, "female", "male")


def measured(logits, labels, lesions, values, **more):
    options = {"classes": THREE, "resamples": 200} | PRIORS | more
    return measure_groups(logits, labels, lesions, groups_of("sex", values), **options)


def test_columns_are_found_by_what_people_call_them():
    columns = ["image_id", "age_approx", "Sex", "anatom_site_general", "skin_tone_class", "dataset", "site"]
    asked = {
        "age": "age_approx",
        "sex": "Sex",
        "site": "site",
        "skin_tone": "skin_tone_class",
        "attribution": "dataset",
    }
    assert {word: find_column(word, columns) for word in asked} == asked
    assert find_column("site", columns[:-1]) == "anatom_site_general" and find_column("hair", columns) is None


@pytest.mark.parametrize(
    ("column", "values", "edges", "names"),
    [
        (
            "age",
            [20.0, 30, 49, 50, None, 85, 33, 34, 35, 36, 37, 38, 39],
            (),
            "under 30|30 to under 50|50 to under 70|70 and more",
        ),
        ("age", ["20", "41.5", "unknown", "80.0", ""], (40.0,), "under 40|40 and more"),
        ("tone", [3.0, 1.0, 3.0, None], (), "1|3"),
        ("sex", ["male", "female", "unknown", None, " NaN"], (), "female|male"),
        ("smoke", [True, False, None], (), "False|True"),
        ("mm", list(range(100)), (), "under 24.8|24.8 to under 49.5|49.5 to under 74.2|74.2 and more"),
        (
            "id",
            [f"v{n:02d}" for n in range(25)] + ["v03"],
            (),
            "|".join([f"v{n:02d}" for n in range(20)] + ["5 others"]),
        ),
        ("none", [None, "", "nan"], (), ""),
    ],
)
def test_values_become_groups(column, values, edges, names):
    found = groups_of(column, values, edges)
    assert "|".join(found.names) == names
    known = [str(v).strip().lower() not in ("", "none", "nan", "unknown") for v in values]
    assert ((found.codes >= 0) == known).all() and set(found.codes) - {-1} == set(range(len(found.names)))


def test_the_scores_of_a_group_are_those_of_its_images_alone():
    logits, labels, lesions, sex = made()
    found = measured(logits, labels, lesions, sex)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    values = []
    for group in found["groups"]:
        mine = sex == group["value"]
        assert group["images"] == mine.sum() and group["lesions"] == len(set(lesions[mine]))
        called = logits[mine].argmax(axis=1)
        assert group["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(labels[mine], called))
        assert group["macro_auc"]["value"] == pytest.approx(
            sk.roc_auc_score(labels[mine], shares[mine], multi_class="ovr")
        )
        assert group["bad_auc"]["value"] == pytest.approx(sk.roc_auc_score(labels[mine] == 2, shares[mine, 2]))
        assert group["bad_auc"]["low"] < group["bad_auc"]["value"] < group["bad_auc"]["high"]
        values.append(group)
    for key in compared(THREE):
        one, two = (group["against_others"][key] for group in values)
        assert one["value"] == pytest.approx(values[0][key]["value"] - values[1][key]["value"])
        assert (two["value"], two["low"], two["high"], two["p"]) == (-one["value"], -one["high"], -one["low"], one["p"])


def test_a_class_counts_where_both_sides_have_enough_lesions():
    logits, labels, lesions, sex = made(300)
    rare = (labels == 1) & (sex == "male")
    keep = ~rare | np.isin(lesions, np.unique(lesions[rare])[: FEWEST - 1])
    found = measured(logits[keep], labels[keep], lesions[keep], sex[keep])
    by = {group["value"]: group for group in found["groups"]}
    assert by["female"]["classes"] == ["a", "b", "c"] and by["male"]["classes"] == ["a", "c"]
    gap = by["female"]["against_others"]["balanced_accuracy"]
    assert gap["classes"] == ["a", "c"]
    sides = []
    for name in ("female", "male"):
        part = keep & (sex == name) & (labels != 1)
        right = logits[part].argmax(axis=1) == labels[part]
        sides.append(np.mean([right[labels[part] == c].mean() for c in (0, 2)]))
    assert gap["value"] == pytest.approx(sides[0] - sides[1])
    few = measured(logits[:9], labels[:9], lesions[:9], sex[:9])["groups"][0]
    assert few["balanced_accuracy"]["value"] is None and "not 5 lesions" in few["against_others"]["macro_auc"]["reason"]


def test_subgroups_keep_their_size_in_every_resample():
    _, labels, lesions, sex = made()
    codes = (sex == "male").astype(np.int64)
    bootstrap = LesionBootstrap(labels, lesions, resamples=50, seed=0, within=codes)
    weights = np.concatenate(list(bootstrap.weights()), axis=1)
    first = np.unique(lesions, return_index=True)[1]  # one image of each lesion
    for c in range(3):
        for code in (0, 1):
            rows = first[(labels[first] == c) & (codes[first] == code)]
            np.testing.assert_allclose(weights[rows].sum(axis=0), rows.size)


def test_one_lesion_on_both_sides_is_drawn_once():
    """Two views of every lesion, one in each group, with equal answers: the difference is 0 in every resample."""
    logits, labels, _, _ = made(60)
    twice = np.repeat(np.arange(labels.size), 2)
    side = np.tile(["clinical", "dermoscopic"], labels.size)
    gap = measured(logits[twice], labels[twice], twice.astype(str), side)["groups"][0]["against_others"]
    assert gap["balanced_accuracy"] | {"classes": None} == {"value": 0, "low": 0, "high": 0, "p": 1.0, "classes": None}


def test_p_values_are_corrected_for_all_tests_of_a_score_and_a_mirror_image_is_no_test():
    cells = [{"value": 0.1, "p": p} for p in (0.01, 0.02, 0.03)]
    mirror = {"value": -0.1, "p": 0.01, "mirror": True}
    columns = [
        {"groups": [{"against_others": {"x": cells[0]}}, {"against_others": {"x": mirror}}]},
        {"groups": [{"against_others": {"x": one}} for one in (cells[1], {"reason": "few"}, cells[2])]},
    ]
    holm(columns, ["x", "y"])
    expected = multipletests([0.01, 0.02, 0.03], method="holm")[1]
    assert [cell["p_holm"] for cell in cells] == pytest.approx(expected)
    assert mirror["p_holm"] == cells[0]["p_holm"]


@pytest.mark.slow
def test_equal_groups_differ_in_one_of_twenty_sets_and_different_ones_in_most():
    for gap, low, high in ((0.0, 0.01, 0.10), (1.5, 0.8, 1.0)):
        found = []
        for seed in range(150):
            logits, labels, lesions, sex = made(200, seed=seed, gap=gap)
            groups = measured(logits, labels, lesions, sex)["groups"]
            found.append([groups[0]["against_others"][key]["p"] < 0.05 for key in compared(THREE)])
        share = np.mean(found, axis=0)
        assert (low <= share).all() and (share <= high).all(), share


def test_ham10000s_sets_are_compared():
    assert compared(HAM10000) == ("balanced_accuracy", "macro_auc", "melanoma_auc", "malignant_auc")
