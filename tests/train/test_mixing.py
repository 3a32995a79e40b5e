"""Random erasing, MixUp and CutMix: against a loop over pixels, their distributions, and what they do not depend on."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shards.common.errors import UsageError
from train import mixing
from train.config import Config, check_batch, resolved
from train.distributed import World
from train.loss import Loss
from train.mixing import Mixing, drawn

BOTH = resolved(Config(model="x", batch_size=8, seed=3, erasing=0.5, mixup=0.4, cutmix=1.0), "batchnorm")
KINDS = {
    "erasing": replace(BOTH, mixup=0.0, cutmix=0.0),
    "mixup": replace(BOTH, erasing=0.0, cutmix=0.0),
    "cutmix": replace(BOTH, erasing=0.0, mixup=0.0),
    "all": BOTH,
}
COUNTS = [30, 40, 100, 10, 90, 600, 20]


def pixels(count: int, px: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, px, px, generator=generator).contiguous(memory_format=torch.channels_last)


def by_hand(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Box by box, on the host."""
    x = x.copy()
    for one, (top, left, height, width) in zip(x, table[:, :4].astype(int), strict=True):
        one[:, top : top + height, left : left + width] = 0
    out = x.copy()
    for i, row in enumerate(table[:, 4:] if table.shape[1] > 4 else ()):
        box = np.s_[:, int(row[0]) : int(row[0] + row[2]), int(row[1]) : int(row[1] + row[3])]
        out[i][box] = (1 - row[4]) * x[i][box] + row[4] * x[i ^ 1][box]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_does_what_the_table_says(kind: str) -> None:
    x, table = pixels(40, 17), drawn(KINDS[kind], 2, 40, 17)
    found = mixing.apply(x, torch.from_numpy(table))
    np.testing.assert_allclose(found.numpy(), by_hand(x.numpy(), table), rtol=0, atol=1e-6)
    assert not torch.equal(found, x)


def test_boxes_lie_within_and_have_the_shares_that_were_asked_for() -> None:
    for px in (1, 7, 64):
        table = drawn(KINDS["all"], 0, 4000, px)
        for box in (table[:, :4], table[:, 4:8]):
            assert box.min() >= 0
            assert (box[:, :2] + box[:, 2:]).max() <= px
            assert np.array_equal(box, np.rint(box))
    erased = drawn(KINDS["erasing"], 0, 4000, 64)
    assert erased.shape == (4000, 4)
    area = erased[:, 2] * erased[:, 3] / 64**2
    assert (area > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert area.max() < 0.36
    assert area[area > 0].min() > 0.01
    assert area[area > 0].mean() == pytest.approx(0.18, abs=0.02)  # half way between 2 % and a third


@pytest.mark.parametrize(("kind", "alpha"), [("mixup", 0.4), ("cutmix", 1.0)])
def test_labels_have_the_share_of_the_pixels_and_shares_their_distribution(kind: str, alpha: float) -> None:
    table = drawn(KINDS[kind], 0, 8000, 64)
    assert np.array_equal(table[::2, 4:], table[1::2, 4:])  # the two of a pair
    share = table[:, 8] * table[:, 6] * table[:, 7] / 64**2
    np.testing.assert_allclose(1 - table[:, 9], share, rtol=0, atol=1e-6)
    if kind == "mixup":
        expected, at = np.random.default_rng(0).beta(alpha, alpha, 4000), np.linspace(0.1, 0.9, 9)
        np.testing.assert_allclose(np.quantile(table[::2, 9], at), np.quantile(expected, at), rtol=0, atol=0.05)
    else:  # boxes are cut off at the border, so that less is mixed in than Beta(1, 1) says
        assert 0.1 < share.mean() < 0.5
        assert set(table[:, 8]) == {1.0}


def test_each_pair_has_mixup_or_cutmix() -> None:
    table = drawn(KINDS["all"], 0, 8000, 64)
    whole = (table[:, 6] == 64) & (table[:, 7] == 64)
    assert whole.mean() == pytest.approx(0.5, abs=0.03)


def test_it_depends_on_seed_epoch_and_position_alone() -> None:
    one = drawn(BOTH, 1, 64, 32)
    assert np.array_equal(one[:24], drawn(replace(BOTH, batch_size=12, epochs=3), 1, 24, 32))
    for other in (drawn(BOTH, 2, 64, 32), drawn(replace(BOTH, seed=4), 1, 64, 32)):
        assert not np.array_equal(one, other)
    for a, b in pairwise((one[:, :4] > 0).any(1).reshape(8, 8)):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_share_the_global_batch_of_one(ranks: int) -> None:
    """Steps in any order, as after a resume: steps 5 and 9 are of the second epoch and of the third."""
    parts = [Mixing(BOTH, 4, World(rank, ranks)) for rank in range(ranks)]
    for step, px in ((9, 32), (5, 32), (5, 48), (0, 32)):
        whole = drawn(BOTH, step // 4, 32, px)[step % 4 * 8 :][:8]
        for part in parts:
            part.seek(step, px)
        found = torch.cat([part.batch(8 // ranks) for part in parts])
        assert np.array_equal(found.numpy(), whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["plain", "logit-adjusted", "class-weighted"])
def test_the_loss_of_mixed_labels_is_that_of_a_soft_target(kind: str, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 7, generator=generator), torch.arange(12) * 5 % 7
    own = torch.rand(6, generator=generator).repeat_interleave(2)
    target = own[:, None] * F.one_hot(labels, 7) + (1 - own)[:, None] * F.one_hot(labels[torch.arange(12) ^ 1], 7)
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    shift = (counts / counts.sum()).log() if kind == "logit-adjusted" else 0
    weights = counts.sum() / (7 * counts) if kind == "class-weighted" else torch.ones(7)
    soft = (1 - smoothing) * target + smoothing / 7
    total, weight = Loss(kind, COUNTS, torch.device("cpu"), smoothing)(logits, labels, own)
    torch.testing.assert_close(total, -(soft * weights * (logits + shift).log_softmax(1)).sum())
    assert (weight is None) == (kind != "class-weighted")
    if weight is not None:
        torch.testing.assert_close(weight, (target * weights).sum())


def test_a_batch_that_cannot_be_mixed_in_pairs_is_refused() -> None:
    for batch_size, processes, words in ((7, 1, "a multiple of 2$"), (6, 2, "a multiple of 4, twice the number")):
        with pytest.raises(UsageError, match=words):
            check_batch(replace(BOTH, batch_size=batch_size), "batchnorm", processes)
        check_batch(replace(KINDS["erasing"], batch_size=batch_size), "batchnorm", processes)
    check_batch(replace(BOTH, batch_size=8), "batchnorm", 2)
