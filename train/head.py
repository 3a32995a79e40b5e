"""The input head: the model's first layer, which turns the engines' bytes into normalised floats."""

import torch
from torch import Tensor, nn

from train import mixing


class InputHead(nn.Module):
    """uint8 pixels and a colour map per image → floats of mean 0 and deviation 1 per channel.

    Division by 255, the colour matrix (for values of 0 to 1) and the normalisation are all affine. Together they are
    one 3×4 map per image: A = M / (255·std), b = (m − mean) / std for the colour map (M | m). Nothing is clamped.
    `torch.compile` fuses it with the cast into one pass over the pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """mean, std: RGB, of pixels from 0 to 1. Raises ValueError if std is not positive."""
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
            raise ValueError(f"mean {mean} and std {std} must be three numbers each, std positive")
        # not in the state dict: model files hold the network alone, and keep mean and std in their metadata
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.memory_format = torch.channels_last

    def forward(self, images: Tensor, colour: Tensor, mix: Tensor | None = None) -> Tensor:
        """images (N, 3, H, W) uint8, 0–255; colour (N, 3, 4) float32 → (N, 3, H, W) float32 in `memory_format`.

        mix: erases and mixes, as `train.mixing.drawn` says; the images are square then.
        """
        scale = colour[:, :, :3] / (255.0 * self.std)[:, None]
        shift = ((colour[:, :, 3] - self.mean) / self.std)[:, :, None, None]
        pixels = images.float()
        out = shift
        for channel in range(3):
            # elementwise, because TF32 and autocast would make a matrix product less precise
            out = torch.addcmul(out, pixels[:, channel, None], scale[:, :, channel, None, None])
        if mix is not None:
            out = mixing.apply(out, mix)
        return out.contiguous(memory_format=self.memory_format)
