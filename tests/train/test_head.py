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


def test_identity_only_normalises() -> None:
    images, _ = batch()
    out = InputHead(MEAN, STD)(images, torch.eye(3, 4).repeat(len(images), 1, 1))
    expected = (images.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def test_channels_last_in_and_out() -> None:
    images, colour = batch()
    assert images.is_contiguous(memory_format=torch.channels_last)
    out = InputHead(MEAN, STD)(images, colour)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


def test_layout_does_not_change_values() -> None:
    images, colour = batch()
    head = InputHead(MEAN, STD)
    assert torch.equal(head(images, colour), head(images.contiguous(), colour))


def test_stays_in_float32_under_autocast() -> None:
    images, colour = batch()
    head = InputHead(MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(images, colour), head.float()(images, colour))
        assert head(images, colour).dtype == torch.float32


def test_is_no_part_of_the_weights() -> None:
    assert list(InputHead(MEAN, STD).state_dict()) == []


@pytest.mark.parametrize("std", [(0.1, 0.0, 0.1), (0.1, 0.1), (-0.1, 0.1, 0.1)])
def test_refuses_a_deviation_that_is_none(std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        InputHead(MEAN, std)
