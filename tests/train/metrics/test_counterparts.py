"""The classes that a network and another set both have, and probabilities over them."""

import numpy as np
import pytest

from shards.common.errors import DataError
from shards.format import HAM10000, Classes
from shards.labelmap import LabelMap, read_map
from train.metrics.counterparts import as_logits, find_counterparts, labels_of

PAD = Classes(("ACK", "BCC", "MEL", "NEV", "SCC", "SEK"))


def test_a_set_with_some_of_the_classes():
    images = {0: 3, 1: 2, 2: 4, 3: 5, 4: 7, 5: 0}
    found = find_counterparts(HAM10000, PAD, images, read_map("pad-ufes-20-ham10000"))
    assert found.classes.names == ("akiec", "bcc", "mel", "nv")  # SEK has a counterpart and no image
    assert found.run_only == ("bkl", "df", "vasc") and found.set_only == ("SCC",)
    assert found.classes.sets == {"melanoma": ("mel",), "malignant": ("akiec", "bcc", "mel")}
    assert labels_of(found, np.array([3, 4, 0, 2])).tolist() == [3, -1, 0, 2]
    of_run = np.array([[0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.0], [0, 0, 1, 0, 0, 0, 0]])
    np.testing.assert_allclose(found.probabilities(of_run), [[0.25] * 4, [0.25] * 4])
    assert found.called_outside(of_run) == 1.0
    assert np.isfinite(as_logits(np.eye(3))).all()


def test_a_network_of_seven_classes_on_a_set_of_two():
    two = Classes(("malignant", "benign"))
    found = find_counterparts(HAM10000, two, {0: 1, 1: 1}, None, read_map("ham10000-malignant"))
    assert found.classes.names == ("benign", "malignant") and found.classes.sets == {"malignant": ("malignant",)}
    assert found.of_set == {0: 1, 1: 0} and found.run_only == found.set_only == ()
    shares = np.random.default_rng(0).dirichlet(np.ones(7), 20)
    expected = shares[:, [0, 1, 4]].sum(axis=1)
    np.testing.assert_allclose(found.probabilities(shares), np.column_stack([1 - expected, expected]))


def test_equal_names_need_no_map_in_any_case():
    found = find_counterparts(HAM10000, Classes(("NV", "Mel", "other")), {0: 1, 1: 1, 2: 1})
    assert found.classes.names == ("mel", "nv") and found.set_only == ("other",)
    with pytest.raises(DataError, match="have nv in common, and two are needed; say with --map"):
        find_counterparts(HAM10000, Classes(("NV", "other")), {0: 1, 1: 1})
    with pytest.raises(DataError, match="have none in common"):
        find_counterparts(HAM10000, PAD, {0: 1, 1: 1}, LabelMap("mine", {"ACK": "x", "BCC": ""}))
