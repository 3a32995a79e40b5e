"""Variance shares against statsmodels and hand-made designs."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from shards.common.errors import DataError
from train.study.variance import SOURCES, Design, variance_shares


def grid(models=3, sizes=4, runs=3, *, noise=0.01, interaction=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        (
            f"m{m}",
            size / sizes,
            100 * 2**size,
            s,
            0.5 + 0.05 * m + 0.1 * size + interaction * m * size + noise * rng.normal(),
        )
        for m in range(models)
        for size in range(1, sizes + 1)
        for s in range(runs)
    ]
    return pd.DataFrame(rows, columns=["model", "fraction", "n_train", "seed", "score"])


@pytest.mark.parametrize("dropped", [[], [0, 5, 7, 20]])
def test_the_vectorised_sums_of_squares_are_statsmodels(dropped):
    table = grid(interaction=0.02, noise=0.05).drop(index=dropped)
    table["size"] = table["fraction"]
    found = anova_lm(ols("score ~ C(model) * C(size)", table).fit(), typ=2)["sum_sq"].to_numpy()
    design = Design(pd.factorize(table["model"])[0], pd.factorize(table["size"])[0], repeated=True)
    np.testing.assert_allclose(design.sums(table["score"].to_numpy()[:, None])[:, 0], found, rtol=1e-9)
    noise = found[3] / design.freedom[3]
    parts = np.append(np.maximum(found[:3] - design.freedom[:3] * noise, 0) / len(table), noise)
    found = variance_shares(table, "score", resamples=10)["shares"]
    np.testing.assert_allclose([found[name]["value"] for name in SOURCES], parts / parts.sum())


def test_shares_sum_to_one_and_name_the_cause():
    found = variance_shares(grid(noise=0.001), "score", resamples=100)["shares"]
    assert sum(found[name]["value"] for name in SOURCES) == pytest.approx(1)
    # Size steps of 0.1 over four, model steps of 0.05 over three: variances 0.0125 and 0.00167.
    assert found["size"]["value"] == pytest.approx(0.0125 / (0.0125 + 0.0025 * 2 / 3), abs=0.003)
    assert found["interaction"]["value"] < 0.001 and found["seed"]["value"] < 0.001
    alone = grid(noise=0.001)
    alone["score"] = np.random.default_rng(1).normal(size=len(alone))
    assert variance_shares(alone, "score", resamples=100)["shares"]["seed"]["value"] > 0.7


def test_without_repeats_the_interaction_is_not_made_up():
    found = variance_shares(grid(runs=1), "score", resamples=50)
    assert found["shares"]["interaction"] == {"value": None, "low": None, "high": None}
    assert any("cannot be separated from the seed" in note for note in found["notes"])
    assert sum(found["shares"][name]["value"] for name in ("model", "size", "seed")) == pytest.approx(1)


def test_gaps_in_the_grid_are_noted():
    table = grid(noise=1e-5)
    table = table[~((table["model"] == "m1") & (table["fraction"] == 0.25))]
    found = variance_shares(table.iloc[:-1], "score", resamples=20)
    notes = found["notes"]
    assert found["shares"]["interaction"]["value"] < 1e-4  # there is none, and the gap does not make one up
    assert any("1 cells of the grid have no run" in note for note in notes)
    assert any("different numbers of runs" in note for note in notes)


def test_runs_that_share_subsets_are_noted_as_counted_independent():
    table = grid(runs=4)
    alone, crossed = (
        variance_shares(table.assign(subset_seed=subset), "score", resamples=50)["notes"]
        for subset in (table["seed"], table["seed"] % 2)
    )
    assert alone == [] and len(crossed) == 1 and "share subset seeds" in crossed[0]


def test_too_little_to_share_out_is_refused():
    with pytest.raises(DataError, match="at least two models and two sizes, and there are 1 and 4"):
        variance_shares(grid(models=1), "score")
    empty = grid()
    empty["score"] = np.nan
    with pytest.raises(DataError, match="there are 0 and 0"):
        variance_shares(empty, "score")
    two = grid(models=2, sizes=2, runs=1)
    with pytest.raises(DataError, match="more runs"):
        variance_shares(two[~((two["model"] == "m1") & (two["fraction"] == 1.0))], "score")


@pytest.mark.parametrize("rounding", [0.0, 1e-14])
def test_equal_scores_are_not_shared_out(rounding):
    table = grid()
    table["score"] = 1 / 7 + rounding * np.arange(len(table))
    with pytest.raises(
        DataError, match=r"all 36 runs have the same score \(0\.143\), so there is nothing to share out"
    ):
        variance_shares(table, "score")
