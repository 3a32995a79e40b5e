"""Explanations: bright where the evidence for the class lies, for every kind of network."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from shards.common.errors import UsageError
from train import models
from train.inference.explain import Explainer, overlay
from train.inference.predictor import Prepared
from train.inference.resnet import ResNet as OwnResNet


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def explainer(body: nn.Module, resolution: int) -> Explainer:
    """An explainer of a body that takes pixels from 0 to 1."""
    stand_in = SimpleNamespace(
        net=SimpleNamespace(body=body.eval()),
        about=SimpleNamespace(resolution=resolution),
        device=torch.device("cpu"),
        inputs=lambda squares: pixels(squares),
    )
    return Explainer(stand_in)  # pyright: ignore[reportArgumentType]


def pixels(squares: np.ndarray) -> Tensor:
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------ exact maps


class ResNet(nn.Module):
    """Class 0 is the mean of red, class 1 that of blue, over a grid of 32 px. Its name is that of timm's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.AvgPool2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))[:, [0, 2]]


class Sums(ResNet):
    """The same in a class of which nothing is known."""


def red_and_blue(side: int) -> np.ndarray:
    """Image 0 is red in cell (1, 5) of 8 × 8, image 1 is blue in cell (6, 2). Both are black elsewhere."""
    squares, cell = np.zeros((2, side, side, 3), np.uint8), side // 8
    squares[0, cell : 2 * cell, 5 * cell : 6 * cell, 0] = 255
    squares[1, 6 * cell : 7 * cell, 2 * cell : 3 * cell, 2] = 200
    return squares


def test_grad_cam_is_bright_in_the_cells_of_the_evidence_alone():
    network = explainer(ResNet(), 128)
    expected = np.zeros((2, 4, 4), np.float32)
    expected[0, 0, 2] = expected[1, 3, 1] = 1
    assert network.method == "Grad-CAM"
    np.testing.assert_allclose(network.maps(red_and_blue(128), np.array([0, 1])), expected, atol=1e-6)


@pytest.mark.parametrize("side", [32, 64])
def test_occlusion_is_the_mean_fall_of_the_logit_over_the_squares_that_cover_a_cell(side):
    network = explainer(Sums(), side)
    assert network.method == "occlusion"
    squares, cell = red_and_blue(side), side // 8
    for image, (square, channel) in enumerate([(squares[0], 0), (squares[1], 2)]):
        value = square[..., channel] / 255.0
        falls = [[[] for _ in range(8)] for _ in range(8)]
        for y in range(7):
            for x in range(7):
                covered = value.copy()
                covered[y * cell : (y + 2) * cell, x * cell : (x + 2) * cell] = value.mean()
                for row, column in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
                    falls[row][column].append(value.mean() - covered.mean())
        expected = np.maximum([[np.mean(cells) for cells in row] for row in falls], 0)
        found = network.maps(squares, np.array([0, 1]))[image]
        np.testing.assert_allclose(found, expected / expected.max(), atol=1e-4)


def test_occlusion_takes_49_forward_passes_for_an_image_in_batches():
    batches: list[int] = []

    class Counting(Sums):
        def forward(self, x: Tensor) -> Tensor:
            batches.append(len(x))
            return super().forward(x)

    explainer(Counting(), 64).maps(np.zeros((3, 64, 64, 3), np.uint8), np.zeros(3, int))
    assert sum(batches) <= 3 * (49 + 1) and max(batches) <= 32


def test_any_size_can_be_explained():
    for side in (1, 5, 30, 100):
        found = explainer(Sums() if side > 31 else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), side).maps(
            np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8), np.array([0])
        )
        assert found.shape == (1, min(side, 8), min(side, 8)) and np.isfinite(found).all()


@pytest.mark.parametrize(("kind", "side"), [(ResNet, 128), (Sums, 32)])
def test_no_evidence_is_an_empty_map(kind, side):
    assert not explainer(kind(), side).maps(np.zeros((1, side, side, 3), np.uint8), np.array([0])).any()


# ------------------------------------------------------------------ networks of timm


