"""Settings, their defaults and limits, the schedules, and the loss against torch's own."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shards.common.errors import DataError, UsageError
from train.config import (
    RECIPES,
    Config,
    differences,
    learning_rate,
    pixel_share,
    read_config,
    resolution_of,
    resolved,
)
from train.loss import Loss


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0.0}, "fraction 0.0"),
        ({"fraction": 1.5}, "outside"),
        ({"fraction": float("nan")}, "outside"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"loss": "focal"}, "logit-adjusted"),
        ({"precision": "fp8"}, "bf16"),
        ({"compile": "yes"}, "auto, on, off"),
        ({"engine": "pil"}, "native"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"pretrained": True, "weights": "w.pt"}, "exclude"),
        ({"start_resolution": 100}, "steps of 32"),
        ({"start_resolution": 256}, "steps of 32"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Config(model="resnet18", **changes)


def test_recipes_by_family_and_what_is_given_stays() -> None:
    conv, vit = (resolved(Config(model="x", batch_size=128), family) for family in ("batchnorm", "layernorm"))
    assert (conv.optimizer, vit.optimizer) == ("sgd-nesterov", "adamw")
    assert conv.lr == pytest.approx(2 * RECIPES["batchnorm"].lr)
    assert vit.lr == pytest.approx(2**0.5 * RECIPES["layernorm"].lr)
    given = resolved(Config(model="x", lr=0.0, weight_decay=0.0, warmup=0.0), "batchnorm")
    assert (given.lr, given.weight_decay, given.warmup) == (0.0, 0.0, 0.0)
    finetuned = resolved(Config(model="x", pretrained=True), "layernorm")
    assert finetuned.lr == pytest.approx(0.1 * RECIPES["layernorm"].lr)


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    config = resolved(Config(model="vit_b16", ema=0.99, start_resolution=96), "layernorm")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert read_config(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_config(tmp_path / "config.json")


def test_differences_name_what_would_change_the_weights() -> None:
    a = Config(model="resnet18")
    assert differences(a, Config(model="resnet18", data="elsewhere", checkpoint_s=1.0, eval_epochs=9)) == []
    assert differences(a, Config(model="resnet18", epochs=3)) == ["epochs: 30, now 3"]


def test_learning_rate_warms_up_and_falls_to_almost_nothing() -> None:
    config = resolved(Config(model="x", lr=1.0, warmup=0.1), "batchnorm")
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(config, 0, 1) == 1.0  # a run too short for a warm-up


@pytest.mark.parametrize(("epochs", "start", "px"), [(16, 128, 224), (30, 96, 224), (4, 32, 64), (1, 192, 224)])
def test_the_ramp_rises_by_32_and_ends_at_full_size(epochs: int, start: int, px: int) -> None:
    config = Config(model="x", resolution=px, start_resolution=start)
    sizes = [resolution_of(config, epoch, epochs) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert all((px - size) % 32 == 0 and start <= size <= px for size in sizes)
    assert set(sizes[int(0.75 * epochs) :]) == {px}
    if epochs >= 16:
        assert sizes[0] == start
        assert set(sizes) == set(range(start, px + 1, 32))


def test_without_a_ramp_the_size_is_constant() -> None:
    assert {resolution_of(Config(model="x", resolution=100), epoch, 9) for epoch in range(9)} == {100}


def test_a_ramp_trains_at_a_share_of_the_pixels() -> None:
    assert pixel_share(Config(model="x", resolution=96), 7) == 1
    ramp = Config(model="x", resolution=96, start_resolution=32)  # 3 epochs at 32 px, 3 at 64, 2 at 96
    assert pixel_share(ramp, 8) == pytest.approx((3 * 1 + 3 * 4 + 2 * 9) / 9 / 8)


# ------------------------------------------------------------------ loss

COUNTS = [30, 40, 100, 10, 90, 600, 20]


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 7, generator=generator), torch.arange(12) % 7


def mean(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total, weight = loss(logits, labels)
    return total / (len(labels) if weight is None else weight)


def test_the_three_losses_against_their_definitions() -> None:
    logits, labels = example()
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    cpu = torch.device("cpu")
    torch.testing.assert_close(mean(Loss("plain", COUNTS, cpu), logits, labels), F.cross_entropy(logits, labels))
    adjusted = -((logits + prior.log()).softmax(1)[range(12), labels]).log().mean()
    torch.testing.assert_close(mean(Loss("logit-adjusted", COUNTS, cpu), logits, labels), adjusted)
    weighted = F.cross_entropy(logits, labels, weight=1 / prior)
    torch.testing.assert_close(mean(Loss("class-weighted", COUNTS, cpu), logits, labels), weighted)


@pytest.mark.parametrize("kind", ["plain", "logit-adjusted", "class-weighted"])
def test_uneven_parts_add_up_to_the_whole(kind: str) -> None:
    logits, labels = example()
    loss = Loss(kind, COUNTS, torch.device("cpu"))
    parts = [loss(logits[a:b], labels[a:b]) for a, b in ((0, 1), (1, 5), (5, 12))]
    weights = [weight for _, weight in parts if weight is not None]
    total = torch.stack([part for part, _ in parts]).sum() / (torch.stack(weights).sum() if weights else len(labels))
    torch.testing.assert_close(total, mean(loss, logits, labels))


@pytest.mark.parametrize("kind", ["plain", "logit-adjusted", "class-weighted"])
def test_a_class_without_images_does_no_harm(kind: str) -> None:
    logits, labels = example()
    logits.requires_grad_()
    value = mean(Loss(kind, [*COUNTS[:6], 0], torch.device("cpu")), logits[:6], labels[:6])
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
