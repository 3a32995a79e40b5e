"""The input head against the same arithmetic written out in float64, and its layout and precision."""

import numpy as np
import pytest
import torch

from train.head import InputHead

MEAN, STD = (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)


def batch(count: int = 3, px: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, px, px + 2, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(rng.normal(0, 1, (count, 3, 4)).astype(np.float32))


def by_hand(images: torch.Tensor, colour: torch.Tensor) -> np.ndarray:
    """Divide by 255, apply the colour map, subtract the mean, divide by the deviation: (N, 3, H, W) float64."""
    unit = images.numpy().astype(np.float64) / 255
    matrix = colour.numpy().astype(np.float64)
    mapped = np.einsum("ncd,ndhw->nchw", matrix[:, :, :3], unit) + matrix[:, :, 3, None, None]
    return (mapped - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


def test_one_affine_map_equals_the_three_steps() -> None:
    images, colour = batch()
    out = InputHead(MEAN, STD)(images, colour)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), by_hand(images, colour), rtol=0, atol=2e-5)


def test_channels_last_in_and_out_and_the_same_values_from_another_layout() -> None:
    images, colour = batch()
    head = InputHead(MEAN, STD)
    out = head(images, colour)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    assert torch.equal(out, head(images.contiguous(), colour))


def test_stays_in_float32_under_autocast() -> None:
    images, colour = batch()
    head = InputHead(MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(images, colour)
    assert out.dtype == torch.float32
    assert torch.equal(out, head(images, colour))


def test_has_no_weights() -> None:
    assert list(InputHead(MEAN, STD).state_dict()) == []


@pytest.mark.parametrize("std", [(0.1, 0.0, 0.1), (0.1, 0.1), (-0.1, 0.1, 0.1)])
def test_refuses_a_deviation_that_is_none(std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        InputHead(MEAN, std)
