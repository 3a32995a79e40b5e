"""Settings, the options made of them, their limits, the recipes, and the schedules."""

import json
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from shards import Augment, order
from shards.common.errors import DataError, UsageError
from train import grid, leakage, run
from train.config import (
    ADDED,
    RECIPES,
    SAMPLERS,
    Config,
    differences,
    learning_rate,
    pixel_share,
    read_config,
    resolution_of,
    resolved,
)
from train.prepare import augment_of


def test_the_options_of_commands_are_the_fields_of_config() -> None:
    known = {field.name: field for field in fields(Config)}
    typed = run.main.make_context("train.run", ["--model", "x"]).params
    assert set(known) - set(typed) == {"steps"}
    assert set(typed) - set(known) == {"out", "resume"}
    own = {name: value for name, value in typed.items() if name in known}
    assert Config(**own) == Config(model="x")
    for command in (grid.main, leakage.main):  # these vary or set the others themselves
        shared = {option.name for option in command.params} & set(known) - {"model"}
        assert set(own) - shared == {"model", "fraction", "seed", "subset_seed", "sync_batch_norm"}
    some = {"epochs": 3, "lr": 0.25, "ema": 0.5, "weights": "w.pt", "start_resolution": 96}
    arguments = [part for name, value in some.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--pretrained", "--no-symmetries"]
    typed = run.main.make_context("train.run", ["--model", "x", *flags, *arguments]).params
    for name, value in (some | {"pretrained": True, "symmetries": False}).items():
        assert typed[name] == value
        assert type(typed[name]) in (known[name].type, *get_args(known[name].type))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0.0}, "fraction 0.0"),
        ({"fraction": 1.5}, "outside"),
        ({"fraction": float("nan")}, "outside"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"threads": 0}, "--threads 0 is under 1"),
        ({"loss": "hinge"}, "logit-adjusted, class-weighted, plain, focal"),
        ({"precision": "fp8"}, "bf16"),
        ({"compile": "yes"}, "auto, on, off"),
        ({"engine": "pil"}, "native"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"optimizer": "lion"}, "sgd-nesterov, adamw, muon"),
        ({"schedule": "step"}, "cosine, linear, constant"),
        ({"tta": "five-crop"}, "none, flips, symmetries"),
        ({"warmup": 1.5}, "--warmup 1.5 is outside 0 to 1"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0"),
        ({"crop_scale": 0.0}, "--crop-scale 0.0 is outside 0.01 to 1"),
        ({"crop_scale": float("nan")}, "--crop-scale nan"),
        ({"crop_ratio": 0.75}, "--crop-ratio 0.75 is outside 1 to 4"),
        ({"colour_jitter": 1.0}, "--colour-jitter 1.0"),
        ({"erasing": 1.5}, "--erasing 1.5 is outside 0 to 1"),
        ({"mixup": -0.1}, "--mixup -0.1"),
        ({"drop_path": 1.0}, "--drop-path 1.0"),
        ({"layer_decay": 0.0}, "--layer-decay 0.0 is outside 0.01 to 1"),
        ({"sampler": "rare"}, "uniform, balanced, weighted:COLUMN"),
        ({"sampler": "weighted:age", "loss": "focal"}, "--sampler weighted:age needs --loss logit-adjusted or class-w"),
        ({"eval_crop": 1.5}, "--eval-crop 1.5"),
        ({"pretrained": True, "weights": "w.pt"}, "exclude"),
        ({"start_resolution": 0}, "outside 1 to 224"),
        ({"start_resolution": 256}, "outside 1 to 224"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Config(model="resnet18", **changes)


def test_the_loader_knows_the_samplers_of_the_options() -> None:
    assert SAMPLERS == order.SAMPLERS


def test_recipes_by_family_and_what_is_given_stays() -> None:
    conv, vit = (resolved(Config(model="x", batch_size=128), family) for family in ("batchnorm", "layernorm"))
    assert (conv.optimizer, vit.optimizer) == ("sgd-nesterov", "adamw")
    assert conv.lr == pytest.approx(2 * RECIPES["batchnorm"].lr)
    assert vit.lr == pytest.approx(2**0.5 * RECIPES["layernorm"].lr)
    given = resolved(Config(model="x", lr=0.0, weight_decay=0.0, warmup=0.0), "batchnorm")
    assert (given.lr, given.weight_decay, given.warmup) == (0.0, 0.0, 0.0)
    finetuned = resolved(Config(model="x", pretrained=True), "layernorm")
    assert finetuned.lr == pytest.approx(0.1 * RECIPES["layernorm"].lr)


@pytest.mark.parametrize("given", [{}, {"lr": 1e-3}, {"weight_decay": 0.05}])
def test_another_optimizer_needs_a_learning_rate_of_its_own(given: dict) -> None:
    with pytest.raises(UsageError, match=r"--optimizer muon: .* for sgd-nesterov; give --lr and --weight-decay too"):
        resolved(Config(model="resnet18", optimizer="muon", **given), "batchnorm")
    found = resolved(Config(model="resnet18", optimizer="muon", lr=1e-3, weight_decay=0.05), "batchnorm")
    assert (found.optimizer, found.lr, found.weight_decay) == ("muon", 1e-3, 0.05)
    assert resolved(Config(model="resnet18", optimizer="sgd-nesterov"), "batchnorm").lr == RECIPES["batchnorm"].lr


def test_configuration_survives_its_file(tmp_path: Path) -> None:
    config = resolved(Config(model="vit_b16", ema=0.99, start_resolution=96), "layernorm")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert read_config(tmp_path / "config.json") == config
    older = {name: value for name, value in config.to_dict().items() if name not in ADDED}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert read_config(tmp_path / "config.json") == replace(config, **ADDED)
    assert augment_of(replace(config, **ADDED), "bilinear") == Augment()  # what these releases trained with
    (tmp_path / "config.json").write_text(json.dumps(older | {"pretrained": True}))
    assert read_config(tmp_path / "config.json").interpolation == "bilinear"  # whatever the weights were trained with
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_config(tmp_path / "config.json")


def test_differences_name_what_would_change_the_weights() -> None:
    a = Config(model="resnet18")
    assert differences(a, Config(model="resnet18", data="elsewhere", checkpoint_s=1.0, eval_epochs=9, threads=1)) == []
    assert differences(a, Config(model="resnet18", epochs=3)) == ["epochs: 30, now 3"]


def test_learning_rate_warms_up_and_falls_to_almost_nothing() -> None:
    config = resolved(Config(model="x", lr=1.0, warmup=0.1), "batchnorm")
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(config, 0, 1) == 1.0  # a run too short for a warm-up


def test_the_other_schedules_fall_in_a_line_and_not_at_all() -> None:
    for schedule, end in (("linear", 1 / 90), ("constant", 1.0)):
        config = resolved(Config(model="x", lr=1.0, warmup=0.1, schedule=schedule), "batchnorm")
        rates = [learning_rate(config, step, 100) for step in range(100)]
        assert rates[:11] == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0])
        assert rates[10:] == pytest.approx([1.0 + (end - 1.0) * k / 89 for k in range(90)])


@pytest.mark.parametrize(
    ("epochs", "start", "px"), [(16, 128, 224), (30, 96, 224), (4, 32, 64), (1, 192, 224), (17, 48, 64), (20, 100, 224)]
)
def test_the_ramp_rises_by_32_and_ends_at_full_size(epochs: int, start: int, px: int) -> None:
    config = Config(model="x", resolution=px, start_resolution=start)
    sizes = [resolution_of(config, epoch, epochs) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert all((size - start) % 32 == 0 or size == px for size in sizes) and start <= sizes[0] and sizes[-1] == px
    assert set(sizes[int(0.75 * epochs) :]) == {px}
    if epochs >= 16:
        assert sizes[0] == start
        assert set(sizes) == {*range(start, px, 32), px}


def test_a_ramp_trains_at_a_share_of_the_pixels() -> None:
    assert pixel_share(Config(model="x", resolution=100), 7) == 1
    ramp = Config(model="x", resolution=96, start_resolution=32)  # 3 epochs at 32 px, 3 at 64, 2 at 96
    assert pixel_share(ramp, 8) == pytest.approx((3 * 1 + 3 * 4 + 2 * 9) / 9 / 8)
