"""Explanations: bright where the evidence for the class lies, for every kind of network that has places."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from shards.common.errors import UsageError
from train.inference.explain import Explainer, overlay
from train.inference.predictor import Predictor, Prepared


def toy(body: nn.Module, resolution: int = 32) -> Explainer:
    """An explainer of a body that takes pixels as they are."""
    stand_in = SimpleNamespace(
        net=SimpleNamespace(body=body.eval()),
        about=SimpleNamespace(model="toy", resolution=resolution),
        device=torch.device("cpu"),
        inputs=lambda squares: torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255,
    )
    return Explainer(stand_in)  # pyright: ignore[reportArgumentType]


class RedAgainstBlue(nn.Module):
    """Class 0 is the mean of red, class 1 that of blue; features on an 8×8 grid, of channels or of patches."""

    def __init__(self, patches: bool) -> None:
        super().__init__()
        self.patches = patches
        self.pool = nn.AvgPool2d(4)
        if patches:
            self.num_prefix_tokens = 1
            self.blocks = nn.Sequential(nn.Module())
            self.blocks[0].norm1 = nn.Identity()
        else:
            self.feature_info = [{"module": "pool", "reduction": 4}]

    def forward(self, x):
        grid = self.pool(x)
        if not self.patches:
            return grid.mean((2, 3))[:, [0, 2]]
        tokens = torch.cat([torch.zeros(len(x), 1, 3), grid.flatten(2).transpose(1, 2)], dim=1)
        return self.blocks[0].norm1(tokens).mean(1)[:, [0, 2]]


@pytest.mark.parametrize("patches", [False, True])
def test_a_map_is_bright_where_the_evidence_for_the_class_lies(patches):
    squares = np.zeros((2, 32, 32, 3), np.uint8)
    squares[:, 4:8, 20:24, 0] = 255  # red in cell (1, 5)
    squares[:, 24:28, 8:12, 2] = 200  # blue in cell (6, 2)
    maps = toy(RedAgainstBlue(patches)).maps(squares, np.array([0, 1]))
    expected = np.zeros((2, 8, 8), np.float32)
    expected[0, 1, 5] = expected[1, 6, 2] = 1
    np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_no_evidence_is_an_empty_map():
    assert not toy(RedAgainstBlue(False)).maps(np.zeros((1, 32, 32, 3), np.uint8), np.array([0])).any()


@pytest.mark.parametrize(
    "model", ["resnet18", "alexnet", "vit_b16", "mixer_b16", "test_convnext", "swin_tiny_patch4_window7_224"]
)
def test_every_kind_of_network_can_be_explained(model):
    from train import models

    px = {"vit_b16": 32, "mixer_b16": 32, "test_convnext": 160, "swin_tiny_patch4_window7_224": 224}.get(model, 64)
    torch.manual_seed(0)
    net = models.build(model, px, 7, (0.5,) * 3, (0.2,) * 3).eval()
    predictor = Predictor.__new__(Predictor)
    predictor.net, predictor.device = net, torch.device("cpu")
    predictor.about = SimpleNamespace(model=model, resolution=px)  # pyright: ignore[reportAttributeAccessIssue]
    predictor._colour = torch.eye(3, 4)[None]
    squares = np.random.default_rng(0).integers(0, 256, (2, px, px, 3), dtype=np.uint8)
    maps = Explainer(predictor).maps(squares, np.array([1, 4]))
    assert maps.shape[0] == 2 and maps.shape[1] == maps.shape[2] > 1 and np.isfinite(maps).all()
    assert maps.min() >= 0 and maps.max() <= 1
    assert predictor.features(squares).shape[0] == 2 and predictor.features(squares).ndim == 2


def test_a_network_without_places_is_refused_by_name():
    with pytest.raises(UsageError, match="toy has no layer"):
        toy(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))


def test_an_overlay_changes_what_the_model_saw_by_its_evidence_and_darkens_the_rest():
    packed = np.full((30, 40, 3), 100, np.uint8)
    evidence = np.zeros((4, 4), np.float32)
    prepared = Prepared(packed, (5, 10, 20, 20), packed[:16, :16])
    drawn = overlay(prepared, evidence)
    assert (drawn[5:25, 10:30] == 100).all() and (drawn[:5] < 60).all() and (drawn[:, 30:] < 60).all()
    evidence[0, 3] = 1
    drawn = overlay(prepared, evidence).astype(int)
    changed = np.abs(drawn - 100).sum(axis=2)[5:25, 10:30]
    assert changed[2, 17] > 50 and changed[17, 2] == 0
