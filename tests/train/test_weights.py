"""Weights that other people have: any usual wrapper and prefix is taken off, and what does not fit is named."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils.checkpoint_saver import CheckpointSaver
from torch import Tensor

from shards.common.errors import DataError
from tests.support.train_runs import small
from train import models
from train.loop import train_once
from train.models import Classifier
from train.weights import Weights, load_fitting

MEAN, STD = (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)


def build(name: str = "test_resnet", px: int = 32, **more: Any) -> Classifier:
    """Random weights, other ones each time."""
    return models.build(name, px, 7, MEAN, STD, **more)


def assert_same(net: Classifier, state: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """The network has these tensors, and others in the layers of `but`."""
    own = net.body.state_dict()
    different = {name for name in own if name not in state or not torch.equal(own[name], state[name])}
    assert different == {name for name in own if name.rpartition(".")[0] in but}


# ------------------------------------------------------------------ names and keys


@pytest.mark.parametrize(
    ("key", "stack"),
    [
        ("", "module."),
        ("", "_orig_mod.module."),
        ("state_dict", "module._orig_mod."),
        ("model", "model.net.backbone."),
        ("model_state_dict", ""),
        ("model_ema", "module.module."),
        ("net", "student.backbone."),
        ("teacher", "teacher.module."),
    ],
)
def test_prefixes_in_any_stack_under_any_usual_key(tmp_path: Path, key: str, stack: str) -> None:
    state = build().body.state_dict()
    named = {stack + name: value for name, value in state.items()}
    torch.save({key: named, "epoch": 3, "optimizer": {"state": {}}} if key else named, tmp_path / "w.pt")
    assert_same(build(weights=tmp_path / "w.pt"), state)


def test_a_checkpoint_of_timms_train_script(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=1000)
    args = argparse.Namespace(model="test_resnet", lr=0.1, opt="adamw", output=tmp_path, extra=SimpleNamespace(a=1))
    optimizer = torch.optim.AdamW(source.parameters())
    CheckpointSaver(source, optimizer, args, checkpoint_dir=str(tmp_path)).save_checkpoint(3, metric=np.float64(71.5))
    found = build(weights=tmp_path / "last.pth.tar")
    assert_same(found, dict(source.state_dict()), but=("fc",))
    assert "the layer fc is new, the file has fc.bias of 1000" in found.decisions["weights"].reason


def test_what_stands_beside_the_network_is_left_out_and_said(tmp_path: Path) -> None:
    state = build().body.state_dict()
    other = build().body.state_dict()
    beside = {"criterion.weight": torch.ones(7), "n_averaged": torch.tensor(3)}
    named = {f"teacher.{name}": value for name, value in state.items()}
    named |= {f"student.{name}": value for name, value in other.items()} | beside
    torch.save({"state_dict": named, "hyper_parameters": {"lr": 0.1}}, tmp_path / "lightning.ckpt")
    found = build(weights=tmp_path / "lightning.ckpt")
    assert_same(found, state)
    assert found.decisions["weights"].reason == f"{len(other) + 2} tensors beside the network left out"


def test_batch_norm_without_its_counter(tmp_path: Path) -> None:
    state = {k: v for k, v in build().body.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    net = build(weights=tmp_path / "w.pt")
    counters = {k: torch.tensor(0) for k in net.body.state_dict() if k.endswith("num_batches_tracked")}
    assert counters
    assert_same(net, state | counters)


# ------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("name", "px", "layers"),
    [
        ("resnet18", 32, ("fc",)),
        ("vit_small_patch16_dinov3", 32, ("head",)),
        ("deit_tiny_distilled_patch16_224", 32, ("head", "head_dist")),
        ("levit_128s", 224, ("head.bn", "head.linear", "head_dist.bn", "head_dist.linear")),
    ],
)
def test_a_backbone_begins_with_a_new_head_and_says_so(
    tmp_path: Path, name: str, px: int, layers: tuple[str, ...]
) -> None:
    state = build(name, px).body.state_dict()
    backbone = {key: value for key, value in state.items() if key.rpartition(".")[0] not in layers}
    assert len(backbone) < len(state)
    torch.save({"teacher": {f"backbone.{key}": value for key, value in backbone.items()}}, tmp_path / "w.pt")
    net = build(name, px, weights=tmp_path / "w.pt")
    new = {key for key, value in net.body.state_dict().items() if key not in backbone}
    assert new == state.keys() - backbone.keys()
    assert all(torch.equal(net.body.state_dict()[key], value) for key, value in backbone.items())
    for layer in layers:
        assert f"the layer {layer} is new, the file has none" in net.decisions["weights"].reason


def test_both_heads_of_a_distilled_deit_for_other_classes_are_new(tmp_path: Path) -> None:
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=1000, img_size=32).state_dict()
    torch.save({"model": source}, tmp_path / "w.pth")
    net = build("deit_tiny_distilled_patch16_224", weights=tmp_path / "w.pth")
    assert_same(net, source, but=("head", "head_dist"))
    assert net.decisions["weights"].reason.count("is new") == 2


def test_a_head_of_other_layers_is_replaced(tmp_path: Path) -> None:
    """As in `model.fc = nn.Sequential(nn.Dropout(), nn.Linear(64, 7))`."""
    state = build().body.state_dict()
    torch.save({name.replace("fc.", "fc.1."): value for name, value in state.items()}, tmp_path / "w.pt")
    net = build(weights=tmp_path / "w.pt")
    assert_same(net, state, but=("fc",))
    assert "the layer fc is new, the file has fc.1.bias of 7" in net.decisions["weights"].reason


def test_torchvisions_names_of_a_densenet(tmp_path: Path) -> None:
    import torchvision

    source = torchvision.models.densenet121(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert "is new" in build("densenet121", 32, weights=tmp_path / "w.pth").decisions["weights"].reason


# ------------------------------------------------------------------ what does not fit


def test_weights_of_another_model_are_one_line_with_names_of_both_sides(tmp_path: Path) -> None:
    torch.save({"module." + k: v for k, v in build("test_vit").body.state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="another model or size") as error:
        build(weights=tmp_path / "w.pt")
    text = str(error.value)
    assert "only the network has conv1.0.weight, conv1.1.weight, conv1.1.bias and " in text
    assert "only the file has cls_token, pos_embed, patch_embed.proj.weight and " in text
    assert "\n" not in text and str(tmp_path / "w.pt") in text


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    state = build().body.state_dict() | {"conv1.0.weight": torch.zeros(9, 3, 3, 3)}
    with pytest.raises(DataError, match=r"conv1\.0\.weight is 9×3×3×3 in the file and .* in the network"):
        load_fitting(build().body, Weights("w.pt", state))


def test_log_and_record_say_what_a_run_starts_from(tiny_shards: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in build().body.state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pt")
    train_once(small(tiny_shards, epochs=1, weights=str(tmp_path / "backbone.pt")), tmp_path / "run")
    expected = {"value": str(tmp_path / "backbone.pt"), "reason": "the layer fc is new, the file has none"}
    for name in ("environment", "result"):
        record = json.loads((tmp_path / "run" / f"{name}.json").read_text())
        assert record["decisions"]["weights"] == expected
    assert f"weights: {expected['value']} ({expected['reason']})" in (tmp_path / "run" / "log.txt").read_text()