def planted(side: int, cells: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Two plain grey images, the same with a bright patch of a cell, and the patch's row and column in cells."""
    plain = np.full((2, side, side, 3), 120, np.uint8)
    with_patch, places, cell = plain.copy(), {8: [(2, 5), (5, 3)], 4: [(0, 2), (3, 1)]}[cells], side // cells
    for image, (row, column) in zip(with_patch, places, strict=True):
        image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = (255, 255, 0)
    return plain, with_patch, places


@torch.no_grad()
def depend_on_the_patch(body: Any, plain: Tensor, with_patch: Tensor) -> None:
    """Give class c the direction in which the patch of image c moves the input of the last layer.

    Batch norm gets the statistics of the images first: with none, a deep network's signal fades out.
    """
    norms = [layer for layer in body.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = None
    body(torch.cat([plain, with_patch, torch.rand(4, *plain.shape[1:])]))
    body.eval()
    heads = body.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):  # a distilled network has two
        layer = [part for part in head.modules() if isinstance(part, (nn.Linear, nn.Conv2d))][-1]
        seen: list[Tensor] = []
        with layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[1][0])):
            body(with_patch)
            body(plain)
        layer.weight.copy_((seen[0] - seen[1]).reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.zero_()


def check_points_at_the_patch(body: Any, px: int, method: str) -> None:
    plain, with_patch, places = planted(px, 4 if method == "Grad-CAM" else 8)
    depend_on_the_patch(body, pixels(plain), pixels(with_patch))
    network = explainer(body, px)
    assert network.method == method
    for found, place in zip(network.maps(with_patch, np.array([0, 1])), places, strict=True):
        assert np.unravel_index(found.argmax(), found.shape) == place


@pytest.mark.parametrize(
    ("name", "px", "method", "arguments"),
    [
        ("test_resnet", 128, "Grad-CAM", {}),
        ("resnet18", 128, "Grad-CAM", {}),
        ("test_efficientnet", 64, "occlusion", {}),
        ("test_resnet", 64, "occlusion", {}),
        ("test_convnext", 64, "occlusion", {}),
        ("test_vit", 64, "occlusion", {"img_size": 64}),
        ("gmlp_ti16_224", 64, "occlusion", {"img_size": 64}),
        ("deit_tiny_distilled_patch16_224", 64, "occlusion", {"img_size": 64, "depth": 2}),
        ("beit_base_patch16_224", 64, "occlusion", {"img_size": 64, "depth": 1}),
        ("eva02_tiny_patch14_224", 56, "occlusion", {"img_size": 56, "depth": 2}),
        ("vit_tiny_patch16_dinov3_qkvb", 64, "occlusion", {"img_size": 64, "depth": 2}),
        ("levit_128s", 64, "occlusion", {"img_size": 64}),
        ("xcit_nano_12_p8_224", 64, "occlusion", {"img_size": 64, "depth": 2}),
        ("hiera_tiny_224", 64, "occlusion", {"img_size": 64, "stages": (1, 1, 2, 1), "embed_dim": 32}),
        ("cait_xxs24_224", 64, "occlusion", {"img_size": 64, "depth": 2}),
        ("hrnet_w18_small", 64, "occlusion", {}),
    ],
)
def test_a_map_points_at_the_patch_on_which_the_class_depends(name, px, method, arguments):
    torch.manual_seed(0)
    check_points_at_the_patch(timm.create_model(name, num_classes=2, **arguments), px, method)


FAMILIES = [
    "test_byobnet",
    "beit_base_patch16_224",
    "poolformerv2_s12",
    "cait_xxs24_224",
    "coat_tiny",
    "test_coatnet",
    "convit_tiny",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "test_nfnet",
    "dpn48b",
    "ese_vovnet19b_slim_dw",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "lcnet_035",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pnasnet5large",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "samvit_base_patch16_224",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
]
"""A small model of each file of timm.models, without those that are too large or slow (deepseek_vit, gemma4_vit,
halonet, vgg) and without convmixer: untrained, it reacts to any change as strongly as to the patch."""


LARGER = {"inception_v4": 128, "regnetx_002": 128, "res2next50": 96}
"""Untrained, these lose a patch of 8 px in layers of few places."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_map_of_each_family_of_timm_points_at_the_patch(name):
    for px in (LARGER[name],) if name in LARGER else (64, 96, 128, 224, 240):
        try:
            models.check_resolution(name, px)
            break
        except UsageError:
            continue
    torch.manual_seed(0)
    body = models.build(name, px, 2, (0.5,) * 3, (0.2,) * 3).body
    check_points_at_the_patch(body, px, "occlusion")


def test_the_own_resnets_are_explained_as_timms():
    assert explainer(OwnResNet("resnet18", 7), 128).method == "Grad-CAM"


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
